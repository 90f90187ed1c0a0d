"""The GPU suite proves itself without a GPU: it resumes, keeps to its time, and tells right from wrong."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import aksae_kernels as ak
from aksae_kernels.codes import live_slots
from benchmarks import gpu_suite, machine, timing
from benchmarks.gpu import ceilings, correctness, ledger, plan, ratios, sanitizer, table, targets, traffic
from benchmarks.gpu.bench import Bench, Outcome, same_bits
from benchmarks.gpu.ratios import Step
from benchmarks.problem import Problem, Shape
from benchmarks.report import NotMeasured

ROOT = Path(__file__).parent.parent
BACKENDS = tuple(name for name in ("reference", "cpu") if name in ak.available_backends())
RATES = {"copy, bytes/s": 1e12, "gather from L2, bytes/s": {"128 B": 1e12, "256 B": 2e12}}
NEEDS_A_GPU = ("gemms", "graphs", "memory S1", "memory S2", *(f"sanitizer {tool}" for tool in sanitizer.TOOLS))
ARGUMENTS = ["--device", "cpu", "--tiny", "--commit", "1234567", "--backends", ",".join(BACKENDS)]
KS = ("uniform", "spread")

pytestmark = pytest.mark.slow


def measured_rates(bench: Bench, outcome: Outcome) -> None:
    outcome.facts |= RATES


def run(folder: Path, *arguments: str) -> int:
    return gpu_suite.main([*ARGUMENTS, "--out", str(folder), *arguments])


def kept(folder: Path) -> dict:
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Shapes so tiny that threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> SimpleNamespace:
    """Everything in two of the shapes, with rates as a GPU would have."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(plan.KINDS, "ceilings", measured_rates)
        status = run(folder, "--shapes", "S1,S2")
    return SimpleNamespace(status=status, folder=folder, document=kept(folder))


@pytest.fixture
def parts(monkeypatch) -> list[str]:
    """A plan of three parts that only note that they ran."""
    ran = []
    for kind in ("ceilings", "gemms", "graphs"):
        monkeypatch.setitem(plan.KINDS, kind, lambda bench, outcome, kind=kind: ran.append(kind))
    monkeypatch.setattr(plan, "PLAN", tuple(plan.Part(kind, 10) for kind in ("ceilings", "gemms", "graphs")))
    return ran


# ------------------------------------------------------------------------------------------------- a whole run


def test_all_is_right(whole):
    assert whole.status == 0
    assert whole.document["parts"].keys() == {part.name for part in plan.chosen(plan.KINDS, ("S1", "S2"))}
    for part in whole.document["parts"].values():
        assert part["wrong"] == part["failed"] == []


def test_the_document(whole):
    document = whole.document
    assert document.keys() == {"suite", "commit", "machine", "backends", "shapes", "parts", "running"}
    assert (document["suite"], document["commit"], document["running"]) == (ledger.SUITE, "1234567", None)
    assert document["backends"] == list(BACKENDS)
    assert document["machine"].keys() >= {"device", "torch", "Triton", "Python"}
    for part in document["parts"].values():
        assert part.keys() == {"seconds", "rows", "facts", "wrong", "failed", "skipped"}
        for row in part["rows"]:
            assert row.keys() >= {"what", "rival", "shape", "k", "backend", "unit", "must", "stretch", "verdict"}
            assert row["backend"] in BACKENDS
            for figures in (row["ours"], row["theirs"], row["ratio"]):
                assert all(math.isfinite(figure) for figure in figures.values())


def test_every_row_of_the_table_is_measured_on_every_backend(whole):
    found = table.cells(whole.document)
    gpu_only = {targets.ENCODE_MEMORY, targets.STEP_MEMORY}
    absent = {targets.COMPILED, targets.SPARSIFY}
    for line in targets.LINES:
        if line.what not in gpu_only and line.rival not in absent:
            for k in line.ks:
                for backend in BACKENDS:
                    assert (line.what, line.rival, k, "S1", backend) in found, (line, k)
    assert {key[:2] for key in found} <= {(line.what, line.rival) for line in targets.LINES}


