"""`aksae eval` on another text, layer or model than the run's: against what is computed by hand."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from aksae import SAE, SAEConfig, TopK, TrainConfig, calibrate
from aksae.activations import LanguageModel
from aksae.config import ModelConfig, TextChoice, TextConfig
from aksae.elsewhere import evaluate_elsewhere
from aksae.runs import start_run
from aksae.sites import Site
from aksae.text import whole_contexts
from command_line import call, fails
from finished_runs import TOKENS
from language_models import WIDTH, write_documents

DOCUMENTS = 30


@pytest.fixture(scope="module")
def other_text(tmp_path_factory):
    """Documents that no run has read, one context each."""
    return write_documents(tmp_path_factory.mktemp("text") / "others.txt", DOCUMENTS, TOKENS)


@pytest.fixture
def copied(finished, tmp_path):
    """A run that may be changed."""
    return lambda kind: Path(shutil.copytree(finished(kind), tmp_path / kind))


@pytest.fixture(scope="module")
def lm(saved, tmp_path_factory):
    config = ModelConfig(str(saved("llama")), 1, device="cpu")
    return LanguageModel.load(config, tmp_path_factory.mktemp("cache"))


def evaluated(run: Path, tmp_path: Path, *words: str, **options) -> dict:
    """What `aksae eval` writes."""
    out = tmp_path / "evaluated.json"
    assert call("eval", run, *words, "--overwrite", **options, out=out) == 0
    return json.loads(out.read_text())


def rows_by_hand(lm: LanguageModel, text: Path, site: Site) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The token numbers of each document, and what passes the site at all of its tokens but the first."""
    ids = [torch.tensor(lm.tokenizer(document)["input_ids"]) for document in text.read_text().split("\n\f\n")]
    ones = torch.ones(1, TOKENS)
    return ids, [lm.read(each[None], ones, [site])[site][0, 1:] for each in ids]


@pytest.mark.parametrize("kind", ["priced", "mean"])
def test_with_the_runs_own_text_the_rows_are_those_held_out(finished, tmp_path, kind, capsys):
    run = finished(kind)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    got = evaluated(run, tmp_path, "--metrics", "reconstruction")
    recorded = json.loads((run / "eval.json").read_text())
    assert got["held_out"]
    assert got["rows"] == recorded["rows"]
    assert got["models"].keys() == recorded["models"].keys()
    for name, metrics in recorded["models"].items():
        assert got["models"][name] == pytest.approx(metrics, rel=1e-5), name
    assert got["checkpoints"] == recorded["checkpoints"]
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert "8 documents that the run held out" in capsys.readouterr().out


def test_another_text_and_another_layer(finished, other_text, lm, tmp_path, monkeypatch, capsys):
    run = finished("priced")
    monkeypatch.chdir(other_text.parent)
    options = {"text.source": other_text.name, "model.layer": 0, "model.device": "cpu", "model.batch-size": 3}
    got = evaluated(run, tmp_path, **options)
    said = capsys.readouterr()
    assert f"{DOCUMENTS * (TOKENS - 1)} tokens of {DOCUMENTS} documents: {other_text}, " in said.out
    assert "note: " not in said.err
    assert not got["held_out"]
    assert (got["site"], got["text"]["source"]) == ("layers.0.resid_post", str(other_text))
    x = torch.cat(rows_by_hand(lm, other_text, Site(0))[1])
    sae = SAE.from_pretrained(run / "priced")
    with torch.no_grad():
        codes = sae.encode(x)
        error = (sae.decode(codes) - x).square().sum()
    metrics = got["models"]["priced"]
    assert metrics["fvu"] == pytest.approx(float(error / (x - x.mean(0)).square().sum()), rel=1e-4)
    assert metrics["l0_mean"] == pytest.approx(float(codes.counts.double().mean()), abs=0.01)
    assert metrics["k_mean"] == 4
    # Another place in the block.
    assert evaluated(run, tmp_path, **options, site="mlp_out")["models"]["priced"]["mse"] != metrics["mse"]


