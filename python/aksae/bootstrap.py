"""Intervals by resampling what a measure is a sum over: documents, or rows where there are none."""

from __future__ import annotations

import math
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
    axes: int = 1,
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
        axes: how many of the last axes are resampled, each by itself: 2 for sums `[..., S, N]` of S seeds and N
            documents, in which every seed meets every document.

    Returns:
        Arrays of the broadcast shape without the axes that are resampled. Of a single unit along the last one no
        interval is known: low and high are NaN.

    Raises ValueError for sums of different N, or none, and for a level outside (0, 1).
    """
    parts = [np.asarray(part, dtype=np.float64) for part in sums]
    units = {part.shape[-axes:] for part in parts}
    if len(units) != 1 or len(n := units.pop()) < axes or 0 in n:
        shapes = [part.shape for part in parts]
        raise ValueError(f"sums must agree in their last {axes} axes, none of them empty, got shapes {shapes}")
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    over = tuple(range(-axes, 0))
    value = np.asarray(statistic(*(part.sum(over) for part in parts)))
    if n[-1] == 1:
        unknown = np.full_like(value, np.nan)
        return Interval(value, unknown, unknown)
    drawn = []
    for first in range(0, draws, step := max(1, _COUNTS // math.prod(n))):
        size = min(step, draws - first)
        counts = [rng.multinomial(of, np.full(of, 1 / of), size=size).astype(np.float64) for of in n]
        drawn.append(statistic(*(_resampled(part, counts) for part in parts)))
    low, high = np.quantile(np.concatenate(drawn, -1), [(1 - level) / 2, (1 + level) / 2], axis=-1)
    return Interval(value, low, high)


def _resampled(part: NDArray[np.float64], counts: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """The sums `[..., draws]` of `part [..., N_1, ..., N_m]` over its units, each times its count `[draws, N_i]`."""
    drawn = part @ counts[-1].T
    for count in reversed(counts[:-1]):
        drawn = (drawn * count.T).sum(-2)
    return drawn
