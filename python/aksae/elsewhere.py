"""SAEs that were trained, evaluated on another text, layer or model than their run's."""

from __future__ import annotations

import dataclasses
import functools
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from aksae_kernels import frozen

from .activations import LanguageModel
from .config import (
    SELECTION_NAMES,
    EvaluationMetric,
    ModelChoice,
    ProbeReads,
    TextChoice,
    TextConfig,
    TrainConfig,
    absolute,
    cache_folder,
    to_dict,
    validate_text,
)
from .data import BatchReader, collect_contexts, context_key
from .errors import Notice, UserError
from .files import WEIGHTS, check_writable, read_json, write_json
from .finished import Finished, open_finished
from .identity import digest_of_file, digest_of_json
from .metrics import ReconstructionMetrics
from .pricing import CALIBRATED, calibrate
from .reading import Activations
from .sae import SAE
from .selections import AdaptiveK
from .sites import Hook
from .splice import cross_entropy
from .text import ContextSet, check_source, load_contexts, whole_contexts

_ROWS = 1024
_L0 = ("l0_mean", "l0_min", "l0_max", "k_mean")
"""Of each SAE, whatever is measured."""


@dataclass(frozen=True)
class Elsewhere:
    """See `evaluate_elsewhere`."""

    file: Path
    evaluation: dict[str, Any]
    """What the file holds."""


@dataclass(frozen=True)
class _Request:
    """What is to be evaluated, and on what, before anything is read."""

    found: Finished
    """With the model that is asked for."""
    text: TextConfig
    metrics: tuple[EvaluationMetric, ...]
    recalibrate: bool

    def described(self) -> dict[str, Any]:
        return {
            "model": to_dict(self.found.known_model()),
            "site": str(self.found.site),
            "text": to_dict(self.text),
            "metrics": list(self.metrics),
            "recalibrated": self.recalibrate,
        }


@torch.no_grad()
def evaluate_elsewhere(
    path: Path,
    *,
    model: ModelChoice | None = None,
    text: TextChoice | None = None,
    hook: Hook | None = None,
    metrics: Sequence[EvaluationMetric] = ("reconstruction",),
    recalibrate: bool = False,
    out: Path | None = None,
    overwrite: bool = False,
) -> Elsewhere:
    """Evaluate the SAEs of a finished run, all on the same rows, wherever they are asked for.

    The text is read as a whole, without a share that is held out: take one that the SAEs were not trained on. Only with
    the run's own text settings, and a tokenizer that cuts the same contexts of it, are the rows those of the documents
    that the run held out. A `Notice` says where documents may have been trained on.

    The price of a `Priced` SAE, the bias of a `Need` SAE and the thresholds of others are constants of the checkpoint,
    and `l0_mean` may be another here than `k_mean`, which they were set for. With `recalibrate` the first half of the
    documents sets price and bias so that they agree, and everything is measured on the second half. An AdaptiveK SAE
    whose probe reads contexts as a whole gives each row the k of its context.

    The file has the metrics of each SAE by the name of its folder: with `reconstruction` those of
    `ReconstructionMetrics` on the rows that the run trains on (`train_on`), else L0 and k of these; with `ce` those of
    `CrossEntropy.summary`, with all loss tokens replaced, and their mean as mean ablation. It says, too, what model,
    place, text and weights they are of. The run's `eval.json` is never written.

    Args:
        path: folder of a run, for all SAEs in it; or of one SAE, in a run or by itself.
        model: in place of what the run says: layer, model, device and so on.
        text: in place of what the run says.
        hook: place in the block of the layer; None for the run's, else resid_post.
        metrics: what is measured.
        recalibrate: see above.
        out: a `.json` file; None for one in `path`, named after model, place, text, and a digest of all settings.
        overwrite: whether `out` may be replaced.

    Raises:
        UserError: no SAE; nothing says what model or text to read; a model, layer, place, device, text or file that
            cannot be used, or that does not fit the SAEs; transcoders; no SAE that can be calibrated, or too few
            documents for it.
    """
    found, of_text = _settings(path, open_finished(path, model, hook), text or TextChoice())
    request = _Request(found, of_text, tuple(metrics), recalibrate)
    saes = _saes(path, found)
    _check(saes, request)
    out = path / _file_name(request.described()) if out is None else out
    _check_out(out, found, overwrite)
    check_source(of_text)
    lm = found.load_model(of_text.context_length)
    lm.check_length(of_text.context_length)
    if "ce" in metrics:
        lm.check_predicts("cross-entropy")
    for sae in saes.values():
        sae.to(lm.device)
    cache, batch_size = cache_folder(found.run.cache if found.run else None), found.known_model().batch_size
    read = functools.partial(collect_contexts, lm, cache=cache, batch_size=batch_size, site=found.site)
    contexts, held_out = _contexts(found, of_text, lm)
    calibrated = 0
    if recalibrate:
        first, contexts = _halves(contexts)
        calibrated = _recalibrate(saes, read(contexts=first))
    evaluation = {
        **request.described(),
        "held_out": held_out,
        "contexts": context_key(contexts),
        "documents": len(np.unique(contexts.document)),
        "calibrated": calibrated,
        **_measured(saes, read(contexts=contexts), contexts, lm, request),
        "checkpoints": {name: digest_of_file(folder / WEIGHTS) for name, folder in _folders(path).items()},
    }
    # Hours may have passed since it was first looked at.
    _check_out(out, found, overwrite)
    write_json(out, evaluation)
    return Elsewhere(out, evaluation)


