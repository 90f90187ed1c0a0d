"""Checks of results at full size, in fp64: of a sample of rows and of latents, since all would take too long.

What they sample is drawn anew from the shape alone, so that a failure repeats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aksae_kernels import SparseCodes
from aksae_kernels.codes import live_slots
from aksae_kernels.testing import check_codes, check_errors, dense_codes, encode_scores

from ..problem import Problem

ROWS, LATENTS = 48, 8
_CHUNK = 1 << 15


def sampled_rows(problem: Problem) -> Tensor:
    """Up to 48 row numbers, ascending: the first and the last, and random ones between them."""
    n_rows = problem.shape.B
    drawn = torch.randperm(n_rows, generator=torch.Generator().manual_seed(n_rows))[:ROWS]
    ends = torch.tensor([0, n_rows - 1])
    return torch.cat([ends, drawn]).unique().to(problem.device)


def of_rows(codes: SparseCodes, rows: Tensor) -> SparseCodes:
    """The codes of some of the rows."""
    return SparseCodes(*(tensor.detach()[rows] for tensor in codes))


def check_encode(codes: SparseCodes, problem: Problem, W: Tensor, b: Tensor) -> None:
    """An encode of `problem.x`."""
    rows = sampled_rows(problem)
    chunks = (slice(start, start + _CHUNK) for start in range(0, W.shape[0], _CHUNK))
    parts = zip(*(encode_scores(problem.x[rows], W[chunk], b[chunk]) for chunk in chunks))
    scores, tolerance = (torch.cat(part, dim=-1) for part in parts)
    check_codes(of_rows(codes, rows), scores, problem.k[rows], problem.width, tolerance=tolerance)


def check_select(codes: SparseCodes, problem: Problem) -> None:
    """A selection from `problem.scores`, which it has to meet exactly."""
    rows = sampled_rows(problem)
    check_codes(of_rows(codes, rows), problem.scores[rows], problem.k[rows], problem.width)


def narrowed(codes: SparseCodes, W: Tensor) -> tuple[SparseCodes, Tensor]:
    """The same products with the rows of W that the codes use, and no others."""
    live = live_slots(codes)
    used, index = codes.indices[live].unique(return_inverse=True)
    indices = torch.full_like(codes.indices, -1)
    indices[live] = index.to(torch.int32)
    return codes._replace(indices=indices), W.detach()[used.long()]


def check_decode(y: Tensor, codes: SparseCodes, W: Tensor, problem: Problem) -> None:
    """A decode of `codes`; it may lose twice what the dense product in its dtype loses."""
    rows = sampled_rows(problem)
    chosen, used = narrowed(of_rows(codes, rows), W)
    dense = dense_codes(chosen, used.shape[0])
    within(y[rows], dense @ used.double(), dense.to(used.dtype) @ used, "the decode")


def check_loss(loss: Tensor, value_grad: Tensor, codes: SparseCodes, problem: Problem) -> None:
    """`decode_mse` and the gradient of its sum with respect to the values."""
    rows = sampled_rows(problem)
    chosen, used = narrowed(of_rows(codes, rows), problem.W)
    dense = dense_codes(chosen, used.shape[0])
    x = problem.x[rows]
    residual, lossy = (dense.to(dtype) @ used.to(dtype) - x.to(dtype) for dtype in (torch.float64, used.dtype))
    within(loss[rows], residual.square().sum(-1), lossy.float().square().sum(-1), "the loss")
    exact, torch_result = (at_codes(2 * error @ used.to(error.dtype).T, chosen) for error in (residual, lossy))
    within(value_grad[rows], exact, torch_result, "the gradient of the values")


def sampled_latents(codes: SparseCodes) -> Tensor:
    """Up to 8 latents that fired, spread evenly over all that did."""
    fired = codes.indices[live_slots(codes)].unique().long()
    return fired[:: max(1, len(fired) // LATENTS)][:LATENTS]


def check_weight_grad(grad: Tensor, codes: SparseCodes, dense: Tensor) -> None:
    """`sum values[b, j] dense[b]` over the hits of each latent."""
    latents = sampled_latents(codes)
    weights = _column_weights(codes, latents)
    exact = weights @ dense.double()
    within(grad[latents], exact, weights.to(dense.dtype) @ dense, "the gradient of a weight")


def check_step(
    codes: SparseCodes, value_grad: Tensor, loss: Tensor, grads: tuple[Tensor, Tensor], problem: Problem
) -> None:
    """A step's codes, loss and gradients of `W_enc` and `W_dec` (`grads`), where both weights are `problem.W`.

    The gradients are judged against fp64 sums over the step's own codes and `value_grad`, and over the fp64 residual of
    the rows that hit the sampled latents.
    """
    check_encode(codes, problem, problem.W, problem.b_enc)
    check_loss(loss, value_grad, codes, problem)
    check_weight_grad(grads[0], codes._replace(values=value_grad), problem.x)
    latents = sampled_latents(codes)
    weights = _column_weights(codes, latents)
    rows = weights.any(0).nonzero().squeeze(-1)
    chosen, used = narrowed(of_rows(codes, rows), problem.W)
    residual = 2 * (dense_codes(chosen, used.shape[0]) @ used.double() - problem.x[rows].double())
    weights, rounded = weights[:, rows], residual.to(problem.dtype)
    within(grads[1][latents], weights @ residual, weights.to(problem.dtype) @ rounded, "the gradient of W_dec")


def _column_weights(codes: SparseCodes, latents: Tensor) -> Tensor:
    """`[latents, B]` fp64: what each row's codes hold of each latent."""
    hits = live_slots(codes) & torch.isin(codes.indices, latents.to(codes.indices.dtype))
    weights = torch.zeros(len(latents), codes.counts.shape[0], dtype=torch.float64, device=latents.device)
    rows, slots = hits.nonzero(as_tuple=True)
    place = torch.searchsorted(latents.contiguous(), codes.indices[rows, slots].long())
    return weights.index_put_((place, rows), codes.values.detach()[rows, slots].double(), accumulate=True)


def at_codes(products: Tensor, codes: SparseCodes) -> Tensor:
    """Of `products [B, F]` those with the latents of `codes`, `[B, K]`, 0 past the counts."""
    live = live_slots(codes)
    return products.gather(-1, codes.indices.where(live, 0).long()).where(live, 0)


def within(actual: Tensor, exact: Tensor, torch_result: Tensor, what: str) -> None:
    """Raise AssertionError where `actual` is further from the fp64 `exact` than twice what PyTorch loses."""
    check_errors([{what: (actual, exact, torch_result)}])
