"""No op, conversion, layer or optimizer asks torch for its default device."""

from __future__ import annotations

import pytest
import torch
from test_compile import calls
from test_forward_mode import FUNCTIONS

from aksae_kernels import SparseCodes, topk_select
from aksae_kernels.layers import SparseDecoder, TopKEncoder
from aksae_kernels.optim import SAEAdam
from aksae_kernels.testing import (
    adversarial_rows,
    check_codes,
    codes_from_mask,
    dense_codes,
    encode_scores,
    error_ratio,
    poison_padding,
    random_codes,
    topk_mask,
)


@pytest.fixture(autouse=True)
def meta_by_default():
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def is_here(result) -> bool:
    tensors = result if isinstance(result, tuple) else (result,)
    return all(tensor.device.type == "cpu" for tensor in tensors)


@pytest.mark.parametrize("name", calls((), torch.float32, "cpu"))
def test_ops(backend, name):
    assert is_here(calls((2, 3), torch.float32, "cpu")[name]())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients(backend, name):
    leaves = [torch.randn(*shape, device="cpu", requires_grad=True) for shape in ((5, 4), (9, 4), (9,), (4,))]
    out = FUNCTIONS[name](*leaves)
    out.sum().backward()
    assert is_here((out, *(leaf.grad for leaf in leaves if leaf.grad is not None)))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_conversions(backend):
    codes = random_codes((2, 3), 4, 9)
    dense = dense_codes(codes, 9).float()
    assert torch.equal(codes.to_dense(9), dense)
    assert torch.equal(codes.to_coo(9).to_dense(), dense)
    assert torch.equal(codes.to_csr(9).to_dense(), dense.view(6, 9))
    assert is_here((codes.mask(), codes.gather(dense), codes.gather(dense[0, 0]), *SparseCodes.from_dense(dense)))
    codes.indices[0, 0, 0], codes.counts[0, 0] = 9, 4
    with pytest.raises(IndexError, match="9"):
        codes.to_dense(9)


@pytest.mark.parametrize("max_grad_norm", [None, 1.0], ids=str)
@pytest.mark.parametrize("lazy", [False, True], ids=["full", "lazy"])
def test_layers_and_optimizer(backend, max_grad_norm, lazy):
    encoder, decoder = TopKEncoder(8, 30, k=3, device="cpu"), SparseDecoder(30, 8, device="cpu")
    groups = [
        {"params": list(encoder.parameters()), "lazy": lazy},
        {"params": [decoder.weight], "unit_norm_rows": True},
    ]
    optimizer = SAEAdam(groups, max_grad_norm=max_grad_norm)
    optimizer.step()
    assert max_grad_norm is None or is_here(optimizer.last_grad_norm)
    before = decoder.weight.detach().clone()
    decoder(encoder(torch.randn(6, 8, device="cpu"))).square().sum().backward()
    optimizer.step()
    assert is_here(
        tuple(value for state in optimizer.state.values() for value in state.values() if value is not state["step"])
    )
    assert not torch.equal(decoder.weight, before)
    resumed = SAEAdam(groups, max_grad_norm=max_grad_norm)
    resumed.load_state_dict(optimizer.state_dict())
    resumed.step()


def test_helpers_of_tests(backend):
    for row in adversarial_rows(33).values():
        codes = topk_select(row, 5)
        check_codes(codes, row, 5)
        assert is_here(codes_from_mask(row, topk_mask(row, 5), 5))
        assert is_here(poison_padding(codes))
    x, W = torch.randn(4, 7, device="cpu"), torch.randn(9, 7, device="cpu")
    scores, bound = encode_scores(x, W)
    codes = topk_select(x @ W.T, 3)
    check_codes(codes, scores, 3, tolerance=bound)
    assert error_ratio(x @ W.T, scores, x @ W.T) <= 2
    assert is_here(random_codes((3,), 4, 9, by_hand=True))
