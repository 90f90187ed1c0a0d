"""The op contract: schemas, shapes, gradients, and the typed functions users call.

The functions check their arguments, flatten the leading dimensions to rows, and call `torch.ops.aksae.*`, which are
defined here and run on the backend that `dispatch` chooses. Gradients are registered here and nowhere else; each op
takes the name of the requested backend as its last argument, so a backward pass runs where its forward ran.

Rules common to all of them:

* Only entries `> 0` or NaN are selected, so a row may hold fewer than `k` latents. The order is total: NaN, +inf,
  larger value, smaller index. Indices ascend within a row; slots past `counts` hold value 0 and index -1 and are never
  read.
* Sums are held in fp32 (fp64 for fp64) and rounded once; a selection ranks the unrounded scores.
* Leading dimensions are kept: `x [..., D]` gives `values [..., K]`, with `K = min(k_max, F)`. Any of them may be 0.
* All floating arguments of a call share one dtype and one device. Under autocast the products
  (the encodes, `sparse_decode`, `decode_mse`, `sparse_value_grad`, `sparse_weight_grad`) cast to
  the autocast dtype first, as `torch.nn.functional.linear` does; the selections keep the dtype they are given.
* Results repeat bit by bit on one machine, and no selection depends on the number of threads.
* Gradients are first-order: a double backward raises. Forward-mode AD (`torch.func.jvp`, dual tensors) gives the
  tangents of values, scores, decodes and losses, at the latents that were selected; through a backward it raises.
* No call synchronises an accelerator with the host, and every shape follows from the arguments' shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch._library.autograd import Info, make_autograd_impl
from torch.autograd import forward_ad

from . import dispatch
from ._arguments import (
    as_rows,
    autocast,
    autocasting,
    code_width,
    flat_codes,
    require_alike,
    require_codes,
    require_decoder,
    require_encoder,
    require_float,
    require_shape,
    rows_of_k,
    rows_of_price,
    split_lead,
    threshold_of,
    wrong,
)
from .codes import SparseCodes, acc_dtype, as_d_sae, as_int, gather_at, live_slots

_library = torch.library.Library("aksae", "DEF")

_CODES = "Tensor values, Tensor indices, Tensor counts"
_SELECTED = "(Tensor values, Tensor indices, Tensor counts)"


def _define(name: str, arguments: str, returns: str, kernel: str | None = None) -> None:
    """An op that runs the backend function `kernel` (None: the one of its own name)."""
    _library.define(f"{name}({arguments}, str backend) -> {returns}", tags=(torch.Tag.pt2_compliant_tag,))

    def run(*args):
        *args, backend = args
        function = dispatch.kernel(kernel or name, backend, args[0])
        if not autocasting(args[0].device):
            result = function(*args)
        else:
            # What is to be cast has been: inside a backend, products keep the precision they are written in.
            with torch.autocast(args[0].device.type, enabled=False):
                result = function(*args)
        # SparseCodes to the plain tuple that the schema wants.
        return tuple(result) if isinstance(result, tuple) else result

    _library.impl(name, run, "CompositeExplicitAutograd")


_define("topk_select", "Tensor pre_acts, Tensor k, SymInt k_max", _SELECTED)
_define("topk_encode", "Tensor x, Tensor W_enc, Tensor? b_enc, Tensor k, SymInt k_max", _SELECTED)
_define("batch_topk_encode", "Tensor x, Tensor W_enc, Tensor? b_enc, SymInt budget, SymInt k_max", _SELECTED)
_define("threshold_encode", "Tensor x, Tensor W_enc, Tensor? b_enc, Tensor threshold, SymInt k_max", _SELECTED)
_define("batch_topk_select", "Tensor pre_acts, SymInt budget, SymInt k_max", _SELECTED)
_define("threshold_select", "Tensor pre_acts, Tensor threshold, SymInt k_max", _SELECTED)
_define("sparse_decode", f"{_CODES}, Tensor W_dec, Tensor? b_dec", "Tensor")
_define(
    "decode_mse",
    f"{_CODES}, Tensor W_dec, Tensor? b_dec, Tensor target, bool residual, bool value_grad",
    "(Tensor loss, Tensor residual, Tensor value_grad)",
)
# The same product as the gradient of an encode's input: without a derivative of its own.
_define("sparse_input_grad", f"{_CODES}, Tensor W_enc, Tensor? b", "Tensor", kernel="sparse_decode")
_define("sparse_value_grad", "Tensor grad, Tensor indices, Tensor counts, Tensor W", "Tensor")
# The same product as an encoder at given latents: with the derivative that a gradient must not have.
_define("sparse_encode", "Tensor x, Tensor indices, Tensor counts, Tensor W_enc, Tensor? b_enc", "Tensor")
_define("sparse_weight_grad", f"{_CODES}, Tensor dense, SymInt d_sae, bool sums", "(Tensor grad, Tensor sums)")
_define("scatter_codes", f"{_CODES}, SymInt d_sae", "Tensor")
# A selection of slots of the candidates; the latents that are there come last.
_define(
    "price_select",
    f"{_CODES}, Tensor W_dec, Tensor? b_dec, Tensor x, Tensor price, int passes",
    "(Tensor values, Tensor slots, Tensor counts, Tensor indices)",
)
_define(
    "adam_step_",
    "Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor grad_scale, int step, float lr, "
    "float beta1, float beta2, float eps, bool unit_norm_rows, bool lazy",
    "()",
)

# ------------------------------------------------------------------------------------------------ shapes


def _fake_selected(data: Tensor, k_max: int) -> tuple[Tensor, Tensor, Tensor]:
    n_rows = data.shape[0]
    return (
        data.new_empty(n_rows, k_max),
        data.new_empty(n_rows, k_max, dtype=torch.int32),
        data.new_empty(n_rows, dtype=torch.int32),
    )


def _fake(name: str) -> Callable:
    return torch.library.register_fake(f"aksae::{name}", lib=_library)


@_fake("topk_select")
def _(pre_acts, k, k_max, backend):
    return _fake_selected(pre_acts, k_max)


@_fake("topk_encode")
@_fake("batch_topk_encode")
@_fake("threshold_encode")
def _(x, W_enc, b_enc, chosen_by, k_max, backend):
    return _fake_selected(x, k_max)


@_fake("batch_topk_select")
def _(pre_acts, budget, k_max, backend):
    return _fake_selected(pre_acts, k_max)


@_fake("threshold_select")
def _(pre_acts, threshold, k_max, backend):
    return _fake_selected(pre_acts, k_max)


@_fake("sparse_input_grad")
@_fake("sparse_decode")
def _(values, indices, counts, W_dec, b_dec, backend):
    return values.new_empty(values.shape[0], W_dec.shape[1])


@_fake("decode_mse")
def _(values, indices, counts, W_dec, b_dec, target, residual, value_grad, backend):
    acc = acc_dtype(values.dtype)
    return (
        values.new_empty(values.shape[0], dtype=acc),
        values.new_empty(target.shape if residual else (0, 0), dtype=acc),
        values.new_empty(values.shape if value_grad else (0, 0), dtype=acc),
    )


@_fake("sparse_value_grad")
def _(grad, indices, counts, W, backend):
    return grad.new_empty(indices.shape)


@_fake("sparse_encode")
def _(x, indices, counts, W_enc, b_enc, backend):
    return x.new_empty(indices.shape)


@_fake("sparse_weight_grad")
def _(values, indices, counts, dense, d_sae, sums, backend):
    return values.new_empty(d_sae, dense.shape[1]), values.new_empty(d_sae if sums else 0)


@_fake("scatter_codes")
def _(values, indices, counts, d_sae, backend):
    return values.new_empty(values.shape[0], d_sae)


@_fake("price_select")
def _(values, indices, counts, W_dec, b_dec, x, price, passes, backend):
    return (*_fake_selected(values, values.shape[1]), torch.empty_like(indices, memory_format=torch.contiguous_format))


@_fake("adam_step_")
def _(param, grad, exp_avg, exp_avg_sq, grad_scale, step, lr, beta1, beta2, eps, unit_norm_rows, lazy, backend):
    return None


# --------------------------------------------------------------------------------------------- gradients
# A backward is made of the ops below, whose own derivatives raise: no second derivative is silently wrong. A tangent is
# made of differentiable ops, the same products once more at the places that were selected.


def _gradient(name: str, setup_context: Callable, backward: Callable, forward_mode: Callable) -> None:
    """Register the derivatives of an op: those for autograd, as `torch.library.register_autograd` takes them, and
    `forward_mode(primal, primals, tangents)`, which returns the outputs with their tangents.

    `primal()` runs the op, `primals` are its arguments, and `tangents` has None for each that is without one.
    """
    op = getattr(torch.ops.aksae, name).default
    # What `register_autograd` would register; torch has no counterpart of it for forward mode.
    reverse_mode = make_autograd_impl(op, Info(backward, setup_context))

    def run(keyset, *args):
        # Outside of a dual level no tensor has a tangent. Of levels in a compiled function Python does not hear; such a
        # function is traced under a dispatch mode.
        if forward_ad._current_level >= 0 or torch._C._len_torch_dispatch_stack():
            primals, tangents = zip(*map(_unpacked, args))
            if any(tangent is not None for tangent in tangents):
                return forward_mode(lambda: primal(keyset, args, primals), primals, tangents)
        return reverse_mode(keyset, *args)

    def primal(keyset, args, primals):
        if not (torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)):
            return op(*primals)
        # Tensors are saved with their tangents, so that a backward that needs those meets an op that refuses them.
        with forward_ad._set_fwd_grad_enabled(False):
            return reverse_mode(keyset, *args)

    _library.impl(name, run, "Autograd", with_keyset=True)


def _unpacked(arg: object) -> tuple[object, Tensor | None]:
    return torch._VF._unpack_dual(arg, level=0) if isinstance(arg, Tensor) else (arg, None)


def _dual(primal: Tensor, *parts: Tensor | None) -> Tensor:
    """`primal` with the sum of the parts for its tangent."""
    given = [part for part in parts if part is not None]
    return torch._VF._make_dual(primal, sum(given[1:], given[0]), level=0) if given else primal


def _at(dense: Tensor | None, indices: Tensor, counts: Tensor) -> Tensor | None:
    """`gather_at` of a `dense` that may be missing."""
    return None if dense is None else gather_at(dense, indices, counts)


def _selection_setup(ctx, inputs, output):
    dense, *_, ctx.backend = inputs
    ctx.width, ctx.n_other_inputs = dense.shape[1], len(inputs) - 1
    ctx.save_for_backward(*output[1:3])


def _selection_backward(ctx, grad_values, *_):
    indices, counts = ctx.saved_tensors
    grad = torch.ops.aksae.scatter_codes(grad_values, indices, counts, ctx.width, ctx.backend)
    return grad, *[None] * ctx.n_other_inputs


def _selection_forward_mode(primal, primals, tangents):
    values, indices, counts, *latents = primal()
    return _dual(values, _at(tangents[0], indices, counts)), indices, counts, *latents


# The candidates of price_select are a dense row to it, of which it selects slots.
for _name in ("topk_select", "batch_topk_select", "threshold_select", "price_select"):
    _gradient(_name, _selection_setup, _selection_backward, _selection_forward_mode)


def _encode_setup(ctx, inputs, output):
    x, W_enc, _, _, _, ctx.backend = inputs
    wants_x, wants_W, wants_b = ctx.needs_input_grad[:3]
    ctx.d_sae = W_enc.shape[0]
    ctx.save_for_backward(*output[1:], x if wants_W or wants_b else None, W_enc if wants_x else None)


def _encode_backward(ctx, grad_values, *_):
    grad_x, grad_W, grad_b = _encoder_gradients(ctx, grad_values, *ctx.needs_input_grad[:3])
    return grad_x, grad_W, grad_b, None, None, None


def _encoder_gradients(ctx, grad_values, wants_x, wants_W, wants_b):
    indices, counts, x, W_enc = ctx.saved_tensors
    codes = (grad_values, indices, counts)
    grad_x = torch.ops.aksae.sparse_input_grad(*codes, W_enc, None, ctx.backend) if wants_x else None
    grad_W = grad_b = None
    if wants_W or wants_b:
        # Without W_enc's gradient the sums alone are wanted: a product of width 0.
        dense = x if wants_W else x[:, :0]
        grad_W, grad_b = torch.ops.aksae.sparse_weight_grad(*codes, dense, ctx.d_sae, wants_b, ctx.backend)
    return grad_x, grad_W if wants_W else None, grad_b if wants_b else None


def _encode_forward_mode(primal, primals, tangents):
    x, W_enc, *_, backend = primals
    d_x, d_W, d_b, *_ = tangents
    values, indices, counts = primal()
    parts = _encoder_tangents(x, d_x, indices, counts, W_enc, d_W, backend)
    return _dual(values, *parts, _at(d_b, indices, counts)), indices, counts


def _encoder_tangents(x, d_x, indices, counts, W_enc, d_W, backend):
    encode = torch.ops.aksae.sparse_encode
    yield None if d_x is None else encode(d_x, indices, counts, W_enc, None, backend)
    yield None if d_W is None else encode(x, indices, counts, d_W, None, backend)


for _name in ("topk_encode", "batch_topk_encode", "threshold_encode"):
    _gradient(_name, _encode_setup, _encode_backward, _encode_forward_mode)


def _sparse_encode_setup(ctx, inputs, output):
    x, indices, counts, W_enc, _, ctx.backend = inputs
    wants_x, _, _, wants_W, wants_b = ctx.needs_input_grad[:5]
    ctx.d_sae = W_enc.shape[0]
    ctx.save_for_backward(indices, counts, x if wants_W or wants_b else None, W_enc if wants_x else None)


def _sparse_encode_backward(ctx, grad_values):
    wants_x, _, _, wants_W, wants_b = ctx.needs_input_grad[:5]
    grad_x, grad_W, grad_b = _encoder_gradients(ctx, grad_values, wants_x, wants_W, wants_b)
    return grad_x, None, None, grad_W, grad_b, None


def _sparse_encode_forward_mode(primal, primals, tangents):
    x, indices, counts, W_enc, _, backend = primals
    d_x, _, _, d_W, d_b, _ = tangents
    parts = _encoder_tangents(x, d_x, indices, counts, W_enc, d_W, backend)
    return _dual(primal(), *parts, _at(d_b, indices, counts))


_gradient("sparse_encode", _sparse_encode_setup, _sparse_encode_backward, _sparse_encode_forward_mode)


def _decode_setup(ctx, inputs, output):
    values, indices, counts, W_dec, _, ctx.backend = inputs
    wants_values, _, _, wants_W, _ = ctx.needs_input_grad[:5]
    ctx.d_sae = W_dec.shape[0]
    ctx.save_for_backward(indices, counts, values if wants_W else None, W_dec if wants_values else None)


def _decode_backward(ctx, grad):
    indices, counts, values, W_dec = ctx.saved_tensors
    wants_values, _, _, wants_W, wants_b = ctx.needs_input_grad[:5]
    grad_values = grad_W = None
    if wants_values:
        grad_values = torch.ops.aksae.sparse_value_grad(grad, indices, counts, W_dec, ctx.backend)
    if wants_W:
        grad_W, _ = torch.ops.aksae.sparse_weight_grad(values, indices, counts, grad, ctx.d_sae, False, ctx.backend)
    return grad_values, None, None, grad_W, grad.sum(0) if wants_b else None, None


def _decode_forward_mode(primal, primals, tangents):
    values, indices, counts, W_dec, _, backend = primals
    d_values, _, _, d_W, d_b, _ = tangents
    decode, y = torch.ops.aksae.sparse_decode, primal()
    return _dual(
        y,
        None if d_values is None else decode(d_values, indices, counts, W_dec, None, backend),
        None if d_W is None else decode(values, indices, counts, d_W, None, backend),
        None if d_b is None else d_b.expand_as(y),
    )


_gradient("sparse_decode", _decode_setup, _decode_backward, _decode_forward_mode)


def _decode_mse_setup(ctx, inputs, output):
    values, indices, counts, W_dec, b_dec, target, has_residual, has_value_grad, ctx.backend = inputs
    wants_values, _, _, *others = ctx.needs_input_grad[:6]
    for name, given, wanted in (("residual", has_residual, any(others)), ("value_grad", has_value_grad, wants_values)):
        if wanted and not given:
            raise ValueError(f"aksae::decode_mse: {name} must be True for the gradients that are asked for, got False")
    _, residual, value_grad = output
    # They are there for the backward alone: to autograd they are constants.
    ctx.mark_non_differentiable(residual, value_grad)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(values, indices, counts, W_dec, b_dec, target, residual, value_grad)


def _decode_mse_backward(ctx, grad_loss, *_):
    if grad_loss is None:
        return (None,) * 9
    *inputs, residual, value_grad = ctx.saved_tensors
    values, indices, counts, W_dec, _, _ = inputs
    wants_values, _, _, wants_W, wants_b, wants_target = ctx.needs_input_grad[:6]
    # d loss[b] = 2 <residual[b], d y[b]>; the forward left residual and <residual[b], W_dec[indices[b, j]]>.
    scale = 2 * grad_loss.unsqueeze(-1)
    is_differentiated = torch.is_grad_enabled()
    if is_differentiated:
        # A second derivative has to find the inputs, and on its way the ops that refuse it.
        residual = _residual(*inputs, ctx.backend)
    grad_values = grad_W = grad_b = grad_target = None
    if wants_values and not is_differentiated:
        # Blanked last: a NaN in grad_loss must not reach the padding.
        live = live_slots(SparseCodes(value_grad, indices, counts))
        grad_values = torch.where(live, scale * value_grad, 0).to(values.dtype)
    if wants_W or wants_b or wants_target or is_differentiated:
        grad_y = scale * residual
        rounded = grad_y.to(values.dtype)
        if wants_values and is_differentiated:
            grad_values = torch.ops.aksae.sparse_value_grad(rounded, indices, counts, W_dec, ctx.backend)
        if wants_W:
            grad_W, _ = torch.ops.aksae.sparse_weight_grad(
                values, indices, counts, rounded, W_dec.shape[0], False, ctx.backend
            )
        grad_b = grad_y.sum(0).to(values.dtype) if wants_b else None
        grad_target = -rounded if wants_target else None
    return grad_values, None, None, grad_W, grad_b, grad_target, None, None, None


def _residual(values, indices, counts, W_dec, b_dec, target, backend):
    """What `decode_mse` squares, differentiable in either mode, in the accumulation dtype."""
    acc = acc_dtype(values.dtype)
    b_dec = None if b_dec is None else b_dec.to(acc)
    return torch.ops.aksae.sparse_decode(values.to(acc), indices, counts, W_dec.to(acc), b_dec, backend) - target


def _decode_mse_forward_mode(primal, primals, tangents):
    # All from ops with derivatives in either mode: `primal` gives helper outputs without any.
    *inputs, has_residual, has_value_grad, backend = map(_dual, primals, tangents)
    _, indices, counts, W_dec, _, _ = inputs
    residual = _residual(*inputs, backend)
    nothing = residual.new_empty(0, 0)
    value_grad = nothing
    if has_value_grad:
        value_grad = torch.ops.aksae.sparse_encode(residual, indices, counts, W_dec.to(residual.dtype), None, backend)
    return residual.square().sum(-1), residual if has_residual else nothing, value_grad


_gradient("decode_mse", _decode_mse_setup, _decode_mse_backward, _decode_mse_forward_mode)


def _without_derivative(name: str) -> None:
    """Of what only a backward or an optimizer calls: a derivative of either mode raises."""

    def backward(*_):
        raise RuntimeError(
            f"aksae::{name} cannot be differentiated: aksae ops have no second derivative, so their backward has none"
        )

    def forward_mode(*_):
        raise RuntimeError(
            f"aksae::{name} has no forward-mode derivative, and got a tensor with a tangent: detach it, or use the ops "
            "that have one, the selections, encodes and decodes"
        )

    _gradient(name, lambda ctx, inputs, output: None, backward, forward_mode)


for _name in ("sparse_input_grad", "sparse_value_grad", "sparse_weight_grad", "scatter_codes", "adam_step_"):
    _without_derivative(_name)

# ------------------------------------------------------------------------------------- public functions


def topk_select(pre_acts: Tensor, k: int | Tensor, k_max: int | None = None) -> SparseCodes:
    """Keep the `k[b]` largest positive entries of row b (ReLU, then TopK with a k of its own for every row).

    Args:
        pre_acts: `[..., F]`, any floating dtype and strides.
        k: int, or integer tensor `[...]` on the data's device; taken as `clamp(k, 0, min(k_max, F))`.
        k_max: the width of the result is `min(k_max, F)`. None means the largest `k`, which is allowed for an int and
            for a CPU tensor; on an accelerator, and while tracing, reading the maximum is not free: ValueError.

    Returns:
        Codes with `counts = min(k, number of positive or NaN entries)`. The gradient of `values` reaches `pre_acts`.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device, or a negative `k_max`.
    """
    require_float("pre_acts", pre_acts)
    lead, n_latents = split_lead("pre_acts", pre_acts)
    k, width = rows_of_k(k, k_max, lead, n_latents, pre_acts.device)
    out = torch.ops.aksae.topk_select(as_rows(pre_acts), k, width, dispatch.requested())
    return _codes(out, lead)


def topk_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None = None, *, k: int | Tensor, k_max: int | None = None
) -> SparseCodes:
    """`topk_select(x @ W_enc.T + b_enc, k, k_max)` without having to keep the `[..., F]` pre-activations.

    Scores are fp32-accurate for fp32 inputs (fp64 for fp64), whatever torch's matmul precision is set to, and are
    ranked before they are rounded to the dtype of `x`.

    On CPUs with bf16 units (AMX, AVX-512 BF16) and on GPUs an fp32 encode looks for candidates in bf16. With `~` for
    operands rounded to bf16, p for their product and b for the bias, every fp32 score r satisfies `|p + b - r| <= e`,

        e = (|x - x~| + (D + 32) 2^-22 |x|) |w| + |x~| |w - w~| + 2^-20 |b| + (D + 32) 2^-120,

    by Cauchy-Schwarz for the rounding of the operands, and by the usual bound for sums of D + 32 terms, units (which
    may truncate) and fp32 together. With L the k-th largest `p + b - e` of a row, a latent with `p + b + e < L` is not
    among its k best; all others are multiplied again in fp32 and ranked by that. A row of which the bound says nothing
    (entries that are not finite or near overflow, more candidates than a quarter of the latents on CPUs, than some 4 k
    on GPUs) is multiplied in fp32 throughout. On CPUs its scores have the same bits either way; on GPUs the order of
    their sums differs, within the error above. 16-bit inputs are multiplied on those units directly; on CPUs products
    below 2^-126 count as 0 there, as they do in torch's own bf16 products. `frozen` saves rounding W_enc in every call.

    Beside arguments and result it takes memory for a part of the scores: on `triton` one slab, 128 MB or what
    AKSAE_SLAB_MB says; on `cuda` 512 MB or the scores of 1024 rows, and for fp32 bf16 copies of x and W_enc.

    Args:
        x: `[..., D]`.
        W_enc: `[F, D]`, one row per latent.
        b_enc: `[F]` or None.
        k, k_max: as in `topk_select`.

    Returns:
        Codes; the gradient of `values` reaches `x`, `W_enc` and `b_enc`.

    Raises:
        TypeError, ValueError: as `topk_select`, and for shapes that do not fit.
    """
    x, W_enc, b_enc = autocast(x, W_enc, b_enc)
    lead = require_encoder(x, W_enc, b_enc)
    k, width = rows_of_k(k, k_max, lead, W_enc.shape[0], x.device)
    out = torch.ops.aksae.topk_encode(as_rows(x), W_enc, b_enc, k, width, dispatch.requested())
    return _codes(out, lead)


def batch_topk_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor | None = None, *, budget: int, k_max: int) -> SparseCodes:
    """BatchTopK (arXiv 2412.06410) of `x @ W_enc.T + b_enc` without having to keep the `[..., F]` pre-activations.

    Each row first keeps its `k_max` best positive scores; of what all rows have kept, the `budget` best are selected.
    Ties go to the smaller row, then to the smaller latent. So a row never has more than `k_max` latents, and nothing
    raises: where the cap bit, `counts` of the row is `k_max`. With `k_max = F` it is `batch_topk_select`.

    Scores are ranked and rounded as in `topk_encode`.

    Args:
        x: `[..., D]`; all leading dimensions together are the batch.
        W_enc, b_enc: as in `topk_encode`.
        budget: entries to keep in all; 0 or less keeps none.
        k_max: the most latents of a row, and the width of the result, `min(k_max, F)`.

    Returns:
        Codes; the gradient of `values` reaches `x`, `W_enc` and `b_enc`.

    Raises:
        TypeError, ValueError: as `topk_encode`.
    """
    x, W_enc, b_enc = autocast(x, W_enc, b_enc)
    lead = require_encoder(x, W_enc, b_enc)
    width = code_width(as_int("k_max", k_max), W_enc.shape[0])
    rows = as_rows(x)
    # Clamped, so that any int fits the 64-bit argument.
    budget = min(max(0, as_int("budget", budget)), rows.shape[0] * width)
    out = torch.ops.aksae.batch_topk_encode(rows, W_enc, b_enc, budget, width, dispatch.requested())
    return _codes(out, lead)


def threshold_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None = None, *, threshold: float | Tensor, k_max: int
) -> SparseCodes:
    """The scores `x @ W_enc.T + b_enc` that are above their threshold and `> 0` (JumpReLU, BatchTopK inference),
    without having to keep the `[..., F]` pre-activations.

    Each row first keeps its `k_max` best positive scores; of these, those strictly above their threshold are selected,
    unshifted. So a row never has more than `k_max` latents, and nothing raises; where `counts` of a row is `k_max`, the
    cap may have bitten. With `k_max = F` it is `threshold_select`. NaN scores are kept, whatever the threshold; a NaN
    threshold keeps nothing else.

    Scores are ranked and rounded as in `topk_encode`, and compared unrounded.

    Args:
        x: `[..., D]`.
        W_enc, b_enc: as in `topk_encode`.
        threshold: a number, or a tensor `[]` or `[F]`, as in `threshold_select`. No gradient reaches it:
            `aksae.selections.jumprelu` has the estimator.
        k_max: the most latents of a row, and the width of the result, `min(k_max, F)`.

    Returns:
        Codes; the gradient of `values` reaches `x`, `W_enc` and `b_enc`.

    Raises:
        TypeError, ValueError: as `topk_encode` and `threshold_select`.
    """
    x, W_enc, b_enc = autocast(x, W_enc, b_enc)
    lead = require_encoder(x, W_enc, b_enc)
    threshold = threshold_of(threshold, "F, the rows of W_enc", W_enc.shape[0], x=x)
    width = code_width(as_int("k_max", k_max), W_enc.shape[0])
    out = torch.ops.aksae.threshold_encode(as_rows(x), W_enc, b_enc, threshold, width, dispatch.requested())
    return _codes(out, lead)


def encode_at(codes: SparseCodes, x: Tensor, W_enc: Tensor, b_enc: Tensor | None = None) -> SparseCodes:
    """The latents of `codes` with `<x[b], W_enc[indices[b, j]]> + b_enc[indices[b, j]]` for values.

    What an encoder says of latents that were chosen otherwise: by scaled scores, by another SAE, at an earlier step.
    Values may be negative, and are 0 past the counts. Cost and gradients follow `sum(counts)`.

    Args:
        codes: only `indices` and `counts` are read, and returned as they are.
        x: `[..., D]`, any strides.
        W_enc: `[F, D]`, one row per latent.
        b_enc: `[F]` or None.

    Returns:
        Codes; the gradient of `values` reaches `x`, `W_enc` and `b_enc`.

    Raises:
        As `sparse_decode`.
    """
    values = _scores_at(codes, x, W_enc, b_enc)
    return codes._replace(values=values)


def sparse_encode(codes: SparseCodes, x: Tensor, W_enc: Tensor) -> Tensor:
    """`out[b, j] = <x[b], W_enc[indices[b, j]]>` (SDDMM): the scores of given latents, without bias, `[..., K]`.

    For a selection that was made by other scores than those it is to be trained by: scaled by decoder norms, the best
    of a batch, near a threshold. Cost and gradients follow `sum(counts)`, as those of `topk_encode` do.

    Args:
        codes: only `indices` and `counts` are read.
        x: `[..., D]`, any strides.
        W_enc: `[F, D]`, one row per latent.

    Returns:
        `[..., K]`, 0 in the slots past `counts`, whatever the sign elsewhere. Gradients reach `x` and `W_enc`.

    Raises:
        As `sparse_decode`.
    """
    return _scores_at(codes, x, W_enc, None)


def batch_topk_select(pre_acts: Tensor, budget: int, k_max: int | None = None) -> SparseCodes:
    """Keep the `budget` largest positive entries of the whole batch (BatchTopK, arXiv 2412.06410).

    Ties go to the smaller row, then to the smaller latent.

    Args:
        pre_acts: `[..., F]`; all leading dimensions together are the batch.
        budget: entries to keep in all; 0 or less keeps none.
        k_max: width of the result; None means F, since one row may take the whole budget.

    Raises:
        ValueError: a row wins more than `k_max` entries (on an accelerator: an asynchronous device assertion).
        TypeError, ValueError: an argument of the wrong kind.
    """
    require_float("pre_acts", pre_acts)
    lead, n_latents = split_lead("pre_acts", pre_acts)
    budget = max(0, as_int("budget", budget))
    width = code_width(k_max, n_latents)
    rows = as_rows(pre_acts)
    # Clamped, so that any int fits the 64-bit argument.
    budget = min(budget, rows.shape[0] * n_latents)
    out = torch.ops.aksae.batch_topk_select(rows, budget, width, dispatch.requested())
    return _codes(out, lead)


def threshold_select(pre_acts: Tensor, threshold: float | Tensor, k_max: int | None = None) -> SparseCodes:
    """Keep every entry that is strictly above its threshold and `> 0`, unshifted (JumpReLU, BatchTopK inference).

    NaN entries are kept, whatever the threshold; a NaN threshold keeps nothing else.

    Args:
        pre_acts: `[..., F]`.
        threshold: a number, compared without rounding it to the data's dtype, or a tensor `[]` or `[F]` of the data's
            dtype (under autocast: of any floating dtype). No gradient reaches it.
        k_max: width of the result; None means F.

    Raises:
        ValueError: a row has more than `k_max` such entries (on an accelerator: an asynchronous device assertion).
        TypeError, ValueError: an argument of the wrong kind, shape, dtype or device.
    """
    require_float("pre_acts", pre_acts)
    lead, n_latents = split_lead("pre_acts", pre_acts)
    threshold = threshold_of(threshold, "F, the last dimension of pre_acts", n_latents, pre_acts=pre_acts)
    width = code_width(k_max, n_latents)
    out = torch.ops.aksae.threshold_select(as_rows(pre_acts), threshold, width, dispatch.requested())
    return _codes(out, lead)


def price_select(
    codes: SparseCodes,
    W_dec: Tensor,
    b_dec: Tensor | None,
    x: Tensor,
    *,
    price: float | Tensor,
    passes: int = 1,
) -> SparseCodes:
    """Of candidates, those that lower a row's squared error by more than `price`, given the others that were kept.

    Candidates are visited by value, larger first, ties by smaller index. With v and w the value of one and its row of
    `W_dec`, and a residual r that starts as `x - b_dec`:

        a candidate that is out joins where  2 v <r, w> - v^2 <w, w> > price;  then  r -= v w;
        one that is in leaves where          2 v <r, w> + v^2 <w, w> < price;  then  r += v w.

    This is coordinate descent on `|r|^2 + price * counts`, which never rises; one more pass over all candidates can
    only lower it, and one that changes nothing is the last. A row's k comes out by itself, whatever the others do.

    Sums are held in fp32 (fp64 for fp64). Backends may differ where a gain is within rounding of the price, and after
    it. NaN joins, and does not leave: a NaN candidate is kept, whatever the price, and so is every candidate visited
    after the residual has become NaN; all of a row with NaN in `x`.

    Args:
        codes: the candidates, `[..., K]`, of either sign, in any order; a repeated index is as many candidates.
        W_dec, b_dec: `[F, D]`, rows of any norm, and `[D]` or None, as in `sparse_decode`.
        x: `[..., D]`, what is reconstructed: an SAE's input, a transcoder's target.
        price: in units of squared error; a number, or a floating tensor `[]` or `[...]` on the device of `x`, read
            there. inf keeps nothing, -inf everything.
        passes: 1 or more.

    Returns:
        Codes of the width K: those that were kept, their values as they came, indices ascending. The gradient of
        `values` reaches those of the candidates; none flows to `x`, `W_dec`, `b_dec` or `price`.

    Raises:
        ValueError: a NaN price (on an accelerator, and while tracing: everything is kept), or fewer passes than 1.
        IndexError, TypeError, ValueError: as `sparse_decode`.
    """
    require_codes(codes)
    values, W_dec, b_dec, x = autocast(codes.values, W_dec, b_dec, x)
    lead, flat = flat_codes(codes, values)
    require_decoder(W_dec, b_dec)
    require_shape("x", x, (*lead, W_dec.shape[1]), "[..., D], with the leading shape of codes")
    require_alike(values=values, W_dec=W_dec, b_dec=b_dec, x=x)
    prices = rows_of_price(price, lead, values)
    passes = as_int("passes", passes)
    if passes < 1:
        raise ValueError(f"passes must be at least 1, got {passes}")
    constants = (None if t is None else t.detach() for t in (W_dec, b_dec, as_rows(x)))
    chosen, _, counts, indices = torch.ops.aksae.price_select(*flat, *constants, prices, passes, dispatch.requested())
    return _codes((chosen, indices, counts), lead)


def sparse_decode(codes: SparseCodes, W_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """`y[b] = sum_j values[b, j] * W_dec[indices[b, j]] + b_dec` (SpMM), `[..., D]`.

    Args:
        codes: values `[..., K]`; may be unsorted and may repeat an index.
        W_dec: `[F, D]`, one row per latent.
        b_dec: `[D]` or None.

    Raises:
        IndexError: an index outside `[0, F)` on CPU (undefined on an accelerator).
        TypeError, ValueError: shapes, dtypes or devices that do not fit.
    """
    require_codes(codes)
    values, W_dec, b_dec = autocast(codes.values, W_dec, b_dec)
    lead, flat = flat_codes(codes, values)
    require_decoder(W_dec, b_dec)
    require_alike(values=values, W_dec=W_dec, b_dec=b_dec)
    y = torch.ops.aksae.sparse_decode(*flat, W_dec, b_dec, dispatch.requested())
    # A view of the result would differ from it in nothing, but in what may be done with it in place.
    return y if len(lead) == 1 else y.view(*lead, W_dec.shape[1])


def decode_mse(codes: SparseCodes, W_dec: Tensor, b_dec: Tensor | None, target: Tensor) -> Tensor:
    """Squared error of the decode, summed over D:
    `loss[b] = |sum_j values[b, j] * W_dec[indices[b, j]] + b_dec - target[b]|^2`.

    One fused pass decodes, forms the residual and the gradient of `values` from the same gathered rows of `W_dec`, and
    leaves to the backward only what cannot be had before the loss is scaled.

    Args:
        codes, W_dec, b_dec: as in `sparse_decode`.
        target: `[..., D]`.

    Returns:
        `[...]`, fp32 for 16-bit inputs, else the inputs' dtype. Gradients reach `values`, `W_dec`, `b_dec`, `target`.

    Raises:
        As `sparse_decode`.
    """
    require_codes(codes)
    values, W_dec, b_dec, target = autocast(codes.values, W_dec, b_dec, target)
    lead, flat = flat_codes(codes, values)
    require_decoder(W_dec, b_dec)
    require_shape("target", target, (*lead, W_dec.shape[1]), "[..., D], with the leading shape of codes")
    require_alike(values=values, W_dec=W_dec, b_dec=b_dec, target=target)
    grads = torch.is_grad_enabled()
    wants_residual = grads and any(t is not None and t.requires_grad for t in (W_dec, b_dec, target))
    loss, _, _ = torch.ops.aksae.decode_mse(
        *flat, W_dec, b_dec, as_rows(target), wants_residual, grads and values.requires_grad, dispatch.requested()
    )
    return loss.view(lead)


def sparse_value_grad(grad: Tensor, codes: SparseCodes, W: Tensor) -> Tensor:
    """`out[b, j] = <grad[b], W[indices[b, j]]>` (SDDMM): the gradient of `sparse_decode` with respect to `values`.

    Args:
        grad: `[..., D]`, any strides.
        codes: only `indices` and `counts` are read.
        W: `[F, D]`.

    Returns:
        `[..., K]`, 0 in the slots past `counts`. It cannot be differentiated: its backward raises RuntimeError.

    Raises:
        As `sparse_decode`.
    """
    grad, W = autocast(grad, W)
    lead, (_, indices, counts) = _places(codes, grad=grad, W=W)
    out = torch.ops.aksae.sparse_value_grad(as_rows(grad), indices, counts, W, dispatch.requested())
    return out.view(*lead, indices.shape[1])


def sparse_weight_grad(codes: SparseCodes, dense: Tensor, d_sae: int) -> Tensor:
    """`dW[f] = sum of values[b, j] * dense[b] over the hits indices[b, j] = f` (transposed SpMM), `[F, D]`.

    With the codes of a decode and the gradient of its output it is the gradient of `W_dec`; with the gradient of an
    encode's values and its input `x`, that of `W_enc`. Rows add up in ascending order: no atomics, the same bits.

    Args:
        codes: values `[..., K]`.
        dense: `[..., D]`, any strides.
        d_sae: F.

    Raises:
        As `sparse_decode`. It cannot be differentiated: its backward raises RuntimeError.
    """
    require_codes(codes)
    values, dense = autocast(codes.values, dense)
    lead, flat = flat_codes(codes, values)
    if not isinstance(dense, Tensor) or dense.ndim == 0:
        raise wrong("dense", dense, "a tensor [..., D]")
    require_shape("dense", dense, (*lead, dense.shape[-1]), "[..., D], with the leading shape of codes")
    require_alike(values=values, dense=dense)
    d_sae = as_d_sae(d_sae)
    return torch.ops.aksae.sparse_weight_grad(*flat, as_rows(dense), d_sae, False, dispatch.requested())[0]


def adam_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    grad_scale: Tensor | None,
    unit_norm_rows: bool,
    lazy: bool,
) -> None:
    """One in-place Adam step of `optim.SAEAdam`, which says what it computes.

    Args:
        param: any floating dtype; a matrix `[F, D]` with `unit_norm_rows`, else any shape.
        grad: the same shape and dtype.
        exp_avg, exp_avg_sq: the moments, in the accumulation dtype.
        step: 1 for the first step.
        grad_scale: 0-dim tensor the gradient is multiplied with; None for 1.
        lazy: leave rows of a matrix whose gradient is 0 throughout as they are.
    """
    if grad_scale is None:
        grad_scale = torch.ones((), dtype=exp_avg.dtype, device=param.device)
    if param.ndim == 2 and not (unit_norm_rows or lazy) and not param.is_contiguous():
        # Kept transposed: kernels see a contiguous matrix, and which dimension is which does not matter here.
        param, grad, exp_avg, exp_avg_sq = param.T, grad.T, exp_avg.T, exp_avg_sq.T
    # Kernels see a contiguous matrix; without the constraint the shape is of no account.
    shape = (math.prod(param.shape[:-1]), param.shape[-1] if param.ndim else 1)
    state = (param, exp_avg, exp_avg_sq)
    rows = [tensor.contiguous().view(shape) for tensor in state]
    torch.ops.aksae.adam_step_(
        rows[0],
        grad.contiguous().view(shape),
        *rows[1:],
        grad_scale,
        step,
        lr,
        *betas,
        eps,
        unit_norm_rows,
        lazy,
        dispatch.requested(),
    )
    for tensor, updated in zip(state, rows):
        if not tensor.is_contiguous():
            tensor.copy_(updated.view(param.shape))


def explain(op: str, *args, **kwargs) -> str:
    """Which backend would run `op` on these arguments, and what every backend says to it.

    `op` is the name of a public function of this package; the arguments are the ones it would be called with (the first
    tensor or codes among them decides). Runs nothing. Raises ValueError for an unknown op or where no tensor is given.
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in _EXPLAINED:
        raise ValueError(f"op must be one of {', '.join(_EXPLAINED)}; got {name!r}")
    for argument in (*args, *kwargs.values()):
        tensor = argument.values if isinstance(argument, SparseCodes) else argument
        if isinstance(tensor, Tensor):
            # Without its data, and of the dtype that autocast gives to the products.
            like = tensor.new_empty(0)
            return dispatch.explain_choice(name, like if name.endswith("_select") else autocast(like)[0])
    raise ValueError(f"explain needs the arguments of {name}, with at least one tensor among them")


