"""Complexity labels: a score from 0 (simplest) to 10 for each context, by one of four scorers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tqdm import tqdm

from .activations import LOSS_TOKENS, LanguageModel
from .config import LabelConfig, label_file
from .errors import UserError
from .rubric import SCORE_MAX
from .text import ContextSet, normalised, read_rows

SURPRISAL_RANGE = (1.0, 6.0)
"""Mean losses in nats per token that `surprisal` maps to 0 and 10."""


def score_contexts(
    contexts: ContextSet,
    config: LabelConfig,
    *,
    model: LanguageModel | None = None,
    cache: Path | None = None,
    progress: bool = True,
) -> np.ndarray:
    """Scores `[N]` float32 from 0 to 10, one per context; NaN where scoring failed, which is never a 0.

    - `text-stats`: six measured dimensions, weighted (`aksae.text_stats`); offline. NaN for a context without a word.
    - `surprisal`: `10 * (loss - 1) / (6 - 1)`, clamped to 0..10, of `model`'s mean next-token loss in nats; a fixed
      map: 1 nat is text the model nearly knows by heart, 6 nats text it can hardly follow. NaN where the loss is NaN.
    - `llm`: six dimensions rated by a model behind an OpenAI-compatible endpoint, weighted here; answers are kept in
      the folder `cache`, if given (`aksae.llm_labels`). NaN for a context without a valid answer.
    - `file`: scores from `config.file`, a `.parquet` or `.jsonl` file, matched by text, white space normalised. NaN for
      a context whose text is not in the file.

    Raises `UserError` for an unknown scorer, `surprisal` without `model`, what `aksae.llm_labels.rate` raises, and for
    a label file that is missing, unreadable, matches no context, or has a row whose text is no string, whose score is
    missing, not a number or outside 0..10, or which gives a text a second, different score.
    """
    if config.scorer == "text-stats":
        return _text_stats(contexts, progress)
    if config.scorer == "surprisal":
        return _surprisal(contexts, model, progress)
    if config.scorer == "llm":
        from . import llm_labels

        return llm_labels.rate(contexts.texts, config, cache=cache, progress=progress)
    if config.scorer == "file":
        return _file(contexts, config, progress)
    raise UserError(f"labels.scorer: got {config.scorer!r}, needs text-stats, surprisal, llm or file")


def _text_stats(contexts: ContextSet, progress: bool) -> np.ndarray:
    from . import text_stats

    with tqdm(contexts.texts, desc="text-stats labels", unit="context", disable=not progress) as bar:
        return np.array([text_stats.score(text) for text in bar], np.float32)


def _surprisal(contexts: ContextSet, model: LanguageModel | None, progress: bool) -> np.ndarray:
    if model is None:
        raise UserError("labels.scorer: surprisal needs a language model, got none")
    losses = np.empty(len(contexts), np.float32)
    tokens = contexts.attention_mask.sum(axis=1)
    with tqdm(total=int(tokens.sum()), desc="surprisal labels", unit="token", disable=not progress) as bar:
        size = max(1, LOSS_TOKENS // contexts.input_ids.shape[1])
        for start in range(0, len(contexts), size):
            batch = slice(start, start + size)
            losses[batch] = model.token_losses(contexts.input_ids[batch], contexts.attention_mask[batch]).cpu()
            bar.update(int(tokens[batch].sum()))
    low, high = SURPRISAL_RANGE
    return np.clip(SCORE_MAX * (losses - low) / (high - low), 0.0, SCORE_MAX)


def _file(contexts: ContextSet, config: LabelConfig, progress: bool) -> np.ndarray:
    path = label_file(config)
    rows = read_rows(path, [config.text_column, config.score_column], "labels.file")
    known: dict[str, float] = {}
    for place, (text, score) in tqdm(rows, desc="label file", unit="row", disable=not progress):
        if not isinstance(text, str):
            raise UserError(f"labels.file: {place}: column {config.text_column!r} got {text!r}, needs a string")
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not 0 <= score <= SCORE_MAX:
            raise UserError(
                f"labels.file: {place}: column {config.score_column!r} got {score!r}, needs a number from 0 to "
                f"{SCORE_MAX:g}"
            )
        if known.setdefault(normalised(text), score) != score:
            raise UserError(
                f"labels.file: {place}: gives score {score}, needs one score a text (earlier: "
                f"{known[normalised(text)]})"
            )
    scores = np.array([known.get(normalised(text), np.nan) for text in contexts.texts], np.float32)
    if np.isnan(scores).all() and len(scores):
        raise UserError(
            f"labels.file: none of the {len(scores)} contexts is among the {len(known)} texts of {path}; needs scores "
            "for these contexts (same text source, tokenizer and context length)"
        )
    return scores