@pytest.mark.parametrize(("reads", "train_on"), [("last", "all"), ("mean", "all"), ("mean", "last")])
def test_k_comes_from_the_context(copied, other_text, lm, tmp_path, reads, train_on):
    """AdaptiveK as the paper has it, in metrics and spliced, with a hook of the test's own."""
    run, site = copied("mean"), Site(1)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "train_on": train_on}))
    sae = SAE.from_pretrained(run / "adaptivek")
    sae.config.selection = dataclasses.replace(sae.config.selection, probe=reads)
    ids, rows = rows_by_hand(lm, other_text, site)
    read = [x.mean(0) if reads == "mean" else x[-1] for x in rows]
    # Far apart, whatever a few steps of training have made of the probe.
    sae.probe.weight.data = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))
    spread = torch.stack(read) @ sae.probe.weight
    sae.probe.weight.data *= 4 / spread.std()
    sae.probe.bias.data = 5 - (4 / spread.std()) * spread.mean()
    sae.save_pretrained(run / "adaptivek")
    got = evaluated(run, tmp_path, "--metrics", "reconstruction", "ce", **{"text.source": other_text})

    change: dict[str, torch.Tensor] = {}
    block = lm.model.model.layers[1]
    handle = block.register_forward_hook(lambda module, args, output: change.get("to", output))
    xs, errors, ks, losses, divergences = [], [], [], [], []
    with torch.no_grad():
        for number, x in enumerate(rows):
            k = int(sae.k_for(read[number]))
            x_hat = sae.decode(sae.encode(x, k=k))
            kept = slice(None) if train_on == "all" else slice(-1, None)
            xs.append(x[kept])
            errors.append((x - x_hat)[kept].square().sum())
            ks.append(torch.full((len(x[kept]),), k))
            hidden = lm.read(ids[number][None], torch.ones(1, TOKENS), [site])[site].clone()
            hidden[0, 1:] = x_hat
            clean = lm.model(input_ids=ids[number][None]).logits[0, :-1]
            change["to"] = hidden
            logits = lm.model(input_ids=ids[number][None]).logits[0, :-1]
            change.clear()
            losses.append(F.cross_entropy(logits, ids[number][1:]) - F.cross_entropy(clean, ids[number][1:]))
            divergences.append(F.kl_div(logits.log_softmax(-1), clean.softmax(-1), reduction="batchmean"))
    handle.remove()
    x, k = torch.cat(xs), torch.cat(ks).double()
    assert len(k.unique()) > 3
    metrics = got["models"]["adaptivek"]
    assert got["rows"] == len(x)
    assert metrics["k_mean"] == pytest.approx(float(k.mean()))
    assert metrics["fvu"] == pytest.approx(float(sum(errors) / (x - x.mean(0)).square().sum()), rel=1e-4)
    assert metrics["ce_damage"] == pytest.approx(float(sum(losses)) / DOCUMENTS, abs=1e-5)
    assert metrics["kl"] == pytest.approx(float(sum(divergences)) / DOCUMENTS, abs=1e-5)
    assert metrics["kl"] > 1e-4


def test_several_saes_and_a_price_set_anew(copied, other_text, lm, tmp_path, capsys):
    run = copied("priced")
    options = {"text.source": other_text, "model.layer": 0}
    # Where fewer latents pay: L0 is another than the budget.
    sae = SAE.from_pretrained(run / "priced")
    sae.price.mul_(4)
    sae.save_pretrained(run / "priced")
    stands = evaluated(run, tmp_path, **options)
    capsys.readouterr()
    anew = evaluated(run, tmp_path, "--recalibrate", "--metrics", "ce", **options)
    assert "285 tokens of other documents set prices and biases" in capsys.readouterr().out
    assert (anew["documents"], anew["rows"], anew["calibrated"]) == (15, 285, 285)
    assert list(stands["models"]) == list(anew["models"]) == ["priced", "topk"]
    assert stands["models"]["priced"]["l0_mean"] < 3
    contexts = whole_contexts(TextConfig(str(other_text), context_length=TOKENS), lm.tokenizer)
    x = lm.read(contexts.input_ids, contexts.attention_mask, [Site(0)])[Site(0)][:, 1:]
    by_hand = SAE.from_pretrained(run / "priced")
    calibrate(by_hand, x[:15].reshape(-1, WIDTH))
    counts = by_hand.encode(x).counts.double()
    assert float(counts[:15].mean()) == pytest.approx(4, abs=0.02)
    assert anew["models"]["priced"]["l0_mean"] == pytest.approx(float(counts[15:].mean()), abs=0.02)
    assert "fvu" not in anew["models"]["priced"]
    # The checkpoint is as it was.
    assert torch.equal(SAE.from_pretrained(run / "priced").price, sae.price)


def test_an_sae_of_a_run_and_one_by_itself(finished, copied, other_text, saved, tmp_path, monkeypatch, capsys):
    run = copied("mean")
    assert list(evaluated(run / "topk", tmp_path)["models"]) == ["topk"]
    alone = Path(shutil.copytree(run / "topk", tmp_path / "alone"))
    monkeypatch.setenv("AKSAE_CACHE", str(tmp_path / "cache"))
    named = {"model.name": saved("llama"), "model.layer": 1, "model.device": "cpu"}
    fails(capsys, "model.name and model.layer: got none", "eval", alone, **{"text.source": other_text})
    fails(capsys, "text.source: got none, needs the text to evaluate on: .*alone does not say", "eval", alone, **named)
    text = {"text.source": other_text, "text.context-length": TOKENS}
    assert call("eval", alone, **named, **text) == 0
    (file,) = alone.glob("eval-*.json")
    assert file.name.startswith(f"eval-{saved('llama').name}-layers.1.resid_post-others.txt-")
    # The same as in its run, under the name of its folder.
    there = evaluated(run / "topk", tmp_path, **text)
    assert json.loads(file.read_text())["models"] == {"alone": there["models"]["topk"]}
    fails(capsys, f"out: got .*{file.name}, which exists, needs a new file", "eval", alone, **named, **text)
    # The digits tell other settings apart, and not where a model runs.
    assert call("eval", alone, "--overwrite", **{**named, "model.batch-size": 2}, **text) == 0
    assert call("eval", alone, **{**named, "model.dtype": "bfloat16"}, **text) == 0
    assert len(list(alone.glob("eval-*.json"))) == 2


