"""Evaluation of a run's models on its held-out documents: the same rows for every model, pooled over all of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aksae_kernels import frozen

from .activations import LanguageModel, resolve_device
from .batches import Batch
from .config import (
    ADAPTIVE,
    BASELINE,
    SELECTION_NAMES,
    ProbeReads,
    SAEConfig,
    TrainConfig,
    adaptive_config,
    cache_folder,
    selection_for,
    to_dict,
    validate,
)
from .data import (
    LABELS,
    BatchReader,
    Corpus,
    Split,
    collect_activations,
    context_vectors,
    read_scores,
    score_corpus,
)
from .errors import UserError
from .files import WEIGHTS, read_json, write_json
from .identity import digest_of_file, require_same
from .metrics import ReconstructionMetrics
from .runs import read_run
from .sae import SAE
from .selections import TopK
from .text import load_contexts
from .top_contexts import activations_of, spread_latents, top_contexts

K_FACTORS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
"""The L0-FVU curve is drawn with every k scaled by these."""


def evaluate_run(folder: Path) -> dict[str, Any]:
    """Evaluate the checkpoints of the run in `folder` again, and write and return its `eval.json`.

    On what the run was trained on, or not at all: the model, the contexts and the settings are compared with what
    `data.json` says of them, the checkpoints with the run's settings and with those that an `eval.json` that is there
    already is of. The labels are the run's own, from `labels.safetensors`: none is asked or paid for again.

    Raises UserError for a folder that is no run, for checkpoints that cannot be read or are another run's, and, naming
    what differs, what the run had and what is there now, for anything else than the run was trained on.
    """
    from .unlabelled import evaluate_unlabelled

    config = read_run(folder)
    validate(config)
    if config.selection != ADAPTIVE:
        return evaluate_unlabelled(config)
    models = read_checkpoints(folder, config)
    recorded = read_json(folder / "data.json", needs=dict)
    if "labels" not in recorded:
        raise UserError(
            f"{folder / 'data.json'}: got a run that did not note what it was trained on, needs a newer one"
        )

    def check(got: dict[str, Any], hint: str) -> None:
        require_same(f"{folder}: what the run was trained on", recorded, got, hint)

    check(run_settings(config), "config.json says otherwise now")
    device = resolve_device(config.device)
    cache = cache_folder(config.cache)
    model = LanguageModel.load(config.model, cache, context_length=config.text.context_length)
    check(
        model.identity,
        f"model.name is {config.model.name}, and the run read {recorded.get('model')}; where that lies elsewhere now, "
        "change model.name or model.revision in config.json",
    )
    corpus = Corpus(model, *load_contexts(config.text, model.tokenizer))
    check(
        corpus.identity(),
        f"the text of {config.text.source}, its settings or, with python-prose, the installed packages have changed, "
        "and a document trained on may now be held out",
    )
    scores = read_scores(folder)
    check({"labels": scores.digest()}, f"{LABELS} is another run's")
    if config.labels.scorer == "file":
        now = score_corpus(corpus, config.labels, cache)
        check({"labels": now.digest()}, f"{config.labels.file} gives other scores now")
    data = collect_activations(corpus, scores, cache, batch_size=config.model.batch_size)
    for sae in models.values():
        sae.to(device, torch.float32)
    return write_evaluation(folder, evaluate(models, data.heldout, data.tokenizer, config, device))


def run_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide over an evaluation, and that no checkpoint tells."""
    return {"train_on": config.train_on, "probe_reads": config.probe_reads}


def write_evaluation(folder: Path, evaluation: dict[str, Any]) -> dict[str, Any]:
    """Write `eval.json` with digests of the checkpoints that it is of, and return what it holds."""
    evaluation = {**evaluation, "checkpoints": {name: _weights_digest(folder, name) for name in evaluation["models"]}}
    write_json(folder / "eval.json", evaluation)
    return evaluation


def check_evaluated(folder: Path, evaluation: Mapping[str, Any]) -> None:
    """Raise UserError where `evaluation`, what the run's `eval.json` holds, is of other checkpoints than are there."""
    names = [name for name in SELECTION_NAMES if (folder / name / WEIGHTS).is_file()]
    require_same(
        f"{folder / 'eval.json'}: the checkpoint that it is of",
        evaluation.get("checkpoints"),
        {name: _weights_digest(folder, name) for name in names},
        "with eval.json moved elsewhere, `aksae eval` evaluates those that are there now",
    )


def _weights_digest(folder: Path, name: str) -> str:
    return digest_of_file(folder / name / WEIGHTS)


def read_checkpoints(folder: Path, config: TrainConfig) -> dict[str, SAE]:
    """The models of the run in `folder`, by name, once they are known to be its own.

    Raises UserError for a folder without a checkpoint of the run's selection, for checkpoints of other settings than
    the run's, and for others than those that an `eval.json` that is there is of.
    """
    names = [name for name in dict.fromkeys((config.selection, BASELINE)) if (folder / name).is_dir()]
    if config.selection not in names:
        raise UserError(f"{folder}: got no checkpoint folder {config.selection}, needs a run that has reached one")
    models = {name: SAE.from_pretrained(folder / name) for name in names}
    for name, sae in models.items():
        got = _flat(to_dict(sae.config))
        for key, value in _flat(to_dict(_wanted(folder, config, name, sae.config))).items():
            if got.get(key) != value:
                raise UserError(
                    f"{folder / name}: got the checkpoint of another run ({key} {got.get(key)}), needs the run's "
                    f"({key} {value})"
                )
    if (folder / "eval.json").exists():
        check_evaluated(folder, read_json(folder / "eval.json", needs=dict))
    return models


