"""The correctness checks of the kernels under NVIDIA's compute-sanitizer, each tool in a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from ..report import NotMeasured
from .bench import Bench, Outcome

TOOLS = ("memcheck", "racecheck")
LIMIT_S = 120
_FOUND = 86
_ROOT = Path(__file__).parent.parent.parent


def sanitized(bench: Bench, tool: str, outcome: Outcome) -> None:
    """Out-of-bounds accesses, or races on shared memory, in the bf16 checks of every op."""
    if bench.device.type != "cuda":
        raise NotMeasured("compute-sanitizer watches a GPU")
    binary = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if binary is None:
        raise NotMeasured("compute-sanitizer is not installed")
    for backend in bench.backends:
        with outcome.judging(f"{tool}, {backend}"):
            outcome.facts[backend] = watched(binary, tool, backend, LIMIT_S / len(bench.backends))


def watched(binary: str, tool: str, backend: str, limit_s: float) -> str:
    """The tool's summary. Raises AssertionError where it found something, NotMeasured where the limit was too short.

    Memory is not cached in that process: a read past one tensor must not end in another one.
    """
    command = [binary, "--tool", tool, "--error-exitcode", str(_FOUND), sys.executable]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            [*command, "-m", "benchmarks.gpu.correctness", "--backend", backend],
            capture_output=True,
            text=True,
            env=environment,
            cwd=_ROOT,
            timeout=limit_s,
        )
    except subprocess.TimeoutExpired:
        raise NotMeasured(f"it did not end within {limit_s:.0f} s") from None
    lines = (done.stdout + done.stderr).strip().splitlines() or [f"exit status {done.returncode}"]
    found = next((line for line in lines if "Error" in line or "hazard" in line), lines[-1])
    if done.returncode == _FOUND:
        raise AssertionError(found)
    if done.returncode:
        raise RuntimeError(found)
    return next((line for line in reversed(lines) if "SUMMARY" in line), lines[-1])
