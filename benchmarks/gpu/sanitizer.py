"""Calls of the kernels under NVIDIA's compute-sanitizer, each tool in a process of its own."""

from __future__ import annotations

import shutil
import sys

from ..child import Ended, run_within
from ..report import NotMeasured
from .bench import Bench, Outcome

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
"""What they find: accesses out of bounds, races on shared memory, wrong barriers, reads of memory never written."""
LIMIT_S = 120
FOUND = 86
"""The exit status where the tool has found something."""


def sanitized(bench: Bench, tool: str, outcome: Outcome) -> None:
    """What the tool finds in the bf16 checks of every op."""
    if bench.device.type != "cuda":
        raise NotMeasured("compute-sanitizer watches a GPU")
    limit_s = LIMIT_S / len(bench.backends)
    for backend in bench.backends:
        with outcome.judging(f"{tool}, {backend}"):
            ended = watched(tool, limit_s, "benchmarks.gpu.correctness", "--backend", backend)
            outcome.facts[backend] = verdict(ended)


def watched(tool: str, limit_s: float, module: str, *arguments: str) -> Ended:
    """How `python -m MODULE ARGUMENTS` ends under the tool. Raises NotMeasured where it is not installed.

    Memory is not cached in that process: a read past one tensor must not end in another one.
    """
    binary = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if binary is None:
        raise NotMeasured("compute-sanitizer is not installed")
    command = [binary, "--tool", tool, "--error-exitcode", str(FOUND), sys.executable, "-m", module, *arguments]
    return run_within(limit_s, command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def verdict(ended: Ended) -> str:
    """The tool's summary. Raises AssertionError where it found something, NotMeasured where the limit was too short,
    and RuntimeError where the process failed by itself."""
    lines = ended.output.strip().splitlines() or [f"exit status {ended.status}"]
    if ended.status is None:
        raise NotMeasured(f"it did not end within {ended.seconds:.0f} s")
    if ended.status:
        found = next((line for line in lines if "Error" in line or "hazard" in line), lines[-1])
        raise AssertionError(found) if ended.status == FOUND else RuntimeError(found)
    return next((line for line in reversed(lines) if "SUMMARY" in line), lines[-1])