def _wanted(folder: Path, config: TrainConfig, name: str, has: SAEConfig) -> SAEConfig:
    """The config that the checkpoint `name`, which `has` one, should have as far as the run's settings say."""
    if name == ADAPTIVE:
        return adaptive_config(config, has.d_in, read_json(folder / "probe.json", needs=dict).get("lambda"))
    if config.selection == ADAPTIVE:
        # Its k was measured.
        return SAEConfig(has.d_in, config.d_sae, TopK(has.selection.k if isinstance(has.selection, TopK) else 1))
    selection = selection_for(config) if name == config.selection else TopK(config.k)
    scales = {"input_scale": has.input_scale, "output_scale": has.output_scale}
    return SAEConfig(has.d_in, config.d_sae, selection, **scales)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one mapping, of dotted names."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


@torch.no_grad()
def evaluate(
    models: Mapping[str, SAE], heldout: Split, tokenizer, config: TrainConfig, device: torch.device
) -> dict[str, Any]:
    """What `eval.json` holds: metrics and L0-FVU curve of each model, and k and top contexts of the `adaptivek` one.

    Metrics are over the rows that the run trains on (`config.train_on`), in the weights' precision whatever
    `config.dtype`. Raises UserError for NaN activations, and where model and activations differ in width.
    """
    for name, sae in models.items():
        if sae.config.d_in != heldout.store.d_in:
            raise UserError(f"{name}: got d_in {sae.config.d_in}, needs {heldout.store.d_in}, that of the activations")
    reader = BatchReader(heldout.store, probe_reads=config.probe_reads, train_on=config.train_on, device=device)
    at_scale = {
        name: {factor: _measure(sae, reader, config.batch_size, factor) for factor in K_FACTORS}
        for name, sae in models.items()
    }
    results = {
        name: {factor: metrics.result() for factor, metrics in curve.items()} for name, curve in at_scale.items()
    }
    adaptive, measured = models[ADAPTIVE], at_scale[ADAPTIVE][1.0]
    contexts = _contexts(adaptive, heldout, config.probe_reads, device)
    latents = spread_latents(measured.fired.cpu(), len(reader.rows))
    k, rows = measured.k.cpu().unique(return_counts=True)
    return {
        "rows": len(reader.rows),
        "models": {name: curve[1.0] for name, curve in results.items()},
        "l0_fvu": {
            name: [[result["l0_mean"], result["fvu"]] for result in curve.values()] for name, curve in results.items()
        },
        "contexts": contexts,
        "k_histogram": {"k": k.tolist(), "rows": rows.tolist()},
        "top_contexts": _top_contexts(adaptive, latents, heldout, tokenizer, reader, contexts, config.batch_size),
    }


@torch.no_grad()
def mean_l0(sae: SAE, reader: BatchReader, batch_size: int) -> float:
    """Mean number of active latents over the rows of `reader`."""
    active = sum(_encode(sae, batch, reader.k(sae, batch)).counts.sum() for batch in reader.in_order(batch_size))
    return int(active) / len(reader.rows)


@torch.no_grad()
def _measure(sae: SAE, reader: BatchReader, batch_size: int, factor: float = 1.0) -> ReconstructionMetrics:
    """The metrics of `sae` with every k scaled by `factor`: rounded, at least 1, at most d_sae."""
    metrics = ReconstructionMetrics(sae.config.d_in, sae.config.d_sae, reader.device)
    with frozen(sae.W_enc):
        for batch in reader.in_order(batch_size):
            k = reader.k(sae, batch)
            if factor != 1.0:
                k = (k * factor).round().clamp(1, sae.config.d_sae).int()
            codes = _encode(sae, batch, k, factor)
            metrics.update(batch.x, sae.decode(codes), codes, k)
    return metrics


def _encode(sae: SAE, batch: Batch, k: Tensor, factor: float = 1.0):
    return sae.encode(batch.x, k, k_max=max(1, round(sae.k_bound * factor)))


def _contexts(sae: SAE, heldout: Split, probe_reads: ProbeReads, device: torch.device) -> list[dict[str, Any]]:
    """Label, predicted score and k of each held-out context; with a k per token, the k of its last one."""
    x = context_vectors(heldout.store, probe_reads)(torch.arange(len(heldout.labels))).to(device)
    columns = zip(heldout.labels.tolist(), sae.probe(x).tolist(), sae.k_for(x).tolist(), strict=True)
    return [{"score": label, "predicted": predicted, "k": k} for label, predicted, k in columns]


def _top_contexts(
    sae: SAE,
    latents: Tensor,
    heldout: Split,
    tokenizer,
    reader: BatchReader,
    contexts: list[dict[str, Any]],
    batch_size: int,
) -> list[dict[str, Any]]:
    """The contexts in which each of `latents` is most active, with their tokens, whatever rows are trained on."""
    batches = reader.in_order(batch_size, all_rows=True)
    activations = torch.cat([activations_of(latents, _encode(sae, batch, reader.k(sae, batch))) for batch in batches])

    def about(number: int) -> dict[str, Any]:
        tokens = heldout.contexts.input_ids[number][heldout.contexts.loss_mask[number]]
        return {
            "tokens": [tokenizer.decode([token]) for token in tokens.tolist()],
            "score": contexts[number]["score"],
            "k": contexts[number]["k"],
        }

    return top_contexts(latents, activations, heldout.store.context, about)
