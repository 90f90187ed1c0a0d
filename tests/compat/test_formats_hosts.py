"""Files that the real hosts write are read to the hosts' own outputs, and the hosts read what is written for them."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from aksae import AdaptiveK, AdaptiveKSAE, KMap, SAEConfig, TopK, formats
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

D_IN, D_OUT, D_SAE, K = 12, 9, 48, 5
HOOK = "blocks.3.hook_resid_post"


def host(module: str, package: str) -> ModuleType:
    with warnings.catch_warnings():
        # Of their imports, some deprecated; never of ours.
        warnings.simplefilter("ignore")
        return pytest.importorskip(module, reason=f"{package} is not installed; the extra `compat` names it")


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X = randn(60, D_IN, seed=9)


@torch.no_grad()
def randomised(module: nn.Module) -> nn.Module:
    """The module with random parameters: decoder rows of many lengths, thresholds above 0."""
    for seed, (name, parameter) in enumerate(module.named_parameters()):
        parameter.copy_(randn(*parameter.shape, seed=seed))
        if name == "threshold":
            parameter.abs_()
    return module


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def same(sae: formats.StoredSAE, latents: Tensor, output: Tensor, x: Tensor = X) -> None:
    codes = sae.encode(x)
    assert latents.any(-1).float().mean() > 0.5
    close(codes.to_dense(sae.d_sae), latents.detach())
    close(sae.decode(codes, x), output.detach())


def written(tmp_path: Path, activation: str, **fields: Any) -> formats.StoredSAE:
    """An SAE that came as another project's file, to be written for the host under test."""
    W_enc, W_dec = randn(D_SAE, D_IN, seed=1), randn(D_SAE, fields.pop("d_out", D_IN), seed=2)
    kinds = {
        "topk": formats.stored.TopK(K),
        "jumprelu": formats.stored.JumpReLU(randn(D_SAE, seed=3).abs()),
        "relu": formats.stored.ReLU(),
    }
    return formats.StoredSAE(
        W_enc,
        randn(D_SAE, seed=4),
        W_dec,
        randn(W_dec.shape[1], seed=5),
        activation=kinds[activation],
        **{"subtract_b_dec": True, "hook_name": HOOK, **fields},
    )


# ----------------------------------------------------------------------------------------------------- sparsify


@pytest.fixture
def sparsify() -> ModuleType:
    return host("sparsify", "eai-sparsify")


def sparsify_run(coder: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    acts, indices, _ = coder.encode(x)
    output = coder.decode(acts, indices)
    if coder.W_skip is not None:
        output = output + x @ coder.W_skip.mT
    return x.new_zeros(len(x), coder.num_latents).scatter(1, indices, acts), output


SPARSIFY = {
    "expansion factor": {"expansion_factor": 4},
    "number of latents": {"num_latents": D_SAE, "normalize_decoder": False},
    "transcoder": {"num_latents": D_SAE, "transcode": True},
    "skip transcoder": {"num_latents": D_SAE, "transcode": True, "skip_connection": True},
}


def sparsify_folder(sparsify: ModuleType, folder: Path, **settings: Any) -> nn.Module:
    coder = randomised(sparsify.SparseCoder(D_IN, sparsify.SparseCoderConfig(k=K, **settings)))
    coder.save_to_disk(folder)
    return coder


@pytest.mark.parametrize("settings", SPARSIFY.values(), ids=SPARSIFY)
def test_sparsify_files_are_read(sparsify, tmp_path, settings):
    coder = sparsify_folder(sparsify, tmp_path / "layers.3", **settings)
    same(formats.load(tmp_path / "layers.3"), *sparsify_run(coder, X))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"subtract_b_dec": False},
        {"decoder_norm": "codes"},
        {"transcoder": True, "subtract_b_dec": False, "W_skip": randn(D_IN, D_IN, seed=6)},
    ],
    ids=["SAE", "b_dec folded", "norms folded", "skip transcoder"],
)
def test_sparsify_reads_what_is_written(sparsify, tmp_path, fields):
    sae = written(tmp_path, "topk", **fields)
    formats.save(sae, tmp_path / "a", "sparsify")
    same(sae, *sparsify_run(sparsify.SparseCoder.load_from_disk(tmp_path / "a"), X))


