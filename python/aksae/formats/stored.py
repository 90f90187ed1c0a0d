"""The neutral form of an SAE in a file: what it computes, whatever its host calls the parts."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from aksae_kernels import SparseCodes, sparse_decode, threshold_select, topk_encode, topk_select

from .. import selections
from ..errors import UserError
from ..probe import ComplexityProbe

# As SAELens and OpenAI divide: x / (std + eps), and back by std alone.
_LAYER_NORM_EPS = 1e-5


@dataclass(frozen=True)
class TopK:
    """The `k` largest positive scores of a row."""

    k: int

    def k_for(self, x: Tensor) -> int:
        return self.k

    @property
    def k_bound(self) -> int:
        return self.k

    def to(self, *args: Any, **kwargs: Any) -> TopK:
        return self

    def __str__(self) -> str:
        return f"TopK, k = {self.k}"


@dataclass(frozen=True, eq=False)
class AdaptiveK:
    """The k largest positive scores of a row, k read off the row by `probe` and the map of `selection`."""

    probe: ComplexityProbe
    selection: selections.AdaptiveK

    @torch.no_grad()
    def k_for(self, x: Tensor) -> Tensor:
        return self.selection.k_map(self.probe(x))

    @property
    def k_bound(self) -> int:
        return self.selection.k_map.k_max

    def to(self, *args: Any, **kwargs: Any) -> AdaptiveK:
        return replace(self, probe=deepcopy(self.probe).to(*args, **kwargs))

    def __str__(self) -> str:
        return str(self.selection)


@dataclass(frozen=True, eq=False)
class JumpReLU:
    """The positive scores above `threshold [F]`, unshifted. BatchTopK files are read as this, their inference rule."""

    threshold: Tensor

    def to(self, *args: Any, **kwargs: Any) -> JumpReLU:
        return replace(self, threshold=self.threshold.to(*args, **kwargs))

    def __str__(self) -> str:
        return "JumpReLU"


@dataclass(frozen=True)
class ReLU:
    """Every positive score."""

    def to(self, *args: Any, **kwargs: Any) -> ReLU:
        return self

    def __str__(self) -> str:
        return "ReLU"


Activation = TopK | AdaptiveK | JumpReLU | ReLU


class Origin(NamedTuple):
    """The files an SAE was loaded from."""

    format: str
    files: Mapping[str, Any]
    """What each file holds, by its name within the folder; `""` for a format of one file."""
    assumptions: Mapping[str, Any]
    """What the caller of `load` said beside the files."""


@dataclass(frozen=True, eq=False)
class StoredSAE:
    """An SAE as its file describes it; it runs without its host.

        u     = normalised(x) * input_scale, less b_dec where `subtract_b_dec`
        s     = W_enc u + b_enc, times |W_dec[f]| where `decoder_norm` is not "none"
        z     = activation(s), divided by |W_dec[f]| again where `decoder_norm` is "selection"
        x_hat = denormalised((z W_dec + b_dec) / output_scale) + W_skip x

    with z divided by |W_dec[f]| in the decoder alone where `decoder_norm` is "codes". Tensors are read only: several
    share memory with `origin`.

    Raises UserError where the parts do not fit each other.
    """

    W_enc: Tensor
    """`[F, D]`, floating point; the weights share one dtype."""
    b_enc: Tensor
    """`[F]`."""
    W_dec: Tensor
    """`[F, D_out]`; D_out is D unless this is a transcoder."""
    b_dec: Tensor
    """`[D_out]`."""
    activation: Activation
    subtract_b_dec: bool
    """Whether the encoder reads `x - b_dec`."""
    decoder_norm: Literal["none", "selection", "codes"] = "none"
    """What the norms of the decoder's rows scale: nothing, the selection alone, or the latents too."""
    input_norm: Literal["none", "layer_norm", "constant_norm_rescale"] = "none"
    """`layer_norm`: mean 0 and standard deviation (of D - 1) 1. `constant_norm_rescale`: norm sqrt(D)."""
    input_scale: float = 1.0
    output_scale: float = 1.0
    W_skip: Tensor | None = None
    """`[D_out, D]`."""
    transcoder: bool = False
    """Whether the output is another activation than the input."""
    model_name: str | None = None
    hook_name: str | None = None
    hook_name_out: str | None = None
    """The language model and the places in it, where the file names them."""
    notes: tuple[str, ...] = ()
    """What was assumed while loading, or folded or left out while converting, in words."""
    origin: Origin | None = field(default=None, init=False, repr=False)
    """Set by `load`. `dataclasses.replace` makes a copy without one."""

    def __post_init__(self):
        d_sae, d_in = self.W_enc.shape
        if 0 in (d_sae, d_in):
            raise UserError(f"W_enc: got {d_sae} latents of {d_in} inputs, needs at least one of each")
        if not self.transcoder and (self.W_dec.shape[1] != d_in or self.input_scale != self.output_scale):
            raise UserError(f"W_dec: got {self.W_dec.shape[1]} outputs, needs {d_in}, what an autoencoder reads")
        if isinstance(self.activation, TopK) and not 0 <= self.activation.k <= d_sae:
            raise UserError(f"k: got {self.activation.k}, needs a number from 0 to d_sae = {d_sae}")

    @property
    def d_sae(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[1]

    def to(self, *args: Any, **kwargs: Any) -> StoredSAE:
        """A copy, without `origin`, of which every tensor is `tensor.to(*args, **kwargs)`."""
        parts = {name: getattr(self, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip", "activation")}
        moved = {name: part.to(*args, **kwargs) for name, part in parts.items() if part is not None}
        return replace(self, **moved)

    def encode(self, x: Tensor) -> SparseCodes:
        """Latents of `x [..., D]`, as the host's own encoder gives them but sparse.

        `x` has the dtype and the device of the weights. Raises TypeError or ValueError as
        `aksae_kernels.topk_encode` does.
        """
        u = self._normalised(x) * self.input_scale
        if self.subtract_b_dec:
            u = u - self.b_dec
        activation = self.activation
        ranked = isinstance(activation, (TopK, AdaptiveK))
        if ranked and self.decoder_norm == "none":
            return topk_encode(u, self.W_enc, self.b_enc, k=activation.k_for(x), k_max=activation.k_bound)
        scores = F.linear(u, self.W_enc, self.b_enc)
        if self.decoder_norm != "none":
            scores = scores * self._norms()
        if ranked:
            codes = topk_select(scores, activation.k_for(x), activation.k_bound)
        else:
            # A host compares in the dtype of its scores.
            threshold = activation.threshold.to(scores.dtype) if isinstance(activation, JumpReLU) else 0.0
            codes = threshold_select(scores, threshold)
        return self._without_norms(codes) if self.decoder_norm == "selection" else codes

    def decode(self, codes: SparseCodes, x: Tensor | None = None) -> Tensor:
        """The reconstruction `[..., D_out]` of codes `[..., K]`.

        `x [..., D]`, what was encoded, is needed where the SAE normalises its input or has a skip connection:
        ValueError without it.
        """
        if x is None and (self.input_norm != "none" or self.W_skip is not None):
            raise ValueError("x: got None, needs what was encoded: this SAE normalises its input or skips")
        if self.decoder_norm == "codes":
            codes = self._without_norms(codes)
        y = sparse_decode(codes, self.W_dec, self.b_dec) / self.output_scale
        if self.input_norm == "layer_norm":
            y = y * x.std(-1, keepdim=True) + x.mean(-1, keepdim=True)
        elif self.input_norm == "constant_norm_rescale":
            y = y / self._rescaling(x)
        return y if self.W_skip is None else y + F.linear(x, self.W_skip)

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction `[..., D_out]` of `x [..., D]`."""
        return self.decode(self.encode(x), x)

    __call__ = forward

    def __str__(self) -> str:
        kind = "transcoder" if self.transcoder else "SAE"
        return f"{kind} ({self.activation}; {self.d_sae} latents of {self.d_in} inputs)"

    def _normalised(self, x: Tensor) -> Tensor:
        if self.input_norm == "layer_norm":
            x = x - x.mean(-1, keepdim=True)
            return x / (x.std(-1, keepdim=True) + _LAYER_NORM_EPS)
        return x * self._rescaling(x) if self.input_norm == "constant_norm_rescale" else x

    def _rescaling(self, x: Tensor) -> Tensor:
        return self.d_in**0.5 / x.norm(dim=-1, keepdim=True)

    def _norms(self) -> Tensor:
        return self.W_dec.norm(dim=-1)

    def _without_norms(self, codes: SparseCodes) -> SparseCodes:
        """The codes with each value divided by its latent's decoder norm."""
        # A latent without a direction has the score 0 and is never selected: its 0 stands in padding alone.
        inverse = torch.where(self._norms() > 0, 1 / self._norms(), 0)
        return codes._replace(values=codes.values * inverse[codes.indices.clamp_min(0).long()])
