"""The fp32 encode on a CPU without bf16 units, whatever this one has: `AKSAE_CPU_ISA` hides them from our kernels.

The switch is read once per process. So the case runs in a child, which is this module: it prints the samples as JSON.
"""

from __future__ import annotations

import argparse
import json
from typing import NamedTuple

import torch

from . import machine
from .case import OURS, Case
from .child import output_of
from .ops import encode_fp32
from .problem import Problem, Shape
from .report import Row, Target
from .timing import quantiles

TARGET = Target(1.10, 1.03)


class PlainCase(NamedTuple):
    """`topk_encode` with the widest instruction set that has no bf16 units, against the faster fp32 product."""

    what: str
    problem: Problem

    def measure(self, rounds: int) -> list[Row]:
        """Raises AssertionError where the result is wrong, NotMeasured where the child could not run."""
        isa = "avx512" if "avx512f" in machine.cpu_flags() else "avx2"
        # Without its binary the library would quietly run on the reference.
        env = {"AKSAE_CPU_ISA": isa, "AKSAE_BACKEND": "cpu"}
        samples = output_of("isa", *self.problem.shape, self.problem.label, "--rounds", rounds, env=env)
        ours = samples.pop(OURS)
        rival = min(samples, key=lambda name: quantiles(samples[name]).p50)
        return [Row.compare(f"{self.what} ({isa})", rival, self.problem, ours, samples[rival], TARGET)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", type=int, nargs=3, metavar=("B", "D", "F"))
    parser.add_argument("k", help="64, or 20..320")
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    problem = Problem(Shape(*options.shape), options.k)
    _, samples = Case("topk_encode fp32", problem, encode_fp32).samples(options.rounds)
    print(json.dumps(samples))


if __name__ == "__main__":
    main()
