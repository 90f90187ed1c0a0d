"""`torch.optim.Adam`, as the trainers of hosts hold it, on the kernels: the same state, one pass over each weight."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..optim import PLAIN_ADAM, adam_step
from .weights import lay_out_moments, lay_out_state

_PLAIN = {**PLAIN_ADAM, "capturable": False}


class FastAdam(torch.optim.Adam):
    """Adam whose step runs on the kernels for fp32 and fp64 parameters with dense gradients and no options set.

    Everything else it leaves to torch. State and `state_dict` are torch's; numbers are, to rounding.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._is_plain():
            lay_out_state(self)
            _torch_step(self)
            return loss
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._step_param(param, group)
        return loss

    def _is_plain(self) -> bool:
        """Whether the kernels can do this step, with the gradients there are now."""
        # Of a gradient scaler: torch unscales in the step itself.
        if getattr(self, "grad_scale", None) is not None or getattr(self, "found_inf", None) is not None:
            return False
        groups = self.param_groups
        parameters = [param for group in groups for param in group["params"] if param.grad is not None]
        plain = all(group.get(name, value) == value for group in groups for name, value in _PLAIN.items())
        return plain and not _is_fused(self) and all(_is_ours(param) for param in parameters)

    def _step_param(self, param: Tensor, group: dict) -> None:
        state = self.state[param]
        if not state:
            # As torch has them, so that either can go on with the other's state.
            state["step"] = torch.tensor(0.0, device="cpu")
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        # Loaded from a file, or of a parameter that was laid out anew.
        lay_out_moments(state, param)
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


def speed_up(optimizer: Optimizer) -> None:
    """Turn a `torch.optim.Adam` that is not fused into a FastAdam, in place; leave any other optimizer as it is."""
    if type(optimizer) is torch.optim.Adam and not _is_fused(optimizer):
        optimizer.__class__ = FastAdam
        _settle(optimizer)


def slow_down(optimizer: Optimizer) -> None:
    """Undo `speed_up`, after the parameters have their layouts back."""
    if type(optimizer) is FastAdam:
        optimizer.__class__ = torch.optim.Adam
        _settle(optimizer)


def _torch_step(optimizer: FastAdam) -> None:
    """Of Adam, without the hooks that every step of an optimizer calls: the step that asks has called them."""
    step = torch.optim.Adam.step
    (step.__wrapped__ if getattr(step, "hooked", False) else step)(optimizer)


def _is_fused(optimizer: Optimizer) -> bool:
    return any(group.get("fused") for group in optimizer.param_groups)


def _is_ours(param: Tensor) -> bool:
    return param.dtype in (torch.float32, torch.float64) and not param.grad.is_sparse


def _settle(optimizer: Optimizer) -> None:
    """Lay moments out as their parameters are now, and have `step` be that of the class the optimizer has now."""
    lay_out_state(optimizer)
    # The step of a class runs hooks from its first instance on.
    optimizer._patch_step_function()
    # A scheduler of the learning rate has replaced the method, on the instance, by one that calls the function it found
    # and notes that it was called; torch warns where that replacement is gone.
    if "step" not in vars(optimizer):
        return

    def step(*args, **kwargs):
        optimizer._opt_called = True
        return type(optimizer).step(optimizer, *args, **kwargs)

    step._wrapped_by_lr_sched = True
    optimizer.step = step
