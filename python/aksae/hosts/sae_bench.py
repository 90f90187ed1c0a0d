"""An SAE of this package with the interface that SAEBench's evaluations read.

Imports nothing of SAEBench; tested with sae-bench 0.6.0.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..files import dtype_name
from ..sae import SAE
from ._checks import require_unscaled
from ._codes import decode_dense


@dataclass
class SAEBenchConfig:
    """The fields that SAEBench, and SAELens' activation store behind it, look up in `sae.cfg`."""

    model_name: str
    d_in: int
    d_sae: int
    hook_layer: int
    hook_name: str
    dtype: str
    device: str
    architecture: str
    hook_head_index: int | None = None
    context_size: int | None = None
    prepend_bos: bool = True
    normalize_activations: str = "none"
    apply_b_dec_to_input: bool = True
    finetuning_scaling_factor: bool = False
    activation_fn_str: str = "topk"
    activation_fn_kwargs: dict[str, Any] = field(default_factory=dict)
    model_from_pretrained_kwargs: dict[str, Any] = field(default_factory=dict)
    dataset_path: str = ""
    dataset_trust_remote_code: bool = True
    seqpos_slice: tuple[int | None, ...] = (None,)
    training_tokens: int = -1
    sae_lens_training_version: str | None = None
    neuronpedia_id: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class SAEBenchAdapter(nn.Module):
    """`sae` as SAEBench takes it: `selected_saes = [("name", SAEBenchAdapter(sae, ...))]`.

    `encode` gives dense latents `[..., F]` and `decode` takes them, changed or not; `forward` stays sparse. `W_enc` is
    `[D, F]`, `W_dec` `[F, D]`. In a 16-bit dtype, to which SAEBench casts an SAE where its model has one, the probe is
    rounded too, and k moves by about one.

    Args:
        sae: an `aksae.SAE`, whatever its selection, or a module with `W_enc` and `W_dec` `[F, D]`, `b_enc`,
            `b_dec`, `encode(x) -> SparseCodes` and `decode(codes) = W_dec codes + b_dec`.
        model_name: the language model, by TransformerLens' name.
        hook_layer: whose activations the SAE reads.
        hook_name: where in the layer; None for the residual stream after it.
        architecture: what the results say it is.
        context_size: tokens per context, for evaluations that ask.

    Raises:
        UserError: weights of `sae` missing or of shapes that do not fit, a transcoder, or scaled activations.
    """

    def __init__(
        self,
        sae: nn.Module,
        *,
        model_name: str,
        hook_layer: int,
        hook_name: str | None = None,
        architecture: str = "adaptivek",
        context_size: int | None = None,
    ):
        super().__init__()
        _check(sae)
        self.sae = sae
        d_sae, d_in = sae.W_dec.shape
        self.cfg = SAEBenchConfig(
            model_name,
            d_in,
            d_sae,
            hook_layer,
            hook_name or f"blocks.{hook_layer}.hook_resid_post",
            dtype_name(self.dtype),
            str(self.device),
            architecture,
            context_size=context_size,
        )

    @property
    def W_enc(self) -> Tensor:
        return self.sae.W_enc.T

    @property
    def W_dec(self) -> Tensor:
        return self.sae.W_dec

    @property
    def b_enc(self) -> Tensor:
        return self.sae.b_enc

    @property
    def b_dec(self) -> Tensor:
        return self.sae.b_dec

    @property
    def device(self) -> torch.device:
        return self.sae.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        return self.sae.W_dec.dtype

    def to(self, *args, **kwargs) -> SAEBenchAdapter:
        """As for every module; `cfg.dtype` and `cfg.device` follow."""
        super().to(*args, **kwargs)
        self.cfg.dtype, self.cfg.device = dtype_name(self.dtype), str(self.device)
        return self

    def encode(self, x: Tensor) -> Tensor:
        """Latents of `x [..., D]`, dense `[..., F]`, in the SAE's dtype."""
        return self.sae.encode(x.to(self.dtype)).to_dense(self.cfg.d_sae)

    def decode(self, feature_acts: Tensor) -> Tensor:
        """`feature_acts @ W_dec + b_dec` of latents `[..., F]`: from their non-zeros wherever those are few."""
        return decode_dense(feature_acts.to(self.dtype), self.W_dec, self.b_dec)

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction of `x [..., D]`."""
        return self.sae.decode(self.sae.encode(x.to(self.dtype)))


def _check(sae: nn.Module) -> None:
    if isinstance(sae, SAE):
        require_unscaled(sae)
    shapes = {
        name: tuple(getattr(getattr(sae, name, None), "shape", ())) for name in ("W_dec", "W_enc", "b_enc", "b_dec")
    }
    W_dec = shapes["W_dec"]
    wanted = {"W_dec": W_dec, "W_enc": W_dec, "b_enc": W_dec[:1], "b_dec": W_dec[1:]}
    if len(W_dec) != 2 or shapes != wanted:
        raise UserError(f"sae: got shapes {shapes}, needs W_enc and W_dec [F, D], b_enc [F] and b_dec [D]")
