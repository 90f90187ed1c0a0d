"""Every op in plain PyTorch, for any floating dtype and device: the default implementation and the oracle of the tests.

All functions take rows flattened to two dimensions and arguments already checked by `ops.py`. They compute in fp32
(fp64 for fp64), round once, and read nothing past `counts`. Cost follows `B * K`, or `B * F` for the selections and
weight gradients.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .codes import MAX_LATENTS, SparseCodes, acc_dtype, check_codes, live_slots
from .operands import above, among, exact_product, limits, require_width, visiting_order, whole_rows, with_bias
from .ordering import best_first, selectable

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Elements of the largest temporary of a sparse product; rows are taken in chunks that stay below it.
_CHUNK = 1 << 24


def unavailable() -> None:
    """Always there."""


def refuse(op: str, tensor: Tensor) -> str | None:
    """Any device, and the floating dtypes that PyTorch computes in."""
    name = str(tensor.dtype).removeprefix("torch.")
    return None if tensor.dtype in _DTYPES else f"it takes float16, bfloat16, float32 and float64, not {name}"


def describe() -> str:
    return "plain PyTorch"


def topk_select(pre_acts: Tensor, k: Tensor, k_max: int) -> SparseCodes:
    return _topk(pre_acts, k, k_max, pre_acts.dtype)


def topk_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: Tensor, k_max: int) -> SparseCodes:
    return _topk(_scores(x, W_enc, b_enc), k, k_max, x.dtype)


def batch_topk_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, budget: int, k_max: int) -> SparseCodes:
    candidates = _candidates(x, W_enc, b_enc, k_max)
    return among(candidates, batch_topk_select(candidates.values, budget, k_max), x.dtype)


def threshold_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, threshold: Tensor, k_max: int) -> SparseCodes:
    candidates = _candidates(x, W_enc, b_enc, k_max)
    values = above(candidates, limits(x, threshold, len(W_enc)))
    return among(candidates, topk_select(values, whole_rows(x, k_max), k_max), x.dtype)


def batch_topk_select(pre_acts: Tensor, budget: int, k_max: int) -> SparseCodes:
    flat = pre_acts.flatten()
    # Row-major order breaks ties by smaller row, then smaller latent.
    best = best_first(flat)[:budget]
    keep = torch.zeros_like(flat, dtype=torch.bool).scatter(0, best, selectable(flat[best]))
    return _compact(keep.view_as(pre_acts), pre_acts, k_max, pre_acts.dtype, "batch_topk_select")


def threshold_select(pre_acts: Tensor, threshold: Tensor, k_max: int) -> SparseCodes:
    above = pre_acts.double() > threshold.double()
    keep = ((pre_acts > 0) & above) | pre_acts.isnan()
    return _compact(keep, pre_acts, k_max, pre_acts.dtype, "threshold_select")


def sparse_decode(values: Tensor, indices: Tensor, counts: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    acc = acc_dtype(values.dtype)
    check_codes(indices, counts, W.shape[0])
    y = values.new_zeros(values.shape[0], W.shape[1], dtype=acc)
    for rows, weight, pieces in _gathered(values, indices, counts, W):
        y[rows] = (weight.unsqueeze(-1) * pieces).sum(1)
    if b is not None:
        y += b
    return y.to(values.dtype)


def decode_mse(
    values: Tensor,
    indices: Tensor,
    counts: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    target: Tensor,
    residual: bool,
    value_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    acc = acc_dtype(values.dtype)
    error = sparse_decode(values.to(acc), indices, counts, W_dec.to(acc), None if b_dec is None else b_dec.to(acc))
    error -= target
    loss = error.square().sum(-1)
    dots = sparse_value_grad(error, indices, counts, W_dec.to(acc)) if value_grad else error.new_empty(0, 0)
    return loss, error if residual else error.new_empty(0, 0), dots


def sparse_value_grad(grad: Tensor, indices: Tensor, counts: Tensor, W: Tensor) -> Tensor:
    check_codes(indices, counts, W.shape[0])
    out = grad.new_zeros(indices.shape)
    for rows, _, pieces in _gathered(None, indices, counts, W):
        out[rows] = (grad[rows].to(pieces.dtype).unsqueeze(1) * pieces).sum(-1).to(grad.dtype)
    # A NaN in grad times a blanked piece is NaN: padding is blanked last.
    return torch.where(live_slots(SparseCodes(out, indices, counts)), out, 0)


def sparse_weight_grad(
    values: Tensor, indices: Tensor, counts: Tensor, dense: Tensor, d_sae: int, sums: bool
) -> tuple[Tensor, Tensor]:
    check_codes(indices, counts, d_sae)
    live = live_slots(SparseCodes(values, indices, counts))
    weight = torch.where(live, values, 0).double()
    latent = torch.where(live, indices, 0).long()
    grad = weight.new_zeros(d_sae, dense.shape[1])
    total = weight.new_zeros(d_sae if sums else 0)
    for rows in _row_chunks(indices, dense.shape[1], d_sae) if d_sae else ():
        # A dense product and sum: one addend after the other would lose more than those in a latent of many hits.
        # index_put_ adds in a fixed order on every device, where scatter_add_ uses atomics on accelerators.
        dense_codes = weight.new_zeros(len(weight[rows]), d_sae)
        row = torch.arange(len(dense_codes), device=weight.device).unsqueeze(1)
        dense_codes.index_put_((row, latent[rows]), weight[rows], accumulate=True)
        finite = dense[rows].isfinite()
        grad += dense_codes.T @ torch.where(finite, dense[rows], 0).double()
        # Infinities and NaN reach the latents of their own row, and no zeros of others.
        rest = weight[rows].unsqueeze(-1) * torch.where(finite, 0, dense[rows]).double().unsqueeze(1)
        grad.index_put_((latent[rows],), torch.where(live[rows].unsqueeze(-1), rest, 0), accumulate=True)
        if sums:
            total += dense_codes.sum(0)
    return grad.to(values.dtype), total.to(values.dtype)


def sparse_encode(x: Tensor, indices: Tensor, counts: Tensor, W_enc: Tensor, b_enc: Tensor | None) -> Tensor:
    acc = acc_dtype(x.dtype)
    dots = sparse_value_grad(x.to(acc), indices, counts, W_enc.to(acc))
    return with_bias(dots, indices, counts, b_enc, x.dtype)


def scatter_codes(values: Tensor, indices: Tensor, counts: Tensor, d_sae: int) -> Tensor:
    return SparseCodes(values, indices, counts).to_dense(d_sae)


def price_select(
    values: Tensor,
    indices: Tensor,
    counts: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    x: Tensor,
    price: Tensor,
    passes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    acc = acc_dtype(values.dtype)
    check_codes(indices, counts, W_dec.shape[0])
    live = live_slots(SparseCodes(values, indices, counts))
    weight = torch.where(live, values, 0).to(acc)
    latent = torch.where(live, indices, 0).long()
    _, order = visiting_order(SparseCodes(values, indices, counts))
    residual = x.to(acc) if b_dec is None else x.to(acc) - b_dec.to(acc)
    kept = torch.zeros_like(live)
    for slot in order.unsqueeze(-1).unbind(1) * passes if W_dec.shape[0] else ():
        v, is_kept = weight.gather(1, slot), kept.gather(1, slot)
        piece = W_dec[latent.gather(1, slot).squeeze(1)].to(acc)
        linear = 2 * v * (residual * piece).sum(-1, keepdim=True)
        quadratic = v.square() * piece.square().sum(-1, keepdim=True)
        # A NaN joins, and what is NaN does not leave.
        joins = ~is_kept & ~(linear - quadratic <= price.unsqueeze(-1))
        leaves = is_kept & (linear + quadratic < price.unsqueeze(-1))
        changes = (joins | leaves) & live.gather(1, slot)
        # Blanked, not multiplied by zero: the row of W may hold inf.
        residual = residual + torch.where(changes, torch.where(joins, -v, v) * piece, 0)
        kept = kept.scatter(1, slot, is_kept ^ changes)
    kept = torch.where((price == -torch.inf).unsqueeze(-1), live, kept)
    slots = torch.where(kept, latent, MAX_LATENTS).argsort(dim=-1, stable=True).to(torch.int32)
    chosen = SparseCodes(slots, slots, kept.sum(-1, dtype=torch.int32))
    slots = torch.where(live_slots(chosen), slots, -1)
    chosen = SparseCodes(chosen.gather(values), slots, chosen.counts)
    return *chosen, among(SparseCodes(values, indices, counts), chosen, values.dtype).indices


def adam_step_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad_scale: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    unit_norm_rows: bool,
    lazy: bool,
) -> None:
    # Rows that sit the step out; a factor that is not finite must reach all of them.
    idle = ((grad == 0).all(-1, keepdim=True) & grad_scale.isfinite()) if lazy else None
    before = [tensor.clone() for tensor in (param, exp_avg, exp_avg_sq)] if lazy else []
    weight = param.to(exp_avg.dtype)
    grad = grad.to(exp_avg.dtype)
    if unit_norm_rows:
        grad = grad - torch.linalg.vecdot(grad, weight).unsqueeze(-1) * weight
    grad = grad * grad_scale
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (exp_avg_sq / (1 - beta2**step)).sqrt_().add_(eps)
    weight = weight - lr / (1 - beta1**step) * exp_avg / denominator
    if unit_norm_rows:
        norm = torch.linalg.vector_norm(weight, dim=-1, keepdim=True)
        weight = weight / torch.where(norm > 0, norm, 1)
    param.copy_(weight)
    for tensor, old in zip((param, exp_avg, exp_avg_sq), before):
        tensor.copy_(torch.where(idle, old, tensor))


def _scores(x: Tensor, W_enc: Tensor, b_enc: Tensor | None) -> Tensor:
    acc = acc_dtype(x.dtype)
    scores = exact_product(x.to(acc), W_enc.to(acc))
    return scores if b_enc is None else scores + b_enc.to(acc)


def _candidates(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k_max: int) -> SparseCodes:
    """The best of each row, unrounded."""
    return _topk(_scores(x, W_enc, b_enc), whole_rows(x, k_max), k_max, acc_dtype(x.dtype))


def _topk(scores: Tensor, k: Tensor, k_max: int, dtype: torch.dtype) -> SparseCodes:
    best = best_first(scores)[:, :k_max]
    rank = torch.arange(best.shape[1], device=scores.device)
    wanted = (rank < k.unsqueeze(-1)) & selectable(scores.gather(1, best))
    keep = torch.zeros_like(scores, dtype=torch.bool).scatter(1, best, wanted)
    return _compact(keep, scores, k_max, dtype, None)


def _compact(keep: Tensor, scores: Tensor, k_max: int, dtype: torch.dtype, checked_op: str | None) -> SparseCodes:
    """The kept scores of each row, packed to the left, as `[B, k_max]`; `checked_op` names the op that may overflow."""
    counts = keep.sum(-1, dtype=torch.int32)
    if checked_op is not None:
        require_width(counts, k_max, checked_op)
    n_latents = scores.shape[1]
    latent = torch.arange(n_latents, device=scores.device)
    indices = torch.where(keep, latent, n_latents).sort(-1).values[:, :k_max]
    live = indices < n_latents
    # A latent of its own for padding, so that rows of no latents can be gathered from too.
    padded = torch.nn.functional.pad(scores, (0, 1))
    values = padded.gather(1, indices).to(dtype)
    return SparseCodes(values, torch.where(live, indices, -1).to(torch.int32), counts)


def _row_chunks(indices: Tensor, width: int, of_row: int = 1) -> Iterator[slice]:
    """Slices of rows that each have `K * width` elements of temporaries, or `of_row` if that is more."""
    n_rows, k_max = indices.shape
    size = max(1, _CHUNK // max(of_row, k_max * width))
    return (slice(start, start + size) for start in range(0, n_rows, size))


def _gathered(
    values: Tensor | None, indices: Tensor, counts: Tensor, W: Tensor
) -> Iterator[tuple[slice, Tensor | None, Tensor]]:
    """Chunks of rows: their slice, their values `[b, K]` and rows of W `[b, K, D]`, padding blanked, as sums' dtype."""
    if W.shape[0] == 0:
        return
    acc = acc_dtype(W.dtype)
    live = live_slots(SparseCodes(indices, indices, counts))
    for rows in _row_chunks(indices, W.shape[1]):
        pieces = W[torch.where(live[rows], indices[rows], 0).long()].to(acc)
        # Blanked, not multiplied by zero: row 0 of W may hold inf or NaN.
        pieces = torch.where(live[rows].unsqueeze(-1), pieces, 0)
        weight = None if values is None else torch.where(live[rows], values[rows], 0).to(acc)
        yield rows, weight, pieces
