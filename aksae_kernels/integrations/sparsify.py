"""EleutherAI sparsify: `SparseCoder` and its `Trainer`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from sparsify import SparseCoder, Trainer
from sparsify.fused_encoder import EncoderOutput
from sparsify.sparse_coder import ForwardOutput
from torch import Tensor

from .. import SparseCodes, decode_mse, sparse_decode, topk_encode, topk_select
from . import accelerate, deaccelerate
from .accelerated import Accelerated, AcceleratedModule, Candidates
from .adam import slow_down, speed_up
from .sparse import candidates, candidates_of, padded, padded_apart, topk
from .weights import normalize_rows_, project_rows_


class FastSparseCoder(AcceleratedModule, SparseCoder):
    """A `SparseCoder` with activation "topk": ReLU, then the k largest of a row.

    A training step makes no `[B, F]` tensor; AuxK encodes with the rows of dead latents only, and Multi-TopK encodes
    once, at 4k. Other than in the host,

    * the gradients of the AuxK and Multi-TopK losses reach the encoder; the host's fused encoder drops them;
    * in a row with fewer than k positive pre-activations the remaining slots name latents that fired (in that row, or
      in another where none did) with activation 0, so that a trainer counts none as fired that was not. The host fills
      them with latents of pre-activation 0, counts those as fired, and passes a gradient through their ReLU. `encode`,
      which no trainer calls, names no latent twice, as the host: callers write its activations into dense rows.

    At a price, outputs hold `k_max` activations of each row, or one for each latent if those are fewer. Slots past
    those that pay are filled as in `encode`, in `forward` too. Multi-TopK and AuxK, which are about training, are 0.

    As in the host, decoding and its gradients stay in the dtype of the weights under autocast, and with Multi-TopK
    `sae_out` and the latents of the output are those of 4k.
    """

    host_class = SparseCoder

    @classmethod
    def refusal(cls, obj: SparseCoder) -> str | None:
        if obj.cfg.activation != "topk":
            return f"activation {obj.cfg.activation!r}, where 'topk' is the only one with kernels"
        return None

    @classmethod
    def price_obstacle(cls, obj: SparseCoder) -> str | None:
        if obj.cfg.transcode:
            return "transcode=True, where encode is not given what is to be reconstructed"
        if obj.W_dec is None:
            return "no decoder, where a price is asked for what latents reconstruct"
        return None

    def encode(self, x: Tensor) -> EncoderOutput:
        """As the host's, with the dense `pre_acts [..., F]`: for callers other than `forward`. Gradients are dense."""
        pre_acts = F.linear(self._encoder_input(x), self.encoder.weight, self.encoder.bias).relu()
        codes = self._at_price(x, pre_acts) if self._is_priced() else topk_select(pre_acts, self.cfg.k)
        return EncoderOutput(*padded_apart(codes), pre_acts)

    def decode(self, top_acts: Tensor, top_indices: Tensor) -> Tensor:
        counts = top_indices.new_full(top_indices.shape[:-1], top_indices.shape[-1], dtype=torch.int32)
        return self._decode(SparseCodes(top_acts, top_indices.int(), counts))

    @torch.autocast("cuda", dtype=torch.bfloat16, enabled=torch.cuda.is_bf16_supported())
    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        dead_mask: Tensor | None = None,
        total_variance: Tensor | None = None,
    ) -> ForwardOutput:
        k, multi_topk = self.cfg.k, self.cfg.multi_topk
        y = x if y is None else y
        if self._is_priced():
            return self._forward_at_price(x, y, total_variance)
        z = self._encoder_input(x)
        wide = topk(z, self.encoder.weight, self.encoder.bias, 4 * k if multi_topk else k)
        sae_out = self._reconstruct(_best(wide, k) if multi_topk else wide, x)

        e = y - sae_out
        if total_variance is None:
            total_variance = (y - y.mean(0)).pow(2).sum()
        auxk_loss = multi_topk_fvu = sae_out.new_zeros(())
        if dead_mask is not None:
            auxk_loss = self._auxk_error(z, e.detach(), dead_mask) / total_variance
        if multi_topk:
            sae_out = self._decode(wide)
            multi_topk_fvu = (sae_out - y).pow(2).sum() / total_variance
        return ForwardOutput(sae_out, *padded(wide), e.pow(2).sum() / total_variance, auxk_loss, multi_topk_fvu)

    def _forward_at_price(self, x: Tensor, y: Tensor, total_variance: Tensor | None) -> ForwardOutput:
        codes = self._at_price(x)
        sae_out = self._reconstruct(codes, x)
        if total_variance is None:
            total_variance = (y - y.mean(0)).pow(2).sum()
        zero = sae_out.new_zeros(())
        return ForwardOutput(sae_out, *padded_apart(codes), (y - sae_out).pow(2).sum() / total_variance, zero, zero)

    def _candidates(self, k_max: int, x: Tensor, pre_acts: Tensor | None = None) -> Candidates:
        z = self._encoder_input(x)
        if pre_acts is None:
            codes = candidates(z, self.encoder.weight, self.encoder.bias, k_max)
        else:
            codes = candidates_of(pre_acts, k_max)
        target = z if self.W_skip is None else z - x.to(self.dtype) @ self.W_skip.mT
        # In the dtype of the weights, as they are decoded.
        return Candidates(codes._replace(values=codes.values.to(self.dtype)), self.W_dec, None, target.to(self.dtype))

    def _reconstruct(self, codes: SparseCodes, x: Tensor) -> Tensor:
        sae_out = self._decode(codes)
        return sae_out if self.W_skip is None else sae_out + x.to(self.dtype) @ self.W_skip.mT

    @torch.no_grad()
    def set_decoder_norm_to_unit_norm(self) -> None:
        normalize_rows_(self.W_dec.data, torch.finfo(self.W_dec.dtype).eps)

    @torch.no_grad()
    def remove_gradient_parallel_to_decoder_directions(self) -> None:
        project_rows_(self.W_dec.grad, self.W_dec.data)

    def _encoder_input(self, x: Tensor) -> Tensor:
        return x if self.cfg.transcode else x - self.b_dec

    def _decode(self, codes: SparseCodes) -> Tensor:
        assert self.W_dec is not None, "the coder was made without a decoder"
        with _without_autocast(codes.values.device):
            return sparse_decode(codes._replace(values=codes.values.to(self.dtype)), self.W_dec, self.b_dec)

    def _auxk_error(self, z: Tensor, e: Tensor, dead_mask: Tensor) -> Tensor:
        """Squared error of the best dead latents' prediction of the residual `e`, scaled by how many are dead."""
        # An accelerator waits for the host, as it does for the host's own count of the dead.
        dead = dead_mask.nonzero().squeeze(1)
        if not len(dead):
            return e.new_zeros(())
        k = e.shape[-1] // 2
        W_enc, b_enc = self.encoder.weight.index_select(0, dead), self.encoder.bias[dead]
        if len(dead) <= k:
            acts = F.linear(z, W_enc, b_enc).relu()
            with _without_autocast(z.device):
                e_hat = acts.to(self.dtype) @ self.W_dec.index_select(0, dead)
            return len(dead) / k * (e_hat - e).pow(2).sum()
        codes = topk_encode(z, W_enc, b_enc, k=k)
        codes = codes._replace(values=codes.values.to(self.dtype), indices=codes.gather(dead).int())
        with _without_autocast(z.device):
            return decode_mse(codes, self.W_dec, None, e.to(self.dtype)).sum().to(e.dtype)


