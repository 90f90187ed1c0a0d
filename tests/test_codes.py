"""SparseCodes and its conversions: to_dense and to_coo carry the gradient, to_csr does not."""

from __future__ import annotations

import math

import pytest
import torch

from aksae_kernels import SparseCodes, topk_select
from aksae_kernels.codes import live_slots
from aksae_kernels.testing import INT_MIN, dense_codes, poison_padding, random_codes

SHAPES = [
    ((3,), 4, 64),
    ((2, 3), 7, 33),
    ((), 5, 9),
    ((5,), 0, 9),
    ((4,), 2, 0),
    ((0,), 8, 9),
    ((0,), 0, 0),
    ((2, 0), 3, 5),
]
shapes = pytest.mark.parametrize(("lead", "width", "d_sae"), SHAPES, ids=lambda value: str(value).replace(" ", ""))
by_hand = pytest.mark.parametrize("by_hand", [False, True], ids=["selected", "by-hand"])
# torch says so once per process, at the first sparse CSR tensor of anyone.
csr_is_beta = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")


@shapes
@by_hand
def test_to_dense(case, lead, width, d_sae, by_hand):
    codes = random_codes(lead, width, d_sae, dtype=case.dtype, device=case.device, integers=True, by_hand=by_hand)
    dense = poison_padding(codes).to_dense(d_sae)
    assert dense.dtype == case.dtype
    assert dense.shape == (*lead, d_sae)
    assert torch.equal(dense, dense_codes(codes, d_sae).to(case.dtype))


def test_to_dense_restores_what_was_selected(case):
    pre_acts = case.randn(2, 5, 40)
    assert torch.equal(topk_select(pre_acts, 40).to_dense(40), pre_acts.clamp(min=0))


@by_hand
def test_to_dense_carries_the_gradient(case, by_hand):
    codes = random_codes((2, 6), 5, 20, dtype=case.dtype, device=case.device, by_hand=by_hand)
    poisoned = poison_padding(codes)
    values = poisoned.values.requires_grad_()
    grad = case.integers(2, 6, 20)
    poisoned._replace(values=values).to_dense(20).backward(grad)
    live = codes.indices >= 0
    expected = grad.gather(-1, codes.indices.clamp(min=0).long()).where(live, 0)
    assert torch.equal(values.grad, expected)


def test_to_dense_gradcheck():
    codes = random_codes((4,), 5, 9, dtype=torch.float64, by_hand=True)
    assert torch.autograd.gradcheck(lambda v: codes._replace(values=v).to_dense(9), codes.values.requires_grad_())


def test_padding_takes_no_gradient():
    codes = poison_padding(random_codes((8,), 5, 9))
    values = codes.values.requires_grad_()
    codes._replace(values=values).to_dense(9).backward(torch.full((8, 9), math.nan))
    assert (values.grad[codes.indices == INT_MIN] == 0).all()


@shapes
@by_hand
def test_to_coo(case, lead, width, d_sae, by_hand):
    codes = random_codes(lead, width, d_sae, dtype=case.dtype, device=case.device, integers=True, by_hand=by_hand)
    codes = poison_padding(codes)
    values = codes.values.requires_grad_()
    with torch.sparse.check_sparse_tensor_invariants(True):
        coo = codes._replace(values=values).to_coo(d_sae)
    assert coo.is_coalesced()
    assert coo.shape == (*lead, d_sae)
    assert coo.dtype == case.dtype
    index = coo.indices()
    assert torch.equal(index, torch.unique(index, dim=1))
    assert torch.equal(coo.to_dense(), codes.to_dense(d_sae))
    if not by_hand:
        assert coo._nnz() == codes.counts.sum()
    torch.sparse.sum(coo * 3).backward()
    expected = torch.full_like(values, 3) if values.numel() else values
    assert torch.equal(values.grad, expected.where(live_slots(codes), 0))


