"""Intervals by resampling what a measure is a sum over: documents, or rows where there are none."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

_COUNTS = 2**22
"""Entries of the matrix of counts that are in memory at a time."""


class Interval(NamedTuple):
    """A statistic and its interval; each of the three has the statistic's shape."""

    value: NDArray[np.float64]
    """Of the units as they are."""
    low: NDArray[np.float64]
    high: NDArray[np.float64]


def bootstrap(
    statistic: Callable[..., NDArray[np.float64]],
    *sums: ArrayLike,
    rng: np.random.Generator,
    draws: int = 2000,
    level: float = 0.95,
) -> Interval:
    """The percentile interval of a function of sums over units, such as documents.

        T(c) = statistic(sum_i c_i a_i, sum_i c_i b_i, ...),   value = T(1, ..., 1),
        low, high = quantiles (1 -+ level) / 2 of T(c) over draws of c ~ Multinomial(N; 1/N, ..., 1/N)

    Every draw resamples the same units for all sums, so that differences between models are paired. Of squared errors
    `[models, N]` and variances `[N]`, `bootstrap(np.divide, errors, variances, rng=rng)` has the FVU of each model, and
    `bootstrap(lambda a, b, v: (a - b) / v, errors[0], errors[1], variances, rng=rng)` the difference of two.

    Args:
        statistic: an elementwise function of arrays, one for each of `sums`.
        sums: each unit's part, `[..., N]`, of shapes that broadcast.
        rng: what draws; the same state gives the same interval.
        draws: how many resamples.
        level: share of them within the interval.

    Returns:
        Arrays of the broadcast shape without N. Of a single unit no interval is known: low and high are NaN.

    Raises ValueError for sums of different N, or none, and for a level outside (0, 1).
    """
    parts = [np.asarray(part, dtype=np.float64) for part in sums]
    numbers = {part.shape[-1] if part.ndim else 0 for part in parts}
    if len(numbers) != 1 or 0 in numbers:
        raise ValueError(f"sums must have the same last dimension, of at least 1, got {[p.shape for p in parts]}")
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    n = numbers.pop()
    value = np.asarray(statistic(*(part.sum(-1) for part in parts)))
    if n == 1:
        unknown = np.full_like(value, np.nan)
        return Interval(value, unknown, unknown)
    drawn = []
    for first in range(0, draws, step := max(1, _COUNTS // n)):
        counts = rng.multinomial(n, np.full(n, 1 / n), size=min(step, draws - first)).astype(np.float64)
        drawn.append(statistic(*(part @ counts.T for part in parts)))
    low, high = np.quantile(np.concatenate(drawn, -1), [(1 - level) / 2, (1 + level) / 2], axis=-1)
    return Interval(value, low, high)
