"""The losses of training, and what they need to remember between steps."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aksae_kernels import SparseCodes, decode_mse, encode_at, topk_encode

from .distributed import global_max, global_mean, global_rows, global_sum
from .sae import SAE
from .selections import Encoder


class SAELoss(NamedTuple):
    """`total = recon + penalty + sparsity_coef * sparsity + aux_coef * aux`, its terms, and the codes of the batch.

    In a data-parallel run all of it is that of the batch of all processes, but the codes.
    """

    total: Tensor
    recon: Tensor
    """Squared error, mean over rows and dimensions; with Matryoshka, over the prefixes too."""
    penalty: Tensor
    """What the selection adds; 0 for most."""
    sparsity: Tensor
    """`mean_i |z_i|_1 / mean_i |x_i|_2`."""
    aux: Tensor
    """What the dead latents leave of the residual, relative to its variance; 0 without dead latents."""
    codes: SparseCodes


class DeadLatents:
    """Which latents have not fired for `dead_after` rows: `rows_since_fired [F]` int64, on the SAE's device.

    Of the dead ones the auxiliary loss sees at most `cap`, the longest dead first, so that its cost does not depend on
    how many there are, and nothing has to ask an accelerator for their number.
    """

    def __init__(self, d_sae: int, dead_after: int, device: torch.device | str = "cpu", cap: int | None = None):
        self.dead_after = dead_after
        self.cap = d_sae if cap is None else min(cap, d_sae)
        self.rows_since_fired = torch.zeros(d_sae, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, codes: SparseCodes) -> None:
        """Count the rows of `codes`, of all processes, and start again at 0 for every latent that fired in one."""
        fired = torch.zeros(len(self.rows_since_fired) + 1, dtype=torch.uint8, device=codes.indices.device)
        # Padding, and what a selection holds at 0, falls on the extra last place.
        fires = codes.mask() & (codes.values != 0)
        fired[torch.where(fires, codes.indices, -1).long()] = 1
        self.rows_since_fired.add_(global_rows(codes.counts.unsqueeze(-1)))
        self.rows_since_fired.masked_fill_(global_max(fired[:-1]).bool(), 0)

    def mask(self) -> Tensor:
        """`[F]` bool."""
        return self.rows_since_fired >= self.dead_after

    def may_be(self) -> bool:
        """Whether any latent is dead: exact where looking is free, else True."""
        return self.rows_since_fired.device.type != "cpu" or bool(self.mask().any())

    @torch.no_grad()
    def codes(self, encoder: Encoder, k: int) -> SparseCodes:
        """Each row's `k` largest positive pre-activations among the dead latents; values are without gradient."""
        longest = self.rows_since_fired
        if self.cap < len(longest):
            latents = longest.topk(self.cap).indices.sort().values
        else:
            latents = torch.arange(len(longest), device=longest.device)
        is_dead = longest[latents] >= self.dead_after
        x, W_enc, b_enc = encoder
        # The others' scores are -inf: they are not selected.
        bias = torch.where(is_dead, b_enc[latents], -math.inf)
        codes = topk_encode(x, W_enc[latents], bias, k=min(k, self.cap))
        return codes._replace(indices=torch.where(codes.mask(), codes.gather(latents), -1).int())


