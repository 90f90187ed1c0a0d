"""The judges themselves: the arithmetic of the oracles, the error ratio, and the total order on other devices."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from aksae_kernels import SparseCodes, reference
from aksae_kernels.double_double import DoubleDouble
from aksae_kernels.testing import (
    adversarial_rows,
    check_codes,
    check_errors,
    codes_from_mask,
    dense_codes,
    encode_scores,
    error_ratio,
    exact_codes,
    random_codes,
    topk_mask,
)

EPS = torch.finfo(torch.float64).eps

# -------------------------------------------------------------------------------------------- double-double


def wide(*shape: int, seed: int) -> torch.Tensor:
    """Numbers of all 53 bits and many magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    normal, exponent = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return normal * 2 ** (20 * exponent).round()


def fractions(value: DoubleDouble | torch.Tensor) -> list[Fraction]:
    value = DoubleDouble.of(value)
    parts = (part.flatten().tolist() for part in (value.high, value.low))
    return [Fraction(high) + Fraction(low) for high, low in zip(*parts, strict=True)]


def assert_exact(found: DoubleDouble, expected: list[Fraction], magnitude: list[Fraction]) -> None:
    """Within 2^-100 of what is added, where fp64 itself has 2^-53."""
    for a, e, m in zip(fractions(found), expected, magnitude, strict=True):
        assert abs(a - e) <= m * Fraction(2) ** -100
    assert (found.low.abs() <= EPS * found.high.abs()).all()


@pytest.mark.parametrize("terms", [0, 1, 2, 129])
def test_matrix_products(terms):
    a, b = wide(4, terms, seed=1), wide(terms, 3, seed=2)
    a_wide = DoubleDouble(a) + wide(4, terms, seed=3) * 2.0**-70
    for left, right in ((DoubleDouble(a), b), (a_wide, b), (a_wide, DoubleDouble(b) * wide(terms, 3, seed=4))):
        rows, columns = fractions(left), fractions(right)
        of = lambda i, j, rows=rows, columns=columns: [rows[i * terms + t] * columns[3 * t + j] for t in range(terms)]
        products = [of(i, j) for i in range(4) for j in range(3)]
        magnitude = [sum(map(abs, terms_of), Fraction(0)) for terms_of in products]
        assert_exact(left @ right, [sum(terms_of, Fraction(0)) for terms_of in products], magnitude)


def test_a_matrix_product_does_not_depend_on_the_order_of_its_sums():
    a, b = wide(5, 300, seed=1), wide(300, 4, seed=2)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    for permuted in (DoubleDouble(a[:, order]) @ b[order], (DoubleDouble(b.T.contiguous()) @ a.T).T):
        assert torch.equal((DoubleDouble(a) @ b).high, permuted.high)
    assert not torch.equal(a @ b, a[:, order] @ b[order]), "in fp64 it does, or this test shows nothing"


def test_elementwise():
    a, b = DoubleDouble(wide(50, seed=1)) + wide(50, seed=2), DoubleDouble(wide(50, seed=3)) + wide(50, seed=4)
    pairs = list(zip(fractions(a), fractions(b)))
    assert_exact(a + b, [x + y for x, y in pairs], [abs(x) + abs(y) for x, y in pairs])
    assert_exact(a - b, [x - y for x, y in pairs], [abs(x) + abs(y) for x, y in pairs])
    assert_exact(a * b, [x * y for x, y in pairs], [abs(x * y) for x, y in pairs])
    assert_exact(3 * a.square(), [3 * x * x for x, _ in pairs], [3 * x * x for x, _ in pairs])
    total = DoubleDouble(a.high.view(5, 10), a.low.view(5, 10)).sum(0)
    columns = [fractions(a)[i::10] for i in range(10)]
    assert_exact(total, list(map(sum, columns)), [sum(map(abs, column)) for column in columns])


def test_nan_and_infinity():
    a = DoubleDouble(torch.tensor([[1.0, math.inf, 2], [math.nan, 2, 3], [1, 2, 3]]))
    ones = torch.ones(3, 1)
    for found, expected in (
        (a @ ones, a.high @ ones.double()),
        (a + a, a.high + a.high),
        (a * a, a.high * a.high),
        (a.sum(1), a.high.sum(1)),
    ):
        torch.testing.assert_close(found.high, expected, rtol=0, atol=0, equal_nan=True)
        assert (found.low == 0).all()


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("lead", [(), (4,), (0,), (2, 3)], ids=str)
def test_exact_codes(lead, by_hand):
    codes = random_codes(lead, 9, 5, dtype=torch.float64, by_hand=by_hand)
    exact = exact_codes(codes, 5)
    torch.testing.assert_close(exact.round(), dense_codes(codes, 5))
    rows = zip(*(part.reshape(-1, *part.shape[len(lead) :]).tolist() for part in codes), strict=True)
    expected = [Fraction(0)] * exact.high.numel()
    for row, (values, indices, count) in enumerate(rows):
        for value, index in zip(values[:count], indices[:count]):
            expected[5 * row + index] += Fraction(value)
    assert_exact(exact, expected, list(map(abs, expected)))
    assert exact_codes(codes._replace(counts=torch.zeros_like(codes.counts)), 0).shape == (*lead, 0)


# --------------------------------------------------------------------------------------------- error ratio


