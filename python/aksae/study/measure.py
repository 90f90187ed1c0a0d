"""How well codes reconstruct the rows that judge, as sums over documents and shares of latents."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aksae_kernels import SparseCodes

from ..sae import SAE
from .rows import Rows

DENSE = 0.1
"""A latent is dense that fires on more than this share of the rows."""


@torch.no_grad()
def measured(sae: SAE, codes: Iterable[tuple[slice, SparseCodes]], rows: Rows) -> dict[str, Any]:
    """What a record of a study says of codes of all `rows`, chunk by chunk.

    `error`: the sum of `|x - x_hat|^2` over each document; `l0`, its deviation `l0_std`, and its 10th and 90th
    percentile over rows; `cosine`, the mean over rows; `dead` and `dense`, shares of the latents that fire on no row,
    and on more than a tenth of them. An error's unit is that of the activations. `fvu_near` and `error_near` are of the
    rows that are not far (`Rows.near`).
    """
    error, counts, cosine = torch.empty(len(rows)), torch.empty(len(rows)), torch.empty(len(rows))
    fired = torch.zeros(sae.config.d_sae + 1, dtype=torch.int64)
    for part, chunk in codes:
        x = rows.x[part]
        x_hat = sae.decode(chunk, x)
        error[part] = (x - x_hat).square().sum(-1).cpu()
        counts[part] = chunk.counts.float().cpu()
        cosine[part] = F.cosine_similarity(x, x_hat, dim=-1).cpu()
        # Padding has index -1: one place further it falls on the first, which is dropped.
        fired += torch.bincount(chunk.indices.flatten().cpu() + 1, minlength=len(fired))
    low, high = counts.quantile(torch.tensor([0.1, 0.9])).tolist()
    share, spread = fired[1:] / len(rows), variance(rows.x).double()
    return {
        "l0": float(counts.double().mean()),
        "l0_std": float(counts.std(correction=0)),
        "l0_p10": low,
        "l0_p90": high,
        "cosine": float(cosine.double().mean()),
        "dead": float((share == 0).double().mean()),
        "dense": float((share > DENSE).double().mean()),
        "fvu": float(error.double().sum() / spread.sum()),
        "error": rows.sums(error),
        "fvu_near": float(error.double()[rows.near].sum() / spread[rows.near].sum()),
        "error_near": rows.sums(error * rows.near),
    }


def variance(x: Tensor) -> Tensor:
    """`|x - mean|^2` of each row, `[N]`, whose sum FVU is relative to."""
    return (x - x.mean(0)).square().sum(-1).cpu()
