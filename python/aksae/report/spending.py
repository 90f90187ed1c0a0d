"""What a report says of a run at a price or by need, beyond what it says of every run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..config import BASELINE, TITLES
from ..selections import Need, Priced
from .charts import ACCENT, FAINT, INK, Chart, axes, histogram, log_if_wide, look
from .values import VISIBLE, as_dict, as_list, count, is_number, shown

_PASSED_SHOWN = 3
_NO_COMPARISON = (
    "Not drawn: eval.json holds no “pareto” of a TopK baseline with intervals, which take two held-out units."
)


def spending_facts(config: dict) -> Iterator[tuple[str, str]]:
    """Label and value of what the header states about the budget."""
    chooses = {"priced": "a price for each latent", "need": "a linear probe of need"}[config["selection"]]
    yield "Latents of a token", f"{count(config.get('k'))} on average, by {chooses}"


def budget_of(config: dict) -> dict[str, str]:
    """The numbers that the idea is told with: latents there are, those of a token on average, and its candidates."""
    d_sae, k = config.get("d_sae"), config.get("k")
    candidates = None
    if is_number(d_sae) and is_number(k):
        kind = {"priced": Priced, "need": Need}[config["selection"]]
        candidates = min(kind(int(k)).width(int(d_sae)), d_sae)
    return {"latents": count(d_sae), "budget": count(k), "candidates": count(candidates)}


def spending_charts(evaluation: dict, names: list[str]) -> list[Chart]:
    """The error at several budgets, the difference, and how latents are spread over tokens."""
    return [
        _pareto(evaluation, names),
        _difference(evaluation, names),
        histogram(
            "Latents of a token", evaluation, "l0_histogram", quantity="L0", name="l0-histogram", of="held-out rows"
        ),
    ]


def walks_drawn(evaluation: dict) -> list[dict[str, Any]]:
    """Each walk: its token in its context, a chart, and the first candidates that were passed over, in words."""
    return [_walk(number, walk) for number, walk in enumerate(map(as_dict, as_list(evaluation.get("walks"))))]


def tokens_shown(evaluation: dict) -> dict[str, Any]:
    """Contexts as runs of `(text, share of the largest L0, tooltip)`, tokens with most and fewest, and kinds."""
    spent = as_dict(evaluation.get("spending"))
    contexts = [context for context in map(as_dict, as_list(spent.get("contexts"))) if context.get("tokens")]
    numbers = sorted(l0 for context in contexts for l0 in as_list(context.get("l0")) if is_number(l0))
    low, high = (numbers[0], numbers[-1]) if numbers else (0, 0)

    def runs(context: dict) -> Iterator[tuple[str, str, str]]:
        for token, l0 in zip(as_list(context["tokens"]), as_list(context.get("l0"))):
            share = (l0 - low) / (high - low) if is_number(l0) and high > low else 0.0
            space, word = _split(str(token).translate(VISIBLE))
            if space:
                yield space, "0", ""
            yield word, f"{share:.2f}", shown(l0, ".0f")

    most = max((kind["l0"] for kind in as_list(spent.get("kinds")) if is_number(kind.get("l0"))), default=0)
    return {
        "contexts": [{"mean": shown(context.get("mean"), ".0f"), "runs": list(runs(context))} for context in contexts],
        "low": shown(low, ".0f"),
        "high": shown(high, ".0f"),
        "most": [_in_context(entry) for entry in as_list(spent.get("most"))],
        "fewest": [_in_context(entry) for entry in as_list(spent.get("fewest"))],
        "kinds": [
            {
                "kind": kind.get("kind", "?"),
                "rows": count(kind.get("rows")),
                "l0": shown(kind.get("l0"), ".1f"),
                "share": f"{kind['l0'] / most:.3f}" if is_number(kind.get("l0")) and most else "0",
            }
            for kind in map(as_dict, as_list(spent.get("kinds")))
        ],
    }


def _curves(evaluation: dict, names: list[str]) -> dict[str, list[dict]]:
    """The points of each model that has some, ascending by L0, all of whose numbers are there but for the interval."""
    curves = as_dict(as_dict(evaluation.get("pareto")).get("models"))
    found = {
        name: [p for p in map(as_dict, as_list(curves.get(name))) if is_number(p.get("l0")) and is_number(p.get("fvu"))]
        for name in names
    }
    return {name: sorted(points, key=lambda point: point["l0"]) for name, points in found.items() if points}


def _sample(evaluation: dict) -> str:
    sample, pareto = as_dict(evaluation.get("sample")), as_dict(evaluation.get("pareto"))
    rows = f"{count(sample.get('rows'))} held-out rows"
    if sample.get("unit") == "rows":
        return rows
    return f"{rows} out of {count(pareto.get('units'))} {sample.get('unit', 'documents')}"


def _pareto(evaluation: dict, names: list[str]) -> Chart:
    title = "L0 and FVU"
    curves = _curves(evaluation, names)
    if not curves:
        return Chart(title, "Not drawn: eval.json holds no “pareto” curve.")
    with axes() as ((ax,), done):
        for name, points in curves.items():
            l0, fvu = [p["l0"] for p in points], [p["fvu"] for p in points]
            ax.plot(l0, fvu, **look(name), markersize=4)
            between = [
                (p["l0"], p["low"], p["high"]) for p in points if is_number(p.get("low")) and is_number(p.get("high"))
            ]
            if between:
                ax.fill_between(*zip(*between), color=look(name)["color"], alpha=0.2, linewidth=0)
        log_if_wide(ax, [p["l0"] for points in curves.values() for p in points], axis="x")
        log_if_wide(ax, [p["fvu"] for points in curves.values() for p in points])
        ax.set(xlabel="mean L0", ylabel="FVU")
        unit = as_dict(evaluation.get("sample")).get("unit", "documents")
        caption = (
            f"{_sample(evaluation)}; lower is better. Bands are intervals of 95 %, by resampling {unit}. Each SAE was "
            "trained at one budget and is read at the others too, by another price (or bias) or, for TopK, another k."
        )
        return Chart(title, caption, done("pareto", "Mean L0 against FVU on held-out rows, with intervals"))


def _difference(evaluation: dict, names: list[str]) -> Chart:
    title = "Difference of FVU at equal L0"
    curves = _curves(evaluation, names)
    changes = as_list(as_dict(as_dict(evaluation.get("pareto")).get("differences")).get(BASELINE))
    points = [
        (point["l0"], *change["change"])
        for point, change in zip(curves.get(names[0], []), changes)
        if all(map(is_number, as_list(as_dict(change).get("change")) or [None]))
    ]
    if not points:
        return Chart(title, _NO_COMPARISON)
    l0, values, low, high = (list(column) for column in zip(*points))
    with axes() as ((ax,), done):
        below, above = [v - a for v, a in zip(values, low)], [b - v for v, b in zip(values, high)]
        ax.errorbar(l0, values, (below, above), color=ACCENT, marker="o", markersize=4, capsize=3, linewidth=1.2)
        ax.axhline(0, color=INK, linewidth=0.9, linestyle=(0, (1, 2)))
        log_if_wide(ax, l0, axis="x")
        ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:+.0f}%" if value else "0%")
        ax.set(xlabel="mean L0", ylabel="difference from TopK")
        told = ", ".join(f"{v:+.1%} [{a:+.1%}, {b:+.1%}] at {n:.0f}" for n, v, a, b in points)
        caption = f"{TITLES[names[0]]} against TopK on the same rows, with paired intervals of 95 %: {told}."
        return Chart(title, caption, done("difference", "Relative difference of FVU at equal mean L0, with intervals"))


def _in_context(entry: dict) -> dict[str, str]:
    parts = {name: str(entry.get(name, "")).translate(VISIBLE) for name in ("before", "token", "after")}
    space, word = _split(parts["token"])
    return {**parts, "before": parts["before"] + space, "token": word, "l0": shown(entry.get("l0"), ".0f")}


def _split(token: str) -> tuple[str, str]:
    """The space before a word, which is not shaded, and the word; a token of spaces alone is a word."""
    word = token.lstrip() or token
    return token[: len(token) - len(word)], word


def _walk(number: int, walk: dict) -> dict[str, Any]:
    errors = [error for error in as_list(walk.get("errors")) if is_number(error)]
    passed = [as_dict(candidate) for candidate in as_list(walk.get("passed"))]
    told = {
        **_in_context(walk),
        "has_text": "token" in walk,
        "row": count(walk.get("row")),
        "n_passed": count(len(passed)),
        "error": shown(errors[-1] if errors else None, ".1%"),
        "passed": [_told_of(candidate) for candidate in _best_alone(passed)],
        "chart": Chart("", "Not drawn: eval.json holds no errors of this walk."),
    }
    if errors:
        told["chart"] = _walk_chart(number, walk, errors, passed)
    return told


def _walk_chart(number: int, walk: dict, errors: list[float], passed: list[dict]) -> Chart:
    after: dict[int, int] = {}
    for candidate in passed:
        if is_number(candidate.get("after")):
            after[candidate["after"]] = after.get(candidate["after"], 0) + 1
    with axes(3, 1) as ((ax, below), done):
        lines = {"priced": errors, **{name: as_list(line) for name, line in as_dict(walk.get("others")).items()}}
        for name, line in reversed(lines.items()):
            ax.plot(range(len(line)), line, **{**look(name), "marker": None})
        at = [place for place in sorted(after) if place < len(errors)]
        ax.scatter(at, [errors[place] for place in at], s=9, color=ACCENT, linewidths=0)
        log_if_wide(ax, [value for line in lines.values() for value in line])
        ax.set(ylabel="error")
        below.bar(list(after), list(after.values()), width=0.8, color=INK)
        below.set(xlabel="latents kept", ylabel="passed")
        below.grid(axis="x", visible=False)
        below.spines["bottom"].set_color(FAINT)
        below.xaxis.get_major_locator().set_params(integer=True)
        caption = (
            "Squared error as a share of the token's variance, after each latent; the price of one is "
            f"{shown(walk.get('price'), '.2%')} of that. Dots and bars: so many candidates were passed over there."
        )
        return Chart("", caption, done(f"walk-{number}", "Error after each latent, and candidates passed over"))


def _best_alone(passed: list[dict]) -> list[dict]:
    """The candidates that would have lowered the error most by themselves, of those that others explain."""
    explained = [c for c in passed if is_number(c.get("explained_by")) and is_number(c.get("alone"))]
    return sorted(explained, key=lambda candidate: -candidate["alone"])[:_PASSED_SHOWN]


def _told_of(candidate: dict) -> str:
    alone, beside = shown(candidate["alone"], ".1%"), shown(candidate.get("gain"), ".2%")
    return (
        f"Latent {candidate.get('latent', '?')} would lower the error by {alone} alone, by {beside} beside the others. "
        f"Latent {candidate['explained_by']} explains {shown(candidate.get('share'), '.0%')} of what lowers that."
    )
