"""Selections from scores in memory: topk_select, batch_topk_select, threshold_select.

**topk_select** is the pruned select of `offer.py`, one program a row, and an exact ranking of what it leaves.

**batch_topk_select** is a radix select over the whole matrix: three passes of histograms find the key that the budget
ends at, a fourth counts the ties of every row, a fifth writes. Counts are integers, so atomics do not disturb them.

No result depends on timing, and no list can overflow: one that is full is cut to its k best, which loses nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...codes import SparseCodes
from ...operands import empty_codes, limits, require_width, rows
from . import tuning
from .launch import launch, on_device_of_first
from .offer import offer_row
from .ordering import first_of_ties, places, to_key, write_best, write_padding
from .rounding import widen

# A key's 31 bits from the top: where its digits begin and end.
_DIGITS = ((20, 31), (9, 20), (0, 9))
_N_DIGITS = tl.constexpr(2**11)
# Programs that share the rows of a batch: enough to fill a GPU, few enough that adding up their histograms is cheap.
_HISTOGRAM_PROGRAMS = 1024


@on_device_of_first
def topk_select(pre_acts: Tensor, k: Tensor, k_max: int) -> SparseCodes:
    codes = empty_codes(pre_acts, k_max)
    select_rows(rows(pre_acts), None, k.contiguous(), codes)
    return codes


def select_rows(scores: Tensor, bias: Tensor | None, k: Tensor, codes: SparseCodes) -> None:
    """Write the codes of `scores + bias`, which has all latents of its rows."""
    n_rows, n_latents = scores.shape
    width = codes.indices.shape[1]
    config = tuning.select(n_latents)
    n_groups = triton.cdiv(n_latents, config["GROUP"])
    capacity = list_capacity(width, config["BLOCK"], n_latents)
    maxima, groups = k.new_empty(2, n_rows, n_groups)
    keys, columns = k.new_empty(2, n_rows, capacity)
    launch(
        _topk_select_kernel,
        (n_rows,),
        scores,
        scores.stride(0),
        n_latents,
        bias,
        k,
        maxima,
        groups,
        n_groups,
        keys,
        columns,
        capacity,
        *codes,
        width,
        HAS_BIAS=bias is not None,
        **config.meta,
    )


@on_device_of_first
def batch_topk_select(pre_acts: Tensor, budget: int, k_max: int) -> SparseCodes:
    scores = rows(pre_acts)
    n_rows, n_latents = scores.shape
    budget = min(budget, n_rows * n_latents)
    config = tuning.histogram()
    # The key found so far, and how many of its ties are still wanted.
    bound = torch.zeros(1, dtype=torch.int32, device=scores.device)
    wanted = torch.full((1,), budget, dtype=torch.int64, device=scores.device)
    for shift, above in _DIGITS:
        histogram = torch.zeros(_N_DIGITS.value, dtype=torch.int64, device=scores.device)
        n_tiles = n_rows * triton.cdiv(n_latents, config["BLOCK"])
        launch(
            _histogram_kernel,
            (min(n_tiles, _HISTOGRAM_PROGRAMS),),
            scores,
            scores.stride(0),
            n_rows,
            n_latents,
            bound,
            histogram,
            SHIFT=shift,
            ABOVE=above,
            **config.meta,
        )
        launch(_pick_digit_kernel, (1,), histogram, bound, wanted, SHIFT=shift, num_warps=4)
    ties = torch.empty(n_rows, dtype=torch.int64, device=scores.device)
    launch(_count_ties_kernel, (n_rows,), scores, scores.stride(0), n_latents, bound, ties, **tuning.scan().meta)
    # Rows in order get what is left of the wanted ties.
    before = ties.cumsum(0) - ties
    ties = torch.minimum(ties, (wanted - before).clamp(min=0)).to(torch.int32)
    return _write_hits(scores, bound, ties, k_max, "batch_topk_select", BY_LIMIT=False)


@on_device_of_first
def threshold_select(pre_acts: Tensor, threshold: Tensor, k_max: int) -> SparseCodes:
    return _write_hits(rows(pre_acts), limits(pre_acts, threshold), None, k_max, "threshold_select", BY_LIMIT=True)


def list_capacity(k_max: int, block: int, n_latents: int) -> int:
    """Candidates a row's list holds: all there can be, or so many that it takes a block after a cut to k, rarely."""
    return min(2 * k_max + block, n_latents)


def _write_hits(
    scores: Tensor, bound: Tensor, ties: Tensor | None, k_max: int, op: str, *, BY_LIMIT: bool
) -> SparseCodes:
    codes = empty_codes(scores, k_max)
    n_rows, n_latents = scores.shape
    launch(
        _write_hits_kernel,
        (n_rows,),
        scores,
        scores.stride(0),
        n_latents,
        bound,
        ties,
        *codes,
        k_max,
        BY_LIMIT=BY_LIMIT,
        **tuning.scan().meta,
    )
    require_width(codes.counts, k_max, op)
    return codes


