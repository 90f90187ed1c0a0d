"""AdaptiveK as an architecture of SAELens: the same numbers, files and trainer, by SAELens' own code."""

from __future__ import annotations

import importlib
import json

import pytest
import torch
from aksae import AdaptiveK, AdaptiveKSAE, KMap, SAEConfig, TopK, UserError
from aksae.probe import ComplexityProbe
from safetensors.torch import load_file

from aksae_kernels import SparseCodes

pytest.importorskip("sae_lens", reason="needs the host: pip install sae-lens==6.54.12")

import sae_lens
from aksae.hosts import sae_lens as host
from aksae.hosts.sae_lens import AdaptiveKSAELens, AdaptiveKTrainingSAELens, AdaptiveKTrainingSAELensConfig
from sae_lens import SAE, LoggingConfig, SAETrainer, TrainingSAE
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput

D, F, K_MAX = 16, 128, 24
BOTH = pytest.mark.parametrize("cls", [AdaptiveKSAELens, AdaptiveKTrainingSAELens])


def make_adaptivek(selection=None, **k_map) -> AdaptiveKSAE:
    generator = torch.Generator().manual_seed(1)
    selection = selection or AdaptiveK(KMap(2, K_MAX, **k_map), "token", probe_lambda=3.0)
    sae = AdaptiveKSAE(SAEConfig(D, F, selection), generator=generator)
    with torch.no_grad():
        for tensor in (sae.b_enc, sae.b_dec, sae.W_enc):
            tensor.normal_(generator=generator)
        if sae.probe is not None:
            sae.probe.weight.normal_(generator=generator)
            sae.probe.bias.fill_(5.0)
    return sae


def scaled() -> AdaptiveKSAE:
    return AdaptiveKSAE(SAEConfig(D, F, AdaptiveK(KMap(2, K_MAX)), input_scale=2.0, output_scale=2.0))


def make_probe(scale=1.0) -> ComplexityProbe:
    probe = ComplexityProbe(D)
    with torch.no_grad():
        probe.weight.copy_(scale * torch.randn(D, generator=torch.Generator().manual_seed(2)))
        probe.bias.fill_(5.0)
    return probe


def make_training(**fields) -> AdaptiveKTrainingSAELens:
    config = AdaptiveKTrainingSAELensConfig(d_in=D, d_sae=F, **{"k_min": 2, "k_max": K_MAX, **fields})
    sae = AdaptiveKTrainingSAELens(config)
    sae.set_probe(make_probe())
    return sae


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def step_input(x, dead=None):
    return TrainStepInput(x, coefficients={}, dead_neuron_mask=dead, n_training_steps=0, is_logging_step=False)


@BOTH
@pytest.mark.parametrize("shape", [(40,), (3, 5), (0,), ()], ids=str)
def test_same_numbers_as_adaptivek(cls, shape):
    sae, x = make_adaptivek(), randn(*shape, D)
    own = cls.from_adaptivek(sae)
    assert torch.equal(own.k_for(x), sae.k_for(x))
    acts = own.encode(x)
    assert torch.equal(acts, sae.encode(x).to_dense(F))
    assert torch.equal(own(x), sae(x))
    torch.testing.assert_close(own.decode(acts), sae(x))
    if shape == (40,):
        assert len(sae.k_for(x).unique()) > 4
        torch.testing.assert_close(own.decode(acts.detach().to_sparse()), sae(x))


@BOTH
def test_conversion_there_and_back_is_exact(cls):
    sae = make_adaptivek(steepness=4.0, score_max=8.0)
    back = cls.from_adaptivek(sae).to_adaptivek()
    assert back.config == sae.config
    assert back.state_dict().keys() == sae.state_dict().keys()
    for name, tensor in sae.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
        assert back.state_dict()[name].data_ptr() != tensor.data_ptr(), name
    assert all(parameter.requires_grad for parameter in back.parameters())
    assert back.W_enc.is_contiguous()


