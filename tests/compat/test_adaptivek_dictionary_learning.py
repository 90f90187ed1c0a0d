"""AdaptiveK as a dictionary of dictionary_learning: the same numbers, its trainer, its file."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from aksae import AdaptiveK, AdaptiveKSAE, KMap, SAEConfig, TopK, UserError, formats
from aksae.probe import ComplexityProbe

pytest.importorskip("dictionary_learning", reason="needs the host: pip install dictionary-learning==0.1.0")

from aksae.hosts.dictionary_learning import AutoEncoderAdaptiveK
from dictionary_learning.evaluation import evaluate
from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
from dictionary_learning.training import trainSAE

D, F, K_MAX = 16, 128, 24


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_probe() -> ComplexityProbe:
    probe = ComplexityProbe(D)
    with torch.no_grad():
        probe.weight.copy_(randn(D, seed=2))
        probe.bias.fill_(5.0)
    return probe


def make_adaptivek(selection=None, **k_map) -> AdaptiveKSAE:
    selection = selection or AdaptiveK(KMap(2, K_MAX, **k_map), "token")
    sae = AdaptiveKSAE(SAEConfig(D, F, selection), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for seed, tensor in enumerate((sae.b_enc, sae.b_dec, sae.W_enc)):
            tensor.copy_(randn(*tensor.shape, seed=10 + seed))
        if sae.probe is not None:
            sae.probe.load_state_dict(make_probe().state_dict())
    return sae


def transcoder() -> AdaptiveKSAE:
    return AdaptiveKSAE(SAEConfig(D, F, AdaptiveK(KMap(2, K_MAX)), d_out=D))


def make(**fields) -> AutoEncoderAdaptiveK:
    return AutoEncoderAdaptiveK(D, F, K_MAX, **{"k_min": 2, "probe": make_probe(), **fields})


def activations(batch, steps, seed=3):
    """Rows of a few sparse directions, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    directions = randn(64, D, seed=4)
    for _ in range(steps):
        strength = torch.rand(batch, 64, generator=generator)
        yield (strength * (strength > 0.9)) @ directions


@pytest.mark.parametrize("shape", [(40,), (3, 5), (0,)], ids=str)
def test_same_numbers_as_adaptivek(shape):
    sae, x = make_adaptivek(), randn(*shape, D)
    ae = AutoEncoderAdaptiveK.from_adaptivek(sae)
    acts = sae.encode(x).to_dense(F)
    assert torch.equal(ae.k_for(x), sae.k_for(x))
    assert torch.equal(ae.encode(x), acts)
    x_hat, features = ae(x, output_features=True)
    assert torch.equal(features, acts)
    assert torch.equal(x_hat, sae(x))
    assert torch.equal(ae(x), x_hat)
    torch.testing.assert_close(ae.decode(acts), x_hat)
    with torch.no_grad():
        torch.testing.assert_close(ae.decode(acts), x_hat)
    encoded, top_acts, top_indices, post_relu = ae.encode(x, return_topk=True)
    torch.testing.assert_close(encoded, acts)
    assert post_relu.shape == acts.shape
    if x.numel():
        assert top_acts.shape == top_indices.shape == (*shape, K_MAX)


def test_conversion_there_and_back_is_exact():
    sae = make_adaptivek(steepness=5.3, score_max=8.0)
    ae = AutoEncoderAdaptiveK.from_adaptivek(sae)
    back = ae.to_adaptivek()
    assert back.config == sae.config
    assert back.state_dict().keys() == sae.state_dict().keys()
    for name, tensor in sae.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
        assert back.state_dict()[name].data_ptr() != tensor.data_ptr(), name
    assert AutoEncoderAdaptiveK.from_adaptivek(make_adaptivek().double()).to_adaptivek().W_dec.dtype == torch.float64


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AutoEncoderAdaptiveK.from_adaptivek(make_adaptivek(TopK(5))), "sae: got TopK, k = 5, needs AdaptiveK"),
        (lambda: AutoEncoderAdaptiveK.from_adaptivek(transcoder()), "sae: got a transcoder, needs an autoencoder"),
        (lambda: make(k_min=30), "k_min: got 30, needs at most k_max = 24"),
        (lambda: AutoEncoderAdaptiveK(D, F, F + 1), "k_max: got 129, needs a number from 0 to d_sae = 128"),
        (lambda: make(score_max=8.0), "probe: got .* needs .*8.0"),
    ],
    ids=["fixed k", "transcoder", "k_min", "k_max", "score range"],
)
def test_what_cannot_be_is_refused(build, message):
    with pytest.raises(UserError, match=message):
        build()


