"""`python -m benchmarks.train_step --json FILE`: where the time of a training step goes; `--plot` draws it.

FILE is what `python -m benchmarks.peers --json FILE` measured, so that the bars come from the run that gave the ratios.
The phases are those of `benchmarks.phases`. Our encode selects as it multiplies, and the gradient of the codes comes
with the loss: our backward is the gradients of the weights.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .phases import PHASES
from .problem import Shape

_COLOURS = dict(zip(PHASES, ("#2b6cb0", "#63b3ed", "#38a169", "#dd6b20", "#805ad5", "#a0aec0")))


def table(result: Mapping[str, Any]) -> str:
    """Milliseconds of every contender by phase: medians, so that they need not add up to that of the whole step."""
    columns = ("total", *PHASES)
    lines = [f"{'ms':34s}" + "".join(f"{column:>15s}" for column in columns)]
    for name, step in result["steps"].items():
        lines.append(f"{name:34s}" + "".join(f"{1e3 * step[column]['p50']:15.4g}" for column in columns))
    return "\n".join(lines)


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Stacked bars of the median phases, one for each contender; the suffix of `path` chooses the format."""
    from matplotlib.figure import Figure

    steps = dict(reversed(result["steps"].items()))
    figure = Figure(figsize=(9, 1.3 + 0.45 * len(steps)), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(steps)
    for phase in PHASES:
        widths = [1e3 * step[phase]["p50"] for step in steps.values()]
        axes.barh(list(steps), widths, left=left, height=0.62, label=phase, color=_COLOURS[phase])
        left = [start + width for start, width in zip(left, widths)]
    for row, (end, step) in enumerate(zip(left, steps.values())):
        total = f"{1e3 * step['total']['p50']:.4g} ms"
        axes.annotate(total, (end, row), (5, 0), textcoords="offset points", va="center")
    axes.margins(x=0.13)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    shape, machine = Shape(**result["shape"]), result["machine"]
    where = f"{machine['CPU']}, {machine['threads']} threads"
    axes.set_xlabel(f"ms per training step, fp32, (B, D, F) = {shape}, k = {result['k']}\n{where}")
    figure.legend(loc="outside upper center", ncols=len(PHASES), frameon=False)
    figure.savefig(path, dpi=200)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="what benchmarks.peers kept there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="where to draw it: .png or .svg")
    options = parser.parse_args(arguments)
    try:
        result = json.loads(options.json.read_text())
        print(table(result))
        if options.plot:
            options.plot.parent.mkdir(parents=True, exist_ok=True)
            plot(result, options.plot)
    except OSError as error:
        print(f"{error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
