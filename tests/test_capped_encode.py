"""batch_topk_encode and threshold_encode, selections of a product with a cap on each row; encode_at."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import EMULATED, INTERPRETED, MANY_ROWS, THREADS
from test_encode import SHAPES, gradients, integer_problem, random_problem

from aksae_kernels import (
    SparseCodes,
    available_backends,
    batch_topk_encode,
    batch_topk_select,
    encode_at,
    sparse_encode,
    threshold_encode,
    threshold_select,
    topk_encode,
    use_backend,
)
from aksae_kernels.backends import native
from aksae_kernels.codes import live_slots
from aksae_kernels.testing import (
    DoubleDouble,
    check_codes,
    check_errors,
    dense_codes,
    encode_scores,
    exact_codes,
    poison_padding,
    random_codes,
    topk_mask,
)

# Of the encode's shapes, in the interpreter those of few rows.
FEW = [shape for shape in SHAPES if math.prod(shape[0]) <= 4]
shapes = pytest.mark.parametrize(
    ("lead", "d_in", "d_sae"), FEW if INTERPRETED else SHAPES, ids=lambda value: str(value).replace(" ", "")
)
CAPS = (3, 2**40) if INTERPRETED else (0, 3, 2**40)


def same(codes: SparseCodes, expected: SparseCodes) -> bool:
    """Whether they are equal, values rounded to the dtype of `codes`."""
    values = expected.values.to(codes.values.dtype)
    return all(torch.equal(a, b) for a, b in zip(codes, (values, *expected[1:]), strict=True))


def capped(scores: torch.Tensor, k_max: int) -> torch.Tensor:
    """The scores of the `k_max` best of each row, 0 elsewhere."""
    return torch.where(topk_mask(scores, k_max), scores, 0)


def best_of_batch(scores: torch.Tensor, budget: int, k_max: int) -> SparseCodes:
    with use_backend("reference"):
        return batch_topk_select(capped(scores, k_max), budget, k_max)


def above(scores: torch.Tensor, threshold: float | torch.Tensor, k_max: int) -> SparseCodes:
    with use_backend("reference"):
        limit = threshold.double() if isinstance(threshold, torch.Tensor) else threshold
        return threshold_select(capped(scores, k_max), limit, k_max)


def budgets(rows: int) -> tuple[int, ...]:
    return (3 * rows,) if INTERPRETED else (-1, 0, 1, rows, 3 * rows, 2**70)


def thresholds(case, d_sae: int) -> dict[str, float | torch.Tensor]:
    named = {
        "0": 0.0,
        "negative": -4.0,
        "a number": 5.5,
        "a score": 6,
        "a scalar": torch.tensor(7.0, dtype=case.dtype, device=case.device),
        "per latent": case.integers(d_sae, seed=9, high=12),
        "inf": math.inf,
        "NaN": math.nan,
    }
    return {name: named[name] for name in ("per latent", "NaN")} if INTERPRETED else named


# --------------------------------------------------------------------------------------------- the selections


@shapes
def test_batch_topk_exact_on_integers(case, lead, d_in, d_sae):
    x, W_enc, b_enc = integer_problem(case, lead, d_in, d_sae)
    scores, _ = encode_scores(x, W_enc, b_enc)
    rows = math.prod(lead)
    for k_max in CAPS:
        width = min(k_max, d_sae)
        for budget in budgets(rows):
            codes = batch_topk_encode(x, W_enc, b_enc, budget=budget, k_max=k_max)
            assert same(codes, best_of_batch(scores, budget, width)), (k_max, budget)


@shapes
def test_threshold_exact_on_integers(case, lead, d_in, d_sae):
    x, W_enc, b_enc = integer_problem(case, lead, d_in, d_sae)
    scores, _ = encode_scores(x, W_enc, b_enc)
    for k_max in CAPS:
        width = min(k_max, d_sae)
        for name, threshold in thresholds(case, d_sae).items():
            codes = threshold_encode(x, W_enc, b_enc, threshold=threshold, k_max=k_max)
            assert same(codes, above(scores, threshold, width)), (k_max, name)


def test_without_bias(case):
    x, W_enc, b_enc = integer_problem(case, (4,), 12, 300)
    zeros = torch.zeros_like(b_enc)
    for encode in (
        lambda b: batch_topk_encode(x, W_enc, b, budget=40, k_max=20),
        lambda b: threshold_encode(x, W_enc, b, threshold=4, k_max=20),
    ):
        assert same(encode(None), encode(zeros))


def test_rows_that_win_almost_all(case):
    """A few rows take the budget of a batch, up to the cap, and others nothing."""
    x, W_enc, b_enc = integer_problem(case, (MANY_ROWS // 3,), 12, 300)
    x[[3, 4, 9]] *= 8
    scores, _ = encode_scores(x, W_enc, b_enc)
    for k_max in (90,) if INTERPRETED else (5, 90, 300):
        codes = batch_topk_encode(x, W_enc, b_enc, budget=200, k_max=k_max)
        assert same(codes, best_of_batch(scores, 200, k_max))
    assert codes.counts.max() > 60


def test_rows_that_are_encoded_again_may_score_otherwise(monkeypatch):
    """Few rows are summed in another order than many. Here the second scores of row 0 lose to row 1, whose list then is
    too short as well."""
    real = native._candidates

    def row_0_is_lower_alone(x, *arguments):
        codes = real(x, *arguments)
        return codes if len(x) == 3 else codes._replace(values=codes.values - x[:, :1] / 4)

    monkeypatch.setattr(native, "_candidates", row_0_is_lower_alone)
    scores = torch.tensor([[5.0, 5, 4], [5, 5, 5], [0, 0, 0]])
    with use_backend("cpu"):
        codes = batch_topk_encode(torch.eye(3), scores.T, budget=3, k_max=3)
    assert codes.counts.tolist() == [0, 3, 0]


def test_nan_and_infinity_surface(case):
    x, W_enc, b_enc = integer_problem(case, (6,), 12, 300)
    x[1, 3], x[2, 4], W_enc[77, 5], b_enc[200] = math.nan, math.inf, -math.nan, math.inf
    scores, _ = encode_scores(x, W_enc, b_enc)
    for k_max in (10,) if INTERPRETED else (10, 300):
        codes = batch_topk_encode(x, W_enc, b_enc, budget=900, k_max=k_max)
        assert same_with_nan(codes, best_of_batch(scores, 900, k_max))
        for name, threshold in thresholds(case, 300).items():
            codes = threshold_encode(x, W_enc, b_enc, threshold=threshold, k_max=k_max)
            assert same_with_nan(codes, above(scores, threshold, k_max)), name


def same_with_nan(codes: SparseCodes, expected: SparseCodes) -> bool:
    values, wanted = codes.values.double(), expected.values.to(codes.values.dtype).double()
    return torch.equal(values.isnan(), wanted.isnan()) and same(
        codes._replace(values=values.nan_to_num()), expected._replace(values=wanted.nan_to_num())
    )


@pytest.mark.skipif(INTERPRETED, reason="Triton's encode does without such a bound here")
def test_a_nan_threshold_of_many_rows_keeps_nan(case):
    """Enough rows and latents for an encode that looks for candidates by a bound."""
    x, W_enc, _ = random_problem(case, 20, 64, 600)
    W_enc[123, 5] = math.nan
    for threshold in (math.nan, math.inf):
        codes = threshold_encode(x, W_enc, threshold=threshold, k_max=50)
        assert codes.counts.tolist() == [1] * 20
        assert codes.indices[:, 0].tolist() == [123] * 20


def test_ranked_and_compared_before_rounding(case):
    if case.dtype not in (torch.bfloat16, torch.float16):
        pytest.skip("scores are not rounded further in fp32 and fp64")
    # 2^n and 2^n + 1 are one number in the output dtype; the larger score has the larger index, in the later row.
    n = 9 if case.dtype == torch.bfloat16 else 12
    x = torch.tensor([[1.0, 0], [1, 1]], dtype=case.dtype, device=case.device)
    W_enc = torch.tensor([[2.0**n, -1], [2.0**n, 1]], dtype=case.dtype, device=case.device)
    codes = batch_topk_encode(x, W_enc, budget=1, k_max=2)
    assert codes.counts.tolist() == [0, 1]
    assert codes.indices[1].tolist() == [1, -1]
    assert codes.values[1].tolist() == [2.0**n, 0]
    codes = threshold_encode(x, W_enc, threshold=2.0**n, k_max=2)
    assert codes.counts.tolist() == [0, 1]
    assert codes.indices[1].tolist() == [1, -1]


SIZES = [(70, 48, 1000, 20), (33, 300, 5000, 8), (9, 512, 300, 100)]


@pytest.mark.parametrize(("rows", "d_in", "d_sae", "mean"), SIZES[:1] if INTERPRETED else SIZES)
def test_accurate_on_real_numbers(case, rows, d_in, d_sae, mean):
    rows = min(rows, MANY_ROWS // 4)
    problem = random_problem(case, rows, d_in, d_sae)
    problem[0][::7] *= 2
    scores, bound = encode_scores(*problem)
    for k_max in (2 * mean, d_sae):
        codes = batch_topk_encode(*problem, budget=mean * rows, k_max=k_max)
        selected = dense_codes(codes._replace(values=torch.ones_like(codes.values)), d_sae).bool()
        assert selected.sum() == codes.counts.sum() == mean * rows
        # Nothing that was left out is better than what was taken, in its row where that is full, and in the batch.
        worst = torch.where(selected, scores + bound, math.inf)
        full = (codes.counts == k_max).unsqueeze(-1)
        bar = torch.where(full, worst.min(-1, keepdim=True).values, worst.min())
        assert (torch.where(selected, -math.inf, scores - bound) <= bar).all()
        for row in range(rows):
            check_codes(
                SparseCodes(*(part[row] for part in codes)),
                scores[row],
                int(codes.counts[row]),
                k_max,
                tolerance=bound[row],
            )
    threshold = case.randn(d_sae, seed=8).abs() + 0.5
    codes = threshold_encode(*problem, threshold=threshold, k_max=d_sae)
    selected = dense_codes(codes._replace(values=torch.ones_like(codes.values)), d_sae).bool()
    over = scores - threshold.double()
    assert selected[over > bound].all()
    assert not selected[over < -bound].any()


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs one program after the other")
def test_same_bits_again_and_with_other_threads(case):
    problem = integer_problem(case, (20,), 40, 3000)
    real = random_problem(case, 20, 40, 3000)
    calls = (
        lambda p: batch_topk_encode(*p, budget=300, k_max=100),
        lambda p: threshold_encode(*p, threshold=1.25, k_max=100),
    )
    threads = torch.get_num_threads()
    try:
        for call in calls:
            first, first_real = call(problem), call(real)
            assert same(call(real), first_real)
            for n in THREADS:
                torch.set_num_threads(n)
                assert same(call(problem), first)
    finally:
        torch.set_num_threads(threads)


def test_agrees_with_topk_encode(fp32):
    """A budget that no row can use up, or no threshold, leaves the best of each row."""
    problem = random_problem(fp32, 12, 30, 200)
    expected = topk_encode(*problem, k=9)
    assert same(batch_topk_encode(*problem, budget=12 * 9, k_max=9), expected)
    assert same(threshold_encode(*problem, threshold=0, k_max=9), expected)


# -------------------------------------------------------------------------------------------------- encode_at


@shapes
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_encode_at_exact_on_integers(case, lead, d_in, d_sae, bias):
    x, W_enc, b_enc = integer_problem(case, lead, d_in, d_sae)
    codes = random_codes(lead, min(4, d_sae), d_sae, dtype=case.dtype, device=case.device)
    b_enc = b_enc if bias else None
    at = encode_at(poison_padding(codes), x, W_enc, b_enc)
    scores, _ = encode_scores(x, W_enc, b_enc)
    live = live_slots(codes)
    expected = (
        torch.where(live, scores.gather(-1, torch.where(live, codes.indices, 0).long()), 0) if d_sae else at.values
    )
    assert torch.equal(at.values, expected.to(case.dtype))
    assert torch.equal(at.counts, codes.counts)
    assert torch.equal(at.indices[live], codes.indices[live])


def test_encode_at_of_a_selection_gives_its_values(case):
    """Sums in an order of their own, so within what both may lose."""
    problem = random_problem(case, MANY_ROWS // 4, 96, 500)
    codes = topk_encode(*problem, k=20)
    scores, bound = encode_scores(*problem)
    at = encode_at(codes, *problem).values.double()
    live = live_slots(codes)
    exact, allowed = (t.gather(-1, codes.indices.clamp(min=0).long())[live] for t in (scores, bound))
    ulp = torch.finfo(case.dtype).eps * exact.abs()
    assert ((at[live] - exact).abs() <= allowed + ulp / 2).all()


def test_without_bias_it_is_sparse_encode(fp32):
    x, W_enc, _ = random_problem(fp32, 6, 7, 30)
    codes = topk_encode(x, W_enc, k=4)
    assert torch.equal(encode_at(codes, x, W_enc).values, sparse_encode(codes, x, W_enc))


# -------------------------------------------------------------------------------------------------- gradients

ENCODES = {
    "batch_topk_encode": lambda x, W, b: batch_topk_encode(x, W, b, budget=30, k_max=9),
    "threshold_encode": lambda x, W, b: threshold_encode(x, W, b, threshold=0.4, k_max=9),
    "encode_at": lambda x, W, b: encode_at(topk_encode(x.detach(), -W.detach(), k=5), x, W, b),
}
every_encode = pytest.mark.parametrize("name", ENCODES)


@every_encode
def test_gradients_exact_on_integers(case, name):
    inputs = [t.requires_grad_() for t in integer_problem(case, (2, 3), 7, 33)]
    codes = ENCODES[name](*inputs)
    assert codes.counts.sum() > 0
    grad = case.integers(*codes.values.shape, seed=5)
    codes.values.backward(torch.where(live_slots(codes), grad, math.nan))
    x, W_enc, b_enc = inputs
    dense = dense_codes(codes._replace(values=grad), 33).view(6, 33)
    assert torch.equal(x.grad, (dense @ W_enc.detach().double()).view(x.shape).to(case.dtype))
    assert torch.equal(W_enc.grad, (dense.T @ x.detach().double().view(6, 7)).to(case.dtype))
    assert torch.equal(b_enc.grad, dense.sum(0).to(case.dtype))


@every_encode
@pytest.mark.skipif(INTERPRETED or bool(EMULATED), reason="the products of the backward are those of topk_encode's")
def test_gradients_lose_no_more_than_torch(case, name):
    def of_inputs(draw):
        problem = random_problem(case, 24, 96, 200, draw)
        codes = ENCODES[name](*problem)
        grad = case.randn(*codes.values.shape, seed=100 * draw + 6)
        index, live = codes.indices.clamp(min=0).long(), live_slots(codes)
        x, W_enc, _ = problem
        dense = exact_codes(codes._replace(values=grad), 200)

        def dense_values(x, W_enc, b_enc):
            return torch.nn.functional.linear(x, W_enc, b_enc).gather(-1, index)

        actual = gradients(lambda *inputs: ENCODES[name](*inputs).values, problem, grad)
        by_torch = gradients(dense_values, problem, grad.where(live, 0))
        expected = dense @ W_enc, DoubleDouble.of(dense).T @ x, dense.sum(0)
        return dict(zip(("x", "W_enc", "b_enc"), zip(actual, expected, by_torch), strict=True))

    check_errors(map(of_inputs, range(case.draws)))


@every_encode
def test_gradcheck(fp64, name):
    problem = tuple(t.requires_grad_() for t in random_problem(fp64, 5, 4, 12))
    assert torch.autograd.gradcheck(lambda *inputs: ENCODES[name](*inputs).values, problem)


@every_encode
@pytest.mark.skipif(INTERPRETED, reason="which gradients are wanted decides autograd, not a backend")
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
def test_each_gradient_alone(fp32, name, wanted):
    problem = integer_problem(fp32, (6,), 7, 30)
    all_inputs = [t.clone().requires_grad_() for t in problem]
    ENCODES[name](*all_inputs).values.sum().backward()
    inputs = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(problem)]
    ENCODES[name](*inputs).values.sum().backward()
    for i, (t, full) in enumerate(zip(inputs, all_inputs, strict=True)):
        assert torch.equal(t.grad, full.grad) if i in wanted else t.grad is None


@every_encode
def test_double_backward_raises(fp32, name):
    inputs = tuple(t.requires_grad_() for t in random_problem(fp32, 5, 4, 12))
    (grad,) = torch.autograd.grad(ENCODES[name](*inputs).values.square().sum(), inputs[1], create_graph=True)
    with pytest.raises(RuntimeError):
        (grad.square().sum() + sum(t.sum() for t in inputs)).backward()


# ------------------------------------------------------------------------------------------------- allocation


@pytest.mark.skipif("cpu" not in available_backends(), reason="backend 'cpu' is not available")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_no_dense_scores(largest, dtype):
    """Of the backend itself: within an op no tensor is seen. Triton's are in test_triton.py."""
    rows, d_in, d_sae, k_max = 100, 16, 8192, 40
    x, W_enc, b_enc = (torch.randn(*shape).to(dtype) for shape in ((rows, d_in), (d_sae, d_in), (d_sae,)))
    # One row takes the whole budget, up to the cap.
    x[7] *= 100
    for threshold in (torch.tensor(0.5), torch.rand(d_sae)):
        with largest() as made:
            codes = native.batch_topk_encode(x, W_enc, b_enc, 300, k_max)
            native.threshold_encode(x, W_enc, b_enc, threshold, k_max)
            native.sparse_encode(x, codes.indices, codes.counts, W_enc, b_enc)
        assert codes.counts[7] == k_max
        assert codes.values.numel() < made.elements <= d_sae * 2


