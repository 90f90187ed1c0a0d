"""The report of a finished run: one HTML file that needs nothing else, not even a network."""

from __future__ import annotations

import io
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoints import LOG
from .errors import UserError
from .evaluate import check_evaluated

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PROBE_READS = {
    "last": "each context's last token",
    "mean": "the mean of each context's tokens",
    "token": "each token by itself",
}
NAMES = {"adaptivek": "AdaptiveK", "topk": "TopK"}
# Key in metrics.jsonl, title and caption of each chart over training steps.
TRAINING = (
    ("loss", "Total loss", "Weighted sum of all terms on the step's batch; the probe trains on a loss of its own."),
    ("fvu", "FVU of the batch", "Squared error of the batch over its variance: training rows, not held-out ones."),
    ("sparsity", "Sparsity term", "Mean L1 norm of the latents over the mean L2 norm of the activations, unweighted."),
    ("aux", "Auxiliary term", "Share of the residual's variance that the dead latents fail to explain, unweighted."),
    ("l0", "L0", "Active latents per row, mean over the batch."),
    ("dead", "Dead latents", "Share of latents that have not fired for the configured number of rows."),
)
PROBE_TRAINING = ("probe", "Probe term", "Squared error of the predicted score plus the ridge penalty, unweighted.")
MAX_POINTS = 2_000
WINDOW_BEFORE, WINDOW_AFTER = 40, 20

# Drawn in colours that stand for a role; the SVG then names the page's CSS variable instead, so that one drawing serves
# the light, the dark and the printed page.
INK, FAINT, ACCENT = "#0a0b01", "#0a0b02", "#0a0b03"
COLOURS = {"adaptivek": ACCENT, "topk": "#0a0b04"}
CSS_COLOURS = {INK: "var(--muted)", FAINT: "var(--rule)", ACCENT: "var(--adaptivek)", COLOURS["topk"]: "var(--topk)"}
LINES = {"adaptivek": "-", "topk": (0, (4, 1.6))}
MARKERS = {"adaptivek": "o", "topk": "s"}
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "aksae",
    "text.usetex": False,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "font.size": 9,
    "lines.linewidth": 1.5,
}
# Control characters may not stand in HTML; the Unicode control pictures say what was there.
VISIBLE = {code: chr(0x2400 + code) for code in range(32)} | {0x0A: "↵", 0x09: "⇥", 0x7F: "␡"}


@dataclass(frozen=True)
class Chart:
    """One drawing of a section; `svg` is None where the run lacks the data, and `caption` then says what is missing."""

    title: str
    caption: str
    svg: str | None = None


def write_report(run: Path) -> Path:
    """Write `report.html` into the finished run folder `run` and return its path.

    The file is self-contained: plots are inline SVG, and there is no script, font or image to load. It is replaced
    as a whole or not at all. What a run does not hold (no baseline, an optional key) is named in its section.

    Raises:
        UserError: `run` is not a folder, lacks `config.json`, `metrics.jsonl`, `probe.json` or `eval.json`, or one of
            them is not readable as JSON; `eval.json` is of other checkpoints than are there; or the report cannot be
            written.
    """
    import jinja2

    run = Path(run)
    selection = _read_json(run, "config.json").get("selection", "adaptivek")
    if selection != "adaptivek":
        raise UserError(f"run: {run} is one of {selection}, of which `aksae eval` prints all there is; needs adaptivek")
    config, probe, evaluation = (_read_json(run, name) for name in ("config.json", "probe.json", "eval.json"))
    metrics = _read_metrics(run)
    check_evaluated(run, evaluation)

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    models = {name: evaluation["models"][name] for name in NAMES if name in _dict(evaluation.get("models"))}
    html = environment.get_template("report.html.j2").render(
        model=_dict(config.get("model")).get("name", "unknown model"),
        layer=_dict(config.get("model")).get("layer", "?"),
        facts=list(_facts(config, probe, evaluation)),
        names={name: NAMES[name] for name in models},
        table=list(_table(models)),
        headline=_headline(models),
        heldout=_count(evaluation.get("rows")),
        drawn=[name for name in NAMES if name in models or any(record.get("model") == name for record in metrics)],
        sparsity=[_tradeoff(evaluation, models), _k_distribution(evaluation), _label_and_k(evaluation, config)],
        training=[_history(metrics, *panel) for panel in TRAINING],
        probe=[_cross_validation(probe), _label_and_prediction(evaluation), _history(metrics, *PROBE_TRAINING)],
        probe_facts=list(_probe_facts(probe)),
        latents=list(_latents(evaluation)),
    )
    return _write_atomically(run / "report.html", html)