def test_rows_carry_the_target_of_their_shape(whole):
    rows = [row for row in whole.document["parts"]["encode S2"]["rows"] if row["rival"] == targets.CUBLAS]
    assert {(row["must"], row["stretch"]) for row in rows} == {(1.12, 1.06)}
    assert {row["k"] for row in rows} == {"80", "20..320"}


def test_what_needs_a_gpu_is_skipped_with_a_reason(whole):
    for name in NEEDS_A_GPU:
        (reason,) = whole.document["parts"][name]["skipped"]
        assert reason.startswith(f"{name}: ")


def test_the_correctness_of_every_op_is_checked(whole):
    for op in correctness.CHECKS:
        passed = whole.document["parts"][f"correctness {op}"]["facts"]["passed"]
        assert {f"{backend} {dtype}" for backend in BACKENDS for dtype in ("fp32", "bf16")} <= set(passed)


def test_floors_need_rates(tmp_path, capsys):
    assert run(tmp_path, "--parts", "weight-grads", "--shapes", "S1", "--backends", "reference") == 0
    part = kept(tmp_path)["parts"]["weight-grads S1"]
    assert part["rows"] == []
    assert all("needs the rates" in reason for reason in part["skipped"])
    assert len(part["skipped"]) == len(KS)


def test_the_printed_table_is_short(whole):
    document = dict(whole.document, backends=["triton", "cuda"], shapes=table.shape_names(targets.SHAPES))
    row = lambda line, k, shape, backend: {
        "what": line.what,
        "rival": line.rival,
        "k": targets.SPREAD if k == "spread" else "64",
        "backend": backend,
        "shape": targets.SHAPES[shape]._asdict(),
        "ratio": {"p50": 1.0},
    }
    rows = [
        row(line, k, shape, backend)
        for line in targets.LINES
        for k in line.ks
        for shape in targets.SHAPES
        for backend in document["backends"]
    ]
    reasons = {key: ["a reason"] * 99 for key in ("wrong", "failed", "skipped")}
    facts = {"copy": 1e12} | {f"gather {place}": dict.fromkeys("abcde", 1e12) for place in ("L2", "HBM")}
    gemms = {kind: dict.fromkeys(targets.SHAPES, 1e15) for kind in ("bf16", "fp16", "TF32", "fp32")}
    document["parts"] = {
        "ceilings": {"rows": rows, "facts": facts, **reasons},
        "gemms": {"rows": [], "facts": gemms, **reasons},
    }
    lines = table.text(document).splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 160
    assert "1++ 1++" in next(line for line in lines if line.startswith("topk_encode bf16 / cuBLAS bf16"))


# ------------------------------------------------------------------------------------- time, and starting again


def test_a_second_run_does_what_is_missing(tmp_path, parts):
    assert run(tmp_path, "--parts", "gemms") == 0
    assert run(tmp_path) == 0
    assert parts == ["gemms", "ceilings", "graphs"]
    assert run(tmp_path, "--commit", "7654321") == 0
    assert parts[3:] == ["ceilings", "gemms", "graphs"]


def test_every_part_is_kept_at_once(tmp_path, parts, monkeypatch):
    monkeypatch.setitem(plan.KINDS, "gemms", lambda bench, outcome: sys.exit("pulled the plug"))
    with pytest.raises(SystemExit, match="plug"):
        run(tmp_path)
    document = kept(tmp_path)
    assert list(document["parts"]) == ["ceilings"]
    assert document["running"] == "gemms"
    assert run(tmp_path) == 0
    assert kept(tmp_path)["parts"]["gemms"]["failed"] == ["gemms: the process ended while it ran"]
    assert parts == ["ceilings", "graphs"]


