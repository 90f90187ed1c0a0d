"""The folder that collected activations are kept in: shards in safetensors, and a manifest that says what they are."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import UserError
from .files import dtype_name, read_json, write_files, write_json
from .identity import digest_of_file
from .shards import Shard, shards_of

MANIFEST = "manifest.json"
_OLD_RECORD = "store.json"


def is_store(folder: Path) -> bool:
    """Whether `aksae collect`, or version 0.1, wrote this folder."""
    return (folder / MANIFEST).is_file() or (folder / _OLD_RECORD).is_file()


def store_shards(folder: Path) -> tuple[list[Shard], dict[str, Any]]:
    """The shards of a complete store in their order, and its manifest.

    Raises UserError for one that is not complete, and naming the file that is missing, truncated or another's.
    """
    if not (folder / MANIFEST).is_file():
        return _old_store(folder)
    info = read_manifest(folder)
    missing = [entry for entry in info["shards"] if entry["sha256"] is None]
    if missing:
        raise UserError(
            f"{folder}: got {len(info['shards']) - len(missing)} of {len(info['shards'])} shards, needs all of them: "
            "collecting was cut off, and the same command goes on"
        )
    shards = []
    for entry in info["shards"]:
        (shard,) = shards_of(folder / entry["file"])
        got = {"rows": shard.n, "d_in": shard.d_in, "dtype": dtype_name(shard.dtype)}
        for name, needed in {"rows": entry["rows"], "d_in": info["d_in"], "dtype": info["dtype"]}.items():
            if got[name] != needed:
                raise UserError(f"{shard.path}: {name}: got {got[name]}, needs {needed}, as {MANIFEST} says")
        shards.append(shard)
    return shards, info


def stored_info(folder: Path) -> dict[str, Any]:
    """The manifest of a store, complete or not; of version 0.1, its record. Raises UserError where it is none."""
    return read_manifest(folder) if (folder / MANIFEST).is_file() else read_json(folder / _OLD_RECORD, needs=dict)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a store. Raises UserError where it is none."""
    path = folder / MANIFEST
    info = read_json(path, needs=dict)
    fields = {"key": str, "rows": int, "d_in": int, "dtype": str, "shards": list}
    for name, kind in fields.items():
        if not isinstance(info.get(name), kind):
            raise UserError(f"{path}: {name}: got {info.get(name)!r}, needs {kind.__name__}")
    for number, entry in enumerate(info["shards"]):
        if not isinstance(entry, dict) or not {"file", "rows", "contexts", "sha256"} <= entry.keys():
            raise UserError(f"{path}: shards: got {entry!r} for number {number}, needs file, rows, contexts and sha256")
    return info


def check_shards(folder: Path, info: dict[str, Any], *, verify: bool) -> dict[str, Any]:
    """The manifest `info` as far as its shards are there: one whose file is gone counts as not collected.

    Raises UserError for a shard that is truncated or, with `verify`, has other bytes than were collected.
    """
    entries = []
    for entry in info.get("shards", ()):
        path = folder / entry["file"]
        if not path.is_file():
            entry = {**entry, "sha256": None}
        elif entry["sha256"] is not None:
            shards_of(path)
            if verify and digest_of_file(path) != entry["sha256"]:
                raise UserError(
                    f"{path}: got other bytes than were collected, needs those; with the file moved elsewhere, the "
                    "same command collects it again"
                )
        entries.append(entry)
    return {**info, "shards": entries} if entries else info


def publish_shard(folder: Path, info: dict[str, Any], number: int, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write shard `number` of the store that `info` describes, and the manifest with it; what the manifest says then.

    Another process may do the same work: what it has done is taken over. Raises UserError where the disk refuses.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            if (folder / MANIFEST).is_file():
                there = read_manifest(folder)
                if (there["key"], _plan(there)) != (info["key"], _plan(info)):
                    raise UserError(f"{folder}: got other activations meanwhile, needs a folder of its own")
                info = check_shards(folder, there, verify=False)
            else:
                # First, so that shards never lie where nothing says what they are.
                write_json(folder / MANIFEST, info)
            entry = info["shards"][number]
            if entry["sha256"] is None:
                path = folder / entry["file"]
                write_files({path: tensors})
                shards = [*info["shards"]]
                shards[number] = {**entry, "sha256": digest_of_file(path)}
                info = {**info, "shards": shards}
                write_json(folder / MANIFEST, info)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror or error}); the shards that were done are kept, and the "
            "same command goes on"
        ) from error
    return info


def _plan(info: dict[str, Any]) -> list[Any]:
    return [(entry["rows"], entry["contexts"]) for entry in info["shards"]]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Alone in the folder; the lock ends with the process, however that ends."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _old_store(folder: Path) -> tuple[list[Shard], dict[str, Any]]:
    """What version 0.1 wrote: `x.npy`, `context.npy` and `store.json`."""
    info = read_json(folder / _OLD_RECORD, needs=dict)
    (x,) = shards_of(folder / "x.npy")
    try:
        context = torch.from_numpy(np.load(folder / "context.npy")).long()
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{folder / 'context.npy'}: got a file that NumPy cannot read ({error}), needs one") from error
    if [x.n, x.d_in] != info.get("shape") or len(context) != x.n:
        raise UserError(
            f"{folder}: got {x.n} rows of width {x.d_in} and {len(context)} contexts, needs {info.get('shape')}, as "
            f"{_OLD_RECORD} says"
        )
    return [Shard(x.path, 0, x.n, x.d_in, x.dtype, x.read, {"contexts": lambda: context})], info