_EXPLAINED = (
    "topk_select",
    "topk_encode",
    "batch_topk_encode",
    "threshold_encode",
    "batch_topk_select",
    "threshold_select",
    "price_select",
    "sparse_decode",
    "decode_mse",
    "encode_at",
    "sparse_encode",
    "sparse_value_grad",
    "sparse_weight_grad",
)


def _codes(out: tuple[Tensor, Tensor, Tensor], lead: tuple[int, ...]) -> SparseCodes:
    values, indices, counts = out
    width = values.shape[1]
    return SparseCodes(values.view(*lead, width), indices.view(*lead, width), counts.view(lead))


def _scores_at(codes: SparseCodes, x: Tensor, W_enc: Tensor, b_enc: Tensor | None) -> Tensor:
    x, W_enc, b_enc = autocast(x, W_enc, b_enc)
    lead, (_, indices, counts) = _places(codes, x=x, W_enc=W_enc)
    if b_enc is not None:
        require_shape("b_enc", b_enc, (W_enc.shape[0],), "[F], with F the rows of W_enc")
        require_alike(x=x, b_enc=b_enc)
    out = torch.ops.aksae.sparse_encode(as_rows(x), indices, counts, W_enc, b_enc, dispatch.requested())
    return out.view(*lead, indices.shape[1])


def _places(codes: SparseCodes, **operands: Tensor) -> tuple[tuple[int, ...], tuple[Tensor, Tensor, Tensor]]:
    """`flat_codes` of codes that are to be looked up in the product of a dense `[..., D]` and a weight `[F, D]`: the
    operands, under their names."""
    require_codes(codes)
    (dense_name, dense), (weight_name, W) = operands.items()
    lead, flat = flat_codes(codes, codes.values)
    require_decoder(W, None, weight_name)
    require_shape(dense_name, dense, (*lead, W.shape[1]), "[..., D], with the leading shape of codes")
    require_alike(**operands, indices=flat[1])
    return lead, flat
