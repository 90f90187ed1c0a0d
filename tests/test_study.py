"""A study of small SAEs on a tiny model: equal L0, the controls, going on where it was cut off, and what it says."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from aksae import SAE, AdaptiveK, BatchTopK, JumpReLU, KMap, Matryoshka, Need, Priced, SAEConfig, TopK, UserError
from aksae.config import ModelConfig, TextConfig
from aksae.study import StudyConfig, study
from aksae.study.budget import TOLERANCE, Chooser, at_budget, own, priced
from aksae.study.controls import NAMES, controls
from aksae.study.figures import write_figures
from aksae.study.measure import measured
from aksae.study.plan import search_trials, trials
from aksae.study.rows import Rows
from aksae.study.summary import lines
from aksae.text import ContextSet
from command_line import fails
from language_models import write_documents

D, F, BUDGET = 12, 48, 5
SELECTIONS = [
    TopK(BUDGET),
    BatchTopK(BUDGET),
    JumpReLU(BUDGET),
    Matryoshka(BatchTopK(BUDGET), (12, 48)),
    Need(BUDGET),
    Priced(BUDGET),
    AdaptiveK(KMap(1, 10), "mean"),
]


def rows(n: int, seed: int) -> Rows:
    """Sums of a few of 40 directions, in contexts of 10 rows, two to a document."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(40, D, generator=torch.Generator().manual_seed(9))
    x = (torch.rand(n, 40, generator=generator) * (torch.rand(n, 40, generator=generator) < 0.15)) @ directions + 1
    context = torch.arange(n) // 10
    means = torch.stack([part.mean(0) for part in x.split(10)])
    none = ContextSet(*(np.zeros((len(means), 1), dtype) for dtype in (np.int32, bool, bool)), [""] * len(means), None)
    return Rows(x, context, context // 2, means, none)


def made(selection) -> SAE:
    sae = SAE(SAEConfig(D, F, selection), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.start(rows(200, 0).x)
        if sae.probe is not None:
            sae.probe.weight.normal_(generator=torch.Generator().manual_seed(1)).mul_(3)
            sae.probe.bias.fill_(5)
        if isinstance(selection, BatchTopK | Matryoshka):
            sae.threshold.fill_(1.0)
        if isinstance(selection, Need):
            sae.need_weight.normal_(generator=torch.Generator().manual_seed(1))
    return sae.eval()


@torch.no_grad()
@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
def test_every_selection_is_judged_at_the_budget(selection):
    judged = rows(400, 2)
    chooser, before = own(made(selection), rows(300, 1), judged, BUDGET)
    record = measured(chooser.sae, chooser.codes(), judged)
    if isinstance(selection, TopK):
        assert record["l0"] == before <= BUDGET
    else:
        assert record["l0"] == pytest.approx(BUDGET, rel=max(TOLERANCE, 0.02 if isinstance(selection, Need) else 0))
        # A few contexts of random rows have another mean k than others.
        assert before == pytest.approx(BUDGET, rel=0.4 if isinstance(selection, AdaptiveK) else 0.2)
    # The SAE is left at what was found, so that what else is done with it has the same L0.
    if not isinstance(selection, AdaptiveK):
        assert float(chooser.sae.encode(judged.x).counts.double().mean()) == pytest.approx(record["l0"])
    x_hat = torch.cat([chooser.sae.decode(codes) for _, codes in chooser.codes()])
    error = (judged.x - x_hat).square().sum(-1)
    by_hand = torch.stack([error[judged.document == document].sum() for document in range(judged.n_documents)])
    assert record["error"] == pytest.approx(by_hand.tolist(), rel=1e-4)
    assert record["fvu"] == pytest.approx(float(error.sum() / (judged.x - judged.x.mean(0)).square().sum()), rel=1e-4)


@torch.no_grad()
def test_a_row_far_away_is_told_apart():
    near, topk = rows(400, 2), made(TopK(BUDGET))
    x = near.x.clone()
    x[13] *= 40
    judged = dataclasses.replace(near, x=x)
    assert near.near.all()
    assert (~judged.near).nonzero().tolist() == [[13]]
    record = measured(topk, Chooser(topk, judged).codes(), judged)
    error = (x - topk(x)).square().sum(-1)
    spread = (x - x.mean(0)).square().sum(-1)
    others = torch.arange(400) != 13
    assert record["fvu"] == pytest.approx(float(error.sum() / spread.sum()), rel=1e-4)
    assert record["fvu_near"] == pytest.approx(float(error[others].sum() / spread[others].sum()), rel=1e-4)
    assert sum(record["error_near"]) == pytest.approx(float(error[others].sum()), rel=1e-4)


def test_weights_trained_otherwise_at_a_price():
    judged = rows(400, 2)
    topk = made(TopK(BUDGET))
    chooser, _ = priced(topk, rows(300, 1), judged, BUDGET)
    at_price = measured(chooser.sae, chooser.codes(), judged)
    plain = measured(topk, Chooser(topk, judged).codes(), judged)
    assert at_price["l0"] == pytest.approx(BUDGET, rel=TOLERANCE)
    assert at_price["fvu"] < plain["fvu"]
    assert at_price["l0_p10"] < BUDGET < at_price["l0_p90"]


def test_a_budget_that_cannot_be_had():
    sae = made(Priced(BUDGET))
    with torch.no_grad():
        sae.b_enc.fill_(-100)
    chooser = Chooser(sae, rows(50, 2))
    at_budget(chooser, BUDGET)
    assert chooser.mean_l0() == 0


def test_controls():
    judged, topk = rows(400, 2), made(TopK(BUDGET))
    found = controls(topk, judged, BUDGET, seed=0)
    assert list(found) == list(NAMES)
    plain = measured(topk, Chooser(topk, judged).codes(), judged)
    assert found["by value"]["fvu"] == pytest.approx(plain["fvu"], rel=1e-4)
    fvu = {name: record["fvu"] for name, record in found.items()}
    assert fvu["price"] < fvu["price, every row k"] < fvu["by value"]
    assert fvu["k by error, by value"] < fvu["by value"] < fvu["k of price, shuffled"]
    assert fvu["by value, least squares"] < fvu["by value"]
    assert fvu["price, least squares"] < fvu["price"]
    assert found["price, every row k"]["l0"] <= BUDGET
    for name in ("price", "k of price, by value", "k by norm, by value"):
        assert found[name]["l0"] == pytest.approx(BUDGET, rel=0.02), name
    # With random weights more latents by value do not lower the error any further.
    assert 0 < found["k by error, by value"]["l0"] <= BUDGET


@torch.no_grad()
def test_least_squares_and_pursuit_by_hand():
    judged = rows(60, 3)
    topk = made(TopK(3))
    found = controls(topk, judged, 3, seed=0)
    codes, W = topk.encode(judged.x), topk.W_dec.detach().double()
    left = judged.x.double() - topk.b_dec.double()
    total = (judged.x - judged.x.mean(0)).square().sum()
    error = 0.0
    for row, latents, count in zip(left, codes.indices.long(), codes.counts):
        support = W[latents[:count]]
        error += float((row - torch.linalg.lstsq(support.T, row[:, None]).solution[:, 0] @ support).square().sum())
    assert found["by value, least squares"]["fvu"] == pytest.approx(error / float(total), rel=1e-3)
    error = 0.0
    for row in left:
        for _ in range(3):
            scores = W @ row
            row = row - scores.max().clamp_min(0) * W[scores.argmax()]
        error += float(row.square().sum())
    assert found["matching pursuit"]["fvu"] == pytest.approx(error / float(total), rel=1e-3)


@pytest.fixture(scope="module")
def settings(saved, tmp_path_factory):
    """Of a study of three selections, two budgets and two layers of a tiny model, on 60 documents."""
    folder = tmp_path_factory.mktemp("study")
    text = TextConfig(
        str(write_documents(folder / "documents.txt", 60, 40)), context_length=20, max_tokens=2000, heldout_fraction=0.3
    )
    return StudyConfig(
        output=folder / "study",
        cache=folder / "cache",
        model=ModelConfig(str(saved("llama")), device="cpu"),
        text=text,
        layers=(1, 0),
        d_sae=F,
        selections=("priced", "topk", "adaptivek"),
        budgets=(4, 8),
        other_budgets=(4,),
        seeds=(0,),
        lrs=(1e-3, 1e-2),
        search_budget=8,
        steps=12,
        batch_size=64,
        ce_contexts=3,
        control_rows=100,
        device="cpu",
    )


@pytest.fixture(scope="module")
def finished(settings):
    said = []
    return study(settings, said.append), said


def test_a_study(settings, finished):
    found, said = finished
    folder = settings.output
    assert json.loads((folder / "results.json").read_text()) == found
    assert "learning rates: priced" in said[1]
    rates = found["rates"]
    for name in settings.selections:
        # The best by the rows that calibrate.
        tried = {
            trial.lr: json.loads((folder / "search" / f"{trial}.json").read_text())["fvu"]
            for trial in search_trials(settings)
            if trial.selection == name
        }
        assert set(tried) == {1e-3, 1e-2}
        assert rates[name] == min(tried, key=tried.get)
    planned = trials(settings, rates)
    assert len(planned) == 3 * 2 + 3 * 1
    assert {(r["layer"], r["budget"], r["selection"], r["rule"]) for r in found["fvu"]} == {
        (t.layer, t.budget, t.selection, rule)
        for t in planned
        for rule in ("own", "price")
        if (t.selection, rule) != ("priced", "price")
    }
    for record in found["fvu"]:
        assert record["low"] <= record["value"] <= record["high"]
        # A row of a young TopK SAE may have fewer positive latents.
        assert record["l0"] == pytest.approx(record["budget"], rel=0.005 if record["selection"] != "topk" else 0.2)
        if record["selection"] != "topk":
            against = record["against"]["topk"]
            topk = next(
                r["value"]
                for r in found["fvu"]
                if (r["layer"], r["budget"], r["selection"], r["rule"])
                == (record["layer"], record["budget"], "topk", "own")
            )
            assert against["value"] == pytest.approx(record["value"] / topk - 1)
    assert {(r["selection"], r["rule"]) for r in found["damage"]} == {
        ("priced", "own"),
        ("topk", "own"),
        ("topk", "price"),
    }
    for record in found["damage"]:
        assert record["kl"] > 0
    assert {r["weights"] for r in found["controls"]} == {"topk", "priced"}
    assert {(r["budget"], r["selection"], r["rule"]) for r in found["probing"]} == {
        (budget, *which)
        for budget in (4, 8)
        for which in (*((name, "own") for name in settings.selections), ("topk", "price"))
    }
    for record in found["probing"]:
        # Of random words only this differs.
        assert set(record["by_label"]) == {"repeated, 1", "repeated, 5"}
        assert 0.2 < record["auc"] <= 1
    assert [(record["budget"], record["selection"]) for record in found["firings"]] == [(4, "topk"), (8, "topk")]
    for record in found["firings"]:
        assert 0 < record["dropped"] < 1
        shares = [example["dropped_share"] for example in record["examples"]]
        assert shares == sorted(shares)
        # What is dropped is marked in the text; of a latent that loses nothing there is none.
        assert all(
            ("~w" in "".join(example["text"])) == (example["dropped_share"] > 0) for example in record["examples"]
        )
    # Documents that calibrate are not judged by.
    rows_of = found["layers"]["1"]
    assert rows_of["documents"] == len(rows_of["variance"]) >= 10
    assert rows_of["calibration_rows"] + rows_of["rows"] < rows_of["train_rows"]


def test_it_goes_on_with_what_is_missing(settings, finished):
    found, _ = finished
    folder, rates = settings.output, finished[0]["rates"]
    one = trials(settings, rates)[0]
    kept = (settings.folder(one) / "sae.safetensors").read_bytes()
    others = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors") if str(one) not in str(path)}
    for path in sorted(settings.folder(one).rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (folder / "records" / f"{one}.json").unlink()
    again = study(settings, lambda _: None)
    # The same rows in the same order, even where it was trained on a pass of its own.
    assert (settings.folder(one) / "sae.safetensors").read_bytes() == kept
    assert {path: path.stat().st_mtime_ns for path in others} == others
    assert again["fvu"] == found["fvu"]


def test_it_grows_by_a_seed_and_keeps_its_settings(settings, finished):
    more = study(dataclasses.replace(settings, seeds=(0, 1), layers=(1,), budgets=(4,)), lambda _: None)
    assert {(record["layer"], record["budget"]) for record in more["fvu"]} == {(1, 4)}
    one = next(r for r in finished[0]["fvu"] if (r["layer"], r["budget"], r["selection"]) == (1, 4, "topk"))
    two = next(r for r in more["fvu"] if r["selection"] == "topk")
    assert two["value"] != one["value"]
    with pytest.raises(UserError, match=r"d_sae \(had 48, got 50\)"):
        study(dataclasses.replace(settings, d_sae=50))
    text = dataclasses.replace(settings.text, seed=5)
    with pytest.raises(UserError, match="settings of the study"):
        study(dataclasses.replace(settings, text=text))


def test_figures_and_table(settings, finished, tmp_path):
    found, _ = finished
    names = dict(zip(settings.selections, ("Priced", "TopK", "Paper")))
    assert [path.name for path in write_figures(found, names, tmp_path)] == ["pareto.png", "controls.png"]
    assert all(path.stat().st_size > 10_000 for path in tmp_path.iterdir())
    table = lines(found, names)
    assert len({len(line) for line in table}) == 1
    assert len(table) == 1 + len(found["fvu"])
    topk = next(line for line in table if line[2:4] == ["TopK", "its own rule"])
    assert topk[6] == ""


def test_bad_settings(settings, tmp_path, capsys):
    for field, value, message in (
        ("budgets", (), "budgets: got \\(\\), needs at least one"),
        ("seeds", (1, 1), "seeds: got .*none twice"),
        ("lrs", (0.0,), "lrs: got 0.0"),
        ("steps", 0, "steps: got 0"),
        ("ce_selections", ("adaptivek",), "ce_selections: got adaptivek"),
        ("calibration_share", 1.0, "calibration_share"),
        ("other_budgets", (1000,), "1000, needs a number from 1 to d_sae"),
    ):
        with pytest.raises(UserError, match=message):
            study(dataclasses.replace(settings, output=tmp_path / "bad", **{field: value}))
    assert not (tmp_path / "bad").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")
    fails(capsys, "which holds other files", "study", output=tmp_path / "other")
