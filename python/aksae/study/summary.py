"""What a study found: FVU and damage with their intervals, differences that are paired, and the controls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bootstrap import Interval, bootstrap
from ..files import read_json
from .layer import OWN, PRICED
from .plan import StudyConfig, Trial

BASELINES = ("topk", "batch-topk")
"""What the others are compared with."""
EQUAL = 0.005
"""How far, as a share of the budget, mean L0 may be off it in a difference."""
_DETAILS = ("l0", "l0_calibrated", "l0_std", "l0_p10", "l0_p90", "cosine", "dead", "dense")


def summary(config: StudyConfig, planned: Sequence[Trial], facts: dict[str, Any]) -> dict[str, Any]:
    """What `results.json` holds: `facts`, and lists of records.

    `fvu`: of each layer, budget, selection it was trained by and rule it is judged by, FVU with its 95 % interval,
    means over seeds of the details, and by baseline the relative difference, `FVU / FVU of the baseline - 1`, with its
    interval; `near`, the same of the rows that are not far (`Rows.near`). `damage`: the rise of the model's
    cross-entropy in nats per token, the share of it that is recovered, and the divergence, likewise. `controls`: FVU
    and L0 of each control, a mean over seeds. `probing`: area under the curve by label and number of latents, and their
    mean, with the standard deviation of that over seeds. `firings`: of each TopK SAE, what share of its latents'
    firings a price drops, with examples. `synthetic`: what `synthetic.scores` says, means over seeds.

    Differences are between SAEs whose mean L0 is the budget to 0.5 %; where one has too few positive latents for that,
    there is none. Intervals resample seeds and documents (`bootstrap`), the same ones for both sides of a difference.
    """
    records = {trial: read_json(config.output / "records" / f"{trial}.json", needs=dict) for trial in planned}
    rng = np.random.default_rng(0)
    found: dict[str, Any] = {
        **facts,
        "fvu": [],
        "damage": [],
        "controls": [],
        "probing": [],
        "firings": [],
        "synthetic": [],
    }
    for layer, budget in dict.fromkeys((trial.layer, trial.budget) for trial in planned):
        here = [trial for trial in planned if (trial.layer, trial.budget) == (layer, budget)]
        rules: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for trial in here:
            for rule in (OWN, PRICED):
                if rule in records[trial]:
                    rules.setdefault((trial.selection, rule), []).append(records[trial][rule])
        place = {"layer": layer, "budget": budget}
        of_layer = facts["layers"][str(layer)]
        judged = {
            error: _judged(rules, error, np.array(of_layer[variance]), budget, rng)
            for error, variance in (("error", "variance"), ("error_near", "variance_near"))
        }
        for (selection, rule), of_seeds in rules.items():
            details = {name: float(np.mean([record[name] for record in of_seeds])) for name in _DETAILS}
            found["fvu"].append(
                {
                    **place,
                    "selection": selection,
                    "rule": rule,
                    **judged["error"][selection, rule],
                    **details,
                    "near": judged["error_near"][selection, rule],
                }
            )
        found["damage"] += [{**place, **record} for record in _damage(config, here, rng)]
        found["controls"] += [{**place, **record} for record in _controls(here, records)]
        found["firings"] += [
            read_json(path, needs=dict)
            for trial in here
            if (path := config.output / "firings" / f"{trial}.json").is_file()
        ]
        found["probing"] += [{**place, **record} for record in _probing(config, here)]
    found["synthetic"] = _synthetic(config)
    return found


def _judged(
    rules: dict[tuple[str, str], list[dict[str, Any]]],
    name: str,
    variance: NDArray[np.float64],
    budget: int,
    rng: np.random.Generator,
) -> dict[tuple[str, str], dict[str, Any]]:
    """FVU of each selection and rule with its interval, and against the baselines, of errors of that `name`."""
    errors = {key: np.array([record[name] for record in of_seeds]) for key, of_seeds in rules.items()}
    return {
        key: {
            **_interval(bootstrap(np.divide, error, np.broadcast_to(variance, error.shape), rng=rng, axes=2)),
            "against": {
                baseline: _interval(bootstrap(_relative, error, errors[baseline, OWN], rng=rng, axes=2))
                for baseline in BASELINES
                if (baseline, OWN) in errors
                and (baseline, OWN) != key
                and _equal(budget, rules[key], rules[baseline, OWN])
            },
        }
        for key, error in errors.items()
    }


def _damage(config: StudyConfig, here: Sequence[Trial], rng: np.random.Generator) -> list[dict[str, Any]]:
    """Of each selection and rule that was spliced into the model: `value` is the damage."""
    rises: dict[tuple[str, str], list[NDArray]] = {}
    divergences: dict[tuple[str, str], list[NDArray]] = {}
    recoverable: dict[str, NDArray] = {}
    for trial in here:
        path = config.output / "ce" / f"layer-{trial.layer}_seed-{trial.seed}.json"
        if not path.is_file():
            continue
        losses = read_json(path, needs=dict)
        document = np.unique(losses["document"], return_inverse=True)[1]
        clean = np.array(losses["clean"])
        ones = _sums(np.ones_like(clean), document)
        recoverable = {
            name: _sums(np.array(losses[name]) - clean, document) for name in ("mean_ablated", "zero_ablated")
        }
        for rule in (OWN, PRICED):
            if (name := f"{trial}/{rule}") in losses["spliced"]:
                key = trial.selection, rule
                rises.setdefault(key, []).append(_sums(np.array(losses["spliced"][name]) - clean, document))
                divergences.setdefault(key, []).append(_sums(np.array(losses["divergence"][name]), document))
    found = []
    for (selection, rule), of_seeds in rises.items():
        rise = np.stack(of_seeds)
        against = {
            name: _interval(bootstrap(_relative, rise, np.stack(rises[name, OWN]), rng=rng, axes=2))
            for name in BASELINES
            if (name, OWN) in rises and (name, OWN) != (selection, rule)
        }
        mean = _interval(bootstrap(np.divide, rise, np.broadcast_to(ones, rise.shape), rng=rng, axes=2))
        recovered = {
            f"recovered_{name.removesuffix('_ablated')}": float(1 - rise.sum() / (len(rise) * possible.sum()))
            for name, possible in recoverable.items()
        }
        kl = float(np.stack(divergences[selection, rule]).sum() / (len(rise) * ones.sum()))
        found.append({"selection": selection, "rule": rule, **mean, "kl": kl, **recovered, "against": against})
    return found


def _controls(here: Sequence[Trial], records: dict[Trial, dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each control with the weights of each selection, the mean over seeds."""
    by_weights: dict[str, list[dict[str, Any]]] = {}
    for trial in here:
        if "controls" in records[trial]:
            by_weights.setdefault(trial.selection, []).append(records[trial]["controls"])
    return [
        {
            "weights": weights,
            "control": name,
            **{key: float(np.mean([s[name][key] for s in of_seeds])) for key in value},
        }
        for weights, of_seeds in by_weights.items()
        for name, value in of_seeds[0].items()
    ]


