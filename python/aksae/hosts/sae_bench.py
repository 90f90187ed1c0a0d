"""An SAE of this package with the interface that SAEBench's and sae-probes' evaluations read.

Imports nothing of either; tested with sae-bench 0.6.0, and by hand with sae-probes 0.4.2. Their evaluations load
language models and data sets from the Hugging Face hub, for which a network is needed:

    adapter = SAEBenchAdapter(sae, model_name=name, hook_layer=3)
    sae_bench.evals.absorption.main.run_eval(AbsorptionEvalConfig(model_name=name), [("mine", adapter)], device, out)
    sae_bench.evals.sparse_probing.main.run_eval(SparseProbingEvalConfig(model_name=name), [("mine", adapter)], ...)
    sae_probes.run_sae_evals(adapter, name, adapter.cfg.hook_name, reg_type="l1", setting="normal", device=device)

With beartype 0.23 SAEBench's sparse probing fails in a type check of its own, whatever the SAE: JAXTYPING_DISABLE=1.
`aksae.study.sparse_probing` is a small measurement of the same kind without one.
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
    `[D, F]`, `W_dec` `[F, D]`. Latents at a price are those that pay at the price of `sae`, which `aksae.calibrate`
    sets. In a 16-bit dtype, to which SAEBench casts an SAE where its model has one, prices and thresholds keep their
    precision; AdaptiveK's probe is rounded, and k moves by about one.

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
        """As for every module, but for what `Selection.exact` names, which is not rounded; `cfg.dtype` and `cfg.device`
        follow."""
        names = self.sae.config.selection.exact if isinstance(self.sae, SAE) else ()
        before = {name: getattr(self.sae, name).data for name in names}
        super().to(*args, **kwargs)
        for name, value in before.items():
            tensor = getattr(self.sae, name)
            if tensor.dtype.itemsize < value.dtype.itemsize:
                tensor.data = value.to(tensor.device)
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
