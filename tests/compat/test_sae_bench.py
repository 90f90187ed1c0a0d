"""The adapter for SAEBench: its interface by itself, and under SAEBench's own functions where it is installed."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
import types

import pytest
import torch
from aksae import SAE, AdaptiveK, AdaptiveKSAE, KMap, Priced, SAEConfig, TopK, UserError, calibrate
from aksae.hosts import _codes
from aksae.hosts.sae_bench import SAEBenchAdapter
from torch import nn

from aksae_kernels import price_select

D, F, K_MAX = 16, 256, 24


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_sae(k=None) -> AdaptiveKSAE:
    selection = TopK(k) if k else AdaptiveK(KMap(2, K_MAX))
    sae = AdaptiveKSAE(SAEConfig(D, F, selection), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        sae.b_enc.copy_(0.1 * randn(F, seed=2))
        sae.b_dec.copy_(randn(D, seed=3))
        if sae.probe is not None:
            sae.probe.weight.copy_(randn(D, seed=4))
            sae.probe.bias.fill_(5.0)
    return sae


def adapt(k=None, **fields) -> SAEBenchAdapter:
    return SAEBenchAdapter(make_sae(k), **{"model_name": "pythia-70m-deduped", "hook_layer": 3, **fields})


@pytest.mark.parametrize("k", [None, 5], ids=["adaptivek", "topk"])
@pytest.mark.parametrize("shape", [(30,), (4, 7)], ids=str)
def test_dense_interface(k, shape):
    adapter, x = adapt(k), randn(*shape, D)
    sae = adapter.sae
    acts = adapter.encode(x)
    assert torch.equal(acts, sae.encode(x).to_dense(F))
    assert torch.equal(adapter(x), sae(x))
    torch.testing.assert_close(adapter.decode(acts), adapter(x))
    # What SAEBench's own check of a new SAE compares.
    torch.testing.assert_close(adapter(x.reshape(-1, D)).reshape(x.shape), adapter.decode(acts))
    assert adapter.W_enc.shape == (D, F)
    assert adapter.W_dec.shape == (F, D)
    assert (adapter.b_enc.shape, adapter.b_dec.shape) == ((F,), (D,))
    assert adapter.W_enc.data_ptr() == sae.W_enc.data_ptr()
    assert (adapter.device, adapter.dtype) == (torch.device("cpu"), torch.float32)


def test_config():
    cfg = adapt().cfg
    assert (cfg.hook_layer, cfg.hook_name) == (3, "blocks.3.hook_resid_post")
    assert (cfg.d_in, cfg.d_sae, cfg.dtype, cfg.device) == (D, F, "float32", "cpu")
    assert adapt(hook_name="blocks.3.hook_mlp_out").cfg.hook_name == "blocks.3.hook_mlp_out"
    assert json.loads(json.dumps(cfg.to_dict()))["architecture"] == "adaptivek"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_to(dtype):
    adapter, x = adapt(), randn(10, D)
    assert adapter.to(device="cpu", dtype=dtype) is adapter
    assert adapter.dtype == adapter.W_enc.dtype == dtype
    assert adapter.cfg.dtype == str(dtype).removeprefix("torch.")
    # Activations may come in the dtype of a language model.
    assert adapter.encode(x).dtype == adapter(x).dtype == adapter.decode(adapter.encode(x)).dtype == dtype


def make_priced() -> SAE:
    sae = SAE(SAEConfig(D, F, Priced(3, k_max=K_MAX)), generator=torch.Generator().manual_seed(1)).eval()
    calibrate(sae, randn(2000, D, seed=7))
    return sae


@pytest.mark.parametrize("shape", [(30,), (4, 7)], ids=str)
def test_latents_at_a_price_are_those_that_pay(shape):
    sae, x = make_priced(), randn(*shape, D)
    adapter = SAEBenchAdapter(sae, model_name="pythia-70m-deduped", hook_layer=3, architecture="priced")
    candidates = sae.encode(x, k=sae.k_bound)
    kept = price_select(candidates, sae.W_dec, sae.b_dec, x, price=sae.price, passes=2)
    with torch.inference_mode():
        acts = adapter.encode(x)
    assert torch.equal(acts, kept.to_dense(F))
    assert 0 < int(acts.count_nonzero()) < int(candidates.counts.sum())
    torch.testing.assert_close(adapter.decode(acts), adapter(x))
    # At another price it has other latents.
    calibrate(sae, randn(2000, D, seed=7), 2)
    assert int(adapter.encode(x).count_nonzero()) < int(acts.count_nonzero())


def test_a_price_is_not_rounded_with_the_weights():
    sae, x = make_priced(), randn(200, D)
    adapter, price = SAEBenchAdapter(sae, model_name="pythia-70m-deduped", hook_layer=3), float(sae.price)
    assert float(torch.tensor(price).bfloat16()) != price
    adapter.to(torch.bfloat16)
    assert adapter.dtype == torch.bfloat16
    assert float(sae.price) == price
    assert adapter.encode(x).count_nonzero(-1).double().mean() == pytest.approx(3, rel=0.1)
    assert adapter.to(torch.float64).sae.price.dtype == torch.float64


def negative(acts):
    acts = acts.clone()
    acts[..., 3] = -5.0
    return acts


@pytest.mark.parametrize(
    ("change", "sparse"),
    [
        (lambda acts: acts, True),
        (lambda acts: acts * (torch.arange(F) % 2), True),
        (lambda acts: acts * torch.tensor([True, False, True])[:, None], True),
        (lambda acts: acts[:0], True),
        (lambda acts: torch.zeros_like(acts), True),
        (negative, True),
        (lambda acts: acts + 0.5, False),
        (lambda acts: acts.detach().requires_grad_(), False),
    ],
    ids=["untouched", "latents ablated", "rows ablated", "no rows", "nothing active", "negative", "dense", "gradient"],
)
def test_decode_takes_the_sparse_path_where_that_is_safe(monkeypatch, change, sparse):
    adapter = adapt()
    acts = change(adapter.encode(randn(3, D)).detach())
    calls = []
    real = _codes.sparse_decode
    monkeypatch.setattr(_codes, "sparse_decode", lambda *arguments: calls.append(1) or real(*arguments))
    out = adapter.decode(acts)
    torch.testing.assert_close(out, acts @ adapter.W_dec + adapter.b_dec)
    assert bool(calls) == sparse
    if acts.requires_grad:
        out.sum().backward()
        torch.testing.assert_close(acts.grad, adapter.W_dec.detach().sum(1).expand(3, F))


def test_nan_and_infinity_come_through():
    adapter = adapt()
    acts = adapter.encode(randn(4, D)).detach()
    acts[0, acts[0].argmax()] = float("nan")
    acts[1, acts[1].argmax()] = float("inf")
    out = adapter.decode(acts)
    assert out[0].isnan().all()
    assert not out[1].isfinite().any()
    assert out[2:].isfinite().all()


def test_a_decoder_can_be_trained_through_it():
    """Unlike the latents, the weights get their gradient on the sparse path too."""
    adapter = adapt()
    acts = adapter.encode(randn(6, D)).detach()
    adapter.decode(acts).pow(2).sum().backward()
    W_dec = adapter.W_dec.detach().clone().requires_grad_()
    (acts @ W_dec + adapter.b_dec.detach()).pow(2).sum().backward()
    torch.testing.assert_close(adapter.W_dec.grad, W_dec.grad)


@pytest.mark.parametrize(
    "sae", [nn.Linear(3, 4), nn.ParameterDict({"W_dec": torch.zeros(4, 3)})], ids=["linear", "no W_enc"]
)
def test_something_else_is_refused(sae):
    with pytest.raises(UserError, match=r"sae: got shapes .* needs W_enc and W_dec \[F, D\]"):
        SAEBenchAdapter(sae, model_name="gpt2", hook_layer=0)


@pytest.mark.parametrize(
    ("fields", "got"),
    [
        ({"input_scale": 2.0, "output_scale": 2.0}, "input_scale = 2, needs 1"),
        ({"d_out": D}, "a transcoder, needs an autoencoder"),
    ],
    ids=["scaled", "transcoder"],
)
def test_what_would_decode_to_something_else_is_refused(fields, got):
    with pytest.raises(UserError, match=f"sae: got {got}"):
        SAEBenchAdapter(AdaptiveKSAE(SAEConfig(D, F, TopK(4), **fields)), model_name="gpt2", hook_layer=0)


# ---------------------------------------------------------------------------------------------- the real SAEBench


@pytest.fixture
def bench(monkeypatch):
    """SAEBench's modules; a missing `tabulate`, with which it prints lists of SAEs, is stood in for."""
    for name in ("sae_lens", "sae_bench"):
        pytest.importorskip(name, reason=f"needs the host: pip install --no-deps {name.replace('_', '-')}")
    if importlib.util.find_spec("tabulate") is None:
        monkeypatch.setitem(sys.modules, "tabulate", types.SimpleNamespace(tabulate=None))
    from sae_bench.custom_saes import base_sae, custom_sae_config, topk_sae
    from sae_bench.evals.core import main
    from sae_bench.sae_bench_utils import general_utils

    return types.SimpleNamespace(
        base=base_sae, config=custom_sae_config, topk=topk_sae, core=main, general=general_utils
    )


