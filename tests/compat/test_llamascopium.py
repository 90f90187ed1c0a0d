"""Llamascopium's SparseAutoEncoder and Trainer, accelerated and not: the same numbers, or right ones for wrong."""

from __future__ import annotations

import copy
import importlib.util
import os
import pickle
import subprocess
import sys
import warnings

import pytest
import torch

from aksae_kernels.integrations import accelerate, deaccelerate
from aksae_kernels.integrations.adam import FastAdam

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what it and its dependencies say on import
    pytest.importorskip("llamascopium", reason="llamascopium is not installed; make test-compat installs it")
    from llamascopium.models.sae import SAEConfig, SparseAutoEncoder
    from llamascopium.trainer import Trainer, TrainerConfig

    from aksae_kernels.integrations.llamascopium import FastSparseAutoEncoder, FastTrainer

D, N, K, B = 13, 104, 5, 24
OPTIONS = {
    "topk": {},
    "topk, without norms": {"sparsity_include_decoder_norm": False},
    "topk, without decoder bias": {"use_decoder_bias": False},
    "topk, k=1": {"top_k": 1},
    "batchtopk": {"act_fn": "batchtopk"},
    "batchtopk, without norms": {"act_fn": "batchtopk", "sparsity_include_decoder_norm": False},
}
JUMPRELU = {
    "jumprelu": {"act_fn": "jumprelu"},
    "jumprelu, without norms": {"act_fn": "jumprelu", "sparsity_include_decoder_norm": False},
}
# With k_aux = 10: all of the dead, or the best.
DEAD = {"no dead": 0, "few dead": 7, "many dead": 40, "all dead": N}
SHAPES = {"matrix": (B,), "sequences": (4, 6)}
TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_sae(cls=SparseAutoEncoder, **options) -> SparseAutoEncoder:
    """Not to be copied: a copy selects by the k of its original."""
    config = {"hook_point_in": "in", "hook_point_out": "out", "d_model": D, "expansion_factor": N / D, "top_k": K}
    sae = cls(SAEConfig(**{"act_fn": "topk", "dtype": torch.float64, **config, **options}))
    for seed, parameter in enumerate(sae.parameters()):
        parameter.data.copy_(randn(*parameter.shape, seed=seed))
    return sae


def make_pair(**options) -> tuple[SparseAutoEncoder, SparseAutoEncoder]:
    return make_sae(**options), accelerate(make_sae(**options))


def make_batch(*shape, masked=False, dtype=torch.float64) -> dict[str, torch.Tensor]:
    batch = {"in": randn(*shape, D, seed=10, dtype=dtype), "out": randn(*shape, D, seed=11, dtype=dtype)}
    batch["tokens"] = torch.zeros(shape, dtype=torch.long)
    if masked:
        batch["mask"] = (randn(*shape, seed=12) > 0).long()
    return batch


def auxk(dead: int) -> dict:
    is_dead = torch.randperm(N, generator=torch.Generator().manual_seed(12)) < dead
    return {"auxk_coefficient": 0.3, "k_aux": 10, "update_dead_statistics": lambda *_: is_dead}


def step(sae: SparseAutoEncoder, batch: dict[str, torch.Tensor], **options) -> dict:
    """What compute_loss gives, and every gradient."""
    sae.zero_grad()
    out = sae.compute_loss(batch, **options)
    out["loss"].backward()
    found = {name: out[name] for name in (*out, "hidden_pre")}
    return {**found, **{f"gradient of {name}": parameter.grad for name, parameter in sae.named_parameters()}}


def assert_same(found: dict, expected: dict, **tolerance) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            message = lambda text, name=name: f"{name}: {text}"
            torch.testing.assert_close(found[name], value, **tolerance, msg=message)
        else:
            assert found[name] == value, name


