"""dictionary_learning: its TopK, BatchTopK, JumpReLU and ReLU autoencoders, and the trainers of the first three.

Its rules, kept here: `b_dec` is subtracted from the input (JumpReLU: only with `apply_b_dec_to_input`, never by the
trainer); ReLU comes before the top-k; the auxiliary loss takes the dead latents best in a row from the same input, is
computed in fp32 and divided by the variance of the residual; a row without activations makes the TopK trainer's
threshold infinite; the JumpReLU trainer's estimator is the host's own, applied where it is not zero. Differences:

* A latent fires where its activation is positive. The host's TopK trainer also counts those picked with activation 0
  by rows with fewer than k positive ones.
* The BatchTopK trainer's threshold starts at 0 from a batch without activations, where the host raises TypeError.
* The TopK trainer can log with `auxk_alpha=0`, where the host raises AttributeError.

`encode` with its extra results, and every call while an `nn.Linear` of the autoencoder has hooks or is replaced, are
the host's.

A price holds for `encode` with extra results, too, and whatever `use_threshold` says.
"""

from __future__ import annotations

from collections import namedtuple
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from dictionary_learning.dictionary import AutoEncoder, JumpReluAutoEncoder
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE, BatchTopKTrainer
from dictionary_learning.trainers.jumprelu import JumpReLUFunction, JumpReluTrainer, StepFunction
from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer, geometric_median
from torch import Tensor, nn

from .. import SparseCodes, sparse_decode, topk_encode
from . import accelerate, deaccelerate
from .accelerated import AbstractFirst, Accelerated, AcceleratedModule, Candidates, has_data, is_plain_linear
from .adam import slow_down, speed_up
from .sparse import above, batch_topk, candidates, candidates_of, is_crowded, padded_apart, product_dtype, topk
from .weights import as_latent_major, as_row_major, normalize_rows_, project_rows_


class _LinearAutoEncoder(AcceleratedModule):
    """What the autoencoders with an `nn.Linear` for encoder and decoder share."""

    transposed = ("decoder.weight",)

    def _attach(self) -> None:
        super()._attach()
        as_row_major(self.encoder.weight)

    def _detach(self) -> None:
        super()._detach()
        # The host makes it by transposing the decoder's, and its layout shows that.
        as_latent_major(self.encoder.weight)

    def _is_plain(self) -> bool:
        """Whether encoder and decoder are what the host makes."""
        plain = is_plain_linear(self.encoder) and is_plain_linear(self.decoder)
        return plain and self.encoder.bias is not None and self.decoder.bias is None

    def _select(self, centred: Tensor) -> SparseCodes:
        """The codes that training takes, of `x - b_dec`."""
        raise NotImplementedError

    def _bias(self) -> Tensor:
        """`b_enc`, under autocast in its dtype: an `nn.Linear` rounds the bias, too."""
        return self.encoder.bias.to(product_dtype(self.encoder.bias))

    def _candidates(self, k_max: int, x: Tensor) -> Candidates:
        centred = x - self.b_dec
        if self._is_plain():
            codes = candidates(centred, self.encoder.weight, self._bias(), k_max)
        else:
            codes = candidates_of(self.encoder(centred), k_max)
        return Candidates(codes, self.decoder.weight.T, None, centred)

    def _post_relu(self, x: Tensor) -> Tensor:
        return self.encoder(x - self.b_dec).relu()

    def _decode(self, codes: SparseCodes) -> Tensor:
        # b_dec is added as the host adds it: outside of autocast.
        return sparse_decode(codes, self.decoder.weight.T) + self.b_dec

    def _output(self, codes: SparseCodes, output_features: bool) -> Tensor | tuple[Tensor, Tensor]:
        x_hat = self._decode(codes)
        return (x_hat, codes.to_dense(self.dict_size)) if output_features else x_hat


