"""The layout of the AdaptiveK authors (hiyukie/adaptiveK): `ae.pt`, `probe.pt`, `dynamic_config.json`.

Their probe is fitted to last tokens, and gives every vector a k of its own. The files hold neither the range of its
scores nor the slope of the map nor the ridge penalty; the authors' code knows but one range, 0 to 10, and one slope, 6.
"""

from __future__ import annotations

from typing import Any

from .. import selections
from ..config import ProbeReads
from ..errors import UserError
from ..k_policy import KMap
from .folding import Needs, left_out
from .native import probe_of
from .reading import Fields, Tensors, agree, assumed
from .stored import AdaptiveK, StoredSAE

_WEIGHTS, _PROBE, _CONFIG = "ae.pt", "probe.pt", "dynamic_config.json"
_MAP = {"steepness": 6.0, "score_min": 0.0, "score_max": 10.0}
_ASSUMED = {**_MAP, "probe_reads": "last"}
OPEN = (*_ASSUMED, "probe_lambda")


def unpack(
    files: dict[str, Any],
    *,
    steepness: float | None = None,
    score_min: float | None = None,
    score_max: float | None = None,
    probe_reads: ProbeReads | None = None,
    probe_lambda: float | None = None,
) -> StoredSAE:
    """The arguments are what the files leave open, named as in `TrainConfig`; None stands for the authors' values."""
    given = {"steepness": steepness, "score_min": score_min, "score_max": score_max, "probe_reads": probe_reads}
    taken = {name: value for name, value in _ASSUMED.items() if given[name] is None}
    tensors = Tensors(_WEIGHTS, files[_WEIGHTS])
    W_enc = tensors.take("encoder.weight", None, None)
    d_sae, d_in = W_enc.shape
    weights = {
        "b_enc": tensors.take("encoder.bias", d_sae),
        "W_dec": tensors.take("decoder.weight", d_in, d_sae).T,
        "b_dec": tensors.take("b_dec", d_in),
    }
    tensors.finish()
    probe = Tensors(_PROBE, files[_PROBE])
    weight, bias = probe.take("weights", d_in, 1)[:, 0], probe.take("bias", 1)[0]
    probe.finish()
    fields = Fields(_CONFIG, files[_CONFIG])
    agree(_CONFIG, "activation_dim", fields.take("activation_dim", int, d_in), d_in)
    agree(_CONFIG, "dict_size", fields.take("dict_size", int, d_sae), d_sae)
    k_map = {**given, **taken, "k_min": fields.take("min_k", int), "k_max": fields.take("max_k", int)}
    reads = k_map.pop("probe_reads")
    selection = selections.AdaptiveK(KMap(**k_map), reads, probe_lambda)
    selection.check(d_sae)
    return StoredSAE(
        W_enc,
        **weights,
        activation=AdaptiveK(probe_of(weight, bias, selection), selection),
        subtract_b_dec=True,
        notes=(assumed(taken),) if taken else (),
    )


def needs(sae: StoredSAE) -> Needs:
    return Needs((AdaptiveK,), subtract_b_dec=True, note=left_out(sae.activation, "last"))


def pack(sae: StoredSAE) -> dict[str, Any]:
    k_map, probe = sae.activation.selection.k_map, sae.activation.probe.state_dict()
    for name, value in _MAP.items():
        if getattr(k_map, name) != value:
            got = f"{getattr(k_map, name):g}"
            raise UserError(f"{name}: got {got}, needs {value:g}, all that the authors' code knows")
    return {
        _CONFIG: {
            "activation_dim": sae.d_in,
            "dict_size": sae.d_sae,
            # The authors' default; their map does not use it.
            "base_k": 80,
            "min_k": k_map.k_min,
            "max_k": k_map.k_max,
            "trainer_type": "DynamicTopKTrainer",
        },
        _PROBE: {"weights": probe["weight"][:, None], "bias": probe["bias"][None]},
        _WEIGHTS: {
            "b_dec": sae.b_dec,
            "encoder.weight": sae.W_enc,
            "encoder.bias": sae.b_enc,
            "decoder.weight": sae.W_dec.T,
        },
    }
