"""The step of SAEAdam: moments, weight and, where rows keep unit norm, projection and norm in one kernel.

A parameter has the same bits after a step whether or not its group is lazy, though these are launches of different
constants and block sizes. So the compiler may not choose which products it fuses with a sum, which depends on the code
around them: the kernel is compiled without such fusion, and calls `tl.fma` where it wants one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .launch import launch, on_device_of_first
from .rounding import narrow

# Weights that a program takes of a parameter without a row constraint.
_FLAT_ROW = 1024


@on_device_of_first
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
    n_rows, n_columns = param.shape
    if not unit_norm_rows and not lazy:
        # No row constraint: the parameter is taken as flat.
        n_rows, n_columns = triton.cdiv(param.numel(), _FLAT_ROW), _FLAT_ROW
    launch(
        _adam_kernel,
        (n_rows,),
        param,
        grad.contiguous(),
        exp_avg,
        exp_avg_sq,
        grad_scale,
        param.numel(),
        n_columns,
        # Taken in double precision here: 1 - beta2 in fp32 would be off in the fifth digit.
        1 - beta1,
        beta2,
        1 - beta2,
        lr / (1 - beta1**step),
        1 / (1 - beta2**step),
        eps,
        UNIT_NORM=unit_norm_rows,
        LAZY=lazy,
        enable_fp_fusion=False,
        **tuning.optimizer(n_columns).meta,
    )
    # Autograd must notice that weights saved by an older graph are gone.
    torch.autograd.graph.increment_version((param, exp_avg, exp_avg_sq))


@triton.jit
def _adam_kernel(
    param_ptr,
    grad_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    grad_scale_ptr,
    n_elements,
    n_columns,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    step_size,
    bias_correction2,
    eps,
    UNIT_NORM: tl.constexpr,
    LAZY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: `g = (grad - <grad, w> w) scale`, the moments, `w - step_size m / (sqrt(v bias_correction2) + eps)`, and
    that over its norm. A row wider than a block is gone through again for the norm, from what is then in cache."""
    first = tl.program_id(0).to(tl.int64) * n_columns
    last = tl.minimum(first + n_columns, n_elements)
    scale = tl.load(grad_scale_ptr).to(tl.float32)
    grad_dot_weight = 0.0
    busy = 1
    if UNIT_NORM or LAZY:
        products = tl.zeros([BLOCK], dtype=tl.float32)
        nonzero = tl.zeros([BLOCK], dtype=tl.int32)
        for start in range(first, last, BLOCK):
            slot = start + tl.arange(0, BLOCK)
            weight = tl.load(param_ptr + slot, mask=slot < last, other=0.0).to(tl.float32)
            grad = tl.load(grad_ptr + slot, mask=slot < last, other=0.0).to(tl.float32)
            products = tl.fma(grad, weight, products)
            nonzero |= (grad != 0).to(tl.int32)
        grad_dot_weight = tl.sum(products, 0) if UNIT_NORM else 0.0
        if LAZY:
            # A factor that is not finite must reach all rows.
            busy = tl.max(nonzero, 0) | (~(tl.abs(scale) < float("inf"))).to(tl.int32)
    if busy != 0:
        squares = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(first, last, BLOCK):
            slot = start + tl.arange(0, BLOCK)
            inside = slot < last
            weight = tl.load(param_ptr + slot, mask=inside, other=0.0).to(tl.float32)
            grad = tl.load(grad_ptr + slot, mask=inside, other=0.0).to(tl.float32)
            if UNIT_NORM:
                grad = tl.fma(-grad_dot_weight, weight, grad)
            grad *= scale
            exp_avg = tl.load(exp_avg_ptr + slot, mask=inside, other=0.0)
            exp_avg = tl.fma(one_minus_beta1, grad - exp_avg, exp_avg)
            exp_avg_sq = tl.load(exp_avg_sq_ptr + slot, mask=inside, other=0.0)
            exp_avg_sq = tl.fma(one_minus_beta2 * grad, grad, beta2 * exp_avg_sq)
            tl.store(exp_avg_ptr + slot, exp_avg, mask=inside)
            tl.store(exp_avg_sq_ptr + slot, exp_avg_sq, mask=inside)
            weight = moved(weight, exp_avg, exp_avg_sq, step_size, bias_correction2, eps)
            if UNIT_NORM:
                squares = tl.where(inside, tl.fma(weight, weight, squares), squares)
            else:
                tl.store(param_ptr + slot, narrow(weight, param_ptr.dtype.element_ty), mask=inside)
        if UNIT_NORM:
            norm = tl.sqrt_rn(tl.sum(squares, 0))
            # A row of zeros stays one; a norm that overflowed or is NaN must surface.
            norm = tl.where(norm == 0, 1.0, tl.where(norm == float("inf"), float("nan"), norm))
            tl.debug_barrier()
            for start in range(first, last, BLOCK):
                slot = start + tl.arange(0, BLOCK)
                inside = slot < last
                weight = tl.load(param_ptr + slot, mask=inside, other=0.0).to(tl.float32)
                exp_avg = tl.load(exp_avg_ptr + slot, mask=inside, other=0.0)
                exp_avg_sq = tl.load(exp_avg_sq_ptr + slot, mask=inside, other=0.0)
                weight = moved(weight, exp_avg, exp_avg_sq, step_size, bias_correction2, eps)
                tl.store(param_ptr + slot, narrow(tl.div_rn(weight, norm), param_ptr.dtype.element_ty), mask=inside)


@triton.jit
def moved(weight, exp_avg, exp_avg_sq, step_size, bias_correction2, eps):
    """The weight after the step; called again for the norm, it gives the same bits."""
    return tl.fma(-step_size, tl.div_rn(exp_avg, tl.sqrt_rn(exp_avg_sq * bias_correction2) + eps), weight)
