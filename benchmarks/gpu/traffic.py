"""What the ops must compute and move at the very least, and how long that takes at measured rates.

`item` is the size of an element in bytes, `nnz` the sum of the counts, `used` the number of latents that fired. Bytes
are those of device memory unless it says L2.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from aksae_kernels import SparseCodes
from aksae_kernels.codes import live_slots

from ..problem import Shape


class Rates(NamedTuple):
    """Bytes per second: of a copy in device memory, read and written bytes together, and of random rows from L2."""

    copy: float = math.nan
    gather: float = math.nan

    @classmethod
    def of(cls, facts: dict[str, Any]) -> Rates:
        """From the facts of the part `ceilings`; of the gathers the fastest counts. NaN for what is not there."""
        gathers = facts.get("gather from L2, bytes/s", {})
        return cls(facts.get("copy, bytes/s", math.nan), max(gathers.values(), default=math.nan))


class Load(NamedTuple):
    """What the codes of a batch ask for."""

    nnz: int
    used: int

    @classmethod
    def of(cls, codes: SparseCodes) -> Load:
        """Counted in the codes."""
        live = codes.indices[live_slots(codes)]
        return cls(live.numel(), live.unique().numel())


def gemm_flops(shape: Shape) -> int:
    """`2 B D F`: of the product that an encode contains."""
    return 2 * shape.B * shape.D * shape.F


def select_bytes(shape: Shape, width: int, item: int) -> int:
    """Scores `[B, F]` read once; values, int32 indices and int32 counts written."""
    return shape.B * (shape.F * item + width * (item + 4) + 4)


def gather_bytes(shape: Shape, nnz: int, item: int) -> int:
    """A row of D for each of the live slots: from L2, where the slices of a matrix stay while they are used."""
    return nnz * shape.D * item


def decode_seconds(shape: Shape, load: Load, item: int, rates: Rates) -> float:
    """The larger of two: the gather from L2, and the used rows, live codes and result through device memory."""
    compulsory = load.used * shape.D * item + load.nnz * (item + 4) + shape.B * shape.D * item
    # Of a NaN and a number, max() gives whichever comes first.
    both = gather_bytes(shape, load.nnz, item) / rates.gather, compulsory / rates.copy
    return math.nan if any(map(math.isnan, both)) else max(both)


def weight_grads_seconds(shape: Shape, load: Load, item: int, rates: Rates) -> float:
    """Two gathers from L2, of rows of the residual and of x, and two `[F, D]` written."""
    return 2 * (gather_bytes(shape, load.nnz, item) / rates.gather + shape.F * shape.D * item / rates.copy)
