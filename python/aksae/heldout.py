"""Held-out rows, and what is known of where they come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .mixing import Block
from .text import ContextSet

Unit = Literal["documents", "contexts", "rows"]


@dataclass(frozen=True)
class HeldOut:
    """Held-out rows in blocks, with the document, or the context, of each where that is known."""

    blocks: Sequence[Block]
    unit: Unit = "rows"
    """Of what the rows are parts that do not depend on each other."""
    unit_of_row: Tensor | None = None
    """`[N]` int64, by number; None where each row is a unit of its own."""
    text: HeldOutText | None = None

    @classmethod
    def of_text(cls, blocks: Sequence[Block], contexts: ContextSet, order: np.ndarray, tokenizer: Any) -> HeldOut:
        """Rows that are the loss tokens of `contexts`, taken in the `order [n]` of their numbers."""
        lengths = contexts.loss_mask[order].sum(1)
        documents = torch.from_numpy(np.repeat(contexts.document[order], lengths)).long()
        of_row = torch.from_numpy(np.repeat(order, lengths)).long()
        tokens = torch.from_numpy(contexts.input_ids[order][contexts.loss_mask[order]]).long()
        return cls(blocks, "documents", documents, HeldOutText(of_row, tokens, tokenizer))

    def __len__(self) -> int:
        return sum(block.n for block in self.blocks)

    def first_rows(self, n: int) -> Tensor:
        """The first `n` rows, or all that there are, `[n, D]`, in the dtype that they have."""
        taken, left = [], n
        for block in self.blocks:
            if left <= 0:
                break
            taken.append(block.checked()[:left])
            left -= len(taken[-1])
        return torch.cat(taken)

    def units(self, n: int) -> Tensor:
        """The unit of each of the first `n` rows: `[n]` int64, numbered from 0 without a gap."""
        if self.unit_of_row is None:
            return torch.arange(n)
        return self.unit_of_row[:n].unique(return_inverse=True)[1]


@dataclass(frozen=True)
class HeldOutText:
    """The tokens that rows are the activations of."""

    contexts: Tensor
    """`[N]` int64, the context of each row; a context's rows stand together, in the order of its tokens."""
    tokens: Tensor
    """`[N]` int64."""
    tokenizer: Any

    def first(self, n: int) -> HeldOutText:
        """That of the first `n` rows."""
        return HeldOutText(self.contexts[:n], self.tokens[:n], self.tokenizer)

    def decoded(self, rows: Tensor) -> list[str]:
        """The tokens of `rows [n]`, each by itself."""
        return [self.tokenizer.decode([token]) for token in self.tokens[rows].tolist()]

    def rows_of(self, context: int) -> Tensor:
        """`[n]`, the rows of a context."""
        return (self.contexts == context).nonzero().flatten()
