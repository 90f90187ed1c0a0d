"""Which format files have: told by their names, or by the tensors of a file that is an SAE by itself."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError
from ..files import CONFIG, WEIGHTS, read_json, read_pickle, read_tensors
from .places import Place, place_of, some
from .reading import read_arrays, unwrapped

_LLAMASCOPIUM = [
    stem + ending
    for stem in ("sae_weights", "checkpoints/pruned", "checkpoints/final")
    for ending in (".safetensors", ".pt", ".dcp")
]

# The files that make a folder one SAE. Where a host takes several names, they stand in the order in which it looks.
FOLDERS: dict[str, list[tuple[str, ...]]] = {
    "native": [(CONFIG, WEIGHTS)],
    "adaptivek": [("dynamic_config.json", "probe.pt", "ae.pt")],
    "sparsify": [("cfg.json", "sae.safetensors")],
    "sae_lens": [("cfg.json", "sae_weights.safetensors")],
    "dictionary_learning": [("config.json", "ae.pt")],
    "llamascopium": [("config.json", weights) for weights in _LLAMASCOPIUM],
    "llama_scope": [("hyperparams.json", weights) for weights in _LLAMASCOPIUM],
    "gemma_scope": [("config.json", "params.safetensors")],
}


class Single(NamedTuple):
    """What tells that one file is an SAE by itself."""

    format: str
    name: str
    """A pattern of the file's name."""
    tensors: str
    """Patterns of names that it must have; it may have more."""
    known_as: str = ""
    """What the format's `unpack` calls the file."""


# Of several that fit a file, the first counts.
SINGLES = (
    Single("openai", "*.pt", "pre_bias latent_bias encoder.weight decoder.weight"),
    Single("dictionary_learning", "*.pt", "encoder.weight encoder.bias decoder.weight", "ae.pt"),
    Single("dictionary_learning", "*.pt", "encoder.weight gate_bias decoder.weight", "ae.pt"),
    Single("dictionary_learning", "*.pt", "W_enc b_enc W_dec b_dec threshold", "ae.pt"),
    Single("circuit_tracer", "*.safetensors", "W_enc b_enc W_dec b_dec activation_function.threshold"),
    # The weights of other formats have these names, too, and mean something else: the file's own name has to tell.
    Single("circuit_tracer", "layer_*.safetensors", "W_enc b_enc W_dec b_dec"),
    Single("circuit_tracer", "W_???_*.safetensors", "W_???_*"),
    Single("gemma_scope", "*.npz", "W_enc b_enc W_dec b_dec threshold", "params.npz"),
    Single("gemma_scope", "*.safetensors", "w_enc b_enc w_dec b_dec threshold", "params.safetensors"),
)


def find(path: str | Path, format: str | None = None) -> tuple[str, dict[str, Any]]:
    """The format of the SAE in `path`, and what its files hold, by their names within a folder of that format.

    Args:
        path: a folder, a file, or `owner/name[@revision][/folder or file]` on the Hugging Face hub.
        format: that of the files; None where names and tensors tell.

    Raises UserError naming what was found and what is needed.
    """
    place = place_of(path)
    try:
        return _found(place, format)
    except UserError as error:
        raise error if str(error).startswith(str(path)) else UserError(f"{path}: {error}") from error


def is_whole(format: str, files: Mapping[str, Any]) -> bool:
    """Whether `files` are all that a host of `format` reads."""
    return format not in FOLDERS or any(files.keys() >= set(layout) for layout in FOLDERS[format])


def _found(place: Place, format: str | None) -> tuple[str, dict[str, Any]]:
    layouts = _layouts(place.files)
    if place.chosen is not None:
        if format is None and any(place.chosen in layout for layout in layouts.values()):
            raise UserError("got one of the files of a folder, needs the folder, or the format to be given")
        return _of_file(place, place.chosen, format)
    if layouts:
        # A format of more files is the surer: the AdaptiveK authors' folders may have those of dictionary_learning.
        most = max(map(len, layouts.values()))
        names = [name for name, layout in layouts.items() if format == name or (format is None and len(layout) == most)]
        if not names:
            raise UserError(f"got files of {' and '.join(layouts)}, needs {format}'s: {_alternatives(format)}")
        if len(names) > 1:
            raise UserError(f"got files of {' and '.join(names)}, needs the format to be given: {', '.join(names)}")
        return names[0], {file: _read(place, file) for file in layouts[names[0]]}
    _refuse_incomplete(place.files, format)
    _refuse_several(place.files, format)
    weights = [name for name in place.files if _is_weights(name) and "/" not in name]
    if len(weights) == 1:
        return _of_file(place, weights[0], format)
    raise UserError(_unknown_folder(place.files, format))


