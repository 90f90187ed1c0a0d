"""The reference shapes, and every row of the table with the ratio it is to reach in each of them."""

from __future__ import annotations

from typing import NamedTuple

from .. import ops
from ..problem import Shape
from ..report import Target

SHAPES = {
    "S1": Shape(8192, 768, 24576),
    "S2": Shape(8192, 2304, 65536),
    "S3": Shape(8192, 4096, 131072),
    "S4": Shape(4096, 5120, 524288),
}
TINY = {"S1": Shape(24, 16, 96), "S2": Shape(16, 24, 160), "S3": Shape(16, 40, 200), "S4": Shape(8, 33, 257)}
"""Stand-ins of the same names, for a machine without a GPU."""

UNIFORM = {"S1": "64", "S2": "80", "S3": "128", "S4": "128"}
SPREAD = "20..320"
"""The two choices of k: one for all rows, by shape, and one drawn for each row."""

CUBLAS, TF32, FP32 = "cuBLAS bf16", "cuBLAS TF32", "cuBLAS fp32"
DENSE_TOPK = "GEMM + torch.topk, fp32 scores"
EQUAL_K = "uniform k of the same mean"
DENSE, COMPILED, SPARSIFY = "dense PyTorch", "dense PyTorch, compiled", "sparsify SparseCoder + Adam"
ENCODE, ENCODE_FP32, ALIKE = "topk_encode bf16", "topk_encode fp32", "topk_encode bf16, latents all alike"
SELECT, DECODE, FUSED = "topk_select", "sparse_decode", "decode_mse + value gradient"
WEIGHTS, INDEX, STEP = "both weight gradients", "both indices by latent", "forward + backward"
ENCODE_MEMORY, STEP_MEMORY, TRAINING = "peak memory of topk_encode", "peak memory of a step", "training step"


class Line(NamedTuple):
    """A row of the table: ours over the rival, which is to be at most `must[i]`, hopefully `stretch[i]`, in shape i.

    `must` is empty for a row that is there for information, and `stretch` where only one figure was set. `ks` says
    with which choices of k it is measured.
    """

    what: str
    rival: str
    must: tuple[float, ...] = ()
    stretch: tuple[float, ...] = ()
    ks: tuple[str, ...] = ("uniform", "spread")

    def target(self, shape: str) -> Target | None:
        """In the shape of that name."""
        if not self.must:
            return None
        column = tuple(SHAPES).index(shape)
        return Target(self.must[column], (self.stretch or self.must)[column])


_ALL = lambda figure: (figure,) * len(SHAPES)

LINES = (
    Line(ENCODE, CUBLAS, (1.30, 1.12, 1.08, 1.06), (1.15, 1.06, 1.04, 1.03)),
    Line(ENCODE, DENSE_TOPK, (1 / 4.5, 1 / 2.4, 1 / 1.8, 1 / 1.7)),
    Line(ENCODE, EQUAL_K, _ALL(1.15), ks=("spread",)),
    Line(ALIKE, "random weights", _ALL(1.5), ks=("uniform",)),
    Line(ENCODE_FP32, TF32, (1.45, 1.18, 1.12, 1.10)),
    Line(ENCODE_FP32, FP32),
    Line(SELECT, "torch.topk", _ALL(1 / 6)),
    # Half of the copy bandwidth, and three quarters of it.
    Line(SELECT, "HBM floor", _ALL(2.0), _ALL(4 / 3)),
    *(Line(f"{SELECT}, {name} rows", "random rows", _ALL(1.5), ks=("uniform",)) for name in ops.ADVERSARIAL.values()),
    Line(DECODE, "max(L2, HBM) floor", (1.3, 1.25, 1.25, 1.25)),
    Line(FUSED, "sparse_decode alone", (1.35, 1.3, 1.3, 1.3)),
    Line(WEIGHTS, "2 L2 gathers + writes", (1.4, 1.3, 1.3, 1.25)),
    Line(STEP, CUBLAS, (2.8, 1.9, 1.75, 1.45)),
    Line(STEP, EQUAL_K, _ALL(1.15), ks=("spread",)),
    Line(INDEX, STEP, _ALL(0.03)),
    Line(ENCODE_MEMORY, DENSE_TOPK, ks=("uniform",)),
    Line(STEP_MEMORY, DENSE, ks=("uniform",)),
    *(Line(TRAINING, rival, ks=("uniform",)) for rival in (DENSE, COMPILED, SPARSIFY)),
)


def target(what: str, rival: str, shape: str) -> Target | None:
    """Of a row of `LINES`; KeyError where there is no such row."""
    return _BY_NAME[what, rival].target(shape)


_BY_NAME = {(line.what, line.rival): line for line in LINES}
