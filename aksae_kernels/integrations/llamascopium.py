"""Llamascopium: `SparseAutoEncoder` and its `Trainer`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from llamascopium.models.sae import SparseAutoEncoder
from llamascopium.trainer import Trainer
from llamascopium.utils.tensor_specs import apply_token_mask
from llamascopium.utils.timer import timer
from torch import Tensor, nn

from .. import SparseCodes, sparse_decode
from . import accelerate
from .accelerated import Accelerated, AcceleratedModule, Candidates, has_data, has_hooks
from .adam import slow_down, speed_up
from .sparse import above, batch_topk, candidates, candidates_of, topk

_ACTIVATIONS = ("topk", "batchtopk", "jumprelu")


class FastSparseAutoEncoder(AcceleratedModule, SparseAutoEncoder):
    """A `SparseAutoEncoder` with act_fn "topk" or "batchtopk", or in inference "jumprelu".

    Between encoder and decoder there is no `[..., F]` tensor in `forward` and `compute_loss`; AuxK encodes with the
    rows of dead latents only. The k is `current_k`, read at each call. Selection by scores times decoder norms
    (`sparsity_include_decoder_norm`) follows the host's; the gradient that its scaling back cancels is not computed.

    `compute_loss` still makes the dense `feature_acts` where its result (`return_aux_data`) or the dead latents' count
    (AuxK) need it, and `hidden_pre` when the result is asked for it, before the weights change: it is no key of the
    result until then.

    The host's own, dense code runs with hooks on `hook_hidden_pre` or `hook_feature_acts`, with a sparsity loss, for
    `encode(return_hidden_pre=True)`, for the training of "jumprelu", and without data (on the meta device) where the
    width of the codes would be data.

    Other than in the host, `use_triton_kernel` does not change what is decoded: there it passes the decoder transposed.
    """

    host_class = SparseAutoEncoder
    transposed = ("W_E",)

    @classmethod
    def refusal(cls, obj: SparseAutoEncoder) -> str | None:
        if obj.device_mesh is not None:
            return "a device_mesh, where the kernels work on the tensors of one device"
        if obj.cfg.use_glu_encoder:
            return "use_glu_encoder=True, where the kernels know a linear encoder"
        if obj.cfg.act_fn.lower() not in _ACTIVATIONS:
            return f"act_fn {obj.cfg.act_fn!r}, where {', '.join(_ACTIVATIONS)} have kernels"
        return None

    @classmethod
    def price_obstacle(cls, obj: SparseAutoEncoder) -> str | None:
        if obj.cfg.hook_point_in != obj.cfg.hook_point_out:
            points = f"hook_point_in {obj.cfg.hook_point_in!r} and hook_point_out {obj.cfg.hook_point_out!r}"
            return f"{points}, where encode is not given what is to be reconstructed"
        return None

    def encode(self, x: Tensor, return_hidden_pre: bool = False, **kwargs: Any) -> Tensor | tuple[Tensor, Tensor]:
        if self._is_priced():
            feature_acts = self.hook_feature_acts(self._encode_at_price(x).to_dense(self.cfg.d_sae))
            return (feature_acts, self._hidden_pre(x)) if return_hidden_pre else feature_acts
        if return_hidden_pre or not self._is_sparse(x):
            return super().encode(x, return_hidden_pre, **kwargs)
        return self._encode(x).to_dense(self.cfg.d_sae)

    def decode(self, feature_acts: Tensor, **kwargs: Any) -> Tensor:
        return self._finish(feature_acts @ self.W_D)

    def forward(
        self, x: Tensor, encoder_kwargs: dict[str, Any] | None = None, decoder_kwargs: dict[str, Any] | None = None
    ) -> Tensor:
        if self._is_priced() and not (encoder_kwargs or has_hooks(self.hook_feature_acts)):
            return self._decode(self._encode_at_price(x))
        if self._is_priced() or encoder_kwargs or not self._is_sparse(x):
            return super().forward(x, encoder_kwargs or {}, decoder_kwargs or {})
        with timer.time("forward"):
            return self._decode(self._encode(x))

    def compute_loss(
        self, batch: dict[str, Tensor], label: Tensor | None = None, **options: Any
    ) -> Tensor | dict[str, Any]:
        dense = options.get("sparsity_loss_type") is not None or self.cfg.act_fn.lower() == "jumprelu"
        x = self.prepare_input(batch)[0]
        if dense or not self._is_sparse(x):
            return super().compute_loss(batch, label, **options)
        with timer.time("compute_loss"):
            return self._compute_loss(x, batch, **options)

    def _compute_loss(
        self,
        x: Tensor,
        batch: dict[str, Tensor],
        *,
        l1_coefficient: float = 1.0,
        lp_coefficient: float = 0.0,
        auxk_coefficient: float = 0.0,
        k_aux: int = 512,
        update_dead_statistics: Callable[[Tensor, Tensor | None, tuple[str, ...]], Tensor] | None = None,
        return_aux_data: bool = True,
        **kwargs: Any,
    ) -> Tensor | dict[str, Any]:
        label, mask = self.prepare_label(batch, **kwargs), batch.get("mask")
        with timer.time("encode"):
            codes = self._encode(x)
        with timer.time("decode"):
            reconstructed = self._decode(codes)
        feature_acts = codes.to_dense(self.cfg.d_sae) if return_aux_data or auxk_coefficient > 0 else None
        l_rec = self._mean_error(reconstructed - label, mask)
        loss, losses = l_rec, {"l_rec": l_rec, "l_s": None, "l_p": None}
        if auxk_coefficient > 0:
            assert update_dead_statistics is not None, "auxk_coefficient > 0 needs update_dead_statistics"
            is_dead = update_dead_statistics(feature_acts, mask, self.specs.feature_acts(feature_acts))
            with timer.time("auxk_loss_calculation"):
                # Where none is dead the host reports a loss of 0.
                losses["l_aux"] = torch.zeros_like(l_rec)
                dead = is_dead.nonzero().squeeze(1)
                k = min(k_aux, len(dead))
                if k > 0:
                    error = label - reconstructed - self._reconstruct_from(dead, k, x)
                    losses["l_aux"] = auxk_coefficient * self._mean_error(error, mask)
                    loss = loss + losses["l_aux"]
        if not return_aux_data:
            return loss
        return _LossData(
            self,
            x,
            loss=loss,
            **losses,
            label=label,
            mask=mask,
            n_tokens=batch["tokens"].numel() if mask is None else int(mask.sum()),
            feature_acts=feature_acts,
            reconstructed=reconstructed,
            l1_coefficient=l1_coefficient,
            lp_coefficient=lp_coefficient,
            auxk_coefficient=auxk_coefficient,
        )

    def _is_sparse(self, x: Tensor) -> bool:
        """Whether nobody looks at dense scores or activations, no gradient needs them, and codes can be made of x."""
        if any(has_hooks(point) for point in (self.hook_hidden_pre, self.hook_feature_acts)):
            return False
        if self.cfg.act_fn.lower() != "topk" and not has_data(x):
            return False
        return self.cfg.act_fn.lower() != "jumprelu" or not torch.is_grad_enabled()

    def _encode(self, x: Tensor) -> SparseCodes:
        return self._select(x, self.W_E.T, self.b_E, self._scale(), self.current_k)

    def _encode_at_price(self, x: Tensor) -> SparseCodes:
        codes, scale = self._at_price(x), self._scale()
        return codes if scale is None else codes._replace(values=codes.values * codes.gather(1 / scale))

    def _candidates(self, k_max: int, x: Tensor) -> Candidates:
        x, scale = x.to(self.W_E.dtype), self._scale()
        if has_hooks(self.hook_hidden_pre):
            codes = candidates_of(self._hidden_pre(x), k_max, scale)
        else:
            codes = candidates(x, self.W_E.T, self.b_E, k_max, scale)
        W_dec = self.W_D if scale is None else self.W_D / scale.unsqueeze(1)
        return Candidates(codes, W_dec, self.b_D if self.cfg.use_decoder_bias else None, x)

    def _hidden_pre(self, x: Tensor) -> Tensor:
        return self.hook_hidden_pre(x.to(self.W_E.dtype) @ self.W_E + self.b_E)

    def _scale(self) -> Tensor | None:
        with torch.no_grad():
            return self.decoder_norm() if self.cfg.sparsity_include_decoder_norm else None

    def _select(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, scale: Tensor | None, k: int) -> SparseCodes:
        x = x.to(W_enc.dtype)
        act_fn = self.cfg.act_fn.lower()
        if act_fn == "batchtopk":
            codes = batch_topk(x, W_enc, b_enc, k * x[..., 0].numel(), scale)
        elif act_fn == "jumprelu":
            threshold = self.activation_function.get_jumprelu_threshold()
            codes = above(x, W_enc, b_enc, threshold if scale is None else threshold / scale)
        else:
            codes = topk(x, W_enc, b_enc, k, scale)
        # Under autocast the host adds its bias to the product, and so goes on in the bias's dtype.
        return codes._replace(values=codes.values.to(b_enc.dtype))

    def _decode(self, codes: SparseCodes) -> Tensor:
        return self._finish(sparse_decode(codes, self.W_D))

    def _finish(self, reconstructed: Tensor) -> Tensor:
        if self.cfg.use_decoder_bias:
            reconstructed = reconstructed + self.b_D
        return self.hook_reconstructed(reconstructed)

    def _reconstruct_from(self, dead: Tensor, k: int, x: Tensor) -> Tensor:
        """The decode, without bias, of the k best (in a batch: k a row) of the latents `dead [n]`."""
        W_enc, b_enc = self.W_E.T.index_select(0, dead), self.b_E[dead]
        if k == len(dead):
            return F.linear(x.to(W_enc.dtype), W_enc, b_enc).relu() @ self.W_D.index_select(0, dead)
        scale = self._scale()
        codes = self._select(x, W_enc, b_enc, None if scale is None else scale[dead], k)
        return sparse_decode(codes._replace(indices=codes.gather(dead).int()), self.W_D)

    def _mean_error(self, difference: Tensor, mask: Tensor | None) -> Tensor:
        error = difference.pow(2).sum(-1)
        return apply_token_mask(error, self.specs.loss(error), mask, "mean")[0]


class FastTrainer(Accelerated, Trainer):
    """A `Trainer` that accelerates the SAE it is given to fit, if it can be, and its `torch.optim.Adam`.

    `deaccelerate` of the trainer leaves the SAE, which is not the trainer's, accelerated.
    """

    host_class = Trainer

    def _detach(self) -> None:
        if self.optimizer is not None:
            slow_down(self.optimizer)

    def fit(self, sae: nn.Module, *args: Any, **kwargs: Any) -> bool | None:
        if type(sae) is SparseAutoEncoder and FastSparseAutoEncoder.obstacle(sae) is None:
            accelerate(sae)
        if self.optimizer is not None:
            speed_up(self.optimizer)
        return super().fit(sae, *args, **kwargs)

    def _initialize_optimizer(self, sae: nn.Module) -> None:
        super()._initialize_optimizer(sae)
        speed_up(self.optimizer)


class _LossData(dict):
    """The result of `compute_loss`, which makes `hidden_pre` when it is asked for."""

    def __init__(self, sae: FastSparseAutoEncoder, x: Tensor, **data: Any):
        super().__init__(**data)
        self._scored = (x, sae.W_E, sae.b_E)
        self._versions = self._current_versions()

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key == "hidden_pre" else super().get(key, default)

    def __missing__(self, key: str) -> Tensor:
        if key != "hidden_pre":
            raise KeyError(key)
        if self._versions != self._current_versions():
            raise RuntimeError("hidden_pre must be read before the input or the encoder of its loss is changed")
        x, W_E, b_E = self._scored
        self[key] = x.to(W_E.dtype) @ W_E + b_E
        return self[key]

    def _current_versions(self) -> list[int | None]:
        return [None if tensor.is_inference() else tensor._version for tensor in self._scored]
