"""A training run without labels: any selection but AdaptiveK, on activations that are there, or on text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aksae_kernels import frozen

from .activations import resolve_device
from .callbacks import JsonLines, Progress
from .checkpoints import LOG
from .config import SAEConfig, TrainConfig, cache_folder, selection_for, validate
from .data import collect_contexts, read_corpus
from .distributed import join_process_group, on_rank_0, own_device
from .errors import UserError
from .evaluate import check_evaluated, write_evaluation
from .files import read_json, write_json
from .fit import fit
from .identity import require_same
from .metrics import ReconstructionMetrics
from .mixing import Block, MixedBatches
from .pricing import CALIBRATED, calibrate
from .reading import Activations, open_activations
from .runs import TrainResult, check_output, fit_config, seeded, start_run
from .sae import SAE
from .shards import blocks_of
from .streaming import forward_blocks, stream_activations


@dataclass(frozen=True)
class _Rows:
    """What a run trains on and is evaluated on."""

    d_in: int
    batches: MixedBatches
    heldout: Sequence[Block]
    identity: dict[str, Any]
    """What tells it from another."""


def train_unlabelled(config: TrainConfig, *, resume: bool = False) -> TrainResult:
    """Train the SAE that `config.selection` names and evaluate it on rows that were held out; see `aksae.train`.

    The folder of the run holds config, `data.json`, `metrics.jsonl`, the SAE in a folder of the selection's name, and
    `eval.json`. With `resume` the run in `config.output` goes on from its last checkpoint and ends with the same bits.

    Under `torchrun` each process reads rows of its own, and rank 0 writes.

    Raises UserError for a setting or an input that is bad, and on resuming for other activations than it began with.
    """
    validate(config)
    device = own_device(resolve_device(config.device))
    join_process_group(device)
    return _train(config, device, resume)


def evaluate_unlabelled(config: TrainConfig) -> dict[str, Any]:
    """Evaluate the SAE of a run again, and write and return its `eval.json`.

    Raises UserError for a folder without a checkpoint, for one that is another run's, and, naming what differs, for
    other activations than the run was trained on.
    """
    folder, name = config.output, config.selection
    if not (folder / name).is_dir():
        raise UserError(f"{folder}: got no checkpoint folder {name}, needs a run that has reached one")
    sae = SAE.from_pretrained(folder / name)
    if sae.config.selection != selection_for(config) or sae.config.d_sae != config.d_sae:
        raise UserError(
            f"{folder / name}: got the checkpoint of another run ({sae.config.selection}, d_sae {sae.config.d_sae}), "
            f"needs the run's ({selection_for(config)}, d_sae {config.d_sae})"
        )
    if (folder / "eval.json").exists():
        check_evaluated(folder, read_json(folder / "eval.json", needs=dict))
    rows = _read(config)
    _check_same(config, rows)
    device = resolve_device(config.device)
    return write_evaluation(folder, _evaluate(sae.to(device, torch.float32), rows, config, device))


def _train(config: TrainConfig, device: torch.device, resume: bool) -> TrainResult:
    if not resume:
        on_rank_0(lambda: check_output(config))
    rows = _read(config)
    if resume:
        _check_same(config, rows)
    else:
        on_rank_0(lambda: _start(config, rows))
    name = config.selection
    sae = SAE(SAEConfig(rows.d_in, config.d_sae, selection_for(config)), generator=seeded(config))
    callbacks = [JsonLines(config.output / LOG, model=name), Progress(name)]
    fit(sae, rows.batches, fit_config(config, name, resume=resume, normalize="mean-norm"), callbacks)
    if sae.config.selection.calibrated:
        calibrate(sae, _first_rows(rows.heldout, CALIBRATED))
        on_rank_0(lambda: sae.save_pretrained(config.output / name))
    evaluation = _evaluate(sae, rows, config, device)
    on_rank_0(lambda: write_evaluation(config.output, evaluation))
    return TrainResult(config.output, read_json(config.output / "eval.json"))


def _start(config: TrainConfig, rows: _Rows) -> None:
    start_run(config)
    write_json(config.output / "data.json", rows.identity)


def _read(config: TrainConfig) -> _Rows:
    if config.activations is not None:
        everything = open_activations(config.activations)
        train, heldout = everything.split(config.text.heldout_fraction)
        identity = {"activations": everything.identity(), "held-out rows": len(heldout)}
        return _rows_on_disk(train, heldout, config, identity)
    cache = cache_folder(config.cache)
    corpus = read_corpus(config.model, config.text, None, cache)
    model, per_forward = corpus.model, config.model.batch_size
    identity = {"model": model.name, **corpus.identity()}
    if config.stream:
        batches = stream_activations(
            model, corpus.train, config.batch_size, contexts_per_forward=per_forward, seed=config.seed
        )
        held = forward_blocks(model, corpus.heldout, contexts_per_forward=per_forward)
        return _Rows(model.d_model, batches, held, identity)
    train, heldout = (
        collect_contexts(model, contexts, cache, batch_size=per_forward) for contexts in (corpus.train, corpus.heldout)
    )
    return _rows_on_disk(train, heldout, config, identity)


def _rows_on_disk(train: Activations, heldout: Activations, config: TrainConfig, identity: dict[str, Any]) -> _Rows:
    batches = train.batches(config.batch_size, seed=config.seed)
    return _Rows(train.d_in, batches, list(blocks_of(heldout.shards, config.batch_size)), identity)


def _check_same(config: TrainConfig, rows: _Rows) -> None:
    recorded = read_json(config.output / "data.json", needs=dict)
    now = {name: value for name, value in rows.identity.items() if name != "model"}
    require_same(f"{config.output}: what the run was trained on", recorded, now)


def _first_rows(blocks: Sequence[Block], n: int) -> Tensor:
    """The first `n` rows of blocks, or all that there are, `[n, D]`."""
    taken, left = [], n
    for block in blocks:
        if left <= 0:
            break
        taken.append(block.checked()[:left])
        left -= len(taken[-1])
    return torch.cat(taken)


@torch.no_grad()
def _evaluate(sae: SAE, rows: _Rows, config: TrainConfig, device: torch.device) -> dict[str, Any]:
    """What `eval.json` holds: the metrics over the rows held out. `k_mean` is what the selection aims at."""
    if sae.config.d_in != rows.d_in:
        raise UserError(f"{config.selection}: got d_in {sae.config.d_in}, needs {rows.d_in}, that of the activations")
    metrics = ReconstructionMetrics(sae.config.d_in, sae.config.d_sae, device)
    with frozen(sae.W_enc):
        for block in rows.heldout:
            x = block.checked().to(device, sae.W_dec.dtype)
            codes = sae.encode(x)
            metrics.update(x, sae.decode(codes), codes, torch.full_like(codes.counts, config.k))
    return {"rows": sum(block.n for block in rows.heldout), "models": {config.selection: metrics.result()}}
