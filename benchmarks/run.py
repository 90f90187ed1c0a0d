"""`python -m benchmarks.run`: check each case, time its contenders in turn, print ratios; keep them with `--json`."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch

import aksae_kernels as ak

from .cases import OURS, Shape, cpu_cases
from .timing import interleaved


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", choices=["cpu"], default="cpu")
    parser.add_argument("--shape", type=int, nargs=3, metavar=("B", "D", "F"), default=(1024, 768, 24576))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="also write the rows there")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)

    shape = Shape(*options.shape)
    machine = describe_machine()
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(f"(B, D, F) = ({shape.B}, {shape.D}, {shape.F}), fp32; medians of {options.rounds} interleaved rounds\n")
    print(f"{'case':40s} {'k':>8s} {'ours':>10s}   ratio to")
    rows, failed = [], 0
    for case in cpu_cases(shape):
        try:
            case.check()
        except AssertionError as error:
            failed += 1
            print(f"{case.name:40s} {case.k:>8s}  not timed, its result is wrong: {str(error).splitlines()[0]}")
            continue
        times = interleaved(case.contenders, options.rounds)
        ours = times[OURS].p50
        ratios = {name: ours / other.p50 for name, other in times.items() if name != OURS}
        rows.append(
            {
                "case": case.name,
                "k": case.k,
                "seconds": {name: asdict(time) for name, time in times.items()},
                "ratio_of_medians": ratios,
            }
        )
        said = "; ".join(f"{ratio:.2f} of {name}" for name, ratio in ratios.items())
        print(f"{case.name:40s} {case.k:>8s} {ours * 1e3:7.1f} ms   {said}", flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        result = {"machine": machine, "shape": asdict(shape), "rounds": options.rounds, "rows": rows}
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 1 if failed else 0


def describe_machine() -> dict[str, str | int]:
    """Hardware, versions and commit: what a figure needs beside it."""
    cpu = Path("/proc/cpuinfo")
    names = [line for line in cpu.read_text().splitlines() if line.startswith("model name")] if cpu.exists() else []
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    backend = ak.explain("topk_encode", torch.empty(1, 1)).splitlines()[1].strip()
    return {
        "CPU": names[0].split(":")[1].strip() if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown",
        "backend": backend,
    }


if __name__ == "__main__":
    sys.exit(main())
