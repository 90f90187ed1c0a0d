"""The layout of host weights in memory, and what trainers do to decoder rows, a few rows at a time."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

_BLOCK = 2**18
"""Elements of a weight handled at once: with the temporaries they stay in cache, and calls are few."""


def as_latent_major(parameter: nn.Parameter) -> None:
    """Lay `[D, F]` out so that its `.T`, `[F, D]`, is contiguous. Shape and values stay, and so does the object.

    A parameter that somebody else holds (`is_held`) keeps its layout.
    """
    _arrange(parameter, lambda tensor: tensor.T.contiguous().T)


def as_row_major(parameter: nn.Parameter) -> None:
    """Undo `as_latent_major`."""
    _arrange(parameter, Tensor.contiguous)


def is_held(parameter: nn.Parameter) -> bool:
    """Whether somebody counts on the memory or on the strides that the parameter has now.

    * `fully_shard`, and whoever else keeps parameters in a tensor class of its own, makes the weight that a call sees
      from what it keeps.
    * FSDP, `ZeroRedundancyOptimizer(parameters_as_bucket_view=True)` and other owners of flat buffers let parameters be
      views into them: a parameter with memory of its own would no longer be the one they update.
    * DistributedDataParallel: see `is_in_buckets`.
    """
    if type(parameter.data) is not Tensor or getattr(parameter, "_fsdp_flattened", False):
        return True
    return parameter.untyped_storage().nbytes() > parameter.nbytes or is_in_buckets(parameter)


def is_in_buckets(parameter: nn.Parameter) -> bool:
    """Whether a DistributedDataParallel has the parameter.

    It lays its buckets out by the strides of the parameters it is given, reduces gradients into them, and reads them by
    the strides of later: with others it scrambles the gradients, without an error.
    """
    # It leaves no trace on its module, but cannot be made without a process group.
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    wrappers = (obj for obj in gc.get_objects() if issubclass(type(obj), DistributedDataParallel))
    return any(parameter is other for wrapper in wrappers for other in wrapper.parameters())


def lay_out_state(optimizer: Optimizer) -> None:
    """Give the moments of an optimizer the strides of their parameters."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            lay_out_moments(optimizer.state.get(param, {}), param)


def lay_out_moments(state: dict, param: Tensor) -> None:
    """Give the moments of one parameter its strides."""
    for name, value in state.items():
        if isinstance(value, Tensor) and value.shape == param.shape and value.stride() != param.stride():
            state[name] = torch.empty_like(param, dtype=value.dtype).copy_(value)


def _lay_out_fused_state(optimizer: Optimizer, *_) -> None:
    if any(group.get("fused") for group in optimizer.param_groups):
        lay_out_state(optimizer)


# torch's fused steps go through parameter, gradient and moments in the order that each has in memory. Moments may be
# older than the layout of their parameter, or come from a file, in any optimizer that holds it.
register_optimizer_step_pre_hook(_lay_out_fused_state)


def _arrange(parameter: nn.Parameter, layout: Callable[[Tensor], Tensor]) -> None:
    # Others than parameters are made at each use, by a parametrization or by FSDP.
    if not isinstance(parameter, nn.Parameter):
        return
    # In inference mode the copies would be tensors that can never be trained again.
    with torch.inference_mode(parameter.is_inference()):
        arranged = layout(parameter.data)
        if arranged.stride() != parameter.stride() and is_held(parameter):
            return
        parameter.data = _keep_shared(arranged, parameter.data)
        # One that is there already: later steps add to it in place.
        if parameter.grad is not None:
            parameter.grad = _keep_shared(layout(parameter.grad), parameter.grad)


def _keep_shared(copy: Tensor, original: Tensor) -> Tensor:
    return copy.share_memory_() if original.is_shared() else copy


def project_rows_(grad: Tensor, W: Tensor, *, norm_eps: float | None = None) -> None:
    """Take out of each row g of `grad [F, D]` its part along the row w of `W [F, D]`, in place.

    `g <- g - <g, w> w`, with `w / (|w| + norm_eps)` for w where `norm_eps` is given.
    """
    for g, w in _blocks(grad, W):
        along = torch.linalg.vecdot(g, w).unsqueeze(1)
        if norm_eps is not None:
            along /= (torch.linalg.vector_norm(w, dim=1, keepdim=True) + norm_eps).square()
        g.addcmul_(along, w, value=-1)


def normalize_rows_(W: Tensor, eps: float) -> None:
    """`w <- w / (|w| + eps)` for each row of `W [F, D]`, in place."""
    for (w,) in _blocks(W):
        w /= torch.linalg.vector_norm(w, dim=1, keepdim=True) + eps


def _blocks(*matrices: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each, some at a time; all at once on an accelerator, where a launch costs more than memory."""
    size = max(1, _BLOCK // max(1, matrices[0].shape[1])) if matrices[0].device.type == "cpu" else len(matrices[0])
    return zip(*(matrix.split(max(1, size)) for matrix in matrices))
