"""Runs without labels, from the command line: on activations of one's own, on collected ones, on text and streamed."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from aksae import (
    SAE,
    BatchTopK,
    JumpReLU,
    Matryoshka,
    ModelConfig,
    Need,
    Priced,
    SAEConfig,
    TextConfig,
    TopK,
    TrainConfig,
    open_activations,
)
from aksae.callbacks import JsonLines
from aksae.unlabelled import _read
from command_line import call, fails
from language_models import WIDTH, write_documents

ROOT = Path(__file__).resolve().parent.parent
D, F, TOKENS = 8, 32, 20
SELECTIONS = {
    "priced": Priced(4),
    "need": Need(4),
    "topk": TopK(4),
    "batch-topk": BatchTopK(4),
    "jumprelu": JumpReLU(4),
    "matryoshka": Matryoshka(BatchTopK(4), (2, 8, 32)),
}


@pytest.fixture(scope="module")
def activations(tmp_path_factory):
    """A folder of three files, 600 rows together."""
    folder = tmp_path_factory.mktemp("activations")
    random_state = np.random.default_rng(0)
    active = random_state.random((600, 20))
    x = (active * (active > 0.8)) @ random_state.standard_normal((20, D)) * 4 + 1
    for number, part in enumerate(np.split(x.astype(np.float32), 3)):
        np.save(folder / f"x{number}.npy", part)
    return folder


@pytest.fixture
def settings(activations, tmp_path):
    return {
        "activations": activations,
        "k": 4,
        "d-sae": F,
        "steps": 30,
        "batch-size": 32,
        "checkpoint-every": 7,
        "dead-after": 500,
        "device": "cpu",
        "output": tmp_path / "run",
    }


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """40 documents of 20 words each, one context per document."""
    return write_documents(tmp_path_factory.mktemp("text") / "documents.txt", 40, TOKENS)


@pytest.fixture
def source(saved, text, tmp_path):
    """Model and text."""
    return {
        "model.name": saved("llama"),
        "model.layer": 1,
        "model.device": "cpu",
        "text.source": text,
        "text.context-length": TOKENS,
        "text.heldout-fraction": 0.2,
        "cache": tmp_path / "cache",
    }


@pytest.fixture
def no_report(monkeypatch):
    """Nothing is drawn, which would take most of a small run's time."""
    monkeypatch.setattr("aksae.report.write_report", lambda run: None)


@pytest.mark.parametrize("name", SELECTIONS)
def test_every_selection_on_files_of_ones_own(settings, tmp_path, capsys, name):
    assert call("train", **settings, selection=name) == 0
    table = capsys.readouterr().out
    assert "60 held-out tokens" in table
    run, compared = tmp_path / "run", name in ("priced", "need")
    beside = ["report.html", "topk"] if compared else []
    assert sorted(os.listdir(run)) == sorted(["config.json", "data.json", "eval.json", "metrics.jsonl", name, *beside])
    sae = SAE.from_pretrained(run / name)
    assert sae.config.selection == SELECTIONS[name]
    assert sae.config.input_scale != 1
    evaluation = json.loads((run / "eval.json").read_text())
    # The last tenth of the rows was held out, and is what is evaluated.
    x = open_activations(settings["activations"]).rows(torch.arange(540, 600))
    with torch.no_grad():
        error = (sae(x) - x).square().sum() / (x - x.mean(0)).square().sum()
    assert evaluation["models"][name]["fvu"] == pytest.approx(float(error), rel=1e-4)
    assert evaluation["models"][name]["k_mean"] == 4
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    models = [name, "topk"] if compared else [name]
    assert list(evaluation["models"]) == models
    assert [(record["model"], record["step"]) for record in records] == [
        (model, step) for model in models for step in (0, 10, 20, 29)
    ]
    assert all(0 <= record["data_wait"] <= 1 for record in records)
    before = (run / "eval.json").read_text()
    assert call("eval", run) == 0
    assert (run / "eval.json").read_text() == before
    if not compared:
        message = rf"is one of {name}, of which `aksae eval` prints all there is; needs adaptivek, priced, need"
        fails(capsys, message, "report", run)
        return
    report = (run / "report.html").read_text()
    assert call("report", run) == 0
    assert (run / "report.html").read_text() == report
    assert "no text is known of them" in report
    assert evaluation["sample"] == {"rows": 60, "unit": "rows"}
    assert "spending" not in evaluation
    assert ("walks" in evaluation) == (name == "priced")


