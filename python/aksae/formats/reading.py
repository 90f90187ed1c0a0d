"""Fields and tensors taken from a file by name: each refusal says which, what it got and what it needs."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_REQUIRED = object()
# What DistributedDataParallel and DataParallel, torch.compile, FSDP and activation checkpointing put into names.
_WRAPPERS = re.compile(r"^module\.|(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


class Fields:
    """The settings in a JSON file or a pickled dictionary."""

    def __init__(self, file: str, values: Any):
        if not isinstance(values, Mapping):
            raise UserError(f"{file}: got {type(values).__name__}, needs an object")
        self.file = file
        self._values = values

    def get(self, name: str, default: Any = None) -> Any:
        """Whatever stands under `name`, unchecked; `default` where there is none or null."""
        value = self._values.get(name)
        return default if value is None else value

    def take(self, name: str, kind: type, default: Any = _REQUIRED) -> Any:
        """The value of `name`, of type `kind` and finite; `default` where there is none or null.

        UserError for any other value, and where there is neither a value nor a default.
        """
        value = self.get(name)
        if value is None:
            if default is _REQUIRED:
                raise UserError(f"{self.file}: {name}: got none, needs {kind.__name__}")
            return default
        if kind is float:
            return number(f"{self.file}: {name}", value)
        if type(value) is not kind:
            raise UserError(f"{self.file}: {name}: got {shown(value)}, needs {kind.__name__}")
        return value

    def inner(self, name: str) -> Fields:
        """The object under `name`; an empty one where there is none."""
        return Fields(f"{self.file}: {name}", self._values.get(name) or {})

    def filled(self, **given: Any) -> Fields:
        """These settings with `given`, of which None counts for nothing; UserError where both say, and differ."""
        given = {name: value for name, value in given.items() if value is not None}
        for name, value in given.items():
            if self.get(name, value) != value:
                raise UserError(f"{name}: got {value!r}, needs {self.get(name)!r}, what {self.file} says")
        return Fields(self.file, {**self._values, **given})

    def expect(self, name: str, kind: type, wanted: Any, reason: str) -> None:
        """UserError with `reason` where `name` is there and not `wanted`."""
        if self.take(name, kind, wanted) != wanted:
            raise UserError(f"{self.file}: {name}: got {self._values[name]!r}, needs {wanted!r}: {reason}")


class Tensors:
    """The tensors of one file, each taken once; what is left at the end is refused."""

    def __init__(self, file: str, tensors: Any):
        if not isinstance(tensors, Mapping):
            raise UserError(f"{file}: got {type(tensors).__name__}, needs a dictionary of tensors")
        for name, tensor in tensors.items():
            if isinstance(tensor, Tensor) and not _is_whole(tensor):
                raise UserError(
                    f"{file}: tensor {name}: got {shown(tensor)} without its entries, needs every one stored"
                )
        self.file = file
        self._left = dict(tensors)
        self._dtype: torch.dtype | None = None

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def take(self, name: str, *shape: int | None, any_float: bool = False) -> Tensor:
        """The tensor `name` of `shape`, None standing for any size; of the floating dtype of those taken before,
        or with `any_float` of any."""
        tensor = self._left.pop(name, None)
        needed = ", ".join("any" if size is None else str(size) for size in shape)
        if not isinstance(tensor, Tensor):
            got = "none" if tensor is None else type(tensor).__name__
            raise UserError(f"{self.file}: tensor {name}: got {got}, needs one of shape [{needed}]")
        fits = tensor.ndim == len(shape) and all(n in (None, m) for m, n in zip(tensor.shape, shape))
        if not fits:
            raise UserError(f"{self.file}: tensor {name}: got shape {list(tensor.shape)}, needs [{needed}]")
        if tensor.dtype not in _DTYPES or tensor.layout != torch.strided:
            got = f"{tensor.dtype} in layout {tensor.layout}"
            raise UserError(f"{self.file}: tensor {name}: got {got}, needs a floating dtype, dense")
        if tensor.isnan().any():
            raise UserError(
                f"{self.file}: tensor {name}: got NaN in {int(tensor.isnan().sum())} of {tensor.numel()} entries, "
                "needs numbers: the training diverged, or the file is damaged"
            )
        if not any_float:
            self._dtype = self._dtype or tensor.dtype
            if tensor.dtype != self._dtype:
                raise UserError(f"{self.file}: tensor {name}: got {tensor.dtype}, needs {self._dtype}, as those before")
        return tensor.detach()

    def take_if(self, name: str, *shape: int | None) -> Tensor | None:
        """`take`, or None where there is no such tensor."""
        return self.take(name, *shape) if name in self else None

    def pop(self, name: str, default: Any = None) -> Any:
        """Whatever stands under `name`, unchecked."""
        return self._left.pop(name, default)

    def finish(self, *ignored: str) -> None:
        """UserError for a tensor that was neither taken nor is `ignored`."""
        for name in self._left:
            if name not in ignored:
                raise UserError(f"{self.file}: tensor {name}: got one, needs none: its meaning is not known here")


def unwrapped(file: str, content: Any) -> Any:
    """`content` with the names that its tensors have in the module itself, outside what wraps it.

    UserError where two names become one.
    """
    if not isinstance(content, Mapping):
        return content
    bare: dict[Any, Any] = {}
    for name, value in content.items():
        short = name
        while isinstance(short, str) and _WRAPPERS.search(short):
            short = _WRAPPERS.sub("", short)
        if short in bare:
            raise UserError(f"{file}: tensor {name}: got {short} a second time, needs it once")
        bare[short] = unwrapped(file, value)
    return bare


def read_arrays(path: Path) -> dict[str, Tensor]:
    """The arrays of an `.npz` file as tensors, never code. Raises UserError for a file that is no such."""
    import numpy as np

    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except FileNotFoundError as error:
        raise UserError(f"{path}: got no such file, needs one of numpy.savez") from error
    # What NumPy and zipfile raise over bytes that are no archive of arrays is anything.
    except Exception as error:
        raise UserError(
            f"{path}: got a file that numpy cannot read as numbers ({error}), needs one of numpy.savez"
        ) from error


def number(name: str, value: Any) -> float:
    """The finite number that `value` is, or that it holds as a tensor without dimensions; UserError for any other."""
    if isinstance(value, Tensor) and value.ndim == 0 and not value.is_complex():
        value = value.item()
    # Larger ones are no float.
    if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
        raise UserError(f"{name}: got {shown(value)}, needs a finite number")
    return float(value)


def whole(name: str, value: Any) -> int:
    """The integer that `value` is or holds, as `number` reads it; UserError for any other."""
    if not number(name, value).is_integer():
        raise UserError(f"{name}: got {shown(value)}, needs an integer")
    return int(value)


def shown(value: Any) -> str:
    """`value` in a message, on one line."""
    if isinstance(value, Tensor) and value.ndim:
        return f"a tensor of shape {list(value.shape)}"
    return repr(value.item() if isinstance(value, Tensor) and not value.is_meta else value)


def assumed(values: Mapping[str, Any]) -> str:
    """The note of a reader that took `values` for what its files leave open, and the options that give others."""
    said = [f"{name} = {f'{value:g}' if type(value) is float else value}" for name, value in values.items()]
    options = [f"--{name.replace('_', '-')}" for name in values]
    return f"assumed, since the files do not say: {', '.join(said)} (other values: {', '.join(options)})"


def _is_whole(tensor: Tensor) -> bool:
    """Whether memory holds each entry of `tensor`: neither on the meta device nor expanded from fewer."""
    if tensor.layout != torch.strided:
        return True
    return not tensor.is_meta and tensor.untyped_storage().nbytes() >= tensor.nbytes


def agree(file: str, name: str, got: int, needed: int) -> None:
    """UserError where a size in the settings is not that of the tensors."""
    if got != needed:
        raise UserError(f"{file}: {name}: got {got}, needs {needed}, what the tensors have")
