"""The total order of the contract as integers, and exact selection from a list of candidates: functions of kernels.

A key is an int32 that ranks as the contract does: the bits of a positive fp32 score, `NAN_KEY` above +inf, and 0 for
whatever may not be selected. A program works on the list of one row in global memory, where `count` candidates lie in
ascending order of their columns; every function leaves that order alone, which is why no result needs sorting.

Threads of a program exchange the list through memory, hence the barriers: Triton orders no global store before a load.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rounding import narrow, widen

NAN_KEY = tl.constexpr(0x7FFFFFFE)
FAILED = tl.constexpr(0x7FFFFFFF)
"""A bar that no key reaches: the mark of a row whose screen gave up."""


@triton.jit
def to_key(score):
    score = widen(score)
    bits = score.to(tl.int32, bitcast=True)
    return tl.where(score != score, NAN_KEY, tl.maximum(bits, 0))


@triton.jit
def to_score(key):
    return key.to(tl.float32, bitcast=True)


@triton.jit
def count_at_least(keys_ptr, count, bound, BLOCK: tl.constexpr):
    """How many of the keys are `>= bound`."""
    hits = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(0, count, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        key = tl.load(keys_ptr + slot, mask=slot < count, other=-1)
        hits += (key >= bound).to(tl.int32)
    return tl.sum(hits, 0)


@triton.jit
def kth_key(keys_ptr, count, k, least, BLOCK: tl.constexpr):
    """What the k best of the keys that are `>= least` have in common: `(bar, ties)`, where the k best are all keys
    `>= bar` and the first `ties` of those equal to `bar - 1`.

    By bisection, which ends early where exactly k keys reach the middle: usually after a dozen of at most 31 steps.
    Fewer than k such keys are all taken: `(least, 0)`.
    """
    low = FAILED
    largest = 0
    n_bar = 0
    for start in range(0, count, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        key = tl.load(keys_ptr + slot, mask=slot < count, other=-1)
        largest = tl.maximum(largest, tl.max(key, 0))
        low = tl.minimum(low, tl.min(tl.where(key >= least, key, FAILED), 0))
        n_bar += tl.sum((key >= least).to(tl.int32), 0)
    bar = least
    ties = 0
    if n_bar > k:
        # n(low) > k > n(bar): the k-th key lies in [low, bar).
        bar = largest + 1
        n_bar = 0
        while (n_bar != k) & (bar - low > 1):
            middle = low + (bar - low) // 2
            n_middle = count_at_least(keys_ptr, count, middle, BLOCK)
            if n_middle > k:
                low = middle
            else:
                bar = middle
                n_bar = n_middle
        ties = k - n_bar
    return bar, ties


@triton.jit
def first_of_ties(tie, taken, ties):
    """Those of the block's ties that are among the first `ties` of the row, `taken` of which came in blocks before."""
    return tie & (taken + tl.cumsum(tie.to(tl.int32), 0) <= ties)


@triton.jit
def places(keep, count):
    """Where what is kept of a block goes behind `count` entries, in order, and how many there are then."""
    return count + tl.cumsum(keep.to(tl.int32), 0) - 1, count + tl.sum(keep.to(tl.int32), 0)


@triton.jit
def compact(keys_ptr, columns_ptr, count, k, bar, BLOCK: tl.constexpr):
    """Cut a list of more than 2 k entries to the k best: `(count, bar)`. Later columns lose every tie, so the new bar
    is above the k-th key; entries that tie with it, k at most, are why a shorter list might lose some the next time.
    """
    tl.debug_barrier()
    bar, ties = kth_key(keys_ptr, count, k, bar, BLOCK)
    kept = 0
    taken = 0
    for start in range(0, count, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        key = tl.load(keys_ptr + slot, mask=slot < count, other=-1)
        column = tl.load(columns_ptr + slot, mask=slot < count, other=0)
        # Nobody may write to a slot of this block that another thread has yet to read.
        tl.debug_barrier()
        tie = key == bar - 1
        keep = (key >= bar) | first_of_ties(tie, taken, ties)
        taken += tl.sum(tie.to(tl.int32), 0)
        slot, kept = places(keep, kept)
        tl.store(keys_ptr + slot, key, mask=keep)
        tl.store(columns_ptr + slot, column, mask=keep)
    tl.debug_barrier()
    return kept, bar


@triton.jit
def compact_bounds(keys_ptr, uppers_ptr, columns_ptr, count, k, bar, BLOCK: tl.constexpr):
    """The same of lower and upper bounds: the bar is the k-th largest lower one, and what may reach it is kept."""
    tl.debug_barrier()
    kth, ties = kth_key(keys_ptr, count, k, bar, BLOCK)
    bar = tl.where(ties > 0, kth - 1, kth)
    kept = 0
    for start in range(0, count, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        key = tl.load(keys_ptr + slot, mask=slot < count, other=-1)
        upper = tl.load(uppers_ptr + slot, mask=slot < count, other=-1)
        column = tl.load(columns_ptr + slot, mask=slot < count, other=0)
        tl.debug_barrier()
        keep = upper >= bar
        slot, kept = places(keep, kept)
        tl.store(keys_ptr + slot, key, mask=keep)
        tl.store(uppers_ptr + slot, upper, mask=keep)
        tl.store(columns_ptr + slot, column, mask=keep)
    tl.debug_barrier()
    return kept, bar


@triton.jit
def write_best(keys_ptr, columns_ptr, count, k, values_ptr, indices_ptr, width, BLOCK: tl.constexpr):
    """Write the k best of a list as a row of codes, padding included; returns how many there were."""
    tl.debug_barrier()
    bar, ties = kth_key(keys_ptr, count, k, 1, BLOCK)
    written = 0
    taken = 0
    for start in range(0, count, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        key = tl.load(keys_ptr + slot, mask=slot < count, other=-1)
        column = tl.load(columns_ptr + slot, mask=slot < count, other=0)
        tie = key == bar - 1
        keep = (key >= bar) | first_of_ties(tie, taken, ties)
        taken += tl.sum(tie.to(tl.int32), 0)
        slot, written = places(keep, written)
        tl.store(values_ptr + slot, narrow(to_score(key), values_ptr.dtype.element_ty), mask=keep)
        tl.store(indices_ptr + slot, column, mask=keep)
    write_padding(values_ptr, indices_ptr, written, width, BLOCK)
    return written


@triton.jit
def write_padding(values_ptr, indices_ptr, first, width, BLOCK: tl.constexpr):
    """Value 0 and index -1 in the slots of a row from `first` on."""
    for start in range(first, width, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        tl.store(values_ptr + slot, 0.0, mask=slot < width)
        tl.store(indices_ptr + slot, -1, mask=slot < width)
