"""dictionary_learning before and after `accelerate`: the same numbers, by the host's own rules."""

from __future__ import annotations

import contextlib
import copy
import pickle

import pytest
import torch
from torch import nn

from aksae_kernels.integrations import accelerate, deaccelerate, sparse
from aksae_kernels.integrations.adam import FastAdam

pytest.importorskip("dictionary_learning", reason="dictionary-learning is not installed; make test-compat installs it")

from dictionary_learning.dictionary import JumpReluAutoEncoder
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE, BatchTopKTrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
from dictionary_learning.training import trainSAE

from aksae_kernels.integrations import dictionary_learning as ours

D, F, K = 17, 97, 5
ROWS = 24
EXACT = {"rtol": 1e-10, "atol": 1e-10}
# The host computes its auxiliary loss and its step function in fp32, whatever the weights are.
SINGLE = {"rtol": 1e-5, "atol": 1e-6}

AUTOENCODERS = {"topk": AutoEncoderTopK, "batch_topk": BatchTopKSAE, "jumprelu": JumpReluAutoEncoder}
TRAINERS = {"topk": TopKTrainer, "batch_topk": BatchTopKTrainer, "jumprelu": JumpReluTrainer}
FAST_TRAINERS = {
    "topk": ours.FastTopKTrainer,
    "batch_topk": ours.FastBatchTopKTrainer,
    "jumprelu": ours.FastJumpReluTrainer,
}


def autoencoder(kind: str, dtype: torch.dtype = torch.float64, d_in: int = D, k: int = K) -> nn.Module:
    torch.manual_seed(0)
    sizes = (d_in, F) if kind == "jumprelu" else (d_in, F, k)
    ae = AUTOENCODERS[kind](*sizes)
    biases = (ae.b_enc, ae.b_dec) if kind == "jumprelu" else (ae.encoder.bias, ae.b_dec)
    for bias in biases:
        nn.init.normal_(bias, std=0.3)
    # About 1 % of the latents are above: sparse.
    ae.threshold.data.fill_(2.4)
    return ae.to(dtype)


def inputs(*lead: int, d_in: int = D, dtype: torch.dtype = torch.float64, seed: int = 1) -> torch.Tensor:
    return torch.randn(*lead, d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def trainer(kind: str, cls: type | None = None, dtype: torch.dtype = torch.float64, **options):
    given = {"steps": 100, "activation_dim": D, "dict_size": F, "layer": 0, "lm_name": "none", "device": "cpu"}
    given |= {"warmup_steps": 2, "lr": 1e-3}
    if kind == "jumprelu":
        given |= {"sparsity_warmup_steps": 10, "bandwidth": 0.3, "target_l0": 2.0}
    else:
        given |= {"k": K, "threshold_start_step": 3}
    torch.manual_seed(0)
    made = (cls or TRAINERS[kind])(**given | options)
    made.ae.to(dtype)
    if kind == "jumprelu":
        made.ae.threshold.data.fill_(2.4)
    return made


def both(kind: str, **options):
    return trainer(kind, **options), accelerate(trainer(kind, **options))


def gradients(module: nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: param.grad for name, param in module.named_parameters()}


def assert_same(got, expected, **tolerance):
    """Of tensors, and of dicts and tuples of them; None only for None."""
    if isinstance(expected, dict):
        assert got.keys() == expected.keys()
        for name in expected:
            assert_same(got[name], expected[name], **tolerance)
    elif isinstance(expected, tuple):
        assert len(got) == len(expected)
        for one, other in zip(got, expected):
            assert_same(one, other, **tolerance)
    elif isinstance(expected, torch.Tensor):
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected, equal_nan=True, **tolerance)
    else:
        assert got == expected


@contextlib.contextmanager
def without(cls: type, name: str):
    """The host's method raises: what runs does without it."""

    def raises(*args, **kwargs):
        raise AssertionError(f"{cls.__name__}.{name} was called")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cls, name, raises)
        yield


