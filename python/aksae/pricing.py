"""The mean number of latents of an SAE that is there: calibrated, or at a price."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from aksae_kernels.pricing import candidates_of

from .errors import UserError
from .formats.native import as_sae
from .formats.stored import StoredSAE
from .sae import SAE
from .selections import Priced

CALIBRATED = 16_384
"""Rows by which a run sets a price: the mean of as many is good to some 0.3 %."""
_TRIES = 25
_LEAST = 1e-3
"""A mean L0 below this is as good as none."""


def calibrate(
    sae: SAE, rows: Tensor, budget: float | None = None, *, target: Tensor | None = None, batch_size: int = 4096
) -> float:
    """Let `rows` keep `budget` latents in the mean: set, and return, the constant of an SAE's selection that decides.

    That is the price of `Priced`, the bias of `Need`, the threshold of `BatchTopK` and of a `Matryoshka` of it; the
    thresholds of `JumpReLU` are all multiplied by one factor, which is returned.

    Take rows that were not trained on: the error of those that were is smaller, so that fewer latents pay, and the same
    price gives other rows 10 % more. A few thousand give the mean to half a percent. Several budgets of one SAE are
    several constants of it.

    Where fewer latents lower the error than the budget asks for, even without a price, all of these are kept. Short of
    it by more than 2 %, a `Notice` says so, with both numbers.

    Args:
        sae: its constant is set in place, in the units of training.
        rows: `[N, D]`, as `SAE.encode` takes them, on any device. But for `Need`, candidates are held in memory
            together.
        budget: None for the selection's own.
        target: `[N, D_out]`, for a transcoder at a price; others need none.
        batch_size: rows encoded at a time.

    Raises:
        UserError: another selection, no rows, or a budget that no row can have: above 0 and at most `SAE.k_bound`,
            from k_min to k_max for `Need`.
        ValueError: a transcoder with latents at a price, without a target.
    """
    selection = sae.config.selection
    if len(rows) == 0:
        raise UserError("rows: got none, needs at least one to take the mean over")
    targets = [None] * len(rows.split(batch_size)) if target is None else target.split(batch_size)
    like = sae.W_dec
    batches = (
        (x.to(like.device, like.dtype), None if y is None else y.to(like.device, like.dtype))
        for x, y in zip(rows.split(batch_size), targets, strict=True)
    )
    return float(selection.calibrate(sae, batches, selection.mean_k() if budget is None else budget))


def settle(mean_l0: Callable[[float], float], budget: float, *, tolerance: float) -> float:
    """The shift at which `mean_l0(shift)`, which does not fall with it, is `budget`; its last call has that shift.

    For a rule with one number: a price or a threshold that is multiplied by `exp(-shift)`, starting as it stands. The
    logarithm of the mean L0 is nearly linear in the shift, so that secants, between bounds as soon as there are some,
    need a few calls where bisection from nothing needs 30. Where no shift gives the budget to a share of `tolerance`,
    as when too few latents are positive, the last one tried: look at the L0 that is left.
    """
    shift, low, high = 0.0, -math.inf, math.inf
    before: tuple[float, float] | None = None
    for tries in range(_TRIES):
        l0 = mean_l0(shift)
        if abs(l0 / budget - 1) <= tolerance or tries == _TRIES - 1:
            break
        gap = math.log(max(l0, _LEAST) / budget)
        low, high = (shift, high) if gap < 0 else (low, shift)
        slope = 1.0 if before is None else (gap - before[1]) / (shift - before[0])
        before = shift, gap
        # Two near shifts may have any slope: no step is of more than a factor of e^2.
        target = shift + max(-2.0, min(2.0, -gap / slope if slope > 0 else -gap))
        if not low < target < high:
            target = (low + high) / 2 if math.isfinite(low + high) else shift - math.copysign(2.0, gap)
        if target == shift:
            break
        shift = target
    return shift


def adapt(
    sae: SAE | StoredSAE,
    rows: Tensor,
    budget: float,
    *,
    target: Tensor | None = None,
    k_max: int | None = None,
    passes: int = 2,
) -> SAE:
    """`sae`, whatever its selection, with latents at a price: `budget` of them in the mean over `rows`.

    It is not trained, and its weights are shared, not copied, but for what is folded into those of another codebase:
    decoder norms, so that its latents are larger by these, and what its encoder subtracts. What a row may keep are its
    `k_max` largest positive pre-activations, whatever the thresholds or the k of the SAE were.

    Args:
        sae: any `SAE`, or what `aksae.formats.load` gave.
        rows, target: as in `calibrate`.
        budget: mean number of latents of a row; the `budget` of the selection is this, rounded.
        k_max: candidates of a row; None for 4 budgets and at least 256, or d_sae if that is less.
        passes: walks over the candidates.

    Returns:
        An `SAE` on the device and in the dtype of `sae`; one of another codebase in eval mode.

    Raises:
        As `calibrate`, and UserError for a budget, a k_max or passes that `Priced` refuses, and for an SAE of another
        codebase that normalises each input, or adds a skip connection to an autoencoder.
    """
    d_sae = sae.config.d_sae if isinstance(sae, SAE) else sae.d_sae
    if not 0 < budget <= d_sae:
        raise UserError(f"budget: got {budget}, needs a number above 0 and at most d_sae = {d_sae}")
    k_max = min(candidates_of(budget), d_sae) if k_max is None else k_max
    selection = Priced(max(1, round(budget)), k_max, passes, passes)
    if isinstance(sae, SAE):
        config, weights = dataclasses.replace(sae.config, selection=selection), dict(sae.named_parameters())
    else:
        try:
            config, weights = as_sae(sae, selection)
        except UserError as error:
            raise UserError(f"sae: {error}") from error
    with torch.device("meta"):
        priced = SAE(config)
    weights = {name: weights[name] for name, _ in priced.named_parameters()}
    weights["price"] = torch.zeros((), device=sae.W_dec.device)
    priced.load_state_dict(weights, assign=True)
    calibrate(priced, rows, budget, target=target)
    return priced.train(isinstance(sae, SAE) and sae.training)
