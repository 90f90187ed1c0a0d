"""This project's own folders: `config.json` and `sae.safetensors`, as `AdaptiveKSAE.save_pretrained` writes them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..config import SAEConfig, from_dict, to_dict, validate_sae
from ..files import CONFIG, WEIGHTS
from ..probe import ComplexityProbe
from .folding import Needs, exactly
from .reading import Tensors
from .stored import AdaptiveK, StoredSAE, TopK


def unpack(files: dict[str, Any]) -> StoredSAE:
    config = from_dict(SAEConfig, files[CONFIG], CONFIG)
    validate_sae(config)
    tensors = Tensors(WEIGHTS, files[WEIGHTS])
    W_enc = tensors.take("W_enc", config.d_sae, config.d_in)
    weights = {
        "b_enc": tensors.take("b_enc", config.d_sae),
        "W_dec": tensors.take("W_dec", config.d_sae, config.d_in),
        "b_dec": tensors.take("b_dec", config.d_in),
    }
    if config.k is None:
        weight, bias = tensors.take("probe.weight", config.d_in), tensors.take("probe.bias")
        activation = AdaptiveK(probe_of(weight, bias, config), config)
    else:
        activation = TopK(config.k)
    tensors.finish()
    return StoredSAE(W_enc, **weights, activation=activation, subtract_b_dec=True)


def needs(sae: StoredSAE) -> Needs:
    return Needs((TopK, AdaptiveK), subtract_b_dec=True)


def pack(sae: StoredSAE) -> dict[str, Any]:
    tensors = {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    if isinstance(sae.activation, TopK):
        config = SAEConfig(sae.d_in, sae.d_sae, k=sae.activation.k)
    else:
        config = sae.activation.config
        tensors |= probe_tensors(sae)
    validate_sae(config)
    return {CONFIG: to_dict(config), WEIGHTS: tensors}


def probe_tensors(sae: StoredSAE) -> dict[str, Tensor]:
    """`probe.weight [D]` and `probe.bias []`, in the weights' dtype."""
    tensors = {f"probe.{name}": tensor for name, tensor in sae.activation.probe.state_dict().items()}
    return {name: exactly(tensor, sae.W_enc.dtype, name) for name, tensor in tensors.items()}


def probe_of(weight: Tensor, bias: Tensor, config: SAEConfig) -> ComplexityProbe:
    """The probe with `weight [D]` and `bias []`, shared with it."""
    probe = ComplexityProbe(config.d_in, config.score_min, config.score_max)
    probe.load_state_dict({"weight": weight, "bias": bias}, assign=True)
    return probe.requires_grad_(False)
