"""The tables: what a run prints last, and what the README shows of every device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..machine import NO_GPU
from ..problem import Shape
from ..report import Target
from .ledger import read
from .targets import LINES, SHAPES, SPREAD, UNIFORM, Line

MARKS = {"stretch": "++", "must": "+", "missed": "!", None: " "}
NOT_YET = "not yet measured"
START, END = "<!-- gpu-table -->", "<!-- /gpu-table -->"

Cells = Mapping[tuple[str, str, str, str, str], float]
"""Ratios by what, rival, choice of k, shape and backend."""
_MOST_REASONS = 4
_CAPTION = (
    f'Shapes S1 to S4, in this order: (B, D, F) = {", ".join(map(str, SHAPES.values()))}. A "uniform" k is '
    f'{", ".join(UNIFORM.values())}; a "spread" one is drawn from {SPREAD} for each row. A ratio is our time (or '
    "memory) over the rival's: below 1 is faster. Bold: the target was missed."
)


def cells(document: Mapping[str, Any]) -> Cells:
    """Of everything a document holds."""
    names = {tuple(shape): name for name, shape in document["shapes"].items()}
    found = {}
    for part in document["parts"].values():
        for row in part["rows"]:
            k = "spread" if ".." in row["k"] else "uniform"
            key = row["what"], row["rival"], k, names[tuple(row["shape"].values())], row["backend"]
            found[key] = row["ratio"]["p50"]
    return found


def text(document: Mapping[str, Any]) -> str:
    """For the terminal, less than 60 lines: ratios by shape, of several backends side by side, then what is amiss."""
    found, backends = cells(document), document["backends"]
    cold = "" if document["machine"]["device"] == NO_GPU else ", cold L2"
    lines = [
        f"ours / rival, of {', '.join(backends)}; medians{cold}; ++ stretch, + must, ! missed, no mark: no target",
        f"{'what / rival':52s} {'k':8s}" + "".join(f"{name:>17s}" for name in document["shapes"]),
    ]
    for line, k in _rows():
        shown = [_cell(found, line, k, shape, backends) for shape in document["shapes"]]
        if any(shown):
            lines.append(f"{f'{line.what} / {line.rival}':52.52s} {k:8s}" + "".join(f"{cell:>17s}" for cell in shown))
    parts = document["parts"]
    for name in ("ceilings", "gemms"):
        for fact, value in parts.get(name, {}).get("facts", {}).items():
            lines.append(f"{fact}: {_rates(value)}")
    for key in ("wrong", "failed", "skipped"):
        reasons = [reason for part in parts.values() for reason in part[key]]
        lines.append(f"{key}: {len(reasons)}")
        lines += [f"  {reason:.140s}" for reason in reasons[:_MOST_REASONS]]
    return "\n".join(lines)


def _rates(value: float | Mapping[str, float]) -> str:
    """In units of 10^12, of pieces of a size or of products in a shape."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_rates(rate)}" for name, rate in value.items())
    return f"{value / 1e12:.3g} T"


def _cell(found: Cells, line: Line, k: str, shape: str, backends: Iterable[str]) -> str:
    ratios = [found.get((line.what, line.rival, k, shape, backend)) for backend in backends]
    if all(ratio is None for ratio in ratios):
        return ""
    return " ".join("-" if ratio is None else f"{ratio:.3g}{_mark(line.target(shape), ratio)}" for ratio in ratios)


def _mark(target: Target | None, ratio: float) -> str:
    return MARKS[target.verdict(ratio) if target else None]


def markdown(folder: Path) -> str:
    """The README's table, of every device with a result in the folder; one column where there is none yet."""
    documents = [document for path in sorted(folder.glob("*.json")) if _counts(document := read(path))]
    heads = [document["machine"]["device"] for document in documents] or ["on a GPU"]
    lines = [
        _CAPTION,
        "",
        f"| what | rival | k | must | stretch | {' | '.join(heads)} |",
        "|---" * (5 + len(heads)) + "|",
    ]
    known = [(cells(document), document["backends"]) for document in documents]
    for line, k in _rows():
        figures = [_measured(found, line, k, backends) for found, backends in known] or [NOT_YET]
        must, stretch = (_figures(bounds) for bounds in (line.must, line.stretch))
        lines.append(f"| {line.what} | {line.rival} | {k} | {must} | {stretch} | {' | '.join(figures)} |")
    lines += ["", *(_provenance(document) for document in documents)]
    return "\n".join(lines).rstrip()


def _counts(document: Mapping[str, Any] | None) -> bool:
    """Whether it is of a real device in the reference shapes."""
    reference = {name: list(shape) for name, shape in SHAPES.items()}
    return document is not None and document["machine"]["device"] != NO_GPU and document["shapes"] == reference


def _measured(found: Cells, line: Line, k: str, backends: Iterable[str]) -> str:
    by_backend = {}
    for backend in backends:
        ratios = [found.get((line.what, line.rival, k, shape, backend)) for shape in SHAPES]
        if any(ratio is not None for ratio in ratios):
            by_backend[backend] = ", ".join(
                "-" if ratio is None else _judged(line.target(shape), ratio) for shape, ratio in zip(SHAPES, ratios)
            )
    return "; ".join(f"`{backend}` {ratios}" for backend, ratios in by_backend.items()) or NOT_YET


def _judged(target: Target | None, ratio: float) -> str:
    return f"**{ratio:.3g}**" if target and target.verdict(ratio) == "missed" else f"{ratio:.3g}"


def _figures(bounds: tuple[float, ...]) -> str:
    """One where all shapes have the same."""
    return ", ".join(f"{bound:.3g}" for bound in (bounds if len(set(bounds)) > 1 else bounds[:1])) or "-"


def _provenance(document: Mapping[str, Any]) -> str:
    machine = document["machine"]
    return (
        f"{machine['device']}: {machine['SMs']} SMs, L2 {machine['L2 MB']:.3g} MB, driver {machine['driver']}, CUDA "
        f"{machine['CUDA']}, torch {machine['torch']}, Triton {machine['Triton']}, commit {document['commit']}."
    )


def _rows() -> Iterator[tuple[Line, str]]:
    return ((line, k) for line in LINES for k in line.ks)


def between_markers(readme: str) -> str:
    """What a README has between the markers of the table. Raises ValueError where they are missing."""
    _, start, rest = readme.partition(START)
    inside, end, _ = rest.partition(END)
    if not (start and end):
        raise ValueError(f"the README has no {START} ... {END}")
    return inside.strip()


def shape_names(shapes: Mapping[str, Shape]) -> dict[str, list[int]]:
    """For JSON."""
    return {name: list(shape) for name, shape in shapes.items()}
