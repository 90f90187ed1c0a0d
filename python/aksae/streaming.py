"""Activations straight from a language model, mixed in memory and kept nowhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .activations import LanguageModel
from .batches import broken_rows
from .errors import UserError
from .mixing import MixedBatches
from .sites import Site

if TYPE_CHECKING:
    from .text import ContextSet


@dataclass(frozen=True)
class ForwardBlock:
    """The loss tokens of a few contexts, read by a forward each time they are asked for."""

    model: LanguageModel
    contexts: ContextSet
    index: np.ndarray
    """`[m]`, which contexts."""
    site: Site
    n: int
    """Their loss tokens."""

    def checked(self) -> Tensor:
        """The rows `[n, D]`, float32, on the CPU. Raises UserError for NaN and infinities, naming the context."""
        attended, mask = self.contexts.attention_mask[self.index], self.contexts.loss_mask[self.index]
        # Up to the last token that is not padding in all of them.
        cut = slice(int(np.flatnonzero(attended.any(0))[-1]) + 1)
        hidden = self.model.read(self.contexts.input_ids[self.index][:, cut], attended[:, cut], [self.site])[self.site]
        loss_mask = torch.from_numpy(np.ascontiguousarray(mask[:, cut]))
        x = hidden[loss_mask.to(hidden.device)].cpu()
        broken = broken_rows(x)
        if len(broken):
            context = np.repeat(self.index, mask.sum(1))[int(broken[0])]
            raise UserError(
                f"activations: got NaN or infinity in context {context} ({self.model.described(self.site)}), needs "
                "numbers"
            )
        return x


def forward_blocks(
    model: LanguageModel, contexts: ContextSet, site: Site | None = None, *, contexts_per_forward: int = 8
) -> list[ForwardBlock]:
    """The contexts in blocks of one forward each, those of one length together, so that padding costs little.

    `site` is the residual stream after `model.layer` where it is not given. Raises UserError where the model has no
    such site, or there is no context.
    """
    if contexts_per_forward < 1:
        raise UserError(f"model.batch_size: got {contexts_per_forward}, needs 1 or more")
    if not len(contexts):
        raise UserError("contexts: got none, needs at least one")
    site = Site(model.layer) if site is None else site
    model.check_sites([site])
    by_length = np.argsort(-contexts.attention_mask.sum(1), kind="stable")
    parts = np.array_split(by_length, range(contexts_per_forward, len(by_length), contexts_per_forward))
    return [ForwardBlock(model, contexts, part, site, int(contexts.loss_mask[part].sum())) for part in parts]


def stream_activations(
    model: LanguageModel,
    contexts: ContextSet,
    batch_size: int,
    *,
    site: Site | None = None,
    contexts_per_forward: int = 8,
    buffer_rows: int = 1 << 16,
    seed: int = 0,
) -> MixedBatches:
    """Batches of activations for `aksae.fit` without end, straight from the model through a mixing buffer.

    The buffer is filled again, by forwards on a thread, when half of it is spent; see `MixedBatches`, whose rules hold:
    each epoch reads every loss token once, in a new order, and a run that is resumed goes on with the very batches that
    would have followed, running the model only for contexts that still have rows in the buffer. Exact to the bit where
    a forward is.

    Args:
        model: the language model.
        contexts: what it reads; only tokens of the loss mask become rows.
        batch_size: rows of a batch.
        site: where it is read; None for the residual stream after `model.layer`.
        contexts_per_forward: contexts that are read together.
        buffer_rows: rows that are mixed.
        seed: of the orders.

    Raises UserError for a setting out of range and, on reading, for NaN and infinities, naming the context.
    """
    blocks = forward_blocks(model, contexts, site, contexts_per_forward=contexts_per_forward)
    return MixedBatches(blocks, batch_size, buffer_rows=buffer_rows, seed=seed)
