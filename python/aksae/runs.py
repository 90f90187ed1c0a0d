"""What every training run shares: its folder, and how it has its SAEs fitted."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .activations import resolve_device
from .checkpoints import LOG
from .config import ADAPTIVE, SELECTION_NAMES, SAEConfig, TrainConfig, absolute, from_dict, to_dict
from .data import LABELS
from .errors import UserError
from .files import check_writable, read_json, write_json
from .fit import FitConfig
from .sae import SAE

_RUN_FILES = (
    "config.json",
    "data.json",
    LABELS,
    LOG,
    "probe.json",
    *SELECTION_NAMES,
    "eval.json",
    "report.html",
)


@dataclass(frozen=True)
class TrainResult:
    """A finished run."""

    folder: Path
    """Holds config, metrics, checkpoints, evaluation and report."""
    evaluation: dict[str, Any]
    """What `eval.json` holds; `evaluation["models"]` is the comparison table."""


def read_run(folder: Path) -> TrainConfig:
    """The settings of the run in `folder`, to be gone on with there. Raises UserError for a folder without a run."""
    settings = read_json(folder / "config.json")
    if isinstance(settings, dict):
        # Runs of before there were others name no selection.
        settings = {"selection": ADAPTIVE, **settings}
    config = from_dict(TrainConfig, settings, str(folder / "config.json"))
    return dataclasses.replace(config, output=folder)


def check_output(config: TrainConfig) -> None:
    """Raise UserError where `config.output` cannot become this run's folder."""
    folder = config.output
    check_writable(folder, "output")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / "config.json").is_file():
        raise UserError(f"output: got {folder}, which holds other files, needs a new or empty folder")
    if not config.overwrite:
        raise UserError(f"output: got {folder}, which holds another run, needs a new folder (or overwrite)")


def start_run(config: TrainConfig) -> None:
    """Clear what a run to be overwritten left, and write the config."""
    # Hours may have passed since it was first looked at.
    check_output(config)
    config.output.mkdir(parents=True, exist_ok=True)
    # Evaluations elsewhere, too, are of what is to be overwritten.
    for path in [*(config.output / name for name in _RUN_FILES), *config.output.glob("eval-*.json")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    write_json(config.output / "config.json", to_dict(absolute(config)))


def fit_config(config: TrainConfig, name: str, *, resume: bool, **others: Any) -> FitConfig:
    """How the SAE `name` of a run is fitted; it is kept in the folder of that name. `others` are further settings."""
    return FitConfig(
        steps=config.steps,
        lr=config.lr,
        warmup_steps=config.warmup_steps,
        decay_start=config.decay_start,
        aux_coef=config.aux_coef,
        sparsity_coef=config.sparsity_coef,
        dead_after=config.dead_after,
        max_grad_norm=config.max_grad_norm,
        dtype=config.dtype,
        device=str(resolve_device(config.device)),
        output=config.output / name,
        resume=config.output / name if resume else None,
        # Whether another run may be replaced was decided for the whole of it.
        overwrite=True,
        log_every=config.log_every,
        checkpoint_every=config.checkpoint_every,
        **others,
    )


def new_sae(config: TrainConfig, sae: SAEConfig) -> SAE:
    """An SAE of a run, before its first step: those of one shape begin with the same weights."""
    return SAE(sae, generator=torch.Generator().manual_seed(config.seed))
