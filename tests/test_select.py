"""Selections over pre-activations already in memory: topk_select, batch_topk_select, threshold_select."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import MANY_ROWS, THREADS

from aksae_kernels import (
    SparseCodes,
    batch_topk_select,
    sparse_weight_grad,
    threshold_select,
    topk_encode,
    topk_select,
)
from aksae_kernels.layers import TopKEncoder
from aksae_kernels.testing import adversarial_rows, check_codes, codes_from_mask, selectable, topk_mask

ROW_NAMES = tuple(adversarial_rows(8))
SHAPES = [(3, 64), (2, 3, 33), (MANY_ROWS,), (1, 7), (5, 1), (4, 0), (0, 9), (0, 0), (2, 0, 5), (1, 1, 1, 20)]
HUGE = (2**31, 2**32, 2**40, 2**63 - 1)


def same_codes(actual: SparseCodes, expected: SparseCodes) -> None:
    assert torch.equal(actual.counts, expected.counts)
    assert torch.equal(actual.indices, expected.indices)
    torch.testing.assert_close(actual.values, expected.values, rtol=0, atol=0, equal_nan=True)


def random_k(shape: tuple[int, ...], high: int, device: str) -> torch.Tensor:
    return torch.randint(-1, high + 1, shape, generator=torch.Generator().manual_seed(3)).to(device)


def batch_codes(pre_acts: torch.Tensor, budget: int, width: int) -> SparseCodes:
    """The oracle of batch_topk_select: a top-k of the flattened batch."""
    mask = topk_mask(pre_acts.flatten(), budget).view(pre_acts.shape)
    return codes_from_mask(pre_acts, mask, width)


def threshold_codes(pre_acts: torch.Tensor, threshold: float | torch.Tensor, width: int) -> SparseCodes:
    """The oracle of threshold_select; a double holds every threshold unrounded."""
    limit = torch.as_tensor(threshold, dtype=torch.float64, device=pre_acts.device)
    return codes_from_mask(pre_acts, selectable(pre_acts) & ~(pre_acts.double() <= limit), width)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("k", [0, 1, 5, 1000], ids="k{}".format)
def test_topk_odd_shapes(case, shape, k):
    pre_acts = case.randn(*shape)
    check_codes(topk_select(pre_acts, k), pre_acts, k)
    check_codes(topk_select(pre_acts, k, 3), pre_acts, k, 3)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_topk_per_row_k(case, shape):
    pre_acts = case.randn(*shape)
    k = random_k(shape[:-1], 12, case.device)
    check_codes(topk_select(pre_acts, k, 12), pre_acts, k, 12)
    check_codes(topk_select(pre_acts, k, 4), pre_acts, k, 4)
    check_codes(topk_select(pre_acts, k, 2**40), pre_acts, k, 2**40)
    if case.device == "cpu":
        check_codes(topk_select(pre_acts, k), pre_acts, k)


@pytest.mark.parametrize("d_sae", [37, 5000])
@pytest.mark.parametrize("name", ROW_NAMES)
def test_topk_adversarial_rows(case, name, d_sae):
    row = adversarial_rows(d_sae, dtype=case.dtype, device=case.device)[name]
    k = torch.tensor([-(2**40), -1, 0, 1, 2, d_sae // 5, d_sae - 1, d_sae, d_sae + 1, *HUGE], device=case.device)
    pre_acts = row.expand(len(k), d_sae)
    check_codes(topk_select(pre_acts, k, d_sae), pre_acts, k, d_sae)
    check_codes(topk_select(pre_acts, k, 9), pre_acts, k, 9)
    check_codes(topk_select(row, d_sae // 3), row, d_sae // 3)


def test_topk_of_very_many_latents(fp32):
    # Past 131072, and with a k of thousands, kernels leave the ways of ordinary rows.
    rows = adversarial_rows(140_001, device=fp32.device)
    pre_acts = torch.stack([rows[name] for name in ("normal", "few-levels", "one-block", "specials")])
    k = torch.tensor([5000, 400, 3, 140_001], device=fp32.device)
    check_codes(topk_select(pre_acts, k, 140_001), pre_acts, k, 140_001)


def test_topk_ties_and_order_by_example(fp32):
    nan, inf = math.nan, math.inf
    row = torch.tensor([1.0, 2, 2, -0.0, 0, inf, -nan, 2, nan, -1, -inf], device=fp32.device)
    for k, indices in {
        1: [6],
        2: [6, 8],
        3: [5, 6, 8],
        4: [1, 5, 6, 8],
        5: [1, 2, 5, 6, 8],
        7: [0, 1, 2, 5, 6, 7, 8],
    }.items():
        codes = topk_select(row, k)
        assert codes.indices.tolist() == indices
        assert codes.counts.item() == k
    codes = topk_select(row, 10)
    assert codes.counts.item() == 7
    assert codes.indices.tolist() == [0, 1, 2, 5, 6, 7, 8, -1, -1, -1]
    assert codes.values[[0, 1, 2, 3, 5, 7, 8, 9]].tolist() == [1, 2, 2, inf, 2, 0, 0, 0]
    assert codes.values[[4, 6]].isnan().all()


@pytest.mark.parametrize("k", [*HUGE, 2**64 + 3, -1, -(2**70)])
def test_topk_k_beyond_any_width(fp32, k):
    pre_acts = fp32.randn(3, 20)
    check_codes(topk_select(pre_acts, k, 7), pre_acts, k, 7)
    check_codes(topk_select(pre_acts, k, 2**70), pre_acts, k, 2**70)
    check_codes(topk_select(pre_acts, k), pre_acts, k)


@pytest.mark.parametrize(
    "dtype",
    [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64],
    ids=str,
)
def test_topk_any_integer_dtype_of_k(fp32, dtype):
    pre_acts = fp32.randn(4, 20)
    most = torch.iinfo(dtype).max
    k = torch.tensor([0, 3, 9, most], dtype=dtype, device=fp32.device)
    same = torch.tensor([0, 3, 9, min(most, 2**62)], device=fp32.device)
    check_codes(topk_select(pre_acts, k, 6), pre_acts, same, 6)
    if fp32.device == "cpu":
        check_codes(topk_select(pre_acts, k), pre_acts, same)


def test_topk_k_with_any_strides(fp32):
    pre_acts = fp32.randn(4, 3, 20)
    k = random_k((3, 8), 9, fp32.device).T[::2]
    check_codes(topk_select(pre_acts, k, 9), pre_acts, k, 9)
    k = random_k((4, 1), 9, fp32.device).expand(4, 3)
    check_codes(topk_select(pre_acts, k, 9), pre_acts, k, 9)


SELECTIONS = {
    "topk": lambda pre_acts: topk_select(pre_acts, 6),
    "batch-topk": lambda pre_acts: batch_topk_select(pre_acts, 40),
    "threshold": lambda pre_acts: threshold_select(pre_acts, 0.3),
}
each_selection = pytest.mark.parametrize("select", SELECTIONS.values(), ids=SELECTIONS.keys())


@each_selection
def test_any_strides(case, select):
    base = case.randn(24, 30, 2)
    views = {
        "transposed": base[:, :, 0].T,
        "row slice": base[::3, 2:27, 1],
        "column step": base.view(24, 60)[:, ::3],
        "one row many times": base[:1, :, 0].expand(9, 30),
        "one column many times": base[:, :1, 0].expand(24, 11),
        "permuted leading": base.permute(2, 1, 0),
        "offset": base.flatten()[5 : 5 + 7 * 31].view(7, 31),
    }
    for name, view in views.items():
        before = view.clone()
        codes, expected = select(view), select(view.contiguous())
        same_codes(codes, expected)
        torch.testing.assert_close(view, before, rtol=0, atol=0, msg=f"{name}: the input was written to")


@each_selection
def test_gradient_goes_to_the_selected_entries_only(case, select):
    pre_acts = case.randn(3, 4, 40).requires_grad_()
    codes = select(pre_acts)
    # What arrives in the padding must not be read.
    live = codes.indices >= 0
    grad = case.randn(*codes.values.shape, seed=1)
    codes.values.backward(grad.where(live, math.nan))
    expected = torch.zeros_like(pre_acts)
    for position in live.nonzero().tolist():
        slot = tuple(position)
        expected[(*slot[:-1], codes.indices[slot])] = grad[slot]
    assert torch.equal(pre_acts.grad, expected)
    assert not codes.indices.requires_grad
    assert not codes.counts.requires_grad


@each_selection
def test_expanded_gradient(case, select):
    pre_acts = case.randn(5, 40).T.requires_grad_()
    select(pre_acts.T).values.sum().backward()
    assert torch.equal(pre_acts.grad.T, select(pre_acts.detach().T).to_dense(40).ne(0).to(case.dtype))


@each_selection
def test_gradcheck(fp64, select):
    # Sixteenths, shuffled: no perturbation changes the selection or crosses a threshold.
    order = torch.randperm(120, generator=torch.Generator().manual_seed(0))
    pre_acts = ((order - 40.5) / 16).view(6, 20).to(fp64.device, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: select(p).values, pre_acts)


@each_selection
def test_double_backward_raises(fp32, select):
    pre_acts = fp32.randn(4, 20).requires_grad_()
    values = select(pre_acts).values

    def twice():
        (grad,) = torch.autograd.grad(values.square().sum(), pre_acts, create_graph=True)
        # The other term sees to it that a gradient which lost its graph is not an error by itself.
        (grad.square().sum() + pre_acts.sum()).backward()

    with pytest.raises(RuntimeError):
        twice()


@each_selection
def test_no_gradient_where_none_is_asked(fp32, select):
    assert not select(fp32.randn(4, 20)).values.requires_grad
    with torch.no_grad():
        assert not select(fp32.randn(4, 20).requires_grad_()).values.requires_grad


@each_selection
@pytest.mark.parametrize("shape", [(0, 9), (4, 0), (0, 0), (2, 0, 3)], ids=str)
def test_gradient_of_empty_input(fp32, select, shape):
    pre_acts = fp32.randn(*shape).requires_grad_()
    select(pre_acts).values.sum().backward()
    assert pre_acts.grad.shape == shape


@each_selection
def test_same_bits_again_and_with_other_threads(case, select):
    pre_acts = case.randn(min(67, MANY_ROWS // 4), 3000)
    first = select(pre_acts)
    threads = torch.get_num_threads()
    try:
        for n in THREADS:
            torch.set_num_threads(n)
            same_codes(select(pre_acts), first)
    finally:
        torch.set_num_threads(threads)


@each_selection
def test_rows_far_apart_in_memory(backend, select):
    # Never written, so the pages in between cost nothing: only offsets beyond 2^31 elements are at stake.
    stride = 2**31 + 5
    base = torch.empty(stride + 64, dtype=torch.bfloat16)
    rows = base.as_strided((2, 50), (stride, 1))
    rows.copy_(torch.randn(2, 50, generator=torch.Generator().manual_seed(0)))
    same_codes(select(rows), select(rows.contiguous()))
    columns = base.as_strided((50, 2), (1, stride))
    same_codes(select(columns), select(columns.contiguous()))


# ---------------------------------------------------------------------------------------------- whole batch


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("budget", [0, 1, 17, 10**6, 2**70], ids="budget{}".format)
def test_batch_topk_odd_shapes(case, shape, budget):
    pre_acts = case.randn(*shape)
    same_codes(batch_topk_select(pre_acts, budget), batch_codes(pre_acts, budget, shape[-1]))


@pytest.mark.parametrize("name", ROW_NAMES)
@pytest.mark.parametrize("d_sae", [37, 3000])
def test_batch_topk_adversarial_rows(case, name, d_sae):
    row = adversarial_rows(d_sae, dtype=case.dtype, device=case.device)[name]
    pre_acts = torch.stack([row, row.flip(0), row, -row])
    for budget in (1, 2, d_sae // 2, d_sae, d_sae + 1, 2 * d_sae + 3, 4 * d_sae - 1):
        same_codes(batch_topk_select(pre_acts, budget), batch_codes(pre_acts, budget, d_sae))


def test_batch_topk_ties_go_to_the_smaller_row_then_latent(fp32):
    codes = batch_topk_select(torch.ones(3, 4, device=fp32.device), 6, 4)
    assert codes.counts.tolist() == [4, 2, 0]
    assert codes.indices.tolist() == [[0, 1, 2, 3], [0, 1, -1, -1], [-1] * 4]


def test_batch_topk_of_all_leading_dimensions(fp32):
    pre_acts = fp32.randn(2, 3, 20)
    codes, flat = batch_topk_select(pre_acts, 15), batch_topk_select(pre_acts.view(6, 20), 15)
    same_codes(SparseCodes(codes.values.view(6, 20), codes.indices.view(6, 20), codes.counts.view(6)), flat)
    assert codes.counts.sum() == 15


def test_batch_topk_width(fp32):
    pre_acts = -torch.ones(3, 10, device=fp32.device)
    pre_acts[1, 2:8] = 1
    same_codes(batch_topk_select(pre_acts, 6, 6), batch_codes(pre_acts, 6, 6))
    same_codes(batch_topk_select(pre_acts, 4, 4), batch_codes(pre_acts, 4, 4))
    if fp32.device == "cpu":
        with pytest.raises(ValueError, match="k_max"):
            batch_topk_select(pre_acts, 6, 5)
        with pytest.raises(ValueError, match="k_max"):
            batch_topk_select(pre_acts, 2**40, 0)


# ------------------------------------------------------------------------------------------------ threshold


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("threshold", [0.0, 0.5, -1.0, math.inf, -math.inf], ids=str)
def test_threshold_odd_shapes(case, shape, threshold):
    pre_acts = case.randn(*shape)
    expected = threshold_codes(pre_acts, threshold, shape[-1])
    same_codes(threshold_select(pre_acts, threshold), expected)
    per_latent = torch.full(shape[-1:], threshold, dtype=case.dtype, device=case.device)
    same_codes(threshold_select(pre_acts, per_latent), expected)


@pytest.mark.parametrize("name", ROW_NAMES)
def test_threshold_adversarial_rows(case, name):
    rows = adversarial_rows(3000, dtype=case.dtype, device=case.device)
    pre_acts = torch.stack([rows[name], rows[name].flip(0)])
    for threshold in (0.0, 1.0, -2.0, math.inf, rows["normal"], rows[name].nan_to_num(0.5)):
        same_codes(threshold_select(pre_acts, threshold), threshold_codes(pre_acts, threshold, 3000))


def test_threshold_is_not_rounded(case):
    # Thresholds a hair below and above a representable number; rounded, all three are that number.
    info = torch.finfo(case.dtype)
    if case.dtype == torch.float64:
        pytest.skip("a Python float is fp64: there is nothing to round")
    value = 1 + info.eps
    pre_acts = torch.full((2, 3), value, dtype=case.dtype, device=case.device)
    for threshold, kept in ((value * (1 - 1e-12), 3), (value, 0), (value * (1 + 1e-12), 0)):
        assert threshold_select(pre_acts, threshold).counts.tolist() == [kept, kept], threshold


def test_threshold_keeps_values_unshifted_and_nan(fp32):
    row = torch.tensor([0.5, 2.0, math.nan, -3.0, math.inf, -0.0, 1.0], device=fp32.device)
    codes = threshold_select(row, 1.0)
    assert codes.indices.tolist() == [1, 2, 4, -1, -1, -1, -1]
    assert codes.values[[0, 2]].tolist() == [2, math.inf]
    assert codes.values[1].isnan()
    assert threshold_select(row, math.inf).indices.tolist()[0] == 2
    assert threshold_select(row, -5).indices.tolist() == [0, 1, 2, 4, 6, -1, -1]


def test_threshold_per_latent_by_example(fp32):
    pre_acts = torch.tensor([[1.0, 1, 1, 1], [2.0, 2, 2, 2]], device=fp32.device)
    threshold = torch.tensor([0.5, 1.0, 1.5, 2.0], device=fp32.device)
    codes = threshold_select(pre_acts, threshold, 3)
    assert codes.counts.tolist() == [1, 3]
    assert codes.indices.tolist() == [[0, -1, -1], [0, 1, 2]]
    strided = torch.stack([threshold, -threshold], 1)[:, 0]
    same_codes(threshold_select(pre_acts, strided, 3), codes)
    same_codes(threshold_select(pre_acts, threshold[:1].expand(4)), threshold_select(pre_acts, 0.5))


def test_threshold_gets_no_gradient(fp32):
    pre_acts = fp32.randn(4, 10).requires_grad_()
    threshold = torch.full((10,), 0.1, device=fp32.device, requires_grad=True)
    threshold_select(pre_acts, threshold).values.sum().backward()
    assert pre_acts.grad is not None
    assert threshold.grad is None
    assert not threshold_select(pre_acts.detach(), threshold).values.requires_grad


def test_threshold_width(fp32):
    pre_acts = torch.tensor([[1.0, -1, 3], [1, 2, 3]], device=fp32.device)
    assert threshold_select(pre_acts, 1.5, 2).indices.tolist() == [[2, -1], [1, 2]]
    if fp32.device == "cpu":
        with pytest.raises(ValueError, match="k_max"):
            threshold_select(pre_acts, 1.5, 1)
        with pytest.raises(ValueError, match="k_max"):
            threshold_select(pre_acts, 0.0, 0)


# ---------------------------------------------------------------------------------------------- bad arguments

ROWS = torch.ones(2, 3)
WRONG = {
    "pre_acts is a list": ("pre_acts", TypeError, lambda: topk_select([[1.0]], 1)),
    "pre_acts is int": ("pre_acts", TypeError, lambda: topk_select(torch.ones(2, 3, dtype=torch.int64), 1)),
    "pre_acts is bool": ("pre_acts", TypeError, lambda: topk_select(ROWS > 0, 1)),
    "pre_acts is complex": ("pre_acts", TypeError, lambda: topk_select(ROWS + 0j, 1)),
    "pre_acts has no dimension": ("pre_acts", ValueError, lambda: topk_select(torch.ones(()), 1)),
    "k is a float": ("k", TypeError, lambda: topk_select(ROWS, 1.0)),
    "k is a bool": ("k", TypeError, lambda: topk_select(ROWS, True)),
    "k is None": ("k", TypeError, lambda: topk_select(ROWS, None)),
    "k is a list": ("k", TypeError, lambda: topk_select(ROWS, [1, 1])),
    "k is a float tensor": ("k", TypeError, lambda: topk_select(ROWS, torch.ones(2), 1)),
    "k is a bool tensor": ("k", TypeError, lambda: topk_select(ROWS, torch.ones(2, dtype=torch.bool), 1)),
    "k is too long": ("k", ValueError, lambda: topk_select(ROWS, torch.ones(3, dtype=torch.int64), 1)),
    "k has one dimension too many": (
        "k",
        ValueError,
        lambda: topk_select(ROWS, torch.ones(2, 1, dtype=torch.int64), 1),
    ),
    "k is one number for two rows": ("k", ValueError, lambda: topk_select(ROWS, torch.tensor(1), 1)),
    "k is elsewhere": ("k", ValueError, lambda: topk_select(ROWS, torch.ones(2, dtype=torch.int64, device="meta"), 1)),
    "k_max is negative": ("k_max", ValueError, lambda: topk_select(ROWS, 1, -1)),
    "k_max is a float": ("k_max", TypeError, lambda: topk_select(ROWS, 1, 2.0)),
    "k_max is a bool": ("k_max", TypeError, lambda: topk_select(ROWS, 1, True)),
    "k is NumPy's bool": ("k", TypeError, lambda: topk_select(ROWS, np.True_)),
    "k is NumPy's float": ("k", TypeError, lambda: topk_select(ROWS, np.float64(1))),
    "k_max is a bool tensor": ("k_max", TypeError, lambda: topk_select(ROWS, 1, torch.tensor(True))),
    "batch: budget is NumPy's bool": ("budget", TypeError, lambda: batch_topk_select(ROWS, np.True_)),
    "batch: pre_acts is int": ("pre_acts", TypeError, lambda: batch_topk_select(ROWS.int(), 1)),
    "batch: pre_acts has no dimension": ("pre_acts", ValueError, lambda: batch_topk_select(torch.ones(()), 1)),
    "batch: budget is a float": ("budget", TypeError, lambda: batch_topk_select(ROWS, 1.5)),
    "batch: budget is a bool": ("budget", TypeError, lambda: batch_topk_select(ROWS, True)),
    "batch: budget is per row": ("budget", TypeError, lambda: batch_topk_select(ROWS, torch.tensor([1, 1]))),
    "batch: k_max is negative": ("k_max", ValueError, lambda: batch_topk_select(ROWS, 1, -2)),
    "threshold: pre_acts is int": ("pre_acts", TypeError, lambda: threshold_select(ROWS.int(), 1.0)),
    "threshold: threshold is None": ("threshold", TypeError, lambda: threshold_select(ROWS, None)),
    "threshold: threshold is a bool": ("threshold", TypeError, lambda: threshold_select(ROWS, True)),
    "threshold: of another length": ("threshold", ValueError, lambda: threshold_select(ROWS, torch.ones(4))),
    "threshold: per row": ("threshold", ValueError, lambda: threshold_select(ROWS, torch.ones(2, 3))),
    "threshold: of another dtype": ("threshold", TypeError, lambda: threshold_select(ROWS, torch.ones(3).double())),
    "threshold: of ints": ("threshold", TypeError, lambda: threshold_select(ROWS, torch.ones(3).int())),
    "threshold: elsewhere": ("threshold", ValueError, lambda: threshold_select(ROWS, torch.ones(3, device="meta"))),
    "threshold: k_max is negative": ("k_max", ValueError, lambda: threshold_select(ROWS, 1.0, -2)),
}


@pytest.mark.parametrize(("name", "error", "call"), WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments_are_named(name, error, call):
    with pytest.raises(error, match=rf"\b{name}\b"):
        call()


def test_k_max_must_be_given_with_a_tensor_k_on_an_accelerator():
    # A meta tensor stands for any tensor whose values are not at hand.
    with pytest.raises(ValueError, match="k_max"):
        topk_select(torch.ones(2, 3, device="meta"), torch.ones(2, dtype=torch.int64, device="meta"))


# ------------------------------------------------------------------------------------------ the judge itself


def spoil(codes: SparseCodes, field: str, row: int, slot: int | None, value: float) -> SparseCodes:
    tensor = getattr(codes, field).clone()
    tensor[(row,) if slot is None else (row, slot)] = value
    return codes._replace(**{field: tensor})


@pytest.mark.parametrize("tolerance", [0.0, 1e-6])
@pytest.mark.parametrize(
    ("field", "row", "slot", "value"),
    [
        ("counts", 0, None, 2),
        ("counts", 1, None, 3),
        ("indices", 0, 1, 0),
        ("indices", 0, 2, 5),
        ("indices", 0, 2, 6),
        ("indices", 1, 2, 0),
        ("values", 0, 0, 1.001),
        ("values", 0, 0, math.nan),
        ("values", 1, 2, 1.0),
    ],
)
def test_check_codes_catches_a_wrong_entry(tolerance, field, row, slot, value):
    scores = torch.tensor([[1.0, 2, 4, 3, -1, 0.5], [0, 1, 2, -1, -2, -3]], dtype=torch.float64)
    codes = codes_from_mask(scores, topk_mask(scores, 3), 3)
    check_codes(codes, scores, 3, tolerance=tolerance)
    with pytest.raises(AssertionError):
        check_codes(spoil(codes, field, row, slot, value), scores, 3, tolerance=tolerance)


def test_check_codes_tolerates_near_ties_only_within_the_tolerance():
    scores = torch.tensor([1.0, 1 + 1e-7, 2.0, 1e-9], dtype=torch.float64)
    swapped = SparseCodes(scores[[0, 2]], torch.tensor([0, 2], dtype=torch.int32), torch.tensor(2, dtype=torch.int32))
    check_codes(swapped, scores, 2, tolerance=1e-6)
    with pytest.raises(AssertionError, match="better entry"):
        check_codes(swapped, scores, 2, tolerance=1e-8)
    with pytest.raises(AssertionError, match="total order"):
        check_codes(swapped, scores, 2)
    fewer = codes_from_mask(scores, topk_mask(scores, 3), 4)
    check_codes(fewer, scores, 4, tolerance=1e-6)
    with pytest.raises(AssertionError, match="left out"):
        check_codes(fewer, scores, 4, tolerance=1e-10)


def test_more_latents_than_int32_are_refused():
    rows = torch.zeros(1, 1).expand(1, 2**31)
    with pytest.raises(ValueError, match="F must be at most"):
        topk_select(rows, 1)


class Index:
    """Some other library's integer."""

    def __init__(self, value: int):
        self.value = value

    def __index__(self) -> int:
        return self.value


