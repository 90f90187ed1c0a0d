"""AdaptiveK as a `dict_class` of dictionary_learning: `TopKTrainer(..., dict_class=AutoEncoderAdaptiveK)`.

Tested with dictionary-learning 0.1.0.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from dictionary_learning.dictionary import Dictionary
from torch import Tensor, nn

from aksae_kernels import SparseCodes, sparse_decode, topk_encode, topk_select

from ..config import SAEConfig, validate_sae
from ..errors import UserError
from ..files import read_pickle
from ..k_policy import KMap
from ..probe import ComplexityProbe
from ..sae import AdaptiveKSAE
from ..selections import AdaptiveK
from ._checks import adaptive_selection
from ._codes import decode_dense


class AutoEncoderAdaptiveK(Dictionary, nn.Module):
    """`f = TopK_k(ReLU(encoder(x - b_dec)))`, `x_hat = decoder(f) + b_dec`, with `k = score_to_k(probe(x))` per row.

    The equations of `aksae.AdaptiveKSAE`, with the attributes and tensor names of the host's `AutoEncoderTopK`; probe
    and map are in the state dict too, so that `ae.pt` is the whole dictionary. `decoder.weight` has the host's shape
    `[D, F]` over latent-major storage, which is what the kernels read. The probe reads activations as the trainer hands
    them in (divided by its norm factor, where `trainSAE` normalises); it is frozen, since no gradient flows through k.

    Args:
        activation_dim: D.
        dict_size: F.
        k: the largest k a row can be given, and so the width of `top_acts`.
        k_min: the smallest; None for `k // 16`, at least 1, after AdaptiveK's own 20 and 320.
        steepness, score_min, score_max: the rest of the map, see `aksae.k_policy.score_to_k`.
        probe: a fitted probe, copied; None starts one at 0, which gives all rows the k of score 0. A trainer calls
            its `dict_class` with the first three arguments alone: give it `functools.partial(..., probe=probe)`.

    Raises:
        UserError: an argument out of range, or a probe of another width or score range.
    """

    def __init__(
        self,
        activation_dim: int,
        dict_size: int,
        k: int,
        *,
        k_min: int | None = None,
        steepness: float = 6.0,
        score_min: float = 0.0,
        score_max: float = 10.0,
        probe: ComplexityProbe | None = None,
    ):
        super().__init__()
        self.activation_dim, self.dict_size = activation_dim, dict_size
        self._set_map(max(1, k // 16) if k_min is None else k_min, k, steepness, score_min, score_max)
        self.register_buffer("k", torch.tensor(k, dtype=torch.int))
        self.register_buffer("threshold", torch.tensor(-1.0))
        self.probe = ComplexityProbe(activation_dim, score_min, score_max).requires_grad_(False)

        self.decoder = nn.Linear(dict_size, activation_dim, bias=False)
        self.encoder = nn.Linear(activation_dim, dict_size)
        with torch.no_grad():
            W_dec = F.normalize(self.decoder.weight.T, dim=-1).contiguous()
            self.decoder.weight.data = W_dec.T
            self.encoder.weight.copy_(W_dec)
            self.encoder.bias.zero_()
        self.b_dec = nn.Parameter(torch.zeros(activation_dim))
        if probe is not None:
            self.set_probe(probe)

    @torch.no_grad()
    def set_probe(self, probe: ComplexityProbe) -> None:
        """Take over weight and bias of `probe`. UserError where its width or score range is not the dictionary's."""
        wanted = (self.activation_dim, self.probe.score_min, self.probe.score_max)
        got = (probe.weight.numel(), probe.score_min, probe.score_max)
        if got != wanted:
            raise UserError(f"probe: got (activation_dim, score_min, score_max) = {got}, needs {wanted}")
        self.probe.weight.copy_(probe.weight)
        self.probe.bias.copy_(probe.bias)

    @torch.no_grad()
    def k_for(self, x: Tensor) -> Tensor:
        """k of each vector of `x [..., D]`, `[...]` int32."""
        return self._map(self.probe(x))

    def encode(
        self, x: Tensor, return_topk: bool = False, use_threshold: bool = False
    ) -> Tensor | tuple[Tensor, Tensor, Tensor, Tensor]:
        """Latents of `x [..., D]`, dense `[..., F]`.

        Args:
            return_topk: also give `(top_acts [..., K], top_indices [..., K] int64, post_relu [..., F])`, as the host's
                trainers want; all four come from one dense product. A row with fewer than K latents repeats an index
                that fired in it, with act 0, so that counting indices as fired stays right; one with none repeats a
                latent of another row. Where nothing fires in the whole batch, K is 0.
            use_threshold: keep what lies above `threshold`, which the trainer keeps as the mean smallest act of a row,
                in place of the k largest. One threshold for all rows forgets the probe.
        """
        if not (return_topk or use_threshold):
            return self._codes(x).to_dense(self.dict_size)
        pre_acts = self.encoder(x - self.b_dec)
        post_relu = F.relu(pre_acts)
        codes = topk_select(pre_acts, self.k_for(x), self._map.k_max)
        acts = post_relu * (post_relu > self.threshold) if use_threshold else codes.to_dense(self.dict_size)
        return (acts, *_fired(codes), post_relu) if return_topk else acts

    def decode(self, x: Tensor) -> Tensor:
        """`decoder(x) + b_dec` of dense latents `[..., F]`."""
        return decode_dense(x, self.decoder.weight.T, self.b_dec)

    def forward(self, x: Tensor, output_features: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """The reconstruction of `x [..., D]`, with `output_features` also its dense latents."""
        codes = self._codes(x)
        x_hat = sparse_decode(codes, self.decoder.weight.T, self.b_dec)
        return (x_hat, codes.to_dense(self.dict_size)) if output_features else x_hat

    @torch.no_grad()
    def scale_biases(self, scale: float) -> None:
        """Fold in that activations are `scale` times as large as those trained on: latents scale, k stays."""
        self.encoder.bias.mul_(scale)
        self.b_dec.mul_(scale)
        self.probe.weight.div_(scale)
        if self.threshold >= 0:
            self.threshold *= scale

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], k: int | None = None, device: torch.device | str | None = None
    ) -> AutoEncoderAdaptiveK:
        """The dictionary in `path`, an `ae.pt`, in its dtype.

        Raises UserError for a file that is no such dictionary's, ValueError where `k` is given and is not the file's.
        """
        state = read_pickle(Path(path))
        for name in ("encoder.weight", "_extra_state"):
            if not isinstance(state, dict) or not isinstance(state.get(name), Tensor):
                raise UserError(f"{path}: tensor {name}: got none, needs what AutoEncoderAdaptiveK saves")
        d_sae, d_in = state["encoder.weight"].shape
        k_min, k_max, steepness, score_min, score_max = state["_extra_state"].tolist()
        if k is not None and k != k_max:
            raise ValueError(f"k: got {k}, needs {int(k_max)}, the one in {path}")
        ae = cls(
            d_in,
            d_sae,
            int(k_max),
            k_min=int(k_min),
            steepness=steepness,
            score_min=score_min,
            score_max=score_max,
        ).to(state["encoder.weight"].dtype)
        ae.load_state_dict(state)
        return ae if device is None else ae.to(device)

    @classmethod
    @torch.no_grad()
    def from_adaptivek(cls, sae: AdaptiveKSAE) -> AutoEncoderAdaptiveK:
        """The dictionary with the weights, probe and map of `sae`, copied, on its device and in its dtype.

        Raises UserError for another selection than AdaptiveK, a transcoder, or scaled activations.
        """
        given = dataclasses.asdict(adaptive_selection(sae).k_map)
        ae = cls(sae.config.d_in, sae.config.d_sae, given.pop("k_max"), **given).to(sae.W_enc.device, sae.W_enc.dtype)
        tensors = sae.state_dict()
        for name, own in ae._tensors().items():
            own.copy_(tensors[name])
        return ae

    @torch.no_grad()
    def to_adaptivek(self) -> AdaptiveKSAE:
        """The `AdaptiveKSAE` with these weights, probe and map, copied; its probe reads tokens."""
        with torch.device("meta"):
            sae = AdaptiveKSAE(SAEConfig(self.activation_dim, self.dict_size, AdaptiveK(self._map, "token")))
        sae.load_state_dict({name: own.clone() for name, own in self._tensors().items()}, assign=True)
        return sae

    def get_extra_state(self) -> Tensor:
        """The map as it goes into the state dict: float64, which no cast of the module rounds."""
        return torch.tensor(dataclasses.astuple(self._map), dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        k_min, k_max, *others = state.tolist()
        self._set_map(int(k_min), int(k_max), *others)
        self.probe.score_min, self.probe.score_max = self._map.score_min, self._map.score_max

    def _set_map(self, k_min: int, k_max: int, steepness: float, score_min: float, score_max: float) -> None:
        k_map = KMap(k_min, k_max, steepness, score_min, score_max)
        validate_sae(SAEConfig(self.activation_dim, self.dict_size, AdaptiveK(k_map)))
        # Python numbers: reading them off the device in every call would wait for it.
        self._map = k_map

    def _tensors(self) -> dict[str, Tensor]:
        """The parameters under the names and in the shapes of `AdaptiveKSAE`."""
        return {
            "W_enc": self.encoder.weight.detach(),
            "W_dec": self.decoder.weight.detach().T,
            "b_enc": self.encoder.bias.detach(),
            "b_dec": self.b_dec.detach(),
            "probe.weight": self.probe.weight.detach(),
            "probe.bias": self.probe.bias.detach(),
        }

    def _codes(self, x: Tensor) -> SparseCodes:
        k, k_max = self.k_for(x), self._map.k_max
        return topk_encode(x - self.b_dec, self.encoder.weight, self.encoder.bias, k=k, k_max=k_max)


def _fired(codes: SparseCodes) -> tuple[Tensor, Tensor]:
    """Values and int64 indices `[..., K]`, with every index one that fired: see `AutoEncoderAdaptiveK.encode`."""
    values, indices, counts = codes
    if indices.shape[-1] == 0 or not bool(counts.any()):
        return values[..., :0], indices[..., :0].long()
    own, someone = indices[..., :1], indices[..., 0].max()
    # An empty row starts with -1, padding; so does every row of padding, and the largest is an index that fired.
    filler = torch.where(own < 0, someone, own)
    return values, torch.where(indices < 0, filler, indices).long()