class Store:
    """The part of SAELens' activation store that the core evaluation calls."""

    context_size, store_batch_size_prompts = 6, 4

    def __init__(self):
        self.generator = torch.Generator().manual_seed(5)

    def get_batch_tokens(self, n):
        return torch.randint(0, 50, (n, self.context_size), generator=self.generator)


class Model:
    """The part of a hooked transformer that it calls: token t has the activation `embedding[t]`."""

    embedding = randn(50, D, seed=6)

    def run_with_cache(self, tokens, prepend_bos, names_filter, stop_at_layer):
        assert stop_at_layer == 4
        return None, {name: self.embedding[tokens] for name in names_filter}


def test_it_has_what_the_base_class_has(bench):
    adapter = adapt()
    assert bench.base.BaseSAE.check_decoder_norms(adapter)
    theirs = {field.name for field in dataclasses.fields(bench.config.CustomSAEConfig)}
    assert theirs <= {field.name for field in dataclasses.fields(adapter.cfg)}
    methods = {name for name in vars(bench.base.BaseSAE) if not name.startswith("_")}
    assert methods - set(dir(adapter)) == {"check_decoder_norms", "test_sae"}

    sae_id, sae, sparsity = bench.general.load_and_format_sae("release", adapter, "cpu")
    assert (sae_id, sparsity) == ("custom_sae", None)
    assert sae is adapter
    assert sae.cfg.metadata.hook_name == "blocks.3.hook_resid_post"
    assert sae.cfg.architecture_str == "adaptivek"
    json.dumps(sae.cfg.to_dict())