# ---------------------------------------------------------------------------------------------- autoencoders


@pytest.mark.parametrize("output_features", [False, True])
@pytest.mark.parametrize("lead", [(ROWS,), (3, 7), (), (1,), (0,)], ids=str)
@pytest.mark.parametrize("kind", AUTOENCODERS)
def test_forward(kind, lead, output_features, monkeypatch):
    # A single row is soon called crowded.
    monkeypatch.setattr(sparse, "_CROWD", 2)
    host = autoencoder(kind)
    fast = accelerate(copy.deepcopy(host))
    results = []
    for ae in (host, fast):
        x = inputs(*lead).requires_grad_()
        with without(AUTOENCODERS[kind], "encode") if ae is fast else contextlib.nullcontext():
            outputs = ae(x, output_features=output_features)
        outputs = outputs if output_features else (outputs,)
        sum((output * torch.linspace(-1, 1, output.shape[-1])).sum() for output in outputs).backward()
        results.append((outputs, x.grad, gradients(ae)))
    assert_same(results[1], results[0], **EXACT)


@pytest.mark.parametrize("k", [1, 8, F])
@pytest.mark.parametrize("d_in", [1, 16, 33])
def test_topk_of_other_sizes(k, d_in):
    host = autoencoder("topk", d_in=d_in, k=k)
    fast = accelerate(copy.deepcopy(host))
    x = inputs(ROWS, d_in=d_in)
    for ae in (host, fast):
        ae(x).square().sum().backward()
    # With k = F, rows have fewer than k positive activations.
    assert_same(fast(x, output_features=True), host(x, output_features=True), **EXACT)
    assert_same(gradients(fast), gradients(host), **EXACT)


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("use_threshold", [False, True])
@pytest.mark.parametrize("lead", [(ROWS,), (3, 7)], ids=str)
@pytest.mark.parametrize("kind", ["topk", "batch_topk"])
def test_encode_stays_dense(kind, lead, use_threshold, extra):
    host = autoencoder(kind)
    fast = accelerate(copy.deepcopy(host))
    option = {"topk": "return_topk", "batch_topk": "return_active"}[kind]
    results = []
    for ae in (host, fast):
        x = inputs(*lead).requires_grad_()
        encoded = ae.encode(x, use_threshold=use_threshold, **{option: extra})
        dense = encoded[0] if extra else encoded
        (ae.decode(dense) * torch.linspace(-1, 1, D)).sum().backward()
        results.append((encoded, x.grad, gradients(ae)))
    assert_same(results[1], results[0], **EXACT)


def test_jumprelu_encode_and_its_options():
    host = autoencoder("jumprelu")
    host.apply_b_dec_to_input = True
    fast = accelerate(copy.deepcopy(host))
    x = inputs(ROWS)
    assert_same(fast.encode(x, output_pre_jump=True), host.encode(x, output_pre_jump=True), **EXACT)
    assert_same(fast(x, output_features=True), host(x, output_features=True), **EXACT)


@pytest.mark.parametrize("kind", ["batch_topk", "jumprelu"])
def test_untrained_thresholds_keep_the_dense_path(kind):
    host = autoencoder(kind)
    host.threshold.data.fill_(-1.0)
    fast = accelerate(copy.deepcopy(host))
    x = inputs(ROWS)
    assert_same(fast(x, output_features=True), host(x, output_features=True), **EXACT)
    with without(AUTOENCODERS[kind], "encode"), pytest.raises(AssertionError, match="was called"):
        fast(x)


@pytest.mark.parametrize("kind", AUTOENCODERS)
def test_fp32_is_as_near_to_fp64_as_the_host_is(kind):
    exact, host = autoencoder(kind), autoencoder(kind, torch.float32)
    fast = accelerate(copy.deepcopy(host))
    # The same numbers: fp32 weights and inputs, in fp64.
    exact.load_state_dict(host.state_dict())
    x = inputs(ROWS, dtype=torch.float32)
    truth = exact(x.double())
    error = {ae: (ae(x) - truth).abs().max() for ae in (host, fast)}
    assert error[fast] <= 2 * error[host]