def test_conversion_without_b_dec_in_the_encoder():
    own, x = make_training(apply_b_dec_to_input=False), randn(30, D)
    with torch.no_grad():
        own.b_dec.normal_()
        expected = torch.relu(x @ own.W_enc + own.b_enc)
    torch.testing.assert_close(own.encode(x)[own.encode(x) > 0], expected[own.encode(x) > 0])
    torch.testing.assert_close(own.to_adaptivek()(x), own(x))


@pytest.mark.parametrize(
    ("convert", "message"),
    [
        (lambda: AdaptiveKSAELens.from_adaptivek(make_adaptivek(TopK(5))), "sae: got TopK, k = 5, needs AdaptiveK"),
        (lambda: AdaptiveKSAELens.from_adaptivek(scaled()), "sae: got input_scale = 2, needs 1"),
        (
            lambda: make_training(normalize_activations="expected_average_only_in").to_adaptivek(),
            "normalize_activations: got expected_average_only_in, needs none",
        ),
        (lambda: make_training(k_max=F + 1), f"k_max: got {F + 1}, needs a number from 0 to d_sae"),
        (lambda: make_training(k_min=30), "k_min: got 30, needs at most k_max"),
        (lambda: make_training(normalize_activations="layer_norm"), "aux_loss_coefficient: got 1.0, needs 0"),
        (lambda: make_training(score_max=8.0), "probe: got .* needs .*8.0"),
        (lambda: make_training().set_probe(ComplexityProbe(D + 1)), "probe: got .*17"),
    ],
    ids=["fixed k", "scaled", "normalised", "k_max", "k_min", "aux", "score range", "probe width"],
)
def test_what_cannot_be_is_refused(convert, message):
    with pytest.raises(UserError, match=message):
        convert()


@BOTH
def test_encoder_is_latent_major_and_its_file_plain(tmp_path, cls):
    own = cls.from_adaptivek(make_adaptivek())
    assert own.W_enc.shape == (D, F)
    assert own.W_enc.T.is_contiguous()
    own.save_model(tmp_path)
    saved = load_file(tmp_path / "sae_weights.safetensors")
    assert saved["W_enc"].shape == (D, F)
    assert torch.equal(saved["W_enc"], own.W_enc)
    assert own.W_enc.T.is_contiguous()


def test_files_of_a_training_sae(tmp_path):
    own, x = AdaptiveKTrainingSAELens.from_adaptivek(make_adaptivek()), randn(20, D)
    own.save_model(tmp_path / "training")
    own.save_inference_model(tmp_path / "inference")
    loaded = {
        AdaptiveKTrainingSAELens: TrainingSAE.load_from_disk(tmp_path / "training"),
        AdaptiveKSAELens: SAE.load_from_disk(tmp_path / "inference"),
    }
    # SAELens reads a training checkpoint as an inference SAE, too.
    assert type(SAE.load_from_disk(tmp_path / "training")) is AdaptiveKSAELens
    for cls, sae in loaded.items():
        assert type(sae) is cls
        assert sae.W_enc.T.is_contiguous()
        assert not any(parameter.requires_grad for parameter in sae.probe.parameters())
        assert torch.equal(sae(x), own(x))
        assert sae.cfg.adaptivek_config() == own.cfg.adaptivek_config()
        assert sae.state_dict().keys() == own.state_dict().keys()
        assert all(torch.equal(tensor, own.state_dict()[name]) for name, tensor in sae.state_dict().items())
    config = json.loads((tmp_path / "inference" / "cfg.json").read_text())
    assert config["architecture"] == "adaptivek"
    assert config["metadata"]["training_architecture"] == "adaptivek"

    other = make_training()
    other.load_weights_from_checkpoint(tmp_path / "training")
    assert torch.equal(other(x), own(x))
    assert other.W_enc.T.is_contiguous()


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_loading_in_another_dtype_keeps_the_layout(tmp_path, dtype):
    own, x = AdaptiveKSAELens.from_adaptivek(make_adaptivek()), randn(20, D)
    own.save_model(tmp_path)
    sae = SAE.load_from_disk(tmp_path, dtype=dtype)
    assert sae.W_enc.T.is_contiguous()
    assert sae.W_enc.dtype == sae(x).dtype == getattr(torch, dtype)