def test_starts_as_the_hosts_dictionary_does():
    """Decoder directions of unit norm, the encoder equal to them, a decoder whose rows lie together."""
    ae, host = AutoEncoderAdaptiveK(D, F, 32), AutoEncoderTopK(D, F, 32)
    names = {name for name in ae.state_dict() if not name.startswith(("probe", "_extra"))}
    assert names == set(host.state_dict())
    for name in names:
        assert ae.state_dict()[name].shape == host.state_dict()[name].shape, name
    torch.testing.assert_close(ae.decoder.weight.norm(dim=0), torch.ones(F))
    assert torch.equal(ae.encoder.weight, ae.decoder.weight.T)
    assert ae.decoder.weight.T.is_contiguous()
    # A probe of 0 gives score 0 throughout, here sigmoid(-3) of the way from 32 // 16 to 32.
    assert ae.k_for(randn(3, D)).tolist() == [3, 3, 3]


def test_padding_repeats_what_fired():
    ae, x = make(), randn(50, D)
    with torch.no_grad():
        ae.encoder.bias.fill_(-1.2)
        ae.encoder.weight[:, 0] += 0.7
        x[7] = 0.0
    acts, top_acts, top_indices, _ = ae.encode(x, return_topk=True)
    fired = acts > 0
    counts = fired.sum(-1)
    assert counts[7] == 0
    assert (counts < ae.k_for(x)).sum() > 5
    assert counts.max() > 5
    assert top_indices.dtype == torch.int64
    for row, (row_acts, row_indices) in enumerate(zip(top_acts, top_indices)):
        real = row_acts > 0
        torch.testing.assert_close(acts[row][row_indices[real]], row_acts[real])
        assert real.sum() == counts[row]
        if counts[row]:
            assert fired[row][row_indices].all()
    assert set(top_indices.unique().tolist()) == set(fired.any(0).nonzero().flatten().tolist())


def test_a_batch_without_latents_fires_none():
    ae = make()
    with torch.no_grad():
        ae.encoder.bias.fill_(-100.0)
    acts, top_acts, top_indices, _ = ae.encode(randn(6, D), return_topk=True)
    assert not acts.any()
    assert top_acts.shape == top_indices.shape == (6, 0)


def test_threshold_replaces_k():
    ae, x = make(), randn(20, D)
    ae.threshold = torch.tensor(0.5)
    acts, top_acts, _, post_relu = ae.encode(x, return_topk=True, use_threshold=True)
    assert torch.equal(acts, post_relu * (post_relu > 0.5))
    assert torch.equal(ae.encode(x, use_threshold=True), acts)
    assert torch.equal((top_acts > 0).sum(-1), torch.minimum(ae.k_for(x), (post_relu > 0).sum(-1)))


@pytest.mark.parametrize("change", [lambda f: f, lambda f: -f, lambda f: f + 1], ids=["codes", "negative", "dense"])
def test_decode_of_anything_is_the_product(change):
    ae, x = make().double(), randn(20, D).double()
    with torch.no_grad():
        f = change(ae.encode(x))
        torch.testing.assert_close(ae.decode(f), f @ ae.decoder.weight.T + ae.b_dec)
    # Entries that are 0 have a gradient, too.
    f = f.clone().requires_grad_()
    ae.decode(f).sum().backward()
    torch.testing.assert_close(f.grad, ae.decoder.weight.sum(0).expand_as(f))


def trainer(**fields):
    return TopKTrainer(
        **{
            "steps": 50,
            "activation_dim": D,
            "dict_size": F,
            "k": K_MAX,
            "layer": 0,
            "lm_name": "none",
            "dict_class": partial(AutoEncoderAdaptiveK, k_min=2, probe=make_probe()),
            "lr": 1e-2,
            "warmup_steps": 1,
            "threshold_start_step": 10,
            "device": "cpu",
            "seed": 0,
            **fields,
        }
    )


def test_the_hosts_trainer(tmp_path):
    own = trainer()
    probe = own.ae.probe.weight.clone()
    own.dead_feature_threshold = 300
    with torch.no_grad():
        own.ae.encoder.bias[:9] = -100.0
    batches = activations(64, 50)
    # The first step sets b_dec before it encodes; from then on these are the very weights that a step encodes with.
    losses = [own.update(0, next(batches))]
    silent = own.num_tokens_since_fired.clone()
    for step, x in enumerate(batches, 1):
        fired = (own.ae.encode(x) > 0).any(0)
        losses.append(own.update(step, x))
        silent = torch.where(fired, 0, silent + len(x))
        assert torch.equal(own.num_tokens_since_fired, silent), step
    assert len(losses) == 50
    assert own.dead_features >= 9, "the auxiliary loss was never used"
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert torch.equal(own.ae.probe.weight, probe)
    assert 0 < own.ae.threshold < float("inf")
    assert own.ae.decoder.weight.T.is_contiguous()
    torch.testing.assert_close(own.ae.decoder.weight.norm(dim=0), torch.ones(F))
    assert own.config["k"] == K_MAX

    torch.save(own.ae.state_dict(), tmp_path / "ae.pt")
    loaded = AutoEncoderAdaptiveK.from_pretrained(tmp_path / "ae.pt", k=K_MAX, device="cpu")
    assert_same(loaded, own.ae)
    with pytest.raises(ValueError, match="k: got 5, needs 24"):
        AutoEncoderAdaptiveK.from_pretrained(tmp_path / "ae.pt", k=5)


