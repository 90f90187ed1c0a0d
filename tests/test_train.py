"""The training loop on made-up activations, and the checks around it."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from aksae import AdaptiveKSAE, LabelConfig, ModelConfig, SAEConfig, TextConfig, TopK, TrainConfig, UserError
from aksae.config import absolute, from_dict, to_dict, validate
from aksae.data import BatchReader, Split
from aksae.errors import Notice
from aksae.files import check_space
from aksae.k_policy import score_to_k
from aksae.runs import check_output, start_run
from aksae.sae import geometric_median
from aksae.train import adaptive_config, fit_probe, lr_factor, train_sae

D, F = 8, 32


class Store:
    """`ActivationStore` in memory, in any dtype."""

    def __init__(self, x, context):
        self.x, self.context, self.d_in = x, context, x.shape[1]

    def __len__(self):
        return len(self.x)

    def rows(self, index):
        return self.x[index].clone()

    def last_rows(self):
        return self.context.bincount().cumsum(0) - 1


def make_split(n_contexts=40, dtype=torch.float64) -> Split:
    """Contexts of 1 to 9 rows of sparse combinations; the label can be read off the last row."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 10, (n_contexts,), generator=generator)
    directions = torch.nn.functional.normalize(torch.randn(20, D, generator=generator), dim=-1)
    activations = torch.rand(int(lengths.sum()), 20, generator=generator)
    x = (activations * (activations > 0.8)) @ directions * 4 + 1
    store = Store(x.to(dtype), torch.arange(n_contexts).repeat_interleave(lengths))
    labels = (x[store.last_rows()] @ torch.randn(D, generator=generator) + 5).clamp(0, 10)
    return Split(contexts=None, labels=labels.to(dtype), store=store)


def make_config(tmp_path, **fields) -> TrainConfig:
    defaults = {
        "output": tmp_path / "run",
        "selection": "adaptivek",
        "d_sae": F,
        "k_min": 1,
        "k_max": 6,
        "steps": 20,
        "batch_size": 16,
        "warmup_steps": 2,
        "dead_after": 40,
        "phase3_start": 0.6,
        "probe_lambdas": (1.0,),
        "log_every": 1,
        "device": "cpu",
    }
    return TrainConfig(**{**defaults, **fields})


def make_sae(config, split, *, k=None) -> AdaptiveKSAE:
    generator = torch.Generator().manual_seed(5)
    if k is not None:
        return AdaptiveKSAE(SAEConfig(D, F, TopK(k)), generator=generator).to(split.store.x.dtype)
    probe, report = fit_probe(split, config)
    sae = AdaptiveKSAE(adaptive_config(config, D, report.lam), generator=generator).to(split.store.x.dtype)
    sae.probe.load_state_dict(probe.state_dict())
    return sae


def run(config, split, **sae_fields):
    sae, records = make_sae(config, split, **sae_fields), []
    train_sae(sae, split, config, name="adaptivek", log=records.append)
    return sae, records