def _probing(config: StudyConfig, here: Sequence[Trial]) -> list[dict[str, Any]]:
    """Of each selection and rule that was probed, the area under the curve."""
    kept: dict[tuple[str, str], list[dict[str, float]]] = {}
    for trial in here:
        path = config.output / "probing" / f"{trial}.json"
        if path.is_file():
            record = read_json(path, needs=dict)
            for rule in (OWN, PRICED):
                if record.get(rule):
                    kept.setdefault((trial.selection, rule), []).append(record[rule])
    found = []
    for (selection, rule), of_seeds in kept.items():
        by_label = {name: float(np.mean([seed[name] for seed in of_seeds])) for name in of_seeds[0]}
        means = [float(np.mean(list(seed.values()))) for seed in of_seeds]
        spread = {"auc": float(np.mean(means)), "std": float(np.std(means))}
        found.append({"selection": selection, "rule": rule, **spread, "by_label": by_label})
    return found


def _synthetic(config: StudyConfig) -> list[dict[str, Any]]:
    """Of each selection by its own rule and at a price, means and standard deviations over seeds."""
    kept: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for seed in config.seeds:
        path = config.output / "synthetic" / f"seed-{seed}.json"
        for record in read_json(path, needs=list) if path.is_file() else ():
            rule = OWN if record["selection"] == record["trained"] else PRICED
            kept.setdefault((record["trained"], rule), []).append(record)
    found = []
    for (selection, rule), of_seeds in kept.items():
        numbers = {
            name: np.array([record[name] for record in of_seeds])
            for name, value in of_seeds[0].items()
            if isinstance(value, float)
        }
        means = {name: float(values.mean()) for name, values in numbers.items()}
        spread = {f"{name}_std": float(values.std()) for name, values in numbers.items()}
        found.append({"selection": selection, "rule": rule, "seeds": len(of_seeds), **means, **spread})
    return found


