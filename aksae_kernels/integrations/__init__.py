"""The sparse autoencoders and trainers of other codebases, on the kernels of this one.

`accelerate(obj)` makes them run on these kernels, `priced(sae, price)` makes their latents cost something.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
import warnings
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from numbers import Real
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from .. import price_for
from ..pricing import candidates_of
from .accelerated import Accelerated, AcceleratedModule, Pricing

__all__ = ["accelerate", "deaccelerate", "priced"]

T = TypeVar("T")


class _Host(NamedTuple):
    """A codebase: its distribution at PyPI, the version the parity tests ran with, and what of it is accelerated."""

    distribution: str
    tested: str
    supported: str


# By the package its classes live in. The module of that name here imports it, and is itself imported only for an object
# of that package.
_HOSTS = {
    "sparsify": _Host("eai-sparsify", "1.3.3", "SparseCoder, Trainer"),
    "sae_lens": _Host(
        "sae-lens",
        "6.54.12",
        "TopKSAE, JumpReLUSAE, StandardSAE, TopKTrainingSAE, BatchTopKTrainingSAE, JumpReLUTrainingSAE, SAETrainer",
    ),
    "dictionary_learning": _Host(
        "dictionary-learning",
        "0.1.0",
        "AutoEncoderTopK, BatchTopKSAE, JumpReluAutoEncoder, AutoEncoder, "
        "TopKTrainer, BatchTopKTrainer, JumpReluTrainer",
    ),
    "overcomplete": _Host("overcomplete", "0.3.0", "TopKSAE"),
    "llamascopium": _Host("llamascopium", "2.0.0b34", "SparseAutoEncoder with topk, batchtopk or jumprelu, Trainer"),
}
# Why an SAE whose class has this in its name has no latents that could have a price.
_UNPRICED = {
    "Gated": "a latent of it has two pre-activations, one that opens its gate and one for its value",
    "Transcoder": "its encode is not given what is to be reconstructed",
    "Temporal": "its reconstruction of a token is made of other tokens, too",
    "MatchingPursuit": "its latents are chosen by what is not yet explained, so they have no pre-activations",
    "AbsTopK": "its latents fire with either sign",
}
_ROWS_AT_ONCE = 4096
"""Rows encoded at a time to find a price."""
_warned: set[str] = set()


def accelerate(obj: T) -> T:
    """Make an SAE of another codebase, or a trainer with the SAEs in it, run on these kernels: in place, and returned.

    The object keeps its identity, its parameters, its `state_dict` keys and the files it writes; its class becomes a
    subclass of the one it had. Outputs, losses and gradients are the host's, to rounding, by the host's own rules (its
    module here names each of them); where the host is wrong, they are right. What is accelerated already is left as it
    is.

    Weights that the host keeps as `[D, F]` are transposed in memory, behind the same shape and object:

    * `state_dict()` of the object holds contiguous COPIES of them. Edits in place of its entries, as moving averages
      of weights are often applied, do not reach the parameters: edit those, or what `state_dict(keep_vars=True)` holds.
      The `state_dict()` of a submodule by itself (`ae.decoder`) holds the parameter's own memory, in its layout.
    * `.view(-1)`, `parameters_to_vector` and safetensors need `.contiguous()` of the parameter.
    * Other processes that share a weight's memory, and captured CUDA graphs, go on with the old one: accelerate first.

    Wrappers that remember parameters:

    * DistributedDataParallel may come before or after. Where it was first, its weights keep their layout, and every
      call copies them; a warning says so.
    * FSDP, `fully_shard` and `ZeroRedundancyOptimizer(parameters_as_bucket_view=True)` lay parameters out themselves.
      Apply them first, then `accelerate(fully_shard(sae))`: their weights keep their layout, too. After `accelerate`,
      `fully_shard` refuses "non-contiguous parameters", and torch scrambles gradients in FSDP with `use_orig_params`
      and NO_SHARD (which one process always has), and where that optimizer follows a DistributedDataParallel.
    * `fully_shard` gathers weights for `forward` alone. It has to be told of other methods, of an accelerated object as
      of the host's own: `register_fsdp_forward_method(sae, "training_forward_pass")`.
    * `torch.compile`, `torch.optim.swa_utils.AveragedModel`, optimizers and `torch.func.functional_call` may come
      before or after. Moments of torch's fused optimizers, which go through weights and moments in the order they have
      in memory, are laid out like their weights before each step.

    Derivatives are of first order where sparse kernels run: double backward and `torch.func.grad` raise. Forward mode
    (`torch.func.jvp`, dual tensors) gives the tangents of what was selected, or raises. A NaN in the decoder's row of a
    latent that did not fire does not show in outputs.

    Args:
        obj: an instance of one of the classes listed in the README, not of a subclass of somebody's own: what that
            overrides would be lost. Compile, parametrise or replace methods on the instance afterwards. Of a wrapper
            (`torch.compile`, DistributedDataParallel) it is the module inside, of a list each element.

    Raises:
        TypeError: the object is of none of those classes; the message lists them, and says what of the object is.
        ValueError: it is, but is configured for something the kernels do not do, or hides an accelerated method behind
            an attribute of its own; the message says what.

    The object is as it was where this raises. Warns once for each host whose installed version is not the tested one.
    """
    if isinstance(obj, Accelerated):
        return obj
    host, fast = _host_of(type(obj)), _fast_class(type(obj))
    if host is None or fast is None:
        supported = "; ".join(f"{name}: {known.supported}" for name, known in _HOSTS.items())
        raise TypeError(
            f"obj must be an object of a class that can be accelerated, got {_describe(obj)}; there are {supported}"
        )
    reason = fast.obstacle(obj)
    if reason is not None:
        raise ValueError(f"obj must be something the kernels can do, got a {_name(type(obj))} with {reason}")
    _warn_untested(host)
    accelerated = cast(Any, obj)
    accelerated.__class__ = fast
    try:
        accelerated._attach()
    except BaseException:
        deaccelerate(obj)
        raise
    return obj


def deaccelerate(obj: T) -> T:
    """Undo `accelerate`, in place: the object's class and the layout of its weights are the host's again; returned.

    An object that is not accelerated is left as it is, and so is one of a subclass of an accelerated class: the host
    has none with its methods. A weight that is no plain parameter any more keeps its layout. Raises nothing.
    """
    if isinstance(obj, Accelerated) and "host_class" in vars(type(obj)):
        _unprice(obj)
        obj._detach()
        obj.__class__ = type(obj).host_class
    return obj


def priced(
    sae: T,
    price: float | None = None,
    *,
    budget: float | None = None,
    rows: Tensor | None = None,
    k_max: int | None = None,
    passes: int = 2,
) -> T:
    """Make an SAE of another codebase keep the latents that pay, in its own `encode` and `forward`; returned.

    Of a row's `k_max` largest positive pre-activations, whatever the host's k or thresholds are, it keeps those that
    lower the squared error by more than `price`, given those kept before (`aksae_kernels.price_select`). Each row has a
    k of its own, and none depends on its batch. Pre-activations, decoder and error are the host's own: centred,
    normalised and scaled as in its encode. What `encode` and `forward` return has the form it always had, and hooks
    see it.

        priced(sae, budget=64, rows=held_out)  # then sae.pricing.price is what was found
        priced(sae, 0.25, k_max=256)
        priced(sae, None)                      # as it was

    The SAE is accelerated if it is not yet, and put into `eval` mode: a price is for inference. After `sae.train()`,
    and in the methods by which trainers alone encode, the host's own rule holds; `sae.eval()` brings the price back.
    The SAE's files hold no price. `deaccelerate` takes it away, too.

    Args:
        sae: of a class that `accelerate` takes; not a trainer.
        price: in units of squared error, of the normalised input where the SAE normalises; inf keeps nothing, -inf
            all candidates. In the place of an earlier price, its `k_max` and `passes`. None, without a budget, takes
            the price away, and the mode that the SAE had comes back.
        budget: instead of a price, the mean number of latents of a row that it is to give on `rows`.
        rows: `[N, ...]`, as `encode` takes them, on the SAE's device; not rows that it was trained on, whose error is
            smaller. A few thousand do: their candidates are in memory together.
        k_max: candidates of a row; None, with a budget, for 4 budgets and at least 256. All latents, if there
            are fewer.
        passes: walks over the candidates.

    Raises:
        TypeError: an object of no such class; the message says what it lacks.
        ValueError: an SAE that cannot be priced as it is configured (a transcoder, say), or arguments that do not fit.

    The object is as it was where this raises.
    """
    if price is None and budget is None and rows is None:
        _unprice(sae)
        return sae
    k_max = _candidates_of_a_row(price, budget, rows, k_max, passes)
    fast = type(sae) if isinstance(sae, Accelerated) else _fast_class(type(sae))
    if fast is None or not issubclass(fast, AcceleratedModule):
        raise TypeError(
            f"sae must be an SAE that can be accelerated and gives its own input back, got {_why_unpriced(sae, fast)}"
        )
    if (reason := fast.price_obstacle(sae)) is not None:
        raise ValueError(f"sae must have latents that can have a price, got a {_name(type(sae))} with {reason}")
    module = cast(Any, sae)
    is_new, training = not isinstance(sae, Accelerated), module.training
    accelerate(sae)
    try:
        module.eval()
        found = price if rows is None else _price_at(module, rows, cast(float, budget), k_max, passes)
        pricing = Pricing(float(cast(float, found)), k_max, passes)
    except BaseException:
        module.train(training)
        if is_new:
            deaccelerate(sae)
        raise
    if module.pricing is None:
        module._was_training = training
    module.pricing = pricing
    return sae


def _candidates_of_a_row(
    price: float | None, budget: float | None, rows: Tensor | None, k_max: int | None, passes: int
) -> int:
    """`k_max`, if these are arguments for `priced`; raises ValueError if not."""
    if (price is None) == (budget is None) or (budget is None) != (rows is None):
        got = ", ".join(
            name for name, value in (("price", price), ("budget", budget), ("rows", rows)) if value is not None
        )
        raise ValueError(f"priced needs either a price or a budget and rows, got {got}")
    if budget is not None:
        if isinstance(budget, bool) or not isinstance(budget, Real) or not 0 < budget < math.inf:
            raise ValueError(f"budget must be a number above 0, got {budget!r}")
        k_max = candidates_of(budget) if k_max is None else k_max
    elif isinstance(price, bool) or not isinstance(price, (Real, Tensor)) or math.isnan(price):
        raise ValueError(f"price must be a number, got {price!r}")
    elif k_max is None:
        raise ValueError("k_max must be given with a price: how many candidates a row has; got None")
    for name, value in (("k_max", k_max), ("passes", passes)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an int from 1 up, got {value!r}")
    if budget is not None and budget > k_max:
        raise ValueError(f"budget must be at most k_max, {k_max}, the candidates of a row; got {budget}")
    return cast(int, k_max)


@torch.no_grad()
def _price_at(sae: Any, rows: Tensor, budget: float, k_max: int, passes: int) -> Tensor:
    """The price at which `rows` keep `budget` latents in the mean."""
    if not isinstance(rows, Tensor) or rows.ndim < 2 or not rows.numel():
        got = list(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
        raise ValueError(f"rows must be a tensor [N, ...] of at least one row to find a price, got {got}")
    parts = []
    for some in rows.split(_ROWS_AT_ONCE):
        codes, W_dec, b_dec, target = sae._candidates(k_max, some)
        parts.append((codes, target))
    return price_for(parts, W_dec, b_dec, budget, passes)


def _unprice(obj: Any) -> None:
    if isinstance(getattr(obj, "pricing", None), Pricing):
        del obj.pricing
        obj.train(vars(obj).pop("_was_training"))


def _why_unpriced(obj: Any, fast: type[Accelerated] | None) -> str:
    """What the object is, and what of it is in the way of a price."""
    if fast is not None:
        return f"a {_name(type(obj))}: price the SAE in it"
    reason = next((reason for part, reason in _UNPRICED.items() if part in type(obj).__name__), None)
    return _describe(obj) if reason is None else f"a {_name(type(obj))}: {reason}"


def _host_of(cls: type) -> str | None:
    """The package of the most derived class among the bases that is a host's."""
    packages = (base.__module__.partition(".")[0] for base in cls.__mro__)
    return next((package for package in packages if package in _HOSTS), None)