def test_no_time_left(tmp_path, parts, capsys):
    assert run(tmp_path, "--minutes", "0.25") == 0
    assert parts == ["ceilings", "gemms", "graphs"]
    assert run(tmp_path / "other", "--minutes", "0.1") == 0
    assert parts[3:] == []
    assert capsys.readouterr().out.count(" left out\n") == 3
    assert kept(tmp_path / "other")["parts"] == {}


def test_a_budget_learns_how_slow_the_machine_is():
    budget, part = gpu_suite.Budget(1), plan.Part("encode", 10)
    assert 59 < budget.left <= 60
    assert budget.needs(part) == 10
    budget.took(part, 70)
    assert budget.needs(part) == pytest.approx(10 * 130 / 70)


# --------------------------------------------------------------------------------------- what fails, what is wrong


def test_a_part_that_fails_is_kept_with_its_reason(tmp_path, parts, monkeypatch, capsys):
    def fails(bench, outcome):
        raise torch.OutOfMemoryError("Tried to allocate 9 GiB\nand more")

    monkeypatch.setitem(plan.KINDS, "gemms", fails)
    assert run(tmp_path) == 0
    assert parts == ["ceilings", "graphs"]
    assert kept(tmp_path)["parts"]["gemms"]["failed"] == ["gemms: OutOfMemoryError: Tried to allocate 9 GiB"]
    said = capsys.readouterr()
    assert "failed: 1" in said.out
    assert "in fails" in said.err


def test_a_wrong_result_is_the_exit_status(tmp_path, parts, monkeypatch):
    def wrong(bench, outcome):
        raise AssertionError("off by one")

    monkeypatch.setitem(plan.KINDS, "gemms", wrong)
    assert run(tmp_path) == 1
    assert kept(tmp_path)["parts"]["gemms"]["wrong"] == ["gemms: off by one"]
    monkeypatch.undo()
    assert run(tmp_path, "--parts", "gemms") == 1


def test_a_dead_device_needs_a_new_process(tmp_path, parts, monkeypatch):
    monkeypatch.setattr(Bench, "alive", lambda self: "gemms" not in parts)
    called = []

    def execv(program, arguments):
        called.extend(arguments)
        raise SystemExit

    monkeypatch.setattr(os, "execv", execv)
    with pytest.raises(SystemExit):
        run(tmp_path, "--minutes", "5")
    assert list(kept(tmp_path)["parts"]) == ["ceilings", "gemms"]
    options = gpu_suite._parser().parse_args(called[called.index("benchmarks.gpu_suite") + 1 :])
    assert 4.9 < options.minutes < 5
    assert options.out == tmp_path


def test_a_refusal_is_no_failure():
    outcome = Outcome()
    with outcome.judging("encode"), ak.use_backend("cpu"):
        ak.topk_select(torch.ones(1, 1, dtype=torch.float16), 1)
    assert (len(outcome.skipped), outcome.failed) == (1, [])
    assert "'cpu' cannot run topk_select" in outcome.skipped[0]


def test_a_folder_that_cannot_be_written(tmp_path, parts, capsys):
    (tmp_path / "file").touch()
    assert run(tmp_path / "file") == 1
    assert "the result was not kept" in capsys.readouterr().err
    assert parts == []


@pytest.mark.parametrize("option", [["--shapes", "S9"], ["--parts", "encode,nothing"], ["--backends", "quantum"]])
def test_unknown_names_are_refused(tmp_path, option, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, *option)
    assert "is none of" in capsys.readouterr().err


