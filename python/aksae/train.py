"""A training run from text to report: labels, activations, probe, the two SAE phases, the baseline, evaluation."""

from __future__ import annotations

import json
import os
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from aksae_kernels.optim import SAEAdam

from .activations import resolve_device
from .config import SAEConfig, TrainConfig, absolute, adaptive_config, cache_folder, to_dict, validate
from .data import (
    LABELS,
    Batch,
    BatchReader,
    Corpus,
    Scores,
    Split,
    collect_activations,
    context_vectors,
    listed,
    read_corpus,
    score_corpus,
)
from .errors import Notice, UserError
from .evaluate import ADAPTIVE, BASELINE, evaluate, mean_l0, run_settings, write_evaluation
from .files import check_space, finite, nearest_folder, write_files, write_json
from .losses import DeadLatents, DeviationWeight, SAELoss, deviation, probe_loss, sae_loss
from .probe import ComplexityProbe, ProbeReport
from .sae import AdaptiveKSAE

Log = Callable[[dict[str, Any]], None]

_RUN_FILES = (
    "config.json",
    "data.json",
    LABELS,
    "metrics.jsonl",
    "probe.json",
    ADAPTIVE,
    BASELINE,
    "eval.json",
    "report.html",
)
_PROBE_HOLDOUT = 0.2


@dataclass(frozen=True)
class TrainResult:
    """A finished run."""

    folder: Path
    """Holds config, metrics, checkpoints, evaluation and report."""
    evaluation: dict[str, Any]
    """What `eval.json` holds; `evaluation["models"]` is the comparison table."""


def train(config: TrainConfig) -> TrainResult:
    """Train an AdaptiveK SAE on a language model's activations, in three phases, and a TopK SAE of equal L0 beside it.

    Beyond its options it differs from the authors' code in that batches are drawn in a new order each epoch, the probe
    term of phase 3 is a mean over the distinct contexts of a batch, and the default precision is fp32.

    Everything random follows `config.seed` and `config.text.seed`. Labels and activations are kept in the cache folder
    and used again by a run that reads the same; everything else goes to `config.output`, which is created once the
    inputs are known to be good. What can be checked is checked before anything is spent on: settings, devices, folders
    and the text's first document before the model is loaded; numbers of contexts and free disk, and for labels that are
    paid for that the model can read a context, before the first label.

    `data.json` in the folder says what the run was trained on, by digests of content, and `labels.safetensors` keeps
    the labels: an evaluation refuses anything else.

    Raises:
        UserError: a setting or an input is bad, `config.output` holds another run, or activations or the loss become
            NaN. Checkpoints written before that stay valid, as they do on KeyboardInterrupt and OSError.
    """
    from .report import write_report

    validate(config)
    device = resolve_device(config.device)
    resolve_device(config.model.device)
    _check_output(config)
    cache = cache_folder(config.cache)

    corpus = read_corpus(config.model, config.text, config.labels, cache)
    _check_corpus(config, corpus, cache)
    scores = score_corpus(corpus, config.labels, cache)
    _check_scores(config, scores)
    data = collect_activations(corpus, scores, cache, batch_size=config.model.batch_size)

    # Phase 1: the probe, in closed form.
    probe, probe_report = fit_probe(data.train, config)
    _start_run(config)
    _write_inputs(config, corpus, scores)
    counts = {"scored": scores.scored, "failed": scores.failed}
    write_json(config.output / "probe.json", {**probe_report.to_dict(), "scores": counts})

    # Phases 2 and 3: the SAE, first with the probe frozen, then with both.
    log = _json_lines(config.output / "metrics.jsonl")
    adaptive = AdaptiveKSAE(adaptive_config(config, data.train.store.d_in, probe_report.lam), generator=_seeded(config))
    adaptive.probe.load_state_dict(probe.state_dict())
    train_sae(adaptive, data.train, config, name=ADAPTIVE, log=log)
    models = {ADAPTIVE: adaptive}

    if config.baseline:
        # Equal L0 where the two are compared.
        reader = BatchReader(
            data.heldout.store, probe_reads=config.probe_reads, train_on=config.train_on, device=device
        )
        k = max(1, round(mean_l0(adaptive, reader, config.batch_size)))
        topk = AdaptiveKSAE(SAEConfig(adaptive.config.d_in, config.d_sae, k=k), generator=_seeded(config))
        train_sae(topk, data.train, config, name=BASELINE, log=log)
        models[BASELINE] = topk

    evaluation = evaluate(models, data.heldout, data.tokenizer, config, device)
    evaluation = write_evaluation(config.output, evaluation)
    write_report(config.output)
    return TrainResult(config.output, evaluation)


