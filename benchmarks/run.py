"""`python -m benchmarks.run`: the table of targets. Checks each case, times its contenders in turn, prints the ratios.

A row whose result is wrong is not timed, and makes the exit status 1; a row that misses its target does not.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch

from . import machine, ops, steps
from .case import Case
from .isa import PlainCase
from .memory import MemoryCase
from .problem import KS, Problem, Shape
from .report import HEADER, NotMeasured, Row, label, write_json

SHAPES = (Shape(1024, 768, 24576), Shape(1024, 2304, 16384), Shape(512, 576, 16384))


class Measurable(Protocol):
    """What a suite is made of. `measure` may raise AssertionError, for a wrong result, and NotMeasured."""

    @property
    def what(self) -> str: ...

    @property
    def problem(self) -> Problem: ...

    def measure(self, rounds: int) -> list[Row]: ...


def cpu_suite(shapes: Sequence[Shape]) -> Iterator[Measurable]:
    """The cases of the `cpu` suite. The encodes come in every shape, the others in the first."""
    encodes = [Problem(shape, k) for shape in shapes for k in KS]
    firsts = encodes[: len(KS)]
    ragged = firsts[-1]
    yield from (Case("topk_encode fp32", problem, ops.encode_fp32) for problem in encodes)
    yield from (Case("topk_encode bf16", problem, ops.encode_bf16) for problem in encodes)
    yield from (PlainCase("topk_encode fp32 without bf16 units", problem) for problem in encodes)
    yield from (Case("topk_select", problem, ops.select) for problem in firsts)
    yield from (Case("price_select, one pass", problem, ops.price) for problem in encodes[:: len(KS)])
    yield Case("topk_encode + price_select", firsts[0], ops.priced_encode)
    yield from (Case("decode_mse forward + value gradient", problem, ops.decode) for problem in firsts)
    yield from (Case("both weight gradients", problem, ops.weight_grads) for problem in firsts)
    yield from (Case("forward + backward + SAEAdam", problem, steps.step) for problem in firsts)
    yield Case("decode_mse + backward", ragged, ops.ragged)
    for kind, name in ops.ADVERSARIAL.items():
        prepare = functools.partial(ops.select_adversarial, kind)
        yield from (Case(f"topk_select, {name} rows", problem, prepare) for problem in firsts)
    yield from (Case("topk_encode fp32, latents all alike", problem, ops.encode_equal_latents) for problem in firsts)
    yield from (MemoryCase("peak memory of a step", problem) for problem in firsts)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", choices=["cpu"], default="cpu")
    parser.add_argument(
        "--shape", type=int, nargs=3, action="append", metavar=("B", "D", "F"), help="replaces the shapes"
    )
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="of what the table calls a row")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="also keep the rows there, with their quantiles")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)

    result = {"machine": machine.describe(), "rounds": options.rounds, "rows": [], "wrong": [], "not measured": []}
    print(", ".join(f"{key} {value}" for key, value in result["machine"].items()))
    print(f"medians of {options.rounds} interleaved rounds; a ratio below 1 is faster, or smaller\n\n{HEADER}")
    for case in cpu_suite([Shape(*shape) for shape in options.shape] if options.shape else SHAPES):
        if options.only not in case.what:
            continue
        named = label(case.what, case.problem.shape, case.problem.label)
        try:
            rows = case.measure(options.rounds)
        except (AssertionError, NotMeasured) as error:
            wrong = isinstance(error, AssertionError)
            said = (str(error).splitlines() or ["no reason given"])[0]
            print(f"{named}  {'not timed, its result is wrong' if wrong else 'not measured'}: {said}", flush=True)
            entry = {"what": case.what, "shape": case.problem.shape._asdict(), "k": case.problem.label, "why": said}
            result["wrong" if wrong else "not measured"].append(entry)
            continue
        for row in rows:
            print(row.line(), flush=True)
            result["rows"].append(row.record())
    kept = options.json is None or write_json(options.json, result)
    return 0 if kept and not result["wrong"] else 1


if __name__ == "__main__":
    sys.exit(main())
