"""Checkpoints of a training run: complete or not there, the last few kept, found again by a run that goes on."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .errors import UserError
from .files import WEIGHTS, atomic_file, check_writable, finite, read_pickle, write_files

_NAME = re.compile(r"checkpoint-(\d{9})")
_STATE = "state.pt"
LOG = "metrics.jsonl"
"""The log of a run, a record a line."""


def claim(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Make `folder` the place of a run, before it starts. With `overwrite` the run in it is removed.

    Raises UserError for a folder that cannot be written and, without `resume` and `overwrite`, for one with a run.
    """
    check_writable(folder, "output")
    if not resume:
        files = [path for name in (LOG, WEIGHTS) if (path := folder / name).is_file()]
        found = checkpoints(folder) + files
        if found and not overwrite:
            raise UserError(
                f"output: got {folder}, which holds another run ({found[-1].name}), needs a new folder, resume to go "
                "on with it, or overwrite"
            )
        for old in checkpoints(folder):
            _remove(old)
        for file in files:
            file.unlink()
    folder.mkdir(parents=True, exist_ok=True)


def write_checkpoint(folder: Path, step: int, state: dict[str, Any], save: Callable[[Path], None], keep: int) -> None:
    """Write `folder/checkpoint-STEP`, `state` in it and what `save` puts there, and drop all but the last `keep`.

    The folder gets its name when all is on the disk: whatever happens before leaves the checkpoints that were there.
    Raises OSError, naming the file, where the disk refuses.
    """
    path = folder / f"checkpoint-{step:09d}"
    temporary = folder / f".{path.name}.tmp"
    for left in (path, *folder.glob(".checkpoint-*")):
        # A folder of that name without a state, and what writes that were cut off have left.
        _remove(left)
    temporary.mkdir(parents=True)
    try:
        save(temporary)
        write_files({temporary / _STATE: state})
        for part in (temporary, *temporary.rglob("*")):
            _flush(part)
        os.replace(temporary, path)
        _flush(folder)
    finally:
        _remove(temporary)
    for old in checkpoints(folder)[:-keep]:
        _remove(old)


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, by step."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if _NAME.fullmatch(path.name) and (path / _STATE).is_file())


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `write_checkpoint` was given. Raises UserError as `read_pickle` does: nothing is run."""
    return read_pickle(checkpoint / _STATE)


def rng_state() -> dict[str, Any]:
    """The state of the generators that a run may draw from: torch's, on all devices, NumPy's and Python's."""
    version, numbers, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 - it is other people's that is kept
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "python": [version, list(numbers), gauss],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy(), *rest))  # noqa: NPY002 - and put back
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def cut_log(path: Path, step: int, common: Mapping[str, Any]) -> None:
    """Drop the records of a JSONL log that have the `common` fields and are of `step` or later, and a last line that is
    not whole."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break
        if record.get("step", -1) < step or any(record.get(name) != value for name, value in common.items()):
            kept.append(json.dumps(finite(record)) + "\n")
    with atomic_file(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")


def _flush(path: Path) -> None:
    """Return when the disk has what was written: a name without its content is no checkpoint."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(folder: Path) -> None:
    if not folder.exists():
        return
    if _NAME.fullmatch(folder.name):
        # Renamed first: half a checkpoint must not look like one.
        doomed = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(folder, doomed)
        folder = doomed
    shutil.rmtree(folder)
