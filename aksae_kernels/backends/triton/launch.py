"""Starting kernels: on the right device, and not at all where there is nothing to do."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import torch
import triton
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1 when this was imported)."""


def launch(kernel, grid: tuple[int, ...], *args, enable_fp_fusion: bool = True, **meta) -> None:
    """`kernel[grid]`, which Triton itself refuses where a dimension of the grid is 0.

    `enable_fp_fusion`, whether the compiler may fuse multiplications and additions as it likes, does not depend on
    Triton's default, which changes with its version.
    """
    if all(grid):
        kernel[grid](*args, enable_fp_fusion=enable_fp_fusion, **meta)


def on_device_of_first(op: Callable) -> Callable:
    """Triton launches on torch's current device: make that the device of the op's first tensor."""

    @functools.wraps(op)
    def run(first: Tensor, *args):
        device = torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext()
        with device:
            return op(first, *args)

    return run
