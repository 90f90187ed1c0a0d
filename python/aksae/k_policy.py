"""From a complexity score to the number of latents a row may use."""

from __future__ import annotations

import math
import numbers
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import UserError


@dataclass(frozen=True)
class KMap:
    """The map from a complexity score to k: `score_to_k` with these settings, which it names.

    Raises as `score_to_k` does where it is made, so that a map that exists is a good one. NumPy's integers, and
    whatever else is one, become ints: JSON and torch.compile take no others.
    """

    k_min: int = 20
    k_max: int = 320
    steepness: float = 6.0
    score_min: float = 0.0
    score_max: float = 10.0

    def __post_init__(self) -> None:
        for name in ("k_min", "k_max"):
            object.__setattr__(self, name, as_plain_int(getattr(self, name)))
        _check_range(self.k_min, self.k_max, self.steepness, self.score_min, self.score_max)

    def __call__(self, score: Tensor | float) -> Tensor:
        """k of each score, int32 of its shape."""
        return score_to_k(
            score,
            k_min=self.k_min,
            k_max=self.k_max,
            steepness=self.steepness,
            score_min=self.score_min,
            score_max=self.score_max,
        )


def score_to_k(
    score: Tensor | float,
    *,
    k_min: int = 20,
    k_max: int = 320,
    steepness: float = 6.0,
    score_min: float = 0.0,
    score_max: float = 10.0,
) -> Tensor:
    """Map complexity scores to per-row k along a sigmoid.

        k = round(k_min + sigmoid(steepness * ((score - score_min) / (score_max - score_min) - 0.5)) * (k_max - k_min))

    Halves round to the even neighbour. The middle of the score range gives the middle of the k range; at finite
    steepness the ends `k_min` and `k_max` are approached rather than reached (34 and 306 at the defaults).

    Args:
        score: floating or integer tensor of any shape, or a Python number. Computed in float64, so that 16-bit scores
            lose nothing here. Scores outside the range follow the sigmoid on; +-infinity gives an end of the k range.
        k_min, k_max: ends of the k range, `0 <= k_min <= k_max < 2**31`.
        steepness: slope of the sigmoid; 0 gives the middle of the k range for every score.
        score_min, score_max: the score range, `score_min < score_max`.

    Returns:
        int32 tensor of the shape and on the device of `score` (0-dimensional for a number), within `[k_min, k_max]`.
        No gradient flows through it, and on an accelerator nothing waits for the device.

    Raises:
        TypeError: `score` is neither a real tensor nor a number, or a bound is not an integer.
        UserError: a range is empty or reversed, `k_min` is negative, or a parameter is not finite. A NaN score raises
            on the CPU; on an accelerator, and while `torch.compile` traces, where looking would cost a
            synchronisation, it becomes `k_min`.

    Source: AdaptiveK, arXiv 2508.17320.
    """
    _check_range(k_min, k_max, steepness, score_min, score_max)
    if isinstance(score, Tensor):
        if score.dtype == torch.bool or score.is_complex():
            raise TypeError(f"score: got a tensor of {score.dtype}, needs real numbers")
        score = score.detach().double()
    elif isinstance(score, numbers.Real) and not isinstance(score, bool):
        score = torch.tensor(float(score), dtype=torch.float64, device="cpu")
    else:
        raise TypeError(f"score: got {type(score).__name__}, needs a tensor or a number")

    if score.device.type == "cpu" and not torch.compiler.is_compiling() and score.isnan().any():
        raise UserError(f"score: got NaN in {int(score.isnan().sum())} of {score.numel()} entries, needs numbers")

    position = (score - score_min) / (score_max - score_min)
    k = k_min + torch.sigmoid(steepness * (position - 0.5)) * (k_max - k_min)
    return k.nan_to_num(nan=k_min).clamp(k_min, k_max).round().to(torch.int32)


def as_plain_int(value: Any) -> Any:
    """The int that `operator.index` makes of `value`; whatever it makes none of, bool included, as it is."""
    return operator.index(value) if hasattr(value, "__index__") and not isinstance(value, bool) else value


def _check_range(k_min: int, k_max: int, steepness: float, score_min: float, score_max: float) -> None:
    for name, value in (("k_min", k_min), ("k_max", k_max)):
        if not isinstance(value, numbers.Integral) or isinstance(value, bool):
            raise TypeError(f"{name}: got {value!r}, needs an integer")
    if k_min < 0:
        raise UserError(f"k_min: got {k_min}, needs a number from 0 up")
    if k_max < k_min:
        raise UserError(f"k_min: got {k_min}, needs at most k_max = {k_max}")
    if k_max >= 2**31:
        raise UserError(f"k_max: got {k_max}, needs less than 2**31")
    for name, number in (("steepness", steepness), ("score_min", score_min), ("score_max", score_max)):
        # Compared, since torch.compile may trace the settings as symbols, of which it knows no `math.isfinite`.
        if not -math.inf < number < math.inf:
            raise UserError(f"{name}: got {number}, needs a finite number")
    if score_min >= score_max:
        raise UserError(f"score_min: got {score_min}, needs a number below score_max = {score_max}")
