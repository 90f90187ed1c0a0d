"""The Triton backend beside the op tests, which run on it where it is available: on a GPU, and in the interpreter.

Half of this file is about what would run on a GPU: launches are recorded on meta tensors and compiled ahead of time.
The other half runs in the interpreter, in a process with TRITON_INTERPRET=1, and forces paths that shapes of ordinary
tests do not reach.
"""

from __future__ import annotations

import inspect
import json
import math
import re
import weakref
from collections import defaultdict

import pytest
import torch
from conftest import INTERPRETED
from torch.utils._python_dispatch import TorchDispatchMode

from aksae_kernels import (
    SparseCodes,
    available_backends,
    explain,
    frozen,
    price_select,
    sparse_weight_grad,
    topk_encode,
    topk_select,
    use_backend,
)
from aksae_kernels.testing import check_codes, check_errors, encode_scores, random_codes

pytest.importorskip("triton", reason="Triton is not installed")

from aksae_kernels.backends import triton as backend
from aksae_kernels.backends.triton import adam, encode, offer, ordering, price, select, sparse, tuning
from benchmarks import resources, tune
from benchmarks.problem import Shape

compiled = pytest.mark.skipif(INTERPRETED, reason="compiles: in a process without TRITON_INTERPRET")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="interprets: in a process with TRITON_INTERPRET=1")

# ----------------------------------------------------------------------------------------- without a GPU, compiled


@compiled
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_backend_says_so():
    assert "triton" not in available_backends()
    with use_backend("triton"), pytest.raises(RuntimeError, match=r"'triton'.*no GPU"):
        topk_select(torch.ones(2, 3), 1)
    assert "triton: refuses - torch sees no GPU" in explain("topk_select", torch.ones(2, 3), 1)


def kernels() -> set[str]:
    names = {name for module in (adam, encode, price, select, sparse) for name in vars(module)}
    return {name for name in names if name.endswith("_kernel")}


@compiled
def test_every_kernel_is_launched_by_some_op():
    assert {launch.kernel for launch in resources.launches(["S1"])} == kernels()


@compiled
@pytest.mark.slow
def test_every_launch_compiles_for_every_target_within_bounds(capsys):
    """Registers, spills and shared memory: a program of 128 threads must leave room for others beside it."""
    # S1 and S3 differ in the size of groups and slices, the others in what may be specialised.
    table = resources.measured(resources.launches(["S1", "S3", "odd", "one"]), ["sm_90"])
    table |= resources.measured(resources.launches(["S1"]), [t for t in resources.TARGETS if t != "sm_90"])
    with capsys.disabled():
        print("\n" + resources.formatted(table))
    assert {kernel for kernel, _ in table} == kernels()
    for (kernel, target), (_, use) in table.items():
        assert use.registers <= 255, (kernel, target, use)
        assert use.spills <= 64, (kernel, target, use)
        assert use.shared <= 32 << 10, (kernel, target, use)


@compiled
@pytest.mark.parametrize("dtype", resources.DTYPES, ids=str)
def test_k_rows_and_entries_compile_nothing_anew(dtype):
    def started(rows: int, k: int) -> set:
        calls = list(resources.op_calls(Shape(rows, 768, 24576), k, dtype))
        return {launch for call in calls for launch in resources.record(call)}

    # All latents of a few rows fit one slab, and are selected from at once.
    first = started(8192, 64) | started(64, 64)
    for rows, k in ((100, 64), (8192, 320), (8191, 17), (33, 1), (10_000, 1000)):
        assert started(rows, k) <= first, (rows, k)


class PeakMemory(TorchDispatchMode):
    """Bytes of the tensors that are alive, at most, of those made while the mode is on; views of others are not."""

    def __init__(self, *others: torch.Tensor):
        super().__init__()
        self.alive = self.peak = 0
        self.seen = weakref.WeakSet(tensor.untyped_storage() for tensor in others)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.seen:
                storage = tensor.untyped_storage()
                self.seen.add(storage)
                self.alive += storage.nbytes()
                self.peak = max(self.peak, self.alive)
                weakref.finalize(storage, self.freed, storage.nbytes())
        return result

    def freed(self, n_bytes: int) -> None:
        self.alive -= n_bytes


