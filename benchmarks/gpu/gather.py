"""How fast random rows of a table can be read: a Triton kernel that does nothing else."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 4096
"""Words that a program has in flight."""


@triton.jit
def _gather_sum_kernel(table_ptr, row_ptr, out_ptr, steps, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Program p sums the rows `row_ptr[p * steps * ROWS:][:steps * ROWS]` of a table `[*, WIDTH]` of fp32."""
    program = tl.program_id(0)
    column = tl.arange(0, WIDTH)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for step in range(steps):
        slot = (program * steps + step) * ROWS + tl.arange(0, ROWS)
        row = tl.load(row_ptr + slot).to(tl.int64)
        total += tl.load(table_ptr + row[:, None] * WIDTH + column[None, :])
    tl.store(out_ptr + program * WIDTH + column, tl.sum(total, 0))


def gather_sum(table: Tensor, rows: Tensor, programs: int) -> Tensor:
    """`[programs, WIDTH]`: the sums of equal runs of `table[rows]`.

    Args:
        table: `[*, WIDTH]` fp32, contiguous, WIDTH a power of two of at most 4096.
        rows: int32, `programs * steps * (4096 / WIDTH)` of them for some whole number of steps.
    """
    width = table.shape[1]
    per_step = _TILE // width
    steps, rest = divmod(rows.numel(), programs * per_step)
    if rest:
        raise ValueError(f"rows must come in multiples of {programs * per_step}, got {rows.numel()}")
    out = torch.empty(programs, width, device=table.device)
    _gather_sum_kernel[(programs,)](table, rows, out, steps, WIDTH=width, ROWS=per_step)
    return out
