"""`aksae study`: selections compared at equal L0, with the same tokens, updates and search for a learning rate."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..activations import resolve_device
from ..config import FitConfig, LabelConfig, cache_folder, to_dict
from ..data import Split, collect_contexts, read_corpus, score_corpus
from ..errors import UserError
from ..files import CONFIG, check_writable, read_json, write_json
from ..identity import require_same
from ..sites import Site
from .layer import Layer
from .plan import StudyConfig, Trial, search_trials, selection_at, trials, validate_study
from .summary import summary
from .synthetic import Setup, World, measure_synthetic, search_lrs, synth_sae_bench

__all__ = ["StudyConfig", "study"]

_FIXED = ("model", "text", "d_sae", "steps", "batch_size", "calibration_share", "search_budget", "dead_after")
"""Settings that a study keeps; others may grow when it goes on."""


def study(config: StudyConfig, announce: Callable[[str], None] = print) -> dict[str, Any]:
    """Train and compare what `config` says, and return what `results.json` in its folder then holds.

    1. The learning rate of each selection: `lrs` at the first layer, the first seed and `search_budget`; the lowest FVU
       on the held-out documents that calibrate.
    2. Of each seed, layer and budget all selections, on the same rows in the same order; those of one rate on one pass.
    3. Each SAE on the other held-out documents, by its own rule and at a price (`aksae.adapt`), at a mean L0 that is
       the budget to 0.4 %; beside it stands the L0 to which the documents that calibrate alone led. At the first layer
       the controls (`aksae.study.controls`) with the weights of the TopK and the priced SAEs, and of every SAE
       sparse probing (`aksae.study.sparse_probing`); of TopK's latents, which firings a price drops
       (`aksae.study.firings`).
    4. The model's cross-entropy with SAEs spliced in.
    5. With `synthetic`, the same selections where the features are known (`aksae.study.synthetic`).

    Everything is kept in the study's folder as it ends: SAEs in `saes`, what was found of each in `search` and
    `records`, losses of the model in `ce`. A study that was cut off, or that got more seeds, budgets, layers or
    selections, goes on with what is missing; only the pass over the data that was cut off begins anew.

    Raises UserError for settings that are bad, for a folder that holds something else or a study of other data or
    settings, and for a model or a text that cannot be used.
    """
    validate_study(config)
    device, cache = resolve_device(config.device), cache_folder(config.cache)
    _claim(config)
    corpus = read_corpus(dataclasses.replace(config.model, layer=max(config.layers)), config.text, None, cache)
    corpus.model.check_predicts("cross-entropy")
    scores = score_corpus(corpus, LabelConfig(), cache)
    _check_data(config, {**corpus.identity(), "labels": scores.digest()})
    layers = {}
    for number in config.layers:
        collected = functools.partial(
            collect_contexts, corpus.model, cache=cache, batch_size=config.model.batch_size, site=Site(number)
        )
        layers[number] = Layer(
            config,
            number,
            Split(corpus.train, scores.train, collected(corpus.train)),
            Split(corpus.heldout, scores.heldout, collected(corpus.heldout)),
            device,
        )
    first = layers[config.layers[0]]
    steps = config.steps or max(1, len(first.train.store) // config.batch_size)
    announce(
        f"{len(first.train.store):,} tokens to train on in {steps} steps of {config.batch_size}; of those held out "
        f"{len(first.calibration):,} calibrate and {len(first.judged):,} judge"
    )
    search = search_trials(config)
    for group in _groups(search):
        first.fit_missing(group, steps)
    rates = {
        name: min((trial for trial in search if trial.selection == name), key=first.search_fvu).lr
        for name in config.selections
    }
    announce("learning rates: " + _listed(rates))
    planned = trials(config, rates)
    for seed in config.seeds:
        of_seed = [trial for trial in planned if trial.seed == seed]
        for group in _groups(of_seed):
            layer = layers[group[0].layer]
            layer.fit_missing(group, steps)
            for trial in group:
                layer.judge(trial)
                if layer is first:
                    layer.probe(trial, corpus.model.tokenizer)
                    if trial.selection == "topk":
                        layer.drops(trial, corpus.model.tokenizer)
        for number, layer in layers.items():
            layer.splice([trial for trial in of_seed if trial.layer == number], corpus.model)
    if config.synthetic:
        compare_with_truth(config, announce)
    described = {str(number): layer.described() for number, layer in layers.items()}
    found = summary(config, planned, {"steps": steps, "rates": rates, "layers": described})
    write_json(config.output / "results.json", found)
    return found


def compare_with_truth(
    config: StudyConfig, announce: Callable[[str], None], world: World | None = None, setup: Setup | None = None
) -> None:
    """Keep `synthetic/seed-N.json` for each seed: the records of `measure_synthetic`, with learning rates that are
    searched at a seed of their own.

    The budget is below the true mean number of features, since rows of rare ones, which an SAE has not learned, have
    too few latents for more. The paper's AdaptiveK has no text to read there. `world` and `setup` stand in for
    SynthSAEBench's at a size for a CPU. Raises UserError without sae-lens.
    """
    folder = config.output / "synthetic"
    missing = [seed for seed in config.seeds if not (folder / f"seed-{seed}.json").is_file()]
    if not missing:
        return
    world = synth_sae_bench() if world is None else world
    if setup is None:
        fitted = FitConfig(
            config.synthetic_steps,
            warmup_steps=config.synthetic_steps // 10,
            normalize="mean-norm",
            dead_after=config.dead_after,
        )
        setup = Setup(fitted)
    budget = max(1, round(0.7 * float(world.rows(setup.heldout_rows, seed=0)[1].sum(-1).double().mean())))
    selections = {name: selection_at(name, budget, setup.d_sae) for name in config.selections if name != "adaptivek"}
    path = folder / "rates.json"
    if not path.is_file():
        write_json(path, search_lrs(world, selections, config.lrs, setup, seed=max(config.seeds) + 1)[0])
    rates = read_json(path, needs=dict)
    announce(f"where the truth is known, L0 {budget}; learning rates: {_listed(rates)}")
    for seed in missing:
        write_json(folder / f"seed-{seed}.json", list(measure_synthetic(world, selections, rates, setup, seed=seed)))


def _listed(rates: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {lr:g}" for name, lr in rates.items())


def _groups(planned: Iterable[Trial]) -> list[list[Trial]]:
    """Trials by what one pass over the data shares, in the order of the first of each."""
    groups: dict[Any, list[Trial]] = {}
    for trial in planned:
        groups.setdefault(trial.group(), []).append(trial)
    return list(groups.values())


def _claim(config: StudyConfig) -> None:
    """Make the folder the study's. Raises UserError where it holds something else, or a study of other settings."""
    folder = config.output
    check_writable(folder, "output")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / CONFIG).is_file():
        raise UserError(f"output: got {folder}, which holds other files, needs a new folder or that of a study")
    settings = {name: value for name, value in to_dict(config).items() if name not in ("output", "cache", "device")}
    if (folder / CONFIG).is_file():
        fixed = {name: settings[name] for name in _FIXED}
        require_same(f"{folder}: settings of the study", read_json(folder / CONFIG, needs=dict), fixed)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG, settings)


def _check_data(config: StudyConfig, identity: dict[str, Any]) -> None:
    path = config.output / "data.json"
    # The model stops at the deepest layer, which may change from run to run.
    identity = {name: value for name, value in identity.items() if name != "model.layer"}
    if path.is_file():
        require_same(f"{config.output}: what the study was trained on", read_json(path, needs=dict), identity)
    write_json(path, identity)
