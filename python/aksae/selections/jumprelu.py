"""JumpReLU: a threshold of its own for each latent, learned."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from aksae_kernels import SparseCodes, batch_topk_encode, sparse_encode, threshold_encode

from ..distributed import global_mean, global_rows
from ..errors import UserError
from .batch_topk import threshold_for
from .selection import CAP, Chosen, Encoder, Selection, at_least, check_budget

if TYPE_CHECKING:
    from ..sae import SAE


@dataclass(frozen=True)
class JumpReLU(Selection):
    """The pre-activations above their latent's threshold, `z = pre_act * [pre_act > theta]` (arXiv 2407.14435).

    The thresholds `theta = exp(log_threshold) [F]` are trained by the rectangle estimator of `jumprelu` and `step`, and
    by a penalty that pulls the mean L0 of a batch to `l0`:

        penalty * ((L0 / l0) - 1)^2,

    as a share of the variance of what is reconstructed, so that neither depends on the units of the activations. They
    start, all alike, at the number that gives the first batch a mean L0 of `l0`. `aksae.calibrate` multiplies them all
    by the factor at which rows that were not trained on have the mean L0 that is asked for.
    """

    l0: int = 64
    """The mean number of latents of a row that training aims at."""
    k_max: int | None = None
    """The most latents of a row, a row's largest first; None for 8 l0, or d_sae if that is less."""
    bandwidth: float = 0.1
    """Width of the rectangle, as a share of the threshold."""
    penalty: float = 10.0
    """What the distance from `l0` weighs. It is never quite closed: a mean L0 above the target lowers the error. With
    the defaults runs of 1000 to 1500 steps end 2 to 9 % above the target (CONTRIBUTING.md has the numbers)."""
    threshold_lr: float = 3.0
    """How many times as fast as the weights the logarithms of the thresholds learn. Pre-activations shrink in the first
    steps, and thresholds that do not follow leave most latents silent."""
    exact: ClassVar[tuple[str, ...]] = ("log_threshold",)

    def check(self, d_sae: int) -> None:
        at_least("l0", self.l0, 1, d_sae)
        if self.k_max is not None:
            at_least("k_max", self.k_max, self.l0, d_sae)
        if not 0 < self.bandwidth <= 2:
            raise UserError(f"bandwidth: got {self.bandwidth}, needs a number above 0 and at most 2")
        if not self.threshold_lr > 0:
            raise UserError(f"threshold_lr: got {self.threshold_lr}, needs a number above 0")
        if not self.penalty >= 0:
            raise UserError(f"penalty: got {self.penalty}, needs a number from 0 up")

    def attach(self, sae: SAE) -> None:
        # Below every positive number of the dtypes in use: an SAE that was not trained yet keeps what is positive.
        sae.log_threshold = nn.Parameter(torch.full((sae.config.d_sae,), -80.0))

    def rates(self) -> dict[str, float]:
        return {"log_threshold": self.threshold_lr}

    def width(self, d_sae: int) -> int:
        return min(CAP * self.l0, d_sae) if self.k_max is None else self.k_max

    def mean_k(self) -> float:
        return self.l0

    @torch.no_grad()
    def start(self, sae: SAE, encoder: Encoder, wanted: Tensor) -> None:
        rows = encoder.x.shape[:-1].numel()
        codes = batch_topk_encode(*encoder, budget=self.l0 * rows, k_max=sae.width())
        smallest = codes.values[codes.mask()].amin() if bool(codes.counts.any()) else sae.log_threshold.new_ones(())
        sae.log_threshold.copy_(smallest.log())

    def encode(self, sae: SAE, x: Tensor, encoder: Encoder, wanted: Tensor | None) -> SparseCodes:
        threshold = sae.log_threshold.detach().exp().to(encoder.x.dtype)
        return threshold_encode(*encoder, threshold=threshold, k_max=sae.width())

    def choose(self, sae: SAE, x: Tensor, encoder: Encoder, k: int | Tensor | None, wanted: Tensor) -> Chosen:
        if isinstance(k, Tensor):
            return Chosen(encoder.topk(k, sae.width(k)))
        theta = sae.log_threshold.exp()
        # The estimator's rectangle reaches half its width below a threshold.
        reach = (theta.detach() * (1 - self.bandwidth / 2)).to(encoder.x.dtype)
        near = threshold_encode(*encoder, threshold=reach, k_max=sae.width())
        values, fires = _JumpReLU.apply(near.values, _at(theta, near), self.bandwidth)
        # The square is that of the whole batch's L0, not a mean of the processes' squares.
        l0 = global_mean(fires, global_rows(x))
        target = self.l0 if k is None else k
        return Chosen(near._replace(values=values), self.penalty * (l0 / target - 1).square())

    @torch.no_grad()
    def calibrate(self, sae: SAE, rows: Iterable[tuple[Tensor, Tensor | None]], budget: float) -> Tensor:
        check_budget(budget, sae.width())
        theta = sae.log_threshold.exp()
        candidates = [sae.encoder(x).topk(sae.width()) for x, _ in rows]
        # In units of their latents' thresholds, where one threshold holds for all.
        relative = [codes._replace(values=codes.values / _at(theta, codes)) for codes in candidates]
        factor = threshold_for(relative, budget)
        # The logarithm of a threshold has no number for 0.
        sae.log_threshold.add_(factor.clamp_min(torch.finfo(factor.dtype).tiny).log())
        return factor

    def __str__(self) -> str:
        return f"JumpReLU, L0 of {self.l0}"


