"""price_select: of candidates, those that lower the error by more than a price."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from conftest import INTERPRETED, MANY_ROWS, THREADS
from torch import Tensor

from aksae_kernels import (
    SparseCodes,
    available_backends,
    price_for,
    price_select,
    sparse_decode,
    topk_encode,
    use_backend,
)
from aksae_kernels.codes import acc_dtype, live_slots
from aksae_kernels.testing import codes_from_mask, keep_slots, poison_padding, price_mask, random_codes

SHAPES = [((), 5, 9, 4), ((1,), 1, 1, 1), ((3,), 7, 12, 6), ((2, 3), 65, 40, 17)]
if not INTERPRETED:
    SHAPES += [((4,), 130, 64, 64), ((5,), 769, 300, 33), ((2,), 1031, 50, 40), ((MANY_ROWS,), 16, 30, 12)]
shapes = pytest.mark.parametrize(
    ("lead", "d_in", "d_sae", "width"), SHAPES, ids=lambda value: str(value).replace(" ", "")
)


def assert_same(codes: SparseCodes, expected: SparseCodes) -> None:
    for name, actual, wanted in zip(SparseCodes._fields, codes, expected, strict=True):
        assert actual.dtype == wanted.dtype, name
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0, equal_nan=True)


def integer_problem(case, lead, d_in, d_sae, width, *, by_hand=False, seed=0):
    """Codes, W_dec, b_dec and x in small integers: every sum is exact, and so is every decision."""
    codes = random_codes(
        lead, width, d_sae, dtype=case.dtype, device=case.device, integers=True, by_hand=by_hand, seed=seed
    )
    W, b = case.integers(d_sae, d_in, seed=seed + 1, high=1), case.integers(d_in, seed=seed + 2)
    # What some of the candidates sum up to, and something else: these pay, and the others do not.
    some = codes._replace(values=torch.where(torch.arange(width, device=b.device) % 3 > 0, codes.values, 0))
    with use_backend("reference"):
        return codes, W, b, sparse_decode(some, W, b) + case.integers(*lead, d_in, seed=seed + 3, high=1)


def encoded_problem(case, rows=6, d_in=40, d_sae=60, k=12, seed=0):
    """Candidates as an encoder gives them: overlapping directions, positive values."""
    W = torch.nn.functional.normalize(case.randn(d_sae, d_in, seed=seed).float(), dim=-1).to(case.dtype)
    b, x = 0.1 * case.randn(d_in, seed=seed + 1), 3 * case.randn(rows, d_in, seed=seed + 2)
    with use_backend("reference"):
        return topk_encode(x - b, W, k=k), W, b, x


def objective(codes: SparseCodes, W: Tensor, b: Tensor | None, x: Tensor, price: float) -> Tensor:
    """`|r|^2 + price * counts` of each row, in fp64."""
    with use_backend("reference"):
        y = sparse_decode(codes._replace(values=codes.values.double()), W.double(), None if b is None else b.double())
    return (x.double() - y).square().sum(-1) + price * codes.counts


# ------------------------------------------------------------------------------------------------ the rule


@shapes
@pytest.mark.parametrize("passes", [1, 3])
def test_exact_on_integers(case, lead, d_in, d_sae, width, passes):
    for by_hand in (False, True):
        codes, W, b, x = integer_problem(case, lead, d_in, d_sae, width, by_hand=by_hand)
        for price in (0, 2 * d_in):
            expected = keep_slots(codes, price_mask(codes, W, b, x, price, passes))
            assert_same(price_select(poison_padding(codes), W, b, x, price=price, passes=passes), expected)
            if codes.counts.sum() > 20:
                assert 0.1 < float(expected.counts.sum() / codes.counts.sum()) < 0.9


def test_each_row_has_a_price_of_its_own(case):
    codes, W, b, x = integer_problem(case, (2, 4), 9, 20, 8)
    prices = torch.tensor([[0.0, 5, 40, math.inf], [-30, -math.inf, 1, 17]], device=case.device)
    expected = keep_slots(codes, price_mask(codes, W, b, x, prices, 2))
    for dtype in (torch.float32, torch.float64):
        assert_same(price_select(codes, W, b, x, price=prices.to(dtype), passes=2), expected)
    assert_same(
        price_select(codes, W, b, x, price=prices[0, 2], passes=2), price_select(codes, W, b, x, price=40.0, passes=2)
    )
    assert_same(price_select(codes, W, None, x - b, price=3), price_select(codes, W, b, x, price=3))


def test_infinite_prices_keep_nothing_and_everything(case):
    codes, W, b, x = encoded_problem(case)
    none, every = (price_select(codes, W, b, x, price=price, passes=2) for price in (math.inf, -math.inf))
    assert not none.counts.any()
    assert (none.indices == -1).all()
    assert not none.values.any()
    assert_same(every, codes)


def test_the_objective_never_rises_and_no_flip_is_left_that_helps(case):
    codes, W, b, x = encoded_problem(case)
    tolerance = 64 * torch.finfo(acc_dtype(case.dtype)).eps * float(x.double().square().sum(-1).max())
    for price in (0.5,) if INTERPRETED else (0.05, 0.5, 2.0):
        before = objective(codes._replace(counts=torch.zeros_like(codes.counts)), W, b, x, price)
        for passes in (1, 2, 3, 20):
            kept = price_select(codes, W, b, x, price=price, passes=passes)
            after = objective(kept, W, b, x, price)
            assert (after <= before + tolerance).all(), (price, passes)
            before = after
        mask = (codes.indices.unsqueeze(-1) == kept.indices.unsqueeze(-2)).any(-1)
        for slot in range(codes.indices.shape[-1]):
            flipped = mask.clone()
            flipped[:, slot] ^= True
            other = objective(keep_slots(codes, flipped & live_slots(codes)), W, b, x, price)
            assert (other >= before - tolerance).all(), (price, slot)


def test_larger_values_are_visited_first_and_ties_by_index(case):
    # Three times the same direction: whoever is visited first explains it, and the others are passed over.
    W = case.integers(4, 8, seed=1)[:1].expand(4, 8).contiguous()
    x = 2 * W[:1]
    for values, winner in (((1.0, 2, 1), 1), ((2.0, 2, 2), 0), ((-1.0, 1, 2), 2), ((2.0, 1, 2), 0)):
        codes = SparseCodes(
            torch.tensor([values], dtype=case.dtype, device=case.device),
            torch.tensor([[0, 2, 3]], dtype=torch.int32, device=case.device),
            torch.tensor([3], dtype=torch.int32, device=case.device),
        )
        kept = price_select(codes, W, None, x, price=0)
        assert kept.counts.tolist() == [1], values
        assert kept.indices[0, 0] == codes.indices[0, winner], values
        # By hand, the other way round: ties still go to the smaller index, and what comes out ascends.
        turned = SparseCodes(codes.values.flip(1), codes.indices.flip(1), codes.counts)
        assert_same(price_select(turned, W, None, x, price=0), kept)


def test_of_two_equal_latents_one_stays(case):
    """The encoder gives both the same value, and top-k both a place; the second explains nothing that is left."""
    W = torch.eye(6, 8, dtype=case.dtype, device=case.device)
    x = case.integers(3, 8, high=5)
    twice = torch.cat([W, W])
    with use_backend("reference"):
        codes = topk_encode(x, twice, k=12)
    kept = price_select(codes, twice, None, x, price=0.5, passes=2)
    assert torch.equal(kept.counts * 2, codes.counts)
    assert (kept.indices < 6).all()


def test_orthogonal_rows_of_any_norm_give_the_best_subset(case):
    """Where directions do not overlap, one pass finds what trying all subsets finds."""
    norms = torch.tensor([0.0, 0.25, 0.5, 1, 2, 4, 1, 0.5], dtype=case.dtype, device=case.device)
    W = norms.unsqueeze(-1) * torch.eye(8, 11, dtype=case.dtype, device=case.device)
    codes = codes_from_mask(case.integers(5, 8, seed=3), torch.ones(5, 8, dtype=torch.bool, device=case.device), 8)
    x, b = case.integers(5, 11, seed=4, high=8), case.integers(11, seed=5)
    for price in (0.0, 0.7, 9.3, -0.6):
        best = None
        for subset in itertools.product((False, True), repeat=8):
            kept = torch.tensor(subset, device=case.device).expand(5, 8)
            total = objective(keep_slots(codes, kept), W, b, x, price)
            best = total if best is None else torch.minimum(best, total)
        kept = price_select(codes, W, b, x, price=price)
        torch.testing.assert_close(objective(kept, W, b, x, price), best, rtol=0, atol=0)


def test_nan_is_kept_and_shows(case):
    codes, W, b, x = encoded_problem(case)
    plain = price_select(codes, W, b, x, price=1.0)
    spoilt = x.clone()
    spoilt[2, -1] = math.nan
    kept = price_select(codes, W, b, spoilt, price=1.0, passes=2)
    rest = [row for row in range(len(x)) if row != 2]
    assert_same(SparseCodes(*(part[2] for part in kept)), SparseCodes(*(part[2] for part in codes)))
    assert_same(
        SparseCodes(*(part[rest] for part in kept)),
        SparseCodes(*(part[rest] for part in price_select(codes, W, b, x, price=1.0, passes=2))),
    )

    values = codes.values.clone()
    values[1, 3] = math.nan
    for price in (1.0, math.inf):
        kept = price_select(codes._replace(values=values), W, b, x, price=price)
        assert_same(SparseCodes(*(part[1] for part in kept)), SparseCodes(values[1], codes.indices[1], codes.counts[1]))
    assert_same(
        SparseCodes(*(part[0] for part in price_select(codes, W, b, x, price=1.0))),
        SparseCodes(*(part[0] for part in plain)),
    )


@pytest.mark.parametrize("d_in", [33, 768] if not INTERPRETED else [33])
def test_real_numbers_decide_alike_unless_a_gain_is_within_rounding_of_the_price(case, d_in):
    codes, W, b, x = encoded_problem(case, rows=16 if not INTERPRETED else 4, d_in=d_in, d_sae=3 * d_in, k=24)
    for price in (0.1, 1.0):
        expected = price_mask(codes, W, b, x, price, 2)
        kept = price_select(codes, W, b, x, price=price, passes=2)
        mask = (codes.indices.unsqueeze(-1) == kept.indices.unsqueeze(-2)).any(-1) & live_slots(codes)
        # A row whose decisions differ from fp64's has to be as good as theirs, to rounding.
        roundoff = 64 * torch.finfo(acc_dtype(case.dtype)).eps * x.double().square().sum(-1)
        gap = objective(kept, W, b, x, price) - objective(keep_slots(codes, expected), W, b, x, price)
        same = (mask == expected.to(mask.device)).all(-1)
        assert same.float().mean() >= 0.75
        assert (gap[same].abs() <= roundoff[same]).all()


# --------------------------------------------------------------------------------------------- shapes, gradients


def test_nothing_to_choose_from(case):
    W, b = case.randn(7, 5), case.randn(5, seed=1)
    for lead, width in (((0,), 3), ((2,), 0), ((0, 4), 0), ((3, 0), 2)):
        codes = random_codes(lead, width, 7, dtype=case.dtype, device=case.device)
        kept = price_select(codes, W, b, case.randn(*lead, 5), price=0.0)
        assert kept.values.shape == kept.indices.shape == (*lead, width)
        assert kept.counts.shape == lead
    empty = SparseCodes(
        case.randn(2, 3),
        torch.full((2, 3), -1, dtype=torch.int32, device=case.device),
        torch.zeros(2, dtype=torch.int32, device=case.device),
    )
    assert not price_select(empty, case.randn(0, 5), None, case.randn(2, 5), price=-1.0).counts.any()
    # Rows without columns explain nothing: they join for a negative price alone.
    codes = random_codes((3,), 4, 7, dtype=case.dtype, device=case.device, seed=2)
    for price, counts in ((0.0, torch.zeros_like(codes.counts)), (-1.0, codes.counts)):
        kept = price_select(codes, case.randn(7, 0), None, case.randn(3, 0), price=price)
        assert torch.equal(kept.counts, counts)


def test_strides_and_threads_change_no_bit(case):
    codes, W, b, x = encoded_problem(case, rows=MANY_ROWS if not INTERPRETED else 3)
    expected = price_select(codes, W, b, x, price=0.4, passes=2)
    wide = torch.full((len(x), 3, x.shape[1]), math.nan, dtype=x.dtype, device=x.device)
    wide[:, 1] = x
    strided = SparseCodes(codes.values.t().contiguous().t(), codes.indices.t().contiguous().t(), codes.counts)
    variants = [
        (codes, W.t().contiguous().t(), b.repeat_interleave(2)[::2], x.t().contiguous().t()),
        (strided, torch.cat([W, W], -1)[:, : W.shape[1]], b, wide[:, 1]),
    ]
    for variant in variants:
        assert_same(price_select(*variant, price=0.4, passes=2), expected)
    threads = torch.get_num_threads()
    try:
        for n in THREADS:
            torch.set_num_threads(n)
            assert_same(price_select(codes, W, b, x, price=0.4, passes=2), expected)
    finally:
        torch.set_num_threads(threads)
    assert_same(
        price_select(SparseCodes(*(p[1:2] for p in codes)), W, b, x[1:2], price=0.4, passes=2),
        SparseCodes(*(p[1:2] for p in expected)),
    )


@pytest.mark.parametrize("by_hand", [False, True])
def test_the_gradient_goes_to_the_candidates_that_were_kept(case, by_hand):
    codes, W, b, x = integer_problem(case, (4,), 9, 20, 8, by_hand=by_hand)
    values, W, b, x = (part.clone().requires_grad_() for part in (codes.values, W, b, x))
    price = torch.tensor(2.0, device=case.device, requires_grad=True)
    kept = price_select(poison_padding(codes)._replace(values=values), W, b, x, price=price)
    grad = case.integers(*kept.values.shape, seed=7)
    (kept.values * grad).sum().backward()
    mask = price_mask(codes, W.detach(), b.detach(), x.detach(), 2.0, 1).to(case.device)
    order = torch.where(mask, codes.indices, 2**31 - 1).argsort(dim=-1, stable=True)
    wanted = torch.zeros_like(grad).scatter(-1, order, torch.where(live_slots(kept), grad, 0))
    assert torch.equal(values.grad, wanted)
    assert all(part.grad is None for part in (W, b, x, price))


def test_a_second_derivative_raises(case):
    codes, W, b, x = encoded_problem(case)
    values = codes.values.clone().requires_grad_()
    kept = price_select(codes._replace(values=values), W, b, x, price=0.5)
    (grad,) = torch.autograd.grad(kept.values.square().sum(), values, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated"):
        grad.sum().backward()


def test_autocast_casts_as_for_a_product(fp32):
    codes, W, b, x = encoded_problem(fp32)
    with torch.autocast(fp32.device, torch.bfloat16):
        kept = price_select(codes, W, b, x, price=torch.tensor(0.5, device=fp32.device))
    assert kept.values.dtype == torch.bfloat16
    half = torch.bfloat16
    assert_same(kept, price_select(codes.to(half), W.to(half), b.to(half), x.to(half), price=0.5))


# ---------------------------------------------------------------------------------------------------- arguments


def test_wrong_arguments_are_named():
    codes = random_codes((3,), 4, 7)
    W, b, x = torch.zeros(7, 5), torch.zeros(5), torch.zeros(3, 5)
    for error, text, arguments, options in (
        (TypeError, "codes must be SparseCodes", (x, W, b, x), {"price": 1}),
        (ValueError, "W_dec must have shape", (codes, b, b, x), {"price": 1}),
        (ValueError, "b_dec must have shape", (codes, W, x, x), {"price": 1}),
        (ValueError, "x must have shape", (codes, W, b, x[:2]), {"price": 1}),
        (TypeError, "x must have the dtype", (codes, W, b, x.double()), {"price": 1}),
        (TypeError, "price must be a number", (codes, W, b, x), {"price": "1"}),
        (TypeError, "price must be a number", (codes, W, b, x), {"price": True}),
        (TypeError, "price must be a floating-point", (codes, W, b, x), {"price": torch.tensor(1)}),
        (ValueError, "price must have shape", (codes, W, b, x), {"price": torch.zeros(4)}),
        (ValueError, "price must be on the device", (codes, W, b, x), {"price": torch.zeros((), device="meta")}),
        (ValueError, "price must not be NaN", (codes, W, b, x), {"price": math.nan}),
        (ValueError, "price must not be NaN", (codes, W, b, x), {"price": torch.tensor([0, 0, math.nan])}),
        (ValueError, "passes must be at least 1", (codes, W, b, x), {"price": 1, "passes": 0}),
        (TypeError, "passes must be an int", (codes, W, b, x), {"price": 1, "passes": 1.5}),
    ):
        with pytest.raises(error, match=text):
            price_select(*arguments, **options)
    for backend in available_backends():
        if backend in ("cpu", "reference"):
            bad = codes._replace(indices=codes.indices.clone().fill_(7), counts=torch.full_like(codes.counts, 4))
            with use_backend(backend), pytest.raises(IndexError):
                price_select(bad, W, b, x, price=1)


# --------------------------------------------------------------------------------------------- a price for a budget


@pytest.mark.parametrize("bias", [True, False])
def test_the_price_of_a_budget(bias):
    torch.manual_seed(0)
    # Rows shorter than 1, so that some of every row pay.
    W, b = torch.randn(40, 12) / 4, torch.randn(12) if bias else None
    parts = []
    for n in (70, 30):
        x = torch.randn(n, 12)
        parts.append((topk_encode(x if b is None else x - b, W, k=16), x))

    def mean_l0(price: Tensor) -> float:
        kept = [price_select(codes, W, b, x, price=price, passes=2) for codes, x in parts]
        return float(sum(codes.counts.sum() for codes in kept)) / 100

    price = price_for(parts, W, b, 2.5, passes=2)
    assert price.shape == ()
    # One latent more or less in a hundred rows.
    assert mean_l0(price) == pytest.approx(2.5, abs=0.02)
    # Not so many pay, whatever the price.
    assert mean_l0(price_for(parts, W, b, 16, passes=2)) == mean_l0(torch.tensor(0.0))
    with pytest.raises(ValueError, match="at least one row"):
        price_for([(SparseCodes(*(t[:0] for t in parts[0][0])), parts[0][1][:0])], W, b, 2)
