"""Contests of single ops: each beside what PyTorch offers for the same result, or for a part of it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import aksae_kernels as ak
from aksae_kernels.testing import adversarial_rows, check_codes, encode_scores

from .case import Contest, Rival
from .problem import Problem
from .report import Target

ONEDNN, MKL = "oneDNN linear", "MKL F.linear"
ADVERSARIAL = {"all-equal": "all-equal", "ascending": "sorted", "one-block": "one hot block", "near-ties": "near-ties"}
"""Rows of `aksae_kernels.testing.adversarial_rows`, and what the tables call them."""


def fp32_gemms(x: Tensor, W: Tensor, b: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The library products that an encode contains; oneDNN's is missing from some builds of torch."""
    gemms = {}
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        gemms[ONEDNN] = lambda: torch.ops.mkldnn._linear_pointwise(x, W, b, "none", [], "")
    gemms[MKL] = lambda: F.linear(x, W, b)
    return gemms


def encode_fp32(problem: Problem) -> Contest:
    """`topk_encode` against the bare product, which leaves the selection to do."""
    x, W, b = problem.x, problem.W, problem.b_enc
    targets = {ONEDNN: Target(0.80, 0.60), MKL: Target(0.40, 0.30)}
    return _encode(problem, x, W, b, *(Rival(name, gemm, targets[name]) for name, gemm in fp32_gemms(x, W, b).items()))


def encode_bf16(problem: Problem) -> Contest:
    """The same in bf16; the product rounds its scores, ours are ranked before that."""
    x, W, b = (tensor.bfloat16() for tensor in (problem.x, problem.W, problem.b_enc))
    return _encode(problem, x, W, b, Rival("bf16 F.linear", lambda: F.linear(x, W, b), Target(1.15, 1.05)))


def encode_equal_latents(problem: Problem) -> Contest:
    """Latents that score alike to 1e-6, which no cheap bound tells apart, against random ones."""
    x, W, b = problem.x, problem.W, problem.b_enc
    alike = W[:1] * (1 + 1e-6 * problem.randn(0, *W.shape)).to(W.dtype)
    usual = lambda: ak.topk_encode(x, W, b, k=problem.k, k_max=problem.width)
    return _encode(problem, x, alike, torch.zeros_like(b), Rival("random weights", usual, own=True))


def _encode(problem: Problem, x: Tensor, W: Tensor, b: Tensor, *rivals: Rival) -> Contest:
    k, width = problem.k, problem.width
    ours = lambda: ak.topk_encode(x, W, b, k=k, k_max=width)

    def check() -> None:
        scores, tolerance = encode_scores(x, W, b)
        check_codes(ours(), scores, k, width, tolerance=tolerance)

    return Contest(ours, check, rivals)


def select(problem: Problem) -> Contest:
    """`topk_select` against `torch.topk`, which takes one k for all rows: the largest."""
    scores, width = problem.scores, problem.width
    return _select(
        problem, scores, Rival("torch.topk", lambda: scores.topk(width, sorted=False), Target(1 / 6, 1 / 10))
    )


def select_adversarial(kind: str, problem: Problem) -> Contest:
    """`topk_select` on rows of `aksae_kernels.testing.adversarial_rows`, against itself on random ones."""
    scores, k, width = problem.scores, problem.k, problem.width
    rows = adversarial_rows(problem.shape.F, device=problem.device)[kind].expand_as(scores).contiguous()
    random = Rival("random rows", lambda: ak.topk_select(scores, k, width), Target(1.5, 1.2), own=True)
    return _select(problem, rows, random)


def _select(problem: Problem, scores: Tensor, rival: Rival) -> Contest:
    k, width = problem.k, problem.width
    ours = lambda: ak.topk_select(scores, k, width)
    return Contest(ours, lambda: check_codes(ours(), scores, k, width), (rival,))


def price(problem: Problem) -> Contest:
    """One pass of `price_select` over twice as many candidates as there are latents, about half of which pay, against
    the decode of all of them."""
    candidates, price = _priced_candidates(problem)
    ours = lambda: ak.price_select(candidates, problem.W, None, problem.x, price=price)
    decode = lambda: ak.sparse_decode(candidates, problem.W)
    check = functools.partial(_check_price, ours, candidates, problem, price)
    return Contest(ours, check, (Rival("sparse_decode of the candidates", decode, Target(2.0, 1.4), own=True),))


def priced_encode(problem: Problem) -> Contest:
    """The same after the encode of the candidates, against an encode that needs no choice."""
    x, W, b, k, width = problem.x, problem.W, problem.b_enc, problem.k, problem.width
    candidates, price = _priced_candidates(problem)
    encode = lambda: ak.topk_encode(x, W, b, k=2 * k, k_max=2 * width)
    ours = lambda: ak.price_select(encode(), W, None, x, price=price)
    usual = lambda: ak.topk_encode(x, W, b, k=k, k_max=width)
    check = functools.partial(_check_price, ours, candidates, problem, price)
    return Contest(ours, check, (Rival("topk_encode alone", usual, Target(1.10, 1.05), own=True),))


