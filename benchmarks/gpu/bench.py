"""What every part of the suite is given, how it measures, and what it leaves behind."""

from __future__ import annotations

import math
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import aksae_kernels as ak
from aksae_kernels import dispatch

from ..case import Contest
from ..problem import Problem, Shape
from ..report import NotMeasured, Row
from ..timing import Clock, interleaved
from .targets import SPREAD, UNIFORM, target
from .traffic import Rates

_REFUSAL = re.compile(r"backend '\w+' cannot run")
_FEWEST, _MOST = 3, 50


@dataclass
class Outcome:
    """What a part found: rows of the table and other facts, and a line for everything that has none."""

    rows: list[Row] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @contextmanager
    def judging(self, what: str) -> Iterator[None]:
        """Keeps an exception of the block as a line: of what is wrong, failed, or cannot be measured here."""
        try:
            yield
        except AssertionError as error:
            self.wrong.append(f"{what}: {_first_line(error) or 'no reason given'}")
        except NotMeasured as error:
            self.skipped.append(f"{what}: {error}")
        except Exception as error:  # a part may fail as it likes: the others are still wanted
            refused = _REFUSAL.match(str(error))
            if not refused:
                traceback.print_exc()
            reason = f"{what}: {type(error).__name__}: {_first_line(error)}"
            (self.skipped if refused else self.failed).append(reason)


@dataclass(frozen=True)
class Bench:
    """Where and how to measure.

    `backends` are those of ours to compare, `shapes` what S1 to S4 stand for. A contest takes about `seconds`, of at
    least 3 and at most 50 rounds. `rates` are NaN until the part `ceilings` has run.
    """

    device: torch.device
    clock: Clock
    backends: tuple[str, ...]
    shapes: dict[str, Shape]
    seconds: float
    rates: Rates

    def problem(self, shape: str, k: str = "uniform", dtype: torch.dtype = torch.bfloat16) -> Problem:
        """The inputs of a named shape, with one of its two choices of k."""
        return Problem(self.shapes[shape], UNIFORM[shape] if k == "uniform" else SPREAD, self.device, dtype)

    def both_ks(self, shape: str, dtype: torch.dtype = torch.bfloat16) -> tuple[Problem, Problem]:
        """The problem with the uniform k, and the same data with the spread one."""
        uniform = self.problem(shape, dtype=dtype)
        return uniform, uniform.with_k(SPREAD)

    def measure(
        self,
        outcome: Outcome,
        shape: str,
        what: str,
        problem: Problem,
        prepare: Callable[[Problem], Contest],
        *,
        repeats: bool = True,
    ) -> None:
        """Add the rows of one contest to `outcome`: all backends and rivals take turns in the same rounds.

        Each backend prepares a contest of its own. One whose result is wrong, or differs between two calls where it
        should repeat, is not timed; the others are.
        """
        contests: dict[str, Contest] = {}
        for backend in self.backends:
            with outcome.judging(f"{what}, {shape}, k {problem.label}, {backend}"), ak.use_backend(backend):
                contest = prepare(problem)
                contest.check()
                assert not repeats or same_bits(contest.ours(), contest.ours()), "two calls differ"
                contests[backend] = contest
        calls = {}
        for backend, contest in contests.items():
            calls[backend] = on(backend, contest.ours)
            calls |= {_key(rival, backend): on(backend, rival.call) for rival in contest.rivals}
        samples = self.samples(calls) if calls else {}
        for backend, contest in contests.items():
            for floor in contest.floors:
                if math.isnan(floor.seconds):
                    outcome.skipped.append(f"{what}, {shape}: its floor needs the rates of the part 'ceilings'")
            aim = lambda entry: entry._replace(target=target(what, entry.name, shape))
            aimed = contest._replace(
                rivals=tuple(map(aim, contest.rivals)),
                floors=tuple(aim(floor) for floor in contest.floors if not math.isnan(floor.seconds)),
            )
            theirs = {rival.name: samples[_key(rival, backend)] for rival in contest.rivals}
            outcome.rows += aimed.rows(what, problem, samples[backend], theirs, backend)

    def samples(self, calls: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Seconds of the calls, from as many interleaved rounds as the time of a contest allows."""
        trial = interleaved(calls, 1, self.clock)
        round_ = sum(seconds for (seconds,) in trial.values())
        return interleaved(calls, max(_FEWEST, min(_MOST, int(self.seconds / round_))), self.clock)

    def alive(self) -> bool:
        """Whether the device still works: after an illegal access nothing does in this process."""
        try:
            release(self.device)
        except RuntimeError:
            return False
        return True


def usable_backends(device: torch.device) -> tuple[str, ...]:
    """Our backends for tensors of the device. The reference is an oracle, measured where there is nothing else."""
    usable = [name for name in ak.available_backends() if accepts("topk_select", name, device)]
    return tuple(name for name in usable if name != "reference") or tuple(usable)


def accepts(op: str, backend: str, device: torch.device) -> bool:
    """Whether the backend runs the op on tensors of the device."""
    try:
        dispatch.choose(op, backend, torch.empty(1, 1, device=device))
    except RuntimeError:
        return False
    return True


def on(backend: str, call: Callable[[], object]) -> Callable[[], object]:
    """The call, on that backend."""

    def run() -> object:
        with ak.use_backend(backend):
            return call()

    return run


def same_bits(one: Tensor | Sequence, other: Tensor | Sequence) -> bool:
    """Of two tensors, or of two sequences of them. NaN of the same bits are the same."""
    if not isinstance(one, Tensor):
        return all(same_bits(a, b) for a, b in zip(one, other, strict=True))
    return torch.equal(*(tensor.detach().reshape(-1).view(torch.uint8) for tensor in (one, other)))


def release(device: torch.device) -> None:
    """Wait for the device, and give back the memory that nobody uses."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def _key(rival, backend: str) -> str:
    return f"{rival.name} [{backend}]" if rival.own else rival.name


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