def _read_text(run: Path, name: str) -> str:
    try:
        return (run / name).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"run: {run} has no {name}; it needs the folder of a finished `aksae train` run") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"run: {run / name} cannot be read ({error})") from None


def _read_json(run: Path, name: str) -> dict:
    try:
        value = json.loads(_read_text(run, name))
    except json.JSONDecodeError as error:
        raise UserError(f"run: {run / name} is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"run: {run / name} holds a JSON {type(value).__name__}; it needs an object")
    return value


def _read_metrics(run: Path) -> list[dict]:
    records = []
    for number, line in enumerate(_read_text(run, LOG).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"run: {run / LOG} line {number} is not valid JSON ({error})") from None
        if isinstance(record, dict):
            records.append(record)
    return records


def _write_atomically(path: Path, text: str) -> Path:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # A lone surrogate in a token must not cost the whole report.
        temporary.write_text(text, encoding="utf-8", errors="replace")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"run: cannot write {path} ({error})") from None
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _dict(value: Any) -> dict:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list:
    return value if isinstance(value, list) else []


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _count(value: Any) -> str:
    return f"{value:,.0f}" if _is_number(value) else "unknown"


def _format(value: Any, spec: str) -> str:
    return format(value, spec) if _is_number(value) else "n/a"


def _facts(config: dict, probe: dict, evaluation: dict) -> Iterator[tuple[str, str]]:
    """Label and value of what the header states about the run."""
    model, text, labels = (_dict(config.get(key)) for key in ("model", "text", "labels"))
    scores = _dict(probe.get("scores"))

    def value(section: dict, key: str) -> str:
        return str(section.get(key, "unknown"))

    yield "Model", f"{value(model, 'name')}, {value(model, 'dtype')}"
    yield "Layer", f"residual stream after block {value(model, 'layer')}"
    yield "Text", value(text, "source")
    yield (
        "Tokens",
        f"at most {_count(text.get('max_tokens'))}, of which {_count(evaluation.get('rows'))} held out by document",
    )
    cut = "packed across documents" if text.get("packed") else "within one document"
    yield "Contexts", f"at most {_count(text.get('context_length'))} tokens, {cut}"
    scored = f"{_count(scores.get('scored'))} contexts scored, {_count(scores.get('failed'))} failed and left out"
    yield "Complexity labels", f"{value(labels, 'scorer')}; {scored}"
    yield "Dictionary", f"d_sae = {_count(config.get('d_sae'))} latents"
    steepness = _format(config.get("steepness"), "g")
    yield "Score to k", f"{value(config, 'k_min')} to {value(config, 'k_max')}, steepness {steepness}"
    yield "The probe reads", PROBE_READS.get(config.get("probe_reads"), "unknown")
    rows = "all tokens" if config.get("train_on") == "all" else f"{value(config, 'train_on')} tokens"
    yield "Training", f"{_count(config.get('steps'))} steps of {_count(config.get('batch_size'))} rows, {rows}"
    yield "Seed", value(config, "seed")


def _negative(value: float) -> float:
    return -value


def _from_one(value: float) -> float:
    return abs(value - 1)


