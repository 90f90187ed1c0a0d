"""Sparse products: sparse_decode, decode_mse, sparse_encode, and the two gradients of sparse_decode."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import INTERPRETED, MANY_ROWS, THREADS

from aksae_kernels import (
    SparseCodes,
    decode_mse,
    sparse_decode,
    sparse_encode,
    sparse_value_grad,
    sparse_weight_grad,
    topk_encode,
)
from aksae_kernels.codes import live_slots
from aksae_kernels.testing import (
    INT_MIN,
    DoubleDouble,
    check_errors,
    dense_codes,
    exact_codes,
    poison_padding,
    random_codes,
)

SHAPES = [
    # leading dimensions, K, F, D
    ((3,), 4, 64, 5),
    ((2, 3), 7, 33, 7),
    ((), 16, 257, 16),
    ((), 1, 1, 1),
    ((MANY_ROWS,), 3, 7, 2),
    ((7,), 40, 40, 257),
    ((5,), 9, 4, 6),
    ((5,), 0, 9, 3),
    ((4,), 3, 6, 0),
    ((4,), 2, 0, 8),
    ((4,), 0, 0, 3),
    ((0,), 8, 9, 4),
    ((0,), 0, 0, 0),
    ((2, 0), 3, 5, 2),
]
shapes = pytest.mark.parametrize(
    ("lead", "width", "d_sae", "d_in"), SHAPES, ids=lambda value: str(value).replace(" ", "")
)
by_hand = pytest.mark.parametrize("by_hand", [False, True], ids=["selected", "by-hand"])


def rows_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def at_codes(products, codes: SparseCodes):
    """`products [..., F]`, a tensor or a DoubleDouble, at the latents of `codes`, 0 in the padding."""
    live = live_slots(codes)
    return products.gather(-1, codes.indices.where(live, 0).long()).where(live, 0)


def value_grad_oracle(grad: torch.Tensor, codes: SparseCodes, W: torch.Tensor) -> torch.Tensor:
    """<grad[b], W[index]> in fp64, 0 in the padding."""
    if not W.shape[0]:
        return torch.zeros(codes.indices.shape, dtype=torch.float64, device=W.device)
    return at_codes(grad.double() @ W.double().T, codes)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# --------------------------------------------------------------------------------- exact, whatever the shape


@shapes
@by_hand
def test_decode_exact_on_integers(case, lead, width, d_sae, d_in, by_hand):
    codes = random_codes(lead, width, d_sae, dtype=case.dtype, device=case.device, integers=True, by_hand=by_hand)
    W_dec, b_dec = case.integers(d_sae, d_in, seed=1), case.integers(d_in, seed=2)
    expected = dense_codes(codes, d_sae) @ W_dec.double()
    for poisoned in (codes, poison_padding(codes)):
        y = sparse_decode(poisoned, W_dec)
        assert y.dtype == case.dtype
        assert torch.equal(y, expected.to(case.dtype))
        assert torch.equal(sparse_decode(poisoned, W_dec, b_dec), (expected + b_dec.double()).to(case.dtype))


@shapes
@by_hand
def test_decode_mse_exact_on_integers(case, lead, width, d_sae, d_in, by_hand):
    codes = random_codes(lead, width, d_sae, dtype=case.dtype, device=case.device, integers=True, by_hand=by_hand)
    W_dec, b_dec, target = (
        case.integers(d_sae, d_in, seed=1),
        case.integers(d_in, seed=2),
        case.integers(*lead, d_in, seed=3),
    )
    residual = dense_codes(codes, d_sae) @ W_dec.double() - target.double()
    for poisoned in (codes, poison_padding(codes)):
        loss = decode_mse(poisoned, W_dec, None, target)
        assert loss.dtype == accumulator(case.dtype)
        assert torch.equal(loss, residual.square().sum(-1).to(loss.dtype))
        loss = decode_mse(poisoned, W_dec, b_dec, target)
        assert torch.equal(loss, (residual + b_dec.double()).square().sum(-1).to(loss.dtype))


@shapes
@by_hand
def test_value_grad_exact_on_integers(case, lead, width, d_sae, d_in, by_hand):
    codes = random_codes(lead, width, d_sae, dtype=case.dtype, device=case.device, by_hand=by_hand)
    W, grad = case.integers(d_sae, d_in, seed=1), case.integers(*lead, d_in, seed=2)
    expected = value_grad_oracle(grad, codes, W).to(case.dtype)
    for poisoned in (codes, poison_padding(codes)):
        assert torch.equal(sparse_value_grad(grad, poisoned, W), expected)
        assert torch.equal(sparse_encode(poisoned, grad, W), expected)


@shapes
@by_hand
def test_weight_grad_exact_on_integers(case, lead, width, d_sae, d_in, by_hand):
    codes = random_codes(lead, width, d_sae, dtype=case.dtype, device=case.device, integers=True, by_hand=by_hand)
    dense = case.integers(*lead, d_in, seed=2)
    expected = (rows_of(dense_codes(codes, d_sae)).T @ rows_of(dense).double()).to(case.dtype)
    for poisoned in (codes, poison_padding(codes)):
        assert torch.equal(sparse_weight_grad(poisoned, dense, d_sae), expected)


@shapes
@by_hand
def test_gradients_exact_on_integers(case, lead, width, d_sae, d_in, by_hand):
    codes = random_codes(lead, width, d_sae, dtype=case.dtype, device=case.device, integers=True, by_hand=by_hand)
    W_dec = case.integers(d_sae, d_in, seed=1).requires_grad_()
    b_dec = case.integers(d_in, seed=2).requires_grad_()
    values = poison_padding(codes).values.requires_grad_()
    grad = case.integers(*lead, d_in, seed=3)
    sparse_decode(poison_padding(codes)._replace(values=values), W_dec, b_dec).backward(grad)
    dense, rows = rows_of(dense_codes(codes, d_sae)), rows_of(grad).double()
    assert torch.equal(values.grad, value_grad_oracle(grad, codes, W_dec.detach()).to(case.dtype))
    assert torch.equal(W_dec.grad, (dense.T @ rows).to(case.dtype))
    assert torch.equal(b_dec.grad, rows.sum(0).to(case.dtype))


@shapes
@by_hand
def test_decode_mse_gradients_exact_on_integers(case, lead, width, d_sae, d_in, by_hand):
    if case.dtype in (torch.bfloat16, torch.float16):
        pytest.skip("2 * residual * grad has more digits than 16 bits hold; see test_gradients_lose_no_more_than_torch")
    codes = random_codes(lead, width, d_sae, dtype=case.dtype, device=case.device, integers=True, by_hand=by_hand)
    W_dec = case.integers(d_sae, d_in, seed=1).requires_grad_()
    b_dec = case.integers(d_in, seed=2).requires_grad_()
    target = case.integers(*lead, d_in, seed=3).requires_grad_()
    values = poison_padding(codes).values.requires_grad_()
    loss = decode_mse(poison_padding(codes)._replace(values=values), W_dec, b_dec, target)
    scale = torch.randint(-2, 3, lead, generator=torch.Generator().manual_seed(4)).to(loss)
    loss.backward(scale)
    dense = dense_codes(codes, d_sae)
    residual = dense @ W_dec.detach().double() + b_dec.detach().double() - target.detach().double()
    grad = 2 * scale.double().unsqueeze(-1) * residual
    assert torch.equal(values.grad, value_grad_oracle(grad, codes, W_dec.detach()).to(case.dtype))
    assert torch.equal(W_dec.grad, (rows_of(dense).T @ rows_of(grad)).to(case.dtype))
    assert torch.equal(b_dec.grad, rows_of(grad).sum(0).to(case.dtype))
    assert torch.equal(target.grad, -grad.to(case.dtype))


@shapes
@by_hand
def test_sparse_encode_gradients_exact_on_integers(case, lead, width, d_sae, d_in, by_hand):
    codes = random_codes(lead, width, d_sae, dtype=case.dtype, device=case.device, integers=True, by_hand=by_hand)
    W, x = case.integers(d_sae, d_in, seed=1).requires_grad_(), case.integers(*lead, d_in, seed=2).requires_grad_()
    sparse_encode(poison_padding(codes), x, W).backward(poison_padding(codes).values)
    dense = rows_of(dense_codes(codes, d_sae))
    assert torch.equal(rows_of(x.grad), (dense @ W.detach().double()).to(case.dtype))
    assert torch.equal(W.grad, (dense.T @ rows_of(x.detach()).double()).to(case.dtype))


# ----------------------------------------------------------------------------------------- error of real sums


def problem(case, lead=(60,), width=40, d_sae=300, d_in=130, draw=0, **kwargs):
    seed = 100 * draw
    codes = random_codes(lead, width, d_sae, dtype=case.dtype, device=case.device, seed=seed, **kwargs)
    W_dec = case.randn(d_sae, d_in, seed=seed + 1)
    W_dec = W_dec / W_dec.norm(dim=1, keepdim=True)
    return codes, W_dec, case.randn(d_in, seed=seed + 2), case.randn(*lead, d_in, seed=seed + 3)


@by_hand
@pytest.mark.parametrize(("width", "d_sae", "d_in"), [(40, 300, 130), (150, 200, 33), (5, 2000, 768)])
def test_products_lose_no_more_than_torch(case, width, d_sae, d_in, by_hand):
    def products(draw):
        codes, W, b, target = problem(case, width=width, d_sae=d_sae, d_in=d_in, by_hand=by_hand, draw=draw)
        dense = exact_codes(codes, d_sae)
        dense_torch = dense.round().to(case.dtype)
        y, y_torch = dense @ W + b, torch.nn.functional.linear(dense_torch, W.T, b)
        loss_torch = (y_torch - target).to(accumulator(case.dtype)).square().sum(-1)
        dots, dots_torch = at_codes(DoubleDouble(target) @ W.T, codes), at_codes(target @ W.T, codes)
        weight, weight_torch = dense.T @ target, dense_torch.T @ target
        return {
            "sparse_decode": (sparse_decode(codes, W, b), y, y_torch),
            "decode_mse": (decode_mse(codes, W, b, target), (y - target).square().sum(-1), loss_torch),
            "sparse_value_grad": (sparse_value_grad(target, codes, W), dots, dots_torch),
            "sparse_weight_grad": (sparse_weight_grad(codes, target, d_sae), weight, weight_torch),
        }

    check_errors(map(products, range(case.draws)))


def test_a_loss_of_many_columns_loses_no_more_than_torch(case):
    """Thousands of squares in one sum: a chain of them, slice after slice, would lose more and more."""

    def loss(draw):
        codes, W, b, target = problem(case, (40,), width=3, d_sae=20, d_in=4096, draw=draw)
        dense = exact_codes(codes, 20)
        y, y_torch = dense @ W + b, torch.nn.functional.linear(dense.round().to(case.dtype), W.T, b)
        loss_torch = (y_torch - target).to(accumulator(case.dtype)).square().sum(-1)
        return {"decode_mse": (decode_mse(codes, W, b, target), (y - target).square().sum(-1), loss_torch)}

    check_errors(map(loss, range(case.draws)))


def torch_decode(values, codes, W_dec, b_dec):
    dense = torch.zeros(*codes.counts.shape, W_dec.shape[0], dtype=values.dtype, device=values.device)
    live = live_slots(codes)
    return dense.scatter_add(-1, codes.indices.where(live, 0).long(), values.where(live, 0)) @ W_dec + b_dec


def torch_decode_mse(values, codes, W_dec, b_dec, target):
    return (torch_decode(values, codes, W_dec, b_dec) - target).to(accumulator(values.dtype)).square().sum(-1)


def upstream(out: torch.Tensor) -> torch.Tensor:
    """A gradient for `out`, of both signs."""
    return torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view(out.shape).to(out)


def gradients(function, inputs):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(*leaves)
    out.backward(upstream(out))
    return [leaf.grad for leaf in leaves]


def exact_gradients(codes, W, grad):
    """Those of values, W_dec and b_dec where the decoded rows have the gradient `grad`, a DoubleDouble."""
    return at_codes(grad @ W.T, codes), exact_codes(codes, len(W)).T @ grad, grad.sum(0)


@by_hand
def test_gradients_lose_no_more_than_torch(case, by_hand):
    def of_inputs(draw):
        codes, W, b, target = problem(case, by_hand=by_hand, draw=draw)
        y = exact_codes(codes, len(W)) @ W + b
        of_y = DoubleDouble(upstream(target))
        of_loss = upstream(decode_mse(codes, W, b, target)).double()
        of_y_by_loss = (y - target) * (2 * of_loss).unsqueeze(-1)
        judged = {}
        for name, ours, torchs, inputs, expected in (
            (
                "sparse_decode",
                lambda v, W, b: sparse_decode(codes._replace(values=v), W, b),
                lambda v, W, b: torch_decode(v, codes, W, b),
                (codes.values, W, b),
                exact_gradients(codes, W, of_y),
            ),
            (
                "decode_mse",
                lambda v, W, b, t: decode_mse(codes._replace(values=v), W, b, t),
                lambda v, W, b, t: torch_decode_mse(v, codes, W, b, t),
                (codes.values, W, b, target),
                (*exact_gradients(codes, W, of_y_by_loss), -of_y_by_loss),
            ),
        ):
            actual, by_torch = gradients(ours, inputs), gradients(torchs, inputs)
            for argument, a, e, t in zip(("values", "W_dec", "b_dec", "target"), actual, expected, by_torch):
                assert a.dtype == case.dtype
                judged[f"{name}: {argument}"] = a, e, t
        return judged

    check_errors(map(of_inputs, range(case.draws)))


def test_many_hits_of_one_latent_lose_no_more_than_torch(case):
    """Thousands of positive terms in one sum: a weight's gradient, and a bias's as the gradient of an encode has it."""
    rows = 3000
    pattern = torch.zeros(rows, 1, dtype=torch.int32, device=case.device)
    counts = torch.ones(rows, dtype=torch.int32, device=case.device)

    def sums(draw):
        values, dense = case.randn(rows, 1, seed=2 * draw).abs(), case.randn(rows, 9, seed=2 * draw + 1).abs()
        codes = SparseCodes(values, pattern, counts)
        weight, bias = torch.ops.aksae.sparse_weight_grad(*codes, dense, 1, True, case.backend)
        expected, by_torch = DoubleDouble(values).T @ dense, values.T @ dense
        return {
            "the weight": (sparse_weight_grad(codes, dense, 1), expected, by_torch),
            "the weight beside the bias": (weight, expected, by_torch),
            "the bias": (bias, DoubleDouble(values).sum(0), values.sum(0)),
        }

    # The interpreter takes 40 s for each.
    check_errors(map(sums, range(1 if INTERPRETED else case.draws)))


def test_sums_are_not_held_in_16_bits(case):
    # 4096 ones: a running sum in bf16 stops at 256, in fp16 at 2048.
    ones = torch.ones(1, 4096, dtype=case.dtype, device=case.device)
    index = torch.zeros(1, 4096, dtype=torch.int32, device=case.device)
    codes = SparseCodes(ones, index, torch.tensor([4096], dtype=torch.int32, device=case.device))
    assert sparse_decode(codes, ones[:, :3]).tolist() == [[4096.0] * 3]
    assert decode_mse(codes, ones[:, :3], None, ones[:, :3] * 0).tolist() == [3 * 4096.0**2]
    assert (sparse_value_grad(ones, codes, ones) == 4096).all()
    assert sparse_weight_grad(codes, ones[:, :2], 1).tolist() == [[4096.0] * 2]
    many = SparseCodes(ones.view(4096, 1), index.view(4096, 1), torch.ones_like(index.view(4096)))
    assert sparse_weight_grad(many, ones.view(4096, 1), 1).tolist() == [[4096.0]]


@by_hand
def test_gradcheck(fp64, by_hand):
    codes, W, b, target = problem(fp64, (2, 3), 4, 9, 5, by_hand=by_hand)
    leaves = [t.detach().requires_grad_() for t in (target, W)]
    assert torch.autograd.gradcheck(lambda x, W: sparse_encode(codes, x, W), leaves)
    leaves = [t.requires_grad_() for t in (codes.values, W.detach(), b, target)]
    assert torch.autograd.gradcheck(lambda v, W, b: sparse_decode(codes._replace(values=v), W, b), leaves[:3])
    assert torch.autograd.gradcheck(lambda v, W, b, t: decode_mse(codes._replace(values=v), W, b, t), leaves)
    assert torch.autograd.gradcheck(
        lambda v, W, t: decode_mse(codes._replace(values=v), W, None, t), [leaves[i] for i in (0, 1, 3)]
    )


# ----------------------------------------------------------------------------------------- strides and layout


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, every second element of a transposed larger tensor."""
    if tensor.ndim == 1:
        return torch.stack([tensor, tensor + 1], -1)[:, 0]
    big = torch.full((2 * tensor.shape[-1], *tensor.shape[:-1]), 7, dtype=tensor.dtype, device=tensor.device)
    view = big[::2].movedim(0, -1)
    view.copy_(tensor)
    assert not view.is_contiguous()
    return view