# ------------------------------------------------------------------------------------------------------ SAELens


@pytest.fixture
def sae_lens() -> ModuleType:
    return host("sae_lens", "sae-lens")


SAE_LENS = {
    "topk": ("TopKSAE", {"k": K}),
    "topk by decoder norm": ("TopKSAE", {"k": K, "rescale_acts_by_decoder_norm": True}),
    "topk without b_dec": ("TopKSAE", {"k": K, "apply_b_dec_to_input": False}),
    "jumprelu": ("JumpReLUSAE", {}),
    "standard with layer norm": ("StandardSAE", {"normalize_activations": "layer_norm"}),
    "standard of constant norm": ("StandardSAE", {"normalize_activations": "constant_norm_rescale"}),
    "transcoder": ("Transcoder", {"apply_b_dec_to_input": False, "d_out": D_OUT}),
    "skip transcoder": ("SkipTranscoder", {"apply_b_dec_to_input": False, "d_out": D_OUT}),
    "jumprelu transcoder": ("JumpReLUTranscoder", {"apply_b_dec_to_input": False, "d_out": D_OUT}),
    "jumprelu skip transcoder": ("JumpReLUSkipTranscoder", {"apply_b_dec_to_input": False, "d_out": D_OUT}),
}


@pytest.mark.parametrize(("kind", "settings"), SAE_LENS.values(), ids=SAE_LENS)
def test_sae_lens_files_are_read(sae_lens, tmp_path, kind, settings):
    config = getattr(sae_lens, f"{kind}Config")(d_in=D_IN, d_sae=D_SAE, **settings)
    model = randomised(getattr(sae_lens, kind)(config))
    model.save_model(tmp_path)
    same(formats.load(tmp_path), model.encode(X), model(X))


@pytest.mark.parametrize("kind", ["TopKTrainingSAE", "BatchTopKTrainingSAE", "JumpReLUTrainingSAE"])
def test_sae_lens_training_files_are_read(sae_lens, tmp_path, kind):
    settings = {} if "Jump" in kind else {"k": K}
    model = randomised(getattr(sae_lens, kind)(getattr(sae_lens, f"{kind}Config")(D_IN, D_SAE, **settings)))
    if "Batch" in kind:
        model.topk_threshold.fill_(3.5)
    model.save_model(tmp_path / "checkpoint")
    model.save_inference_model(tmp_path / "inference")
    inference = sae_lens.SAE.load_from_disk(tmp_path / "inference")
    for folder in ("checkpoint", "inference"):
        same(formats.load(tmp_path / folder), inference.encode(X), inference(X))


@pytest.mark.parametrize(
    ("activation", "fields"),
    [
        ("topk", {}),
        ("topk", {"decoder_norm": "codes", "subtract_b_dec": False}),
        ("topk", {"decoder_norm": "selection", "input_scale": 0.7, "output_scale": 0.7}),
        ("topk", {"input_norm": "layer_norm"}),
        ("jumprelu", {}),
        ("jumprelu", {"decoder_norm": "selection"}),
        ("relu", {"subtract_b_dec": False, "input_norm": "constant_norm_rescale"}),
        ("relu", {"subtract_b_dec": False, "transcoder": True, "d_out": D_OUT, "W_skip": randn(D_OUT, D_IN, seed=6)}),
        ("jumprelu", {"subtract_b_dec": False, "transcoder": True}),
    ],
)
def test_sae_lens_reads_what_is_written(sae_lens, tmp_path, activation, fields):
    sae = written(tmp_path, activation, **fields)
    notes = formats.save(sae, tmp_path / "a", "sae_lens")
    model = sae_lens.SAE.load_from_disk(tmp_path / "a")
    latents = model.encode(X)
    if any("larger by their norms" in note for note in notes):
        latents = latents / sae.W_dec.norm(dim=-1)
    same(sae, latents, model(X))
    assert model.cfg.metadata.hook_name == HOOK


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_sae_lens_own_loader_fails_on_a_sparsify_file_and_the_converted_one_loads(sparsify, sae_lens, tmp_path):
    """It transposes a decoder that is `[F, D]` already, and takes `num_latents: 0` for the number of latents."""
    from sae_lens.loading.pretrained_sae_loaders import sparsify_disk_loader

    folder = tmp_path / "run" / "layers.3"
    coder = sparsify_folder(sparsify, folder, expansion_factor=4)
    config, tensors = sparsify_disk_loader(folder)
    assert config["d_sae"] == 0
    assert tensors["W_dec"].shape == (D_IN, D_SAE), "[F, D] is what SAELens itself needs"
    with pytest.raises(RuntimeError, match="size mismatch"):
        sae_lens.SAE.load_from_disk(folder, converter=sparsify_disk_loader)

    formats.convert(folder, tmp_path / "converted", to="sae_lens")
    model = sae_lens.SAE.load_from_disk(tmp_path / "converted")
    latents, output = sparsify_run(coder, X)
    close(model.encode(X), latents)
    close(model(X), output)


