"""Forward-mode derivatives: the tangent, or an error that names the op; never a zero that nobody asked for."""

from __future__ import annotations

import functools

import pytest
import torch
from conftest import EMULATED, INTERPRETED
from test_compile import OPS, samples
from torch.autograd import forward_ad

from aksae_kernels import (
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
)
from aksae_kernels.layers import SparseDecoder, TopKEncoder
from aksae_kernels.testing import random_codes

# torch says so when it first needs its own tangents.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")

FUNCTIONS = {
    "topk_select": lambda x, W, b, c: topk_select(x @ W.T, 3).values,
    "batch_topk_select": lambda x, W, b, c: batch_topk_select(x @ W.T, 11).values,
    "threshold_select": lambda x, W, b, c: threshold_select(x @ W.T, 0.3).values,
    "topk_encode": lambda x, W, b, c: topk_encode(x, W, b, k=3).values,
    "topk_encode without bias": lambda x, W, b, c: topk_encode(x, W, k=3).values,
    "batch_topk_encode": lambda x, W, b, c: batch_topk_encode(x, W, b, budget=11, k_max=4).values,
    "threshold_encode": lambda x, W, b, c: threshold_encode(x, W, b, threshold=0.3, k_max=4).values,
    "encode_at": lambda x, W, b, c: encode_at(topk_encode(x, W, b, k=3), x, W, b).values,
    "sparse_encode": lambda x, W, b, c: sparse_encode(topk_encode(x, W, b, k=3), x, W),
    "price_select": lambda x, W, b, c: price_select(topk_encode(x, W, b, k=5), W, c, x, price=1e-3).values,
    "sparse_decode": lambda x, W, b, c: sparse_decode(topk_encode(x, W, b, k=3), W, c),
    "decode_mse": lambda x, W, b, c: decode_mse(topk_encode(x, W, b, k=3), W, c, x),
    "decode_mse without bias": lambda x, W, b, c: decode_mse(topk_encode(x, W, b, k=3), W, None, x),
    "to_dense": lambda x, W, b, c: topk_encode(x, W, b, k=3).to_dense(9),
}
every_function = pytest.mark.parametrize("name", FUNCTIONS)
REFUSED = {"sparse_input_grad", "sparse_value_grad", "sparse_weight_grad", "scatter_codes", "adam_step_"}
# Arguments that decide what is selected, and nothing else.
COMPARED = {"threshold_select": (1,), "threshold_encode": (3,), "price_select": (3, 4, 5, 6)}
# One that goes through most ops, where the ways to it are what is tested.
LOSS = FUNCTIONS["decode_mse"]


def arguments(case) -> tuple[torch.Tensor, ...]:
    """x, W, b_enc and b_dec; pre-activations are far enough apart for finite differences."""
    return case.randn(5, 4), case.randn(9, 4, seed=1), case.randn(9, seed=2), case.randn(4, seed=3)


def directions(case) -> tuple[torch.Tensor, ...]:
    return tuple(case.randn(*t.shape, seed=10 + i) for i, t in enumerate(arguments(case)))


