"""The contests whose ratios have targets. Weights and activations are bf16 where it does not say fp32.

The rivals multiply without the bias, which is in their favour.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

import aksae_kernels as ak

from .. import ops
from ..case import Contest, Floor, Rival
from ..problem import Problem
from ..report import NotMeasured, Row
from ..steps import DenseStep
from . import oracles, traffic
from .bench import Bench, Outcome, on, release
from .targets import (
    ALIKE,
    CUBLAS,
    DECODE,
    DENSE,
    DENSE_TOPK,
    ENCODE,
    ENCODE_FP32,
    ENCODE_MEMORY,
    EQUAL_K,
    FP32,
    FUSED,
    INDEX,
    SELECT,
    STEP,
    STEP_MEMORY,
    TF32,
    WEIGHTS,
)


def encode(bench: Bench, shape: str, outcome: Outcome) -> None:
    """`topk_encode` against the product in it, against that and `torch.topk`, and against itself with equal k."""
    uniform, spread = bench.both_ks(shape)
    bench.measure(outcome, shape, ENCODE, uniform, encode_contest)
    bench.measure(outcome, shape, ENCODE, spread, lambda problem: _beside_equal_k(problem, encode_contest))


def encode_alike(bench: Bench, shape: str, outcome: Outcome) -> None:
    """Rows of scores that are all equal: the hardest for a bound on them."""
    bench.measure(outcome, shape, ALIKE, bench.problem(shape), ops.encode_equal_latents)


def encode_contest(problem: Problem) -> Contest:
    x, W = problem.x, problem.W
    rivals = Rival(CUBLAS, lambda: x @ W.T), Rival(DENSE_TOPK, functools.partial(_dense_topk, problem))
    return _encode_contest(problem, *rivals)


def encode_fp32(bench: Bench, shape: str, outcome: Outcome) -> None:
    """The same from fp32 inputs, where scores have to be accurate to fp32."""
    for problem in bench.both_ks(shape, torch.float32):
        bench.measure(outcome, shape, ENCODE_FP32, problem, _encode_fp32_contest)


def _encode_fp32_contest(problem: Problem) -> Contest:
    def product(precision: str) -> Tensor:
        with _matmul_precision(precision):
            return problem.x @ problem.W.T

    rivals = ((TF32, "high"), (FP32, "highest"))
    return _encode_contest(problem, *(Rival(name, functools.partial(product, kind)) for name, kind in rivals))


def _encode_contest(problem: Problem, *rivals: Rival) -> Contest:
    W, b = problem.W, problem.b_enc
    ours = lambda: ak.topk_encode(problem.x, W, b, k=problem.k, k_max=problem.width)
    return Contest(ours, lambda: oracles.check_encode(ours(), problem, W, b), rivals)


def _dense_topk(problem: Problem) -> object:
    """What one writes without a kernel, ranked like ours: fp32 scores, one k for all rows."""
    return fp32_product(problem.x, problem.W).topk(problem.width, sorted=False)


def fp32_product(x: Tensor, W: Tensor) -> Tensor:
    """`x @ W.T` of 16-bit matrices with the fp32 accumulators for a result; CPUs have no such product."""
    return torch.mm(x, W.T, out_dtype=torch.float32) if x.is_cuda else x.float() @ W.float().T


def select(bench: Bench, shape: str, outcome: Outcome) -> None:
    """`topk_select` of fp32 scores against `torch.topk` of the largest k, and against reading the scores once."""
    for problem in bench.both_ks(shape, torch.float32):
        bench.measure(outcome, shape, SELECT, problem, functools.partial(_select_contest, bench.rates))


def _select_contest(rates: traffic.Rates, problem: Problem) -> Contest:
    scores, k, width = problem.scores, problem.k, problem.width
    ours = lambda: ak.topk_select(scores, k, width)
    floor = traffic.select_bytes(problem.shape, width, scores.element_size()) / rates.copy
    rivals = (Rival("torch.topk", lambda: scores.topk(width, sorted=False)),)
    check = lambda: oracles.check_select(ours(), problem)
    return Contest(ours, check, rivals, (Floor("HBM floor", floor),))


def select_adversarial(bench: Bench, shape: str, outcome: Outcome) -> None:
    """Rows made to be hard to select from, against random ones."""
    problem = bench.problem(shape, dtype=torch.float32)
    for kind, name in ops.ADVERSARIAL.items():
        prepare = functools.partial(ops.select_adversarial, kind)
        bench.measure(outcome, shape, f"{SELECT}, {name} rows", problem, prepare)


def decode(bench: Bench, shape: str, outcome: Outcome) -> None:
    """`sparse_decode` against its floor, and what loss and value gradient add to it."""
    for problem in bench.both_ks(shape):
        bench.measure(outcome, shape, DECODE, problem, functools.partial(_decode_contest, bench.rates))
        bench.measure(outcome, shape, FUSED, problem, _fused_contest)


def _decode_contest(rates: traffic.Rates, problem: Problem) -> Contest:
    codes, W = problem.codes, problem.W
    ours = lambda: ak.sparse_decode(codes, W)
    floor = traffic.decode_seconds(problem.shape, traffic.Load.of(codes), W.element_size(), rates)
    check = lambda: oracles.check_decode(ours(), codes, W, problem)
    return Contest(ours, check, (), (Floor("max(L2, HBM) floor", floor),))


def _fused_contest(problem: Problem) -> Contest:
    codes, x = problem.codes, problem.x
    values, W = codes.values.clone().requires_grad_(), problem.W.detach().requires_grad_()
    ours = lambda: ak.decode_mse(codes._replace(values=values), W, None, x)

    def check() -> None:
        loss = ours()
        (value_grad,) = torch.autograd.grad(loss.sum(), values)
        oracles.check_loss(loss, value_grad, codes, problem)

    alone = lambda: ak.sparse_decode(codes, problem.W)
    return Contest(ours, check, (Rival("sparse_decode alone", alone, own=True),))


def weight_grads(bench: Bench, shape: str, outcome: Outcome) -> None:
    """The gradients of both weights, one after the other as a backward computes them, against their floor."""
    for problem in bench.both_ks(shape):
        bench.measure(outcome, shape, WEIGHTS, problem, functools.partial(_weight_grads_contest, bench.rates))


def _weight_grads_contest(rates: traffic.Rates, problem: Problem) -> Contest:
    codes, x, residual, d_sae = problem.codes, problem.x, problem.residual, problem.shape.F
    # Of W_enc it is that of other values, for the same time.
    ours = lambda: (ak.sparse_weight_grad(codes, residual, d_sae), ak.sparse_weight_grad(codes, x, d_sae))

    def check() -> None:
        for grad, dense in zip(ours(), (residual, x)):
            oracles.check_weight_grad(grad, codes, dense)

    floor = traffic.weight_grads_seconds(problem.shape, traffic.Load.of(codes), x.element_size(), rates)
    return Contest(ours, check, (), (Floor("2 L2 gathers + writes", floor),))


class Step:
    """Encode, loss and the gradients of both weights and of the biases: a training step without its optimizer."""

    def __init__(self, problem: Problem):
        self.problem = problem
        self.b_enc, self.b_dec = problem.b_enc.clone(), problem.x.new_zeros(problem.shape.D)
        # Two matrices: of one, the decode would find in the cache what the encode has read.
        self.W_enc, self.W_dec = problem.W.detach(), problem.W.clone()
        self.parameters = tuple(t.requires_grad_() for t in (self.W_enc, self.W_dec, self.b_enc, self.b_dec))

    def forward(self) -> tuple[ak.SparseCodes, Tensor]:
        x, k, width = self.problem.x, self.problem.k, self.problem.width
        codes = ak.topk_encode(x, self.W_enc, self.b_enc, k=k, k_max=width)
        return codes, ak.decode_mse(codes, self.W_dec, self.b_dec, x)

    def __call__(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.forward()[1].sum(), self.parameters)

    def check(self) -> None:
        codes, loss = self.forward()
        value_grad, *grads = torch.autograd.grad(loss.sum(), (codes.values, self.W_enc, self.W_dec))
        oracles.check_step(codes, value_grad, loss, tuple(grads), self.problem)


def step(bench: Bench, shape: str, outcome: Outcome) -> None:
    """A step without its optimizer, and without the gradient of x, against the bare product of its encoder."""
    uniform, spread = bench.both_ks(shape)
    bench.measure(outcome, shape, STEP, uniform, _step_contest)
    bench.measure(outcome, shape, STEP, spread, lambda problem: _beside_equal_k(problem, _step_contest))
    for problem in (uniform, spread):
        bench.measure(outcome, shape, INDEX, problem, _index_contest)


def _step_contest(problem: Problem) -> Contest:
    whole = Step(problem)
    return Contest(whole, whole.check, (Rival(CUBLAS, lambda: problem.x @ problem.W.T),))


def _index_contest(problem: Problem) -> Contest:
    """The codes by latent, which each weight gradient needs: the gradient of a single column is little else."""
    codes, column, d_sae = problem.codes, problem.x[:, :1].contiguous(), problem.shape.F
    one = lambda: ak.sparse_weight_grad(codes, column, d_sae)
    check = lambda: oracles.check_weight_grad(one(), codes, column)
    return Contest(lambda: (one(), one()), check, (Rival(STEP, Step(problem), own=True),))


def _beside_equal_k(problem: Problem, prepare: Callable[[Problem], Contest]) -> Contest:
    """The contest of a spread k, with our own call for the same mean as one more rival."""
    contest, equal = prepare(problem), prepare(problem.with_equal_k())
    return contest._replace(rivals=(*contest.rivals, Rival(EQUAL_K, equal.ours, own=True)))


def memory(bench: Bench, shape: str, outcome: Outcome) -> None:
    """Peak of allocated device memory beyond inputs, weights and results; the gradients of a step are results."""
    if bench.device.type != "cuda":
        raise NotMeasured("torch keeps no count of allocated CPU memory")
    problem = bench.problem(shape)
    dense = DenseStep(problem.W, problem.k)
    parameters = (dense.W_enc, dense.W_dec, dense.b_enc, dense.b_dec)
    dense_step = lambda: torch.autograd.grad(dense.forward(problem.x), parameters)
    for what, rival, prepare, theirs in (
        (ENCODE_MEMORY, DENSE_TOPK, lambda: encode_contest(problem).ours, lambda: _dense_topk(problem)),
        (STEP_MEMORY, DENSE, lambda: Step(problem), dense_step),
    ):
        most = peak_bytes(theirs, bench.device)
        for backend in bench.backends:
            with outcome.judging(f"{what} {shape}, {backend}"):
                least = peak_bytes(on(backend, prepare()), bench.device)
                figures = [least], [most]
                outcome.rows.append(Row.compare(what, rival, problem, *figures, unit="bytes", backend=backend))


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """What `call` has allocated at its peak, less what was there before and what it returns; at least 1."""
    # The first call makes what a library keeps, as workspaces are.
    call()
    release(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = call()
    torch.cuda.synchronize(device)
    peak, returned = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device) - before
    del result
    return max(1, peak - before - returned)


@contextmanager
def _matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
