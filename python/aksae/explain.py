"""What a latent stands for: where it fires on a run's held-out text, and which tokens its direction makes likelier."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from aksae_kernels import SparseCodes, frozen

from .activations import LanguageModel
from .config import ModelChoice, TrainConfig, cache_folder
from .data import LABELS, BatchReader, Corpus, collect_contexts, read_scores
from .errors import UserError
from .files import read_json
from .finished import Finished, open_finished
from .identity import require_same
from .reading import Activations, open_activations
from .report.page import marked_runs
from .sae import SAE
from .selections import AdaptiveK
from .sites import Site, replaced_sites
from .streaming import forward_blocks
from .text import ContextSet, load_contexts
from .top_contexts import activations_of

_BEFORE, _AFTER = 20, 10


class _Rows(NamedTuple):
    """Codes of some held-out tokens."""

    codes: SparseCodes
    tokens: Tensor
    """`[n]`, their numbers in the vocabulary."""
    contexts: Tensor
    """`[n]`, the context of each; a context's tokens stand together and in their order."""


@torch.no_grad()
def explain(
    run: Path, latents: Sequence[int], *, examples: int = 5, tokens: int = 10, model: ModelChoice | None = None
) -> dict[str, Any]:
    """Where latents of a run's SAE fire on the run's held-out tokens, and what they do to the logits.

    Of each latent: `density`, the share of held-out tokens on which it fires; `mean`, its activation over those; `max`;
    `examples`, the contexts in which it is strongest, with all their tokens and its activation at each; `raises` and
    `lowers`, the tokens of which `logit_effect` is largest and smallest. These are None for a model without a
    language-model head, as is `mean` where the latent never fires. Activations are in the units of the SAE's codes,
    which `intervene` and `aksae steer` take, too.

    Args:
        run: folder of a run, or of an SAE in a run.
        latents: their numbers.
        examples: contexts of each.
        tokens: how many are raised and lowered.
        model: settings in place of the run's own; other activations than the run's are refused.

    Raises:
        UserError: no SAE, or no such latent; activations without text: an SAE without a run, or a run on files that do
            not say what the tokens were; and, naming what differs, another text or model than the run was trained on.
    """
    found = open_finished(run, model)
    if not latents:
        raise UserError("latents: got none, needs at least one number")
    for latent in latents:
        found.check_latent(latent)
    _check_has_text(found)
    language_model = found.load_model()
    index = torch.tensor(latents)
    parts = [
        (activations_of(index, rows.codes), rows.tokens, rows.contexts) for rows in _heldout(found, language_model)
    ]
    activations, ids, contexts = (torch.cat(part) for part in zip(*parts, strict=True))
    effects = None
    if language_model.predicts:
        effects = logit_effect(language_model, found.sae.W_dec[index.to(language_model.device)])
    tokenizer = language_model.tokenizer
    return {
        "sae": str(found.folder),
        "model": language_model.described(found.site),
        "tokens": len(ids),
        "latents": [
            {
                "latent": latent,
                **_statistics(activations[:, number]),
                **_strongest_tokens(None if effects is None else effects[number], tokens, tokenizer),
                "examples": _examples(activations[:, number], ids, contexts, examples, tokenizer),
            }
            for number, latent in enumerate(latents)
        ],
    }