@compiled
@pytest.mark.parametrize("dtype", resources.DTYPES, ids=str)
@pytest.mark.parametrize("k", [64, 320])
@pytest.mark.parametrize("name", ["S1", "S2", "S3", "S4"])
@pytest.mark.parametrize("megabytes", [None, 40])
def test_an_encode_takes_one_slab_of_memory(monkeypatch, megabytes, name, k, dtype):
    if megabytes:
        monkeypatch.setenv("AKSAE_SLAB_MB", str(megabytes))
    # It writes into the slab, except where a device has no mixed product, as meta has none.
    monkeypatch.setattr(encode, "_product", lambda x, W, slab: None)
    shape, _ = resources.SHAPES[name]
    meta = torch.device("meta")
    x = torch.empty(shape.B, shape.D, dtype=dtype, device=meta)
    W = torch.empty(shape.F, shape.D, dtype=dtype, device=meta)
    rows_of_k = torch.empty(shape.B, dtype=torch.int32, device=meta)
    memory = PeakMemory(x, W, rows_of_k)
    with memory:
        resources.record(lambda: backend.topk_encode(x, W, None, rows_of_k, k))
    codes = shape.B * (k * (dtype.itemsize + 4) + 4)
    assert tuning.slab_bytes() * 0.2 < memory.peak - codes <= tuning.slab_bytes() * 1.02


