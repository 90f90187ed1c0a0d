"""The held-out rows of a study, and what is known of each."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import Split, context_vectors
from ..text import ContextSet
from .plan import PROBE_READS
from .sparse_probing import token_labels

CHUNK = 2048
"""Rows that are encoded at a time."""
FAR = 3.0
"""A row is far whose norm is more than this many times the median one."""


@dataclass(frozen=True)
class Rows:
    """Activations of held-out loss tokens, in memory."""

    x: Tensor
    """`[N, D]`."""
    context: Tensor
    """`[N]`, the context of each, from 0."""
    document: Tensor
    """`[N]`, the document of each, from 0."""
    probed: Tensor
    """`[n_contexts, D]`, what the probe of the paper's AdaptiveK reads."""
    contexts: ContextSet

    def __len__(self) -> int:
        return len(self.x)

    @property
    def n_documents(self) -> int:
        return int(self.document.max()) + 1

    @functools.cached_property
    def near(self) -> Tensor:
        """`[N]` bool on the CPU, which rows are not far.

        Where a model parks attention within a context, too, a token's activation is several times longer than the
        others. A rule by thresholds keeps hundreds of latents of such a row, and one row can be a third of its error.
        """
        norms = torch.linalg.vector_norm(self.x, dim=-1).cpu()
        return norms <= FAR * norms.median()

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, len(self.x), CHUNK):
            part = slice(start, start + CHUNK)
            yield part, self.x[part]

    def first(self, n: int) -> Rows:
        """The first `n` rows, or all."""
        return Rows(self.x[:n], self.context[:n], self.document[:n], self.probed, self.contexts)

    def token_labels(self, tokenizer: Any) -> dict[str, Tensor]:
        """What the text says of each row, bool `[N]` by name: `sparse_probing.token_labels` of its context."""
        of_contexts = []
        for ids, kept in zip(self.contexts.input_ids, self.contexts.loss_mask):
            of_contexts.append(token_labels([tokenizer.decode([token]) for token in ids[kept].tolist()]))
        return {name: torch.cat([labels[name] for labels in of_contexts])[: len(self)] for name in of_contexts[0]}

    def sums(self, values: Tensor) -> list[float]:
        """Sums of `values [N]` over each document."""
        return torch.zeros(self.n_documents, dtype=torch.float64).index_add_(0, self.document, values.double()).tolist()


def split_rows(split: Split, calibration_share: float, device: torch.device) -> tuple[Rows, Rows]:
    """The held-out rows that calibrate, those of the first documents, and those that judge; no document is in both."""
    documents = split.contexts.document
    distinct = list(dict.fromkeys(documents.tolist()))
    n = min(len(distinct) - 1, max(1, round(len(distinct) * calibration_share)))
    calibrates = np.isin(documents, distinct[:n])
    return _rows(split, calibrates, device), _rows(split, ~calibrates, device)


def _rows(split: Split, chosen: np.ndarray, device: torch.device) -> Rows:
    store = split.store
    assert store.context is not None  # ours name them
    numbers = torch.from_numpy(chosen.nonzero()[0])
    here = torch.isin(store.context, numbers).nonzero()[:, 0]
    context = torch.searchsorted(numbers, store.context[here])
    contexts = split.contexts.select(chosen)
    documents = torch.from_numpy(contexts.document).long().unique(return_inverse=True)[1]
    probed = context_vectors(store, PROBE_READS)(numbers)
    return Rows(store.rows(here).to(device), context, documents[context], probed.to(device), contexts)