def test_what_may_have_been_trained_on_is_said(copied, tmp_path, capsys):
    run = copied("priced")
    other_cut = evaluated(run, tmp_path, **{"text.seed": 3})
    assert "documents.txt is what the run read, and its settings are others: all of it" in capsys.readouterr().err
    assert (other_cut["held_out"], other_cut["documents"]) == (False, 40)
    data = json.loads((run / "data.json").read_text())
    (run / "data.json").write_text(json.dumps({**data, "train contexts": "others"}))
    assert not evaluated(run, tmp_path, **{"model.layer": 0})["held_out"]
    assert "documents.txt is what the run read, and its contexts are others now: all of it" in capsys.readouterr().err


def test_the_text_in_place_of_a_runs():
    known = TextConfig("/there/a.jsonl", column="body", subset="small", context_length=64, heldout_fraction=0.3)
    assert TextChoice().over(known) == known
    assert TextChoice("/there/a.jsonl", seed=1).over(known).column == "body"
    other = TextChoice("b.jsonl", max_tokens=7).over(known)
    assert (other.column, other.subset, other.context_length, other.max_tokens) == ("text", None, 64, 7)
    assert TextChoice(seed=1).over(None) is None
    assert TextChoice("b.jsonl", seed=1).over(None) == TextConfig("b.jsonl", seed=1)


def test_a_text_as_a_whole_is_all_of_its_documents(lm, other_text, tmp_path):
    config = TextConfig(str(other_text), context_length=TOKENS)
    whole = whole_contexts(config, lm.tokenizer)
    assert sorted(whole.texts) == sorted(other_text.read_text().split("\n\f\n"))
    # One document is enough, and a budget ends it.
    single = tmp_path / "single.txt"
    single.write_text("w1 w2 w3 w4 " * 40)
    assert len(whole_contexts(TextConfig(str(single), context_length=TOKENS), lm.tokenizer)) == 8
    assert len(whole_contexts(TextConfig(str(single), context_length=TOKENS, max_tokens=40), lm.tokenizer)) == 2


def test_what_cannot_be_evaluated_ends_in_one_line(copied, lm, other_text, saved, tmp_path, capsys):
    run = copied("mean")
    SAE(SAEConfig(WIDTH, 32, TopK(2), d_out=WIDTH)).save_pretrained(tmp_path / "transcoder")
    single = tmp_path / "single.txt"
    single.write_text("w1 w2 w3 w4 " * 40)
    own = {"model.layer": 1}
    for path, message, words, options in (
        (run, "out: got .*eval.json, the run's own evaluation, needs another", ["--overwrite"], {"out": "eval.json"}),
        (run, r"out: got mine\.txt, needs a name that ends in \.json", [], {"out": "mine.txt"}),
        (run, "recalibrate: got AdaptiveK, k = 2..8 and TopK, k = 4, needs an SAE with", ["--recalibrate"], {}),
        (run, "model.layer: got 3, needs 0 to 2", [], {"model.layer": 3}),
        (run, "text.source: .*nowhere.txt", [], {"text.source": "nowhere.txt"}),
        (run, "text.max_tokens: got 19, needs a number from 20 up", [], {"text.max-tokens": 19}),
        (run, "predicts no next token", ["--metrics", "ce"], {"model.name": saved("bert")}),
        (tmp_path / "transcoder", "transcoder: got a transcoder, needs an autoencoder", [],
         {"model.name": saved("llama"), "text.source": other_text}),
        (tmp_path, "run: got .*, needs the folder of an `aksae train` run", [], {}),
    ):  # fmt: skip
        if options.get("out") == "eval.json":
            options = {"out": run / "eval.json"}
        fails(capsys, message, "eval", path, *words, **{**own, **options})
    fails(
        capsys, "recalibrate: got text of 1 document, needs 2",
        "eval", copied("priced"), "--recalibrate", **{"text.source": single},
    )  # fmt: skip


def test_a_run_that_is_overwritten_leaves_no_evaluation(tmp_path):
    for name in ("config.json", "eval-m-layers.1.resid_post-a.txt-01234567.json", "mine.json"):
        (tmp_path / name).write_text("{}")
    start_run(TrainConfig(output=tmp_path, overwrite=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "mine.json"]


def test_from_python(finished, other_text, tmp_path):
    choice = TextChoice(str(other_text))
    done = evaluate_elsewhere(finished("mean") / "topk", text=choice, metrics=["ce"], out=tmp_path / "a.json")
    assert done.file == tmp_path / "a.json"
    assert json.loads(done.file.read_text()) == done.evaluation
    metrics = done.evaluation["models"]["topk"]
    losses = done.evaluation["cross_entropy"]
    assert metrics["recovered_zero"] == pytest.approx(
        1 - metrics["ce_damage"] / (losses["zero_ablated"] - losses["clean"])
    )
