"""The pruned select: what a row of scores adds to the row's list of candidates. Functions of kernels.

One streaming read leaves the maximum of every group of adjacent latents. With tau the k-th largest maximum, at least k
scores are `>= tau`, so every winner is; a group whose maximum is below tau holds none; fewer than k groups are above
it, and of those that tie with it the first few suffice, since each holds a score equal to tau and ties go to the
smaller index. So at most k groups are read again, whatever the row looks like. Where the scores of a row come in
several slabs, the bar that earlier ones left prunes as well.

Scores that are known but to an error bound have two keys, of their lower and their upper bound. The bar is the k-th
largest lower bound, and a candidate is whatever may reach it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .ordering import FAILED, compact, compact_bounds, first_of_ties, kth_key, places, to_key

# The constants of the bound; see topk_encode.
_BIAS_LOSS = tl.constexpr(2.0**-20)
NEAR_OVERFLOW = tl.constexpr(2.0**126)


@triton.jit
def score_keys(
    scores_ptr,
    latent,
    inside,
    bias_ptr,
    slope,
    residual_slope,
    norms_ptr,
    residual_norms_ptr,
    floor,
    HAS_BIAS: tl.constexpr,
    SCREEN: tl.constexpr,
):
    """Keys of the lower and the upper bounds of scores; without SCREEN both are those of the scores themselves.

    The error is `slope * norm + residual_slope * residual_norm + 2^-20 |b| + floor`, of a latent of zeros that of b.
    """
    score = tl.load(scores_ptr + latent, mask=inside, other=0.0)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + latent, mask=inside, other=0.0).to(tl.float32)
        score += bias
    lower = to_key(score)
    upper = lower
    if SCREEN:
        norm = tl.load(norms_ptr + latent, mask=inside, other=0.0)
        residual_norm = tl.load(residual_norms_ptr + latent, mask=inside, other=0.0)
        error = slope * norm + residual_slope * residual_norm + tl.where(norm > 0, floor, 0.0)
        if HAS_BIAS:
            error += _BIAS_LOSS * tl.abs(bias)
        # What is not finite, or so large that the fp32 product may not be, is a candidate that excludes nothing.
        known = tl.abs(score) + error < NEAR_OVERFLOW
        lower = tl.where(known, to_key(score - error), 0)
        upper = tl.where(inside, tl.where(known, to_key(score + error), FAILED - 1), 0)
    return lower, upper


@triton.jit
def offer_row(
    scores_ptr,
    n,
    first,
    last,
    bias_ptr,
    k,
    maxima_ptr,
    lower_maxima_ptr,
    groups_ptr,
    keys_ptr,
    uppers_ptr,
    columns_ptr,
    capacity,
    count,
    bar,
    slope,
    residual_slope,
    norms_ptr,
    residual_norms_ptr,
    floor,
    HAS_BIAS: tl.constexpr,
    SCREEN: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Offer the scores of latents [first, first + n) to a list of more than k + BLOCK places, or of as many as there
    are latents: its new `(count, bar)`. A screened list that is full of what nothing excludes fails: `(0, FAILED)`.
    """
    N: tl.constexpr = BLOCK // GROUP
    n_groups = tl.cdiv(n, GROUP)
    for first_group in range(0, n_groups, N):
        group = first_group + tl.arange(0, N)
        # Offsets from the block on: GROUP times a number of groups may pass 2^31 where no column does.
        offset = tl.arange(0, N)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        start = tl.cast(first_group, tl.int64) * GROUP
        bias_block_ptr = bias_ptr
        if HAS_BIAS:
            bias_block_ptr = bias_ptr + start
        norms_block_ptr = norms_ptr
        residual_norms_block_ptr = residual_norms_ptr
        if SCREEN:
            norms_block_ptr = norms_ptr + start
            residual_norms_block_ptr = residual_norms_ptr + start
        lower, upper = score_keys(
            scores_ptr + start,
            offset,
            offset < n - first_group * GROUP,
            bias_block_ptr,
            slope,
            residual_slope,
            norms_block_ptr,
            residual_norms_block_ptr,
            floor,
            HAS_BIAS,
            SCREEN,
        )
        tl.store(maxima_ptr + group, tl.max(upper, 1), mask=group < n_groups)
        if SCREEN:
            tl.store(lower_maxima_ptr + group, tl.max(lower, 1), mask=group < n_groups)
    tl.debug_barrier()
    if SCREEN:
        kth, ties = kth_key(lower_maxima_ptr, n_groups, k, bar, BLOCK)
        bar = tl.where(ties > 0, kth - 1, kth)
        n_listed = list_groups(maxima_ptr, n_groups, bar, 0, groups_ptr, BLOCK)
    else:
        kth, ties = kth_key(maxima_ptr, n_groups, k, bar, BLOCK)
        n_listed = list_groups(maxima_ptr, n_groups, kth, ties, groups_ptr, BLOCK)
        bar = tl.where(ties > 0, kth - 1, kth)
    tl.debug_barrier()
    for start in range(0, n_listed, N):
        slot = start + tl.arange(0, BLOCK) // GROUP
        group = tl.load(groups_ptr + slot, mask=slot < n_listed, other=0)
        latent = group * GROUP + tl.arange(0, BLOCK) % GROUP
        lower, upper = score_keys(
            scores_ptr,
            latent,
            (slot < n_listed) & (latent < n) & (latent >= 0),
            bias_ptr,
            slope,
            residual_slope,
            norms_ptr,
            residual_norms_ptr,
            floor,
            HAS_BIAS,
            SCREEN,
        )
        if count + tl.sum((upper >= bar).to(tl.int32), 0) > capacity:
            if SCREEN:
                count, bar = compact_bounds(keys_ptr, uppers_ptr, columns_ptr, count, k, bar, BLOCK)
                if count + BLOCK > capacity:
                    count = 0
                    bar = FAILED
            else:
                count, bar = compact(keys_ptr, columns_ptr, count, k, bar, BLOCK)
        keep = upper >= bar
        slot, count = places(keep, count)
        tl.store(keys_ptr + slot, lower, mask=keep)
        tl.store(columns_ptr + slot, first + latent, mask=keep)
        if SCREEN:
            tl.store(uppers_ptr + slot, upper, mask=keep)
    # A high bar spares the slabs to come work, and a screened list the product of its candidates.
    if SCREEN:
        count, bar = compact_bounds(keys_ptr, uppers_ptr, columns_ptr, count, k, bar, BLOCK)
    elif (last == 0) & (count > 2 * k):
        count, bar = compact(keys_ptr, columns_ptr, count, k, bar, BLOCK)
    return count, bar


@triton.jit
def list_groups(maxima_ptr, n_groups, bar, ties, groups_ptr, BLOCK: tl.constexpr):
    """The numbers of the groups whose maximum is `>= bar`, and of the first `ties` of those at `bar - 1`."""
    count = 0
    taken = 0
    for start in range(0, n_groups, BLOCK):
        group = start + tl.arange(0, BLOCK)
        maximum = tl.load(maxima_ptr + group, mask=group < n_groups, other=-1)
        tie = maximum == bar - 1
        keep = (maximum >= bar) | first_of_ties(tie, taken, ties)
        taken += tl.sum(tie.to(tl.int32), 0)
        slot, count = places(keep, count)
        tl.store(groups_ptr + slot, group, mask=keep)
    return count