def by_the_equations(sae, split, config):
    """The same training with nothing shared but the order of the batches: dense, row by row, `torch.optim.Adam`."""
    W_enc, b_enc, W_dec, b_dec = (
        sae.get_parameter(name).detach().clone().requires_grad_() for name in ("W_enc", "b_enc", "W_dec", "b_dec")
    )
    w, b = (p.detach().clone().requires_grad_() for p in sae.probe.parameters())
    w0, b0 = w.detach().clone(), b.detach().clone()
    sae_adam = torch.optim.Adam([W_enc, b_enc, W_dec, b_dec], lr=config.lr)
    probe_adam = torch.optim.Adam([w, b], lr=config.lr)
    silent, history, delta = torch.zeros(F), [], 0.2
    batches = BatchReader(split.store, probe_reads="last", train_on="all").shuffled(config.batch_size, config.seed)
    phase3_from, decay_from = int(config.phase3_start * config.steps), int(config.decay_start * config.steps)
    totals = []
    for step in range(config.steps):
        rows = next(batches)
        x, context = split.store.x[rows], split.store.context[rows]
        if step == 0:
            b_dec.data = geometric_median(x)
        score = (split.store.x[split.store.last_rows()] @ w + b).clamp(0, 10)
        k = score_to_k(score, k_min=config.k_min, k_max=config.k_max)[context]

        z, activations = [], []
        for row, row_k in zip(x, k.tolist()):
            activation = torch.relu(W_enc @ (row - b_dec) + b_enc)
            kept = activation.argsort(descending=True, stable=True)[:row_k]
            z.append(torch.zeros_like(activation).scatter(0, kept, activation[kept]))
            activations.append(activation)
        z = torch.stack(z)
        silent += len(x)
        silent[(z != 0).any(0)] = 0
        e = x - (z @ W_dec + b_dec)
        loss = (e**2).mean() + config.sparsity_coef * z.abs().sum(1).mean() / x.norm(dim=1).mean()
        is_dead = silent >= config.dead_after
        if is_dead.any():
            e_hat = []
            for activation in activations:
                best = activation[is_dead].argsort(descending=True, stable=True)[: D // 2]
                e_hat.append(activation[is_dead][best] @ W_dec[is_dead][best])
            error = ((e - torch.stack(e_hat)) ** 2).sum(1).mean()
            loss = loss + config.aux_coef * error / ((e - e.mean(0)) ** 2).sum(1).mean()
        sae_adam.zero_grad()
        loss.backward()
        with torch.no_grad():
            W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
        torch.nn.utils.clip_grad_norm_([W_enc, b_enc, W_dec, b_dec], config.max_grad_norm)
        sae_adam.param_groups[0]["lr"] = config.lr * min(
            1, step / config.warmup_steps, (config.steps - step) / (config.steps - decay_from)
        )
        sae_adam.step()
        with torch.no_grad():
            W_dec /= W_dec.norm(dim=1, keepdim=True)

        if step >= phase3_from:
            of_batch = context.unique()
            share = {"published": 1 / 2, "fitted": 1 / len(split.labels)}[config.phase3_penalty]
            fit = ((score - split.labels)[of_batch] ** 2).mean() + share * sae.config.selection.probe_lambda * (
                w**2
            ).sum()
            moved = torch.zeros(()) if step < phase3_from + 2 else (w - w0).norm() + (b - b0).abs()
            probe_adam.zero_grad()
            (config.probe_coef * (fit + delta * moved)).backward()
            torch.nn.utils.clip_grad_norm_([w, b], config.max_grad_norm)
            probe_adam.param_groups[0]["lr"] = config.lr * min(1, (step - phase3_from) / config.warmup_steps)
            probe_adam.step()
            history.append(fit.item())
            if len(history) >= 3:
                fell = (history[-3] - history[-1]) / history[-3] > 0.05
                delta = max(0.01, 0.8 * delta) if fell else min(0.5, 1.2 * delta)
        totals.append(loss.item())
    return {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec, "probe.weight": w, "probe.bias": b}, totals


@pytest.mark.parametrize("penalty", ["published", "fitted"])
def test_training_follows_the_equations(tmp_path, penalty):
    split, config = make_split(), make_config(tmp_path, phase3_penalty=penalty)
    expected, totals = by_the_equations(make_sae(config, split), split, config)
    sae, records = run(config, split)
    assert [record["loss"] for record in records] == pytest.approx(totals, rel=1e-6)
    assert any(record["dead"] > 0 for record in records), "the auxiliary loss should have had something to do"
    for name, parameter in expected.items():
        torch.testing.assert_close(sae.get_parameter(name), parameter, rtol=1e-5, atol=1e-7, msg=name)


def test_records(tmp_path):
    split, config = make_split(), make_config(tmp_path, log_every=7)
    sae, records = run(config, split)
    assert [r["step"] for r in records] == [0, 7, 14, 19]
    assert [r["phase"] for r in records] == [2, 2, 3, 3]
    assert [r["rows"] for r in records] == [16, 128, 240, 320]
    assert [r["lr"] for r in records] == pytest.approx([0, 1e-3, 1e-3, 0.25e-3])
    for record in records:
        assert record["model"] == "adaptivek"
        assert all((record[key] is None) == (record["phase"] == 2) for key in ("probe", "deviation", "delta"))
        assert 1 <= record["l0"] <= record["k_mean"] <= 6
        assert record["tokens_per_s"] > 0
        assert json.loads(json.dumps(record)) == record
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(F, dtype=torch.float64))


