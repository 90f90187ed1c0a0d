"""SAEAdam: Adam that keeps decoder rows on the unit sphere, in one pass over each weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .codes import SparseCodes, acc_dtype
from .ops import adam_step, sparse_value_grad

# What `torch.optim.Adam` can do besides, at the values where both are one algorithm. A group has them too, so that
# either optimizer reads the other's state.
PLAIN_ADAM = {"weight_decay": 0, "amsgrad": False, "maximize": False, "differentiable": False}
# How torch's Adam computes, which is not ours to follow.
_IMPLEMENTATION = ("foreach", "capturable", "fused", "decoupled_weight_decay")
_OWN = ("unit_norm_rows", "lazy", "max_grad_norm")


class SAEAdam(torch.optim.Optimizer):
    """Adam (arXiv 1412.6980) without weight decay, with the constraint SAE decoders need.

    For a group with `unit_norm_rows=True` (matrices `[F, D]` whose rows have unit norm), a step does, for each row w
    with gradient g:

        g <- g - <g, w> w                     the part along w would only change its length
        g <- g min(1, max_grad_norm / |g|)    |g| over all parameters of the optimizer, after the line above
        w <- Adam(w, g)
        w <- w / |w|                          a zero row stays zero

    Other groups do the two middle lines. Moments are held in fp32 (fp64 for fp64 weights); the update is rounded once
    to the weight's dtype. On the `cpu` backend all lines of a row run while it is in cache.

    For a group with `lazy=True` a step leaves out the latents that did not fire: a row of a matrix `[F, D]` whose
    gradient is 0 throughout keeps its weights and its moments. That saves reading and writing them, and it is another
    optimizer than Adam, for which such a row goes on moving by its momentum while its moments decay; the step count in
    the bias correction is that of the parameter, not of the row. Parameters that are not matrices take every step.

    Args:
        params: parameters, or groups with the keys `params`, and optionally `lr`, `betas`, `eps`, `unit_norm_rows`,
            `lazy`.
        lr, betas, eps: as in `torch.optim.Adam`.
        max_grad_norm: clip by the global norm (over all groups); None for no clipping. `last_grad_norm` then holds the
            norm before clipping, as a 0-dim tensor, after each step. A NaN or infinite norm makes the update NaN: a
            diverged run must surface.

    Parameters without a gradient are left alone. Raises ValueError for hyper-parameters out of range, for a
    `unit_norm_rows` parameter that is not a matrix, for a group with an option of `torch.optim.Adam` that this is
    without (weight decay, AMSGrad, maximizing), and for sparse gradients.

    A `state_dict` of `torch.optim.Adam` can be loaded, and one of SAEAdam by `torch.optim.Adam`, which goes on without
    the constraint, the clipping and the laziness.
    """

    last_grad_norm: Tensor | None = None

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        max_grad_norm: float | None = None,
    ):
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be positive or None, got {max_grad_norm}")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "unit_norm_rows": False, "lazy": False}
        defaults |= {"max_grad_norm": max_grad_norm, **PLAIN_ADAM}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if not group["lr"] >= 0:
            raise ValueError(f"lr must not be negative, got {group['lr']}")
        if not all(0 <= beta < 1 for beta in group["betas"]):
            raise ValueError(f"betas must lie in [0, 1), got {group['betas']}")
        if not group["eps"] >= 0:
            raise ValueError(f"eps must not be negative, got {group['eps']}")
        _require_plain(group)
        for param in group["params"]:
            if group["unit_norm_rows"] and param.ndim != 2:
                raise ValueError(f"unit_norm_rows needs matrices [F, D], got a parameter of shape {list(param.shape)}")

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            # Older checkpoints do not have them.
            for name, value in {"lazy": False, **PLAIN_ADAM}.items():
                group.setdefault(name, value)

    @torch.no_grad()
    # torch's own types know of closures that return a float alone.
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One step over all parameters that have a gradient; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale = None
        # Of all groups together, so not a group's own; torch copies and pickles an optimizer by its defaults.
        max_grad_norm = self.defaults["max_grad_norm"]
        if max_grad_norm is not None:
            self.last_grad_norm = self._grad_norm()
            # Not clamped away when NaN; and NaN, not 0, when the norm is infinite.
            too_long = max_grad_norm / self.last_grad_norm + 0 * self.last_grad_norm
            scale = torch.where(self.last_grad_norm <= max_grad_norm, 1.0, too_long)
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._step_param(param, param.grad, group, scale)
        return loss

    def load_state_dict(self, state_dict: dict) -> None:
        """As in torch, but moments keep the accumulation dtype, where torch would round them to the weight's.

        Takes a state of `torch.optim.Adam` (or AdamW) too, and goes on as that would, with `unit_norm_rows`, `lazy` and
        `max_grad_norm` as they are here. Raises ValueError, before anything has changed, for one with options that this
        is without, and for the state of any other optimizer.
        """
        groups, saved = self.param_groups, state_dict["param_groups"]
        if len(groups) == len(saved):  # else torch says so
            saved = [_as_ours(theirs, ours) for theirs, ours in zip(saved, groups)]
        for state in state_dict["state"].values():
            if set(state) != {"step", "exp_avg", "exp_avg_sq"}:
                raise ValueError(f"state must hold Adam's step, exp_avg and exp_avg_sq, got {', '.join(state)}")
        super().load_state_dict({**state_dict, "param_groups": saved})
        ours = (param for group in self.param_groups for param in group["params"])
        keys = (key for group in saved for key in group["params"])
        for param, key in zip(ours, keys):
            if key not in state_dict["state"]:
                continue
            loaded, state = state_dict["state"][key], self.state[param]
            # torch's Adam counts in a tensor.
            state["step"] = int(loaded["step"])
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = loaded[name].to(param.device, acc_dtype(param.dtype), copy=True)

    def _step_param(self, param: Tensor, grad: Tensor, group: dict, scale: Tensor | None) -> None:
        if grad.is_sparse:
            raise ValueError("SAEAdam takes dense gradients, got a sparse one")
        state = self.state[param]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(param, dtype=acc_dtype(param.dtype))
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=acc_dtype(param.dtype))
        state["step"] += 1
        adam_step(
            param,
            grad,
            state["exp_avg"],
            state["exp_avg_sq"],
            step=state["step"],
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            grad_scale=None if scale is None else scale.to(param.device),
            unit_norm_rows=group["unit_norm_rows"],
            # The latents of a matrix [F, D]; a vector has no rows to leave out.
            lazy=group["lazy"] and param.ndim == 2,
        )

    def _grad_norm(self) -> Tensor:
        squares = []
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                acc = acc_dtype(param.dtype)
                square = torch.linalg.vector_norm(param.grad, dtype=acc).square()
                if group["unit_norm_rows"]:
                    # |g - <g, w> w|^2 = |g|^2 - <g, w>^2 (2 - |w|^2), also where |w| is only about 1.
                    along = _row_dots(param.grad.to(acc), param.to(acc))
                    length = torch.linalg.vector_norm(param, dim=-1, dtype=acc)
                    square = (square - (along.square() * (2 - length.square())).sum()).clamp(min=0)
                squares.append(square)
        if not squares:
            return torch.zeros((), device="cpu")
        return torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt()


def _row_dots(a: Tensor, b: Tensor) -> Tensor:
    """`<a[f], b[f]>`, `[F]`, without a product `[F, D]` in memory: each row is the one latent of its own code."""
    index = torch.arange(len(a), dtype=torch.int32, device=a.device).unsqueeze(-1)
    codes = SparseCodes(a.new_zeros(index.shape), index, torch.ones_like(index[:, 0]))
    return sparse_value_grad(a, codes, b).squeeze(-1)


def _require_plain(group: dict) -> None:
    for name, value in PLAIN_ADAM.items():
        if group.get(name, value) != value:
            raise ValueError(f"{name} must be {value}, which is all that SAEAdam does, got {group[name]}")


def _as_ours(group: dict, ours: dict) -> dict:
    """A saved group of SAEAdam as it is; of torch's Adam with the options of `ours` that it is without."""
    _require_plain(group)
    if "unit_norm_rows" in group:
        return group
    if "amsgrad" not in group:
        raise ValueError(f"state_dict must be one of SAEAdam or torch.optim.Adam, got groups with {', '.join(group)}")
    kept = {name: value for name, value in group.items() if name not in _IMPLEMENTATION}
    return kept | {name: ours[name] for name in _OWN}
