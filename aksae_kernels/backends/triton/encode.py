"""topk_encode: a library product in slabs, each filtered while it is in the second-level cache.

A slab holds the fp32 scores of some rows and of the next few latents, written by cuBLAS. A program for each row
compares them with the row's bar, a key that k candidates seen so far reach, and puts what reaches it on the row's list
of candidates; a full list is cut to its k best, which raises the bar. So scores never lie in memory as `[B, F]`, no
list can overflow, and no winner can be lost.

**16-bit inputs** are multiplied by tensor cores into fp32 accumulators: those are the scores.

**fp32 inputs** have no fast product on tensor cores. A bf16 product screens them instead: with e the error bound that
the docstring of `aksae_kernels.topk_encode` derives, the bar is the k-th largest of the lower bounds `p + b - e`, and a
latent is a candidate where `p + b + e` reaches it. What remains is multiplied again in fp32 and ranked by that. Where a
row's candidates do not fit its list, or its bound is not finite, `_encode_exactly_kernel` multiplies the whole row in
fp32: nothing but time depends on it, apart from the last bits of its scores.
"""

from __future__ import annotations

import copy

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...codes import SparseCodes
from ...kept import prepared
from ...operands import empty_codes, rows, vector
from . import tuning
from .launch import launch, on_device_of_first
from .ordering import FAILED, append, compact, kth_key, to_key, write_best
from .rounding import narrow, widen
from .select import list_capacity
from .sparse import gather_dots

# The constants of the bound; n = D + 32 terms. See topk_encode.
_SUM_LOSS = tl.constexpr(2.0**-22)
_BIAS_LOSS = tl.constexpr(2.0**-20)
_UNDERFLOW = tl.constexpr(2.0**-120)
_EXTRA_TERMS = tl.constexpr(32)
_NEAR_OVERFLOW = tl.constexpr(2.0**126)
# Norms are taken in fp32: what their own roundings may have lost of them, and of squares below the smallest number.
_NORM_MARGIN = tl.constexpr(1 + 2.0**-10)
_NORM_FLOOR = tl.constexpr(2.0**-53)
# Longer sums would leave the norms' margin.
_SCREEN_DEPTH = 1 << 17
# Candidates a list may hold for each of the k that win: the bound lets some 2 k through.
_SCREEN_SHARE = 4
# For a small k there are more for each.
_LEAST_LISTED = 256


@on_device_of_first
def topk_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: Tensor, k_max: int) -> SparseCodes:
    codes = empty_codes(x, k_max)
    x, W, bias, k = rows(x), rows(W_enc), vector(b_enc), k.contiguous()
    n_rows, n_latents = x.shape[0], W.shape[0]
    full = x.dtype == torch.float32
    config = tuning.slab(n_rows, n_latents, x.shape[1] if full else 0, _capacity(k_max, n_latents, full))
    weight = prepared(W_enc, lambda weight: _Rounded(rows(weight))) if full else None
    for first in range(0, n_rows, config.rows):
        part = slice(first, first + config.rows)
        encode = _encode_full if full else _encode_half
        encode(x[part], W, bias, k[part], SparseCodes(*(t[part] for t in codes)), config, weight)
    return codes


def _capacity(k_max: int, n_latents: int, screened: bool) -> int:
    if screened:
        # An exact list is to fit too.
        return max(_SCREEN_SHARE * k_max, _LEAST_LISTED) + tuning.scan()["BLOCK"]
    return list_capacity(k_max, tuning.scan()["BLOCK"], n_latents)


class _Lists:
    """The candidates of some rows: keys and columns in order, how many, and the key a further one must reach."""

    def __init__(self, k: Tensor, capacity: int, screened: bool):
        self.capacity = capacity
        self.keys, self.columns = k.new_empty(2, len(k), capacity)
        # Upper bounds beside the lower ones.
        self.uppers = torch.empty_like(self.keys) if screened else None
        self.counts = torch.zeros_like(k)
        self.bars = torch.ones_like(k)

    def write_best(self, k: Tensor, codes: SparseCodes) -> None:
        width = codes.indices.shape[1]
        config = tuning.scan()
        launch(
            _finish_kernel,
            (len(k),),
            k,
            self.keys,
            self.columns,
            self.capacity,
            self.counts,
            *codes,
            width,
            **config.meta,
        )