def test_fp64_is_judged_by_more_digits_than_its_own():
    third = DoubleDouble(torch.tensor([1.0])) - DoubleDouble(torch.tensor([2.0**-60], dtype=torch.float64))
    one, below = torch.ones(1, dtype=torch.float64), torch.full((1,), 1 - EPS / 2, dtype=torch.float64)
    # Half an ulp is what is granted PyTorch at least; the oracle tells 2^-60 apart.
    assert error_ratio(one, third, one) == pytest.approx(2.0**-60 / (EPS / 2))
    assert error_ratio(below, third, one) == pytest.approx(1, rel=0.01)
    assert error_ratio(one - 2 * EPS, third, one) > 2
    with pytest.raises(TypeError, match="DoubleDouble"):
        error_ratio(one, one, one)
    assert error_ratio(one.float(), one, one.float()) == 0


def test_draws_are_judged_together():
    """Luck on one problem does not count; a loss that PyTorch has on none of them does."""

    def draw(ours: float, torchs: float, scale: float = 1.0) -> dict[str, tuple]:
        expected = torch.full((3,), scale, dtype=torch.float64)
        ours, torchs = (scale * torch.tensor([1, 1, 1 + lost * 2.0**-20]) for lost in (ours, torchs))
        return {"sums": (ours, expected, torchs)}

    check_errors([])
    check_errors([draw(3, 1), draw(1, 2)])
    check_errors([draw(2, 1), draw(1, 1)])
    # Each in a unit of its own: 1000 times larger numbers hide nothing.
    for scale in (1.0, 1024.0):
        with pytest.raises(AssertionError, match="sums loses 3 times what PyTorch loses"):
            check_errors([draw(3, 1), draw(1, 1, scale)])
    with pytest.raises(AssertionError, match="sums loses inf times"):
        check_errors([draw(1, 1), draw(float("nan"), 1)])
    for draws in ([draw(1, 1), draw(1, float("nan"))], [draw(1, float("nan")), draw(1, 1)]):
        with pytest.raises(AssertionError, match="sums loses nan times"):
            check_errors(draws)


def test_scores_in_fp64_are_rounded_once():
    x, W, b = wide(3, 200, seed=1), wide(7, 200, seed=2), wide(7, seed=3)
    scores, _ = encode_scores(x, W, b)
    exact = fractions(DoubleDouble(x) @ W.T + b)
    for score, e in zip(scores.flatten().tolist(), exact, strict=True):
        assert abs(Fraction(score) - e) <= abs(e) * Fraction(EPS) / 2


# ------------------------------------------------------------------------------- the order of sorts on CUDA


class CudaSort(TorchDispatchMode):
    """Sorts order NaN by its sign, as CUDA's do: the positive above +inf, the negative below -inf.

    `torch.topk` is left alone: on both devices it takes every NaN for the largest.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.overloadpacket is torch.ops.aten.sort and args[0].is_floating_point():
            bits = args[0].double().view(torch.int64)
            key = torch.where(bits < 0, -(bits & 0x7FFF_FFFF_FFFF_FFFF), bits)
            dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
            index = func(key, *args[1:], **kwargs)[1]
            return args[0].gather(dim, index), index
        return func(*args, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_hostile_rows_hold_nan_of_both_signs(dtype):
    row = adversarial_rows(203, dtype=dtype)["specials"]
    negative = row.isnan() & row.signbit()
    assert negative.any()
    assert (row.isnan() & ~negative).any()


def ranked(row: list[float]) -> list[int]:
    """The indices of the selectable entries, best first, by the words of the contract."""
    selectable = [i for i, value in enumerate(row) if value > 0 or math.isnan(value)]
    return sorted(selectable, key=lambda i: (not math.isnan(row[i]), -row[i] if row[i] > 0 else 0, i))


def selected(codes: SparseCodes) -> list[list[int]]:
    return [row[:count] for row, count in zip(codes.indices.tolist(), codes.counts.tolist(), strict=True)]


def test_the_emulated_sort_is_cudas():
    values = torch.tensor([1.0, -math.nan, math.nan, -math.inf])
    with CudaSort():
        assert values.argsort(descending=True, stable=True).tolist() == [2, 0, 3, 1]
        assert torch.sort(values).indices.tolist() == [1, 3, 0, 2]
    assert set(values.argsort(descending=True, stable=True)[:2].tolist()) == {1, 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["specials", "all-nan", "zeros", "denormal", "few-levels", "largest"])
def test_nan_of_either_sign_ranks_first_whatever_the_sort(name, dtype):
    """The oracle of the selections, and the backend that runs on any device."""
    row = adversarial_rows(203, dtype=dtype)[name]
    rows = torch.stack([row, -row, row.flip(0)])
    best = [ranked(values) for values in rows.double().tolist()]
    flat = ranked(rows.double().flatten().tolist())
    with CudaSort():
        for k in (1, 7, 60, 203):
            expected = [sorted(indices[:k]) for indices in best]
            assert [mask.nonzero().flatten().tolist() for mask in topk_mask(rows, k)] == expected
            assert selected(codes_from_mask(rows, topk_mask(rows, k), 203)) == expected
            per_row = torch.full((3,), k)
            codes = reference.topk_select(rows, per_row, k)
            assert selected(codes) == expected
            check_codes(codes, rows, per_row, k)
            scored = torch.eye(203, dtype=dtype)
            if not rows.isnan().any() and not rows.isinf().any():
                assert selected(reference.topk_encode(rows, scored, None, per_row, k)) == expected
            batch = reference.batch_topk_select(rows, k, 203)
            of_batch = sorted(203 * b + f for b, indices in enumerate(selected(batch)) for f in indices)
            assert of_batch == sorted(flat[:k])
        above = reference.threshold_select(rows, torch.tensor(0.5, dtype=torch.float64), 203)
        limit = lambda value: math.isnan(value) or value > 0.5
        assert selected(above) == [[i for i, v in enumerate(values) if limit(v)] for values in rows.double().tolist()]
