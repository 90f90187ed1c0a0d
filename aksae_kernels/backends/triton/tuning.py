"""Launch configurations: a heuristic that needs no GPU, and in its place what was measured to be better on one.

Nothing here depends on k or on the number of stored entries, so neither compiles a kernel anew. The number of latents
and the width of the activations decide among a few powers of two, and so does the number of rows of a batch, in weight
gradients alone, which gather these rows: there are three widths of a slice.

`tuned.json` beside this file holds, by name of the device and then by the heuristic's choice, what replaces it there;
`python -m benchmarks.tune` measures and writes it. A device it does not name runs on the heuristics.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import triton

TUNED = Path(__file__).with_name("tuned.json")

ENTRIES = 128
"""Stored entries of a row that one program takes, where a row is shared among programs."""

# The part of a second-level cache that gathered rows may fill: 40 MB on an A100, 50 on H100 and H200.
_CACHED_BYTES = 32 << 20
# A slab of scores of that size is filtered before it leaves that cache.
_SLAB_CACHED_BYTES = 32 << 20
_SLAB_LATENTS = 1024
_SLAB_ROWS = 1024
_DEFAULT_SLAB_MB = 128
_LEAST_PIECE = 1024


class Config(NamedTuple):
    """Block sizes of a kernel, by the names of its constants, and the warps of a program."""

    family: str
    blocks: tuple[tuple[str, int], ...]
    num_warps: int = 4

    @property
    def meta(self) -> dict[str, int]:
        # One stage: the programs hide latency from each other, and loads may not pass the stores before them.
        return {**dict(self.blocks), "num_warps": self.num_warps, "num_stages": 1}

    @property
    def key(self) -> str:
        """How `tuned.json` names it."""
        return " ".join([self.family, *(f"{name}={size}" for name, size in self.blocks)])

    def __getitem__(self, name: str) -> int:
        return dict(self.blocks)[name]


def select(n_latents: int) -> Config:
    """Groups of which there are some 500 or more: a k of half as many is bounded well, whatever the row. With groups of
    sqrt(2 F / k) latents, the maxima and what is read again would be equally many."""
    return _config("select", GROUP=16 if n_latents <= 1 << 14 else 32 if n_latents <= 1 << 17 else 64, BLOCK=1024)


def scan() -> Config:
    """A program that goes through one row in order, a block at a time."""
    return _config("scan", BLOCK=512)


def histogram() -> Config:
    """Large blocks: each is a histogram of 2048 bins to clear and to add."""
    return _config("histogram", BLOCK=4096)


def rounding() -> Config:
    """Rows of a matrix that is read once and written once."""
    return _config("rounding", ROWS=16, BLOCK=128)


def exact(n_latents: int) -> Config:
    """The fp32 product of rows that the screen could not judge, and the selection from their scores."""
    select_blocks = dict(select(n_latents).blocks)
    return _config("exact", ROWS=16, BLOCK_N=64, BLOCK_D=32, **select_blocks)


def gather(n_rows: int, d_in: int, element_size: int) -> Config:
    """Slices of a gathered `[n_rows, d_in]` matrix that stay in the second-level cache, 128 columns at least."""
    block_d = _gathered_slice(n_rows, d_in, element_size)
    return _config("gather", BLOCK_K=max(4, 4096 // block_d), BLOCK_D=block_d)


def slice_width(n_rows: int, d_in: int, element_size: int, block_d: int) -> int:
    """Columns of a gathered matrix that stay in that cache, where one program takes them all: a multiple of `block_d`,
    or all there are where not even 128 would stay."""
    columns = _cached_columns(n_rows, element_size)
    return max(1, d_in) if columns < 128 else max(1, columns // block_d) * block_d


def weight_grad(n_rows: int, d_in: int, element_size: int) -> Config:
    """As `gather`, with blocks for latents that have few entries."""
    return _config("weight_grad", BLOCK_K=8, BLOCK_D=min(512, _gathered_slice(n_rows, d_in, element_size)))


def piece(n_slots: int) -> int:
    """Entries of a latent that one program of a weight gradient takes: 1024, or so many more that the sums of pieces
    take the memory of 4096 rows at most."""
    return max(_LEAST_PIECE, triton.next_power_of_2(triton.cdiv(n_slots, 2048)))


def optimizer(n_columns: int) -> Config:
    """A row in one block where it is not wide."""
    return _config("optimizer", BLOCK=min(2048, max(128, triton.next_power_of_2(n_columns))))


def price(n_columns: int) -> Config:
    """A row in one block, whatever its width. Few warps, each with many columns: at every candidate they wait for each
    other. More than 16 would be more threads than AMD's GPUs take, whose warps have 64."""
    block = max(32, triton.next_power_of_2(n_columns))
    return _config("price", num_warps=min(16, max(1, block // 1024)), BLOCK_D=block)


class Slab(NamedTuple):
    """How many rows an encode takes at a time, and the scores of how many latents."""

    rows: int
    latents: int


def slab(n_rows: int, n_latents: int, rounded_width: int, capacity: int) -> Slab:
    """A slab that stays in cache: 1024 rows, which is enough to multiply at full speed, and as many latents as fit.

    Where operands are rounded to bf16 first (`rounded_width` numbers a row), as many rows as `slab_bytes` allows, and
    fewer latents: W is rounded again for each part of the rows.

    A row needs its list of `capacity` candidates (two or three int32) and its rounded copy, a latent the latter; a
    score four bytes, and one for the maxima and numbers of groups. One row and 1024 latents are taken even where they
    do not fit. Parts of the rows are equal, and begin at multiples of 16, as kernels of aligned data want them.
    """
    per_row = (12 if rounded_width else 8) * capacity + 2 * rounded_width
    per_latent = 2 * rounded_width
    budget, least = slab_bytes(), min(n_latents, _SLAB_LATENTS)
    fitting = max(1, (budget - per_latent * least) // max(1, per_row + 5 * least))
    rows = fitting if rounded_width else min(fitting, _SLAB_ROWS)
    n_parts = -(-n_rows // rows)
    rows = min(max(1, fitting // 16 * 16), -(-n_rows // max(1, 16 * n_parts)) * 16)
    most = min(_SLAB_CACHED_BYTES // (4 * max(1, rows)), (budget - per_row * rows) // max(1, 5 * rows + per_latent))
    return Slab(max(1, rows), max(1, min(n_latents, max(_SLAB_LATENTS, most // _SLAB_LATENTS * _SLAB_LATENTS))))


def slab_bytes() -> int:
    """Memory that an encode may use beyond its arguments and its result: AKSAE_SLAB_MB, 128 by default."""
    text = os.environ.get("AKSAE_SLAB_MB") or str(_DEFAULT_SLAB_MB)
    if not text.isdecimal() or not int(text):
        raise ValueError(f"AKSAE_SLAB_MB must be a positive whole number of megabytes, got {text!r}")
    return int(text) << 20


def _gathered_slice(n_rows: int, d_in: int, element_size: int) -> int:
    columns = min(_cached_columns(n_rows, element_size), 1024)
    block_d = max(128, 1 << max(0, columns.bit_length() - 1))
    # No wider than the matrix; and 768 columns as 3 x 256, not as 512 and a slice that is half empty.
    while block_d > 128 and -(-d_in // block_d) * block_d - d_in >= block_d // 4:
        block_d //= 2
    return block_d


def _cached_columns(n_rows: int, element_size: int) -> int:
    return _CACHED_BYTES // (max(1, n_rows) * element_size)


def _config(family: str, num_warps: int = 4, **blocks: int) -> Config:
    config = Config(family, tuple(blocks.items()), num_warps)
    return _replacements().get(config.key, config)


# What `trying` puts in the place of the table while it measures.
_trial: Mapping[str, Config] | None = None


@contextlib.contextmanager
def trying(replacements: Mapping[str, Config]) -> Iterator[None]:
    """Within it, these replace the heuristics, by `Config.key`, and the table is not asked."""
    global _trial
    outer, _trial = _trial, replacements
    try:
        yield
    finally:
        _trial = outer


def _replacements() -> Mapping[str, Config]:
    if _trial is not None:
        return _trial
    return _tuned(torch.cuda.current_device()) if torch.cuda.is_available() else {}


@functools.cache
def _tuned(device: int) -> Mapping[str, Config]:
    table = json.loads(TUNED.read_text()).get(torch.cuda.get_device_name(device), {}) if TUNED.exists() else {}
    return {
        key: Config(key.split()[0], tuple(entry["blocks"].items()), entry["num_warps"]) for key, entry in table.items()
    }
