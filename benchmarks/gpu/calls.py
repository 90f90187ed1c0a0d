"""One call of every op, forward and backward, on small data: as much as compute-sanitizer watches in half a minute.

`python -m benchmarks.gpu.calls` makes them on every backend for the device, in bf16 and then in fp32, and prints a line
after each, which says how far it came if it is cut off. Results are not looked at.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator

import torch

import aksae_kernels as ak
from aksae_kernels.optim import SAEAdam

from ..problem import Shape
from .bench import accepts, release, usable_backends
from .correctness import CHECKS

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_SHAPE, _K = Shape(40, 72, 1031), 9


def call(op: str, device: torch.device, dtype: torch.dtype) -> None:
    """One call of an op by its name in `CHECKS`, and the backward of those that have one."""
    B, D, F = _SHAPE
    randn = lambda *shape: torch.randn(shape, device=device, dtype=dtype).requires_grad_()
    x, W_enc, W_dec, b_enc, b_dec = randn(B, D), randn(F, D), randn(F, D), randn(F), randn(D)
    scores = randn(B, F)
    k = torch.arange(B, device=device) % _K
    codes = ak.SparseCodes(*(part.detach() for part in ak.topk_select(scores, k, _K)))
    codes = codes._replace(values=codes.values.requires_grad_())
    match op:
        case "topk_encode":
            ak.topk_encode(x, W_enc, b_enc, k=k, k_max=_K).values.sum().backward()
        case "batch_topk_encode":
            ak.batch_topk_encode(x, W_enc, b_enc, budget=B * _K // 2, k_max=_K).values.sum().backward()
        case "threshold_encode":
            ak.threshold_encode(x, W_enc, b_enc, threshold=1.0, k_max=_K).values.sum().backward()
        case "encode_at":
            ak.encode_at(codes, x, W_enc, b_enc).values.sum().backward()
        case "price_select":
            ak.price_select(codes, W_dec, b_dec, x, price=1.0, passes=2).values.sum().backward()
        case "topk_select":
            ak.topk_select(scores, k, _K).values.sum().backward()
        case "sparse_decode":
            ak.sparse_decode(codes, W_dec, b_dec).sum().backward()
        case "decode_mse":
            ak.decode_mse(codes, W_dec, b_dec, x).sum().backward()
        case "batch_topk_select":
            ak.batch_topk_select(scores, B * _K).values.sum().backward()
        case "threshold_select":
            ak.threshold_select(scores, 1.0).values.sum().backward()
        case "sparse_value_grad":
            ak.sparse_value_grad(x.detach(), codes, W_dec.detach())
        case "sparse_weight_grad":
            ak.sparse_weight_grad(codes, x.detach(), F)
        case "optimizer":
            groups = [{"params": [W_dec], "unit_norm_rows": True, "lazy": True}, {"params": [W_enc, b_enc]}]
            for weight in (W_dec, W_enc, b_enc):
                weight.grad = torch.ones_like(weight)
            SAEAdam(groups, max_grad_norm=1.0).step()


def calls(device: torch.device) -> Iterator[str]:
    """Make them, and say of each that it has ended."""
    pairs = itertools.product(DTYPES, usable_backends(device), CHECKS)
    wanted = [(dtype, backend, op) for dtype, backend, op in pairs if accepts(op, backend, device)]
    for n, (dtype, backend, op) in enumerate(wanted, 1):
        with ak.use_backend(backend):
            call(op, device, DTYPES[dtype])
        release(device)
        yield f"{n} of {len(wanted)} calls ended, the last was {op}, {dtype}, on {backend}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    options = parser.parse_args()
    for ended in calls(options.device):
        print(ended, flush=True)


if __name__ == "__main__":
    main()
