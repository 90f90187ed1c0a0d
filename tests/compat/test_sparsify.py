"""sparsify's SparseCoder and Trainer, accelerated and not: the same numbers, and the right ones where the host errs."""

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
import torch.nn.functional as F

from aksae_kernels.integrations import accelerate, deaccelerate

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what its dependencies say on import
    pytest.importorskip("sparsify", reason="sparsify is not installed; make test-compat installs it")
    import datasets
    import transformers

import sparsify
from sparsify import SparseCoder, SparseCoderConfig, TrainConfig, Trainer
from sparsify.fused_encoder import EncoderOutput

from aksae_kernels.integrations.adam import FastAdam
from aksae_kernels.integrations.sparsify import FastSparseCoder, FastTrainer

D, N, K, B = 13, 101, 5, 24
OPTIONS = {
    "plain": {},
    "free norms": {"normalize_decoder": False},
    "k=1": {"k": 1},
    "skip": {"skip_connection": True},
    "transcoder": {"transcode": True},
    "transcoder with skip": {"transcode": True, "skip_connection": True},
}
MULTI = {f"multi {name}": {**options, "multi_topk": True} for name, options in OPTIONS.items()}
# At most half of d_in are all taken; of more, the best.
DEAD = {"no dead": 0, "few dead": 5, "many dead": 40, "all dead": N}


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_coder(dtype=torch.float64, cls=SparseCoder, **options) -> SparseCoder:
    coder = cls(D, SparseCoderConfig(num_latents=N, **{"k": K, **options}), dtype=dtype)
    for seed, parameter in enumerate(coder.parameters()):
        parameter.data = randn(*parameter.shape, seed=seed, dtype=dtype)
    return coder


def make_batch(coder: SparseCoder, dead: int | None = None) -> dict[str, torch.Tensor]:
    batch = {"x": randn(B, D, seed=10, dtype=coder.dtype)}
    if coder.cfg.transcode:
        batch["y"] = randn(B, D, seed=11, dtype=coder.dtype)
    if dead is not None:
        batch["dead_mask"] = torch.randperm(N, generator=torch.Generator().manual_seed(12)) < dead
    return batch


