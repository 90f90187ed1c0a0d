"""Times of several callables, taken in turn, so that whatever else the machine does hits all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Times:
    """Quantiles of one callable's wall time, in seconds."""

    p20: float
    p50: float
    p80: float


def interleaved(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, Times]:
    """Call every contender once per round, after one warm-up round; caches are as the others left them."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(rounds + 1):
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            if round_:
                seconds[name].append(time.perf_counter() - start)
    return {name: Times(*(_quantile(times, q) for q in (0.2, 0.5, 0.8))) for name, times in seconds.items()}


def _quantile(times: list[float], q: float) -> float:
    return statistics.quantiles(times, n=10, method="inclusive")[round(q * 10) - 1] if len(times) > 1 else times[0]
