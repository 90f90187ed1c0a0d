"""Fakes, schemas and torch.compile: shapes follow from arguments, nothing breaks the graph, no backend is forgotten."""

from __future__ import annotations

import math
import threading

import numpy as np
import pytest
import torch
from conftest import INTERPRETED
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import aksae_kernels
from aksae_kernels import (
    SparseCodes,
    available_backends,
    batch_topk_encode,
    batch_topk_select,
    decode_mse,
    encode_at,
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
from aksae_kernels.layers import SparseDecoder, TopKEncoder
from aksae_kernels.testing import random_codes

needs_cpu = pytest.mark.skipif("cpu" not in available_backends(), reason="backend 'cpu' is not available")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def samples(case) -> dict[str, list[tuple]]:
    """Arguments of every torch op, without the backend."""
    x, pre_acts, target = case.randn(5, 7), case.randn(5, 20, seed=1), case.randn(5, 7, seed=2)
    W, b, b_dec = case.randn(20, 7, seed=3), case.randn(20, seed=4), case.randn(7, seed=5)
    values, indices, counts = random_codes((5,), 4, 20, dtype=case.dtype, device=case.device)
    k = torch.tensor([0, 1, 2, 3, 4], dtype=torch.int32, device=case.device)
    for leaf in (x, pre_acts, target, W, b, b_dec, values):
        leaf.requires_grad_()
    plain = {name: tensor.detach() for name, tensor in {"W": W, "target": target, "values": values}.items()}
    acc = torch.float64 if case.dtype == torch.float64 else torch.float32
    moments = [torch.rand(20, 7, device=case.device, dtype=acc) for _ in range(2)]
    scale = torch.tensor(0.5, device=case.device, dtype=acc)
    prices = torch.full((5,), 0.5, device=case.device, dtype=acc)
    return {
        "topk_select": [(pre_acts, k, 4)],
        "topk_encode": [(x, W, b, k, 4), (x, W, None, k, 4), (x.detach(), W, b, k, 4)],
        "batch_topk_encode": [(x, W, b, 9, 4), (x, W, None, 9, 20), (x, W.detach(), b.detach(), 9, 4)],
        "threshold_encode": [
            (x, W, b, torch.tensor(0.25, dtype=torch.float64, device=case.device), 4),
            (x, W, None, b.detach(), 20),
        ],
        "batch_topk_select": [(pre_acts, 9, 20)],
        "threshold_select": [
            (pre_acts, torch.tensor(0.25, dtype=torch.float64, device=case.device), 20),
            (pre_acts, b.detach(), 20),
        ],
        "sparse_decode": [(values, indices, counts, W, b_dec), (values, indices, counts, W, None)],
        "sparse_input_grad": [(values.detach(), indices, counts, W.detach(), None)],
        "decode_mse": [
            (values, indices, counts, W, b_dec, target, True, True),
            (values, indices, counts, W, None, target, True, True),
            (values, indices, counts, plain["W"], b_dec.detach(), plain["target"], False, True),
            (plain["values"], indices, counts, W, b_dec, plain["target"], True, False),
            (plain["values"], indices, counts, plain["W"], None, plain["target"], True, True),
            (plain["values"], indices, counts, plain["W"], None, plain["target"], False, False),
        ],
        "sparse_encode": [
            (x, indices, counts, W, b),
            (x, indices, counts, W, None),
            (x.detach(), indices, counts, W, b),
        ],
        "sparse_value_grad": [(plain["target"], indices, counts, plain["W"])],
        "sparse_weight_grad": [
            (plain["values"], indices, counts, plain["target"], 20, True),
            (plain["values"], indices, counts, plain["target"], 20, False),
        ],
        "scatter_codes": [(plain["values"], indices, counts, 20)],
        "price_select": [
            (values, indices, counts, plain["W"], b_dec.detach(), plain["target"], prices, 2),
            (plain["values"], indices, counts, plain["W"], None, plain["target"], prices, 1),
        ],
        "adam_step_": [
            (plain["W"].clone(), plain["W"] / 2, *moments, scale, 3, 1e-3, 0.9, 0.999, 1e-8, True, False),
            (plain["W"].clone(), plain["W"] / 2, *moments, scale, 3, 1e-3, 0.9, 0.999, 1e-8, False, True),
        ],
    }


OPS = sorted(
    name.removeprefix("aksae::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("aksae::")
)


@pytest.mark.parametrize("op", OPS)
def test_opcheck(case, op):
    for arguments in samples(case)[op]:
        torch.library.opcheck(getattr(torch.ops.aksae, op).default, (*arguments, case.backend))


@pytest.mark.parametrize("op", OPS)
def test_opcheck_with_parameters_and_no_grad(fp32, op):
    """As a backward and an optimizer call what has no derivative; the other ops may be called so, too."""
    for arguments in samples(fp32)[op]:
        for a in arguments:
            if isinstance(a, torch.Tensor) and a.is_floating_point():
                a.requires_grad_()
        with torch.no_grad():
            torch.library.opcheck(getattr(torch.ops.aksae, op).default, (*arguments, fp32.backend))


# ------------------------------------------------------------------------------------------------ fake tensors


def calls(lead: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> dict:
    """Every public function on data with these leading dimensions."""

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    shape = (*lead, 4)
    codes = SparseCodes(
        randn(*shape),
        torch.zeros(shape, dtype=torch.int32, device=device),
        torch.ones(lead, dtype=torch.int32, device=device),
    )
    k = torch.full(lead, 3, device=device)
    return {
        "topk_select": lambda: topk_select(randn(*lead, 20), k, 6),
        "topk_select int": lambda: topk_select(randn(*lead, 20), 50),
        "topk_encode": lambda: topk_encode(randn(*lead, 7), randn(20, 7), randn(20), k=k, k_max=6),
        "batch_topk_encode": lambda: batch_topk_encode(randn(*lead, 7), randn(20, 7), randn(20), budget=9, k_max=6),
        "threshold_encode": lambda: threshold_encode(randn(*lead, 7), randn(20, 7), threshold=0.5, k_max=6),
        "threshold_encode per latent": lambda: threshold_encode(
            randn(*lead, 7), randn(20, 7), randn(20), threshold=randn(20), k_max=30
        ),
        "encode_at": lambda: encode_at(codes, randn(*lead, 7), randn(20, 7), randn(20)),
        "batch_topk_select": lambda: batch_topk_select(randn(*lead, 20), 9),
        "threshold_select": lambda: threshold_select(randn(*lead, 20), 0.5),
        "threshold_select per latent": lambda: threshold_select(randn(*lead, 20), randn(20), 30),
        "price_select": lambda: price_select(codes, randn(20, 7), randn(7), randn(*lead, 7), price=0.5, passes=2),
        "sparse_decode": lambda: sparse_decode(codes, randn(20, 7), randn(7)),
        "decode_mse": lambda: decode_mse(codes, randn(20, 7), randn(7), randn(*lead, 7)),
        "sparse_encode": lambda: sparse_encode(codes, randn(*lead, 7), randn(20, 7)),
        "sparse_value_grad": lambda: sparse_value_grad(randn(*lead, 7), codes, randn(20, 7)),
        "sparse_weight_grad": lambda: sparse_weight_grad(codes, randn(*lead, 7), 20),
        "to_dense": lambda: codes.to_dense(20),
    }


def described(result: torch.Tensor | tuple) -> list[tuple]:
    tensors = result if isinstance(result, tuple) else (result,)
    return [(t.shape, t.dtype, t.stride()) for t in tensors]


@pytest.mark.parametrize("lead", [(5,), (2, 3), (), (0,)], ids=str)
@pytest.mark.parametrize("name", calls((), torch.float32))
def test_fakes_have_the_real_shapes(case, name, lead):
    real = described(calls(lead, case.dtype, case.device)[name]())
    with FakeTensorMode():
        assert described(calls(lead, case.dtype, case.device)[name]()) == real


@pytest.mark.parametrize("name", calls((), torch.float32))
def test_meta_tensors(backend, name):
    assert described(calls((2, 3), torch.float32, "meta")[name]()) == described(calls((2, 3), torch.float32)[name]())


# ---------------------------------------------------------------------------------------------- torch.compile


def inputs(seed: int = 0, rows: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, 8), (30, 8), (30,), (30, 8), (8,))
    return [(torch.randn(*shape, generator=generator) / math.sqrt(8)).requires_grad_() for shape in shapes]


def forward(x, W_enc, b_enc, W_dec, b_dec, k=3, k_max=None):
    """Everything that has a gradient, in one scalar."""
    codes = topk_encode(x, W_enc, b_enc, k=k, k_max=k_max)
    y = sparse_decode(codes, W_dec, b_dec)
    loss = decode_mse(codes, W_dec, b_dec, x)
    pre_acts = x @ W_enc.T
    selected = [
        topk_select(pre_acts, k, k_max),
        batch_topk_select(pre_acts, 12),
        threshold_select(pre_acts, 0.3),
        threshold_select(pre_acts, b_enc.detach()),
        batch_topk_encode(x, W_enc, b_enc, budget=12, k_max=5),
        threshold_encode(x, W_enc, b_enc, threshold=0.3, k_max=5),
        threshold_encode(x, W_enc, threshold=b_enc.detach(), k_max=5),
        encode_at(codes, x, W_dec, b_enc),
    ]
    dense = sum(codes.to_dense(30).square().sum() for codes in selected)
    gathered = codes.gather(b_enc) + codes.gather(pre_acts)
    return (y * x).sum() + loss.mean() + dense + gathered.where(codes.mask(), 0).square().sum()


def gradients(function, arguments, **kwargs) -> list[torch.Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in arguments]
    out = function(*leaves, **kwargs)
    out.backward()
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def compiled(function, **kwargs):
    return torch.compile(function, fullgraph=True, backend="aot_eager", **kwargs)


@pytest.mark.parametrize("per_row", [False, True], ids=["int-k", "tensor-k"])
def test_fullgraph_gives_the_eager_result(backend, per_row):
    k = {"k": torch.tensor([0, 1, 2, 3, 4, 5]), "k_max": 4} if per_row else {"k": 3}
    eager, traced = gradients(forward, inputs(), **k), gradients(compiled(forward), inputs(), **k)
    for a, b in zip(traced, eager, strict=True):
        torch.testing.assert_close(a, b)


def test_fullgraph_gradient_ops_and_no_grad(backend):
    codes, (x, _, _, W_dec, _) = random_codes((6,), 4, 30), inputs()

    def both(x, codes, W):
        return sparse_value_grad(x, codes, W), sparse_weight_grad(codes, x, 30)

    with torch.no_grad():
        for a, b in zip(compiled(both)(x, codes, W_dec), both(x, codes, W_dec), strict=True):
            torch.testing.assert_close(a, b)


def test_layers_compile(backend):
    encoder, decoder = TopKEncoder(8, 30, k=3), SparseDecoder(30, 8)
    x = inputs()[0].detach()

    def autoencode(x):
        return decoder(encoder(x))

    torch.testing.assert_close(compiled(autoencode)(x), autoencode(x))


def test_layers_export(backend):
    autoencoder, x = torch.nn.Sequential(TopKEncoder(8, 30, k=3), SparseDecoder(30, 8)), inputs()[0].detach()
    exported = torch.export.export(autoencoder, (x,)).module()
    torch.testing.assert_close(exported(x), autoencoder(x))


class Selections(torch.nn.Module):
    def forward(self, pre_acts):
        encoded = batch_topk_encode(pre_acts, pre_acts, budget=9, k_max=5)
        return batch_topk_select(pre_acts, 9).values, topk_select(pre_acts, 30, 5).values, encoded.values


@pytest.mark.parametrize("strict", [False, True], ids=["default", "strict"])
def test_sizes_are_exported_without_a_guard(strict):
    """A budget and a k that may be larger or smaller than what there is: for every size of the batch one graph."""
    rows = torch.export.Dim("rows", min=2, max=1000)
    dynamic = {"pre_acts": {0: rows, 1: torch.export.Dim.DYNAMIC}}
    exported = torch.export.export(Selections(), (torch.randn(5, 20),), dynamic_shapes=dynamic, strict=strict)
    for shape in ((2, 3), (7, 40)):
        pre_acts = torch.randn(shape)
        for a, b in zip(exported.module()(pre_acts), Selections()(pre_acts), strict=True):
            assert torch.equal(a, b)


def test_layers_compile_with_numpys_integers(backend):
    encoder, x = TopKEncoder(8, 30, k=np.int32(3), k_max=np.int64(4)), inputs()[0].detach()
    for a, b in zip(compiled(encoder)(x), encoder(x), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="its dynamo does not trace operator.index of NumPy's scalars")
def test_numpys_integers_compile(backend):
    def select(pre_acts, k, k_max):
        return topk_select(pre_acts, k, k_max).values, batch_topk_select(pre_acts, k).values

    pre_acts, traced = inputs()[1].detach(), compiled(select)
    for k, k_max in ((np.int64(3), np.int64(4)), (np.int64(5), np.int64(6)), (2, 3)):
        for a, b in zip(traced(pre_acts, k, k_max), select(pre_acts, int(k), int(k_max)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.skipif(INTERPRETED, reason="what is traced names its backend, and is the same for all")
def test_batch_size_does_not_recompile(backend):
    counter = CompileCounterWithBackend("aot_eager")
    traced = torch.compile(forward, fullgraph=True, backend=counter, dynamic=True)
    for rows in (6, 11, 17):
        arguments = inputs(rows, rows)
        for a, b in zip(gradients(traced, arguments), gradients(forward, arguments), strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


def test_per_row_k_does_not_recompile(backend):
    counter = CompileCounterWithBackend("aot_eager")
    traced = torch.compile(topk_select, fullgraph=True, backend=counter)
    pre_acts = inputs()[1].detach()
    for k in (torch.arange(30), torch.zeros(30, dtype=torch.int64), torch.full((30,), 2**40)):
        for a, b in zip(traced(pre_acts, k, 5), topk_select(pre_acts, k, 5), strict=True):
            assert torch.equal(a, b)
    assert counter.frame_count == 1


@needs_cpu
def test_a_compiled_function_follows_the_backend_around_it():
    # fp16 tells who ran: `cpu` refuses it.
    half = torch.ones(2, 3).half()
    traced = compiled(topk_select)
    for _ in range(2):
        with use_backend("reference"):
            assert traced(half, 1, 2).counts.tolist() == [1, 1]
        with use_backend("cpu"), pytest.raises(RuntimeError, match="float16"):
            traced(half, 1, 2)
        assert traced(half, 1, 2).counts.tolist() == [1, 1]


@needs_cpu
def test_use_backend_inside_a_compiled_function():
    half = torch.ones(2, 3).half().requires_grad_()

    @compiled
    def on_reference(x):
        with use_backend("reference"):
            return topk_select(x, 1, 2).values.sum()

    @compiled
    def on_cpu(x):
        with use_backend("cpu"):
            return topk_select(x, 1, 2).values.sum()

    with use_backend("cpu"):
        # The inner request wins, and the backward stays with the forward.
        on_reference(half).backward()
    assert half.grad.tolist() == [[1, 0, 0]] * 2
    with pytest.raises(RuntimeError, match="float16"):
        on_cpu(half)
    # The request does not outlive the call, even one that failed.
    assert topk_select(half, 1).counts.tolist() == [1, 1]


@needs_cpu
def test_a_compiled_function_follows_the_backend_of_its_thread():
    # fp16 tells who ran: `cpu` refuses it.
    half = torch.ones(2, 3).half()
    traced = compiled(topk_select)
    seen, ours_ran, theirs_ran = [], threading.Event(), threading.Event()

    def on_cpu():
        seen.append(traced(half, 1, 2).counts.tolist())
        with use_backend("cpu"):
            ours_ran.wait(10)
            with pytest.raises(RuntimeError, match="float16"):
                traced(half, 1, 2)
            theirs_ran.set()
        seen.append(traced(half, 1, 2).counts.tolist())

    thread = threading.Thread(target=on_cpu)
    with use_backend("reference"):
        assert traced(half, 1, 2).counts.tolist() == [1, 1]
        thread.start()
        ours_ran.set()
        theirs_ran.wait(10)
        assert traced(half, 1, 2).counts.tolist() == [1, 1]
    thread.join(10)
    assert seen == [[1, 1]] * 2


def test_threads_share_what_was_compiled():
    counter = CompileCounterWithBackend("aot_eager")
    traced = torch.compile(topk_select, fullgraph=True, backend=counter)

    def run():
        for name in ("reference", "auto", "reference"):
            with use_backend(name):
                traced(torch.ones(2, 3), 1, 2)
        with use_backend("auto"), use_backend("reference"):
            traced(torch.ones(2, 3), 1, 2)

    for _ in range(3):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert counter.frame_count == 2


@needs_cpu
def test_compiled_backward_runs_on_the_backend_of_the_forward():
    arguments = [t.detach().half().requires_grad_() for t in inputs()[:3]]
    with use_backend("reference"):
        values = compiled(lambda *a: topk_encode(*a, k=3).values)(*arguments)
    with use_backend("cpu"):
        values.sum().backward()
    assert all(t.grad is not None for t in arguments)


def test_k_max_must_be_given_while_tracing(backend):
    pre_acts, k = torch.ones(2, 3), torch.tensor([1, 2])
    with FakeTensorMode(), pytest.raises(ValueError, match="k_max"):
        topk_select(torch.ones(2, 3), torch.ones(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="k_max"):
        make_fx(lambda p, k: topk_select(p, k).values, tracing_mode="fake")(pre_acts, k)
    with pytest.raises(Exception, match="k_max"):
        compiled(topk_select)(pre_acts, k)
    assert topk_select(pre_acts, k).values.shape == (2, 2)


@pytest.mark.slow
@needs_cpu
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_inductor(tmp_path, monkeypatch):
    # A header that inductor compiled for another ATEN_CPU_CAPABILITY does not fit this one, and it does not ask.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def loss(x, W_enc, b_enc, W_dec, b_dec):
        return decode_mse(topk_encode(x, W_enc, b_enc, k=3), W_dec, b_dec, x).mean()

    traced = torch.compile(loss, fullgraph=True)
    for a, b in zip(gradients(traced, inputs()), gradients(loss, inputs()), strict=True):
        torch.testing.assert_close(a, b)


def test_every_public_op_is_among_the_samples():
    public = {name for name in aksae_kernels.__all__ if name.islower()} - {
        "encode_at",  # the op sparse_encode, with a bias
        "price_for",  # some calls of price_select
        "use_backend",
        "available_backends",
        "explain",
        "frozen",
    }
    assert public <= set(OPS)


# -------------------------------------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_synchronisation_and_cuda_graphs():
    leaves = [t.detach().cuda() for t in inputs()]
    k = torch.tensor([0, 1, 2, 3, 4, 5], device="cuda")
    expected = forward(*leaves, k=k, k_max=4)
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward(*leaves, k=k, k_max=4)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward(*leaves, k=k, k_max=4)
    graph.replay()
    torch.testing.assert_close(captured, expected)
