"""FVU against mean L0 of SAEs that are there, at several budgets, and the paired difference of two at each."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aksae_kernels import SparseCodes, price_for, price_select

from .bootstrap import Interval, bootstrap
from .errors import UserError
from .pricing import calibrate, settle
from .sae import SAE
from .selections import Priced, TopK

BUDGETS = (1 / 4, 1 / 2, 3 / 4, 1, 3 / 2)
"""Shares of the budget of training at which SAEs are compared."""

_ROWS = 4096
_TOLERANCE = 1e-3
_FIRST = 512
"""Rows that give a price from which all rows go on."""


def budgets_around(budget: int, *most: int) -> list[int]:
    """`BUDGETS` of a budget in whole latents, from 1 up and not above any of `most`, ascending."""
    wanted = {max(1, round(share * budget)) for share in BUDGETS}
    return sorted(number for number in wanted if number <= min(most))


@torch.no_grad()
def pareto(
    models: Mapping[str, SAE], x: Tensor, units: Tensor, budgets: Sequence[int], *, rng: np.random.Generator
) -> dict[str, Any]:
    """The FVU of each model at each budget, and how the first one's differs from each other's.

        FVU = sum_i |x_i - x_hat_i|^2 / sum_i |x_i - mean(x)|^2

    over the rows, with 95 % intervals by resampling units, the mean and what was calibrated held fixed. Differences are
    paired: of the same units in every draw.

    Args:
        models: by name; at a budget TopK has it as its k, the others are calibrated on the rows to have it in the mean
            (`codes_at`). None is changed.
        x: `[N, D]`, on the device and in the dtype of the models.
        units: `[N]` int64 on the CPU, the document or whatever else each row is of, numbered from 0.
        budgets: mean numbers of latents.
        rng: what resamples.

    Returns:
        `rows`, `units`, `budgets`; `models`, for each a list over budgets of `l0`, `fvu`, `low`, `high`; and
        `differences`, for each model but the first a list over budgets of `difference`, FVU of the first less its own,
        and `change`, that as a share of its own, each with its interval as `[value, low, high]`.

    Raises UserError as `codes_at` does.
    """
    n_units = int(units.max()) + 1
    mean = x.double().mean(0)
    spread = _per_unit(torch.cat([(part.double() - mean).square().sum(-1) for part in x.split(_ROWS)]), units, n_units)
    l0, errors = {}, {}
    for name, sae in models.items():
        points = [_measured(sae, x, budget) for budget in budgets]
        l0[name] = [counts.double().mean().item() for _, counts in points]
        errors[name] = np.stack([_per_unit(of_rows, units, n_units) for of_rows, _ in points])
    curves = {name: _listed(bootstrap(np.divide, of_units, spread, rng=rng)) for name, of_units in errors.items()}
    first, *others = errors
    differences = {}
    for name in others:
        pair = errors[first], errors[name]
        absolute = _listed(bootstrap(lambda own, other, total: (own - other) / total, *pair, spread, rng=rng))
        relative = _listed(bootstrap(lambda own, other: own / other - 1, *pair, rng=rng))
        differences[name] = [{"difference": a, "change": r} for a, r in zip(absolute, relative)]
    return {
        "rows": len(x),
        "units": n_units,
        "budgets": list(budgets),
        "models": {
            name: [
                {"l0": mean_l0, "fvu": fvu, "low": low, "high": high}
                for mean_l0, (fvu, low, high) in zip(l0[name], curve)
            ]
            for name, curve in curves.items()
        },
        "differences": differences,
    }


@torch.no_grad()
def codes_at(sae: SAE, x: Tensor, budget: int) -> list[SparseCodes]:
    """Codes of rows `x [N, D]` with `budget` latents in the mean, in parts of 4096 rows.

    TopK keeps so many of each row. A `Need` SAE has the bias, and a `Priced` one the price, at which these rows have
    `budget` in the mean, the latter to a thousandth, or all that pay without one. `sae` is not changed. Raises
    UserError as `calibrate` does.
    """
    selection, parts = sae.config.selection, x.split(_ROWS)
    if isinstance(selection, TopK):
        return [sae.encode(part, k=budget) for part in parts]
    if not isinstance(selection, Priced):
        calibrated = copy.deepcopy(sae)
        calibrate(calibrated, x, budget)
        return [calibrated.encode(part) for part in parts]
    if not 0 < budget <= sae.width():
        raise UserError(f"budget: got {budget}, needs a number above 0 and at most {sae.width()}, a row's candidates")
    candidates = [(sae.encoder(part).topk(sae.width()), sae.wanted(part)) for part in parts]
    passes, codes = selection.walks(training=False), []
    few = SparseCodes(*(tensor[:_FIRST] for tensor in candidates[0][0])), candidates[0][1][:_FIRST]
    start = price_for([few], sae.W_dec, sae.b_dec, budget, passes)

    def mean_l0(shift: float) -> float:
        price = start * math.exp(-shift)
        codes[:] = [
            price_select(part, sae.W_dec, sae.b_dec, wanted, price=price, passes=passes) for part, wanted in candidates
        ]
        return sum(int(part.counts.sum()) for part in codes) / len(x)

    settle(mean_l0, budget, tolerance=_TOLERANCE)
    return codes


def _measured(sae: SAE, x: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    """Squared error, float64, and L0 of each row, `[N]` on the CPU."""
    parts = codes_at(sae, x, budget)
    errors = [(part - sae.decode(codes, part)).double().square().sum(-1) for part, codes in zip(x.split(_ROWS), parts)]
    return torch.cat(errors).cpu(), torch.cat([codes.counts for codes in parts]).cpu()


def _per_unit(of_rows: Tensor, units: Tensor, n_units: int) -> np.ndarray:
    """The sums `[n_units]` of `of_rows [N]`."""
    return torch.zeros(n_units, dtype=torch.float64).index_add_(0, units, of_rows.cpu()).numpy()


def _listed(interval: Interval) -> list[list[float]]:
    """`[value, low, high]` of each budget."""
    return np.stack(interval, -1).tolist()