# ---------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("dead", DEAD.values(), ids=DEAD)
@pytest.mark.parametrize("masked", [False, True], ids=["all tokens", "masked"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("options", {**OPTIONS, **JUMPRELU}.values(), ids={**OPTIONS, **JUMPRELU})
def test_parity(options, shape, masked, dead):
    sae, fast = make_pair(**options)
    batch = make_batch(*shape, masked=masked)
    expected = step(sae, batch, **auxk(dead))
    assert (expected["l_aux"] > 0) == (dead > 0)
    assert_same(step(fast, batch, **auxk(dead)), expected, **TIGHT)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_parity_in_fp32(options):
    sae, fast = make_pair(dtype=torch.float32, **options)
    batch = make_batch(B, dtype=torch.float32)
    assert_same(step(fast, batch, **auxk(40)), step(sae, batch, **auxk(40)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("loss", ["power", "tanh"])  # the host's third, "tanh-quad", raises in the host
def test_parity_of_sparsity_losses(loss):
    sae, fast = make_pair()
    options = {"sparsity_loss_type": loss, "l1_coefficient": 0.5, **auxk(40)}
    assert_same(step(fast, make_batch(B), **options), step(sae, make_batch(B), **options), **TIGHT)


@pytest.mark.parametrize("options", [{}, {"sparsity_include_decoder_norm": False}], ids=["norms", "without norms"])
@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
def test_bf16(options, autocast):
    """No further from the result in fp64 than twice the host, where rounded scores lead to the same selection."""
    dtype = torch.float32 if autocast else torch.bfloat16
    sae, fast = make_pair(dtype=dtype, **options)
    exact = make_sae(**options)
    exact.load_state_dict(sae.state_dict())

    def steps(batch):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found, expected = step(fast, batch, **auxk(7)), step(sae, batch, **auxk(7))
        return found, expected, step(exact, {name: value.double() for name, value in batch.items()}, **auxk(7))

    batch = make_batch(B, dtype=dtype)
    found, expected, truth = (result["feature_acts"] > 0 for result in steps(batch))
    same = ((found == truth) & (expected == truth)).all(1)
    assert same.sum() > B / 2
    found, expected, truth = steps({name: value[same] for name, value in batch.items()})
    for name, value in found.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == expected[name].dtype, name
            error, allowed = ((v.double() - truth[name]).norm() for v in (value, expected[name]))
            assert error <= 2 * allowed + 0.02 * truth[name].norm(), name


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("options", {**OPTIONS, **JUMPRELU}.values(), ids={**OPTIONS, **JUMPRELU})
def test_inference(options, shape):
    sae, fast = make_pair(**options)
    x = randn(*shape, D, seed=3)
    with torch.no_grad():
        acts = sae.encode(x)
        assert 0 < (acts > 0).sum() < acts.numel()
        torch.testing.assert_close(fast(x), sae(x), **TIGHT)
        torch.testing.assert_close(fast.encode(x), acts, **TIGHT)
        torch.testing.assert_close(fast.decode(acts), sae.decode(acts), **TIGHT)
        anything = randn(*shape, N, seed=4)
        torch.testing.assert_close(fast.decode(anything), sae.decode(anything), **TIGHT)
        for found, expected in zip(*(one.encode(x, return_hidden_pre=True) for one in (fast, sae))):
            torch.testing.assert_close(found, expected, **TIGHT)


@pytest.mark.parametrize("options", {**OPTIONS, **JUMPRELU}.values(), ids={**OPTIONS, **JUMPRELU})
def test_gradients_of_encode_and_forward(options):
    results = []
    for sae in make_pair(**options):
        x = randn(B, D).requires_grad_()
        (sae.encode(x).pow(2).sum() + (sae(x) * randn(B, D, seed=5)).sum()).backward()
        grads = {name: p.grad for name, p in sae.named_parameters()}
        results.append({"x": x.grad, **grads})
    assert_same(*results, **TIGHT)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_rows_with_too_few_positives(options):
    sae, fast = make_pair(**options)
    batch = make_batch(B)
    for one in (sae, fast):
        one.b_E.data -= 9
    batch["in"][0] = 0
    expected = step(sae, batch, **auxk(40))
    assert 0 in (expected["feature_acts"] > 0).sum(1)
    assert (expected["feature_acts"] > 0).sum() < B * sae.current_k
    assert_same(step(fast, batch, **auxk(40)), expected, **TIGHT)


@pytest.mark.parametrize("act_fn", ["topk", "batchtopk"])
def test_k_is_read_at_each_call(act_fn):
    sae, fast = make_pair(act_fn=act_fn)
    x = randn(B, D)
    for k in (9, 2):
        for one in (sae, fast):
            one.set_current_k(k)
        assert (fast.encode(x) > 0).sum() == B * k
        torch.testing.assert_close(fast(x), sae(x), **TIGHT)
        step(fast, make_batch(B), **auxk(40))
        assert fast.current_k == k


def test_a_nan_surfaces():
    fast = accelerate(make_sae())
    batch = make_batch(B)
    clean = fast(batch["in"])
    batch["in"][3, 2] = torch.nan
    out = fast(batch["in"])
    assert out[3].isnan().all()
    others = torch.arange(B) != 3
    torch.testing.assert_close(out[others], clean[others])
    assert fast.compute_loss(batch, return_aux_data=False).isnan()


def test_an_empty_batch():
    fast = accelerate(make_sae())
    assert fast(randn(0, D)).shape == (0, D)
    assert fast.encode(randn(0, D)).shape == (0, N)


# ------------------------------------------------------------------------------ what others see of a forward


def test_hooks_see_and_change_what_they_do_in_the_host():
    sae, fast = make_pair()
    x = randn(B, D)
    names = ["hook_hidden_pre", "hook_feature_acts", "hook_reconstructed"]
    (_, expected), (out, found) = (one.run_with_cache(x) for one in (sae, fast))
    assert [name for name in found if name in names] == [name for name in expected if name in names] == names
    for name in names:
        torch.testing.assert_close(found[name], expected[name], **TIGHT)
    torch.testing.assert_close(out, fast(x), **TIGHT)
    for name in names:
        hooks = [(name, lambda value, hook: value * 2 - 1)]
        results = [one.run_with_hooks(x, fwd_hooks=hooks) for one in (fast, sae)]
        torch.testing.assert_close(*results, **TIGHT)
        assert not torch.allclose(results[0], out)
        with fast.hooks(hooks), sae.hooks(hooks):
            assert_same(*(step(one, make_batch(B), **auxk(7)) for one in (fast, sae)), **TIGHT)


def test_the_result_of_compute_loss():
    sae, fast = make_pair()
    batch = make_batch(B)
    loss = fast.compute_loss(batch, return_aux_data=False)
    torch.testing.assert_close(loss, sae.compute_loss(batch, return_aux_data=False), **TIGHT)
    out, expected = fast.compute_loss(batch), sae.compute_loss(batch)
    assert set(expected) - set(out) == {"hidden_pre"}
    assert out.get("nothing", 3) == 3
    with pytest.raises(KeyError, match="nothing"):
        out["nothing"]
    torch.testing.assert_close(out.get("hidden_pre"), expected["hidden_pre"], **TIGHT)
    assert out.keys() == expected.keys()
    # The gradients of what is handed out.
    results = []
    for one, data in ((fast, out), (sae, expected)):
        one.zero_grad()
        (data["hidden_pre"].sum() + data["feature_acts"].pow(2).sum()).backward()
        results.append({name: parameter.grad for name, parameter in one.named_parameters() if name != "b_D"})
        results[-1].pop("W_D")  # in the host, zeros
    assert_same(*results, **TIGHT)

    late = fast.compute_loss(batch)
    with torch.no_grad():
        fast.W_E += 1
    with pytest.raises(RuntimeError, match="before"):
        late["hidden_pre"]


def test_dead_latents_are_counted_from_the_dense_activations():
    sae, fast = make_pair()
    batch, seen = make_batch(4, 6, masked=True), []
    for one in (sae, fast):
        count = lambda acts, mask, specs: seen.append((acts.detach(), mask, specs)) or (acts.sum((0, 1)) == 0)
        step(one, batch, auxk_coefficient=0.1, update_dead_statistics=count)
    (acts, mask, specs), (fast_acts, *others) = seen
    torch.testing.assert_close(fast_acts, acts, **TIGHT)
    assert others == [mask, specs]
    with pytest.raises(AssertionError):
        fast.compute_loss(batch, auxk_coefficient=0.1)


@pytest.mark.parametrize("norms", [True, False], ids=["norms", "without norms"])
def test_a_step_makes_no_dense_codes(norms, largest):
    rows, sizes = 128, []
    for one in make_pair(sparsity_include_decoder_norm=norms):
        with largest() as made:
            one.compute_loss(make_batch(rows), return_aux_data=False).backward()
            one(randn(rows, D))
        sizes.append(made.elements)
    assert sizes[0] >= rows * N
    assert sizes[1] < rows * N


# ------------------------------------------------------------------------------------ where the host is wrong

TRITON = """
import torch
from llamascopium.models.sae import SAEConfig, SparseAutoEncoder

config = {"hook_point_in": "in", "hook_point_out": "out", "act_fn": "topk", "top_k": 2}
config |= {"use_triton_kernel": True, "use_decoder_bias": False}
for d_model, factor in ((16, 1), (8, 2)):
    options = {"d_model": d_model, "expansion_factor": factor, "sparsity_threshold_for_triton_spmm_kernel": 0.5}
    sae = SparseAutoEncoder(SAEConfig(**config, **options))
    sae.init_parameters(encoder_uniform_bound=1, decoder_uniform_bound=1)
    acts = sae.encode(torch.randn(4, d_model))
    found, expected = sae.decode(acts), acts @ sae.W_D
    print(found.shape == expected.shape, found.shape == expected.shape and torch.allclose(found, expected))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the host's Triton kernel needs Triton")
def test_the_host_hands_its_kernel_a_transposed_decoder():
    """Wrong numbers where F = D, a wrong shape elsewhere; here in Triton's interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    said = subprocess.run([sys.executable, "-c", TRITON], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.split()[-4:] == ["True", "False", "False", "False"]


def test_use_triton_kernel_changes_nothing():
    sae = make_sae()
    fast = accelerate(make_sae(use_triton_kernel=True, sparsity_threshold_for_triton_spmm_kernel=0.1))
    assert_same(step(fast, make_batch(B), **auxk(40)), step(sae, make_batch(B), **auxk(40)), **TIGHT)
    acts = sae.encode(randn(B, D))
    torch.testing.assert_close(fast.decode(acts), sae.decode(acts), **TIGHT)


def test_a_decoder_row_of_zeros():
    """The host divides its activations by its norm, and loses the whole batch to NaN."""
    sae, fast = make_pair()
    x = randn(B, D)
    for one in (sae, fast):
        one.W_D.data[7] = 0
        one.b_E.data[7] = 100
    assert sae(x).isnan().all()
    sae.b_E.data[7] = -100  # as if it were not there
    sae.W_D.data[7] = 1
    torch.testing.assert_close(fast(x), sae(x), **TIGHT)


def test_a_copy_has_a_k_of_its_own():
    sae, fast = make_pair()
    x = randn(B, D)
    for one, active in ((sae, K), (fast, 2)):
        twin = copy.deepcopy(one)
        twin.set_current_k(2)
        assert ((twin.encode(x) > 0).sum(1) == active).all()
        assert ((one.encode(x) > 0).sum(1) == K).all()


# ----------------------------------------------------------------------------- objects, files, and their trainer


@pytest.mark.parametrize("act_fn", ["topk", "batchtopk", "jumprelu"])
def test_objects_and_files(act_fn, tmp_path):
    options = {"act_fn": act_fn, "dtype": torch.float32}
    sae, fast = make_pair(**options)
    assert type(fast) is FastSparseAutoEncoder
    assert fast.W_E.T.is_contiguous()
    assert list(fast.state_dict()) == list(sae.state_dict())
    for one, name in ((sae, "host"), (fast, "fast")):
        one.set_dataset_average_activation_norm({"in": 2.0, "out": 3.0})
        one.save_pretrained(tmp_path / name)
        one.cfg.save_hyperparameters(tmp_path / name)
    for name in ("sae_weights.safetensors", "config.json"):
        assert (tmp_path / "host" / name).read_bytes() == (tmp_path / "fast" / name).read_bytes()

    batch = make_batch(B, dtype=torch.float32)
    expected = step(sae, batch)
    loaded = accelerate(SparseAutoEncoder.from_pretrained(str(tmp_path / "fast"), dtype=torch.float32))
    constructed = make_sae(FastSparseAutoEncoder, **options)
    twins = [copy.deepcopy(fast)]
    if act_fn == "jumprelu":  # the activation function of the others is a closure, which pickle refuses
        twins.append(pickle.loads(pickle.dumps(fast)))
    for one in (loaded, constructed, *twins):
        assert type(one) is FastSparseAutoEncoder
        assert one.W_E.T.is_contiguous()
        assert_same(step(one, batch), expected, rtol=1e-4, atol=1e-4)
    assert type(deaccelerate(fast)) is SparseAutoEncoder
    assert fast.W_E.is_contiguous()
    assert_same(step(fast, batch), expected, rtol=0, atol=0)


def test_methods_that_write_weights():
    sae, fast = make_pair(norm_activation="dataset-wise")
    for one in (sae, fast):
        one.set_decoder_to_fixed_norm(0.7, force_exact=True)
        one.set_encoder_to_fixed_norm(1.3)
        one.init_encoder_with_decoder_transpose(0.9)
        one.init_encoder_bias_with_mean_hidden_pre(make_batch(B))
        one.set_dataset_average_activation_norm({"in": 2.0, "out": 3.0})
        one.standardize_parameters_of_dataset_norm()
    assert fast.W_E.T.is_contiguous()
    assert_same(dict(fast.named_parameters()), dict(sae.named_parameters()), **TIGHT)
    assert fast.log_statistics() == pytest.approx(sae.log_statistics())


def test_refusals():
    for options, reason in (({"act_fn": "relu"}, "act_fn 'relu'"), ({"use_glu_encoder": True}, "use_glu_encoder")):
        with pytest.raises(ValueError, match=reason):
            accelerate(make_sae(**options))
        with pytest.raises(ValueError, match=reason):
            make_sae(FastSparseAutoEncoder, **options)
    meshed = make_sae()
    meshed.device_mesh = object()
    with pytest.raises(ValueError, match="device_mesh"):
        accelerate(meshed)
    with pytest.raises(TypeError, match="llamascopium: SparseAutoEncoder"):
        accelerate(make_sae(type("Mine", (SparseAutoEncoder,), {})))


class Log(list):
    """In the place of a wandb run."""

    id = "a run"

    def log(self, metrics: dict, step: int) -> None:
        self.append(metrics)


STEPS = 50


def stream() -> list[dict[str, torch.Tensor]]:
    tokens = {"tokens": torch.zeros(64, dtype=torch.long), "mask": torch.ones(64, dtype=torch.long)}
    data = randn(STEPS, 64, D, seed=7, dtype=torch.float32)
    return [{"in": x, "out": x, **tokens} for x in data]


def make_trainer(folder, **config) -> Trainer:
    schedule = {"total_training_tokens": STEPS * 64, "lr": 1e-3, "lr_warm_up_steps": 5, "n_checkpoints": 0}
    k = {"initial_k": 9, "k_warmup_steps": 0.5}
    config = {**schedule, **k, "log_frequency": 1, "amp_dtype": torch.float32, "l1_coefficient": None, **config}
    return Trainer(TrainerConfig(exp_result_path=str(folder), **config))


def make_trained(**options) -> SparseAutoEncoder:
    return make_sae(dtype=torch.float32, norm_activation="token-wise", **options)


AUX = {"auxk_coefficient": 1 / 32, "k_aux": 10, "dead_threshold": 200}
RUNS = {
    "topk": ({}, {}),
    "topk, without norms": ({"sparsity_include_decoder_norm": False}, {}),
    "auxk": ({}, AUX),
    "batchtopk and auxk": ({"act_fn": "batchtopk"}, AUX),
    "clipped": ({}, {"clip_grad_norm": 1e-4}),
    "sparse Adam": ({}, {"optimizer_class": "sparseadam"}),
    "without metrics": ({}, {"skip_metrics_calculation": True}),
    "sparsity loss": ({}, {"sparsity_loss_type": "tanh", "l1_coefficient": 0.1}),
    "jumprelu": ({"act_fn": "jumprelu"}, {"lp_coefficient": 1e-3}),
    "autocast": ({}, {**AUX, "amp_dtype": torch.bfloat16}),
}


@pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")  # how the host trains in fp32
@pytest.mark.parametrize(("options", "config"), RUNS.values(), ids=RUNS)
def test_fifty_steps_of_the_trainer(options, config, tmp_path):
    logs, saes = [], [make_trained(**options), make_trained(**options)]
    trainers = [make_trainer(tmp_path, **config), accelerate(make_trainer(tmp_path, **config))]
    for sae, trainer in zip(saes, trainers):
        logs.append(Log())
        trainer.fit(sae, stream(), wandb_logger=logs[-1])
        assert trainer.cur_step == STEPS
    _, fast = trainers
    assert type(fast) is FastTrainer
    assert type(saes[1]) is FastSparseAutoEncoder
    assert (type(fast.optimizer) is FastAdam) == (config.get("optimizer_class") is None)

    rounded = "amp_dtype" in config
    if not config.get("skip_metrics_calculation"):
        assert len(logs[0]) == STEPS
        assert logs[0][-1]["losses/overall_loss"] < logs[0][0]["losses/overall_loss"]
        assert any("losses/aux_loss" in metrics for metrics in logs[0]) == ("auxk_coefficient" in config)
    for found, expected in zip(logs[1], logs[0], strict=True):
        if rounded:  # counts of latents near a limit may differ
            found, expected = ({k: v for k, v in log.items() if "sparsity/" not in k} for log in (found, expected))
        assert found == pytest.approx(expected, rel=0.02 if rounded else 1e-3, abs=0.02 if rounded else 1e-5)
    weights = [dict(sae.state_dict()) for sae in saes]
    assert_same(weights[1], weights[0], rtol=1e-3, atol=1e-2 if rounded else 1e-4)

    assert type(deaccelerate(fast)) is Trainer
    assert not isinstance(fast.optimizer, FastAdam)


@pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")
def test_a_run_goes_on_from_the_files_of_either(tmp_path):
    whole = make_trained()
    make_trainer(tmp_path).fit(whole, stream())
    for first, second in ((accelerate, deaccelerate), (deaccelerate, accelerate)):
        folder = tmp_path / first.__name__
        sae, trainer = make_trained(), first(make_trainer(folder))
        trainer.fit(sae, stream()[: STEPS // 2])
        trainer.save_checkpoint(sae, folder)
        checkpoint = str(folder / "checkpoints" / f"step_{STEPS // 2}")
        sae = SparseAutoEncoder.from_pretrained(checkpoint, dtype=torch.float32)
        trainer = second(Trainer.from_checkpoint(sae, checkpoint))
        trainer.fit(sae, stream()[STEPS // 2 :])
        assert trainer.cur_step == STEPS
        assert (type(sae) is FastSparseAutoEncoder) == (second is accelerate)
        assert (type(trainer.optimizer) is FastAdam) == (second is accelerate)
        assert_same(dict(sae.state_dict()), dict(whole.state_dict()), rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")
def test_a_trainer_leaves_what_it_cannot_accelerate(tmp_path):
    sae, twin = make_trained(act_fn="relu"), make_trained(act_fn="relu")
    trainer = accelerate(make_trainer(tmp_path))
    trainer.fit(sae, stream())
    make_trainer(tmp_path).fit(twin, stream())
    assert type(sae) is SparseAutoEncoder
    assert type(trainer.optimizer) is FastAdam
    assert_same(dict(sae.state_dict()), dict(twin.state_dict()), rtol=1e-3, atol=1e-5)
