"""The page: what every run has, and the parts of those of one kind."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ..checkpoints import LOG
from ..config import ADAPTIVE, BASELINE, COMPARED, TITLES
from ..errors import UserError
from ..evaluate import check_evaluated
from ..selections import SELECTIONS
from .charts import FAINT, Chart, axes, log_if_wide, look
from .paper import paper_facts, probe_charts, probe_facts, sparsity_charts
from .spending import budget_of, spending_charts, spending_facts, tokens_shown, walks_drawn
from .values import VISIBLE, as_dict, as_list, count, is_number, shown

# Key in metrics.jsonl, title and caption of each chart over training steps.
TRAINING = (
    ("loss", "Total loss", "Weighted sum of all terms on the step's batch."),
    ("fvu", "FVU of the batch", "Squared error of the batch over its variance: training rows, not held-out ones."),
    ("sparsity", "Sparsity term", "Mean L1 norm of the latents over the mean L2 norm of the activations, unweighted."),
    ("aux", "Auxiliary term", "Share of the residual's variance that the dead latents fail to explain, unweighted."),
    ("l0", "L0", "Active latents per row, mean over the batch."),
    ("dead", "Dead latents", "Share of latents that have not fired for the configured number of rows."),
)
PROBE_TRAINING = ("probe", "Probe term", "Squared error of the predicted score plus the ridge penalty, unweighted.")
WINDOW_BEFORE, WINDOW_AFTER = 40, 20


def write_report(run: Path) -> Path:
    """Write `report.html` into the finished run folder `run` and return its path.

    The file is self-contained: plots are inline SVG, and there is no script, font or image to load. It is replaced
    as a whole or not at all. What a run does not hold (no baseline, no text, an optional key) is named in its section.

    Raises:
        UserError: `run` is not a folder, or is one of a selection without a baseline; lacks `config.json`,
            `metrics.jsonl`, `eval.json` or, in the paper's mode, `probe.json`, or one of them is not readable as JSON;
            `eval.json` is of other checkpoints than are there; or the report cannot be written.
    """
    import jinja2

    run = Path(run)
    config = _read_json(run, "config.json")
    selection = config.get("selection", ADAPTIVE)
    if selection not in COMPARED:
        raise UserError(
            f"run: {run} is one of {selection}, of which `aksae eval` prints all there is; needs {', '.join(COMPARED)}"
        )
    probe = _read_json(run, "probe.json") if selection == ADAPTIVE else {}
    evaluation = _read_json(run, "eval.json")
    metrics = _read_metrics(run)
    check_evaluated(run, evaluation)

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent.parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = [selection, BASELINE]
    models = {name: evaluation["models"][name] for name in names if name in as_dict(evaluation.get("models"))}
    drawn = [name for name in names if name in models or any(record.get("model") == name for record in metrics)]
    phases = _phases(config, metrics)
    about = {
        "selection": selection,
        "title": TITLES[selection],
        "subject": _subject(config),
        **_told_of_rows(config),
        "facts": list(_facts(config, probe, evaluation)),
        "names": {name: TITLES[name] for name in models},
        "table": list(_table(models)),
        "headline": _headline(models),
        "heldout": count(evaluation.get("rows")),
        "drawn": {name: TITLES[name] for name in drawn},
        "training": [_history(metrics, names, phases, *panel) for panel in TRAINING],
        "latents": list(_latents(evaluation)),
        "files": ", ".join(("config.json", LOG, *(["probe.json"] if selection == ADAPTIVE else []), "eval.json")),
    }
    if selection == ADAPTIVE:
        about |= {
            "sparsity": sparsity_charts(evaluation, config, models, names),
            "probe": [*probe_charts(probe, evaluation), _history(metrics, names, phases, *PROBE_TRAINING)],
            "probe_facts": list(probe_facts(probe)),
        }
    else:
        about |= {
            "idea": budget_of(config),
            "has_text": config.get("activations") is None,
            "sparsity": spending_charts(evaluation, names),
            "walks": walks_drawn(evaluation),
            "tokens": tokens_shown(evaluation),
        }
    return _write_atomically(run / "report.html", environment.get_template("report.html.j2").render(about))


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


def _subject(config: dict) -> str:
    """What the SAE is of, for titles."""
    if (folder := config.get("activations")) is not None:
        return f"activations of {Path(str(folder)).name}"
    model = as_dict(config.get("model"))
    return f"{model.get('name', 'unknown model')}, layer {model.get('layer', '?')}"


def _told_of_rows(config: dict) -> dict[str, str]:
    """What the page calls the rows that models are judged on, and where they were trained otherwise."""
    selection = config.get("selection", ADAPTIVE)
    has_text = config.get("activations") is None
    saw = "neither training nor the probe saw" if selection == ADAPTIVE else "training did not see"
    phases = {
        ADAPTIVE: "The probe is frozen at first (phase 2), and trains too at last (phase 3, shaded).",
        "priced": "The first steps select as TopK does; then latents have a price (shaded).",
        "need": "The first steps select as TopK does; then the probe of need says how many (shaded).",
    }
    no_text = "No text is known of these activations, and so no context of a latent."
    return {
        "rows": "tokens" if has_text else "rows",
        "held": "held-out documents" if has_text else "held-out rows",
        "unseen": f"from documents that {saw}" if has_text else "which training did not see",
        "phases": phases[selection],
        "no_latents": "eval.json lists no latent with its top contexts." if has_text else no_text,
    }


def _facts(config: dict, probe: dict, evaluation: dict) -> Iterator[tuple[str, str]]:
    """Label and value of what the header states about the run."""
    model, text = (as_dict(config.get(key)) for key in ("model", "text"))

    def value(section: dict, key: str) -> str:
        return str(section.get(key, "unknown"))

    if config.get("activations") is not None:
        yield "Activations", f"{config['activations']}, of which {count(evaluation.get('rows'))} rows held out"
    else:
        yield "Model", f"{value(model, 'name')}, {value(model, 'dtype')}"
        yield "Layer", f"residual stream after block {value(model, 'layer')}"
        yield "Text", value(text, "source")
        held = f"of which {count(evaluation.get('rows'))} held out by document"
        yield "Tokens", f"at most {count(text.get('max_tokens'))}, {held}"
        cut = "packed across documents" if text.get("packed") else "within one document"
        yield "Contexts", f"at most {count(text.get('context_length'))} tokens, {cut}"
    yield "Dictionary", f"d_sae = {count(config.get('d_sae'))} latents"
    yield from (spending_facts(config) if config.get("selection", ADAPTIVE) != ADAPTIVE else paper_facts(config, probe))
    rows = "all tokens" if config.get("train_on") == "all" else f"{value(config, 'train_on')} tokens"
    if config.get("activations") is not None:
        rows = "all of them"
    yield "Training", f"{count(config.get('steps'))} steps of {count(config.get('batch_size'))} rows, {rows}"
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
    ("k_mean", "k, mean", "latents that a token may have or, at a price, should have on average", ".1f", None),
    ("dead", "Dead latents", "share that never fires on the held-out tokens; lower is better", ".2%", abs),
)


def _table(models: dict[str, dict]) -> Iterator[dict]:
    """One row per metric: its name, explanation, and per model the formatted value and whether it is the better one."""
    for key, name, explanation, spec, rank in METRICS:
        values = [as_dict(model).get(key) for model in models.values()]
        texts = [shown(value, spec) for value in values]
        best = None
        # Values that read the same are a tie, whatever their hidden digits say.
        if rank and len(set(texts)) > 1 and all(map(is_number, values)):
            best = min(range(len(values)), key=lambda index: rank(values[index]))
        cells = [{"text": text, "best": index == best} for index, text in enumerate(texts)]
        yield {"name": name, "explanation": explanation, "cells": cells}


def _headline(models: dict[str, dict]) -> list[str]:
    """The comparison in words, and a warning where the two models are not equally sparse."""
    if len(models) < 2:
        return []
    (name, own), (_, topk) = ((name, as_dict(model)) for name, model in models.items())
    if not all(is_number(model.get(key)) for model in (own, topk) for key in ("fvu", "l0_mean")):
        return []
    change = own["fvu"] / topk["fvu"] - 1 if topk["fvu"] else 0.0
    verdict = "the same as" if abs(change) < 5e-4 else f"{abs(change):.1%} {'less' if change < 0 else 'more'} than"
    sentences = [
        f"With {own['l0_mean']:.1f} active latents per token on average (TopK: {topk['l0_mean']:.1f}), {TITLES[name]}",
        f"leaves {own['fvu']:.2%} of the held-out variance unexplained, {verdict} TopK ({topk['fvu']:.2%}).",
    ]
    gap = own["l0_mean"] / topk["l0_mean"] - 1 if topk["l0_mean"] else math.inf
    if abs(gap) > 0.02:
        sentences.append(
            f"The mean L0 of the two differs by {abs(gap):.1%}, so this is not quite a comparison at equal sparsity."
        )
    return sentences


def _phases(config: dict, metrics: list[dict]) -> tuple[float, str, str]:
    """The step at which the run's SAE begins to be trained otherwise, and what it is called before and after."""
    selection = config.get("selection", ADAPTIVE)
    if selection == ADAPTIVE:
        of_phase_3 = (r["step"] for r in metrics if r.get("phase") == 3 and is_number(r.get("step")))
        return min(of_phase_3, default=math.inf), "phase 2", "phase 3"
    steps = config.get("steps")
    kind = SELECTIONS[{"priced": "Priced", "need": "Need"}[selection]]
    after = {"priced": "at a price", "need": "by need"}[selection]
    return kind(1).topk_share * steps if is_number(steps) else math.inf, "as TopK", after


