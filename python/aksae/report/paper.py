"""What a report says of a run of the paper's mode, beyond what it says of every run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from ..config import ADAPTIVE
from ..k_policy import score_to_k
from .charts import ACCENT, INK, Chart, axes, dots, histogram, log_if_wide, look, ring
from .values import as_dict, as_list, count, is_number, shown

MAX_POINTS = 2_000
PROBE_READS = {
    "last": "each context's last token",
    "mean": "the mean of each context's tokens",
    "token": "each token by itself",
}


def paper_facts(config: dict, probe: dict) -> Iterator[tuple[str, str]]:
    """Label and value of what the header states about labels and probe."""
    scores = as_dict(probe.get("scores"))
    scorer = as_dict(config.get("labels")).get("scorer", "unknown")
    scored = f"{count(scores.get('scored'))} contexts scored, {count(scores.get('failed'))} failed and left out"
    yield "Complexity labels", f"{scorer}; {scored}"
    steepness = shown(config.get("steepness"), "g")
    ends = (config.get(key, "unknown") for key in ("k_min", "k_max"))
    yield "Score to k", f"{' to '.join(map(str, ends))}, steepness {steepness}"
    yield "The probe reads", PROBE_READS.get(config.get("probe_reads"), "unknown")


def sparsity_charts(evaluation: dict, config: dict, models: Mapping[str, dict], names: list[str]) -> list[Chart]:
    """How much is reconstructed for how many latents, and how k is spread."""
    return [
        _tradeoff(evaluation, models, names),
        histogram(
            "Distribution of k", evaluation, "k_histogram", quantity="k", name="k-distribution", of="held-out tokens"
        ),
        _label_and_k(evaluation, config),
    ]


def probe_charts(probe: dict, evaluation: dict) -> list[Chart]:
    """How well the probe knows the labels."""
    return [_cross_validation(probe), _label_and_prediction(evaluation)]


def _tradeoff(evaluation: dict, models: Mapping[str, dict], names: list[str]) -> Chart:
    title = "L0 and FVU"
    curves = as_dict(evaluation.get("l0_fvu"))
    points = {
        name: sorted((l0, fvu) for l0, fvu in curves.get(name) or [] if is_number(l0) and is_number(fvu))
        for name in names
    }
    if not any(points.values()):
        return Chart(title, "Not drawn: eval.json holds no “l0_fvu” curve.")
    with axes() as ((ax,), done):
        for name, curve in points.items():
            if curve:
                ax.plot(*zip(*curve), **look(name), markersize=3)
            trained = [as_dict(models.get(name)).get(key) for key in ("l0_mean", "fvu")]
            if all(map(is_number, trained)):
                ax.plot(*trained, **ring(name))
        everything = [point for curve in points.values() for point in curve]
        log_if_wide(ax, [l0 for l0, _ in everything], axis="x")
        log_if_wide(ax, [fvu for _, fvu in everything])
        ax.set(xlabel="mean L0", ylabel="FVU")
        caption = (
            "Held-out tokens, pooled, encoded again with every k multiplied by a factor; lower and further left is "
            "better. The large open marker is the model as trained."
        )
        return Chart(title, caption, done("tradeoff", "Mean L0 against FVU on held-out tokens"))


def _label_and_k(evaluation: dict, config: dict) -> Chart:
    title = "Label and k"
    contexts = _contexts(evaluation, "score", "k")
    if not contexts:
        return Chart(title, "Not drawn: eval.json lists no held-out context with both a label and a k.")
    drawn, note = _thinned(contexts)
    curve = _map_curve(config)
    with axes() as ((ax,), done):
        ax.scatter([c["score"] for c in drawn], [c["k"] for c in drawn], **dots(len(drawn)))
        line = "config.json does not hold the whole map"
        if curve:
            ax.plot(*curve, color=INK, linewidth=1.2)
            line = "the line is the configured map from score to k, which dots leave as the prediction leaves the label"
        ax.set(xlabel="complexity label", ylabel="k")
        ax.set_ylim(bottom=0)
        whose = "its last token was given" if config.get("probe_reads") == "token" else "its predicted score led to"
        caption = f"Each dot is a held-out context: its label, and the k {whose}; {line}.{note}"
        return Chart(title, caption, done("label-k", "Complexity label against k, with the map's curve"))


def _cross_validation(probe: dict) -> Chart:
    title = "Cross-validation"
    cv = as_dict(probe.get("cv"))
    pairs = zip(as_list(cv.get("lambdas")), as_list(cv.get("rmse")))
    points = sorted((lam, rmse) for lam, rmse in pairs if is_number(rmse) and is_number(lam) and lam > 0)
    if not points:
        return Chart(title, "Not drawn: probe.json holds no cross-validation curve.")
    caption = "Root mean squared error of the score over the folds of the training contexts, in label points."
    with axes() as ((ax,), done):
        ax.plot(*zip(*points), color=ACCENT, marker="o", markersize=3)
        for chosen in (point for point in points if point[0] == probe.get("lambda")):
            ax.plot(*chosen, **ring(ADAPTIVE))
            caption += " The open marker is the λ that was chosen."
        log_if_wide(ax, [lam for lam, _ in points], axis="x")
        ax.set(xlabel="ridge penalty λ", ylabel="RMSE")
        return Chart(title, caption, done("cross-validation", "Cross-validated error against the ridge penalty"))


def _label_and_prediction(evaluation: dict) -> Chart:
    title = "Label and prediction"
    contexts = _contexts(evaluation, "score", "predicted")
    if not contexts:
        return Chart(title, "Not drawn: eval.json lists no held-out context with a label and a prediction.")
    drawn, note = _thinned(contexts)
    labels, predicted = [c["score"] for c in drawn], [c["predicted"] for c in drawn]
    ends = [min(labels + predicted), max(labels + predicted)]
    with axes() as ((ax,), done):
        ax.scatter(labels, predicted, **dots(len(drawn)))
        ax.plot(ends, ends, color=INK, linewidth=1.2)
        ax.set(xlabel="complexity label", ylabel="predicted score")
        caption = f"Each dot is a held-out context, scored after training; on the line the two agree.{note}"
        return Chart(title, caption, done("label-prediction", "Complexity label against predicted score"))


def probe_facts(probe: dict) -> Iterator[tuple[str, str, str]]:
    """Name, value and unit of the probe's held-out quality."""
    heldout = as_dict(probe.get("heldout"))
    yield "RMSE", shown(heldout.get("rmse"), ".3f"), "label points"
    yield "Pearson", shown(heldout.get("pearson"), ".3f"), "correlation"
    yield "Spearman", shown(heldout.get("spearman"), ".3f"), "rank correlation"
    yield "Contexts", shown(heldout.get("n"), ",.0f"), "kept out of the fit"
    yield "λ", shown(probe.get("lambda"), "g"), "chosen ridge penalty"


def _contexts(evaluation: dict, *keys: str) -> list[dict]:
    """The held-out contexts whose `keys` are all finite numbers."""
    contexts = map(as_dict, evaluation.get("contexts") or [])
    return [context for context in contexts if all(is_number(context.get(key)) for key in keys)]


def _thinned(contexts: list[dict]) -> tuple[list[dict], str]:
    """At most `MAX_POINTS` evenly spaced contexts, so that the file stays small, and the words that say so."""
    if len(contexts) <= MAX_POINTS:
        return contexts, ""
    stride = math.ceil(len(contexts) / MAX_POINTS)
    return contexts[::stride], f" Only one in {stride} of {len(contexts):,} contexts is drawn."


def _map_curve(config: dict) -> tuple[list[float], list[int]] | None:
    keys = ("k_min", "k_max", "steepness", "score_min", "score_max")
    if not all(is_number(config.get(key)) for key in keys):
        return None
    low, high = config["score_min"], config["score_max"]
    scores = [low + (high - low) * i / 100 for i in range(101)]
    return scores, [int(score_to_k(score, **{key: config[key] for key in keys})) for score in scores]
