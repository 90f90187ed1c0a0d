"""Which backend runs a call, what runs in a backward pass, and what a missing or refusing backend says."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import aksae_kernels
from aksae_kernels import (
    available_backends,
    batch_topk_encode,
    batch_topk_select,
    decode_mse,
    explain,
    price_select,
    sparse_decode,
    sparse_encode,
    sparse_value_grad,
    sparse_weight_grad,
    threshold_encode,
    threshold_select,
    topk_encode,
    topk_select,
    use_backend,
)
from aksae_kernels.dispatch import requested
from aksae_kernels.testing import adversarial_rows, check_codes, check_errors, encode_scores, exact_codes, random_codes

PACKAGE = Path(aksae_kernels.__file__).parent
needs_cpu = pytest.mark.skipif("cpu" not in available_backends(), reason="backend 'cpu' is not available")
AVX512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
CPU_FLAGS = {
    "baseline": (),
    "avx2": ("avx2", "fma"),
    "avx512": AVX512,
    "avx512_bf16": (*AVX512, "avx512_bf16"),
    "amx": (*AVX512, "avx512_bf16", "amx_tile", "amx_bf16"),
    "emulated_bf16": (),
}


class Spy(TorchDispatchMode):
    """Records name and backend argument of every aksae op that runs."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "aksae":
            self.calls.append((func._schema.name.removeprefix("aksae::"), args[-1]))
        return func(*args, **(kwargs or {}))

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


