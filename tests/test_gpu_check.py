"""The check of a GPU machine, as far as it goes without one: its commands, its time, and what it says of failures."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import aksae_kernels as ak
from benchmarks import gpu_check, machine
from benchmarks.child import Ended, run_within
from benchmarks.gpu import calls, correctness, sanitizer, table, targets

ROOT = Path(__file__).parent.parent
BUILT = {"aksae_kernels._C": None, "aksae_kernels._C_cuda": None}
TRAINING_PACKAGES = (
    *("accelerate", "datasets", "gguf", "matplotlib", "openai", "pyarrow", "pyphen", "safetensors"),
    *("textstat", "tqdm", "transformers", "tyro"),
)
STEPS = ["build", "tests", "memcheck", "racecheck", "synccheck", "initcheck", "headline"]

pytestmark = pytest.mark.slow


def suite_document(wrong: list[str]) -> dict:
    part = {"rows": [], "facts": {}, "wrong": wrong, "failed": [], "skipped": []}
    facts = {"machine": {"device": "NVIDIA toy"}, "backends": ["cuda"], "shapes": table.shape_names(targets.SHAPES)}
    return {"suite": "gpu", **facts, "parts": {"encode S1": part, "step S1": part}}


class Machine:
    """A GPU machine on which every command ends as `ends` says of it by a word of its command line."""

    def __init__(self, folder: Path):
        self.ran: dict[str, tuple[float, list[str], dict[str, str]]] = {}
        self.ends: dict[str, Ended] = {}
        self.wrong: list[str] = []
        self.report = folder / "_build_report.json"
        self.report.write_text(json.dumps(BUILT))
        self.out = folder / "results"

    def run_within(self, limit_s, command, env) -> Ended:
        kinds = ("setup.py", "pytest", "benchmarks.gpu_suite", *sanitizer.TOOLS)
        (kind,) = [kind for kind in kinds if kind in command]
        self.ran[kind] = limit_s, list(command), dict(env)
        if kind == "benchmarks.gpu_suite":
            folder = Path(command[command.index("--out") + 1])
            (folder / "toy.json").write_text(json.dumps(suite_document(self.wrong)))
        said = {"pytest": "...\n12 passed in 3.21s\n", "setup.py": "", "benchmarks.gpu_suite": "skipped: 0\n"}
        sanitized = "18 of 18 calls ended, the last was optimizer, fp32, on cuda\n===== ERROR SUMMARY: 0 errors\n"
        return self.ends.get(kind, Ended(0, said.get(kind, sanitized), 1.5))

    def check(self, *arguments: str) -> tuple[int, dict, dict[str, dict]]:
        """Its exit status, what it wrote, and of that the steps by name."""
        status = gpu_check.main(["--out", str(self.out), *arguments])
        document = json.loads((self.out / "nvidia-toy-check.json").read_text())
        return status, document, {record["step"]: record for record in document["steps"]}


@pytest.fixture
def toy(monkeypatch, tmp_path) -> Machine:
    toy = Machine(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(machine, "describe_device", lambda device: {"device": "NVIDIA toy", "driver": "580"})
    monkeypatch.setattr(machine, "revision", lambda: "1234567")
    monkeypatch.setattr(shutil, "which", lambda name, path=None: f"/toy/{name}")
    monkeypatch.setattr(gpu_check, "_BUILD_REPORT", toy.report)
    for module in (gpu_check, sanitizer):
        monkeypatch.setattr(module, "run_within", toy.run_within)
    return toy


def test_without_a_device_it_says_so_in_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(["--out", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "torch sees no CUDA device" in said.err
    assert len(said.err.splitlines()) == 1
    assert said.out == ""
    assert list(tmp_path.iterdir()) == []


def test_all_steps_pass(toy, capsys):
    status, document, steps = toy.check()
    assert status == 0
    assert list(steps) == STEPS
    assert {record["state"] for record in steps.values()} == {"passed"}
    assert document.keys() == {"suite", "commit", "machine", "steps", "headline"}
    assert document["headline"] == suite_document([])
    assert steps["build"]["lines"] == ["_C and _C_cuda for 9.0a"]
    assert steps["tests"]["lines"] == ["12 passed in 3.21s"]
    assert steps["racecheck"]["lines"][0] == "ERROR SUMMARY: 0 errors"
    assert steps["headline"]["lines"] == ["2 parts of the suite: encode S1, step S1"]
    assert capsys.readouterr().out.endswith(f"{gpu_check.page(document)}\n")


def test_the_commands(toy, monkeypatch):
    monkeypatch.setattr(gpu_check.os, "cpu_count", lambda: 16)
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: name == "xdist")
    toy.check()
    limit, command, env = toy.ran["setup.py"]
    assert command == [sys.executable, "setup.py", "build_ext", "--inplace", "--force"]
    assert env == {"TORCH_CUDA_ARCH_LIST": "9.0a", "MAX_JOBS": "16"}
    limit, command, env = toy.ran["pytest"]
    assert command[:6] == [sys.executable, "-m", "pytest", "-q", "-m", "gpu"]
    assert [word for word in command if word.endswith(".py")] == gpu_check.gpu_test_files()
    assert command[-2:] == ["-n", "12"]
    for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
        limit, command, env = toy.ran[tool]
        assert limit == 30
        assert command[:3] == ["/toy/compute-sanitizer", "--tool", tool]
        assert command[-3:] == [sys.executable, "-m", "benchmarks.gpu.calls"]
    limit, command, env = toy.ran["benchmarks.gpu_suite"]
    assert limit == 120
    assert command[:5] == [sys.executable, "-m", "benchmarks.gpu_suite", "--minutes", "1.75"]
    assert not {"pip", "venv"} & {word for _, command, _ in toy.ran.values() for word in command}


def test_tests_run_in_one_process_where_there_is_no_xdist(toy, monkeypatch):
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: None)
    toy.check()
    assert "-n" not in toy.ran["pytest"][1]


def test_the_architecture_of_a_device():
    of = gpu_check.architecture_of
    assert [of(8, 0), of(9, 0), of(10, 0), of(12, 1)] == ["8.0", "9.0a", "10.0", "12.1"]


@pytest.mark.parametrize(
    ("kind", "ended", "step", "said"),
    [
        ("setup.py", Ended(1, "no module named torch\n", 1.0), "build", "no module named torch"),
        ("setup.py", Ended(None, "g++ ...\n", 80.0), "build", "did not end within 80 s"),
        ("pytest", Ended(1, "FAILED tests/test_a.py::b - no\n== 1 failed in 2s ==\n", 2.0), "tests", "1 failed in 2s"),
        ("pytest", Ended(None, ".......F.. [ 45%]\n", 120.0), "tests", "did not end within 120 s"),
        ("pytest", Ended(0, "1510 skipped in 70.02s\n", 70.0), "tests", "1510 skipped"),
        ("pytest", Ended(127, "No such file or directory: 'pytest'", 0.0), "tests", "No such file"),
        (
            "racecheck",
            Ended(86, "Error: Race reported\nSUMMARY: 1 hazard", 9.0),
            "racecheck",
            "Race reported",
        ),
        ("synccheck", Ended(1, "RuntimeError: out of memory\n", 9.0), "synccheck", "out of memory"),
        ("benchmarks.gpu_suite", Ended(None, "encode S1\n", 120.0), "headline", "did not end within 120 s"),
    ],
)
def test_a_step_that_fails_does_not_stop_the_others(toy, capsys, kind, ended, step, said):
    toy.ends[kind] = ended
    status, _, steps = toy.check()
    assert status == 1
    assert list(steps) == STEPS
    assert {name for name, record in steps.items() if record["state"] == "failed"} == {step}
    assert said in steps[step]["lines"][0]
    printed = capsys.readouterr().out
    assert ended.output.strip() in printed
    assert printed.splitlines()[-1] == f"failed: {step}"


def test_the_page_names_the_tests_that_failed(toy):
    failed = [f"FAILED tests/test_a.py::test_{n}" for n in range(20)]
    toy.ends["pytest"] = Ended(1, "\n".join([*failed, "20 failed in 2s"]), 2.0)
    _, document, steps = toy.check()
    assert steps["tests"]["lines"] == ["20 failed in 2s", *failed]
    page = gpu_check.page(document)
    assert failed[0] in page
    assert failed[-1] not in page
    assert len(page.splitlines()) < 60


@pytest.mark.parametrize("reason", ["it could not be built: there is no nvcc, neither in CUDA_HOME nor on the PATH"])
def test_a_binary_that_was_left_out_is_a_failed_build(toy, reason):
    toy.report.write_text(json.dumps(BUILT | {"aksae_kernels._C_cuda": reason}))
    status, _, steps = toy.check()
    assert status == 1
    assert steps["build"]["lines"] == [f"aksae_kernels._C_cuda: {reason}"]


def test_a_headline_that_is_wrong_is_a_failure(toy):
    toy.wrong = ["encode S1: off by one"]
    toy.ends["benchmarks.gpu_suite"] = Ended(1, "skipped: 0\n", 100.0)
    status, _, steps = toy.check()
    assert status == 1
    assert steps["headline"]["lines"][0] == "encode S1: off by one"


def test_a_sanitizer_that_is_cut_off_says_how_far_it_came(toy, capsys):
    far = "7 of 36 calls ended, the last was decode_mse, bf16, on cuda"
    toy.ends["racecheck"] = Ended(None, f"6 of 36 calls ended, the last was x\n{far}\n", 30.0)
    toy.ends["initcheck"] = Ended(None, "", 30.0)
    status, _, steps = toy.check()
    assert status == 0
    assert steps["racecheck"]["state"] == "cut off"
    assert steps["racecheck"]["lines"] == [f"it did not end within 30 s: {far}"]
    assert steps["initcheck"]["lines"] == ["it did not end within 30 s: no call ended"]
    assert capsys.readouterr().out.splitlines()[-1] == "cut off: racecheck, initcheck"


def test_a_tool_that_is_missing_is_named(toy, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    status, _, steps = toy.check()
    assert status == 0
    assert {name for name, record in steps.items() if record["state"] == "missing"} == set(sanitizer.TOOLS)
    assert steps["memcheck"]["lines"] == ["compute-sanitizer is not installed"]
    assert capsys.readouterr().out.splitlines()[-1].startswith("missing: memcheck")


def test_steps_share_the_minutes(monkeypatch):
    """As if every step took all that it may: the last ones get what is left, or nothing."""
    now, limits = [1000.0], {}
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def step(name: str, limit_s: float) -> gpu_check.Step:
        def run(limit):
            limits[name] = limit
            now[0] += limit
            return gpu_check.Finding("passed", [""])

        return gpu_check.Step(name, limit_s, run)

    plan = [step(real.name, real.limit_s) for real in gpu_check.steps({})]
    states = {record["step"]: record["state"] for record in gpu_check.taken(plan, 6.0)}
    assert list(states) == STEPS
    assert now[0] - 1000 <= 360
    assert limits["headline"] < 120
    now[0], limits = 1000.0, {}
    states = {record["step"]: record["state"] for record in gpu_check.taken(plan, 4.0)}
    assert states["initcheck"] == states["headline"] == "left out"
    assert now[0] - 1000 <= 240


def test_a_step_that_raises_is_a_failure():
    def run(limit_s):
        raise OSError("no space left")

    (record,) = gpu_check.taken([gpu_check.Step("build", 30, run)], 6.0)
    assert (record["state"], record["lines"]) == ("failed", ["OSError: no space left"])


def test_a_result_that_cannot_be_written_is_the_exit_status(toy, capsys):
    toy.out.write_text("a file in the place of the folder")
    assert gpu_check.main(["--out", str(toy.out)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "all steps passed"


def test_a_limit_ends_the_grandchildren_too():
    start = time.monotonic()
    code = "import subprocess; print('started', flush=True); subprocess.run(['sleep', '60'])"
    ended = run_within(2, [sys.executable, "-c", code], {})
    assert ended.status is None
    assert ended.output == "started\n"
    assert time.monotonic() - start < 30
    assert run_within(60, ["sh", "-c", 'echo "$WORD"; pwd; exit 3'], {"WORD": "said"})[:2] == (3, f"said\n{ROOT}\n")
    assert run_within(60, ["/no/such/program"], {}).status == 127


class Seen(TorchDispatchMode):
    """The ops of ours that are called while the mode is on."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "aksae":
            self.names.add(func.name().removeprefix("aksae::").partition(".")[0])
        return func(*args, **(kwargs or {}))