@pytest.mark.parametrize("integer", [np.int64, np.uint8, np.array, torch.tensor, Index], ids=lambda kind: kind.__name__)
def test_whatever_is_an_index_is_an_int(integer):
    pre_acts, x, W = torch.randn(4, 20), torch.randn(4, 7), torch.randn(20, 7)
    codes = topk_select(pre_acts, 5)
    if integer is not torch.tensor:
        # A tensor is a k for each row.
        same_codes(topk_select(pre_acts, integer(5)), codes)
        same_codes(topk_encode(x, W, k=integer(5)), topk_encode(x, W, k=5))
    same_codes(topk_select(pre_acts, 9, integer(5)), topk_select(pre_acts, 9, 5))
    same_codes(topk_encode(x, W, k=9, k_max=integer(5)), topk_encode(x, W, k=9, k_max=5))
    same_codes(batch_topk_select(pre_acts, integer(9), integer(9)), batch_topk_select(pre_acts, 9, 9))
    same_codes(threshold_select(pre_acts, 0.5, integer(20)), threshold_select(pre_acts, 0.5, 20))
    assert torch.equal(codes.to_dense(integer(20)), codes.to_dense(20))
    assert torch.equal(codes.to_coo(integer(20)).to_dense(), codes.to_dense(20))
    assert torch.equal(sparse_weight_grad(codes, x, integer(20)), sparse_weight_grad(codes, x, 20))
    if integer is not torch.tensor:
        assert type(TopKEncoder(integer(7), integer(20), k=integer(5)).k) is int