def test_sae_lens_reshapes_what_reads_heads(sae_lens, tmp_path):
    sae = written(tmp_path, "jumprelu", hook_name="blocks.3.attn.hook_z")
    formats.save(sae, tmp_path / "a", "sae_lens")
    heads = X.reshape(60, 3, D_IN // 3)
    close(sae_lens.SAE.load_from_disk(tmp_path / "a")(heads).reshape(60, D_IN), sae(X))


def adaptive() -> AdaptiveKSAE:
    k_map = KMap(k_min=1, k_max=20, steepness=4.0, score_max=8.0)
    model = AdaptiveKSAE(SAEConfig(D_IN, D_SAE, AdaptiveK(k_map, probe="token")))
    randomised(model).probe.bias.data.fill_(4)
    assert len(model.k_for(X).unique()) > 5
    return model


def test_adaptivek_goes_to_sae_lens_and_back(sae_lens, tmp_path):
    host("aksae.hosts.sae_lens", "sae-lens")
    model = adaptive()
    assert formats.save(model, tmp_path / "a", "sae_lens") == (
        "read by SAELens where aksae.hosts.sae_lens is imported",
    )
    loaded = sae_lens.SAE.load_from_disk(tmp_path / "a")
    assert torch.equal(loaded(X), model(X))
    loaded.save_model(tmp_path / "b")
    formats.convert(tmp_path / "b", tmp_path / "c", to="native")
    back = AdaptiveKSAE.from_pretrained(tmp_path / "c")
    assert back.config == model.config
    assert torch.equal(back(X), model(X))


# ------------------------------------------------------------------------------------- files SAELens loads, too


@pytest.fixture
def loaders(sae_lens, tmp_path, monkeypatch) -> ModuleType:
    """SAELens' loaders of other projects' files, with `tmp_path` in the hub's place."""
    from sae_lens.loading import pretrained_sae_loaders

    def download(repo_id: str, filename: str, subfolder: str = "", **options: Any) -> str:
        return str(tmp_path / repo_id / subfolder / filename)

    def shapes(repo_id: str, filename: str) -> dict[str, list[int]]:
        return {name: list(tensor.shape) for name, tensor in load_file(tmp_path / repo_id / filename).items()}

    monkeypatch.setattr(pretrained_sae_loaders, "hf_hub_download", download)
    monkeypatch.setattr(pretrained_sae_loaders, "get_safetensors_tensor_shapes", shapes)
    return pretrained_sae_loaders


def of_sae_lens(sae_lens: ModuleType, kind: str, config: dict[str, Any], state: dict[str, Tensor]) -> nn.Module:
    """The SAE that `SAE.from_pretrained` makes of what a loader returns."""
    settings = {"d_in": D_IN, "d_sae": D_SAE, "apply_b_dec_to_input": config.get("apply_b_dec_to_input", False)}
    settings |= {"d_out": config["d_out"]} if "d_out" in config else {}
    model = getattr(sae_lens, kind)(getattr(sae_lens, f"{kind}Config")(**settings))
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return model


def gemma_scope_arrays(W: str) -> dict[str, Tensor]:
    tensors = {f"{W}_enc": randn(D_IN, D_SAE, seed=1), f"{W}_dec": randn(D_SAE, D_IN, seed=2)}
    return tensors | {
        "b_enc": randn(D_SAE, seed=3),
        "b_dec": randn(D_IN, seed=4),
        "threshold": randn(D_SAE, seed=5).abs(),
    }


@pytest.mark.parametrize(
    ("repository", "loader", "kind"),
    [
        ("google/gemma-scope-2b-pt-res", "gemma_2_sae_huggingface_loader", "JumpReLUSAE"),
        ("google/gemma-scope-2b-pt-transcoders", "gemma_2_transcoder_huggingface_loader", "JumpReLUTranscoder"),
    ],
)
def test_gemma_scope_is_read_as_sae_lens_reads_it(sae_lens, loaders, tmp_path, repository, loader, kind):
    inner = "layer_12/width_16k/average_l0_82"
    folder = tmp_path / repository / inner
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{name: tensor.numpy() for name, tensor in gemma_scope_arrays("W").items()})
    config, state, _ = getattr(loaders, loader)(repository, inner)
    config |= {"d_out": D_IN} if "d_out" in config else {}
    model = of_sae_lens(sae_lens, kind, config, state)
    sae = formats.load(folder)
    same(sae, model.encode(X), model(X))
    assert sae.transcoder == ("transcoder" in config["architecture"])
    assert sae.model_name == config["model_name"]
    assert sae.hook_name in (config["hook_name"], None)


