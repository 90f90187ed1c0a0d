"""The command `aksae steer`, and how runs and SAEs of any kind are opened."""

from __future__ import annotations

import shutil

import pytest
import torch
from aksae import SAE, SAEConfig, TopK
from aksae.config import ModelChoice
from aksae.errors import UserError
from aksae.finished import open_finished
from aksae.sites import Site
from aksae.steer import steer
from command_line import call, fails
from finished_runs import KINDS, F
from language_models import WIDTH

PROMPT = "w3 w1 w4 w1 w5"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "files"])
def test_every_kind_of_run(finished, kind, capsys):
    run = finished(kind)
    capsys.readouterr()
    assert call("steer", run, PROMPT, latent=3, strength=400, tokens=12) == 0
    head, without, steered = capsys.readouterr().out.strip().split("\n\n")
    place = "layer 1 mlp_out" if kind == "collected" else "layer 1"
    assert head.startswith(f"latent 3 of {run}/")
    assert head.endswith(f" set to 400 at {open_finished(run).model.name}, {place}, float32")
    prefixes = ("without: ", "with:    ")
    texts = [line.removeprefix(prefix) for line, prefix in zip((without, steered), prefixes, strict=True)]
    assert all(text.startswith(PROMPT) for text in texts)
    assert texts[0] != texts[1]


def test_the_same_seed_draws_the_same(finished):
    run = finished("topk")
    before = torch.get_rng_state()
    first, again, other = (steer(run, PROMPT, 3, 400.0, tokens=12, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first.without != other.without
    # What the SAE makes of the latent by itself, within a factor that changes no draw.
    nothing = steer(run, PROMPT, 3, 0.0, tokens=12)
    assert nothing.without == first.without
    assert torch.equal(torch.get_rng_state(), before)


def test_an_sae_by_itself_is_told_its_model(finished, saved, tmp_path, capsys):
    folder = shutil.copytree(finished("topk") / "topk", tmp_path / "sae")
    options = {"latent": 3, "strength": 1, "tokens": 2}
    fails(capsys, "model.name and model.layer: got none, need the language model", "steer", folder, PROMPT, **options)
    named = {"model.name": saved("llama"), "model.layer": 0, "model.device": "cpu"}
    assert call("steer", folder, PROMPT, **options, **named, site="attn_out") == 0
    assert "layer 0 attn_out" in capsys.readouterr().out


def test_what_a_run_says_of_its_model(finished, saved):
    collected = open_finished(finished("collected"))
    assert collected.site == Site(1, "mlp_out")
    assert not collected.reads_text
    assert open_finished(finished("files")).model is None
    baseline = open_finished(finished("adaptivek") / "topk")
    assert isinstance(baseline.sae.config.selection, TopK)
    assert baseline.run == open_finished(finished("adaptivek")).run
    other = open_finished(finished("topk"), ModelChoice(layer=0, dtype="bfloat16"), "mlp_out")
    assert (other.site, other.model.dtype, other.model.name) == (Site(0, "mlp_out"), "bfloat16", str(saved("llama")))


WRONG = {
    "latent": ({"latent": F}, "latent: got 32, needs a number from 0 to 31"),
    "strength": ({"strength": "nan"}, "strength: got nan, needs a finite number"),
    "tokens": ({"tokens": 0}, "tokens: got 0, needs 1 or more"),
    "layer": ({"model.layer": 3}, "model.layer: got 3, needs 0 to 2"),
}


@pytest.mark.parametrize(("options", "message"), WRONG.values(), ids=WRONG)
def test_bad_settings(finished, capsys, options, message):
    fails(capsys, message, "steer", finished("topk"), PROMPT, **{"latent": 3, "strength": 1, **options})


def test_what_cannot_be_steered(finished, saved, tmp_path, capsys):
    options = {"latent": 3, "strength": 1}
    run = finished("topk")
    fails(capsys, "prompt: got '', needs text of at least one token", "steer", run, "", **options)
    fails(capsys, "run: got nowhere, needs the folder of an `aksae train` run, or", "steer", "nowhere", "w1", **options)
    fails(capsys, "need the language model that the SAE is of", "steer", finished("files"), "w1", **options)
    gpt2, bert = ({"model.name": saved(family), "model.device": "cpu"} for family in ("gpt2", "bert"))
    long = " ".join(["w1"] * 20)
    fails(capsys, "tokens: got 40 after a prompt of 20, needs at most 32", "steer", run, long, **options, **gpt2)
    fails(capsys, "predicts no next token, steer needs a causal", "steer", run, "w1", **options, **bert)
    SAE(SAEConfig(2 * WIDTH, F, TopK(3))).save_pretrained(tmp_path)
    named = {**gpt2, "model.layer": 1}
    fails(capsys, "got d_in 32, needs 16, that of", "steer", tmp_path, "w1", **options, **named)
    shutil.copy(run / "config.json", tmp_path / "config.json")
    (tmp_path / "sae.safetensors").unlink()
    with pytest.raises(UserError, match="got no checkpoint folder topk"):
        open_finished(tmp_path)
