"""Hardware, versions and commit: what a figure needs beside it."""

from __future__ import annotations

import platform
import re
import subprocess
from pathlib import Path

import torch

import aksae_kernels as ak

BF16_UNITS = ("avx512_bf16", "amx_bf16")


def describe() -> dict[str, str | int]:
    """Of this machine and process, as it is now."""
    build = torch.__config__.show()
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return {
        "CPU": _cpuinfo("model name") or platform.processor() or "unknown",
        "bf16 units": ", ".join(unit for unit in BF16_UNITS if unit in cpu_flags()) or "none",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "oneDNN": _find(r"MKL-DNN v([\d.]+)", build),
        "MKL": _find(r"Math Kernel Library Version ([\w.-]+)", build),
        "Python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown",
        "backend": ak.explain("topk_encode", torch.empty(1, 1)).splitlines()[1].strip(),
    }


def cpu_flags() -> frozenset[str]:
    """The instruction sets that Linux names; empty elsewhere."""
    return frozenset(_cpuinfo("flags").split())


def _cpuinfo(key: str) -> str:
    path = Path("/proc/cpuinfo")
    found = re.search(rf"^{key}\s*: (.*)$", path.read_text(), re.MULTILINE) if path.exists() else None
    return found[1].strip() if found else ""


def _find(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found[1] if found else "none"
