"""Activations on disk: any number of files as one table of rows, in any order or shuffled for training."""

from __future__ import annotations

import hashlib
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import user_path
from .errors import UserError
from .files import dtype_name
from .identity import digest_of_json
from .mixing import MixedBatches
from .shards import Shard, blocks_of, files_of, shards_of
from .store import is_store, store_shards

_BLOCK_ROWS = 4096
_BUFFER_BYTES = 256 << 20
_SAMPLED_BYTES = 1 << 16


class Activations:
    """Rows of activations, `[N, D]`, of one dtype; see `open_activations`.

    Attributes:
        path: what was opened.
        d_in: width D.
        dtype: that of the files.
        info: what a folder of `aksae collect` says of itself (`manifest.json`); empty for other files.
    """

    def __init__(self, path: Path, shards: list[Shard], info: dict[str, Any]):
        self.path, self.shards, self.info = path, [shard for shard in shards if shard.n], info
        if not self.shards:
            raise UserError(f"{path}: got no rows, needs at least one")
        first = self.shards[0]
        self.d_in, self.dtype = first.d_in, first.dtype
        for shard in self.shards:
            for what, of_shard, of_first in (
                ("rows of width", shard.d_in, first.d_in),
                ("numbers in", dtype_name(shard.dtype), dtype_name(first.dtype)),
                ("rows with", _names(shard), _names(first)),
            ):
                if of_shard != of_first:
                    raise UserError(f"{shard.path}: got {what} {of_shard}, needs {of_first}, as in {first.path}")
        self._ends = list(accumulate(shard.n for shard in self.shards))

    def __len__(self) -> int:
        return self._ends[-1]

    def rows(self, index: Tensor) -> Tensor:
        """A fresh `[n, D]` float32 tensor of the rows `index [n]` (integer, CPU), read from disk or the page cache.

        Safe from several threads, and leaves the interpreter free while it copies.

        Raises:
            IndexError: an index is negative or past the end.
        """
        if len(self.shards) == 1:
            return self.shards[0].read().index_select(0, index).float()
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(self):
            raise IndexError(f"index out of range: got {int(index.min())} to {int(index.max())} of {len(self)} rows")
        of_shard = torch.bucketize(index, torch.tensor(self._ends), right=True)
        found = torch.empty(len(index), self.d_in)
        for number in of_shard.unique().tolist():
            shard, here = self.shards[number], (of_shard == number).nonzero().squeeze(1)
            local = index[here] - (self._ends[number] - shard.n)
            found.index_copy_(0, here, shard.read().index_select(0, local).float())
        return found

    @cached_property
    def context(self) -> Tensor | None:
        """`[N]` int64, the context of each row; None where the files do not say."""
        return self._numbers("contexts")

    @cached_property
    def tokens(self) -> Tensor | None:
        """`[N]` int64, the token of each row; None where the files do not say."""
        return self._numbers("tokens")

    def last_rows(self) -> Tensor:
        """`[N_contexts]` int64, the last row of each context, where contexts are numbered from 0 in ascending order.

        Raises UserError where the files name no contexts.
        """
        if self.context is None:
            raise UserError(f"{self.path}: got no contexts, needs the context of each row")
        return self.context.bincount().cumsum(0) - 1

    def part(self, start: int, stop: int) -> Activations:
        """The rows from `start` to before `stop`."""
        parts = []
        for shard, end in zip(self.shards, self._ends):
            begin = end - shard.n
            low, high = max(start, begin) - begin, min(stop, end) - begin
            if low < high:
                parts.append(shard.slice(low, high))
        return Activations(self.path, parts, self.info)

    def split(self, heldout_fraction: float) -> tuple[Activations, Activations]:
        """Rows to train on, and the last ones, which are held out.

        A folder of `aksae collect` says which rows are those of held-out documents. Of other files the last
        `heldout_fraction` is held out, and no context is on both sides where the files name them.

        Raises UserError where either side would be empty.
        """
        heldout = self.info.get("heldout_rows")
        cut = len(self) - (round(len(self) * heldout_fraction) if heldout is None else heldout)
        if heldout is None and self.context is not None and 0 < cut < len(self):
            others = (self.context[:cut] != self.context[cut]).nonzero()
            cut = int(others[-1]) + 1 if len(others) else 0
        if not 0 < cut < len(self):
            raise UserError(
                f"{self.path}: got {len(self)} rows, of which {len(self) - cut} would be held out "
                f"(heldout_fraction {heldout_fraction}), needs some to train on and some to hold out"
            )
        return self.part(0, cut), self.part(cut, len(self))

    def batches(self, batch_size: int, *, seed: int = 0, buffer_rows: int | None = None) -> MixedBatches:
        """Batches for `aksae.fit`, without end and in the dtype of the files, each epoch in a new order.

        Args:
            batch_size: rows of a batch.
            seed: of the order.
            buffer_rows: rows that are mixed, held in memory; None for those of 256 MB. With all rows of the files an
                epoch is a permutation of them. A row group of Parquet is read as a whole, and two fit into the buffer.

        Raises UserError as `MixedBatches` does: while it is read, for NaN and infinities, naming the file and the row.
        """
        if buffer_rows is None:
            buffer_rows = max(1, _BUFFER_BYTES // (self.d_in * self.dtype.itemsize))
        # Small files, too, are to have blocks for many processes.
        size = min(_BLOCK_ROWS, max(1, len(self) // 64))
        return MixedBatches(list(blocks_of(self.shards, size)), batch_size, buffer_rows=buffer_rows, seed=seed)

    def identity(self) -> str:
        """A digest that tells these activations from others: of a folder of `aksae collect` by its manifest, of other
        files by their sizes and the first and last 64 KiB of each. Where they lie does not enter."""
        if "shards" in self.info:
            return digest_of_json([self.info["key"], [shard["sha256"] for shard in self.info["shards"]]])
        digest = hashlib.sha256(repr((self.d_in, str(self.dtype), self._ends)).encode())
        for path in dict.fromkeys(shard.path for shard in self.shards):
            with open(path, "rb") as file:
                size = path.stat().st_size
                digest.update(repr(size).encode() + file.read(_SAMPLED_BYTES))
                file.seek(max(0, size - _SAMPLED_BYTES))
                digest.update(file.read())
        return digest.hexdigest()

    def _numbers(self, name: str) -> Tensor | None:
        if name not in self.shards[0].numbers:
            return None
        return torch.cat([shard.numbers[name]() for shard in self.shards])


def open_activations(path: str | Path) -> Activations:
    """Open activations for training, without reading them.

    `path` is a folder that `aksae collect` wrote, or a file or a folder of files (of one type, in the order of their
    names, hidden ones left out) of

    - `.safetensors`, `.pt`, `.pth` (`torch.save`, opened with `weights_only=True`): a tensor `x` or `activations`, or
      the only floating matrix, `[N, D]`; beside it, if you like, `tokens` and `contexts`, `[N]` integers;
    - `.npy`: `[N, D]`; beside `NAME.npy`, if you like, `NAME.tokens.npy` and `NAME.contexts.npy`;
    - `.parquet`: a column of lists of D floats, of fixed size or not, `x` or `activations` or the only one; `tokens`
      and `contexts` are columns. It is read by row groups, so that some 10,000 rows are a good size of one.

    Numbers are float16, bfloat16, float32 or float64, the same in all files. All but Parquet is memory-mapped.

    Raises:
        UserError: there are none, a file is truncated or of another kind, or files differ in width, dtype or names. The
            message names the file, the tensor, and what is needed. Nothing is ever changed or deleted.
    """
    path = user_path(path, "activations")
    if not path.exists():
        raise UserError(f"activations: got {path}, which does not exist, needs a file or folder of activations")
    if path.is_dir() and is_store(path):
        shards, info = store_shards(path)
        return Activations(path, shards, info)
    files = files_of(path) if path.is_dir() else [path]
    return Activations(path, [shard for file in files for shard in shards_of(file)], {})


def _names(shard: Shard) -> str:
    return " and ".join(sorted(shard.numbers)) or "neither tokens nor contexts"
