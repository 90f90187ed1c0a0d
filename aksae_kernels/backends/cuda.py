"""The `cuda` backend: the CUDA C++ kernels of `_C_cuda`, loaded when they are first needed.

The binary takes tensors with contiguous rows and writes into outputs made here; it launches on the current stream, and
synchronises nothing. Where there is no device, the op tests run it under an emulation of CUDA on the CPU
(`tests/emulation`).
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
from torch import Tensor

from ..codes import SparseCodes
from ..operands import above, among, empty_codes, limits, require_width, rows, vector, whole_rows, with_bias

_PACKAGE = Path(__file__).parent.parent
# Of the tensors it takes; the tests' emulation of CUDA takes those of the CPU.
_DEVICE = "cuda"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST = (8, 0)


def _binary() -> Path | None:
    return next(_PACKAGE.glob("_C_cuda.*so"), None)


@functools.cache
def unavailable() -> str | None:
    """Load the binary; the sentence says why there is none, or why it does not load."""
    binary = _binary()
    if binary is None:
        report = _PACKAGE / "_build_report.json"
        reason = json.loads(report.read_text()).get("aksae_kernels._C_cuda") if report.exists() else None
        return reason or "its binary _C_cuda is not there; install the package with nvcc and a CUDA torch to build it"
    if _DEVICE == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    try:
        torch.ops.load_library(binary)
    except (OSError, RuntimeError) as error:
        return f"its binary {binary.name} does not load: {error}"
    return None


def refuse(op: str, tensor: Tensor) -> str | None:
    if op == "price_select":
        return "it has no kernel for price_select yet"
    if tensor.device.type != _DEVICE:
        return f"it takes {_DEVICE} tensors, not {tensor.device.type}"
    if tensor.dtype not in _DTYPES:
        return f"it takes float32, bfloat16 and float16, not {str(tensor.dtype).removeprefix('torch.')}"
    if _DEVICE == "cuda" and torch.cuda.get_device_capability(tensor.device) < _OLDEST:
        return "it takes GPUs of compute capability 8.0 or more"
    return None


def describe() -> str:
    return "CUDA C++"


def topk_select(pre_acts: Tensor, k: Tensor, k_max: int) -> SparseCodes:
    codes = empty_codes(pre_acts, k_max)
    torch.ops.aksae_cuda.topk_select(rows(pre_acts), k.contiguous(), *codes)
    return codes


def topk_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: Tensor, k_max: int) -> SparseCodes:
    codes = empty_codes(x, k_max)
    torch.ops.aksae_cuda.topk_encode(rows(x), rows(W_enc), vector(b_enc), k.contiguous(), *codes)
    return codes


def batch_topk_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, budget: int, k_max: int) -> SparseCodes:
    candidates = _candidates(x, W_enc, b_enc, k_max)
    return among(candidates, batch_topk_select(candidates.values, budget, k_max), x.dtype)


def threshold_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, threshold: Tensor, k_max: int) -> SparseCodes:
    candidates = _candidates(x, W_enc, b_enc, k_max)
    values = above(candidates, limits(x, threshold, len(W_enc)))
    return among(candidates, topk_select(values, whole_rows(x, k_max), k_max), x.dtype)


def _candidates(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k_max: int) -> SparseCodes:
    """The best of each row, unrounded."""
    codes = empty_codes(x, k_max, torch.float32)
    torch.ops.aksae_cuda.topk_encode(rows(x), rows(W_enc), vector(b_enc), whole_rows(x, k_max), *codes)
    return codes


def batch_topk_select(pre_acts: Tensor, budget: int, k_max: int) -> SparseCodes:
    codes = empty_codes(pre_acts, k_max)
    torch.ops.aksae_cuda.batch_topk_select(rows(pre_acts), budget, *codes)
    require_width(codes.counts, k_max, "batch_topk_select")
    return codes


def threshold_select(pre_acts: Tensor, threshold: Tensor, k_max: int) -> SparseCodes:
    codes = empty_codes(pre_acts, k_max)
    torch.ops.aksae_cuda.threshold_select(rows(pre_acts), limits(pre_acts, threshold), *codes)
    require_width(codes.counts, k_max, "threshold_select")
    return codes


def sparse_decode(values: Tensor, indices: Tensor, counts: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    y = values.new_empty(values.shape[0], W.shape[1])
    torch.ops.aksae_cuda.sparse_decode(*_codes(values, indices, counts), rows(W), vector(b), y)
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
    loss = values.new_empty(values.shape[0], dtype=torch.float32)
    error = values.new_empty(target.shape if residual else (0, 0), dtype=torch.float32)
    dots = values.new_empty(values.shape if value_grad else (0, 0), dtype=torch.float32)
    torch.ops.aksae_cuda.decode_mse(
        *_codes(values, indices, counts),
        rows(W_dec),
        vector(b_dec),
        rows(target),
        loss,
        error if residual else None,
        dots if value_grad else None,
    )
    return loss, error, dots


def sparse_value_grad(grad: Tensor, indices: Tensor, counts: Tensor, W: Tensor) -> Tensor:
    return sparse_encode(grad, indices, counts, W, None)


def sparse_encode(x: Tensor, indices: Tensor, counts: Tensor, W_enc: Tensor, b_enc: Tensor | None) -> Tensor:
    dots = x.new_empty(indices.shape, dtype=torch.float32)
    torch.ops.aksae_cuda.sparse_value_grad(rows(x), indices.contiguous(), counts.contiguous(), rows(W_enc), dots)
    return with_bias(dots, indices, counts, b_enc, x.dtype)


def sparse_weight_grad(
    values: Tensor, indices: Tensor, counts: Tensor, dense: Tensor, d_sae: int, sums: bool
) -> tuple[Tensor, Tensor]:
    grad = values.new_empty(d_sae, dense.shape[1])
    total = values.new_empty(d_sae if sums else 0)
    torch.ops.aksae_cuda.sparse_weight_grad(
        *_codes(values, indices, counts), rows(dense), grad, total if sums else None
    )
    return grad, total


def scatter_codes(values: Tensor, indices: Tensor, counts: Tensor, d_sae: int) -> Tensor:
    dense = values.new_empty(values.shape[0], d_sae)
    torch.ops.aksae_cuda.scatter_codes(*_codes(values, indices, counts), dense)
    return dense


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
    torch.ops.aksae_cuda.adam_step(
        param,
        grad.contiguous(),
        exp_avg,
        exp_avg_sq,
        grad_scale.to(exp_avg.dtype),
        step,
        lr,
        beta1,
        beta2,
        eps,
        unit_norm_rows,
        lazy,
    )
    # Autograd must notice that weights saved by an older graph are gone.
    torch.autograd.graph.increment_version((param, exp_avg, exp_avg_sq))


def _codes(*codes: Tensor) -> list[Tensor]:
    return [tensor.contiguous() for tensor in codes]