@triton.jit(do_not_specialize=["n_groups", "capacity", "width"])
def _topk_select_kernel(
    scores_ptr,
    stride_row,
    n_latents,
    bias_ptr,
    k_ptr,
    maxima_ptr,
    groups_ptr,
    n_groups,
    keys_ptr,
    columns_ptr,
    capacity,
    values_ptr,
    indices_ptr,
    counts_ptr,
    width,
    HAS_BIAS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    k = tl.load(k_ptr + row)
    keys_ptr += row * capacity
    columns_ptr += row * capacity
    count = 0
    if k > 0:
        count, _ = offer_row(
            scores_ptr + row * stride_row,
            n_latents,
            0,
            1,
            bias_ptr,
            k,
            maxima_ptr + row * n_groups,
            None,
            groups_ptr + row * n_groups,
            keys_ptr,
            None,
            columns_ptr,
            capacity,
            count,
            1,
            0.0,
            0.0,
            None,
            None,
            0.0,
            HAS_BIAS,
            False,
            GROUP,
            BLOCK,
        )
    written = write_best(
        keys_ptr, columns_ptr, count, k, values_ptr + row * width, indices_ptr + row * width, width, BLOCK
    )
    tl.store(counts_ptr + row, written)


@triton.jit(do_not_specialize=["n_rows"])
def _histogram_kernel(
    scores_ptr,
    stride_row,
    n_rows,
    n_latents,
    bound_ptr,
    histogram_ptr,
    SHIFT: tl.constexpr,
    ABOVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Counts the digits in bits [SHIFT, ABOVE) of the keys whose higher bits are those of the bound."""
    bound = tl.load(bound_ptr)
    counts = tl.zeros([_N_DIGITS], dtype=tl.int32)
    per_row = tl.cdiv(n_latents, BLOCK)
    n_tiles = tl.cast(per_row, tl.int64) * n_rows
    for tile in range(tl.program_id(0).to(tl.int64), n_tiles, tl.num_programs(0)):
        row = tile // per_row
        column = tl.cast(tile - row * per_row, tl.int32) * BLOCK + tl.arange(0, BLOCK)
        key = to_key(tl.load(scores_ptr + row * stride_row + column, mask=column < n_latents, other=0.0))
        digit = (key >> SHIFT) & ((1 << (ABOVE - SHIFT)) - 1)
        counts += tl.histogram(digit, _N_DIGITS, mask=(key > 0) & ((key ^ bound) >> ABOVE == 0))
    tl.atomic_add(histogram_ptr + tl.arange(0, _N_DIGITS), counts.to(tl.int64), mask=counts > 0, sem="relaxed")


@triton.jit
def _pick_digit_kernel(histogram_ptr, bound_ptr, wanted_ptr, SHIFT: tl.constexpr):
    """Extends the bound by the digit at which the wanted number of keys is reached, counted from the top; by 0 where
    there are not so many."""
    digit = tl.arange(0, _N_DIGITS)
    counts = tl.load(histogram_ptr + digit)
    wanted = tl.load(wanted_ptr)
    at_least = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts
    best = tl.max(tl.where(at_least >= wanted, digit, 0), 0)
    tl.store(wanted_ptr, wanted - tl.sum(tl.where(digit > best, counts, 0), 0))
    tl.store(bound_ptr, tl.load(bound_ptr) | (best << SHIFT))


@triton.jit
def _count_ties_kernel(scores_ptr, stride_row, n_latents, bound_ptr, ties_ptr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    bound = tl.load(bound_ptr)
    ties = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(0, n_latents, BLOCK):
        column = start + tl.arange(0, BLOCK)
        key = to_key(tl.load(scores_ptr + row * stride_row + column, mask=column < n_latents, other=0.0))
        ties += ((key == bound) & (key > 0)).to(tl.int32)
    tl.store(ties_ptr + row, tl.sum(ties, 0).to(tl.int64))


@triton.jit(do_not_specialize=["width"])
def _write_hits_kernel(
    scores_ptr,
    stride_row,
    n_latents,
    bound_ptr,
    ties_ptr,
    values_ptr,
    indices_ptr,
    counts_ptr,
    width,
    BY_LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes what a row has above `bound`, in order: per latent an fp32 limit, or one key for the whole batch together
    with how many ties the row may keep. Counts are those of the row, the codes what fits."""
    row = tl.program_id(0).to(tl.int64)
    scores_ptr += row * stride_row
    values_ptr += row * width
    indices_ptr += row * width
    count = 0
    taken = 0
    for start in range(0, n_latents, BLOCK):
        column = start + tl.arange(0, BLOCK)
        score = tl.load(scores_ptr + column, mask=column < n_latents, other=0.0)
        key = to_key(score)
        if BY_LIMIT:
            limit = tl.load(bound_ptr + column, mask=column < n_latents, other=0.0)
            # Not `>`: NaN is kept, whatever the limit.
            keep = (key > 0) & ~(widen(score) <= limit)
        else:
            bound = tl.load(bound_ptr)
            tie = (key == bound) & (key > 0)
            keep = (key > bound) | first_of_ties(tie, taken, tl.load(ties_ptr + row))
            taken += tl.sum(tie.to(tl.int32), 0)
        slot, count = places(keep, count)
        fits = keep & (slot < width)
        tl.store(values_ptr + slot, score, mask=fits)
        tl.store(indices_ptr + slot, column, mask=fits)
    write_padding(values_ptr, indices_ptr, count, width, BLOCK)
    tl.store(counts_ptr + row, count)
