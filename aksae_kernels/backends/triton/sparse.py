"""Sparse products: sparse_decode, decode_mse, sparse_value_grad, sparse_weight_grad, scatter_codes.

All of them gather rows of a dense matrix, and gathers are bound by the second-level cache. So they go through the
columns slice by slice, a slice being what keeps its part of the gathered matrix in that cache, and slices are the
slowest dimension of a grid, or launches that follow each other where a result adds up over slices.

**Weight gradients** are latent-major: a stable counting sort of all stored entries by latent (CSR to CSC) puts the rows
that latent f is active in next to each other, in ascending order, and one program sums them and writes row f once,
zeros included. Atomics hand out places, never add numbers, and the places are put in order afterwards. A latent with
many entries is summed in pieces by programs of their own, and the pieces are added in order.

Sums have two levels at least (blocks by a tree, runs of blocks one after the other, runs one after the other), so that
thousands of terms of one sign lose no more than a dense product does. Every order is fixed: results repeat bit by bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...codes import check_codes
from ...operands import rows, vector, with_bias
from . import tuning
from .launch import launch, on_device_of_first
from .rounding import narrow, widen

# Blocks that are summed one after the other before their sum joins the total.
_RUN = tl.constexpr(16)
# Entries of the sort by latent that one program puts in order at a time, and programs that share them.
_ORDERED = 64
_ORDER_PROGRAMS = 4096


@on_device_of_first
def sparse_decode(values: Tensor, indices: Tensor, counts: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    check_codes(indices, counts, W.shape[0])
    n_rows, width = values.shape
    n_latents, d_in = W.shape
    W = rows(W)
    y = values.new_empty(n_rows, d_in)
    config = tuning.gather(n_latents, d_in, W.element_size())
    launch(
        _decode_kernel,
        (n_rows, triton.cdiv(d_in, config["BLOCK_D"])),
        values.contiguous(),
        indices.contiguous(),
        counts.contiguous(),
        width,
        W,
        W.stride(0),
        vector(b),
        y,
        d_in,
        HAS_BIAS=b is not None,
        **config.meta,
    )
    return y


@on_device_of_first
def decode_mse(
    values: Tensor,
    indices: Tensor,
    counts: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    target: Tensor,
    residual: bool,
    value_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check_codes(indices, counts, W_dec.shape[0])
    n_rows, width = values.shape
    n_latents, d_in = W_dec.shape
    values, indices, counts = values.contiguous(), indices.contiguous(), counts.contiguous()
    W, target, bias = rows(W_dec), rows(target), vector(b_dec)
    loss = torch.zeros(n_rows, dtype=torch.float32, device=values.device)
    error = loss.new_empty(target.shape if residual else (0, 0))
    dots = loss.new_zeros(values.shape if value_grad else (0, 0))
    config = tuning.gather(n_latents, d_in, W.element_size())
    # Slices add to the loss and to the dots in turn: a launch each.
    for first in range(0, d_in, config["BLOCK_D"]):
        launch(
            _decode_mse_kernel,
            (n_rows,),
            values,
            indices,
            counts,
            width,
            W,
            W.stride(0),
            bias,
            target,
            target.stride(0),
            loss,
            error,
            dots,
            first,
            d_in,
            HAS_BIAS=bias is not None,
            RESIDUAL=residual,
            VALUE_GRAD=value_grad,
            **config.meta,
        )
    return loss, error, dots


@on_device_of_first
def sparse_value_grad(grad: Tensor, indices: Tensor, counts: Tensor, W: Tensor) -> Tensor:
    return _dots(grad, indices, counts, W, grad.dtype).to(grad.dtype)


@on_device_of_first
def sparse_encode(x: Tensor, indices: Tensor, counts: Tensor, W_enc: Tensor, b_enc: Tensor | None) -> Tensor:
    dots = _dots(x, indices, counts, W_enc, x.dtype if b_enc is None else torch.float32)
    return with_bias(dots, indices, counts, b_enc, x.dtype)


def _dots(grad: Tensor, indices: Tensor, counts: Tensor, W: Tensor, dtype: torch.dtype) -> Tensor:
    """The dots in `dtype` or, where they are added up in several launches, in fp32."""
    check_codes(indices, counts, W.shape[0])
    n_rows, width = indices.shape
    n_latents, d_in = W.shape
    grad, W = rows(grad), rows(W)
    indices, counts = indices.contiguous(), counts.contiguous()
    config = tuning.gather(n_latents, d_in, W.element_size())
    slice_width = tuning.slice_width(n_latents, d_in, W.element_size(), config["BLOCK_D"])
    # Slices add to the dots in turn; a single one may round them at once.
    one_slice = d_in <= slice_width
    dots = torch.zeros(n_rows, width, dtype=dtype if one_slice else torch.float32, device=grad.device)
    for first in range(0, d_in, slice_width):
        launch(
            _value_grad_kernel,
            (n_rows, triton.cdiv(width, tuning.ENTRIES)),
            grad,
            grad.stride(0),
            indices,
            counts,
            width,
            W,
            W.stride(0),
            dots,
            first,
            min(first + slice_width, d_in),
            ENTRIES=tuning.ENTRIES,
            **config.meta,
        )
    return dots


@on_device_of_first
def sparse_weight_grad(
    values: Tensor, indices: Tensor, counts: Tensor, dense: Tensor, d_sae: int, sums: bool
) -> tuple[Tensor, Tensor]:
    check_codes(indices, counts, d_sae)
    n_rows, width = values.shape
    d_in = dense.shape[1]
    grad = values.new_empty(d_sae, d_in)
    total = values.new_empty(d_sae if sums else 0)
    if not d_sae:
        return grad, total
    dense = rows(dense)
    order, offsets, hits = by_latent(indices, counts, d_sae)
    config = tuning.weight_grad(n_rows, d_in, dense.element_size())
    # One slice at least: the sums are wanted of a matrix without columns too.
    n_slices = max(1, triton.cdiv(d_in, config["BLOCK_D"]))
    # Latents of more than `long` entries have fewer than twice as many pieces as they have `long` entries.
    long = tuning.piece(n_rows * width)
    n_pieces = 2 * (n_rows * width // long)
    ends = torch.where(hits > long, (hits + (long - 1)) // long, 0).cumsum(0)
    partial = torch.empty(n_pieces, d_in, dtype=torch.float32, device=dense.device)
    partial_sums = torch.empty(n_pieces if sums else 0, dtype=torch.float64, device=dense.device)
    operands = (values.contiguous(), order, offsets, width, dense, dense.stride(0), d_in)
    parts = (long, ends, partial, partial_sums)
    meta = {"SUMS": sums, **config.meta}
    launch(_long_latents_kernel, (n_pieces, n_slices), *operands, *parts, d_sae, **meta)
    launch(_weight_grad_kernel, (d_sae, n_slices), *operands, *parts, grad, total, **meta)
    return grad, total


@on_device_of_first
def scatter_codes(values: Tensor, indices: Tensor, counts: Tensor, d_sae: int) -> Tensor:
    """Dense rows of codes. Indices of a row are distinct, as those of every selection are."""
    check_codes(indices, counts, d_sae)
    n_rows, width = values.shape
    dense = values.new_zeros(n_rows, d_sae)
    launch(
        _scatter_kernel,
        (n_rows, triton.cdiv(width, tuning.ENTRIES)),
        values.contiguous(),
        indices.contiguous(),
        counts.contiguous(),
        width,
        dense,
        d_sae,
        ENTRIES=tuning.ENTRIES,
        num_warps=1,
    )
    return dense


def by_latent(indices: Tensor, counts: Tensor, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    """CSR to CSC: all entries `row << 32 | j` by latent, then by row and slot; where those of each latent begin,
    `[F + 1]`; and how many there are, `[F]`.

    Its time follows the number of entries. Its result is that of a stable sort, whatever the order of the atomics.
    """
    n_rows, width = indices.shape
    indices, counts = indices.contiguous(), counts.contiguous()
    hits, taken = torch.zeros(2, d_sae, dtype=torch.int32, device=indices.device)
    offsets = torch.zeros(d_sae + 1, dtype=torch.int64, device=indices.device)
    placed, order = torch.empty(2, n_rows * width, dtype=torch.int64, device=indices.device)
    launch(_count_hits_kernel, (n_rows,), indices, counts, width, hits, BLOCK=tuning.ENTRIES, num_warps=1)
    torch.cumsum(hits, 0, out=offsets[1:])
    launch(_place_kernel, (n_rows,), indices, counts, width, offsets, taken, placed, BLOCK=tuning.ENTRIES, num_warps=1)
    n_blocks = min(triton.cdiv(n_rows * width, _ORDERED), _ORDER_PROGRAMS)
    launch(
        _order_kernel,
        (n_blocks,),
        placed,
        indices,
        width,
        offsets,
        d_sae,
        order,
        BLOCK=_ORDERED,
        OTHERS=32,
        num_warps=8,
    )
    return order, offsets, hits


@triton.jit
def gather_sum(
    values_ptr,
    index_ptr,
    begin,
    end,
    width,
    matrix_ptr,
    stride_matrix,
    column,
    inside,
    TRANSPOSED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`sum of values[e] * matrix[index[e], column]` over entries e in [begin, end), in fp32.

    TRANSPOSED: `index[e]` is `row << 32 | j`, and the value that of slot j of the row.
    """
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    for run in range(begin, end, BLOCK_K * _RUN):
        # Sums over the blocks of a run are held apart for each place in a block, and added up once.
        run_total = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
        for start in range(run, tl.minimum(run + BLOCK_K * _RUN, end), BLOCK_K):
            entry = start + tl.arange(0, BLOCK_K)
            live = entry < end
            index = tl.load(index_ptr + entry, mask=live, other=0)
            if TRANSPOSED:
                row = index >> 32
                value = tl.load(values_ptr + row * width + (index & 0xFFFFFFFF), mask=live, other=0.0)
            else:
                row = index.to(tl.int64)
                value = tl.load(values_ptr + entry, mask=live, other=0.0)
            piece = tl.load(
                matrix_ptr + row[:, None] * stride_matrix + column[None, :],
                mask=live[:, None] & inside[None, :],
                other=0.0,
            )
            run_total += value.to(tl.float32)[:, None] * piece.to(tl.float32)
        total += tl.sum(run_total, 0)
    return total


