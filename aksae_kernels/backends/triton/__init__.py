"""The `triton` backend: the same kernels for CUDA GPUs from sm_80 on and for AMD's, and in the interpreter on the CPU.

It takes CUDA tensors, or, with TRITON_INTERPRET=1 in the environment when it is first considered, CPU tensors: slowly,
for tests. Importing this module imports Triton; the kernels are compiled when they first run.
"""

from __future__ import annotations

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST = (8, 0)

try:
    from .adam import adam_step_
    from .encode import batch_topk_encode, threshold_encode, topk_encode
    from .launch import INTERPRETED
    from .price import price_select
    from .select import batch_topk_select, threshold_select, topk_select
    from .sparse import decode_mse, scatter_codes, sparse_decode, sparse_encode, sparse_value_grad, sparse_weight_grad
except ImportError as error:
    _missing: str | None = f"Triton does not load: {error}"
else:
    _missing = None

__all__ = [
    "adam_step_",
    "batch_topk_encode",
    "batch_topk_select",
    "decode_mse",
    "describe",
    "price_select",
    "refuse",
    "scatter_codes",
    "sparse_decode",
    "sparse_encode",
    "sparse_value_grad",
    "sparse_weight_grad",
    "threshold_encode",
    "threshold_select",
    "topk_encode",
    "topk_select",
    "unavailable",
]


def unavailable() -> str | None:
    if _missing or INTERPRETED or torch.cuda.is_available():
        return _missing
    return "torch sees no GPU; TRITON_INTERPRET=1 would run it on the CPU, for tests"


def refuse(op: str, tensor: Tensor) -> str | None:
    device = tensor.device.type
    if device != "cuda" and not (device == "cpu" and INTERPRETED):
        return f"it takes CUDA tensors{' and CPU tensors' if INTERPRETED else ''}, not {device}"
    if tensor.dtype not in _DTYPES:
        return f"it takes float32, bfloat16 and float16, not {str(tensor.dtype).removeprefix('torch.')}"
    if device == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(tensor.device) < _OLDEST:
        return "it takes GPUs of compute capability 8.0 or more"
    return None


def describe() -> str:
    return "Triton, in the interpreter" if INTERPRETED else "Triton"
