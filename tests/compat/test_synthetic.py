"""SAEs on SAELens' synthetic activations, against SAELens' own judge."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from aksae import SAE, BatchTopK, FitConfig, JumpReLU, Matryoshka, Need, Priced, SAEConfig, TopK, adapt, calibrate
from aksae.hosts.sae_bench import SAEBenchAdapter
from aksae.study import StudyConfig, compare_with_truth
from aksae.study.summary import summary, synthetic_lines
from aksae.study.synthetic import MATCHED, Setup, World, matched, measure_synthetic, scores, search_lrs, synth_sae_bench

synthetic = pytest.importorskip("sae_lens.synthetic", reason="needs the host: pip install sae-lens==6.54.12")

D, F, BUDGET = 64, 128, 2
SELECTIONS = {
    "TopK": TopK(BUDGET),
    "BatchTopK": BatchTopK(BUDGET),
    "JumpReLU": JumpReLU(BUDGET),
    "Matryoshka": Matryoshka(BatchTopK(BUDGET), (32, F)),
    "Need": Need(BUDGET),
    "Priced": Priced(BUDGET),
}
SETUP = Setup(FitConfig(steps=40), d_sae=F, batch_size=256, train_rows=2048, heldout_rows=2048)


@pytest.fixture(scope="module")
def world() -> World:
    return synth_sae_bench(128, D, seed=1)


def ideal(world: World, x: torch.Tensor) -> SAE:
    """An SAE whose decoder is the truth, in another order, and whose threshold gives rows `x` the budget."""
    sae = SAE(SAEConfig(D, F, BatchTopK(BUDGET))).eval()
    order = torch.randperm(F, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.W_dec.copy_(world.directions[order])
        sae.W_enc.copy_(sae.W_dec)
    calibrate(sae, x)
    return sae


def test_a_world(world):
    x, active = world.rows(4000, seed=3)
    assert world.directions.shape == (128, D)
    torch.testing.assert_close(world.directions.norm(dim=-1), torch.ones(128))
    again = synth_sae_bench(128, D, seed=1)
    assert torch.equal(again.directions, world.directions)
    assert torch.equal(again.rows(4000, seed=3)[0], x)
    assert not torch.equal(synth_sae_bench(128, D, seed=2).directions, world.directions)
    # Features have rates of their own, and rows numbers of their own.
    counts, rates = active.sum(-1).double(), active.double().mean(0)
    assert 1 < counts.mean() < 3
    assert counts.std() > 0.5
    assert rates.max() > 10 * rates.median()
    # What is active is what rows are made of.
    wanted = torch.linalg.lstsq(active.float() @ world.directions, x - x.mean(0)).solution
    explained = (active.float() @ world.directions @ wanted - (x - x.mean(0))).square().sum()
    assert explained < 0.3 * (x - x.mean(0)).square().sum()


def test_scores_are_saelens_own(world):
    """The judge of SAELens on our SAE, through an adapter, over the same rows."""
    x, active = world.rows(3000, seed=5)
    sae = ideal(world, x)
    ours = scores(sae, x, active, world)

    class Generator:
        sample = staticmethod(lambda n: active.float())

    class Dictionary:
        feature_vectors = world.directions

        def __call__(self, activations):
            return x

    adapter = SAEBenchAdapter(sae, model_name="none", hook_layer=0)
    theirs = synthetic.eval_sae_on_synthetic_data(adapter, Dictionary(), Generator(), num_samples=3000)
    named = {
        "f1": theirs.classification.f1_score,
        "precision": theirs.classification.precision,
        "recall": theirs.classification.recall,
        "mcc": theirs.mcc,
        "uniqueness": theirs.uniqueness,
        "l0": theirs.sae_l0,
        "true_l0": theirs.true_l0,
        "dead": theirs.dead_latents / F,
    }
    assert {name: ours[name] for name in named} == pytest.approx(named, rel=1e-5)
    # The truth is found, and told well by a threshold.
    assert ours["mcc"] == pytest.approx(1, abs=1e-5)
    assert ours["found"] == ours["uniqueness"] == 1
    assert ours["set_f1"] > 0.6
    assert ours["count_correlation"] > 0.6


def test_matching_is_one_to_one_and_by_sign(world):
    W_dec = world.directions[[4, 9, 9, 2]] * torch.tensor([3.0, 1.0, 0.5, -1.0])[:, None]
    latents, features = matched(W_dec, world.directions)
    # Of two latents of one feature one has it; what points the other way has none.
    assert dict(zip(latents.tolist(), features.tolist())) in ({0: 4, 1: 9}, {0: 4, 2: 9})
    cosine = torch.cosine_similarity(W_dec[latents], world.directions[features], dim=-1)
    assert (cosine > MATCHED).all()


def test_every_selection_is_compared_at_the_same_l0(world):
    lrs = dict.fromkeys(SELECTIONS, 3e-3) | {"TopK": 1e-3}
    records = list(measure_synthetic(world, SELECTIONS, lrs, SETUP, seed=0))
    read = [(record["trained"], record["selection"]) for record in records]
    expected = {(name, name) for name in SELECTIONS} | {(name, "Priced") for name in SELECTIONS}
    assert len(read) == len(expected)
    assert set(read) == expected
    for record in records:
        assert record["lr"] == lrs[record["trained"]]
        assert all(math.isfinite(record[name]) for name in ("fvu", "f1", "set_f1", "mcc", "count_correlation"))
        # TopK has fewer where a row has fewer positive pre-activations.
        assert record["l0"] == pytest.approx(BUDGET, rel=0.005)
        assert (record["l0_uncalibrated"] is None) == (record["trained"] != "Priced" == record["selection"])
    # What an SAE becomes does not depend on what is trained beside it.
    (alone, _) = measure_synthetic(world, {"TopK": TopK(BUDGET)}, lrs, SETUP, seed=0)
    assert alone == next(record for record in records if record["trained"] == record["selection"] == "TopK")


def test_the_rate_with_the_least_error_is_taken(world):
    names = {name: SELECTIONS[name] for name in ("TopK", "Priced")}
    best, tried = search_lrs(world, names, (1e-5, 3e-3), SETUP, seed=7)
    assert best == {"TopK": 3e-3, "Priced": 3e-3}
    assert len(tried) == 4
    for name in names:
        worse, better = (next(t["fvu"] for t in tried if (t["trained"], t["lr"]) == (name, lr)) for lr in (1e-5, 3e-3))
        assert better < worse


def test_prices_of_the_true_dictionary_tell_how_many_features_a_row_has(world):
    x, active = world.rows(3000, seed=6)
    priced = scores(adapt(ideal(world, x), x, BUDGET), x, active, world)
    assert priced["count_correlation"] > 0.6


def test_the_part_of_a_study(world, tmp_path):
    config = StudyConfig(output=tmp_path, selections=("priced", "topk", "adaptivek"), seeds=(0,), lrs=(1e-3, 1e-2))
    said = []
    compare_with_truth(config, said.append, world, SETUP)
    assert len(said) == 1
    first = (tmp_path / "synthetic" / "seed-0.json").read_bytes()
    # A seed more: what is there stays, and so do the rates.
    more = dataclasses.replace(config, seeds=(0, 1))
    compare_with_truth(more, said.append, world, SETUP)
    assert (tmp_path / "synthetic" / "seed-0.json").read_bytes() == first
    assert said[0] == said[1]
    found = summary(more, [], {})["synthetic"]
    assert [(r["selection"], r["rule"], r["seeds"]) for r in found] == [
        ("priced", "own", 2),
        ("topk", "own", 2),
        ("topk", "price", 2),
    ]
    assert all(0 <= r["f1"] <= 1 and r["f1_std"] > 0 for r in found)
    lines = synthetic_lines({"synthetic": found}, {"priced": "Priced", "topk": "TopK"})
    assert [line[:2] for line in lines[1:]] == [
        ["Priced", "its own rule"],
        ["TopK", "its own rule"],
        ["TopK", "a price"],
    ]
