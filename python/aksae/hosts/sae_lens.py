"""The SAELens architecture `adaptivek`: TopK with a k of each row's own, read off a linear probe inside the SAE.

Importing this module registers it, so that `SAE.load_from_disk`, `TrainingSAE.load_from_disk`, `SAETrainer` and
everything built on them know it. Tested with sae-lens 6.54.12.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from sae_lens import SAE, SAEConfig, TrainingSAE, TrainingSAEConfig
from sae_lens import registry as _registry
from sae_lens.saes.sae import SAEMetadata, TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import act_times_W_dec
from sae_lens.util import dtype_to_str
from torch import Tensor, nn

from aksae_kernels import SparseCodes, decode_mse, sparse_decode, topk_encode, topk_select

from ..config import ProbeReads, flat_selection, k_map_of, validate_sae
from ..config import SAEConfig as AdaptiveKConfig
from ..errors import UserError
from ..probe import ComplexityProbe
from ..sae import AdaptiveKSAE
from ..selections import AdaptiveK
from ._checks import adaptive_selection
from ._codes import decode_dense

ARCHITECTURE = "adaptivek"


@dataclass(kw_only=True)
class _KMapConfig:
    """The score-to-k map, as in `aksae.SAEConfig`."""

    k_min: int = 20
    k_max: int = 320
    steepness: float = 6.0
    score_min: float = 0.0
    score_max: float = 10.0
    probe_reads: ProbeReads = "last"
    """What the probe was fitted to read. In SAELens it reads every row by itself."""
    probe_lambda: float | None = None

    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    def __post_init__(self) -> None:
        super().__post_init__()
        config = self.adaptivek_config()
        validate_sae(config)
        # As plain ints, which a file can hold.
        self.k_min, self.k_max = config.selection.k_map.k_min, config.selection.k_map.k_max

    def adaptivek_config(self) -> AdaptiveKConfig:
        """The config of the `AdaptiveKSAE` with this shape and map."""
        selection = AdaptiveK(k_map_of(self), self.probe_reads, self.probe_lambda)
        return AdaptiveKConfig(self.d_in, self.d_sae, selection)


@dataclass(kw_only=True)
class AdaptiveKSAELensConfig(_KMapConfig, SAEConfig):
    """SAELens' config fields and the score-to-k map. Raises UserError for a field out of range."""