@pytest.mark.parametrize("kind", AUTOENCODERS)
def test_bf16(kind):
    host = autoencoder(kind, torch.bfloat16)
    fast = accelerate(copy.deepcopy(host))
    x = inputs(ROWS, dtype=torch.bfloat16)
    got, expected = fast(x), host(x)
    assert got.dtype == expected.dtype
    # Ranks may differ where pre-activations are within a rounding of each other: of few rows.
    off = (got - expected).abs().amax(-1) > 0.05
    assert off.float().mean() < 0.2


@pytest.mark.parametrize("kind", AUTOENCODERS)
def test_autocast(kind):
    host = autoencoder(kind, torch.float32)
    fast = accelerate(copy.deepcopy(host))
    x = inputs(ROWS, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        for got, expected in zip(fast(x, output_features=True), host(x, output_features=True)):
            assert got.dtype == expected.dtype
            off = (got - expected).abs().amax(-1) > 0.05
            assert off.float().mean() < 0.2


@pytest.mark.parametrize("kind", AUTOENCODERS)
def test_rows_without_activations(kind):
    host = autoencoder(kind)
    with torch.no_grad():
        (host.b_enc if kind == "jumprelu" else host.encoder.bias).sub_(3.0)
    fast = accelerate(copy.deepcopy(host))
    x = inputs(ROWS)
    expected = host(x, output_features=True)
    assert (expected[1] == 0).all(-1).any()
    assert_same(fast(x, output_features=True), expected, **EXACT)


@pytest.mark.parametrize("kind", AUTOENCODERS)
def test_a_nan_row_surfaces(kind):
    host = autoencoder(kind)
    fast = accelerate(copy.deepcopy(host))
    x = inputs(ROWS)
    x[3] = torch.nan
    got, expected = fast(x), host(x)
    assert got[3].isnan().all()
    assert_same(got, expected, **EXACT)


@pytest.mark.parametrize("kind", ["topk", "batch_topk"])
@pytest.mark.parametrize("watched", ["encoder", "decoder"])
def test_hooks_see_what_they_saw(kind, watched):
    host = autoencoder(kind)
    fast = accelerate(copy.deepcopy(host))
    seen = {}
    for ae in (host, fast):
        seen[ae] = []
        getattr(ae, watched).register_forward_hook(lambda module, args, output, log=seen[ae]: log.append(output))
        option = {"topk": {}, "batch_topk": {"use_threshold": False}}[kind]
        ae(inputs(ROWS), output_features=True)
        ae.decode(ae.encode(inputs(ROWS), **option))
    assert len(seen[fast]) == 2
    assert_same(tuple(seen[fast]), tuple(seen[host]), **EXACT)


# ------------------------------------------------------------------------------------------ files, copies, classes


@pytest.mark.parametrize("kind", AUTOENCODERS)
def test_saved_weights_move_both_ways(kind, tmp_path):
    saved = autoencoder(kind, torch.float32)
    torch.save(saved.state_dict(), tmp_path / "ae.pt")
    loaded = accelerate(AUTOENCODERS[kind].from_pretrained(tmp_path / "ae.pt"))
    x = inputs(ROWS, dtype=torch.float32)
    assert_same(loaded(x), saved(x), rtol=1e-5, atol=1e-6)
    torch.save(loaded.state_dict(), tmp_path / "ours.pt")
    # Bit by bit, in keys, shapes and dtypes too.
    assert_same(torch.load(tmp_path / "ours.pt"), torch.load(tmp_path / "ae.pt"), rtol=0, atol=0)
    again = AUTOENCODERS[kind].from_pretrained(tmp_path / "ours.pt")
    assert torch.equal(again(x), saved(x))
    assert type(type(loaded).from_pretrained(tmp_path / "ae.pt")) in (type(loaded), type(saved))


@pytest.mark.parametrize("kind", AUTOENCODERS)
def test_there_and_back(kind):
    ae = autoencoder(kind)
    before = {name: (p.stride(), p.detach().clone()) for name, p in ae.named_parameters()}
    params = dict(ae.named_parameters())
    fast = accelerate(ae)
    assert fast is ae
    assert type(fast) is not AUTOENCODERS[kind]
    assert isinstance(fast, AUTOENCODERS[kind])
    weight = fast.W_enc if kind == "jumprelu" else fast.decoder.weight
    assert weight.T.is_contiguous()
    assert deaccelerate(fast) is ae
    assert type(ae) is AUTOENCODERS[kind]
    for name, param in ae.named_parameters():
        assert param is params[name]
        assert param.stride() == before[name][0]
        assert torch.equal(param, before[name][1])


@pytest.mark.parametrize("kind", AUTOENCODERS)
@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda ae: pickle.loads(pickle.dumps(ae))], ids=["copy", "pickle"])
def test_copies(kind, twin_of):
    fast = accelerate(autoencoder(kind))
    twin = twin_of(fast)
    assert type(twin) is type(fast)
    assert [p.stride() for p in twin.parameters()] == [p.stride() for p in fast.parameters()]
    assert torch.equal(twin(inputs(ROWS)), fast(inputs(ROWS)))


