"""The command line from text to report on a tiny model, and every kind of bad input."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil

import pytest
import safetensors.torch
import torch
from aksae import AdaptiveKSAE, cli

transformers = pytest.importorskip("transformers")

WORDS = [f"{a}{b}" for a in ("ka", "lo", "mi", "ne", "ru", "sto") for b in ("ba", "den", "fil", "gor", "hin")]
TOKENS = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of a random Llama of two blocks, with a word tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["?", *WORDS])}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS) + 1,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """60 documents of 24 words each, one context per document."""
    path = tmp_path_factory.mktemp("text") / "documents.txt"
    draw = random.Random(0)
    path.write_text("\n\f\n".join(" ".join(draw.choices(WORDS, k=TOKENS)) for _ in range(60)))
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def inputs(model, text, cache):
    return {
        "model.name": model,
        "model.layer": 1,
        "model.device": "cpu",
        "text.source": text,
        "text.context-length": TOKENS,
        "text.heldout-fraction": 0.2,
        "cache": cache,
    }


@pytest.fixture(scope="module")
def settings(inputs):
    return {
        **inputs,
        "d-sae": 64,
        "k-min": 2,
        "k-max": 12,
        "steps": 30,
        "batch-size": 64,
        "dead-after": 300,
        "checkpoint-every": 10,
        "device": "cpu",
    }


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    """Folder of a finished run."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert call("train", **settings, output=folder) == 0
    return folder


def call(*words, **options) -> int:
    flags = [str(part) for key, value in options.items() for part in (f"--{key}", value)]
    return cli.main([*map(str, words), *flags])


def fails(capsys, message, *words, status=2, **options) -> str:
    """The command ends with `status` and one line on stderr that matches `message`."""
    capsys.readouterr()
    assert call(*words, **options) == status
    # Progress bars rewrite their line.
    lines = [line for line in re.split(r"[\r\n]+", capsys.readouterr().err) if line.startswith("aksae: ")]
    assert len(lines) == 1
    assert re.search(message, lines[0]), lines[0]
    return lines[0]


def test_a_run_leaves_everything(finished):
    assert sorted(os.listdir(finished)) == [
        "adaptivek", "config.json", "data.json", "eval.json", "metrics.jsonl", "probe.json", "report.html", "topk"
    ]  # fmt: skip
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [(r["model"], r["step"]) for r in records] == [
        (model, step) for model in ("adaptivek", "topk") for step in (0, 10, 20, 29)
    ]
    assert {r["phase"] for r in records if r["model"] == "adaptivek"} == {2, 3}
    evaluation = json.loads((finished / "eval.json").read_text())
    adaptive, topk = (AdaptiveKSAE.from_pretrained(finished / name) for name in ("adaptivek", "topk"))
    assert adaptive.config.probe_lambda == json.loads((finished / "probe.json").read_text())["lambda"]
    assert topk.config.k == pytest.approx(evaluation["models"]["adaptivek"]["l0_mean"], abs=0.5)
    assert evaluation["rows"] == len(evaluation["contexts"]) * (TOKENS - 1)
    for entry in evaluation["top_contexts"]:
        assert all(set(example["tokens"]) <= set(WORDS) for example in entry["examples"])


def test_a_second_run_reads_labels_and_activations_again(finished, settings, tmp_path, monkeypatch):
    from aksae import activations, data

    def never(*args, **kwargs):
        raise AssertionError("should have come from the cache")

    monkeypatch.setattr(data, "score_contexts", never)
    monkeypatch.setattr(activations.LanguageModel, "residual", never)
    assert call("train", **settings, output=tmp_path / "again") == 0
    first, second = ((folder / "eval.json").read_text() for folder in (finished, tmp_path / "again"))
    assert first == second


