"""The command `aksae export`: folders that hold the same SAE, and say how to go on."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from aksae import SAE, SAEConfig, TopK, formats
from aksae.cli import main
from aksae.finished import open_finished
from command_line import fails
from finished_runs import KINDS, TOKENS, F
from language_models import WIDTH

TARGETS = ("saedashboard", "neuronpedia")
ON_TEXT = {"context_size": TOKENS, "prepend_bos": True, "dataset_path": None}


def call(run, folder, to, *words, **options) -> int:
    """`--to` ends the positional arguments."""
    flags = [str(part) for key, value in options.items() for part in (f"--{key}", value)]
    return main(["export", *map(str, (run, folder)), "--to", to, *words, *flags])


def rows(sae):
    x = torch.randn(200, sae.config.d_in, generator=torch.Generator().manual_seed(0)) / sae.config.input_scale
    return x + sae.b_dec.detach() / sae.config.output_scale


@pytest.mark.parametrize("kind", KINDS)
def test_hub(finished, tmp_path, capsys, kind):
    run = finished(kind)
    found = open_finished(run)
    before = found.sae
    capsys.readouterr()
    assert call(run, tmp_path / "out", "hub") == 0
    assert f"{run} -> {tmp_path / 'out'} (hub); " in capsys.readouterr().out
    names = ["README.md", "config.json", "eval.json", "sae.safetensors", "sae_lens"]
    assert sorted(os.listdir(tmp_path / "out")) == names
    after = SAE.from_pretrained(tmp_path / "out")
    assert after.config == before.config
    assert all(torch.equal(after.state_dict()[name], tensor) for name, tensor in before.state_dict().items())

    evaluation = json.loads((run / "eval.json").read_text())
    name = found.folder.name
    figures = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert figures == {"rows": evaluation["rows"], "models": {name: evaluation["models"][name]}}
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| FVU | {evaluation['models'][name]['fvu']:.4g} |" in card
    assert f"# {before.config.selection}: a sparse autoencoder of " in card
    assert ("import aksae.hosts.sae_lens" in card) == (kind in ("adaptivek", "mean"))
    assert str(tmp_path) not in card
    assert "tmp" not in card, "a folder of this machine is nobody's business"
    assert card.startswith('---\nlibrary_name: "aksae"\ntags: ["sparse-autoencoder"')
    metadata = json.loads((tmp_path / "out" / "sae_lens" / "cfg.json").read_text())["metadata"]
    hook = {"collected": "blocks.1.hook_mlp_out", "files": None}.get(kind, "blocks.1.hook_resid_post")
    assert metadata.get("hook_name") == hook
    assert "model_name" not in metadata


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("adaptivek", "mean", "files")])
def test_dashboards(finished, tmp_path, capsys, kind, to):
    run = finished(kind)
    sae = open_finished(run).sae
    capsys.readouterr()
    assert call(run, tmp_path / "out", to, **{"model.name": "owner/gpt-of-ours"}) == 0
    assert sorted(os.listdir(tmp_path / "out")) == ["README.md", "cfg.json", "sae_weights.safetensors"]
    config = json.loads((tmp_path / "out" / "cfg.json").read_text())
    metadata = config["metadata"]
    assert metadata["model_name"] == "owner/gpt-of-ours"
    assert metadata["model_from_pretrained_kwargs"] == {"center_writing_weights": False}
    of_text = ON_TEXT if kind != "collected" else dict.fromkeys(ON_TEXT)
    assert {name: metadata.get(name) for name in ON_TEXT} == of_text
    readme = (tmp_path / "out" / "README.md").read_text()
    if to == "neuronpedia":
        hook = "hook_mlp_out" if kind == "collected" else "hook_resid_post"
        assert f"--model-name gpt-of-ours --layer-num 1 --hook-point {hook}" in readme
        assert "DATASET is one of the Hugging Face hub" in readme
    else:
        assert "SaeVisRunner(config).run(" in readme

    stored, x = formats.load(tmp_path / "out"), rows(sae)
    same = sae if kind != "priced" else SAE_with_topk(sae)
    with torch.no_grad():
        torch.testing.assert_close(stored(x), same(x), rtol=1e-4, atol=1e-5)
    if config["architecture"] == "topk":
        # SAEDashboard may fold decoder norms, since they are 1.
        assert config["rescale_acts_by_decoder_norm"]
        torch.testing.assert_close(stored.W_dec.norm(dim=-1), torch.ones(F))


def SAE_with_topk(sae):
    """What is left of Priced elsewhere: a TopK of its budget."""
    topk = SAE(SAEConfig(WIDTH, F, TopK(4), input_scale=sae.config.input_scale, output_scale=sae.config.output_scale))
    topk.load_state_dict(sae.state_dict(), strict=False)
    return topk


def test_names_on_the_hub(finished, tmp_path):
    """Of the bundled model, of a dataset, and of those of the hub."""
    run = shutil.copytree(finished("topk"), tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["model"]["name"], config["text"]["source"] = "smollm2", "owner/prose"
    (run / "config.json").write_text(json.dumps(config))
    assert call(run, tmp_path / "out", "hub") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'base_model: "HuggingFaceTB/SmolLM2-135M-Instruct"\ndatasets: ["owner/prose"]\n' in card
    assert "a sparse autoencoder of HuggingFaceTB/SmolLM2-135M-Instruct, block 1, resid_post" in card
    assert call(run, tmp_path / "np", "neuronpedia") == 0
    assert "--dataset-path owner/prose" in (tmp_path / "np" / "README.md").read_text()


def test_the_baseline_and_an_sae_by_itself(finished, tmp_path, capsys):
    assert call(finished("adaptivek") / "topk", tmp_path / "baseline", "saedashboard", **{"model.name": "gpt2"}) == 0
    alone = shutil.copytree(finished("topk") / "topk", tmp_path / "sae")
    assert call(alone, tmp_path / "hub", "hub") == 0
    assert "no figures: the SAE is in no run with an eval.json of it" in capsys.readouterr().out
    assert not (tmp_path / "hub" / "eval.json").exists()
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "held-out" not in card
    assert "of a language model\n" in card
    named = {"model.name": "gpt2", "model.layer": 7}
    assert call(alone, tmp_path / "np", "neuronpedia", **named, site="attn_out") == 0
    metadata = json.loads((tmp_path / "np" / "cfg.json").read_text())["metadata"]
    assert (metadata["model_name"], metadata["hook_name"]) == ("gpt2", "blocks.7.hook_attn_out")


def test_what_sae_lens_has_no_format_for(tmp_path, capsys):
    sae = SAE(SAEConfig(WIDTH, F, TopK(3), d_out=WIDTH, skip=True))
    sae.save_pretrained(tmp_path / "sae")
    assert call(tmp_path / "sae", tmp_path / "out", "hub") == 0
    assert "no sae_lens/: sae_lens: got TopK" in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "SAELens has no format for it" in card
    assert "a transcoder of" in card
    assert not (tmp_path / "out" / "sae_lens").exists()


def test_refusals(finished, tmp_path, capsys):
    out, named = tmp_path / "out", {"model.name": "gpt2", "model.layer": 1}

    def refused(message, run, to, **options):
        fails(capsys, message, "export", run, out, "--to", to, **options)
        assert not out.exists()

    for to in TARGETS:
        refused(f"{to}: got AdaptiveK, needs another selection", finished("adaptivek"), to, **named)
        refused("model.name and model.layer: got none", finished("files"), to)
        refused("model.name: got .*, a folder, needs the name by which TransformerLens", finished("topk"), to)
    sae = SAE(SAEConfig(WIDTH, F, TopK(3)))
    with torch.no_grad():
        sae.W_dec[3] *= 2
    sae.save_pretrained(tmp_path / "long")
    refused("decoder rows of norms from 1 to 2, needs all alike", tmp_path / "long", "saedashboard", **named)
    SAE(SAEConfig(WIDTH, F, TopK(3), d_out=WIDTH)).save_pretrained(tmp_path / "transcoder")
    refused("saedashboard: got a transcoder", tmp_path / "transcoder", "saedashboard", **named)
    refused("run: got nowhere, needs", "nowhere", "hub")


def test_what_is_there_is_not_replaced_unasked(finished, tmp_path, capsys):
    (tmp_path / "README.md").write_text("mine")
    run = finished("topk")
    fails(capsys, "folder: got .*, which holds other files, needs a new", "export", run, tmp_path, "--to", "hub")
    assert os.listdir(tmp_path) == ["README.md"]
    assert call(run, tmp_path, "hub", "--overwrite") == 0
    assert "TopK" in (tmp_path / "README.md").read_text()
    assert call(run, tmp_path, "hub", "--overwrite") == 0


def test_figures_of_other_weights_are_refused(finished, tmp_path, capsys):
    run = shutil.copytree(finished("topk"), tmp_path / "run")
    sae = SAE.from_pretrained(run / "topk")
    with torch.no_grad():
        sae.b_enc += 1
    sae.save_pretrained(run / "topk")
    fails(capsys, "the checkpoint that it is of differs in topk", "export", run, tmp_path / "out", "--to", "hub")
    assert not (tmp_path / "out").exists()
