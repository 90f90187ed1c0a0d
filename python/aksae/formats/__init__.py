"""SAEs in the files of other projects: read, run, converted and written, without any of those projects installed.

| format                | files                                      | SAEs                    | transcoders          |
|-----------------------|--------------------------------------------|-------------------------|----------------------|
| `native`              | `config.json`, `sae.safetensors`           | AdaptiveK, TopK         |                      |
| `adaptivek`           | `dynamic_config.json`, `ae.pt`, `probe.pt` | AdaptiveK               |                      |
| `sparsify`            | `cfg.json`, `sae.safetensors`              | TopK                    | TopK; skip           |
| `sae_lens`            | `cfg.json`, `sae_weights.safetensors`      | all four                | JumpReLU, ReLU; skip |
| `dictionary_learning` | `config.json`, `ae.pt`                     | all four                |                      |
| `openai`              | one `.pt`                                  | TopK (layer norm), ReLU |                      |
| `llamascopium`        | `config.json`, `sae_weights.safetensors`   | TopK, JumpReLU, ReLU    | TopK, JumpReLU, ReLU |
| `circuit_tracer`      | one `.safetensors` a layer                 |                         | JumpReLU, ReLU; skip |

What a file means is converted, not only its names: an SAE keeps its latents and its output, or it is refused with the
reason. Where a host lacks a part, it is folded into the weights, and `notes` say so.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

from ..config import to_dict
from ..errors import UserError
from ..files import CONFIG, WEIGHTS, read_json, read_pickle, read_tensors, write_files
from ..sae import AdaptiveKSAE
from . import adaptivek, circuit_tracer, dictionary_learning, llamascopium, native, openai, sae_lens, sparsify
from .folding import fit
from .stored import Origin, StoredSAE

__all__ = ["FORMATS", "Format", "StoredSAE", "convert", "load", "save"]

Format = Literal[
    "native",
    "adaptivek",
    "sparsify",
    "sae_lens",
    "dictionary_learning",
    "openai",
    "llamascopium",
    "circuit_tracer",
]
FORMATS: tuple[Format, ...] = get_args(Format)
"""The formats `load`, `save` and `convert` know."""

_MODULES = (native, adaptivek, sparsify, sae_lens, dictionary_learning, openai, llamascopium, circuit_tracer)
_FORMATS = dict(zip(FORMATS, _MODULES, strict=True))
_READ = {".json": read_json, ".safetensors": read_tensors}


def load(path: str | Path, format: Format | None = None, **assumptions: Any) -> StoredSAE:
    """The SAE in `path`, a folder or a file, on the CPU.

    Args:
        path: what the host would be given.
        format: one of `FORMATS`; None where the names of the files tell.
        assumptions: of `adaptivek` files alone, what they do not hold: `steepness`, `score_min`, `score_max`
            (None: 6, 0 and 10, as in the authors' code), `probe_reads` (None: last) and `probe_lambda`. A note says
            what was assumed.

    Raises:
        UserError: a file is missing, truncated or not readable, asks for code to be run when opened, or describes
            something that a `StoredSAE` cannot be; or the format is unknown, unclear or wrong. The message names the
            file, the field or tensor, what it got and what it needs.
    """
    path = Path(path)
    name = _recognised(path) if format is None else format
    module = _module(name)
    assumptions = {name: value for name, value in assumptions.items() if value is not None}
    if assumptions and name != "adaptivek":
        raise UserError(f"{next(iter(assumptions))}: got it for {name}, needs adaptivek: others leave nothing open")
    files = {file: _READ.get((path / file).suffix, read_pickle)(path / file) for file in module.names(path)}
    try:
        return _unpacked(name, files, **assumptions)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def save(
    sae: StoredSAE | AdaptiveKSAE, path: str | Path, format: Format = "native", *, overwrite: bool = False
) -> tuple[str, ...]:
    """Write `sae` to `path`; its files are complete before the first takes its place, and the weights do so last.

    An SAE as `load` gave it, without assumptions, has its tensors and settings written back unchanged in its own
    format. In another the settings are the host's defaults, but for what the SAE computes and the names of model and
    hook.

    Args:
        sae: what `load` gave, or a model of this project.
        path: a folder; a name ending in `.pt` for `openai`, in `.safetensors` for `circuit_tracer`.
        format: one of `FORMATS`.
        overwrite: whether what already stands there may be replaced.

    Returns:
        What was assumed, folded or left out on the way, in words; empty where the bits of all weights are as they were.

    Raises:
        UserError: the format cannot hold this SAE (the message says why), or the destination is there already.
        OSError: the disk refuses.
    """
    path, module = Path(path), _module(format)
    _check_destination(path, module, format, overwrite)
    if isinstance(sae, AdaptiveKSAE):
        sae = _unpacked("native", {CONFIG: to_dict(sae.config), WEIGHTS: sae.state_dict()})
    # What was assumed stands in no file of the origin's.
    if sae.origin is not None and sae.origin.format == format and not sae.origin.assumptions:
        files = sae.origin.files
    else:
        try:
            sae = fit(_reshaping_noted(sae, format), module.needs(sae))
            files = module.pack(sae)
        except UserError as error:
            raise UserError(f"{format}: {error}") from error
    write_files({path / file: content for file, content in files.items()})
    return sae.notes


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: Format,
    source_format: Format | None = None,
    overwrite: bool = False,
    **assumptions: Any,
) -> str:
    """`load` and `save` in one, returning a line that says what was done. Raises as they do."""
    sae = load(source, source_format, **assumptions)
    notes = save(sae, target, to, overwrite=overwrite)
    return f"{sae}: {source} ({sae.origin.format}) -> {target} ({to}); {'; '.join(notes) or 'weights unchanged'}"


def _unpacked(name: Format, files: dict[str, Any], **assumptions: Any) -> StoredSAE:
    sae = _FORMATS[name].unpack(files, **assumptions)
    object.__setattr__(sae, "origin", Origin(name, files, assumptions))
    return sae


def _reshaping_noted(sae: StoredSAE, format: Format) -> StoredSAE:
    if format == "sae_lens" or not (sae.hook_name or "").endswith("hook_z"):
        return sae
    note = f"reshaping {sae.hook_name} from [..., heads, d_head] to one vector is left to the caller"
    return replace(sae, notes=(*sae.notes, note))


def _module(name: str) -> ModuleType:
    if name not in _FORMATS:
        raise UserError(f"format: got {name!r}, needs one of {', '.join(FORMATS)}")
    return _FORMATS[name]


def _recognised(path: Path) -> str:
    if not path.exists():
        raise UserError(f"{path}: got no such file or folder, needs an SAE's")
    for module in _MODULES:
        if path.is_file() and not hasattr(module, "SUFFIX") and path.name in module.names(path.parent):
            raise UserError(f"{path}: got one of the files of a folder, needs the folder, or the format to be given")
    found = [name for name, module in _FORMATS.items() if module.recognises(path)]
    if len(found) != 1:
        got = f"files of {' and '.join(found)}" if found else "files of no format known here"
        raise UserError(f"{path}: got {got}, needs the format to be given: {', '.join(found or FORMATS)}")
    return found[0]


def _check_destination(path: Path, module: ModuleType, format: str, overwrite: bool) -> None:
    suffix = getattr(module, "SUFFIX", None)
    if suffix and path.suffix != suffix:
        raise UserError(f"{path}: got a name for {format}, needs one that ends in {suffix}")
    if path.exists() and path.is_file() != bool(suffix):
        raise UserError(f"{path}: got a {'file' if path.is_file() else 'folder'}, needs the other for {format}")
    if not overwrite and path.exists() and (path.is_file() or any(path.iterdir())):
        raise UserError(f"{path}: got a destination that exists, needs a new one, or overwrite")