def test_by_default_latents_have_a_price_and_topk_of_equal_l0_stands_beside_it(settings, source, tmp_path, capsys):
    del settings["activations"]
    assert call("train", **settings, **source) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^AdaptiveK \(priced\) .*^TopK ", shown, re.MULTILINE | re.DOTALL)
    assert f"report: {tmp_path / 'run' / 'report.html'}" in shown
    priced, topk = (SAE.from_pretrained(tmp_path / "run" / name) for name in ("priced", "topk"))
    assert priced.config.selection == Priced(4)
    assert topk.config.selection == TopK(4)
    evaluation = json.loads((tmp_path / "run" / "eval.json").read_text())
    l0 = [evaluation["models"][name]["l0_mean"] for name in ("priced", "topk")]
    assert l0 == pytest.approx([4, 4], abs=0.05)
    # Both read the same rows in the same order, from the same weights on.
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first = {record["model"]: record["fvu"] for record in records if record["step"] == 0}
    assert first["priced"] == first["topk"]
    assert evaluation["sample"]["unit"] == "documents"
    report = (tmp_path / "run" / "report.html").read_text()
    assert "AdaptiveK (priced) and TopK on held-out documents" in report
    assert "Most latents" in report
    assert report.count('id="walk-') > 6


def test_rows_know_their_tokens_and_documents_in_whatever_order_they_come(saved, tmp_path):
    """Documents of many lengths, which a stream reads the longest first."""
    words = [f"w{i % 49 + 1}" for i in range(2000)]
    lengths = [18 + 37 * i % 90 for i in range(20)]
    (tmp_path / "text.txt").write_text("\n\f\n".join(" ".join(words[i * 61 :][:n]) for i, n in enumerate(lengths)))
    text = TextConfig(str(tmp_path / "text.txt"), context_length=24, heldout_fraction=0.4, max_tokens=1000)
    model = ModelConfig(str(saved("llama")), layer=1, device="cpu", batch_size=3)
    config = TrainConfig(model=model, text=text, cache=tmp_path / "cache", batch_size=16)
    stored, streamed = (_read(dataclasses.replace(config, stream=stream)).heldout for stream in (False, True))
    assert len(stored) == len(streamed) == len(stored.text.tokens)
    assert not torch.equal(stored.text.contexts, streamed.text.contexts)
    x, same = stored.first_rows(len(stored)), streamed.first_rows(len(streamed))
    for context in stored.text.contexts.unique().tolist():
        rows, there = stored.text.rows_of(context), streamed.text.rows_of(context)
        torch.testing.assert_close(same[there], x[rows], rtol=1e-4, atol=1e-5)
        assert torch.equal(streamed.text.tokens[there], stored.text.tokens[rows])
        assert torch.equal(streamed.unit_of_row[there], stored.unit_of_row[rows])
    assert 1 < len(stored.unit_of_row.unique()) < len(stored.text.contexts.unique())
    assert len(stored.first_rows(5)) == 5
    assert stored.units(len(stored)).unique().tolist() == list(range(len(stored.unit_of_row.unique())))


def test_a_run_without_a_baseline(settings, tmp_path, capsys):
    assert call("train", "--no-baseline", **settings) == 0
    assert not (tmp_path / "run" / "topk").exists()
    evaluation = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert list(evaluation["models"]) == ["priced"]
    assert evaluation["pareto"]["differences"] == {}
    assert "nothing to compare it with" in (tmp_path / "run" / "report.html").read_text()
    assert call("eval", tmp_path / "run") == 0


def test_another_baseline_is_not_evaluated(settings, tmp_path, capsys, no_report):
    assert call("train", **settings) == 0
    other = SAE(SAEConfig(D, F, TopK(5)))
    (tmp_path / "run" / "eval.json").unlink()
    other.save_pretrained(tmp_path / "run" / "topk")
    message = r"topk: got the checkpoint of another run \(selection.k 5\), needs the run's \(selection.k 4\)"
    fails(capsys, message, "eval", tmp_path / "run")


def cut_off(monkeypatch, step, model=None):
    """Interrupt the next run once, at a step, in the training of a model."""
    log, cut = JsonLines.on_log, []

    def once(self, run, record):
        log(self, run, record)
        if not cut and record["step"] == step and model in (None, self.common["model"]):
            cut.append(record)
            raise KeyboardInterrupt

    monkeypatch.setattr(JsonLines, "on_log", once)


def test_a_run_with_a_baseline_that_was_cut_off_ends_with_the_same_bits(
    settings, tmp_path, monkeypatch, capsys, no_report
):
    """Cut off in the training of the one, and then of the other."""
    assert call("train", **{**settings, "output": tmp_path / "whole"}) == 0
    cut_off(monkeypatch, 20, "priced")
    fails(capsys, "interrupted", "train", status=130, **settings)
    assert not (tmp_path / "run" / "topk").exists()
    cut_off(monkeypatch, 20, "topk")
    fails(capsys, "interrupted", "train", status=130, resume=tmp_path / "run")
    assert (tmp_path / "run" / "topk").exists()
    assert call("train", resume=tmp_path / "run") == 0
    for name in ("priced", "topk"):
        whole, ended = (SAE.from_pretrained(tmp_path / run / name).state_dict() for run in ("whole", "run"))
        assert all(torch.equal(whole[key], ended[key]) for key in whole)
    evaluations = [json.loads((tmp_path / run / "eval.json").read_text()) for run in ("whole", "run")]
    assert evaluations[0] == evaluations[1]