def fit_probe(split: Split, config: TrainConfig) -> tuple[ComplexityProbe, ProbeReport]:
    """Phase 1: the probe from what it reads of each context to the context's label.

    Of fewer contexts than `config.probe_folds` each is validated on in turn, which a `Notice` says.
    """
    fitted = len(split.labels) - round(len(split.labels) * _PROBE_HOLDOUT)
    folds = min(config.probe_folds, fitted)
    if folds < config.probe_folds:
        warnings.warn(
            f"probe_folds: got {config.probe_folds} for {fitted} contexts; validates on one after the other ({folds} "
            "folds)",
            Notice,
            stacklevel=2,
        )
    return ComplexityProbe.fit(
        context_vectors(split.store, config.probe_reads)(torch.arange(len(split.labels))),
        split.labels,
        lambdas=config.probe_lambdas,
        folds=folds,
        holdout=_PROBE_HOLDOUT,
        seed=config.seed,
        score_min=config.score_min,
        score_max=config.score_max,
    )


def train_sae(sae: AdaptiveKSAE, split: Split, config: TrainConfig, *, name: str, log: Log) -> None:
    """Phases 2 and 3 on `config.device`, in place; `sae` with a fixed k has no probe and stays in phase 2.

    Checkpoints go to `config.output / name`, the last one at the end. Every `config.log_every` steps, and for the last
    one, `log` gets a record of the step. On an accelerator nothing else waits for the device.

    Raises UserError naming step and contexts for NaN activations (before the step) and for a loss that is not finite
    (before the update on CPU; on an accelerator at the next record or checkpoint).
    """
    from tqdm import tqdm

    device = resolve_device(config.device)
    sae.to(device)
    reader = BatchReader(split.store, probe_reads=config.probe_reads, train_on=config.train_on, device=device)
    batches = reader.shuffled(config.batch_size, config.seed)
    dead = DeadLatents(sae.config.d_sae, config.dead_after, device)

    optimizer = SAEAdam(
        [{"params": [sae.W_enc, sae.b_enc, sae.b_dec]}, {"params": [sae.W_dec], "unit_norm_rows": True}],
        lr=config.lr,
        max_grad_norm=config.max_grad_norm,
    )
    decay_from = int(config.decay_start * config.steps)
    schedule = LambdaLR(optimizer, lambda step: lr_factor(step, config.warmup_steps, decay_from, config.steps))
    tuner = ProbeTuner(sae, config, len(split.labels)) if sae.probe is not None else None
    phase3_from = int(config.phase3_start * config.steps)

    with tqdm(total=config.steps * config.batch_size, unit="tok", unit_scale=True, desc=name) as bar:
        clock = _Clock()
        for step in range(config.steps):
            phase = 3 if tuner is not None and step >= phase3_from else 2
            batch = reader.read(next(batches), f"step {step}")
            if step == 0:
                sae.initialize_from(batch.x)

            k = reader.k(sae, batch)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
                loss = sae_loss(sae, batch.x, k, dead, sparsity_coef=config.sparsity_coef, aux_coef=config.aux_coef)
            logged = step % config.log_every == 0 or step == config.steps - 1
            saved = (step + 1) % config.checkpoint_every == 0 or step == config.steps - 1
            looked_at = logged or saved or device.type == "cpu"
            if looked_at and not loss.total.isfinite():
                raise UserError(_diverged(sae, batch, k, loss, step))

            loss.total.backward()
            optimizer.step()
            optimizer.zero_grad()
            lr = schedule.get_last_lr()[0]
            schedule.step()
            terms = {}
            if phase == 3:
                where = f"step {step} in {listed(batch.contexts)}" if looked_at else None
                terms = tuner.step(batch.probed, reader.put(split.labels[batch.contexts]), where)

            bar.update(config.batch_size)
            if logged:
                dead.look()
                record = {
                    "model": name,
                    "phase": phase,
                    "step": step,
                    "rows": (step + 1) * config.batch_size,
                    "lr": lr,
                    **_terms(loss, batch.x, k, dead),
                    **{key: float(terms[key]) if terms else None for key in ("probe", "deviation", "delta")},
                    "tokens_per_s": clock.rate((step + 1) * config.batch_size),
                }
                log(record)
                bar.set_postfix(fvu=f"{record['fvu']:.3f}", l0=f"{record['l0']:.0f}", dead=f"{record['dead']:.1%}")
            if saved:
                sae.save_pretrained(config.output / name)