def test_a_sanitizer_is_given_a_call_of_every_op():
    with Seen() as seen:
        said = list(calls.calls(torch.device("cpu")))
    n = len(calls.DTYPES) * len(calls.CHECKS) * len(calls.usable_backends(torch.device("cpu")))
    assert len(said) == n
    assert re.match(rf"{n} of {n} calls ended, the last was optimizer, fp32, on \w+$", said[-1])
    registered = {name.removeprefix("aksae::") for name in torch._C._dispatch_get_all_op_names() if "aksae::" in name}
    assert seen.names == registered


@pytest.mark.parametrize("op", correctness.CHECKS)
def test_those_calls_run_on_the_backend_they_are_for(op):
    class Asked(Exception):
        pass

    def refuse(*args):
        raise Asked

    with pytest.MonkeyPatch.context() as patch, ak.use_backend("reference"):
        patch.setattr(ak.dispatch, "choose", refuse)
        with pytest.raises(Asked):
            calls.call(op, torch.device("cpu"), torch.float32)


def test_the_files_with_tests_on_a_gpu():
    found = set(gpu_check.gpu_test_files())
    kernels = ("codes", "compile", "decode", "encode", "layers", "optim", "screen", "select", "triton")
    assert found >= {f"tests/test_{name}.py" for name in (*kernels, "gpu_suite")}
    assert not {"tests/test_text.py", "tests/test_cli.py"} & found


def test_the_packages_of_the_training_package_are_not_needed():
    """A bare machine has torch, Triton and pytest; neither what `aksae` depends on nor the other codebases."""
    code = f"""
import sys
for name in {TRAINING_PACKAGES}:
    sys.modules[name] = None
import pytest, torch
from benchmarks import gpu_check, gpu_suite, steps
from benchmarks.gpu import calls
from benchmarks.report import NotMeasured
with pytest.raises(NotMeasured, match="aksae"):
    steps.OurStep(torch.ones(3, 2), torch.ones(4))
sys.exit(pytest.main(["--collect-only", "-qqq", "-p", "no:cacheprovider", *gpu_check.gpu_test_files()]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_make_gpu_needs_no_index(tmp_path):
    """It uses the Python at hand, and installs nothing."""
    command = ["make", "--dry-run", "--no-print-directory", "gpu", "PYTHON=python3.99"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["PYTHONPATH=python:. python3.99 -m benchmarks.gpu_check"]