def assert_same(loaded, ae):
    x = randn(30, D)
    assert loaded.state_dict().keys() == ae.state_dict().keys()
    for name, tensor in ae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert torch.equal(loaded(x), ae(x))
    assert torch.equal(loaded.k_for(x), ae.k_for(x))


@pytest.mark.parametrize("normalize", [False, True])
def test_train_sae_and_its_file(tmp_path, normalize):
    config = {"trainer": trainer, "wandb_name": "adaptivek"}
    # A list, since normalising reads the data twice; it also divides the tensors that it is given in place.
    data = list(activations(64, 200))
    trainSAE(
        data, [config], steps=50, save_dir=str(tmp_path), save_steps=[20], device="cpu", normalize_activations=normalize
    )
    data = list(activations(64, 3))
    folder = tmp_path / "trainer_0"
    ae = AutoEncoderAdaptiveK.from_pretrained(folder / "ae.pt")
    assert ae.k_for(data[0]).unique().numel() > 4
    assert (folder / "checkpoints" / "ae_20.pt").is_file()
    metrics = evaluate(ae, iter(data), n_batches=3)
    # The file is for activations as they are, whatever they were divided by in training.
    assert metrics["frac_variance_explained"] > 0.5
    assert 2 <= metrics["l0"] <= K_MAX
    assert json.loads((folder / "config.json").read_text())["trainer"]["k"] == K_MAX
    stored = formats.load(folder)
    torch.testing.assert_close(stored(data[0]), ae(data[0]))
    assert torch.equal(stored.activation.k_for(data[0]), ae.k_for(data[0]))


def test_scale_biases_keeps_k():
    ae, x = make(), randn(40, D)
    k, acts, x_hat = ae.k_for(x), ae.encode(x), ae(x)
    ae.threshold = torch.tensor(0.25)
    ae.scale_biases(4.0)
    assert torch.equal(ae.k_for(4 * x), k)
    torch.testing.assert_close(ae.encode(4 * x), 4 * acts)
    torch.testing.assert_close(ae(4 * x), 4 * x_hat)
    assert ae.threshold == 1.0


@pytest.mark.parametrize("content", [AutoEncoderTopK(D, F, 4).state_dict(), [1], {"_extra_state": torch.zeros(5)}])
def test_a_file_of_another_class(tmp_path, content):
    torch.save(content, tmp_path / "ae.pt")
    with pytest.raises(UserError, match=r"ae.pt: tensor \S+: got none, needs what AutoEncoderAdaptiveK saves"):
        AutoEncoderAdaptiveK.from_pretrained(tmp_path / "ae.pt")


def test_the_dtype_of_a_file_is_kept(tmp_path):
    ae = make().double()
    with torch.no_grad():
        ae.encoder.weight.copy_(torch.rand(F, D, dtype=torch.float64) / 3)
    torch.save(ae.state_dict(), tmp_path / "ae.pt")
    loaded = AutoEncoderAdaptiveK.from_pretrained(tmp_path / "ae.pt")
    assert torch.equal(loaded.encoder.weight, ae.encoder.weight)
    assert loaded.decoder.weight.T.is_contiguous()


def test_a_map_that_is_refused_changes_nothing():
    ae, x = make(), randn(9, D)
    k = ae.k_for(x)
    with pytest.raises(UserError, match="k_min: got 30, needs at most k_max"):
        ae.set_extra_state(torch.tensor([30.0, 3, 6, 0, 10]))
    assert torch.equal(ae.k_for(x), k)


def test_the_map_survives_a_cast(tmp_path):
    ae = make(steepness=5.3).to(torch.bfloat16)
    torch.save(ae.state_dict(), tmp_path / "ae.pt")
    loaded = AutoEncoderAdaptiveK.from_pretrained(tmp_path / "ae.pt")
    assert loaded.to_adaptivek().config.selection.k_map.steepness == 5.3
    other = make()
    other.load_state_dict(ae.state_dict())
    assert other.to_adaptivek().config.selection.k_map.steepness == 5.3


def test_a_row_without_latents_ends_the_hosts_threshold():
    """A defect of the host: the smallest act of an empty row is taken for infinite, and stays so in the mean."""
    own = trainer(dict_class=AutoEncoderTopK)
    with torch.no_grad():
        own.ae.encoder.bias.fill_(-100.0)
    own.loss(randn(4, D), step=11)
    assert own.ae.threshold == float("inf")