@pytest.mark.parametrize("lead", [(6,), (2, 3)], ids=str)
def test_any_strides(case, lead):
    codes = random_codes(lead, 4, 20, dtype=case.dtype, device=case.device, integers=True)
    W, b, dense = case.integers(20, 9, seed=1), case.integers(9, seed=2), case.integers(*lead, 9, seed=3)
    codes_s = SparseCodes(*map(strided, codes))
    W_s, b_s, dense_s = strided(W), strided(b), strided(dense)
    assert torch.equal(sparse_decode(codes_s, W_s, b_s), sparse_decode(codes, W, b))
    assert torch.equal(decode_mse(codes_s, W_s, b_s, dense_s), decode_mse(codes, W, b, dense))
    assert torch.equal(sparse_value_grad(dense_s, codes_s, W_s), sparse_value_grad(dense, codes, W))
    assert torch.equal(sparse_weight_grad(codes_s, dense_s, 20), sparse_weight_grad(codes, dense, 20))


def test_expanded_inputs(case):
    codes = random_codes((1,), 4, 20, dtype=case.dtype, device=case.device, integers=True, seed=5)
    wide = SparseCodes(codes.values.expand(6, 4), codes.indices.expand(6, 4), codes.counts.expand(6))
    copied = SparseCodes(*(t.contiguous() for t in wide))
    W, b, dense = (
        case.integers(1, 9, seed=1).expand(20, 9),
        case.integers(1).expand(9),
        case.integers(6, 1).expand(6, 9),
    )
    assert torch.equal(sparse_decode(wide, W, b), sparse_decode(copied, W.contiguous(), b.contiguous()))
    assert torch.equal(
        decode_mse(wide, W, b, dense), decode_mse(copied, W.contiguous(), b.contiguous(), dense.contiguous())
    )
    assert torch.equal(sparse_value_grad(dense, wide, W), sparse_value_grad(dense.contiguous(), copied, W.contiguous()))
    assert torch.equal(sparse_weight_grad(wide, dense, 20), sparse_weight_grad(copied, dense.contiguous(), 20))