# Key in eval.json, name, explanation, format, and what is smaller for the better value (None: not a contest).
METRICS: tuple[tuple[str, str, str, str, Callable[[float], float] | None], ...] = (
    ("fvu", "FVU", "squared error as a share of the total variance; lower is better", ".4f", abs),
    (
        "explained_variance",
        "Explained variance",
        "1 - FVU, a constant error forgiven; higher is better",
        ".4f",
        _negative,
    ),
    ("mse", "MSE", "per activation dimension; lower is better", ".4g", abs),
    ("cosine", "Cosine similarity", "of activation and reconstruction; higher is better", ".4f", _negative),
    ("l2_ratio", "L2 ratio", "norm of reconstruction over norm of activation; nearer 1 is better", ".4f", _from_one),
    ("l0_mean", "L0, mean", "active latents per token", ".1f", None),
    ("l0_min", "L0, smallest", "over the held-out tokens", ",.0f", None),
    ("l0_max", "L0, largest", "over the held-out tokens", ",.0f", None),
    ("k_mean", "k, mean", "latents allowed per token; L0 falls short where fewer are positive", ".1f", None),
    ("dead", "Dead latents", "share that never fires on the held-out tokens; lower is better", ".2%", abs),
)


def _table(models: dict[str, dict]) -> Iterator[dict]:
    """One row per metric: its name, explanation, and per model the formatted value and whether it is the better one."""
    for key, name, explanation, spec, rank in METRICS:
        values = [_dict(model).get(key) for model in models.values()]
        shown = [_format(value, spec) for value in values]
        best = None
        # Values that read the same are a tie, whatever their hidden digits say.
        if rank and len(set(shown)) > 1 and all(map(_is_number, values)):
            best = min(range(len(values)), key=lambda index: rank(values[index]))
        cells = [{"text": text, "best": index == best} for index, text in enumerate(shown)]
        yield {"name": name, "explanation": explanation, "cells": cells}


def _headline(models: dict[str, dict]) -> list[str]:
    """The comparison in words, and a warning where the two models are not equally sparse."""
    adaptive, topk = (_dict(models.get(name)) for name in NAMES)
    if not all(_is_number(model.get(key)) for model in (adaptive, topk) for key in ("fvu", "l0_mean")):
        return []
    change = adaptive["fvu"] / topk["fvu"] - 1 if topk["fvu"] else 0.0
    verdict = "the same as" if abs(change) < 5e-4 else f"{abs(change):.1%} {'less' if change < 0 else 'more'} than"
    sentences = [
        f"With {adaptive['l0_mean']:.1f} active latents per token on average (TopK: {topk['l0_mean']:.1f}), AdaptiveK",
        f"leaves {adaptive['fvu']:.2%} of the held-out variance unexplained, {verdict} TopK ({topk['fvu']:.2%}).",
    ]
    gap = adaptive["l0_mean"] / topk["l0_mean"] - 1 if topk["l0_mean"] else math.inf
    if abs(gap) > 0.02:
        sentences.append(
            f"The mean L0 of the two differs by {abs(gap):.1%}, so this is not quite a comparison at equal sparsity."
        )
    return sentences


def _history(metrics: list[dict], key: str, title: str, caption: str) -> Chart:
    """One logged quantity against the step, both models, with phase 3 shaded."""
    series = {name: points for name in NAMES if (points := _series(metrics, name, key))}
    if not series:
        return Chart(title, f"Not drawn: {LOG} holds no finite “{key}”.")
    steps = [step for points in series.values() for step, _ in points]
    values = [value for points in series.values() for _, value in points]
    phase3 = min((r["step"] for r in metrics if r.get("phase") == 3 and _is_number(r.get("step"))), default=math.inf)
    with _axes() as (ax, done):
        for name, points in series.items():
            # A single point has no line to show.
            marker = MARKERS[name] if len(points) == 1 else None
            ax.plot(*zip(*points), color=COLOURS[name], linestyle=LINES[name], marker=marker)
        if key in ("loss", "fvu"):
            _log_if_wide(ax, values)
        if key in ("l0", "dead", "aux"):
            ax.set_ylim(bottom=0)
        if key == "dead":
            # A run without dead latents would otherwise get an axis of made-up height.
            ax.set_ylim(top=max(0.01, 1.05 * max(values)))
            ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
        if min(steps) < phase3 <= max(steps):
            ax.axvspan(phase3, max(steps), color=FAINT, alpha=0.35, linewidth=0)
            ax.set_title("phase 2", loc="left", fontsize=8, pad=3)
            ax.set_title("phase 3", loc="right", fontsize=8, pad=3)
        ax.set_xlabel("step")
        ax.xaxis.get_major_locator().set_params(integer=True)
        return Chart(title, caption, done(f"train-{key}", f"{title} against training step"))


