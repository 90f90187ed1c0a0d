"""Rows of a result: what was measured, against what, and whether it meets the target that was set for it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .problem import Problem, Shape
from .timing import Quantiles, quantiles, quotient

HEADER = (
    f"{'what / rival':66s} {'(B, D, F)':>18s} {'k':>8s} {'ours':>10s} {'rival':>10s} {'ratio':>7s} {'p20-p80':>13s} "
    f"{'must':>6s} {'stretch':>7s}  met"
)


class NotMeasured(Exception):
    """A case that this machine cannot run; the message says why."""


class Target(NamedTuple):
    """The ratio to reach, and the one to hope for."""

    must: float
    stretch: float

    def verdict(self, ratio: float) -> str:
        """`stretch`, `must` or `missed`. A ratio of exactly the target meets it; NaN meets none."""
        return "stretch" if ratio <= self.stretch else "must" if ratio <= self.must else "missed"


@dataclass(frozen=True)
class Row:
    """Ours against one rival.

    `ours` and `theirs` are seconds, or bytes or plain numbers where `unit` says so; `ratio.p50` is the quotient of
    their medians, and its other two quantiles say how far the rounds of the run spread. Below 1 we win.
    """

    what: str
    rival: str
    shape: Shape
    k: str
    ours: Quantiles
    theirs: Quantiles
    ratio: Quantiles
    target: Target | None = None
    unit: str = "seconds"
    backend: str | None = None
    """Of ours, where more than one was measured."""

    @classmethod
    def compare(
        cls,
        what: str,
        rival: str,
        problem: Problem,
        ours: Sequence[float],
        theirs: Sequence[float],
        target: Target | None = None,
        unit: str = "seconds",
        backend: str | None = None,
    ) -> Row:
        """The row of two lists of samples, taken in the same rounds."""
        figures = quantiles(ours), quantiles(theirs), quotient(ours, theirs)
        return cls(what, rival, problem.shape, problem.label, *figures, target, unit, backend)

    @property
    def verdict(self) -> str | None:
        """None for a row that is there for information."""
        return self.target.verdict(self.ratio.p50) if self.target else None

    def line(self) -> str:
        """The row of the printed table, under `HEADER`."""
        scale, unit = {"seconds": (1e3, "ms"), "bytes": (2.0**-20, "MB"), "times": (1, "x ")}[self.unit]
        must, stretch = (f"{bound:.3g}" for bound in self.target) if self.target else ("-", "-")
        return (
            f"{label(self.what, self.shape, self.k, self.rival)} {self.ours.p50 * scale:7.4g} {unit} "
            f"{self.theirs.p50 * scale:7.4g} {unit} {self.ratio.p50:7.3f} "
            f"{f'{self.ratio.p20:.3f}-{self.ratio.p80:.3f}':>13s} {must:>6s} {stretch:>7s}  {self.verdict or '-'}"
        )

    def record(self) -> dict[str, Any]:
        """The same for JSON, with every quantile."""
        return {
            "what": self.what,
            "rival": self.rival,
            "shape": self.shape._asdict(),
            "k": self.k,
            "backend": self.backend,
            "unit": self.unit,
            "ours": self.ours._asdict(),
            "theirs": self.theirs._asdict(),
            "ratio": self.ratio._asdict(),
            **(self.target or Target(None, None))._asdict(),
            "verdict": self.verdict,
        }


def label(what: str, shape: Shape, k: str, rival: str | None = None) -> str:
    """The first columns of a line: of a row, or of a case that gave none."""
    name = f"{what} / {rival}" if rival else what
    return f"{name:66s} {shape!s:>18s} {k:>8s}"


def tell(rows: Iterable[Row], result: Mapping[str, Any], path: Path | None) -> int:
    """Print the rows, under what they were measured on, and why others are missing; keep `result` where `path` says.

    The exit status is 1 where somebody's result is wrong, or that of ours was not kept.
    """
    print(", ".join(f"{key} {value}" for key, value in result["machine"].items()))
    print(f"medians of {result['rounds']} interleaved rounds; a ratio below 1 is faster\n\n{HEADER}")
    for row in rows:
        print(row.line())
    for name, why in (result["absent"] | result["wrong"]).items():
        print(f"{name}: {why}")
    kept = path is None or write_json(path, result)
    return 0 if kept and not result["wrong"] else 1


def write_json(path: Path, result: Mapping[str, Any]) -> bool:
    """Write `result`, making folders as needed. False, after a line on stderr, where that is not possible.

    A file that is there is replaced in one step: whoever reads it, or is cut off here, finds the old or the new one.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}.draft")
        draft.write_text(json.dumps(result, indent=2) + "\n")
        draft.replace(path)
    except OSError as error:
        print(f"the result was not kept: {path}: {error.strerror}", file=sys.stderr)
        return False
    return True
