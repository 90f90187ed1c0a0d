"""Metrics against their formulas, and what an evaluation holds."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from aksae import AdaptiveK, AdaptiveKSAE, KMap, SAEConfig, TopK, TrainConfig, UserError
from aksae.data import BatchReader, Split
from aksae.evaluate import K_FACTORS, evaluate, evaluate_run, mean_l0
from aksae.metrics import ReconstructionMetrics
from aksae.top_contexts import spread_latents

D, F, N = 6, 40, 90


class Store:
    """`ActivationStore` in memory: 9 contexts of 10 rows."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(N, D, generator=generator) * torch.arange(1, D + 1) + 3
        self.context = torch.arange(N) // 10
        self.d_in = D

    def __len__(self):
        return N

    def rows(self, index):
        return self.x[index].clone()

    def last_rows(self):
        return self.context.bincount().cumsum(0) - 1


class Tokenizer:
    def decode(self, tokens):
        return f"<{tokens[0]}>"


def make_split() -> Split:
    """The token of row r is r; a special token stands before each context."""
    input_ids = np.concatenate([np.full((9, 1), 1000), np.arange(N).reshape(9, 10)], axis=1).astype(np.int32)
    contexts = SimpleNamespace(input_ids=input_ids, loss_mask=input_ids < 1000)
    return Split(contexts, torch.linspace(0, 10, 9), Store())


def make_sae(k=None) -> AdaptiveKSAE:
    generator = torch.Generator().manual_seed(1)
    sae = AdaptiveKSAE(SAEConfig(D, F, TopK(k) if k is not None else AdaptiveK(KMap(2, 10))), generator=generator)
    with torch.no_grad():
        sae.b_dec.fill_(3.0)
        sae.W_enc.mul_(0.3)
        if sae.probe is not None:
            sae.probe.weight.fill_(0.3)
    return sae


@pytest.fixture
def config(tmp_path):
    return TrainConfig(output=tmp_path, selection="adaptivek", d_sae=F, k_min=2, k_max=10, batch_size=32, device="cpu")


@pytest.fixture
def evaluation(config):
    models = {"adaptivek": make_sae(), "topk": make_sae(k=6)}
    return evaluate(models, make_split(), Tokenizer(), config, torch.device("cpu"))


def measured(sae, x, batch_size, k=7):
    metrics = ReconstructionMetrics(D, F)
    for rows in x.split(batch_size):
        codes = sae.encode(rows, k)
        metrics.update(rows, sae.decode(codes), codes, torch.full((len(rows),), k))
    return metrics


def test_metrics_follow_their_formulas():
    sae, x = make_sae(), Store().x
    z = sae.encode(x, 7).to_dense(F).detach().double().numpy()
    x_hat = sae.decode(sae.encode(x, 7)).detach().double().numpy()
    x_np = x.double().numpy()
    e = x_np - x_hat
    norms, norms_hat = np.linalg.norm(x_np, axis=1), np.linalg.norm(x_hat, axis=1)
    expected = {
        "fvu": (e**2).sum() / ((x_np - x_np.mean(0)) ** 2).sum(),
        "explained_variance": 1 - e.var(0).sum() / x_np.var(0).sum(),
        "mse": (e**2).mean(),
        "cosine": ((x_np * x_hat).sum(1) / norms / norms_hat).mean(),
        "l2_ratio": (norms_hat / norms).mean(),
        "l0_mean": (z > 0).sum(1).mean(),
        "l0_min": (z > 0).sum(1).min(),
        "l0_max": (z > 0).sum(1).max(),
        "k_mean": 7,
        "dead": (z == 0).all(0).mean(),
    }
    result = measured(sae, x, N).result()
    assert result == pytest.approx(expected, rel=1e-9)
    assert result["fvu"] > 1 - result["explained_variance"], "only fvu counts the mean error"


def test_metrics_are_pooled_and_not_averaged_over_batches():
    # In fp32 a batch of one row may be encoded by other kernels, and differ in the eighth digit.
    sae, x = make_sae().double(), Store().x.double()
    whole = measured(sae, x, N).result()
    assert measured(sae, x, 1).result() == pytest.approx(whole, rel=1e-9)
    assert measured(sae, x, 32).result() == pytest.approx(whole, rel=1e-9)


