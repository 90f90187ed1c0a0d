"""The training loop on made-up activations: every selection, any iterable, cut off and gone on with, two processes."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from aksae import (
    SAE,
    AdaptiveK,
    BatchTopK,
    FitConfig,
    JumpReLU,
    KMap,
    Matryoshka,
    Need,
    Priced,
    SAEConfig,
    TopK,
    UserError,
    fit,
)
from aksae.callbacks import Callback, EarlyStop, Evaluate, Records
from aksae.checkpoints import checkpoints
from aksae.selections import Chosen
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from aksae_kernels import SparseCodes

ROOT = Path(__file__).resolve().parent.parent
D, F, B = 24, 128, 64
SELECTIONS = {
    "TopK": TopK(6),
    "BatchTopK": BatchTopK(6),
    "JumpReLU": JumpReLU(6),
    "Matryoshka": Matryoshka(BatchTopK(6), (16, 48, F)),
    "AdaptiveK": AdaptiveK(KMap(6, 6)),
    "Priced": Priced(6, k_max=16),
    "Need": Need(6, measured_rows=8 * B),
}
every_selection = pytest.mark.parametrize("name", SELECTIONS)


def rows(n: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    """Sparse combinations of directions, off the origin."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(60, D, generator=torch.Generator().manual_seed(7)), dim=-1)
    active = torch.rand(n, 60, generator=generator)
    return ((active * (active > 0.9)) @ directions * 5 + 1).to(dtype)


def batches(n: int = 30, dtype=torch.float32) -> list[torch.Tensor]:
    return list(rows(n * B, dtype=dtype).split(B))


def make(selection=SELECTIONS["TopK"], dtype=torch.float32, **fields) -> SAE:
    config = SAEConfig(D, F, selection, **fields)
    return SAE(config, generator=torch.Generator().manual_seed(1)).to(dtype)


def fvu(sae: SAE, x: torch.Tensor) -> float:
    with torch.no_grad():
        return float((sae(x) - x).square().sum() / (x - x.mean(0)).square().sum())


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same(a: SAE, b: SAE) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ------------------------------------------------------------------------------------------------- what it learns


@every_selection
def test_every_selection_learns(name):
    sae = make(SELECTIONS[name])
    result = fit(sae, batches(), FitConfig(steps=300, lr=3e-3, normalize="mean-norm", dead_after=2000))
    x = rows(2000, seed=1)
    assert not sae.training
    assert result.sae is sae
    assert result.record["step"] == 299
    # An SAE that was not trained yet has a price of 0, at which every latent is kept that lowers the error.
    untrained = fvu(make(SELECTIONS[name]).eval(), x)
    assert fvu(sae, x) < 0.5 < untrained if name != "Priced" else fvu(sae, x) < 0.5 * untrained
    # JumpReLU is drawn to its target, the others have it in every batch.
    assert float(sae.encode(x).counts.float().mean()) == pytest.approx(6, rel=0.1 if name == "JumpReLU" else 0.25)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(F))


def test_the_scale_is_kept_and_undone():
    sae = make()
    fit(sae, batches(), FitConfig(steps=1, normalize="mean-norm"))
    x = batches()[0]
    assert sae.config.input_scale == sae.config.output_scale
    assert float((x * sae.config.input_scale).norm(dim=1).mean()) == pytest.approx(D**0.5)
    # In other units: the same SAE, ten times as large.
    tenfold = make()
    fit(tenfold, [10 * b for b in batches()], FitConfig(steps=1, normalize="mean-norm"))
    torch.testing.assert_close(tenfold(10 * x), 10 * sae(x), rtol=1e-4, atol=1e-4)


def test_jumprelu_starts_at_its_target():
    sae = make(SELECTIONS["JumpReLU"])
    x = rows(4000)
    sae.start(x)
    assert float(sae.encode(x).counts.float().mean()) == pytest.approx(6, rel=0.01)


@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoder_learns_its_target(skip):
    matrix = torch.randn(D, 10, generator=torch.Generator().manual_seed(3))
    pairs = [(x, x @ matrix) for x in batches()]
    sae = make(d_out=10, skip=skip)
    fit(sae, pairs, FitConfig(steps=300, lr=3e-3, normalize="mean-norm"))
    x = rows(1000, seed=1)
    target = x @ matrix
    with torch.no_grad():
        left = float((sae(x) - target).square().sum() / (target - target.mean(0)).square().sum())
    assert left < (0.1 if skip else 0.5)


def test_several_on_one_pass_are_those_of_passes_of_their_own():
    together = [make(SELECTIONS[name]) for name in ("TopK", "BatchTopK")]
    result = fit(together, batches(), FitConfig(steps=40))
    assert [record["sae"] for record in result.records] == [0, 1]
    for sae, name in zip(together, ("TopK", "BatchTopK")):
        alone = make(SELECTIONS[name])
        fit(alone, batches(), FitConfig(steps=40))
        assert same(alone, sae)