@torch.no_grad()
def logit_effect(model: LanguageModel, directions: Tensor) -> list[Tensor]:
    """What directions `[n, D]` of the residual stream do to the logits, `[vocabulary]` float32 of each:

        unembed(norm(d)) - unembed(norm(0)),   |d|^2 = D

    where `norm` is the model's final norm, and `unembed` all that it does behind it. This is an approximation: later
    blocks are passed by, and the direction is taken alone, where in a residual stream that holds other things, too, the
    norm would make it smaller. So it tells tokens apart, and is no size of an effect.

    Found by a forward of one token, in which the last block is made to give `d`, whatever the architecture.
    """
    last = Site(model.n_layers - 1)
    scaled = F.normalize(directions.float(), dim=-1) * model.d_model**0.5
    streams = torch.cat([scaled, torch.zeros_like(scaled[:1])]).unsqueeze(1)
    one = torch.ones(len(streams), 1, dtype=torch.int64, device=model.device)
    with replaced_sites({last: model.module(last)}, {last: lambda hidden: streams.to(hidden)}):
        logits = model.model(input_ids=one, attention_mask=one).logits[:, 0].float().cpu()
    # Some models have rows for tokens that no vocabulary has.
    logits = logits[:, : len(model.tokenizer)]
    return list(logits[:-1] - logits[-1])


def strongest_contexts(activations: Tensor, contexts: Tensor, n: int) -> list[Tensor]:
    """The rows, bool `[N]`, of each of the `n` contexts with the largest of `activations [N]`: the largest first, the
    earlier first where two are alike, and fewer where fewer have one above 0. `contexts [N]` is each row's."""
    numbers, of_row = contexts.unique(return_inverse=True)
    strongest = torch.zeros(len(numbers)).scatter_reduce(0, of_row, activations.float(), "amax")
    best = strongest.sort(descending=True, stable=True)
    return [of_row == number for number in best.indices[:n][best.values[:n] > 0].tolist()]


def described(explained: dict[str, Any]) -> str:
    """What `explain` found, as text: in each example the tokens on which the latent fires are in «», and the largest
    activation stands before it."""
    blocks = []
    for latent in explained["latents"]:
        lines = [f"latent {latent['latent']} of {explained['sae']} ({explained['model']})"]
        if latent["fired"]:
            lines.append(
                f"  fires on {latent['density']:.3%} of {explained['tokens']:,} held-out tokens, there "
                f"{latent['mean']:.4g} in the mean and {latent['max']:.4g} at most"
            )
        else:
            lines.append(f"  does not fire on any of {explained['tokens']:,} held-out tokens")
        for side in ("raises", "lowers"):
            if latent[side] is not None:
                listed = ", ".join(f"{entry['token']!r} {entry['logit']:+.2f}" for entry in latent[side])
                lines.append(f"  {side}  {listed}")
        for example in latent["examples"]:
            peak = max(example["activations"])
            runs = marked_runs(example["tokens"], example["activations"], latent["max"], _BEFORE, _AFTER)
            lines.append(f"  {peak:8.4g}  " + "".join(f"«{text}»" if tip else text for text, _, tip in runs).strip())
        blocks.append("\n".join(lines))
    if explained["latents"][0]["raises"] is not None:
        blocks.append(
            "raises, lowers: by the decoder row alone, through the final norm to the unembedding, past the later blocks"
        )
    return "\n\n".join(blocks)


def _check_has_text(found: Finished) -> None:
    run = found.run
    if run is None:
        raise UserError(
            f"run: got {found.folder}, an SAE that lies in no run, needs one in a run, whose held-out text explains it"
        )
    if run.activations is not None and open_activations(run.activations).tokens is None:
        raise UserError(
            f"run: got {run.output}, which was trained on {run.activations}, files without text, needs a run on text, "
            "on a folder of `aksae collect`, or on files with tokens and contexts"
        )


def _heldout(found: Finished, model: LanguageModel) -> Iterator[_Rows]:
    """The codes of the rows that the run held out, once they are known to be those."""
    run, sae = found.run, found.sae
    with frozen(sae.W_enc):
        if run.activations is not None:
            store = _collected(found, model)
            numbers = torch.zeros_like(store.tokens) if store.context is None else store.context
            yield from _of_store(sae, store, store.tokens, numbers, run)
            return
        contexts = _contexts(run, model)
        if run.stream:
            yield from _of_forwards(sae, model, contexts, run)
            return
        store = collect_contexts(model, contexts, cache_folder(run.cache), batch_size=run.model.batch_size)
        # Not the store's own tokens, which version 0.1 did not keep.
        yield from _of_store(sae, store, *_tokens(contexts, np.arange(len(contexts))), run)


