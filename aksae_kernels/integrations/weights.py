"""The layout of host weights in memory, and what trainers do to decoder rows, a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

_BLOCK = 2**18
"""Elements of a weight handled at once: with the temporaries they stay in cache, and calls are few."""


def as_latent_major(parameter: nn.Parameter) -> None:
    """Lay `[D, F]` out so that its `.T`, `[F, D]`, is contiguous. Shape and values stay, and so does the object."""
    _arrange(parameter, lambda tensor: tensor.T.contiguous().T)


def as_row_major(parameter: nn.Parameter) -> None:
    """Undo `as_latent_major`."""
    _arrange(parameter, Tensor.contiguous)


def _arrange(parameter: nn.Parameter, layout: Callable[[Tensor], Tensor]) -> None:
    # In inference mode the copies would be tensors that can never be trained again.
    with torch.inference_mode(parameter.is_inference()):
        parameter.data = _keep_shared(layout(parameter.data), parameter.data)
        # One that is there already: later steps add to it in place. Others than leaves warn when they are asked.
        if parameter.is_leaf and parameter.grad is not None:
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