@pytest.mark.parametrize("affine", [False, True], ids=["SAE", "skip transcoder"])
def test_gemma_scope_2_is_read_as_sae_lens_reads_it(sae_lens, loaders, tmp_path, affine):
    inner = "transcoder_all/layer_5_width_16k_l0_big_affine" if affine else "resid_post_all/layer_5_width_16k_l0_big"
    folder = tmp_path / "google/gemma-scope-2-1b-pt" / inner
    folder.mkdir(parents=True)
    tensors = gemma_scope_arrays("w") | ({"affine_skip_connection": randn(D_IN, D_IN, seed=6)} if affine else {})
    save_file(tensors, folder / "params.safetensors")
    settings = {"architecture": "jump_relu", "model_name": "google/gemma-3-1b-pt", "affine_connection": affine}
    settings |= {"type": "transcoder" if affine else "sae", "hf_hook_point_in": "model.layers.5.output"}
    (folder / "config.json").write_text(json.dumps(settings))
    config, state, _ = loaders.gemma_3_sae_huggingface_loader("google/gemma-scope-2-1b-pt", inner)
    model = of_sae_lens(sae_lens, "JumpReLUSkipTranscoder" if affine else "JumpReLUSAE", config, state)
    sae = formats.load(folder)
    same(sae, model.encode(X), model(X))
    assert sae.transcoder == affine


def test_llama_scope_is_read_as_sae_lens_reads_it(sae_lens, loaders, tmp_path):
    """SAELens takes the decoder's rows for unit vectors, which makes the latents alike."""
    inner = "Llama3_1-8B-Base-L15R-8x"
    folder = tmp_path / "fnlp/Llama3_1-8B-Base-LXR-8x" / inner
    (folder / "checkpoints").mkdir(parents=True)
    tensors = {
        "encoder.weight": randn(D_SAE, D_IN, seed=1),
        "encoder.bias": randn(D_SAE, seed=2),
        "decoder.weight": torch.nn.functional.normalize(randn(D_IN, D_SAE, seed=3), dim=0).contiguous(),
        "decoder.bias": randn(D_IN, seed=4),
    }
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(tensors, folder / "checkpoints" / "final.safetensors")
    settings = {
        "d_model": D_IN,
        "d_sae": D_SAE,
        "hook_point_in": HOOK,
        "hook_point_out": HOOK,
        "act_fn": "jumprelu",
        "jump_relu_threshold": 0.5,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": 4.0, "out": 4.0},
        "apply_decoder_bias_to_pre_encoder": False,
    }
    (folder / "hyperparams.json").write_text(json.dumps(settings))
    config, state, _ = loaders.llama_scope_sae_huggingface_loader("fnlp/Llama3_1-8B-Base-LXR-8x", inner)
    scale = math.sqrt(D_IN) / 4
    # Where the reconstruction is compared, their threshold is not to be rounded to bfloat16 first.
    state["threshold"] = torch.full((D_SAE,), 0.5 * scale)
    model = of_sae_lens(sae_lens, "JumpReLUSAE", config, state)
    model.fold_activation_norm_scaling_factor(scale)
    sae = formats.load(folder).to(torch.float32)
    theirs, ours = model.encode(X), sae.encode(X).to_dense(D_SAE)
    # Theirs are larger by the scale; bfloat16 rows are unit vectors but for their rounding.
    torch.testing.assert_close(ours * scale, theirs, rtol=0.02, atol=0.02)
    torch.testing.assert_close(sae(X), model(X).detach(), rtol=0.05, atol=0.05)


