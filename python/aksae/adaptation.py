"""From the file of an SAE to the same SAE with latents at a price, judged on text that neither has seen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aksae_kernels import frozen

from .config import LabelConfig, ModelConfig, TextConfig, cache_folder, validate_inputs
from .data import collect_contexts, read_corpus
from .errors import UserError
from .files import CONFIG, WEIGHTS, check_writable
from .formats import Format, StoredSAE, load
from .formats.native import without_rule
from .metrics import ReconstructionMetrics
from .pricing import CALIBRATED, adapt
from .reading import Activations
from .sae import SAE
from .sites import Hook, Site
from .splice import CrossEntropy, cross_entropy
from .text import ContextSet

OWN, SAME_L0, HALF_L0, BUDGET = "own", "same L0", "half L0", "budget"
"""What is compared: the SAE by its own rule, and priced at its mean L0, at half of that, and at the budget."""
_ROWS = 1024


@dataclass(frozen=True)
class Adaptation:
    """An SAE with latents at a price, and how it does on held-out text."""

    sae: SAE
    """At the budget."""
    described: str
    """The SAE of the file, in words."""
    notes: tuple[str, ...]
    """What was assumed of the file, and folded into its weights."""
    calibrated: int
    """Rows by which the prices were set."""
    heldout: int
    """Rows on which everything was measured."""
    metrics: dict[str, dict[str, float]]
    """`ReconstructionMetrics` of `own`, `same L0`, `budget`, if there was one, and `half L0`."""
    cross_entropy: CrossEntropy
    """The language model's, with the reconstructions of each of these spliced in."""
    document: Tensor
    """`[N]` int64, the document of each of its contexts."""


def adapt_file(
    file: str | Path,
    model: ModelConfig,
    text: TextConfig,
    *,
    budget: int | None = None,
    out: Path | None = None,
    hook: Hook = "resid_post",
    format: Format | None = None,
    cache: Path | None = None,
    overwrite: bool = False,
    **assumptions: Any,
) -> Adaptation:
    """Give the SAE of a file latents at a price, and compare it with what it was at equal L0.

    Prices are set on the first `CALIBRATED` tokens of the text's train side, and everything is measured on the held-out
    one. Take text that the SAE was not trained on: both sides are then as new to it. Weights are taken to fp32.

    Args:
        file: an SAE as `aksae.formats.load` takes it. An autoencoder: of a transcoder two activations are needed, and
            `aksae.adapt` takes both.
        model: the language model, the layer that the SAE is for, and the device for both.
        text: what the model reads.
        budget: mean number of latents of a row; None for the mean L0 that the SAE has by its own rule.
        out: a folder, new or empty unless `overwrite`, for a native checkpoint of the SAE at the budget; None writes
            none.
        hook: the place in the block of the layer.
        format: as `aksae.formats.load` takes it.
        cache: folder for converted models and activations; None for AKSAE_CACHE or ~/.cache/aksae.
        overwrite: whether an SAE in `out` may be replaced; other files in it stay.
        assumptions: what the file may leave open, as `aksae.formats.load` takes it.

    Raises:
        UserError: a file, a setting, the model or the text cannot be used, `aksae.adapt` refuses the SAE, its width is
            not the model's, or none of its latents is active. What can be refused early is, before the model is loaded.
    """
    validate_inputs(model, text, LabelConfig())
    if out is not None:
        _check_out(out, overwrite)
    stored, own, bare = _read(file, format, assumptions)
    if budget is not None and not 1 <= budget <= bare.d_sae:
        raise UserError(f"budget: got {budget}, needs a number from 1 to d_sae = {bare.d_sae}")
    cache, site = cache_folder(cache), Site(model.layer, hook)
    corpus = read_corpus(model, text, None, cache)
    lm = corpus.model
    if bare.d_in != lm.d_model:
        raise UserError(f"{file}: got an SAE of {bare.d_in} inputs, needs {lm.d_model}, the width of {lm.name}")
    lm.check_predicts("cross-entropy")
    first = _first_contexts(corpus.train, CALIBRATED)
    calibrating, heldout = (
        collect_contexts(lm, contexts, cache, batch_size=model.batch_size, site=site)
        for contexts in (first, corpus.heldout)
    )
    rows = calibrating.rows(torch.arange(min(len(calibrating), CALIBRATED)))
    own, bare = own.to(lm.device), bare.to(lm.device)
    compared: dict[str, SAE | StoredSAE] = {OWN: own}
    metrics = {OWN: _measure(own, heldout, lm.device)}
    l0 = metrics[OWN]["l0_mean"]
    if l0 == 0:
        raise UserError(
            f"{file}: got an SAE of which no latent is active at {lm.described(site)}; needs the model, the layer and "
            "the place that it was trained on"
        )
    wanted = {SAME_L0: l0, **({} if budget is None else {BUDGET: budget}), HALF_L0: l0 / 2}
    for name, at in wanted.items():
        compared[name] = adapt(bare, rows, at)
        metrics[name] = _measure(compared[name], heldout, lm.device)
    with torch.no_grad():
        losses = cross_entropy(lm, corpus.heldout, site, compared, mean=rows.mean(0))
    priced = compared[SAME_L0 if budget is None else BUDGET]
    assert isinstance(priced, SAE)
    if out is not None:
        # Hours may have passed since it was first looked at.
        _check_out(out, overwrite)
        priced.save_pretrained(out)
    return Adaptation(
        sae=priced,
        described=_described(stored, own),
        # An SAE of ours is run as it is, whatever a StoredSAE leaves out of it.
        notes=bare.notes[len(stored.notes) :] if isinstance(own, SAE) else bare.notes,
        calibrated=len(rows),
        heldout=len(heldout),
        metrics=metrics,
        cross_entropy=losses,
        document=torch.from_numpy(corpus.heldout.document).long(),
    )


