"""SparseCodes: what it says of its latents, and its conversions; of these to_csr alone carries no gradient."""

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
# torch's own forward mode warns of what it is made of.
warns_of_jit = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
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


# -------------------------------------------------------------------------------------------- mask and gather


@shapes
@by_hand
def test_mask(lead, width, d_sae, by_hand):
    codes = random_codes(lead, width, d_sae, by_hand=by_hand)
    assert torch.equal(poison_padding(codes).mask(), codes.indices >= 0)


@shapes
@by_hand
@pytest.mark.parametrize("of_rows", [False, True], ids=["F", "rows-F"])
def test_gather(case, lead, width, d_sae, by_hand, of_rows):
    codes = random_codes(lead, width, d_sae, device=case.device, by_hand=by_hand)
    dense = case.integers(*lead, d_sae) if of_rows else case.integers(d_sae)
    dense.requires_grad_()
    gathered = poison_padding(codes).gather(dense)
    assert gathered.dtype == case.dtype
    assert gathered.shape == codes.indices.shape
    live = codes.indices >= 0
    *row, _ = live.nonzero(as_tuple=True)
    expected = torch.zeros(codes.indices.shape, dtype=case.dtype, device=case.device)
    expected[live] = dense.detach().expand(*lead, d_sae)[(*row, codes.indices[live].long())]
    assert torch.equal(gathered, expected)
    grad = case.integers(*codes.indices.shape, seed=1)
    gathered.backward(grad.where(live, math.nan))
    hits = codes._replace(values=grad.to(torch.float64)).to_dense(d_sae)
    hits = hits if of_rows or not lead else hits.flatten(0, -2).sum(0)
    assert torch.equal(dense.grad, hits.to(case.dtype))


def test_gather_takes_integers_and_what_learns_nothing():
    codes = SparseCodes(torch.ones(2), torch.tensor([2, 0], dtype=torch.int32), torch.tensor(1, dtype=torch.int32))
    assert codes.gather(torch.tensor([7, 8, 9])).tolist() == [9, 0]
    assert codes.gather(torch.tensor([True, False, True])).tolist() == [True, False]


def test_gather_leaves_what_no_latent_points_to():
    """NaN beside the latents comes neither into the result nor, times 0, into the gradient."""
    codes = SparseCodes(
        *(part.unsqueeze(0) for part in (torch.ones(2), torch.tensor([1, -1]).int())), torch.ones(1).int()
    )
    dense = torch.tensor([math.nan, 3.0, math.inf], requires_grad=True)
    codes.gather(dense).sum().backward()
    assert codes.gather(dense).tolist() == [[3, 0]]
    assert dense.grad.tolist() == [0, 1, 0]


@warns_of_jit
def test_gather_gradcheck():
    codes = random_codes((4,), 5, 9, by_hand=True)
    for shape in ((9,), (4, 9)):
        dense = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(codes.gather, dense, check_forward_ad=True)


@pytest.mark.parametrize(
    ("dense", "error", "message"),
    [
        (torch.ones(3, 9), ValueError, r"dense must have shape \[F\] or \[2, 3, F\].*got \[3, 9\]"),
        (torch.ones(6, 9), ValueError, "dense"),
        (torch.ones(()), ValueError, "dense"),
        (9, TypeError, "dense.*got int"),
        (torch.ones(9, device="meta"), ValueError, "dense must be on the device of the codes, cpu; got meta"),
        (torch.ones(4), IndexError, "codes.indices"),
        (torch.ones(0), IndexError, "codes.indices"),
    ],
    ids=["lead", "flat", "scalar", "int", "device", "few", "none"],
)
def test_what_gather_refuses(dense, error, message):
    codes = random_codes((2, 3), 4, 9)
    codes.indices[1, 1], codes.counts[1, 1] = torch.tensor([3, 6, 7, 8]), 4
    with pytest.raises(error, match=message):
        codes.gather(dense)


# ------------------------------------------------------------------------------------------------- from_dense

dense_shapes = pytest.mark.parametrize(
    "shape", [(9,), (5, 9), (2, 3, 9), (0, 9), (4, 0), (0, 0), (2, 0, 5), (300, 1), (1, 1)], ids=str
)