class DeviationWeight:
    """delta, the weight of `deviation`: it falls while the probe loss falls, so the probe may move further.

    Starts at 0.2. From the third loss on: `delta = max(0.01, 0.8 delta)` where it fell by more than 5 % from the first
    to the last of the latest three, else `min(0.5, 1.2 delta)`. All on the loss's device, without synchronising.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.value = torch.tensor(0.2, device=device)
        self._latest: list[Tensor] = []

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "latest": self._latest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"].to(self.value.device)
        self._latest = [loss.to(self.value.device) for loss in state["latest"]]

    def update(self, probe_loss: Tensor) -> None:
        """Take in the probe loss of a step, after the step."""
        self._latest = [*self._latest[-2:], probe_loss.detach()]
        if len(self._latest) == 3:
            fell = self._latest[0] - self._latest[2] > 0.05 * self._latest[0]
            self.value = torch.where(fell, (0.8 * self.value).clamp_min(0.01), (1.2 * self.value).clamp_max(0.5))


def sae_loss(
    sae: SAE,
    x: Tensor,
    k: int | Tensor | None,
    dead: DeadLatents,
    *,
    target: Tensor | None = None,
    sparsity_coef: float = 0.0,
    aux_coef: float = 0.0,
) -> SAELoss:
    """The loss of the rows `x [B, D]`, and an update of `dead` by the latents that fired.

    With y what is to be reconstructed (`SAE.target`, less a skip connection's share) and e the residual `y - y_hat`:

    * `recon = mean error / D_out`, the error being the selection's: `|e|^2`, or its mean over prefixes;
    * `penalty`: the selection's, times `mean (y - mean(y))^2`, so that it does not depend on units;
    * `sparsity = mean_i |z_i|_1 / mean_i |x_i|_2`, a ratio of batch means, of the scaled x;
    * `aux = mean_i |e_i - e_hat_i|^2 / mean_i |e_i - mean(e)|^2` with e not detached and `e_hat` the decode, without
      bias, of each row's `D_out // 2` largest positive dead latents. 0 where no latent is dead or e does not vary.

    `k` stands in for the selection's budget or is each row's own; None for neither. No term needs a tensor of the size
    of all pre-activations, and nothing waits for an accelerator.
    """
    selection, encoder, wanted = sae.config.selection, sae.encoder(x), sae.wanted(x, target)
    codes, penalty = selection.choose(sae, x, encoder, k, wanted)
    dead.update(codes)
    with_aux = aux_coef > 0 and dead.may_be()
    error, residual = selection.error(sae, codes, wanted, residual=with_aux)
    n_rows = global_rows(wanted)
    recon = global_mean(error, n_rows) / wanted.shape[-1]
    none = recon.new_zeros(())
    sparsity = aux = none
    penalty = none if penalty is None else penalty * spread(wanted, n_rows) / wanted.shape[-1]
    if sparsity_coef > 0:
        l1 = codes.values.sum(-1, dtype=torch.promote_types(codes.values.dtype, torch.float32))
        length = torch.linalg.vector_norm(sae.scaled(x), dim=-1)
        sparsity = global_mean(l1, n_rows) / global_mean(length, n_rows)
    if residual is not None:
        aux_codes = encode_at(dead.codes(encoder, wanted.shape[-1] // 2), *encoder)
        left = global_mean(decode_mse(aux_codes, sae.W_dec, None, residual), n_rows)
        whole = spread(residual, n_rows)
        counts = dead.mask().any() & (whole > 0)
        aux = torch.where(counts, left / torch.where(counts, whole, 1), 0)
    total = recon + penalty + sparsity_coef * sparsity + aux_coef * aux
    return SAELoss(total, recon, penalty, sparsity, aux, codes)


def spread(rows: Tensor, n_rows: int | Tensor) -> Tensor:
    """`mean_i |rows_i - mean(rows)|^2` over the rows of all processes."""
    # Detached: the squares do not change with the mean, to first order.
    mean = global_sum(rows.detach().sum(0)) / n_rows
    return global_mean((rows - mean).square().sum(-1), n_rows)


def probe_loss(probe: nn.Module, x: Tensor, labels: Tensor, penalty: float) -> Tensor:
    """`mean (probe(x) - labels)^2 + penalty / 2 |w|^2` over contexts: `x [n, D]`, `labels [n]`.

    Scores clamped to an end of the range pass no gradient.
    """
    return F.mse_loss(probe(x), labels) + penalty / 2 * probe.weight.square().sum()


def deviation(probe: nn.Module, weight: Tensor, bias: Tensor) -> Tensor:
    """`|w - w0|_2 + |b - b0|`, how far the probe is from the `weight` and `bias` it was fitted to. Gradient 0 at 0."""
    return torch.linalg.vector_norm(probe.weight - weight) + (probe.bias - bias).abs().sum()
