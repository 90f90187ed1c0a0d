"""topk_encode: a library product in slabs, each filtered while it is in the second-level cache.

A slab holds the fp32 scores of some rows and of some latents, written by cuBLAS. A program for each row then offers
them to the row's list of candidates (`offer.py`): what cannot be among its k best is not even looked at twice. So
scores never lie in memory as `[B, F]`, no list can overflow, and no winner can be lost. Rows whose latents fit one slab
need no list that outlives it, and are selected from at once.

**16-bit inputs** are multiplied by tensor cores into fp32 accumulators: those are the scores.

**fp32 inputs** have no fast product on tensor cores. A bf16 product screens them instead: with e the error bound that
the docstring of `aksae_kernels.topk_encode` derives, candidates are the latents whose `p + b + e` reaches the k-th
largest `p + b - e`; they are multiplied again in fp32 and ranked by that. Where a row's candidates do not fit its list,
or its bound is not finite, `_encode_exactly_kernel` multiplies the whole row in fp32. Where k is so large that a screen
would exclude little, the library's fp32 product takes the place of the screen for all rows.
"""

from __future__ import annotations

import copy

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...codes import SparseCodes
from ...kept import prepared
from ...operands import above, among, empty_codes, exact_product, limits, rows, vector, whole_rows
from . import tuning
from .launch import launch, on_device_of_first
from .offer import NEAR_OVERFLOW, offer_row
from .ordering import FAILED, to_key, write_best
from .rounding import narrow, widen
from .select import batch_topk_select, list_capacity, select_rows, threshold_select
from .sparse import gather_dots

# The constants of the bound; n = D + 32 terms. See topk_encode.
_SUM_LOSS = tl.constexpr(2.0**-22)
_UNDERFLOW = tl.constexpr(2.0**-120)
_EXTRA_TERMS = tl.constexpr(32)
# Norms are taken in fp32: what their own roundings may have lost of them, and of squares below the smallest number.
_NORM_MARGIN = tl.constexpr(1 + 2.0**-10)
_NORM_FLOOR = tl.constexpr(2.0**-53)
# Longer sums would leave the norms' margin.
_SCREEN_DEPTH = 1 << 17
# Candidates a list may hold for each of the k that win: the bound lets some 2 k through. For a small k it is more.
_SCREEN_SHARE = 4
_LEAST_LISTED = 256


@on_device_of_first
def topk_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: Tensor, k_max: int) -> SparseCodes:
    codes = empty_codes(x, k_max)
    _encode(x, W_enc, b_enc, k, codes)
    return codes


@on_device_of_first
def batch_topk_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, budget: int, k_max: int) -> SparseCodes:
    candidates = _candidates(x, W_enc, b_enc, k_max)
    return among(candidates, batch_topk_select(candidates.values, budget, k_max), x.dtype)


@on_device_of_first
def threshold_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, threshold: Tensor, k_max: int) -> SparseCodes:
    candidates = _candidates(x, W_enc, b_enc, k_max)
    values = above(candidates, limits(x, threshold, len(W_enc)))
    return among(candidates, threshold_select(values, values.new_zeros(()), k_max), x.dtype)


def _candidates(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k_max: int) -> SparseCodes:
    """The best of each row, unrounded, in rows of a multiple of 16 slots: what selects from them is compiled for such
    widths alone, whatever k_max."""
    codes = empty_codes(x, triton.cdiv(k_max, 16) * 16, torch.float32)
    _encode(x, W_enc, b_enc, whole_rows(x, k_max), codes)
    return codes


