"""The training losses of AdaptiveK, and what they need to remember between steps."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aksae_kernels import SparseCodes, decode_mse, sparse_decode, sparse_weight_grad, topk_encode, topk_select

from .sae import AdaptiveKSAE


class SAELoss(NamedTuple):
    """`total = recon + sparsity_coef * sparsity + aux_coef * aux`, its terms, and what the forward pass found."""

    total: Tensor
    recon: Tensor
    """Squared error, mean over rows and dimensions."""
    sparsity: Tensor
    """`mean_i |z_i|_1 / mean_i |x_i|_2`."""
    aux: Tensor
    """What the dead latents leave of the residual, relative to its variance; 0 without dead latents."""
    codes: SparseCodes


class DeadLatents:
    """Which latents have not fired for `dead_after` rows: `rows_since_fired [F]` int64.

    `possible` answers from the host, so that a step on an accelerator does not wait for the device to say whether any
    latent is dead: none can be before enough rows have passed since the last look.
    """

    def __init__(self, d_sae: int, dead_after: int, device: torch.device | str = "cpu"):
        self.dead_after = dead_after
        self.rows_since_fired = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self._most = 0

    def possible(self, n_rows: int) -> bool:
        """Whether a latent could be dead once `n_rows` more rows have passed. Exact on CPU; else no false no."""
        if self.rows_since_fired.device.type == "cpu":
            self.look()
        return self._most + n_rows >= self.dead_after

    def look(self) -> None:
        """Read the longest silence from the device (synchronises); called from time to time, it sharpens `possible`."""
        self._most = int(self.rows_since_fired.max()) if self.rows_since_fired.numel() else 0

    @torch.no_grad()
    def update(self, codes: SparseCodes) -> None:
        """Count the rows of `codes` and start again at 0 for every latent that is active in one of them."""
        n_rows = codes.counts.numel()
        fired = torch.zeros(len(self.rows_since_fired) + 1, dtype=torch.bool, device=codes.indices.device)
        # Padding has index -1: it falls on the extra last place.
        fired[codes.indices.long()] = True
        self.rows_since_fired.add_(n_rows).masked_fill_(fired[:-1], 0)
        self._most += n_rows

    def mask(self) -> Tensor:
        """`[F]` bool."""
        return self.rows_since_fired >= self.dead_after


class DeviationWeight:
    """delta, the weight of `deviation`: it falls while the probe loss falls, so the probe may move further.

    Starts at 0.2. From the third loss on: `delta = max(0.01, 0.8 delta)` where it fell by more than 5 % from the first
    to the last of the latest three, else `min(0.5, 1.2 delta)`. All on the loss's device, without synchronising.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.value = torch.tensor(0.2, device=device)
        self._latest: list[Tensor] = []

    def update(self, probe_loss: Tensor) -> None:
        """Take in the probe loss of a step, after the step."""
        self._latest = [*self._latest[-2:], probe_loss.detach()]
        if len(self._latest) == 3:
            fell = self._latest[0] - self._latest[2] > 0.05 * self._latest[0]
            self.value = torch.where(fell, (0.8 * self.value).clamp_min(0.01), (1.2 * self.value).clamp_max(0.5))


