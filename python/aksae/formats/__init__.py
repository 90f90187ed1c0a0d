"""SAEs in the files of other projects: read, run, converted and written, without any of those projects installed.

| format              | files                                      | SAEs                    | transcoders          |
|---------------------|--------------------------------------------|-------------------------|----------------------|
| native              | `config.json`, `sae.safetensors`           | AdaptiveK, TopK         |                      |
| adaptivek           | `dynamic_config.json`, `ae.pt`, `probe.pt` | AdaptiveK               |                      |
| sparsify            | `cfg.json`, `sae.safetensors`              | TopK                    | TopK; skip           |
| sae_lens            | `cfg.json`, `sae_weights.safetensors`      | all four                | JumpReLU, ReLU; skip |
| dictionary_learning | `config.json`, `ae.pt`; or one `.pt`       | all four                |                      |
| openai              | one `.pt`                                  | TopK (layer norm), ReLU |                      |
| llamascopium        | `config.json`, `sae_weights.safetensors`   | TopK, JumpReLU, ReLU    | TopK, JumpReLU, ReLU |
| circuit_tracer      | one `.safetensors` a layer                 |                         | JumpReLU, ReLU; skip |
| gemma_scope, read   | `params.npz`; or `params.safetensors`      | JumpReLU                | JumpReLU; skip       |
| llama_scope, read   | `hyperparams.json`, `final.safetensors`    | TopK, JumpReLU, ReLU    | TopK, JumpReLU, ReLU |

SAEs that `aksae.fit` has trained are read from the native format whatever they are: BatchTopK, and Matryoshka as the
BatchTopK in it, is its threshold, and the scale of activations is folded into the weights.

What a file means is converted, not only its names: an SAE keeps its latents and its output, or it is refused with the
reason. Where a host lacks a part, it is folded into the weights, and `notes` say so. A module for each format has
`unpack`, and `needs` and `pack` if it is written, too; `finding` tells the formats apart.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

from ..config import to_dict
from ..errors import UserError
from ..files import CONFIG, WEIGHTS, write_files
from ..sae import SAE
from . import (
    adaptivek,
    circuit_tracer,
    dictionary_learning,
    gemma_scope,
    llama_scope,
    llamascopium,
    native,
    openai,
    sae_lens,
    sparsify,
)
from .finding import find, is_whole
from .folding import fit
from .stored import Origin, StoredSAE

__all__ = ["FORMATS", "WRITTEN", "Format", "StoredSAE", "WrittenFormat", "convert", "load", "save"]

WrittenFormat = Literal[
    "native",
    "adaptivek",
    "sparsify",
    "sae_lens",
    "dictionary_learning",
    "openai",
    "llamascopium",
    "circuit_tracer",
]
Format = Literal[WrittenFormat, "gemma_scope", "llama_scope"]
WRITTEN: tuple[WrittenFormat, ...] = get_args(WrittenFormat)
"""The formats that `save` knows, and `convert` as a target."""
FORMATS: tuple[Format, ...] = get_args(Format)
"""The formats that `load` knows."""

_MODULES = (
    native,
    adaptivek,
    sparsify,
    sae_lens,
    dictionary_learning,
    openai,
    llamascopium,
    circuit_tracer,
    gemma_scope,
    llama_scope,
)
_FORMATS: dict[str, ModuleType] = dict(zip(FORMATS, _MODULES, strict=True))


def load(path: str | Path, format: Format | None = None, **assumptions: Any) -> StoredSAE:
    """The SAE in `path`, on the CPU.

    Args:
        path: the folder or file that the host would be given, or where there is none of that name,
            `owner/name[@revision][/folder or file]` on the Hugging Face hub, of which what is read is downloaded.
        format: one of `FORMATS`; None where the names of the files or of the tensors tell.
        assumptions: what files may leave open. Of `adaptivek`: `steepness`, `score_min`, `score_max` (None: 6, 0 and
            10, as in the authors' code), `probe_reads` (None: last) and `probe_lambda`. Of `dictionary_learning`
            without its `config.json`: `dict_class` and `k`. Of `gemma_scope`: `transcoder` (None: False where no name
            of a folder tells). A note says what was assumed.

    Names of tensors are read without what DistributedDataParallel, FSDP or torch.compile put before them.

    Raises:
        UserError: a file is missing, truncated or not readable, asks for code to be run when opened, or describes
            something that a `StoredSAE` cannot be; a weight is NaN; the format is unknown, unclear or wrong; or the
            hub does not answer. The message names the file, the field or tensor, what it got and what it needs.
    """
    if format is not None:
        _module(format)
    name, files = find(path, format)
    module = _FORMATS[name]
    given = {key: value for key, value in assumptions.items() if value is not None}
    for key in given:
        if key not in _open(module):
            holders = [of for of, other in _FORMATS.items() if key in _open(other)]
            raise UserError(f"{key}: got it for {name}, needs {' or '.join(holders)}: others do not leave it open")
    # A folder of the hub's cache is called after its repository, wherever in it one stands.
    named = os.path.abspath(path) if os.path.exists(path) else str(path)
    told = module.told(named) if hasattr(module, "told") else {}
    try:
        return _unpacked(name, files, told, given)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def save(
    sae: StoredSAE | SAE, path: str | Path, format: WrittenFormat = "native", *, overwrite: bool = False
) -> tuple[str, ...]:
    """Write `sae` to `path`; its files are complete before the first takes its place, and the weights do so last.

    An SAE as `load` gave it, without assumptions, has its tensors and settings written back unchanged in its own
    format. In another the settings are the host's defaults, but for what the SAE computes and the names of model and
    hook.

    Args:
        sae: what `load` gave, or a model of this project.
        path: a folder; a name ending in `.pt` for `openai`, in `.safetensors` for `circuit_tracer`.
        format: one of `WRITTEN`.
        overwrite: whether what already stands there may be replaced.

    Returns:
        What was assumed, folded or left out on the way, in words; empty where the bits of all weights are as they were.

    Raises:
        UserError: the format cannot hold this SAE (the message says why), or the destination is there already.
        OSError: the disk refuses.
    """
    path, module = Path(path), _module(format, WRITTEN)
    _check_destination(path, module, format, overwrite)
    if isinstance(sae, SAE):
        sae = _unpacked("native", {CONFIG: to_dict(sae.config), WEIGHTS: sae.state_dict()}, {}, {})
    origin = sae.origin
    # What was given stands in no file of the origin's.
    if origin is not None and origin.format == format and not origin.assumptions and is_whole(format, origin.files):
        files = origin.files
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
    to: WrittenFormat,
    source_format: Format | None = None,
    overwrite: bool = False,
    **assumptions: Any,
) -> str:
    """`load` and `save` in one, returning a line that says what was done. Raises as they do."""
    sae = load(source, source_format, **assumptions)
    assert sae.origin is not None  # `load` names it
    notes = save(sae, target, to, overwrite=overwrite)
    return f"{sae}: {source} ({sae.origin.format}) -> {target} ({to}); {'; '.join(notes) or 'weights unchanged'}"


def _unpacked(name: str, files: dict[str, Any], told: Mapping[str, Any], given: Mapping[str, Any]) -> StoredSAE:
    sae = _FORMATS[name].unpack(files, **{**told, **given})
    object.__setattr__(sae, "origin", Origin(name, files, given))
    return sae


def _open(module: ModuleType) -> tuple[str, ...]:
    """What the files of a format may leave open."""
    return getattr(module, "OPEN", ())


def _reshaping_noted(sae: StoredSAE, format: Format) -> StoredSAE:
    if format == "sae_lens" or not (sae.hook_name or "").endswith("hook_z"):
        return sae
    note = f"reshaping {sae.hook_name} from [..., heads, d_head] to one vector is left to the caller"
    return replace(sae, notes=(*sae.notes, note))


def _module(name: str, known: tuple[str, ...] = FORMATS) -> ModuleType:
    if name not in known:
        only = ", which is only read" if name in FORMATS else ""
        raise UserError(f"format: got {name!r}{only}, needs one of {', '.join(known)}")
    return _FORMATS[name]


def _check_destination(path: Path, module: ModuleType, format: str, overwrite: bool) -> None:
    suffix = getattr(module, "SUFFIX", None)
    if suffix and path.suffix != suffix:
        raise UserError(f"{path}: got a name for {format}, needs one that ends in {suffix}")
    if path.exists() and path.is_file() != bool(suffix):
        raise UserError(f"{path}: got a {'file' if path.is_file() else 'folder'}, needs the other for {format}")
    if not overwrite and path.exists() and (path.is_file() or any(path.iterdir())):
        raise UserError(f"{path}: got a destination that exists, needs a new one, or overwrite")
