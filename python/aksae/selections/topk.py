"""TopK: one k for all rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from aksae_kernels import SparseCodes

from .selection import Chosen, Encoder, Selection, at_least

if TYPE_CHECKING:
    from ..sae import SAE


@dataclass(frozen=True)
class TopK(Selection):
    """Each row keeps its `k` largest positive pre-activations (arXiv 2406.04093), in training and at inference."""

    k: int

    def check(self, d_sae: int) -> None:
        at_least("k", self.k, 0, d_sae)

    def width(self, d_sae: int) -> int:
        return self.k

    def mean_k(self) -> float:
        return self.k

    def k_for(self, sae: SAE, x: Tensor) -> Tensor:
        return torch.full(x.shape[:-1], self.k, dtype=torch.int32, device=x.device)

    def encode(self, sae: SAE, x: Tensor, encoder: Encoder, wanted: Tensor | None) -> SparseCodes:
        return encoder.topk(self.k)

    def choose(self, sae: SAE, x: Tensor, encoder: Encoder, k: int | Tensor | None, wanted: Tensor) -> Chosen:
        return Chosen(encoder.topk(self.k) if k is None else encoder.topk(k, sae.width(k)))

    def __str__(self) -> str:
        return f"TopK, k = {self.k}"