def test_importing_twice_is_harmless():
    before, contents = sae_lens.registry.get_sae_class("adaptivek")[0], dict(vars(host))
    importlib.reload(host)
    after = sae_lens.registry.get_sae_class("adaptivek")[0]
    try:
        assert after is host.AdaptiveKSAELens
        assert after is not before
    finally:
        # The other tests hold the classes of the first import, and those of other files find them in the module.
        vars(host).update(contents)
        for name, cls in (("SAE", AdaptiveKSAELens), ("SAE_TRAINING", AdaptiveKTrainingSAELens)):
            getattr(sae_lens.registry, f"{name}_CLASS_REGISTRY")["adaptivek"] = (cls, cls._config_class)


def test_a_foreign_adaptivek_is_not_replaced(monkeypatch):
    foreign = sae_lens.registry.get_sae_class("topk")
    monkeypatch.setitem(sae_lens.registry.SAE_CLASS_REGISTRY, "adaptivek", foreign)
    with pytest.raises(ValueError, match="already registered"):
        host._register()
    assert sae_lens.registry.get_sae_class("adaptivek") is foreign


@pytest.mark.parametrize("apply_b_dec", [True, False])
@pytest.mark.parametrize("n_dead", [None, 0, 5, F])
def test_sparse_training_pass_equals_the_dense_one(apply_b_dec, n_dead):
    sae, x = make_training(dtype="float64", apply_b_dec_to_input=apply_b_dec), randn(30, D).double()
    with torch.no_grad():
        sae.b_dec.normal_()
        sae.W_dec.mul_(1.7)
    dead = None if n_dead is None else torch.arange(F) < n_dead
    sparse = sae.training_forward_pass(step_input(x, dead))
    sparse.loss.backward()
    grads = {name: parameter.grad for name, parameter in sae.named_parameters()}
    sae.zero_grad()

    # Written out: SAELens' own training_forward_pass, whose encode and decode are dense.
    dense = TrainingSAE.training_forward_pass(sae, step_input(x, dead))
    dense.loss.backward()
    assert sparse.feature_acts.is_sparse
    assert sparse.feature_acts.is_coalesced()
    assert not dense.feature_acts.is_sparse
    assert sparse.hidden_pre.shape == (30, 0)
    torch.testing.assert_close(sparse.feature_acts.to_dense(), dense.feature_acts)
    torch.testing.assert_close(sparse.sae_out, dense.sae_out)
    assert sparse.losses.keys() == dense.losses.keys()
    for name, loss in sparse.losses.items():
        torch.testing.assert_close(loss, dense.losses[name], msg=name)
    assert bool(sparse.losses["auxiliary_reconstruction_loss"] > 0) == bool(n_dead)
    for name, parameter in sae.named_parameters():
        if name.startswith("probe"):
            assert grads[name] is parameter.grad is None
        else:
            torch.testing.assert_close(grads[name], parameter.grad, msg=name)
    assert grads["W_enc"].T.is_contiguous()


def test_aux_loss_is_that_of_sae_lens_topk():
    """On pre-activations that are positive throughout, where SAELens' unrectified choice is no different."""
    sae, x = make_training(dtype="float64"), randn(30, D).double()
    with torch.no_grad():
        sae.b_enc.fill_(50)
    topk = sae_lens.TopKTrainingSAE(
        sae_lens.TopKTrainingSAEConfig(d_in=D, d_sae=F, k=4, dtype="float64", rescale_acts_by_decoder_norm=False)
    )
    topk.load_state_dict({name: tensor for name, tensor in sae.state_dict().items() if not name.startswith("probe")})
    dead = torch.arange(F) < 7
    _, hidden_pre = sae.encode_with_hidden_pre(x)
    arguments = {"feature_acts": None, "hidden_pre": hidden_pre, "sae_out": x * 0.5}
    ours = sae.calculate_aux_loss(step_input(x, dead), **arguments)
    theirs = topk.calculate_aux_loss(step_input(x, dead), **arguments)
    assert ours.keys() == theirs.keys()
    torch.testing.assert_close(ours["auxiliary_reconstruction_loss"], theirs["auxiliary_reconstruction_loss"])


