"""Files of weights and settings, each written under a temporary name and renamed when complete."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import pickle
import re
import shutil
import warnings
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import UserError

WEIGHTS, CONFIG = "sae.safetensors", "config.json"


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`: how files, settings and messages name a dtype."""
    return str(dtype).removeprefix("torch.")


def save_checkpoint(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write `config.json` and `sae.safetensors` into `folder`, as `write_files` does."""
    write_files({folder / CONFIG: config, folder / WEIGHTS: tensors})


def load_checkpoint(folder: Path, like: Mapping[str, Tensor], exact: Collection[str] = ()) -> dict[str, Tensor]:
    """The tensors of `sae.safetensors` in `folder`: names and shapes must be those of `like`, all of one float dtype
    but for those that `exact` names.

    Raises UserError naming the tensor, what it got and what it needs, for a file that `read_tensors` refuses, and for a
    tensor that is missing, unknown or of another shape or dtype.
    """
    path = Path(folder) / WEIGHTS
    tensors = read_tensors(path)
    for name in sorted(like.keys() ^ tensors.keys()):
        got, needed = ("none", "one") if name in like else ("one", f"only {', '.join(like)}")
        raise UserError(f"{path}: tensor {name}: got {got}, needs {needed}")
    dtype = tensors[min(like)].dtype
    for name, wanted in like.items():
        tensor = tensors[name]
        if tensor.shape != wanted.shape:
            raise UserError(f"{path}: tensor {name}: got shape {list(tensor.shape)}, needs {list(wanted.shape)}")
        if not tensor.is_floating_point() or (tensor.dtype != dtype and name not in exact):
            raise UserError(f"{path}: tensor {name}: got {tensor.dtype}, needs the one floating dtype of all tensors")
    return tensors


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU, each a map of the file: read where it is looked at.

    Raises UserError for a file that is missing, truncated (naming the tensor that is cut) or not safetensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise UserError(f"{path}: got no such file, needs a safetensors file")
    _check_length(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: got a file that is not safetensors ({error}), needs one that is") from error


def read_pickle(path: Path) -> Any:
    """What `torch.save` wrote to `path`, on the CPU: tensors, numbers, strings and containers of them, never code.

    Raises UserError for a file that is missing, truncated or not torch's, and for one that names anything else to be
    run when it is opened: that is never done.
    """
    return _unpickled(path, mmap=False)


def map_pickle(path: Path) -> Any:
    """The same, its tensors maps of the file, where it has the format of torch 1.6 or newer."""
    return _unpickled(path, mmap=zipfile.is_zipfile(path))


def _unpickled(path: Path, mmap: bool) -> Any:
    try:
        with warnings.catch_warnings():
            # Of another pickle protocol than torch's: it is read or refused all the same.
            warnings.filterwarnings("ignore", message="Detected pickle protocol", category=UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError as error:
        raise UserError(f"{path}: got no such file, needs one that torch.save wrote") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: got a pickle that is refused ({_refused(error)}), "
            "needs tensors, numbers and strings only; anything else could run code"
        ) from error
    except Exception as error:
        # What torch raises over bytes that are no pickle of its own is anything.
        reason = str(error).partition("\n")[0] or "it ends too early"
        raise UserError(f"{path}: got a file that torch cannot read ({reason}), needs one of torch.save") from error


def check_pickle(value: Any, name: str) -> None:
    """Raise UserError, naming `name`, for a value of which `read_pickle` would refuse the file."""
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception as error:
        # A pickle may fail with anything that the objects in it raise.
        raise UserError(
            f"{name}: got something that cannot be read back ({_refused(error)}), needs tensors, numbers, strings and "
            "containers of them"
        ) from error


def _refused(error: Exception) -> str:
    """What a pickle was refused for, in a few words."""
    found = re.search(r"GLOBAL \S+", str(error)) or re.search(r"Unsupported [^\n]+", str(error))
    return found[0] if found else str(error).partition("\n")[0] or "not readable"


def read_json(path: Path, needs: type = object) -> Any:
    """The JSON in `path`. Raises UserError where there is none, or something else than `needs`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: got no such file, needs a JSON file") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: got a file that is not readable JSON ({error}), needs one") from error
    if not isinstance(value, needs):
        raise UserError(f"{path}: got a JSON {type(value).__name__}, needs a {needs.__name__}")
    return value


def nearest_folder(path: Path) -> Path:
    """The path itself or, where it does not exist, the nearest of the folders it would be in that does."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def check_writable(folder: Path, argument: str) -> None:
    """Raise UserError, starting with `argument`, for what cannot become a folder that can be written."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{argument}: got {folder}, a file, needs a folder")
    nearest = nearest_folder(folder)
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"{argument}: got {folder}, needs a folder that can be made and written ({nearest} forbids it)")


