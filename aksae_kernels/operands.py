"""What every backend of kernels does to its arguments before, and to its results after."""

from __future__ import annotations

import torch
from torch import Tensor

from .codes import MAX_LATENTS, SparseCodes, acc_dtype, gather_at, live_slots
from .ordering import best_first


def rows(matrix: Tensor) -> Tensor:
    """The matrix itself where its rows are contiguous, else a copy: kernels take one stride, that of the rows."""
    if matrix.stride(1) == 1 or matrix.shape[1] <= 1:
        return matrix
    # Not `contiguous`, which leaves an expanded matrix without rows as it is, with a stride of 0.
    return matrix.clone(memory_format=torch.contiguous_format)


def vector(bias: Tensor | None) -> Tensor | None:
    """The bias, contiguous."""
    return None if bias is None else bias.contiguous()


def empty_codes(data: Tensor, width: int, dtype: torch.dtype | None = None) -> SparseCodes:
    """Codes for a selection from the rows of `data`, to be written by a kernel; `dtype` None is that of the data."""
    n_rows = data.shape[0]
    return SparseCodes(
        data.new_empty(n_rows, width, dtype=dtype),
        data.new_empty(n_rows, width, dtype=torch.int32),
        data.new_empty(n_rows, dtype=torch.int32),
    )


def whole_rows(data: Tensor, width: int) -> Tensor:
    """The k of rows that are to be filled: `[B]` int32."""
    return torch.full((data.shape[0],), width, dtype=torch.int32, device=data.device)


def among(candidates: SparseCodes, chosen: SparseCodes, dtype: torch.dtype) -> SparseCodes:
    """What `chosen`, codes whose indices are slots of the candidates, stands for; values rounded to `dtype`."""
    slots = torch.where(chosen.indices < 0, 0, chosen.indices).long()
    indices = torch.where(chosen.indices < 0, -1, candidates.indices.gather(1, slots))
    return SparseCodes(chosen.values.to(dtype), indices, chosen.counts)


def above(candidates: SparseCodes, limit: Tensor) -> Tensor:
    """The values of the candidates `[B, K]`, 0 where they are `<=` their limit of the `[F]` limits."""
    return torch.where(candidates.values <= gather_at(limit, *candidates[1:]), 0, candidates.values)


def visiting_order(candidates: SparseCodes) -> tuple[Tensor, Tensor]:
    """The slots of candidates `[B, K]` by index, and in the order in which `price_select` visits them: larger values
    first, NaN before all, ties by smaller index. Padding is last in both."""
    live = live_slots(candidates)
    by_index = torch.where(live, candidates.indices, MAX_LATENTS).argsort(dim=-1, stable=True)
    values = torch.where(live, candidates.values, -torch.inf).gather(1, by_index)
    # Ties stay in the order of their indices, and a live -inf before the padding.
    return by_index, by_index.gather(1, best_first(values))


def with_bias(dots: Tensor, indices: Tensor, counts: Tensor, b: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`dots + b[indices]` rounded to `dtype`; None for no bias. Past the counts dots are 0, and stay so."""
    return (dots if b is None else dots + gather_at(b, indices, counts)).to(dtype)


def limits(pre_acts: Tensor, threshold: Tensor, n_latents: int | None = None) -> Tensor:
    """`[F]` limits in the accumulation dtype: an entry is kept unless it is `<=` its limit.

    Rounded down, so that no entry of that dtype changes sides; at least 0; and +inf for a NaN threshold, which keeps
    nothing but NaN.
    """
    limit = threshold.to(acc_dtype(pre_acts.dtype))
    rounded_up = limit.double() > threshold.double()
    limit = torch.where(rounded_up, torch.nextafter(limit, limit.new_full((), -torch.inf)), limit)
    limit = limit.nan_to_num(nan=torch.inf, posinf=torch.inf).clamp(min=0)
    return limit.expand(pre_acts.shape[1] if n_latents is None else n_latents).contiguous()


def require_width(counts: Tensor, k_max: int, op: str) -> None:
    """Raise ValueError where a row has more than `k_max` entries; on an accelerator, assert it asynchronously."""
    if counts.device.type != "cpu":
        torch._assert_async((counts <= k_max).all(), f"{op}: k_max={k_max} is too small for a row of the batch")
    elif counts.numel() and int(counts.max()) > k_max:
        raise ValueError(f"{op}: k_max must be at least {int(counts.max())}, the active latents of a row; got {k_max}")


def exact_product(x: Tensor, W: Tensor, out: Tensor | None = None) -> Tensor:
    """`x @ W.T` in the arithmetic of its dtype, fp32 or fp64.

    With TF32, or bf16 on CPU, scores would not rank like fp32: where torch was told that it may use those, in fp64.
    """
    try:
        exact = x.dtype == torch.float64 or torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set through torch's newer, finer switches, which this call refuses to sum up
        exact = False
    if exact:
        return torch.mm(x, W.T, out=out)
    product = torch.mm(x.double(), W.double().T)
    return product.to(x.dtype) if out is None else out.copy_(product)