def step(coder: SparseCoder, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Outputs of a forward by name, its codes as a dense tensor, and every gradient of a loss over all of them."""
    coder.zero_grad()
    x = batch["x"].clone().requires_grad_()
    out = coder(**{**batch, "x": x})
    loss = out.fvu + out.auxk_loss / 3 + out.multi_topk_fvu / 8
    (loss + (out.sae_out * randn(*out.sae_out.shape, seed=13, dtype=out.sae_out.dtype)).sum() / 50).backward()
    found = {name: value.detach() for name, value in out._asdict().items() if not name.startswith("latent")}
    found["codes"] = out.latent_acts.new_zeros(len(x), N).scatter_add_(1, out.latent_indices, out.latent_acts).detach()
    gradients = {name: parameter.grad.clone() for name, parameter in coder.named_parameters()}
    return {**found, "gradient of x": x.grad, **{f"gradient of {name}": grad for name, grad in gradients.items()}}


def assert_same(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name in found:
        message = lambda text, name=name: f"{name}: {text}"
        torch.testing.assert_close(found[name], expected[name], **tolerance, msg=message)


TIGHT = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture
def differentiable_host(monkeypatch):
    """The host with its encoder written out, so that autograd finds every gradient."""

    def encoder(x, weight, bias, k, activation):
        pre_acts = F.linear(x, weight, bias).relu()
        return EncoderOutput(*pre_acts.topk(k, sorted=False), pre_acts)

    monkeypatch.setattr(sparsify.sparse_coder, "fused_encoder", encoder)


# ---------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_parity(options, dtype):
    coder = make_coder(dtype, **options)
    fast = accelerate(copy.deepcopy(coder))
    batch = make_batch(coder)
    tolerance = TIGHT if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    assert_same(step(fast, batch), step(coder, batch), **tolerance)
    assert fast(**batch).latent_indices.dtype == torch.int64
    assert fast(**batch).latent_acts.shape == (B, coder.cfg.k)


@pytest.mark.parametrize("dead", DEAD.values(), ids=DEAD)
@pytest.mark.parametrize("options", {**OPTIONS, **MULTI}.values(), ids={**OPTIONS, **MULTI})
def test_parity_of_all_losses(options, dead, differentiable_host):
    coder = make_coder(**options)
    fast = accelerate(copy.deepcopy(coder))
    batch = make_batch(coder, dead)
    expected = step(coder, batch)
    assert (expected["auxk_loss"] > 0) == (dead > 0)
    assert (expected["multi_topk_fvu"] > 0) == coder.cfg.multi_topk
    assert_same(step(fast, batch), expected, **TIGHT)
    batch["total_variance"] = torch.tensor(70.0, dtype=torch.float64)
    assert_same(step(fast, batch), step(coder, batch), **TIGHT)


@pytest.mark.parametrize("options", [{}, {"skip_connection": True, "multi_topk": True}], ids=["plain", "multi"])
@pytest.mark.parametrize("dead", [5, 40], ids=["few dead", "many dead"])
@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
def test_bf16(options, dead, autocast, differentiable_host):
    """No further from the result in fp64 than twice the host, where rounded scores lead to the same selection."""
    exact = make_coder(**options)
    coder = copy.deepcopy(exact).to(torch.float32 if autocast else torch.bfloat16)
    exact.load_state_dict(coder.state_dict())
    fast = accelerate(copy.deepcopy(coder))

    def steps(batch):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found, expected = step(fast, batch), step(coder, batch)
        batch = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
        return found, expected, step(exact, batch)

    batch = make_batch(coder, dead)
    found, expected, truth = (chosen["codes"] > 0 for chosen in steps(batch))
    same = ((found == truth) & (expected == truth)).all(1)
    assert same.sum() > B / 2
    batch["x"] = batch["x"][same]
    found, expected, truth = steps(batch)
    for name, value in found.items():
        assert value.dtype == expected[name].dtype
        error, allowed = ((v.double() - truth[name]).norm() for v in (value, expected[name]))
        assert error <= 2 * allowed + 0.02 * truth[name].norm(), name


@pytest.mark.parametrize("multi_topk", [False, True])
@pytest.mark.parametrize("dead", [None, 40], ids=["no mask", "many dead"])
def test_a_nan_surfaces(dead, multi_topk):
    fast = accelerate(make_coder(multi_topk=multi_topk))
    batch = make_batch(fast, dead)
    clean = fast(**batch).sae_out
    batch["x"][3, 2] = torch.nan
    out = fast(**batch)
    assert out.sae_out[3].isnan().all()
    others = torch.arange(B) != 3
    torch.testing.assert_close(out.sae_out[others], clean[others])
    assert out.fvu.isnan()


def test_an_empty_batch():
    fast = accelerate(make_coder(multi_topk=True))
    out = fast(randn(0, D), dead_mask=torch.ones(N, dtype=torch.bool))
    assert out.sae_out.shape == (0, D)
    assert out.latent_indices.shape == (0, 4 * K)
    out.fvu.backward()


def test_leading_dimensions_are_kept():
    """Where the host takes matrices only."""
    fast = accelerate(make_coder(skip_connection=True))
    x = randn(2, 3, D)
    flat = fast(x.reshape(6, D), total_variance=torch.ones(()))
    out = fast(x, total_variance=torch.ones(()))
    torch.testing.assert_close(out.sae_out, flat.sae_out.view(2, 3, D))
    assert torch.equal(out.latent_indices, flat.latent_indices.view(2, 3, K))
    torch.testing.assert_close(out.fvu, flat.fvu)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_encode_and_decode(options):
    coder = make_coder(**options)
    fast = accelerate(copy.deepcopy(coder))
    x = make_batch(coder)["x"]
    expected, found = coder.encode(x), fast.encode(x)
    torch.testing.assert_close(found.pre_acts, expected.pre_acts, **TIGHT)
    order, theirs = found.top_indices.sort(1), expected.top_indices.sort(1)
    assert torch.equal(order.values, theirs.values)
    torch.testing.assert_close(found.top_acts.gather(1, order.indices), expected.top_acts.gather(1, theirs.indices))
    # Any order, repeated indices and negative activations too.
    indices = torch.randint(0, N, (B, 7), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(fast.decode(randn(B, 7), indices), coder.decode(randn(B, 7), indices), **TIGHT)
    with pytest.raises(IndexError):
        fast.decode(randn(B, 7), indices + N)


def test_the_pre_activations_of_encode_have_gradients():
    fast = accelerate(make_coder())
    x = randn(B, D)
    fast.encode(x).pre_acts.sum().backward()
    active = (F.linear(x - fast.b_dec, fast.encoder.weight, fast.encoder.bias) > 0).double()
    torch.testing.assert_close(fast.encoder.weight.grad, active.T @ (x - fast.b_dec), **TIGHT)


def test_without_a_decoder():
    coder = SparseCoder(D, SparseCoderConfig(num_latents=N, k=K), decoder=False)
    fast = accelerate(copy.deepcopy(coder))
    x = randn(B, D, dtype=torch.float32)
    torch.testing.assert_close(fast.encode(x).pre_acts, coder.encode(x).pre_acts)
    with pytest.raises(AssertionError):
        fast(x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_norms_and_gradients_of_decoder_rows(dtype):
    coder = make_coder(dtype)
    fast = accelerate(copy.deepcopy(coder))
    for one in (coder, fast):
        one.W_dec.grad = randn(N, D, seed=20, dtype=dtype)
        one.set_decoder_norm_to_unit_norm()
        one.remove_gradient_parallel_to_decoder_directions()
    tolerance = {} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(fast.W_dec, coder.W_dec, **tolerance)
    if dtype == torch.bfloat16:
        tolerance = {"rtol": 0.02, "atol": 0.05}
    torch.testing.assert_close(fast.W_dec.grad, coder.W_dec.grad, **tolerance)


@pytest.mark.parametrize("dead", [0, 5, 40])
@pytest.mark.parametrize("options", [{}, {"multi_topk": True}], ids=["plain", "multi"])
def test_a_step_makes_no_dense_codes(options, dead, largest):
    coder = make_coder(**options)
    x, dead_mask = randn(128, D), torch.arange(N) < dead
    sizes = []
    for one in (coder, accelerate(copy.deepcopy(coder))):
        with largest() as made:
            out = one(x, dead_mask=dead_mask)
            (out.fvu + out.auxk_loss + out.multi_topk_fvu).backward()
        sizes.append(made.elements)
    assert sizes[0] >= 128 * N
    assert sizes[1] < 128 * N


# ------------------------------------------------------------------------------------ where the host is wrong


@pytest.mark.parametrize("loss", ["auxk_loss", "multi_topk_fvu"])
@pytest.mark.parametrize("dead", [5, 40], ids=["few dead", "many dead"])
def test_the_host_drops_the_encoder_gradient(loss, dead, request):
    coder = make_coder(transcode=True, multi_topk=True)
    fast = accelerate(copy.deepcopy(coder))
    batch = make_batch(coder, dead)

    def encoder_gradient(coder):
        coder.zero_grad()
        getattr(coder(**batch), loss).backward()
        return coder.encoder.weight.grad

    host = encoder_gradient(coder)
    assert host is None or not host.any()
    request.getfixturevalue("differentiable_host")
    oracle = encoder_gradient(coder)
    assert oracle.any()
    torch.testing.assert_close(encoder_gradient(fast), oracle, **TIGHT)


@pytest.mark.parametrize("multi_topk", [False, True])
def test_rows_with_too_few_positives(multi_topk, request):
    """The host fills them with latents that did not fire, and gives those a gradient."""
    coder = make_coder(multi_topk=multi_topk)
    coder.encoder.bias.data -= 10  # one latent in fourteen fires
    fast = accelerate(copy.deepcopy(coder))
    batch = make_batch(coder, 40)
    x = batch["x"]
    x[0] = coder.b_dec.detach()  # none does
    pre_acts = coder.encode(x).pre_acts
    fired = (pre_acts > 0).any(0)
    assert 0 in (pre_acts > 0).sum(1)
    assert ((pre_acts > 0).sum(1) < K).any()
    assert (~fired).any()

    host, ours = coder(**batch), fast(**batch)
    assert (~fired)[host.latent_indices].any()
    assert fired[ours.latent_indices].all()
    assert not ours.latent_acts[0].any()
    for name in ("sae_out", "fvu", "auxk_loss", "multi_topk_fvu"):
        torch.testing.assert_close(getattr(ours, name), getattr(host, name), **TIGHT)
    host_step = step(coder, batch)
    request.getfixturevalue("differentiable_host")
    oracle = step(coder, batch)
    assert not torch.allclose(host_step["gradient of encoder.bias"], oracle["gradient of encoder.bias"])
    assert_same(step(fast, batch), oracle, **TIGHT)


def test_where_nothing_fires():
    fast = accelerate(make_coder(transcode=True))
    fast.encoder.bias.data.fill_(-1e3)
    out = fast(**make_batch(fast))
    assert not out.latent_acts.any()
    assert not out.latent_indices.any()
    torch.testing.assert_close(out.sae_out, fast.b_dec.expand(B, D))


EXPANDED = """
import torch
from sparsify.xformers import xformers_embedding_bag

indices = torch.arange(15).view(5, 3)
for gradient in (torch.ones(5, 8), torch.ones(()).expand(5, 8)):
    W, acts = torch.ones(16, 8, requires_grad=True), torch.ones(5, 3, requires_grad=True)
    xformers_embedding_bag(indices, W, acts).backward(gradient)
    print((W.grad[:15] == 1).all().item(), (acts.grad == 8).all().item())
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the host's Triton kernel needs Triton")
def test_the_host_misreads_an_expanded_gradient():
    """As `.sum()` hands one to its kernel, which runs in Triton's interpreter here; a contiguous one it reads well."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    said = subprocess.run([sys.executable, "-c", EXPANDED], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.split()[-4:] == ["True", "True", "False", "False"]


def test_an_expanded_gradient():
    fast = accelerate(make_coder())
    acts, indices = randn(B, K).requires_grad_(), torch.arange(B * K).view(B, K) % N
    fast.decode(acts, indices).sum().backward()
    torch.testing.assert_close(acts.grad, fast.W_dec.detach().sum(1)[indices], **TIGHT)
    sums = torch.zeros(N, dtype=torch.float64).index_add_(0, indices.flatten(), acts.detach().flatten())
    torch.testing.assert_close(fast.W_dec.grad, sums.unsqueeze(1).expand(N, D), **TIGHT)


# ----------------------------------------------------------------------------- objects, files, and their trainer


def test_objects_and_files(tmp_path):
    coder = make_coder(torch.float32, skip_connection=True)
    fast = accelerate(copy.deepcopy(coder))
    assert type(fast) is FastSparseCoder
    assert list(fast.state_dict()) == list(coder.state_dict())
    coder.save_to_disk(tmp_path / "host")
    fast.save_to_disk(tmp_path / "fast")
    for name in ("sae.safetensors", "cfg.json"):
        assert (tmp_path / "host" / name).read_bytes() == (tmp_path / "fast" / name).read_bytes()

    batch = make_batch(coder)
    expected = step(coder, batch)
    loaded = accelerate(SparseCoder.load_from_disk(tmp_path / "fast"))
    constructed = make_coder(torch.float32, FastSparseCoder, skip_connection=True)
    for one in (loaded, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), constructed):
        assert type(one) is FastSparseCoder
        assert_same(step(one, batch), expected, rtol=1e-4, atol=1e-4)
    assert type(deaccelerate(fast)) is SparseCoder
    assert_same(step(fast, batch), expected, rtol=0, atol=0)


def test_refusals():
    groups = SparseCoderConfig(num_latents=100, k=K, activation="groupmax")
    with pytest.raises(ValueError, match="'groupmax'"):
        accelerate(SparseCoder(D, groups))
    with pytest.raises(ValueError, match="'groupmax'"):
        FastSparseCoder(D, groups)
    with pytest.raises(TypeError, match="SparseCoder, Trainer"):
        accelerate(type("Mine", (SparseCoder,), {})(D, SparseCoderConfig()))


@pytest.fixture
def precision():
    """`fit` sets that of products for the whole process: it is put back."""
    was = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(was)


def make_trainer(folder, *, rows=200, coder=None, **config) -> Trainer:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 16, "vocab_size": 64}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    model.eval()  # without dropout, the data are the same in every run
    tokens = torch.randint(0, 64, (200, 16), generator=torch.Generator().manual_seed(0))[:rows]
    dataset = datasets.Dataset.from_dict({"input_ids": tokens.tolist()}).with_format("torch")
    config = {"optimizer": "adam", "lr": 1e-3, "lr_warmup_steps": 5, "batch_size": 4, "save_dir": str(folder), **config}
    sae = SparseCoderConfig(num_latents=128, **{"k": 8, **(coder or {})})
    return Trainer(TrainConfig(sae, log_to_wandb=False, **config), dataset, model)


def fit(trainer: Trainer) -> torch.Tensor:
    """The losses of each call of each coder."""
    losses = []
    handles = [
        coder.register_forward_hook(
            lambda _, __, out: losses.append(torch.stack([out.fvu, out.auxk_loss, out.multi_topk_fvu]).detach())
        )
        for coder in trainer.saes.values()
    ]
    trainer.fit()
    for handle in handles:
        handle.remove()
    return torch.stack(losses)


AUX = {"auxk_alpha": 1 / 32, "dead_feature_threshold": 100}
RUNS = {
    "adam": ({}, False),
    "signum": ({"optimizer": "signum"}, False),
    "muon": ({"optimizer": "muon"}, False),
    "accumulation": ({"grad_acc_steps": 2, "micro_acc_steps": 2}, False),
    "cross-entropy": ({"loss_fn": "ce", "lr": 1e-2}, False),
    "transcoders": ({"coder": {"transcode": True, "skip_connection": True}, "hookpoints": ["h.*.mlp"]}, False),
    # Where the host's encoder has wrong gradients: against the host with another.
    "auxk": (AUX, True),
    "decaying k": ({"k_decay_steps": 30}, True),  # which starts with more than are positive
    "multi-topk": ({"coder": {"multi_topk": True}, **AUX}, True),
}


@pytest.mark.parametrize(("config", "corrected"), RUNS.values(), ids=RUNS)
def test_fifty_steps_of_the_trainer(config, corrected, tmp_path, request, precision):
    if corrected:
        request.getfixturevalue("differentiable_host")
    host, fast = (make_trainer(tmp_path / name, **copy.deepcopy(config)) for name in ("host", "fast"))
    assert type(accelerate(fast)) is FastTrainer
    optimizer = config.get("optimizer", "adam")
    assert (type(fast.optimizers[-1]) is FastAdam) == (optimizer != "signum")  # Muon leaves vectors to Adam
    expected, losses = fit(host), fit(fast)
    assert fast.global_step == 50
    assert len(losses) >= 100
    if config.get("loss_fn") != "ce":
        assert losses[-10:, 0].mean() < losses[:10, 0].mean()
    assert (losses[:, 1] > 0).any() == ("auxk_alpha" in config)
    # Muon rounds to bf16, several times a step.
    torch.testing.assert_close(losses, expected, rtol=0.02 if optimizer == "muon" else 1e-3, atol=1e-4)
    for name, counts in host.num_tokens_since_fired.items():
        assert (counts != fast.num_tokens_since_fired[name]).float().mean() < 0.05

    assert type(deaccelerate(fast)) is Trainer
    assert {type(coder) for coder in fast.saes.values()} == {SparseCoder}
    assert not any(isinstance(optimizer, FastAdam) for optimizer in fast.optimizers)


def test_a_run_goes_on_from_the_files_of_either(tmp_path, precision):
    """Half a run by one, the rest by the other."""
    whole = fit(make_trainer(tmp_path / "whole"))
    for first, second in ((accelerate, deaccelerate), (deaccelerate, accelerate)):
        folder = tmp_path / first.__name__
        trainer = first(make_trainer(folder, rows=100))
        # As of a run of the full length.
        trainer.lr_schedulers = [transformers.get_linear_schedule_with_warmup(trainer.optimizers[0], 5, 50)]
        half = fit(trainer)
        trainer = make_trainer(folder)
        trainer.load_state(str(folder / "unnamed"))
        rest = fit(second(trainer))
        torch.testing.assert_close(torch.cat([half, rest]), whole, rtol=1e-3, atol=1e-4)


def test_a_trainer_with_unknown_coders_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    name = next(iter(trainer.saes))
    trainer.saes[name].cfg.activation = "groupmax"
    with pytest.raises(ValueError, match="'groupmax'"):
        accelerate(trainer)
    trainer.saes[name].cfg.activation = "topk"
    trainer.saes[name].__class__ = type("Mine", (SparseCoder,), {})
    with pytest.raises(ValueError, match=f"a Mine at {name}"):
        accelerate(trainer)
    assert type(trainer) is Trainer
