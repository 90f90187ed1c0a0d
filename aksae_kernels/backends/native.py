"""The `cpu` backend: the C++ kernels of `_C`, loaded when they are first needed.

The binary takes tensors with contiguous rows and writes into outputs made here. AKSAE_CPU_ISA (`baseline`, `avx2`,
`avx512`, `avx512_bf16`, `amx`; `emulated_bf16` for tests) forces an instruction set; without it the best one of the
machine is used.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..codes import SparseCodes, acc_dtype, raise_for_codes
from ..kept import prepared
from ..operands import above, among, empty_codes, limits, require_width, rows, vector, whole_rows, with_bias

_PACKAGE = Path(__file__).parent.parent
_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


@functools.cache
def unavailable() -> str | None:
    """Load the binary; the sentence says why there is none, or why it does not load."""
    binary = next(_PACKAGE.glob("_C.*so"), None)
    if binary is None:
        report = _PACKAGE / "_build_report.json"
        reason = json.loads(report.read_text()).get("aksae_kernels._C") if report.exists() else None
        return reason or "its binary _C is not there; install the package with a C++ compiler at hand to build it"
    try:
        torch.ops.load_library(binary)
        torch.ops.aksae_cpu.isa()
    except (OSError, RuntimeError) as error:
        return f"its binary {binary.name} does not load: {error}"
    return None


def refuse(op: str, tensor: Tensor) -> str | None:
    if tensor.device.type != "cpu":
        return f"it takes CPU tensors, not {tensor.device.type}"
    if tensor.dtype not in _DTYPES:
        return f"it takes float32, float64 and bfloat16, not {str(tensor.dtype).removeprefix('torch.')}"
    return None


def describe() -> str:
    return f"C++, {torch.ops.aksae_cpu.isa()}, {torch.get_num_threads()} threads"


def topk_select(pre_acts: Tensor, k: Tensor, k_max: int) -> SparseCodes:
    codes = empty_codes(pre_acts, k_max)
    torch.ops.aksae_cpu.topk_select(rows(pre_acts), k.contiguous(), *codes)
    return codes


def topk_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: Tensor, k_max: int) -> SparseCodes:
    codes = empty_codes(x, k_max)
    _encode(x, W_enc, b_enc, k.contiguous(), 0.0, codes)
    return codes


def batch_topk_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, budget: int, k_max: int) -> SparseCodes:
    # Few rows have more than twice the average; only those whose list is too short are encoded once more.
    width = min(k_max, max(1, 2 * -(-budget // max(1, len(x)))))
    candidates = _candidates(x, W_enc, b_enc, width)
    chosen = batch_topk_select(candidates.values, budget, width)
    if width < k_max:
        candidates = _widened(candidates, k_max)
        is_short = torch.ones_like(chosen.counts, dtype=torch.bool)
        # What a list has left out comes after all that it holds: it can only win where all of that has won. A list that
        # is made anew may lose to another one, as its scores are summed in an order that depends on the rows there are.
        while len(cut := (is_short & (chosen.counts == width)).nonzero().squeeze(1)):
            for whole, part in zip(candidates, _candidates(x[cut], W_enc, b_enc, k_max)):
                whole[cut] = part
            is_short[cut] = False
            chosen = batch_topk_select(candidates.values, budget, k_max)
        chosen = _widened(chosen, k_max)
    return among(candidates, chosen, x.dtype)


def threshold_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, threshold: Tensor, k_max: int) -> SparseCodes:
    limit = limits(x, threshold, len(W_enc))
    # Finite, since a bound of what may be NaN is never above infinity.
    lowest = min(float(limit.min()), torch.finfo(limit.dtype).max) if len(limit) else 0.0
    candidates = _candidates(x, W_enc, b_enc, k_max, lowest)
    if not bool((limit > lowest).any()):
        return candidates._replace(values=candidates.values.to(x.dtype))
    values = above(candidates, limit)
    return among(candidates, topk_select(values, whole_rows(x, k_max), k_max), x.dtype)


def _candidates(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k_max: int, threshold: float = 0.0) -> SparseCodes:
    """The best of each row that are above the threshold, unrounded."""
    codes = empty_codes(x, k_max, acc_dtype(x.dtype))
    _encode(x, W_enc, b_enc, whole_rows(x, k_max), threshold, codes)
    return codes


def _encode(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: Tensor, threshold: float, codes: SparseCodes) -> None:
    packed = prepared(W_enc, _pack) if x.dtype == torch.float32 else None
    operands = rows(x), rows(W_enc), vector(b_enc), *(packed or (None, None))
    torch.ops.aksae_cpu.topk_encode(*operands, k, threshold, *codes)


def batch_topk_select(pre_acts: Tensor, budget: int, k_max: int) -> SparseCodes:
    codes = empty_codes(pre_acts, k_max)
    torch.ops.aksae_cpu.batch_topk_select(rows(pre_acts), budget, *codes)
    require_width(codes.counts, k_max, "batch_topk_select")
    return codes


def threshold_select(pre_acts: Tensor, threshold: Tensor, k_max: int) -> SparseCodes:
    codes = empty_codes(pre_acts, k_max)
    torch.ops.aksae_cpu.threshold_select(rows(pre_acts), limits(pre_acts, threshold), *codes)
    require_width(codes.counts, k_max, "threshold_select")
    return codes


def sparse_decode(values: Tensor, indices: Tensor, counts: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    indices, counts = _pattern(indices, counts, W.shape[0])
    y = values.new_empty(values.shape[0], W.shape[1])
    torch.ops.aksae_cpu.sparse_decode(values.contiguous(), indices, counts, rows(W), vector(b), y)
    return y


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
    indices, counts = _pattern(indices, counts, W_dec.shape[0])
    acc = acc_dtype(values.dtype)
    loss = values.new_empty(values.shape[0], dtype=acc)
    error = values.new_empty(target.shape if residual else (0, 0), dtype=acc)
    dots = values.new_empty(values.shape if value_grad else (0, 0), dtype=acc)
    torch.ops.aksae_cpu.decode_mse(
        values.contiguous(),
        indices,
        counts,
        rows(W_dec),
        vector(b_dec),
        rows(target),
        loss,
        error if residual else None,
        dots if value_grad else None,
    )
    return loss, error, dots


def sparse_value_grad(grad: Tensor, indices: Tensor, counts: Tensor, W: Tensor) -> Tensor:
    indices, counts = _pattern(indices, counts, W.shape[0])
    out = grad.new_empty(indices.shape)
    torch.ops.aksae_cpu.sparse_value_grad(rows(grad), indices, counts, rows(W), out)
    return out


def sparse_encode(x: Tensor, indices: Tensor, counts: Tensor, W_enc: Tensor, b_enc: Tensor | None) -> Tensor:
    indices, counts = _pattern(indices, counts, W_enc.shape[0])
    dots = x.new_empty(indices.shape, dtype=acc_dtype(x.dtype) if b_enc is not None else x.dtype)
    torch.ops.aksae_cpu.sparse_value_grad(rows(x), indices, counts, rows(W_enc), dots)
    return with_bias(dots, indices, counts, b_enc, x.dtype)


def sparse_weight_grad(
    values: Tensor, indices: Tensor, counts: Tensor, dense: Tensor, d_sae: int, sums: bool
) -> tuple[Tensor, Tensor]:
    indices, counts = _pattern(indices, counts, d_sae)
    grad = values.new_empty(d_sae, dense.shape[1])
    total = values.new_empty(d_sae if sums else 0)
    torch.ops.aksae_cpu.sparse_weight_grad(
        values.contiguous(), indices, counts, rows(dense), grad, total if sums else None
    )
    return grad, total


def scatter_codes(values: Tensor, indices: Tensor, counts: Tensor, d_sae: int) -> Tensor:
    indices, counts = _pattern(indices, counts, d_sae)
    dense = values.new_empty(values.shape[0], d_sae)
    torch.ops.aksae_cpu.scatter_codes(values.contiguous(), indices, counts, dense)
    return dense


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
    indices, counts = _pattern(indices, counts, W_dec.shape[0])
    chosen = empty_codes(values, values.shape[1])
    latents = torch.empty_like(chosen.indices)
    torch.ops.aksae_cpu.price_select(
        values.contiguous(),
        indices,
        counts,
        rows(W_dec),
        vector(b_dec),
        rows(x),
        price.contiguous(),
        passes,
        *chosen,
        latents,
    )
    return *chosen, latents


def adam_step_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad_scale: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    unit_norm_rows: bool,
    lazy: bool,
) -> None:
    torch.ops.aksae_cpu.adam_step(
        param,
        grad.contiguous(),
        exp_avg,
        exp_avg_sq,
        step,
        lr,
        beta1,
        beta2,
        eps,
        float(grad_scale),
        unit_norm_rows,
        lazy,
    )
    # Autograd must notice that weights saved by an older graph are gone.
    torch.autograd.graph.increment_version((param, exp_avg, exp_avg_sq))


def _widened(codes: SparseCodes, width: int) -> SparseCodes:
    """The codes in rows of `width` slots."""
    more = width - codes.indices.shape[1]
    values, indices = (F.pad(part, (0, more), value=fill) for part, fill in ((codes.values, 0), (codes.indices, -1)))
    return SparseCodes(values, indices, codes.counts)


def _pack(W_enc: Tensor) -> tuple[Tensor, Tensor] | None:
    """`W_enc` rounded and packed for bf16 units, and norms of its rows; None where there are no such units."""
    size = torch.ops.aksae_cpu.packed_size(*W_enc.shape)
    if not size:
        return None
    panels = W_enc.new_empty(size, dtype=torch.bfloat16)
    norms = W_enc.new_empty(2, -(-W_enc.shape[0] // 32) * 32)
    torch.ops.aksae_cpu.pack_weight(rows(W_enc), panels, norms)
    return panels, norms


def _pattern(indices: Tensor, counts: Tensor, d_sae: int) -> tuple[Tensor, Tensor]:
    indices, counts = indices.contiguous(), counts.contiguous()
    bad = torch.ops.aksae_cpu.first_bad_row(indices, counts, d_sae)
    if bad >= 0:
        raise_for_codes(indices[bad : bad + 1], counts[bad : bad + 1], d_sae)
    return indices, counts