@pytest.mark.parametrize("hook", ["hook_sae_acts_pre", "hook_sae_acts_post"])
def test_hooks_see_and_change_the_dense_latents(hook):
    sae, x = make_training(), randn(12, D)
    plain = sae(x)
    _, cache = sae.run_with_cache(x)
    assert cache[hook].shape == (12, F)
    torch.testing.assert_close(cache["hook_sae_acts_post"], sae.encode(x))
    nothing = sae.run_with_hooks(x, fwd_hooks=[(hook, lambda acts, hook: torch.zeros_like(acts))])
    torch.testing.assert_close(nothing, sae.b_dec.expand(12, D))
    torch.testing.assert_close(sae.run_with_hooks(x, fwd_hooks=[(hook, lambda acts, hook: None)]), plain)
    with sae.hooks(fwd_hooks=[(hook, lambda acts, hook: torch.zeros_like(acts))]):
        output = sae.training_forward_pass(step_input(x))
    assert not output.feature_acts.any()
    torch.testing.assert_close(output.losses["mse_loss"], (x - sae.b_dec).pow(2).sum(-1).mean())


def test_decode_takes_what_a_hook_may_make_of_the_latents():
    sae, x = make_training(), randn(12, D)
    with torch.no_grad():
        acts = sae.encode(x)
        acts[:, 3] = -2.0
        torch.testing.assert_close(sae.decode(acts), acts @ sae.W_dec + sae.b_dec)


def test_error_term_gives_the_input_back():
    sae, x = make_training(), randn(12, D)
    with pytest.warns(DeprecationWarning, match="use_error_term"):
        sae.use_error_term = True
    torch.testing.assert_close(sae(x), x)


def test_decoder_norms_are_not_folded():
    with pytest.raises(NotImplementedError, match="decoder norms"):
        make_training().fold_W_dec_norm()


def test_folding_the_scale_keeps_k_and_latents():
    sae, x = make_training(normalize_activations="expected_average_only_in"), randn(40, D)
    k, acts, out = sae.k_for(0.3 * x), sae.encode(0.3 * x), sae(0.3 * x)
    sae.fold_activation_norm_scaling_factor(0.3)
    assert torch.equal(sae.k_for(x), k)
    torch.testing.assert_close(sae.encode(x), acts)
    torch.testing.assert_close(sae(x), out / 0.3)


@pytest.mark.parametrize("apply_b_dec", [True, False])
def test_folding_the_whitening_keeps_k_and_latents(apply_b_dec):
    fields = {"normalize_activations": "covariance_whitening", "apply_b_dec_to_input": apply_b_dec}
    sae, x = make_training(dtype="float64", **fields), randn(40, D).double()
    mean, matrix = randn(D, seed=1).double(), torch.linalg.qr(randn(D, D, seed=2).double())[0] * 1.3
    whitened = (x - mean) @ matrix
    k, acts, out = sae.k_for(whitened), sae.encode(whitened), sae(whitened)
    sae.fold_activation_whitening(mean, matrix, matrix.inverse())
    assert torch.equal(sae.k_for(x), k)
    torch.testing.assert_close(sae.encode(x), acts)
    torch.testing.assert_close(sae(x), out @ matrix.inverse() + mean)


def test_normalisation_inside_the_sae_leaves_the_probe_alone():
    sae, x = make_training(normalize_activations="layer_norm", aux_loss_coefficient=0.0), randn(20, D) * 3 + 1
    normed = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-5)
    pre_acts = torch.relu(normed @ sae.W_enc + sae.b_enc)
    counts = torch.minimum(sae.k_for(x), (pre_acts > 0).sum(-1))
    assert torch.equal((sae.encode(x) > 0).sum(-1), counts)
    out = sae(x)
    torch.testing.assert_close(out, sae.decode(sae.encode(x)))
    output = sae.training_forward_pass(step_input(x))
    torch.testing.assert_close(output.sae_out, out)