class ProbeTuner:
    """Phase 3 of the probe: `probe_coef * (L_probe + delta * L_dev)`, Adam, and a clip and warm-up of its own.

    No gradient of the SAE loss reaches the probe, since k is rounded, so its step stands apart from the SAE's.
    """

    def __init__(self, sae: AdaptiveKSAE, config: TrainConfig, n_contexts: int):
        self.probe, self.config = sae.probe, config
        penalty = sae.config.probe_lambda or 0.0
        # `probe_loss` halves it.
        self.penalty = penalty if config.phase3_penalty == "published" else 2 * penalty / n_contexts
        self.fitted = [sae.probe.weight.detach().clone(), sae.probe.bias.detach().clone()]
        self.delta = DeviationWeight(sae.probe.weight.device)
        self.optimizer = torch.optim.Adam(sae.probe.parameters(), lr=config.lr)
        # Warms up again from its first step on, and never decays.
        self.schedule = LambdaLR(self.optimizer, lambda step: lr_factor(step, config.warmup_steps))

    def step(self, x: Tensor, labels: Tensor, where: str | None) -> dict[str, Tensor]:
        """Update the probe by what it reads of contexts, `x [n, D]`, and their `labels [n]`; the loss terms.

        Raises UserError, before the update, for a gradient that is not finite at `where`; None does not look.
        """
        delta = self.delta.value
        fit, moved = probe_loss(self.probe, x, labels, self.penalty), deviation(self.probe, *self.fitted)
        (self.config.probe_coef * (fit + delta * moved)).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.probe.parameters(), self.config.max_grad_norm)
        if where is not None and not norm.isfinite():
            raise UserError(f"probe loss: got a gradient of norm {float(norm)} at {where}, needs a finite one")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.delta.update(fit)
        return {"probe": fit.detach(), "deviation": moved.detach(), "delta": delta}


def lr_factor(step: int, warmup_steps: int, decay_from: int | None = None, steps: int = 0) -> float:
    """Share of the learning rate at a step: from 0 linearly to 1, and from `decay_from` linearly to 0 at `steps`."""
    factor = min(1.0, step / warmup_steps) if warmup_steps else 1.0
    if decay_from is not None and step > decay_from:
        factor = min(factor, (steps - step) / (steps - decay_from))
    return factor


class _Clock:
    """Rows per second since it was last asked."""

    def __init__(self):
        self.time, self.rows = time.perf_counter(), 0

    def rate(self, rows: int) -> float:
        now = time.perf_counter()
        rate = (rows - self.rows) / (now - self.time)
        self.time, self.rows = now, rows
        return rate


@torch.no_grad()
def _terms(loss: SAELoss, x: Tensor, k: Tensor, dead: DeadLatents) -> dict[str, float]:
    """The loss terms and the state of a step, read from the device."""
    variance = (x - x.mean(0)).square().mean()
    terms = {
        "loss": loss.total,
        "mse": loss.recon,
        "fvu": loss.recon / variance,
        "sparsity": loss.sparsity,
        "aux": loss.aux,
        "l0": loss.codes.counts.float().mean(),
        "k_mean": k.float().mean(),
        "dead": dead.mask().float().mean(),
    }
    return {name: float(value) for name, value in terms.items()}