def _fast_class(cls: type) -> type[Accelerated] | None:
    """What stands in for instances of just that class; None where nothing does."""
    host = _host_of(cls)
    if host is None:
        return None
    fast = _classes(host).get(cls)
    # fully_shard has changed the class of its module, too: to one with FSDP's methods before those of the host.
    if fast is None and len(cls.__bases__) == 2 and cls.__bases__[0].__module__.startswith("torch.distributed."):
        within = _fast_class(cls.__bases__[1])
        # mypy misses that a class is hashable.
        fast = None if within is None else _sharded(cls, within)  # type: ignore[arg-type]
    return fast


@functools.cache
def _sharded(cls: type, fast: type[Accelerated]) -> type[Accelerated]:
    """`fast` with the methods that fully_shard has put before those of the host, which made its class `cls`."""
    mixin = cls.__bases__[0]
    own = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(f"{mixin.__name__.removesuffix('Module')}{fast.__name__}", (mixin, fast), {**own, "host_class": cls})


def _classes(host: str) -> dict[type, type[Accelerated]]:
    """The accelerated class for each class of the host."""
    module = importlib.import_module(f".{host}", __name__)
    found = (value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Accelerated))
    return {fast.host_class: fast for fast in found if hasattr(fast, "host_class")}


def _warn_untested(host: str) -> None:
    try:
        installed = version(_HOSTS[host].distribution)
    except PackageNotFoundError:  # a checkout on the path
        installed = "of unknown version"
    if host not in _warned and installed != _HOSTS[host].tested:
        _warned.add(host)
        warnings.warn(
            f"{_HOSTS[host].distribution} is {installed}; accelerate is tested with {_HOSTS[host].tested}", stacklevel=3
        )