def test_without_a_gpu_it_says_how_to_prove_it(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu_suite.main([])
    assert "--device cpu --tiny" in capsys.readouterr().err


def bench_of(backend: str) -> Bench:
    return Bench(torch.device("cpu"), timing.HostClock(), (backend,), targets.TINY, 0.0, traffic.Rates(1e12, 1e12))


def off_by(factor: float, right):
    def wrong(*args, **kwargs):
        result = right(*args, **kwargs)
        return result._replace(values=factor * result.values) if isinstance(result, ak.SparseCodes) else factor * result

    return wrong


@pytest.mark.parametrize(
    ("op", "kind"),
    [
        ("topk_encode", "encode"),
        ("topk_encode", "encode-fp32"),
        ("topk_encode", "encode-alike"),
        ("topk_encode", "step"),
        ("topk_select", "select"),
        ("topk_select", "select-adversarial"),
        ("sparse_decode", "decode"),
        ("decode_mse", "decode"),
        ("decode_mse", "step"),
        ("sparse_weight_grad", "weight-grads"),
    ],
)
def test_a_contest_does_not_time_what_is_off_by_five_percent(monkeypatch, op, kind):
    monkeypatch.setattr(ak, op, off_by(1.05, getattr(ak, op)))
    outcome = plan.Part(kind, 1, "S1").run(bench_of("reference"))
    assert outcome.wrong
    assert not outcome.failed
    rows = {row.what for row in outcome.rows}
    assert not rows - {targets.DECODE, targets.FUSED, targets.INDEX}


def test_a_step_with_a_wrong_gradient_is_seen(monkeypatch):
    step = Step(Problem(targets.TINY["S1"], "5", dtype=torch.bfloat16))
    step.check()
    right = torch.autograd.grad
    for place in (1, 2):

        def wrong(*args, place=place):
            grads = list(right(*args))
            grads[place] = 1.05 * grads[place]
            return grads

        monkeypatch.setattr(torch.autograd, "grad", wrong)
        with pytest.raises(AssertionError, match="gradient of a weight" if place == 1 else "gradient of W_dec"):
            step.check()


@pytest.mark.parametrize("op", [op for op in correctness.CHECKS if op != "optimizer"])
def test_the_correctness_checks_can_fail(monkeypatch, op):
    monkeypatch.setattr(ak, op, off_by(1.05, getattr(ak, op)))
    outcome = plan.Part("correctness", 1, op).run(bench_of("reference"))
    assert len(outcome.wrong) == len(correctness.DTYPES)
    assert outcome.facts["passed"] == []


def test_the_check_of_the_optimizer_can_fail(monkeypatch):
    right, calls = correctness.SAEAdam, itertools.count()
    # Of the four optimizers of a check the first two are ours, the others the oracle and PyTorch.
    wrong = lambda groups, lr, **options: right(groups, lr=lr * (1.05 if next(calls) % 4 < 2 else 1), **options)
    monkeypatch.setattr(correctness, "SAEAdam", wrong)
    assert plan.Part("correctness", 1, "optimizer").run(bench_of("reference")).wrong


def test_a_result_that_does_not_repeat_is_wrong(monkeypatch):
    right, calls = ak.topk_select, iter(range(1000))

    def restless(*args):
        codes = right(*args)
        return codes._replace(values=torch.nextafter(codes.values, codes.values + next(calls) % 2))

    contest = lambda problem: ratios._select_contest(traffic.Rates(), problem)._replace(check=lambda: None)
    monkeypatch.setattr(ak, "topk_select", restless)
    outcome = Outcome()
    bench = bench_of("reference")
    bench.measure(outcome, "S1", targets.SELECT, bench.problem("S1", dtype=torch.float32), contest)
    assert outcome.rows == []
    assert "two calls differ" in outcome.wrong[0]


# ------------------------------------------------------------------------------------------------- the pieces


def test_the_plan():
    names = [part.name for part in plan.PLAN]
    assert len(set(names)) == len(names)
    assert names[0] == "encode S1"
    assert {part.kind for part in plan.PLAN} == set(plan.KINDS)
    # Four minutes are enough for the encodes, the steps and the figures their floors need.
    seconds = [part.seconds for part in plan.PLAN]
    assert sum(seconds[: names.index("step S3") + 1]) < 240
    assert names.index("ceilings") < min(names.index(f"{kind} S1") for kind in ("decode", "weight-grads", "select"))


def test_every_target_has_a_figure_for_every_shape():
    for line in targets.LINES:
        assert len(line.must) in (0, len(targets.SHAPES))
        assert len(line.stretch) in (0, len(targets.SHAPES))
        assert all(must >= stretch for must, stretch in zip(line.must, line.stretch))
    assert targets.target(targets.STEP, targets.CUBLAS, "S4").must == 1.45
    assert targets.TINY.keys() == targets.SHAPES.keys() == targets.UNIFORM.keys()


def test_the_floors():
    shape, load, rates = Shape(10, 4, 100), traffic.Load(nnz=30, used=20), traffic.Rates(copy=100.0, gather=1000.0)
    assert traffic.gemm_flops(shape) == 8000
    assert traffic.select_bytes(shape, 3, 4) == 10 * (400 + 3 * 8 + 4)
    compulsory = 20 * 4 * 2 + 30 * 6 + 10 * 4 * 2
    assert traffic.decode_seconds(shape, load, 2, rates) == compulsory / 100
    assert traffic.decode_seconds(shape, load, 2, rates._replace(gather=1.0)) == 240
    assert math.isnan(traffic.decode_seconds(shape, load, 2, traffic.Rates(copy=1.0)))
    assert traffic.weight_grads_seconds(shape, load, 2, rates) == 2 * (0.24 + 8)
    assert traffic.Rates.of(RATES) == (1e12, 2e12)
    assert all(math.isnan(rate) for rate in traffic.Rates.of({}))


def test_the_codes_of_a_problem_are_a_selection():
    problem = Problem(Shape(30, 16, 200), "0..150")
    assert same_bits(problem.codes, ak.topk_select(problem.scores, problem.k, problem.width))
    load = traffic.Load.of(problem.codes)
    assert load == (int(problem.codes.counts.sum()), len(problem.codes.indices[live_slots(problem.codes)].unique()))


def test_another_k_of_the_same_data():
    problem = Problem(Shape(30, 16, 200), "20..80")
    equal = problem.with_equal_k()
    assert equal.x is problem.x
    assert equal.W is problem.W
    assert (equal.k == round(problem.k.double().mean().item())).all()


def test_same_bits():
    nan = torch.tensor([math.nan, 0.0])
    assert same_bits((nan, nan[0]), (nan.clone(), nan[0].clone()))
    assert not same_bits(nan, torch.tensor([math.nan, -0.0]))


def test_the_device_clock_flushes_the_cache_between_the_pause_and_the_call(monkeypatch):
    order = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            order.append("record")

        def synchronize(self):
            order.append("wait")

        def elapsed_time(self, end):
            return 2.5

    class Buffer:
        def zero_(self):
            order.append("flush")

    cuda = torch.cuda
    monkeypatch.setattr(cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=1000))
    monkeypatch.setattr(cuda, "_sleep", lambda cycles: order.append("pause"), raising=False)
    monkeypatch.setattr(cuda, "Event", Event)
    sizes = []
    monkeypatch.setattr(timing.torch, "empty", lambda size, **kwargs: sizes.append(size) or Buffer())
    clock = timing.clock_of(torch.device("cuda"))
    assert clock.seconds(lambda: order.append("call")) == 2.5e-3
    assert order == ["pause", "flush", "record", "call", "record", "wait"]
    assert sizes[0] > 2 * 1000
    assert isinstance(timing.clock_of(torch.device("cpu")), timing.HostClock)


