"""The command `aksae explain`: what it says against what the codes and the model's own modules say."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from aksae import SAE, Activations, open_activations
from aksae.cli import main
from aksae.data import BatchReader, collect_contexts
from aksae.explain import explain, logit_effect
from aksae.finished import open_finished
from aksae.text import load_contexts
from command_line import call, fails
from finished_runs import KINDS, TEXT, train
from language_models import CAUSAL, VOCABULARY, WIDTH

HELD_OUT = 8 * 19


def heldout(run):
    """Activations `[N, F]`, tokens and contexts of the held-out rows, in order."""
    found = open_finished(run)
    model = found.load_model()
    if found.reads_text:
        contexts = load_contexts(found.run.text, model.tokenizer)[1]
        store = collect_contexts(model, contexts, run.parent / "mine", batch_size=4)
    else:
        store = open_activations(found.run.activations).split(0.2)[1]
    sae = found.sae
    with torch.no_grad():
        if sae.probe is None:
            codes = sae.encode(store.rows(torch.arange(len(store))))
        else:
            reader = BatchReader(store, probe_reads=sae.config.selection.probe, train_on="all")
            batch = next(reader.in_order(len(store)))
            codes = sae.encode(batch.x, reader.k(sae, batch), k_max=sae.k_bound)
    return codes.to_dense(sae.config.d_sae), store.tokens, store.context


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "files"])
def test_every_kind_of_run(finished, kind, tmp_path, capsys):
    run = finished(kind)
    dense, tokens, contexts = heldout(run)
    latents = dense.gt(0).sum(0).argsort(descending=True)[[0, 5, -1]].tolist()
    capsys.readouterr()
    assert call("explain", run, *latents, json=tmp_path / "said.json", examples=3, tokens=4) == 0
    shown = capsys.readouterr().out
    said = json.loads((tmp_path / "said.json").read_text())
    assert said["tokens"] == len(dense) == HELD_OUT
    assert said["sae"].startswith(str(run))
    for entry, latent in zip(said["latents"], latents, strict=True):
        column = dense[:, latent]
        fired = column[column > 0]
        assert entry["latent"] == latent
        assert entry["fired"] == len(fired)
        assert entry["density"] == pytest.approx(len(fired) / HELD_OUT)
        assert entry["max"] == pytest.approx(float(column.max()), rel=1e-4)
        if len(fired):
            assert entry["mean"] == pytest.approx(float(fired.mean()), rel=1e-4)
        else:
            assert entry["mean"] is None
        peaks = torch.stack([column[contexts == number].max() for number in contexts.unique()])
        best = [peak for peak in peaks.sort(descending=True).values.tolist() if peak > 0][:3]
        assert [max(example["activations"]) for example in entry["examples"]] == pytest.approx(best, rel=1e-4)
        # A whole context, each token beside its own activation.
        for example in entry["examples"]:
            ids = torch.tensor([int(token[1:]) for token in example["tokens"]])
            (number,) = [n for n in contexts.unique().tolist() if torch.equal(tokens[contexts == n].long(), ids)]
            assert example["activations"] == pytest.approx(column[contexts == number].tolist(), rel=1e-4, abs=1e-5)
        assert len(entry["raises"]) == len(entry["lowers"]) == 4
        assert re.search(rf"^latent {latent} of {run}/", shown, re.MULTILINE)
    first = said["latents"][0]
    assert f"{first['mean']:.4g} in the mean and {first['max']:.4g} at most" in shown
    assert re.search(r"^ +\d[\d.e-]*  .*«w\d+»", shown, re.MULTILINE)
    assert shown.rstrip().endswith("through the final norm to the unembedding, past the later blocks")


def test_the_tokens_of_a_stream_are_those_of_the_store(finished):
    stream, store = (explain(finished(kind), range(6)) for kind in ("stream", "topk"))
    # Other weights, since other batches; but the same tokens, all of them.
    assert stream["tokens"] == store["tokens"]


def test_a_cache_of_version_0_1_holds_no_tokens(finished, monkeypatch):
    wanted = explain(finished("topk"), range(4))
    monkeypatch.setattr(Activations, "tokens", None)
    assert explain(finished("topk"), range(4)) == wanted


@pytest.mark.parametrize("family", CAUSAL)
def test_logits_of_a_direction_in_every_family(load, family):
    model = load(family)
    directions = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
    scaled = F.normalize(directions, dim=-1) * WIDTH**0.5
    inner = model.model
    norm = next(
        module for name, module in inner.named_modules() if re.fullmatch(r"\w+\.(norm|ln_f|final_layer_norm)", name)
    )
    head = inner.get_output_embeddings()
    with torch.no_grad():
        wanted = head(norm(scaled)) - head(norm(torch.zeros(1, WIDTH)))
        cap = getattr(inner.config, "final_logit_softcapping", None)
        if cap:
            wanted = (head(norm(scaled)) / cap).tanh() * cap
    got = torch.stack(logit_effect(model, directions))
    assert got.shape == (3, VOCABULARY)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_raised_and_lowered_tokens(finished):
    run = finished("topk")
    found = open_finished(run)
    (effect,) = logit_effect(found.load_model(), found.sae.W_dec[7:8])
    (entry,) = explain(run, [7], tokens=3)["latents"]
    order = effect.argsort(descending=True)
    assert [token["token"] for token in entry["raises"]] == [f"w{i}" for i in order[:3].tolist()]
    assert [token["token"] for token in entry["lowers"]] == [f"w{i}" for i in order.flip(0)[:3].tolist()]
    assert entry["raises"][0]["logit"] == pytest.approx(effect.max().item())


def test_a_silent_latent(finished, tmp_path, capsys):
    run = shutil.copytree(finished("topk"), tmp_path / "run")
    sae = SAE.from_pretrained(run / "topk")
    with torch.no_grad():
        sae.b_enc[5] = -1e3
    sae.save_pretrained(run / "topk")
    assert call("explain", run, 5, json=tmp_path / "said.json") == 0
    assert f"does not fire on any of {HELD_OUT} held-out tokens\n  raises  'w" in capsys.readouterr().out
    (entry,) = json.loads((tmp_path / "said.json").read_text())["latents"]
    assert (entry["fired"], entry["density"], entry["mean"], entry["max"], entry["examples"]) == (0, 0, None, 0, [])


def test_a_model_that_predicts_no_next_token(saved, tmp_path, capsys):
    run = train("topk", saved("bert"), tmp_path)
    capsys.readouterr()
    assert call("explain", run, 5, json=tmp_path / "said.json") == 0
    assert "raises" not in capsys.readouterr().out
    (entry,) = json.loads((tmp_path / "said.json").read_text())["latents"]
    assert entry["raises"] is entry["lowers"] is None
    assert entry["fired"]


def test_the_baseline_of_a_run(finished, capsys):
    folder = finished("adaptivek") / "topk"
    assert call("explain", folder, 3) == 0
    assert f"latent 3 of {folder}" in capsys.readouterr().out


def test_what_has_no_text(finished, tmp_path, capsys):
    run = finished("files")
    fails(capsys, r"was trained on .*x\.npy, files without text, needs a run on text, on a folder", "explain", run, 3)
    alone = shutil.copytree(finished("topk") / "topk", tmp_path / "sae")
    fails(capsys, "an SAE that lies in no run, needs one in a run, whose held-out text", "explain", alone, 3)


def test_other_text_or_another_model_is_refused(finished, saved, tmp_path, capsys):
    run = finished("topk")
    fails(capsys, r"differs in model.layer \(had 1, got 0\)", "explain", run, 3, **{"model.layer": 0})
    copy = shutil.copytree(run, tmp_path / "run")
    config = json.loads((copy / "config.json").read_text())
    config["text"]["seed"] = 1
    (copy / "config.json").write_text(json.dumps(config))
    fails(capsys, "differs in train contexts .*the text or its settings have changed", "explain", copy, 3)
    fails(capsys, "differs in model weights", "explain", finished("collected"), 3, **{"model.name": saved("gpt2")})


def test_bad_latents(finished, capsys):
    fails(capsys, "latent: got 32, needs a number from 0 to 31", "explain", finished("topk"), 3, 32)
    assert main(["explain", str(finished("topk"))]) == 2
    assert "latents: got none" in capsys.readouterr().err


def test_all_kinds_are_covered():
    assert set(TEXT) < set(KINDS)
    assert np.unique(KINDS).size == len(KINDS)
