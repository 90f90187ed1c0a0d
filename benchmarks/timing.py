"""Times of several callables, taken in turn, so that whatever else the machine does hits all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch


class Quantiles(NamedTuple):
    """The median of some samples, and what the middle 60 % of them lie between."""

    p20: float
    p50: float
    p80: float


def interleaved(contenders: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every contender, called once per round; caches are as the others left them.

    A warm-up round goes first and is not kept: after a pause, as a check is one, the first calls find cold caches,
    sleeping threads and memory that the system still has to hand out.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(rounds + 1):
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            if round_:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def quantiles(samples: Sequence[float]) -> Quantiles:
    """Linear between samples; of a single one, that one three times."""
    cuts = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return Quantiles(*torch.tensor(samples, dtype=torch.float64).quantile(cuts).tolist())


def quotient(ours: Sequence[float], theirs: Sequence[float]) -> Quantiles:
    """Ours over theirs: the quotient of the medians, and the spread of the quotients within each round."""
    spread = quantiles([a / b for a, b in zip(ours, theirs, strict=True)])
    return spread._replace(p50=quantiles(ours).p50 / quantiles(theirs).p50)
