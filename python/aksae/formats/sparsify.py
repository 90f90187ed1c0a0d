"""EleutherAI sparsify: `cfg.json` and `sae.safetensors` in the folder of a hookpoint."""

from __future__ import annotations

from typing import Any

from .folding import Needs
from .reading import Fields, Tensors, agree
from .stored import StoredSAE, TopK

_CONFIG, _WEIGHTS = "cfg.json", "sae.safetensors"


def unpack(files: dict[str, Any]) -> StoredSAE:
    fields = Fields(_CONFIG, files[_CONFIG])
    fields.expect("activation", str, "topk", "the best of each group is no TopK")
    fields.expect("signed", bool, False, "latents below 0 have no place here")
    d_in = fields.take("d_in", int)
    # 0 stands for unset.
    d_sae = fields.take("num_latents", int, 0) or d_in * fields.take("expansion_factor", int, 32)
    tensors = Tensors(_WEIGHTS, files[_WEIGHTS])
    W_enc = tensors.take("encoder.weight", None, d_in)
    agree(_CONFIG, "num_latents or expansion_factor", d_sae, len(W_enc))
    transcoder = fields.take("transcode", bool, False)
    skip = fields.take("skip_connection", bool, False)
    sae = StoredSAE(
        W_enc,
        tensors.take("encoder.bias", d_sae),
        tensors.take("W_dec", d_sae, d_in),
        tensors.take("b_dec", d_in),
        activation=TopK(fields.take("k", int, 32)),
        subtract_b_dec=not transcoder,
        W_skip=tensors.take("W_skip", d_in, d_in) if skip else None,
        transcoder=transcoder,
    )
    tensors.finish()
    return sae


def needs(sae: StoredSAE) -> Needs:
    return Needs((TopK,), subtract_b_dec=not sae.transcoder, transcoder=None, skip=True)


def pack(sae: StoredSAE) -> dict[str, Any]:
    config = {
        "activation": "topk",
        "expansion_factor": sae.d_sae // sae.d_in,
        # Training on would otherwise begin by changing the decoder.
        "normalize_decoder": False,
        "num_latents": sae.d_sae,
        "k": sae.activation.k,
        "multi_topk": False,
        "skip_connection": sae.W_skip is not None,
        "transcode": sae.transcoder,
        "d_in": sae.d_in,
    }
    tensors = {"encoder.weight": sae.W_enc, "encoder.bias": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    if sae.W_skip is not None:
        tensors["W_skip"] = sae.W_skip
    return {_CONFIG: config, _WEIGHTS: tensors}
