"""circuit-tracer: per-layer transcoders, `layer_<i>.safetensors`. Cross-layer ones are several decoders to a latent."""

from __future__ import annotations

from typing import Any

from ..errors import UserError
from .folding import Needs
from .reading import Tensors
from .stored import JumpReLU, ReLU, StoredSAE

SUFFIX = ".safetensors"
_THRESHOLD = "activation_function.threshold"


def unpack(files: dict[str, Any]) -> StoredSAE:
    ((file, values),) = files.items()
    if any(name.startswith(("W_enc_", "W_dec_")) for name in values):
        raise UserError("got a cross-layer transcoder, needs one layer's: its latents write to several layers")
    tensors = Tensors(file or "weights", values)
    W_enc = tensors.take("W_enc", None, None)
    d_sae, d_in = W_enc.shape
    activation = ReLU()
    if _THRESHOLD in tensors:
        threshold = tensors.take(_THRESHOLD, d_sae, any_float=True)
        if (threshold < 0).any():
            raise UserError(f"tensor {_THRESHOLD}: got {float(threshold.min())}, needs 0 or more: latents are positive")
        activation = JumpReLU(threshold)
    sae = StoredSAE(
        W_enc,
        tensors.take("b_enc", d_sae),
        tensors.take("W_dec", d_sae, d_in),
        tensors.take("b_dec", d_in),
        activation=activation,
        subtract_b_dec=False,
        W_skip=tensors.take_if("W_skip", d_in, d_in),
        transcoder=True,
    )
    tensors.finish()
    return sae


def needs(sae: StoredSAE) -> Needs:
    return Needs((ReLU, JumpReLU), subtract_b_dec=False, transcoder=True, skip=True)


def pack(sae: StoredSAE) -> dict[str, Any]:
    tensors = {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    if isinstance(sae.activation, JumpReLU):
        # It does not rectify; latents are positive here whatever the threshold.
        tensors[_THRESHOLD] = sae.activation.threshold.clamp_min(0)
    if sae.W_skip is not None:
        tensors["W_skip"] = sae.W_skip
    return {"": tensors}
