"""Other ways to choose and to value the latents of the same SAE, which tell apart what a price changes.

A price changes three things at once: which latents a row keeps, how many of them, and, where it was there in training,
the weights. Each control has the weights of one SAE and the same mean L0, and takes one of the others away.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aksae_kernels import SparseCodes, price_select, sparse_decode, topk_encode

from ..pricing import adapt
from ..sae import SAE
from ..selections.need import need_of, prefix_errors
from .budget import Chooser, at_budget
from .measure import variance
from .rows import Rows

NAMES = {
    "by value": "the k largest of every row: TopK's rule",
    "price": "at a price",
    "price, every row k": "at a price of each row's own, at which it keeps at most k",
    "k of price, by value": "as many as at a price, but the largest ones",
    "k of price, shuffled": "the same numbers, dealt to other rows",
    "k by error, by value": "of the largest ones as many as make error and price together least",
    "k by norm, by value": "as many as the norm of the row lets expect of these",
    "matching pursuit": "k times the latent that explains most of what is left, which it then leaves",
    "by value, least squares": "TopK's latents with the best values that they can have",
    "price, least squares": "the latents at a price with the best values that they can have",
}
"""What each control does."""
_HALVINGS = 18
_ROWS = 256
"""Rows whose least squares are solved at a time: of each a matrix of its latents' products is made."""


@torch.no_grad()
def controls(sae: SAE, rows: Rows, budget: int, seed: int) -> dict[str, dict[str, float]]:
    """FVU and mean L0 on `rows` of each of `NAMES`, with the weights of `sae`, whatever its selection.

    A row's candidates, where it chooses from some, are those that `adapt` gives it. Encoder and decoder are as they
    are; the pursuit and least squares have values of their own. `seed` shuffles.
    """
    d_sae = sae.config.d_sae
    adapted = adapt(sae, rows.x[:1024], budget)
    chooser = Chooser(adapted, rows)
    at_budget(chooser, budget)
    at_price = [codes for _, codes in chooser.codes()]
    assert chooser.candidates is not None
    candidates, chunks = chooser.candidates, [x for _, x in rows.chunks()]
    wanted = [sae.wanted(x) for x in chunks]
    encoders = [sae.encoder(x) for x in chunks]
    counts = torch.cat([codes.counts for codes in at_price])
    generator = torch.Generator().manual_seed(seed)
    shuffled = counts[torch.randperm(len(counts), generator=generator).to(counts.device)]
    errors = [prefix_errors(codes, sae.W_dec, sae.b_dec, y) for codes, y in zip(candidates, wanted)]
    need = torch.cat(need_of(errors, budget))
    norms = torch.cat([torch.linalg.vector_norm(encoder.x, dim=-1) for encoder in encoders])
    most = candidates[0].indices.shape[-1]

    def by_value(k: Tensor) -> list[SparseCodes]:
        parts = k.int().split([len(x) for x in chunks])
        return [topk_encode(*encoder, k=part, k_max=most) for encoder, part in zip(encoders, parts)]

    largest = by_value(torch.full_like(counts, min(budget, d_sae)))
    chosen = {
        "by value": largest,
        "price": at_price,
        "price, every row k": [
            _at_most(codes, y, sae, budget, adapted.config.selection.walks(training=False))
            for codes, y in zip(candidates, wanted)
        ],
        "k of price, by value": by_value(counts),
        "k of price, shuffled": by_value(shuffled),
        "k by error, by value": by_value(need),
        "k by norm, by value": by_value(_expected(need, norms, budget, most)),
    }
    rebuilt = {
        name: [(codes.counts, sparse_decode(codes, sae.W_dec, sae.b_dec)) for codes in parts]
        for name, parts in chosen.items()
    }
    gram = sae.W_dec @ sae.W_dec.T
    rebuilt["matching pursuit"] = [_pursuit(y, sae, gram, budget) for y in wanted]
    rebuilt["by value, least squares"] = [_least_squares(codes, y, sae) for codes, y in zip(largest, wanted)]
    rebuilt["price, least squares"] = [_least_squares(codes, y, sae) for codes, y in zip(at_price, wanted)]
    total = variance(torch.cat(wanted)).double().sum()
    records = {}
    for name in NAMES:
        error = sum((y - y_hat).square().double().sum() for (_, y_hat), y in zip(rebuilt[name], wanted))
        l0 = torch.cat([k for k, _ in rebuilt[name]]).double().mean()
        records[name] = {"fvu": float(error.cpu() / total), "l0": float(l0)}
    return records


def _at_most(candidates: SparseCodes, wanted: Tensor, sae: SAE, k: int, passes: int) -> SparseCodes:
    """The candidates of each row at the lowest price at which it keeps no more than k, by bisection."""
    left = wanted - sae.b_dec
    high = left.square().sum(-1).clamp_min(torch.finfo(left.dtype).tiny).log()
    low = high - 20
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        kept = price_select(candidates, sae.W_dec, sae.b_dec, wanted, price=middle.exp(), passes=passes)
        is_low = kept.counts > k
        low, high = torch.where(is_low, middle, low), torch.where(is_low, high, middle)
    return price_select(candidates, sae.W_dec, sae.b_dec, wanted, price=high.exp(), passes=passes)


def _expected(need: Tensor, norms: Tensor, budget: int, most: int) -> Tensor:
    """k by a straight line through `need` over `norms`, `[N]` each, moved so that its mean is the budget."""
    centred = norms.double() - norms.double().mean()
    slope = (centred * need).sum() / centred.square().sum().clamp_min(1e-12)
    k, shift = budget + slope * centred, 0.0
    for _ in range(30):
        clamped = (k + shift).round().clamp(1, most)
        shift += float(budget - clamped.mean())
    return clamped


def _pursuit(wanted: Tensor, sae: SAE, gram: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Matching pursuit (MP-SAE, arXiv 2506.03093): k times `j = argmax <r, w_j>`, `r -= <r, w_j> w_j`, with decoder
    rows `w` of unit norm; the counts and the reconstruction.

    A latent that is chosen again counts once more only in the error. What does not point along any latent is left.
    """
    norms = gram.diagonal().sqrt().clamp_min(1e-12)
    scores = (wanted - sae.b_dec) @ (sae.W_dec / norms[:, None]).T
    gram = gram / norms[:, None] / norms
    values = torch.zeros_like(scores)
    rows = torch.arange(len(scores), device=scores.device)
    for _ in range(k):
        best = scores.max(-1)
        step = best.values.clamp_min(0)
        values[rows, best.indices] += step
        scores.addcmul_(step[:, None], gram[best.indices], value=-1)
    return (values > 0).sum(-1), (values / norms) @ sae.W_dec + sae.b_dec


def _least_squares(codes: SparseCodes, wanted: Tensor, sae: SAE) -> tuple[Tensor, Tensor]:
    """The counts and the reconstruction with the values that make each row's error least; some may be negative."""
    parts = []
    for start in range(0, len(wanted), _ROWS):
        rows = slice(start, start + _ROWS)
        width = max(1, int(codes.counts[rows].max()))
        live = codes.mask()[rows, :width]
        W = sae.W_dec[codes.indices[rows, :width].clamp_min(0)] * live[..., None]
        left = wanted[rows] - sae.b_dec
        # A little of the identity where latents are alike, and on padding, whose rows are 0.
        products = W @ W.mT + torch.diag_embed(torch.where(live, 1e-4, 1.0))
        values = torch.cholesky_solve((W @ left[..., None]), torch.linalg.cholesky(products))
        parts.append((values.mT @ W)[:, 0] + sae.b_dec)
    return codes.counts, torch.cat(parts)