@pytest.mark.parametrize("kind", AUTOENCODERS)
def test_scaled_biases(kind):
    host = autoencoder(kind)
    fast = accelerate(copy.deepcopy(host))
    for ae in (host, fast):
        ae.scale_biases(1.5)
    assert_same(fast(inputs(ROWS)), host(inputs(ROWS)), **EXACT)


def test_what_is_not_supported_is_refused():
    class Own(AutoEncoderTopK):
        pass

    with pytest.raises(TypeError, match=r"Own, a subclass of .*AutoEncoderTopK: .*; there are"):
        accelerate(Own(D, F, K))
    odd = trainer("topk", dict_class=lambda d_in, d_sae, k: BatchTopKSAE(d_in, d_sae, k))
    with pytest.raises(ValueError, match=r"got a .*TopKTrainer with an autoencoder of class BatchTopKSAE"):
        accelerate(odd)
    with pytest.raises(ValueError, match=r"FastTopKTrainer must be .* an autoencoder of class BatchTopKSAE"):
        trainer("topk", ours.FastTopKTrainer, dict_class=BatchTopKSAE)


# -------------------------------------------------------------------------------------------------- trainers

BOOKS = ("num_tokens_since_fired", "dead_features", "effective_l0", "pre_norm_auxk_loss")


def books(made) -> dict:
    """What a trainer keeps count of, and the logging values."""
    kept = {name: getattr(made, name) for name in BOOKS if hasattr(made, name)}
    kept["threshold"] = made.ae.threshold
    return {name: torch.as_tensor(value).detach().double() for name, value in kept.items()}


# Latents called dead: none; fewer than the auxiliary loss takes; more; all that do not fire.
DEAD = {"none": 0, "few": 6, "many": 40, "all": F}


@pytest.mark.parametrize("step", [0, 10], ids=["early", "late"])
@pytest.mark.parametrize("dead", DEAD)
@pytest.mark.parametrize("alpha", [1 / 32, 0])
@pytest.mark.parametrize("kind", ["topk", "batch_topk"])
def test_loss(kind, alpha, dead, step):
    host, fast = both(kind, auxk_alpha=alpha)
    x = inputs(ROWS)
    for made in (host, fast):
        made.dead_feature_threshold = 1000
        made.num_tokens_since_fired[: DEAD[dead]] = 2000
        nn.init.constant_(made.ae.b_dec, 0.1)
        made.loss(x, step=step).backward()
    assert host.loss(x, step=step).item() == pytest.approx(fast.loss(x, step=step).item(), rel=1e-6)
    tolerance = EXACT if dead == "none" or alpha == 0 else SINGLE
    assert_same(gradients(fast.ae), gradients(host.ae), **tolerance)
    assert_same(books(fast), books(host), **SINGLE)
    if dead != "none" and not (kind == "topk" and alpha == 0):
        assert 0 < fast.dead_features <= DEAD[dead]
        assert (fast.dead_features > fast.top_k_aux) == (dead != "few")
        assert fast.pre_norm_auxk_loss > 0