def test_accumulated_batches_are_one_batch():
    whole, parts = make(dtype=torch.float64), make(dtype=torch.float64)
    x = rows(10 * B, dtype=torch.float64)
    options = {"steps": 10, "aux_coef": 0.0}
    fit(whole, list(x.split(B)), FitConfig(**options))
    fit(parts, list(x.split(B // 2)), FitConfig(**options, accumulate=2))
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(parts.get_parameter(name), parameter, rtol=1e-9, atol=1e-12)


def records_of(sae: SAE, given, **options) -> list[dict]:
    records = []
    fit(sae, given, FitConfig(log_every=5, **options), [Records(records.append)])
    return records


@pytest.mark.parametrize("name", sorted(SELECTIONS.keys() - {"AdaptiveK"}))
def test_the_budget_falls(name):
    records = records_of(make(SELECTIONS[name]), batches(), steps=21, k_start=16, k_steps=10)
    assert [record["k_mean"] for record in records] == [16, 11, 6, 6, 6]
    # JumpReLU and a price are drawn to it, the probe of need has it in the mean, the others have it at once.
    if name not in ("JumpReLU", "Priced", "Need"):
        assert [record["l0"] for record in records] == [16, 11, 6, 6, 6]


def test_the_k_of_each_row_falls_to_its_own():
    sae = make(AdaptiveK(KMap(2, 16)))
    with torch.no_grad():
        sae.probe.weight.copy_(torch.randn(D, generator=torch.Generator().manual_seed(2)))
    own = [sae.k_for(batches()[step]) for step in (0, 5, 10, 15, 20)]
    assert own[0].unique().numel() > 3
    records = records_of(sae, batches(), steps=21, k_start=16, k_steps=10)
    expected = [16, float(((own[1] + 16) / 2).round().mean()), *(float(k.float().mean()) for k in own[2:])]
    assert [record["k_mean"] for record in records] == pytest.approx(expected)
    assert [record["l0"] for record in records] == pytest.approx(expected)


def test_a_k_of_each_row():
    sae = make()
    k = torch.arange(B) % 9
    result = fit(sae, [{"x": b, "k": k} for b in batches()], FitConfig(steps=3, log_every=1))
    assert result.record["k_mean"] == pytest.approx(float(k.float().mean()))


def test_the_mean_of_the_weights():
    sae, plain = make(), make()
    weights = []

    class Weights(Callback):
        def on_step(self, run, group):
            weights.append(run.learners[0].sae.W_enc.detach().clone())

    fit(plain, batches(), FitConfig(steps=5), [Weights()])
    fit(sae, batches(), FitConfig(steps=5, ema=0.5))
    mean = weights[0]
    for weight in weights[1:]:
        mean = 0.5 * mean + 0.5 * weight
    torch.testing.assert_close(sae.W_enc.detach(), mean)


def test_the_mean_is_of_more_bits_than_the_weights():
    """A mean of 16 bits stands still as soon as a step changes it by less than half of its last bit."""
    means = []

    class Means(Callback):
        def on_step(self, run, group):
            means.append(run.learners[0].trained().W_enc.detach().clone())

    fit(make(), batches(), FitConfig(steps=20, lr=1e-2, ema=0.999, weights="bfloat16"), [Means()])
    assert means[0].dtype == torch.float32
    assert (means[-1] != means[-2]).float().mean() > 0.9


class Looked(Callback):
    """What is seen of a run after its last step."""

    def on_step(self, run, group):
        (learner,) = run.learners
        self.moments = {state[name].dtype for state in learner.optimizer.state.values() for name in MOMENTS}
        self.weights = {name: tensor.dtype for name, tensor in learner.sae.state_dict().items()}


MOMENTS = ("exp_avg", "exp_avg_sq")


@pytest.mark.parametrize("name", ["TopK", "BatchTopK", "JumpReLU"])
def test_weights_of_16_bits(name, tmp_path):
    sae, exact, looked = make(SELECTIONS[name]), make(SELECTIONS[name]), Looked()
    # Steps that weights of 16 bits see: at a small lr they stand still.
    options = {"steps": 100, "lr": 1e-2}
    expected = fit(exact, batches(), FitConfig(**options))
    result = fit(sae, batches(), FitConfig(**options, weights="bfloat16", ema=0.9, output=tmp_path), [looked])
    assert result.record["fvu"] == pytest.approx(expected.record["fvu"], rel=0.2)
    assert looked.moments == {torch.float32}
    # A threshold changes by less than 16 bits show.
    kept = sae.config.selection.exact
    assert looked.weights == {key: torch.float32 if key in kept else torch.bfloat16 for key in sae.state_dict()}
    assert same(SAE.from_pretrained(tmp_path), sae)


def test_products_of_16_bits(monkeypatch):
    from aksae import learner

    seen = set()

    def loss(*args, **kwargs):
        terms = learner_loss(*args, **kwargs)
        seen.add(terms.codes.values.dtype)
        return terms

    learner_loss = learner.sae_loss
    monkeypatch.setattr(learner, "sae_loss", loss)
    sae, exact, looked = make(), make(), Looked()
    result = fit(sae, batches(), FitConfig(steps=60, dtype="bfloat16"), [looked])
    assert seen == {torch.bfloat16}
    assert {*looked.weights.values(), *looked.moments} == {torch.float32}
    expected = fit(exact, batches(), FitConfig(steps=60))
    assert result.record["fvu"] == pytest.approx(expected.record["fvu"], rel=0.2)


# --------------------------------------------------------------------------------------------- what it is given


def test_batches_begin_again():
    few, many = make(), make()
    fit(few, batches(3), FitConfig(steps=9))
    fit(many, batches(3) * 3, FitConfig(steps=9))
    assert same(few, many)


def test_a_generator_that_ends_is_an_error():
    with pytest.raises(UserError, match=r"batches: ended after 3 batches, needs .* not a generator"):
        fit(make(), (b for b in batches(3)), FitConfig(steps=9))
    fit(make(), (b for b in batches(9)), FitConfig(steps=9))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "batches: got none"),
        ([3], r"batch 0: got int, needs a tensor, a pair \(x, target\) or a mapping"),
        ([torch.ones(3)], r"batch 0: x: got torch.float32 \[3\], needs a floating tensor \[B, D\]"),
        ([torch.ones(3, D).long()], "batch 0: x: got torch.int64"),
        ([torch.ones(3, D), torch.ones(3, D - 1)], f"batch 1: x: got width {D - 1}, needs {D}, the SAE's d_in"),
        ([torch.ones(0, D)], "batch 0: x: got no rows, needs at least one"),
        ([{"x": torch.ones(3, D), "k": torch.ones(3)}], r"batch 0: k: got torch.float32 \[3\], needs integers \[3\]"),
        ([{"x": torch.ones(3, D), "k": torch.ones(2).int()}], r"batch 0: k: got torch.int32 \[2\], needs"),
        ([{"y": torch.ones(3, D)}], "batch 0: got the field y, needs x"),
        ([{"k": torch.ones(3).int()}], "batch 0: got no field x"),
        ([(torch.ones(3, D), torch.ones(2, D))], "batch 0: target: got 2 rows, needs 3"),
        (
            [torch.ones(4, D), torch.full((4, D), float("nan"))],
            r"activations: got NaN .* in rows 0, 1, 2, 3 of batch 1",
        ),
        # Finite, until it is in the dtype of the weights.
        ([torch.full((4, D), 1e300, dtype=torch.float64)], "activations: got NaN or infinity in rows 0, 1, 2, 3 of"),
    ],
)
def test_a_bad_batch_is_named(given, message):
    with pytest.raises(UserError, match=message):
        fit(make(), given, FitConfig(steps=3))


