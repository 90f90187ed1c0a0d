"""The total order of the contract, in plain PyTorch: NaN, then larger value, then smaller index."""

from __future__ import annotations

import torch
from torch import Tensor


def selectable(scores: Tensor) -> Tensor:
    """True where a score may be selected: `> 0`, or NaN of either sign. `-0.0` is not positive."""
    return (scores > 0) | scores.isnan()


def best_first(scores: Tensor) -> Tensor:
    """The indices that sort the last dimension of `scores [..., F]` by the total order, best first.

    Every NaN is made the positive one before the sort. On the CPU torch's sorts take each NaN as largest; on CUDA some
    order a NaN by its sign, and put the negative one after -inf.
    """
    return torch.where(scores.isnan(), torch.nan, scores).argsort(dim=-1, descending=True, stable=True)
