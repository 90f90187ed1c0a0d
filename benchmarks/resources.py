"""`python -m benchmarks.resources`: what every Triton kernel takes of every GPU it is for, compiled ahead of time.

Needs no GPU. The ops run on meta tensors of the shapes S1..S4 with Triton's launcher replaced by a recorder, so the
table holds the launches as they would be, with their dtypes, block sizes and specialisations; these are compiled for
each target, and the compilers say what registers, spills and shared memory they came to.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from aksae_kernels.backends import triton as backend

from .gpu.targets import SHAPES as REFERENCE
from .gpu.targets import UNIFORM
from .problem import Shape

# With their k.
SHAPES = {name: (shape, int(UNIFORM[name])) for name, shape in REFERENCE.items()} | {
    "odd": (Shape(1001, 33, 4099), 7),
    "one": (Shape(1, 1, 1), 1),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_NAMES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
}


@dataclass(frozen=True)
class Launch:
    """A kernel with the types and constants it was started with: one compilation for each target.

    `signature`, `constants` and `divisible` are by position; `options` are Triton's.
    """

    module: str
    kernel: str
    signature: tuple[str, ...]
    constants: tuple[tuple[int, Any], ...]
    divisible: tuple[int, ...]
    options: tuple[tuple[str, int], ...]

    def compile(self, target: GPUTarget) -> Any:
        function = getattr(sys.modules[self.module], self.kernel)
        source = ASTSource(
            function,
            dict(zip(function.arg_names, self.signature)),
            {(position,): value for position, value in self.constants},
            {(position,): [["tt.divisibility", 16]] for position in self.divisible},
        )
        return triton.compile(source, target=target, options=dict(self.options))


@dataclass(frozen=True)
class Usage:
    """Of a thread: registers and bytes of stack and spilled registers. Of a program: bytes of shared memory."""

    registers: int
    spills: int
    shared: int


def record(call) -> list[Launch]:
    """The launches that `call()` would start."""
    launches = []

    def run(self: JITFunction, *args, grid, warmup, **kwargs) -> None:
        launches.append(_launch(self, args, kwargs))

    with mock.patch.object(JITFunction, "run", run):
        call()
    return launches


def _launch(function: JITFunction, args: Sequence[Any], kwargs: dict[str, Any]) -> Launch:
    values = dict(zip(function.arg_names, args)) | {n: v for n, v in kwargs.items() if n in function.arg_names}
    signature, constants, divisible = [], [], []
    for position, parameter in enumerate(function.params):
        value = values[parameter.name]
        runtime_int = isinstance(value, int) and not parameter.is_constexpr and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (runtime_int and value == 1):
            signature.append("constexpr")
            constants.append((position, value))
            continue
        if isinstance(value, torch.Tensor):
            signature.append("*" + _NAMES[value.dtype])
        elif isinstance(value, float):
            signature.append("fp32")
        else:
            signature.append("i32" if -(2**31) <= value < 2**31 else "i64")
        # Fresh tensors begin at multiples of 16 bytes; views of them may not, which is slower and takes no less.
        if isinstance(value, torch.Tensor) or (runtime_int and value % 16 == 0):
            divisible.append(position)
    options = {name: value for name, value in kwargs.items() if name not in function.arg_names}
    return Launch(
        function.fn.__module__,
        function.fn.__name__,
        tuple(signature),
        tuple(constants),
        tuple(divisible),
        tuple(sorted(options.items())),
    )


def op_calls(shape: Shape, k: int, dtype: torch.dtype) -> Iterator[Any]:
    """Every function of the backend on meta tensors."""
    meta = torch.device("meta")
    x, target = (torch.empty(shape.B, shape.D, dtype=dtype, device=meta) for _ in range(2))
    W = torch.empty(shape.F, shape.D, dtype=dtype, device=meta)
    b_enc, b_dec = torch.empty(shape.F, dtype=dtype, device=meta), torch.empty(shape.D, dtype=dtype, device=meta)
    scores = torch.empty(shape.B, shape.F, dtype=dtype, device=meta)
    rows_of_k = torch.empty(shape.B, dtype=torch.int32, device=meta)
    threshold = torch.empty((), dtype=torch.float64, device=meta)
    codes = (
        torch.empty(shape.B, k, dtype=dtype, device=meta),
        torch.empty(shape.B, k, dtype=torch.int32, device=meta),
        rows_of_k,
    )
    yield lambda: backend.topk_select(scores, rows_of_k, k)
    yield lambda: backend.batch_topk_select(scores, k * shape.B, k)
    yield lambda: backend.threshold_select(scores, threshold, k)
    for bias in (b_enc, None):
        yield lambda bias=bias: backend.topk_encode(x, W, bias, rows_of_k, k)
        yield lambda bias=bias: backend.batch_topk_encode(x, W, bias, k * shape.B // 2, k)
        yield lambda bias=bias: backend.threshold_encode(x, W, bias, threshold, k)
        yield lambda bias=bias: backend.sparse_encode(x, *codes[1:], W, bias)
    for bias in (b_dec, None):
        yield lambda bias=bias: backend.sparse_decode(*codes, W, bias)
    for wanted in (True, False):
        yield lambda wanted=wanted: backend.decode_mse(*codes, W, b_dec, target, wanted, wanted)
    yield lambda: backend.sparse_value_grad(target, *codes[1:], W)
    for sums in (True, False):
        yield lambda sums=sums: backend.sparse_weight_grad(*codes, x, shape.F, sums)
    yield lambda: backend.scatter_codes(*codes, shape.F)
    prices = torch.empty(shape.B, dtype=torch.float32, device=meta)
    for bias in (b_dec, None):
        yield lambda bias=bias: backend.price_select(*codes, W, bias, x, prices, 2)
    moments = [torch.empty(W.shape, dtype=torch.float32, device=meta) for _ in range(2)]
    scale = torch.empty((), dtype=torch.float32, device=meta)
    for unit_norm, lazy in ((True, False), (False, False), (True, True), (False, True)):
        numbers = (3, 1e-3, 0.9, 0.999, 1e-8, unit_norm, lazy)
        yield lambda numbers=numbers: backend.adam_step_(W, x.new_empty(W.shape), *moments, scale, *numbers)


def launches(shapes: Sequence[str] = tuple(SHAPES), dtypes: Sequence[torch.dtype] = DTYPES) -> list[Launch]:
    """The distinct launches of all ops, in the order in which they come."""
    found: dict[Launch, None] = {}
    for shape in shapes:
        for dtype in dtypes:
            for call in op_calls(*SHAPES[shape], dtype):
                found.update(dict.fromkeys(record(call)))
    return list(found)


def usage(launch: Launch, target: str) -> Usage:
    """Compile, and read what the assembler says."""
    compiled = launch.compile(TARGETS[target])
    shared = compiled.metadata.shared
    if "cubin" in compiled.asm:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(compiled.asm["cubin"])
            tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
            text = subprocess.run(
                [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
            ).stdout
        registers, stack, local = (int(re.search(rf"\b{key}:(\d+)", text)[1]) for key in ("REG", "STACK", "LOCAL"))
        return Usage(registers, stack + local, shared)
    text = compiled.asm["amdgcn"]
    registers, spilled, scratch = (
        int(re.search(rf"\.{key}:\s*(\d+)", text)[1])
        for key in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    )
    return Usage(registers, max(4 * spilled, scratch), shared)


def measured(found: Sequence[Launch], targets: Sequence[str]) -> dict[tuple[str, str], tuple[int, Usage]]:
    """By kernel and target: how many launches, and the largest use of each resource among them."""
    jobs = [(launch, target) for launch in found for target in targets]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(usage, *zip(*jobs), chunksize=4))
    table: dict[tuple[str, str], list[Usage]] = {}
    for (launch, target), result in zip(jobs, results):
        table.setdefault((launch.kernel, target), []).append(result)
    return {
        key: (len(uses), Usage(*(max(getattr(use, field) for use in uses) for field in Usage.__annotations__)))
        for key, uses in table.items()
    }


def formatted(table: Mapping[tuple[str, str], tuple[int, Usage]]) -> str:
    lines = [
        f"{'kernel':28s} {'target':8s} {'variants':>8s} {'registers':>9s} {'spill bytes':>11s} {'shared bytes':>12s}"
    ]
    for (kernel, target), (variants, use) in sorted(table.items()):
        lines.append(f"{kernel:28s} {target:8s} {variants:8d} {use.registers:9d} {use.spills:11d} {use.shared:12d}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    options = parser.parse_args(arguments)
    print(formatted(measured(launches(options.shapes), options.targets)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
