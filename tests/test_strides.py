"""Arguments and gradients of every shape that has no memory of its own: expanded, empty, or both."""

from __future__ import annotations

import pytest
import torch

from aksae_kernels import (
    SparseCodes,
    batch_topk_encode,
    batch_topk_select,
    decode_mse,
    encode_at,
    price_select,
    sparse_decode,
    sparse_encode,
    sparse_value_grad,
    sparse_weight_grad,
    threshold_encode,
    threshold_select,
    topk_encode,
    topk_select,
)
from aksae_kernels.testing import random_codes

# B, D, F and K, each 0 in turn, and all of them.
SIZES = [(3, 4, 6, 2), (0, 4, 6, 2), (3, 0, 6, 2), (3, 4, 0, 2), (3, 4, 6, 0), (1, 1, 1, 1), (0, 0, 0, 0)]
EXPANDED = ["none", "rows", "columns", "both"]
# Of the arguments, and of the gradient that comes back.
PAIRS = [
    ("none", "rows"),
    ("none", "columns"),
    ("none", "both"),
    ("rows", "both"),
    ("columns", "none"),
    ("both", "none"),
]


def expanded(tensor: torch.Tensor, how: str) -> torch.Tensor:
    """The tensor with its first row in all rows, its first column in all columns, or both, by strides of 0."""
    strides = list(tensor.stride())
    if how in ("rows", "both"):
        strides[0] = 0
    if how in ("columns", "both"):
        strides[-1] = 0
    return tensor.as_strided(tensor.shape, strides)


def calls(codes: SparseCodes, x, W, b, c, pre_acts) -> dict:
    """Every public op, as a function of its differentiable arguments, and these."""
    n_rows, d_sae = pre_acts.shape
    width = codes.indices.shape[1]
    k = torch.full((1,), width, device=x.device).expand(n_rows)

    def with_values(values):
        return codes._replace(values=values)

    return {
        "topk_select": (lambda p: topk_select(p, k, width).values, [pre_acts]),
        "batch_topk_select": (lambda p: batch_topk_select(p, 4).values, [pre_acts]),
        "threshold_select": (lambda p: threshold_select(p, b.detach()).values, [pre_acts]),
        "topk_encode": (lambda x, W, b: topk_encode(x, W, b, k=k, k_max=width).values, [x, W, b]),
        "batch_topk_encode": (
            lambda x, W, b: batch_topk_encode(x, W, b, budget=4, k_max=width).values,
            [x, W, b],
        ),
        "threshold_encode": (
            lambda x, W, b: threshold_encode(x, W, b, threshold=b.detach(), k_max=width).values,
            [x, W, b],
        ),
        "encode_at": (lambda x, W, b: encode_at(codes, x, W, b).values, [x, W, b]),
        "sparse_encode": (lambda x, W: sparse_encode(codes, x, W), [x, W]),
        "price_select": (
            lambda v: price_select(with_values(v), W.detach(), c.detach(), x.detach(), price=0.5, passes=2).values,
            [codes.values],
        ),
        "sparse_decode": (lambda v, W, c: sparse_decode(with_values(v), W, c), [codes.values, W, c]),
        "decode_mse": (lambda v, W, c, x: decode_mse(with_values(v), W, c, x), [codes.values, W, c, x]),
        "sparse_value_grad": (lambda x, W: sparse_value_grad(x.detach(), codes, W.detach()), [x, W]),
        "sparse_weight_grad": (lambda x: sparse_weight_grad(codes, x.detach(), d_sae), [x]),
        "to_dense": (lambda v: with_values(v).to_dense(d_sae), [codes.values]),
    }


OPS = list(calls(random_codes((1,), 1, 1), *[torch.ones(1, 1)] * 5))


def outcome(call, how: str, grad_how: str) -> list[torch.Tensor]:
    function, inputs = call
    leaves = [expanded(t, how).detach().requires_grad_() for t in inputs]
    out = function(*leaves)
    results = [out.detach()]
    if out.requires_grad:
        results += torch.autograd.grad(out, leaves, expanded(torch.ones_like(out), grad_how))
    return results


@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "B{}-D{}-F{}-K{}".format(*sizes))
@pytest.mark.parametrize("op", OPS)
def test_expanded_and_empty(fp32, op, sizes):
    """The bits of contiguous copies; where there are no rows, of the right shapes, and without an error."""
    n_rows, d_in, d_sae, width = sizes
    codes = random_codes((n_rows,), width, d_sae, dtype=fp32.dtype, device=fp32.device, integers=True)
    dense = [fp32.integers(*shape, seed=i) for i, shape in enumerate(((n_rows, d_in), (d_sae, d_in)))]
    vectors = [fp32.integers(size, seed=i) for i, size in enumerate((d_sae, d_in))]
    arguments = (codes, *dense, *vectors, fp32.integers(n_rows, d_sae, seed=7))
    for how, grad_how in PAIRS:
        codes, *others = (expanded(t, how) if isinstance(t, torch.Tensor) else t for t in arguments)
        copies = calls(codes, *(t.clone(memory_format=torch.contiguous_format) for t in others))
        actual = outcome(calls(codes, *others)[op], how, grad_how)
        function, inputs = copies[op]
        same_data = [expanded(t, how).clone(memory_format=torch.contiguous_format) for t in inputs]
        expected = outcome((function, same_data), "none", "none")
        for a, e in zip(actual, expected, strict=True):
            assert a.shape == e.shape
            torch.testing.assert_close(a, e)


@pytest.mark.parametrize("how", EXPANDED)
def test_expanded_patterns(fp32, how):
    """Indices and counts of stride 0: a row of codes for all rows, one latent in all of its slots."""
    codes = SparseCodes(
        fp32.integers(3, 4),
        expanded(torch.full((3, 4), 2, dtype=torch.int32, device=fp32.device), how),
        torch.full((1,), 3, dtype=torch.int32, device=fp32.device).expand(3),
    )
    plain = SparseCodes(codes.values, codes.indices.contiguous(), codes.counts.contiguous())
    W, x = fp32.integers(6, 5, seed=1), fp32.integers(3, 5, seed=2)
    assert torch.equal(sparse_decode(codes, W), sparse_decode(plain, W))
    assert torch.equal(sparse_encode(codes, x, W), sparse_encode(plain, x, W))
    assert torch.equal(sparse_weight_grad(codes, x, 6), sparse_weight_grad(plain, x, 6))
    assert torch.equal(codes.to_dense(6), plain.to_dense(6))