def _at(theta: Tensor, codes: SparseCodes) -> Tensor:
    """`theta [F]` of each code, `[..., K]`, 0 past the counts: a product of one column, whose gradient is summed in a
    fixed order."""
    pattern = codes._replace(values=codes.values.detach().to(theta.dtype))
    with torch.autocast(theta.device.type, enabled=False):
        return sparse_encode(pattern, theta.new_ones(*codes.counts.shape, 1), theta.unsqueeze(-1))


def jumprelu(pre_acts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """`pre_acts * [pre_acts > threshold]`, elementwise, with a gradient to the threshold (arXiv 2407.14435).

    With `e = bandwidth * threshold`, the gradient is `[pre_acts > threshold]` to `pre_acts` and
    `-threshold / e * [|pre_acts - threshold| < e / 2]` to `threshold`: the rectangle estimator of the derivative of the
    expected loss. `threshold` is positive; both tensors have one shape and may differ in dtype.
    """
    return _JumpReLU.apply(pre_acts, threshold, bandwidth)[0]


def step(pre_acts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """`[pre_acts > threshold]`, elementwise in the threshold's dtype, with the rectangle estimator's gradient,
    `-1 / e * [|pre_acts - threshold| < e / 2]`, to `threshold`; see `jumprelu`. None to `pre_acts`."""
    return _JumpReLU.apply(pre_acts, threshold, bandwidth)[1]


class _JumpReLU(torch.autograd.Function):
    """`jumprelu` and `step` at once: their gradients share a rectangle."""

    @staticmethod
    def forward(ctx, pre_acts, threshold, bandwidth):
        fires = pre_acts > threshold
        ctx.save_for_backward(pre_acts, threshold, fires)
        ctx.bandwidth = bandwidth
        return torch.where(fires, pre_acts, 0), fires.to(threshold.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, to_values, to_fires):
        pre_acts, threshold, fires = ctx.saved_tensors
        inside = (pre_acts.to(threshold.dtype) - threshold).abs() < threshold * (ctx.bandwidth / 2)
        # Inside, the values' derivative is -threshold / e and the step's -1 / e. Outside, where a threshold may be 0,
        # the quotient is dropped.
        slope = (to_values.to(threshold.dtype) + to_fires / threshold) / -ctx.bandwidth
        return torch.where(fires, to_values, 0), torch.where(inside, slope, 0), None
