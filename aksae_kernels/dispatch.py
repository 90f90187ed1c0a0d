"""Which backend runs a call, and why not the others.

The choice is made when an op runs, from the device and dtype of its first tensor. `auto` takes the first backend of
the device's list that accepts the call; a backend asked for by name runs or raises with its reason.
"""

from __future__ import annotations

import importlib
import os
import threading
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

AUTO = "auto"

# A backend is a module with one function per op, `unavailable()` and `refuse(op, tensor)`, each giving a sentence or
# None, and `describe()`. It is imported when it is first considered.
_MODULES = {
    "cuda": "aksae_kernels.backends.cuda",
    "triton": "aksae_kernels.backends.triton",
    "cpu": "aksae_kernels.backends.native",
    "reference": "aksae_kernels.reference",
}
# By preference, per device type; other devices have the reference alone.
_CANDIDATES = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}
_FALLBACK = ("reference",)


class _Request(threading.local):
    """What `use_backend` asks for in this thread; the empty string means "as AKSAE_BACKEND says, else auto".

    torch.compile guards on attributes of a thread-local, as it does not on a ContextVar: a compiled function sees a
    change of backend and is specialised again. They are set in every thread, and are no defaults of the class: a read
    that finds an attribute of the class is guarded as one of the class alone.
    """

    def __init__(self) -> None:
        self.backend = ""
        self.outer: list[str] = []


_request = _Request()


class use_backend:
    """Context manager: ops called inside run on the named backend, or raise RuntimeError with the reason it cannot.

    `name` is one of the backends or `"auto"`. The setting holds for the thread that enters it, and no other: a new
    thread starts from the environment variable `AKSAE_BACKEND`, over which the setting wins. It is read at every call,
    inside `torch.compile(fullgraph=True)` too. A backward pass runs on the backend its forward was called with,
    whichever thread runs it; a forward that activation checkpointing computes again is a new call of the thread that
    does so, which for accelerators is one of autograd's own. Raises ValueError for an unknown name.
    """

    def __init__(self, name: str):
        if name != AUTO and name not in _MODULES:
            raise ValueError(f"backend must be one of {', '.join((AUTO, *_MODULES))}; got {name!r}")
        self.name = name

    def __enter__(self) -> None:
        _request.outer.append(_request.backend)
        _request.backend = self.name

    def __exit__(self, *exc_info) -> None:
        _request.backend = _request.outer.pop()


def requested() -> str:
    """The backend asked for: by `use_backend`, else by AKSAE_BACKEND, else `"auto"`.

    Empty while tracing where `use_backend` asked for none: a graph must not keep what the environment said then.
    """
    if _request.backend or torch.compiler.is_compiling():
        return _request.backend
    return os.environ.get("AKSAE_BACKEND") or AUTO


def available_backends() -> tuple[str, ...]:
    """Names of the backends that can run on this machine, fastest first; `reference` is always among them."""
    return tuple(name for name in _MODULES if _load(name).unavailable() is None)


def choose(op: str, name: str, tensor: Tensor) -> tuple[str, dict[str, str]]:
    """The backend that runs `op` on data like `tensor`, and the sentence of every candidate that refused before it.

    `name` is what the caller asked for: a backend, `"auto"`, or empty for what the environment says now. Raises
    RuntimeError where a backend asked for by name refuses, ValueError where AKSAE_BACKEND names none.
    """
    name = name or os.environ.get("AKSAE_BACKEND") or AUTO
    if name == AUTO:
        candidates = _CANDIDATES.get(tensor.device.type, _FALLBACK)
    elif name in _MODULES:
        candidates = (name,)
    else:
        raise ValueError(f"AKSAE_BACKEND must be one of {', '.join((AUTO, *_MODULES))}; got {name!r}")
    refusals: dict[str, str] = {}
    for candidate in candidates:
        reason = _refusal(candidate, op, tensor)
        if reason is None:
            return candidate, refusals
        refusals[candidate] = reason
    raise RuntimeError(
        "; ".join(f"backend {candidate!r} cannot run {op}: {why}" for candidate, why in refusals.items())
    )


def kernel(op: str, name: str, tensor: Tensor) -> Callable[..., Any]:
    """The function that runs `op`; warns once where a missing binary makes `auto` fall back to the reference."""
    chosen, refusals = choose(op, name, tensor)
    for candidate in refusals if chosen == "reference" else ():
        _warn_if_missing(candidate)
    return getattr(_load(chosen), op)


def explain_choice(op: str, tensor: Tensor) -> str:
    """The text of `explain`: a line for the choice, then one for each backend."""
    lines = []
    try:
        chosen, _ = choose(op, requested(), tensor)
        lines.append(f"{op} on {tensor.device.type}, {str(tensor.dtype).removeprefix('torch.')}: runs on {chosen!r}")
    except RuntimeError as refusal:
        lines.append(str(refusal))
    for name in _MODULES:
        reason = _refusal(name, op, tensor)
        lines.append(f"  {name}: {'accepts - ' + _load(name).describe() if reason is None else 'refuses - ' + reason}")
    return "\n".join(lines)


def _load(name: str) -> ModuleType:
    return importlib.import_module(_MODULES[name])


def _refusal(name: str, op: str, tensor: Tensor) -> str | None:
    backend = _load(name)
    return backend.unavailable() or backend.refuse(op, tensor)


_warned: set[str] = set()


def _warn_if_missing(name: str) -> None:
    reason = _load(name).unavailable()
    if reason is not None and name not in _warned:
        _warned.add(name)
        warnings.warn(
            f"aksae_kernels runs without its {name!r} backend, slowly: {reason}", RuntimeWarning, stacklevel=4
        )
