"""Llama Scope, and what else Llamascopium wrote in 2024, as Language-Model-SAEs: `hyperparams.json`. Read, not written.

That host changes the weights while it loads them, and means its threshold for the changed ones. With s_in and s_out,
which are sqrt(D) over the average norms of what is read and written:

    norm_activation "dataset-wise":   b_enc / s_in, W_dec * s_in / s_out and b_dec / s_out
    sparsity_include_decoder_norm:    W_enc and b_enc times the norms of W_dec's rows, which become 1
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ..errors import UserError
from .llamascopium import weights_of
from .reading import Fields, agree
from .stored import Activation, JumpReLU, ReLU, StoredSAE, TopK

_CONFIG = "hyperparams.json"


def unpack(files: dict[str, Any]) -> StoredSAE:
    fields, tensors = Fields(_CONFIG, files[_CONFIG]), weights_of(files, _CONFIG)
    fields.expect("use_glu_encoder", bool, False, "its gate is a second encoder")
    d_in = fields.take("d_model", int)
    W_enc = tensors.take("encoder.weight", None, d_in)
    d_sae = len(W_enc)
    agree(_CONFIG, "d_sae", fields.take("d_sae", int, d_sae), d_sae)
    has_bias = fields.take("use_decoder_bias", bool, True)
    b_enc, W_dec = tensors.take("encoder.bias", d_sae), tensors.take("decoder.weight", d_in, d_sae).T
    b_dec = tensors.take("decoder.bias", d_in) if has_bias else W_enc.new_zeros(d_in)
    tensors.finish()
    hook_in = fields.take("hook_point_in", str)
    hook_out = fields.take("hook_point_out", str, hook_in)
    norm = fields.take("norm_activation", str, "token-wise")
    notes = ()
    if norm == "dataset-wise":
        s_in, s_out = (_scale(fields.inner("dataset_average_activation_norm"), way, d_in) for way in ("in", "out"))
        b_enc, b_dec = b_enc / s_in, b_dec / s_out
        # Equal scales, those of an SAE, leave the decoder's bits as they are.
        W_dec = W_dec if s_in == s_out else W_dec * (s_in / s_out)
        notes = ("the dataset's average norms folded into the weights, as the host does when it loads them",)
    elif norm not in ("inference", "none") and (norm != "token-wise" or hook_in != hook_out):
        raise UserError(
            f"{_CONFIG}: norm_activation: got {norm}, whose factor is not the input's own, needs dataset-wise, "
            "inference, none, or token-wise where it is no transcoder"
        )
    return StoredSAE(
        W_enc,
        b_enc,
        W_dec,
        b_dec,
        activation=_activation(fields, d_sae, W_enc.dtype),
        subtract_b_dec=has_bias and fields.take("apply_decoder_bias_to_pre_encoder", bool, True),
        decoder_norm="codes" if fields.take("sparsity_include_decoder_norm", bool, True) else "none",
        input_norm="constant_norm_rescale" if norm == "token-wise" else "none",
        transcoder=hook_in != hook_out,
        hook_name=hook_in,
        hook_name_out=hook_out,
        notes=notes,
    )


def _scale(norms: Fields, way: str, d_in: int) -> float:
    norm = norms.take(way, float)
    if norm <= 0:
        raise UserError(f"{norms.file}: {way}: got {norm}, needs a number above 0")
    return math.sqrt(d_in) / norm


def _activation(fields: Fields, d_sae: int, dtype: torch.dtype) -> Activation:
    name = fields.take("act_fn", str, "relu").lower()
    threshold = fields.take("jump_relu_threshold", float, 0.0)
    if threshold < 0:
        raise UserError(f"{_CONFIG}: jump_relu_threshold: got {threshold}, needs 0 or more: latents are positive")
    # A TopK SAE with a threshold was processed into a JumpReLU SAE, and its host runs it as one.
    if name == "jumprelu" or (name == "topk" and threshold > 0):
        return JumpReLU(torch.full((d_sae,), threshold, dtype=dtype))
    if name == "topk":
        return TopK(fields.take("top_k", int, 50))
    if name == "relu":
        return ReLU()
    raise UserError(f"{_CONFIG}: act_fn: got {name}, needs topk, jumprelu or relu")