@pytest.mark.parametrize("kind", ["topk", "batch_topk"])
def test_a_residual_without_variance(kind):
    """Of a single row: the host's rule makes the auxiliary loss the largest number there is, not infinite."""
    host, fast = both(kind)
    for made in (host, fast):
        made.dead_feature_threshold = 0
    losses = [made.loss(inputs(1), step=0).item() for made in (host, fast)]
    assert losses[1] == losses[0] > 1e30


@pytest.mark.parametrize("kind", TRAINERS)
def test_loss_under_autocast(kind):
    """As `trainSAE` computes it on a GPU. Ranks within a rounding of bf16 may differ."""
    host, fast = both(kind, dtype=torch.float32)
    for made in (host, fast):
        with torch.autocast("cpu", torch.bfloat16):
            made.loss(inputs(ROWS, dtype=torch.float32), step=10).backward()
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = (made.loss(inputs(ROWS, dtype=torch.float32), step=10) for made in (fast, host))
    assert got.dtype == expected.dtype
    assert got.item() == pytest.approx(expected.item(), rel=0.02)
    for name, grad in gradients(fast.ae).items():
        other = gradients(host.ae)[name]
        assert grad.dtype == other.dtype
        assert (grad - other).norm() <= 0.2 * other.norm() + 1e-6


@pytest.mark.parametrize("kind", TRAINERS)
def test_log(kind):
    host, fast = both(kind)
    x = inputs(ROWS)
    got, expected = (made.loss(x, step=10, logging=True) for made in (fast, host))
    assert type(got).__name__ == type(expected).__name__ == "LossLog"
    assert got._fields == expected._fields
    assert_same(tuple(got[:3]), tuple(expected[:3]), **EXACT)
    assert got.losses == pytest.approx(expected.losses)
    assert fast.get_logging_parameters().keys() == host.get_logging_parameters().keys()
    assert fast.config == host.config


@pytest.mark.parametrize("kind", TRAINERS)
def test_an_empty_batch(kind):
    host, fast = both(kind)
    losses = [made.loss(inputs(0), step=0) for made in (host, fast)]
    assert all(loss.isnan() for loss in losses)


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_nan_row_surfaces_in_the_loss(kind):
    _, fast = both(kind)
    x = inputs(ROWS)
    x[3] = torch.nan
    assert fast.loss(x, step=0).isnan()


# Of every case of the estimator: thresholds far above 0, within half a bandwidth of it, 0, and below.
THRESHOLDS = {"high": (2.0, 2.5), "near 0": (-0.2, 0.2), "zero": (0.0, 0.0), "mixed": (-0.6, 2.0)}


@pytest.mark.parametrize("step", [0, 5, 50])
@pytest.mark.parametrize("thresholds", THRESHOLDS)
def test_jumprelu_loss(thresholds, step, monkeypatch):
    # However many latents are near their thresholds.
    monkeypatch.setattr(sparse, "_CROWD", 1)
    host, fast = both("jumprelu")
    x = inputs(ROWS)
    for made in (host, fast):
        made.ae.threshold.data.copy_(torch.linspace(*THRESHOLDS[thresholds], F))
        nn.init.normal_(made.ae.b_enc, std=0.2, generator=torch.Generator().manual_seed(0))
        made.dead_feature_threshold = 10
    losses = []
    for made in (host, fast):
        with without(JumpReluTrainer, "loss") if made is fast else contextlib.nullcontext():
            losses.append(made.loss(x, step=step))
        losses[-1].backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    assert_same(gradients(fast.ae), gradients(host.ae), **SINGLE)
    # A threshold of 0 has a gradient by the step function alone, whose weight starts at 0.
    assert fast.ae.threshold.grad.any() == (thresholds != "zero" or step > 0)
    assert_same(books(fast), books(host), **SINGLE)


