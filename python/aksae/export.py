"""A trained SAE as what others take: a folder for the Hugging Face hub, for SAEDashboard or for Neuronpedia.

SAEDashboard, and Neuronpedia's runner, which is part of it, load SAELens' files. Beside the weights they read in the
`metadata` of `cfg.json` which model the SAE is of (by a name of TransformerLens) and at which hook, and SAELens' store
of activations what a context is. Both fold decoder norms into the encoder first, which SAELens refuses for a TopK SAE
unless its latents are scaled by those norms anyway: so one is written with decoder rows of norm 1, where that changes
nothing.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import formats
from .config import BUNDLED_MODEL, BUNDLED_TEXT, ExportTarget, ModelChoice, user_path
from .errors import UserError
from .evaluate import check_evaluated
from .files import check_writable, read_json, write_json, write_text
from .finished import Finished, open_finished
from .formats.stored import AdaptiveK, StoredSAE, TopK
from .sites import Hook

_ON_HUB = {BUNDLED_MODEL: "HuggingFaceTB/SmolLM2-135M-Instruct"}
_SAE_LENS = "sae_lens"
_NORM_TOLERANCE = 1e-4
_FIGURES = {
    "fvu": "FVU",
    "explained_variance": "explained variance",
    "cosine": "cosine similarity",
    "l0_mean": "mean L0",
    "dead": "dead latents",
}


def export(
    run: Path,
    folder: Path,
    to: ExportTarget,
    *,
    model: ModelChoice | None = None,
    site: Hook | None = None,
    overwrite: bool = False,
) -> tuple[str, ...]:
    """Write what `to` takes into `folder`, with a README.md that says how to go on.

    - `hub`: this project's files, SAELens' in `sae_lens/`, the figures of `eval.json`, and a model card.
    - `saedashboard`, `neuronpedia`: SAELens' files, with what those read in `cfg.json`.

    Args:
        run: as in `open_finished`.
        folder: new or empty, unless `overwrite`; with it files of these names are replaced, and others stay.
        to: what for.
        model, site: in place of what the run says. `model.name` may be the name by which the others know the model.

    Returns:
        What was folded, assumed or left out, in words.

    Raises:
        UserError: no SAE; one that the others cannot hold (the message says why); no name of the model, or no layer,
            where they need it; a folder that holds something.
    """
    check_writable(folder, "folder")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise UserError(f"folder: got {folder}, which holds other files, needs a new or empty folder (or overwrite)")
    found = open_finished(run, model, site)
    sae = formats.load(found.folder, "native")
    named = _named(sae, found)
    if to == "hub":
        return _export_hub(found, named, folder)
    return _export_dashboard(found, named, folder, to)


def _export_hub(found: Finished, sae: StoredSAE, folder: Path) -> tuple[str, ...]:
    figures = _figures(found)
    found.sae.save_pretrained(folder)
    notes: tuple[str, ...] = ()
    refused = ""
    try:
        notes = _save_sae_lens(found, sae, folder / _SAE_LENS)
    except UserError as error:
        refused = str(error)
        notes = (f"no {_SAE_LENS}/: {refused}",)
    if figures is None:
        notes += ("no figures: the SAE is in no run with an eval.json of it",)
    else:
        write_json(folder / "eval.json", figures)
    write_text(folder / "README.md", _model_card(found, sae, figures, refused))
    return notes


def _export_dashboard(found: Finished, sae: StoredSAE, folder: Path, to: ExportTarget) -> tuple[str, ...]:
    if sae.transcoder:
        raise UserError(f"{to}: got a transcoder, needs an autoencoder: no run says where its output goes")
    if isinstance(sae.activation, AdaptiveK):
        raise UserError(
            f"{to}: got AdaptiveK, needs another selection: SAEDashboard folds decoder norms into the encoder, which "
            "would change what AdaptiveK keeps"
        )
    if sae.model_name is None:
        raise UserError(
            f"model.name: got {found.known_model().name}, a folder, needs the name by which TransformerLens knows the "
            "model"
        )
    if isinstance(sae.activation, TopK):
        sae = _with_unit_rows(sae, to)
    notes = _save_sae_lens(found, sae, folder)
    write_text(folder / "README.md", _next_steps(found, sae, to))
    return notes


def _named(sae: StoredSAE, found: Finished) -> StoredSAE:
    """The SAE with the names of its model on the hub and of its hook in TransformerLens, as far as they are known."""
    if found.model is None:
        return replace(sae)
    hook = f"blocks.{found.site.layer}.hook_{found.site.hook}"
    return replace(sae, model_name=_hub_name(found.model.name), hook_name=hook)


def _hub_name(name: str) -> str | None:
    """The name of a model on the hub; None for a folder."""
    if name in _ON_HUB:
        return _ON_HUB[name]
    return None if user_path(name, "model.name").exists() else name


def _save_sae_lens(found: Finished, sae: StoredSAE, folder: Path) -> tuple[str, ...]:
    """Write SAELens' files, with all that the metadata in them can say."""
    notes = formats.save(sae, folder, "sae_lens", overwrite=True)
    config = read_json(folder / "cfg.json", needs=dict)
    # TransformerLens else centres what is written to the residual stream, which this SAE has not read.
    config["metadata"] |= {"model_from_pretrained_kwargs": {"center_writing_weights": False}}
    if found.reads_text:
        text = found.run.text
        config["metadata"] |= {"context_size": text.context_length, "dataset_path": _dataset(found)}
        # Contexts begin with a BOS wherever the tokenizer has one.
        config["metadata"]["prepend_bos"] = True
    write_json(folder / "cfg.json", config)
    return notes


