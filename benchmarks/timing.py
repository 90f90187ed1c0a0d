"""Times of several callables, taken in turn, so that whatever else the machine does hits all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch

_LEAD_CYCLES = 2_000_000


class Quantiles(NamedTuple):
    """The median of some samples, and what the middle 60 % of them lie between."""

    p20: float
    p50: float
    p80: float


class Clock(Protocol):
    """`seconds(call)` calls it once and says how long that took."""

    def seconds(self, call: Callable[[], object]) -> float: ...


class HostClock:
    """For work that is done when its call returns. Caches are as the last call left them."""

    def seconds(self, call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


class DeviceClock:
    """Time of a CUDA device between two events around a call, with a cold L2.

    Before the first event a buffer of 2.5 times the L2 is written, and before that the device pauses for about a
    millisecond, so that the host can queue the call's kernels meanwhile: what is timed is the device at work, not
    Python, unless queueing takes longer than the pause.
    """

    def __init__(self, device: torch.device):
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._buffer = torch.empty(5 * cache // 2, dtype=torch.uint8, device=device)

    def seconds(self, call: Callable[[], object]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(_LEAD_CYCLES)
        self._buffer.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def clock_of(device: torch.device) -> Clock:
    """The clock for work on `device`."""
    return DeviceClock(device) if device.type == "cuda" else HostClock()


def interleaved(
    contenders: Mapping[str, Callable[[], object]], rounds: int, clock: Clock | None = None
) -> dict[str, list[float]]:
    """Seconds of every contender, called once per round, by `clock`; None is the host's.

    A warm-up round goes first and is not kept: after a pause, as a check is one, the first calls find cold caches,
    sleeping threads and memory that the system still has to hand out.
    """
    clock = clock or HostClock()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(rounds + 1):
        for name, call in contenders.items():
            sample = clock.seconds(call)
            if round_:
                seconds[name].append(sample)
    return seconds


def quantiles(samples: Sequence[float]) -> Quantiles:
    """Linear between samples; of a single one, that one three times."""
    cuts = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return Quantiles(*torch.tensor(samples, dtype=torch.float64).quantile(cuts).tolist())


def quotient(ours: Sequence[float], theirs: Sequence[float]) -> Quantiles:
    """Ours over theirs: the quotient of the medians, and the spread of the quotients within each round."""
    spread = quantiles([a / b for a, b in zip(ours, theirs, strict=True)])
    return spread._replace(p50=quantiles(ours).p50 / quantiles(theirs).p50)
