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
        device, dtype: of the data; it is drawn in fp32 on the device, and rounded.
    """

    def __init__(
        self, shape: Shape, label: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ):
        self.shape, self.label = shape, label
        self.device, self.dtype = torch.device(device), dtype

    def with_k(self, label: str) -> Problem:
        """The same data, not a copy of it, with another k."""
        other = Problem(self.shape, label, self.device, self.dtype)
        # What is cached on the new one is not made again.
        other.x, other.W, other.b_enc = self.x, self.W, self.b_enc
        return other

    def with_equal_k(self) -> Problem:
        """The same data with the mean of k for all rows."""
        return self.with_k(str(round(self.k.double().mean().item())))

    def randn(self, seed: int, *shape: int) -> Tensor:
        """Standard normal, fp32."""
        return torch.randn(shape, device=self.device, generator=self._generator(seed))

    @functools.cached_property
    def k(self) -> Tensor:
        """`[B]` int64."""
        low, _, high = self.label.partition("..")
        low, high = (min(int(bound), self.shape.F) for bound in (low, high or low))
        return torch.randint(low, high + 1, (self.shape.B,), device=self.device, generator=self._generator(0))

    @functools.cached_property
    def width(self) -> int:
        """The largest k: the width of the codes."""
        return int(self.k.max())

    @functools.cached_property
    def x(self) -> Tensor:
        """`[B, D]`, standard normal."""
        return self.randn(1, self.shape.B, self.shape.D).to(self.dtype)

    @functools.cached_property
    def W(self) -> Tensor:
        """`[F, D]` with unit rows: encoder and decoder both, as SAEs start."""
        return F.normalize(self.randn(2, self.shape.F, self.shape.D), dim=-1).to(self.dtype)

    @functools.cached_property
    def b_enc(self) -> Tensor:
        """`[F]`, small."""
        return (0.01 * self.randn(3, self.shape.F)).to(self.dtype)

    @functools.cached_property
    def scores(self) -> Tensor:
        """`[B, F]`: the pre-activations of `x`."""
        return F.linear(self.x, self.W, self.b_enc)

    @functools.cached_property
    def codes(self) -> ak.SparseCodes:
        """The codes of `x`, by plain PyTorch: what is measured with them depends on no kernel of ours but its own."""
        values, indices = self.scores.topk(self.width)
        rank = torch.arange(self.width, device=self.device)
        live = (rank < self.k.unsqueeze(-1)) & (values > 0)
        indices, order = indices.where(live, self.shape.F).sort(dim=-1)
        live = indices < self.shape.F
        values = values.gather(-1, order).where(live, 0)
        return ak.SparseCodes(values, indices.where(live, -1).to(torch.int32), live.sum(-1, dtype=torch.int32))

    @functools.cached_property
    def residual(self) -> Tensor:
        """`[B, D]`: what a decode of `codes` leaves, the gradient that reaches the decoder."""
        return self.codes.to_dense(self.shape.F) @ self.W - self.x

    def _generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)
