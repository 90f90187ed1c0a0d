"""What a format can hold, and how an SAE is brought into it: folded into its weights, or refused."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..files import dtype_name
from .stored import Activation, AdaptiveK, JumpReLU, ReLU, StoredSAE, TopK

_KEEPS = {
    TopK: "the k largest scores of a row",
    AdaptiveK: "as many scores of a row as its probe says",
    JumpReLU: "whatever is above its thresholds",
    ReLU: "every positive score",
}
# Rows converted to float64 at a time.
_CHUNK = 4096


@dataclass(frozen=True)
class Needs:
    """What the files of a format can say about one SAE."""

    activations: tuple[type, ...]
    subtract_b_dec: bool | None
    """None: either."""
    decoder_norm: tuple[str, ...] = ("none",)
    input_norm: tuple[str, ...] = ("none",)
    transcoder: bool | None = False
    """None: either."""
    skip: bool = False
    d_out: bool = False
    """Whether the output may be of another width than the input."""
    note: str = ""
    """What writing this SAE rounds or leaves out, if anything."""


def fit(sae: StoredSAE, needs: Needs) -> StoredSAE:
    """An SAE of the same latents and outputs that `needs` allow, its `notes` saying what was folded.

    Folding is exact up to one rounding of the weights. Raises UserError with the reason where nothing fits.
    """
    if not isinstance(sae.activation, needs.activations):
        kind, kinds = type(sae.activation), " or ".join(kind.__name__ for kind in needs.activations)
        raise UserError(f"got {kind.__name__}, which keeps {_KEEPS[kind]}, needs {kinds}")
    if needs.transcoder is not None and sae.transcoder != needs.transcoder:
        kinds = ("an autoencoder", "a transcoder")
        raise UserError(f"got {kinds[sae.transcoder]}, needs {kinds[needs.transcoder]}")
    if sae.W_skip is not None and not needs.skip:
        raise UserError("got a skip connection, needs an SAE without")
    if sae.W_dec.shape[1] != sae.d_in and not needs.d_out:
        raise UserError(f"got {sae.d_in} inputs and {sae.W_dec.shape[1]} outputs, needs as many of both")
    if sae.input_norm not in needs.input_norm:
        norms = " or ".join(needs.input_norm)
        raise UserError(f"got the input normalisation {sae.input_norm}, needs {norms}")
    scaled = not sae.input_scale == sae.output_scale == 1
    # Scales change decoder norms, so these go first.
    if sae.decoder_norm != "none" and (scaled or sae.decoder_norm not in needs.decoder_norm):
        sae = _fold_decoder_norm(sae)
    if scaled:
        sae = _fold_scales(sae)
    if needs.subtract_b_dec not in (None, sae.subtract_b_dec):
        sae = _fold_b_dec(sae)
    return _noted(sae, needs.note) if needs.note else sae


def left_out(activation: Activation, read_as: str) -> str:
    """What a format does not say of an AdaptiveK SAE that it takes to read `read_as`; "" where that is nothing.

    Its host gives every vector a k of its own; UserError where the probe was not fitted to single vectors.
    """
    if not isinstance(activation, AdaptiveK):
        return ""
    reads, penalty = activation.selection.probe, activation.selection.probe_lambda
    if reads == "mean":
        raise UserError("probe_reads: got mean, needs last or token: the host's probe reads single vectors")
    parts = [f"probe_reads = {reads}"] * (reads != read_as) + [f"probe_lambda = {penalty}"] * (penalty is not None)
    return f"not written: {', '.join(parts)}" if parts else ""


def exactly(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """`tensor` in `dtype`. Raises UserError where that would round it."""
    cast = tensor.to(dtype)
    if not torch.equal(cast.to(tensor.dtype), tensor):
        raise UserError(f"{name}: got {tensor.dtype} values that are not exact in {dtype}, the weights' dtype")
    return cast


def _fold_decoder_norm(sae: StoredSAE) -> StoredSAE:
    norm = torch.linalg.vector_norm(sae.W_dec, dim=-1, dtype=torch.float64)
    norm = norm.to(torch.promote_types(sae.W_dec.dtype, torch.float32))
    if sae.decoder_norm == "selection" and isinstance(sae.activation, JumpReLU):
        # Without a direction a latent's score is 0, which is above no threshold: infinity keeps it so.
        threshold = (sae.activation.threshold.clamp_min(0) / norm).where(norm > 0, torch.inf)
        activation = JumpReLU(threshold.to(sae.activation.threshold.dtype))
        return _noted(sae, "decoder norms folded into the thresholds", activation=activation, decoder_norm="none")
    note = "decoder norms folded into W_enc, b_enc and W_dec"
    if sae.decoder_norm == "selection":
        note += ", so that latents are larger by their norms"
    dtype = sae.W_enc.dtype
    return _noted(
        sae,
        note + _rounded(sae),
        W_enc=(sae.W_enc * norm[:, None]).to(dtype),
        b_enc=(sae.b_enc * norm).to(dtype),
        W_dec=(sae.W_dec / norm.where(norm > 0, 1)[:, None]).to(dtype),
        decoder_norm="none",
    )


def _fold_scales(sae: StoredSAE) -> StoredSAE:
    scales = " and ".join(f"{scale:.6g}" for scale in dict.fromkeys((sae.input_scale, sae.output_scale)))
    return _noted(
        sae,
        f"activations' scale {scales} folded into W_enc, W_dec and b_dec{_rounded(sae)}",
        W_enc=sae.W_enc * sae.input_scale,
        W_dec=sae.W_dec / sae.output_scale,
        b_dec=sae.b_dec / sae.output_scale,
        input_scale=1.0,
        output_scale=1.0,
    )


def _fold_b_dec(sae: StoredSAE) -> StoredSAE:
    """The same SAE with `subtract_b_dec` the other way round."""
    b_dec = sae.b_dec.double()
    shift = torch.cat([rows.double() @ b_dec for rows in sae.W_enc.split(_CHUNK)])
    sign = -1 if sae.subtract_b_dec else 1
    return _noted(
        sae,
        f"W_enc b_dec {'subtracted from' if sign < 0 else 'added to'} b_enc{_rounded(sae)}",
        b_enc=(sae.b_enc.double() + sign * shift).to(sae.b_enc.dtype),
        subtract_b_dec=not sae.subtract_b_dec,
    )


def _noted(sae: StoredSAE, note: str, **fields: Any) -> StoredSAE:
    return replace(sae, **fields, notes=(*sae.notes, note))


def _rounded(sae: StoredSAE) -> str:
    """What to say of folding into 16-bit weights: the rounding shows."""
    return f", rounded to {dtype_name(sae.W_enc.dtype)}" if sae.W_enc.dtype.itemsize == 2 else ""