def test_a_target_of_another_width():
    with pytest.raises(UserError, match="batch 0: target: got width 11, needs 10, the SAE's d_out"):
        fit(make(d_out=10), [(b, torch.ones(B, 11)) for b in batches()], FitConfig(steps=3))


def test_batches_of_any_size_and_dtype():
    x = rows(7 * B, dtype=torch.float64)
    sae, same_rows = make(), make()
    sizes = (B, 1, 2 * B, 3)
    given = [part.to(dtype) for part, dtype in zip(x.split(2 * B), (torch.float64, torch.float32, torch.float64))]
    records = records_of(sae, [part[:size] for part, size in zip(x.split(2 * B), sizes)], steps=4)
    assert records[-1]["rows"] == sum(sizes)
    assert sae.W_enc.dtype == torch.float32
    fit(sae, given, FitConfig(steps=3))
    fit(same_rows, [part.float() for part in x.split(2 * B)], FitConfig(steps=3))
    sae = make()
    fit(sae, given, FitConfig(steps=3))
    assert same(sae, same_rows)


def test_a_target_for_an_autoencoder():
    with pytest.raises(ValueError, match="target: got one, needs no target"):
        fit(make(), [(b, b) for b in batches()], FitConfig(steps=3))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps: got 0"),
        ({"lr": -1.0}, "lr: got -1.0"),
        ({"accumulate": 0}, "accumulate: got 0"),
        ({"decay_start": 2.0}, "decay_start: got 2.0"),
        ({"ema": 1.0}, "ema: got 1.0"),
        ({"keep": 0}, "keep: got 0"),
        ({"k_start": 9.0}, "k_steps: got 0, needs a number from 1 up"),
    ],
)
def test_bad_settings_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        fit(make(), batches(), FitConfig(**{"steps": 3, **fields}))