class _Rounded:
    """Rows of an fp32 matrix in bf16, their norms, and the norms of what the rounding took, each bounded from above."""

    def __init__(self, matrix: Tensor):
        n_rows, depth = matrix.shape
        self.matrix = matrix.new_empty(n_rows, depth, dtype=torch.bfloat16)
        self.norms, self.residual_norms = matrix.new_empty(2, n_rows)
        config = tuning.rounding()
        launch(
            _round_kernel,
            (triton.cdiv(n_rows, config["ROWS"]),),
            matrix,
            matrix.stride(0),
            n_rows,
            depth,
            self.matrix,
            self.norms,
            self.residual_norms,
            **config.meta,
        )

    def __getitem__(self, part: slice) -> _Rounded:
        """Some of the rows."""
        rows = copy.copy(self)
        rows.matrix, rows.norms, rows.residual_norms = self.matrix[part], self.norms[part], self.residual_norms[part]
        return rows


def _encode_half(
    x: Tensor, W: Tensor, bias: Tensor | None, k: Tensor, codes: SparseCodes, config: tuning.Slab, _: None
) -> None:
    lists = _Lists(k, _capacity(codes.indices.shape[1], W.shape[0], screened=False), screened=False)
    slab = torch.empty(len(k), config.latents, dtype=torch.float32, device=x.device)
    for first in range(0, W.shape[0], config.latents):
        _product(x, W[first : first + config.latents], slab)
        _filter(slab, first, W.shape[0], bias, k, lists)
    lists.write_best(k, codes)


def _encode_full(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    k: Tensor,
    codes: SparseCodes,
    config: tuning.Slab,
    weight: _Rounded | None,
) -> None:
    n_latents, depth = W.shape
    lists = _Lists(k, _capacity(codes.indices.shape[1], n_latents, screened=True), screened=True)
    slab = torch.empty(len(k), config.latents, dtype=torch.float32, device=x.device)
    # With every other latent a candidate, the screen would only come on top.
    if lists.capacity < n_latents // 2 and depth <= _SCREEN_DEPTH:
        rounded = _Rounded(x)
        for first in range(0, n_latents, config.latents):
            # A tile is gone before the next one is rounded.
            _screen(rounded, W, weight, slab, first, bias, k, lists)
        launch(
            _rescore_kernel,
            (len(k), triton.cdiv(lists.capacity, tuning.ENTRIES)),
            x,
            x.stride(0),
            W,
            W.stride(0),
            bias,
            depth,
            lists.keys,
            lists.columns,
            lists.capacity,
            lists.counts,
            HAS_BIAS=bias is not None,
            ENTRIES=tuning.ENTRIES,
            **tuning.gather(n_latents, depth, W.element_size()).meta,
        )
    else:
        lists.bars.fill_(FAILED.value)
    exact = tuning.exact()
    launch(
        _encode_exactly_kernel,
        (triton.cdiv(len(k), exact["ROWS"]),),
        x,
        x.stride(0),
        W,
        W.stride(0),
        bias,
        len(k),
        n_latents,
        depth,
        k,
        slab,
        config.latents,
        lists.keys,
        lists.columns,
        lists.capacity,
        lists.counts,
        lists.bars,
        HAS_BIAS=bias is not None,
        **exact.meta,
    )
    lists.write_best(k, codes)


def _screen(
    x: _Rounded,
    W: Tensor,
    weight: _Rounded | None,
    slab: Tensor,
    first: int,
    bias: Tensor | None,
    k: Tensor,
    lists: _Lists,
) -> None:
    """One slab of an fp32 encode; `weight` is what was kept of W, where it was."""
    part = slice(first, first + slab.shape[1])
    tile = _Rounded(W[part]) if weight is None else weight[part]
    _product(x.matrix, tile.matrix, slab)
    _filter(slab, first, len(W), bias, k, lists, x, tile)


