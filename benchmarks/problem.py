"""The inputs of the benchmarks: random data of one shape with one choice of k, the same in every run."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import aksae_kernels as ak

KS = ("64", "20..320")
"""A constant k, and k uniform between two bounds: what a fixed and an adaptive SAE ask for."""


class Shape(NamedTuple):
    """Rows, width of the activations, number of latents."""

    B: int
    D: int
    F: int

    def __str__(self) -> str:
        return f"({self.B}, {self.D}, {self.F})"


class Problem:
    """What the cases read. Tensors are made when they are first asked for, so an unused problem costs nothing.

    Args:
        shape: rows, width, latents.
        label: a k for all rows, "64", or the bounds of one drawn for each, "20..320"; at most F either way.
    """

    def __init__(self, shape: Shape, label: str):
        self.shape, self.label = shape, label

    @functools.cached_property
    def k(self) -> Tensor:
        """`[B]` int64."""
        low, _, high = self.label.partition("..")
        low, high = (min(int(bound), self.shape.F) for bound in (low, high or low))
        return torch.randint(low, high + 1, (self.shape.B,), generator=_generator(0))

    @functools.cached_property
    def width(self) -> int:
        """The largest k: the width of the codes."""
        return int(self.k.max())

    @functools.cached_property
    def x(self) -> Tensor:
        """`[B, D]`, standard normal."""
        return torch.randn(self.shape.B, self.shape.D, generator=_generator(1))

    @functools.cached_property
    def W(self) -> Tensor:
        """`[F, D]` with unit rows: encoder and decoder both, as SAEs start."""
        return F.normalize(torch.randn(self.shape.F, self.shape.D, generator=_generator(2)), dim=-1)

    @functools.cached_property
    def b_enc(self) -> Tensor:
        """`[F]`, small."""
        return 0.01 * torch.randn(self.shape.F, generator=_generator(3))

    @functools.cached_property
    def scores(self) -> Tensor:
        """`[B, F]`: the pre-activations of `x`."""
        return F.linear(self.x, self.W, self.b_enc)

    @functools.cached_property
    def codes(self) -> ak.SparseCodes:
        """The codes of `x`."""
        return ak.topk_select(self.scores, self.k, self.width)

    @functools.cached_property
    def residual(self) -> Tensor:
        """`[B, D]`: what a decode of `codes` leaves, the gradient that reaches the decoder."""
        return ak.sparse_decode(self.codes, self.W) - self.x


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
