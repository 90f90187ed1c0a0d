"""The figures of a study."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .layer import OWN, PRICED

_COLOURS = {
    "priced": "#1f5fa8",
    "need": "#5b9bd5",
    "adaptivek": "#8a8f98",
    "topk": "#b3530f",
    "batch-topk": "#d99a3d",
    "jumprelu": "#4f8f5b",
    "matryoshka": "#8e5ba6",
}


def write_figures(found: Mapping[str, Any], names: Mapping[str, str], folder: Path) -> list[Path]:
    """Draw `pareto.png` (FVU and damage against L0 at each layer, with intervals) and `controls.png` (what of a price's
    gain comes from where), and return the paths.

    FVU is that of the rows that are not far (`Rows.near`): a single far row can be most of a selection's error, and the
    curves of all rows say more of it than of the rest.
    """
    import matplotlib

    style = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3, "font.size": 9}
    with matplotlib.rc_context(style):
        drawn = [_pareto(found, names, folder / "pareto.png")]
        if found["controls"]:
            drawn.append(_controls(found, names, folder / "controls.png"))
    return drawn


def _pareto(found: Mapping[str, Any], names: Mapping[str, str], path: Path) -> Path:
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    layers = list(dict.fromkeys(record["layer"] for record in found["fvu"]))
    kinds = [("fvu", "FVU, far rows left out")] + (
        [("damage", "rise of cross-entropy, nats a token")] if found["damage"] else []
    )
    figure = Figure(
        figsize=(4.4 * len(kinds) * len(layers) / max(1, len(layers) - 0.4), 3.6 * len(layers)), layout="constrained"
    )
    axes = figure.subplots(len(layers), len(kinds), squeeze=False)
    for row, layer in zip(axes, layers):
        for ax, (kind, label) in zip(row, kinds):
            records = [{**record, **record.get("near", {})} for record in found[kind] if record["layer"] == layer]
            shown = dict.fromkeys((record["selection"], record["rule"]) for record in records)
            for selection, rule in shown:
                # Of weights at a price only TopK's are drawn: the others lie close to them.
                if rule == PRICED and selection != "topk":
                    continue
                curve = sorted(
                    (record["budget"], record["value"], record["low"], record["high"])
                    for record in records
                    if (record["selection"], record["rule"]) == (selection, rule)
                )
                l0, value, low, high = zip(*curve)
                name = names[selection] if rule == OWN else f"{names[selection]}'s weights at a price"
                ax.errorbar(
                    l0,
                    value,
                    yerr=[[v - b for v, b in zip(value, low)], [t - v for v, t in zip(value, high)]],
                    color=_COLOURS[selection],
                    linestyle="-" if rule == OWN else "--",
                    marker="o" if rule == OWN else "s",
                    markersize=3.5,
                    linewidth=1.8 if selection == "priced" else 1.1,
                    capsize=2,
                    label=name,
                )
            ax.set_xscale("log")
            ax.set_yscale("log" if min(record["value"] for record in records) > 0 else "linear")
            ticks = sorted({record["budget"] for record in records})
            ax.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
            ax.xaxis.minorticks_off()
            if ax.get_yscale() == "log":
                ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                ax.yaxis.minorticks_off()
            ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            ax.set_xlabel("mean L0")
            ax.set_title(f"block {layer}: {label}", fontsize=9, loc="left")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    return path


def _controls(found: Mapping[str, Any], names: Mapping[str, str], path: Path) -> Path:
    from matplotlib.figure import Figure

    budgets = sorted({record["budget"] for record in found["controls"]})
    budget = budgets[len(budgets) // 2]
    records = [record for record in found["controls"] if record["budget"] == budget]
    weights = list(dict.fromkeys(record["weights"] for record in records))
    figure = Figure(figsize=(4.6 * len(weights), 3.4), layout="constrained")
    for ax, of in zip(figure.subplots(1, len(weights), squeeze=False, sharex=True)[0], weights):
        shown = [record for record in records if record["weights"] == of]
        ax.barh(range(len(shown)), [record["fvu"] for record in shown], color=_COLOURS[of], height=0.65)
        ax.set_yticks(range(len(shown)), [record["control"] for record in shown])
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
        ax.set_title(f"weights trained as {names[of]}, L0 {budget}: FVU", fontsize=9, loc="left")
    figure.savefig(path, dpi=150)
    return path