class FastTrainer(Accelerated, Trainer):
    """A `Trainer` whose coders are accelerated, and its `torch.optim.Adam`; other optimizers are left as they are."""

    host_class = Trainer

    @classmethod
    def refusal(cls, obj: Trainer) -> str | None:
        for name, coder in obj.saes.items():
            if not isinstance(coder, FastSparseCoder) and type(coder) is not SparseCoder:
                return f"a {type(coder).__name__} at {name}, where SparseCoder is the only class with kernels"
            if reason := FastSparseCoder.refusal(coder):
                return reason
        return None

    def _attach(self) -> None:
        for coder in self.saes.values():
            accelerate(coder)
        for optimizer in self.optimizers:
            speed_up(optimizer)

    def _detach(self) -> None:
        for coder in self.saes.values():
            deaccelerate(coder)
        for optimizer in self.optimizers:
            slow_down(optimizer)


def _without_autocast(device: torch.device) -> AbstractContextManager[None]:
    # torch knows no autocast of the meta device, and raises.
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _best(codes: SparseCodes, k: int) -> SparseCodes:
    """The k largest of each row of codes."""
    top = topk_select(codes.values, k)
    places = top.indices.where(top.mask(), 0).long()
    return top._replace(indices=codes.indices.gather(-1, places))