@pytest.mark.parametrize("kind", ["activations", "text", "stream"])
def test_a_run_that_was_cut_off_ends_with_the_same_bits(settings, source, tmp_path, monkeypatch, capsys, kind):
    if kind != "activations":
        del settings["activations"]
        settings |= source
    flags = ["--stream"] if kind == "stream" else []
    settings["selection"] = "batch-topk"
    assert call("train", *flags, **{**settings, "output": tmp_path / "whole"}) == 0
    cut_off(monkeypatch, 20)
    fails(capsys, "interrupted; the last checkpoint stays valid", "train", *flags, status=130, **settings)
    assert not (tmp_path / "run" / "eval.json").exists()
    assert call("train", resume=tmp_path / "run") == 0
    whole, ended = (SAE.from_pretrained(tmp_path / run / "batch-topk").state_dict() for run in ("whole", "run"))
    assert all(torch.equal(whole[name], ended[name]) for name in whole)
    evaluations = [json.loads((tmp_path / run / "eval.json").read_text()) for run in ("whole", "run")]
    assert evaluations[0]["models"] == evaluations[1]["models"]
    assert (tmp_path / "cache" / "activations").exists() == (kind == "text")


def test_other_activations_are_not_gone_on_with(settings, activations, tmp_path, monkeypatch, capsys):
    own = shutil.copytree(activations, tmp_path / "own")
    settings |= {"activations": own, "selection": "topk"}
    cut_off(monkeypatch, 20)
    fails(capsys, "interrupted", "train", status=130, **settings)
    np.save(own / "x1.npy", np.load(own / "x1.npy") + 1)
    fails(capsys, r"what the run was trained on differs in activations \(had", "train", resume=tmp_path / "run")
    fails(capsys, r"what the run was trained on differs in activations \(had", "eval", tmp_path / "run")


