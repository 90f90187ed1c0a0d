"""Where the time of a training step goes, without a change to the code that runs it."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

PHASES = ("encode", "select", "decode + loss", "backward", "optimizer", "other")
"""In the order of a step. A selection inside a fused encode cannot be told from it: it counts as `encode`."""


class Span(NamedTuple):
    """Calls of `owner.attribute` belong to `phase`, except for what they call that has a span of its own."""

    owner: Any
    attribute: str
    phase: str


@contextmanager
def timed(spans: Sequence[Span]) -> Iterator[dict[str, float]]:
    """Seconds of each of `PHASES` while the block runs; they add up to its whole time, when it has ended.

    For that long, every `owner.attribute` is replaced by a function that keeps the clock and calls it.
    """
    seconds = dict.fromkeys(PHASES, 0.0)
    current, since = "other", 0.0

    def enter(phase: str) -> str:
        nonlocal current, since
        now = time.perf_counter()
        seconds[current] += now - since
        left, current, since = current, phase, now
        return left

    def keeping_time(function: Callable, phase: str) -> Callable:
        @functools.wraps(function)
        def call(*args, **kwargs):
            outer = enter(phase)
            try:
                return function(*args, **kwargs)
            finally:
                enter(outer)

        return call

    with ExitStack() as stack:
        for owner, attribute, phase in spans:
            replacement = keeping_time(getattr(owner, attribute), phase)
            stack.enter_context(mock.patch.object(owner, attribute, replacement))
        since = time.perf_counter()
        yield seconds
        enter("other")
