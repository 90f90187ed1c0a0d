"""What a language model says with and without an edited latent."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from .activations import LanguageModel, quiet
from .config import ModelChoice
from .errors import UserError
from .finished import open_finished
from .intervene import Set, intervene
from .sites import Hook
from .text import special_tokens


@dataclass(frozen=True)
class Steered:
    """Two continuations of a prompt, drawn with the same seed."""

    where: str
    """Which latent was set to what."""
    without: str
    steered: str


def steer(
    run: Path,
    prompt: str,
    latent: int,
    strength: float,
    *,
    tokens: int = 40,
    seed: int = 0,
    model: ModelChoice | None = None,
    site: Hook | None = None,
) -> Steered:
    """Continue `prompt`, without and with the latent set to `strength` at every token, prompt included.

    Args:
        run: as in `open_finished`.
        prompt: text; the special tokens that contexts begin with are put before it.
        latent: its number.
        strength: the activation it is given, in the unit in which `aksae explain` prints its mean and its largest: once
            to a few times the largest steers, 0 ablates.
        tokens: how many are drawn at most.
        seed: of both drawings.
        model, site: in place of what the run says.

    Raises:
        UserError: a setting out of range, no SAE, no model that fits it, or one that predicts no next token.
    """
    if tokens < 1:
        raise UserError(f"tokens: got {tokens}, needs 1 or more")
    if not math.isfinite(strength):
        raise UserError(f"strength: got {strength}, needs a finite number")
    found = open_finished(run, model, site)
    found.check_latent(latent)
    language_model = found.load_model()
    language_model.check_predicts("steer")
    ids = _prompt_ids(language_model, prompt, tokens)
    without = _continued(language_model, ids, tokens, seed)
    with intervene(language_model, found.sae, {latent: Set(strength)}, found.site):
        steered = _continued(language_model, ids, tokens, seed)
    where = f"latent {latent} of {found.folder} set to {strength:g} at {language_model.described(found.site)}"
    return Steered(where, without, steered)


def _prompt_ids(model: LanguageModel, prompt: str, tokens: int) -> list[int]:
    own = model.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if not own:
        raise UserError(f"prompt: got {prompt!r}, needs text of at least one token")
    ids = [*special_tokens(model.tokenizer)[0], *own]
    if model.positions is not None and len(ids) + tokens > model.positions:
        raise UserError(
            f"tokens: got {tokens} after a prompt of {len(ids)}, needs at most {model.positions} together, the "
            f"positions of {model.name}"
        )
    return ids


@torch.no_grad()
def _continued(model: LanguageModel, ids: list[int], tokens: int, seed: int) -> str:
    input_ids = torch.tensor([ids], device=model.device)
    tokenizer, devices = model.tokenizer, [model.device] if model.device.type == "cuda" else []
    # Some models have no token for padding, and say so in a warning; a single row is never padded.
    pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
    with torch.random.fork_rng(devices), quiet():
        torch.manual_seed(seed)
        drawn = model.model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=tokens,
            do_sample=True,
            pad_token_id=pad,
            use_cache=True,
        )
    return tokenizer.decode(drawn[0, len(ids) :], skip_special_tokens=True)