def core_metrics(bench, sae):
    bench.general.load_and_format_sae("release", sae, "cpu")
    config = bench.core.CoreEvalConfig(
        batch_size_prompts=8,
        n_eval_sparsity_variance_batches=3,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        compute_featurewise_density_statistics=True,
        compute_featurewise_weight_based_metrics=True,
    )
    return bench.core.run_evals(sae, Store(), Model(), config, ignore_tokens={7})


def test_core_evaluation(bench):
    adapter = adapt()
    metrics, features = core_metrics(bench, adapter)
    store = Store()
    tokens = torch.stack([store.get_batch_tokens(8) for _ in range(3)])
    x = Model.embedding[tokens[tokens != 7]]
    assert len(x) < tokens.numel()
    counts = adapter.sae.encode(x).counts
    assert metrics["sparsity"]["l0"] == pytest.approx(float(counts.float().mean()))
    assert len(counts.unique()) > 4
    norms = adapter.sae(x).detach().norm(dim=-1).mean()
    assert metrics["shrinkage"]["l2_norm_out"] == pytest.approx(float(norms), rel=1e-5)
    fired = (adapter.encode(x) > 0).float().mean(0)
    torch.testing.assert_close(torch.tensor(features["feature_density"]), fired)


def test_core_evaluation_of_a_fixed_k_is_that_of_saebenchs_topk(bench):
    adapter = adapt(k=9, architecture="topk")
    theirs = bench.topk.TopKSAE(D, F, 9, "pythia-70m-deduped", 3, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
            getattr(theirs, name).copy_(getattr(adapter, name))
    ours, our_features = core_metrics(bench, adapter)
    expected, their_features = core_metrics(bench, theirs)
    assert ours.keys() == expected.keys()
    for group, values in expected.items():
        assert ours[group] == pytest.approx(values, rel=1e-4), group
    for name, values in their_features.items():
        torch.testing.assert_close(torch.tensor(our_features[name]), torch.tensor(values), equal_nan=True)


def test_the_explained_variance_of_the_host_depends_on_the_scale(bench):
    """A defect of the host: it subtracts the squared mean of squares where the squared mean belongs."""
    explained = []
    for scale in (1.0, 0.5):
        adapter = adapt(k=9)
        with torch.no_grad():
            adapter.sae.W_dec.mul_(scale)
            adapter.sae.b_dec.mul_(scale)
            adapter.sae.W_enc.div_(scale)

        class Scaled(Model):
            embedding = Model.embedding * scale

        bench.general._standardize_sae_cfg(adapter.cfg)
        metrics, _ = bench.core.run_evals(
            adapter, Store(), Scaled(), bench.core.CoreEvalConfig(compute_variance_metrics=True, batch_size_prompts=8)
        )
        explained.append(metrics["reconstruction_quality"])
    assert explained[0]["cossim"] == pytest.approx(explained[1]["cossim"], rel=1e-4)
    assert explained[0]["explained_variance"] != pytest.approx(explained[1]["explained_variance"], abs=0.02)


# A network would bring language models and data sets; the functions that read the SAE are run on made activations.


@pytest.mark.filterwarnings("ignore:'penalty' was deprecated:FutureWarning")
def test_sparse_probing_of_latents_at_a_price(bench, tmp_path, monkeypatch):
    """SAEBench's sparse probing, on a file of activations such as it keeps: classes that differ in one latent."""
    from sae_bench.evals.sparse_probing import probe_training
    from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig
    from sae_bench.evals.sparse_probing.main import run_eval_single_dataset

    # With beartype 0.23 the host's check of this one takes the sizes of its caller for its own, and fails on any SAE.
    monkeypatch.setattr(probe_training, "train_sklearn_probe", probe_training.train_sklearn_probe.__wrapped__)
    sae = make_priced()
    adapter = SAEBenchAdapter(sae, model_name="pythia-70m-deduped", hook_layer=3)

    def activations(seed):
        acts = {name: 0.3 * randn(40, 6, D, seed=seed + place) for place, name in enumerate(("0", "1", "2"))}
        acts["1"] += 3 * sae.W_dec[5].detach()
        return acts

    path = tmp_path / "made_activations.pt"
    torch.save({"train": activations(0), "test": activations(10), "llm_results": {}}, path)
    config = SparseProbingEvalConfig(model_name="pythia-70m-deduped", k_values=[1, 2])
    results, per_class = run_eval_single_dataset(
        "made", config, adapter, None, 3, "blocks.3.hook_resid_post", "cpu", str(tmp_path), save_activations=False
    )
    assert per_class["sae_top_1_test_accuracy"]["1"] > 0.95
    assert results["sae_test_accuracy"] > 0.6


def test_absorption_of_latents_at_a_price(bench):
    """SAEBench's absorption: a latent that says a word and its first letter leaves that of the letter silent."""
    from sae_bench.evals.absorption.feature_absorption_calculator import FeatureAbsorptionCalculator

    letter, word = torch.eye(D)[0], torch.eye(D)[1]
    sae = SAE(SAEConfig(D, F, Priced(2, k_max=8)), generator=torch.Generator().manual_seed(1)).eval()
    with torch.no_grad():
        sae.W_dec[0], sae.W_dec[1] = letter, (letter + word) / 2**0.5
        sae.W_enc.copy_(sae.W_dec)
        sae.price.fill_(0.1)
    adapter = SAEBenchAdapter(sae, model_name="pythia-70m-deduped", hook_layer=3)

    class Spelling:
        """Prompts of words with one length; "cat" has the latent of its own, "cow" has that of its letter."""

        def to_tokens(self, prompt):
            return torch.zeros(1, 7)

        def run_with_cache(self, prompts, names_filter):
            x = torch.stack([letter + word if prompt.endswith("cat:") else letter for prompt in prompts])
            return None, {names_filter[0]: x.unsqueeze(1).expand(-1, 7, -1)}

    calculator = FeatureAbsorptionCalculator(Spelling(), icl_word_list=["dog"], max_icl_examples=1)
    found = calculator.calculate_absorption(adapter, ["cat", "cow"], letter, [0], layer=3, show_progress=False)
    cat, cow = found.word_results
    # Among the candidates of "cat" the letter is, too: at a fixed k it fires with the word, at a price it does not.
    assert sae.encode(letter + word, k=8).to_dense(F)[0] > 0
    assert cat.main_feature_scores[0].activation == 0
    assert cat.is_full_absorption
    assert cow.main_feature_scores[0].activation == pytest.approx(1)
    assert not cow.is_full_absorption