def _tradeoff(evaluation: dict, models: dict[str, dict]) -> Chart:
    title = "L0 and FVU"
    curves = _dict(evaluation.get("l0_fvu"))
    points = {
        name: sorted((l0, fvu) for l0, fvu in curves.get(name) or [] if _is_number(l0) and _is_number(fvu))
        for name in NAMES
    }
    if not any(points.values()):
        return Chart(title, "Not drawn: eval.json holds no “l0_fvu” curve.")
    with _axes() as (ax, done):
        for name, curve in points.items():
            if curve:
                ax.plot(*zip(*curve), color=COLOURS[name], linestyle=LINES[name], marker=MARKERS[name], markersize=3)
            trained = [_dict(models.get(name)).get(key) for key in ("l0_mean", "fvu")]
            if all(map(_is_number, trained)):
                ax.plot(*trained, marker=MARKERS[name], **_ring(COLOURS[name]))
        everything = [point for curve in points.values() for point in curve]
        _log_if_wide(ax, [l0 for l0, _ in everything], axis="x")
        _log_if_wide(ax, [fvu for _, fvu in everything])
        ax.set(xlabel="mean L0", ylabel="FVU")
        caption = (
            "Held-out tokens, pooled, encoded again with every k multiplied by a factor; lower and further left is "
            "better. The large open marker is the model as trained."
        )
        return Chart(title, caption, done("tradeoff", "Mean L0 against FVU on held-out tokens"))


def _k_distribution(evaluation: dict) -> Chart:
    title = "Distribution of k"
    histogram = _dict(evaluation.get("k_histogram"))
    pairs = zip(_list(histogram.get("k")), _list(histogram.get("rows")))
    rows = {k: count for k, count in pairs if _is_number(k) and _is_number(count)}
    total = sum(rows.values())
    if not total:
        return Chart(title, "Not drawn: eval.json holds no “k_histogram”.")
    low, high = math.floor(min(rows)), math.ceil(max(rows))
    width = max(1, math.ceil((high - low + 1) / 30))
    bars = math.ceil((high - low + 1) / width)
    mean = sum(k * count for k, count in rows.items()) / total
    with _axes() as (ax, done):
        # Edges lie halfway between integers, so that no k falls on one.
        edges = [low - 0.5 + width * i for i in range(bars + 1)]
        ax.hist(list(rows), bins=edges, weights=list(rows.values()), color=ACCENT, alpha=0.75, rwidth=0.9)
        ax.axvline(mean, color=INK, linewidth=0.9, linestyle=(0, (1, 2)))
        place = {"xycoords": ("data", "axes fraction"), "xytext": (0, 3), "textcoords": "offset points"}
        ax.annotate(f"mean {mean:.0f}", (mean, 1), **place, ha="center", fontsize=8)
        ax.set(xlabel="k", ylabel="held-out tokens")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(axis="x", visible=False)
        caption = f"k of each of {total:,.0f} held-out tokens, in bars {width} wide; the dotted line is their mean."
        return Chart(title, caption, done("k-distribution", "Histogram of k over held-out tokens"))


