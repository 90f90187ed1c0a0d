"""How the latents of a row were chosen at a price: the error after each, and what explains those passed over."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aksae_kernels import SparseCodes, price_select

from .selections.need import prefix_errors


@dataclass(frozen=True)
class Passed:
    """A candidate that was passed over; see `walk`."""

    latent: int
    value: float
    after: int
    """How many latents that were kept have a larger value."""
    alone: float
    """What it would lower the squared error by if nothing else were kept."""
    gain: float
    """What it would lower the squared error by beside those that were kept."""
    explained_by: int | None
    """The latent that was kept and lowers its gain most; None where it would not have paid alone, either."""
    share: float
    """That latent's part of what those that lower the gain lower it by together; 0 where there is no such latent."""


@dataclass(frozen=True)
class Walk:
    """What `walk` found of one row."""

    price: float
    latents: list[int]
    """Those kept, by value, larger first."""
    values: list[float]
    errors: list[float]
    """`[len(latents) + 1]`: squared error with none of them, with the first, and so on; the last is that of the row."""
    passed: list[Passed]
    """The other candidates, by value, larger first."""


@torch.no_grad()
def walk(
    candidates: SparseCodes, W_dec: Tensor, b_dec: Tensor | None, x: Tensor, *, price: float | Tensor, passes: int = 1
) -> Walk:
    """The kept latents of one row, `aksae_kernels.price_select` of its candidates, and why the others are not.

    With r the residual of the kept ones, S, a candidate c that was passed over would lower the squared error by

        gain(c) = 2 v_c <r, w_c> - v_c^2 |w_c|^2 = alone(c) - sum_{s in S} 2 v_c v_s <w_s, w_c>

    where `alone` is the same with S empty. So each kept latent has an additive part in lowering the gain, whatever the
    order: c is explained by the s with the largest 2 v_c v_s <w_s, w_c>, if `alone(c) > price` and that is positive.

    After the last pass, if that changed nothing, every gain is at most the price.

    Args:
        candidates: `[K]`, as the selection had them.
        W_dec, b_dec, x: `[F, D]`, `[D]` or None, and `[D]`, in the units of the selection.
        price, passes: as in `price_select`.
    """
    kept = price_select(candidates, W_dec, b_dec, x, price=price, passes=passes)
    n, n_kept = int(candidates.counts), int(kept.counts)
    values, order = candidates.values[:n].sort(descending=True, stable=True)
    indices = candidates.indices[:n][order].long()
    is_kept = torch.isin(indices, kept.indices[:n_kept].long())
    pieces = (values[:, None] * W_dec[indices]).double()
    wanted = x.double() if b_dec is None else x.double() - b_dec.double()
    alone = 2 * (pieces @ wanted) - pieces.square().sum(-1)
    # [passed, kept]: the part of each kept latent in lowering the gain of each that was passed over.
    parts = 2 * pieces[~is_kept] @ pieces[is_kept].T
    gains = alone[~is_kept] - parts.sum(-1)
    latents = indices[is_kept]
    over = zip(
        indices[~is_kept].tolist(),
        values[~is_kept].tolist(),
        is_kept.cumsum(0)[~is_kept].tolist(),
        alone[~is_kept].tolist(),
        gains.tolist(),
        (_explained(part, latents) for part in parts),
    )
    passed = [
        Passed(latent, value, after, by_itself, gain, *(explained if by_itself > price else (None, 0.0)))
        for latent, value, after, by_itself, gain, explained in over
    ]
    errors = prefix_errors(_row(kept), W_dec, b_dec if b_dec is not None else torch.zeros_like(x), x[None])[0]
    return Walk(float(price), latents.tolist(), values[is_kept].tolist(), errors[: n_kept + 1].tolist(), passed)


def _explained(parts: Tensor, latents: Tensor) -> tuple[int | None, float]:
    """Of the parts `[kept]` that kept latents have in lowering a gain: whose is largest, and its share, if any is."""
    if not len(parts) or not parts.max() > 0:
        return None, 0.0
    largest = int(parts.argmax())
    return int(latents[largest]), float(parts[largest] / parts.clamp_min(0).sum())


def _row(codes: SparseCodes) -> SparseCodes:
    """Codes `[K]` as `[1, K]`."""
    return SparseCodes(codes.values[None], codes.indices[None], codes.counts[None])