def test_expanded_and_strided_gradients(fp32):
    codes = random_codes((2, 3), 4, 20, device=fp32.device, integers=True)
    W, b, target = fp32.integers(20, 9, seed=1), fp32.integers(9, seed=2), fp32.integers(2, 3, 9, seed=3)

    def run(function, grad):
        leaves = [t.clone().requires_grad_() for t in (codes.values, W, b, target)]
        out = function(codes._replace(values=leaves[0]), *leaves[1:])
        out.backward(torch.full_like(out, 2.0) if grad is None else grad(out))
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    for function in (lambda codes, W, b, _: sparse_decode(codes, W, b), decode_mse):
        plain = run(function, None)
        for grad in (
            lambda out: torch.tensor(2.0, device=out.device).expand(out.shape),
            lambda out: strided(torch.full_like(out, 2.0)),
        ):
            assert all(torch.equal(a, b) for a, b in zip(run(function, grad), plain, strict=True))


def test_rows_far_apart_in_memory(backend):
    # Never written, so the pages in between cost nothing: only offsets beyond 2^31 elements are at stake.
    stride = 2**31 + 5
    base = torch.empty(stride + 64, dtype=torch.bfloat16)
    codes = random_codes((2,), 2, 2, dtype=torch.bfloat16, integers=True, by_hand=True, seed=1)
    W = base.as_strided((2, 8), (stride, 1)).copy_(torch.arange(16.0).view(2, 8))
    grad = base.as_strided((2, 8), (stride, 1), 16).copy_(torch.arange(16.0).view(2, 8) - 8)
    values = base.as_strided((2, 2), (stride, 1), 32).copy_(codes.values)
    assert torch.equal(sparse_decode(codes._replace(values=values), W), sparse_decode(codes, W.contiguous()))
    assert torch.equal(decode_mse(codes, W, None, grad), decode_mse(codes, W.contiguous(), None, grad.contiguous()))
    assert torch.equal(sparse_value_grad(grad, codes, W), sparse_value_grad(grad.contiguous(), codes, W.contiguous()))
    assert torch.equal(sparse_weight_grad(codes, grad, 2), sparse_weight_grad(codes, grad.contiguous(), 2))


