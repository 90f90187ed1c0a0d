"""What a report draws of a run that gives each row a k of its own, beside its baseline."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aksae_kernels import SparseCodes, frozen

from .heldout import HeldOut, HeldOutText
from .pareto import budgets_around, pareto
from .pricing import CALIBRATED
from .sae import SAE
from .selections import Priced
from .selections.need import prefix_errors
from .spending import in_context, l0_histogram, spending
from .top_contexts import activations_of, spread_latents, top_contexts
from .walk import walk

_ROWS = 4096
_WALKS = 6


@torch.no_grad()
def compare(models: Mapping[str, SAE], heldout: HeldOut, budget: int, *, seed: int) -> dict[str, Any]:
    """How the first of `models` spends its latents on the first 16,384 held-out rows, and how it and the others fare.

    Args:
        models: by name, the one that the run is about first; all on one device.
        heldout: the rows by which the first one was calibrated, and others behind them.
        budget: its mean number of latents.
        seed: of the intervals.

    Returns:
        `sample`: the `rows`, and what the `unit` of the intervals is; `pareto`: see `aksae.pareto`; `l0_histogram`:
        see `aksae.spending`; `walks`, of a `Priced` SAE: see `walks`; and, of rows whose text is known, `spending`:
        see `aksae.spending`, and `top_contexts`: see `aksae.top_contexts`.
    """
    name, own = next(iter(models.items()))
    x = heldout.first_rows(CALIBRATED).to(own.W_dec.device, own.W_dec.dtype)
    text = None if heldout.text is None else heldout.text.first(len(x))
    with frozen(own.W_enc):
        codes = [own.encode(part) for part in x.split(_ROWS)]
    l0 = torch.cat([part.counts for part in codes]).cpu().long()
    budgets = budgets_around(budget, own.width(), own.config.d_sae)
    found: dict[str, Any] = {
        "sample": {"rows": len(x), "unit": heldout.unit},
        "pareto": pareto(models, x, heldout.units(len(x)), budgets, rng=np.random.default_rng(seed)),
        "l0_histogram": l0_histogram(l0),
    }
    if isinstance(own.config.selection, Priced):
        found["walks"] = walks(own, {other: sae for other, sae in models.items() if other != name}, x, l0, text)
    if text is not None:
        found |= {"spending": spending(l0, text), "top_contexts": _top_contexts(own.config.d_sae, codes, l0, text)}
    return found


@torch.no_grad()
def walks(sae: SAE, others: Mapping[str, SAE], x: Tensor, l0: Tensor, text: HeldOutText | None) -> list[dict[str, Any]]:
    """The walks of six rows of `x [N, D]`, evenly spaced by their L0 from the second percentile to the 98th.

    Of each `row`, `l0`, `before`, `token` and `after` where there is a text, and the fields of `aksae.walk.Walk`, with
    errors, gains and price as shares of the row's variance, |x_i - mean(x)|^2 in the units of the SAE. `others` has the
    same errors of each other SAE with as many of the row's largest positive pre-activations.
    """
    selection, mean = sae.config.selection, x.double().mean(0)
    places = torch.linspace(0.02, 0.98, min(_WALKS, len(x)), dtype=torch.float64) * (len(x) - 1)
    found = []
    for row in l0.argsort(stable=True)[places.round().long()].tolist():
        variance = (x[row].double() - mean).square().sum().item()
        own = x[row : row + 1]
        candidates = sae.encoder(own).topk(sae.width())
        done = walk(
            SparseCodes(candidates.values[0], candidates.indices[0], candidates.counts[0]),
            sae.W_dec,
            sae.b_dec,
            sae.wanted(own)[0],
            price=sae.price,
            passes=selection.walks(training=False),
        )
        unit = variance * sae.config.output_scale**2
        fields = dataclasses.asdict(done)
        fields["passed"] = [
            {**passed, "alone": passed["alone"] / unit, "gain": passed["gain"] / unit} for passed in fields["passed"]
        ]
        found.append(
            {
                "row": row,
                "l0": len(done.latents),
                **({} if text is None else in_context(row, text)),
                **fields,
                "price": done.price / unit,
                "errors": [error / unit for error in done.errors],
                "others": {name: _by_value(other, own, len(done.latents), variance) for name, other in others.items()},
            }
        )
    return found


def _by_value(sae: SAE, x: Tensor, n: int, variance: float) -> list[float]:
    """The errors of a row `x [1, D]` with none, the largest, and so on to the `n` largest, as shares of `variance`."""
    codes = sae.encoder(x).topk(max(1, n))
    errors = prefix_errors(codes, sae.W_dec, sae.b_dec, sae.wanted(x))[0, : n + 1]
    return (errors.double() / (variance * sae.config.output_scale**2)).tolist()


def _top_contexts(d_sae: int, codes: list[SparseCodes], l0: Tensor, text: HeldOutText) -> list[dict[str, Any]]:
    fired = sum(torch.bincount(part.indices.flatten().long() + 1, minlength=d_sae + 1)[1:] for part in codes)
    latents = spread_latents(fired.cpu(), len(l0))
    activations = torch.cat([activations_of(latents, part) for part in codes])

    def about(context: int) -> dict[str, Any]:
        rows = text.rows_of(context)
        return {"tokens": text.decoded(rows), "l0": l0[rows].double().mean().item()}

    return top_contexts(latents, activations, text.contexts, about)
