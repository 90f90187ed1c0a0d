"""Llamascopium (Language-Model-SAEs): `config.json` and `sae_weights.safetensors`, or others of its names for it.

Its SAE is given normalised activations; here normalising and undoing it are parts of the SAE. Until the middle of 2025
its tensors were those of `nn.Linear`, as in Llama-Scope-R1-Distill. Older files still are `llama_scope`'s.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from .folding import Needs
from .reading import Fields, Tensors, agree, number
from .stored import Activation, JumpReLU, ReLU, StoredSAE, TopK

_CONFIG, _WEIGHTS = "config.json", "sae_weights.safetensors"
_LOG_THRESHOLD = "activation_function.log_jumprelu_threshold"
_AVERAGE_NORM = "dataset_average_activation_norm."
_ACT_FN = {TopK: "topk", JumpReLU: "jumprelu", ReLU: "relu"}


def unpack(files: dict[str, Any]) -> StoredSAE:
    fields = Fields(_CONFIG, files[_CONFIG])
    fields.expect("sae_type", str, "sae", "only the plain SAE has one encoder and one decoder")
    fields.expect("use_glu_encoder", bool, False, "its gate is a second encoder")
    tensors = weights_of(files, _CONFIG)
    d_in = fields.take("d_model", int)
    linear = "encoder.weight" in tensors
    W_enc = tensors.take("encoder.weight", None, d_in) if linear else tensors.take("W_E", d_in, None).T
    d_sae = len(W_enc)
    agree(_CONFIG, "expansion_factor", int(d_in * fields.take("expansion_factor", float)), d_sae)
    hook_in, hook_out = (fields.take(f"hook_point_{way}", str) for way in ("in", "out"))
    weights = {
        "b_enc": tensors.take("encoder.bias" if linear else "b_E", d_sae),
        "W_dec": tensors.take("decoder.weight", d_in, d_sae).T if linear else tensors.take("W_D", d_sae, d_in),
    }
    activation = _activation(fields, tensors, d_sae, "log_jumprelu_threshold" if linear else _LOG_THRESHOLD)
    # Scaled by a norm or not, a score is positive.
    scaled = fields.take("sparsity_include_decoder_norm", bool, True) and not isinstance(activation, ReLU)
    has_bias = fields.take("use_decoder_bias", bool, True)
    average_norms = {hook: tensors.pop(_AVERAGE_NORM + hook) for hook in dict.fromkeys((hook_in, hook_out))}
    sae = StoredSAE(
        W_enc,
        **weights,
        b_dec=tensors.take("decoder.bias" if linear else "b_D", d_in) if has_bias else W_enc.new_zeros(d_in),
        activation=activation,
        subtract_b_dec=has_bias and fields.take("apply_decoder_bias_to_pre_encoder", bool, False),
        decoder_norm="selection" if scaled else "none",
        transcoder=hook_in != hook_out,
        **_normalisation(fields, hook_in, hook_out, average_norms),
        hook_name=hook_in,
        hook_name_out=hook_out,
    )
    tensors.finish()
    return sae


def needs(sae: StoredSAE) -> Needs:
    return Needs(
        (TopK, JumpReLU, ReLU),
        subtract_b_dec=False,
        decoder_norm=("none", "selection"),
        input_norm=("none",) if sae.transcoder else ("none", "constant_norm_rescale"),
        transcoder=None,
        note="thresholds written as their logarithms" if isinstance(sae.activation, JumpReLU) else "",
    )


def pack(sae: StoredSAE) -> dict[str, Any]:
    hook_in = hook_out = sae.hook_name or "unknown"
    if sae.transcoder:
        # That they differ is what makes it one.
        hook_out = sae.hook_name_out if sae.hook_name_out not in (None, hook_in) else f"{hook_in}.out"
    config = {
        "sae_type": "sae",
        "d_model": sae.d_in,
        "expansion_factor": _expansion(sae.d_sae, sae.d_in),
        "use_decoder_bias": True,
        "act_fn": _ACT_FN[type(sae.activation)],
        "norm_activation": "token-wise" if sae.input_norm == "constant_norm_rescale" else "inference",
        "sparsity_include_decoder_norm": sae.decoder_norm == "selection",
        "hook_point_in": hook_in,
        "hook_point_out": hook_out,
        "use_glu_encoder": False,
    }
    tensors = {"W_E": sae.W_enc.T, "b_E": sae.b_enc, "W_D": sae.W_dec, "b_D": sae.b_dec}
    if isinstance(sae.activation, TopK):
        config["top_k"] = sae.activation.k
    elif isinstance(sae.activation, JumpReLU):
        tensors[_LOG_THRESHOLD] = _logarithm(sae.activation.threshold, sae.W_enc.dtype)
    return {_CONFIG: config, _WEIGHTS: tensors}


def weights_of(files: dict[str, Any], config: str) -> Tensors:
    """The tensors of the one file beside `config`."""
    (name,) = files.keys() - {config}
    # A pickle has the tensors beside the version.
    return Tensors(name, Tensors(name, files[name]).pop("sae") if name.endswith(".pt") else files[name])


def _activation(fields: Fields, tensors: Tensors, d_sae: int, log_threshold: str) -> Activation:
    name = fields.take("act_fn", str, "relu").lower()
    if name == "topk":
        return TopK(fields.take("top_k", int, 50))
    if name == "jumprelu":
        return JumpReLU(tensors.take(log_threshold, d_sae, any_float=True).exp())
    if name == "relu":
        return ReLU()
    reason = "; what it keeps of a row depends on the batch" if name == "batchtopk" else ""
    raise UserError(f"{_CONFIG}: act_fn: got {name}{reason}, needs topk, jumprelu or relu")


def _normalisation(fields: Fields, hook_in: str, hook_out: str, average_norms: dict[str, Any]) -> dict[str, Any]:
    kind = fields.take("norm_activation", str, "dataset-wise")
    if kind == "inference":
        return {}
    if kind == "token-wise" and hook_in == hook_out:
        return {"input_norm": "constant_norm_rescale"}
    if kind == "dataset-wise":
        root = math.sqrt(fields.take("d_model", int))
        scales = []
        for hook in (hook_in, hook_out):
            norm = number(f"tensor {_AVERAGE_NORM}{hook}", average_norms[hook])
            if norm <= 0:
                raise UserError(f"tensor {_AVERAGE_NORM}{hook}: got {norm}, needs a number above 0 (dataset-wise)")
            scales.append(root / norm)
        return {"input_scale": scales[0], "output_scale": scales[1]}
    raise UserError(
        f"{_CONFIG}: norm_activation: got {kind}, whose factor is not the input's own, needs inference, dataset-wise, "
        "or token-wise where it is no transcoder"
    )


def _expansion(d_sae: int, d_in: int) -> float:
    """The factor of which the host's own `int(d_model * expansion_factor)` makes d_sae."""
    factor = d_sae / d_in
    return factor if int(d_in * factor) == d_sae else math.nextafter(factor, math.inf)


def _logarithm(threshold: Tensor, dtype: torch.dtype) -> Tensor:
    """The logarithms of thresholds, a negative one counting as 0, which keeps the same positive scores."""
    threshold = threshold.double().clamp_min(0)
    log = threshold.log().to(dtype)
    if not torch.allclose(log.double().exp(), threshold, rtol=1e-5, atol=0):
        raise UserError(f"threshold: got values whose logarithms {dtype} cannot hold, needs float32")
    return log
