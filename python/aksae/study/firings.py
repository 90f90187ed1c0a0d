"""How the firings of latents change with their selection: which are dropped, which join, and where in the text."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from aksae_kernels import SparseCodes

from ..evaluate import activations_of
from ..explain import strongest_contexts

_BEFORE, _AFTER = 20, 10


class FiringChanges(NamedTuple):
    """How often each latent fired before and after, `[F]` int64 each."""

    fired: Tensor
    """Before."""
    dropped: Tensor
    """Before and not after."""
    gained: Tensor
    """After and not before."""

    @property
    def dropped_share(self) -> Tensor:
        """`dropped / fired`, `[F]` float64; NaN for a latent that did not fire."""
        return self.dropped.double() / self.fired.double()


def firing_changes(before: SparseCodes, after: SparseCodes, d_sae: int) -> FiringChanges:
    """How the latents of the same rows change from one selection to another.

    Both are codes `[n, K]`, of any widths. Of an SAE with latents at a price, `sae.encode(x, k=sae.k_bound)` are what
    prices chose from, `sae.encode(x, k=budget)` is TopK at the same L0, from whose latents priced ones may also be
    further down.
    """
    keys = [_keys(codes, d_sae) for codes in (before, after)]

    def count(chosen: Tensor) -> Tensor:
        return torch.bincount(chosen % d_sae, minlength=d_sae)

    is_dropped, is_gained = ~torch.isin(keys[0], keys[1]), ~torch.isin(keys[1], keys[0])
    return FiringChanges(count(keys[0]), count(keys[0][is_dropped]), count(keys[1][is_gained]))


def dropped_examples(
    before: SparseCodes, after: SparseCodes, latent: int, tokens: Tensor, contexts: Tensor, n: int, tokenizer: Any
) -> list[dict[str, Any]]:
    """The `n` contexts in which the strongest dropped firings of a latent are.

    Args:
        before, after: codes `[N, K]` of the tokens of whole contexts, as `firing_changes` takes them.
        latent: its number.
        tokens: `[N]`, their numbers in the vocabulary.
        contexts: `[N]`, the context of each.
        n: at most so many.
        tokenizer: decodes.

    Returns:
        Of each `tokens`, as text, `activations`, before, and `dropped`, of each token whether its firing was.
    """
    index = torch.tensor([latent])
    activations = activations_of(index, before)[:, 0]
    dropped = (activations > 0) & (activations_of(index, after)[:, 0] == 0)
    return [
        {
            "tokens": [tokenizer.decode([token]) for token in tokens[rows].tolist()],
            "activations": activations[rows].tolist(),
            "dropped": dropped[rows].tolist(),
        }
        for rows in strongest_contexts(torch.where(dropped, activations, 0), contexts, n)
    ]


def described_drops(example: dict[str, Any]) -> str:
    """An example as a line around its strongest dropped firing: what still fires in «», what was dropped in ~~."""
    strengths = [a * dropped for a, dropped in zip(example["activations"], example["dropped"])]
    peak = strengths.index(max(strengths))
    start, stop = max(0, peak - _BEFORE), peak + _AFTER + 1
    text = "…" if start else ""
    shown = (example[name][start:stop] for name in ("tokens", "activations", "dropped"))
    for token, activation, dropped in zip(*shown):
        word = token.lstrip()
        marked = f"~{word}~" if dropped else f"«{word}»" if activation > 0 else word
        text += token[: len(token) - len(word)] + marked
    return (text + ("…" if stop < len(example["tokens"]) else "")).replace("\n", "⏎")


def _keys(codes: SparseCodes, d_sae: int) -> Tensor:
    """A number for each firing, of its row and its latent."""
    rows = torch.arange(len(codes.counts), device=codes.indices.device).unsqueeze(-1)
    # A slot past a row's count names no latent; one that holds a 0 does not fire.
    return (rows * d_sae + codes.indices.long())[codes.mask() & (codes.values > 0)]
