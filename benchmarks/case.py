"""A case: one thing of ours beside its rivals, and a check of it that comes before any time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from .problem import Problem
from .report import Row, Target
from .timing import interleaved

OURS = "aksae"


class Rival(NamedTuple):
    """What we are compared with; without a target, for information. `own`: it is a call of ours too."""

    name: str
    call: Callable[[], object]
    target: Target | None = None
    own: bool = False


class Floor(NamedTuple):
    """A time that is computed, not taken: what the hardware needs at the very least. NaN where that is not known."""

    name: str
    seconds: float
    target: Target | None = None


class Contest(NamedTuple):
    """`ours` and the rivals are called without arguments; `check` raises AssertionError where our result is wrong."""

    ours: Callable[[], object]
    check: Callable[[], None]
    rivals: tuple[Rival, ...]
    floors: tuple[Floor, ...] = ()

    def rows(
        self,
        what: str,
        problem: Problem,
        ours: Sequence[float],
        theirs: Mapping[str, Sequence[float]],
        backend: str | None = None,
    ) -> list[Row]:
        """A row for each rival, whose samples `theirs` has by name, and for each floor."""
        theirs = dict(theirs) | {floor.name: [floor.seconds] * len(ours) for floor in self.floors}
        return [
            Row.compare(what, rival.name, problem, ours, theirs[rival.name], rival.target, backend=backend)
            for rival in (*self.rivals, *self.floors)
        ]


class Case(NamedTuple):
    """What the table calls it, its inputs, and what makes the contest of them: nothing is computed before."""

    what: str
    problem: Problem
    prepare: Callable[[Problem], Contest]

    def samples(self, rounds: int) -> tuple[Contest, dict[str, list[float]]]:
        """The contest, checked, and the seconds of its contenders from interleaved rounds, ours under `OURS`."""
        contest = self.prepare(self.problem)
        contest.check()
        calls = {OURS: contest.ours} | {rival.name: rival.call for rival in contest.rivals}
        return contest, interleaved(calls, rounds)

    def measure(self, rounds: int) -> list[Row]:
        """A row for each rival, all from one interleaved run. Raises AssertionError where our result is wrong."""
        contest, samples = self.samples(rounds)
        return contest.rows(self.what, self.problem, samples[OURS], samples)
