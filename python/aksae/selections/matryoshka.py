"""Matryoshka: prefixes of the latents reconstruct as well as they can."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from aksae_kernels import SparseCodes, sparse_decode

from ..errors import UserError
from .batch_topk import BatchTopK
from .selection import Chosen, Encoder, Selection

if TYPE_CHECKING:
    from ..sae import SAE


@dataclass(frozen=True)
class Matryoshka(Selection):
    """A selection whose error is the mean over prefixes of the latents (arXiv 2503.17547).

        error = mean over p in prefixes of |W_dec[:p]^T z[:p] + b_dec - target|^2

    The first prefix learns what is most general, and each further one what is left. Codes are those of `inner`.
    """

    inner: BatchTopK
    prefixes: tuple[int, ...]
    """Ascending numbers of latents, the last one d_sae."""
    exact: ClassVar[tuple[str, ...]] = BatchTopK.exact

    def __post_init__(self) -> None:
        object.__setattr__(self, "prefixes", tuple(self.prefixes))

    def check(self, d_sae: int) -> None:
        self.inner.check(d_sae)
        ascending = all(type(p) is int for p in self.prefixes) and list(self.prefixes) == sorted(set(self.prefixes))
        if not self.prefixes or not ascending or self.prefixes[0] < 1 or self.prefixes[-1] != d_sae:
            raise UserError(
                f"prefixes: got {self.prefixes}, needs ascending numbers from 1 up, the last d_sae = {d_sae}"
            )

    def attach(self, sae: SAE) -> None:
        self.inner.attach(sae)

    def width(self, d_sae: int) -> int:
        return self.inner.width(d_sae)

    def mean_k(self) -> float | None:
        return self.inner.mean_k()

    def start(self, sae: SAE, encoder: Encoder, wanted: Tensor) -> None:
        self.inner.start(sae, encoder, wanted)

    def encode(self, sae: SAE, x: Tensor, encoder: Encoder, wanted: Tensor | None) -> SparseCodes:
        return self.inner.encode(sae, x, encoder, wanted)

    def choose(self, sae: SAE, x: Tensor, encoder: Encoder, k: int | Tensor | None, wanted: Tensor) -> Chosen:
        return self.inner.choose(sae, x, encoder, k, wanted)

    def error(self, sae: SAE, codes: SparseCodes, target: Tensor, *, residual: bool) -> tuple[Tensor, Tensor | None]:
        # Each latent is gathered once: a prefix takes away what its last group of latents decodes to.
        sizes = [end - start for start, end in zip((0, *self.prefixes), self.prefixes)]
        left, errors = target - sae.b_dec, []
        for group, W in zip(groups(codes, self.prefixes), sae.W_dec.split(sizes)):
            left = left - sparse_decode(group, W)
            errors.append(left.square().sum(-1))
        return torch.stack(errors).mean(0), left if residual else None

    def after_step(self, sae: SAE, codes: SparseCodes, k: int | Tensor | None) -> None:
        self.inner.after_step(sae, codes, k)

    def calibrate(self, sae: SAE, rows: Iterable[tuple[Tensor, Tensor | None]], budget: float) -> Tensor:
        return self.inner.calibrate(sae, rows, budget)

    def __str__(self) -> str:
        return f"Matryoshka of {len(self.prefixes)}, {self.inner}"


def groups(codes: SparseCodes, ends: tuple[int, ...]) -> list[SparseCodes]:
    """The codes `[..., K]` of the latents below `ends[0]`, from there to below `ends[1]`, and so on, each numbered from
    the start of its group.

    Indices must ascend within a row, as a selection's do. The gradient of every value comes back from its group.
    """
    live, width = codes.mask(), codes.indices.shape[-1]
    slot = torch.arange(width, device=codes.indices.device)
    parts, first, start = [], torch.zeros_like(codes.counts), 0
    for end in ends:
        # Ascending: the latents of a group lie next to each other, from `first` on.
        last = (live & (codes.indices < end)).sum(-1, dtype=torch.int32)
        place = (slot + first.unsqueeze(-1)).clamp(max=max(0, width - 1)).long()
        counts = last - first
        inside = slot < counts.unsqueeze(-1)
        values = torch.where(inside, codes.values.gather(-1, place), 0)
        indices = torch.where(inside, codes.indices.gather(-1, place) - start, -1)
        parts.append(SparseCodes(values, indices, counts))
        first, start = last, end
    return parts