def _of_file(place: Place, name: str, format: str | None) -> tuple[str, dict[str, Any]]:
    singles = [single for single in SINGLES if format in (None, single.format) and _is_called(single, name)]
    if not singles:
        needed = f"{format}'s: {_alternatives(format)}" if format else "the file of the weights, or the folder"
        raise UserError(f"got {name}, needs {needed}")
    content = _read(place, name)
    fitting = [single for single in singles if not _missing(single, content)]
    if not fitting and format is None:
        raise UserError(_unknown_file(name, content))
    single = (fitting or singles)[0]
    # A checkpoint of a run has other names than its last one, and the same settings.
    layouts = [layout for layout in FOLDERS.get(single.format, []) if single.known_as in layout]
    settings = {file: _read(place, file) for layout in layouts for file in layout[:-1] if file in place.files}
    return single.format, {**settings, single.known_as: content}


def _read(place: Place, name: str) -> Any:
    path = place.path(name)
    content = _READ.get(Path(name).suffix, read_pickle)(path)
    return content if name.endswith(".json") else unwrapped(name, content)


def _refuse_sharded(path: Path) -> None:
    raise UserError(f"{path}: got a distributed checkpoint, needs one file, such as sae_weights.safetensors")


_READ = {".json": read_json, ".safetensors": read_tensors, ".npz": read_arrays, ".dcp": _refuse_sharded}


def _is_called(single: Single, name: str) -> bool:
    return fnmatchcase(posixpath.basename(name), single.name)


def _missing(single: Single, content: Any) -> list[str]:
    """Those of its tensors that are not in `content`."""
    names = list(map(str, content)) if isinstance(content, Mapping) else []
    return [needed for needed in single.tensors.split() if not any(fnmatchcase(name, needed) for name in names)]


def _is_weights(name: str) -> bool:
    return name.endswith((".pt", ".safetensors", ".npz"))


def _layouts(files: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Which files they are, for each format whose files are all there."""
    there = set(files)
    complete = {name: [layout for layout in layouts if there.issuperset(layout)] for name, layouts in FOLDERS.items()}
    return {name: layouts[0] for name, layouts in complete.items() if layouts}


def _refuse_incomplete(files: Sequence[str], format: str | None) -> None:
    """UserError where several files of an SAE are there and one is not."""
    for name, layouts in FOLDERS.items():
        for layout in layouts if format in (None, name) else ():
            missing = [file for file in layout if file not in files]
            if len(layout) - len(missing) >= 2:
                there = " and ".join(file for file in layout if file in files)
                raise UserError(f"got {there} without {missing[0]}, needs all files of {name}: {', '.join(layout)}")


def _refuse_several(files: Sequence[str], format: str | None) -> None:
    """UserError with the folders below that are SAEs, where there are any."""
    inside: dict[str, list[str]] = {}
    for name in files:
        parts = name.split("/")
        for level in range(1, len(parts)):
            inside.setdefault("/".join(parts[:level]), []).append("/".join(parts[level:]))
    saes = [folder for folder, names in inside.items() if any(format in (None, of) for of in _layouts(names))]
    if saes:
        raise UserError(f"got a folder of {_count(saes, 'SAE')}, needs one of them: {some(saes)}")


def _unknown_folder(files: Sequence[str], format: str | None) -> str:
    weights = [name for name in files if _is_weights(name)]
    if weights:
        return f"got a folder of {_count(weights, 'file')} of weights, needs one of them: {some(weights)}"
    got = f"a folder of {some(files)}" if files else "an empty folder"
    formats = dict.fromkeys([*FOLDERS, *(single.format for single in SINGLES)]) if format is None else (format,)
    needed = "; ".join(f"{name}: {_alternatives(name)}" for name in formats)
    return f"got {got}, files of no format known here, needs those of one ({needed})"


def _unknown_file(name: str, content: Any) -> str:
    base = posixpath.basename(name)
    if not isinstance(content, Mapping):
        return f"got {type(content).__name__} in {base}, needs a state dictionary"
    folders = {of: layout for of, layouts in FOLDERS.items() for layout in layouts if name in layout}
    needed = [f"the folder of {of} ({', '.join(layout)})" for of, layout in folders.items()]
    singles = [single for single in SINGLES if _is_called(single, name)]
    # The nearest, where only few of its tensors are missing.
    near = [single for single in singles if 2 * len(_missing(single, content)) <= len(single.tensors.split())]
    for single in near or (singles if not needed else ()):
        needed.append(f"{', '.join(_missing(single, content))} for {single.format}")
    found = some([_shown(*item) for item in content.items()], 8) or "nothing"
    return f"got {found} in {base}, no SAE that is known here, needs {' or '.join(needed)}, or the format to be given"


def _shown(name: Any, value: Any) -> str:
    inner = f" (with {some(list(map(str, value)))})" if isinstance(value, Mapping) and value else ""
    return f"{name}{inner}"


def _alternatives(format: str) -> str:
    """What files of `format` are called."""
    folders = [" and ".join(layout) for layout in FOLDERS.get(format, [])[:1]]
    singles = [f"one {single.name}" for single in SINGLES if single.format == format and single.name.startswith("*")]
    return " or ".join(dict.fromkeys([*folders, *singles]))


def _count(names: Sequence[str], noun: str) -> str:
    return f"{len(names)} {noun}{'s' * (len(names) != 1)}"
