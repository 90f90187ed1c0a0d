"""TopKEncoder and SparseDecoder: the ops as modules."""

from __future__ import annotations

import copy

import pytest
import torch

from aksae_kernels import SparseCodes, sparse_decode, topk_encode
from aksae_kernels.layers import SparseDecoder, TopKEncoder


def same(a: SparseCodes, b: SparseCodes) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("lead", [(5,), (2, 3), (), (0,)], ids=str)
def test_layers_are_the_ops(case, lead, bias):
    encoder = TopKEncoder(8, 30, k=4, bias=bias, device=case.device, dtype=case.dtype)
    decoder = SparseDecoder(30, 8, bias=bias, device=case.device, dtype=case.dtype)
    with torch.no_grad():
        for parameter in (*encoder.parameters(), *decoder.parameters()):
            parameter.copy_(case.randn(*parameter.shape, seed=parameter.ndim))
    x = case.randn(*lead, 8)
    codes = encoder(x)
    assert same(codes, topk_encode(x, encoder.weight, encoder.bias, k=4))
    assert torch.equal(decoder(codes), sparse_decode(codes, decoder.weight, decoder.bias))
    assert decoder(codes).shape == x.shape


def test_parameters():
    encoder, decoder = TopKEncoder(8, 30, k=4), SparseDecoder(30, 8)
    assert {name: tuple(p.shape) for name, p in encoder.named_parameters()} == {"weight": (30, 8), "bias": (30,)}
    assert {name: tuple(p.shape) for name, p in decoder.named_parameters()} == {"weight": (30, 8), "bias": (8,)}
    assert TopKEncoder(8, 30, bias=False).bias is None
    assert list(SparseDecoder(30, 8, bias=False).state_dict()) == ["weight"]
    for weight in (encoder.weight, decoder.weight):
        torch.testing.assert_close(weight.norm(dim=1), torch.ones(30))
    half = TopKEncoder(8, 30, k=4, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert {p.device.type for p in SparseDecoder(30, 8, device="meta").parameters()} == {"meta"}


def test_k_of_the_call_wins(fp32):
    x = fp32.randn(6, 8)
    encoder = TopKEncoder(8, 30, k=4, device=fp32.device)
    assert encoder(x).values.shape[-1] == 4
    assert encoder(x, 2).values.shape[-1] == 2
    assert encoder(x, k=0).counts.tolist() == [0] * 6
    per_row = torch.arange(6, device=fp32.device)
    encoder = TopKEncoder(8, 30, k_max=3, device=fp32.device)
    codes = encoder(x, per_row)
    assert codes.values.shape == (6, 3)
    assert (codes.counts <= per_row).all()
    assert same(codes, topk_encode(x, encoder.weight, encoder.bias, k=per_row, k_max=3))


def test_no_k_is_an_error():
    with pytest.raises((TypeError, ValueError), match=r"\bk\b"):
        TopKEncoder(8, 30)(torch.ones(2, 8))


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match=r"x|W_enc"):
        TopKEncoder(8, 30, k=2)(torch.ones(2, 9))
    with pytest.raises(TypeError, match="codes"):
        SparseDecoder(30, 8)(torch.ones(2, 30))


def test_an_autoencoder_learns(fp32):
    torch.manual_seed(0)
    encoder = TopKEncoder(8, 30, k=4, device=fp32.device)
    decoder = SparseDecoder(30, 8, device=fp32.device)
    x = fp32.randn(64, 8)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=0.02)
    losses = []
    for _ in range(60):
        loss = (decoder(encoder(x)) - x).square().sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in (*encoder.parameters(), *decoder.parameters()))
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3


def test_copy_state_dict_and_repr(fp32):
    x = fp32.randn(6, 8)
    encoder = TopKEncoder(8, 30, k=4, k_max=5, device=fp32.device)
    expected = encoder(x)
    assert same(copy.deepcopy(encoder)(x), expected)
    other = TopKEncoder(8, 30, k=4, k_max=5, device=fp32.device)
    other.load_state_dict(encoder.state_dict())
    assert same(other(x), expected)
    assert "d_sae=30" in repr(encoder)
    assert "d_in=8" in repr(SparseDecoder(30, 8))
