"""The benchmarks run, check before they time, judge by the targets, and keep what they print."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_dispatch import run_python

import aksae_kernels as ak
from aksae_kernels.optim import SAEAdam
from benchmarks import child, fit, fvu, intervene, isa, memory, ops, peers, phases, run, steps, timing, train_step
from benchmarks.case import OURS, Case, Contest, Rival
from benchmarks.problem import KS, Problem, Shape
from benchmarks.report import NotMeasured, Row, Target

SHAPE = Shape(32, 48, 256)
ARGUMENTS = ["--shape", *map(str, SHAPE), "--rounds", "2"]

pytestmark = pytest.mark.slow
has_clear_refs = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc/self/clear_refs")
has_binary = pytest.mark.skipif("cpu" not in ak.available_backends(), reason="needs the C++ backend")


def one_line(text: str) -> str:
    (line,) = text.splitlines()
    return line


# ------------------------------------------------------------------------------------------------- the table


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> SimpleNamespace:
    """A run of the whole suite with one of the two choices of k: what it printed, and what it kept."""
    path = tmp_path_factory.mktemp("results") / "new" / "cpu.json"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(run, "KS", KS[1:])
        status = run.main([*ARGUMENTS, "--json", str(path)])
    return SimpleNamespace(status=status, printed=printed.getvalue(), kept=json.loads(path.read_text()))


def test_the_suite_has_every_row_of_the_target_table():
    cases = [(case.what, case.problem.shape, case.problem.label) for case in run.cpu_suite(run.SHAPES)]
    assert len(set(cases)) == len(cases)
    everywhere = {"topk_encode fp32", "topk_encode bf16", "topk_encode fp32 without bf16 units"}
    for what in everywhere:
        assert {(shape, k) for name, shape, k in cases if name == what} == {(s, k) for s in run.SHAPES for k in KS}
    others = {(name, k) for name, shape, k in cases if name not in everywhere and shape == run.SHAPES[0]}
    in_both = {
        "topk_select",
        "decode_mse forward + value gradient",
        "both weight gradients",
        "forward + backward + SAEAdam",
        "topk_select, all-equal rows",
        "topk_select, sorted rows",
        "topk_select, one hot block rows",
        "topk_select, near-ties rows",
        "topk_encode fp32, latents all alike",
        "peak memory of a step",
    }
    constant = {("price_select, one pass", KS[0]), ("topk_encode + price_select", KS[0])}
    assert others == {(name, k) for name in in_both for k in KS} | constant | {("decode_mse + backward", KS[1])}
    assert {shape for name, shape, k in cases if name == "price_select, one pass"} == set(run.SHAPES)


def test_every_row_is_measured_printed_and_kept(table):
    assert table.status == 0
    assert table.kept["machine"].keys() >= {"CPU", "bf16 units", "threads", "torch", "oneDNN", "MKL", "commit"}
    assert not table.kept["wrong"]
    assert f"torch {torch.__version__}" in table.printed.splitlines()[0]
    rows = {(row["what"], row["rival"]): row for row in table.kept["rows"]}
    assert len(rows) == len(table.kept["rows"])
    for (what, rival), row in rows.items():
        (line,) = (line for line in table.printed.splitlines() if line.startswith(f"{what} / {rival} "))
        assert line.endswith(row["verdict"] or "-")
        assert row["ratio"]["p50"] == pytest.approx(row["ours"]["p50"] / row["theirs"]["p50"])
        for figures in (row["ours"], row["theirs"]):
            assert 0 < figures["p20"] <= figures["p50"] <= figures["p80"]
        assert Shape(**row["shape"]) == SHAPE


def test_the_targets_are_those_that_were_set(table):
    targets = {f"{row['what']} / {row['rival']}": (row["must"], row["stretch"]) for row in table.kept["rows"]}
    for start, expected in {
        "topk_encode fp32 / MKL": (0.40, 0.30),
        "topk_encode bf16 / bf16": (1.15, 1.05),
        "topk_select / torch.topk": (1 / 6, 1 / 10),
        "decode_mse forward": (1.15, 1.0),
        "both weight": (0.25, 0.12),
        "forward + backward + SAEAdam / dense": (None, None),
        "decode_mse + backward / constant k": (1.15, 1.05),
        "topk_select, near-ties rows / random": (1.5, 1.2),
        "topk_encode fp32, latents": (None, None),
    }.items():
        (found,) = (target for name, target in targets.items() if name.startswith(start))
        assert found == expected, start
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        assert targets["topk_encode fp32 / oneDNN linear"] == (0.80, 0.60)
        assert targets["forward + backward + SAEAdam / oneDNN linear"] == (1.4, 1.0)


@has_binary
def test_the_encode_without_bf16_units_ran_on_a_forced_instruction_set(table):
    (row,) = (row for row in table.kept["rows"] if "without bf16 units" in row["what"])
    assert row["what"].endswith(("(avx512)", "(avx2)"))
    assert (row["must"], row["stretch"]) == isa.TARGET


@has_clear_refs
def test_memory_is_measured_in_bytes(table):
    (row,) = (row for row in table.kept["rows"] if row["unit"] == "bytes")
    assert row["what"] == "peak memory of a step"
    assert row["must"] == 0.25
    assert row["stretch"] <= row["must"]


def test_only_some_rows(capsys):
    assert run.main([*ARGUMENTS, "--only", "weight grad"]) == 0
    lines = capsys.readouterr().out.split("\n\n")[1].splitlines()
    assert [line.partition(" / ")[0] for line in lines[1:]] == ["both weight gradients"] * 2


def test_without_onednn_mkl_stands_alone(monkeypatch):
    problem = Problem(SHAPE, "64")
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert [rival.name for rival in ops.encode_fp32(problem).rivals] == [ops.MKL]
    first, *_ = steps.step(problem).rivals
    assert (first.name, first.target) == (ops.MKL, None)


# ------------------------------------------------------------------------------------------ what is refused


def suite_of(monkeypatch, *cases):
    monkeypatch.setattr(run, "cpu_suite", lambda shapes: iter(cases))


def test_a_wrong_result_is_not_timed(monkeypatch, capsys, tmp_path):
    def wrong():
        raise AssertionError("off by one\nand more")

    called = []
    contest = Contest(lambda: called.append(1), wrong, (Rival("theirs", lambda: called.append(2)),))
    suite_of(monkeypatch, Case("broken", Problem(SHAPE, "1"), lambda problem: contest))
    assert run.main([*ARGUMENTS, "--json", str(tmp_path / "cpu.json")]) == 1
    assert "not timed, its result is wrong: off by one\n" in capsys.readouterr().out
    assert not called
    kept = json.loads((tmp_path / "cpu.json").read_text())
    assert kept["wrong"] == [{"what": "broken", "shape": SHAPE._asdict(), "k": "1", "why": "off by one"}]


@pytest.mark.parametrize(
    ("op", "prepare"),
    [
        ("topk_encode", ops.encode_fp32),
        ("topk_encode", ops.encode_bf16),
        ("topk_encode", ops.encode_equal_latents),
        ("topk_select", ops.select),
        ("decode_mse", ops.decode),
        ("decode_mse", ops.ragged),
        ("sparse_weight_grad", ops.weight_grads),
        ("decode_mse", steps.step),
    ],
)
def test_the_checks_see_an_op_that_is_off_by_two_percent(monkeypatch, op, prepare):
    contest = prepare(Problem(SHAPE, KS[1]))
    contest.check()
    right = getattr(ak, op)

    def wrong(*args, **kwargs):
        result = right(*args, **kwargs)
        return result._replace(values=1.02 * result.values) if isinstance(result, ak.SparseCodes) else 1.02 * result

    monkeypatch.setattr(ak, op, wrong)
    with pytest.raises(AssertionError):
        contest.check()


def test_the_check_of_a_step_sees_an_optimizer_that_does_nothing(monkeypatch):
    contest = steps.step(Problem(SHAPE, KS[1]))
    monkeypatch.setattr(SAEAdam, "step", lambda self: None)
    with pytest.raises(AssertionError):
        contest.check()


def test_what_cannot_be_measured_is_said_and_is_no_failure(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(memory, "_PROC", tmp_path)
    suite_of(monkeypatch, memory.MemoryCase("peak memory of a step", Problem(SHAPE, "64")))
    assert run.main(ARGUMENTS) == 0
    assert "not measured: there is no /proc/self/clear_refs" in capsys.readouterr().out


def test_a_result_that_cannot_be_written_is_one_line_and_a_failure(monkeypatch, capsys, tmp_path):
    suite_of(monkeypatch)
    (tmp_path / "file").touch()
    assert run.main([*ARGUMENTS, "--json", str(tmp_path / "file" / "cpu.json")]) == 1
    assert "the result was not kept" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("stderr", "error", "message"),
    [
        ("Traceback\nAssertionError: a better entry was left out", AssertionError, "^a better entry was left out$"),
        ("Traceback\nRuntimeError: no such instruction set", NotMeasured, "RuntimeError: no such instruction set"),
        ("", NotMeasured, "exit status -9"),
    ],
)
def test_how_a_child_fails(monkeypatch, stderr, error, message):
    done = subprocess.CompletedProcess([], -9, "", stderr)
    monkeypatch.setattr(child.subprocess, "run", lambda *args, **kwargs: done)
    with pytest.raises(error, match=message):
        child.output_of("isa", env={})


# ------------------------------------------------------------------------------------------------- the parts


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [(0.1, "stretch"), (0.5, "stretch"), (0.51, "must"), (0.8, "must"), (0.81, "missed"), (math.nan, "missed")],
)
def test_verdict(ratio, verdict):
    assert Target(0.8, 0.5).verdict(ratio) == verdict


def test_a_row_judges_the_quotient_of_the_medians():
    row = Row.compare("a", "b", Problem(SHAPE, "64"), [1.0, 2.0, 9.0], [4.0, 5.0, 3.0], Target(0.4, 0.3))
    assert row.ratio.p50 == pytest.approx(2 / 4)
    assert row.ratio.p20 < 2 / 5 < row.ratio.p80
    assert row.verdict == "missed"


def test_quantiles():
    assert timing.quantiles([3.0]) == (3, 3, 3)
    assert timing.quantiles([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == pytest.approx((2, 3.5, 5))


def test_contenders_take_turns_after_a_warm_up():
    calls = []
    seconds = timing.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls == ["a", "b"] * 3
    assert [len(samples) for samples in seconds.values()] == [2, 2]


def test_phases_exclude_what_has_a_phase_of_its_own(monkeypatch):
    now = 0.0

    class Worker:
        def whole(self):
            passes(1)
            self.part()
            passes(2)

        def part(self):
            passes(10)

    def passes(seconds):
        nonlocal now
        now += seconds

    monkeypatch.setattr(phases.time, "perf_counter", lambda: now)
    worker = Worker()
    spans = (phases.Span(worker, "whole", "backward"), phases.Span(Worker, "part", "select"))
    with phases.timed(spans) as seconds:
        worker.whole()
        passes(100)
    assert seconds == dict.fromkeys(phases.PHASES, 0) | {"backward": 3, "select": 10, "other": 100}
    worker.whole()
    assert seconds["select"] == 10
    assert not vars(worker)


def test_k_of_a_problem():
    assert (Problem(SHAPE, "64").k == 64).all()
    k = Problem(Shape(1000, 1, 4096), "20..320").k
    assert (k.min(), k.max()) == (20, 320)
    assert Problem(Shape(4, 1, 8), "20..320").k.tolist() == [8] * 4


@has_clear_refs
def known_peaks() -> None:
    """Run in a fresh interpreter, where no other test has left memory behind: steps that need 96 MB."""
    mega = 1 << 20

    class Step:
        def __init__(self, forward, update):
            self.temporary = {"forward": forward, "update": update}
            self.weight = torch.nn.Parameter(torch.ones(16 * mega))
            self.optimizer = SimpleNamespace(param_groups=[{"params": [self.weight]}], state={})

        def forward(self, x):
            return torch.ones(self.temporary["forward"] * mega // 4).sum()

        def update(self, loss):
            self.weight.grad = torch.ones_like(self.weight)
            torch.ones(self.temporary["update"] * mega // 4)
            self.weight.grad = None

        def __call__(self, x):
            self.optimizer.state[self.weight] = {"step": 1, "exp_avg": torch.ones_like(self.weight)}
            self.update(self.forward(x))

    found = [memory.peak(Step(*temporary), torch.zeros(())) for temporary in ((96, 40), (40, 96))]
    print(json.dumps([[bytes_ / mega, loss / (mega // 4)] for bytes_, loss in found]))


def test_peak_memory_counts_what_is_neither_weight_nor_gradient_nor_state():
    said = run_python("import test_benchmarks; test_benchmarks.known_peaks()", **memory.MALLOC)
    for (found, loss), forward in zip(json.loads(said.splitlines()[-1]), (96, 40), strict=True):
        assert found == pytest.approx(96, abs=4)
        assert loss == forward


# ------------------------------------------------------------------------------------- peers, and the phases


class DensePeer(steps.DenseStep):
    """A host that need not be installed: accelerated, it does what it did."""

    def __init__(self, W, k):
        super().__init__(W, torch.full((SHAPE.B,), k))

    def accelerate(self):
        self.accelerated = True

    @torch.no_grad()
    def infer(self, x):
        scores = x @ self.W_enc.T + self.b_enc
        values, indices = self.select(scores)
        return torch.zeros_like(scores).scatter(-1, indices, values) @ self.W_dec


class WrongPeer(DensePeer):
    def __init__(self, W, k):
        super().__init__(1.1 * W, k)


class WrongWhenAccelerated(DensePeer):
    def accelerate(self):
        self.W_enc.data.mul_(1.1)


class WrongInInference(DensePeer):
    def infer(self, x):
        return super().infer(x) * (1.1 if hasattr(self, "accelerated") else 1)


def peer_of(make, **options):
    return peers.Peer("a peer", "torch", "torch", make, **options)


def of_peers(monkeypatch, *some):
    monkeypatch.setattr(peers, "PEERS", some)
    # Children know the real ones.
    monkeypatch.setattr(peers, "output_of", lambda *arguments, env: 1000 + ("--accelerated" in arguments))


def test_peers_that_are_not_there_are_listed(monkeypatch, capsys):
    missing = peers.PEERS[0]._replace(package="aksae-no-such-package")
    broken = peers.PEERS[1]._replace(package="torch", module="aksae.no_such_module")
    of_peers(monkeypatch, missing, broken)
    assert peers.main(ARGUMENTS) == 0
    lines = {line.partition(": ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "not installed: pip install aksae-no-such-package" in lines[missing.name]
    assert "its import fails: ModuleNotFoundError: No module named 'aksae.no_such_module'" in lines[broken.name]


def test_peers_and_the_plot_of_their_phases(monkeypatch, capsys, tmp_path):
    peer = peer_of(DensePeer, ours=peers.CLIPPED, target=Target(1e9, 1e-9), accelerated=Target(1e9, 1e8))
    of_peers(monkeypatch, peer, peer_of(DensePeer)._replace(name="another"))
    path = tmp_path / "peers.json"
    assert peers.main([*ARGUMENTS, "--json", str(path)]) == 0
    assert "training step / a peer" in capsys.readouterr().out
    result = json.loads(path.read_text())
    assert [(row["what"], row["rival"], row["verdict"]) for row in result["rows"]] == [
        ("training step", "a peer", "must"),
        ("training step", peers.DENSE, None),
        ("training step, accelerated", "a peer", "stretch"),
        ("training step, accelerated", "another", None),
        ("forward pass, accelerated", "a peer", None),
        ("forward pass, accelerated", "another", None),
        ("memory of a training step, accelerated", "a peer", "missed"),
        ("memory of a forward pass, accelerated", "a peer", None),
        ("memory of a training step, accelerated", "another", "missed"),
        ("memory of a forward pass, accelerated", "another", None),
    ]
    assert {row["unit"] for row in result["rows"]} == {"seconds", "bytes"}
    assert list(result["steps"]) == [OURS, peers.CLIPPED, peers.DENSE, "a peer", "a peer, accelerated"]
    for name, step in result["steps"].items():
        medians = {column: figures["p50"] for column, figures in step.items()}
        total = medians.pop("total")
        assert set(medians) == set(phases.PHASES)
        assert 0 < max(medians.values()) < total
        # Ours selects within its encode.
        assert (medians["select"] > 0) == (name not in (OURS, peers.CLIPPED))
        assert min(medians[phase] for phase in phases.PHASES if phase != "select") > 0

    for suffix, start in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
        plot = tmp_path / "plots" / f"step{suffix}"
        assert train_step.main(["--json", str(path), "--plot", str(plot)]) == 0
        assert plot.read_bytes().startswith(start)
        printed = capsys.readouterr().out.splitlines()
        assert [line.split("  ")[0] for line in printed[1:]] == list(result["steps"])


@pytest.mark.parametrize(
    ("make", "wrong", "why"),
    [
        (WrongPeer, "a peer", "its first loss is"),
        (WrongWhenAccelerated, "a peer, accelerated", "its first loss is"),
        (WrongInInference, "a peer, accelerated", "its reconstruction is off by"),
    ],
)
def test_a_peer_with_another_result_is_not_timed(monkeypatch, capsys, make, wrong, why):
    of_peers(monkeypatch, peer_of(make, ours=OURS, target=Target(1, 1)))
    assert peers.main(ARGUMENTS) == 1
    printed = capsys.readouterr().out
    assert f"{wrong}: {why}" in printed
    assert "forward pass, accelerated / a peer" not in printed


def test_an_unknown_peer_cannot_be_weighed(capsys):
    with pytest.raises(SystemExit):
        peers.main([*ARGUMENTS, "--weigh", "nobody", "training step"])
    assert "nobody" in capsys.readouterr().err.splitlines()[-1]


def weigh_a_peer() -> None:
    """Run in a fresh interpreter: a call that needs 96 MB more when accelerated, and the gradients of its weights."""

    class Greedy(DensePeer):
        def infer(self, x):
            return torch.ones((96 if hasattr(self, "accelerated") else 1) << 18)

    problem = Problem(SHAPE, "8")
    print(json.dumps([peers.weigh(peer_of(Greedy), peers.INFERENCE, fast, problem) >> 20 for fast in (True, False)]))


@has_clear_refs
def test_the_memory_of_a_call():
    fast, slow = json.loads(run_python("import test_benchmarks; test_benchmarks.weigh_a_peer()", **memory.MALLOC))
    assert fast == pytest.approx(96, abs=2)
    assert slow <= 3


def test_the_readme_has_the_table_of_the_kept_result(capsys):
    root = Path(__file__).parent.parent
    assert peers.main(["--readme", str(root / "benchmarks" / "results" / "peers.json")]) == 0
    table = capsys.readouterr().out
    assert len(table.splitlines()) == 2 + len(peers.PEERS)
    assert table in (root / "README.md").read_text(), (
        "paste what `python -m benchmarks.peers --readme benchmarks/results/peers.json` prints"
    )


def test_a_missing_result_cannot_be_drawn(capsys, tmp_path):
    assert train_step.main(["--json", str(tmp_path / "none.json")]) == 1
    assert "none.json: No such file" in one_line(capsys.readouterr().err)


def test_the_microbenchmarks_run():
    options = ["--benchmark-only", "--benchmark-max-time=0", "--benchmark-min-rounds=1", "-q", "-k", "sparse_decode"]
    # In what it takes for a worker of xdist, pytest-benchmark measures nothing.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", *options, "-p", "no:cacheprovider"],
        capture_output=True,
        text=True,
        env=env,
        cwd=Path(__file__).parent.parent,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    assert "8 passed" in done.stdout


TINY_FIT = ["--shape", "32", "16", "64", "--k", "4", "--rounds", "1"]


def test_a_step_of_fit_stands_beside_the_bare_ops(capsys, tmp_path):
    path = tmp_path / "fit.json"
    assert fit.main([*TINY_FIT, "--json", str(path)]) == 0
    printed, kept = capsys.readouterr().out, json.loads(path.read_text())
    targets = {(row["what"], row["rival"]): row["must"] for row in kept["rows"]}
    for name in fit.PEERS:
        assert targets[f"fit, {name}", fit.BARE] == 1.10
        for peer in fit.PEERS[name]:
            present = (f"fit, {name}", peer.name) in targets
            assert present == (peer.name not in kept["absent"])
            assert not present or targets[f"fit, {name}", peer.name] == peer.target.must
    assert targets[fit.SPINNING, fit.DENSE] == 1.15
    assert fit.SPINNING in printed
    assert all(row["ours"]["p50"] > 0 and row["theirs"]["p50"] > 0 for row in kept["rows"])


def test_bare_ops_that_do_something_else_are_not_timed(monkeypatch, capsys):
    error = fit.BareStep.error
    monkeypatch.setattr(fit.BareStep, "error", lambda self, codes, x: 1.01 * error(self, codes, x))
    assert fit.main([*TINY_FIT, "--selections", "TopK"]) == 1
    printed = capsys.readouterr().out
    assert "TopK: the bare ops make" in printed
    assert f"fit, TopK / {fit.BARE}" not in printed


def test_what_selections_learn_is_judged_on_rows_that_were_held_out(capsys, tmp_path):
    rows = fit.sparse_rows(600, 16)
    np.save(tmp_path / "train.npy", rows[:500])
    np.save(tmp_path / "heldout.npy", rows[500:])
    places = ["--train", str(tmp_path / "train.npy"), "--heldout", str(tmp_path / "heldout.npy")]
    sizes = ["--d-sae", "64", "--k", "4", "--steps", "60", "--batch-size", "64"]
    assert fvu.main([*places, *sizes, "--selections", "TopK", "--json", str(tmp_path / "fvu.json")]) == 0
    records = json.loads((tmp_path / "fvu.json").read_text())["records"]
    ours = next(record for record in records if record["name"] == "aksae.fit, TopK")
    assert ours["name"] in capsys.readouterr().out
    assert ours["l0"] == 4
    assert 0 < ours["fvu"] < 0.9


def test_edits_stand_beside_the_model_alone_and_dense_latents(capsys, tmp_path, monkeypatch):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 100}
    model, path = intervene.random_llama(4, **sizes), tmp_path / "intervene.json"
    tiny = ["--d-sae", "128", "--k", "8", "--tokens", "3", "--rounds", "1", "--json", str(path)]
    assert intervene.main(tiny, model) == 0
    kept = json.loads(path.read_text())
    assert [row["rival"] for row in kept["rows"]] == [intervene.PLAIN, intervene.ENCODE, intervene.DENSE]
    assert all(row["ours"]["p50"] > 0 for row in kept["rows"])
    assert capsys.readouterr().out.count("a token with 3 edits / ") == 3
    # What would be timed is checked first.
    monkeypatch.setattr(intervene.Dense, "__call__", lambda self, x: x + 1)
    assert intervene.main(tiny, model) == 1
    assert not json.loads(path.read_text())["rows"]
