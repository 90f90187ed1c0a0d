"""A training run of the paper's mode: labels, activations, probe, the two SAE phases, the baseline, evaluation."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from .activations import resolve_device
from .batches import Batch, listed
from .callbacks import Callback, JsonLines, Log, Progress, Records
from .checkpoints import LOG
from .config import ADAPTIVE, BASELINE, SAEConfig, TrainConfig, adaptive_config, cache_folder, has_baseline, validate
from .data import (
    LABELS,
    BatchReader,
    Corpus,
    Scores,
    Split,
    collect_activations,
    context_vectors,
    read_corpus,
    score_corpus,
)
from .errors import Notice, UserError
from .evaluate import evaluate, mean_l0, run_settings, write_evaluation
from .files import check_space, write_files, write_json
from .fit import fit
from .learner import lr_factor
from .losses import DeviationWeight, deviation, probe_loss
from .probe import ComplexityProbe, ProbeReport
from .runs import TrainResult, check_output, fit_config, new_sae, start_run
from .sae import SAE
from .selections import TopK

_PROBE_HOLDOUT = 0.2


def train(config: TrainConfig, *, resume: bool = False) -> TrainResult:
    """Train the SAE that `config` asks for, with a k for each row and a TopK SAE of equal L0 beside it by default.

    The selections but `adaptivek` need no labels: `priced`, the default, and `need` take the k of a row from what the
    SAE makes of it. Their runs hold config, `data.json`, `metrics.jsonl`, each SAE in a folder of its selection's name,
    `eval.json` and, with `priced` and `need`, `report.html`. Under `torchrun` each process reads rows of its own, and
    rank 0 writes.

    `adaptivek` is the paper's mode: labels, a probe of them, an SAE with the probe frozen, then both. Beyond its
    options it differs from the authors' code in that batches are drawn in a new order each epoch, the probe term of
    phase 3 is a mean over the distinct contexts of a batch, and the default precision is fp32.

    Everything random follows `config.seed` and `config.text.seed`. Labels and activations are kept in the cache folder
    and used again by a run that reads the same; everything else goes to `config.output`, which is created once the
    inputs are known to be good. What can be checked is checked before anything is spent on: settings, devices, folders
    and the text's first document before the model is loaded; numbers of contexts and free disk, and for labels that are
    paid for that the model can read a context, before the first label.

    With `resume` the run in `config.output` goes on from its last checkpoint, and ends with the same bits as one that
    was not cut off: labels and activations come out of the cache or are made again, the probe is fitted again.

    `data.json` in the folder says what the run was trained on, by digests of content, and `labels.safetensors` keeps
    the labels: an evaluation refuses anything else.

    Raises:
        UserError: a setting or an input is bad, `config.output` holds another run, or activations or the loss become
            NaN. Checkpoints written before that stay valid, as they do on KeyboardInterrupt and OSError.
    """
    from .report import write_report
    from .unlabelled import train_unlabelled

    validate(config)
    if config.selection != ADAPTIVE:
        return train_unlabelled(config, resume=resume)
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise UserError(f"train: got {processes} processes, needs one; `fit` trains on activations in several")
    device = resolve_device(config.device)
    resolve_device(config.model.device)
    if not resume:
        check_output(config)
    cache = cache_folder(config.cache)

    corpus = read_corpus(config.model, config.text, config.labels, cache)
    _check_corpus(config, corpus, cache)
    scores = score_corpus(corpus, config.labels, cache)
    _check_scores(config, scores)
    data = collect_activations(corpus, scores, cache, batch_size=config.model.batch_size)

    # Phase 1: the probe, in closed form.
    probe, probe_report = fit_probe(data.train, config)
    if not resume:
        start_run(config)
    _write_inputs(config, corpus, scores)
    counts = {"scored": scores.scored, "failed": scores.failed}
    write_json(config.output / "probe.json", {**probe_report.to_dict(), "scores": counts})

    # Phases 2 and 3: the SAE, first with the probe frozen, then with both.
    adaptive = new_sae(config, adaptive_config(config, data.train.store.d_in, probe_report.lam))
    adaptive.probe.load_state_dict(probe.state_dict())
    train_sae(adaptive, data.train, config, name=ADAPTIVE, resume=resume)
    models = {ADAPTIVE: adaptive}

    if has_baseline(config):
        # Equal L0 where the two are compared.
        reader = BatchReader(
            data.heldout.store, probe_reads=config.probe_reads, train_on=config.train_on, device=device
        )
        k = max(1, round(mean_l0(adaptive, reader, config.batch_size)))
        topk = new_sae(config, SAEConfig(adaptive.config.d_in, config.d_sae, TopK(k)))
        train_sae(topk, data.train, config, name=BASELINE, resume=resume)
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


def train_sae(
    sae: SAE, split: Split, config: TrainConfig, *, name: str, log: Log | None = None, resume: bool = False
) -> None:
    """Phases 2 and 3 on `config.device`, in place, by `fit`; another selection than AdaptiveK stays in phase 2.

    Checkpoints and the SAE go to `config.output / name`; records to the run's `metrics.jsonl` or, where it is given, to
    `log`. With `resume` the last complete checkpoint there is gone on from.

    Raises UserError naming step and contexts for NaN activations (before the step) and for a loss that is not finite
    (before the update on CPU; on an accelerator at the next record or checkpoint).
    """
    device = resolve_device(config.device)
    reader = BatchReader(split.store, probe_reads=config.probe_reads, train_on=config.train_on, device=device)
    tuner = ProbeTuner(sae, config, len(split.labels)) if sae.probe is not None else None
    settings = fit_config(config, name, resume=resume)
    records = JsonLines(config.output / LOG, model=name) if log is None else Records(log, model=name)
    # The tuner's terms go into the records, so it comes first.
    callbacks = [tuner or Phase2(), records, Progress(name)]
    fit(sae, reader.training(config.batch_size, config.seed, split.labels), settings, callbacks)


class Phase2(Callback):
    """What records say of a run without a probe to tune."""

    def on_log(self, run, record: dict[str, Any]) -> None:
        record |= {"phase": 2, "probe": None, "deviation": None, "delta": None}


class ProbeTuner(Callback):
    """Phase 3 of the probe: `probe_coef * (L_probe + delta * L_dev)`, Adam, and a clip and warm-up of its own.

    No gradient of the SAE loss reaches the probe, since k is rounded, so its step stands apart from the SAE's.
    """

    def __init__(self, sae: SAE, config: TrainConfig, n_contexts: int):
        self.sae, self.config = sae, config
        self.phase3_from = int(config.phase3_start * config.steps)
        penalty = sae.config.selection.probe_lambda or 0.0
        # `probe_loss` halves it.
        self.penalty = penalty if config.phase3_penalty == "published" else 2 * penalty / n_contexts

    def on_start(self, run, resumed: bool) -> None:
        if resumed:
            return
        probe = self.sae.probe
        self.fitted = [probe.weight.detach().clone(), probe.bias.detach().clone()]
        self._start(DeviationWeight(probe.weight.device))

    def _start(self, delta: DeviationWeight) -> None:
        self.delta = delta
        self.optimizer = torch.optim.Adam(self.sae.probe.parameters(), lr=self.config.lr)
        # Warms up again from its first step on, and never decays.
        self.schedule = LambdaLR(self.optimizer, lambda step: lr_factor(step, self.config.warmup_steps))
        self.terms: dict[str, Tensor] = {}

    def on_step(self, run, batches: Sequence[Batch]) -> None:
        """Update the probe by what it reads of the contexts, and their labels.

        Raises UserError, before the update, for a gradient that is not finite, where the run looks for it.
        """
        if run.step - 1 < self.phase3_from:
            return
        probe, delta, batch = self.sae.probe, self.delta.value, batches[-1]
        fit_term = probe_loss(probe, batch.probed, batch.scores, self.penalty)
        moved = deviation(probe, *self.fitted)
        (self.config.probe_coef * (fit_term + delta * moved)).backward()
        norm = torch.nn.utils.clip_grad_norm_(probe.parameters(), self.config.max_grad_norm)
        if run.look and not norm.isfinite():
            where = f"step {run.step - 1} in {listed('context', batch.contexts)}"
            raise UserError(f"probe loss: got a gradient of norm {float(norm)} at {where}, needs a finite one")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.delta.update(fit_term)
        self.terms = {"probe": fit_term.detach(), "deviation": moved.detach(), "delta": delta}

    def on_log(self, run, record: dict[str, Any]) -> None:
        tuned = record["step"] >= self.phase3_from
        terms = {key: float(self.terms[key]) if tuned else None for key in ("probe", "deviation", "delta")}
        record |= {"phase": 3 if tuned else 2, **terms}

    def state_dict(self) -> dict[str, Any]:
        return {
            "fitted": self.fitted,
            "delta": self.delta.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], step: int) -> None:
        device = self.sae.probe.weight.device
        self.fitted = [tensor.to(device) for tensor in state["fitted"]]
        delta = DeviationWeight(device)
        delta.load_state_dict(state["delta"])
        self._start(delta)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])


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