def test_what_is_said_of_a_gpu(monkeypatch):
    properties = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3",
        major=9,
        minor=0,
        multi_processor_count=132,
        L2_cache_size=50 << 20,
        total_memory=80 << 30,
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(machine, "_output_of", lambda *command: "580.1, 1980 MHz, 700.00 W\n580.1, ..., ...")
    facts = machine.describe_device(torch.device("cuda"))
    assert (facts["driver"], facts["highest clock"], facts["L2 MB"]) == ("580.1", "1980 MHz", 50)
    assert ledger.slug(facts["device"]) == "nvidia-h100-80gb-hbm3"
    monkeypatch.setattr(machine, "_output_of", lambda *command: "")
    assert machine.describe_device(torch.device("cuda"))["driver"] == "unknown"


def test_a_revision_is_told_apart_by_its_sources(monkeypatch, tmp_path):
    answers = {"describe": "abc", "status": ""}
    monkeypatch.setattr(machine, "_output_of", lambda git, command, *rest: answers[command])
    assert machine.revision() == "abc"
    (tmp_path / "benchmarks").mkdir()
    source = tmp_path / "benchmarks" / "a.py"
    source.write_text("1")
    monkeypatch.setattr(machine, "_ROOT", tmp_path)
    answers["status"] = " M benchmarks/a.py"
    first = machine.revision()
    assert first.startswith("abc+")
    source.write_text("2")
    assert machine.revision() != first
    answers["describe"] = ""
    assert machine.revision().startswith("no repository+")