def _describe(obj: Any) -> str:
    """What the object is and, where that can be told, what to accelerate in its stead."""
    name = _name(obj if isinstance(obj, type) else type(obj))
    if isinstance(obj, type):
        return f"the class {name} itself: accelerate an instance of it"
    if isinstance(obj, (str, os.PathLike)):
        return f"{obj!r}: load what it names by its own codebase, and accelerate the object"
    if isinstance(obj, (list, tuple, set, frozenset, nn.ModuleList)):
        return f"a {type(obj).__name__}: accelerate each of its elements"
    if isinstance(obj, (Mapping, nn.ModuleDict)):
        is_state = any(isinstance(value, Tensor) for value in obj.values())
        instead = "load them into an object of their host, and accelerate that" if is_state else "accelerate each value"
        return f"a {type(obj).__name__}{' of tensors' if is_state else ''}: {instead}"
    for base in type(obj).__mro__[1:]:
        if _fast_class(base) is not None:
            return f"{name}, a subclass of {_name(base)}: what it overrides would be lost"
    if isinstance(obj, nn.Module):
        for path, part in obj.named_modules():
            if isinstance(part, Accelerated):
                return f"a {name}, in which {_expression(path)} is accelerated already"
            if _fast_class(type(part)) is not None:
                return f"a {name}: accelerate({_expression(path)}), best before it is wrapped"
    return name


def _expression(path: str) -> str:
    """Python for the submodule of that path in `obj`."""
    is_plain = all(name.isidentifier() for name in path.split("."))
    return f"obj.{path}" if is_plain else f"obj.get_submodule({path!r})"


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