@pytest.mark.parametrize(
    ("name", "k_start", "message"),
    [
        ("AdaptiveK", 9, r"k_start: got 9 for AdaptiveK, k = 6..6, needs a number from 1 to 6"),
        ("TopK", 129, r"k_start: got 129 for TopK, k = 6, needs a number from 1 to 128"),
        ("TopK", 0, r"k_start: got 0 for TopK, k = 6, needs a number from 1"),
    ],
)
def test_a_start_that_no_row_can_have(name, k_start, message):
    with pytest.raises(UserError, match=message):
        fit(make(SELECTIONS[name]), batches(), FitConfig(steps=3, k_start=k_start, k_steps=2))


def test_a_wrapped_sae_is_refused():
    with pytest.raises(UserError, match="sae: got Sequential, needs an SAE, or several; no wrapper"):
        fit([torch.nn.Sequential(make())], batches(), FitConfig(steps=3))


# -------------------------------------------------------------------------------------------------- callbacks


def test_the_log(tmp_path):
    fit(make(), batches(), FitConfig(steps=25, output=tmp_path, log_every=10))
    records = log(tmp_path)
    assert [record["step"] for record in records] == [0, 10, 20, 24]
    assert [record["rows"] for record in records] == [B, 11 * B, 21 * B, 25 * B]
    assert {"loss", "fvu", "l0", "dead", "lr", "tokens_per_s", "data_wait"} <= records[0].keys()
    assert same(SAE.from_pretrained(tmp_path), SAE.from_pretrained(checkpoints(tmp_path)[-1]))


def test_a_run_stops_early():
    result = fit(make(), batches(), FitConfig(steps=500, log_every=1), [EarlyStop("step", patience=5)])
    assert result.steps == 6


class Noted(Callback):
    def __init__(self):
        self.all = []

    def on_log(self, run, record):
        self.all.append(dict(record))


def test_evaluation_every_few_steps():
    seen = Evaluate(4, lambda run: {"mine": fvu(run.learners[0].sae, rows(100))})
    result = fit(make(), batches(), FitConfig(steps=10), [seen, records := Noted()])
    assert [result["step"] for result in seen.results] == [4, 8]
    # In the record after it, once.
    assert ["mine" in record for record in records.all] == [False, True]
    assert result.record["mine"] == seen.results[-1]["mine"]


def test_what_is_not_installed_is_named(monkeypatch):
    from aksae import callbacks

    for name in ("wandb", "trackio", "tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    for make_callback in (callbacks.Wandb, callbacks.Trackio, lambda: callbacks.TensorBoard("x")):
        with pytest.raises(UserError, match="got no such package, needs it installed"):
            make_callback()


# ------------------------------------------------------------------------------------------------------ cost


class Costs(TorchDispatchMode):
    """Counts reads of the device by the host."""

    def __init__(self):
        super().__init__()
        self.reads = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op._schema.name in ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero"):
            self.reads[op._schema.name] += 1
        return op(*args, **(kwargs or {}))


@every_selection
def test_a_step_reads_nothing_from_the_device(name, monkeypatch):
    """As on an accelerator: what is looked at on the CPU alone is told that it is elsewhere."""
    from aksae.learner import Learner
    from aksae.losses import DeadLatents

    monkeypatch.setattr(DeadLatents, "may_be", lambda self: True)
    sae = make(SELECTIONS[name])
    learner = Learner(sae, FitConfig(steps=20), torch.device("cpu"))
    from aksae.batches import Batch

    batch = Batch(batches()[0])
    learner.start([batch])
    # Need is measured after the second of these; of the step that follows, rows are kept for when it is again.
    for step in (0, 6):
        learner.update([batch], step, False)
    import aksae_kernels.backends.native as native
    from aksae_kernels import ops

    costs = Costs()
    with pytest.MonkeyPatch.context() as patch:
        # The kernels of the CPU may look at its memory.
        for function in ("batch_topk_encode", "threshold_encode", "adam_step_"):
            patch.setattr(native, function, unseen(getattr(native, function)))
        # So may the map and the check of a price, which refuse NaN there.
        patch.setattr(KMap, "__call__", unseen(KMap.__call__))
        patch.setattr(ops, "rows_of_price", unseen(ops.rows_of_price))
        with costs:
            learner.update([batch], 7, False)
    assert not costs.reads


def unseen(function):
    def call(*args):
        with torch.utils._python_dispatch._disable_current_modes():
            return function(*args)

    return call


# ------------------------------------------------------------------------------------------------- going on


class CutOff(Callback):
    def __init__(self, step: int):
        self.step = step

    def on_step(self, run, group):
        if run.step == self.step:
            raise KeyboardInterrupt


@every_selection
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, name):
    def run(folder, *callbacks):
        sae = make(SELECTIONS[name])
        config = FitConfig(steps=30, checkpoint_every=4, log_every=3, resume=folder, ema=0.9, dead_after=300)
        fit(sae, batches(7), config, callbacks)
        return sae

    whole = run(tmp_path / "whole")
    for step in (2, 5, 13, 29):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut", CutOff(step))
    assert same(run(tmp_path / "cut"), whole)
    logs = [log(tmp_path / name) for name in ("whole", "cut")]
    for record in itertools.chain(*logs):
        del record["tokens_per_s"], record["data_wait"]
    assert logs[0] == logs[1]


