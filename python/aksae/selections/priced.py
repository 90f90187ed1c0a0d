"""Latents at a price: those that lower a row's error by more than a price, given the others that it has."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from aksae_kernels import SparseCodes, encode_at, price_for, price_select
from aksae_kernels.pricing import candidates_of

from ..distributed import global_rows, global_sum
from ..errors import Notice, UserError
from .selection import Chosen, Encoder, Selection, at_least, check_budget

if TYPE_CHECKING:
    from ..sae import SAE

_LOWEST = 1e-6
"""The lowest price of training, as a share of the mean square of the latents that are kept."""
_REACHED = 0.98
"""A mean L0 of less than this share of a budget is said."""


@dataclass(frozen=True)
class Priced(Selection):
    """AdaptiveK by a price: of its `k_max` largest positive pre-activations a row keeps those that pay.

    A latent pays if it lowers the row's squared error by more than the SAE's `price`, given those kept before it, which
    are larger (`aksae_kernels.price_select`). So each row has a k of its own, and of latents that say the same only the
    first is kept. No label and no probe is needed, and no row depends on its batch.

    In training the price follows the mean L0 of the batches, `price *= exp(rate * (L0 / budget - 1))`, after a first
    part of the run with the `budget` largest of each row; it does not fall below a millionth of the mean square of the
    latents that are kept, where it changes nothing any more. At inference it is a constant, in the units of training:
    the last one, until `aksae.calibrate` takes it from rows that were not trained on, whose error is larger, so that
    more latents pay.
    """

    budget: int
    """The mean number of latents of a row."""
    k_max: int | None = None
    """Candidates of a row, the most latents that it can have; None for 4 budgets and at least 256, or d_sae if that
    is less. An SAE that was trained with so many needs as many at inference."""
    passes: int = 1
    """Walks over the candidates in training."""
    passes_at_inference: int = 2
    """The same at inference: the second drops what later ones have made superfluous."""
    topk_share: float = 1 / 6
    """Share of a run that selects as TopK, so that there are directions to choose from."""
    rate: float = 1.0
    """How fast the price follows L0."""
    exact: ClassVar[tuple[str, ...]] = ("price",)
    calibrated: ClassVar[bool] = True

    def check(self, d_sae: int) -> None:
        at_least("budget", self.budget, 1, d_sae)
        if self.k_max is not None:
            at_least("k_max", self.k_max, self.budget, d_sae)
        for name in ("passes", "passes_at_inference"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise UserError(f"{name}: got {value!r}, needs an int from 1 up")
        if not 0 <= self.topk_share < 1:
            raise UserError(f"topk_share: got {self.topk_share}, needs a number from 0 to below 1")
        if not 0 < self.rate < math.inf:
            raise UserError(f"rate: got {self.rate}, needs a number above 0")

    def attach(self, sae: SAE) -> None:
        sae.register_buffer("price", torch.zeros(()))

    def width(self, d_sae: int) -> int:
        return min(candidates_of(self.budget), d_sae) if self.k_max is None else self.k_max

    def mean_k(self) -> float:
        return self.budget

    def is_topk_at(self, step: int, steps: int) -> bool:
        return step < self.topk_share * steps

    @torch.no_grad()
    def start(self, sae: SAE, encoder: Encoder, wanted: Tensor) -> None:
        candidates = encoder.topk(sae.width())
        sae.price.copy_(price_for([(candidates, wanted)], sae.W_dec, sae.b_dec, self.budget, self.passes))

    def encode(self, sae: SAE, x: Tensor, encoder: Encoder, wanted: Tensor | None) -> SparseCodes:
        if wanted is None:
            raise ValueError("target: got None, needs what this transcoder is to reconstruct: its latents have a price")
        return self._kept(sae, encoder.topk(sae.width()), wanted, self.walks(training=sae.training))

    def choose(self, sae: SAE, x: Tensor, encoder: Encoder, k: int | Tensor | None, wanted: Tensor) -> Chosen:
        if isinstance(k, Tensor):
            return Chosen(encoder.topk(k, sae.width(k)))
        with torch.no_grad():
            kept = self._kept(sae, encoder.topk(sae.width()), wanted, self.passes)
        # Encoded once more: through the candidates' own values the backward would gather all of them.
        return Chosen(encode_at(kept, *encoder))

    def walks(self, *, training: bool) -> int:
        """Passes over the candidates."""
        return self.passes if training else self.passes_at_inference

    def _kept(self, sae: SAE, candidates: SparseCodes, wanted: Tensor, passes: int) -> SparseCodes:
        return price_select(candidates, sae.W_dec, sae.b_dec, wanted, price=sae.price, passes=passes)

    @torch.no_grad()
    def after_step(self, sae: SAE, codes: SparseCodes, k: int | Tensor | None) -> None:
        if isinstance(k, Tensor):
            return
        dtype = sae.price.dtype
        n_kept, squares = global_sum(torch.stack([codes.counts.sum().to(dtype), codes.values.to(dtype).square().sum()]))
        step = self.rate * (n_kept / global_rows(codes.indices) / (self.budget if k is None else k) - 1)
        # Where rows have too few latents for the budget at any price, it would fall to 0, and never rise.
        sae.price.mul_(step.exp()).clamp_(min=_LOWEST * squares / n_kept.clamp_min(1))

    @torch.no_grad()
    def calibrate(self, sae: SAE, rows: Iterable[tuple[Tensor, Tensor | None]], budget: float) -> Tensor:
        check_budget(budget, sae.width())
        parts = [(sae.encoder(x).topk(sae.width()), sae.wanted(x, target)) for x, target in rows]
        passes = self.walks(training=False)
        price = price_for(parts, sae.W_dec, sae.b_dec, budget, passes)
        sae.price.copy_(price)
        free = [price_select(codes, sae.W_dec, sae.b_dec, y, price=0.0, passes=passes).counts for codes, y in parts]
        most = float(torch.cat([counts.flatten() for counts in free]).double().mean())
        if most < _REACHED * budget:
            warnings.warn(
                f"budget: got {budget:g} latents of a row in the mean, and only {most:.4g} of {sae.width()} candidates "
                "lower its error at all: so many are kept",
                Notice,
                stacklevel=3,
            )
        return price

    def __str__(self) -> str:
        return f"Priced, L0 of {self.budget}"
