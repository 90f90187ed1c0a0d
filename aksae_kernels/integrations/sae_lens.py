"""SAELens: TopK, JumpReLU and standard SAEs, the training SAEs of both and of BatchTopK, and their trainer.

The host's rules, as they are kept here:

* The input is cast to the SAE's dtype, reshaped and normalised; `b_dec` is taken off it with `apply_b_dec_to_input`.
* With `rescale_acts_by_decoder_norm`, TopK and BatchTopK rank and hand out scores times `|W_dec[f]|`, and decode them
  divided by it. The two cancel in what is decoded and in every gradient, so codes here hold the plain scores.
* The auxiliary loss of both is `coefficient * min(n_dead / k_aux, 1) * mean |sum_f s_f W_dec[f] - residual|^2`, where f
  runs over a row's `min(k_aux, n_dead)` best dead latents, `k_aux = d_in // 2`, the scores s are not rectified, and no
  gradient flows through the residual.
* BatchTopK keeps `int(k * rows)` entries of a batch; its threshold follows the smallest of them that is positive.
* JumpReLU keeps scores above their threshold; in training the threshold is held at 0 or more and learns from entries
  within half a bandwidth of it, on both sides.

What a step hands out as `feature_acts` is a COO tensor, for which the host waits for an accelerator, as it does for the
dead latents, and here for the width of the codes of BatchTopK and JumpReLU.

Where somebody looks at dense activations or puts others in their place (a hook on `hook_sae_input`, on
`hook_sae_acts_pre`, on the activation function; in a forward or a training step also on `hook_sae_acts_post`), where an
error term is asked for, where more than a sixteenth of the latents fire, and on the meta device where the width of
codes would be data, the host's own code runs.

At a price, pre-activations are made for the hooks on `hook_sae_acts_pre`, which may replace them, and the activation
function is not called. With `rescale_acts_by_decoder_norm` candidates are visited by their scaled activations.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from sae_lens.saes.batchtopk_sae import BatchTopK, BatchTopKTrainingSAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUTrainingSAE
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.saes.standard_sae import StandardSAE
from sae_lens.saes.topk_sae import TopK, TopKSAE, TopKTrainingSAE
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor, nn

from .. import SparseCodes, sparse_decode
from . import accelerate, deaccelerate
from .accelerated import Accelerated, AcceleratedModule, Candidates, has_data, has_hooks
from .adam import slow_down, speed_up
from .sparse import (
    above,
    active_codes,
    batch_topk,
    candidates,
    candidates_of,
    has_tangent,
    is_crowded,
    pre_acts_at,
    topk,
)

_ROWS_AT_ONCE = 64
"""Rows whose scores of dead latents are kept at once."""


class _Encoded(NamedTuple):
    """Codes, and what they were made of."""

    x: Tensor
    """The input as `W_enc` reads it."""
    b_enc: Tensor
    """The encoder's bias; it also carries the gradient of the `b_dec` in x."""
    codes: SparseCodes
    """Their values are what `W_dec` is multiplied with."""
    norm: Tensor | None = None
    """`|W_dec[f]|`, where the host's activations are values times it."""
    gate: Tensor | None = None
    """`[..., K]`: 1 for what is above its threshold, else 0, with the gradient that a JumpReLU learns it by."""

    def activations(self) -> SparseCodes:
        """The codes with the host's activations for values."""
        codes = self.codes
        return codes if self.norm is None else codes._replace(values=codes.values * codes.gather(self.norm))


class TrainStep(TrainStepOutput):
    """The host's, with `feature_acts` a sparse COO tensor, and `hidden_pre` computed when it is first read.

    It is then that of the weights as they are at that time: read it before the optimizer's step. Nothing in the host's
    trainer does.
    """

    def __init__(self, *, hidden_pre: Callable[[], Tensor] | Tensor, **fields: Any):
        super().__init__(hidden_pre=hidden_pre, **fields)
        if not isinstance(hidden_pre, Tensor):
            del self.hidden_pre
            self._compute_hidden_pre = hidden_pre

    @cached_property
    def hidden_pre(self) -> Tensor:
        return self._compute_hidden_pre()

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in (*vars(self), "hidden_pre") if name != "_compute_hidden_pre"}