def test_the_last_checkpoints_are_kept(tmp_path):
    fit(make(), batches(), FitConfig(steps=30, checkpoint_every=4, output=tmp_path, keep=3))
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{step:09d}" for step in (24, 28, 30)]


def test_a_folder_without_a_complete_checkpoint_starts_anew(tmp_path):
    half = tmp_path / "run" / ".checkpoint-000000004.tmp"
    half.mkdir(parents=True)
    (half / "state.pt").write_bytes(b"half")
    (tmp_path / "run" / "checkpoint-000000009").mkdir()
    sae, other = make(), make()
    fit(sae, batches(), FitConfig(steps=5, resume=tmp_path / "run"))
    fit(other, batches(), FitConfig(steps=5))
    assert same(sae, other)


def test_a_source_that_knows_where_it_stands_is_put_back(tmp_path):
    class Source:
        def __init__(self):
            self.at, self.read = 0, 0

        def __iter__(self):
            while True:
                self.at, self.read = self.at + 1, self.read + 1
                yield batches()[(self.at - 1) % 30]

        def state_dict(self):
            return {"at": self.at}

        def load_state_dict(self, state):
            self.at = state["at"]

    sae, whole, source = make(), make(), Source()
    with pytest.raises(KeyboardInterrupt):
        fit(make(), Source(), FitConfig(steps=20, checkpoint_every=8, resume=tmp_path), [CutOff(11)])
    fit(sae, source, FitConfig(steps=20, checkpoint_every=8, resume=tmp_path))
    fit(whole, batches(), FitConfig(steps=20))
    assert source.read == 12
    assert same(sae, whole)


def test_other_runs_cannot_be_gone_on_with(tmp_path):
    fit(make(), batches(), FitConfig(steps=4, output=tmp_path))
    with pytest.raises(UserError, match="got a run of 1 SAEs, needs one of 2"):
        fit([make(), make()], batches(), FitConfig(steps=8, resume=tmp_path))
    other = SAE(SAEConfig(D, 2 * F, TopK(6)))
    with pytest.raises(UserError, match=f"sae: got d_sae = {2 * F}, needs {F}, as in .*checkpoint-000000004"):
        fit(other, batches(), FitConfig(steps=8, resume=tmp_path))
    with pytest.raises(UserError, match=r"sae: got selection = BatchTopK, k = 6, needs TopK, k = 6, as in"):
        fit(make(SELECTIONS["BatchTopK"]), batches(), FitConfig(steps=8, resume=tmp_path))


@pytest.mark.parametrize("steps", [25, 10])
def test_a_finished_run_has_nothing_left_to_do(tmp_path, steps):
    sae, again = make(), make()
    first = fit(sae, batches(), FitConfig(steps=25, output=tmp_path))
    second = fit(again, batches(), FitConfig(steps=steps, resume=tmp_path))
    assert second.steps == 25
    assert second.record == first.record
    assert second.record["step"] == 24
    assert same(sae, again)
    assert [record["step"] for record in log(tmp_path)] == [0, 10, 20, 24]


def test_an_ended_run_stays_ended(tmp_path):
    stop = {"name": "step", "patience": 5}
    config = FitConfig(steps=500, log_every=1, resume=tmp_path)
    assert fit(make(), batches(), config, [EarlyStop(**stop)]).steps == 6
    assert fit(make(), batches(), config, [EarlyStop(**stop)]).steps == 6
    # Without whoever ended it, it goes on.
    assert fit(make(), batches(), FitConfig(steps=8, resume=tmp_path)).steps == 8


class Drawn:
    """Batches in an order, and of values, that the global generators decide."""

    def __iter__(self):
        for place in torch.randperm(7):
            yield batches(7)[place] + random.random() + float(np.random.rand())  # noqa: NPY002


class Draws(Callback):
    def on_step(self, run, group):
        torch.rand(1), random.random()


@pytest.mark.parametrize("source", ["loader", "drawn"])
def test_random_batches_come_again(tmp_path, source):
    """Also where something else draws from the same generators in between."""

    def run(folder, *callbacks):
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)  # noqa: NPY002
        given = Drawn() if source == "drawn" else DataLoader(rows(7 * B), batch_size=B, shuffle=True)
        sae = make()
        fit(sae, given, FitConfig(steps=30, checkpoint_every=4, resume=folder), [Draws(), *callbacks])
        return sae

    whole = run(tmp_path / "whole")
    for step in (6, 19):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut", CutOff(step))
    assert same(run(tmp_path / "cut"), whole)


