"""Where files are: in a folder of this machine or in a repository of the Hugging Face hub."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from ..errors import UserError

# A run holds its SAEs a few levels down; a folder that was given by mistake may hold anything.
_DEPTH, _MOST_FILES = 4, 20_000
_HUB_TIMEOUT_S = 5.0
_NAME_ON_HUB = re.compile(r"(?:hf:/+)?(?P<repository>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[^/]+))?(?:/(?P<inner>.*))?")
# Of Llamascopium: checkpoints that are folders of shards, which count as one file here.
_SHARDED = ".dcp"


class Place(NamedTuple):
    """A folder, and the file of it that was asked for, if it was a file."""

    files: Sequence[str]
    """The names of the files in and below the folder."""
    chosen: str | None
    path: Callable[[str], Path]
    """Where one of `files` is on this machine. One on the hub is downloaded; UserError where that fails."""


def place_of(path: str | Path) -> Place:
    """The folder or file `path`, or where there is none, `owner/name[@revision][/folder or file]` on the hub.

    Raises UserError where there is neither. A hub that does not answer has a few seconds; then a copy that was
    downloaded before counts.
    """
    local = Path(path)
    if local.is_dir():
        return Place(_listing(local), None, local.joinpath)
    if local.exists():
        # A checkpoint is described by the settings of its run, one level up.
        top = local.parents[1] if local.parent.name == "checkpoints" else local.parent
        return _within(_listing(top, depth=2), local.relative_to(top).as_posix(), top.joinpath)
    on_hub = _NAME_ON_HUB.fullmatch(str(path))
    # What begins like a folder that is here is a mistyped path, and no business of the hub's.
    if not on_hub or str(path).startswith((".", "~")) or Path(local.parts[0]).exists():
        raise UserError(
            f"{path}: got no such file or folder, needs an SAE's, or owner/name[@revision][/folder] on the hub"
        )
    repository, inner = on_hub["repository"], (on_hub["inner"] or "").strip("/")
    files, fetch = _on_hub(str(path), repository, on_hub["revision"] and unquote(on_hub["revision"]))
    place = _within(files, inner, fetch)
    if not place.files:
        folders = sorted({posixpath.dirname(name) for name in files} - {""})
        raise UserError(f"{path}: got no {inner!r} in {repository}, needs one of its folders: {some(folders)}")
    return place


def some(names: Sequence[str], shown: int = 4) -> str:
    """The first of `names`, and how many more there are."""
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")


def _within(files: Sequence[str], inner: str, path: Callable[[str], Path]) -> Place:
    """The place that `inner`, a file or folder, is among `files`."""
    chosen = inner in files
    folder = posixpath.dirname(inner) if chosen else inner
    if chosen and posixpath.basename(folder) == "checkpoints":
        folder = posixpath.dirname(folder)
    start = f"{folder}/" if folder else ""
    below = [name[len(start) :] for name in files if name.startswith(start)]
    return Place(below, inner[len(start) :] if chosen else None, lambda name: path(start + name))


def _listing(top: Path, depth: int = _DEPTH) -> list[str]:
    """Names of the files in `top` and below, the nearest first, `layers.2` before `layers.10`."""
    names, folders = [], [(top, "", 1)]
    for folder, prefix, level in folders:
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: _by_number(entry.name))
        except OSError:
            if folder == top:
                raise
            continue
        for entry in entries:
            name = prefix + entry.name
            if not entry.is_dir() or name.endswith(_SHARDED):
                names.append(name)
            elif level < depth and not entry.name.startswith("."):
                folders.append((Path(entry), f"{name}/", level + 1))
        if len(names) >= _MOST_FILES:
            break
    return names


def _by_number(name: str) -> list[tuple[str, int]]:
    """A key that sorts by the numbers in a name, not by their digits."""
    return [(text, int(digits or 0)) for text, digits in re.findall(r"([^0-9]*)([0-9]*)", name)]


def _on_hub(name: str, repository: str, revision: str | None) -> tuple[list[str], Callable[[str], Path]]:
    """The files of a repository, and what downloads one of them."""
    try:
        import huggingface_hub as hub

        info = hub.HfApi().model_info(repository, revision=revision, timeout=_HUB_TIMEOUT_S)
    # No such repository or revision, gated, no network, or any failure of whichever HTTP client the hub uses.
    except Exception as error:
        cached = _cached(repository, revision)
        if cached is None:
            raise UserError(
                f"{name}: got no such file or folder here, and nothing from the Hugging Face hub "
                f"({os.environ.get('HF_ENDPOINT', 'https://huggingface.co')} said: {_said(error)}); needs a path, "
                "or the hub: a name that it has, a network, HF_TOKEN where the repository is not public, or the files "
                "downloaded elsewhere and the path of their folder"
            ) from error
        return _listing(cached), cached.joinpath
    files = sorted({_unsharded(sibling.rfilename) for sibling in info.siblings or ()}, key=_nearest)

    def fetch(file: str) -> Path:
        try:
            # By its own name, since the cache finds nothing by the name of another revision.
            return Path(hub.hf_hub_download(repository, file, revision=revision))
        except Exception as error:
            raise UserError(
                f"{name}: got the list of its files from the hub, but not {file} ({_said(error)}); needs access "
                "to it: HF_TOKEN where its terms must be accepted, and space on the disk"
            ) from error

    return files, fetch


def _cached(repository: str, revision: str | None) -> Path | None:
    """The folder of what was downloaded before."""
    try:
        import huggingface_hub as hub

        return Path(hub.snapshot_download(repository, revision=revision, local_files_only=True))
    except Exception:
        return None


def _unsharded(name: str) -> str:
    start, sharded, _ = name.partition(f"{_SHARDED}/")
    return start + sharded.rstrip("/")


def _nearest(name: str) -> tuple[int, list[tuple[str, int]]]:
    return name.count("/"), _by_number(name)


def _said(error: BaseException) -> str:
    first_line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first_line}"