def _label_and_k(evaluation: dict, config: dict) -> Chart:
    title = "Label and k"
    contexts = _contexts(evaluation, "score", "k")
    if not contexts:
        return Chart(title, "Not drawn: eval.json lists no held-out context with both a label and a k.")
    shown, note = _thinned(contexts)
    curve = _map_curve(config)
    with _axes() as (ax, done):
        ax.scatter([c["score"] for c in shown], [c["k"] for c in shown], **_dots(len(shown)))
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
    cv = _dict(probe.get("cv"))
    pairs = zip(_list(cv.get("lambdas")), _list(cv.get("rmse")))
    points = sorted((lam, rmse) for lam, rmse in pairs if _is_number(rmse) and _is_number(lam) and lam > 0)
    if not points:
        return Chart(title, "Not drawn: probe.json holds no cross-validation curve.")
    caption = "Root mean squared error of the score over the folds of the training contexts, in label points."
    with _axes() as (ax, done):
        ax.plot(*zip(*points), color=ACCENT, marker="o", markersize=3)
        for chosen in (point for point in points if point[0] == probe.get("lambda")):
            ax.plot(*chosen, marker="o", **_ring(ACCENT))
            caption += " The open marker is the λ that was chosen."
        _log_if_wide(ax, [lam for lam, _ in points], axis="x")
        ax.set(xlabel="ridge penalty λ", ylabel="RMSE")
        return Chart(title, caption, done("cross-validation", "Cross-validated error against the ridge penalty"))


def _label_and_prediction(evaluation: dict) -> Chart:
    title = "Label and prediction"
    contexts = _contexts(evaluation, "score", "predicted")
    if not contexts:
        return Chart(title, "Not drawn: eval.json lists no held-out context with a label and a prediction.")
    shown, note = _thinned(contexts)
    labels, predicted = [c["score"] for c in shown], [c["predicted"] for c in shown]
    ends = [min(labels + predicted), max(labels + predicted)]
    with _axes() as (ax, done):
        ax.scatter(labels, predicted, **_dots(len(shown)))
        ax.plot(ends, ends, color=INK, linewidth=1.2)
        ax.set(xlabel="complexity label", ylabel="predicted score")
        caption = f"Each dot is a held-out context, scored after training; on the line the two agree.{note}"
        return Chart(title, caption, done("label-prediction", "Complexity label against predicted score"))


def _probe_facts(probe: dict) -> Iterator[tuple[str, str, str]]:
    """Name, value and unit of the probe's held-out quality."""
    heldout = _dict(probe.get("heldout"))
    yield "RMSE", _format(heldout.get("rmse"), ".3f"), "label points"
    yield "Pearson", _format(heldout.get("pearson"), ".3f"), "correlation"
    yield "Spearman", _format(heldout.get("spearman"), ".3f"), "rank correlation"
    yield "Contexts", _format(heldout.get("n"), ",.0f"), "kept out of the fit"
    yield "λ", _format(probe.get("lambda"), "g"), "chosen ridge penalty"


def _latents(evaluation: dict) -> Iterator[dict]:
    """The listed latents, each with its contexts as runs of text: `(text, share of the latent's maximum, tooltip)`."""
    for latent in _list(evaluation.get("top_contexts")):
        examples = []
        for example in latent.get("examples") or []:
            tokens = example.get("tokens") or []
            activations = [a if _is_number(a) else 0.0 for a in example.get("activations") or []]
            if tokens and len(tokens) == len(activations):
                examples.append((tokens, activations, example))
        if not examples:
            continue
        top = latent.get("max")
        if not _is_number(top):
            top = max(max(activations) for _, activations, _ in examples)
        yield {
            "id": latent.get("latent", "?"),
            "max": _format(top, ".3g"),
            "examples": [
                {
                    "runs": list(marked_runs(tokens, activations, top)),
                    "peak": _format(max(activations), ".3g"),
                    "score": _format(example.get("score"), ".1f"),
                    "k": _format(example.get("k"), ",.0f"),
                }
                for tokens, activations, example in examples
            ],
        }


def marked_runs(
    tokens: list[str], activations: list[float], top: float, before: int = WINDOW_BEFORE, after: int = WINDOW_AFTER
) -> Iterator[tuple[str, str, str]]:
    """The tokens around the strongest one, as text, share of `top` and tooltip; the silent ones come joined, with an
    empty tooltip."""
    peak = activations.index(max(activations))
    start, stop = max(0, peak - before), min(len(tokens), peak + after + 1)
    silent = "…" if start else ""
    for token, activation in zip(tokens[start:stop], activations[start:stop]):
        text = str(token).translate(VISIBLE)
        if activation <= 0:
            silent += text
            continue
        # Most tokens begin with the space before their word; shading it would leave specks at the line breaks.
        word = text.lstrip() or text
        silent += text[: len(text) - len(word)]
        if silent:
            yield silent, "0", ""
            silent = ""
        share = min(1.0, activation / top) if top > 0 else 0.0
        yield word, f"{share:.2f}", f"{activation:.3g}"
    silent += " …" if stop < len(tokens) else ""
    if silent:
        yield silent, "0", ""