def test_the_probe_moves_in_phase_3_only(tmp_path):
    split = make_split()
    for start, moves in ((1.0, False), (0.5, True)):
        config = make_config(tmp_path, phase3_start=start)
        before = make_sae(config, split).probe.weight
        sae, _ = run(config, split)
        assert torch.equal(sae.probe.weight, before) != moves


def test_a_fixed_k_trains_in_the_same_loop(tmp_path):
    split, config = make_split(), make_config(tmp_path, steps=60, lr=1e-2)
    _, records = run(config, split, k=3)
    assert {r["phase"] for r in records} == {2}
    assert {r["k_mean"] for r in records} == {3.0}
    assert records[-1]["fvu"] < 0.8 * records[0]["fvu"]
    assert AdaptiveKSAE.from_pretrained(tmp_path / "run" / "adaptivek").config.selection == TopK(3)


def test_k_of_tokens_and_last_rows(tmp_path):
    split = make_split()
    per_token = BatchReader(split.store, probe_reads="token", train_on="all")
    sae = make_sae(make_config(tmp_path), split)
    rows = torch.tensor([5, 0, 17, 5])
    batch = per_token.read(rows, "here")
    assert torch.equal(per_token.k(sae, batch), sae.k_for(split.store.x[rows]))
    per_context = BatchReader(split.store, probe_reads="last", train_on="last")
    last = split.store.last_rows()
    assert torch.equal(per_context.rows, last)
    expected = sae.k_for(split.store.x[last])[split.store.context[rows]]
    assert torch.equal(per_context.k(sae, per_context.read(rows, "here")), expected)
    run(make_config(tmp_path, probe_reads="token", train_on="last", steps=3), split)


def test_the_probe_reads_means_of_contexts(tmp_path):
    split = make_split(dtype=torch.float32)
    sae = make_sae(make_config(tmp_path), split).float()
    store = split.store
    means = torch.stack([store.x[store.context == context].mean(0) for context in range(len(split.labels))])
    reader = BatchReader(store, probe_reads="mean", train_on="all")
    rows = torch.tensor([5, 0, 17, 5])
    batch = reader.read(rows, "here")
    torch.testing.assert_close(batch.probed, means[store.context[rows].unique()])
    assert torch.equal(reader.k(sae, batch), sae.k_for(batch.probed)[batch.place])
    config = make_config(tmp_path, probe_reads="mean", steps=3)
    fitted, _ = fit_probe(split, config)
    expected, _ = fit_probe(
        Split(None, split.labels, Store(means, torch.arange(len(means)))),
        dataclasses.replace(config, probe_reads="last"),
    )
    torch.testing.assert_close(fitted.weight, expected.weight)
    run(config, split)