def _settings(path: Path, found: Finished, choice: TextChoice) -> tuple[Finished, TextConfig]:
    """With model and text as a run would keep them: their paths are absolute."""
    text = choice.over(found.run.text if found.run and found.reads_text else None)
    if text is None:
        raise UserError(f"text.source: got none, needs the text to evaluate on: {path} does not say")
    validate_text(text, whole=True)
    kept = absolute(dataclasses.replace(found.run or TrainConfig(), model=found.known_model(), text=text))
    return dataclasses.replace(found, model=kept.model), kept.text


def _folders(path: Path) -> dict[str, Path]:
    """The folders of SAEs, by their names: `path` itself, or those in a run."""
    if (path / WEIGHTS).is_file():
        return {path.absolute().name: path}
    return {name: path / name for name in SELECTION_NAMES if (path / name / WEIGHTS).is_file()}


def _saes(path: Path, found: Finished) -> dict[str, SAE]:
    """The SAEs by the names of their folders, in float32."""
    return {
        name: found.sae if folder == found.folder else SAE.from_pretrained(folder).to(torch.float32)
        for name, folder in _folders(path).items()
    }


def _check(saes: Mapping[str, SAE], request: _Request) -> None:
    """Raise UserError where the SAEs cannot be evaluated so."""
    known = get_args(EvaluationMetric)
    if not request.metrics or not set(request.metrics) <= set(known):
        raise UserError(f"metrics: got {', '.join(request.metrics) or 'none'}, needs {' or '.join(known)}, or both")
    for name, sae in saes.items():
        if sae.config.transcoder:
            raise UserError(f"{name}: got a transcoder, needs an autoencoder, which reconstructs what it reads")
    selections = [sae.config.selection for sae in saes.values()]
    if request.recalibrate and not any(selection.calibrated for selection in selections):
        raise UserError(
            f"recalibrate: got {' and '.join(map(str, selections))}, needs an SAE with a price or a bias that sets its "
            "mean L0: Priced or Need"
        )


def _file_name(described: Mapping[str, Any]) -> str:
    # Where and how fast the model runs changes no more than rounding.
    model = {name: value for name, value in described["model"].items() if name not in ("device", "batch_size")}
    digest = digest_of_json({**described, "model": model})[:8]
    names = (Path(described[kind][name]).name for kind, name in (("model", "name"), ("text", "source")))
    of_model, of_text = (re.sub(r"[^\w.]+", "-", name)[:60] for name in names)
    return f"eval-{of_model}-{described['site']}-{of_text}-{digest}.json"


def _check_out(out: Path, found: Finished, overwrite: bool) -> None:
    """Raise UserError where `out` cannot be written, or must not be."""
    if out.suffix != ".json":
        raise UserError(f"out: got {out}, needs a name that ends in .json")
    if found.run is not None and out.resolve() == (found.run.output / "eval.json").resolve():
        raise UserError(f"out: got {out}, the run's own evaluation, needs another name")
    check_writable(out.parent, "out")
    if out.exists() and not (overwrite and out.is_file()):
        raise UserError(f"out: got {out}, which exists, needs a new file (or overwrite)")


