"""dictionary_learning: `ae.pt` and `config.json`, whose `dict_class` says what the tensors are called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from .folding import Needs
from .reading import Fields, Tensors, agree
from .stored import JumpReLU, ReLU, StoredSAE, TopK

_CONFIG, _WEIGHTS = "config.json", "ae.pt"
# Classes of one nn.Linear each way, and those of bare matrices.
_LINEAR = ("AutoEncoder", "AutoEncoderNew", "AutoEncoderTopK", "BatchTopKSAE")
_BARE = ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE")
_TRAINERS = {
    "AutoEncoder": "StandardTrainer",
    "AutoEncoderNew": "StandardTrainerAprilUpdate",
    "AutoEncoderTopK": "TopKTrainer",
    "JumpReluAutoEncoder": "JumpReluTrainer",
}


def names(path: Path) -> tuple[str, ...]:
    return _CONFIG, _WEIGHTS


def recognises(path: Path) -> bool:
    # The AdaptiveK authors' folders have these two as well.
    return all((path / name).is_file() for name in names(path)) and not (path / "dynamic_config.json").is_file()


def unpack(files: dict[str, Any]) -> StoredSAE:
    fields = Fields(_CONFIG, files[_CONFIG]).inner("trainer")
    kind = fields.take("dict_class", str)
    if kind == "GatedAutoEncoder":
        raise UserError(f"{_CONFIG}: dict_class: got {kind}, whose gate is a second encoder, needs one encoder")
    if kind not in _LINEAR + _BARE:
        raise UserError(f"{_CONFIG}: dict_class: got {kind}, needs one of {', '.join(_LINEAR + _BARE)}")
    tensors = Tensors(_WEIGHTS, files[_WEIGHTS])
    weights = _linear(tensors) if kind in _LINEAR else _bare(tensors)
    d_sae, d_in = weights["W_enc"].shape
    agree(_CONFIG, "activation_dim", fields.take("activation_dim", int, d_in), d_in)
    agree(_CONFIG, "dict_size", fields.take("dict_size", int, d_sae), d_sae)
    if kind == "AutoEncoderTopK":
        activation = TopK(_k(fields, tensors))
        tensors.pop("threshold")
    elif kind in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        # Out of training they keep what is above one threshold, learned for a k that then plays no part.
        activation = JumpReLU(tensors.take("threshold", any_float=True).expand(d_sae))
    elif kind == "JumpReluAutoEncoder":
        activation = JumpReLU(tensors.take("threshold", d_sae, any_float=True))
    else:
        activation = ReLU()
    tensors.finish("k", "group_sizes")
    return StoredSAE(
        **weights,
        activation=activation,
        subtract_b_dec=kind not in ("AutoEncoderNew", "JumpReluAutoEncoder"),
        model_name=fields.take("lm_name", str, None),
        hook_name=fields.take("submodule_name", str, None),
    )


def needs(sae: StoredSAE) -> Needs:
    return Needs((TopK, JumpReLU, ReLU), subtract_b_dec={TopK: True, JumpReLU: False}.get(type(sae.activation)))


def pack(sae: StoredSAE) -> dict[str, Any]:
    linear = {"encoder.weight": sae.W_enc, "encoder.bias": sae.b_enc, "decoder.weight": sae.W_dec.T}
    config = {"activation_dim": sae.d_in, "dict_size": sae.d_sae}
    if isinstance(sae.activation, TopK):
        if sae.activation.k == 0:
            raise UserError("dictionary_learning: k: got 0, needs 1 or more")
        kind, config["k"] = "AutoEncoderTopK", sae.activation.k
        buffers = {"k": torch.tensor(sae.activation.k, dtype=torch.int32), "threshold": torch.tensor(-1.0)}
        tensors = {"b_dec": sae.b_dec, **buffers, **linear}
    elif isinstance(sae.activation, JumpReLU):
        kind = "JumpReluAutoEncoder"
        tensors = {"W_enc": sae.W_enc.T, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
        tensors["threshold"] = sae.activation.threshold
    elif sae.subtract_b_dec:
        kind, tensors = "AutoEncoder", {"bias": sae.b_dec, **linear}
    else:
        kind, tensors = "AutoEncoderNew", {**linear, "decoder.bias": sae.b_dec}
    about = {"lm_name": sae.model_name, "submodule_name": sae.hook_name}
    trainer = {"trainer_class": _TRAINERS[kind], "dict_class": kind, **config, **about}
    return {_CONFIG: {"trainer": trainer, "buffer": {}}, _WEIGHTS: tensors}


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
    k = fields.take("k", int, None if buffer is None else int(buffer))
    if k is None:
        raise UserError(f"{_CONFIG}: trainer: k: got none, needs int")
    if buffer is not None:
        agree(_CONFIG, "k", k, int(buffer))
    return k