def test_fewer_batches_than_were_taken(tmp_path):
    fit(make(), batches(9), FitConfig(steps=8, output=tmp_path))
    with pytest.raises(UserError, match="ended after 3 batches of a pass, needs at least the 8"):
        fit(make(), batches(3), FitConfig(steps=12, resume=tmp_path))


# ------------------------------------------------------------------------------------------- where it writes


@pytest.mark.parametrize("left", ["checkpoints", "sae", "log"])
def test_another_run_is_not_replaced(tmp_path, left):
    if left == "checkpoints":
        fit(make(), batches(), FitConfig(steps=4, output=tmp_path))
        (tmp_path / "sae.safetensors").unlink()
        (tmp_path / "metrics.jsonl").unlink()
    elif left == "sae":
        make().save_pretrained(tmp_path)
    else:
        (tmp_path / "metrics.jsonl").write_text("{}\n")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"output: got .*, which holds another run .*, needs a new folder, resume"):
        fit(make(), batches(), FitConfig(steps=6, output=tmp_path))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    fit(make(), batches(), FitConfig(steps=6, output=tmp_path, overwrite=True))
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-000000006"]
    assert [record["step"] for record in log(tmp_path)] == [0, 5]


def test_going_on_in_another_folder(tmp_path):
    fit(make(), batches(), FitConfig(steps=4, output=tmp_path / "a"))
    before = [path.name for path in checkpoints(tmp_path / "a")]
    sae, whole = make(), make()
    config = FitConfig(steps=8, resume=tmp_path / "a", output=tmp_path / "b")
    fit(sae, batches(), config)
    assert [path.name for path in checkpoints(tmp_path / "a")] == before
    assert [path.name for path in checkpoints(tmp_path / "b")] == ["checkpoint-000000008"]
    with pytest.raises(UserError, match="which holds another run"):
        fit(whole, batches(), config)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    for folder, message in ((tmp_path / "file", "a file, needs a folder"), (tmp_path / "file" / "run", "needs a fold")):
        with pytest.raises(UserError, match=f"output: got {folder}, {message}"):
            fit(make(), batches(), FitConfig(steps=3, output=folder))


class Keeps(Callback):
    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return {"state": self.state}


@pytest.mark.parametrize("state", [lambda: 0, np.float64(1), Path("x")], ids=["function", "numpy", "path"])
def test_a_state_that_could_not_be_read_back(tmp_path, state):
    """It is found out before the first step, not when the run is resumed."""
    with pytest.raises(UserError, match=r"Keeps.state_dict: got something that cannot be read back .*, needs tensors"):
        fit(make(), batches(), FitConfig(steps=4, output=tmp_path), [Keeps(state)])
    assert not checkpoints(tmp_path)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_cut_off_while_a_checkpoint_is_written(tmp_path, error, monkeypatch):
    from aksae import checkpoints as module

    flush, calls = module._flush, itertools.count()

    def fail(path):
        if next(calls) == 8:
            raise error
        flush(path)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_flush", fail)
        with pytest.raises(error):
            fit(make(), batches(), FitConfig(steps=20, checkpoint_every=4, output=tmp_path))
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-000000004"]
    assert not list(tmp_path.glob(".checkpoint-*"))
    sae, whole = make(), make()
    fit(sae, batches(), FitConfig(steps=20, checkpoint_every=4, resume=tmp_path))
    fit(whole, batches(), FitConfig(steps=20))
    assert same(sae, whole)


FULL = """
import resource, signal, sys
from pathlib import Path
import test_fit
from aksae import FitConfig, fit
from aksae.callbacks import Callback

class Fills(Callback):
    def on_step(self, run, group):
        if run.step == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
config = FitConfig(steps=20, checkpoint_every=4, output=Path(sys.argv[1]))
try:
    fit(test_fit.make(), test_fit.batches(), config, [Fills()])
except OSError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    """In a process that may write 60,000 bytes to a file: the SAE's fit in, the optimizer's moments do not."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"[Errno 27] File too large: '{tmp_path}/.checkpoint-000000008.tmp/state.pt'\n"
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-000000004"]
    assert SAE.from_pretrained(tmp_path)


def environment(**variables: str) -> dict[str, str]:
    """Of a process that can import these tests."""
    path = os.pathsep.join([str(ROOT / "tests"), *sys.path])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **variables}


