"""What a run reads: labelled contexts, their activations, and batches of rows that know their context."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .activations import ActivationStore, LanguageModel, collect
from .complexity import score_contexts
from .config import LabelConfig, ModelConfig, ProbeReads, TextConfig
from .errors import UserError
from .files import atomic_file
from .sae import AdaptiveKSAE
from .text import ContextSet, load_contexts


@dataclass(frozen=True)
class Labelled:
    """Contexts with a complexity score each: `labels [N]` float32. Those whose scoring failed are not among them."""

    contexts: ContextSet
    labels: Tensor
    failed: int
    """How many were left out."""


@dataclass(frozen=True)
class Split:
    """Labelled contexts and the activations of their loss tokens."""

    contexts: ContextSet
    labels: Tensor
    store: ActivationStore


@dataclass(frozen=True)
class Data:
    """Train and held-out side of a run."""

    train: Split
    heldout: Split
    tokenizer: Any
    scored: int
    failed: int
    """Contexts with and without a score, both sides together."""


def load_labelled(
    model: LanguageModel, text: TextConfig, labels: LabelConfig, cache: Path
) -> tuple[Labelled, Labelled]:
    """Read text, cut it into contexts, and score them: train and held-out.

    Raises UserError for text, label settings or files that cannot be used, and for a side left without any score.
    """
    sides = []
    for name, contexts in zip(("train", "held-out"), load_contexts(text, model.tokenizer), strict=True):
        scores = torch.from_numpy(_scores(contexts, model, labels, cache / "labels"))
        scored = ~scores.isnan()
        if not scored.any():
            raise UserError(f"labels.scorer: {labels.scorer} scored none of the {len(contexts)} {name} contexts")
        sides.append(Labelled(contexts.select(scored.numpy()), scores[scored], int((~scored).sum())))
    return sides[0], sides[1]


def load_data(model: ModelConfig, text: TextConfig, labels: LabelConfig, cache: Path) -> Data:
    """Labelled contexts and their activations, both kept under `cache` and read again by a later run.

    Only contexts with a score are forwarded. Raises UserError as `load_labelled` does, and for a model that cannot be
    loaded or gives NaN activations.
    """
    language_model = LanguageModel.load(model, cache)
    sides = load_labelled(language_model, text, labels, cache)
    splits = []
    for side in sides:
        folder = cache / "activations" / context_key(side.contexts, language_model.identity)
        store = collect(language_model, side.contexts, folder, batch_size=model.batch_size)
        splits.append(Split(side.contexts, side.labels, store))
    return Data(
        train=splits[0],
        heldout=splits[1],
        tokenizer=language_model.tokenizer,
        scored=sum(len(side.labels) for side in sides),
        failed=sum(side.failed for side in sides),
    )


def context_vectors(store: ActivationStore, probe_reads: ProbeReads) -> Callable[[Tensor], Tensor]:
    """The function from contexts `[n]` to the vectors `[n, D]` that the probe is fitted on.

    With `mean` that is the mean over the loss tokens of each, all of them held in memory; else the last loss token.
    """
    if probe_reads == "mean":
        return _context_means(store).__getitem__
    last_rows = store.last_rows()
    return lambda contexts: store.rows(last_rows[contexts])


# Fit, training, baseline and evaluation all ask, and an answer is a pass over the store: train and held-out are kept.
@functools.lru_cache(maxsize=2)
def _context_means(store: ActivationStore) -> Tensor:
    rows_of = store.context.bincount()
    means = torch.zeros(len(rows_of), store.d_in)
    for rows in torch.arange(len(store)).split(1 << 16):
        means.index_add_(0, store.context[rows], store.rows(rows))
    return means / rows_of.unsqueeze(-1)


@dataclass(frozen=True)
class Batch:
    """Rows of a store, and what the probe reads of the contexts they come from."""

    x: Tensor
    """`[B, D]`."""
    probed: Tensor
    """`[n, D]`, what the probe reads of each context in the batch: see `context_vectors`."""
    contexts: Tensor
    """`[n]` numbers of those contexts, ascending; on the CPU."""
    place: Tensor
    """`[B]`, the context of each row as an index into `contexts`."""


class BatchReader:
    """Reads batches from an `ActivationStore` and gives their rows a k.

    Args:
        store: the activations.
        probe_reads: `last` and `mean` take each row's k from its context, `token` from the row itself.
        train_on: `all` rows, or the `last` of each context.
        device: where batches are put.
    """

    def __init__(
        self,
        store: ActivationStore,
        *,
        probe_reads: ProbeReads,
        train_on: Literal["all", "last"],
        device: torch.device | str = "cpu",
    ):
        self.store, self.probe_reads, self.device = store, probe_reads, torch.device(device)
        self._context_vectors = context_vectors(store, probe_reads)
        self.rows = store.last_rows() if train_on == "last" else torch.arange(len(store))
        """The rows that are trained and evaluated on."""

    def read(self, rows: Tensor, where: str) -> Batch:
        """The batch of the rows `[B]`. Raises UserError for NaN or infinite activations, naming where and contexts."""
        context = self.store.context[rows]
        # On the host, where the number of contexts costs no synchronisation.
        contexts, place = context.unique(return_inverse=True)
        x, probed = self.store.rows(rows), self._context_vectors(contexts)
        # A sum is finite only if all its terms are, and costs a third of looking at each.
        broken = torch.cat([of[~values.sum(-1).isfinite()] for values, of in ((x, context), (probed, contexts))])
        if len(broken):
            raise UserError(f"activations: got NaN or infinity at {where} in {listed(broken)}, needs numbers")
        return Batch(self.put(x), self.put(probed), contexts, self.put(place))

    def shuffled(self, batch_size: int, seed: int) -> Iterator[Tensor]:
        """Rows of one full batch after the other, without end: each epoch in a new order, joined without a gap."""
        generator = torch.Generator().manual_seed(seed)
        rows = self.rows[:0]
        while True:
            while len(rows) < batch_size:
                rows = torch.cat([rows, self.rows[torch.randperm(len(self.rows), generator=generator)]])
            yield rows[:batch_size]
            rows = rows[batch_size:]

    def in_order(self, batch_size: int, *, all_rows: bool = False) -> Iterator[Batch]:
        """Every row once; `all_rows` whatever is trained on."""
        rows = torch.arange(len(self.store)) if all_rows else self.rows
        return (self.read(part, "evaluation") for part in rows.split(batch_size))

    def k(self, sae: AdaptiveKSAE, batch: Batch) -> Tensor:
        """k of each row, `[B]` int32, by the SAE's probe as it is now."""
        return sae.k_for(batch.x) if self.probe_reads == "token" else sae.k_for(batch.probed)[batch.place]

    def put(self, tensor: Tensor) -> Tensor:
        """`tensor` on the reader's device; from pinned memory, so that the host does not wait for the copy."""
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)


def listed(contexts: Tensor) -> str:
    """`context 3`, `contexts 3, 5`, at most five of them."""
    numbers = contexts.unique().tolist()
    shown = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
    return f"context{'s' if len(numbers) > 1 else ''} {shown}"


def _scores(contexts: ContextSet, model: LanguageModel, labels: LabelConfig, cache: Path) -> np.ndarray:
    """Scores of the contexts, from the cache where they are a matter of computing them again."""
    source = {"text-stats": "", "surprisal": model.identity}.get(labels.scorer)
    # A label file may change, and failed requests are worth another try: their own cache knows the answers.
    if source is None:
        return score_contexts(contexts, labels, model=model, cache=cache)
    path = cache / f"{context_key(contexts, labels.scorer, source)}.npy"
    if path.is_file():
        return np.load(path)
    scores = score_contexts(contexts, labels, model=model)
    cache.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        np.save(file, scores)
    return scores


def context_key(contexts: ContextSet, *names: str) -> str:
    """A name for what is computed from these contexts."""
    digest = hashlib.sha256(repr((names, contexts.input_ids.shape, contexts.texts)).encode())
    for array in (contexts.input_ids, contexts.attention_mask, contexts.loss_mask):
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]
