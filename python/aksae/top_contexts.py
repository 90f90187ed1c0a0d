"""The contexts in which latents are strongest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from aksae_kernels import SparseCodes

_DENSE = 0.1
_LATENTS, _EXAMPLES = 12, 5


def top_contexts(
    latents: Tensor, activations: Tensor, contexts: Tensor, about: Callable[[int], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Of each latent its number, its largest activation and, strongest first, the contexts in which it is strongest.

    Args:
        latents: `[n]`, their numbers.
        activations: `[rows, n]` of each.
        contexts: `[rows]`, the context of each row.
        about: what is said of a context, by its number: its `tokens`, those of its rows in their order, at least.
    """
    numbers, of_row = contexts.unique(return_inverse=True)
    # [latents, contexts]: the largest activation of each latent in each context.
    strongest = torch.zeros(len(latents), len(numbers)).scatter_reduce(
        1, of_row.expand(len(latents), -1), activations.float().T, "amax"
    )

    def examples(latent: int) -> list[dict[str, Any]]:
        best = strongest[latent].sort(descending=True, stable=True)
        chosen = best.indices[:_EXAMPLES][best.values[:_EXAMPLES] > 0].tolist()
        return [
            {**about(int(numbers[place])), "activations": activations[of_row == place, latent].tolist()}
            for place in chosen
        ]

    return [
        {"latent": number, "max": strongest[latent].max().item(), "examples": examples(latent)}
        for latent, number in enumerate(latents.tolist())
    ]


def spread_latents(fired: Tensor, n_rows: int) -> Tensor:
    """At most 12 latents that fired, evenly spaced from rarest to most frequent.

    Those on over 10 % of the rows are left out, unless there are no others: no context shows what they stand for.
    """
    alive = fired > 0
    wanted = alive & (fired <= _DENSE * n_rows)
    candidates = (wanted if wanted.any() else alive).nonzero().flatten()
    by_frequency = candidates[fired[candidates].argsort(stable=True)]
    if not len(by_frequency):
        return by_frequency
    return by_frequency[torch.linspace(0, len(by_frequency) - 1, min(_LATENTS, len(by_frequency))).round().long()]


def activations_of(latents: Tensor, codes: SparseCodes) -> Tensor:
    """The activations of `latents [n]` in codes `[B, K]`: `[B, n]` on the CPU, 0 where one was not selected."""
    columns = [torch.where(codes.indices == latent, codes.values, 0).sum(-1) for latent in latents.tolist()]
    return torch.stack(columns, 1).cpu() if columns else codes.values.new_zeros(len(codes.values), 0).cpu()