def test_jumprelu_starts_dense_and_becomes_sparse():
    fast = accelerate(trainer("jumprelu", bandwidth=0.001))
    with without(JumpReluTrainer, "loss"):
        fast.loss(inputs(ROWS), step=0)
        fast.ae.threshold.data.fill_(0.001)
        with pytest.raises(AssertionError, match="was called"):
            fast.loss(inputs(ROWS), step=0)


@pytest.mark.parametrize("options", [{}, {"decay_start": 20, "steps": 60}], ids=["constant", "decay"])
@pytest.mark.parametrize("kind", TRAINERS)
def test_training(kind, options):
    host, fast = both(kind, **options)
    for made in (host, fast):
        made.dead_feature_threshold = 5 * ROWS
    curves = [[made.update(step, inputs(ROWS, seed=step)) for step in range(50)] for made in (host, fast)]
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    assert curves[0][-1] != curves[0][0]
    assert_same(fast.ae.state_dict(), host.ae.state_dict(), rtol=1e-4, atol=1e-5)
    assert_same(books(fast), books(host), rtol=1e-4, atol=1e-5)
    if kind != "jumprelu":
        assert fast.dead_features > 0
        assert fast.ae.threshold > 0
    assert type(fast.optimizer) is FastAdam
    for ours_, theirs in zip(fast.optimizer.state.values(), host.optimizer.state.values()):
        assert_same(ours_, theirs, rtol=1e-3, atol=1e-5)
    assert fast.scheduler.get_last_lr() == host.scheduler.get_last_lr()


@pytest.mark.parametrize("kind", TRAINERS)
def test_updates_in_fp64(kind):
    """Without what the host computes in fp32: to the last digits."""
    host, fast = both(kind, **({"sparsity_penalty": 0.0} if kind == "jumprelu" else {}))
    for step in range(5):
        losses = [made.update(step, inputs(ROWS, seed=step)) for made in (host, fast)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-11)
    assert_same(dict(fast.ae.named_parameters()), dict(host.ae.named_parameters()), **EXACT)


@pytest.mark.parametrize("kind", TRAINERS)
def test_training_in_fp32(kind):
    host, fast = both(kind, dtype=torch.float32)
    curves = [
        [made.update(step, inputs(ROWS, seed=step, dtype=torch.float32)) for step in range(50)] for made in (host, fast)
    ]
    assert curves[1] == pytest.approx(curves[0], rel=1e-3)


@pytest.mark.parametrize("kind", TRAINERS)
def test_the_decoder_keeps_its_norm_and_its_layout(kind):
    fast = accelerate(trainer(kind))
    decoder = fast.ae.W_dec if kind == "jumprelu" else fast.ae.decoder.weight
    strides = [p.stride() for p in fast.ae.parameters()]
    for step in range(3):
        fast.update(step, inputs(ROWS, seed=step))
    assert (fast.ae.W_dec if kind == "jumprelu" else fast.ae.decoder.weight) is decoder
    assert [p.stride() for p in fast.ae.parameters()] == strides
    norms = decoder.norm(dim=1 if kind == "jumprelu" else 0)
    assert_same(norms, torch.ones_like(norms), **EXACT)


