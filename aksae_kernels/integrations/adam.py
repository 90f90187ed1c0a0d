"""`torch.optim.Adam`, as the trainers of hosts hold it, on the kernels: the same state, one pass over each weight."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..optim import adam_step

_PLAIN = {"amsgrad": False, "maximize": False, "weight_decay": 0, "capturable": False, "differentiable": False}


class FastAdam(torch.optim.Adam):
    """Adam whose step runs on the kernels for fp32 and fp64 parameters with dense gradients and no options set.

    Everything else it leaves to torch. State and `state_dict` are torch's; numbers are, to rounding.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        groups = self.param_groups
        plain = all(group.get(name, value) == value for group in groups for name, value in _PLAIN.items())
        parameters = [param for group in groups for param in group["params"] if param.grad is not None]
        if not plain or not all(_is_ours(param) for param in parameters):
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._step_param(param, group)
        return loss

    def _step_param(self, param: Tensor, group: dict) -> None:
        state = self.state[param]
        if not state:
            # As torch has them, so that either can go on with the other's state.
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        # Loaded from a file, or of a parameter that was laid out anew.
        _lay_out(state, param)
        state["step"] += 1
        adam_step(
            param,
            param.grad,
            state["exp_avg"],
            state["exp_avg_sq"],
            step=int(state["step"]),
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            grad_scale=None,
            unit_norm_rows=False,
            lazy=False,
        )


def speed_up(optimizer: torch.optim.Optimizer) -> None:
    """Turn a `torch.optim.Adam` into a FastAdam, in place; leave any other optimizer, a subclass too, as it is."""
    if type(optimizer) is torch.optim.Adam:
        optimizer.__class__ = FastAdam
        optimizer._patch_step_function()
        _settle(optimizer)


def slow_down(optimizer: torch.optim.Optimizer) -> None:
    """Undo `speed_up`."""
    if type(optimizer) is FastAdam:
        optimizer.__class__ = torch.optim.Adam
        _settle(optimizer)


def _is_ours(param: Tensor) -> bool:
    return param.dtype in (torch.float32, torch.float64) and not param.grad.is_sparse


def _settle(optimizer: torch.optim.Optimizer) -> None:
    """Lay moments out as their parameters are now, and have `step` be that of the class the optimizer has now."""
    for param, state in optimizer.state.items():
        _lay_out(state, param)
    # A scheduler of the learning rate has replaced the method, on the instance, by one that calls the function it found
    # and notes that it was called; torch warns where that replacement is gone.
    if "step" not in vars(optimizer):
        return

    def step(*args, **kwargs):
        optimizer._opt_called = True
        return type(optimizer).step(optimizer, *args, **kwargs)

    step._wrapped_by_lr_sched = True
    optimizer.step = step


def _lay_out(state: dict, param: Tensor) -> None:
    """Give moments the strides of their parameter."""
    for name, value in state.items():
        if isinstance(value, Tensor) and value.shape == param.shape and value.stride() != param.stride():
            state[name] = torch.empty_like(param, dtype=value.dtype).copy_(value)
