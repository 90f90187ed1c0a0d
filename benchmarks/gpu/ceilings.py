"""What this device can do at best, measured: the figures that all floors and shares refer to."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from ..problem import Shape
from ..report import NotMeasured
from ..timing import quantiles
from . import traffic
from .bench import Bench, Outcome

PIECES = (128, 256, 512, 1024, 2048)
"""Bytes of a row."""
SQUARE = 8192
_COPY_BYTES, _HBM_TABLE_BYTES, _READ_BYTES = 1 << 32, 1 << 32, 1 << 31


def memory(bench: Bench, outcome: Outcome) -> None:
    """Bytes per second of a copy (read and written) and of gathers of random rows, from L2 and from device memory.

    A gather reads 2 GB in all. The table that stays in L2 takes a quarter of it; its first reads miss, some 0.6 %.
    """
    if bench.device.type != "cuda":
        raise NotMeasured("ceilings are those of a GPU")
    outcome.facts["copy, bytes/s"] = 2 * _COPY_BYTES / _seconds(bench, _copy(bench.device))
    cache = torch.cuda.get_device_properties(bench.device).L2_cache_size
    for place, table_bytes in (("L2", cache // 4), ("HBM", _HBM_TABLE_BYTES)):
        rates = outcome.facts[f"gather from {place}, bytes/s"] = {}
        for piece in PIECES:
            rates[f"{piece} B"] = _READ_BYTES / _seconds(bench, _gather(bench.device, table_bytes, piece))


def _copy(device: torch.device) -> Callable[[], object]:
    source = torch.randint(0, 256, (_COPY_BYTES,), dtype=torch.uint8, device=device)
    return functools.partial(torch.empty_like(source).copy_, source)


def _gather(device: torch.device, table_bytes: int, piece: int) -> Callable[[], object]:
    # Triton is only needed here, and only on a GPU.
    from .gather import gather_sum

    generator = torch.Generator(device).manual_seed(piece)
    table = torch.randn(table_bytes // piece, piece // 4, device=device, generator=generator)
    rows = torch.randint(0, len(table), (_READ_BYTES // piece,), dtype=torch.int32, device=device, generator=generator)
    return functools.partial(gather_sum, table, rows, 4096)


def gemms(bench: Bench, outcome: Outcome) -> None:
    """FLOP per second of library products: a large square, and `x @ W.T` of each shape."""
    if bench.device.type != "cuda":
        raise NotMeasured("ceilings are those of a GPU")
    before = torch.get_float32_matmul_precision()
    shapes = {"square": Shape(SQUARE, SQUARE, SQUARE)} | bench.shapes
    try:
        for kind, dtype, precision in _KINDS:
            rates = outcome.facts[f"{kind} product, FLOP/s"] = {}
            torch.set_float32_matmul_precision(precision)
            for name, shape in shapes.items():
                with outcome.judging(f"{kind} product, {name}"):
                    rates[name] = _gemm_rate(bench, shape, dtype)
    finally:
        torch.set_float32_matmul_precision(before)


_KINDS = (
    ("bf16", torch.bfloat16, "highest"),
    ("fp16", torch.float16, "highest"),
    ("TF32", torch.float32, "high"),
    ("fp32", torch.float32, "highest"),
)


def _gemm_rate(bench: Bench, shape: Shape, dtype: torch.dtype) -> float:
    # No wider than 64 k: rates no longer change, and the fp32 product of S4 would take a second.
    shape = shape._replace(F=min(shape.F, 1 << 16))
    generator = torch.Generator(bench.device).manual_seed(0)
    x, W = (
        torch.randn(rows, shape.D, device=bench.device, generator=generator).to(dtype) for rows in (shape.B, shape.F)
    )
    return traffic.gemm_flops(shape) / _seconds(bench, lambda: x @ W.T)


def _seconds(bench: Bench, call: Callable[[], object]) -> float:
    return quantiles(bench.samples({"": call})[""]).p50