def _product(x: Tensor, W: Tensor, slab: Tensor) -> None:
    """`slab[:, :len(W)] = x @ W.T` with an fp32 result; products of 16-bit numbers are exact in fp32."""
    out = slab[:, : len(W)]
    if x.is_cuda and torch.version.hip is None:
        torch.mm(x, W.T, out_dtype=torch.float32, out=out)
    else:
        # No mixed product there.
        torch.mm(x.float(), W.float().T, out=out)


def _filter(
    slab: Tensor,
    first: int,
    n_latents: int,
    bias: Tensor | None,
    k: Tensor,
    lists: _Lists,
    x: _Rounded | None = None,
    tile: _Rounded | None = None,
) -> None:
    """Offer a slab to the lists; a screened one comes with what was rounded of its operands."""
    n = min(slab.shape[1], n_latents - first)
    screened = x is not None
    bound = (x.norms, x.residual_norms, tile.norms, tile.residual_norms, x.matrix.shape[1]) if screened else (None,) * 5
    launch(
        _filter_kernel,
        (len(k),),
        slab,
        slab.stride(0),
        n,
        first,
        None if bias is None else bias[first : first + n],
        k,
        lists.keys,
        lists.uppers,
        lists.columns,
        lists.capacity,
        lists.counts,
        lists.bars,
        int(first + n == n_latents),
        *bound,
        HAS_BIAS=bias is not None,
        SCREEN=screened,
        **tuning.scan().meta,
    )