def _contexts(run: TrainConfig, model: LanguageModel) -> ContextSet:
    """The held-out contexts of a run on text: those that have a label, where the run has labels."""
    corpus = Corpus(model, *load_contexts(run.text, model.tokenizer))
    require_same(
        f"{run.output}: what the run was trained on",
        read_json(run.output / "data.json", needs=dict),
        corpus.identity(),
        "the model, the text or its settings have changed",
    )
    if not (run.output / LABELS).is_file():
        return corpus.heldout
    return corpus.heldout.select((~read_scores(run.output).heldout.isnan()).numpy())


def _collected(found: Finished, model: LanguageModel) -> Activations:
    """The held-out rows of a run on activations that were there."""
    everything = open_activations(found.run.activations)
    recorded = read_json(found.run.output / "data.json", needs=dict)
    require_same(f"{found.run.output}: what the run was trained on", recorded, {"activations": everything.identity()})
    if "identity" in everything.info:
        require_same(f"{everything.path}: the model", everything.info["identity"], model.identity_at(found.site))
    return everything.split(found.run.text.heldout_fraction)[1]


def _tokens(contexts: ContextSet, index: np.ndarray) -> tuple[Tensor, Tensor]:
    """The loss tokens of the contexts `index`, and the number of the context of each."""
    mask = contexts.loss_mask[index]
    tokens, numbers = contexts.input_ids[index][mask], np.repeat(index, mask.sum(1))
    return torch.from_numpy(tokens).long(), torch.from_numpy(numbers)


def _of_store(sae: SAE, store: Activations, tokens: Tensor, contexts: Tensor, run: TrainConfig) -> Iterator[_Rows]:
    if isinstance(sae.config.selection, AdaptiveK):
        reader = BatchReader(store, probe_reads=run.probe_reads, train_on="all", device=sae.W_dec.device)
        batches = reader.in_order(run.batch_size)
        codes = (sae.encode(batch.x, reader.k(sae, batch), k_max=sae.k_bound) for batch in batches)
    else:
        rows = torch.arange(len(store)).split(run.batch_size)
        codes = (sae.encode(store.rows(part).to(sae.W_dec.device)) for part in rows)
    parts = zip(codes, tokens.split(run.batch_size), contexts.split(run.batch_size), strict=True)
    return (_Rows(*part) for part in parts)


def _of_forwards(sae: SAE, model: LanguageModel, contexts: ContextSet, run: TrainConfig) -> Iterator[_Rows]:
    for block in forward_blocks(model, contexts, contexts_per_forward=run.model.batch_size):
        codes = sae.encode(block.checked().to(sae.W_dec.device))
        yield _Rows(codes, *_tokens(contexts, block.index))


def _statistics(activations: Tensor) -> dict[str, Any]:
    fired = activations[activations > 0]
    return {
        "fired": len(fired),
        "density": len(fired) / len(activations),
        "mean": fired.double().mean().item() if len(fired) else None,
        "max": float(activations.max()),
    }


def _strongest_tokens(effect: Tensor | None, n: int, tokenizer) -> dict[str, Any]:
    if effect is None:
        return {"raises": None, "lowers": None}

    def listed(order: Tensor) -> list[dict[str, Any]]:
        return [{"token": tokenizer.decode([token]), "logit": effect[token].item()} for token in order[:n].tolist()]

    order = effect.argsort(descending=True, stable=True)
    return {"raises": listed(order), "lowers": listed(order.flip(0))}


def _examples(activations: Tensor, ids: Tensor, contexts: Tensor, n: int, tokenizer) -> list[dict[str, Any]]:
    return [
        {
            "tokens": [tokenizer.decode([token]) for token in ids[rows].tolist()],
            "activations": activations[rows].tolist(),
        }
        for rows in strongest_contexts(activations, contexts, n)
    ]