# ------------------------------------------------------------------------------------------ dictionary_learning


@pytest.fixture
def dictionary_learning() -> ModuleType:
    host("dictionary_learning", "dictionary-learning")
    return host("dictionary_learning.utils", "dictionary-learning")


@pytest.mark.parametrize(
    "kind", ["AutoEncoder", "AutoEncoderNew", "AutoEncoderTopK", "BatchTopKSAE", "JumpReluAutoEncoder"]
)
def test_dictionary_learning_files_are_read(dictionary_learning, tmp_path, kind):
    k = (K,) if "TopK" in kind else ()
    model = randomised(getattr(dictionary_learning, kind)(D_IN, D_SAE, *k))
    if kind == "BatchTopKSAE":
        model.threshold.fill_(1.5)
    torch.save(model.state_dict(), tmp_path / "ae.pt")
    trainer = {"dict_class": kind, "activation_dim": D_IN, "dict_size": D_SAE, **({"k": K} if k else {})}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    same(formats.load(tmp_path), model.encode(X), model(X))


def test_dictionary_learning_matryoshka_files_are_read(dictionary_learning, tmp_path):
    model = randomised(dictionary_learning.MatryoshkaBatchTopKSAE(D_IN, D_SAE, K, [16, 32]))
    model.threshold.fill_(1.5)
    torch.save(model.state_dict(), tmp_path / "ae.pt")
    trainer = {"dict_class": "MatryoshkaBatchTopKSAE", "activation_dim": D_IN, "dict_size": D_SAE, "k": K}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    same(formats.load(tmp_path), model.encode(X), model(X))


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("AutoEncoder", {}),
        ("AutoEncoderNew", {}),
        ("JumpReluAutoEncoder", {}),
        ("AutoEncoderTopK", {"dict_class": "AutoEncoderTopK"}),
        ("BatchTopKSAE", {"dict_class": "BatchTopKSAE"}),
    ],
)
def test_a_dictionary_of_a_compiled_module_without_its_settings(dictionary_learning, tmp_path, kind, given):
    k = (K,) if "TopK" in kind else ()
    model = randomised(getattr(dictionary_learning, kind)(D_IN, D_SAE, *k))
    if kind == "BatchTopKSAE":
        model.threshold.fill_(1.5)
    compiled = {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save(compiled, tmp_path / "ae_1000.pt")
    same(formats.load(tmp_path / "ae_1000.pt", **given), model.encode(X), model(X))


@pytest.mark.parametrize(
    ("activation", "fields"),
    [
        ("topk", {}),
        ("topk", {"subtract_b_dec": False, "decoder_norm": "codes"}),
        ("jumprelu", {}),
        ("jumprelu", {"subtract_b_dec": False}),
        ("relu", {}),
        ("relu", {"subtract_b_dec": False}),
    ],
)
def test_dictionary_learning_reads_what_is_written(dictionary_learning, tmp_path, activation, fields, capsys):
    sae = written(tmp_path, activation, **fields)
    formats.save(sae, tmp_path / "a", "dictionary_learning")
    model, config = dictionary_learning.load_dictionary(str(tmp_path / "a"), "cpu")
    latents = model.encode(X)
    if type(model).__name__ == "AutoEncoder":
        # Its loader folds the decoder norms.
        latents = latents / sae.W_dec.norm(dim=-1)
    same(sae, latents, model(X))
    assert config["trainer"]["submodule_name"] == HOOK


def test_adaptivek_goes_to_dictionary_learning_and_back(dictionary_learning, tmp_path):
    from aksae.hosts.dictionary_learning import AutoEncoderAdaptiveK

    model = adaptive()
    assert formats.save(model, tmp_path / "a", "dictionary_learning") == ()
    loaded = AutoEncoderAdaptiveK.from_pretrained(tmp_path / "a" / "ae.pt")
    assert torch.equal(loaded(X), model(X))
    torch.save(loaded.state_dict(), tmp_path / "a" / "ae.pt")
    formats.convert(tmp_path / "a", tmp_path / "b", to="native")
    back = AdaptiveKSAE.from_pretrained(tmp_path / "b")
    assert back.config == model.config
    assert torch.equal(back(X), model(X))


# ------------------------------------------------------------------------------------------------ Llamascopium


@pytest.fixture
def llamascopium() -> ModuleType:
    host("llamascopium", "llamascopium")
    return host("llamascopium.models.sae", "llamascopium")


def llamascopium_run(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised, encoded, decoded and brought back, as its evaluation does."""
    hook_in, hook_out = model.cfg.hook_point_in, model.cfg.hook_point_out
    normalised = model.normalize_activations({hook_in: x})[hook_in]
    latents = model.encode(normalised)
    scale = model.compute_norm_factor(x, hook_out)
    return latents, model.denormalize_activations({hook_out: model.decode(latents)}, {hook_out: scale})[hook_out]


def llamascopium_folder(llamascopium: ModuleType, folder: Path, act_fn: str, **settings: Any) -> nn.Module:
    settings = {"hook_point_in": HOOK, "hook_point_out": HOOK, "top_k": K, **settings}
    config = llamascopium.SAEConfig(d_model=D_IN, expansion_factor=D_SAE / D_IN, act_fn=act_fn, **settings)
    model = randomised(llamascopium.SparseAutoEncoder(config))
    model.set_dataset_average_activation_norm({config.hook_point_out: 4.0, config.hook_point_in: 2.5})
    folder.mkdir()
    model.save_pretrained(folder)
    config.save_hyperparameters(folder)
    return model


@pytest.mark.parametrize(
    ("act_fn", "settings"),
    [
        ("topk", {}),
        ("topk", {"norm_activation": "inference", "sparsity_include_decoder_norm": False}),
        ("jumprelu", {}),
        ("jumprelu", {"norm_activation": "token-wise", "sparsity_include_decoder_norm": False}),
        ("relu", {"use_decoder_bias": False}),
        ("topk", {"hook_point_out": "blocks.3.mlp_out"}),
    ],
)
def test_llamascopium_files_are_read(llamascopium, tmp_path, act_fn, settings):
    model = llamascopium_folder(llamascopium, tmp_path / "a", act_fn, **settings)
    same(formats.load(tmp_path / "a"), *llamascopium_run(model, X))


@pytest.mark.parametrize(
    ("activation", "fields"),
    [
        ("topk", {}),
        ("topk", {"subtract_b_dec": False, "decoder_norm": "selection"}),
        ("topk", {"decoder_norm": "codes"}),
        ("jumprelu", {}),
        ("jumprelu", {"subtract_b_dec": False, "decoder_norm": "selection", "input_scale": 0.7, "output_scale": 0.7}),
        ("relu", {"input_norm": "constant_norm_rescale"}),
        ("topk", {"transcoder": True, "subtract_b_dec": False, "hook_name_out": "blocks.3.mlp_out"}),
    ],
)
def test_llamascopium_reads_what_is_written(llamascopium, tmp_path, activation, fields):
    sae = written(tmp_path, activation, **fields)
    formats.save(sae, tmp_path / "a", "llamascopium")
    model = llamascopium.SparseDictionary.from_pretrained(str(tmp_path / "a"))
    assert model.cfg.hook_point_in == HOOK
    assert (model.cfg.hook_point_out != HOOK) == sae.transcoder
    same(sae, *llamascopium_run(model, X))


@pytest.mark.parametrize(("d_in", "d_sae"), [(49, 1), (3, 100), (768, 24577), (4097, 12)])
def test_llamascopium_finds_the_number_of_latents(llamascopium, tmp_path, d_in, d_sae):
    """It is `int(d_model * expansion_factor)` there, one less where the factor was rounded down."""
    sae = formats.StoredSAE(
        torch.zeros(d_sae, d_in),
        torch.zeros(d_sae),
        torch.zeros(d_sae, d_in),
        torch.zeros(d_in),
        activation=formats.stored.ReLU(),
        subtract_b_dec=False,
    )
    formats.save(sae, tmp_path / "a", "llamascopium")
    config = llamascopium.SparseDictionaryConfig.from_pretrained(str(tmp_path / "a"))
    assert config.d_sae == d_sae == formats.load(tmp_path / "a").d_sae


def test_llamascopium_own_folding_of_the_scale_leaves_thresholds_behind(llamascopium, tmp_path):
    """A JumpReLU SAE changes where it folds the dataset's norm: the thresholds are not scaled. Ours stays the same."""
    model = llamascopium_folder(llamascopium, tmp_path / "a", "jumprelu")
    latents, output = llamascopium_run(model, X)
    scale = math.sqrt(D_IN) / 2.5
    folded = llamascopium.SparseDictionary.from_pretrained(str(tmp_path / "a"), fold_activation_scale=True)
    theirs = folded.encode(X) * scale
    both = (theirs > 0) & (latents > 0)
    close(theirs[both], latents[both])
    assert not torch.equal(theirs > 0, latents > 0)

    formats.convert(tmp_path / "a", tmp_path / "b", to="sae_lens")
    ours = formats.load(tmp_path / "b")
    assert ours.input_scale == 1
    same(ours, latents, output)


# ---------------------------------------------------------------------------------------------- circuit-tracer


@pytest.fixture
def circuit_tracer() -> ModuleType:
    return host("circuit_tracer.transcoder.single_layer_transcoder", "circuit-tracer")


@pytest.mark.parametrize("skip", [False, True], ids=["", "skip"])
@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
def test_circuit_tracer_files_are_read(circuit_tracer, tmp_path, activation, skip):
    act = torch.relu if activation == "relu" else circuit_tracer.JumpReLU(randn(D_SAE, seed=3).abs(), 0.1)
    model = circuit_tracer.SingleLayerTranscoder(D_IN, D_SAE, act, 0, skip_connection=skip, dtype=torch.float32)
    randomised(model)
    if activation == "jumprelu":
        act.threshold.data.abs_()
    model.to_safetensors(str(tmp_path / "layer_0.safetensors"))
    same(formats.load(tmp_path / "layer_0.safetensors"), model.encode(X), model(X))


@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
def test_circuit_tracer_reads_what_is_written(circuit_tracer, tmp_path, activation):
    sae = written(tmp_path, activation, transcoder=True, subtract_b_dec=False, W_skip=randn(D_IN, D_IN, seed=6))
    formats.save(sae, tmp_path / "layer_0.safetensors", "circuit_tracer")
    model = circuit_tracer.load_relu_transcoder(str(tmp_path / "layer_0.safetensors"), 0, torch.device("cpu"))
    same(sae, model.encode(X), model(X))


# --------------------------------------------------------------------------------------------- a chain of them


def test_a_model_goes_through_every_host_and_comes_back(sparsify, sae_lens, dictionary_learning, tmp_path):
    model = AdaptiveKSAE(SAEConfig(D_IN, D_SAE, TopK(K)), generator=torch.Generator().manual_seed(0))
    randomised(model)
    formats.save(model, tmp_path / "a", "sparsify")
    sparsify.SparseCoder.load_from_disk(tmp_path / "a").save_to_disk(tmp_path / "b")
    formats.convert(tmp_path / "b", tmp_path / "c", to="sae_lens")
    sae_lens.SAE.load_from_disk(tmp_path / "c").save_model(tmp_path / "d")
    formats.convert(tmp_path / "d", tmp_path / "e", to="dictionary_learning")
    loaded, _ = dictionary_learning.load_dictionary(str(tmp_path / "e"), "cpu")
    torch.save(loaded.state_dict(), tmp_path / "e" / "ae.pt")
    formats.convert(tmp_path / "e", tmp_path / "f", to="native")
    back = AdaptiveKSAE.from_pretrained(tmp_path / "f")
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
