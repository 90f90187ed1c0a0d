"""SAELens: `cfg.json` and `sae_weights.safetensors`, of version 6 or older, of an inference SAE or a training one.

The architecture `adaptivek` is that of `aksae.hosts.sae_lens`. An SAE of `hook_z` acts on the heads of a token side by
side, in one vector.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..config import FLAT, flat_selection, selection_of
from ..errors import UserError
from ..files import dtype_name
from .folding import Needs, exactly
from .native import probe_of, probe_tensors
from .reading import Fields, Tensors, agree
from .stored import Activation, AdaptiveK, JumpReLU, ReLU, StoredSAE, TopK

_CONFIG, _WEIGHTS = "cfg.json", "sae_weights.safetensors"
_NAMES = {TopK: "topk", AdaptiveK: "adaptivek", JumpReLU: "jumprelu", ReLU: "standard"}
_TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
# The last two are training's; for inference SAELens itself saves their SAEs as JumpReLU.
_ARCHITECTURES = ("standard", "topk", "jumprelu", "adaptivek", *_TRANSCODERS, "batchtopk", "matryoshka_batchtopk")
_INPUT_NORMS = ("none", "layer_norm", "constant_norm_rescale")
# Applied by whoever runs the SAE, and made part of it by SAELens' own `fold_...` methods.
_OUTSIDE = ("expected_average_only_in", "covariance_whitening")
# The layout written, by its oldest version: SAELens takes files without one for older than 6.
_VERSION = "6.0.0"


def unpack(files: dict[str, Any]) -> StoredSAE:
    fields = Fields(_CONFIG, files[_CONFIG])
    architecture, k = _architecture(fields)
    transcoder = architecture in _TRANSCODERS
    input_norm = _input_norm(fields, transcoder)
    tensors = Tensors(_WEIGHTS, files[_WEIGHTS])
    W_enc = tensors.take("W_enc", None, None).T
    d_sae, d_in = W_enc.shape
    d_out = fields.take("d_out", int) if transcoder else d_in
    agree(_CONFIG, "d_in", fields.take("d_in", int), d_in)
    agree(_CONFIG, "d_sae", fields.take("d_sae", int), d_sae)
    _refuse_scaling(tensors)
    about = _about(fields)
    sae = StoredSAE(
        W_enc,
        tensors.take("b_enc", d_sae),
        tensors.take("W_dec", d_sae, d_out),
        tensors.take("b_dec", d_out),
        activation=_activation(architecture, k, fields, tensors, W_enc),
        subtract_b_dec=not transcoder and fields.take("apply_b_dec_to_input", bool, True),
        decoder_norm="codes" if fields.take("rescale_acts_by_decoder_norm", bool, False) else "none",
        input_norm=input_norm,
        W_skip=tensors.take("W_skip", d_out, d_in) if "skip" in architecture else None,
        transcoder=transcoder,
        **about,
    )
    tensors.finish()
    return sae


def needs(sae: StoredSAE) -> Needs:
    if sae.transcoder:
        return Needs((ReLU, JumpReLU), subtract_b_dec=False, transcoder=True, skip=True, d_out=True)
    return Needs(
        (TopK, AdaptiveK, JumpReLU, ReLU),
        subtract_b_dec=None,
        decoder_norm=("none", "codes") if isinstance(sae.activation, TopK) else ("none",),
        input_norm=_INPUT_NORMS,
        note="read by SAELens where aksae.hosts.sae_lens is imported" if isinstance(sae.activation, AdaptiveK) else "",
    )


def pack(sae: StoredSAE) -> dict[str, Any]:
    architecture = _NAMES[type(sae.activation)]
    tensors = {"W_enc": sae.W_enc.T, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    if isinstance(sae.activation, JumpReLU):
        tensors["threshold"] = exactly(sae.activation.threshold, sae.W_enc.dtype, "threshold")
    metadata = {"sae_lens_version": _VERSION, "sae_lens_training_version": None}
    about = {"model_name": sae.model_name, "hook_name": sae.hook_name, "hook_name_out": sae.hook_name_out}
    config = {
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": dtype_name(sae.W_enc.dtype),
        "device": "cpu",
        "apply_b_dec_to_input": sae.subtract_b_dec,
        "normalize_activations": sae.input_norm,
        "reshape_activations": "hook_z" if (sae.hook_name or "").endswith("hook_z") else "none",
        "metadata": metadata | {name: value for name, value in about.items() if value is not None},
    }
    if sae.transcoder:
        parts = ("jumprelu" * (architecture == "jumprelu"), "skip" * (sae.W_skip is not None), "transcoder")
        architecture = "_".join(filter(None, parts))
        config["d_out"] = sae.W_dec.shape[1]
        if sae.W_skip is not None:
            tensors["W_skip"] = sae.W_skip
    elif architecture == "adaptivek":
        config |= flat_selection(sae.activation.selection)
        tensors |= probe_tensors(sae)
    elif architecture == "topk":
        config |= {"k": sae.activation.k, "rescale_acts_by_decoder_norm": sae.decoder_norm == "codes"}
    return {_CONFIG: config | {"architecture": architecture}, _WEIGHTS: tensors}


def _architecture(fields: Fields) -> tuple[str, int | None]:
    """The architecture, and k where it has one. Before version 6 TopK was an activation function's name."""
    architecture = fields.take("architecture", str, "standard")
    function = fields.take("activation_fn_str", str, fields.take("activation_fn", str, "relu"))
    k = fields.inner("activation_fn_kwargs").take("k", int, None)
    if function == "topk" and k is not None:
        return "topk", k
    if function != "relu":
        raise UserError(f"{_CONFIG}: activation_fn: got {function}, needs relu or topk")
    if architecture not in _ARCHITECTURES:
        raise UserError(f"{_CONFIG}: architecture: got {architecture}, needs one of {', '.join(_ARCHITECTURES)}")
    return architecture, fields.take("k", int, 100) if architecture == "topk" else None