def _encode(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: Tensor, codes: SparseCodes) -> None:
    """Write the k best of each row; values in the dtype that they have room for."""
    k_max = codes.indices.shape[1]
    x, W, bias, k = rows(x), rows(W_enc), vector(b_enc), k.contiguous()
    (n_rows, depth), n_latents = x.shape, W.shape[0]
    block = tuning.select(n_latents)["BLOCK"]
    listed = max(_SCREEN_SHARE * k_max, _LEAST_LISTED) + block
    # With every other latent a candidate, the screen would only come on top.
    screened = x.dtype == torch.float32 and listed < n_latents // 2 and depth <= _SCREEN_DEPTH
    capacity = listed if screened else list_capacity(k_max, block, n_latents)
    config = tuning.slab(n_rows, n_latents, depth if screened else 0, capacity)
    assert tuning.select(config.latents)["BLOCK"] == block, "lists are made for one BLOCK of all that `select` gives"
    weight = prepared(W_enc, lambda weight: _Rounded(rows(weight))) if screened else None
    for first in range(0, n_rows, config.rows):
        part = slice(first, first + config.rows)
        k_part, codes_part = k[part], SparseCodes(*(tensor[part] for tensor in codes))
        if screened:
            _encode_screened(x[part], W, bias, k_part, codes_part, config.latents, capacity, weight)
        else:
            _encode_directly(x[part], W, bias, k_part, codes_part, config.latents, capacity)


class _Lists:
    """The candidates of some rows: keys and latents in order, how many, and the key a further one must reach."""

    def __init__(self, k: Tensor, n_slab: int, capacity: int, screened: bool):
        self.k, self.capacity, self.screened = k, capacity, screened
        # For the widest slab; the same for all, so that the last one compiles nothing anew.
        self.config = tuning.select(n_slab)
        n_rows = len(k)
        self.keys, self.columns = k.new_empty(2, n_rows, capacity)
        # Upper bounds beside the lower ones.
        self.uppers = torch.empty_like(self.keys) if screened else None
        self.counts = torch.zeros_like(k)
        self.bars = torch.ones_like(k)
        # Of a slab: maxima of groups, those of lower bounds, and the groups that are looked at again.
        self.n_groups = triton.cdiv(n_slab, self.config["GROUP"])
        self.maxima, self.groups = k.new_empty(2, n_rows, self.n_groups)
        self.lower_maxima = torch.empty_like(self.maxima) if screened else None

    def offer(
        self,
        slab: Tensor,
        first: int,
        n_latents: int,
        bias: Tensor | None,
        x: _Rounded | None = None,
        tile: _Rounded | None = None,
    ) -> None:
        """Take the candidates of a slab; a screened one comes with what was rounded of its operands."""
        n = min(slab.shape[1], n_latents - first)
        bound = (None,) * 5
        if self.screened:
            bound = (x.norms, x.residual_norms, tile.norms, tile.residual_norms, x.matrix.shape[1])
        launch(
            _offer_kernel,
            (len(self.k),),
            slab,
            slab.stride(0),
            n,
            first,
            int(first + n == n_latents),
            None if bias is None else bias[first : first + n],
            self.k,
            self.maxima,
            self.lower_maxima,
            self.groups,
            self.n_groups,
            self.keys,
            self.uppers,
            self.columns,
            self.capacity,
            self.counts,
            self.bars,
            *bound,
            HAS_BIAS=bias is not None,
            SCREEN=self.screened,
            **self.config.meta,
        )

    def write_best(self, codes: SparseCodes) -> None:
        launch(
            _finish_kernel,
            (len(self.k),),
            self.k,
            self.keys,
            self.columns,
            self.capacity,
            self.counts,
            *codes,
            codes.indices.shape[1],
            **tuning.scan().meta,
        )


class _Rounded:
    """Rows of an fp32 matrix in bf16, their norms, and the norms of what the rounding took, each bounded from above;
    0 for rows of zeros."""

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


def _encode_directly(
    x: Tensor, W: Tensor, bias: Tensor | None, k: Tensor, codes: SparseCodes, n_slab: int, capacity: int
) -> None:
    n_latents = len(W)
    slab = torch.empty(len(x), n_slab, dtype=torch.float32, device=x.device)
    if n_slab >= n_latents:
        _product(x, W, slab)
        select_rows(slab[:, :n_latents], bias, k, codes)
        return
    lists = _Lists(k, n_slab, capacity, screened=False)
    for first in range(0, n_latents, n_slab):
        _product(x, W[first : first + n_slab], slab)
        lists.offer(slab, first, n_latents, bias)
    lists.write_best(codes)