def test_the_gather_sums_the_rows_it_is_told():
    pytest.importorskip("triton")
    code = """
import torch
from benchmarks.gpu.gather import gather_sum
for width in (32, 512):
    table, rows = torch.randn(100, width), torch.randint(0, 100, (3 * 2 * 4096 // width,), dtype=torch.int32)
    expected = table[rows.long()].view(3, -1, width).sum(1)
    torch.testing.assert_close(gather_sum(table, rows, 3), expected, rtol=1e-4, atol=1e-4)
"""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, timeout=120)


def test_ceilings_end_in_rates(monkeypatch):
    """With the measurement itself replaced: what it is called, and that it fits what the floors read."""
    bench = SimpleNamespace(device=SimpleNamespace(type="cuda"), shapes=targets.TINY)
    monkeypatch.setattr(ceilings, "_copy", lambda device: None)
    monkeypatch.setattr(ceilings, "_gather", lambda device, table_bytes, piece: piece)
    monkeypatch.setattr(ceilings, "_seconds", lambda bench, call: 1 / (call or 1))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=1 << 20))
    outcome = Outcome()
    ceilings.memory(bench, outcome)
    rates = traffic.Rates.of(outcome.facts)
    assert rates == (2 * ceilings._COPY_BYTES, ceilings._READ_BYTES * max(ceilings.PIECES))


@pytest.fixture
def toy_sanitizer(tmp_path, monkeypatch):
    """What stands for compute-sanitizer runs the given lines of shell; its arguments are $1 to $9."""

    def write(lines: str) -> None:
        binary = tmp_path / "compute-sanitizer"
        binary.write_text(f"#!/bin/sh\n{lines}\n")
        binary.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return write


@pytest.mark.parametrize(
    ("status", "error", "said"),
    [(0, None, "ERROR SUMMARY: 0"), (86, AssertionError, "Error: bad read"), (3, RuntimeError, "Error: bad read")],
)
def test_the_verdict_of_a_sanitizer(toy_sanitizer, status, error, said):
    toy_sanitizer(f"echo Error: bad read of $2 $6 $7 $8\necho ERROR SUMMARY: 0\nexit {status}")
    ended = sanitizer.watched("memcheck", 60, "benchmarks.child", "triton")
    assert ended.output.startswith("Error: bad read of memcheck -m benchmarks.child triton")
    if error is None:
        assert sanitizer.verdict(ended).startswith(said)
    else:
        with pytest.raises(error, match=said):
            sanitizer.verdict(ended)


def test_a_sanitizer_that_takes_too_long(toy_sanitizer):
    toy_sanitizer("sleep 60; true")
    with pytest.raises(NotMeasured, match="did not end within 1 s"):
        sanitizer.verdict(sanitizer.watched("memcheck", 1.0, "benchmarks.child"))


def test_a_machine_without_a_sanitizer(monkeypatch):
    monkeypatch.setattr(sanitizer.shutil, "which", lambda name, path=None: None)
    with pytest.raises(NotMeasured, match="not installed"):
        sanitizer.watched("memcheck", 60, "benchmarks.child")


