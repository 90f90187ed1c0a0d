"""`ae.pt` and `config.json`, whose `dict_class` says what the tensors are called.

Without `config.json` the names of the tensors tell the class, but for two that differ in nothing else than what they
keep. The class `AutoEncoderAdaptiveK` is that of `aksae.hosts.dictionary_learning`: its own `from_pretrained` reads it,
the host's `load_dictionary` does not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import selections
from ..errors import UserError
from ..k_policy import KMap
from .folding import Needs, left_out
from .native import probe_of, probe_tensors
from .reading import Fields, Tensors, agree, whole
from .stored import Activation, AdaptiveK, JumpReLU, ReLU, StoredSAE, TopK

OPEN = ("dict_class", "k")
_CONFIG, _WEIGHTS = "config.json", "ae.pt"
# Classes of one nn.Linear each way, and those of bare matrices.
_LINEAR = ("AutoEncoder", "AutoEncoderNew", "AutoEncoderTopK", "BatchTopKSAE", "AutoEncoderAdaptiveK")
_BARE = ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE")
# By a tensor that no other class has, but for those before it here.
_TOLD_BY = {
    "gate_bias": "GatedAutoEncoder",
    "probe.weight": "AutoEncoderAdaptiveK",
    "bias": "AutoEncoder",
    "decoder.bias": "AutoEncoderNew",
    "group_sizes": "MatryoshkaBatchTopKSAE",
    "W_enc": "JumpReluAutoEncoder",
}
# Of AutoEncoderAdaptiveK, in the order of its extra state.
_MAP = ("k_min", "k_max", "steepness", "score_min", "score_max")


def unpack(files: dict[str, Any], *, dict_class: str | None = None, k: int | None = None) -> StoredSAE:
    """The arguments are what `config.json` says where it is there."""
    tensors = Tensors(_WEIGHTS, files[_WEIGHTS])
    if _CONFIG in files:
        fields = Fields(_CONFIG, files[_CONFIG]).inner("trainer").filled(dict_class=dict_class, k=k)
    else:
        told = dict_class or _class_of(tensors)
        fields = Fields(f"instead of {_CONFIG} (--dict-class, --k)", {}).filled(dict_class=told, k=k)
    kind = fields.take("dict_class", str)
    if kind == "GatedAutoEncoder":
        raise UserError(f"{fields.file}: dict_class: got {kind}, whose gate is a second encoder, needs one encoder")
    if kind not in _LINEAR + _BARE:
        raise UserError(f"{fields.file}: dict_class: got {kind}, needs one of {', '.join(_LINEAR + _BARE)}")
    if kind == "AutoEncoderTopK" and "_extra_state" in tensors and "probe.weight" in tensors:
        # TopKTrainer names this class in its settings whatever its `dict_class` is.
        kind = "AutoEncoderAdaptiveK"
    weights = _linear(tensors) if kind in _LINEAR else _bare(tensors)
    d_sae, d_in = weights["W_enc"].shape
    agree(_CONFIG, "activation_dim", fields.take("activation_dim", int, d_in), d_in)
    agree(_CONFIG, "dict_size", fields.take("dict_size", int, d_sae), d_sae)
    activation = _activation(kind, fields, tensors, weights["W_enc"])
    tensors.finish("k", "group_sizes")
    return StoredSAE(
        **weights,
        activation=activation,
        subtract_b_dec=kind not in ("AutoEncoderNew", "JumpReluAutoEncoder"),
        model_name=fields.take("lm_name", str, None),
        hook_name=fields.take("submodule_name", str, None),
    )


def needs(sae: StoredSAE) -> Needs:
    subtract = {TopK: True, AdaptiveK: True, JumpReLU: False}.get(type(sae.activation))
    return Needs((TopK, AdaptiveK, JumpReLU, ReLU), subtract, note=left_out(sae.activation, "token"))


def pack(sae: StoredSAE) -> dict[str, Any]:
    linear = {"encoder.weight": sae.W_enc, "encoder.bias": sae.b_enc, "decoder.weight": sae.W_dec.T}
    config = {"activation_dim": sae.d_in, "dict_size": sae.d_sae}
    if isinstance(sae.activation, TopK):
        if sae.activation.k == 0:
            raise UserError("k: got 0, needs 1 or more")
        kind, config["k"] = "AutoEncoderTopK", sae.activation.k
        tensors = {"b_dec": sae.b_dec, **_buffers(sae.activation.k), **linear}
    elif isinstance(sae.activation, AdaptiveK):
        own = sae.activation.selection.k_map
        score_to_k = [float(getattr(own, name)) for name in _MAP]
        kind, config["k"] = "AutoEncoderAdaptiveK", own.k_max
        tensors = {"b_dec": sae.b_dec, **_buffers(own.k_max), **probe_tensors(sae), **linear}
        tensors["_extra_state"] = torch.tensor(score_to_k, dtype=torch.float64)
    elif isinstance(sae.activation, JumpReLU):
        kind = "JumpReluAutoEncoder"
        tensors = {"W_enc": sae.W_enc.T, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
        tensors["threshold"] = sae.activation.threshold
    elif sae.subtract_b_dec:
        kind, tensors = "AutoEncoder", {"bias": sae.b_dec, **linear}
    else:
        kind, tensors = "AutoEncoderNew", {**linear, "decoder.bias": sae.b_dec}
    about = {"lm_name": sae.model_name, "submodule_name": sae.hook_name}
    trainer = {"dict_class": kind, **config, **about}
    return {_CONFIG: {"trainer": trainer, "buffer": {}}, _WEIGHTS: tensors}


def _class_of(tensors: Tensors) -> str:
    """The class that has these tensors. UserError where that could be two."""
    for name, kind in _TOLD_BY.items():
        if name in tensors:
            return kind
    if "threshold" in tensors:
        raise UserError(
            f"{_WEIGHTS}: got the tensors of AutoEncoderTopK, which keeps the k largest scores of a row, and of "
            f"BatchTopKSAE, which keeps those above its threshold, needs {_CONFIG} beside it, or dict_class "
            "(--dict-class)"
        )
    return "AutoEncoderTopK"


def _activation(kind: str, fields: Fields, tensors: Tensors, W_enc: Tensor) -> Activation:
    d_sae, d_in = W_enc.shape
    if kind == "AutoEncoderTopK":
        tensors.pop("threshold")
        return TopK(_k(fields, tensors))
    if kind == "AutoEncoderAdaptiveK":
        tensors.pop("threshold")
        score_to_k = dict(zip(_MAP, tensors.take("_extra_state", len(_MAP), any_float=True).tolist(), strict=True))
        for name in ("k_min", "k_max"):
            score_to_k[name] = whole(f"{_WEIGHTS}: tensor _extra_state: {name}", score_to_k[name])
        selection = selections.AdaptiveK(KMap(**score_to_k), "token")
        selection.check(d_sae)
        weight, bias = tensors.take("probe.weight", d_in), tensors.take("probe.bias")
        return AdaptiveK(probe_of(weight, bias, selection), selection)
    if kind in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        # Out of training they keep what is above one threshold, learned for a k that then plays no part.
        return JumpReLU(tensors.take("threshold", any_float=True).expand(d_sae))
    return JumpReLU(tensors.take("threshold", d_sae, any_float=True)) if kind == "JumpReluAutoEncoder" else ReLU()


def _buffers(k: int) -> dict[str, Tensor]:
    return {"k": torch.tensor(k, dtype=torch.int32), "threshold": torch.tensor(-1.0)}


def _linear(tensors: Tensors) -> dict[str, Any]:
    W_enc = tensors.take("encoder.weight", None, None)
    d_sae, d_in = W_enc.shape
    b_dec = next((name for name in ("b_dec", "bias", "decoder.bias") if name in tensors), "b_dec")
    return {
        "W_enc": W_enc,
        "b_enc": tensors.take("encoder.bias", d_sae),
        "W_dec": tensors.take("decoder.weight", d_in, d_sae).T,
        "b_dec": tensors.take(b_dec, d_in),
    }


def _bare(tensors: Tensors) -> dict[str, Any]:
    W_enc = tensors.take("W_enc", None, None).T
    d_sae, d_in = W_enc.shape
    return {
        "W_enc": W_enc,
        "b_enc": tensors.take("b_enc", d_sae),
        "W_dec": tensors.take("W_dec", d_sae, d_in),
        "b_dec": tensors.take("b_dec", d_in),
    }


def _k(fields: Fields, tensors: Tensors) -> int:
    """k of the settings, or the buffer's; UserError where both are there and differ."""
    buffer = tensors.pop("k")
    if buffer is None:
        return fields.take("k", int)
    in_buffer = whole(f"{_WEIGHTS}: tensor k", buffer)
    agree(_CONFIG, "k", fields.take("k", int, in_buffer), in_buffer)
    return in_buffer