@torch.no_grad()
def _diverged(sae: AdaptiveKSAE, batch: Batch, k: Tensor, loss: SAELoss, step: int) -> str:
    x_hat = sae.decode(sae.encode(batch.x, k, k_max=sae.k_bound))
    broken = batch.place[~x_hat.isfinite().all(-1)].cpu()
    where = f" in {listed(batch.contexts[broken])}" if len(broken) else ""
    return (
        f"loss: got {float(loss.total)} at step {step}{where}, needs a finite number; "
        "the activations are finite, a lower lr may help"
    )


def _seeded(config: TrainConfig) -> torch.Generator:
    return torch.Generator().manual_seed(config.seed)


def _json_lines(path: Path) -> Log:
    def log(record: dict[str, Any]) -> None:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(finite(record)) + "\n")

    return log


def _check_output(config: TrainConfig) -> None:
    """Raise UserError where `config.output` cannot become this run's folder."""
    folder = config.output
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output: got {folder}, a file, needs a folder")
    nearest = nearest_folder(folder)
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"output: got {folder}, needs a folder that can be made and written ({nearest} forbids it)")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / "config.json").is_file():
        raise UserError(f"output: got {folder}, which holds other files, needs a new or empty folder")
    if not config.overwrite:
        raise UserError(f"output: got {folder}, which holds another run, needs a new folder (or overwrite)")


def _check_corpus(config: TrainConfig, corpus: Corpus, cache: Path) -> None:
    """Raise UserError where a run on these contexts is known to fail later, when labels have been paid for."""
    _check_counts(config, len(corpus.train), len(corpus.heldout))
    d_in, models = corpus.model.d_model, 1 + config.baseline
    # One more than there are, since a checkpoint is complete before it replaces the last one.
    weights = 4 * (2 * config.d_sae * d_in + config.d_sae + d_in) * (models + 1)
    writes = [("output", config.output, weights)]
    if config.labels.scorer == "llm":
        rows = int(corpus.train.loss_mask.sum() + corpus.heldout.loss_mask.sum())
        writes.append(("cache", cache, 4 * rows * d_in))
        first = corpus.train.select([0])
        if not corpus.model.residual(first.input_ids, first.attention_mask).cpu()[first.loss_mask].isfinite().all():
            raise UserError(f"activations: got NaN or infinity in context 0 ({corpus.model}), needs numbers")
    check_space(*writes)


def _check_counts(config: TrainConfig, train: int, heldout: int) -> None:
    """Raise UserError where contexts are too few to validate the probe, or to take a variance among held-out rows."""
    needed = 2 if config.train_on == "last" else 1
    if train < 2 or heldout < needed:
        raise UserError(
            f"text.source: {config.text.source} gives {train} train and {heldout} held-out contexts with a label, "
            f"needs at least 2 and {needed}; more or longer documents, a shorter text.context_length, more "
            "text.max_tokens or another text.heldout_fraction give more"
        )


def _check_scores(config: TrainConfig, scores: Scores) -> None:
    """Raise UserError where too few contexts have a label, or one lies outside the range of scores."""
    _check_counts(config, *(int((~side.isnan()).sum()) for side in (scores.train, scores.heldout)))
    labels = torch.cat([scores.train, scores.heldout])
    labels = labels[~labels.isnan()]
    low, high = labels.min().item(), labels.max().item()
    if low < config.score_min:
        raise UserError(f"score_min: got {config.score_min}, needs at most {low:g}, the lowest label")
    if high > config.score_max:
        raise UserError(f"score_max: got {config.score_max}, needs at least {high:g}, the highest label")


def _start_run(config: TrainConfig) -> None:
    """Clear what a run to be overwritten left, and write the config."""
    # Hours may have passed since it was first looked at.
    _check_output(config)
    config.output.mkdir(parents=True, exist_ok=True)
    for name in _RUN_FILES:
        path = config.output / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    write_json(config.output / "config.json", to_dict(absolute(config)))


def _write_inputs(config: TrainConfig, corpus: Corpus, scores: Scores) -> None:
    """Write the labels, and what tells all that the run is trained on from anything else."""
    model = corpus.model
    trained_on = {
        "model": f"{model.name}, revision {model.revision}" if model.revision else model.name,
        **corpus.identity(),
        "labels": scores.digest(),
        **run_settings(config),
    }
    write_files({config.output / LABELS: scores.tensors(), config.output / "data.json": trained_on})