@triton.jit
def gather_dots(index, live, W_ptr, stride_W, vector_ptr, first, last, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    """`<W[index], vector>` over columns [first, last), in fp32; 0 for entries that are not live."""
    products = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
    for start in range(first, last, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        inside = column < last
        vector = tl.load(vector_ptr + column, mask=inside, other=0.0).to(tl.float32)
        products += piece_products(index, live, W_ptr, stride_W, column, inside, vector)
    return tl.where(live, tl.sum(products, 1), 0.0)


@triton.jit
def piece_products(index, live, W_ptr, stride_W, column, inside, vector):
    """One slice of `gather_dots`, not yet summed, with the slice of the vector at hand."""
    piece = tl.load(
        W_ptr + index.to(tl.int64)[:, None] * stride_W + column[None, :],
        mask=live[:, None] & inside[None, :],
        other=0.0,
    )
    return piece.to(tl.float32) * vector[None, :]


@triton.jit
def decoded(
    values_ptr,
    indices_ptr,
    count,
    W_ptr,
    stride_W,
    bias_ptr,
    column,
    inside,
    HAS_BIAS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One slice of a decoded row, in fp32."""
    y = gather_sum(
        values_ptr, indices_ptr, 0, count, 0, W_ptr, stride_W, column, inside, False, BLOCK_K=BLOCK_K, BLOCK_D=BLOCK_D
    )
    if HAS_BIAS:
        y += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    return y


@triton.jit(do_not_specialize=["width"])
def _decode_kernel(
    values_ptr,
    indices_ptr,
    counts_ptr,
    width,
    W_ptr,
    stride_W,
    bias_ptr,
    y_ptr,
    d_in,
    HAS_BIAS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < d_in
    slots = row * width
    count = tl.load(counts_ptr + row)
    y = decoded(
        values_ptr + slots,
        indices_ptr + slots,
        count,
        W_ptr,
        stride_W,
        bias_ptr,
        column,
        inside,
        HAS_BIAS,
        BLOCK_K,
        BLOCK_D,
    )
    tl.store(y_ptr + row * d_in + column, narrow(y, y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["width"])
def _decode_mse_kernel(
    values_ptr,
    indices_ptr,
    counts_ptr,
    width,
    W_ptr,
    stride_W,
    bias_ptr,
    target_ptr,
    stride_target,
    loss_ptr,
    error_ptr,
    dots_ptr,
    first,
    d_in,
    HAS_BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    VALUE_GRAD: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One row of one slice: decode, residual, its part of the loss, its product with the rows of W just gathered."""
    row = tl.program_id(0).to(tl.int64)
    column = first + tl.arange(0, BLOCK_D)
    inside = column < d_in
    slots = row * width
    count = tl.load(counts_ptr + row)
    error = decoded(
        values_ptr + slots,
        indices_ptr + slots,
        count,
        W_ptr,
        stride_W,
        bias_ptr,
        column,
        inside,
        HAS_BIAS,
        BLOCK_K,
        BLOCK_D,
    )
    error -= tl.load(target_ptr + row * stride_target + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(loss_ptr + row, tl.load(loss_ptr + row) + tl.sum(error * error, 0))
    if RESIDUAL:
        tl.store(error_ptr + row * d_in + column, error, mask=inside)
    if VALUE_GRAD:
        for start in range(0, count, BLOCK_K):
            entry = start + tl.arange(0, BLOCK_K)
            live = entry < count
            index = tl.load(indices_ptr + slots + entry, mask=live, other=0)
            dots = tl.sum(piece_products(index, live, W_ptr, stride_W, column, inside, error), 1)
            before = tl.load(dots_ptr + slots + entry, mask=live, other=0.0)
            tl.store(dots_ptr + slots + entry, before + dots, mask=live)


@triton.jit(do_not_specialize=["width"])
def _value_grad_kernel(
    grad_ptr,
    stride_grad,
    indices_ptr,
    counts_ptr,
    width,
    W_ptr,
    stride_W,
    dots_ptr,
    first,
    last,
    ENTRIES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slots = row * width
    count = tl.load(counts_ptr + row)
    begin = tl.program_id(1) * ENTRIES
    for start in range(begin, tl.minimum(begin + ENTRIES, count), BLOCK_K):
        entry = start + tl.arange(0, BLOCK_K)
        live = entry < count
        index = tl.load(indices_ptr + slots + entry, mask=live, other=0)
        dots = gather_dots(index, live, W_ptr, stride_W, grad_ptr + row * stride_grad, first, last, BLOCK_K, BLOCK_D)
        # Only sums in fp32 go through memory: with slices to come the dots are no narrower.
        dots += widen(tl.load(dots_ptr + slots + entry, mask=live, other=0.0))
        tl.store(dots_ptr + slots + entry, narrow(dots, dots_ptr.dtype.element_ty), mask=live)


@triton.jit
def sum_values(values_ptr, width, order_ptr, begin, end, BLOCK: tl.constexpr):
    """The values of entries [begin, end) alone, in fp64: a bias's gradient, which nothing else averages out."""
    total = tl.zeros([BLOCK], dtype=tl.float64)
    for start in range(begin, end, BLOCK):
        place = start + tl.arange(0, BLOCK)
        entry = tl.load(order_ptr + place, mask=place < end, other=0)
        slot = (entry >> 32) * width + (entry & 0xFFFFFFFF)
        total += tl.load(values_ptr + slot, mask=place < end, other=0.0).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["width"])
def _count_hits_kernel(indices_ptr, counts_ptr, width, hits_ptr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(counts_ptr + row)
    for start in range(0, count, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        latent = tl.load(indices_ptr + row * width + slot, mask=slot < count, other=0)
        tl.atomic_add(hits_ptr + latent, 1, mask=slot < count, sem="relaxed")


@triton.jit(do_not_specialize=["width"])
def _place_kernel(indices_ptr, counts_ptr, width, offsets_ptr, taken_ptr, placed_ptr, BLOCK: tl.constexpr):
    """Every entry among those of its latent, at whatever place is free."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(counts_ptr + row)
    for start in range(0, count, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        live = slot < count
        latent = tl.load(indices_ptr + row * width + slot, mask=live, other=0)
        place = tl.load(offsets_ptr + latent, mask=live, other=0)
        place += tl.atomic_add(taken_ptr + latent, 1, mask=live, sem="relaxed")
        tl.store(placed_ptr + place, (row << 32) | slot.to(tl.int64), mask=live)


@triton.jit(do_not_specialize=["width", "n_latents"])
def _order_kernel(
    placed_ptr, indices_ptr, width, offsets_ptr, n_latents, order_ptr, BLOCK: tl.constexpr, OTHERS: tl.constexpr
):
    """Each entry to the place that its rank among those of its latent gives it: as many of them as are smaller."""
    n_entries = tl.load(offsets_ptr + n_latents)
    stride = tl.num_programs(0).to(tl.int64) * BLOCK
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n_entries, stride):
        place = start + tl.arange(0, BLOCK)
        live = place < n_entries
        entry = tl.load(placed_ptr + place, mask=live, other=0)
        latent = tl.load(indices_ptr + (entry >> 32) * width + (entry & 0xFFFFFFFF), mask=live, other=0)
        begin = tl.load(offsets_ptr + latent, mask=live, other=0)
        n = tl.load(offsets_ptr + latent + 1, mask=live, other=0) - begin
        rank = tl.zeros([BLOCK], dtype=tl.int32)
        for first in range(0, tl.max(n, 0), OTHERS):
            nth = first + tl.arange(0, OTHERS)
            among = nth[None, :] < n[:, None]
            other = tl.load(placed_ptr + begin[:, None] + nth[None, :], mask=among, other=0)
            rank += tl.sum((among & (other < entry[:, None])).to(tl.int32), 1)
        tl.store(order_ptr + begin + rank, entry, mask=live)


@triton.jit(do_not_specialize=["width", "long", "n_latents"])
def _long_latents_kernel(
    values_ptr,
    order_ptr,
    offsets_ptr,
    width,
    dense_ptr,
    stride_dense,
    d_in,
    long,
    ends_ptr,
    partial_ptr,
    partial_sums_ptr,
    n_latents,
    SUMS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One piece of a latent with more than `long` entries; pieces of all such latents are counted through."""
    piece = tl.program_id(0).to(tl.int64)
    if piece < tl.load(ends_ptr + n_latents - 1):
        # The first latent whose pieces end behind this one.
        latent = n_latents * 0
        above = n_latents
        while latent < above:
            middle = latent + (above - latent) // 2
            if tl.load(ends_ptr + middle) > piece:
                above = middle
            else:
                latent = middle + 1
        first_piece = 0 * piece
        if latent > 0:
            first_piece = tl.load(ends_ptr + latent - 1)
        begin = tl.load(offsets_ptr + latent) + (piece - first_piece) * long
        end = tl.minimum(begin + long, tl.load(offsets_ptr + latent + 1))
        column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = column < d_in
        total = gather_sum(
            values_ptr,
            order_ptr,
            begin,
            end,
            width,
            dense_ptr,
            stride_dense,
            column,
            inside,
            TRANSPOSED=True,
            BLOCK_K=BLOCK_K,
            BLOCK_D=BLOCK_D,
        )
        tl.store(partial_ptr + piece * d_in + column, total, mask=inside)
        if SUMS and tl.program_id(1) == 0:
            tl.store(partial_sums_ptr + piece, sum_values(values_ptr, width, order_ptr, begin, end, BLOCK_D))


@triton.jit(do_not_specialize=["width", "long"])
def _weight_grad_kernel(
    values_ptr,
    order_ptr,
    offsets_ptr,
    width,
    dense_ptr,
    stride_dense,
    d_in,
    long,
    ends_ptr,
    partial_ptr,
    partial_sums_ptr,
    grad_ptr,
    sums_ptr,
    SUMS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One latent of one slice: the sum of its entries, or of the pieces that `_long_latents_kernel` left."""
    latent = tl.program_id(0).to(tl.int64)
    begin = tl.load(offsets_ptr + latent)
    end = tl.load(offsets_ptr + latent + 1)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < d_in
    if end - begin <= long:
        total = gather_sum(
            values_ptr,
            order_ptr,
            begin,
            end,
            width,
            dense_ptr,
            stride_dense,
            column,
            inside,
            TRANSPOSED=True,
            BLOCK_K=BLOCK_K,
            BLOCK_D=BLOCK_D,
        )
    else:
        total = tl.zeros([BLOCK_D], dtype=tl.float32)
        last_piece = tl.load(ends_ptr + latent)
        for piece in range(last_piece - tl.cdiv(end - begin, long), last_piece):
            total += tl.load(partial_ptr + piece * d_in + column, mask=inside, other=0.0)
    tl.store(grad_ptr + latent * d_in + column, narrow(total, grad_ptr.dtype.element_ty), mask=inside)
    if SUMS and tl.program_id(1) == 0:
        if end - begin <= long:
            sums = sum_values(values_ptr, width, order_ptr, begin, end, BLOCK_D)
        else:
            sums = tl.full([], 0.0, dtype=tl.float64)
            last_piece = tl.load(ends_ptr + latent)
            for piece in range(last_piece - tl.cdiv(end - begin, long), last_piece):
                sums += tl.load(partial_sums_ptr + piece)
        tl.store(sums_ptr + latent, narrow(sums.to(tl.float32), sums_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["width"])
def _scatter_kernel(values_ptr, indices_ptr, counts_ptr, width, dense_ptr, n_latents, ENTRIES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    entry = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)
    live = entry < tl.load(counts_ptr + row)
    value = tl.load(values_ptr + row * width + entry, mask=live, other=0.0)
    index = tl.load(indices_ptr + row * width + entry, mask=live, other=0)
    tl.store(dense_ptr + row * n_latents + index, value, mask=live)