# ------------------------------------------------------------------------------------------------- refusals

X, W, B, M = torch.ones(3, 4), torch.ones(9, 4), torch.ones(9), torch.ones(9, device="meta")
CODES = SparseCodes(torch.ones(3, 2), torch.zeros(3, 2, dtype=torch.int32), torch.ones(3, dtype=torch.int32))
WRONG = {
    "budget is no int": ("budget", TypeError, lambda: batch_topk_encode(X, W, budget=1.5, k_max=3)),
    "budget is a bool": ("budget", TypeError, lambda: batch_topk_encode(X, W, budget=True, k_max=3)),
    "k_max is None": ("k_max", TypeError, lambda: batch_topk_encode(X, W, budget=3, k_max=None)),
    "budget is a tensor": ("budget", TypeError, lambda: batch_topk_encode(X, W, budget=torch.ones(2), k_max=3)),
    "k_max is a bool": ("k_max", TypeError, lambda: batch_topk_encode(X, W, budget=3, k_max=True)),
    "x has no dimension": ("x", ValueError, lambda: threshold_encode(X[0, 0], W, threshold=1.0, k_max=3)),
    "x holds integers": ("x", TypeError, lambda: batch_topk_encode(X.int(), W, budget=3, k_max=3)),
    "W_enc is elsewhere": ("W_enc", ValueError, lambda: batch_topk_encode(X, W.to("meta"), budget=3, k_max=3)),
    "b_enc is elsewhere": ("b_enc", ValueError, lambda: threshold_encode(X, W, B.to("meta"), threshold=1.0, k_max=3)),
    "threshold is elsewhere": ("threshold", ValueError, lambda: threshold_encode(X, W, threshold=M, k_max=3)),
    "threshold is a bool": ("threshold", TypeError, lambda: threshold_encode(X, W, threshold=True, k_max=3)),
    "k_max is left out": ("k_max", TypeError, lambda: threshold_encode(X, W, threshold=1.0)),
    "k_max is negative": ("k_max", ValueError, lambda: threshold_encode(X, W, threshold=1.0, k_max=-1)),
    "threshold is a string": ("threshold", TypeError, lambda: threshold_encode(X, W, threshold="1", k_max=3)),
    "threshold has another shape": ("threshold", ValueError, lambda: threshold_encode(X, W, threshold=X[0], k_max=3)),
    "threshold has another dtype": (
        "threshold",
        TypeError,
        lambda: threshold_encode(X, W, threshold=B.double(), k_max=3),
    ),
    "W_enc has another width": ("W_enc", ValueError, lambda: batch_topk_encode(X, W[:, :2], budget=3, k_max=3)),
    "b_enc has another length": ("b_enc", ValueError, lambda: threshold_encode(X, W, B[:5], threshold=1.0, k_max=3)),
    "W_enc has another dtype": ("W_enc", TypeError, lambda: batch_topk_encode(X, W.double(), budget=3, k_max=3)),
    "encode_at: no codes": ("codes", TypeError, lambda: encode_at(X, X, W, B)),
    "encode_at: indices of int64": (
        "codes.indices",
        TypeError,
        lambda: encode_at(CODES._replace(indices=CODES.indices.long()), X, W),
    ),
    "encode_at: codes are elsewhere": ("W_enc|x|indices", ValueError, lambda: encode_at(CODES.to("meta"), X, W)),
    "encode_at: W_enc is elsewhere": ("W_enc", ValueError, lambda: encode_at(CODES, X, W.to("meta"))),
    "encode_at: b_enc is elsewhere": ("b_enc", ValueError, lambda: encode_at(CODES, X, W, B.to("meta"))),
    "encode_at: b_enc has another length": ("b_enc", ValueError, lambda: encode_at(CODES, X, W, B[:5])),
    "encode_at: b_enc has another dtype": ("b_enc", TypeError, lambda: encode_at(CODES, X, W, B.double())),
    "encode_at: x has other rows": ("x", ValueError, lambda: encode_at(CODES, X[:2], W, B)),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(backend, name):
    argument, error, call = WRONG[name]
    with pytest.raises(error, match=argument):
        call()


@pytest.mark.parametrize("index", [9, -1])
def test_index_out_of_range_raises(backend, index):
    with pytest.raises(IndexError, match=rf"codes.indices must lie in \[0, 9\), got {index}"):
        encode_at(CODES._replace(indices=CODES.indices + index), X, W, B)