def _history(
    metrics: list[dict], names: list[str], phases: tuple[float, str, str], key: str, title: str, caption: str
) -> Chart:
    """One logged quantity against the step, both models, with the second phase shaded."""
    series = {name: points for name in names if (points := _series(metrics, name, key))}
    if not series:
        return Chart(title, f"Not drawn: {LOG} holds no finite “{key}”.")
    steps = [step for points in series.values() for step, _ in points]
    values = [value for points in series.values() for _, value in points]
    begins, before, after = phases
    with axes() as ((ax,), done):
        for name, points in series.items():
            # A single point has no line to show.
            ax.plot(*zip(*points), **{**look(name), "marker": look(name)["marker"] if len(points) == 1 else None})
        if key in ("loss", "fvu"):
            log_if_wide(ax, values)
        if key in ("l0", "dead", "aux"):
            ax.set_ylim(bottom=0)
        if key == "dead":
            # A run without dead latents would otherwise get an axis of made-up height.
            ax.set_ylim(top=max(0.01, 1.05 * max(values)))
            ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
        if min(steps) < begins <= max(steps):
            ax.axvspan(begins, max(steps), color=FAINT, alpha=0.35, linewidth=0)
            ax.set_title(before, loc="left", fontsize=8, pad=3)
            ax.set_title(after, loc="right", fontsize=8, pad=3)
        ax.set_xlabel("step")
        ax.xaxis.get_major_locator().set_params(integer=True)
        return Chart(title, caption, done(f"train-{key}", f"{title} against training step"))


