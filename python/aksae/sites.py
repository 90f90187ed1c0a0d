"""Places in a transformer block where activations are read, found by structure in whatever architecture."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from .errors import UserError

Hook = Literal["resid_post", "resid_pre", "mlp_out", "attn_out"]
HOOKS: tuple[Hook, ...] = get_args(Hook)

_NAMED = {
    "attn_out": re.compile(r"attn|attention", re.IGNORECASE),
    "mlp_out": re.compile(r"mlp|ffn|feed_?forward|moe|densereludense|^ff$", re.IGNORECASE),
}
# Blocks whose MLP has no module of its own end it in one of these.
_LAST_OF_MLP = ("output", "fc2", "lin2", "linear2", "w2")
_NORM = re.compile(r"norm|^ln", re.IGNORECASE)
_TOLERANCE = 0.02


@dataclass(frozen=True)
class Site:
    """A place in block `layer`: `resid_pre` and `resid_post` are the residual stream before and after the block,
    `attn_out` and `mlp_out` what attention and MLP add to it."""

    layer: int
    hook: Hook = "resid_post"

    def __str__(self) -> str:
        return f"layers.{self.layer}.{self.hook}"


class _Reached(Exception):
    """Ends a forward that need not go on."""


def hidden_states(output) -> Tensor | None:
    """The hidden states in what a module was given or returned, which holds them alone, or first in a tuple."""
    first = output[0] if isinstance(output, (tuple, list)) and output else output
    return first if isinstance(first, Tensor) else None


def read_sites(modules: dict[Site, nn.Module], forward: Callable[[], object]) -> dict[Site, Tensor]:
    """What passes the sites in a forward, which ends when all were passed. `modules` has each site's module: the block
    for the residual stream, else what `find_module` found."""
    found: dict[Site, Tensor] = {}

    def take(site: Site, value) -> None:
        hidden = hidden_states(value)
        if hidden is None:
            raise UserError(f"site: got no hidden states at {site}, needs a tensor [n, L, D]")
        # A copy, where the forward goes on: it may add to this tensor in place.
        found.setdefault(site, hidden if len(modules) == 1 else hidden.clone())
        if len(found) == len(modules):
            raise _Reached

    def hooked(site: Site, module: nn.Module):
        if site.hook == "resid_pre":
            return module.register_forward_pre_hook(
                lambda module, args, kwargs: take(site, _first(args, kwargs)), with_kwargs=True
            )
        return module.register_forward_hook(lambda module, args, output: take(site, output))

    with _hooks(hooked(site, module) for site, module in modules.items()):
        try:
            forward()
        except _Reached:
            return found
    missed = next(site for site in modules if site not in found)
    raise RuntimeError(f"{missed} was not passed")


@contextmanager
def replaced_sites(
    modules: Mapping[Site, nn.Module], changes: Mapping[Site, Callable[[Tensor], Tensor]]
) -> Iterator[None]:
    """In forwards inside, what passes each site is what its change makes of it. `modules` as in `read_sites`."""

    def changed(site: Site, value):
        """`value` with its hidden states, which it is or begins with, changed."""
        hidden = hidden_states(value)
        if hidden is None:
            raise UserError(f"site: got no hidden states at {site}, needs a tensor [n, L, D]")
        new = changes[site](hidden)
        return new if hidden is value else (new, *value[1:])

    def before(site: Site, args, kwargs):
        if args:
            return changed(site, args), kwargs
        return args, {**kwargs, "hidden_states": changed(site, kwargs.get("hidden_states"))}

    def hooked(site: Site, module: nn.Module):
        if site.hook == "resid_pre":
            return module.register_forward_pre_hook(
                lambda module, args, kwargs: before(site, args, kwargs), with_kwargs=True
            )
        return module.register_forward_hook(lambda module, args, output: changed(site, output))

    with _hooks(hooked(site, module) for site, module in modules.items()):
        yield


def find_module(block: nn.Module, hook: Hook, name: str, forward: Callable[[], object]) -> nn.Module:
    """The module whose output is `attn_out` or `mlp_out` of a block.

    Candidates are told by their names: the modules for attention and MLP, the last layers inside them, and norms
    behind them. Those are right whose outputs add up to what the block adds to the residual stream. Where none do,
    since the block ends in a norm or scales what it adds, it is the module named so, or its last layer where it has
    taken in the residual stream itself and ends in a norm.

    Args:
        block: the block.
        hook: which of the two.
        name: of the block, for messages.
        forward: runs the model on one context of two tokens.

    Raises:
        UserError: nothing in the block is named like it; the message lists what is there.
    """
    before, outputs = _run(block, forward)
    paths = {path: module for path, module in block.named_modules() if path}
    found = {each: _candidates(paths, outputs, each) for each in ("attn_out", "mlp_out")}
    if not found[hook]:
        there = ", ".join(dict.fromkeys(path.partition(".")[0] for path in paths)) or "none"
        raise UserError(
            f"site: found no module for {hook} in {name} ({type(block).__name__}), whose modules are {there}; needs "
            f"{'an attention' if hook == 'attn_out' else 'an MLP'} module of its own, or another site"
        )
    added = outputs[""] - before
    errors = {
        (attention, mlp): float((added - outputs[attention] - outputs[mlp]).norm())
        for attention, mlp in product(found["attn_out"], found["mlp_out"])
    }
    best = min(errors, key=errors.__getitem__, default=None)
    if best is not None and errors[best] <= _TOLERANCE * float(added.norm()):
        return paths[best[hook == "mlp_out"]]
    named, *others = found[hook]
    ends_in_norm = any(path.startswith(f"{named}.") and _is_norm(path, module) for path, module in paths.items())
    inside = [path for path in others if path.startswith(f"{named}.")]
    return paths[inside[0] if ends_in_norm and inside else named]


@torch.no_grad()
def _run(block: nn.Module, forward: Callable[[], object]) -> tuple[Tensor, dict[str, Tensor]]:
    """What the block was given, and what it and the modules in it gave, in the order in which they ended."""
    before: list[Tensor] = []
    outputs: dict[str, Tensor] = {}

    def record(path: str, output) -> None:
        hidden = hidden_states(output)
        # Some blocks put all tokens into one dimension for their MLP.
        like = before[0] if before else None
        if hidden is None or like is None or hidden.numel() != like.numel() or hidden.shape[-1] != like.shape[-1]:
            return
        outputs.setdefault(path, hidden.detach().float().clone().reshape(like.shape))

    def enter(module, args, kwargs) -> None:
        hidden = _first(args, kwargs)
        if hidden is not None and not before:
            before.append(hidden.detach().float().clone())

    handles = [block.register_forward_pre_hook(enter, with_kwargs=True)]
    handles += [
        module.register_forward_hook(lambda m, args, output, p=path: record(p, output))
        for path, module in block.named_modules()
    ]
    with _hooks(handles):
        forward()
    return before[0], outputs


def _candidates(paths: dict[str, nn.Module], outputs: dict[str, Tensor], hook: str) -> list[str]:
    """Paths of modules in a block that may give `hook`, the likeliest first."""
    ran = [path for path in outputs if path]
    pattern = _NAMED[hook]
    named = [path for path in ran if pattern.search(_last(path)) and not _is_norm(path, paths[path])]
    if not named and hook == "mlp_out":
        named = [path for path in ran if path in _LAST_OF_MLP]
    if not named:
        return []
    base = min(named, key=lambda path: path.count("."))
    inside = [
        path
        for path in reversed(ran)
        if path.startswith(f"{base}.")
        and not any(paths[path].children())
        and not _is_norm(path, paths[path])
        and not isinstance(paths[path], nn.Dropout)
    ]
    norms = [path for path in ran if pattern.search(_last(path)) and _is_norm(path, paths[path]) and "post" in path]
    return [base, *inside[:1], *norms]


def _is_norm(path: str, module: nn.Module) -> bool:
    return bool(_NORM.search(_last(path)) or "norm" in type(module).__name__.lower())


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _first(args, kwargs) -> Tensor | None:
    return hidden_states(args) if args else kwargs.get("hidden_states")


@contextmanager
def _hooks(handles: Iterable) -> Iterator[None]:
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
