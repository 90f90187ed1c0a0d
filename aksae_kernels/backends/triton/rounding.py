"""Conversions between fp32 and the dtypes of tensors, by the bits for bf16: Triton's interpreter truncates where GPUs
round to nearest, and widens subnormal numbers wrongly. On a GPU both ways cost a few integer instructions.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def widen(number):
    """To fp32, exactly."""
    if number.dtype == tl.bfloat16:
        return (number.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return number.to(tl.float32)


@triton.jit
def narrow(number, dtype: tl.constexpr):
    """From fp32 to the nearest number of `dtype`, ties to even."""
    if dtype == tl.bfloat16:
        bits = number.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # Adding to the bits of a NaN might carry into the sign.
        return tl.where(number != number, 0x7FC0, bits).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return number.to(dtype)
