"""How well an SAE reconstructs, pooled over a whole set of activations however it is cut into batches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from aksae_kernels import SparseCodes


class ReconstructionMetrics:
    """Sums over rows, in float64, from which `result` computes each metric once over everything seen.

    `x` are the activations, `e = x - x_hat` the errors, sums and means over rows unless said otherwise:

    * fvu: `sum |e|^2 / sum |x - mean(x)|^2`, the fraction of variance unexplained;
    * explained_variance: `1 - sum_d var_d(e) / sum_d var_d(x)`, which forgives a constant error;
    * mse: mean of `e^2` over rows and dimensions;
    * cosine: mean cosine of x and x_hat; l2_ratio: mean `|x_hat| / |x|`;
    * l0_mean, l0_min, l0_max: active latents of a row; k_mean: the k it was allowed;
    * dead: share of the latents that fired on none of the rows.

    Where nothing was seen, or x does not vary, a ratio is NaN.
    """

    def __init__(self, d_in: int, d_sae: int, device: torch.device | str = "cpu"):
        def zeros(*shape):
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self._x, self._error = zeros(d_in), zeros(d_in)
        self._x_square, self._error_square, self._cosine, self._l2_ratio = (zeros() for _ in range(4))
        self._l0: list[Tensor] = []
        self._k: list[Tensor] = []
        self.fired = torch.zeros(d_sae, dtype=torch.int64, device=device)
        """`[F]`, on how many rows each latent fired."""

    @torch.no_grad()
    def update(self, x: Tensor, x_hat: Tensor, codes: SparseCodes, k: Tensor) -> None:
        """Take in rows `x`, `x_hat` `[B, D]`, their codes, and their `k [B]`."""
        x, x_hat = x.double(), x_hat.double()
        error = x - x_hat
        self._x += x.sum(0)
        self._error += error.sum(0)
        self._x_square += x.square().sum()
        self._error_square += error.square().sum()
        self._cosine += F.cosine_similarity(x, x_hat, dim=-1).sum()
        self._l2_ratio += (torch.linalg.vector_norm(x_hat, dim=-1) / torch.linalg.vector_norm(x, dim=-1)).sum()
        self._l0.append(codes.counts)
        self._k.append(k)
        # Padding has index -1: one place further it falls on the first, which is dropped.
        self.fired += torch.bincount(codes.indices.flatten() + 1, minlength=len(self.fired) + 1)[1:]

    @property
    def k(self) -> Tensor:
        """`[rows]` int32, in the order seen."""
        return torch.cat(self._k)

    def result(self) -> dict[str, float]:
        """All metrics by name."""
        l0 = torch.cat(self._l0).double()
        n_rows = len(l0)
        x_variance = self._x_square - self._x.square().sum() / n_rows
        error_variance = self._error_square - self._error.square().sum() / n_rows
        values = {
            "fvu": self._error_square / x_variance,
            "explained_variance": 1 - error_variance / x_variance,
            "mse": self._error_square / (n_rows * len(self._x)),
            "cosine": self._cosine / n_rows,
            "l2_ratio": self._l2_ratio / n_rows,
            "l0_mean": l0.mean(),
            "l0_min": l0.min(),
            "l0_max": l0.max(),
            "k_mean": self.k.double().mean(),
            "dead": (self.fired == 0).double().mean(),
        }
        return {name: float(value) for name, value in values.items()}
