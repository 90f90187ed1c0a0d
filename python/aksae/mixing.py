"""Batches without end from blocks of rows, mixed by the order of the blocks and by a buffer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .batches import Batch
from .distributed import rank, world_size
from .errors import UserError
from .prefetch import prefetched

_READ_AHEAD = 8


class Block(Protocol):
    """Rows that are read together."""

    @property
    def n(self) -> int:
        """How many."""

    def checked(self) -> Tensor:
        """The rows `[n, D]`, the same each time. Raises UserError for one that is NaN or infinite."""


class MixedBatches:
    """Batches of rows without end, for `aksae.fit`: each epoch every row once, epochs joined without a gap.

    An epoch reads the blocks in a new order into a buffer, which is filled again when half of it is spent; batches are
    random rows of the buffer. A thread reads ahead. The same arguments give the same batches; `state_dict` counts the
    batches that were taken, not those read ahead, and after `load_state_dict` the very batches go on that would have
    followed: blocks are read again only as far as they still have rows in the buffer.

    Under `torchrun` each process takes blocks of its own, and all batches have one size.

    Args:
        blocks: the rows.
        batch_size: rows of a batch.
        buffer_rows: rows that are mixed; at least twice the largest block is taken.
        seed: of the orders.

    Raises:
        UserError: there are fewer blocks than processes, `batch_size` or `seed` is out of range, or what a block raises
            on reading.
    """

    def __init__(self, blocks: Sequence[Block], batch_size: int, *, buffer_rows: int, seed: int = 0):
        if batch_size < 1:
            raise UserError(f"batch_size: got {batch_size}, needs 1 or more")
        if seed < 0:
            raise UserError(f"seed: got {seed}, needs a number from 0 up")
        self.blocks = [block for block in blocks if block.n]
        self.batch_size, self.seed, self.taken = batch_size, seed, 0
        largest = max((block.n for block in self.blocks), default=0)
        self.buffer_rows = max(buffer_rows, 2 * largest)

    def __iter__(self) -> Iterator[Batch]:
        for x in prefetched(self._batches(self.taken), _READ_AHEAD):
            self.taken += 1
            yield Batch(x)

    def state_dict(self) -> dict[str, int]:
        return {"taken": self.taken, **self._settings()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state_dict` was asked for. Raises UserError for other rows, batches or seeds than were then."""
        for name, value in self._settings().items():
            if state.get(name) != value:
                raise UserError(f"{name}: got {value}, needs {state.get(name)}, as in the run that goes on")
        self.taken = state["taken"]

    def _settings(self) -> dict[str, int]:
        rows = sum(block.n for block in self.blocks)
        return {
            "rows": rows,
            "blocks": len(self.blocks),
            "batch_size": self.batch_size,
            "buffer_rows": self.buffer_rows,
            "seed": self.seed,
            "processes": world_size(),
        }

    def _batches(self, taken: int) -> Iterator[Tensor]:
        own = self._own()
        epoch, skip = divmod(taken * self.batch_size, sum(block.n for block in own))
        parts: list[Tensor] = []
        missing = self.batch_size
        while True:
            buffer = _Buffer(own, self.buffer_rows, self._random(1 + epoch))
            buffer.skip(skip)
            while len(part := buffer.take(missing)):
                parts.append(part)
                missing -= len(part)
                if not missing:
                    yield torch.cat(parts)
                    parts, missing = [], self.batch_size
            epoch, skip = epoch + 1, 0

    def _own(self) -> list[Block]:
        """The blocks of this process."""
        if len(self.blocks) < world_size():
            raise UserError(
                f"activations: got {len(self.blocks)} blocks of rows for {world_size()} processes, needs at least one "
                "for each"
            )
        order = np.random.default_rng([self.seed, 0]).permutation(len(self.blocks))
        return [self.blocks[i] for i in order[rank() :: world_size()]]

    def _random(self, epoch: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, epoch, rank()])


class _Buffer:
    """The rows of one epoch as they come out of the buffer.

    Which rows stand where is known without a row being read, so what was taken before a run was cut off is skipped over
    in numbers alone.
    """

    def __init__(self, blocks: Sequence[Block], size: int, random: np.random.Generator):
        self.blocks, self.random = blocks, random
        size = min(size, sum(block.n for block in blocks))
        self.coming = iter(random.permutation(len(blocks)).tolist())
        self.next_block = next(self.coming, None)
        self.half = size // 2
        self.free = np.arange(size)
        self.live = np.empty(0, np.int64)
        """The slots of rows that are still to come out, in their order."""
        self.block = np.empty(size, np.int64)
        self.row = np.empty(size, np.int64)
        """Which row of which block a slot holds."""
        self.reading = False
        """Whether the rows themselves are wanted, too."""
        self.rows: Tensor | None = None
        """`[size, D]`, what the slots hold."""

    def skip(self, n: int) -> None:
        """Leave out the next `n` rows, before any is taken."""
        while n > 0:
            n -= len(self._next(n))

    def take(self, n: int) -> Tensor:
        """The next rows, `n` at most, `[m, D]`; none at the end of the epoch."""
        if not self.reading:
            self.reading = True
            for number in np.unique(self.block[self.live]):
                slots = self.live[self.block[self.live] == number]
                self._write(slots, self.blocks[number].checked()[torch.from_numpy(self.row[slots])])
        slots = torch.from_numpy(self._next(n))
        return torch.empty(0) if self.rows is None else self.rows.index_select(0, slots)

    def _next(self, n: int) -> np.ndarray:
        if len(self.live) <= self.half and self.next_block is not None:
            self._fill()
        # Up to where it is filled again, and to the end where nothing is left to fill it with.
        most = len(self.live) - (self.half if self.next_block is not None else 0)
        slots, self.live = np.split(self.live, [min(n, most)])
        self.free = np.concatenate([self.free, slots])
        return slots

    def _fill(self) -> None:
        filled = [self.live]
        while self.next_block is not None and (n := self.blocks[self.next_block].n) <= len(self.free):
            slots, self.free = np.split(self.free, [n])
            self.block[slots], self.row[slots] = self.next_block, np.arange(n)
            if self.reading:
                self._write(slots, self.blocks[self.next_block].checked())
            filled.append(slots)
            self.next_block = next(self.coming, None)
        self.live = self.random.permutation(np.concatenate(filled))

    def _write(self, slots: np.ndarray, x: Tensor) -> None:
        if self.rows is None:
            self.rows = x.new_empty(len(self.block), x.shape[1])
        self.rows.index_copy_(0, torch.from_numpy(slots), x)