@pytest.mark.parametrize("kind", TRAINERS)
def test_training_may_change_sides(kind):
    """Accelerated for a while, not for a while, and again."""
    host, other = both(kind)
    for step in range(30):
        if step % 10 == 5:
            (deaccelerate if step < 20 else accelerate)(other)
            assert type(other) is (TRAINERS[kind] if step < 20 else FAST_TRAINERS[kind])
        x = inputs(ROWS, seed=step)
        assert other.update(step, x) == pytest.approx(host.update(step, x), rel=1e-5)
    assert type(deaccelerate(other).optimizer) is torch.optim.Adam
    assert type(other.ae) is AUTOENCODERS[kind]


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_copied_trainer_goes_on_alike(kind):
    fast = accelerate(trainer(kind))
    fast.update(0, inputs(ROWS))
    twin = copy.deepcopy(fast)
    losses = [[made.update(step, inputs(ROWS, seed=step)) for step in range(1, 4)] for made in (fast, twin)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_fast_class_as_dict_class_of_the_hosts_trainer(kind):
    host = trainer(kind)
    mixed = trainer(kind, dict_class=FAST_TRAINERS[kind].fast_class)
    assert type(mixed) is TRAINERS[kind]
    for step in range(10):
        x = inputs(ROWS, seed=step)
        assert mixed.update(step, x) == pytest.approx(host.update(step, x), rel=1e-6)
    assert_same(mixed.ae.state_dict(), host.ae.state_dict(), rtol=1e-6, atol=1e-7)
    assert type(accelerate(mixed)) is FAST_TRAINERS[kind]
    assert type(deaccelerate(mixed).ae) is AUTOENCODERS[kind]


@pytest.mark.parametrize("kind", TRAINERS)
def test_the_hosts_training_loop(kind, tmp_path, capsys):
    """`trainSAE` makes its trainers itself: it is given the fast class."""
    data = [inputs(ROWS, seed=seed, dtype=torch.float32) for seed in range(20)]
    for name, cls in (("host", TRAINERS[kind]), ("fast", FAST_TRAINERS[kind])):
        torch.manual_seed(0)
        config = {"trainer": cls, "steps": 20, "activation_dim": D, "dict_size": F, "layer": 0, "lm_name": "none"}
        config |= {"device": "cpu", "warmup_steps": 2}
        config |= {"sparsity_warmup_steps": 5} if kind == "jumprelu" else {"k": K, "threshold_start_step": 3}
        trainSAE(
            [batch.clone() for batch in data],
            [config],
            steps=20,
            save_dir=str(tmp_path / name),
            save_steps=[10],
            log_steps=5,
            normalize_activations=True,
            verbose=True,
            device="cpu",
        )
    for file in ("ae.pt", "checkpoints/ae_10.pt"):
        got, expected = (torch.load(tmp_path / name / "trainer_0" / file) for name in ("fast", "host"))
        assert_same(got, expected, rtol=1e-4, atol=1e-5)
    config = "trainer_0/config.json"
    assert (tmp_path / "fast" / config).read_text() == (tmp_path / "host" / config).read_text()
    assert "frac_variance_explained" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["topk", "batch_topk"])
def test_training_with_a_watched_encoder(kind):
    host, fast = both(kind)
    seen = []
    fast.ae.encoder.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    for step in range(5):
        assert fast.update(step, inputs(ROWS)) == pytest.approx(host.update(step, inputs(ROWS)), rel=1e-6)
    assert seen == [(ROWS, F)] * 5


@pytest.mark.parametrize("kind", TRAINERS)
def test_an_autoencoder_of_the_host_put_into_an_accelerated_trainer(kind):
    host, fast = both(kind)
    fast.ae = copy.deepcopy(host.ae)
    fast.optimizer.param_groups[0]["params"] = list(fast.ae.parameters())
    for step in range(5):
        assert fast.update(step, inputs(ROWS)) == pytest.approx(host.update(step, inputs(ROWS)), rel=1e-6)