WRONG = {
    "no labels": (
        {"selection": "adaptivek"},
        r"selection: got adaptivek for activations .* no labels to fit a probe on; needs text in their place, or "
        "one of "
        "priced, need, topk, batch-topk, jumprelu, matryoshka",
    ),
    "nothing there": ({"activations": "nowhere"}, "activations: got nowhere, which does not exist, needs a file"),
    "k": ({"k": 33}, "k: got 33, needs a number from 1 to d_sae = 32"),
    "no k": ({"selection": "jumprelu", "k": 0}, "k: got 0, needs a number from 1 to d_sae = 32"),
    "labels": (
        {"labels.scorer": "surprisal"},
        "labels.scorer: got surprisal with the selection topk, which does not read it, needs the selection adaptivek",
    ),
    "the probe": ({"probe-reads": "mean"}, "probe_reads: got mean with the selection topk, which does not read it"),
    "rows": ({"train-on": "last"}, "train_on: got last, needs all with the selection topk"),
    "fraction": ({"text.heldout-fraction": 1}, "text.heldout_fraction: got 1.0, needs a number between 0 and 1"),
    "nothing held out": ({"text.heldout-fraction": 0.0001}, "got 600 rows, of which 0 would be held out"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_bad_settings_end_in_one_line(settings, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    fails(capsys, message, "train", **{"selection": "topk", **settings, **options})
    assert not os.listdir(tmp_path)


def test_prefixes_and_stream_are_checked(settings, source, tmp_path, capsys):
    prefixes = ["--prefixes", "8", "16"]
    fails(
        capsys, r"prefixes: got \(8, 16\), needs .* d_sae = 32", "train", *prefixes, **settings, selection="matryoshka"
    )
    fails(capsys, "stream: got True beside activations", "train", "--stream", **settings, selection="topk")
    del settings["activations"]
    settings["selection"] = "adaptivek"
    fails(capsys, "selection: got adaptivek with stream, whose probe", "train", "--stream", **settings, **source)


def test_nan_is_named_by_file_and_row(settings, activations, tmp_path, capsys):
    own = shutil.copytree(activations, tmp_path / "own")
    x = np.load(own / "x1.npy")
    x[17, 3] = np.nan
    np.save(own / "x1.npy", x)
    settings |= {"activations": own, "selection": "topk"}
    fails(capsys, "x1.npy: row 17: got nan, needs finite numbers", "train", **settings)
    assert (np.load(own / "x1.npy") == x).sum() == x.size - 1


def test_collected_activations_are_trained_on(settings, source, tmp_path, capsys, monkeypatch):
    out = tmp_path / "collected"
    collected = [*("--layers", "0", "1"), *("--sites", "resid_post", "mlp_out"), *("--shard-mb", "0.01")]
    assert call("collect", *collected, **source, out=out) == 0
    shown = capsys.readouterr().out
    names = ["layers.0.mlp_out", "layers.0.resid_post", "layers.1.mlp_out", "layers.1.resid_post"]
    assert sorted(os.listdir(out)) == names
    for name in names:
        assert re.search(rf"^{name}: 760 tokens x {WIDTH} in float32, 0.0 MB in ", shown, re.MULTILINE)
    assert re.search(r"^about \d+ s for 800 tokens, by a first batch of 160$", shown, re.MULTILINE)
    opened = open_activations(out / names[2])
    # Of held-out documents, as the text was split.
    assert opened.info["heldout_rows"] == 152
    settings |= {"activations": out / names[2], "selection": "topk"}
    assert call("train", **settings) == 0
    assert "152 held-out tokens" in capsys.readouterr().out
    fails(
        capsys,
        "or one of the folders in it: layers.0.mlp_out, layers.0",
        "train",
        **{**settings, "activations": out, "output": tmp_path / "x"},
    )

    # The same command opens what is there; another model's folder is refused.
    from aksae.activations import LanguageModel

    monkeypatch.setattr(LanguageModel, "read", lambda *args: pytest.fail("ran the model again"))
    assert call("collect", *collected, **source, out=out) == 0
    fails(
        capsys,
        r"other contexts \(other: contexts\), needs a new",
        "collect",
        *collected,
        **{**source, "text.seed": 1},
        out=out,
    )


def test_collecting_that_is_cut_off_goes_on(source, tmp_path, capsys, monkeypatch):
    from aksae.activations import LanguageModel

    read, calls = LanguageModel.read, []

    def interrupted(self, *arguments):
        calls.append(arguments)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return read(self, *arguments)

    monkeypatch.setattr(LanguageModel, "read", interrupted)
    options = {**source, "out": tmp_path / "out", "shard-mb": 0.01, "model.batch-size": 1}
    fails(capsys, "interrupted; .* as do shards of activations that were done", "collect", status=130, **options)
    left = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("shard-*")}
    assert left
    assert call("collect", **options) == 0
    assert {path: path.stat().st_mtime_ns for path in left} == left
    assert len(calls) < 12 + 40


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model.layer": 3}, r"model.layer: got 3, needs 0 to 2"),
        ({"out": "file"}, "out: got file, a file, needs a folder"),
        ({"shard-mb": 0}, "shard_mb: got 0.0, needs a number above 0"),
    ],
)
def test_what_cannot_be_collected(source, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    fails(capsys, message, "collect", **{"out": "out", **source, **options})
    assert not (tmp_path / "out").exists()


def test_a_run_on_text_that_is_cut_off_keeps_its_activations(source, settings, tmp_path, capsys, monkeypatch):
    """A run of AdaptiveK that is interrupted while activations are collected does not collect them again."""
    from aksae import collect as collecting
    from aksae import store

    publish, done = store.publish_shard, []

    def interrupted(*arguments):
        info = publish(*arguments)
        done.append(arguments[0])
        if len(done) == 2:
            raise KeyboardInterrupt
        return info

    monkeypatch.setattr(collecting, "publish_shard", interrupted)
    monkeypatch.setattr(collecting.collect, "__kwdefaults__", {**collecting.collect.__kwdefaults__, "shard_mb": 0.01})
    del settings["activations"], settings["k"]
    options = {**settings, **source, "selection": "adaptivek", "steps": 3, "k-min": 1, "k-max": 4}
    fails(capsys, "interrupted", "train", status=130, **options)
    left = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("shard-*")}
    assert len(left) == 2
    assert call("train", **options) == 0
    assert {path: path.stat().st_mtime_ns for path in left} == left
    assert len(done) == len(list((tmp_path / "cache").rglob("shard-*"))) > 2


def test_two_processes_train_on_shares_of_the_rows(settings, tmp_path):
    options = {**settings, "batch-size": 16}
    flags = [str(part) for key, value in options.items() for part in (f"--{key}", value)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "aksae"]
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'python'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, "train", *flags], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(record["model"], record["step"], record["rows"]) for record in records] == [
        (model, *numbers) for model in ("priced", "topk") for numbers in ((0, 32), (10, 352), (20, 672), (29, 960))
    ]
    evaluation = (tmp_path / "run" / "eval.json").read_text()
    assert json.loads(evaluation)["rows"] == 60
    assert call("eval", tmp_path / "run") == 0
    assert (tmp_path / "run" / "eval.json").read_text() == evaluation