class FastAutoEncoderTopK(AbstractFirst, _LinearAutoEncoder, AutoEncoderTopK):
    """`AutoEncoderTopK` whose `forward` goes by sparse codes; also a `dict_class` for `TopKTrainer`."""

    host_class = AutoEncoderTopK

    def encode(self, x: Tensor, return_topk: bool = False, use_threshold: bool = False):
        if self._is_priced():
            codes = self._at_price(x)
            f = codes.to_dense(self.dict_size)
            return (f, *padded_apart(codes), self._post_relu(x)) if return_topk else f
        if return_topk or use_threshold or not self._is_plain():
            return super().encode(x, return_topk=return_topk, use_threshold=use_threshold)
        return self._select(x - self.b_dec).to_dense(self.dict_size)

    def forward(self, x: Tensor, output_features: bool = False):
        if not self._is_plain():
            return super().forward(x, output_features)
        codes = self._at_price(x) if self._is_priced() else self._select(x - self.b_dec)
        return self._output(codes, output_features)

    def _select(self, centred: Tensor) -> SparseCodes:
        return topk(centred, self.encoder.weight, self.encoder.bias, int(self.k))


class FastBatchTopKSAE(AbstractFirst, _LinearAutoEncoder, BatchTopKSAE):
    """`BatchTopKSAE` whose `forward`, by the threshold, goes by sparse codes where they are sparse."""

    host_class = BatchTopKSAE

    def encode(self, x: Tensor, return_active: bool = False, use_threshold: bool = True):
        if self._is_priced():
            f = self._at_price(x).to_dense(self.dict_size)
            return (f, f.sum(0) > 0, self._post_relu(x)) if return_active else f
        if return_active or use_threshold or not (self._is_plain() and has_data(x)):
            return super().encode(x, return_active=return_active, use_threshold=use_threshold)
        return self._select(x - self.b_dec).to_dense(self.dict_size)

    def forward(self, x: Tensor, output_features: bool = False):
        if not self._is_plain():
            return super().forward(x, output_features)
        if self._is_priced():
            return self._output(self._at_price(x), output_features)
        selection = (x - self.b_dec, self.encoder.weight, self._bias(), self.threshold)
        if is_crowded(*selection):
            return super().forward(x, output_features)
        return self._output(above(*selection), output_features)

    def _select(self, centred: Tensor) -> SparseCodes:
        return batch_topk(centred, self.encoder.weight, self._bias(), int(self.k) * len(centred))


class FastAutoEncoder(AbstractFirst, _LinearAutoEncoder, AutoEncoder):
    """`AutoEncoder` whose `forward` goes by sparse codes where they are sparse; not with a `ghost_mask`."""

    host_class = AutoEncoder

    @property
    def b_dec(self) -> Tensor:
        return self.bias

    def encode(self, x: Tensor) -> Tensor:
        return self._at_price(x).to_dense(self.dict_size) if self._is_priced() else super().encode(x)

    def forward(self, x: Tensor, output_features: bool = False, ghost_mask: Tensor | None = None):
        if ghost_mask is not None or not self._is_plain():
            return super().forward(x, output_features, ghost_mask)
        if self._is_priced():
            return self._output(self._at_price(x), output_features)
        bias = self._bias()
        selection = (x - self.b_dec, self.encoder.weight, bias, bias.new_zeros(()))
        if is_crowded(*selection):
            return super().forward(x, output_features)
        return self._output(above(*selection), output_features)


class FastJumpReluAutoEncoder(AbstractFirst, AcceleratedModule, JumpReluAutoEncoder):
    """`JumpReluAutoEncoder` whose `forward` goes by sparse codes where they are sparse."""

    host_class = JumpReluAutoEncoder
    transposed = ("W_enc",)

    def _detach(self) -> None:
        """Nothing: the host itself makes `W_enc` by transposing, which leaves it in the layout wanted here."""

    def forward(self, x: Tensor, output_features: bool = False):
        if self._is_priced():
            return self._output(self._at_price(x), output_features)
        selection = (self._encoder_input(x), self.W_enc.T, self.b_enc, self.threshold)
        if is_crowded(*selection):
            return super().forward(x, output_features)
        return self._output(above(*selection), output_features)

    def encode(self, x: Tensor, output_pre_jump: bool = False):
        if not self._is_priced():
            return super().encode(x, output_pre_jump)
        f = self._at_price(x).to_dense(self.dict_size)
        return (f, self._encoder_input(x) @ self.W_enc + self.b_enc) if output_pre_jump else f

    def _encoder_input(self, x: Tensor) -> Tensor:
        return x - self.b_dec if self.apply_b_dec_to_input else x

    def _candidates(self, k_max: int, x: Tensor) -> Candidates:
        z = self._encoder_input(x)
        codes = candidates(z, self.W_enc.T, self.b_enc, k_max)
        return Candidates(codes, self.W_dec, None if self.apply_b_dec_to_input else self.b_dec, z)

    def _output(self, codes: SparseCodes, output_features: bool) -> Tensor | tuple[Tensor, Tensor]:
        x_hat = sparse_decode(codes, self.W_dec) + self.b_dec
        return (x_hat, codes.to_dense(self.dict_size)) if output_features else x_hat