# ----------------------------------------------------------------------------- what is read, and what surfaces


def test_padding_is_never_read(case):
    codes, W, b, target = problem(case, (20,), 12, 50, 17)
    poisoned = poison_padding(codes)
    assert poisoned.values.isnan().any()
    assert (poisoned.indices == INT_MIN).any()
    assert torch.equal(sparse_decode(poisoned, W, b), sparse_decode(codes, W, b))
    assert torch.equal(decode_mse(poisoned, W, b, target), decode_mse(codes, W, b, target))
    assert torch.equal(sparse_value_grad(target, poisoned, W), sparse_value_grad(target, codes, W))
    assert torch.equal(sparse_weight_grad(poisoned, target, 50), sparse_weight_grad(codes, target, 50))
    for function in (lambda codes, *inputs: sparse_decode(codes, *inputs[:2]), decode_mse):
        values = poisoned.values.clone().requires_grad_()
        function(poisoned._replace(values=values), W, b, target).sum().backward()
        assert (values.grad[~live_slots(codes)] == 0).all()


def test_latents_nobody_uses_are_not_read(case):
    codes = random_codes((6,), 4, 10, dtype=case.dtype, device=case.device, integers=True)
    W, b, dense = case.integers(12, 5, seed=1), case.integers(5, seed=2), case.integers(6, 5, seed=3)
    clean = (sparse_decode(codes, W, b), decode_mse(codes, W, b, dense), sparse_value_grad(dense, codes, W))
    # Index -1 of the padding must not wrap round to the last latent, nor be clamped to the first.
    codes = codes._replace(indices=codes.indices.where(codes.indices < 0, codes.indices + 1))
    W = W.roll(1, 0)
    W[0], W[11] = math.nan, math.nan
    dirty = (sparse_decode(codes, W, b), decode_mse(codes, W, b, dense), sparse_value_grad(dense, codes, W))
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    weight = sparse_weight_grad(codes, dense, 12)
    assert (weight[0] == 0).all()
    assert (weight[11] == 0).all()