class _SparseSAE(AcceleratedModule):
    """What all of them share: the way from the input to codes and from codes to the output."""

    transposed = ("W_enc",)
    activation: type[nn.Module]
    """The one activation function that `_select` does the work of."""

    @classmethod
    def refusal(cls, obj: Any) -> str | None:
        if type(obj.activation_fn) is not cls.activation:
            return f"an activation_fn that is not {cls.activation.__name__}, but {type(obj.activation_fn).__name__}"
        return None

    @classmethod
    def get_sae_class_for_architecture(cls, architecture: str) -> type:
        # Files know the host's classes only.
        found = cls.host_class.get_sae_class_for_architecture(architecture)
        return cls if found is cls.host_class else found

    def encode(self, x: Tensor) -> Tensor:
        if self._is_priced():
            return self.hook_sae_acts_post(self._hand_out(self._at_price(x)))
        encoded = None if self._is_watched() else self._encode(x)
        if encoded is None:
            return super().encode(x)
        return self.hook_sae_acts_post(self._hand_out(encoded.activations()))

    def decode(self, feature_acts: Tensor) -> Tensor:
        if feature_acts.is_sparse:
            # The host's product with a COO tensor has no backward on CPUs.
            feature_acts = feature_acts.to_dense()
        codes = active_codes(feature_acts) if feature_acts.shape[-1] == self.cfg.d_sae else None
        if codes is None:
            return super().decode(feature_acts)
        return self._decode(self._unscaled(codes))

    def forward(self, x: Tensor) -> Tensor:
        if self._is_priced() and not (self.use_error_term or has_hooks(self.hook_sae_acts_post)):
            return self.hook_sae_output(self._decode(self._unscaled(self._at_price(x))))
        encoded = None if self.use_error_term or self._is_watched(self.hook_sae_acts_post) else self._encode(x)
        if encoded is None:
            return super().forward(x)
        return self.hook_sae_output(self._decode(encoded.codes))

    def _encode(self, x: Tensor) -> _Encoded | None:
        """None where the host's own code has to run: too many latents fire, or there is no data to tell how many."""
        sae_in, b_enc = self._encoder_input(x)
        norm = self._decoder_norms() if self._is_rescaled() else None
        codes = self._select(sae_in, b_enc, norm)
        return None if codes is None else _Encoded(sae_in, b_enc, codes, norm)

    def _select(self, x: Tensor, b_enc: Tensor, norm: Tensor | None) -> SparseCodes | None:
        raise NotImplementedError

    def _candidates(self, k_max: int, x: Tensor) -> Candidates:
        norm = self._decoder_norms() if self._is_rescaled() else None
        sae_in = self.process_sae_in(x)
        if has_hooks(self.hook_sae_acts_pre):
            scores = self.hook_sae_acts_pre(sae_in @ self.W_enc + self.b_enc)
            codes = candidates_of(scores, k_max, norm)
        else:
            codes = candidates(sae_in, self.W_enc.T, self.b_enc, k_max, norm)
        W_dec = self.W_dec if norm is None else self.W_dec / norm.unsqueeze(1)
        return Candidates(codes, W_dec, None if self.cfg.apply_b_dec_to_input else self.b_dec, sae_in)

    def _unscaled(self, activations: SparseCodes) -> SparseCodes:
        """What `W_dec` is multiplied with, of the host's activations."""
        if not self._is_rescaled():
            return activations
        return activations._replace(values=activations.values * activations.gather(1 / self._decoder_norms()))

    def _decode(self, codes: SparseCodes) -> Tensor:
        # Added last: under autocast the host adds b_dec in its own precision.
        recons = self.hook_sae_recons(sparse_decode(codes, self.W_dec) + self.b_dec)
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(recons), self.d_head)

    def _hand_out(self, codes: SparseCodes) -> Tensor:
        return codes.to_dense(self.cfg.d_sae)

    def _encoder_input(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The input as `W_enc` reads it, and the encoder's bias."""
        sae_in = self.process_sae_in(x)
        if x.requires_grad or has_tangent(sae_in) or not sae_in.requires_grad:
            return sae_in, self.b_enc
        if not self.cfg.apply_b_dec_to_input:
            # What flows back to b_dec is multiplied by 0.
            return sae_in.detach(), self.b_enc
        # The gradient of b_dec by way of the bias, to which -W_enc^T b_dec adds: one matrix-vector product, where the
        # way through sae_in gathers the rows of W_enc for each row of the batch.
        zero = self.b_dec - self.b_dec.detach()
        return sae_in.detach(), self.b_enc - F.linear(zero, self.W_enc.T.detach())

    def _is_rescaled(self) -> bool:
        return getattr(self.cfg, "rescale_acts_by_decoder_norm", False)

    def _decoder_norms(self) -> Tensor:
        return torch.linalg.vector_norm(self.W_dec, dim=-1)

    def _is_watched(self, *others: nn.Module) -> bool:
        """Whether a hook sees what only the host computes, or may put something in its place."""
        watched = (self.hook_sae_input, self.hook_sae_acts_pre, self.activation_fn, *others)
        return type(self.activation_fn) is not self.activation or any(map(has_hooks, watched))


class _TrainingSAE(_SparseSAE):
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        x = step_input.sae_in
        # What a step hands out is as wide as its longest row: that is data.
        is_hosts = self._is_watched(self.hook_sae_acts_post) or not has_data(x)
        encoded = None if is_hosts else self._encode(x)
        if encoded is None:
            return super().training_forward_pass(step_input)
        sae_out = self._decode(encoded.codes)
        losses = {"mse_loss": self.mse_loss_fn(sae_out, x).sum(dim=-1).mean()}
        losses |= self._other_losses(step_input, encoded, sae_out)
        feature_acts = encoded.activations().to_coo(self.cfg.d_sae)
        return TrainStep(
            sae_in=x,
            sae_out=sae_out,
            feature_acts=feature_acts,
            hidden_pre=lambda: self.encode_with_hidden_pre(x)[1],
            loss=sum(losses.values()),
            losses=losses,
            metrics=self._metrics(feature_acts),
        )

    def _other_losses(self, step_input: TrainStepInput, encoded: _Encoded, sae_out: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError

    def _metrics(self, feature_acts: Tensor) -> dict[str, Tensor]:
        return {}


class _TopKTrainingSAE(_TrainingSAE):
    """TopK and BatchTopK."""

    def _other_losses(self, step_input: TrainStepInput, encoded: _Encoded, sae_out: Tensor) -> dict[str, Tensor]:
        aux = self._aux_loss(step_input, encoded, sae_out)
        return {"auxiliary_reconstruction_loss": sae_out.new_zeros(()) if aux is None else aux}

    def _aux_loss(self, step_input: TrainStepInput, encoded: _Encoded, sae_out: Tensor) -> Tensor | None:
        """None where no latent is dead."""
        dead = _dead(step_input)
        if dead is None:
            return None
        if self.cfg.normalize_activations in ("constant_norm_rescale", "layer_norm"):
            raise ValueError(
                "normalize_activations must leave input and output in one space for the auxiliary loss of dead latents "
                f"(none, expected_average_only_in or covariance_whitening), got {self.cfg.normalize_activations!r}"
            )
        residual = (step_input.sae_in - sae_out).detach()
        k_aux = step_input.sae_in.shape[-1] // 2
        scale = min(len(dead) / k_aux, 1.0)
        recons = self.reshape_fn_out(self._decode_dead(encoded, dead, k_aux), self.d_head)
        return self.cfg.aux_loss_coefficient * scale * (recons - residual).pow(2).sum(dim=-1).mean()

    def _decode_dead(self, encoded: _Encoded, dead: Tensor, k_aux: int) -> Tensor:
        """What each row's best `k_aux` dead latents decode to."""
        x, b_enc, norm = encoded.x, encoded.b_enc, encoded.norm
        W_enc = self.W_enc.T
        if len(dead) <= k_aux:
            return F.linear(x, W_enc[dead], b_enc[dead]) @ self.W_dec[dead]
        with torch.no_grad():
            weight, bias, scale = W_enc[dead], b_enc[dead], None if norm is None else norm[dead]
            rows = x.reshape(-1, x.shape[-1])
            best = torch.cat([_best(F.linear(some, weight, bias), k_aux, scale) for some in rows.split(_ROWS_AT_ONCE)])
            indices = dead[best].int().reshape(*x.shape[:-1], k_aux)
            chosen = SparseCodes(x.new_empty(indices.shape), indices, torch.full_like(indices[..., 0], k_aux))
        return sparse_decode(pre_acts_at(chosen, x, W_enc, b_enc), self.W_dec)


class _TopKSelection:
    activation = TopK

    def _select(self, x: Tensor, b_enc: Tensor, norm: Tensor | None) -> SparseCodes:
        return topk(x, self.W_enc.T, b_enc, self.activation_fn.k, None if norm is None else norm.detach())


class FastTopKSAE(_TopKSelection, _SparseSAE, TopKSAE):
    """`encode` gives a dense tensor, as in the host; `forward` makes none. `decode` reads any."""

    host_class = TopKSAE


class FastTopKTrainingSAE(_TopKSelection, _TopKTrainingSAE, TopKTrainingSAE):
    """A training step makes no `[B, F]` tensor; see `TrainStep` for what it hands out."""

    host_class = TopKTrainingSAE

    def _hand_out(self, codes: SparseCodes) -> Tensor:
        if self.activation_fn.use_sparse_activations:
            return codes.to_coo(self.cfg.d_sae)
        return super()._hand_out(codes)


class FastBatchTopKTrainingSAE(_TopKTrainingSAE, BatchTopKTrainingSAE):
    """A training step makes a `[B, F]` tensor only for a batch in which a row has eight times its share.

    See `TrainStep` for what it hands out.
    """

    host_class = BatchTopKTrainingSAE
    activation = BatchTopK

    def _metrics(self, feature_acts: Tensor) -> dict[str, Tensor]:
        # A copy: torch.compile cannot follow a view of the values of a sparse tensor.
        self.update_topk_threshold(feature_acts.values().clone())
        return {"topk_threshold": self.topk_threshold}

    def _select(self, x: Tensor, b_enc: Tensor, norm: Tensor | None) -> SparseCodes | None:
        if not has_data(x):
            return None
        budget = int(self.activation_fn.k * x.shape[:-1].numel())
        return batch_topk(x, self.W_enc.T, b_enc, budget, None if norm is None else norm.detach())


class FastJumpReLUSAE(_SparseSAE, JumpReLUSAE):
    """As FastTopKSAE, while at most one latent in sixteen fires, on average and in every row."""

    host_class = JumpReLUSAE
    activation = nn.ReLU

    def _select(self, x: Tensor, b_enc: Tensor, norm: Tensor | None) -> SparseCodes | None:
        return _above(x, self.W_enc.T, b_enc, self.threshold.detach())


class FastStandardSAE(_SparseSAE, StandardSAE):
    """As FastJumpReLUSAE, with the threshold 0."""

    host_class = StandardSAE
    activation = nn.ReLU

    def _select(self, x: Tensor, b_enc: Tensor, norm: Tensor | None) -> SparseCodes | None:
        return _above(x, self.W_enc.T, b_enc, b_enc.new_zeros(()))


class FastJumpReLUTrainingSAE(_TrainingSAE, JumpReLUTrainingSAE):
    """Codes hold the entries above their threshold and, with value 0, those whose gradient reaches it from below.

    While more than a sixteenth of the latents would be in them, as at the start of a training, the host's own code
    runs; one `[B, F]` tensor, without gradient, is made while a row has more than a sixteenth. See `TrainStep` for what
    a training step hands out.
    """

    host_class = JumpReLUTrainingSAE
    activation = nn.ReLU  # the host has set it, and makes no use of it

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        # Before anything reads it, as the host does.
        self.threshold.data.clamp_(min=0.0)
        return super().training_forward_pass(step_input)

    def _encode(self, x: Tensor) -> _Encoded | None:
        encoded = super()._encode(x)
        if encoded is None:
            return None
        pre_acts = encoded.codes
        gate = self._gate(pre_acts)
        # The activation jumps by its threshold where the gate opens.
        jump = pre_acts.gather(self.threshold.detach()).to(gate.dtype) * (gate - gate.detach())
        values = pre_acts.values * gate.detach() + jump
        return encoded._replace(codes=pre_acts._replace(values=values), gate=gate)

    def _select(self, x: Tensor, b_enc: Tensor, norm: Tensor | None) -> SparseCodes | None:
        """Pre-activations of what is above its threshold or near enough to teach it."""
        W_enc = self.W_enc.T
        with torch.no_grad():
            # A little more than half a bandwidth: `_gate` says what is near.
            bias = b_enc - (self.threshold - 0.51 * self.bandwidth).to(b_enc.dtype)
            if is_crowded(x, W_enc, bias, bias.new_zeros(())):
                return None
            chosen = above(x, W_enc, bias, bias.new_zeros(()))
        return pre_acts_at(chosen, x, W_enc, b_enc)

    def _gate(self, pre_acts: SparseCodes) -> Tensor:
        """`[..., K]`: 1 above the threshold, else 0, with the gradient of a ramp one bandwidth wide."""
        scores = pre_acts.values
        threshold = pre_acts.gather(self.threshold.to(scores.dtype))
        distance = (scores if self.cfg.jumprelu_ste_to_input else scores.detach()) - threshold
        is_near = (distance.detach() / self.bandwidth).abs() < 0.5
        return (scores > threshold) + is_near * (distance - distance.detach()) / self.bandwidth

    def _other_losses(self, step_input: TrainStepInput, encoded: _Encoded, sae_out: Tensor) -> dict[str, Tensor]:
        losses = {"l0_loss": (step_input.coefficients["l0"] * self._sparsity(encoded)).mean()}
        if self.cfg.pre_act_loss_coefficient is not None:
            losses["pre_act_loss"] = self.cfg.pre_act_loss_coefficient * self._silence(step_input, encoded)
        return losses

    def _sparsity(self, encoded: _Encoded) -> Tensor:
        """Of each row: its L0, how far that is from its target, or a smooth form of it."""
        mode = self.cfg.jumprelu_sparsity_loss_mode
        if mode == "tanh":
            norm = encoded.codes.gather(self._decoder_norms())
            return torch.tanh(self.cfg.jumprelu_tanh_scale * encoded.codes.values * norm).sum(dim=-1)
        l0 = encoded.gate.sum(dim=-1)
        if mode == "quadratic":
            return 2 / self.cfg.target_l0 * (l0 - self.cfg.target_l0) ** 2
        if mode == "step":
            return l0
        raise ValueError(f"jumprelu_sparsity_loss_mode must be step, tanh or quadratic, got {mode!r}")

    def _silence(self, step_input: TrainStepInput, encoded: _Encoded) -> Tensor:
        """How far dead latents are below their thresholds, times the norms of their decoder rows."""
        dead = _dead(step_input)
        if dead is None:
            return encoded.x.new_zeros(())
        pre_acts = F.linear(encoded.x, self.W_enc.T[dead], encoded.b_enc[dead])
        below = (self.threshold.to(pre_acts.dtype)[dead] - pre_acts).relu()
        return (below * torch.linalg.vector_norm(self.W_dec[dead], dim=-1)).sum(dim=-1).mean()


# The host first: Python lets an object change to a class whose first base is the one it had, and to others only if they
# look alike in memory, which a generic class and this one do not.
class FastSAETrainer(SAETrainer, Accelerated):
    """The host's, on an accelerated SAE and optimizer."""

    host_class = SAETrainer

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._attach()

    @classmethod
    def refusal(cls, obj: Any) -> str | None:
        sae = obj.sae
        fast = next((known for known in _TRAINING_SAES if type(sae) in (known, known.host_class)), None)
        if fast is None:
            return f"an SAE that is not accelerated, {type(sae).__name__}"
        return fast.refusal(sae)

    def _attach(self) -> None:
        accelerate(self.sae)
        speed_up(self.optimizer)

    def _detach(self) -> None:
        deaccelerate(self.sae)
        slow_down(self.optimizer)


_TRAINING_SAES = (FastTopKTrainingSAE, FastBatchTopKTrainingSAE, FastJumpReLUTrainingSAE)


def _above(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor) -> SparseCodes | None:
    selection = (x, W_enc, b_enc, threshold)
    return None if is_crowded(*selection) else above(*selection)


def _best(scores: Tensor, k: int, scale: Tensor | None) -> Tensor:
    """Of each row, the k largest scores times `scale`, whatever their sign: `[B, k]` indices."""
    return (scores if scale is None else scores.mul_(scale)).topk(k, sorted=False).indices


def _dead(step_input: TrainStepInput) -> Tensor | None:
    """The dead latents, in order; None for none. Waits for an accelerator, as the host does."""
    mask = step_input.dead_neuron_mask
    dead = None if mask is None else mask.nonzero().squeeze(1)
    return dead if dead is not None and len(dead) else None
