"""OpenAI sparse_autoencoder: one `.pt` file, the state dictionary with the activation in it.

There a TopK SAE always normalises its input, and no other does.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import UserError
from .folding import Needs
from .reading import Fields, Tensors
from .stored import ReLU, StoredSAE, TopK

SUFFIX = ".pt"
_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")


def unpack(files: dict[str, Any]) -> StoredSAE:
    tensors = Tensors("state dictionary", files[""])
    name = tensors.pop("activation", "ReLU")
    state = Fields("activation_state_dict", tensors.pop("activation_state_dict", {}))
    if name not in ("TopK", "ReLU"):
        raise UserError(f"activation: got {name!r}, needs TopK or ReLU")
    if name == "TopK":
        state.expect("postact_fn", str, "ReLU", "latents below 0 have no place here")
    W_enc = tensors.take("encoder.weight", None, None)
    d_sae, d_in = W_enc.shape
    sae = StoredSAE(
        W_enc,
        tensors.take("latent_bias", d_sae),
        tensors.take("decoder.weight", d_in, d_sae).T,
        tensors.take("pre_bias", d_in),
        activation=TopK(state.take("k", int)) if name == "TopK" else ReLU(),
        subtract_b_dec=True,
        input_norm=_norm(name == "TopK"),
    )
    tensors.finish(*_STATISTICS)
    return sae


def needs(sae: StoredSAE) -> Needs:
    return Needs((TopK, ReLU), subtract_b_dec=True, input_norm=(_norm(isinstance(sae.activation, TopK)),))


def pack(sae: StoredSAE) -> dict[str, Any]:
    state = {}
    if isinstance(sae.activation, TopK):
        state = {"k": sae.activation.k, "postact_fn": "ReLU"}
    return {
        "": {
            "pre_bias": sae.b_dec,
            "latent_bias": sae.b_enc,
            "stats_last_nonzero": torch.zeros(sae.d_sae, dtype=torch.long),
            "latents_activation_frequency": torch.ones(sae.d_sae),
            "latents_mean_square": torch.zeros(sae.d_sae),
            "encoder.weight": sae.W_enc,
            "decoder.weight": sae.W_dec.T,
            "activation": type(sae.activation).__name__,
            "activation_state_dict": state,
        }
    }


def _norm(topk: bool) -> str:
    return "layer_norm" if topk else "none"
