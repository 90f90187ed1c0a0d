"""`python -m benchmarks.gpu_suite --out DIR --minutes N`: everything there is to know of the kernels on one GPU.

It measures by parts, the most telling first, and writes `DIR/<device>.json` after each. A second run with the same
folder, device, backends and commit goes on where the first one stopped. A part that would not end in the time left is
passed over; one that fails is kept with its reason. Results are checked before they are timed; the exit status is 1 if
any was wrong.

Times are those of the device, from CUDA events: medians of rounds in which all contenders take turns, each from a cold
L2.

`--device cpu --tiny` runs whatever a machine without a GPU can, on tiny shapes: it proves the suite, not the kernels.
`--readme benchmarks/results` prints the README's table of all devices measured so far, and measures nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path

import torch

import aksae_kernels as ak

from . import machine
from .gpu import plan, table
from .gpu.bench import Bench, usable_backends
from .gpu.ledger import Ledger, slug
from .gpu.plan import Part
from .gpu.targets import SHAPES, TINY
from .gpu.traffic import Rates
from .timing import clock_of

_CONTEST_S = 0.6


class Budget:
    """Minutes to spend. What a part will need is what the plan says, corrected by what the parts before it took."""

    def __init__(self, minutes: float):
        self.end = time.monotonic() + 60 * minutes
        self.planned = self.spent = 0.0

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def needs(self, part: Part) -> float:
        """Seconds; a few parts that were quick, or slow, do not yet say much of the others."""
        pace = (self.spent + 60) / (self.planned + 60)
        return pace * part.seconds

    def took(self, part: Part, seconds: float) -> None:
        self.planned += part.seconds
        self.spent += seconds


def measure(parts: Sequence[Part], bench: Bench, ledger: Ledger, budget: Budget) -> bool:
    """Run what the ledger does not have and the budget allows. False where the device stopped working on the way."""
    for part in parts:
        if part.name in ledger.parts:
            continue
        if budget.needs(part) > budget.left:
            print(f"{part.name:30s} left out", flush=True)
            continue
        ledger.start(part.name)
        start = time.monotonic()
        outcome = part.run(dataclasses.replace(bench, rates=Rates.of(ledger.facts("ceilings"))))
        seconds = time.monotonic() - start
        budget.took(part, seconds)
        ledger.add(part.name, outcome, seconds)
        counts = f"{len(outcome.rows)} rows, {len(outcome.wrong)} wrong, {len(outcome.failed)} failed"
        print(f"{part.name:30s} {seconds:6.1f} s  {counts}", flush=True)
        # Tensors of the part die here, so that the next one finds the memory free.
        gc.collect()
        if not bench.alive():
            return False
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.readme:
        print(table.markdown(options.readme))
        return 0
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --device cpu --tiny proves the suite without one")
    facts = machine.describe_device(device)
    shapes = TINY if options.tiny else SHAPES
    backends = tuple(options.backends) if options.backends else usable_backends(device)
    identity = {
        "commit": options.commit or machine.revision(),
        "machine": facts,
        "backends": list(backends),
        "shapes": table.shape_names(shapes),
    }
    ledger = Ledger(options.out / f"{slug(facts['device'])}{'-tiny' * options.tiny}.json", identity)
    if not ledger.save():
        return 1
    print(", ".join(f"{key} {value}" for key, value in facts.items()), identity["commit"], sep=", commit ")
    bench = Bench(device, clock_of(device), backends, shapes, 0.0 if options.tiny else _CONTEST_S, Rates())
    budget = Budget(options.minutes)
    if not measure(plan.chosen(options.parts, options.shapes), bench, ledger, budget):
        # Only a new process can use the device again. It finds in the ledger what has been done.
        print("the device does not answer any more; going on in a new process", flush=True)
        rest = [*arguments, "--minutes", f"{budget.left / 60:.3f}"]
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu_suite", *rest])
    print(f"\n{table.text(ledger.document)}")
    return 1 if ledger.wrong else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = lambda known: lambda text: _known(text.split(","), known)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="the folder of the result")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--shapes", type=names(SHAPES), default=list(SHAPES), help="of S1,S2,S3,S4")
    parser.add_argument("--parts", type=names(plan.KINDS), default=list(plan.KINDS), help=f"of {','.join(plan.KINDS)}")
    parser.add_argument("--backends", type=names(ak.available_backends()), help="default: all for the device")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes under the same names")
    parser.add_argument("--commit", help="what the results belong to, where there is no git to ask")
    parser.add_argument("--readme", type=Path, metavar="FOLDER", help="print the table of the results there")
    return parser


def _known(names: list[str], known: Collection[str]) -> list[str]:
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
