"""Files of activations, whatever wrote them: each a shard of rows, memory-mapped where its format allows."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .batches import broken_rows
from .errors import UserError
from .files import dtype_name, map_pickle, read_tensors

ROWS = ("x", "activations")
"""Names that activations go by in a file of several tensors or columns; the only floating `[N, D]` needs no name."""
NUMBERS = ("tokens", "contexts")
"""Names of what may stand beside them: `[N]` integers, the token and the context of each row."""
SUFFIXES = (".safetensors", ".npy", ".pt", ".pth", ".parquet")


@dataclass(frozen=True)
class Shard:
    """`n` rows of one file."""

    path: Path
    first: int
    """The number of the first row in the file."""
    n: int
    d_in: int
    dtype: torch.dtype
    read: Callable[[], Tensor]
    """`[n, D]`: a map of the file or, of Parquet, a copy."""
    numbers: dict[str, Callable[[], Tensor]]
    """`[n]` int64 each, by the names in `NUMBERS`."""
    divisible: bool = True
    """Whether some of the rows can be read without the others."""

    def slice(self, start: int, stop: int) -> Shard:
        """The rows from `start` to before `stop`."""
        if (start, stop) == (0, self.n):
            return self
        numbers = {name: lambda read=read: read()[start:stop] for name, read in self.numbers.items()}
        return Shard(
            self.path,
            self.first + start,
            stop - start,
            self.d_in,
            self.dtype,
            lambda: self.read()[start:stop],
            numbers,
            self.divisible,
        )

    def checked(self) -> Tensor:
        """The rows `[n, D]`. Raises UserError for one that is NaN or infinite, naming the file and the row."""
        x = self.read()
        broken = broken_rows(x)
        if len(broken):
            row = int(broken[0])
            wrong = x[row][~x[row].isfinite()][0].item()
            raise UserError(f"{self.path}: row {self.first + row}: got {wrong}, needs finite numbers")
        return x


def shards_of(path: Path) -> list[Shard]:
    """The shards of one file of activations, one for each row group of Parquet.

    Raises UserError naming the file, the tensor or column, what it got and what it needs.
    """
    if not path.is_file():
        raise UserError(f"{path}: got no such file, needs one of activations")
    if path.suffix == ".parquet":
        return _parquet(path)
    if path.suffix == ".npy":
        beside = {name: path.with_suffix(f".{name}.npy") for name in NUMBERS}
        tensors = {"x": _npy(path)} | {name: _npy(file) for name, file in beside.items() if file.is_file()}
    elif path.suffix == ".safetensors":
        tensors = read_tensors(path)
    elif path.suffix in (".pt", ".pth"):
        tensors = _named(path, map_pickle(path))
    else:
        raise UserError(f"{path}: got a file of the type {path.suffix or 'none'}, needs {', '.join(SUFFIXES)}")
    return [_mapped(path, tensors)]


def files_of(folder: Path) -> list[Path]:
    """The files of activations in a folder, hidden ones left out: all of one type, by name, `2` before `10`.

    Raises UserError for a folder without one, or with several types.
    """
    found = sorted((path for path in folder.iterdir() if _holds_rows(path)), key=_natural)
    kinds = sorted({path.suffix for path in found})
    if len(kinds) > 1:
        raise UserError(f"{folder}: got files of the types {' and '.join(kinds)}, needs those of one type")
    if not found:
        inside = sorted(
            path.name for path in folder.iterdir() if path.is_dir() and any(map(_holds_rows, path.iterdir()))
        )
        hint = f", or one of the folders in it: {', '.join(inside)}" if inside else ""
        raise UserError(f"{folder}: got no file of activations, needs {', '.join(SUFFIXES)}{hint}")
    return found


def _holds_rows(path: Path) -> bool:
    companion = path.suffix == ".npy" and Path(path.stem).suffix.removeprefix(".") in NUMBERS
    return path.is_file() and path.suffix in SUFFIXES and not path.name.startswith(".") and not companion


def _natural(path: Path) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def _mapped(path: Path, tensors: dict[str, Tensor]) -> Shard:
    name = _rows_name(path, {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()})
    x = tensors[name]
    _check_rows(f"{path}: tensor {name}", x.dtype, tuple(x.shape))
    numbers: dict[str, Callable[[], Tensor]] = {}
    for key in NUMBERS:
        if key in tensors:
            of_rows = tensors[key]
            whole = not of_rows.is_floating_point() and of_rows.dtype not in (torch.bool, torch.complex64)
            if not whole or tuple(of_rows.shape) != (len(x),):
                raise UserError(
                    f"{path}: tensor {key}: got {of_rows.dtype} {list(of_rows.shape)}, needs integers [{len(x)}]"
                )
            numbers[key] = lambda of_rows=of_rows: of_rows.long()
    return Shard(path, 0, len(x), x.shape[1], x.dtype, lambda: x, numbers)


def _rows_name(path: Path, tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> str:
    """Which of the tensors holds the activations."""
    for name in ROWS:
        if name in tensors:
            return name
    likely = [name for name, (dtype, shape) in tensors.items() if dtype.is_floating_point and len(shape) == 2]
    if len(likely) == 1:
        return likely[0]
    if len(tensors) == 1:
        # Whatever it is: the check of its shape says what is wrong with it.
        return next(iter(tensors))
    found = [f"{name} {dtype_name(dtype)} {list(shape)}" for name, (dtype, shape) in tensors.items()]
    raise UserError(f"{path}: got the tensors {', '.join(found) or 'none'}, needs one named {' or '.join(ROWS)}")


def _check_rows(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    floating = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    if len(shape) != 2 or shape[1] < 1 or dtype not in floating:
        got = f"{dtype_name(dtype)} {list(shape)}"
        raise UserError(f"{name}: got {got}, needs float16, bfloat16, float32 or float64 [N, D]")


def _named(path: Path, value: Any) -> dict[str, Tensor]:
    if isinstance(value, Tensor):
        return {"x": value}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: item for key, item in value.items() if isinstance(item, Tensor)}
    raise UserError(f"{path}: got {type(value).__name__}, needs a tensor, or tensors by name")


def _npy(path: Path) -> Tensor:
    try:
        # Copy-on-write, because torch warns about read-only memory; nothing writes to it.
        array = np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        size = path.stat().st_size
        raise UserError(
            f"{path}: got {size} bytes that NumPy cannot read ({error}), needs a whole .npy file of numbers"
        ) from error
    try:
        return torch.from_numpy(array)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{path}: got {array.dtype} {list(array.shape)}, needs float16, float32 or float64 [N, D] in this "
            "machine's byte order"
        ) from error


def _parquet(path: Path) -> list[Shard]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path, memory_map=True)
        schema = file.schema_arrow
        groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{path}: got {path.stat().st_size} bytes that are no whole Parquet file ({error}), needs one"
        ) from error
    column = _column(path, schema)
    kind = schema.field(column).type
    numbers = [name for name in NUMBERS if name in schema.names]
    for name in numbers:
        if not pyarrow.types.is_integer(schema.field(name).type):
            raise UserError(f"{path}: column {name}: got {schema.field(name).type}, needs integers")
    reader = _RowGroups(path, file, column)
    if pyarrow.types.is_fixed_size_list(kind):
        reader.d_in = kind.list_size
    elif sum(groups):
        # Lists of any length: the first row says which, and all others are held against it.
        batch = next(file.iter_batches(1, columns=[column]))
        reader.d_in = len(batch.column(0)[0] or ())
    dtype = {2: torch.float16, 4: torch.float32, 8: torch.float64}[kind.value_type.bit_width // 8]
    _check_rows(f"{path}: column {column}", dtype, (sum(groups), reader.d_in))
    shards, first = [], 0
    for group, n in enumerate(groups):
        of_rows = {name: lambda group=group, name=name: reader.numbers(group, name) for name in numbers}
        read = lambda group=group, first=first: reader.rows(group, first)
        shards.append(Shard(path, first, n, reader.d_in, dtype, read, of_rows, divisible=False))
        first += n
    return shards


def _column(path: Path, schema: Any) -> str:
    import pyarrow

    def holds_rows(kind: Any) -> bool:
        of_lists = (pyarrow.types.is_list, pyarrow.types.is_large_list, pyarrow.types.is_fixed_size_list)
        return any(test(kind) for test in of_lists) and pyarrow.types.is_floating(kind.value_type)

    likely = [field.name for field in schema if holds_rows(field.type)]
    name = next((name for name in ROWS if name in schema.names), likely[0] if len(likely) == 1 else None)
    if name is None:
        listed = ", ".join(f"{field.name} {field.type}" for field in schema) or "none"
        raise UserError(f"{path}: got the columns {listed}, needs one of lists of floats named {' or '.join(ROWS)}")
    if name not in likely:
        raise UserError(f"{path}: column {name}: got {schema.field(name).type}, needs lists of floats")
    return name


class _RowGroups:
    """The row groups of a Parquet file, decoded when they are asked for."""

    def __init__(self, path: Path, file: Any, column: str):
        self.path, self.file, self.column, self.d_in = path, file, column, 0
        # A thread that reads ahead and whoever else reads take turns.
        self._alone = threading.Lock()
        # Whoever reads some rows of a group reads others of it next.
        self._decoded = lru_cache(maxsize=1)(self._decode)

    def rows(self, group: int, first: int) -> Tensor:
        return self._decoded(group, first)

    def _decode(self, group: int, first: int) -> Tensor:
        import pyarrow.compute

        lists = self._read(group, self.column)
        lengths = pyarrow.compute.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False)
        odd = np.flatnonzero(lengths != self.d_in)
        if len(odd):
            raise UserError(
                f"{self.path}: column {self.column}, row {first + odd[0]}: got {lengths[odd[0]]} numbers, needs "
                f"{self.d_in}"
            )
        flat = lists.flatten()
        if flat.null_count:
            row = int(np.flatnonzero(flat.is_null().to_numpy(zero_copy_only=False))[0]) // self.d_in
            raise UserError(f"{self.path}: column {self.column}, row {first + row}: got null, needs numbers")
        # A copy, since Arrow's memory may not be written to.
        return torch.from_numpy(flat.to_numpy().reshape(-1, self.d_in).copy())

    def numbers(self, group: int, name: str) -> Tensor:
        column = self._read(group, name)
        if column.null_count:
            raise UserError(f"{self.path}: column {name}: got null, needs integers")
        return torch.from_numpy(column.to_numpy().astype(np.int64))

    def _read(self, group: int, column: str) -> Any:
        import pyarrow

        try:
            with self._alone:
                chunks = self.file.read_row_group(group, columns=[column]).column(0)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(
                f"{self.path}: column {column}, row group {group}: got bytes that Parquet cannot read ({error}), "
                "needs a whole file"
            ) from error
        combined = chunks.combine_chunks()
        # Some releases give a chunked array of one chunk.
        return combined.chunk(0) if isinstance(combined, pyarrow.ChunkedArray) else combined


def blocks_of(shards: list[Shard], size: int) -> Iterator[Shard]:
    """The shards in pieces of at most `size` rows, where a shard can be read in pieces."""
    for shard in shards:
        step = size if shard.divisible else max(shard.n, 1)
        for start in range(0, shard.n, step):
            yield shard.slice(start, min(start + step, shard.n))
