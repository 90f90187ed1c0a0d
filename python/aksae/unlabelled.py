"""A training run without labels, of any selection but the paper's mode: on activations that are there, or on text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from aksae_kernels import frozen

from .activations import resolve_device
from .callbacks import JsonLines, Progress
from .checkpoints import LOG
from .comparison import compare
from .config import BASELINE, COMPARED, SAEConfig, TrainConfig, cache_folder, has_baseline, selection_for, validate
from .data import collect_contexts, read_corpus
from .distributed import join_process_group, on_rank_0, own_device
from .errors import UserError
from .evaluate import read_checkpoints, write_evaluation
from .files import read_json, write_json
from .fit import fit
from .heldout import HeldOut
from .identity import require_same
from .metrics import ReconstructionMetrics
from .mixing import MixedBatches
from .pricing import CALIBRATED, calibrate
from .reading import Activations, open_activations
from .runs import TrainResult, check_output, fit_config, new_sae, start_run
from .sae import SAE
from .selections import TopK
from .shards import blocks_of
from .streaming import forward_blocks, stream_activations


@dataclass(frozen=True)
class _Rows:
    """What a run trains on and is evaluated on."""

    d_in: int
    batches: Callable[[], MixedBatches]
    """Gives the batches of a run from the first one on, the same to each SAE."""
    heldout: HeldOut
    identity: dict[str, Any]
    """What tells it from another."""


def train_unlabelled(config: TrainConfig, *, resume: bool = False) -> TrainResult:
    """Train the SAE that `config.selection` names, its baseline if it has one, and evaluate them on rows that were
    held out; see `aksae.train`.

    With `resume` the run in `config.output` goes on from its last checkpoint and ends with the same bits.

    Raises UserError for a setting or an input that is bad, and on resuming for other activations than it began with.
    """
    validate(config)
    device = own_device(resolve_device(config.device))
    join_process_group(device)
    if not resume:
        on_rank_0(lambda: check_output(config))
    rows = _read(config)
    if resume:
        _check_same(config, rows)
    else:
        on_rank_0(lambda: _start(config, rows))
    models = {config.selection: _train(config, rows, config.selection, resume)}
    if has_baseline(config):
        models[BASELINE] = _train(config, rows, BASELINE, resume)
    on_rank_0(lambda: _finish(config, models, rows, device))
    return TrainResult(config.output, read_json(config.output / "eval.json"))


def evaluate_unlabelled(config: TrainConfig) -> dict[str, Any]:
    """Evaluate the SAEs of a run again, and write and return its `eval.json`.

    Raises UserError for a folder without a checkpoint, for one that is another run's, and, naming what differs, for
    other activations than the run was trained on.
    """
    models = read_checkpoints(config.output, config)
    rows = _read(config)
    _check_same(config, rows)
    device = resolve_device(config.device)
    for sae in models.values():
        sae.to(device, torch.float32)
    return write_evaluation(config.output, _evaluate(models, rows, config, device))


def _train(config: TrainConfig, rows: _Rows, name: str, resume: bool) -> SAE:
    """One SAE of the run, which goes to the folder of its name."""
    selection = selection_for(config) if name == config.selection else TopK(config.k)
    sae = new_sae(config, SAEConfig(rows.d_in, config.d_sae, selection))
    callbacks = [JsonLines(config.output / LOG, model=name), Progress(name)]
    fit(sae, rows.batches(), fit_config(config, name, resume=resume, normalize="mean-norm"), callbacks)
    if selection.calibrated:
        calibrate(sae, rows.heldout.first_rows(CALIBRATED))
        on_rank_0(lambda: sae.save_pretrained(config.output / name))
    return sae


def _finish(config: TrainConfig, models: dict[str, SAE], rows: _Rows, device: torch.device) -> None:
    from .report import write_report

    write_evaluation(config.output, _evaluate(models, rows, config, device))
    if config.selection in COMPARED:
        write_report(config.output)


def _start(config: TrainConfig, rows: _Rows) -> None:
    start_run(config)
    write_json(config.output / "data.json", rows.identity)


def _read(config: TrainConfig) -> _Rows:
    if config.activations is not None:
        everything = open_activations(config.activations)
        train, held = everything.split(config.text.heldout_fraction)
        identity = {"activations": everything.identity(), "held-out rows": len(held)}
        blocks = list(blocks_of(held.shards, config.batch_size))
        heldout = HeldOut(blocks, "rows" if held.context is None else "contexts", held.context)
        return _Rows(train.d_in, _on_disk(train, config), heldout, identity)
    cache = cache_folder(config.cache)
    corpus = read_corpus(config.model, config.text, None, cache)
    model, per_forward = corpus.model, config.model.batch_size
    identity = {"model": model.name, **corpus.identity()}
    if config.stream:
        forwards = forward_blocks(model, corpus.heldout, contexts_per_forward=per_forward)
        order = np.concatenate([block.index for block in forwards])
        heldout = HeldOut.of_text(forwards, corpus.heldout, order, model.tokenizer)

        def batches() -> MixedBatches:
            return stream_activations(
                model, corpus.train, config.batch_size, contexts_per_forward=per_forward, seed=config.seed
            )

        return _Rows(model.d_model, batches, heldout, identity)
    train, held = (
        collect_contexts(model, contexts, cache, batch_size=per_forward) for contexts in (corpus.train, corpus.heldout)
    )
    blocks = list(blocks_of(held.shards, config.batch_size))
    heldout = HeldOut.of_text(blocks, corpus.heldout, np.arange(len(corpus.heldout)), model.tokenizer)
    return _Rows(model.d_model, _on_disk(train, config), heldout, identity)


def _on_disk(train: Activations, config: TrainConfig) -> Callable[[], MixedBatches]:
    return lambda: train.batches(config.batch_size, seed=config.seed)


def _check_same(config: TrainConfig, rows: _Rows) -> None:
    recorded = read_json(config.output / "data.json", needs=dict)
    now = {name: value for name, value in rows.identity.items() if name != "model"}
    require_same(f"{config.output}: what the run was trained on", recorded, now)


@torch.no_grad()
def _evaluate(models: dict[str, SAE], rows: _Rows, config: TrainConfig, device: torch.device) -> dict[str, Any]:
    """What `eval.json` holds: metrics over all rows held out, and of AdaptiveK what its report draws."""
    for name, sae in models.items():
        if sae.config.d_in != rows.d_in:
            raise UserError(f"{name}: got d_in {sae.config.d_in}, needs {rows.d_in}, that of the activations")
    measured = {name: _measure(sae, rows.heldout, config, device) for name, sae in models.items()}
    evaluation = {
        "rows": len(rows.heldout),
        "models": {name: metrics.result() for name, metrics in measured.items()},
    }
    if config.selection in COMPARED:
        evaluation |= compare(models, rows.heldout, config.k, seed=config.seed)
    return evaluation


def _measure(sae: SAE, heldout: HeldOut, config: TrainConfig, device: torch.device) -> ReconstructionMetrics:
    """The metrics over all held-out rows; `k_mean` is what the selection aims at."""
    metrics = ReconstructionMetrics(sae.config.d_in, sae.config.d_sae, device)
    with frozen(sae.W_enc):
        for block in heldout.blocks:
            x = block.checked().to(device, sae.W_dec.dtype)
            codes = sae.encode(x)
            metrics.update(x, sae.decode(codes), codes, torch.full_like(codes.counts, config.k))
    return metrics
