"""What every accelerated class has in common."""

from __future__ import annotations

from abc import ABC
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .weights import as_latent_major, as_row_major


class Accelerated:
    """A subclass of a host's class, to which `accelerate` turns an instance of just that class.

    It stands before the host's class among the bases: `class FastTopK(AcceleratedModule, TopKSAE)`.
    """

    host_class: ClassVar[type]
    """The class it stands in for."""

    def __init__(self, *args: Any, **kwargs: Any):
        """Of the host: an accelerated class may also be constructed. Raises ValueError where `accelerate` would."""
        super().__init__(*args, **kwargs)
        reason = self.refusal(self)
        if reason is not None:
            raise ValueError(f"{type(self).__name__} must be something the kernels can do, got one with {reason}")
        self._attach()

    @classmethod
    def refusal(cls, obj: Any) -> str | None:
        """What about an instance of `host_class` cannot be done, in words that fit after "with"; None if all can."""
        return None

    def _attach(self) -> None:
        """After the class has changed: what else has to."""

    def _detach(self) -> None:
        """Undo `_attach`, before the class changes back."""


class AcceleratedModule(Accelerated):
    """An accelerated `nn.Module`, some of whose weights are kept by latent in memory."""

    transposed: ClassVar[tuple[str, ...]] = ()
    """Names of parameters `[D, F]`: their `.T`, `[F, D]`, is contiguous while the module is accelerated."""

    def _attach(self) -> None:
        for name in self.transposed:
            as_latent_major(self.get_parameter(name))

    def _detach(self) -> None:
        for name in self.transposed:
            as_row_major(self.get_parameter(name))

    def state_dict(self: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The host's, with contiguous tensors: safetensors refuses others, and files should not tell."""
        state = super().state_dict(*args, **kwargs)
        for name, value in state.items():
            if isinstance(value, Tensor) and value.layout is torch.strided and not value.is_contiguous():
                state[name] = value.contiguous()
        return state


class AbstractFirst(ABC):  # noqa: B024 - for its place in memory alone
    """First base of what accelerates a `class X(ABC, nn.Module)`: `class Fast(AbstractFirst, AcceleratedModule, X)`.

    CPython lets an object change its class only where the first bases of both classes, followed to the end, begin
    alike: there with `ABC`, in other hosts with `object`.
    """


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody watches calls of the module."""
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    return any(getattr(module, name) for name in hooks)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a call of the module is `F.linear` and nothing else."""
    return type(module) is nn.Linear and not has_hooks(module)