def by_reverse_mode(function, inputs, tangents) -> torch.Tensor:
    """The tangent, an entry at a time, from gradients."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(*leaves)
    entries = []
    for entry in out.flatten():
        grads = torch.autograd.grad(entry, leaves, retain_graph=True, allow_unused=True)
        entries.append(sum((g * t).sum() for g, t in zip(grads, tangents, strict=True) if g is not None))
    return torch.stack(entries).view_as(out)


def by_dual_tensors(function, inputs, tangents) -> torch.Tensor | None:
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, tangent) for t, tangent in zip(inputs, tangents, strict=True)]
        return forward_ad.unpack_dual(function(*duals)).tangent


def by_jvp(function, inputs, tangents) -> torch.Tensor:
    return torch.func.jvp(function, inputs, tangents)[1]


def by_jacfwd(function, inputs, tangents) -> torch.Tensor:
    jacobians = torch.func.jacfwd(function, argnums=tuple(range(len(inputs))))(*inputs)
    return sum(torch.tensordot(j, t, t.ndim) for j, t in zip(jacobians, tangents, strict=True))


def by_compiled_jvp(function, inputs, tangents) -> torch.Tensor:
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: by_jvp(function, t, tangents), fullgraph=True, backend="aot_eager")
    return compiled(*inputs)


def by_compiled_dual_tensors(function, inputs, tangents) -> torch.Tensor:
    torch._dynamo.reset()
    return torch.compile(by_dual_tensors, fullgraph=True, backend="aot_eager")(function, inputs, tangents)


WAYS = [by_dual_tensors, by_jvp, by_jacfwd, by_compiled_jvp, by_compiled_dual_tensors]


@every_function
@pytest.mark.parametrize("requires_grad", [False, True], ids=["constants", "parameters"])
@pytest.mark.parametrize("way", WAYS[:2], ids=lambda way: way.__name__)
def test_the_tangent_is_that_of_the_gradients(fp32, name, requires_grad, way):
    inputs, tangents = arguments(fp32), directions(fp32)
    expected = by_reverse_mode(FUNCTIONS[name], inputs, tangents)
    inputs = tuple(t.requires_grad_(requires_grad) for t in inputs)
    torch.testing.assert_close(way(FUNCTIONS[name], inputs, tangents), expected)


@pytest.mark.parametrize("requires_grad", [False, True], ids=["constants", "parameters"])
@pytest.mark.parametrize("way", WAYS[2:], ids=lambda way: way.__name__)
def test_every_way_to_a_tangent(fp32, requires_grad, way):
    inputs, tangents = arguments(fp32), directions(fp32)
    expected = by_reverse_mode(LOSS, inputs, tangents)
    inputs = tuple(t.requires_grad_(requires_grad) for t in inputs)
    # A Jacobian is multiplied afterwards: its terms are larger than their sum.
    torch.testing.assert_close(way(LOSS, inputs, tangents), expected, rtol=1e-5, atol=1e-4)


@every_function
@pytest.mark.parametrize("alone", range(4), ids=["x", "W", "b_enc", "b_dec"])
def test_a_tangent_of_one_argument_alone(fp32, name, alone):
    inputs, tangents = arguments(fp32), directions(fp32)
    only = [t if i == alone else torch.zeros_like(t) for i, t in enumerate(tangents)]
    with forward_ad.dual_level():
        mixed = list(inputs)
        mixed[alone] = forward_ad.make_dual(inputs[alone], tangents[alone])
        tangent = forward_ad.unpack_dual(FUNCTIONS[name](*mixed)).tangent
    expected = by_reverse_mode(FUNCTIONS[name], inputs, only)
    torch.testing.assert_close(torch.zeros_like(expected) if tangent is None else tangent, expected)


@every_function
def test_gradcheck(fp64, name):
    inputs = [t.requires_grad_() for t in arguments(fp64)]
    assert torch.autograd.gradcheck(FUNCTIONS[name], inputs, check_forward_ad=True)


@every_function
def test_a_tangent_has_gradients(fp64, name):
    """Reverse over forward: second derivatives, by a way on which none is missing."""
    tangents = directions(fp64)
    inputs = [t.requires_grad_() for t in arguments(fp64)]
    assert torch.autograd.gradcheck(lambda *t: by_jvp(FUNCTIONS[name], t, tangents), inputs)


@every_function
def test_a_tangent_has_a_tangent(fp64, name):
    inputs, tangents = arguments(fp64), directions(fp64)
    step = 1e-5
    first = [
        by_jvp(FUNCTIONS[name], tuple(t + h * d for t, d in zip(inputs, tangents, strict=True)), tangents)
        for h in (step, -step)
    ]
    second = by_jvp(lambda *t: by_jvp(FUNCTIONS[name], t, tangents), inputs, tangents)
    torch.testing.assert_close(second, (first[0] - first[1]) / (2 * step), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "to_dense"])
def test_a_backward_is_not_differentiated(fp32, name):
    """Forward over reverse: a Hessian-vector product, of which a part would be missing."""
    inputs, tangents = [t.requires_grad_() for t in arguments(fp32)], directions(fp32)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, tangent) for t, tangent in zip(inputs, tangents, strict=True)]
        loss = FUNCTIONS[name](*duals).square().sum()
        with pytest.raises(RuntimeError, match=r"aksae::\w+ has no forward-mode derivative"):
            torch.autograd.grad(loss, duals[:2])


@pytest.mark.parametrize("op", OPS)
def test_no_op_gives_a_silent_zero(case, op):
    """Of the torch ops themselves, for a tangent of each argument alone: one of every output, or an error."""
    for arguments in samples(case)[op]:
        for i, argument in enumerate(arguments):
            if not isinstance(argument, torch.Tensor) or not argument.is_floating_point():
                continue
            if i in COMPARED.get(op, ()):
                continue
            with torch.no_grad(), forward_ad.dual_level():
                dual = forward_ad.make_dual(argument.detach(), torch.randn_like(argument))
                call = functools.partial(getattr(torch.ops.aksae, op), *arguments[:i], dual, *arguments[i + 1 :])
                if op in REFUSED:
                    with pytest.raises(RuntimeError, match=f"aksae::{op} has no forward-mode derivative"):
                        call(case.backend)
                    continue
                out = call(case.backend)
                for output in out if isinstance(out, tuple) else (out,):
                    if not output.is_floating_point():
                        continue
                    tangent = forward_ad.unpack_dual(output).tangent
                    assert not output.numel() or (tangent is not None and tangent.any())


def test_padding_has_no_tangent_and_is_not_read(fp32):
    codes = random_codes((6,), 4, 30, device=fp32.device)
    padding = codes.indices < 0
    W = fp32.randn(30, 7)
    tangent = fp32.randn(6, 4)

    def decode(values):
        return sparse_decode(codes._replace(values=values), W)

    poisoned = tangent.masked_fill(padding, torch.nan)
    for way in (by_dual_tensors, by_jvp):
        torch.testing.assert_close(way(decode, (codes.values,), (poisoned,)), decode(tangent))
        scores = way(lambda W: sparse_encode(codes, fp32.randn(6, 7), W), (W,), (torch.full_like(W, torch.nan),))
        assert torch.equal(scores.isnan(), ~padding)


@pytest.mark.parametrize("gradient", [sparse_value_grad, sparse_weight_grad], ids=lambda op: op.__name__)
def test_public_gradients_are_refused(fp32, gradient):
    codes, (x, W, _, _) = random_codes((5,), 3, 9, device=fp32.device), arguments(fp32)

    def call(x):
        return gradient(x, codes, W) if gradient is sparse_value_grad else gradient(codes, x, 9)

    for way in (by_dual_tensors, by_jvp):
        with pytest.raises(RuntimeError, match=f"aksae::{gradient.__name__} has no forward-mode derivative"):
            way(call, (x,), (x,))


@pytest.mark.skipif(INTERPRETED or EMULATED, reason="the layers are the ops")
def test_layers():
    torch.manual_seed(0)
    autoencoder = torch.nn.Sequential(TopKEncoder(4, 9, k=3), SparseDecoder(9, 4)).double()
    names, parameters = zip(*autoencoder.named_parameters(), strict=True)
    x = torch.randn(5, 4, dtype=torch.float64)

    def function(x, *parameters):
        return torch.func.functional_call(autoencoder, dict(zip(names, parameters, strict=True)), (x,))

    inputs = (x, *parameters)
    tangents = tuple(torch.randn_like(t) for t in inputs)
    expected = by_reverse_mode(function, inputs, tangents)
    for way in (by_dual_tensors, by_jvp):
        torch.testing.assert_close(way(function, inputs, tangents), expected)
