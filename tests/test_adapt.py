"""SAEs of other codebases with latents at a price: in Python, and by the command, judged on text."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from aksae import SAE, BatchTopK, FitConfig, ModelConfig, Priced, SAEConfig, TextConfig, UserError, adapt, fit, formats
from aksae import TopK as TopKSelection
from aksae.adaptation import adapt_file
from aksae.formats.stored import JumpReLU, ReLU, StoredSAE, TopK
from command_line import call, fails
from language_models import WIDTH, write_documents
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


# Few of the latents of random weights lower an error.
@pytest.mark.filterwarnings("ignore:budget:aksae.errors.Notice")
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
    assert priced.config.selection == Priced(3, sae.d_sae, 2)
    # With every positive latent kept it is the host's SAE without its rule.
    codes, everything = priced.encode(X, k=sae.d_sae), dataclasses.replace(sae, activation=ReLU())
    close(priced.decode(codes, X), everything(X))
    # Candidates are ranked by what they add.
    close(torch.linalg.vector_norm(priced.W_dec, dim=-1), torch.ones(sae.d_sae, dtype=X.dtype))
    wanted = everything.encode(X).to_dense(sae.d_sae)
    if sae.decoder_norm != "codes":
        wanted = wanted * torch.linalg.vector_norm(sae.W_dec, dim=-1)
    close(codes.to_dense(sae.d_sae), wanted)


@pytest.mark.filterwarnings("ignore:budget:aksae.errors.Notice")
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
    assert half.config.selection == Priced(4, 64, 2)
    assert abs(float(half.encode(x.bfloat16()).counts.float().mean()) / 4.5 - 1) < 0.02


def test_an_autoencoder_that_skips_is_refused():
    sae = made(torch.ones(64), ReLU(), W_skip=torch.eye(D))
    with pytest.raises(UserError, match=r"^sae: got a skip connection"):
        adapt(sae, rows(8), 3)


@pytest.mark.parametrize("budget", [0, -1.0, float("nan"), D_SAE + 1])
def test_budgets_that_no_row_can_have(tmp_path, budget):
    example = SAMPLES["native_topk"]()
    sae = formats.load(put(place(tmp_path, example.format), example.files))
    with pytest.raises(UserError, match=rf"^budget: got {budget}, needs .* d_sae = {D_SAE}"):
        adapt(sae, X, budget)


# -------------------------------------------------------------------------------------------------- the command

F_SAE, TOKENS = 64, 20


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """120 documents of 20 words each, one context a document."""
    return write_documents(tmp_path_factory.mktemp("text") / "documents.txt", 120, TOKENS)


@pytest.fixture(scope="module")
def source(saved, text, tmp_path_factory):
    """Model and text."""
    return {
        "model.name": saved("llama"),
        "model.layer": 1,
        "model.device": "cpu",
        "text.source": text,
        "text.context-length": TOKENS,
        "text.heldout-fraction": 0.25,
        "cache": tmp_path_factory.mktemp("cache"),
    }


@pytest.fixture(scope="module")
def settings(source):
    """The same for Python."""
    model = ModelConfig(str(source["model.name"]), 1, device="cpu")
    text = TextConfig(str(source["text.source"]), context_length=TOKENS, heldout_fraction=0.25)
    return {"model": model, "text": text, "cache": source["cache"]}


@pytest.fixture(scope="module")
def activations(settings):
    """Rows that were calibrated on, and those held out."""
    from aksae.data import collect_contexts, read_corpus

    corpus = read_corpus(settings["model"], settings["text"], None, settings["cache"])
    stores = [
        collect_contexts(corpus.model, side, settings["cache"], batch_size=8) for side in (corpus.train, corpus.heldout)
    ]
    return [store.rows(torch.arange(len(store))) for store in stores]


def trained(selection, activations) -> SAE:
    sae = SAE(SAEConfig(WIDTH, F_SAE, selection), generator=torch.Generator().manual_seed(0))
    fit(sae, [activations[0]], FitConfig(100, lr=3e-3, device="cpu", normalize="mean-norm"))
    return sae


@pytest.fixture(scope="module")
def folder(activations, tmp_path_factory):
    """A TopK SAE of dictionary_learning."""
    path = tmp_path_factory.mktemp("saes") / "topk"
    formats.save(trained(TopKSelection(6), activations), path, "dictionary_learning")
    return path


def test_the_command_prints_a_table_and_writes_the_sae(source, folder, settings, activations, tmp_path, capsys):
    out = tmp_path / "adapted"
    assert call("adapt", folder, **source, budget=4, out=out) == 0
    shown = capsys.readouterr().out
    assert f"SAE (TopK, k = 6; {F_SAE} latents of {WIDTH} inputs)" in shown
    assert "1,710 tokens set the prices, 570 held-out tokens judge" in shown
    table = [re.split(r"  +", line) for line in shown.splitlines() if line.startswith(("by its", "at a price"))]
    assert [row[0] for row in table] == [
        "by its own rule", "at a price, the same L0", "at a price, the budget", "at a price, half the L0",
    ]  # fmt: skip
    l0, fvu = ([float(row[column]) for row in table] for column in (1, 2))
    assert l0[0] == 6
    assert all(len(row) == 7 for row in table)
    for got, wanted in zip(l0[1:], (6, 4, 3), strict=True):
        assert abs(got / wanted - 1) < 0.05
    assert fvu[1] < 0.95 * fvu[0]
    assert fvu[1] < fvu[2] < fvu[3]
    assert sorted(os.listdir(out)) == ["config.json", "sae.safetensors"]

    # The same from Python, without any of the command's own code.
    calibrating, heldout = activations
    sae = SAE.from_pretrained(out)
    assert sae.config.selection == Priced(4, F_SAE, 2)
    ours = adapt(formats.load(folder), calibrating, 4)
    torch.testing.assert_close(sae.price, ours.price)
    variance = (heldout - heldout.mean(0)).square().sum()
    for index, each in ((0, formats.load(folder)), (2, sae)):
        with torch.no_grad():
            assert fvu[index] == pytest.approx(float((each(heldout) - heldout).square().sum() / variance), abs=1e-4)


def test_without_a_budget_it_is_the_saes_own_l0(folder, settings, activations):
    result = adapt_file(folder, **settings)
    assert list(result.metrics) == list(result.cross_entropy.spliced) == ["own", "same L0", "half L0"]
    assert result.sae.config.selection.budget == 6
    assert (result.calibrated, result.heldout) == tuple(map(len, activations))
    losses = result.cross_entropy
    assert losses.clean.shape == result.document.shape == (30,)
    assert len(result.document.unique()) == 30
    for name in result.metrics:
        assert losses.damage(name) == pytest.approx(float(losses.spliced[name].mean() - losses.clean.mean()))


@pytest.mark.parametrize("selection", [BatchTopK(6, k_max=7), Priced(6, k_max=7)], ids=str)
def test_an_sae_of_ours_keeps_its_own_rule(settings, activations, tmp_path, selection):
    sae = trained(selection, activations)
    sae.save_pretrained(tmp_path)
    result = adapt_file(tmp_path, **settings)
    assert result.described.startswith(f"SAE ({sae.config.selection}; ")
    assert result.notes == ()
    codes = sae.encode(activations[1])
    assert result.metrics["own"]["l0_mean"] == pytest.approx(float(codes.counts.float().mean()))
    assert result.metrics["own"]["l0_max"] == int(codes.counts.max()) <= 7


def test_an_sae_that_was_adapted_is_replaced_and_no_run(source, folder, tmp_path, capsys):
    out = tmp_path / "adapted"
    trained_so = SAE(SAEConfig(WIDTH, F_SAE, TopKSelection(6)))
    trained_so.save_pretrained(out)
    (out / "mine").touch()
    fails(capsys, r"out: got .*, which holds files, needs .* \(or overwrite\)", "adapt", folder, **source, out=out)
    assert call("adapt", folder, "--overwrite", **source, out=out) == 0
    assert SAE.from_pretrained(out).config.selection == Priced(6, F_SAE, 2)
    assert (out / "mine").exists()
    (out / "sae.safetensors").unlink()
    message = "out: got .*, whose config.json is no SAE's, needs another folder"
    fails(capsys, message, "adapt", folder, "--overwrite", **source, out=out)


def test_what_a_file_leaves_open_is_taken(source, folder, tmp_path, capsys):
    alone = shutil.copy(folder / "ae.pt", tmp_path / "ae.pt")
    fails(capsys, "needs config.json beside it, or dict_class", "adapt", alone, **source)
    assert call("adapt", alone, **source, **{"dict-class": "AutoEncoderTopK"}) == 0
    assert "SAE (TopK, k = 6; " in capsys.readouterr().out
    fails(capsys, "steepness: got it for dictionary_learning, needs adaptivek", "adapt", folder, **source, steepness=3)


def test_a_budget_that_cannot_be_reached_is_said(source, folder, capsys):
    assert call("adapt", folder, **source, budget=60) == 0
    shown = capsys.readouterr()
    (l0,) = re.findall(r"at a price, the budget +(\S+)", shown.out)
    pattern = (
        r"note: budget: got 60 latents of a row in the mean, and only (\S+) of 64 candidates lower its error at all"
    )
    (most,) = re.findall(pattern, shown.err)
    assert float(l0) == pytest.approx(float(most), rel=0.05)
    assert float(l0) < 0.9 * 60


def test_other_places_are_read_and_kept_apart(source, folder, activations, tmp_path, capsys):
    stores = {}
    for site in ("resid_pre", "mlp_out"):
        assert call("adapt", folder, **source, site=site) == 0
        shown = capsys.readouterr().out
        stores[site] = re.search(r"cross-entropy .*", shown).group()
    assert stores["resid_pre"] != stores["mlp_out"]


def test_what_cannot_be_adapted_ends_in_one_line(source, folder, activations, tmp_path, monkeypatch, capsys):
    from aksae.activations import LanguageModel

    monkeypatch.chdir(tmp_path)
    for name in ("sae_lens_standard_with_layer_norm", "gemma_scope_2_skip_transcoder_of_another_width", "native_topk"):
        example = SAMPLES[name]()
        put(place(tmp_path, example.format, name), example.files)
    silent = trained(TopKSelection(6), activations)
    silent.b_enc.data.fill_(-1e3)
    silent.save_pretrained("silent")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    fails(
        capsys, f"native_topk: got an SAE of 12 inputs, needs {WIDTH}, the width of ", "adapt", "native_topk", **source
    )
    fails(
        capsys,
        "silent: got an SAE of which no latent is active at .*, layer 1, .*; needs the model, the layer and the place",
        "adapt", "silent", **source,
    )  # fmt: skip
    # Without the model.
    monkeypatch.setattr(LanguageModel, "load", lambda *args, **options: pytest.fail("loaded the model"))
    layer_norm, transcoder = "sae_lens_standard_with_layer_norm", "gemma_scope_2_skip_transcoder_of_another_width"
    for message, file, options in (
        ("layer_norm: got the input normalisation layer_norm, needs none", layer_norm, {}),
        (r"got a transcoder, .* needs an autoencoder; .*target=\.\.\.", transcoder, {}),
        (f"budget: got 0, needs a number from 1 to d_sae = {F_SAE}", folder, {"budget": 0}),
        (f"budget: got 65, needs a number from 1 to d_sae = {F_SAE}", folder, {"budget": 65}),
        ("out: got full, which holds files, needs a new or empty folder", folder, {"out": "full"}),
        ("nowhere", "nowhere", {}),
        ("model.layer: got -1", folder, {"model.layer": -1}),
    ):
        fails(capsys, message, "adapt", file, **{**source, **options})


def test_a_model_that_predicts_nothing_is_refused(source, saved, folder, capsys):
    options = {**source, "model.name": saved("bert")}
    fails(capsys, "predicts no next token, cross-entropy needs", "adapt", folder, **options)