@dataclass(kw_only=True)
class AdaptiveKTrainingSAELensConfig(_KMapConfig, TrainingSAEConfig):
    """The same for training. Decoder rows start at norm 1, where AdaptiveK keeps them; SAELens lets them drift."""

    decoder_init_norm: float | None = 1.0
    aux_loss_coefficient: float = 1.0
    """Weight of the loss on dead latents, in SAELens' own units: see `AdaptiveKTrainingSAELens.calculate_aux_loss`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.aux_loss_coefficient and self.normalize_activations in ("constant_norm_rescale", "layer_norm"):
            raise UserError(
                f"aux_loss_coefficient: got {self.aux_loss_coefficient}, needs 0 with normalize_activations = "
                f"{self.normalize_activations}: the residual and its reconstruction would be in different units"
            )


class _AdaptiveK:
    """What inference and training SAE share: parameters, k, encode, decode, and the way to `AdaptiveKSAE` and back.

    `W_enc` has SAELens' shape `[D, F]` over latent-major storage, so that `W_enc.T` is the contiguous `[F, D]` that
    the kernels read; saved files hold it contiguous. The probe reads what the SAE is given, before `b_dec` and any
    per-row normalisation; its parameters are frozen, since no gradient flows through k.
    """

    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.W_enc.data = _latent_major(self.W_enc.data)
        self.b_enc = nn.Parameter(torch.zeros(self.cfg.d_sae, dtype=self.dtype, device=self.device))
        probe = ComplexityProbe(self.cfg.d_in, self.cfg.score_min, self.cfg.score_max)
        self.probe = probe.to(self.device, self.dtype).requires_grad_(False)

    @torch.no_grad()
    def set_probe(self, probe: ComplexityProbe) -> None:
        """Take over weight and bias of `probe`. UserError where its width or score range is not the config's."""
        wanted = (self.cfg.d_in, self.cfg.score_min, self.cfg.score_max)
        got = (probe.weight.numel(), probe.score_min, probe.score_max)
        if got != wanted:
            raise UserError(f"probe: got (d_in, score_min, score_max) = {got}, needs {wanted}")
        self.probe.weight.copy_(probe.weight)
        self.probe.bias.copy_(probe.bias)

    @torch.no_grad()
    def k_for(self, x: Tensor) -> Tensor:
        """k of each vector of `x [..., D]`, `[...]` int32."""
        return self.cfg.adaptivek_config().selection.k_map(self.probe(x))

    def encode(self, x: Tensor) -> Tensor:
        """Latents of `x [..., D]`, dense `[..., F]`: per row the k largest positive pre-activations."""
        return self.hook_sae_acts_post(self._codes(*self._read(x)).to_dense(self.cfg.d_sae))

    def decode(self, feature_acts: Tensor) -> Tensor:
        """`feature_acts @ W_dec + b_dec` of dense or sparse COO latents `[..., F]`, normalised and reshaped back."""
        if feature_acts.is_sparse:
            y = act_times_W_dec(feature_acts, self.W_dec, rescale_acts_by_decoder_norm=False) + self.b_dec
        else:
            y = decode_dense(feature_acts, self.W_dec, self.b_dec)
        return self._finish(y)

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction of `x [..., D]`; without a dense tensor of latents unless a hook or error term asks."""
        if self.use_error_term or _is_watched(self.hook_sae_acts_post):
            return super().forward(x)
        return self.hook_sae_output(self._reconstruct(self._codes(*self._read(x))))

    def fold_W_dec_norm(self) -> None:
        """Raises NotImplementedError: it would change which latents are among the k largest."""
        raise NotImplementedError("decoder norms cannot be folded into the encoder: the k largest latents would change")

    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        """As in SAELens; the probe is folded too, so that unscaled activations get the k that scaled ones had."""
        super().fold_activation_norm_scaling_factor(scaling_factor)
        self.probe.weight.mul_(scaling_factor)

    @torch.no_grad()
    def fold_activation_whitening(self, mean: Tensor, whitening_matrix: Tensor, unwhitening_matrix: Tensor) -> None:
        """As in SAELens; the probe is folded too, so that raw activations get the k that whitened ones had."""
        super().fold_activation_whitening(mean, whitening_matrix, unwhitening_matrix)
        weight = whitening_matrix.double().to(self.device) @ self.probe.weight.double()
        self.probe.bias.sub_(mean.double().to(self.device) @ weight)
        self.probe.weight.copy_(weight)

    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving(state_dict)
        state_dict["W_enc"] = state_dict["W_enc"].contiguous()

    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_loading(state_dict)
        state_dict["W_enc"] = _latent_major(state_dict["W_enc"])

    @classmethod
    @torch.no_grad()
    def from_adaptivek(cls, sae: AdaptiveKSAE, metadata: SAEMetadata | None = None):
        """The SAELens SAE with the weights, probe and map of `sae`, copied, on its device and in its dtype.

        Raises UserError for another selection than AdaptiveK, a transcoder, or scaled activations.
        """
        selection = adaptive_selection(sae)
        own = cls(
            cls._config_class(
                d_in=sae.config.d_in,
                d_sae=sae.config.d_sae,
                dtype=dtype_to_str(sae.W_enc.dtype),
                device=str(sae.W_enc.device),
                metadata=metadata or SAEMetadata(),
                **flat_selection(selection),
            )
        )
        own.W_enc.copy_(sae.W_enc.T)
        for name in ("W_dec", "b_enc", "b_dec"):
            getattr(own, name).copy_(getattr(sae, name))
        own.set_probe(sae.probe)
        return own

    @torch.no_grad()
    def to_adaptivek(self) -> AdaptiveKSAE:
        """The `AdaptiveKSAE` with this SAE's weights, probe and map, copied.

        Exact where `apply_b_dec_to_input` is set; else `b_enc + W_enc b_dec` stands for the bias, and rounds. Raises
        UserError where activations are normalised or reshaped inside the SAE, which `AdaptiveKSAE` does not do.
        """
        for name in ("normalize_activations", "reshape_activations"):
            if (value := getattr(self.cfg, name)) != "none":
                raise UserError(f"{name}: got {value}, needs none: AdaptiveKSAE reads activations as they are")
        with torch.device("meta"):
            sae = AdaptiveKSAE(self.cfg.adaptivek_config())
        b_enc = self.b_enc if self.cfg.apply_b_dec_to_input else self.b_enc + self.b_dec @ self.W_enc
        tensors = {"W_enc": self.W_enc.T, "W_dec": self.W_dec, "b_enc": b_enc, "b_dec": self.b_dec}
        tensors |= {"probe.weight": self.probe.weight, "probe.bias": self.probe.bias}
        sae.load_state_dict({name: tensor.detach().clone() for name, tensor in tensors.items()}, assign=True)
        return sae

    def _read(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the encoder reads of `x`, before `b_dec`, and k of each row."""
        sae_in = self.hook_sae_input(self.reshape_fn_in(x.to(self.dtype)))
        return self.run_time_activation_norm_fn_in(sae_in), self.k_for(sae_in)

    def _encoder(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Input, weight `[F, D]` and bias of the product whose largest entries are kept."""
        W_enc = self.W_enc.T
        if not self.cfg.apply_b_dec_to_input:
            return x, W_enc, self.b_enc
        if not (torch.is_grad_enabled() and self.b_dec.requires_grad):
            return x - self.b_dec, W_enc, self.b_enc
        # The gradient of b_dec in x - b_dec, by one matrix-vector product: see AdaptiveKSAE.encoder_bias.
        bias = self.b_enc - F.linear(self.b_dec - self.b_dec.detach(), W_enc.detach())
        return x - self.b_dec.detach(), W_enc, bias

    def _codes(self, x: Tensor, k: Tensor) -> SparseCodes:
        if _is_watched(self.hook_sae_acts_pre):
            return topk_select(self.hook_sae_acts_pre(F.linear(*self._encoder(x))), k, self.cfg.k_max)
        return topk_encode(*self._encoder(x), k=k, k_max=self.cfg.k_max)

    def _reconstruct(self, codes: SparseCodes) -> Tensor:
        return self._finish(sparse_decode(codes, self.W_dec, self.b_dec))

    def _finish(self, y: Tensor) -> Tensor:
        y = self.run_time_activation_norm_fn_out(self.hook_sae_recons(y))
        return self.reshape_fn_out(y, self.d_head)


class AdaptiveKSAELens(_AdaptiveK, SAE[AdaptiveKSAELensConfig]):
    """`z = TopK_k(ReLU((x - b_dec) W_enc + b_enc))`, `x_hat = z W_dec + b_dec`, with `k = score_to_k(probe(x))`.

    The SAE of `aksae.AdaptiveKSAE` in SAELens' clothes: `b_dec` is subtracted where `cfg.apply_b_dec_to_input` says
    so. `encode` and `decode` meet in a dense tensor, as SAELens wants; `forward` stays sparse. A hook on
    `hook_sae_acts_pre` or `hook_sae_acts_post` gets its dense tensor, and its changes count. Until `set_probe`, every
    row has the k of score 0.
    """

    _config_class = AdaptiveKSAELensConfig


class AdaptiveKTrainingSAELens(_AdaptiveK, TrainingSAE[AdaptiveKTrainingSAELensConfig]):
    """The same SAE with the loss that SAELens' trainers minimise; `save_inference_model` writes `AdaptiveKSAELens`."""

    _config_class = AdaptiveKTrainingSAELensConfig

    def get_coefficients(self) -> dict[str, float]:
        return {}

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """`mean_i |x_hat_i - x_i|^2` plus the auxiliary loss; no `[B, F]` tensor is made.

        `feature_acts` is a coalesced COO tensor of the codes and `hidden_pre` is empty, `[B, 0]`. Where a hook watches
        either of them, SAELens' own dense pass runs instead, to the same result.
        """
        if _is_watched(self.hook_sae_acts_pre) or _is_watched(self.hook_sae_acts_post):
            return super().training_forward_pass(step_input)
        x = step_input.sae_in
        read, k = self._read(x)
        codes = self._codes(read, k)
        sae_out = self._reconstruct(codes)
        mse_loss = self.mse_loss_fn(sae_out, x).sum(-1).mean()

        def dead_codes(dead: Tensor, k_aux: int) -> SparseCodes:
            centered, W_enc, bias = self._encoder(read)
            return topk_encode(centered, W_enc[dead], bias[dead], k=k_aux)

        aux_loss = self._aux_loss(step_input, sae_out, dead_codes)
        return TrainStepOutput(
            sae_in=x,
            sae_out=sae_out,
            feature_acts=codes.to_coo(self.cfg.d_sae),
            hidden_pre=x.new_empty(*x.shape[:-1], 0),
            loss=mse_loss + aux_loss,
            losses={"mse_loss": mse_loss, "auxiliary_reconstruction_loss": aux_loss},
        )

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Dense latents and pre-activations of `x [..., D]`, both `[..., F]`."""
        read, k = self._read(x)
        hidden_pre = self.hook_sae_acts_pre(F.linear(*self._encoder(read)))
        codes = topk_select(hidden_pre, k, self.cfg.k_max)
        return self.hook_sae_acts_post(codes.to_dense(self.cfg.d_sae)), hidden_pre

    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        """The loss by which dead latents learn what the live ones leave over, weighed as in SAELens' TopK:

            aux_loss_coefficient * min(n_dead / (D/2), 1) * mean_i |e_hat_i - e_i|^2

        with the detached residual `e` and `e_hat` the decode, without bias, of each row's `min(D/2, n_dead)` largest
        **positive** dead latents; SAELens' TopK takes negative ones too, which then enter unrectified.
        """
        aux_loss = self._aux_loss(step_input, sae_out, lambda dead, k_aux: topk_select(hidden_pre[..., dead], k_aux))
        return {"auxiliary_reconstruction_loss": aux_loss}

    def _aux_loss(
        self, step_input: TrainStepInput, sae_out: Tensor, dead_codes: Callable[[Tensor, int], SparseCodes]
    ) -> Tensor:
        """`dead_codes(dead, k)` gives the codes of each row's k largest of the latents `dead`, numbered within them."""
        mask, coefficient = step_input.dead_neuron_mask, self.cfg.aux_loss_coefficient
        dead = mask.nonzero().squeeze(-1) if mask is not None and coefficient else ()
        if len(dead) == 0:
            return sae_out.new_zeros(())
        k_full = max(self.cfg.d_in // 2, 1)
        residual = (step_input.sae_in - sae_out).detach().to(self.dtype)
        codes = dead_codes(dead, min(k_full, len(dead)))
        error = decode_mse(codes, self.W_dec[dead], None, residual)
        return coefficient * min(len(dead) / k_full, 1.0) * error.mean()


def _latent_major(W_enc: Tensor) -> Tensor:
    """`W_enc [D, F]` over storage in which a latent's weights lie together."""
    return W_enc.T.contiguous().T


def _is_watched(hook: nn.Module) -> bool:
    return bool(hook._forward_hooks or hook._backward_hooks or hook._forward_pre_hooks)


def _register() -> None:
    registrations = (
        (_registry.SAE_CLASS_REGISTRY, _registry.register_sae_class, AdaptiveKSAELens),
        (_registry.SAE_TRAINING_CLASS_REGISTRY, _registry.register_sae_training_class, AdaptiveKTrainingSAELens),
    )
    for registered, register, sae_class in registrations:
        # A reload brings new classes of the same names; anybody else's `adaptivek` is left for SAELens to complain of.
        if ARCHITECTURE in registered and registered[ARCHITECTURE][0].__module__ == __name__:
            del registered[ARCHITECTURE]
        register(ARCHITECTURE, sae_class, sae_class._config_class)


_register()
