"""An SAE that was trained, and what is known of the language model that it is of."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .activations import LanguageModel
from .config import SELECTION_NAMES, ModelChoice, ModelConfig, TrainConfig, cache_folder
from .errors import UserError
from .files import CONFIG, WEIGHTS, read_json
from .runs import read_run
from .sae import SAE
from .sites import Hook, Site
from .store import MANIFEST, read_manifest


@dataclass(frozen=True)
class Finished:
    """See `open_finished`."""

    folder: Path
    """That of the SAE."""
    sae: SAE
    """On the CPU, float32, in eval mode."""
    run: TrainConfig | None
    """The run that trained it, `run.output` its folder; None for an SAE that lies in none."""
    model: ModelConfig | None
    """None where nothing says which one."""
    hook: Hook
    """Where in block `model.layer` it reads."""

    @property
    def site(self) -> Site:
        """Where it reads. Raises UserError where nothing says so."""
        return Site(self.known_model().layer, self.hook)

    def known_model(self) -> ModelConfig:
        """`model`. Raises UserError where nothing says which one."""
        if self.model is None:
            raise UserError(
                "model.name and model.layer: got none, need the language model that the SAE is of and the block that "
                f"it reads: {self.folder} does not say"
            )
        return self.model

    def load_model(self, context_length: int | None = None) -> LanguageModel:
        """The language model, to whose device the SAE is moved. Raises UserError where there is none that fits, or none
        that has room for contexts of `context_length`; None for the run's, if it reads text."""
        length = (self.run.text.context_length if self.reads_text else 0) if context_length is None else context_length
        cache = cache_folder(self.run.cache if self.run else None)
        model = LanguageModel.load(self.known_model(), cache, context_length=length)
        model.check_sites([self.site])
        if self.sae.config.d_in != model.d_model:
            raise UserError(f"{self.folder}: got d_in {self.sae.config.d_in}, needs {model.d_model}, that of {model}")
        self.sae.to(model.device)
        return model

    @property
    def reads_text(self) -> bool:
        """Whether its run reads text, rather than activations that were there."""
        return self.run is not None and self.run.activations is None

    def check_latent(self, latent: int) -> None:
        """Raise UserError where the SAE has no such latent."""
        if not 0 <= latent < self.sae.config.d_sae:
            raise UserError(f"latent: got {latent}, needs a number from 0 to {self.sae.config.d_sae - 1}")


def open_finished(path: Path, choice: ModelChoice | None = None, hook: Hook | None = None) -> Finished:
    """The SAE in `path`: the folder of an `aksae train` run, for the SAE that the run is about; or the folder of an
    SAE, in a run (such as its TopK baseline) or by itself.

    Model and place are those of the run, or of the folder of `aksae collect` that it was trained on, but for what
    `choice` and `hook` say. Raises UserError where there is no SAE, and for files that cannot be read.
    """
    if (path / WEIGHTS).is_file():
        folder, run = path, _run_around(path)
    elif (path / CONFIG).is_file():
        run = read_run(path)
        folder = path / run.selection
        if not (folder / WEIGHTS).is_file():
            raise UserError(f"{path}: got no checkpoint folder {run.selection}, needs a run that has reached one")
    else:
        raise UserError(
            f"run: got {path}, needs the folder of an `aksae train` run, or that of an SAE with {CONFIG} and {WEIGHTS}"
        )
    known = _known(run)
    there = known.pop("hook", None)
    sae = SAE.from_pretrained(folder).to(torch.float32)
    return Finished(folder, sae, run, (choice or ModelChoice()).over(known), hook or there or "resid_post")


def _run_around(folder: Path) -> TrainConfig | None:
    """The run that an SAE's folder lies in."""
    config = folder.absolute().parent / CONFIG
    if folder.absolute().name not in SELECTION_NAMES or not config.is_file():
        return None
    content = read_json(config)
    return read_run(config.parent) if isinstance(content, dict) and "selection" in content else None


def _known(run: TrainConfig | None) -> dict[str, Any]:
    """What a run says of model and place: fields of `ModelConfig`, and `hook`."""
    if run is None:
        return {}
    if run.activations is None:
        return {**dataclasses.asdict(run.model), "hook": "resid_post"}
    if not (run.activations / MANIFEST).is_file():
        return {}
    info = read_manifest(run.activations)
    dtype = info.get("identity", {}).get("model.dtype")
    known = {"name": info.get("model"), "layer": info.get("layer"), "dtype": dtype, "hook": info.get("site")}
    return {name: value for name, value in known.items() if value is not None}
