"""This project's own folders: `config.json` and `sae.safetensors`, as `SAE.save_pretrained` writes them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import selections
from ..config import SAEConfig, from_dict, to_dict, validate_sae
from ..files import CONFIG, WEIGHTS
from ..probe import ComplexityProbe
from .folding import Needs, exactly, fit
from .reading import Tensors
from .stored import Activation, AdaptiveK, JumpReLU, ReLU, StoredSAE, TopK

# Rows of a decoder that was kept at unit norm differ from it by their rounding, in 16 bits by as much as this.
_UNIT = 0.01


def unpack(files: dict[str, Any]) -> StoredSAE:
    config = from_dict(SAEConfig, files[CONFIG], CONFIG)
    validate_sae(config)
    tensors = Tensors(WEIGHTS, files[WEIGHTS])
    weights = {
        "W_enc": tensors.take("W_enc", config.d_sae, config.d_in),
        "b_enc": tensors.take("b_enc", config.d_sae),
        "W_dec": tensors.take("W_dec", config.d_sae, config.width_out),
        "b_dec": tensors.take("b_dec", config.width_out),
    }
    notes = []
    if config.skip:
        W_skip, scale = tensors.take("W_skip", config.width_out, config.d_in), config.input_scale / config.output_scale
        # It reads scaled activations here, and what it adds is scaled back.
        weights["W_skip"] = W_skip if scale == 1 else W_skip * scale
        notes += [f"activations' scales folded into W_skip as {scale:.6g}"] * (scale != 1)
    activation, note = _activation(config, tensors)
    tensors.finish()
    return StoredSAE(
        **weights,
        activation=activation,
        subtract_b_dec=not config.transcoder,
        transcoder=config.transcoder,
        input_scale=config.input_scale,
        output_scale=config.output_scale,
        notes=(*notes, *([note] if note else [])),
    )


def _activation(config: SAEConfig, tensors: Tensors) -> tuple[Activation, str]:
    """What the selection does at inference, and what of that no other format says."""
    selection = config.selection
    if isinstance(selection, selections.AdaptiveK):
        weight, bias = tensors.take("probe.weight", config.d_in), tensors.take("probe.bias")
        return AdaptiveK(probe_of(weight, bias, selection), selection), ""
    if isinstance(selection, selections.TopK):
        return TopK(selection.k), ""
    if isinstance(selection, selections.Priced):
        tensors.pop("price")
        return TopK(selection.budget), f"left out: the price of latents; a TopK of its mean L0, {selection.budget}"
    if isinstance(selection, selections.Need):
        tensors.pop("need_weight")
        tensors.pop("need_bias")
        return TopK(selection.budget), f"left out: the probe of need; a TopK of its mean L0, {selection.budget}"
    if isinstance(selection, selections.JumpReLU):
        threshold = tensors.take("log_threshold", config.d_sae, any_float=True).exp()
    else:
        # One threshold for all latents is what BatchTopK keeps of training.
        threshold = tensors.take("threshold", any_float=True).expand(config.d_sae)
        tensors.pop("threshold_steps")
    width = selection.width(config.d_sae)
    note = f"left out: {selection} keeps at most {width} latents of a row" if width < config.d_sae else ""
    return JumpReLU(threshold), note


def needs(sae: StoredSAE) -> Needs:
    return Needs((TopK, AdaptiveK), subtract_b_dec=True)


def pack(sae: StoredSAE) -> dict[str, Any]:
    tensors = {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    if isinstance(sae.activation, TopK):
        selection = selections.TopK(sae.activation.k)
    else:
        selection = sae.activation.selection
        tensors |= probe_tensors(sae)
    config = SAEConfig(sae.d_in, sae.d_sae, selection)
    validate_sae(config)
    return {CONFIG: to_dict(config), WEIGHTS: tensors}


def without_rule(sae: StoredSAE) -> StoredSAE:
    """The same SAE as an `aksae.SAE` computes it, with every positive score a latent: its own rule is left out.

    Decoder rows get unit norm, and scores the norms that they had, so that the largest scores are those of the latents
    that add most to the output. Scales stay, and a tensor that nothing is folded into is the given one.

    Raises UserError with the reason for what an `aksae.SAE` does not compute: a normalisation of each input, or an
    autoencoder's skip connection.
    """
    bare = replace(sae, activation=ReLU(), input_scale=1.0, output_scale=1.0)
    norm = torch.linalg.vector_norm(sae.W_dec, dim=-1, dtype=torch.promote_types(sae.W_dec.dtype, torch.float32))
    if bare.decoder_norm == "none" and (norm - 1).abs().max() > _UNIT:
        bare = replace(bare, decoder_norm="selection")
    needs = Needs((ReLU,), not sae.transcoder, transcoder=sae.transcoder, skip=sae.transcoder, d_out=True)
    bare = fit(bare, needs)
    return replace(bare, input_scale=sae.input_scale, output_scale=sae.output_scale)


def as_sae(sae: StoredSAE, selection: selections.Selection) -> tuple[SAEConfig, dict[str, Tensor]]:
    """Config and weights of the `aksae.SAE` with the latents of `sae` that chooses them by `selection`.

    Tensors are contiguous, and shared with `sae` where nothing is folded. Raises as `without_rule`.
    """
    sae = without_rule(sae)
    d_out = sae.W_dec.shape[1] if sae.transcoder else None
    skip, scales = sae.W_skip is not None, (sae.input_scale, sae.output_scale)
    weights = {name: getattr(sae, name).contiguous() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    if sae.W_skip is not None:
        # It reads scaled activations there, and what it adds is scaled back.
        weights["W_skip"] = (sae.W_skip * (sae.output_scale / sae.input_scale)).contiguous()
    return SAEConfig(sae.d_in, sae.d_sae, selection, d_out, skip, *scales), weights


def probe_tensors(sae: StoredSAE) -> dict[str, Tensor]:
    """`probe.weight [D]` and `probe.bias []`, in the weights' dtype."""
    tensors = {f"probe.{name}": tensor for name, tensor in sae.activation.probe.state_dict().items()}
    return {name: exactly(tensor, sae.W_enc.dtype, name) for name, tensor in tensors.items()}


def probe_of(weight: Tensor, bias: Tensor, selection: selections.AdaptiveK) -> ComplexityProbe:
    """The probe with `weight [D]` and `bias []`, shared with it."""
    probe = ComplexityProbe(len(weight), selection.k_map.score_min, selection.k_map.score_max)
    probe.load_state_dict({"weight": weight, "bias": bias}, assign=True)
    return probe.requires_grad_(False)