def test_to_coo_keeps_zeros_and_nan():
    indices, counts = torch.tensor([[0, 2, -1]], dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    coo = SparseCodes(torch.tensor([[0.0, math.nan, 1.0]]), indices, counts).to_coo(3)
    assert coo.indices().tolist() == [[0, 0], [0, 2]]
    assert coo.values()[0] == 0
    assert coo.values()[1].isnan()


@csr_is_beta
@shapes
@by_hand
def test_to_csr(case, lead, width, d_sae, by_hand):
    codes = random_codes(lead, width, d_sae, dtype=case.dtype, device=case.device, integers=True, by_hand=by_hand)
    with torch.sparse.check_sparse_tensor_invariants(True):
        csr = poison_padding(codes).to_csr(d_sae)
    rows = math.prod(lead)
    assert csr.layout == torch.sparse_csr
    assert csr.shape == (rows, d_sae)
    assert csr.dtype == case.dtype
    dense = torch.zeros(rows, d_sae, dtype=torch.float64, device=case.device)
    row = torch.arange(rows, device=case.device).repeat_interleave(csr.crow_indices().diff())
    dense.index_put_((row, csr.col_indices()), csr.values().double(), accumulate=True)
    assert torch.equal(dense, dense_codes(codes, d_sae).view(rows, d_sae))


@csr_is_beta
def test_to_csr_keeps_exactly_the_selected_entries():
    pre_acts = torch.tensor([[3.0, -1, math.nan, 2], [-1, -2, -3, -4], [1, math.inf, 1, 1]])
    csr = topk_select(pre_acts, 3, 3).to_csr(4)
    assert csr.crow_indices().tolist() == [0, 3, 3, 6]
    assert csr.col_indices().tolist() == [0, 2, 3, 0, 1, 2]
    assert csr.values()[1].isnan()
    assert csr.values()[[0, 2, 3, 4, 5]].tolist() == [3, 2, 1, math.inf, 1]


@csr_is_beta
def test_to_csr_multiplies():
    codes, W = random_codes((6,), 4, 20), torch.randn(20, 3)
    torch.testing.assert_close(codes.to_csr(20) @ W, codes.to_dense(20) @ W)


@pytest.mark.parametrize("convert", [SparseCodes.to_dense, SparseCodes.to_coo, SparseCodes.to_csr])
@pytest.mark.parametrize("index", [9, -1, 2**31 - 1, INT_MIN])
def test_index_out_of_range_raises(convert, index):
    codes = random_codes((5,), 3, 9, by_hand=True)
    codes.counts[3] = 3
    codes.indices[3, 2] = index
    with pytest.raises(IndexError, match=str(index)):
        convert(codes, 9)


@pytest.mark.parametrize("convert", [SparseCodes.to_dense, SparseCodes.to_coo, SparseCodes.to_csr])
def test_wrong_d_sae_raises(convert):
    codes = random_codes((5,), 3, 9)
    with pytest.raises(IndexError):
        convert(codes, int(codes.indices.max()))
    with pytest.raises((ValueError, TypeError), match="d_sae"):
        convert(codes, -1)
    with pytest.raises(TypeError, match="d_sae"):
        convert(codes, 9.0)


def test_a_named_tuple_of_three():
    codes = random_codes((2,), 3, 9)
    assert codes._fields == ("values", "indices", "counts")
    values, indices, counts = codes
    assert SparseCodes(values, indices, counts) == codes
    assert torch.utils._pytree.tree_map(lambda t: t, codes)._fields == codes._fields


def test_repeats_in_16_bits_are_rounded_once():
    values = torch.ones(1, 300, dtype=torch.bfloat16)
    codes = SparseCodes(values, torch.zeros(1, 300, dtype=torch.int32), torch.tensor([300], dtype=torch.int32))
    assert codes.to_csr(1).values().item() == 300
    assert codes.to_coo(1).values().item() == 300
    assert codes.to_dense(1).item() == 300


def parts(codes: SparseCodes) -> list[tuple]:
    return [(tensor.dtype, tensor.device.type) for tensor in codes]


@pytest.mark.parametrize(
    ("how", "dtype", "device"),
    [
        (lambda codes: codes.to("meta"), torch.float32, "meta"),
        (lambda codes: codes.to(torch.bfloat16), torch.bfloat16, "cpu"),
        (lambda codes: codes.to("meta", torch.float64), torch.float64, "meta"),
        (lambda codes: codes.to(device=torch.device("meta"), dtype=torch.float16), torch.float16, "meta"),
        (lambda codes: codes.to(torch.zeros((), dtype=torch.float64, device="meta")), torch.float64, "meta"),
        (lambda codes: codes.to("meta", torch.float16, True), torch.float16, "meta"),
        (lambda codes: codes.to("meta", non_blocking=True), torch.float32, "meta"),
        (lambda codes: codes.cpu(), torch.float32, "cpu"),
    ],
)
def test_to(how, dtype, device):
    moved = how(random_codes((2, 3), 4, 9))
    assert isinstance(moved, SparseCodes)
    assert parts(moved) == [(dtype, device), (torch.int32, device), (torch.int32, device)]


def test_to_keeps_data_and_copies_when_told():
    codes = random_codes((2, 3), 4, 9)
    same = codes.to(torch.float32)
    assert all(a is b for a, b in zip(same, codes, strict=True))
    for copied in (codes.to(torch.float32, copy=True), codes.to(torch.float32, False, True)):
        for a, b in zip(copied, codes, strict=True):
            assert torch.equal(a, b)
            assert a.data_ptr() != b.data_ptr()
    with pytest.raises(TypeError, match=r"dtype.*int64"):
        codes.to(torch.int64)


def test_to_carries_the_gradient_and_detach_does_not():
    codes = random_codes((2, 3), 4, 9)
    codes = codes._replace(values=codes.values.requires_grad_())
    codes.to(torch.float64).values.sum().backward()
    assert torch.equal(codes.values.grad, torch.ones(2, 3, 4))
    detached = codes.detach()
    assert not detached.values.requires_grad
    assert detached.indices is codes.indices


@pytest.mark.parametrize("weights_only", [{}, {"weights_only": True}], ids=["default", "weights_only"])
def test_saved_codes_load(tmp_path, weights_only):
    codes = random_codes((2, 3), 4, 9)
    torch.save({"codes": codes, "step": 3}, tmp_path / "codes.pt")
    loaded = torch.load(tmp_path / "codes.pt", **weights_only)["codes"]
    assert isinstance(loaded, SparseCodes)
    assert all(torch.equal(a, b) for a, b in zip(loaded, codes, strict=True))