def test_nan_and_infinity_surface(case):
    index = torch.tensor([[0, 1], [1, 2], [2, 3]], dtype=torch.int32, device=case.device)
    counts = torch.full((3,), 2, dtype=torch.int32, device=case.device)
    codes = SparseCodes(torch.ones(3, 2, dtype=case.dtype, device=case.device), index, counts)
    W = torch.ones(4, 3, dtype=case.dtype, device=case.device)
    W[0, 0], W[3, 1] = math.nan, math.inf
    y = sparse_decode(codes, W)
    assert y.isnan().tolist() == [[True, False, False], [False] * 3, [False] * 3]
    assert y[2, 1] == math.inf
    assert y[1].tolist() == [2, 2, 2]
    loss = decode_mse(codes, W, None, torch.zeros_like(y))
    assert loss[0].isnan()
    assert loss[1] == 12
    assert loss[2] == math.inf
    dots = sparse_value_grad(torch.ones_like(y), codes, W)
    assert dots[0, 0].isnan()
    assert dots[0, 1] == 3
    assert dots[2, 1] == math.inf
    dense = torch.ones_like(y)
    dense[1, 2] = math.nan
    weight = sparse_weight_grad(codes, dense, 4)
    assert weight.isnan().any(-1).tolist() == [False, True, True, False]
    # A zero value does not hide what it multiplies.
    zero = codes._replace(values=torch.zeros_like(codes.values))
    assert sparse_decode(zero, W)[0, 0].isnan()
    assert sparse_weight_grad(zero, dense, 4)[1, 2].isnan()