def _latents(evaluation: dict) -> Iterator[dict]:
    """The listed latents, each with its contexts as runs of text: `(text, share of the latent's maximum, tooltip)`."""
    for latent in as_list(evaluation.get("top_contexts")):
        examples = []
        for example in latent.get("examples") or []:
            tokens = example.get("tokens") or []
            activations = [a if is_number(a) else 0.0 for a in example.get("activations") or []]
            if tokens and len(tokens) == len(activations):
                examples.append((tokens, activations, example))
        if not examples:
            continue
        top = latent.get("max")
        if not is_number(top):
            top = max(max(activations) for _, activations, _ in examples)
        yield {
            "id": latent.get("latent", "?"),
            "max": shown(top, ".3g"),
            "examples": [
                {
                    "runs": list(marked_runs(tokens, activations, top)),
                    "peak": shown(max(activations), ".3g"),
                    "about": _about_context(example),
                }
                for tokens, activations, example in examples
            ],
        }


def _about_context(example: dict) -> str:
    if "l0" in example:
        return f"mean L0 {shown(example['l0'], '.0f')}"
    return f"score {shown(example.get('score'), '.1f')}, k {shown(example.get('k'), ',.0f')}"


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
        if record.get("model") == model and is_number(record.get("step")) and is_number(record.get(key))
    )
