"""The parts of the suite in the order of their value: what comes first is measured even when time is short."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from . import ceilings, correctness, ratios, sanitizer, training
from .bench import Bench, Outcome
from .targets import SHAPES

KINDS: dict[str, Callable[..., None]] = {
    "encode": ratios.encode,
    "encode-fp32": ratios.encode_fp32,
    "encode-alike": ratios.encode_alike,
    "select": ratios.select,
    "select-adversarial": ratios.select_adversarial,
    "decode": ratios.decode,
    "weight-grads": ratios.weight_grads,
    "step": ratios.step,
    "memory": ratios.memory,
    "training": training.training,
    "ceilings": ceilings.memory,
    "gemms": ceilings.gemms,
    "correctness": correctness.correctness,
    "graphs": correctness.graphs,
    "sanitizer": sanitizer.sanitized,
}


@dataclass(frozen=True)
class Part:
    """One kind of measurement, `of` one shape, op or tool where it has one; `seconds` is about its time on a GPU."""

    kind: str
    seconds: float
    of: str | None = None

    @property
    def name(self) -> str:
        return f"{self.kind} {self.of}" if self.of else self.kind

    def run(self, bench: Bench) -> Outcome:
        """What it found. Whatever it raises is in the outcome."""
        outcome = Outcome()
        with outcome.judging(self.name):
            KINDS[self.kind](bench, *([self.of] if self.of else []), outcome)
        return outcome


# The headline, and what the floors of the others need, come before the breadth; S4 is slow and says least.
PLAN = (
    Part("encode", 20, "S1"),
    Part("ceilings", 10),
    Part("correctness", 20, "topk_encode"),
    Part("encode", 15, "S3"),
    Part("encode", 15, "S2"),
    Part("step", 25, "S1"),
    Part("step", 30, "S3"),
    *(Part(kind, 12, shape) for shape in ("S1", "S3") for kind in ("decode", "weight-grads", "select")),
    *(Part("correctness", 15, op) for op in correctness.CHECKS if op != "topk_encode"),
    Part("graphs", 10),
    Part("training", 90, "S1"),
    Part("memory", 10, "S1"),
    Part("encode-fp32", 12, "S1"),
    Part("encode-alike", 8, "S1"),
    Part("select-adversarial", 12, "S1"),
    *(Part(kind, 15, "S2") for kind in ("step", "decode", "weight-grads", "select", "encode-fp32", "memory")),
    Part("encode-fp32", 20, "S3"),
    Part("memory", 15, "S3"),
    Part("encode", 25, "S4"),
    Part("training", 90, "S3"),
    Part("gemms", 25),
    *(Part(kind, 25, "S4") for kind in ("step", "decode", "weight-grads", "select", "encode-fp32", "memory")),
    Part("training", 90, "S2"),
    *(Part("sanitizer", sanitizer.LIMIT_S, tool) for tool in sanitizer.TOOLS),
)


def chosen(kinds: Collection[str], shapes: Collection[str]) -> list[Part]:
    """The parts of those kinds, and of those shapes where they have one, in the order of the plan."""
    return [part for part in PLAN if part.kind in kinds and (part.of not in SHAPES or part.of in shapes)]
