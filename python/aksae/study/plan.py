"""What a study trains: its settings, and the SAEs by layer, budget, seed, selection and learning rate."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..config import (
    SELECTION_NAMES,
    LabelConfig,
    ModelConfig,
    SelectionName,
    TextConfig,
    TrainConfig,
    selection_for,
    validate_inputs,
)
from ..errors import UserError
from ..k_policy import KMap
from ..selections import AdaptiveK, Selection

PROBE_READS = "mean"
"""What the probe of the paper's AdaptiveK reads of a context: of a few hundred contexts, the mean of the tokens tells
the score far better than the last one."""


@dataclass
class StudyConfig:
    """A comparison of selections at equal L0: what is trained, and on what it is judged."""

    output: Path = Path("runs/study")
    """Folder of the study. A second run in it goes on where the first one stopped."""
    cache: Path | None = None
    """Folder for converted models, labels and activations; None for AKSAE_CACHE or ~/.cache/aksae."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The language model; `layers` says where it is read."""
    text: TextConfig = field(default_factory=lambda: TextConfig(max_tokens=1_000_000))
    layers: tuple[int, ...] = (15, 5)
    """Blocks whose output is read. The first has all budgets, the controls and the search; the others have
    `other_budgets`."""
    d_sae: int = 4096
    selections: tuple[SelectionName, ...] = SELECTION_NAMES
    budgets: tuple[int, ...] = (16, 40, 80, 144, 256)
    """Mean numbers of latents of a row."""
    other_budgets: tuple[int, ...] = (16, 80)
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the first weights and of the order of the rows."""
    lrs: tuple[float, ...] = (2e-3, 4e-3, 8e-3)
    """Learning rates that are tried for each selection, at the first seed and `search_budget`. The best, by FVU on the
    documents that calibrate, trains all of its SAEs."""
    search_budget: int = 80
    steps: int | None = None
    """Optimiser steps of every SAE; None for as many as show each token once."""
    batch_size: int = 512
    dead_after: int = 50_000
    """A latent is dead once it has not fired for this many rows."""
    calibration_share: float = 0.4
    """Share of the held-out documents that choose learning rates and calibrate; the others are judged by."""
    ce_selections: tuple[SelectionName, ...] = ("priced", "topk", "batch-topk")
    """Selections whose damage to the model's cross-entropy is measured, and that of TopK's weights at a price."""
    ce_contexts: int = 32
    """Contexts on which it is measured, from as many documents as there are."""
    control_rows: int = 2048
    """Held-out rows on which the controls are compared with what they are controls of."""
    synthetic: bool = False
    """Also compare the selections where the features are known, on SynthSAEBench's activations at a reduced size; needs
    sae-lens."""
    synthetic_steps: int = 3000
    """Optimiser steps of every SAE there."""
    device: str = "auto"

    def folder(self, trial: Trial) -> Path:
        """Where an SAE lies."""
        return self.output / "saes" / str(trial)


class Trial(NamedTuple):
    """One SAE of a study."""

    layer: int
    budget: int
    seed: int
    selection: SelectionName
    lr: float

    def __str__(self) -> str:
        return f"layer-{self.layer}_l0-{self.budget}_seed-{self.seed}_{self.selection}_lr-{self.lr:g}"

    def group(self) -> tuple[int, int, int, float]:
        """What trials share that are trained on one pass over the data."""
        return self.layer, self.budget, self.seed, self.lr


def validate_study(config: StudyConfig) -> None:
    """Raise UserError, naming the field, what it got and what it needs, where a study could not go well."""
    validate_inputs(config.model, config.text, LabelConfig())
    for name in ("layers", "selections", "budgets", "seeds", "lrs"):
        values = getattr(config, name)
        if not values or len(set(values)) < len(values):
            raise UserError(f"{name}: got {values}, needs at least one, and none twice")
    for name in ("batch_size", "ce_contexts", "control_rows", "synthetic_steps", "dead_after"):
        if getattr(config, name) < 1:
            raise UserError(f"{name}: got {getattr(config, name)}, needs a number from 1 up")
    if not 0 < config.calibration_share < 1:
        raise UserError(f"calibration_share: got {config.calibration_share}, needs a number between 0 and 1")
    if "adaptivek" in config.ce_selections:
        raise UserError(
            "ce_selections: got adaptivek, whose k comes from whole contexts, needs selections that see rows alone"
        )
    for lr in config.lrs:
        if not 0 < lr < float("inf"):
            raise UserError(f"lrs: got {lr}, needs numbers above 0")
    if config.steps is not None and config.steps < 1:
        raise UserError(f"steps: got {config.steps}, needs a number from 1 up")
    for budget in {*config.budgets, *config.other_budgets, config.search_budget}:
        for name in config.selections:
            selection_at(name, budget, config.d_sae).check(config.d_sae)


def selection_at(name: SelectionName, budget: int, d_sae: int) -> Selection:
    """The selection of that name with a mean of `budget` latents.

    The paper's has its range of k in the paper's proportion, 20 to 320 around a middle of 170.
    """
    if name == "adaptivek":
        return AdaptiveK(KMap(max(1, round(budget * 20 / 170)), min(d_sae, round(budget * 320 / 170))), PROBE_READS)
    return selection_for(TrainConfig(selection=name, k=budget, d_sae=d_sae))


def search_trials(config: StudyConfig) -> list[Trial]:
    """The SAEs that choose the learning rates."""
    first = config.layers[0], config.search_budget, config.seeds[0]
    return [Trial(*first, name, lr) for lr in config.lrs for name in config.selections]


def trials(config: StudyConfig, rates: dict[SelectionName, float]) -> list[Trial]:
    """The SAEs that are compared, seed by seed, so that what a study has after each is a whole comparison."""
    return [
        Trial(layer, budget, seed, name, rates[name])
        for seed in config.seeds
        for layer in config.layers
        for budget in (config.budgets if layer == config.layers[0] else config.other_budgets)
        for name in config.selections
    ]
