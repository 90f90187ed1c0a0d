"""What a run reads: contexts, their labels and activations, and batches of rows that know their context."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from . import text_stats
from .activations import LanguageModel
from .batches import Batch, broken_rows, listed, to_device
from .collect import collect
from .complexity import score_contexts
from .config import LabelConfig, ModelConfig, ProbeReads, TextConfig
from .errors import UserError
from .files import atomic_file, read_tensors
from .identity import digest_of_json, digest_of_tensors
from .prefetch import prefetched
from .reading import Activations
from .sae import SAE
from .sites import Site
from .text import ContextSet, check_source, load_contexts

_READ_AHEAD = 4
LABELS = "labels.safetensors"
"""Where a run keeps its `Scores`: they are evaluated with, and never asked for again."""


@dataclass(frozen=True)
class Corpus:
    """A language model and the contexts that it is to read: train and held-out."""

    model: LanguageModel
    train: ContextSet
    heldout: ContextSet

    def identity(self) -> dict[str, Any]:
        """What tells it from another: the model's `identity`, and digests of the contexts of each side."""
        return {
            **self.model.identity,
            "train contexts": context_key(self.train),
            "held-out contexts": context_key(self.heldout),
        }


@dataclass(frozen=True)
class Scores:
    """A complexity score for each context of a corpus: `[N]` float32, NaN where scoring failed."""

    train: Tensor
    heldout: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """Both, by name."""
        return {"train": self.train, "heldout": self.heldout}

    def digest(self) -> str:
        return digest_of_tensors(self.tensors())

    @property
    def scored(self) -> int:
        return sum(int((~scores.isnan()).sum()) for scores in self.tensors().values())

    @property
    def failed(self) -> int:
        return len(self.train) + len(self.heldout) - self.scored


@dataclass(frozen=True)
class Split:
    """Labelled contexts and the activations of their loss tokens."""

    contexts: ContextSet
    labels: Tensor
    store: Activations


@dataclass(frozen=True)
class Data:
    """Train and held-out side of a run."""

    train: Split
    heldout: Split
    tokenizer: Any


def read_corpus(model: ModelConfig, text: TextConfig, labels: LabelConfig | None, cache: Path) -> Corpus:
    """Load the model, read the text and cut it into contexts; None for `labels` where none will be asked for.

    What can be refused cheaply is refused first: a source without a document before the model is converted or read, a
    layer or a context length that it does not have before its weights are, a scorer that it cannot serve before the
    text is. Raises UserError for these, and for a model or a text that cannot be used.
    """
    check_source(text)
    language_model = LanguageModel.load(model, cache, context_length=text.context_length)
    language_model.check_length(text.context_length)
    if labels is not None and labels.scorer == "surprisal":
        language_model.check_predicts("surprisal")
    return Corpus(language_model, *load_contexts(text, language_model.tokenizer))


def score_corpus(corpus: Corpus, labels: LabelConfig, cache: Path) -> Scores:
    """Score the contexts of both sides; scores that are a matter of computing them again are kept under `cache`.

    Raises UserError for label settings or files that cannot be used, and for a side left without any score.
    """
    sides = []
    for name, contexts in (("train", corpus.train), ("held-out", corpus.heldout)):
        scores = torch.from_numpy(_scores(contexts, corpus.model, labels, cache / "labels"))
        if scores.isnan().all():
            raise UserError(f"labels.scorer: {labels.scorer} scored none of the {len(contexts)} {name} contexts")
        sides.append(scores)
    return Scores(*sides)


def read_scores(run: Path) -> Scores:
    """The scores that a run was trained on. Raises UserError where its folder holds none."""
    tensors = read_tensors(run / LABELS)
    if tensors.keys() != {"train", "heldout"}:
        raise UserError(f"{run / LABELS}: got tensors {', '.join(tensors) or 'none'}, needs train and heldout")
    return Scores(**tensors)


def collect_activations(corpus: Corpus, scores: Scores, cache: Path, *, batch_size: int) -> Data:
    """The contexts that have a score, and their activations: kept under `cache` and read again by a later run.

    Raises UserError as `collect` does.
    """
    splits = []
    for contexts, labels in ((corpus.train, scores.train), (corpus.heldout, scores.heldout)):
        scored = ~labels.isnan()
        contexts = contexts.select(scored.numpy())
        store = collect_contexts(corpus.model, contexts, cache, batch_size=batch_size)
        splits.append(Split(contexts, labels[scored], store))
    return Data(train=splits[0], heldout=splits[1], tokenizer=corpus.model.tokenizer)