def _equal(budget: int, *compared: list[dict[str, Any]]) -> bool:
    """Whether all records are at the budget, so that a difference between them says something."""
    return all(abs(record["l0"] / budget - 1) <= EQUAL for records in compared for record in records)


def _relative(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    return a / b - 1


def _sums(values: NDArray[np.float64], document: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.bincount(document, weights=values)


def _interval(interval: Interval) -> dict[str, float]:
    return {name: float(value) for name, value in interval._asdict().items()}


def lines(found: dict[str, Any], names: dict[str, str]) -> list[list[str]]:
    """The comparison as cells: a head, then a line for each layer, budget, selection and rule. `names` are those of the
    selections."""
    against = [f"vs {names.get(name, name)}" for name in BASELINES]
    errors = [title for error in ("FVU", "near rows", "CE damage") for title in (error, *against)]
    errors.insert(1, "95 %")
    head = ["block", "L0", "trained by", "judged by", *errors, "KL"]
    damage = {_key(record): record for record in found["damage"]}
    table = [head]
    for record in found["fvu"]:
        spliced = damage.get(_key(record))
        table.append(
            [
                str(record["layer"]),
                f"{record['l0']:.1f}",
                names[record["selection"]],
                "its own rule" if record["rule"] == OWN else "a price",
                f"{record['value']:.4f}",
                f"{record['low']:.4f} to {record['high']:.4f}",
                *_differences(record),
                f"{record['near']['value']:.4f}",
                *_differences(record["near"]),
                *(["", "", "", ""] if spliced is None else _damage_cells(spliced)),
            ]
        )
    return table


def synthetic_lines(found: dict[str, Any], names: dict[str, str]) -> list[list[str]]:
    """What was found where the truth is known, as cells under a head; none where nothing was."""
    columns = {"fvu": "FVU", "f1": "F1", "set_f1": "F1 of the set", "mcc": "MCC", "count_correlation": "r(count)"}
    table = [["where the truth is known", "", "L0", *columns.values()]] if found["synthetic"] else []
    for record in found["synthetic"]:
        cells = [f"{record[name]:.3f} +- {record[f'{name}_std']:.3f}" for name in columns]
        rule = "its own rule" if record["rule"] == OWN else "a price"
        table.append([names[record["selection"]], rule, f"{record['l0']:.2f}", *cells])
    return table


def _key(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record[name] for name in ("layer", "budget", "selection", "rule"))


def _damage_cells(spliced: dict[str, Any]) -> list[str]:
    return [f"{spliced['value']:.4f}", *_differences(spliced), f"{spliced['kl']:.4f}"]


def _differences(record: dict[str, Any]) -> list[str]:
    return [_percent(record["against"].get(name)) for name in BASELINES]


def _percent(interval: dict[str, float] | None) -> str:
    """A relative difference; one whose interval holds 0 is in brackets."""
    if interval is None:
        return ""
    text = f"{100 * interval['value']:+.1f} %"
    return f"({text})" if interval["low"] <= 0 <= interval["high"] else text