@pytest.mark.parametrize("dead", [0, 4, 20])
def test_no_tensor_of_the_size_of_the_pre_activations(dead, largest):
    rows, d_in, d_sae = 128, 16, 192
    elements = []
    for made in both("topk", activation_dim=d_in, dict_size=d_sae, auxk_alpha=0.1):
        made.dead_feature_threshold = 10**6
        made.num_tokens_since_fired[:dead] = 10**6
        with torch.no_grad():
            made.ae.encoder.bias[:dead] = -0.5
        with largest() as mode:
            made.update(1, inputs(rows, d_in=d_in))
        elements.append(mode.elements)
    assert elements[0] >= rows * d_sae
    assert elements[1] < rows * d_sae


# --------------------------------------------------------------------------------------- where the host is wrong


def test_a_latent_picked_with_activation_0_has_not_fired():
    """The host's top-k fills rows with fewer than k positive activations up with zeros, and counts those as fired."""
    host, fast = both("topk")
    for made in (host, fast):
        nn.init.constant_(made.ae.encoder.bias, -1.5)
        f = made.loss(inputs(ROWS), step=0, logging=True).f
        positive = (f > 0).any(0)
        assert 0 < positive.sum() < F
        counted = made.num_tokens_since_fired == 0
        if made is host:
            assert (counted & ~positive).any()
        else:
            assert torch.equal(counted, positive)


def test_the_threshold_starts_from_a_batch_without_activations():
    """The host then assigns a float to a buffer, which torch refuses."""
    host, fast = both("batch_topk")
    for made in (host, fast):
        nn.init.constant_(made.ae.encoder.bias, -100.0)
    with pytest.raises(TypeError, match="buffer 'threshold'"):
        host.loss(inputs(ROWS), step=10)
    fast.loss(inputs(ROWS), step=10)
    assert fast.ae.threshold == 0
    assert fast.ae.threshold.dtype == host.ae.threshold.dtype


def test_logging_without_an_auxiliary_loss():
    """The host's loss is then the int 0, which it asks for its `item()`."""
    host, fast = both("topk", auxk_alpha=0)
    with pytest.raises(AttributeError, match="item"):
        host.loss(inputs(ROWS), step=0, logging=True)
    losses = fast.loss(inputs(ROWS), step=0, logging=True).losses
    assert losses["auxk_loss"] == 0
    assert losses["loss"] == losses["l2_loss"]


def test_a_row_without_activations_makes_the_topk_threshold_infinite():
    """The host's rule, kept: such a row has no smallest activation."""
    for made in both("topk"):
        nn.init.constant_(made.ae.encoder.bias, -2.5)
        f = made.loss(inputs(ROWS), step=10, logging=True).f
        assert (f == 0).all(-1).any()
        assert made.ae.threshold == torch.inf


@pytest.mark.parametrize("kind", ["topk", "batch_topk"])
@pytest.mark.parametrize("replace", ["decoder", "encoder"])
def test_a_layer_with_another_bias_is_the_hosts(kind, replace):
    host = autoencoder(kind)
    if replace == "decoder":
        host.decoder = nn.Linear(F, D, bias=True, dtype=torch.float64)
    else:
        host.encoder = nn.Linear(D, F, bias=False, dtype=torch.float64)
    fast = accelerate(copy.deepcopy(host))
    assert_same(fast(inputs(ROWS)), host(inputs(ROWS)), **EXACT)


@pytest.mark.parametrize("kind", TRAINERS)
def test_an_empty_batch_leaves_the_weights_finite(kind):
    _, fast = both(kind)
    fast.update(1, inputs(ROWS))
    with contextlib.suppress(IndexError, RuntimeError):
        fast.update(2, inputs(0))
    assert all(parameter.isfinite().all() for parameter in fast.ae.parameters())


def test_a_k_of_more_than_all_latents_is_refused_as_by_the_host():
    host = autoencoder("topk", k=F + 1)
    for ae in (host, accelerate(copy.deepcopy(host))):
        with pytest.raises((RuntimeError, ValueError)):
            ae(inputs(ROWS))