def test_same_bits_again_and_with_other_threads(case):
    codes, W, b, target = problem(case, (90,), 30, 400, 70)

    def everything():
        leaves = [t.detach().clone().requires_grad_() for t in (codes.values, W, b, target)]
        y = sparse_decode(codes._replace(values=leaves[0]), *leaves[1:3])
        loss = decode_mse(codes._replace(values=leaves[0]), *leaves[1:])
        (y.sum() + loss.sum()).backward()
        return y, loss, *(leaf.grad for leaf in leaves)

    def same(a, b):
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    first = everything()
    assert same(everything(), first)
    if case.backend == "reference":
        # Plain torch products may sum in another order with other threads.
        return
    threads = torch.get_num_threads()
    try:
        for n in THREADS:
            torch.set_num_threads(n)
            assert same(everything(), first)
    finally:
        torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 1), (1, 2), (0, 2, 3), (0, 1, 2, 3)], ids=str)
def test_each_gradient_alone(fp32, wanted):
    codes, W, b, target = problem(fp32, (7,), 5, 30, 11)

    def run(function, names):
        leaves = [t.detach().clone().requires_grad_(i in names) for i, t in enumerate((codes.values, W, b, target))]
        out = function(codes._replace(values=leaves[0]), *leaves[1:])
        if out.requires_grad:
            out.sum().backward()
        return [leaf.grad for leaf in leaves]

    for function in (lambda codes, W, b, _: sparse_decode(codes, W, b), decode_mse):
        for i, (alone, together) in enumerate(zip(run(function, wanted), run(function, range(4)), strict=True)):
            assert alone is None or torch.equal(alone, together)
            assert (alone is not None) == (i in wanted and together is not None)


@pytest.mark.parametrize("wanted", range(2), ids=["values", "W_dec"])
@pytest.mark.parametrize("op", ["sparse_decode", "decode_mse"])
@pytest.mark.parametrize("reduce", [torch.sum, lambda out: out.square().sum()], ids=["sum", "squares"])
def test_double_backward_raises(fp32, op, wanted, reduce):
    codes, W, b, target = problem(fp32, (7,), 5, 30, 11)
    leaves = [t.detach().requires_grad_() for t in (codes.values, W)]
    codes = codes._replace(values=leaves[0])
    out = sparse_decode(codes, leaves[1], b) if op == "sparse_decode" else decode_mse(codes, leaves[1], b, target)

    def twice():
        (grad,) = torch.autograd.grad(reduce(out), leaves[wanted], create_graph=True)
        # The other terms see to it that a gradient which lost its graph is not an error by itself.
        (grad.square().sum() + leaves[0].sum() + leaves[1].sum()).backward()

    with pytest.raises(RuntimeError):
        twice()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_second_derivatives_of_decode_mse_that_exist_are_right(dtype):
    """Those by b_dec and target: a backward that is differentiated finds them in the decode. Its gradients stay."""
    codes = random_codes((7,), 5, 30, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    W, b, target = (
        torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype) for s in ((30, 11), (11,), (7, 11))
    )
    leaves = [t.requires_grad_() for t in (codes.values, W, b, target)]
    loss = decode_mse(codes, W, b, target).double().square().sum()
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves, create_graph=True)
    for a, expected in zip(again, once, strict=True):
        torch.testing.assert_close(a, expected)
    if dtype == torch.float64:
        assert torch.autograd.gradgradcheck(lambda b, target: decode_mse(codes, W.detach(), b, target), leaves[2:])


def test_decode_mse_is_not_differentiated_by_what_it_did_not_keep(fp32):
    (values, *pattern), W, b, target = problem(fp32, (7,), 5, 30, 11)
    with pytest.raises(ValueError, match=r"decode_mse: residual must be True"):
        torch.ops.aksae.decode_mse(values, *pattern, W.requires_grad_(), b, target, False, True, fp32.backend)
    values.requires_grad_()
    with pytest.raises(ValueError, match=r"decode_mse: value_grad must be True"):
        torch.ops.aksae.decode_mse(values, *pattern, W.detach(), b, target, True, False, fp32.backend)


def test_backward_may_run_again(fp32):
    codes, W, b, target = problem(fp32, (7,), 5, 30, 11)
    leaves = [t.detach().requires_grad_() for t in (codes.values, W, b, target)]
    codes = codes._replace(values=leaves[0])
    loss = sparse_decode(codes, leaves[1], b).sum() + decode_mse(codes, *leaves[1:]).sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_gradient_ops_have_no_silent_gradient(fp32):
    codes, W, _, target = problem(fp32, (7,), 5, 30, 11)
    codes = codes._replace(values=codes.values.requires_grad_())
    with pytest.raises(RuntimeError):
        sparse_value_grad(target.requires_grad_(), codes, W).sum().backward()
    with pytest.raises(RuntimeError):
        sparse_weight_grad(codes, target, 30).sum().backward()