def _priced_candidates(problem: Problem) -> tuple[ak.SparseCodes, Tensor]:
    candidates = ak.topk_encode(problem.x, problem.W, problem.b_enc, k=2 * problem.k, k_max=2 * problem.width)
    # What a latent of unit norm gains alone is the square of its value.
    return candidates, candidates.values[_live(candidates)].square().median()


def _check_price(
    ours: Callable[[], ak.SparseCodes], candidates: ak.SparseCodes, problem: Problem, price: Tensor
) -> None:
    """The choice of the reference, for some rows; a gain within rounding of the price may go either way, and others
    after it."""
    few = slice(0, 32)
    kept = ours().indices[few]
    with ak.use_backend("reference"):
        some = ak.SparseCodes(*(part[few] for part in candidates))
        expected = ak.price_select(some, problem.W, None, problem.x[few], price=price).indices
    same = (kept == expected).all(-1).float().mean()
    assert same >= 0.9, f"{1 - same:.0%} of the rows keep others than the reference"


def decode(problem: Problem) -> Contest:
    """`decode_mse` with the gradient of its values, against torch's decode alone."""
    codes, W, x = problem.codes, problem.W, problem.x
    values = codes.values.clone().requires_grad_()
    ours = lambda: ak.decode_mse(codes._replace(values=values), W, None, x)
    bag = embedding_bag(codes)

    def check() -> None:
        loss, error = ours(), bag(W) - x
        (value_grad,) = torch.autograd.grad(loss.sum(), values)
        torch.testing.assert_close(loss.detach(), error.square().sum(-1), rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(value_grad, _value_grad(codes, W, 2 * error), rtol=1e-3, atol=1e-3)

    return Contest(ours, check, (Rival("embedding_bag forward", lambda: bag(W), Target(1.15, 1.0)),))


def weight_grads(problem: Problem) -> Contest:
    """The gradients of `W_dec` and of `W_enc`, against torch's backward of the decoder alone."""
    codes, x, residual, d_sae = problem.codes, problem.x, problem.residual, problem.shape.F
    encoder_codes = codes._replace(values=ak.sparse_value_grad(residual, codes, problem.W))
    bag_backward = embedding_bag_backward(codes, problem.W, residual)

    def ours() -> tuple[Tensor, Tensor]:
        # What the backward of a step computes, one after the other: where it does both in one, change this.
        return ak.sparse_weight_grad(codes, residual, d_sae), ak.sparse_weight_grad(encoder_codes, x, d_sae)

    def check() -> None:
        expected = bag_backward(), embedding_bag_backward(encoder_codes, problem.W, x)()
        torch.testing.assert_close(ours(), expected, rtol=1e-4, atol=1e-4)

    return Contest(ours, check, (Rival("embedding_bag backward (decoder)", bag_backward, Target(0.25, 0.12)),))


def ragged(problem: Problem) -> Contest:
    """A decode and its backward for rows of unequal k, against as many latents in rows of equal k."""
    equal = problem.with_equal_k()
    W = problem.W.clone().requires_grad_()

    def step(codes: ak.SparseCodes) -> tuple[Tensor, ...]:
        values = codes.values.detach().requires_grad_()
        loss = ak.decode_mse(codes._replace(values=values), W, None, problem.x)
        return torch.autograd.grad(loss.sum(), (values, W))

    def check() -> None:
        for codes in (problem.codes, equal.codes):
            grad = 2 * (embedding_bag(codes)(problem.W) - problem.x)
            expected = _value_grad(codes, problem.W, grad), embedding_bag_backward(codes, W, grad)()
            torch.testing.assert_close(step(codes), expected, rtol=1e-3, atol=1e-3)

    rival = Rival(f"constant k = {equal.label}", lambda: step(equal.codes), Target(1.15, 1.05), own=True)
    return Contest(lambda: step(problem.codes), check, (rival,))


def embedding_bag(codes: ak.SparseCodes) -> Callable[[Tensor], Tensor]:
    """torch's decode of `codes` with a weight `[F, D]`; it is given the live latents alone, and pays for no padding."""
    live = _live(codes)
    indices, values = codes.indices[live].long(), codes.values[live]
    counts = codes.counts.long()
    offsets = counts.cumsum(0) - counts
    return lambda W: F.embedding_bag(indices, W, offsets, mode="sum", per_sample_weights=values)


def embedding_bag_backward(codes: ak.SparseCodes, W: Tensor, grad: Tensor) -> Callable[[], Tensor]:
    """The gradient of W alone; the forward has been, and its graph is kept from call to call."""
    weight = W.detach().clone().requires_grad_()
    y = embedding_bag(codes)(weight)
    return lambda: torch.autograd.grad(y, weight, grad, retain_graph=True)[0]


def _value_grad(codes: ak.SparseCodes, W: Tensor, grad: Tensor) -> Tensor:
    return (grad @ W.T).gather(-1, codes.indices.clamp(min=0).long()).where(_live(codes), 0)


def _live(codes: ak.SparseCodes) -> Tensor:
    return torch.arange(codes.indices.shape[1]) < codes.counts.unsqueeze(-1)