CHILD = """
import os, random, signal, sys, time
from pathlib import Path
import test_fit
from aksae import FitConfig, checkpoints, fit
from aksae.callbacks import Callback

folder, kind, left, delay = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])

def reached(what):
    # A process of its own kills this one, a random moment after what it was told to wait for.
    global left
    left -= what == kind
    if what == kind and left == 0 and os.fork() == 0:
        time.sleep(delay)
        os.kill(os.getppid(), signal.SIGKILL)
        os._exit(0)
    return what == kind and left == 0

class Steps(Callback):
    def on_step(self, run, group):
        reached("step")

def slow(path):
    # Every file of a checkpoint is written by now, and the checkpoint is without its name.
    if reached("write"):
        time.sleep(60)
    flush(path)

flush, checkpoints._flush = checkpoints._flush, slow
sae = test_fit.make(test_fit.SELECTIONS[sys.argv[5]])
config = FitConfig(steps=200, checkpoint_every=5, log_every=5, resume=folder, dead_after=300, ema=0.9)
fit(sae, test_fit.batches(11), config, [Steps()])
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["BatchTopK", "Need"])
def test_killed_at_any_moment_it_ends_with_the_same_bits(tmp_path, name):
    """SIGKILL, ten times, at moments drawn at random: five anywhere, five within the write of a checkpoint, before one
    or the other of its files and folders is on the disk."""

    def run(folder: Path, kind: str, count: int, delay: float) -> int:
        command = [sys.executable, "-c", CHILD, str(folder), kind, str(count), str(delay), name]
        return subprocess.run(command, env=environment(), timeout=300, check=False).returncode

    assert run(tmp_path / "whole", "never", 1, 0) == 0
    moments, cut_writes = random.Random(0), 0
    for number in range(10):
        # Each gets some 12 steps further, of the 200.
        kind, count = ("write", moments.randint(1, 20)) if number % 2 else ("step", moments.randint(1, 30))
        assert run(tmp_path / "cut", kind, count, moments.uniform(0, 0.002)) == -signal.SIGKILL
        cut_writes += bool(list((tmp_path / "cut").glob(".checkpoint-*.tmp")))
    assert cut_writes >= 3
    assert checkpoints(tmp_path / "cut")
    assert run(tmp_path / "cut", "never", 1, 0) == 0
    assert same(SAE.from_pretrained(tmp_path / "cut"), SAE.from_pretrained(tmp_path / "whole"))
    assert [record["step"] for record in log(tmp_path / "cut")] == [*range(0, 200, 5), 199]
    assert not list((tmp_path / "cut").glob(".*"))


# ----------------------------------------------------------------------------------------------- data parallel


class Parts(BatchTopK):
    """BatchTopK with a budget for each half of a batch, as two processes have it."""

    def choose(self, sae, x, encoder, k, wanted):
        halves = zip(x.chunk(2), encoder.x.chunk(2))
        codes = [super(Parts, self).choose(sae, rows, encoder._replace(x=u), k, wanted).codes for rows, u in halves]
        return Chosen(SparseCodes(*(torch.cat(parts) for parts in zip(*codes))))


def trained_by(name: str, world: int, rank: int) -> tuple[SAE, list[dict]]:
    """One process of some, on its share of every batch."""
    parts = isinstance(SELECTIONS[name], BatchTopK) and world == 1
    sae = make(Parts(6) if parts else SELECTIONS[name], torch.float64)
    mine = [b.chunk(world)[rank] for b in batches(dtype=torch.float64)]
    records = []
    config = FitConfig(steps=30, log_every=1, dead_after=300, sparsity_coef=0.01, normalize="mean-norm", device="cpu")
    fit(sae, mine, config, [Records(records.append)])
    return sae, records


def launch(n: int, code: str, *arguments: str, fails: bool = False) -> str:
    """What `n` processes under torchrun print."""
    with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
        script.write(code)
        script.flush()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
        done = subprocess.run(
            [*command, script.name, *arguments], env=environment(), capture_output=True, text=True, timeout=300
        )
    assert (done.returncode != 0) == fails, done.stderr[-3000:]
    return done.stdout + done.stderr


SHARES = """
import os, sys
import torch
import test_fit
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
for name in sys.argv[2:]:
    sae, records = test_fit.trained_by(name, world, rank)
    torch.save([sae.state_dict(), records], f"{sys.argv[1]}/{name}-{rank}.pt")
"""


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    names = ["TopK", "BatchTopK", "JumpReLU", "AdaptiveK", "Need"]
    launch(2, SHARES, str(tmp_path), *names)
    for name in names:
        (weights, records), (others, nothing) = (torch.load(tmp_path / f"{name}-{rank}.pt") for rank in (0, 1))
        assert nothing == [], "the log is rank 0's"
        sae, expected = trained_by(name, 1, 0)
        if name in ("TopK", "AdaptiveK"):
            assert any(record["aux"] > 0 for record in expected), "the auxiliary loss should have something to do"
        assert len(records) == len(expected)
        for one, two in zip(expected, records):
            for key in one.keys() - {"tokens_per_s", "data_wait"}:
                assert two[key] == pytest.approx(one[key], rel=1e-12, abs=1e-12), (name, one["step"], key)
        for key, tensor in sae.state_dict().items():
            torch.testing.assert_close(weights[key], tensor, rtol=1e-9, atol=1e-11)
            assert torch.equal(weights[key], others[key]), (name, key)


APART = """
import os, random, signal, sys
import torch
import test_fit
from aksae import FitConfig, fit
from aksae.callbacks import Callback

