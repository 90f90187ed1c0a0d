"""SAEs of other codebases with latents at a price: in Python, and by the command, judged on text."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from aksae import Priced, UserError, adapt, formats
from aksae.formats.stored import JumpReLU, ReLU, StoredSAE, TopK
from test_formats import D_SAE, SAMPLES, X, close, place, put, randn
from test_priced import D, rows

# Those whose host divides each input by a number of its own.
NORMALISED = {
    "sae_lens_standard_with_layer_norm": "layer_norm",
    "sae_lens_standard_of_constant_norm": "constant_norm_rescale",
    "openai_topk": "layer_norm",
    "llamascopium_relu_normalised_by_token": "constant_norm_rescale",
    "llama_scope_relu_of_tokens": "constant_norm_rescale",
}


@pytest.fixture(params=SAMPLES)
def stored(request, tmp_path):
    """An SAE as each of the hosts writes it, and its input normalisation, if any."""
    example = SAMPLES[request.param]()
    return formats.load(put(place(tmp_path, example.format), example.files)), NORMALISED.get(request.param)


def test_what_a_host_computes_is_kept_or_refused(stored):
    sae, norm = stored
    target = randn(len(X), sae.W_dec.shape[1], seed=11) if sae.transcoder else None
    if norm is not None:
        with pytest.raises(UserError, match=f"^sae: got the input normalisation {norm}, needs none"):
            adapt(sae, X, 3, target=target)
        return
    assert sae.input_norm == "none"
    priced = adapt(sae, X, 3, target=target)
    assert not priced.training
    assert priced.config.selection == Priced(3, 12, 2)
    # With every positive latent kept it is the host's SAE without its rule.
    codes, everything = priced.encode(X, k=sae.d_sae), dataclasses.replace(sae, activation=ReLU())
    close(priced.decode(codes, X), everything(X))
    # Candidates are ranked by what they add.
    close(torch.linalg.vector_norm(priced.W_dec, dim=-1), torch.ones(sae.d_sae, dtype=X.dtype))
    wanted = everything.encode(X).to_dense(sae.d_sae)
    if sae.decoder_norm != "codes":
        wanted = wanted * torch.linalg.vector_norm(sae.W_dec, dim=-1)
    close(codes.to_dense(sae.d_sae), wanted)


def test_the_weights_of_an_sae_that_needs_no_folding_are_shared(tmp_path):
    example = SAMPLES["native_topk"]()
    tensors = example.files["sae.safetensors"]
    tensors["W_dec"] /= torch.linalg.vector_norm(tensors["W_dec"], dim=-1, keepdim=True)
    sae = formats.load(put(place(tmp_path, example.format), example.files))
    priced = adapt(sae, X, 3)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert getattr(priced, name).data_ptr() == getattr(sae, name).data_ptr()
    assert not any(parameter.grad_fn for parameter in priced.parameters())


def made(lengths: torch.Tensor, activation, **fields) -> StoredSAE:
    """An SAE of 64 latents, one for each direction that rows are made of, with decoder rows of these lengths."""
    directions = F.normalize(torch.randn(64, D, generator=torch.Generator().manual_seed(5)), dim=-1)
    W_enc, b_enc, W_dec = directions / lengths[:, None], -0.3 / lengths, directions * lengths[:, None]
    return StoredSAE(W_enc, b_enc, W_dec, torch.zeros(D), activation, subtract_b_dec=True, **fields)


def test_the_lengths_of_decoder_rows_do_not_matter():
    x, lengths = rows(2048), torch.logspace(-1, 1, 64)
    ours = adapt(made(torch.ones(64), TopK(6)), x, 5)
    codes = ours.encode(x)
    assert abs(float(codes.counts.float().mean()) / 5 - 1) < 0.01
    for activation in (TopK(6), ReLU(), JumpReLU(torch.full((64,), 0.2))):
        theirs = adapt(made(lengths, activation), x, 5)
        assert float((theirs.encode(x).indices == codes.indices).float().mean()) > 0.999
        torch.testing.assert_close(theirs.price, ours.price, rtol=1e-3, atol=0)


def test_scales_stay_and_16_bits_too():
    x = rows(2048)
    ours = adapt(made(torch.ones(64), TopK(6)), x, 5)
    theirs = adapt(made(torch.ones(64), TopK(6), input_scale=4.0, output_scale=4.0), x / 4, 5)
    assert torch.equal(theirs.encode(x / 4).indices, ours.encode(x).indices)
    half = adapt(made(torch.ones(64), TopK(6)).to(torch.bfloat16), x, 4.5)
    assert half.W_dec.dtype == torch.bfloat16
    assert half.config.selection == Priced(4, 18, 2)
    assert abs(float(half.encode(x.bfloat16()).counts.float().mean()) / 4.5 - 1) < 0.02


def test_an_autoencoder_that_skips_is_refused():
    sae = made(torch.ones(64), ReLU(), W_skip=torch.eye(D))
    with pytest.raises(UserError, match="^sae: got a skip connection, needs an SAE without"):
        adapt(sae, rows(8), 3)


@pytest.mark.parametrize("budget", [0, -1.0, float("nan"), D_SAE + 1])
def test_budgets_that_no_row_can_have(tmp_path, budget):
    example = SAMPLES["native_topk"]()
    sae = formats.load(put(place(tmp_path, example.format), example.files))
    with pytest.raises(UserError, match=f"^budget: got {budget}, needs .* d_sae = {D_SAE}"):
        adapt(sae, X, budget)