def _input_norm(fields: Fields, transcoder: bool) -> str:
    norm = fields.get("normalize_activations", "none")
    if isinstance(norm, bool):
        norm = "expected_average_only_in" if norm else "none"
    known = ("none",) if transcoder else _INPUT_NORMS
    if norm in known:
        return norm
    reason = f", whose statistics are not in {_WEIGHTS}" if norm in _OUTSIDE else ""
    raise UserError(f"{_CONFIG}: normalize_activations: got {norm}{reason}, needs {' or '.join(known)}")


def _activation(architecture: str, k: int | None, fields: Fields, tensors: Tensors, W_enc: Tensor) -> Activation:
    if k is not None:
        return TopK(k)
    if architecture == "adaptivek":
        d_sae, d_in = W_enc.shape
        selection = selection_of({name: fields.get(name) for name in FLAT if fields.get(name) is not None}, _CONFIG)
        selection.check(d_sae)
        weight, bias = tensors.take("probe.weight", d_in), tensors.take("probe.bias")
        return AdaptiveK(probe_of(weight, bias, selection), selection)
    if "batchtopk" in architecture:
        # Rounded to the weights' dtype, as SAELens does when it saves the SAE for inference.
        return JumpReLU(tensors.take("topk_threshold", any_float=True).to(W_enc.dtype).expand(len(W_enc)))
    if "jumprelu" not in architecture:
        return ReLU()
    if "log_threshold" in tensors:
        return JumpReLU(tensors.take("log_threshold", len(W_enc), any_float=True).exp())
    return JumpReLU(tensors.take("threshold", len(W_enc), any_float=True))


def _refuse_scaling(tensors: Tensors) -> None:
    """A factor of each latent from fine-tuning, long all ones, is not applied here."""
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        factor = tensors.pop(name)
        if factor is not None and not (factor == 1).all():
            raise UserError(f"{_WEIGHTS}: tensor {name}: got other values, needs all 1")


def _about(fields: Fields) -> dict[str, str | None]:
    """Names of model and hooks: in `metadata` since version 6, beside the other fields before."""
    inner = fields.inner("metadata")
    hook_name = inner.take("hook_name", str, fields.take("hook_name", str, fields.take("hook_point", str, None)))
    return {
        "model_name": inner.take("model_name", str, fields.take("model_name", str, None)),
        "hook_name": hook_name,
        "hook_name_out": inner.take("hook_name_out", str, fields.take("hook_name_out", str, None)),
    }