def test_hook_z_reshaping():
    own = AdaptiveKSAELens(
        host.AdaptiveKSAELensConfig(d_in=D, d_sae=F, k_min=2, k_max=K_MAX, reshape_activations="hook_z")
    )
    own.set_probe(make_probe())
    x = randn(6, 4, D // 4)
    assert own.encode(x).shape == (6, F)
    out = own(x)
    assert out.shape == x.shape
    own.turn_off_forward_pass_hook_z_reshaping()
    assert torch.equal(own(x.flatten(-2)), out.flatten(-2))


class Batches:
    """Rows of a few sparse directions, so that there is something to learn."""

    def __init__(self, batch):
        self.generator = torch.Generator().manual_seed(3)
        self.directions = randn(64, D, seed=4)
        self.batch = batch

    def __iter__(self):
        return self

    def __next__(self):
        strength = torch.rand(self.batch, 64, generator=self.generator)
        return (strength * (strength > 0.9)) @ self.directions


def trainer_config(tmp_path, steps, **fields):
    return SAETrainerConfig(
        n_checkpoints=0,
        checkpoint_path=str(tmp_path),
        save_final_checkpoint=True,
        total_training_samples=64 * steps,
        device="cpu",
        autocast=fields.pop("autocast", False),
        lr=3e-3,
        lr_end=3e-4,
        lr_scheduler_name="constant",
        lr_warm_up_steps=0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        lr_decay_steps=0,
        n_restart_cycles=1,
        train_batch_size_samples=64,
        dead_feature_window=fields.pop("dead_feature_window", 1000),
        feature_sampling_window=20,
        logger=LoggingConfig(log_to_wandb=False),
    )


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_saelens_own_trainer(tmp_path, monkeypatch, autocast):
    sae = make_training()
    probe = sae.probe.weight.clone()
    losses, fired = [], torch.zeros(F)
    forward = sae.training_forward_pass

    def no_dense(*_):
        raise AssertionError("the training step made a dense tensor of latents")

    def recorded(step_input):
        with monkeypatch.context() as patch:
            patch.setattr(SparseCodes, "to_dense", no_dense)
            output = forward(step_input)
        losses.append(output.losses["mse_loss"].item())
        fired.add_(output.feature_acts.detach().to_dense().bool().float().sum(0))
        recorded.last = output
        return output

    monkeypatch.setattr(sae, "training_forward_pass", recorded)
    trainer = SAETrainer(trainer_config(tmp_path, 50, autocast=autocast, dead_feature_window=5), sae, Batches(64))
    # The window is reset every 20 steps; the sum over all of them is compared.
    monkeypatch.setattr(trainer, "_reset_running_sparsity_stats", lambda: None)
    monkeypatch.setattr(trainer, "_build_sparsity_log_dict", lambda: {"reset": 1})
    assert trainer.fit() is sae
    assert len(losses) == 50
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert torch.equal(trainer.act_freq_scores, fired)
    assert torch.equal(sae.probe.weight, probe)
    assert sae.W_enc.T.is_contiguous()
    log = trainer.build_train_step_log_dict(recorded.last, 0)
    assert log["metrics/l0"] == pytest.approx(
        float(recorded.last.feature_acts.to_dense().bool().sum(-1).float().mean())
    )
    assert 0.3 < log["metrics/explained_variance"] < 1
    x = next(Batches(8))
    loaded = TrainingSAE.load_from_disk(tmp_path / f"final_{64 * 50}")
    assert torch.equal(loaded(x), sae(x))


def test_the_trainer_counts_dead_latents(tmp_path):
    sae = make_training()
    with torch.no_grad():
        sae.b_enc[:10] = -100.0
    trainer = SAETrainer(trainer_config(tmp_path, 8, dead_feature_window=3), sae, Batches(64))
    trainer.fit()
    assert trainer.dead_neurons[:10].all()
    assert trainer.dead_neurons.sum() < F
