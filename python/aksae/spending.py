"""Which tokens get many latents and which get few."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .heldout import HeldOutText

_SHOWN, _CONTEXTS = 8, 6
_BEFORE, _AFTER = 12, 4

_KINDS = ("beginning of a word", "rest of a word", "number", "punctuation", "white space")


def l0_histogram(l0: Tensor) -> dict[str, list[int]]:
    """How many rows have each L0 that occurs, of `l0 [N]`: `l0` ascending, and `rows`."""
    values, rows = l0.unique(return_counts=True)
    return {"l0": values.tolist(), "rows": rows.tolist()}


def spending(l0: Tensor, text: HeldOutText) -> dict[str, Any]:
    """Where the latents of `l0 [N]`, integers, went in a text.

    Returns:
        `contexts`: six of them, evenly spaced from the least mean L0 to the most, each with its `tokens` and their
        `l0`. `most` and `fewest`: the eight tokens with the most and the fewest latents, one at most of a context and
        of a token, each with `before`, `token`, `after` and `l0`. `kinds`: of each kind of token that occurs its
        `rows` and `l0`, the mean.
    """
    numbers, of_row = text.contexts.unique(return_inverse=True)
    means = torch.zeros(len(numbers), dtype=torch.float64).index_add_(0, of_row, l0.double()) / of_row.bincount()
    spread = torch.linspace(0, len(numbers) - 1, min(_CONTEXTS, len(numbers))).round().long()
    contexts = []
    for place in means.argsort(stable=True)[spread].tolist():
        rows = text.rows_of(int(numbers[place]))
        contexts.append({"mean": means[place].item(), "tokens": text.decoded(rows), "l0": l0[rows].tolist()})
    ascending = l0.argsort(stable=True)
    return {
        "contexts": contexts,
        "most": _distinct(ascending.flip(0), l0, text),
        "fewest": _distinct(ascending, l0, text),
        "kinds": _by_kind(l0, text),
    }


def in_context(row: int, text: HeldOutText) -> dict[str, str]:
    """The token of a row, and the text of its context before and after it, cut to some words."""
    rows = text.rows_of(int(text.contexts[row]))
    tokens, at = text.decoded(rows), int((rows == row).nonzero())
    before, after = tokens[max(0, at - _BEFORE) : at], tokens[at + 1 : at + 1 + _AFTER]
    return {
        "before": "…" * (at > _BEFORE) + "".join(before),
        "token": tokens[at],
        "after": "".join(after) + "…" * (at + 1 + _AFTER < len(tokens)),
    }


def kind_of(token: str) -> str:
    """What a token is, by its text: one that holds a space first begins a word."""
    body = token.strip()
    if not body:
        return "white space"
    if not any(character.isalnum() for character in body):
        return "punctuation"
    if not any(character.isalpha() for character in body):
        return "number"
    return "beginning of a word" if token[0].isspace() else "rest of a word"


def _distinct(order: Tensor, l0: Tensor, text: HeldOutText) -> list[dict[str, Any]]:
    """The first rows in `order [N]` that are of different contexts and tokens."""
    chosen: list[int] = []
    contexts, tokens = set(), set()
    for row in order.tolist():
        context, token = int(text.contexts[row]), int(text.tokens[row])
        if context in contexts or token in tokens:
            continue
        contexts.add(context)
        tokens.add(token)
        chosen.append(row)
        if len(chosen) == _SHOWN:
            break
    return [{**in_context(row, text), "l0": int(l0[row])} for row in chosen]


def _by_kind(l0: Tensor, text: HeldOutText) -> list[dict[str, Any]]:
    ids, of_row = text.tokens.unique(return_inverse=True)
    kinds = torch.tensor([_KINDS.index(kind_of(text.tokenizer.decode([token]))) for token in ids.tolist()])[of_row]
    of_kind = {name: l0[kinds == number].double() for number, name in enumerate(_KINDS)}
    return [{"kind": name, "rows": len(rows), "l0": rows.mean().item()} for name, rows in of_kind.items() if len(rows)]
