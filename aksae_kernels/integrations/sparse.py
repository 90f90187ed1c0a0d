"""Codes in the forms that hosts want, and selections that hosts make and the ops alone do not."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from .. import SparseCodes, batch_topk_select, encode_at, sparse_encode, threshold_select, topk_encode, topk_select
from .accelerated import has_data

_SLACK = 8
"""How many times the latents of an average row a row may have before the scores of all latents are kept at once."""
_CROWD = 16
"""Where more than one in so many latents fire, dense products are about as fast."""
_SAMPLE = 16
"""Rows that tell how many latents fire."""


def product_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which a product with `tensor` is made: autocast's, where that is on and casts it."""
    # torch knows no autocast of the meta device, and raises.
    is_cast = not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type) and tensor.dtype != torch.float64
    return torch.get_autocast_dtype(tensor.device.type) if is_cast else tensor.dtype


def pre_acts_at(codes: SparseCodes, x: Tensor, W_enc: Tensor, b_enc: Tensor | None) -> SparseCodes:
    """`encode_at`, but a bias that autocast would round keeps its dtype.

    A host that adds its bias to `x @ W_enc.T` goes on in the dtype of the bias.
    """
    if b_enc is None or b_enc.dtype == product_dtype(x):
        return encode_at(codes, x, W_enc, b_enc)
    return codes._replace(values=sparse_encode(codes, x, W_enc) + codes.gather(b_enc))


def topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, scale: Tensor | None = None) -> SparseCodes:
    """The k latents largest in `scale[f] (<x, W_enc[f]> + b_enc[f])` and positive, with the unscaled scores as values.

    `scale [F]`, not negative: the norms of decoder rows; None for 1. No gradient flows to it, nor does one where a host
    multiplies the scores by norms and the decoder rows by their inverse. Raises ValueError for a k beyond F: hosts do
    not clamp it.
    """
    _require_at_most("k", k, len(W_enc))
    if scale is None:
        return topk_encode(x, W_enc, b_enc, k=k)
    with torch.no_grad():
        chosen = topk_encode(x, W_enc * scale.unsqueeze(1), b_enc * scale, k=k)
    return pre_acts_at(chosen, x, W_enc, b_enc)


def candidates(x: Tensor, W_enc: Tensor, b_enc: Tensor, k_max: int, scale: Tensor | None = None) -> SparseCodes:
    """`topk` of all latents if there are fewer than `k_max`, with the scaled scores as values."""
    codes = topk(x, W_enc, b_enc, min(k_max, len(W_enc)), scale)
    return codes if scale is None else codes._replace(values=codes.values * codes.gather(scale))


def candidates_of(scores: Tensor, k_max: int, scale: Tensor | None = None) -> SparseCodes:
    """`candidates` of scores `[..., F]` that are there: a host has made them, or shows them to hooks."""
    return topk_select(scores if scale is None else scores * scale, min(k_max, scores.shape[-1]))


def batch_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, budget: int, scale: Tensor | None = None) -> SparseCodes:
    """The `budget` best latents of the whole batch `x [..., D]`, ranked by `scale[f]` times the score if given.

    Values are the unscaled scores, with their gradients. The width of the codes is that of the longest row, which costs
    an accelerator a wait for the host, as does the top-k over the batch that it stands in for. Raises ValueError for a
    budget of more than all entries, as hosts do.
    """
    _require_at_most("budget", budget, x.shape[:-1].numel() * len(W_enc))
    with torch.no_grad():
        if scale is None:
            chosen = _best_of_batch(x, W_enc, b_enc, budget)
        else:
            chosen = _best_of_batch(x, W_enc * scale.unsqueeze(1), b_enc * scale, budget)
    is_final = scale is None and not _any_learns(x, W_enc, b_enc)
    return chosen if is_final else pre_acts_at(chosen, x, W_enc, b_enc)


def above(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor) -> SparseCodes:
    """The latents whose score is `> 0` and above `threshold` (`[]` or `[F]`), with scores and gradients as values.

    The width of the codes is that of the longest row, as in `batch_topk`.
    """
    with torch.no_grad():
        chosen = _all_above(x, W_enc, b_enc, threshold.to(b_enc.dtype))
    return pre_acts_at(chosen, x, W_enc, b_enc) if _any_learns(x, W_enc, b_enc) else chosen