def problem(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x, W, b = (torch.randn(*s, generator=generator).to(dtype) for s in ((6, 8), (30, 8), (30,)))
    return x.requires_grad_(), W.requires_grad_(), b.requires_grad_()


def every_call(dtype=torch.float32) -> dict:
    """Each public op with arguments for it: name -> (function, args, kwargs)."""
    x, W, b = (t.detach() for t in problem(dtype))
    codes = random_codes((6,), 4, 30, dtype=dtype)
    return {
        "topk_select": (topk_select, (x, 3), {}),
        "topk_encode": (topk_encode, (x, W, b), {"k": 3}),
        "batch_topk_encode": (batch_topk_encode, (x, W, b), {"budget": 9, "k_max": 3}),
        "threshold_encode": (threshold_encode, (x, W, b), {"threshold": 0.5, "k_max": 3}),
        "batch_topk_select": (batch_topk_select, (x, 9), {}),
        "threshold_select": (threshold_select, (x, 0.5), {}),
        "price_select": (price_select, (codes, W, None, x), {"price": 0.5}),
        "sparse_decode": (sparse_decode, (codes, W), {}),
        "decode_mse": (decode_mse, (codes, W, None, x), {}),
        "sparse_encode": (sparse_encode, (codes, x, W), {}),
        "sparse_value_grad": (sparse_value_grad, (x, codes, W), {}),
        "sparse_weight_grad": (sparse_weight_grad, (codes, x, 30), {}),
    }


every_op = pytest.mark.parametrize("op", every_call())


# --------------------------------------------------------------------------------------------------- choosing


def test_reference_is_always_available():
    assert isinstance(available_backends(), tuple)
    assert "reference" in available_backends()


@pytest.mark.parametrize("name", ["", "nope", "CPU", None, 3])
def test_unknown_backend_is_a_value_error(name):
    with pytest.raises(ValueError, match="reference"):
        use_backend(name)


@every_op
def test_the_named_backend_runs(backend, op):
    function, args, kwargs = every_call()[op]
    with Spy() as spy:
        function(*args, **kwargs)
    assert spy.calls == [(op, backend)]


def test_nesting_and_exceptions_restore():
    def asked() -> str:
        with Spy() as spy:
            topk_select(torch.ones(2, 3), 1)
        return spy.calls[0][1]

    outside = asked() if "cpu" in available_backends() else None
    with use_backend("reference"):
        with use_backend("auto"), use_backend("reference"):
            assert asked() == "reference"
        with pytest.raises(KeyError), use_backend("auto"):
            raise KeyError
        assert asked() == "reference"
        again = use_backend("reference")
        with again, again:
            pass
        assert asked() == "reference"
    if outside is not None:
        assert asked() == outside


def test_one_context_manager_may_be_reused():
    reference = use_backend("reference")
    for _ in range(2):
        with reference, Spy() as spy:
            topk_select(torch.ones(2, 3), 1)
        assert spy.calls == [("topk_select", "reference")]


@needs_cpu
def test_auto_takes_the_fastest_that_accepts():
    assert "runs on 'cpu'" in explain("topk_select", torch.ones(2, 3), 1)
    half = torch.ones(2, 3).half()
    assert "runs on 'reference'" in explain("topk_select", half, 1)
    for name in ("auto", "reference"):
        with use_backend(name):
            assert topk_select(half, 1).counts.tolist() == [1, 1]


@needs_cpu
@every_op
def test_a_refusal_names_backend_and_reason(op):
    function, args, kwargs = every_call(torch.float16)[op]
    with use_backend("cpu"), pytest.raises(RuntimeError, match=r"(?s)'cpu'.*float16"):
        function(*args, **kwargs)


@every_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_explain_says_what_each_backend_says(op, dtype):
    _function, args, kwargs = every_call(dtype)[op]
    with Spy() as spy:
        text = explain(op, *args, **kwargs)
    assert not spy.calls
    for name in ("cpu", "reference"):
        assert name in text
    if dtype == torch.float16 and "cpu" in available_backends():
        assert "float16" in text
        with use_backend("cpu"):
            assert "cannot run" in explain(op, *args, **kwargs)


def test_explain_refuses_what_is_no_op():
    with pytest.raises(ValueError, match="nope"):
        explain("nope", torch.ones(2))
    with pytest.raises(ValueError, match="topk_select"):
        explain("topk_select")


# ---------------------------------------------------------------------------------------------------- threads


def in_a_thread(function) -> threading.Thread:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("shared", [False, True], ids=["own", "one object"])
@pytest.mark.parametrize("leave_by", ["return", "exception"])
def test_overlapping_threads_do_not_see_each_others_setting(monkeypatch, shared, leave_by):
    """The other thread enters inside ours and leaves after it: in a process-wide setting ours would come back then."""
    monkeypatch.setenv("AKSAE_BACKEND", "auto")
    one = use_backend("triton")
    entered, left, seen = threading.Event(), threading.Event(), []

    def other():
        seen.append(requested())
        with contextlib.suppress(KeyError), one if shared else use_backend("triton"):
            entered.set()
            left.wait(10)
            seen.append(requested())
            if leave_by == "exception":
                raise KeyError
        seen.append(requested())

    with use_backend("reference"):
        with one:
            thread = in_a_thread(other)
            entered.wait(10)
            assert requested() == "triton"
        assert requested() == "reference"
    left.set()
    thread.join(10)
    assert seen == ["auto", "triton", "auto"]
    assert requested() == "auto"


def test_a_new_thread_starts_from_the_environment(monkeypatch):
    monkeypatch.setenv("AKSAE_BACKEND", "reference")
    seen = []
    with use_backend("auto"):
        in_a_thread(lambda: seen.append(requested())).join(10)
    assert seen == ["reference"]


# ------------------------------------------------------------------------------------------------ environment


def test_environment_variable_is_read_at_every_call(monkeypatch):
    ones = torch.ones(2, 3)
    monkeypatch.setenv("AKSAE_BACKEND", "reference")
    assert "runs on 'reference'" in explain("topk_select", ones, 1)
    monkeypatch.setenv("AKSAE_BACKEND", "nope")
    with pytest.raises(ValueError, match=r"AKSAE_BACKEND.*nope"):
        topk_select(ones, 1)
    with use_backend("reference"):
        assert topk_select(ones, 1).counts.tolist() == [1, 1]
    if "cpu" in available_backends():
        monkeypatch.setenv("AKSAE_BACKEND", "cpu")
        with pytest.raises(RuntimeError, match="float16"):
            topk_select(ones.half(), 1)
        with use_backend("auto"):
            topk_select(ones.half(), 1)
        monkeypatch.setenv("AKSAE_BACKEND", "auto")
        topk_select(ones.half(), 1)


def run_python(code: str, folder: Path | None = None, **environment: str) -> str:
    """Standard output of a fresh interpreter that sees the package in `folder`, or this one."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("AKSAE_")}
    paths = [str(folder or PACKAGE.parent), str(Path(__file__).parent)]
    clean |= {"PYTHONPATH": os.pathsep.join(paths), **environment}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=clean,
        cwd=folder or PACKAGE.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("case", ["no binary", "build failed", "broken binary"])
def test_a_missing_binary_is_told_and_does_not_hurt(tmp_path, case):
    shutil.copytree(
        PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "_build_report.json")
    )
    if case == "build failed":
        report = {"aksae_kernels._C": "it could not be built: g++ is on holiday"}
        (tmp_path / PACKAGE.name / "_build_report.json").write_text(json.dumps(report))
    if case == "broken binary":
        (tmp_path / PACKAGE.name / "_C.abi3.so").write_bytes(b"not a shared object")
    code = """
import json, warnings, torch, aksae_kernels as a
ones = torch.ones(2, 3)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    counts = [a.topk_select(ones, 2).counts.tolist() for _ in range(3)][0]
try:
    with a.use_backend("cpu"):
        a.topk_select(ones, 2)
    refusal = None
except RuntimeError as error:
    refusal = str(error)
print(json.dumps([a.__file__, a.available_backends(), counts, [str(w.message) for w in seen], refusal,
                  a.explain("topk_select", ones, 2)]))
"""
    file, backends, counts, warned, refusal, explained = json.loads(run_python(code, tmp_path))
    assert file.startswith(str(tmp_path))
    assert "cpu" not in backends
    assert "reference" in backends
    assert counts == [2, 2]
    reason = {"no binary": "_C", "build failed": "g++ is on holiday", "broken binary": "_C.abi3.so"}[case]
    assert len(warned) == 1
    for text in (warned[0], refusal, explained):
        assert "cpu" in text
        assert reason in text


@needs_cpu
def test_nothing_is_loaded_before_it_is_needed():
    code = """
import torch, aksae_kernels
loaded = lambda: "_C.abi3.so" in open("/proc/self/maps").read()
before = loaded()
with aksae_kernels.use_backend("reference"):
    aksae_kernels.topk_select(torch.ones(2, 3), 1)
between = loaded()
aksae_kernels.topk_select(torch.ones(2, 3), 1)
print(before, between, loaded())
"""
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs /proc to see which libraries are loaded")
    assert run_python(code).split() == ["False", "False", "True"]


# ----------------------------------------------------------------------------------- what a backward pass runs


@needs_cpu
@pytest.mark.parametrize(("forward", "backward"), [("cpu", "reference"), ("reference", "cpu")])
def test_backward_runs_on_the_backend_of_the_forward(monkeypatch, forward, backward):
    x, W, b = problem()
    with use_backend(forward):
        codes = topk_encode(x, W, b, k=3)
        loss = sparse_decode(codes, W).sum() + decode_mse(codes, W, None, x).sum()
        for selected in (topk_select(x, 3), batch_topk_select(x, 9), threshold_select(x, 0.1)):
            loss = loss + selected.values.sum()
        loss = loss + codes.to_dense(30).sum()
    monkeypatch.setenv("AKSAE_BACKEND", backward)
    with use_backend(backward), Spy() as spy:
        loss.backward()
    assert {"sparse_weight_grad", "sparse_value_grad"} <= set(spy.names)
    assert {asked for _, asked in spy.calls} == {forward}


@needs_cpu
@pytest.mark.parametrize("how", ["use_backend", "AKSAE_BACKEND"])
def test_backward_of_an_automatic_choice_is_not_disturbed(monkeypatch, how):
    # fp16 runs on the reference by itself; a later request for `cpu`, which refuses fp16, does not reach its backward.
    x, W, b = problem(torch.float16)
    loss = sparse_decode(topk_encode(x, W, b, k=3), W).sum()
    if how == "AKSAE_BACKEND":
        monkeypatch.setenv(how, "cpu")
    with use_backend("cpu") if how == "use_backend" else contextlib.nullcontext():
        loss.backward()
    assert x.grad.dtype == torch.float16


@needs_cpu
def test_backward_in_another_thread():
    x, W, b = problem()
    with use_backend("reference"):
        loss = sparse_decode(topk_encode(x, W, b, k=3), W).sum()
    seen = []

    def run():
        with Spy() as spy:
            loss.backward()
        seen.extend(asked for _, asked in spy.calls)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert set(seen) == {"reference"}


def spied_backward(function, inputs, wanted) -> list[str]:
    leaves = [t.detach().clone().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
    with Spy() as spy:
        out = function(*leaves)
        forward = len(spy.calls)
        out.sum().backward()
    return sorted(spy.names[forward:])


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ((0,), ["sparse_input_grad"]),
        ((1,), ["sparse_weight_grad"]),
        ((2,), ["sparse_weight_grad"]),
        ((1, 2), ["sparse_weight_grad"]),
        ((0, 1, 2), ["sparse_input_grad", "sparse_weight_grad"]),
    ],
    ids=str,
)
def test_encode_computes_no_gradient_unasked(backend, wanted, expected):
    # One gather for x, one for W_enc and b_enc together.
    names = spied_backward(lambda *inputs: topk_encode(*inputs, k=3).values, problem(), wanted)
    assert [name for name in names if not name.endswith("_select")] == expected


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ((0,), ["sparse_value_grad"]),
        ((1,), ["sparse_weight_grad"]),
        ((2,), []),
        ((0, 1, 2), ["sparse_value_grad", "sparse_weight_grad"]),
    ],
    ids=str,
)
def test_decode_computes_no_gradient_unasked(backend, wanted, expected):
    codes, (x, W, _) = random_codes((6,), 4, 30), problem()

    def decode(values, W_dec, b_dec):
        return sparse_decode(codes._replace(values=values), W_dec, b_dec)

    assert spied_backward(decode, (codes.values, W, x[0]), wanted) == expected


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [((0,), []), ((1,), ["sparse_weight_grad"]), ((2,), []), ((3,), []), ((0, 1, 2, 3), ["sparse_weight_grad"])],
    ids=str,
)
def test_decode_mse_computes_no_gradient_unasked(backend, wanted, expected):
    # The gradient of the values comes out of the forward pass: it is never gathered again.
    codes, (x, W, _) = random_codes((6,), 4, 30), problem()

    def loss(values, W_dec, b_dec, target):
        return decode_mse(codes._replace(values=values), W_dec, b_dec, target)

    assert spied_backward(loss, (codes.values, W, x[0], x), wanted) == expected


# --------------------------------------------------------------------------------- code paths of the C++ backend


def isas() -> list[str]:
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    return [isa for isa, needed in CPU_FLAGS.items() if flags.issuperset(needed)]


def products_of_isa(dtype: torch.dtype, draw: int) -> dict[str, tuple]:
    """What `check_errors` judges, of codes whose selection is checked."""
    generator = torch.Generator().manual_seed(draw)
    x, W, b = (torch.randn(*s, generator=generator).to(dtype) for s in ((19, 301), (3001, 301), (3001,)))
    codes = topk_encode(x, W, b, k=50)
    scores, bound = encode_scores(x, W, b)
    check_codes(codes, scores, 50, tolerance=bound)
    y, grad = sparse_decode(codes, W), sparse_weight_grad(codes, x, 3001)
    with use_backend("reference"):
        y_torch, grad_torch = sparse_decode(codes, W), sparse_weight_grad(codes, x, 3001)
    dense = exact_codes(codes, 3001)
    return {"sparse_decode": (y, dense @ W, y_torch), "sparse_weight_grad": (grad, dense.T @ x, grad_torch)}


def isa_results(path: str) -> None:
    """Run in a fresh interpreter under one AKSAE_CPU_ISA: checks against the oracles, and keeps all selections."""
    kept = []
    with use_backend("cpu"):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            for row in adversarial_rows(5003, dtype=dtype).values():
                pre_acts = torch.stack([row, row.flip(0), row.roll(99)])
                for k in (1, 70, 5000):
                    codes = topk_select(pre_acts, k)
                    check_codes(codes, pre_acts, k)
                    kept += codes
                kept += batch_topk_select(pre_acts, 777)
                kept += threshold_select(pre_acts, 0.75)
            generator = torch.Generator().manual_seed(1)
            x, W, b = (torch.randint(-3, 4, s, generator=generator).to(dtype) for s in ((19, 37), (3001, 37), (3001,)))
            codes = topk_encode(x, W, b, k=50)
            check_codes(codes, encode_scores(x, W, b)[0], 50)
            kept += codes
            kept.append(sparse_decode(codes, W))
            kept.append(sparse_weight_grad(codes, x, 3001))
            check_errors(products_of_isa(dtype, draw) for draw in range(8))
    torch.save([torch.ops.aksae_cpu.isa(), kept], path)


@pytest.fixture(scope="module")
def by_isa(tmp_path_factory) -> dict[str, list]:
    if "cpu" not in available_backends():
        pytest.skip("backend 'cpu' is not available")
    folder, results = tmp_path_factory.mktemp("isa"), {}
    for isa in isas():
        path = str(folder / isa)
        run_python(f"import test_dispatch; test_dispatch.isa_results({path!r})", AKSAE_CPU_ISA=isa)
        results[isa] = torch.load(path, weights_only=True)
    return results


def test_every_instruction_set_is_right_and_they_agree(by_isa):
    (_, first), *_ = by_isa.values()
    for isa, (ran, kept) in by_isa.items():
        assert ran == isa
        for a, b in zip(kept, first, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@needs_cpu
def test_an_unknown_instruction_set_is_told():
    code = (
        "import torch, aksae_kernels as a; print(a.available_backends(), a.explain('topk_select', torch.ones(2, 3), 1))"
    )
    said = run_python(code, AKSAE_CPU_ISA="abacus")
    assert "AKSAE_CPU_ISA" in said
    assert "abacus" in said
    assert "'cpu'," not in said


def test_explain_sees_autocast():
    x, W = torch.randn(3, 5), torch.randn(7, 5)
    with torch.autocast("cpu", dtype=torch.float16):
        assert "runs on 'reference'" in explain("topk_encode", x, W, k=2)


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_reference_is_exact_under_reduced_precision(precision):
    was = torch.backends.mkldnn.matmul.fp32_precision
    x, W = torch.randn(4, 300), torch.randn(40, 300)
    try:
        torch.backends.mkldnn.matmul.fp32_precision = precision
        with use_backend("reference"):
            codes = topk_encode(x, W, k=9)
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = was
    scores, bound = encode_scores(x, W)
    check_codes(codes, scores, 9, tolerance=bound)