def sae_loss(
    sae: AdaptiveKSAE, x: Tensor, k: Tensor, dead: DeadLatents, *, sparsity_coef: float, aux_coef: float
) -> SAELoss:
    """The SAE loss of the rows `x [B, D]` with `k [B]`, and an update of `dead` by the latents that fired.

    The encoder product is computed once. Without dead latents the codes come from the fused `topk_encode` and the error
    from the fused `decode_mse`; with them, from one product that both selections read:

    * `recon = mean (x_hat - x)^2` over rows and dimensions;
    * `sparsity = mean_i |z_i|_1 / mean_i |x_i|_2`, a ratio of batch means;
    * `aux = mean_i |e_i - e_hat_i|^2 / mean_i |e_i - mean(e)|^2` with the residual `e = x - x_hat` (not detached) and
      `e_hat` the decode, without bias, of each row's `min(D/2, n_dead)` largest positive dead latents. 0 where no
      latent is dead or e does not vary.
    """
    bias = sae.encoder_bias()
    if dead.possible(len(x)):
        centered = sae.center(x)
        with torch.no_grad():
            pre_acts = F.linear(centered, sae.W_enc, bias)
        codes = _with_encoder_gradient(topk_select(pre_acts, k, sae.k_bound), centered, sae.W_enc, bias)
        dead.update(codes)
        is_dead = dead.mask()
        # Only positive entries are selected: with the live latents silenced, the dead ones are left, however many.
        pre_acts.masked_fill_(~is_dead, 0)
        aux_codes = _with_encoder_gradient(topk_select(pre_acts, x.shape[1] // 2), centered, sae.W_enc, bias)
        residual = x - sparse_decode(codes, sae.W_dec, sae.b_dec)
        recon = residual.square().mean()
        error = decode_mse(aux_codes, sae.W_dec, None, residual).mean()
        variance = (residual - residual.mean(0)).square().sum(-1).mean()
        counts = is_dead.any() & (variance > 0)
        aux = torch.where(counts, error / torch.where(counts, variance, 1), 0)
    else:
        codes = topk_encode(sae.center(x), sae.W_enc, bias, k=k, k_max=sae.k_bound)
        dead.update(codes)
        recon = decode_mse(codes, sae.W_dec, sae.b_dec, x).mean() / x.shape[1]
        aux = recon.new_zeros(())
    l1 = codes.values.sum(-1, dtype=torch.promote_types(codes.values.dtype, torch.float32))
    sparsity = l1.mean() / torch.linalg.vector_norm(x, dim=-1).mean()
    total = recon + sparsity_coef * sparsity + aux_coef * aux
    return SAELoss(total, recon, sparsity, aux, codes)


def probe_loss(probe: nn.Module, x: Tensor, labels: Tensor, penalty: float) -> Tensor:
    """`mean (probe(x) - labels)^2 + penalty / 2 |w|^2` over contexts: `x [n, D]`, `labels [n]`.

    Scores clamped to an end of the range pass no gradient.
    """
    return F.mse_loss(probe(x), labels) + penalty / 2 * probe.weight.square().sum()


def deviation(probe: nn.Module, weight: Tensor, bias: Tensor) -> Tensor:
    """`|w - w0|_2 + |b - b0|`, how far the probe is from the `weight` and `bias` it was fitted to. Gradient 0 at 0."""
    return torch.linalg.vector_norm(probe.weight - weight) + (probe.bias - bias).abs().sum()


def _with_encoder_gradient(codes: SparseCodes, x: Tensor, W_enc: Tensor, bias: Tensor) -> SparseCodes:
    return codes._replace(values=_EncoderGradient.apply(codes.values, codes.indices, codes.counts, x, W_enc, bias))


class _EncoderGradient(torch.autograd.Function):
    """Values that are already known to be `x @ W_enc.T + bias` at some indices, with that product's gradient.

    Two selections of one product cost its gradient twice over their few indices, not over `[B, F]`.
    """

    @staticmethod
    def forward(ctx, values, indices, counts, x, W_enc, bias):
        ctx.save_for_backward(indices, counts, x, W_enc)
        ctx.bias_dtype = bias.dtype
        return values.view_as(values)

    @staticmethod
    def backward(ctx, grad_values):
        indices, counts, x, W_enc = ctx.saved_tensors
        codes = SparseCodes(grad_values, indices, counts)
        grad_x = grad_W = grad_bias = None
        if ctx.needs_input_grad[3]:
            grad_x = sparse_decode(codes, W_enc.to(grad_values.dtype)).to(x.dtype)
        if ctx.needs_input_grad[4]:
            grad_W = sparse_weight_grad(codes, x.to(grad_values.dtype), len(W_enc)).to(W_enc.dtype)
        if ctx.needs_input_grad[5]:
            ones = grad_values.new_ones(len(x), 1)
            grad_bias = sparse_weight_grad(codes, ones, len(W_enc))[:, 0].to(ctx.bias_dtype)
        return None, None, None, grad_x, grad_W, grad_bias
