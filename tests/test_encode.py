"""topk_encode: a product and a selection in one, ranked by scores before they are rounded."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import MANY_ROWS, THREADS

from aksae_kernels import SparseCodes, sparse_decode, topk_encode, topk_select
from aksae_kernels.testing import DoubleDouble, check_codes, check_errors, dense_codes, encode_scores, exact_codes

SHAPES = [
    # leading dimensions, D, F
    ((3,), 5, 64),
    ((2, 3), 7, 33),
    ((), 16, 257),
    ((), 1, 1),
    ((MANY_ROWS,), 3, 7),
    ((7,), 257, 40),
    ((5,), 1, 9),
    ((4,), 0, 6),
    ((4,), 8, 1),
    ((4,), 8, 0),
    ((0,), 8, 9),
    ((0,), 0, 0),
    ((2, 0), 3, 5),
]
shapes = pytest.mark.parametrize(("lead", "d_in", "d_sae"), SHAPES, ids=lambda value: str(value).replace(" ", ""))


def integer_problem(case, lead, d_in, d_sae):
    """Scores that are exact in any order of summation, with many ties among them."""
    return (
        case.integers(*lead, d_in, seed=1),
        case.integers(d_sae, d_in, seed=2),
        case.integers(d_sae, seed=3),
    )


def random_problem(case, rows, d_in, d_sae, draw=0):
    seed = 100 * draw
    return (
        case.randn(rows, d_in, seed=seed + 1),
        case.randn(d_sae, d_in, seed=seed + 2) / math.sqrt(d_in),
        case.randn(d_sae, seed=seed + 3) / 4,
    )


def check_encoded(codes, x, W_enc, b_enc, k, k_max=None):
    """The selection and the values, within the error the contract allows."""
    scores, bound = encode_scores(x, W_enc, b_enc)
    check_codes(codes, scores, k, k_max, tolerance=bound)


@shapes
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_exact_on_integers(case, lead, d_in, d_sae, bias):
    x, W_enc, b_enc = integer_problem(case, lead, d_in, d_sae)
    b_enc = b_enc if bias else None
    scores, _ = encode_scores(x, W_enc, b_enc)
    k = torch.randint(-1, 9, lead, generator=torch.Generator().manual_seed(4)).to(case.device)
    for k_max in (8, 3, 2**40):
        check_codes(topk_encode(x, W_enc, b_enc, k=k, k_max=k_max), scores, k, k_max)
    for k_int in (0, 4, 2**40):
        check_codes(topk_encode(x, W_enc, b_enc, k=k_int), scores, k_int)


@pytest.mark.parametrize(("rows", "d_in", "d_sae", "k"), [(70, 48, 1000, 20), (33, 300, 5000, 64), (9, 1024, 300, 300)])
def test_accurate_on_real_numbers(case, rows, d_in, d_sae, k):
    x, W_enc, b_enc = random_problem(case, rows, d_in, d_sae)
    check_encoded(topk_encode(x, W_enc, b_enc, k=k), x, W_enc, b_enc, k)
    check_encoded(topk_encode(x, W_enc, k=k), x, W_enc, None, k)
    per_row = torch.randint(0, k + 1, (rows,), generator=torch.Generator().manual_seed(4)).to(case.device)
    check_encoded(topk_encode(x, W_enc, b_enc, k=per_row, k_max=k), x, W_enc, b_enc, per_row, k)


@pytest.mark.parametrize("d_in", [256, 2048])
def test_accurate_where_all_roundings_go_one_way(case, d_in):
    """Equal terms: what a chain of additions loses grows with D, where random roundings lose its square root."""
    x = torch.ones(1, d_in, dtype=case.dtype, device=case.device)
    W_enc = (case.randn(64, 1).abs() + 0.01).expand(64, d_in).contiguous()
    scores, bound = encode_scores(x, W_enc)
    # A BLAS with long chains of additions loses more than the bound; the contract then allows twice what it loses.
    lost_by_torch = ((x @ W_enc.T).double() - scores).abs().max()
    check_codes(topk_encode(x, W_enc, k=64), scores, 64, tolerance=bound.clamp(min=2 * lost_by_torch))


def test_accurate_on_very_many_latents(fp32):
    x, W_enc, b_enc = random_problem(fp32, 3, 2, 132_001)
    k = torch.tensor([0, 5, 700], device=fp32.device)
    check_encoded(topk_encode(x, W_enc, b_enc, k=k, k_max=700), x, W_enc, b_enc, k, 700)


def test_accurate_where_terms_cancel(case):
    # Scores near 0 between terms near 100: a reduced-precision product would rank them at random.
    x, W_enc, b_enc = random_problem(case, 20, 65, 700)
    x[:, 64] = 100
    W_enc[:, 64], b_enc = 1, b_enc - 100
    check_encoded(topk_encode(x, W_enc, b_enc, k=30), x, W_enc, b_enc, 30)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_matmul_precision_does_not_change_the_ranking(fp32, precision):
    x, W_enc, b_enc = random_problem(fp32, 40, 300, 900)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        check_encoded(topk_encode(x, W_enc, b_enc, k=50), x, W_enc, b_enc, 50)
    finally:
        torch.set_float32_matmul_precision(before)


def test_values_lose_no_more_than_torch(case):
    def values(draw):
        x, W_enc, b_enc = random_problem(case, 50, 200, 400, draw)
        dense = topk_encode(x, W_enc, b_enc, k=400).to_dense(400)
        live, scores = dense != 0, DoubleDouble(x) @ W_enc.T + b_enc
        return {"values": (dense[live], scores[live], torch.nn.functional.linear(x, W_enc, b_enc)[live])}

    check_errors(map(values, range(case.draws)))


def test_ranked_before_rounding(case):
    if case.dtype not in (torch.bfloat16, torch.float16):
        pytest.skip("scores are not rounded further in fp32 and fp64")
    # 2^n and 2^n + 1 are one number in the output dtype; the larger score has the larger index.
    n = 9 if case.dtype == torch.bfloat16 else 12
    x = torch.ones(3, 2, dtype=case.dtype, device=case.device)
    W_enc = torch.tensor([[2.0**n, 0], [2.0**n, 1]], dtype=case.dtype, device=case.device)
    codes = topk_encode(x, W_enc, k=1)
    assert codes.indices.tolist() == [[1]] * 3
    assert codes.values.tolist() == [[2.0**n]] * 3


def test_positive_before_rounding(case):
    if case.dtype != torch.float16:
        pytest.skip("only fp16 has a narrower range than its accumulator")
    x = torch.full((1, 1), 2.0**-14, dtype=case.dtype, device=case.device)
    codes = topk_encode(x, x, k=1)
    assert codes.counts.tolist() == [1]
    assert codes.indices.tolist() == [[0]]
    assert codes.values.tolist() == [[0.0]]


def test_bias_decides(fp32):
    x = torch.ones(1, 3, device=fp32.device)
    W_enc = torch.tensor([[1.0, 1, 1], [0, 0, 0], [1, 0, 0]], device=fp32.device)
    b_enc = torch.tensor([-4.0, 2, 0], device=fp32.device)
    codes = topk_encode(x, W_enc, b_enc, k=3)
    assert codes.indices.tolist() == [[1, 2, -1]]
    assert codes.values.tolist() == [[2, 1, 0]]


def test_nan_and_infinity_surface(case):
    x, W_enc, b_enc = integer_problem(case, (6,), 12, 300)
    x[1, 3], x[2, 4], W_enc[77, 5], b_enc[200] = math.nan, math.inf, -math.nan, math.inf
    scores, _ = encode_scores(x, W_enc, b_enc)
    codes = topk_encode(x, W_enc, b_enc, k=10)
    check_codes(codes, scores, 10)
    assert codes.values[1].isnan().all()
    assert codes.indices[1].tolist() == list(range(10))
    assert (codes.indices == 77).any(-1).tolist()[3:] == [True] * 3
    assert codes.to_dense(300)[3:, 200].isinf().all()
    assert sparse_decode(codes, torch.ones_like(W_enc)).isnan().all()


def test_agrees_with_the_selection_of_a_dense_product(case):
    x, W_enc, b_enc = integer_problem(case, (30,), 11, 600)
    x[10:], W_enc[50:90] = x[10:11], W_enc[50:51]
    codes = topk_encode(x, W_enc, b_enc, k=25)
    scores = encode_scores(x, W_enc, b_enc)[0].to(case.dtype)
    assert all(torch.equal(a, b) for a, b in zip(codes, topk_select(scores, 25), strict=True))


def test_any_strides(case):
    for name, x, W_enc, b_enc in (
        (
            "transposed",
            case.integers(8, 20, seed=1).T,
            case.integers(8, 50, seed=2).T,
            case.integers(50, 2, seed=3)[:, 0],
        ),
        (
            "sliced",
            case.integers(40, 19, seed=1)[::2, 3:11],
            case.integers(50, 24, seed=2)[:, ::3],
            case.integers(100, seed=3)[::2],
        ),
        (
            "expanded",
            case.integers(1, 8, seed=1).expand(20, 8),
            case.integers(50, 1, seed=2).expand(50, 8),
            case.integers(1, seed=3).expand(50),
        ),
        ("permuted leading", case.integers(8, 5, 4, seed=1).permute(2, 1, 0), case.integers(50, 8, seed=2), None),
    ):
        codes = topk_encode(x, W_enc, b_enc, k=9)
        expected = topk_encode(x.contiguous(), W_enc.contiguous(), None if b_enc is None else b_enc.contiguous(), k=9)
        assert all(torch.equal(a, b) for a, b in zip(codes, expected, strict=True)), name


def test_same_bits_again_and_with_other_threads(case):
    rows = min(65, MANY_ROWS // 4)
    x, W_enc, b_enc = integer_problem(case, (rows,), 40, 5000)
    real = random_problem(case, rows, 40, 5000)
    first, first_real = topk_encode(x, W_enc, b_enc, k=30), topk_encode(*real, k=30)
    assert all(torch.equal(a, b) for a, b in zip(topk_encode(*real, k=30), first_real, strict=True))
    threads = torch.get_num_threads()
    try:
        for n in THREADS:
            torch.set_num_threads(n)
            assert all(torch.equal(a, b) for a, b in zip(topk_encode(x, W_enc, b_enc, k=30), first, strict=True))
            check_encoded(topk_encode(*real, k=30), *real, 30)
    finally:
        torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------- gradients


def gradients(codes_of, inputs, grad):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    codes_of(*leaves).backward(grad)
    return [leaf.grad for leaf in leaves]


@shapes
def test_gradients_exact_on_integers(case, lead, d_in, d_sae):
    x, W_enc, b_enc = integer_problem(case, lead, d_in, d_sae)
    inputs = [t.requires_grad_() for t in (x, W_enc, b_enc)]
    codes = topk_encode(*inputs, k=4)
    live = codes.indices >= 0
    grad = case.integers(*codes.values.shape, seed=5)
    codes.values.backward(grad.where(live, math.nan))
    n_rows = codes.counts.numel()
    dense = dense_codes(SparseCodes(grad, codes.indices, codes.counts), d_sae).view(n_rows, d_sae)
    rows = x.detach().double().view(n_rows, d_in)
    assert torch.equal(x.grad, (dense @ W_enc.detach().double()).view(x.shape).to(case.dtype))
    assert torch.equal(W_enc.grad, (dense.T @ rows).to(case.dtype))
    assert torch.equal(b_enc.grad, dense.sum(0).to(case.dtype))


def test_gradients_lose_no_more_than_torch(case):
    def of_inputs(draw):
        problem = random_problem(case, 64, 96, 500, draw)
        codes = topk_encode(*problem, k=32)
        grad = case.randn(*codes.values.shape, seed=100 * draw + 6)
        index, live = codes.indices.clamp(min=0).long(), codes.indices >= 0
        x, W_enc, _ = problem
        dense = exact_codes(codes._replace(values=grad), 500)

        def dense_values(x, W_enc, b_enc):
            return torch.nn.functional.linear(x, W_enc, b_enc).gather(-1, index)

        actual = gradients(lambda *inputs: topk_encode(*inputs, k=32).values, problem, grad)
        by_torch = gradients(dense_values, problem, grad.where(live, 0))
        expected = dense @ W_enc, dense.T @ x, dense.sum(0)
        return dict(zip(("x", "W_enc", "b_enc"), zip(actual, expected, by_torch), strict=True))

    check_errors(map(of_inputs, range(case.draws)))


def test_expanded_gradient(fp32):
    inputs = [t.requires_grad_() for t in integer_problem(fp32, (2, 5), 6, 40)]
    topk_encode(*inputs, k=4).values.sum().backward()
    expanded = [t.grad.clone() for t in inputs]
    for t in inputs:
        t.grad = None
    values = topk_encode(*inputs, k=4).values
    values.backward(torch.ones_like(values))
    assert all(torch.equal(t.grad, e) for t, e in zip(inputs, expanded, strict=True))


def test_gradcheck(fp64):
    x, W_enc, b_enc = (t.requires_grad_() for t in random_problem(fp64, 5, 4, 12))
    k = torch.tensor([0, 1, 3, 5, 20], device=fp64.device)
    assert torch.autograd.gradcheck(lambda *inputs: topk_encode(*inputs, k=k, k_max=6).values, (x, W_enc, b_enc))
    assert torch.autograd.gradcheck(
        lambda *inputs: topk_encode(*inputs, k=3).values, (x[0].detach().requires_grad_(), W_enc)
    )


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)], ids=str)
def test_each_gradient_alone(fp32, wanted):
    problem = integer_problem(fp32, (6,), 7, 30)
    all_inputs = [t.clone().requires_grad_() for t in problem]
    topk_encode(*all_inputs, k=5).values.sum().backward()
    inputs = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(problem)]
    topk_encode(*inputs, k=5).values.sum().backward()
    for i, (t, full) in enumerate(zip(inputs, all_inputs, strict=True)):
        assert torch.equal(t.grad, full.grad) if i in wanted else t.grad is None


@pytest.mark.parametrize("wanted", range(3), ids=["x", "W_enc", "b_enc"])
def test_double_backward_raises(fp32, wanted):
    x, W_enc, b_enc = inputs = tuple(t.requires_grad_() for t in random_problem(fp32, 5, 4, 12))
    values = topk_encode(x, W_enc, b_enc, k=4).values

    def twice():
        (grad,) = torch.autograd.grad(values.square().sum(), inputs[wanted], create_graph=True)
        # The other terms see to it that a gradient which lost its graph is not an error by itself.
        (grad.square().sum() + x.sum() + W_enc.sum()).backward()

    with pytest.raises(RuntimeError):
        twice()


def test_autocast_casts_first(backend):
    x, W_enc, b_enc = torch.randn(6, 8), torch.randn(30, 8, requires_grad=True), torch.randn(30, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        codes = topk_encode(x, W_enc, b_enc, k=5)
    expected = topk_encode(x.bfloat16(), W_enc.bfloat16(), b_enc, k=5)
    assert codes.values.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(codes, expected, strict=True))
    codes.values.sum().backward()
    assert W_enc.grad.dtype == torch.float32


def test_rows_far_apart_in_memory(backend):
    # Never written, so the pages in between cost nothing: only offsets beyond 2^31 elements are at stake.
    stride = 2**31 + 5
    base = torch.empty(stride + 64, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    x = base.as_strided((2, 8), (stride, 1)).copy_(torch.randint(-3, 4, (2, 8), generator=generator))
    W_enc = base.as_strided((2, 8), (stride, 1), 16).copy_(torch.randint(-3, 4, (2, 8), generator=generator))
    for rows, weight in ((x, W_enc), (x.contiguous(), W_enc), (x, W_enc.contiguous())):
        check_codes(topk_encode(rows, weight, k=2), encode_scores(x, W_enc)[0], 2)


# --------------------------------------------------------------------------------------------- bad arguments

X, W, B = torch.ones(2, 3), torch.ones(5, 3), torch.ones(5)
WRONG = {
    "x is a list": ("x", TypeError, lambda: topk_encode([1.0], W, k=1)),
    "x is int": ("x", TypeError, lambda: topk_encode(X.int(), W.int(), k=1)),
    "x has no dimension": ("x", ValueError, lambda: topk_encode(torch.ones(()), W, k=1)),
    "W_enc is None": ("W_enc", TypeError, lambda: topk_encode(X, None, k=1)),
    "W_enc is a vector": ("W_enc", ValueError, lambda: topk_encode(X, W[0], k=1)),
    "W_enc is feature-major": ("W_enc", ValueError, lambda: topk_encode(X, W.T, k=1)),
    "W_enc has another dtype": ("W_enc", TypeError, lambda: topk_encode(X, W.double(), k=1)),
    "W_enc is elsewhere": ("W_enc", ValueError, lambda: topk_encode(X, W.to("meta"), k=1)),
    "b_enc is a number": ("b_enc", TypeError, lambda: topk_encode(X, W, 0.0, k=1)),
    "b_enc has another length": ("b_enc", ValueError, lambda: topk_encode(X, W, torch.ones(3), k=1)),
    "b_enc has two dimensions": ("b_enc", ValueError, lambda: topk_encode(X, W, torch.ones(1, 5), k=1)),
    "b_enc has another dtype": ("b_enc", TypeError, lambda: topk_encode(X, W, B.bfloat16(), k=1)),
    "b_enc is elsewhere": ("b_enc", ValueError, lambda: topk_encode(X, W, B.to("meta"), k=1)),
    "k is missing": ("k", TypeError, lambda: topk_encode(X, W, B)),
    "k is a bool": ("k", TypeError, lambda: topk_encode(X, W, B, k=True)),
    "k is a float": ("k", TypeError, lambda: topk_encode(X, W, B, k=2.0)),
    "k is a float tensor": ("k", TypeError, lambda: topk_encode(X, W, B, k=torch.ones(2), k_max=1)),
    "k has another shape": ("k", ValueError, lambda: topk_encode(X, W, B, k=torch.ones(5, dtype=torch.int32), k_max=1)),
    "k_max is negative": ("k_max", ValueError, lambda: topk_encode(X, W, B, k=1, k_max=-1)),
    "k_max is a float": ("k_max", TypeError, lambda: topk_encode(X, W, B, k=1, k_max=1.0)),
}


@pytest.mark.parametrize(("name", "error", "call"), WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments_are_named(name, error, call):
    with pytest.raises(error, match=rf"\b{name}\b"):
        call()
