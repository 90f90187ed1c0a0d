"""Hardware, versions and commit: what a figure needs beside it."""

from __future__ import annotations

import hashlib
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import aksae_kernels as ak

BF16_UNITS = ("avx512_bf16", "amx_bf16")
NO_GPU = "no GPU"
_ROOT = Path(__file__).parent.parent
_SOURCES = (".py", ".h", ".cpp", ".cu", ".cuh")


def describe() -> dict[str, str | int]:
    """Of this machine and process, as it is now."""
    build = torch.__config__.show()
    return {
        "CPU": _cpuinfo("model name") or platform.processor() or "unknown",
        "bf16 units": ", ".join(unit for unit in BF16_UNITS if unit in cpu_flags()) or "none",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "oneDNN": _find(r"MKL-DNN v([\d.]+)", build),
        "MKL": _find(r"Math Kernel Library Version ([\w.-]+)", build),
        "Python": platform.python_version(),
        "commit": commit() or "unknown",
        "backend": ak.explain("topk_encode", torch.empty(1, 1)).splitlines()[1].strip(),
    }


def describe_device(device: torch.device) -> dict[str, str | int | float]:
    """Of a CUDA device, or of the CPU that stands in for one; without the commit."""
    versions = {"torch": torch.__version__, "Triton": _version("triton"), "Python": platform.python_version()}
    if device.type != "cuda":
        return {"device": NO_GPU, **versions}
    properties = torch.cuda.get_device_properties(device)
    driver, clock, power = _nvidia_smi("driver_version", "clocks.max.sm", "power.limit")
    return {
        "device": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "SMs": properties.multi_processor_count,
        "L2 MB": properties.L2_cache_size / 2**20,
        "memory GB": round(properties.total_memory / 2**30, 1),
        "driver": driver,
        "highest clock": clock,
        "power limit": power,
        "CUDA": torch.version.cuda or "none",
        **versions,
    }


def commit() -> str:
    """What git says of the tree, `-dirty` where it has changes; empty where there is no repository."""
    return _output_of("git", "describe", "--always", "--dirty")


def revision() -> str:
    """The commit, with a digest of the sources where they are not what was committed, or there is no repository.

    Changes of other files do not count: results are kept in the repository too.
    """
    known = _output_of("git", "describe", "--always")
    sources = [f"*{suffix}" for suffix in _SOURCES]
    if known and not _output_of("git", "status", "--porcelain", "--", *sources):
        return known
    digest = hashlib.sha256()
    for folder in ("aksae_kernels", "benchmarks", "csrc"):
        for path in sorted((_ROOT / folder).rglob("*")):
            if path.suffix in _SOURCES:
                digest.update(path.read_bytes())
    return f"{known or 'no repository'}+{digest.hexdigest()[:8]}"


def cpu_flags() -> frozenset[str]:
    """The instruction sets that Linux names; empty elsewhere."""
    return frozenset(_cpuinfo("flags").split())


def _cpuinfo(key: str) -> str:
    path = Path("/proc/cpuinfo")
    found = re.search(rf"^{key}\s*: (.*)$", path.read_text(), re.MULTILINE) if path.exists() else None
    return found[1].strip() if found else ""


def _nvidia_smi(*fields: str) -> list[str]:
    """Of the first GPU; "unknown" where the tool is missing or fails."""
    said = _output_of("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader").splitlines()
    return [value.strip() for value in said[0].split(",")] if said else ["unknown"] * len(fields)


def _output_of(*command: str) -> str:
    """What a program prints, run in the root of the repository; empty where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=_ROOT).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _find(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found[1] if found else "none"
