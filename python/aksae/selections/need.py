"""Need: a k for each row that a linear probe knows before the encode."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from aksae_kernels import SparseCodes
from aksae_kernels.pricing import lowest_price

from ..distributed import gathered, global_max, global_sum
from ..errors import UserError
from ..probe import solve_psd
from .selection import Chosen, Encoder, Selection, at_least

if TYPE_CHECKING:
    from ..sae import SAE

_CHUNK = 4096
"""Rows in float64 at a time."""


@dataclass(frozen=True)
class Need(Selection):
    """AdaptiveK by need: each row keeps its k largest positive pre-activations, `k = probe(x)`, of what it needs.

    The need of a row is the length of the prefix of its candidates, by value, whose error and price together are least,

        need = argmin_j |x - x_hat_j|^2 + price j,   x_hat_j = b_dec + sum of the j largest candidates,

    with the price at which the mean is the `budget`. It is nearly linear in the activation, so a ridge regression on
    standardised activations reads it without encoding:

        k = clamp(round(w . s x + b), k_min, k_max),

    with s the SAE's `input_scale` and b such that the mean is the budget. So, as in AdaptiveK (arXiv 2508.17320), k is
    known before the encode and no row depends on its batch, but what it predicts is measured on the SAE.

    A run selects as TopK for `topk_share` of its steps, then measures need on the last `measured_rows` rows and fits
    the probe, and does so again at even intervals, `fits` times in all. The probe is two buffers of the SAE,
    `need_weight [d_in]` and `need_bias []`; until the first fit every row has the budget. `aksae.calibrate` sets the
    bias again, by the mean L0 of rows that were not trained on. Measuring holds the rows and `k_max + 1` errors of
    each.

    A transcoder's need is measured against its target; at inference it is read off its input.
    """

    budget: int
    """The mean number of latents of a row."""
    k_min: int | None = None
    """The fewest latents of a row; None for an eighth of the budget, and at least 1."""
    k_max: int | None = None
    """The most latents of a row, and the candidates that need is measured on; None for 4 budgets, or d_sae if that is
    less. Hardly a row needs more, and measuring costs as much as there are."""
    topk_share: float = 1 / 3
    """Share of a run that selects as TopK, so that there are latents to measure need on."""
    fits: int = 4
    """How many times need is measured."""
    measured_rows: int = 20_000
    """How many rows it is measured on, of all processes together."""
    ridge_lambda: float = 100.0
    """The probe's penalty, beside the sum over rows of squared errors."""
    exact: ClassVar[tuple[str, ...]] = ("need_weight", "need_bias")
    calibrated: ClassVar[bool] = True

    def check(self, d_sae: int) -> None:
        at_least("budget", self.budget, 1, d_sae)
        if self.k_min is not None and not (type(self.k_min) is int and 0 <= self.k_min <= self.budget):
            raise UserError(f"k_min: got {self.k_min!r}, needs an int from 0 to the budget, {self.budget}")
        if self.k_max is not None:
            at_least("k_max", self.k_max, self.budget, d_sae)
        if not 0 < self.topk_share < 1:
            raise UserError(f"topk_share: got {self.topk_share}, needs a number above 0 and below 1")
        for name in ("fits", "measured_rows"):
            value = getattr(self, name)
            if not (type(value) is int and value >= 1):
                raise UserError(f"{name}: got {value!r}, needs an int from 1 up")
        if not 0 < self.ridge_lambda < float("inf"):
            raise UserError(f"ridge_lambda: got {self.ridge_lambda}, needs a number above 0")

    def attach(self, sae: SAE) -> None:
        sae.register_buffer("need_weight", torch.zeros(sae.config.d_in))
        sae.register_buffer("need_bias", torch.tensor(float(self.budget)))

    def width(self, d_sae: int) -> int:
        return min(4 * self.budget, d_sae) if self.k_max is None else self.k_max

    def mean_k(self) -> float:
        return self.budget

    def is_topk_at(self, step: int, steps: int) -> bool:
        return step < self.measures(steps)[0][0]

    def measures(self, steps: int) -> tuple[Sequence[int], int]:
        shares = (self.topk_share + (1 - self.topk_share) * fit / self.fits for fit in range(self.fits))
        return sorted({max(1, round(share * steps)) for share in shares}), self.measured_rows

    @torch.no_grad()
    def measure(self, sae: SAE, rows: Sequence[tuple[Tensor, Tensor | None]]) -> None:
        most = sae.width()
        errors = [
            prefix_errors(sae.encoder(x).topk(most), sae.W_dec, sae.b_dec, sae.wanted(x, target)) for x, target in rows
        ]
        need = need_of(errors, self.budget)
        sae.need_weight.copy_(_probe([sae.scaled(x) for x, _ in rows], need, self.ridge_lambda))
        # Every process searches the scores of all of them. The mean is that of k, not of L0: rows of a young SAE may
        # have too few positive candidates for any k.
        scores = gathered(torch.cat([self._scores(sae, x) for x, _ in rows]).double()[:, None])[:, 0]
        sae.need_bias.copy_(self._bias(scores, torch.full_like(scores, most), self.budget, most))

    @torch.no_grad()
    def calibrate(self, sae: SAE, rows: Iterable[tuple[Tensor, Tensor | None]], budget: float) -> Tensor:
        least, most = self._least(), sae.width()
        if not least <= budget <= most:
            raise UserError(f"budget: got {budget}, needs a number from k_min to k_max, {least} to {most}")
        parts = [(self._scores(sae, x), sae.encoder(x).topk(most).counts) for x, _ in rows]
        scores, counts = (torch.cat(tensors).double() for tensors in zip(*parts))
        sae.need_bias.copy_(self._bias(scores, counts, budget, most))
        return sae.need_bias

    @torch.no_grad()
    def k_for(self, sae: SAE, x: Tensor, more: int = 0) -> Tensor:
        return self._k(self._scores(sae, x) + (sae.need_bias + more), sae.width())

    def encode(self, sae: SAE, x: Tensor, encoder: Encoder, wanted: Tensor | None) -> SparseCodes:
        return encoder.topk(self.k_for(sae, x), sae.width())

    def choose(self, sae: SAE, x: Tensor, encoder: Encoder, k: int | Tensor | None, wanted: Tensor) -> Chosen:
        if not isinstance(k, Tensor):
            k = self.k_for(sae, x, 0 if k is None else k - self.budget)
        return Chosen(encoder.topk(k, sae.width()))

    def _least(self) -> int:
        return max(1, self.budget // 8) if self.k_min is None else self.k_min

    def _scores(self, sae: SAE, x: Tensor) -> Tensor:
        """`w . s x`, `[...]`. A product of 16 bits would move k by about one."""
        dtype = torch.promote_types(sae.need_weight.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return sae.scaled(x.to(dtype)) @ sae.need_weight.to(dtype)

    def _k(self, scores: Tensor, most: int) -> Tensor:
        # NaN would be any integer; its row has NaN in its codes with every k but 0.
        return scores.nan_to_num(nan=most).clamp(self._least(), most).round().int()

    def _bias(self, scores: Tensor, counts: Tensor, budget: float, most: int) -> Tensor:
        """The bias `[]` at which rows of `scores [N]` and of so many candidates, `counts [N]`, keep `budget` in the
        mean; where they have fewer candidates, all of them.

        Found by bisection between the biases that give every row the least and the most, for the first that reaches the
        budget and the last that does not exceed it. The middle of both is the bias furthest from where a k changes.
        """
        wanted = budget * len(scores)
        edges = []
        for exceeds in (torch.ge, torch.gt):
            low, high = self._least() - scores.amax() - 1, most - scores.amin() + 1
            for _ in range(64):
                middle = (low + high) / 2
                is_high = exceeds(torch.minimum(self._k(scores + middle, most), counts).sum(), wanted)
                low, high = torch.where(is_high, low, middle), torch.where(is_high, middle, high)
            edges.append(high)
        return sum(edges) / 2

    def __str__(self) -> str:
        return f"Need, k of {self.budget}"


@torch.no_grad()
def prefix_errors(codes: SparseCodes, W_dec: Tensor, b_dec: Tensor, wanted: Tensor) -> Tensor:
    """Squared error of `wanted [B, D]` from each prefix of its codes by value: `[B, K + 1]`, in the dtype of sums.

        e[:, j] = |wanted - b_dec - sum_{i < j} v_i W_dec[l_i]|^2,   v_0 >= v_1 >= ...

    Equal values go by index, as a selection of the j largest takes them; past a row's count the error stays. The
    residual is carried along the prefixes, so no tensor `[B, K, D]` exists. Waits for an accelerator, once.
    """
    dtype = torch.promote_types(wanted.dtype, torch.float32)
    values, order = codes.values.masked_fill(~codes.mask(), -torch.inf).sort(dim=-1, descending=True, stable=True)
    values = values.masked_fill(values == -torch.inf, 0).to(dtype)
    latents = codes.indices.gather(-1, order).clamp_min(0)
    residual = wanted.to(dtype) - b_dec.to(dtype)
    errors = values.new_empty(len(values), values.shape[-1] + 1)
    longest = int(codes.counts.max()) if len(values) else 0
    # On CPUs as many rows as stay in a cache while all their prefixes pass; elsewhere a prefix is a few launches.
    n = max(1, 2**19 // wanted.shape[-1]) if wanted.device.type == "cpu" else max(1, len(values))
    for e, v, at, left in zip(errors.split(n), values.split(n), latents.split(n), residual.split(n)):
        e[:, 0] = torch.linalg.vector_norm(left, dim=-1).square()
        for j in range(longest):
            left.addcmul_(W_dec.index_select(0, at[:, j]).to(dtype), v[:, j, None], value=-1)
            e[:, j + 1] = torch.linalg.vector_norm(left, dim=-1).square()
        e[:, longest + 1 :] = e[:, longest : longest + 1]
    return errors


def need_of(errors: Sequence[Tensor], budget: float) -> list[Tensor]:
    """The need of each row, `[B]` integers for each of some `errors [B, K + 1]` (`prefix_errors`): the length of the
    prefix whose error and price together are least, at the price that makes the mean over the rows of all processes
    `budget`."""

    def needs(price: Tensor) -> list[Tensor]:
        return [(e + price * torch.arange(e.shape[-1], dtype=e.dtype, device=e.device)).argmin(-1) for e in errors]

    highest = global_max(torch.stack([e[:, 0].amax() for e in errors]).amax())
    n_rows = global_sum(torch.tensor(sum(len(e) for e in errors), device=highest.device))

    def n_needed(price: Tensor) -> Tensor:
        return global_sum(torch.stack([need.sum() for need in needs(price)]).sum())

    return needs(lowest_price(n_needed, budget * n_rows, highest))


def _probe(xs: Sequence[Tensor], need: Sequence[Tensor], lam: float) -> Tensor:
    """Weights `[D]` of the ridge regression of `need [B]` on the rows `x [B, D]` of all processes, in float64.

        minimise  sum_i (z_i . u + c - need_i)^2 + lam |u|^2,   z = (x - mean) / deviation,   w = u / deviation

    A column that does not vary has weight 0.
    """
    n_rows = global_sum(torch.tensor(sum(len(x) for x in xs), device=xs[0].device))
    mean = global_sum(torch.stack([x.sum(0, dtype=torch.float64) for x in xs]).sum(0)) / n_rows
    mean_need = global_sum(torch.stack([n.sum() for n in need]).sum()) / n_rows
    gram, product = mean.new_zeros(len(mean), len(mean)), torch.zeros_like(mean)
    for x, n in zip(xs, need):
        for rows, needs in zip(x.split(_CHUNK), n.split(_CHUNK)):
            centred = rows.double() - mean
            gram.addmm_(centred.T, centred)
            product += centred.T @ (needs.double() - mean_need)
    gram, product = global_sum(gram), global_sum(product)
    deviation = (gram.diagonal() / n_rows).sqrt()
    # What fp32 makes of a constant varies, too.
    varies = deviation > torch.finfo(torch.float32).eps * mean.abs()
    per_unit = torch.where(varies, 1 / deviation, 0)
    if not (gram.isfinite().all() and product.isfinite().all()):
        raise UserError("activations: got NaN or infinity where need is measured, needs numbers")
    return per_unit * solve_psd(per_unit[:, None] * gram * per_unit, per_unit * product, lam)