def test_batches_cover_every_epoch():
    reader = BatchReader(make_split().store, probe_reads="last", train_on="all")
    batches, n = reader.shuffled(16, seed=0), len(reader.rows)
    drawn = torch.cat([next(batches) for _ in range(3 * n // 16 + 1)])
    epochs = [drawn[i * n : (i + 1) * n] for i in range(3)]
    assert all(torch.equal(epoch.sort().values, torch.arange(n)) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    assert len(next(reader.shuffled(10 * n, seed=0))) == 10 * n


def test_the_seed_decides(tmp_path):
    split = make_split(dtype=torch.float32)
    first, again, other = (run(make_config(tmp_path, seed=seed), split)[0] for seed in (0, 0, 1))
    assert torch.equal(first.W_enc, again.W_enc)
    assert not torch.equal(first.W_enc, other.W_enc)


def test_bfloat16(tmp_path):
    split = make_split(dtype=torch.float32)
    _, exact = run(make_config(tmp_path), split)
    sae, records = run(make_config(tmp_path, dtype="bfloat16"), split)
    assert sae.W_enc.dtype == torch.float32
    assert records[-1]["loss"] == pytest.approx(exact[-1]["loss"], rel=0.1)


def test_few_contexts_are_validated_on_one_after_the_other(tmp_path):
    for contexts, fitted in ((2, 2), (3, 2), (5, 4)):
        with pytest.warns(Notice, match=rf"probe_folds: got 5 for {fitted} contexts; .* \({fitted} folds\)"):
            probe, report = fit_probe(make_split(contexts), make_config(tmp_path))
        assert probe.bias.isfinite()
        assert report.heldout_n == contexts - fitted
    fit_probe(make_split(6), make_config(tmp_path))


def test_more_rows_than_there_are_fit_in_a_batch(tmp_path):
    split = make_split(n_contexts=3)
    config = make_config(tmp_path, batch_size=10 * len(split.store), probe_folds=2)
    assert run(config, split)[1][-1]["rows"] == config.steps * config.batch_size


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_activations_stop_the_run(tmp_path, bad):
    split, config = make_split(), make_config(tmp_path)
    sae = make_sae(config, split)
    first = next(BatchReader(split.store, probe_reads="last", train_on="all").shuffled(config.batch_size, config.seed))
    unseen = ~torch.isin(split.store.context, split.store.context[first])
    split.store.x[unseen, 3] = bad
    with pytest.raises(UserError, match=r"activations: got NaN or infinity at step 1 in context.* needs") as error:
        train_sae(sae, split, config, name="adaptivek", log=lambda record: None)
    named = int(re.search(r"contexts? (\d+)", str(error.value))[1])
    assert named in split.store.context[unseen]


def test_a_diverged_probe_stops_the_run_before_it_spoils_the_weights(tmp_path):
    config = make_config(tmp_path, probe_coef=1e38, checkpoint_every=5)
    with pytest.raises(UserError, match=r"probe loss: got a gradient of norm inf at step 12 in contexts \d"):
        run(config, make_split(dtype=torch.float32))
    assert AdaptiveKSAE.from_pretrained(config.output / "adaptivek").probe.bias.isfinite()


def test_a_diverged_loss_stops_the_run_before_it_spoils_the_weights(tmp_path):
    split, config = make_split(), make_config(tmp_path, lr=1e200, warmup_steps=1, checkpoint_every=1)
    with pytest.raises(UserError, match=r"loss: got (nan|inf) at step 2 in contexts [\d, .]+, needs a finite number"):
        run(config, split)
    assert AdaptiveKSAE.from_pretrained(config.output / "adaptivek").W_enc.isfinite().all()


def test_an_interrupted_run_leaves_its_last_checkpoint(tmp_path):
    split, config = make_split(), make_config(tmp_path, checkpoint_every=4)
    sae, weights = make_sae(config, split), {}

    def log(record):
        # Called before the checkpoint of the step is written.
        weights[record["step"]] = sae.W_enc.detach().clone()
        if record["step"] == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_sae(sae, split, config, name="adaptivek", log=log)
    saved = AdaptiveKSAE.from_pretrained(config.output / "adaptivek")
    torch.testing.assert_close(saved.W_enc, weights[7])


@pytest.mark.parametrize(
    ("step", "factor"), [(0, 0), (5, 1 / 3), (15, 1), (80, 1), (90, 0.5), (99, 0.05), (100, 0)], ids=str
)
def test_lr_factor(step, factor):
    assert lr_factor(step, 15, 80, 100) == pytest.approx(factor)


def test_lr_factor_at_the_edges():
    assert lr_factor(1000, 15) == 1
    assert lr_factor(0, 0) == 1
    assert lr_factor(5, 10, 2, 10) == pytest.approx(0.5), "the smaller of warm-up and decay"
    assert lr_factor(10, 0, 10, 10) == 1


def test_output_folder(tmp_path):
    config = make_config(tmp_path)
    check_output(config)
    start_run(config)
    (config.output / "adaptivek").mkdir()
    (config.output / "eval.json").write_text("{}")
    assert from_dict(TrainConfig, json.loads((config.output / "config.json").read_text())) == config
    with pytest.raises(UserError, match=r"output: got .*run, which holds another run, needs a new folder"):
        check_output(config)
    again = dataclasses.replace(config, overwrite=True)
    check_output(again)
    (config.output / "notes.txt").write_text("mine")
    start_run(again)
    assert sorted(path.name for path in config.output.iterdir()) == ["config.json", "notes.txt"]

    (config.output / "config.json").unlink()
    with pytest.raises(UserError, match="which holds other files, needs a new or empty folder"):
        check_output(again)
    with pytest.raises(UserError, match="a file, needs a folder"):
        check_output(dataclasses.replace(config, output=config.output / "notes.txt"))


def test_what_goes_to_one_disk_is_added_up(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    check_space(("output", tmp_path / "not" / "yet", 60), ("cache", tmp_path, 40))
    with pytest.raises(UserError, match=r"output \(.*yet\) and cache \(.*\): got 0.00 GB of free disk, needs 0.00 GB"):
        check_space(("output", tmp_path / "not" / "yet", 60), ("cache", tmp_path, 41))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k_min": 7}, "k_min: got 7, needs at most k_max = 6"),
        ({"k_max": 33}, "k_max: got 33, needs at most d_sae = 32"),
        ({"k_min": -1}, "k_min: got -1, needs a number from 0 up"),
        ({"score_max": 0.0}, "score_min: got 0.0, needs a number below score_max = 0.0"),
        ({"steps": 0}, "steps: got 0, needs a number from 1 up"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"lr": float("nan")}, "lr: got nan, needs a number above 0"),
        ({"decay_start": 1.5}, "decay_start: got 1.5, needs a number from 0 to 1"),
        ({"aux_coef": -1.0}, "aux_coef: got -1.0"),
        ({"probe_lambdas": ()}, "probe_lambdas: got none"),
        ({"probe_lambdas": (1.0, -1.0)}, "probe_lambdas: got -1.0"),
        ({"probe_folds": 1}, "probe_folds: got 1, needs a number from 2 up"),
        ({"model": ModelConfig(layer=-1)}, "model.layer: got -1"),
        ({"text": TextConfig(heldout_fraction=1.0)}, "text.heldout_fraction: got 1.0"),
        ({"labels": LabelConfig(scorer="file")}, "labels.file: got none"),
        (
            {"labels": LabelConfig(scorer="file", file=Path("nowhere.jsonl"))},
            "labels.file: got nowhere.jsonl, needs an",
        ),
        ({"text": TextConfig(context_length=15)}, "text.context_length: got 15, needs a number from 16 up"),
        ({"text": TextConfig(max_tokens=1000)}, "text.max_tokens: got 1000, needs at least 1281"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(f"{k}={v}" for k, v in value.items())[:30],
)
def test_validate(tmp_path, fields, message):
    validate(make_config(tmp_path))
    with pytest.raises(UserError, match=re.escape(message)):
        validate(make_config(tmp_path, **fields))


def test_a_run_keeps_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("model", "smollm2", "python-prose"):
        (tmp_path / name).mkdir()
    (tmp_path / "text.txt").touch()
    config = make_config(Path(), model=ModelConfig("model"), text=TextConfig("text.txt"), cache=Path("c"))
    config.labels.file = Path("a.jsonl")
    kept = absolute(config)
    assert (kept.model.name, kept.text.source) == (str(tmp_path / "model"), str(tmp_path / "text.txt"))
    assert (kept.output, kept.cache, kept.labels.file) == tuple(tmp_path / name for name in ("run", "c", "a.jsonl"))
    assert config.model.name == "model", "the config itself stays"
    hub = make_config(tmp_path, model=ModelConfig("some/model"), text=TextConfig("some/text"))
    assert absolute(hub) == hub
    assert absolute(make_config(tmp_path)) == make_config(tmp_path), "what is bundled is no folder"


def test_config_survives_json(tmp_path):
    config = make_config(tmp_path, labels=LabelConfig(file=Path("a.jsonl")), cache=Path("c"), lr=1)
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probe_reads": "word"}, "config.probe_reads: got 'word', needs one of last, mean, token"),
        ({"steps": True}, "config.steps: got True, needs int"),
        ({"lr": "fast"}, "config.lr: got 'fast', needs float"),
        ({"model": 3}, "config.model: got int, needs an object"),
        ({"model": {"depth": 3}}, "config.model: got the unknown field depth"),
        ({"probe_lambdas": ["x"]}, "config.probe_lambdas: got 'x', needs float"),
    ],
)
def test_config_of_the_wrong_kind(tmp_path, change, message):
    with pytest.raises(UserError, match=re.escape(message)):
        from_dict(TrainConfig, {**to_dict(make_config(tmp_path)), **change})