def test_eval_and_report_of_a_run(finished, tmp_path, capsys):
    folder = shutil.copytree(finished, tmp_path / "copy")
    evaluation = (folder / "eval.json").read_text()
    (folder / "eval.json").unlink()
    (folder / "report.html").unlink()
    assert call("eval", folder) == 0
    table = capsys.readouterr().out
    assert re.search(r"^ +FVU +expl\. var\. .*dead$", table, re.MULTILINE)
    assert re.search(r"^AdaptiveK( +[\d.e+-]+%?){10}$", table, re.MULTILINE)
    assert re.search(r"^TopK( +[\d.e+-]+%?){10}$", table, re.MULTILINE)
    assert (folder / "eval.json").read_text() == evaluation
    assert call("report", folder) == 0
    assert str(folder / "report.html") in capsys.readouterr().out
    assert (folder / "report.html").stat().st_size > 1000


def test_eval_refuses_other_heldout_contexts(settings, text, tmp_path, capsys):
    source, folder = tmp_path / "documents.txt", tmp_path / "run"
    shutil.copy(text, source)
    assert call("train", **{**settings, "steps": 2, "text.source": source}, output=folder) == 0
    source.write_text("\n\f\n".join(source.read_text().split("\n\f\n")[:-9]))
    before = (folder / "eval.json").read_text()
    fails(capsys, "got held-out contexts other than the run's, needs the same", "eval", folder)
    assert (folder / "eval.json").read_text() == before


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_labels_go_to_a_file_and_come_back(inputs, settings, tmp_path, capsys, suffix):
    labels = tmp_path / f"labels{suffix}"
    assert call("label", **inputs, out=labels) == 0
    assert "60 contexts with a score" in capsys.readouterr().out
    if suffix == ".jsonl":
        rows = [json.loads(line) for line in labels.read_text().splitlines()]
    else:
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(labels).to_pylist()
    assert len(rows) == 60
    assert {row["split"] for row in rows} == {"train", "heldout"}
    assert all(0 <= row["complexity_score"] <= 10 and len(row["text"].split()) == TOKENS for row in rows)
    assert os.listdir(tmp_path) == [labels.name]

    if suffix == ".jsonl":
        # Contexts without a score are left out, and said to be.
        labels.write_text("".join(json.dumps(row) + "\n" for row in rows if row is not rows[0]))
        options = {**settings, "labels.scorer": "file", "labels.file": labels, "steps": 2, "output": tmp_path / "run"}
        assert call("train", "--no-baseline", **options) == 0
        assert json.loads((tmp_path / "run" / "probe.json").read_text())["scores"] == {"scored": 59, "failed": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model.name": "./no-such-model"}, r"model\.name: .*no-such-model"),
        ({"model.layer": 2}, r"model\.layer: got 2, needs 0 to 1"),
        ({"text.source": "missing.txt"}, r"text\.source: .*missing\.txt"),
        ({"text.source": "empty.txt"}, r"text\.source: .*empty\.txt is empty"),
        ({"text.source": "binary.txt"}, r"text\.source: .*binary\.txt"),
        ({"labels.scorer": "file"}, r"labels\.file: got none"),
        ({"labels.scorer": "file", "labels.file": "no score.jsonl"}, "complexity_score"),
        ({"labels.scorer": "file", "labels.file": "no number.jsonl"}, "complexity_score|row|line"),
        ({"labels.scorer": "file", "labels.file": "out of range.jsonl"}, r"11.* 0|11.*10"),
        ({"k-min": 13}, "k_min: got 13, needs at most k_max = 12"),
        ({"k-max": 65}, "k_max: got 65, needs at most d_sae = 64"),
        ({"device": "abacus"}, "device: got 'abacus'"),
        ({"score-max": 1}, r"score_max: got 1.0, needs at least [\d.]+, the highest label"),
        ({"output": "empty.txt/run"}, "output: got empty.txt/run, needs a folder"),
        ({"cache": "empty.txt/cache"}, "cache: got empty.txt/cache .*, needs a folder that can be written"),
        ({"text.source": "~nobody-of-this-name/x.txt"}, "text.source: got ~nobody-of-this-name/x.txt, needs a path"),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_bad_input_ends_in_one_line(settings, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 8)
    for name, row in (
        ("no score", {"text": "a"}),
        ("no number", {"text": "a", "complexity_score": "high"}),
        ("out of range", {"text": "a", "complexity_score": 11}),
    ):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    before = sorted(os.listdir(tmp_path))
    fails(capsys, message, "train", **{**settings, "output": tmp_path / "run", **options})
    assert sorted(os.listdir(tmp_path)) == before


def test_a_folder_with_a_run_is_not_overwritten_unasked(finished, settings, tmp_path, capsys):
    folder = shutil.copytree(finished, tmp_path / "run")
    fails(capsys, "output: got .*run, which holds another run, needs", "train", **settings, output=folder)
    assert (folder / "eval.json").read_text() == (finished / "eval.json").read_text()
    assert call("train", "--overwrite", **{**settings, "steps": 2}, output=folder) == 0
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize("kind", ["truncated", "shape", "dtype", "another model"])
def test_a_broken_checkpoint_is_named(finished, tmp_path, capsys, kind):
    folder = shutil.copytree(finished, tmp_path / "run")
    weights, config = folder / "topk" / "sae.safetensors", folder / "topk" / "config.json"
    if kind == "truncated":
        os.truncate(weights, 3000)
        message = r"tensor [\w.]+: got a file of 3000 bytes, needs \d+"
    elif kind == "shape":
        config.write_text(config.read_text().replace('"d_sae": 64', '"d_sae": 65'))
        message = r"tensor \w+: got shape \[64.*, needs \[65"
    elif kind == "dtype":
        tensors = safetensors.torch.load_file(weights)
        safetensors.torch.save_file({**tensors, "b_enc": tensors["b_enc"].int()}, weights)
        message = "tensor b_enc: got torch.int32, needs the one floating dtype"
    else:
        shutil.rmtree(folder / "adaptivek")
        shutil.copytree(folder / "topk", folder / "adaptivek")
        message = "adaptivek: got the checkpoint of another run"
    fails(capsys, message, "eval", folder)
    assert (folder / "eval.json").read_text() == (finished / "eval.json").read_text()


@pytest.mark.parametrize(("command", "message"), [("eval", "needs a JSON file"), ("report", "run")])
def test_a_folder_without_a_run(tmp_path, capsys, command, message):
    fails(capsys, message, command, tmp_path)


@pytest.mark.parametrize("out", ["labels.csv", "no-such-folder/labels.jsonl"])
def test_a_label_file_that_cannot_be_written(inputs, tmp_path, capsys, out):
    fails(capsys, "out: got .*labels", "label", **inputs, out=tmp_path / out)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere"), 2, "aksae: somewhere: the disk is full"),
        (KeyboardInterrupt(), 130, "aksae: interrupted; the last checkpoint stays valid"),
    ],
    ids=["full disk", "Ctrl-C"],
)
def test_a_run_that_is_cut_off_keeps_its_last_checkpoint(
    settings, tmp_path, monkeypatch, capsys, error, status, message
):
    from aksae import files

    calls, replace = [], os.replace

    def cut_off(source, target):
        # After the first checkpoint, while the second one's weights are about to take its place.
        if str(target).endswith("sae.safetensors"):
            calls.append(target)
            if len(calls) == 2:
                raise error
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", cut_off)
    fails(capsys, message, "train", status=status, **settings, output=tmp_path / "run")
    AdaptiveKSAE.from_pretrained(tmp_path / "run" / "adaptivek")
    assert sorted(os.listdir(tmp_path / "run" / "adaptivek")) == ["config.json", "sae.safetensors"]


def test_other_errors_are_not_hidden(monkeypatch, tmp_path):
    from aksae import report

    def broken(folder):
        raise FileNotFoundError(errno.ENOENT, "a bug", "x")

    monkeypatch.setattr(report, "write_report", broken)
    with pytest.raises(FileNotFoundError, match="a bug"):
        call("report", tmp_path)


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in ("label", "train", "eval", "report", "convert"))
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--steps", "many"])
    assert stop.value.code == 2