def _check_out(out: Path, overwrite: bool) -> None:
    """Raise UserError where `out` cannot be written, or must not be."""
    check_writable(out, "out")
    if not out.exists() or not any(out.iterdir()):
        return
    if not overwrite:
        raise UserError(f"out: got {out}, which holds files, needs a new or empty folder (or overwrite)")
    if (out / CONFIG).exists() and not (out / WEIGHTS).exists():
        # That of a run, for one.
        raise UserError(f"out: got {out}, whose {CONFIG} is no SAE's, needs another folder")


def _read(
    file: str | Path, format: Format | None, assumptions: dict[str, Any]
) -> tuple[StoredSAE, SAE | StoredSAE, StoredSAE]:
    """The SAE as it is stored; with its own rule, and without, as `adapt` takes it: both on the CPU in fp32."""
    stored = load(file, format, **assumptions)
    if stored.transcoder:
        raise UserError(
            f"{file}: got a transcoder, whose latents are priced by what it is to reconstruct, needs an autoencoder; "
            "in Python aksae.adapt(sae, rows, budget, target=...) takes both activations"
        )
    # Before anything is folded, so that nothing is rounded to 16 bits.
    precise = stored.to(torch.float32)
    try:
        bare = without_rule(precise)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    assert stored.origin is not None  # `load` names it
    if stored.origin.format == "native" and Path(file).is_dir():
        # A StoredSAE has no word for all that an SAE of ours does at inference.
        return stored, SAE.from_pretrained(file).to(torch.float32), bare
    return stored, precise, bare


def _described(stored: StoredSAE, own: SAE | StoredSAE) -> str:
    """The SAE in words, with what its file says of its place."""
    rule = own.config.selection if isinstance(own, SAE) else own.activation
    place = " ".join(name for name in (stored.model_name, stored.hook_name) if name)
    return f"SAE ({rule}; {stored.d_sae} latents of {stored.d_in} inputs){f' of {place}' if place else ''}"


def _first_contexts(contexts: ContextSet, rows: int) -> ContextSet:
    """The first contexts, as many as hold `rows` loss tokens, or all."""
    before = np.cumsum(contexts.loss_mask.sum(1)) - contexts.loss_mask.sum(1)
    return contexts.select(before < rows)


@torch.no_grad()
def _measure(sae: SAE | StoredSAE, activations: Activations, device: torch.device) -> dict[str, float]:
    metrics = ReconstructionMetrics(activations.d_in, len(sae.b_enc), device)
    with frozen(sae.W_enc):
        for index in torch.arange(len(activations)).split(_ROWS):
            x = activations.rows(index).to(device)
            codes = sae.encode(x)
            metrics.update(x, sae.decode(codes, x), codes, codes.counts)
    return metrics.result()