def test_sparse_encode_has_one_derivative(fp32):
    codes, W, _, x = problem(fp32, (7,), 5, 30, 11)
    x, W = x.requires_grad_(), W.detach().requires_grad_()
    (grad,) = torch.autograd.grad(sparse_encode(codes, x, W).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        (grad.square().sum() + x.sum() + W.sum()).backward()


def test_sparse_encode_is_topk_encode_at_its_latents(fp32):
    x, W = fp32.randn(7, 11).requires_grad_(), fp32.randn(30, 11, seed=1).requires_grad_()
    codes = topk_encode(x, W, k=5)
    again = sparse_encode(codes, x, W)
    torch.testing.assert_close(again, codes.values)
    upstream = fp32.randn(7, 5, seed=2)
    for a, b in zip(*(torch.autograd.grad(out, (x, W), upstream) for out in (again, codes.values)), strict=True):
        torch.testing.assert_close(a, b)


def test_grad_under_no_grad(fp32):
    codes, W, b, target = problem(fp32, (7,), 5, 30, 11)
    W = W.detach().requires_grad_()
    with torch.no_grad():
        assert not sparse_decode(codes, W, b).requires_grad
        assert not decode_mse(codes, W, b, target).requires_grad


def test_autocast_casts_first(backend):
    codes = random_codes((6,), 4, 20)
    W, b, target = torch.randn(20, 33, requires_grad=True), torch.randn(33), torch.randn(6, 33).bfloat16()
    half = codes._replace(values=codes.values.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, loss = sparse_decode(codes, W, b), decode_mse(codes, W, b, target)
        dots, weight = sparse_value_grad(target, codes, W), sparse_weight_grad(codes, target, 20)
    W16, b16 = W.detach().bfloat16(), b.bfloat16()
    assert torch.equal(y, sparse_decode(half, W16, b16))
    assert y.dtype == torch.bfloat16
    assert torch.equal(loss, decode_mse(half, W16, b16, target))
    assert loss.dtype == torch.float32
    assert torch.equal(dots, sparse_value_grad(target, half, W16))
    assert dots.dtype == torch.bfloat16
    assert torch.equal(weight, sparse_weight_grad(half, target, 20))
    assert weight.dtype == torch.bfloat16
    (y.float().sum() + loss.sum()).backward()
    assert W.grad.dtype == torch.float32


# --------------------------------------------------------------------------------------------- bad arguments


@pytest.mark.parametrize("index", [7, -1, 2**31 - 1, INT_MIN])
def test_index_out_of_range_raises(backend, index):
    codes = random_codes((5,), 3, 7, by_hand=True)
    codes.counts[3] = 3
    codes.indices[3, 2] = index
    W, dense = torch.ones(7, 4), torch.ones(5, 4)
    for call in (
        lambda: sparse_decode(codes, W),
        lambda: decode_mse(codes, W, None, dense),
        lambda: sparse_value_grad(dense, codes, W),
        lambda: sparse_weight_grad(codes, dense, 7),
    ):
        with pytest.raises(IndexError, match=str(index)):
            call()


@pytest.mark.parametrize("d_sae", [0, 3])
def test_too_few_latents_raise(backend, d_sae):
    codes = SparseCodes(
        torch.ones(1, 2), torch.tensor([[0, 3]], dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    )
    with pytest.raises(IndexError):
        sparse_decode(codes, torch.ones(d_sae, 4))
    with pytest.raises(IndexError):
        sparse_weight_grad(codes, torch.ones(1, 4), d_sae)
    with pytest.raises(IndexError):
        sparse_weight_grad(codes, torch.ones(1, 0), d_sae)


@pytest.mark.parametrize("count", [4, -1, 2**31 - 1])
def test_count_out_of_range_raises(backend, count):
    codes = random_codes((5,), 3, 7)
    codes.counts[2] = count
    W, dense = torch.ones(7, 4), torch.ones(5, 4)
    for call in (
        lambda: sparse_decode(codes, W),
        lambda: decode_mse(codes, W, None, dense),
        lambda: sparse_value_grad(dense, codes, W),
        lambda: sparse_weight_grad(codes, dense, 7),
    ):
        with pytest.raises(ValueError, match="counts"):
            call()


CODES = SparseCodes(torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.int32), torch.ones(2, dtype=torch.int32))
W, B, Y = torch.ones(5, 4), torch.ones(4), torch.ones(2, 4)
LONG = CODES._replace(indices=CODES.indices.long())
WRONG = {
    "codes are a tensor": ("codes", TypeError, lambda: sparse_decode(Y, W)),
    "codes are a tuple": ("codes", TypeError, lambda: sparse_decode(tuple(CODES), W)),
    "mse: codes are a tuple": ("codes", TypeError, lambda: decode_mse(tuple(CODES), W, B, Y)),
    "value grad: codes are a tuple": ("codes", TypeError, lambda: sparse_value_grad(Y, tuple(CODES), W)),
    "weight grad: codes are a tuple": ("codes", TypeError, lambda: sparse_weight_grad(tuple(CODES), Y, 5)),
    "values are None": ("values", TypeError, lambda: sparse_decode(CODES._replace(values=None), W)),
    "values are int": ("values", TypeError, lambda: sparse_decode(CODES._replace(values=CODES.indices), W)),
    "values have another shape": ("indices", ValueError, lambda: sparse_decode(CODES._replace(values=Y), W)),
    "indices are int64": ("indices", TypeError, lambda: sparse_decode(LONG, W)),
    "indices are float": ("indices", TypeError, lambda: sparse_decode(CODES._replace(indices=CODES.values), W)),
    "indices have another shape": (
        "indices",
        ValueError,
        lambda: sparse_decode(CODES._replace(indices=CODES.indices[:, :2]), W),
    ),
    "counts are int64": ("counts", TypeError, lambda: sparse_decode(CODES._replace(counts=CODES.counts.long()), W)),
    "counts have another shape": (
        "counts",
        ValueError,
        lambda: sparse_decode(CODES._replace(counts=CODES.counts[:1]), W),
    ),
    "W_dec is None": ("W_dec", TypeError, lambda: sparse_decode(CODES, None)),
    "W_dec is a vector": ("W_dec", ValueError, lambda: sparse_decode(CODES, B)),
    "W_dec has another dtype": ("W_dec", TypeError, lambda: sparse_decode(CODES, W.double())),
    "W_dec is elsewhere": ("W_dec", ValueError, lambda: sparse_decode(CODES, W.to("meta"))),
    "b_dec is a number": ("b_dec", TypeError, lambda: sparse_decode(CODES, W, 1.0)),
    "b_dec has another length": ("b_dec", ValueError, lambda: sparse_decode(CODES, W, torch.ones(5))),
    "b_dec has another dtype": ("b_dec", TypeError, lambda: sparse_decode(CODES, W, B.half())),
    "b_dec has two dimensions": ("b_dec", ValueError, lambda: sparse_decode(CODES, W, torch.ones(1, 4))),
    "mse: target is None": ("target", TypeError, lambda: decode_mse(CODES, W, B, None)),
    "mse: target has another shape": ("target", ValueError, lambda: decode_mse(CODES, W, B, torch.ones(2, 3))),
    "mse: target is one row": ("target", ValueError, lambda: decode_mse(CODES, W, B, torch.ones(4))),
    "mse: target has another dtype": ("target", TypeError, lambda: decode_mse(CODES, W, B, Y.double())),
    "mse: target is elsewhere": ("target", ValueError, lambda: decode_mse(CODES, W, B, Y.to("meta"))),
    "sparse encode: x has another shape": ("x", ValueError, lambda: sparse_encode(CODES, torch.ones(3, 4), W)),
    "sparse encode: W_enc has another dtype": ("W_enc", TypeError, lambda: sparse_encode(CODES, Y, W.half())),
    "value grad: grad is a list": ("grad", TypeError, lambda: sparse_value_grad([1.0], CODES, W)),
    "value grad: grad has another shape": ("grad", ValueError, lambda: sparse_value_grad(torch.ones(3, 4), CODES, W)),
    "value grad: W has another dtype": ("W", TypeError, lambda: sparse_value_grad(Y, CODES, W.half())),
    "value grad: W is a vector": ("W", ValueError, lambda: sparse_value_grad(Y, CODES, B)),
    "value grad: indices are int64": ("indices", TypeError, lambda: sparse_value_grad(Y, LONG, W)),
    "weight grad: dense is None": ("dense", TypeError, lambda: sparse_weight_grad(CODES, None, 5)),
    "weight grad: dense has other rows": ("dense", ValueError, lambda: sparse_weight_grad(CODES, torch.ones(3, 4), 5)),
    "weight grad: dense has another dtype": ("dense", TypeError, lambda: sparse_weight_grad(CODES, Y.double(), 5)),
    "weight grad: dense has no dimension": ("dense", ValueError, lambda: sparse_weight_grad(CODES, torch.ones(()), 5)),
    "weight grad: d_sae is negative": ("d_sae", ValueError, lambda: sparse_weight_grad(CODES, Y, -1)),
    "weight grad: d_sae is a float": ("d_sae", TypeError, lambda: sparse_weight_grad(CODES, Y, 5.0)),
    "weight grad: d_sae is a bool": ("d_sae", TypeError, lambda: sparse_weight_grad(CODES, Y, True)),
}


@pytest.mark.parametrize(("name", "error", "call"), WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments_are_named(name, error, call):
    with pytest.raises(error, match=rf"\b{name}\b"):
        call()