def with_holes(case, shape) -> torch.Tensor:
    dense = case.integers(*shape, seed=2)
    return torch.where(case.integers(*shape, seed=3) > 0, dense, 0)


@dense_shapes
def test_from_dense(case, shape):
    dense = with_holes(case, shape)
    codes = SparseCodes.from_dense(dense)
    stored = dense != 0
    longest = int(stored.sum(-1).max()) if stored.shape[:-1].numel() and shape[-1] else 0
    assert codes.values.shape == codes.indices.shape == (*shape[:-1], longest)
    assert [part.dtype for part in codes] == [case.dtype, torch.int32, torch.int32]
    assert torch.equal(codes.counts, stored.sum(-1).int())
    live = codes.mask()
    assert torch.equal(codes.indices >= 0, live)
    assert (codes.values[~live] == 0).all()
    assert (codes.indices.diff(dim=-1)[live[..., 1:]] > 0).all()
    assert torch.equal(codes.to_dense(shape[-1]), dense)
    wider = SparseCodes.from_dense(dense, longest + 2)
    assert wider.values.shape[-1] == longest + 2
    assert torch.equal(wider.to_dense(shape[-1]), dense)


def test_from_dense_keeps_what_is_not_zero():
    codes = SparseCodes.from_dense(torch.tensor([[-0.0, -2, math.nan, math.inf], [0, 1e-45, 0, 0]]))
    assert codes.counts.tolist() == [3, 1]
    assert codes.indices.tolist() == [[1, 2, 3], [1, -1, -1]]
    assert codes.values[0, 0] == -2
    assert codes.values[0, 1].isnan()
    assert codes.values[0, 2] == math.inf
    assert codes.values[1, 0] > 0


def test_from_dense_of_any_strides(case):
    dense = with_holes(case, (6, 8))
    for strided in (dense.T.contiguous().T, dense[::2, 1::3], dense[:1].expand(4, -1)):
        expected = SparseCodes.from_dense(strided.contiguous())
        assert all(torch.equal(a, b) for a, b in zip(SparseCodes.from_dense(strided), expected, strict=True))


def test_from_dense_undoes_to_dense(case):
    codes = topk_select(case.randn(2, 5, 40), 7)
    for a, b in zip(SparseCodes.from_dense(codes.to_dense(40), 7), codes, strict=True):
        assert torch.equal(a, b)


def test_from_dense_carries_the_gradient(case):
    dense = with_holes(case, (2, 5, 9)).requires_grad_()
    codes = SparseCodes.from_dense(dense)
    grad = case.integers(*codes.values.shape, seed=4)
    codes.values.backward(grad.where(codes.mask(), math.nan))
    assert torch.equal(dense.grad, codes._replace(values=grad).to_dense(9))


@warns_of_jit
def test_from_dense_gradcheck():
    """Of the entries that are there: a step away from 0 would make another one."""
    stored = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()

    def values(entries: torch.Tensor) -> torch.Tensor:
        dense = torch.zeros(3, 4, dtype=torch.float64).masked_scatter(stored, entries)
        return SparseCodes.from_dense(dense).values

    entries = torch.arange(1, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(values, entries, check_forward_ad=True)


@pytest.mark.parametrize(
    ("dense", "k_max", "error", "message"),
    [
        (torch.ones(2, 3), 2, ValueError, "k_max must be at least 3.*got 2"),
        (torch.zeros(2, 3), -1, ValueError, "k_max.*got -1"),
        (torch.ones(2, 3), 3.0, TypeError, "k_max"),
        (torch.ones(2, 3), True, TypeError, "k_max"),
        (torch.ones(2, 3, dtype=torch.int64), None, TypeError, "dense.*int64"),
        (torch.tensor(1.0), None, TypeError, "dense"),
        ([[1.0]], None, TypeError, "dense.*got list"),
    ],
    ids=["narrow", "negative", "float", "bool", "integers", "scalar", "list"],
)
def test_what_from_dense_refuses(dense, k_max, error, message):
    with pytest.raises(error, match=message):
        SparseCodes.from_dense(dense, k_max)


# ----------------------------------------------------------------------------------------- moving and storing


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