def test_metrics_keep_their_digits_far_from_the_origin():
    x = torch.randn(2000, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sae = make_sae().double()
    near = measured(sae, x, 500).result()
    shifted = ReconstructionMetrics(D, F)
    for rows in x.split(500):
        codes = sae.encode(rows, 7)
        shifted.update(rows + 1e4, sae.decode(codes) + 1e4, codes, torch.full((len(rows),), 7))
    for name in ("fvu", "explained_variance", "mse"):
        assert shifted.result()[name] == pytest.approx(near[name], rel=1e-6)


def test_evaluation_holds_what_the_report_reads(evaluation):
    assert evaluation["rows"] == N
    assert json.loads(json.dumps(evaluation, allow_nan=False)) == evaluation
    assert list(evaluation["models"]) == ["adaptivek", "topk"]
    assert evaluation["models"]["topk"]["k_mean"] == 6
    for name, curve in evaluation["l0_fvu"].items():
        assert len(curve) == len(K_FACTORS)
        assert [l0 for l0, _ in curve] == sorted(l0 for l0, _ in curve)
        trained = evaluation["models"][name]
        assert curve[K_FACTORS.index(1.0)] == [trained["l0_mean"], trained["fvu"]]
    histogram = evaluation["k_histogram"]
    assert sum(histogram["rows"]) == N
    assert len(set(histogram["k"])) == len(histogram["k"]) > 1


def test_contexts_hold_label_prediction_and_k(evaluation):
    sae, split = make_sae(), make_split()
    last = split.store.x[9::10]
    assert [c["score"] for c in evaluation["contexts"]] == split.labels.tolist()
    assert [c["predicted"] for c in evaluation["contexts"]] == pytest.approx(sae.probe(last).tolist())
    assert [c["k"] for c in evaluation["contexts"]] == sae.k_for(last).tolist()


def test_top_contexts_show_the_latents_own_activations(evaluation):
    sae, split = make_sae(), make_split()
    z = sae.encode(split.store.x, sae.k_for(split.store.x[9::10]).repeat_interleave(10)).to_dense(F)
    assert 0 < len(evaluation["top_contexts"]) <= 12
    for entry in evaluation["top_contexts"]:
        of_context = z[:, entry["latent"]].view(9, 10)
        strongest = of_context.amax(1).sort(descending=True).values
        assert entry["max"] == pytest.approx(strongest[0].item())
        for rank, example in enumerate(entry["examples"]):
            rows = [int(token[1:-1]) for token in example["tokens"]]
            assert len(rows) == 10
            assert example["activations"] == pytest.approx(z[rows, entry["latent"]].tolist())
            assert max(example["activations"]) == pytest.approx(strongest[rank].item())
            assert max(example["activations"]) > 0
            context = evaluation["contexts"][rows[0] // 10]
            assert (example["score"], example["k"]) == (context["score"], context["k"])


def test_shown_latents_are_spread_over_frequencies():
    fired = torch.tensor([0, 5, 99, *range(1, 31)])
    chosen = spread_latents(fired, n_rows=300)
    assert len(chosen) == 12
    assert fired[chosen].tolist() == sorted(fired[chosen].tolist())
    assert fired[chosen][0] == 1
    assert fired[chosen][-1] == 30, "99 of 300 rows is dense"
    assert spread_latents(torch.tensor([0, 200, 300]), n_rows=300).tolist() == [1, 2]
    assert spread_latents(torch.zeros(4), n_rows=300).tolist() == []


def test_every_factor_of_k_stays_within_the_dictionary():
    split, config = make_split(), TrainConfig(selection="adaptivek", d_sae=12, k_min=1, k_max=12, device="cpu")
    sae = AdaptiveKSAE(SAEConfig(D, 12, k_min=1, k_max=12))
    curve = evaluate({"adaptivek": sae}, split, Tokenizer(), config, torch.device("cpu"))["l0_fvu"]["adaptivek"]
    assert 0 < curve[0][0] <= curve[-1][0] <= 12


def test_only_the_trained_rows_are_measured(config):
    config.train_on = "last"
    evaluation = evaluate({"adaptivek": make_sae()}, make_split(), Tokenizer(), config, torch.device("cpu"))
    assert evaluation["rows"] == 9
    assert all(len(e["tokens"]) == 10 for latent in evaluation["top_contexts"] for e in latent["examples"])


def test_mean_l0(evaluation):
    reader = BatchReader(Store(), probe_reads="last", train_on="all")
    assert mean_l0(make_sae(), reader, 32) == pytest.approx(evaluation["models"]["adaptivek"]["l0_mean"])


def test_a_model_of_another_width_is_refused(config):
    with pytest.raises(UserError, match="adaptivek: got d_in 5, needs 6"):
        evaluate({"adaptivek": AdaptiveKSAE(SAEConfig(5, F, TopK(3)))}, make_split(), Tokenizer(), config, "cpu")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file, needs a JSON file"), ("{", "not readable JSON"), ("{}", "no checkpoint folder adaptivek")],
)
def test_a_folder_that_is_no_run_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        evaluate_run(tmp_path)