def collect_contexts(
    model: LanguageModel, contexts: ContextSet, cache: Path, *, batch_size: int, site: Site | None = None
) -> Activations:
    """What passes a site at the loss tokens of contexts, kept under `cache`; None for the residual stream after the
    model's layer."""
    site = Site(model.layer) if site is None else site
    folder = cache / "activations" / context_key(contexts, digest_of_json(model.identity_at(site)))
    return collect(model, contexts, {site: folder}, batch_size=batch_size)[site]


def context_vectors(store: Activations, probe_reads: ProbeReads) -> Callable[[Tensor], Tensor]:
    """The function from contexts `[n]` to the vectors `[n, D]` that the probe is fitted on.

    With `mean` that is the mean over the loss tokens of each, all of them held in memory; else the last loss token.
    """
    if probe_reads == "mean":
        return _context_means(store).__getitem__
    last_rows = store.last_rows()
    return lambda contexts: store.rows(last_rows[contexts])


# Fit, training, baseline and evaluation all ask, and an answer is a pass over the store: train and held-out are kept.
@functools.lru_cache(maxsize=2)
def _context_means(store: Activations) -> Tensor:
    rows_of = store.context.bincount()
    means = torch.zeros(len(rows_of), store.d_in)
    for rows in torch.arange(len(store)).split(1 << 16):
        means.index_add_(0, store.context[rows], store.rows(rows))
    return means / rows_of.unsqueeze(-1)


class BatchReader:
    """Reads batches from an `Activations` and gives their rows a k.

    Args:
        store: the activations.
        probe_reads: `last` and `mean` take each row's k from its context, `token` from the row itself.
        train_on: `all` rows, or the `last` of each context.
        device: where batches are put.
    """

    def __init__(
        self,
        store: Activations,
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
        broken = torch.cat([of[broken_rows(values)] for values, of in ((x, context), (probed, contexts))])
        if len(broken):
            raise UserError(
                f"activations: got NaN or infinity at {where} in {listed('context', broken)}, needs numbers"
            )
        x, probed, place = (to_device(tensor, self.device) for tensor in (x, probed, place))
        return Batch(x, probed=probed, place=place, contexts=contexts)

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

    def training(self, batch_size: int, seed: int, labels: Tensor) -> TrainingBatches:
        """Batches without end, as `shuffled` draws them, with the labels of their contexts."""
        return TrainingBatches(self, batch_size, seed, labels)

    def k(self, sae: SAE, batch: Batch) -> Tensor:
        """k of each row, `[B]` int32, by the SAE's probe as it is now."""
        return sae.k_for(batch.x) if self.probe_reads == "token" else sae.k_for(batch.probed)[batch.place]


class TrainingBatches:
    """See `BatchReader.training`; a thread reads ahead. Knows how many batches were taken."""

    def __init__(self, reader: BatchReader, batch_size: int, seed: int, labels: Tensor):
        self.reader, self.batch_size, self.seed, self.labels = reader, batch_size, seed, labels
        self.taken = 0

    def __iter__(self) -> Iterator[Batch]:
        for batch in prefetched(self._read(self.taken), _READ_AHEAD):
            self.taken += 1
            yield batch

    def _read(self, taken: int) -> Iterator[Batch]:
        drawn = itertools.islice(self.reader.shuffled(self.batch_size, self.seed), taken, None)
        for step, rows in enumerate(drawn, taken):
            batch = self.reader.read(rows, f"step {step}")
            yield dataclasses.replace(batch, scores=to_device(self.labels[batch.contexts], self.reader.device))

    def state_dict(self) -> dict[str, int]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.taken = state["taken"]


def _scores(contexts: ContextSet, model: LanguageModel, labels: LabelConfig, cache: Path) -> np.ndarray:
    """Scores of the contexts, from the cache where they are a matter of computing them again."""
    if labels.scorer == "text-stats":
        source = text_stats.identity()
    elif labels.scorer == "surprisal":
        source = digest_of_json({name: value for name, value in model.identity.items() if name != "model.layer"})
    else:
        # A label file may change, and failed requests are worth another try: their own cache knows the answers.
        return score_contexts(contexts, labels, model=model, cache=cache)
    path = cache / f"{context_key(contexts, labels.scorer, source)}.npy"
    with suppress(FileNotFoundError, ValueError, EOFError):
        scores = np.load(path)
        # Whatever damaged it: one that does not fit is computed again.
        if scores.shape == (len(contexts),) and scores.dtype == np.float32:
            return scores
    scores = score_contexts(contexts, labels, model=model)
    cache.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        np.save(file, scores)
    return scores


def context_key(contexts: ContextSet, *names: str) -> str:
    """A name for what is computed from these contexts."""
    digest = hashlib.sha256(repr((names, contexts.input_ids.shape)).encode())
    for text in contexts.texts:
        digest.update(repr(text).encode())
    for array in (contexts.input_ids, contexts.attention_mask, contexts.loss_mask):
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]
