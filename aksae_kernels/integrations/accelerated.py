"""What every accelerated class has in common."""

from __future__ import annotations

import warnings
from abc import ABC
from inspect import isfunction
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .. import SparseCodes, price_select
from .weights import as_latent_major, as_row_major, is_in_buckets


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

    @classmethod
    def obstacle(cls, obj: Any) -> str | None:
        """What keeps `accelerate` from an instance of `host_class`: its `refusal`, or how the object was altered."""
        if (reason := cls.refusal(obj)) is not None:
            return reason
        for name in vars(obj):
            fast, hosts = getattr(cls, name, None), getattr(cls.host_class, name, None)
            if isfunction(fast) and isfunction(hosts) and fast is not hosts:
                return f"a {name} of its own, which hides the accelerated one: accelerate first, then set or compile it"
        return None

    def _attach(self) -> None:
        """After the class has changed: what else has to. Where it raises, `_detach` is called."""

    def _detach(self) -> None:
        """Undo `_attach`, also half of it, before the class changes back."""


class Pricing(NamedTuple):
    """What the latents of a priced SAE cost."""

    price: float
    """In units of the squared error that the SAE's decoder makes: of normalised inputs, where the SAE normalises."""
    k_max: int
    """Candidates of a row."""
    passes: int
    """Walks over them."""


class Candidates(NamedTuple):
    """The first arguments of `price_select`: candidates, and what they are to reconstruct."""

    codes: SparseCodes
    W_dec: Tensor
    b_dec: Tensor | None
    x: Tensor


class AcceleratedModule(Accelerated):
    """An accelerated `nn.Module`, some of whose weights are kept by latent in memory."""

    pricing: Pricing | None = None
    """What `priced` has set: it holds in `eval` mode, for `encode` and `forward`."""

    transposed: ClassVar[tuple[str, ...]] = ()
    """Names of parameters `[D, F]`: their `.T`, `[F, D]`, is contiguous while the module is accelerated.

    One that is no plain parameter, or that somebody else holds (`weights.is_held`), keeps its layout, and kernels copy
    it in every call.
    """

    def _attach(self) -> None:
        for name in self.transposed:
            if (weight := _matrix(self, name)) is not None:
                as_latent_major(weight)
                _warn_kept(name, weight)

    def _detach(self) -> None:
        for name in self.transposed:
            if (weight := _matrix(self, name)) is not None:
                as_row_major(weight)

    @classmethod
    def price_obstacle(cls, obj: Any) -> str | None:
        """What about an SAE that can be accelerated keeps its latents from a price, in words that fit after "with"."""
        return None

    def _is_priced(self: nn.Module) -> bool:
        return self.pricing is not None and not self.training

    def _candidates(self, k_max: int, *data: Tensor) -> Candidates:
        """The `k_max` latents of each row with the largest positive scores, or all that there are. Every class of a
        host that can be priced defines it.

        `data` is the input, and where the host makes scores in any case, those. Scores, decoder and target are in the
        host's own units: a host that ranks by scores times decoder norms reconstructs with decoder rows of norm 1.
        """
        raise NotImplementedError

    def _at_price(self, *data: Tensor) -> SparseCodes:
        """Those of the candidates that pay."""
        price, k_max, passes = self.pricing
        return price_select(*self._candidates(k_max, *data), price=price, passes=passes)

    def state_dict(self: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The host's, with contiguous copies of `transposed`: safetensors needs them, and files should not tell.

        With `keep_vars` the parameters themselves.
        """
        state = super().state_dict(*args, **kwargs)
        prefix = args[1] if len(args) > 1 else kwargs.get("prefix", "")
        for name in (prefix + name for name in self.transposed):
            if name in state and not isinstance(state[name], nn.Parameter):
                state[name] = state[name].contiguous()
        return state

    def load_state_dict(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The host's. With `assign` the file's tensors are laid out anew."""
        loaded = super().load_state_dict(*args, **kwargs)
        for weight in (_matrix(self, name) for name in self.transposed):
            if weight is not None:
                as_latent_major(weight)
        return loaded


class AbstractFirst(ABC):  # noqa: B024 - for its place in memory alone
    """First base of what accelerates a `class X(ABC, nn.Module)`: `class Fast(AbstractFirst, AcceleratedModule, X)`.

    CPython lets an object change its class only where the first bases of both classes, followed to the end, begin
    alike: there with `ABC`, in other hosts with `object`.
    """


def _matrix(module: nn.Module, name: str) -> nn.Parameter | None:
    """The parameter of that name, where it is one and has two dimensions."""
    try:
        parameter = module.get_parameter(name)
    except AttributeError:
        return None
    return parameter if parameter.ndim == 2 else None


def _warn_kept(name: str, weight: nn.Parameter) -> None:
    # What lays weights out by itself, as FSDP does, comes first in any case; with this the other order is faster.
    if not weight.T.is_contiguous() and is_in_buckets(weight):
        warnings.warn(
            f"{name} keeps its layout in memory, since DistributedDataParallel has made buckets for it: results are "
            "right, but every call copies it; to avoid that, accelerate before wrapping",
            stacklevel=4,
        )


def has_data(tensor: Tensor) -> bool:
    """Whether the tensor has data to decide by: not on the meta device, nor among fake tensors."""
    return not (tensor.is_meta or isinstance(tensor, torch._subclasses.FakeTensor))


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody watches calls of the module."""
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    return any(getattr(module, name) for name in hooks)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a call of the module is `F.linear` and nothing else."""
    return type(module) is nn.Linear and not has_hooks(module)