def test_what_a_sanitizer_watches(monkeypatch):
    seen = []
    checks = {op: lambda site, op=op: seen.append((op, site.dtype)) for op in ("a", "b")}
    monkeypatch.setattr(correctness, "CHECKS", checks)
    monkeypatch.setattr(sys, "argv", ["correctness", "--device", "cpu", "--backend", "reference"])
    correctness.main()
    assert seen == [("a", torch.bfloat16), ("b", torch.bfloat16)]


# ------------------------------------------------------------------------------------------------- the README


def fake_result(folder: Path, device: str, ratio: float, backends=("triton",), **changes) -> None:
    """A result of one row, in S1 and S3."""
    line = targets.LINES[0]
    rows = [
        {
            "what": line.what,
            "rival": line.rival,
            "k": "64",
            "backend": backend,
            "shape": targets.SHAPES[shape]._asdict(),
            "ratio": {"p50": ratio},
        }
        for shape in ("S1", "S3")
        for backend in backends
    ]
    versions = {"SMs": 132, "L2 MB": 50.0, "driver": "580", "CUDA": "13.0", "torch": "2.11", "Triton": "3.6"}
    document = {
        "suite": ledger.SUITE,
        "commit": "1234567",
        "machine": {"device": device, **versions},
        "backends": list(backends),
        "shapes": table.shape_names(targets.SHAPES),
        "parts": {"encode S1": {"rows": rows}},
    } | changes
    (folder / f"{ledger.slug(device)}.json").write_text(json.dumps(document))


def test_the_markdown_of_nothing(tmp_path):
    (tmp_path / "cpu.json").write_text(json.dumps({"machine": {}, "rows": []}))
    (tmp_path / "broken.json").write_text("{")
    fake_result(tmp_path, machine.NO_GPU, 1.0)
    fake_result(tmp_path, "NVIDIA toy", 1.0, shapes=table.shape_names(targets.TINY))
    rows = [line for line in table.markdown(tmp_path).splitlines() if line.startswith("|")]
    assert len(rows) == 2 + sum(len(line.ks) for line in targets.LINES)
    assert all(row.endswith(f"| {table.NOT_YET} |") for row in rows[2:])
    assert len({row.count("|") for row in rows}) == 1


def test_the_markdown_of_two_devices(tmp_path):
    fake_result(tmp_path, "NVIDIA A", 1.2)
    fake_result(tmp_path, "NVIDIA B", 1.05, backends=("cuda", "triton"))
    text = table.markdown(tmp_path)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows[0].endswith("| NVIDIA A | NVIDIA B |")
    assert rows[2].endswith("| `triton` 1.2, -, **1.2**, - | `cuda` 1.05, -, 1.05, -; `triton` 1.05, -, 1.05, - |")
    assert rows[3].endswith(f"| {table.NOT_YET} | {table.NOT_YET} |")
    assert "NVIDIA A: 132 SMs, L2 50 MB, driver 580, CUDA 13.0, torch 2.11, Triton 3.6, commit 1234567." in text


def test_the_table_is_printed_on_request(tmp_path, capsys):
    assert gpu_suite.main(["--readme", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == table.markdown(tmp_path)


def test_the_markers_of_the_readme():
    assert table.between_markers(f"a\n{table.START}\n\nb\n{table.END}\nc") == "b"
    for text in ("", f"{table.START} b", f"b {table.END}"):
        with pytest.raises(ValueError, match="the README has no"):
            table.between_markers(text)


def test_the_readme_has_the_table_of_the_kept_results():
    shown = table.between_markers((ROOT / "README.md").read_text())
    assert shown == table.markdown(ROOT / "benchmarks" / "results"), (
        "paste what `python -m benchmarks.gpu_suite --readme benchmarks/results` prints"
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(tmp_path):
    assert gpu_suite.main(["--tiny", "--shapes", "S1", "--out", str(tmp_path)]) == 0
    assert not [part["failed"] for part in kept(tmp_path)["parts"].values() if part["failed"]]
