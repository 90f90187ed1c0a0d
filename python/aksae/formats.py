"""Checkpoints and other files of a run, each written under a temporary name and renamed when complete."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import UserError

WEIGHTS, CONFIG = "sae.safetensors", "config.json"


def save_checkpoint(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write `config.json` and `sae.safetensors` into `folder`, each replaced as a whole; the weights come last.

    Raises OSError where the disk refuses; the weights that stood there before stay.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG, config)
    with atomic_file(folder / WEIGHTS) as temporary:
        try:
            save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, temporary)
        except SafetensorError as error:
            # safetensors tells a failed write by the text alone; a full disk should look like one.
            code = re.search(r"os error (\d+)", str(error))
            number = int(code[1]) if code else errno.EIO
            raise OSError(number, os.strerror(number), str(folder / WEIGHTS)) from error
        # safetensors lets only the owner read it; the config has the mode that new files have here.
        shutil.copymode(folder / CONFIG, temporary)


def load_checkpoint(folder: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `sae.safetensors` in `folder`: names and shapes must be those of `like`, all of one float dtype.

    Raises UserError naming the tensor, what it got and what it needs, for a file that is missing, truncated or not
    safetensors, and for a tensor that is missing, unknown or of another shape or dtype.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(folder) / WEIGHTS
    if not path.is_file():
        raise UserError(f"{path}: got no such file, needs a checkpoint's weights")
    _check_length(path)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: got a file that safetensors cannot read ({error}), needs a checkpoint") from error
    for name in sorted(like.keys() ^ tensors.keys()):
        got, needed = ("none", "one") if name in like else ("one", f"only {', '.join(like)}")
        raise UserError(f"{path}: tensor {name}: got {got}, needs {needed}")
    dtype = tensors[min(like)].dtype
    for name, wanted in like.items():
        tensor = tensors[name]
        if tensor.shape != wanted.shape:
            raise UserError(f"{path}: tensor {name}: got shape {list(tensor.shape)}, needs {list(wanted.shape)}")
        if not tensor.is_floating_point() or tensor.dtype != dtype:
            raise UserError(f"{path}: tensor {name}: got {tensor.dtype}, needs the one floating dtype of all tensors")
    return tensors


def read_json(path: Path) -> Any:
    """The JSON in `path`. Raises UserError where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: got no such file, needs a JSON file") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: got a file that is not readable JSON ({error}), needs one") from error


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON; numbers that JSON does not know (NaN, infinities) become null."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(finite(value), indent=2) + "\n", encoding="utf-8")


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
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
        except (ValueError, AttributeError, TypeError, LookupError) as error:
            raise UserError(f"{path}: got a header that is not safetensors' ({error}), needs a checkpoint") from error
    for name, end in sorted(ends.items(), key=lambda item: item[1]):
        if end > size:
            raise UserError(
                f"{path}: tensor {name}: got a file of {size} bytes, needs {end}: the checkpoint is truncated"
            )
