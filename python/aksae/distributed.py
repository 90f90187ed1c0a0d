"""Sums over the processes of a data-parallel run, by torch.distributed; one process is its own sum."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import UserError


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def own_device(device: torch.device) -> torch.device:
    """`device`; where that is CUDA without an index, and `torchrun` started this process, the GPU it has for it."""
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


def join_process_group(device: torch.device) -> None:
    """Enter the process group that `torchrun` asks for, until the process ends; one that is there already is used.

    Not until a run ends: torchrun's store remembers the addresses of the first group, and the processes of a second one
    may take those for its own.
    """
    if not dist.is_available() or dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    if device.type == "cuda":
        # Objects travel through the current device.
        torch.cuda.set_device(device)
    # The functions of this module have the group as a default argument: read later (torch.compile does), it would hold
    # the group for ever, and with it gloo's threads, which abort a process that ends while they still drop a tensor.
    from torch.distributed.nn import functional  # noqa: F401 - that it is read before there is a group is all

    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    atexit.register(_leave_process_group)


def _leave_process_group() -> None:
    # Somebody else may have done it.
    if dist.is_initialized():
        dist.destroy_process_group()


def global_sum(local: Tensor) -> Tensor:
    """The sum of every process's `local`, on every process; a gradient goes to this process's own share unchanged.

    So a loss that all processes compute from such sums is the loss of the whole batch, and the sum over the processes
    of its gradients (`sum_gradients`) is that loss's gradient.
    """
    return _GlobalSum.apply(local) if world_size() > 1 else local


def global_mean(of_rows: Tensor, n_rows: int | Tensor) -> Tensor:
    """The sum of every process's `of_rows [B, ...]` over `n_rows`, the rows of all of them (`global_rows`)."""
    return global_sum(of_rows.sum()) / n_rows


def global_rows(rows: Tensor) -> int | Tensor:
    """How many vectors `rows [..., D]` has, every process's together. Nothing waits for an accelerator."""
    own = rows.shape[:-1].numel()
    return own if world_size() == 1 else _reduced(torch.tensor(own, device=rows.device), dist.ReduceOp.SUM)


def global_max(local: Tensor) -> Tensor:
    """The largest of every process's `local`, elementwise."""
    return _reduced(local, dist.ReduceOp.MAX) if world_size() > 1 else local


def global_min(local: Tensor) -> Tensor:
    """The smallest of every process's `local`, elementwise."""
    return _reduced(local, dist.ReduceOp.MIN) if world_size() > 1 else local


def gathered(rows: Tensor) -> Tensor:
    """The rows of all processes, `[B, D]` each, one after the other. Waits for an accelerator."""
    if world_size() == 1:
        return rows
    numbers = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(world_size())]
    dist.all_gather(numbers, torch.tensor([len(rows)], device=rows.device))
    counts = [int(number) for number in numbers]
    # Processes gather what has one shape.
    padded = rows.new_zeros(max(counts), rows.shape[1])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts)])


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace every gradient by its sum over the processes; one that this process is without counts as 0."""
    if world_size() == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)


def from_rank_0(value: Any) -> Any:
    """What rank 0 has, on every process: a tensor in place, else a picklable object."""
    if world_size() == 1:
        return value
    if isinstance(value, Tensor):
        dist.broadcast(value, 0)
        return value
    values = [value]
    dist.broadcast_object_list(values, 0)
    return values[0]


def on_rank_0(work: Callable[[], None]) -> None:
    """Call `work` on rank 0, and return on every process when it is done.

    What it raises is raised on rank 0; the others raise UserError with its message, instead of waiting for ever.
    """
    failed: Exception | None = None
    if rank() == 0:
        try:
            work()
        except Exception as error:
            failed = error
    message = from_rank_0(None if failed is None else str(failed))
    if failed is not None:
        raise failed
    if message is not None:
        raise UserError(f"rank 0: {message}")


def gathered_objects(value: Any) -> list[Any] | None:
    """Every process's picklable `value`, by rank, on rank 0; None on the others."""
    if world_size() == 1:
        return [value]
    values: list[Any] | None = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, values)
    return values


def _reduced(local: Tensor, op: Any) -> Tensor:
    result = local.clone()
    dist.all_reduce(result, op)
    return result


class _GlobalSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, local):
        return _reduced(local, dist.ReduceOp.SUM)

    @staticmethod
    def backward(ctx, grad):
        return grad
