"""The command line from text to report on a tiny model, and every kind of bad input."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from aksae import AdaptiveKSAE, cli
from command_line import call, fails

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
        "selection": "adaptivek",
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


def test_a_run_leaves_everything(finished):
    assert sorted(os.listdir(finished)) == [
        "adaptivek", "config.json", "data.json", "eval.json", "labels.safetensors", "metrics.jsonl", "probe.json",
        "report.html", "topk",
    ]  # fmt: skip
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [(r["model"], r["step"]) for r in records] == [
        (model, step) for model in ("adaptivek", "topk") for step in (0, 10, 20, 29)
    ]
    assert {r["phase"] for r in records if r["model"] == "adaptivek"} == {2, 3}
    evaluation = json.loads((finished / "eval.json").read_text())
    adaptive, topk = (AdaptiveKSAE.from_pretrained(finished / name) for name in ("adaptivek", "topk"))
    assert adaptive.config.selection.probe_lambda == json.loads((finished / "probe.json").read_text())["lambda"]
    assert topk.config.selection.k == pytest.approx(evaluation["models"]["adaptivek"]["l0_mean"], abs=0.5)
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


def test_a_run_whose_config_names_no_selection_is_of_the_papers_mode(finished, tmp_path):
    """As those of before there were others."""
    folder = shutil.copytree(finished, tmp_path / "old")
    settings = json.loads((folder / "config.json").read_text())
    assert settings.pop("selection") == "adaptivek"
    (folder / "config.json").write_text(json.dumps(settings))
    evaluation = (folder / "eval.json").read_text()
    assert call("eval", folder) == 0
    assert (folder / "eval.json").read_text() == evaluation
    assert call("report", folder) == 0


def test_eval_and_report_of_a_run(finished, tmp_path, capsys):
    folder = shutil.copytree(finished, tmp_path / "copy")
    evaluation = (folder / "eval.json").read_text()
    (folder / "eval.json").unlink()
    (folder / "report.html").unlink()
    assert call("eval", folder) == 0
    table = capsys.readouterr().out
    assert re.search(r"^ +FVU +expl\. var\. .*dead$", table, re.MULTILINE)
    assert re.search(r"^AdaptiveK \(paper\)( +[\d.e+-]+%?){10}$", table, re.MULTILINE)
    assert re.search(r"^TopK( +[\d.e+-]+%?){10}$", table, re.MULTILINE)
    assert (folder / "eval.json").read_text() == evaluation
    assert call("report", folder) == 0
    assert str(folder / "report.html") in capsys.readouterr().out
    assert (folder / "report.html").stat().st_size > 1000


def edit(path, **changes) -> None:
    """Change entries of a JSON file; a name with a dot is an entry of an entry."""
    content = json.loads(path.read_text())
    for name, value in changes.items():
        *outer, last = name.split(".")
        entry = content
        for key in outer:
            entry = entry[key]
        entry[last] = value
    path.write_text(json.dumps(content))


@pytest.fixture
def own(settings, model, text, tmp_path):
    """A run of two steps with a model, a text and labels that a test may change: (folder, model, text, labels)."""
    own_model, own_text = shutil.copytree(model, tmp_path / "model"), shutil.copy(text, tmp_path / "documents.txt")
    rows = [{"text": line, "complexity_score": i % 10} for i, line in enumerate(own_text.read_text().split("\n\f\n"))]
    labels = tmp_path / "labels.jsonl"
    labels.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"model.name": own_model, "text.source": own_text, "labels.scorer": "file", "labels.file": labels}
    folder = tmp_path / "run"
    assert call("train", **{**settings, "steps": 2, **options}, output=folder) == 0
    return folder, own_model, own_text, labels


def change_weights(model) -> None:
    """Other weights in a file of the same size and times."""
    path = model / "model.safetensors"
    times, tensors = path.stat(), safetensors.torch.load_file(path)
    name = next(name for name in tensors if "layers.0" in name and "mlp" in name)
    safetensors.torch.save_file({**tensors, name: tensors[name] + 0.5}, path, metadata={"format": "pt"})
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_size == times.st_size


def change_vocabulary(model) -> None:
    path = model / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary[WORDS[0]], vocabulary[WORDS[1]] = vocabulary[WORDS[1]], vocabulary[WORDS[0]]
    path.write_text(json.dumps(content))


OTHER_THINGS = {
    "weights": (lambda run, model, text, labels: change_weights(model), r"model weights \(had \w{12}, got \w{12}\)"),
    "rope": (
        lambda run, model, text, labels: edit(model / "config.json", rms_norm_eps=0.1),
        r"differs in model configuration \(",
    ),
    "vocabulary": (lambda run, model, text, labels: change_vocabulary(model), r"differs in tokenizer \("),
    "layer": (
        lambda run, model, text, labels: edit(run / "config.json", **{"model.layer": 0}),
        r"model.layer \(had 1, got 0\)",
    ),
    "dtype": (
        lambda run, model, text, labels: edit(run / "config.json", **{"model.dtype": "bfloat16"}),
        r"model.dtype \(had float32, got bfloat16\)",
    ),
    "rows": (
        lambda run, model, text, labels: edit(run / "config.json", train_on="last"),
        r"train_on \(had all, got last\); needs the same: config.json",
    ),
    "text": (
        lambda run, model, text, labels: text.write_text("\n\f\n".join(text.read_text().split("\n\f\n")[:-9])),
        r"differs in .*held-out contexts \(.*documents.txt, its settings or, with python-prose, the installed packages",
    ),
    "seed": (
        lambda run, model, text, labels: edit(run / "config.json", **{"text.seed": 1}),
        r"differs in train contexts \(.*, held-out contexts \(",
    ),
    "label file": (
        lambda run, model, text, labels: labels.write_text(labels.read_text().replace('re": 9', 're": 8')),
        r"differs in labels \(.*labels.jsonl gives other scores now",
    ),
    "labels": (
        lambda run, model, text, labels: safetensors.torch.save_file(
            {"train": torch.ones(48), "heldout": torch.ones(12)}, run / "labels.safetensors"
        ),
        r"differs in labels \(.*labels.safetensors is another run's",
    ),
    "map": (
        lambda run, model, text, labels: edit(run / "adaptivek" / "config.json", **{"selection.k_map.steepness": 1.0}),
        r"of another run \(selection.k_map.steepness 1.0\), needs the run's \(selection.k_map.steepness 6.0\)",
    ),
    "penalty": (
        lambda run, model, text, labels: edit(run / "probe.json", **{"lambda": 0.5}),
        r"of another run \(selection.probe_lambda .*\), needs the run's \(selection.probe_lambda 0.5\)",
    ),
    "checkpoint": (
        lambda run, model, text, labels: spoil(run / "topk"),
        r"eval.json: the checkpoint that it is of differs in topk \(had .*with eval.json moved elsewhere",
    ),
    "no record": (
        lambda run, model, text, labels: (run / "data.json").write_text('{"heldout": "1"}'),
        "data.json: got a run that did not note what it was trained on",
    ),
}


def spoil(checkpoint) -> None:
    """Other weights of the same shapes."""
    tensors = safetensors.torch.load_file(checkpoint / "sae.safetensors")
    safetensors.torch.save_file({name: tensor + 1 for name, tensor in tensors.items()}, checkpoint / "sae.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(("change", "message"), OTHER_THINGS.values(), ids=OTHER_THINGS)
def test_eval_refuses_what_the_run_was_not_trained_on(own, capsys, change, message):
    folder = own[0]
    before = (folder / "eval.json").read_text()
    change(*own)
    fails(capsys, message, "eval", folder)
    assert (folder / "eval.json").read_text() == before


def test_a_run_is_evaluated_wherever_its_model_lies_and_from_any_folder(settings, model, text, tmp_path, monkeypatch):
    shutil.copytree(model, tmp_path / "model")
    shutil.copy(text, tmp_path / "documents.txt")
    monkeypatch.chdir(tmp_path)
    options = {**settings, "steps": 2, "model.name": "model", "text.source": "documents.txt", "cache": "cache"}
    assert call("train", **options, output="run") == 0
    before = (tmp_path / "run" / "eval.json").read_text()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert call("eval", "../run") == 0
    assert (tmp_path / "run" / "eval.json").read_text() == before
    assert not os.listdir()

    (tmp_path / "model").rename(tmp_path / "moved")
    assert call("eval", "../run") == 2
    edit(tmp_path / "run" / "config.json", **{"model.name": str(tmp_path / "moved")})
    assert call("eval", "../run") == 0
    assert (tmp_path / "run" / "eval.json").read_text() == before


def test_a_model_that_is_not_there_is_named(own, capsys):
    folder, model, _, _ = own
    shutil.rmtree(model)
    fails(capsys, re.escape(f"model.name: '{model}' is no local folder"), "eval", folder)


def test_other_weights_of_the_same_name_give_other_activations_and_labels(settings, model, tmp_path):
    own = shutil.copytree(model, tmp_path / "model")
    options = {**settings, "steps": 2, "model.name": own, "labels.scorer": "surprisal", "cache": tmp_path / "cache"}
    results = []
    for name in ("one", "same", "other"):
        if name == "other":
            change_weights(own)
        assert call("train", **options, output=tmp_path / name) == 0
        results.append(json.loads((tmp_path / name / "eval.json").read_text()))
    one, same, other = results
    assert one == same
    assert len(os.listdir(tmp_path / "cache" / "labels")) == 4
    assert len(os.listdir(tmp_path / "cache" / "activations")) == 4
    assert [c["score"] for c in one["contexts"]] != [c["score"] for c in other["contexts"]]


def test_failed_labels_are_not_asked_for_again_by_eval(settings, tmp_path, monkeypatch):
    """An answer that came only now would make other contexts of those that the run was trained on."""
    from aksae import data, llm_labels

    def rate(texts, config, *, cache, progress):
        return np.array([float("nan") if i % 5 == 0 else i % 10 for i in range(len(texts))], np.float32)

    monkeypatch.setattr(llm_labels, "rate", rate)
    folder = tmp_path / "run"
    assert call("train", **{**settings, "steps": 2, "labels.scorer": "llm"}, output=folder) == 0
    assert json.loads((folder / "probe.json").read_text())["scores"] == {"scored": 47, "failed": 13}
    before = (folder / "eval.json").read_text()
    monkeypatch.setattr(data, "score_contexts", lambda *args, **options: pytest.fail("scored again"))
    assert call("eval", folder) == 0
    assert (folder / "eval.json").read_text() == before


def test_a_report_of_other_checkpoints_is_refused(finished, tmp_path, capsys):
    folder = shutil.copytree(finished, tmp_path / "run")
    spoil(folder / "adaptivek")
    before = (folder / "report.html").read_bytes()
    fails(capsys, r"eval.json: the checkpoint that it is of differs in adaptivek \(had", "report", folder)
    assert (folder / "report.html").read_bytes() == before


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


def test_a_label_file_is_not_overwritten_unasked(inputs, tmp_path, capsys, monkeypatch):
    from aksae import data

    out = tmp_path / "labels.jsonl"
    out.write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr(data, "load_contexts", lambda *args: pytest.fail("read the text first"))
        fails(
            capsys,
            r"out: got .*labels.jsonl, which exists, needs a new file \(or overwrite\)",
            "label",
            **inputs,
            out=out,
        )
    assert out.read_text() == "mine"
    assert call("label", "--overwrite", **inputs, out=out) == 0
    assert len(out.read_text().splitlines()) == 60
    (tmp_path / "folder.jsonl").mkdir()
    fails(
        capsys, "out: got .*folder.jsonl, which exists", "label", "--overwrite", **inputs, out=tmp_path / "folder.jsonl"
    )


def test_a_label_file_that_appears_meanwhile_stays(inputs, tmp_path, capsys, monkeypatch):
    from aksae import data

    out, score = tmp_path / "labels.jsonl", data.score_corpus

    def overtaken(*args):
        out.write_text("another's")
        return score(*args)

    monkeypatch.setattr(data, "score_corpus", overtaken)
    fails(capsys, "out: got .*labels.jsonl, which exists", "label", **inputs, out=out)
    assert out.read_text() == "another's"


def test_a_run_that_appears_meanwhile_stays(settings, tmp_path, capsys, monkeypatch):
    train = sys.modules["aksae.train"]  # `aksae.train` is the function
    folder, collect = tmp_path / "run", train.collect_activations

    def overtaken(*args, **options):
        folder.mkdir()
        (folder / "config.json").write_text("another's")
        return collect(*args, **options)

    monkeypatch.setattr(train, "collect_activations", overtaken)
    fails(capsys, "output: got .*run, which holds another run", "train", **settings, output=folder)
    assert (folder / "config.json").read_text() == "another's"


def write_documents(path, number, tokens=TOKENS):
    draw = random.Random(0)
    path.write_text("\n\f\n".join(" ".join(draw.choices(WORDS, k=tokens)) for _ in range(number)))
    return path


SPENT = {
    "positions": ({"text.context-length": 65}, r"text.context_length: got 65 tokens, needs at most 64, the positions"),
    "layer": ({"model.layer": 2}, r"model.layer: got 2, needs 0 to 1"),
    "one document": ({"text.source": 1}, r"documents.txt has a single document, which leaves no held-out context"),
    "two documents": (
        {"text.source": 2},
        r"gives 1 train and 1 held-out contexts with a label, needs at least 2 and 1",
    ),
    "last rows": ({"text.source": 3, "train-on": "last"}, r"gives 2 train and 1 held-out .*needs at least 2 and 2"),
    "too few tokens": ({"text.max-tokens": 100}, r"text.max_tokens: got 100, needs at least 121"),
    "disk": ({"d-sae": 10**11}, r"output \(.*run\) and cache \(.*\): got .* GB of free disk, needs"),
    "no text": ({"text.source": "nowhere.txt"}, "text.source: there is no file nowhere.txt"),
    "device": ({"device": "abacus"}, "device: got 'abacus'"),
    "model's device": ({"model.device": "abacus"}, "device: got 'abacus'"),
    "output": ({"output": "documents.txt"}, "output: got documents.txt, a file, needs a folder"),
    "overflow": ({"model.dtype": "float16"}, "activations: got NaN or infinity in context 0 "),
}


@pytest.mark.parametrize(("options", "message"), SPENT.values(), ids=SPENT)
def test_nothing_is_spent_on_what_is_known_to_fail(settings, model, tmp_path, capsys, monkeypatch, options, message):
    from aksae import llm_labels

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(llm_labels, "rate", lambda *args, **options: pytest.fail("labels were paid for"))
    options = {**settings, "output": tmp_path / "run", "labels.scorer": "llm", **options}
    if isinstance(options["text.source"], int):
        options["text.source"] = write_documents(tmp_path / "documents.txt", options["text.source"])
    if options.get("model.dtype") == "float16":
        own = shutil.copytree(model, tmp_path / "model")
        weights = safetensors.torch.load_file(own / "model.safetensors")
        weights["model.embed_tokens.weight"] *= 1e9
        safetensors.torch.save_file(weights, own / "model.safetensors", metadata={"format": "pt"})
        options["model.name"] = own
    write_documents(tmp_path / "documents.txt", 1) if options["output"] == "documents.txt" else None
    fails(capsys, message, "train", **options)
    assert not (tmp_path / "run").exists()


def test_three_documents_are_enough_and_it_is_said_what_was_done(settings, tmp_path, capsys):
    source = write_documents(tmp_path / "documents.txt", 3)
    capsys.readouterr()
    assert call("train", **{**settings, "text.source": source, "steps": 5}, output=tmp_path / "run") == 0
    shown = capsys.readouterr()
    assert re.search(r"^aksae: note: probe_folds: got 5 for 2 contexts; validates on one", shown.err, re.MULTILINE)
    evaluation = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert evaluation["rows"] == TOKENS - 1
    assert 0 < evaluation["models"]["topk"]["fvu"] < 10
    assert call("eval", tmp_path / "run") == 0


def test_a_long_document_is_said_to_be_split(inputs, tmp_path, capsys, monkeypatch):
    from aksae import text

    monkeypatch.setattr(text, "LONGEST_DOCUMENT", 1000)
    monkeypatch.setattr(text, "_READ_CHARACTERS", 100)
    source = write_documents(tmp_path / "documents.txt", 1, tokens=1000)
    capsys.readouterr()
    assert call("label", **{**inputs, "text.source": source}, out=tmp_path / "labels.jsonl") == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("aksae: note: ")]
    assert len(notes) == 1
    assert "documents.txt has a document of over 1,000 characters; it is read in parts" in notes[0]


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
        # After the first checkpoint, while the second one's weights are about to take their place in it. Each
        # checkpoint writes them twice: into its folder, and beside it.
        if str(target).endswith("sae.safetensors"):
            calls.append(target)
            if len(calls) == 3:
                raise error
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", cut_off)
    fails(capsys, message, "train", status=status, **settings, output=tmp_path / "run")
    AdaptiveKSAE.from_pretrained(tmp_path / "run" / "adaptivek")
    checkpoint, *others = sorted(os.listdir(tmp_path / "run" / "adaptivek"))
    assert checkpoint.startswith("checkpoint-")
    assert others == ["config.json", "sae.safetensors"]


def test_a_run_that_was_cut_off_goes_on(settings, finished, tmp_path, monkeypatch, capsys):
    from aksae.callbacks import JsonLines

    log, cut = JsonLines.on_log, []

    def cut_off(self, run, record):
        log(self, run, record)
        if not cut and record["step"] == 20:
            cut.append(record)
            raise KeyboardInterrupt

    monkeypatch.setattr(JsonLines, "on_log", cut_off)
    options = {**settings, "checkpoint-every": 7, "output": tmp_path / "run"}
    fails(capsys, "interrupted", "train", status=130, **options)
    assert cli.main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert "report:" in capsys.readouterr().out
    for name in ("adaptivek", "topk"):
        ended, whole = (AdaptiveKSAE.from_pretrained(run / name).state_dict() for run in (tmp_path / "run", finished))
        assert all(torch.equal(ended[key], whole[key]) for key in whole)
    fails(capsys, "config.json: got no such file", "train", resume=tmp_path / "nowhere")


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