@triton.jit
def filter_row(
    scores_ptr,
    n,
    first,
    bias_ptr,
    k,
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
    BLOCK: tl.constexpr,
):
    """Offer the scores of latents [first, first + n) to a row's list: its new `(count, bar)`.

    SCREEN: the scores are known to `e = slope * norm + residual_slope * residual_norm + 2^-20 |b| + floor`; the list
    holds lower and upper bounds, and the row fails where it is full of candidates that nothing excludes.
    """
    for start in range(0, n, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < n
        score = tl.load(scores_ptr + column, mask=inside, other=0.0)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
            score += bias
        key = to_key(score)
        upper = key
        if SCREEN:
            norm = tl.load(norms_ptr + column, mask=inside, other=0.0)
            error = slope * norm + residual_slope * tl.load(residual_norms_ptr + column, mask=inside, other=0.0) + floor
            if HAS_BIAS:
                error += _BIAS_LOSS * tl.abs(bias)
            # What is not finite, or so large that the fp32 product may not be, is a candidate that excludes nothing.
            known = tl.abs(score) + error < _NEAR_OVERFLOW
            key = tl.where(known, to_key(score - error), 0)
            upper = tl.where(inside, tl.where(known, to_key(score + error), FAILED - 1), 0)
        keep = upper >= bar
        if count + tl.sum(keep.to(tl.int32), 0) > capacity:
            if SCREEN:
                count, bar = compact_screened(keys_ptr, uppers_ptr, columns_ptr, count, k, bar, BLOCK)
                if count + BLOCK > capacity:
                    count = 0
                    bar = FAILED
            else:
                count, bar = compact(keys_ptr, columns_ptr, count, k, bar, BLOCK)
            keep = upper >= bar
        if SCREEN:
            append(uppers_ptr, columns_ptr, count, upper, first + column, keep)
        count = append(keys_ptr, columns_ptr, count, key, first + column, keep)
    return count, bar


@triton.jit
def compact_screened(keys_ptr, uppers_ptr, columns_ptr, count, k, bar, BLOCK: tl.constexpr):
    """Raise the bar to the k-th largest lower bound, and keep the candidates whose upper bound reaches it."""
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
        append(uppers_ptr, columns_ptr, kept, upper, column, upper >= bar)
        kept = append(keys_ptr, columns_ptr, kept, key, column, upper >= bar)
    tl.debug_barrier()
    return kept, bar


@triton.jit(do_not_specialize=["first", "capacity", "last"])
def _filter_kernel(
    slab_ptr,
    stride_slab,
    n,
    first,
    bias_ptr,
    k_ptr,
    keys_ptr,
    uppers_ptr,
    columns_ptr,
    capacity,
    counts_ptr,
    bars_ptr,
    last,
    x_norms_ptr,
    x_residual_norms_ptr,
    norms_ptr,
    residual_norms_ptr,
    depth,
    HAS_BIAS: tl.constexpr,
    SCREEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    keys_ptr += row * capacity
    columns_ptr += row * capacity
    k = tl.load(k_ptr + row)
    count = tl.load(counts_ptr + row)
    bar = tl.load(bars_ptr + row)
    slope = 0.0
    residual_slope = 0.0
    floor = 0.0
    if SCREEN:
        uppers_ptr += row * capacity
        norm = tl.load(x_norms_ptr + row)
        residual = tl.load(x_residual_norms_ptr + row)
        terms = tl.cast(depth + _EXTRA_TERMS, tl.float32)
        slope = residual + terms * _SUM_LOSS * norm
        # The norm of the rounded row is at most that.
        residual_slope = norm + residual
        floor = terms * _UNDERFLOW
        if ~(slope + residual_slope < _NEAR_OVERFLOW):
            bar = FAILED
    if (k > 0) & (bar < FAILED):
        count, bar = filter_row(
            slab_ptr + row * stride_slab,
            n,
            first,
            bias_ptr,
            k,
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
            HAS_BIAS,
            SCREEN,
            BLOCK,
        )
        # Nested: the outer one is decided when the kernel is compiled.
        if SCREEN:  # noqa: SIM102
            if last:
                # Fewer candidates to multiply again.
                count, bar = compact_screened(keys_ptr, uppers_ptr, columns_ptr, count, k, bar, BLOCK)
    tl.store(counts_ptr + row, count)
    tl.store(bars_ptr + row, bar)


@triton.jit(do_not_specialize=["capacity", "width"])
def _finish_kernel(
    k_ptr,
    keys_ptr,
    columns_ptr,
    capacity,
    list_counts_ptr,
    values_ptr,
    indices_ptr,
    counts_ptr,
    width,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    written = write_best(
        keys_ptr + row * capacity,
        columns_ptr + row * capacity,
        tl.load(list_counts_ptr + row),
        tl.load(k_ptr + row),
        values_ptr + row * width,
        indices_ptr + row * width,
        width,
        BLOCK,
    )
    tl.store(counts_ptr + row, written)


@triton.jit(do_not_specialize=["n_rows"])
def _round_kernel(
    matrix_ptr,
    stride_matrix,
    n_rows,
    depth,
    rounded_ptr,
    norms_ptr,
    residual_norms_ptr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    squares = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    residual_squares = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for start in range(0, depth, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = (row < n_rows)[:, None] & (column < depth)[None, :]
        number = tl.load(matrix_ptr + row[:, None] * stride_matrix + column[None, :], mask=inside, other=0.0)
        rounded = narrow(number, tl.bfloat16)
        tl.store(rounded_ptr + row[:, None] * depth + column[None, :], rounded, mask=inside)
        residual = number - widen(rounded)
        squares += number * number
        residual_squares += residual * residual
    norm = tl.sqrt(tl.sum(squares, 1)) * _NORM_MARGIN + _NORM_FLOOR
    tl.store(norms_ptr + row, norm, mask=row < n_rows)
    residual_norm = tl.sqrt(tl.sum(residual_squares, 1)) * _NORM_MARGIN + _NORM_FLOOR
    tl.store(residual_norms_ptr + row, residual_norm, mask=row < n_rows)


@triton.jit(do_not_specialize=["capacity"])
def _rescore_kernel(
    x_ptr,
    stride_x,
    W_ptr,
    stride_W,
    bias_ptr,
    depth,
    keys_ptr,
    columns_ptr,
    capacity,
    counts_ptr,
    HAS_BIAS: tl.constexpr,
    ENTRIES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The fp32 scores of the candidates, in the place of their lower bounds."""
    row = tl.program_id(0).to(tl.int64)
    keys_ptr += row * capacity
    columns_ptr += row * capacity
    count = tl.load(counts_ptr + row)
    begin = tl.program_id(1) * ENTRIES
    for start in range(begin, tl.minimum(begin + ENTRIES, count), BLOCK_K):
        entry = start + tl.arange(0, BLOCK_K)
        live = entry < count
        latent = tl.load(columns_ptr + entry, mask=live, other=0)
        score = gather_dots(latent, live, W_ptr, stride_W, x_ptr + row * stride_x, 0, depth, BLOCK_K, BLOCK_D)
        if HAS_BIAS:
            score += tl.load(bias_ptr + latent, mask=live, other=0.0)
        tl.store(keys_ptr + entry, to_key(score), mask=live)


@triton.jit(do_not_specialize=["n_rows", "capacity"])
def _encode_exactly_kernel(
    x_ptr,
    stride_x,
    W_ptr,
    stride_W,
    bias_ptr,
    n_rows,
    n_latents,
    depth,
    k_ptr,
    slab_ptr,
    n_slab,
    keys_ptr,
    columns_ptr,
    capacity,
    counts_ptr,
    bars_ptr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Lists of exact candidates for the rows that failed; programs without such a row end at once."""
    first_row = tl.program_id(0) * ROWS
    row = first_row + tl.arange(0, ROWS)
    failed = tl.load(bars_ptr + row, mask=row < n_rows, other=0) == FAILED
    # Warps hold copies of these: none may write before all have read.
    tl.debug_barrier()
    if tl.max(failed.to(tl.int32), 0) > 0:
        tl.store(counts_ptr + row, 0, mask=failed)
        tl.store(bars_ptr + row, 1, mask=failed)
        x_rows = x_ptr + row.to(tl.int64)[:, None] * stride_x
        slab_rows = slab_ptr + row.to(tl.int64)[:, None] * n_slab
        for first in range(0, n_latents, n_slab):
            n = tl.minimum(n_slab, n_latents - first)
            for start in range(0, n, BLOCK_N):
                column = start + tl.arange(0, BLOCK_N)
                W_rows = W_ptr + (first + column).to(tl.int64)[None, :] * stride_W
                scores = exact_scores(x_rows, failed, W_rows, column < n, depth, ROWS, BLOCK_N, BLOCK_D)
                tl.store(slab_rows + column[None, :], scores, mask=failed[:, None] & (column < n)[None, :])
            tl.debug_barrier()
            bias_slab_ptr = bias_ptr
            if HAS_BIAS:
                bias_slab_ptr = bias_ptr + first
            for r in range(ROWS):
                if tl.sum((failed & (row == first_row + r)).to(tl.int32), 0) > 0:
                    here = (first_row + r).to(tl.int64)
                    k = tl.load(k_ptr + here)
                    if k > 0:
                        count, bar = filter_row(
                            slab_ptr + here * n_slab,
                            n,
                            first,
                            bias_slab_ptr,
                            k,
                            keys_ptr + here * capacity,
                            keys_ptr,
                            columns_ptr + here * capacity,
                            capacity,
                            tl.load(counts_ptr + here),
                            tl.load(bars_ptr + here),
                            0.0,
                            0.0,
                            keys_ptr,
                            keys_ptr,
                            0.0,
                            HAS_BIAS,
                            SCREEN=False,
                            BLOCK=BLOCK,
                        )
                        tl.store(counts_ptr + here, count)
                        tl.store(bars_ptr + here, bar)
            tl.debug_barrier()


@triton.jit
def exact_scores(x_rows, live, W_rows, inside, depth, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """`[ROWS, BLOCK_N]` products in fp32 arithmetic, in chains of 4 BLOCK_D terms: one chain of all D would lose more
    than the contract allows where every rounding goes the same way."""
    total = tl.zeros([ROWS, BLOCK_N], dtype=tl.float32)
    for chain in range(0, depth, 4 * BLOCK_D):
        part = tl.zeros([ROWS, BLOCK_N], dtype=tl.float32)
        for start in range(chain, chain + 4 * BLOCK_D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            x = tl.load(x_rows + d[None, :], mask=live[:, None] & (d < depth)[None, :], other=0.0)
            W = tl.load(W_rows + d[:, None], mask=(d < depth)[:, None] & inside[None, :], other=0.0)
            part = tl.dot(x, W, part, input_precision="ieee")
        total += part
    return total