folder, kill_at = sys.argv[1], int(sys.argv[2])
rank = int(os.environ["RANK"])
torch.manual_seed(rank)

class Batches:
    # Of another length on each process, and in an order of its own.
    def __iter__(self):
        batches = test_fit.batches(5 + 2 * rank)
        return (batches[place] for place in torch.randperm(len(batches)))

class Killed(Callback):
    def on_step(self, run, group):
        if run.step == kill_at and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

sae = test_fit.make(test_fit.SELECTIONS[sys.argv[3]])
config = FitConfig(steps=30, checkpoint_every=4, log_every=3, dead_after=300, resume=folder, device="cpu")
fit(sae, Batches(), config, [Killed()])
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["BatchTopK", "Need"])
def test_two_processes_go_on_with_the_same_bits(tmp_path, name):
    """Each has rows of its own that need is to be measured on: it is after 10 steps, and 8 are in the checkpoint."""
    launch(2, APART, str(tmp_path / "whole"), "-1", name)
    launch(2, APART, str(tmp_path / "cut"), "11", name, fails=True)
    assert [path.name for path in checkpoints(tmp_path / "cut")] == ["checkpoint-000000004", "checkpoint-000000008"]
    with pytest.raises(UserError, match="checkpoint-000000008: got a run of 2 processes, needs one of 1"):
        fit(make(SELECTIONS[name]), batches(), FitConfig(steps=30, resume=tmp_path / "cut"))
    launch(2, APART, str(tmp_path / "cut"), "-1", name)
    assert same(SAE.from_pretrained(tmp_path / "cut"), SAE.from_pretrained(tmp_path / "whole"))
    assert [record["step"] for record in log(tmp_path / "cut")] == [*range(0, 30, 3), 29]


ENDED = """
import atexit, os, sys

def print_threads():
    names = [open(f"/proc/self/task/{number}/comm").read().strip() for number in os.listdir("/proc/self/task")]
    # In one piece, since both processes write there.
    sys.stdout.write(" ".join(["threads at the end:", *sorted(name for name in names if "gloo" in name)]) + "\\n")

# What is registered first is called last.
atexit.register(print_threads)
import test_fit
test_fit.trained_by("TopK", 2, int(os.environ["RANK"]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads of C++ are seen under /proc alone")
def test_no_thread_of_the_group_outlives_it(tmp_path):
    """One that drops a tensor while the interpreter ends would abort the process: a run that failed after its end."""
    lines = [line for line in launch(2, ENDED).splitlines() if line.startswith("threads at the end:")]
    assert lines == ["threads at the end:"] * 2


UNEVEN = """
import os, sys
import torch
import test_fit
from aksae import FitConfig, UserError, fit
from aksae.callbacks import Callback, EarlyStop, Records

rank, folder = int(os.environ["RANK"]), sys.argv[1]
# Shares of a batch that are not of one size.
parts = [b.split([40, 24])[rank] for b in test_fit.batches(dtype=torch.float64)]
sae, records = test_fit.make(dtype=torch.float64), []
config = FitConfig(steps=10, log_every=1, dead_after=300, device="cpu", output=folder)
fit(sae, parts, config, [Records(records.append)])
torch.save(records, f"{folder}/{rank}.pt")

class Ends(Callback):
    # One process alone asks for it.
    def on_step(self, run, group):
        run.stopped = run.stopped or (rank == 1 and run.step == 4)

result = fit(test_fit.make(), test_fit.batches(), FitConfig(steps=50, log_every=5, device="cpu"), [Ends()])
try:
    fit(test_fit.make(), test_fit.batches(), FitConfig(steps=3, device="cpu", output=folder))
except UserError as error:
    # As one line, since both write at once.
    sys.stdout.write(f"{rank} stopped after {result.steps}: {error}\\n")
"""


@pytest.mark.slow
def test_two_processes_agree(tmp_path):
    """On the mean over rows where they have different numbers of them, on when to stop, and on what is refused."""
    said = launch(2, UNEVEN, str(tmp_path))
    records, sae = [], make(dtype=torch.float64)
    config = FitConfig(steps=10, log_every=1, dead_after=300)
    fit(sae, batches(dtype=torch.float64), config, [Records(records.append)])
    for one, two in zip(records, torch.load(tmp_path / "0.pt"), strict=True):
        for key in one.keys() - {"tokens_per_s", "data_wait"}:
            assert two[key] == pytest.approx(one[key], rel=1e-12, abs=1e-12), (one["step"], key)
    assert f"0 stopped after 6: output: got {tmp_path}, which holds another run" in said
    assert f"1 stopped after 6: rank 0: output: got {tmp_path}, which holds another run" in said