def check_space(*writes: tuple[str, Path, int]) -> None:
    """Raise UserError where a disk has less room than is about to be written there: (argument, path, bytes) each."""
    disks: dict[int, list[tuple[str, Path, int]]] = {}
    for argument, path, size in writes:
        disks.setdefault(nearest_folder(path).stat().st_dev, []).append((argument, path, size))
    for there in disks.values():
        needed, free = sum(size for _, _, size in there), shutil.disk_usage(nearest_folder(there[0][1])).free
        if needed > free:
            arguments = " and ".join(f"{argument} ({path})" for argument, path, _ in there)
            raise UserError(f"{arguments}: got {free / 1e9:.2f} GB of free disk, needs {needed / 1e9:.2f} GB")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON; numbers that JSON does not know (NaN, infinities) become null."""
    write_files({path: value})


def write_text(path: Path, text: str) -> None:
    """Write a text, replaced as a whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_files(files: Mapping[Path, Any]) -> None:
    """Write files that belong together: `.json`, `.safetensors` of a dictionary of tensors, others by `torch.save`.

    All are complete under temporary names before the first takes its place; they do so in the order given. Folders are
    made where they are missing; tensors are written contiguous, and each with memory of its own.

    Raises OSError where the disk refuses; the files that stood there before stay.
    """
    for folder in {path.parent for path in files}:
        folder.mkdir(parents=True, exist_ok=True)
    with atomic_files(*files) as temporaries:
        for (path, content), temporary in zip(files.items(), temporaries, strict=True):
            try:
                _WRITERS.get(path.suffix, _write_pickle)(temporary, content)
            except OSError as error:
                number = error.errno or errno.EIO
                raise OSError(number, os.strerror(number), str(path)) from error


def finite(value: Any) -> Any:
    """`value` with every NaN and infinity in it replaced by None."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, which takes its place if the block succeeds and is removed if it does not."""
    with atomic_files(path) as (temporary,):
        yield temporary


@contextmanager
def atomic_files(*paths: Path) -> Iterator[list[Path]]:
    """The same for several: none takes its place, in the order given, before all are on the disk."""
    temporaries = [path.with_name(f".{path.name}.tmp") for path in paths]
    try:
        yield temporaries
        for temporary in temporaries:
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        for temporary, path in zip(temporaries, paths, strict=True):
            os.replace(temporary, path)
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(finite(value), indent=2) + "\n", encoding="utf-8")


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(_owned(tensors), path)
    except SafetensorError as error:
        # safetensors tells a failed write by the text alone; a full disk should look like one.
        code = re.search(r"os error (\d+)", str(error))
        raise OSError(int(code[1]) if code else errno.EIO, str(error)) from error
    # safetensors lets only the owner read it; it gets the mode that new files have here.
    path.chmod(mode)


def _write_pickle(path: Path, values: Mapping[str, Any]) -> None:
    with open(path, "wb") as file:
        try:
            torch.save(_owned(values), file)
        except RuntimeError as error:
            # torch closes its archive after a failed write, and fails once more: that hides what the disk said.
            first = error.__context__
            known = isinstance(first, (OSError, KeyboardInterrupt))
            raise (first if known else OSError(errno.EIO, str(error))) from error


_WRITERS = {".json": _write_json, ".safetensors": _write_tensors}


def _owned(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with every tensor contiguous, and alone in a memory of no more than its entries."""
    owned, seen = {}, set()
    for name, value in values.items():
        if isinstance(value, Mapping):
            value = _owned(value)
        elif isinstance(value, Tensor):
            value = value.detach().contiguous()
            memory = value.untyped_storage()
            if memory.nbytes() > value.nbytes or memory.data_ptr() in seen:
                value = value.clone()
            seen.add(memory.data_ptr())
        owned[name] = value
    return owned


def _check_length(path: Path) -> None:
    """Raise UserError naming the first tensor that the header promises and the file does not hold."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if not 8 < start <= size:
            raise UserError(f"{path}: got {size} bytes, needs a header of {start} bytes: the file is truncated")
        try:
            header = json.loads(file.read(start - 8))
            ends = {name: start + entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}
        except (ValueError, AttributeError, TypeError, LookupError, RecursionError) as error:
            raise UserError(f"{path}: got a header that is not safetensors' ({error}), needs one that is") from error
    for name, end in sorted(ends.items(), key=lambda item: item[1]):
        if end > size:
            raise UserError(f"{path}: tensor {name}: got a file of {size} bytes, needs {end}: the file is truncated")