def _contexts(found: Finished, text: TextConfig, model: LanguageModel) -> tuple[ContextSet, bool]:
    """The contexts to evaluate on, and whether they are those that the run held out."""
    if found.run is None or not found.reads_text or text.source != found.run.text.source:
        return whole_contexts(text, model.tokenizer), False
    if text == found.run.text:
        train, heldout = load_contexts(text, model.tokenizer)
        recorded = read_json(found.run.output / "data.json", needs=dict)
        # Both, since another tokenizer or a changed text puts documents on other sides.
        if all(
            recorded.get(f"{side} contexts") == context_key(contexts)
            for side, contexts in (("train", train), ("held-out", heldout))
        ):
            return heldout, True
        reason = "its contexts are others now"
    else:
        reason = "its settings are others"
    warnings.warn(
        f"text.source: {text.source} is what the run read, and {reason}: all of it is evaluated on, also documents "
        "that were trained on",
        Notice,
        stacklevel=3,
    )
    return whole_contexts(text, model.tokenizer), False


def _halves(contexts: ContextSet) -> tuple[ContextSet, ContextSet]:
    """The contexts of the first half of the documents, and those of the second."""
    documents = np.unique(contexts.document)
    if len(documents) < 2:
        raise UserError("recalibrate: got text of 1 document, needs 2: one to calibrate by, and one to evaluate on")
    is_first = contexts.document < documents[len(documents) // 2]
    return contexts.select(is_first), contexts.select(~is_first)


def _recalibrate(saes: Mapping[str, SAE], activations: Activations) -> int:
    """Set the prices and biases of those that have one, by the number of rows returned."""
    rows = activations.rows(torch.arange(min(len(activations), CALIBRATED)))
    for sae in saes.values():
        if sae.config.selection.calibrated:
            calibrate(sae, rows)
    return len(rows)


def _measured(
    saes: Mapping[str, SAE], rows: Activations, contexts: ContextSet, model: LanguageModel, request: _Request
) -> dict[str, Any]:
    """What the file says of each SAE and, with `ce`, of the model as it is and without what passes the site."""
    train_on = request.found.run.train_on if request.found.run else "all"
    readers = {
        name: BatchReader(rows, probe_reads=_probe_reads(sae), train_on=train_on, device=model.device)
        for name, sae in saes.items()
    }
    results = {name: _reconstruction(sae, readers[name]) for name, sae in saes.items()}
    if "reconstruction" not in request.metrics:
        results = {name: {key: result[key] for key in _L0} for name, result in results.items()}
    n_rows = len(next(iter(readers.values())).rows)
    if "ce" not in request.metrics:
        return {"rows": n_rows, "models": results}
    functions = {name: _decoded(sae, readers[name]) for name, sae in saes.items()}
    parts = torch.arange(len(rows)).split(_ROWS)
    mean = torch.stack([rows.rows(part).sum(0, dtype=torch.float64) for part in parts]).sum(0) / len(rows)
    losses = cross_entropy(model, contexts, request.found.site, functions, mean=mean.float())
    models = {name: {**result, **losses.summary(name)} for name, result in results.items()}
    return {"rows": n_rows, "models": models, "cross_entropy": losses.means()}


def _probe_reads(sae: SAE) -> ProbeReads:
    """From what rows get their k, where they have one before they are encoded."""
    selection = sae.config.selection
    return selection.probe if isinstance(selection, AdaptiveK) else "token"


def _reconstruction(sae: SAE, reader: BatchReader) -> dict[str, float]:
    metrics = ReconstructionMetrics(sae.config.d_in, sae.config.d_sae, reader.device)
    selection = sae.config.selection
    with frozen(sae.W_enc):
        for batch in reader.in_order(_ROWS):
            if isinstance(selection, AdaptiveK):
                k = reader.k(sae, batch)
                codes = sae.encode(batch.x, k, k_max=sae.k_bound)
            else:
                codes, aim = sae.encode(batch.x), selection.mean_k()
                k = codes.counts if aim is None else torch.full_like(codes.counts, aim, dtype=torch.float64)
            metrics.update(batch.x, sae.decode(codes), codes, k)
    return metrics.result()


def _decoded(sae: SAE, reader: BatchReader) -> Callable[[Tensor], Tensor]:
    """What an SAE makes of the rows of a reader, all of which come in order, whatever is trained on."""
    if not isinstance(sae.config.selection, AdaptiveK):
        return sae
    left = torch.cat([reader.k(sae, batch) for batch in reader.in_order(_ROWS, all_rows=True)])

    def decoded(x: Tensor) -> Tensor:
        nonlocal left
        k, left = left[: len(x)], left[len(x) :]
        return sae.decode(sae.encode(x, k, k_max=sae.k_bound))

    return decoded