def _series(metrics: Iterable[dict], model: str, key: str) -> list[tuple[float, float]]:
    return sorted(
        (record["step"], record[key])
        for record in metrics
        if record.get("model") == model and _is_number(record.get("step")) and _is_number(record.get(key))
    )


def _contexts(evaluation: dict, *keys: str) -> list[dict]:
    """The held-out contexts whose `keys` are all finite numbers."""
    contexts = map(_dict, evaluation.get("contexts") or [])
    return [context for context in contexts if all(_is_number(context.get(key)) for key in keys)]


def _thinned(contexts: list[dict]) -> tuple[list[dict], str]:
    """At most `MAX_POINTS` evenly spaced contexts, so that the file stays small, and the words that say so."""
    if len(contexts) <= MAX_POINTS:
        return contexts, ""
    stride = math.ceil(len(contexts) / MAX_POINTS)
    return contexts[::stride], f" Only one in {stride} of {len(contexts):,} contexts is drawn."


def _map_curve(config: dict) -> tuple[list[float], list[int]] | None:
    from .k_policy import score_to_k

    keys = ("k_min", "k_max", "steepness", "score_min", "score_max")
    if not all(_is_number(config.get(key)) for key in keys):
        return None
    low, high = config["score_min"], config["score_max"]
    scores = [low + (high - low) * i / 100 for i in range(101)]
    return scores, [int(score_to_k(score, **{key: config[key] for key in keys})) for score in scores]


def _dots(count: int) -> dict:
    return {"s": 14, "color": ACCENT, "alpha": 0.75 if count < 200 else 0.4, "linewidths": 0}


def _ring(colour: str) -> dict:
    return {
        "linestyle": "none",
        "markersize": 10,
        "markerfacecolor": "none",
        "markeredgecolor": colour,
        "markeredgewidth": 1.5,
    }


def _log_if_wide(ax: Axes, values: list[float], axis: str = "y") -> None:
    """A logarithmic axis with plain numbers, where the values span enough to earn one."""
    from matplotlib.ticker import LogLocator, NullFormatter

    if min(values) <= 0 or max(values) < 8 * min(values):
        return
    getattr(ax, f"set_{axis}scale")("log")
    decades = math.log10(max(values) / min(values))
    side = getattr(ax, f"{axis}axis")
    side.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,)))
    side.set_major_formatter(lambda value, _: f"{value:g}")
    side.set_minor_formatter(NullFormatter())


@contextmanager
def _axes() -> Iterator[tuple[Axes, Callable[[str, str], str]]]:
    """Axes in the report's style, and what turns them into SVG, given a name unique in the page and a description."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.6, 2.5), layout="constrained")
        ax = figure.add_subplot()
        ax.xaxis.set_major_locator(MaxNLocator(6))
        ax.yaxis.set_major_locator(MaxNLocator(6))
        ax.tick_params(length=3)

        def done(name: str, description: str) -> str:
            buffer = io.StringIO()
            figure.savefig(
                buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
            )
            return _inline(buffer.getvalue(), name, description)

        yield ax, done


def _inline(svg: str, name: str, description: str) -> str:
    """A matplotlib SVG as an element of an HTML page: ids unique in the page, size and colours left to its CSS."""
    svg = svg[svg.index("<svg") :].rstrip()
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\g<1>#{name}-", svg)
    for drawn, themed in CSS_COLOURS.items():
        svg = svg.replace(drawn, themed)
    view_box = re.search(r'viewBox="[^"]*"', svg).group()
    head = f'<svg role="img" aria-label="{description}" {view_box} xmlns:xlink="http://www.w3.org/1999/xlink">'
    return head + svg[svg.index(">") + 1 :]