def is_crowded(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor) -> bool:
    """Whether, by a few rows of `x [..., D]`, too many scores are `> 0` and above their threshold for codes to pay.

    True as well without data to look at, where the host's own code has to run.
    """
    if not has_data(x):
        return True
    rows = x.detach().reshape(-1, x.shape[-1])
    rows = rows[:: max(1, len(rows) // _SAMPLE)]
    hits = F.linear(rows, W_enc.detach(), b_enc.detach()) > threshold.detach().clamp(min=0)
    return _CROWD * int(hits.sum()) > hits.numel()


def active_codes(acts: Tensor) -> SparseCodes | None:
    """The entries of `acts [..., F]` that are not 0, without gradient, if few are and none is negative or NaN.

    None if not, if `acts` has no data to tell, and if it is differentiated, in either mode: that concerns every entry,
    zeros too.
    """
    is_differentiated = (torch.is_grad_enabled() and acts.requires_grad) or has_tangent(acts)
    if is_differentiated or not acts.numel() or not has_data(acts) or not bool(acts.min() >= 0):
        return None
    width = acts.shape[-1] // (2 * _SLACK)
    codes = topk_select(acts, width)
    return _trimmed(codes) if bool((codes.counts < width).all()) else None


def padded(codes: SparseCodes) -> tuple[Tensor, Tensor]:
    """Activations `[..., K]` and indices `[..., K]` int64, as hosts with one k for all rows have them.

    Slots past a row's count hold activation 0 and a latent that fired in the row, or where none did, one that fired in
    another row: a host that counts every index as fired then counts none that did not, as long as any did (else
    latent 0).
    """
    mask = codes.mask()
    indices = codes.indices.where(mask, 0).long()
    values = codes.values.where(mask, 0)
    if indices.shape[-1]:
        # By take: an index that is a tensor is read by the host on some devices, and there is nothing to read on meta.
        somewhere = indices.take(mask.int().argmax()) if indices.numel() else 0
        spare = torch.where(codes.counts > 0, indices[..., 0], somewhere).unsqueeze(-1)
        indices = indices.where(mask, spare)
    return values, indices


def padded_apart(codes: SparseCodes) -> tuple[Tensor, Tensor]:
    """As `padded`, but slots past a row's count hold latents that the row does not have, each at most once.

    For callers that write activations into a dense row: of two that name one latent, the last would win. The codes may
    be no wider than there are latents.
    """
    mask, width = codes.mask(), codes.indices.shape[-1]
    # Of the latents 0 to K - 1 a row lacks at least as many as it has slots to spare; the last column is all others.
    is_taken = mask.new_zeros((*codes.counts.shape, width + 1))
    is_taken.scatter_(-1, codes.indices.where(mask & (codes.indices < width), width).long(), True)
    spare = is_taken[..., :width].int().argsort(dim=-1, stable=True)
    slot = torch.arange(width, device=mask.device) - codes.counts.unsqueeze(-1)
    return codes.values.where(mask, 0), codes.indices.long().where(mask, spare.gather(-1, slot.clamp(min=0).long()))


def has_tangent(tensor: Tensor) -> bool:
    """Whether the tensor is a dual one, of forward-mode differentiation."""
    return unpack_dual(tensor).tangent is not None


def _require_at_most(name: str, value: int, bound: int) -> None:
    if value > bound:
        raise ValueError(f"{name} must be at most {bound}, all there are; got {value}")


def _any_learns(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _best_of_batch(x: Tensor, W_enc: Tensor, b_enc: Tensor, budget: int) -> SparseCodes:
    # From each row's best, eight times as many as it has on average: no [B, F] is needed, unless all of a row's win.
    rows = max(1, x.shape[:-1].numel())
    width = min(_SLACK * math.ceil(budget / rows), len(W_enc))
    best = topk_encode(x, W_enc, b_enc, k=width)
    winners = batch_topk_select(best.values, budget)
    if width == len(W_enc) or bool((winners.counts < width).all()):
        return _trimmed(winners._replace(indices=best.indices.gather(-1, winners.indices.clamp(min=0).long())))
    return _trimmed(batch_topk_select(F.linear(x, W_enc, b_enc), budget))


def _all_above(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor) -> SparseCodes:
    # What is above a bar is positive once the bar is taken off: no [B, F] is needed, unless a row has very many.
    bar = threshold.clamp(min=0).nan_to_num(nan=math.inf, posinf=math.inf).expand_as(b_enc)
    width = len(W_enc) // (2 * _SLACK)
    codes = topk_encode(x, W_enc, b_enc - bar, k=width)
    if bool((codes.counts < width).all()):
        codes = _trimmed(codes)
        return codes._replace(values=codes.values + codes.gather(bar))
    scores = F.linear(x, W_enc, b_enc)
    # NaN is selected whatever the threshold.
    width = int(((scores > bar) | scores.isnan()).sum(-1).max())
    return threshold_select(scores, threshold.to(scores.dtype), width)


def _trimmed(codes: SparseCodes) -> SparseCodes:
    """No wider than the longest row."""
    width = int(codes.counts.max()) if codes.counts.numel() else 0
    return SparseCodes(codes.values[..., :width].contiguous(), codes.indices[..., :width].contiguous(), codes.counts)