def _dataset(found: Finished) -> str | None:
    """The dataset of the hub that the run reads; None for other texts."""
    source = found.run.text.source if found.reads_text else BUNDLED_TEXT
    return None if source == BUNDLED_TEXT or user_path(source, "text.source").exists() else source


def _with_unit_rows(sae: StoredSAE, to: ExportTarget) -> StoredSAE:
    """The same SAE with decoder rows of norm 1, and latents as long as what they add to the activation."""
    norms = torch.linalg.vector_norm(sae.W_dec, dim=-1, dtype=torch.float64)
    norm = float(norms.mean())
    if float((norms / norm - 1).abs().max()) > _NORM_TOLERANCE:
        raise UserError(
            f"{to}: got decoder rows of norms from {float(norms.min()):.4g} to {float(norms.max()):.4g}, needs all "
            "alike in a TopK SAE: SAEDashboard scales latents by them, which would change what a row keeps"
        )
    scale = norm / sae.output_scale
    return replace(
        sae,
        W_enc=sae.W_enc * (scale * sae.input_scale),
        b_enc=sae.b_enc * scale,
        W_dec=(sae.W_dec / norms.unsqueeze(-1)).to(sae.W_dec.dtype),
        b_dec=sae.b_dec / sae.output_scale,
        input_scale=1.0,
        output_scale=1.0,
        decoder_norm="codes",
        notes=(*sae.notes, f"decoder rows scaled to norm 1, latents by {scale:.6g}"),
    )


def _figures(found: Finished) -> dict[str, Any] | None:
    """What the run's `eval.json` says of this SAE."""
    path = found.run.output / "eval.json" if found.run else None
    if path is None or not path.is_file():
        return None
    evaluation = read_json(path, needs=dict)
    check_evaluated(found.run.output, evaluation)
    name = found.folder.absolute().name
    models = evaluation.get("models", {})
    return {"rows": evaluation["rows"], "models": {name: models[name]}} if name in models else None


def _model_card(found: Finished, sae: StoredSAE, figures: dict[str, Any] | None, refused: str) -> str:
    config = found.sae.config
    dataset = _dataset(found)
    head = {
        "library_name": "aksae",
        "tags": ["sparse-autoencoder", "mechanistic-interpretability", *([] if refused else ["saelens"])],
        **({"base_model": sae.model_name} if sae.model_name else {}),
        **({"datasets": [dataset]} if dataset else {}),
    }
    facts = {"latents": f"{config.d_sae:,}", "width": f"{config.d_in:,}", "selection": str(config.selection)}
    if sae.hook_name:
        facts["hook"] = f"`{sae.hook_name}`"
    if found.reads_text:
        text = found.run.text
        source = text.source if dataset or text.source == BUNDLED_TEXT else Path(text.source).name
        facts["text"] = f"{source}, at most {text.max_tokens:,} tokens in contexts of {text.context_length}"
    if found.run:
        facts["training"] = f"{found.run.steps:,} steps of {found.run.batch_size:,} rows"
    measured = next(iter(figures["models"].values())) if figures else {}
    return _rendered(
        "model_card.md.j2",
        head=head,
        config=config,
        sae=sae,
        of=sae.model_name or (Path(found.model.name).name if found.model else "a language model"),
        place=f", block {found.site.layer}, {found.site.hook}" if found.model else "",
        facts=facts,
        rows=figures and figures["rows"],
        figures={name: f"{measured[key]:.4g}" for key, name in _FIGURES.items() if measured.get(key) is not None},
        refused=refused,
        adaptive=isinstance(sae.activation, AdaptiveK),
    )


def _next_steps(found: Finished, sae: StoredSAE, to: ExportTarget) -> str:
    return _rendered(
        f"{to}.md.j2",
        sae=sae,
        dataset=_dataset(found),
        length=found.run.text.context_length if found.reads_text else 128,
        layer=found.site.layer,
        hook=f"hook_{found.site.hook}",
    )


def _rendered(template: str, **values: Any) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    # JSON is YAML, and quotes whatever a name holds; the filter's own escapes are for HTML.
    environment.filters["tojson"] = json.dumps
    return environment.get_template(template).render(**values)