@compiled
@pytest.mark.parametrize("dtype", resources.DTYPES, ids=str)
@pytest.mark.parametrize("k", [60, 320])
def test_a_capped_encode_takes_its_candidates_besides(monkeypatch, k, dtype):
    """And reads nothing back: on the meta device there is nothing to read."""
    monkeypatch.setattr(encode, "_product", lambda x, W, slab: None)
    shape, _ = resources.SHAPES["S1"]
    meta = torch.device("meta")
    x = torch.empty(shape.B, shape.D, dtype=dtype, device=meta)
    W = torch.empty(shape.F, shape.D, dtype=dtype, device=meta)
    thresholds = torch.empty(shape.F, dtype=dtype, device=meta)
    for call in (
        lambda: backend.batch_topk_encode(x, W, None, shape.B * k // 2, k),
        lambda: backend.threshold_encode(x, W, None, thresholds, k),
    ):
        memory = PeakMemory(x, W, thresholds)
        with memory:
            resources.record(call)
        # Two sets of codes, and slots as int64; of all scores there would be some 400 to 800 MB.
        assert memory.peak <= tuning.slab_bytes() * 1.02 + 40 * shape.B * k < shape.B * shape.F * dtype.itemsize


@compiled
@pytest.mark.parametrize("dtype", resources.DTYPES, ids=str)
def test_a_priced_selection_gathers_nothing_into_memory(dtype):
    """Nor does it read anything back: on the meta device there is nothing to read."""
    shape, k = resources.SHAPES["S1"]
    meta = torch.device("meta")
    x = torch.empty(shape.B, shape.D, dtype=dtype, device=meta)
    W = torch.empty(shape.F, shape.D, dtype=dtype, device=meta)
    codes = SparseCodes(
        torch.empty(shape.B, k, dtype=dtype, device=meta),
        torch.empty(shape.B, k, dtype=torch.int32, device=meta),
        torch.empty(shape.B, dtype=torch.int32, device=meta),
    )
    prices = torch.empty(shape.B, dtype=torch.float32, device=meta)
    memory = PeakMemory(x, W, *codes, prices)
    with memory:
        resources.record(lambda: backend.price_select(*codes, W, None, x, prices, 1))
    # The result, two orders as int64 and what sorting makes of them; rows of W would be D numbers for each candidate.
    assert memory.peak <= 64 * shape.B * k


def test_a_priced_selection_of_too_many_columns_is_told():
    n_columns = price._MAX_COLUMNS + 1
    none, W, x = torch.empty(0, 3), torch.empty(2, n_columns, device="meta"), torch.empty(0, n_columns, device="meta")
    with pytest.raises(ValueError, match=f"W_dec.*{n_columns}"):
        backend.price_select(none, none.int(), none[:, 0].int(), W, None, x, none[:, 0], 1)


def stored_values(ptx: str) -> dict[str, set[str]]:
    """What a program stores, as expressions of its parameters and of what it loads through them, by the parameter that
    it is stored through. Registers are followed in the order of the text, so a loop counts as its first turn."""
    known: dict[str, str] = {}
    stored = defaultdict(set)
    for op, operands in re.findall(r"^\s*(?:@!?%p\d+ )?([a-z]\S*)\s+(.*);", ptx, re.MULTILINE):
        names = re.findall(r"%\w+|param_\d+|\b0f\w+|-?\b\d+", operands)
        values = [known.get(name, name) for name in names]
        if op.startswith("ld.global"):
            *targets, _, _ = names
            known |= dict.fromkeys(targets, f"*{values[-2]}")
        elif op.startswith("st.global"):
            stored[values[0]].update(values[2:])
        elif op.startswith(("ld.param", "mov")) and len(names) == 2:
            known[names[0]] = values[1]
        elif op.startswith("ld.shared"):
            known[names[0]] = "shared"
        elif op.endswith("64"):
            known[names[0]] = next((value for value in values if value.startswith("param")), "offset")
        elif names:
            known[names[0]] = f"{op}({', '.join(values[1:])})"
    return dict(stored)


@compiled
@pytest.mark.parametrize("n_columns", [9, 768, 4096])
@pytest.mark.parametrize("unit_norm_rows", [True, False], ids=["unit", "plain"])
def test_a_lazy_step_is_compiled_to_the_same_arithmetic(unit_norm_rows, n_columns):
    """Else a row that fires would not have Adam's bits. Only a GPU rounds a product that is fused with a sum otherwise,
    so the op tests in the interpreter see none of it."""

    def compiled_for(target: str, lazy: bool) -> str:
        param, grad, *moments = torch.empty(4, 40, n_columns, device="meta").unbind()
        numbers = (3, 1e-3, 0.9, 0.999, 1e-8, unit_norm_rows, lazy)
        step = lambda: backend.adam_step_(param, grad, *moments, torch.empty((), device="meta"), *numbers)
        (launch,) = resources.record(step)
        return launch.compile(resources.TARGETS[target]).asm["ptx"]

    for target in ("sm_80", "sm_90", "sm_100"):
        lazy, full = (compiled_for(target, lazy) for lazy in (True, False))
        # The assembler may fuse what does not name its rounding.
        assert not re.search(r"(add|sub|mul)\.(ftz\.)?f32", lazy + full), target
        # sm_100 computes with pairs of registers.
        if target != "sm_100":
            assert stored_values(lazy) == stored_values(full), target
            assert stored_values(lazy).keys() == {"param_0", "param_2", "param_3"}, target


@pytest.mark.parametrize("text", ["0", "-3", "many", "1.5"])
def test_a_slab_of_no_size_is_told(monkeypatch, text):
    monkeypatch.setenv("AKSAE_SLAB_MB", text)
    with pytest.raises(ValueError, match="AKSAE_SLAB_MB"):
        tuning.slab_bytes()


# --------------------------------------------------------------------------------------------- in the interpreter


@pytest.fixture
def small(monkeypatch):
    """Slabs, lists and pieces so small that a small problem needs many of them."""
    monkeypatch.setattr(tuning, "select", lambda n_latents: tuning.Config("select", (("GROUP", 4), ("BLOCK", 32))))
    monkeypatch.setattr(tuning, "_SLAB_LATENTS", 64)
    monkeypatch.setattr(tuning, "_SLAB_CACHED_BYTES", 0)
    monkeypatch.setattr(tuning, "_LEAST_PIECE", 8)
    monkeypatch.setattr(tuning, "gather", lambda *_: tuning.Config("gather", (("BLOCK_K", 4), ("BLOCK_D", 4))))
    monkeypatch.setattr(tuning, "slice_width", lambda *_: 8)
    monkeypatch.setattr(tuning, "slab_bytes", lambda: 20_000)
    monkeypatch.setattr(encode, "_LEAST_LISTED", 8)


def encode_problem(case, rows: int = 11, d_in: int = 24, d_sae: int = 500):
    x, W = case.randn(rows, d_in, seed=1), case.randn(d_sae, d_in, seed=2) / math.sqrt(d_in)
    return x, W, case.randn(d_sae, seed=3) / 4


def check_encoded(x, W, b, k, k_max=None) -> SparseCodes:
    codes = topk_encode(x, W, b, k=k, k_max=k_max)
    scores, bound = encode_scores(x, W, b)
    check_codes(codes, scores, k, k_max, tolerance=bound)
    return codes


@interpreted
@pytest.mark.parametrize("k", [1, 9, 60])
def test_many_slabs_and_full_lists(case, small, k):
    x, W, b = encode_problem(case)
    check_encoded(x, W, b, k)
    per_row = torch.arange(-1, len(x) - 1)
    check_encoded(x, W, None, per_row, k_max=k)


@interpreted
@pytest.mark.parametrize("order", ["ascending", "descending", "equal"])
def test_lists_that_overflow_in_every_slab(case, small, order):
    x = torch.ones(3, 16, dtype=case.dtype)
    ramp = torch.arange(1.0, 401) if order != "equal" else torch.ones(400)
    W = (ramp.flip(0) if order == "descending" else ramp).to(case.dtype)[:, None] * torch.eye(1, 16, dtype=case.dtype)
    codes = check_encoded(x, W, None, 7)
    if order == "equal":
        assert codes.indices.tolist() == [list(range(7))] * 3


@interpreted
def test_rows_that_the_screen_cannot_judge(fp32, small):
    """Latents equal but for their last bits, entries that are not finite, and numbers near overflow."""
    x, W, b = encode_problem(fp32, rows=20)
    W[20:300] = W[20] * (1 + 1e-6 * fp32.randn(280, 1, seed=4))
    check_encoded(x, W, b, 12)
    x[3, 5], x[11, 0], x[17] = math.nan, math.inf, 1e38
    W[7, 2], W[450, 1], b[60] = -math.inf, math.nan, math.inf
    W[9] = 3e38
    scores, bound = encode_scores(x, W, b)
    # What fp32 cannot hold: the kernel's sums overflow, in an order of their own, where fp64 does not.
    calm = (scores.abs() < 1e38).all(-1)
    codes = topk_encode(x, W, b, k=12)
    check_codes(SparseCodes(*(t[calm] for t in codes)), scores[calm], 12, tolerance=bound[calm])
    assert codes.values[3].isnan().all()


@interpreted
@pytest.mark.parametrize("bias", [None, 0.0, 0.5])
def test_rows_of_zeros_are_no_burden(fp32, small, monkeypatch, bias):
    """Padding: their scores are the bias, and the screen knows it."""
    x, W, _ = encode_problem(fp32)
    x[2:5], W[100:200] = 0, 0
    b = None if bias is None else torch.full((len(W),), bias)
    bars, launch = [], encode.launch

    def recorded(kernel, grid, *args, **meta):
        if kernel is encode._encode_exactly_kernel:
            bars.append(args[kernel.arg_names.index("bars_ptr")].clone())
        launch(kernel, grid, *args, **meta)

    monkeypatch.setattr(encode, "launch", recorded)
    codes = check_encoded(x, W, b, 9)
    # A bias that all latents share makes ties of them, more than a list holds.
    failed = torch.cat(bars) == encode.FAILED.value
    assert failed.tolist() == [bias == 0.5 and 2 <= row < 5 for row in range(len(x))]
    assert codes.counts[2:5].tolist() == [9 if bias == 0.5 else 0] * 3


@interpreted
def test_a_kept_weight_gives_the_same_bits(fp32, small):
    x, W, b = encode_problem(fp32)
    plain = topk_encode(x, W, b, k=9)
    with frozen(W):
        for _ in range(2):
            assert all(torch.equal(a, b) for a, b in zip(topk_encode(x, W, b, k=9), plain, strict=True))


@interpreted
def test_long_latents_are_summed_in_pieces(case, small):
    """Latents of 0, 1, 8, 9 and many entries, where one program takes 8."""
    rows, d_in = 60, 5
    hits = [0, 1, 8, 9, 60, 0, 33]
    pattern = torch.full((rows, len(hits)), -1, dtype=torch.int32)
    counts = torch.zeros(rows, dtype=torch.int32)
    for latent, n in enumerate(hits):
        for row in range(n):
            pattern[row, counts[row]] = latent
            counts[row] += 1

    def sums(draw):
        codes = SparseCodes(case.randn(*pattern.shape, seed=2 * draw), pattern, counts)
        dense, by_torch = case.randn(rows, d_in, seed=2 * draw + 1), codes.to_dense(len(hits))
        oracle = by_torch.double()
        _, bias = torch.ops.aksae.sparse_weight_grad(*codes, dense, len(hits), True, "triton")
        weight, weight_torch = oracle.T @ dense.double(), by_torch.T @ dense
        return {
            "the weight": (sparse_weight_grad(codes, dense, len(hits)), weight, weight_torch),
            "the bias": (bias, oracle.sum(0), by_torch.sum(0)),
        }

    check_errors(map(sums, range(case.draws)))


@interpreted
def test_weight_gradients_of_no_latents_and_of_none_active(fp32):
    none = torch.full((32, 64), -1, dtype=torch.int32)
    codes = SparseCodes(torch.ones(32, 64), none, torch.zeros(32, dtype=torch.int32))
    assert sparse_weight_grad(codes, torch.ones(32, 3), 0).shape == (0, 3)
    assert (sparse_weight_grad(codes, torch.ones(32, 3), 7) == 0).all()


@interpreted
def test_the_bound_covers_what_rounding_takes(fp32):
    """`_Rounded` bounds norms from above: of numbers of every size, and of rows that underflow."""
    scale = 2.0 ** torch.arange(-149, 120, 7, dtype=torch.float64)
    rows = (fp32.randn(len(scale), 300).double() * scale[:, None]).float()
    rounded = encode._Rounded(rows)
    assert (rounded.norms.double() >= rows.double().norm(dim=1)).all()
    residual = (rows.double() - rounded.matrix.double()).norm(dim=1)
    assert (rounded.residual_norms.double() >= residual).all()
    ordinary = (scale > 2.0**-40) & (scale < 2.0**50)
    assert (rounded.residual_norms.double() <= 1.01 * residual)[ordinary].all()
    assert torch.equal(rounded.matrix, rows.bfloat16())


@interpreted
@pytest.mark.parametrize("passes", [1, 3])
def test_a_priced_selection_is_written_block_by_block(case, monkeypatch, passes):
    """Blocks of fewer slots than a row keeps, a row that fills none, and one without candidates."""
    codes = random_codes((4,), 50, 90, dtype=case.dtype, integers=True, by_hand=True)
    codes.counts[:3] = torch.tensor([50, 3, 0])
    # What was padding of the first rows.
    codes.indices.clamp_(min=0)
    W, x = case.integers(90, 12, high=1), case.integers(4, 12, high=4)
    at_once = price_select(codes, W, None, x, price=-5, passes=passes)
    assert (at_once.counts[0] > 8) & (at_once.counts < codes.counts).any()
    monkeypatch.setattr(tuning, "ENTRIES", 8)
    for part, whole in zip(price_select(codes, W, None, x, price=-5, passes=passes), at_once, strict=True):
        assert torch.equal(part, whole)


@interpreted
def test_a_priced_selection_of_infinite_values_and_gains(fp32):
    """Infinity times the zeros past the last of five columns stays out of the sums, and a price of -inf keeps what
    gains -inf, too."""
    values = torch.tensor([[math.inf, 2, 1], [1e30, 2, 1]])
    codes = SparseCodes(values, torch.arange(3, dtype=torch.int32).expand(2, 3), torch.full((2,), 3, dtype=torch.int32))
    W, x = torch.ones(3, 5), torch.ones(2, 5)
    assert price_select(codes, W, None, x, price=0).indices.tolist() == [[0, -1, -1], [2, -1, -1]]
    assert price_select(codes, W, None, x, price=-math.inf).counts.tolist() == [3, 3]


# ------------------------------------------------------------------------------------------------------- tuning


@interpreted
def test_what_was_tuned_takes_the_place_of_the_heuristic(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "WARPS", (2,))
    table = tmp_path / "tuned.json"
    arguments = ["--device", "cpu", "--shape", "3", "16", "40", "--rounds", "1", "--out", str(table)]
    assert tune.main([*arguments, "--families", "scan", "gather"]) == 0
    assert set(json.loads(table.read_text())) == {"interpreter"}

    better = {"blocks": {"BLOCK": 64}, "num_warps": 1}
    table.write_text(json.dumps({"a device": {tuning.scan().key: better}}))
    monkeypatch.setattr(tuning, "TUNED", table)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device, block, warps in (("a device", 64, 1), ("another", 512, 4)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, device=device: device)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        tuning._tuned.cache_clear()
        assert (tuning.scan()["BLOCK"], tuning.scan().num_warps) == (block, warps)
    tuning._tuned.cache_clear()


def test_kernels_say_what_they_do():
    for module in (adam, encode, offer, ordering, price, select, sparse, tuning, backend):
        assert inspect.getdoc(module)
