"""Microbenchmarks of every op, forward and backward, with pytest-benchmark: `pytest benchmarks/ --benchmark-only`.

On whatever backend the library chooses. A result is compared with the `reference` backend's before it is timed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import aksae_kernels as ak
from aksae_kernels.optim import SAEAdam

from .problem import KS, Problem, Shape

SHAPES = (Shape(64, 256, 4096), Shape(256, 512, 8192))


class Op(NamedTuple):
    """`call` takes `inputs`, of which those at the positions `wrt` are differentiated, and gives the tensor that is."""

    call: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    wrt: tuple[int, ...]


def topk_encode(problem: Problem) -> Op:
    call = lambda x, W, b: ak.topk_encode(x, W, b, k=problem.k, k_max=problem.width).values
    return Op(call, (problem.x, problem.W, problem.b_enc), (0, 1, 2))


def batch_topk_encode(problem: Problem) -> Op:
    budget = int(problem.k.sum())
    call = lambda x, W, b: ak.batch_topk_encode(x, W, b, budget=budget, k_max=8 * problem.width).values
    return Op(call, (problem.x, problem.W, problem.b_enc), (0, 1, 2))


def threshold_encode(problem: Problem) -> Op:
    call = lambda x, W, b: ak.threshold_encode(x, W, b, threshold=2.0, k_max=8 * problem.width).values
    return Op(call, (problem.x, problem.W, problem.b_enc), (0, 1, 2))


def encode_at(problem: Problem) -> Op:
    call = lambda x, W, b: ak.encode_at(problem.codes, x, W, b).values
    return Op(call, (problem.x, problem.W, problem.b_enc), (0, 1, 2))


def selection(problem: Problem, select: Callable[..., ak.SparseCodes], *arguments: object) -> Op:
    return Op(lambda scores: select(scores, *arguments).values, (problem.scores,), (0,))


def topk_select(problem: Problem) -> Op:
    return selection(problem, ak.topk_select, problem.k, problem.width)


def batch_topk_select(problem: Problem) -> Op:
    return selection(problem, ak.batch_topk_select, int(problem.k.sum()), problem.shape.F)


def threshold_select(problem: Problem) -> Op:
    return selection(problem, ak.threshold_select, 2.0, problem.shape.F)


def price_select(problem: Problem) -> Op:
    call = lambda values: (
        ak.price_select(problem.codes._replace(values=values), problem.W, None, problem.x, price=4.0).values
    )
    return Op(call, (problem.codes.values,), (0,))


def sparse_decode(problem: Problem) -> Op:
    call = lambda values, W: ak.sparse_decode(problem.codes._replace(values=values), W)
    return Op(call, (problem.codes.values, problem.W), (0, 1))


def decode_mse(problem: Problem) -> Op:
    call = lambda values, W: ak.decode_mse(problem.codes._replace(values=values), W, None, problem.x)
    return Op(call, (problem.codes.values, problem.W), (0, 1))


def sparse_value_grad(problem: Problem) -> Op:
    return Op(lambda grad, W: ak.sparse_value_grad(grad, problem.codes, W), (problem.residual, problem.W), ())


def sparse_weight_grad(problem: Problem) -> Op:
    return Op(lambda dense: ak.sparse_weight_grad(problem.codes, dense, problem.shape.F), (problem.residual,), ())


DIFFERENTIABLE = (
    topk_encode,
    batch_topk_encode,
    threshold_encode,
    encode_at,
    topk_select,
    batch_topk_select,
    threshold_select,
    price_select,
    sparse_decode,
    decode_mse,
)
OPS = (*DIFFERENTIABLE, sparse_value_grad, sparse_weight_grad)
NAME = lambda make: make.__name__


@pytest.fixture(scope="module", params=[(shape, k) for shape in SHAPES for k in KS], ids=lambda p: f"{p[0]} k={p[1]}")
def problem(request: pytest.FixtureRequest) -> Problem:
    return Problem(*request.param)


def matches_reference(compute: Callable[[], tuple[Tensor, ...]]) -> None:
    with ak.use_backend("reference"):
        expected = compute()
    torch.testing.assert_close(compute(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", OPS, ids=NAME)
def test_forward(benchmark, problem, make):
    op = make(problem)
    forward = functools.partial(op.call, *op.inputs)
    matches_reference(lambda: (forward(),))
    benchmark(forward)


@pytest.mark.parametrize("make", DIFFERENTIABLE, ids=NAME)
def test_backward(benchmark, problem, make):
    op = make(problem)

    def graph() -> tuple[Tensor, list[Tensor], Tensor]:
        inputs = [tensor.detach().requires_grad_() for tensor in op.inputs]
        output = op.call(*inputs)
        return output, [inputs[position] for position in op.wrt], torch.ones_like(output)

    def backward(output: Tensor, inputs: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, inputs, grad, retain_graph=True)

    matches_reference(lambda: backward(*graph()))
    benchmark(backward, *graph())


def test_optimizer(benchmark, problem):
    gradient = torch.randn(problem.W.shape, generator=torch.Generator().manual_seed(0))

    def optimizer() -> tuple[SAEAdam, torch.nn.Parameter]:
        weight = torch.nn.Parameter(problem.W.clone())
        weight.grad = gradient
        return SAEAdam([{"params": [weight], "unit_norm_rows": True}]), weight

    def stepped() -> tuple[Tensor]:
        adam, weight = optimizer()
        adam.step()
        return (weight.detach(),)

    matches_reference(stepped)
    benchmark(optimizer()[0].step)
