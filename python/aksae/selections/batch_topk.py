"""BatchTopK: one budget for the batch in training, one threshold at inference."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from aksae_kernels import SparseCodes, batch_topk_encode, threshold_encode

from ..distributed import global_min
from .selection import CAP, Chosen, Encoder, Selection, at_least, check_budget

if TYPE_CHECKING:
    from ..sae import SAE


@dataclass(frozen=True)
class BatchTopK(Selection):
    """The `k B` largest positive pre-activations of a batch of B rows (arXiv 2412.06410).

    A row first keeps its `k_max` largest, then the budget applies. At inference, where a row must not depend on its
    batch, it keeps what is above one threshold, the running mean of the smallest activation selected in training:
    `running_threshold`. An SAE that was not trained yet has the threshold 0. `sae.train()` and `sae.eval()` choose
    between the two. `aksae.calibrate` sets the threshold by the mean L0 of rows that were not trained on.
    """

    k: int
    k_max: int | None = None
    """The most latents of a row; None for 8 k, or d_sae if that is less."""
    decay: float = 0.999
    """Of the running mean, after the first steps."""
    exact: ClassVar[tuple[str, ...]] = ("threshold", "threshold_steps")

    def check(self, d_sae: int) -> None:
        at_least("k", self.k, 0, d_sae)
        if self.k_max is not None:
            at_least("k_max", self.k_max, self.k, d_sae)

    def attach(self, sae: SAE) -> None:
        sae.register_buffer("threshold", torch.zeros(()))
        sae.register_buffer("threshold_steps", torch.zeros(()))

    def width(self, d_sae: int) -> int:
        return min(CAP * self.k, d_sae) if self.k_max is None else self.k_max

    def mean_k(self) -> float:
        return self.k

    def encode(self, sae: SAE, x: Tensor, encoder: Encoder, wanted: Tensor | None) -> SparseCodes:
        if sae.training:
            return self._of_batch(sae, x, encoder, self.k)
        threshold = sae.threshold.to(encoder.x.dtype)
        return threshold_encode(*encoder, threshold=threshold, k_max=sae.width())

    def choose(self, sae: SAE, x: Tensor, encoder: Encoder, k: int | Tensor | None, wanted: Tensor) -> Chosen:
        k = self.k if k is None else k
        if isinstance(k, Tensor):
            return Chosen(encoder.topk(k, sae.width(k)))
        return Chosen(self._of_batch(sae, x, encoder, k))

    def _of_batch(self, sae: SAE, x: Tensor, encoder: Encoder, k: int) -> SparseCodes:
        return batch_topk_encode(*encoder, budget=k * math.prod(x.shape[:-1]), k_max=sae.width(k))

    @torch.no_grad()
    def after_step(self, sae: SAE, codes: SparseCodes, k: int | Tensor | None) -> None:
        threshold, steps = running_threshold(sae.threshold, sae.threshold_steps, codes, self.decay)
        sae.threshold.copy_(threshold)
        sae.threshold_steps.copy_(steps)

    @torch.no_grad()
    def calibrate(self, sae: SAE, rows: Iterable[tuple[Tensor, Tensor | None]], budget: float) -> Tensor:
        check_budget(budget, sae.width())
        sae.threshold.copy_(threshold_for([sae.encoder(x).topk(sae.width()) for x, _ in rows], budget))
        return sae.threshold

    def __str__(self) -> str:
        return f"BatchTopK, k = {self.k}"


def running_threshold(threshold: Tensor, steps: Tensor, codes: SparseCodes, decay: float) -> tuple[Tensor, Tensor]:
    """The running mean `threshold []` after `steps []` batches, taken on by one, and their number.

        threshold <- d threshold + (1 - d) min(values selected),   d = min(decay, steps / (steps + 9))

    so the first batch replaces the 0 that it starts from, and the mean reaches over a tenth of the steps until it
    reaches over `1 / (1 - decay)` of them. NaN is left out, and a batch in which nothing else was selected changes
    nothing. All on the codes' device, without synchronising; in a data-parallel run the smallest of all counts.
    """
    live = codes.mask() & (codes.values > 0)
    smallest = (
        torch.where(live, codes.values, math.inf).amin() if codes.values.numel() else threshold.new_tensor(math.inf)
    )
    smallest = global_min(smallest.to(threshold.dtype))
    kept = (steps / (steps + 9)).clamp(max=decay)
    usable = smallest.isfinite()
    return (
        torch.where(usable, kept * threshold + (1 - kept) * torch.where(usable, smallest, 0), threshold),
        steps + usable,
    )


def threshold_for(candidates: Sequence[SparseCodes], budget: float) -> Tensor:
    """The threshold `[]` above which rows keep `budget` of their candidates `[..., K]` in the mean, to the nearest
    latent of all rows; 0 where they have no more than that.

    It lies halfway between the smallest value that is kept and the largest that is not. Values that are equal are kept
    or left out together.
    """
    values = torch.cat([codes.values[codes.mask()] for codes in candidates]).sort(descending=True).values
    n_kept = max(1, round(budget * sum(codes.counts.numel() for codes in candidates)))
    return values[n_kept - 1 : n_kept + 1].mean() if n_kept < len(values) else values.new_zeros(())