def _encode_screened(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    k: Tensor,
    codes: SparseCodes,
    n_slab: int,
    capacity: int,
    weight: _Rounded | None,
) -> None:
    """`weight` is what was kept of W, where it was."""
    n_latents, depth = W.shape
    slab = torch.empty(len(x), n_slab, dtype=torch.float32, device=x.device)
    lists = _Lists(k, n_slab, capacity, screened=True)
    rounded = _Rounded(x)
    for first in range(0, n_latents, n_slab):
        # A tile is gone before the next one is rounded.
        _screen(rounded, W, weight, slab, first, bias, lists)
    gather = tuning.gather(n_latents, depth, W.element_size())
    slice_width = tuning.slice_width(n_latents, depth, W.element_size(), gather["BLOCK_D"])
    # Once at least: without columns a score is the bias.
    for first in range(0, max(depth, 1), slice_width):
        launch(
            _rescore_kernel,
            (len(x), triton.cdiv(capacity, tuning.ENTRIES)),
            x,
            x.stride(0),
            W,
            W.stride(0),
            bias,
            first,
            min(first + slice_width, depth),
            depth,
            lists.keys,
            lists.columns,
            capacity,
            lists.counts,
            HAS_BIAS=bias is not None,
            ENTRIES=tuning.ENTRIES,
            **gather.meta,
        )
    exact = tuning.exact(n_slab)
    launch(
        _encode_exactly_kernel,
        (triton.cdiv(len(x), exact["ROWS"]),),
        x,
        x.stride(0),
        W,
        W.stride(0),
        bias,
        len(x),
        n_latents,
        depth,
        k,
        slab,
        n_slab,
        lists.maxima,
        lists.groups,
        lists.n_groups,
        lists.keys,
        lists.columns,
        capacity,
        lists.counts,
        lists.bars,
        HAS_BIAS=bias is not None,
        **exact.meta,
    )
    lists.write_best(codes)


def _screen(
    x: _Rounded, W: Tensor, weight: _Rounded | None, slab: Tensor, first: int, bias: Tensor | None, lists: _Lists
) -> None:
    part = slice(first, first + slab.shape[1])
    tile = _Rounded(W[part]) if weight is None else weight[part]
    _product(x.matrix, tile.matrix, slab)
    lists.offer(slab, first, len(W), bias, x, tile)


def _product(x: Tensor, W: Tensor, slab: Tensor) -> None:
    """`slab[:, :len(W)] = x @ W.T` with an fp32 result; products of 16-bit numbers are exact in fp32."""
    out = slab[:, : len(W)]
    if x.dtype != torch.float32 and x.is_cuda and torch.version.hip is None:
        torch.mm(x, W.T, out_dtype=torch.float32, out=out)
    else:
        # No mixed product there.
        exact_product(x.float(), W.float(), out)


