"""Drawings of a report: SVG that stands in an HTML page and takes its colours from there."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..config import BASELINE
from .values import as_dict, as_list, is_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Drawn in colours that stand for a role; the SVG then names the page's CSS variable instead, so that one drawing serves
# the light, the dark and the printed page.
INK, FAINT, ACCENT, OTHER = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04"
_CSS_COLOURS = {INK: "var(--muted)", FAINT: "var(--rule)", ACCENT: "var(--own)", OTHER: "var(--topk)"}
_STYLE = {
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


@dataclass(frozen=True)
class Chart:
    """One drawing of a section; `svg` is None where the run lacks the data, and `caption` then says what is missing."""

    title: str
    caption: str
    svg: str | None = None


def look(name: str) -> dict[str, Any]:
    """Colour, dashes and marker of a model: the baseline's, or those of the one that a run is about."""
    if name == BASELINE:
        return {"color": OTHER, "linestyle": (0, (4, 1.6)), "marker": "s"}
    return {"color": ACCENT, "linestyle": "-", "marker": "o"}


def dots(count: int) -> dict[str, Any]:
    """A scatter of so many points."""
    return {"s": 14, "color": ACCENT, "alpha": 0.75 if count < 200 else 0.4, "linewidths": 0}


def ring(name: str) -> dict[str, Any]:
    """A large open marker of a model."""
    drawn = look(name)
    return {
        "linestyle": "none",
        "marker": drawn["marker"],
        "markersize": 10,
        "markerfacecolor": "none",
        "markeredgecolor": drawn["color"],
        "markeredgewidth": 1.5,
    }


def log_if_wide(ax: Axes, values: list[float], axis: str = "y") -> None:
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


def histogram(title: str, evaluation: dict, key: str, *, quantity: str, name: str, of: str) -> Chart:
    """How many rows have each value of a quantity, by what the evaluation has under `key`: values, under the quantity's
    name in lower case, and `rows`. `of` says what rows are."""
    spread = as_dict(evaluation.get(key))
    pairs = zip(as_list(spread.get(quantity.lower())), as_list(spread.get("rows")))
    rows = {value: n for value, n in pairs if is_number(value) and is_number(n)}
    if not sum(rows.values()):
        return Chart(title, f"Not drawn: eval.json holds no “{key}”.")
    low, high, total = math.floor(min(rows)), math.ceil(max(rows)), sum(rows.values())
    width = max(1, math.ceil((high - low + 1) / 30))
    bars = math.ceil((high - low + 1) / width)
    mean = sum(value * count for value, count in rows.items()) / total
    with axes() as ((ax,), done):
        # Edges lie halfway between integers, so that no value falls on one.
        edges = [low - 0.5 + width * i for i in range(bars + 1)]
        ax.hist(list(rows), bins=edges, weights=list(rows.values()), color=ACCENT, alpha=0.75, rwidth=0.9)
        ax.axvline(mean, color=INK, linewidth=0.9, linestyle=(0, (1, 2)))
        place = {"xycoords": ("data", "axes fraction"), "xytext": (0, 3), "textcoords": "offset points"}
        ax.annotate(f"mean {mean:.0f}", (mean, 1), **place, ha="center", fontsize=8)
        ax.set(xlabel=quantity, ylabel=of)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(axis="x", visible=False)
        caption = f"{quantity} of each of {total:,.0f} {of}, in bars {width} wide; the dotted line is their mean."
        return Chart(title, caption, done(name, f"Histogram of {quantity} over {of}"))


@contextmanager
def axes(*heights: float) -> Iterator[tuple[tuple[Axes, ...], Callable[[str, str], str]]]:
    """Axes in the report's style, and what turns them into SVG, given a name unique in the page and a description.

    One for each of some relative heights, below each other, with one x axis; one alone without any. The style, and what
    makes the same drawing the same bytes, holds within the block.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3.6, 2.5), layout="constrained")
        ratios = heights or (1.0,)
        panels = tuple(figure.subplots(len(ratios), sharex=True, squeeze=False, height_ratios=ratios)[:, 0])
        for ax, ratio in zip(panels, ratios):
            ax.xaxis.set_major_locator(MaxNLocator(6))
            ax.yaxis.set_major_locator(MaxNLocator(max(2, round(6 * ratio / max(ratios)))))
            ax.tick_params(length=3)

        def done(name: str, description: str) -> str:
            buffer = io.StringIO()
            figure.savefig(
                buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
            )
            return _inline(buffer.getvalue(), name, description)

        yield panels, done


def _inline(svg: str, name: str, description: str) -> str:
    """A matplotlib SVG as an element of an HTML page: ids unique in the page, size and colours left to its CSS."""
    svg = svg[svg.index("<svg") :].rstrip()
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\g<1>#{name}-", svg)
    for drawn, themed in _CSS_COLOURS.items():
        svg = svg.replace(drawn, themed)
    view_box = re.search(r'viewBox="[^"]*"', svg).group()
    head = f'<svg role="img" aria-label="{description}" {view_box} xmlns:xlink="http://www.w3.org/1999/xlink">'
    return head + svg[svg.index(">") + 1 :]
