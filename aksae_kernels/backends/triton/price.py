"""Latents at a price: price_select.

One program a row walks over the candidates, since whether one joins depends on those that joined before it. The
residual stays in its registers, columns padded to a power of two, and every visit gathers one row of W_dec.

Two orders of the slots are sorted by torch before: by value, in which candidates are visited, and by index, in which
those that stay are written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...codes import SparseCodes, check_codes
from ...operands import empty_codes, rows, vector, visiting_order
from . import tuning
from .launch import launch, on_device_of_first
from .ordering import places
from .rounding import widen

# Beyond 16384 columns a residual spills out of the registers, and from some 10^5 on it takes minutes to compile.
_MAX_COLUMNS = 1 << 16


@on_device_of_first
def price_select(
    values: Tensor,
    indices: Tensor,
    counts: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    x: Tensor,
    price: Tensor,
    passes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_codes(indices, counts, W_dec.shape[0])
    n_rows, width = values.shape
    d_in = W_dec.shape[1]
    if d_in > _MAX_COLUMNS:
        raise ValueError(
            f"W_dec must have at most {_MAX_COLUMNS} columns for price_select on backend 'triton', got {d_in}"
        )
    values, indices, counts = values.contiguous(), indices.contiguous(), counts.contiguous()
    by_index, by_value = visiting_order(SparseCodes(values, indices, counts))
    W, x = rows(W_dec), rows(x)
    # What the pass before kept, which is nothing at first, and what a pass keeps.
    kept_before = torch.zeros(n_rows, width, dtype=torch.int8, device=values.device)
    kept = torch.empty_like(kept_before)
    chosen = empty_codes(values, width)
    latents = torch.empty_like(chosen.indices)
    launch(
        _price_select_kernel,
        (n_rows,),
        values,
        indices,
        counts,
        width,
        by_index,
        by_value,
        W,
        W.stride(0),
        vector(b_dec),
        x,
        x.stride(0),
        d_in,
        price.contiguous(),
        passes,
        kept,
        kept_before,
        *chosen,
        latents,
        HAS_BIAS=b_dec is not None,
        BLOCK_K=tuning.ENTRIES,
        **tuning.price(d_in).meta,
    )
    return *chosen, latents


@triton.jit(do_not_specialize=["width", "passes"])
def _price_select_kernel(
    # candidates
    values_ptr,
    indices_ptr,
    counts_ptr,
    width,
    by_index_ptr,
    by_value_ptr,
    # operands
    W_ptr,
    stride_W,
    bias_ptr,
    x_ptr,
    stride_x,
    d_in,
    price_ptr,
    passes,
    # scratch
    kept_ptr,
    kept_before_ptr,
    # outputs
    chosen_values_ptr,
    chosen_slots_ptr,
    chosen_counts_ptr,
    chosen_indices_ptr,
    # constants
    HAS_BIAS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slots = row * width
    values_ptr += slots
    indices_ptr += slots
    kept_ptr += slots
    kept_before_ptr += slots
    count = tl.load(counts_ptr + row)
    price = tl.load(price_ptr + row)
    column = tl.arange(0, BLOCK_D)
    inside = column < d_in
    residual = widen(tl.load(x_ptr + row * stride_x + column, mask=inside, other=0.0))
    if HAS_BIAS:
        residual -= widen(tl.load(bias_ptr + column, mask=inside, other=0.0))

    passes_left = passes
    n_changes = count
    while (passes_left > 0) & (n_changes > 0):
        n_changes = 0
        for visit in range(0, count):
            slot = tl.load(by_value_ptr + slots + visit)
            value = widen(tl.load(values_ptr + slot))
            latent = tl.load(indices_ptr + slot).to(tl.int64)
            is_kept = tl.load(kept_before_ptr + slot) != 0
            piece = widen(tl.load(W_ptr + latent * stride_W + column, mask=inside, other=0.0))
            linear = 2 * value * tl.sum(residual * piece, 0)
            quadratic = value * value * tl.sum(piece * piece, 0)
            # Not `>`: NaN joins. At a price of -inf, so does a gain of -inf.
            pays = ~(linear - quadratic <= price) | (price == float("-inf"))
            joins = ~is_kept & pays
            moves = joins | (is_kept & (linear + quadratic < price))
            if moves:
                step = tl.where(joins, -value, value)
                # An infinite value times the zeros past the last column would be NaN.
                residual = tl.where(inside, residual + step * piece, 0.0)
            # Not in place: other threads may have yet to load the flag.
            tl.store(kept_ptr + slot, (is_kept ^ moves).to(tl.int8))
            n_changes += moves.to(tl.int32)
        tl.debug_barrier()
        kept_ptr, kept_before_ptr = kept_before_ptr, kept_ptr
        passes_left -= 1

    chosen_values_ptr += slots
    chosen_slots_ptr += slots
    chosen_indices_ptr += slots
    n_kept = 0
    for start in range(0, count, BLOCK_K):
        nth = start + tl.arange(0, BLOCK_K)
        slot = tl.load(by_index_ptr + slots + nth, mask=nth < count, other=0)
        keep = tl.load(kept_before_ptr + slot, mask=nth < count, other=0) != 0
        value = tl.load(values_ptr + slot, mask=keep, other=0.0)
        latent = tl.load(indices_ptr + slot, mask=keep, other=0)
        place, n_kept = places(keep, n_kept)
        tl.store(chosen_values_ptr + place, value, mask=keep)
        tl.store(chosen_slots_ptr + place, slot.to(tl.int32), mask=keep)
        tl.store(chosen_indices_ptr + place, latent, mask=keep)
    for start in range(n_kept, width, BLOCK_K):
        place = start + tl.arange(0, BLOCK_K)
        tl.store(chosen_values_ptr + place, 0.0, mask=place < width)
        tl.store(chosen_slots_ptr + place, -1, mask=place < width)
        tl.store(chosen_indices_ptr + place, -1, mask=place < width)
    tl.store(chosen_counts_ptr + row, n_kept)