@triton.jit(do_not_specialize=["first", "last", "n_groups", "capacity"])
def _offer_kernel(
    slab_ptr,
    stride_slab,
    n,
    first,
    last,
    bias_ptr,
    k_ptr,
    maxima_ptr,
    lower_maxima_ptr,
    groups_ptr,
    n_groups,
    keys_ptr,
    uppers_ptr,
    columns_ptr,
    capacity,
    counts_ptr,
    bars_ptr,
    x_norms_ptr,
    x_residual_norms_ptr,
    norms_ptr,
    residual_norms_ptr,
    depth,
    HAS_BIAS: tl.constexpr,
    SCREEN: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    k = tl.load(k_ptr + row)
    count = tl.load(counts_ptr + row)
    bar = tl.load(bars_ptr + row)
    slope = 0.0
    residual_slope = 0.0
    floor = 0.0
    if SCREEN:
        uppers_ptr += row * capacity
        lower_maxima_ptr += row * n_groups
        norm = tl.load(x_norms_ptr + row)
        residual = tl.load(x_residual_norms_ptr + row)
        terms = tl.cast(depth + _EXTRA_TERMS, tl.float32)
        slope = residual + terms * _SUM_LOSS * norm
        # The norm of the rounded row is at most that.
        residual_slope = norm + residual
        # Nothing underflows in a row of zeros.
        floor = tl.where(norm > 0, terms * _UNDERFLOW, 0.0)
        if ~(slope + residual_slope < NEAR_OVERFLOW):
            bar = FAILED
    if (k > 0) & (bar < FAILED):
        count, bar = offer_row(
            slab_ptr + row * stride_slab,
            n,
            first,
            last,
            bias_ptr,
            k,
            maxima_ptr + row * n_groups,
            lower_maxima_ptr,
            groups_ptr + row * n_groups,
            keys_ptr + row * capacity,
            uppers_ptr,
            columns_ptr + row * capacity,
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
            GROUP,
            BLOCK,
        )
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
    nonzero = tl.zeros([ROWS, BLOCK], dtype=tl.int32)
    for start in range(0, depth, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = (row < n_rows)[:, None] & (column < depth)[None, :]
        number = tl.load(matrix_ptr + row[:, None] * stride_matrix + column[None, :], mask=inside, other=0.0)
        rounded = narrow(number, tl.bfloat16)
        tl.store(rounded_ptr + row[:, None] * depth + column[None, :], rounded, mask=inside)
        residual = number - widen(rounded)
        squares += number * number
        residual_squares += residual * residual
        nonzero |= (number != 0).to(tl.int32)
    norm = tl.sqrt(tl.sum(squares, 1)) * _NORM_MARGIN + _NORM_FLOOR
    residual_norm = tl.sqrt(tl.sum(residual_squares, 1)) * _NORM_MARGIN + _NORM_FLOOR
    some = tl.max(nonzero, 1) > 0
    tl.store(norms_ptr + row, tl.where(some, norm, 0.0), mask=row < n_rows)
    tl.store(residual_norms_ptr + row, tl.where(some, residual_norm, 0.0), mask=row < n_rows)


@triton.jit(do_not_specialize=["capacity"])
def _rescore_kernel(
    x_ptr,
    stride_x,
    W_ptr,
    stride_W,
    bias_ptr,
    first,
    last,
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
    """The fp32 scores of the candidates, in the place of their lower bounds: by slices of columns, whose sums so far
    stand there as they are; the last slice makes keys of them."""
    row = tl.program_id(0).to(tl.int64)
    keys_ptr += row * capacity
    columns_ptr += row * capacity
    count = tl.load(counts_ptr + row)
    n_before = tl.where(first > 0, count, 0)
    n_biased = tl.where(last == depth, count, 0)
    begin = tl.program_id(1) * ENTRIES
    for start in range(begin, tl.minimum(begin + ENTRIES, count), BLOCK_K):
        entry = start + tl.arange(0, BLOCK_K)
        live = entry < count
        latent = tl.load(columns_ptr + entry, mask=live, other=0)
        score = gather_dots(latent, live, W_ptr, stride_W, x_ptr + row * stride_x, first, last, BLOCK_K, BLOCK_D)
        before = tl.load(keys_ptr + entry, mask=entry < n_before, other=0)
        score += before.to(tl.float32, bitcast=True)
        if HAS_BIAS:
            score += tl.load(bias_ptr + latent, mask=entry < n_biased, other=0.0)
        tl.store(keys_ptr + entry, tl.where(last == depth, to_key(score), score.to(tl.int32, bitcast=True)), mask=live)


@triton.jit(do_not_specialize=["n_rows", "n_groups", "capacity"])
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
    maxima_ptr,
    groups_ptr,
    n_groups,
    keys_ptr,
    columns_ptr,
    capacity,
    counts_ptr,
    bars_ptr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
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
                here = (first_row + r).to(tl.int64)
                if tl.sum((failed & (row == first_row + r)).to(tl.int32), 0) > 0:
                    k = tl.load(k_ptr + here)
                    if k > 0:
                        count, bar = offer_row(
                            slab_ptr + here * n_slab,
                            n,
                            first,
                            first + n == n_latents,
                            bias_slab_ptr,
                            k,
                            maxima_ptr + here * n_groups,
                            None,
                            groups_ptr + here * n_groups,
                            keys_ptr + here * capacity,
                            None,
                            columns_ptr + here * capacity,
                            capacity,
                            tl.load(counts_ptr + here),
                            tl.load(bars_ptr + here),
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