class _Trainer(Accelerated):
    """What the trainers share: the autoencoder and the optimizer in them are accelerated, and so is `update`."""

    fast_class: ClassVar[type[AcceleratedModule]]
    """Of its autoencoder."""

    @classmethod
    def refusal(cls, obj: Any) -> str | None:
        known = (cls.fast_class, cls.fast_class.host_class)
        if type(obj.ae) not in known:
            return f"an autoencoder of class {type(obj.ae).__qualname__}, not {known[1].__qualname__}"
        return None

    def _attach(self) -> None:
        accelerate(self.ae)
        speed_up(self.optimizer)

    def _detach(self) -> None:
        deaccelerate(self.ae)
        slow_down(self.optimizer)

    def _decoder_rows(self) -> tuple[Tensor, Tensor]:
        """The decoder's weight and its gradient, both `[F, D]`."""
        raise NotImplementedError

    def update(self, step: int, x: Tensor) -> float:
        loss = self.loss(x.to(self.device), step=step)
        loss.backward()
        W_dec, grad = self._decoder_rows()
        project_rows_(grad, W_dec, norm_eps=1e-6)
        nn.utils.clip_grad_norm_(self.ae.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        normalize_rows_(W_dec, torch.finfo(W_dec.dtype).eps)
        return loss.item()


class _LinearTrainer(_Trainer):
    """What the TopK and the BatchTopK trainer share."""

    _log = namedtuple("LossLog", ["x", "x_hat", "f", "losses"])

    def _decoder_rows(self) -> tuple[Tensor, Tensor]:
        weight = self.ae.decoder.weight
        return weight.data.T, weight.grad.T

    def update(self, step: int, x: Tensor) -> float:
        if step == 0:
            self.ae.b_dec.data = self.geometric_median(x).to(self.ae.b_dec.dtype)
        return super().update(step, x)

    def loss(self, x: Tensor, step: int | None = None, logging: bool = False):
        if not (isinstance(self.ae, self.fast_class) and self.ae._is_plain()):
            return super().loss(x, step=step, logging=logging)
        centred = x - self.ae.b_dec
        codes = self.ae._select(centred)
        if step > self.threshold_start_step:
            self.update_threshold(codes.values)
        x_hat = self.ae._decode(codes)
        residual = x - x_hat
        self.effective_l0 = int(self.ae.k)
        fired = _sum_by_latent(codes, codes.mask().int(), self.ae.dict_size) > 0
        _count_fired(self.num_tokens_since_fired, fired, len(x))

        l2_loss = residual.pow(2).sum(-1).mean()
        auxk_loss = self._auxiliary_loss(centred, residual.detach())
        loss = l2_loss + self.auxk_alpha * auxk_loss
        if not logging:
            return loss
        losses = {"l2_loss": l2_loss.item(), "auxk_loss": auxk_loss.item(), "loss": loss.item()}
        return self._log(x, x_hat, codes.to_dense(self.ae.dict_size), losses)

    def _auxiliary_loss(self, centred: Tensor, residual: Tensor) -> Tensor:
        """How well the dead latents that are best for each row, by its `x - b_dec`, give the residual."""
        dead = (self.num_tokens_since_fired >= self.dead_feature_threshold).nonzero().squeeze(1)
        self.dead_features = len(dead)
        if not len(dead):
            self.pre_norm_auxk_loss = -1
            return residual.new_zeros(())
        encoder = (self.ae.encoder.weight.index_select(0, dead), self.ae.encoder.bias[dead])
        W_dec = self.ae.decoder.weight.T.index_select(0, dead)
        if len(dead) <= self.top_k_aux:
            reconstruction = F.relu(F.linear(centred, *encoder)) @ W_dec
        else:
            reconstruction = sparse_decode(topk_encode(centred, *encoder, k=self.top_k_aux), W_dec)
        l2_loss = (residual.float() - reconstruction.float()).pow(2).sum(-1).mean()
        self.pre_norm_auxk_loss = l2_loss.detach()
        variance = (residual.float() - residual.mean(0).float()).pow(2).sum(-1).mean()
        return (l2_loss / variance).nan_to_num(0.0)


class FastTopKTrainer(_LinearTrainer, TopKTrainer):
    """`TopKTrainer` without a tensor of the size of all pre-activations."""

    host_class = TopKTrainer
    fast_class = FastAutoEncoderTopK
    geometric_median = staticmethod(geometric_median)

    def _auxiliary_loss(self, centred: Tensor, residual: Tensor) -> Tensor:
        return super()._auxiliary_loss(centred, residual) if self.auxk_alpha > 0 else residual.new_zeros(())


class FastBatchTopKTrainer(_LinearTrainer, BatchTopKTrainer):
    """`BatchTopKTrainer` with sparse gradients: the selection alone sees all pre-activations."""

    host_class = BatchTopKTrainer
    fast_class = FastBatchTopKSAE

    def update_threshold(self, f: Tensor) -> None:
        if self.ae.threshold < 0 and not (f > 0).any():
            self.ae.threshold = torch.zeros_like(self.ae.threshold)
        else:
            super().update_threshold(f)


class FastJumpReluTrainer(_Trainer, JumpReluTrainer):
    """`JumpReluTrainer` on the pre-activations at or near their thresholds, as soon as they are few."""

    host_class = JumpReluTrainer
    fast_class = FastJumpReluAutoEncoder

    _log = namedtuple("LossLog", ["x", "recon", "f", "losses"])

    def _decoder_rows(self) -> tuple[Tensor, Tensor]:
        return self.ae.W_dec.data, self.ae.W_dec.grad

    def loss(self, x: Tensor, step: int, logging: bool = False, **_):
        ae = self.ae
        x = x.to(ae.W_enc.dtype)
        # The threshold of a latent has a gradient where its pre-activation is within half a bandwidth, on either side.
        reach = ae.threshold.detach() - self.bandwidth / 2
        selection = (x, ae.W_enc.T, ae.b_enc - reach, reach.new_zeros(()))
        if not len(x) or is_crowded(*selection):
            return super().loss(x, step=step, logging=logging)
        near = above(*selection)
        threshold = near.gather(ae.threshold)
        f = JumpReLUFunction.apply(near.values + near.gather(reach), threshold, self.bandwidth)
        codes = near._replace(values=f)
        fired = _sum_by_latent(codes, f.detach(), ae.dict_size) > 0
        _count_fired(self.num_tokens_since_fired, fired, len(x))
        self.dead_features = (self.num_tokens_since_fired > self.dead_feature_threshold).sum().item()

        recon = sparse_decode(codes, ae.W_dec) + ae.b_dec
        recon_loss = (x - recon).pow(2).sum(-1).mean()
        relative_l0 = self._l0(codes, threshold) / self.target_l0
        scale = self.sparsity_coefficient * self.sparsity_warmup_fn(step)
        loss = recon_loss + scale * (relative_l0 - 1).pow(2)
        if not logging:
            return loss
        losses = {"l2_loss": recon_loss.item(), "loss": loss.item()}
        return self._log(x, recon, codes.to_dense(ae.dict_size), losses)

    def _l0(self, codes: SparseCodes, threshold: Tensor) -> Tensor:
        """Mean over the rows of the host's step function, over all latents, of the activations `codes`."""
        here = codes.mask()
        inside = StepFunction.apply(codes.values, threshold, self.bandwidth).where(here, 0).sum()
        # The others are all 0: above a negative threshold, and with a gradient for one near 0.
        n_others = codes.counts.numel() - _sum_by_latent(codes, here.int(), self.ae.dict_size)
        zeros = torch.zeros_like(self.ae.threshold)
        others = StepFunction.apply(zeros, self.ae.threshold, self.bandwidth) * n_others
        return (inside + others.sum()) / codes.counts.numel()


def _sum_by_latent(codes: SparseCodes, values: Tensor, d_sae: int) -> Tensor:
    """`[F]`: the sum over the rows of `values [..., K]`, which belong to the latents of `codes`."""
    # Slots past the counts go to one latent too many: counting them first would make an accelerator wait.
    index = codes.indices.where(codes.mask(), d_sae).long().flatten()
    return values.new_zeros(d_sae + 1).index_add_(0, index, values.flatten())[:d_sae]


def _count_fired(num_tokens_since_fired: Tensor, fired: Tensor, n_tokens: int) -> None:
    num_tokens_since_fired += n_tokens
    num_tokens_since_fired.masked_fill_(fired, 0)
