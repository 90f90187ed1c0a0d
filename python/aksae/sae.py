"""The AdaptiveK sparse autoencoder: a ReLU + TopK SAE whose k is a row's own, read off a linear complexity probe."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aksae_kernels import SparseCodes, sparse_decode, topk_encode

from .config import SAEConfig, from_dict, to_dict, validate_sae
from .errors import UserError
from .files import CONFIG, load_checkpoint, read_json, save_checkpoint
from .k_policy import k_of_score
from .probe import ComplexityProbe


class AdaptiveKSAE(nn.Module):
    """`z = TopK_k(ReLU(W_enc (x - b_dec) + b_enc))`, `x_hat = W_dec z + b_dec`, with k of each row's own.

    k comes from `config.k` where that is set (a TopK SAE), else from the probe: `k = score_to_k(probe(x))`
    (AdaptiveK, arXiv 2508.17320). Parameters are latent-major: `W_enc`, `W_dec` `[F, D]` (rows of `W_dec` have unit
    norm), `b_enc` `[F]`, `b_dec` `[D]`; `probe` is None for a fixed k. The decoder starts with random directions, the
    encoder equal to it, the biases at 0; see `initialize_from`.

    Args:
        config: shape and sparsity.
        generator: source of the initial weights; None for torch's global one.

    Raises:
        UserError: a field of `config` out of range.
    """

    def __init__(self, config: SAEConfig, *, generator: torch.Generator | None = None):
        super().__init__()
        validate_sae(config)
        self.config = config
        directions = torch.empty(config.d_sae, config.d_in).uniform_(-1, 1, generator=generator)
        self.W_dec = nn.Parameter(F.normalize(directions, dim=-1))
        self.W_enc = nn.Parameter(self.W_dec.detach().clone())
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae))
        self.b_dec = nn.Parameter(torch.zeros(config.d_in))
        self.probe = None
        if config.k is None:
            self.probe = ComplexityProbe(config.d_in, score_min=config.score_min, score_max=config.score_max)

    @torch.no_grad()
    def initialize_from(self, x: Tensor) -> None:
        """Set `b_dec` to the geometric median of `x [..., D]`, the first batch. UserError for one without rows."""
        rows = x.reshape(-1, self.config.d_in)
        if len(rows) == 0:
            raise UserError("x: got no rows, needs at least one to start b_dec from")
        self.b_dec.copy_(geometric_median(rows))

    @property
    def k_bound(self) -> int:
        """The largest k a row can be given: the width of the codes."""
        return self.config.k_max if self.config.k is None else self.config.k

    @torch.no_grad()
    def k_for(self, x: Tensor) -> Tensor:
        """k of each vector of `x [..., D]`, `[...]` int32."""
        if self.probe is None:
            return torch.full(x.shape[:-1], self.k_bound, dtype=torch.int32, device=x.device)
        return k_of_score(self.probe(x), self.config)

    def encode(self, x: Tensor, k: int | Tensor | None = None, *, k_max: int | None = None) -> SparseCodes:
        """Codes of `x [..., D]`: per row the k largest positive pre-activations; a row with fewer positives has fewer.

        Args:
            x: `[..., D]`, the dtype of the weights.
            k: an int, an int tensor `[...]`, or None for `k_for(x)`: the probe reads each vector itself. Where it was
                fitted to read a context as a whole (`config.probe_reads`), give each vector `k_for` of its context.
            k_max: width of the codes, needed for a `k` tensor on an accelerator; else the largest k is read off `k`.

        Ties go to the smaller index and NaN is selected, as `aksae_kernels.topk_encode` says; gradients reach every
        SAE parameter and `x`, and none the probe. Raises TypeError or ValueError as that function does.
        """
        if k is None:
            k, k_max = self.k_for(x), self.k_bound
        return topk_encode(self.center(x), self.W_enc, self.encoder_bias(), k=k, k_max=k_max)

    def decode(self, codes: SparseCodes) -> Tensor:
        """`W_dec z + b_dec` of codes `[..., K]`: `[..., D]`."""
        return sparse_decode(codes, self.W_dec, self.b_dec)

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction of `x [..., D]`, each row with its own k."""
        return self.decode(self.encode(x))

    def center(self, x: Tensor) -> Tensor:
        """`x - b_dec`, as the encoder reads it. The gradient of this use of `b_dec` flows through `encoder_bias`."""
        return x - (self.b_dec.detach() if self._trains_b_dec() else self.b_dec)

    def encoder_bias(self) -> Tensor:
        """`b_enc`, plus a zero that carries the gradient of the pre-encoder bias: `-W_enc^T` of the summed gradients.

        One matrix-vector product; through `x - b_dec` it would gather k rows of `W_enc` for every row of the batch.
        """
        if not self._trains_b_dec():
            return self.b_enc
        return self.b_enc - F.linear(self.b_dec - self.b_dec.detach(), self.W_enc.detach())

    def _trains_b_dec(self) -> bool:
        return torch.is_grad_enabled() and self.b_dec.requires_grad

    def save_pretrained(self, folder: str | Path) -> None:
        """Write weights, probe and map to `folder`: `sae.safetensors` and `config.json`, each replaced as a whole."""
        save_checkpoint(Path(folder), self.state_dict(), to_dict(self.config))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> AdaptiveKSAE:
        """The SAE that `save_pretrained` wrote to `folder`, on the CPU.

        Raises UserError for a missing or truncated file, a config that does not fit, or a tensor of another shape,
        naming the file, the tensor or field, what it got and what it needs.
        """
        path = Path(folder) / CONFIG
        config = from_dict(SAEConfig, read_json(path), str(path))
        with torch.device("meta"):
            shell = cls(config)
        shell.load_state_dict(load_checkpoint(Path(folder), shell.state_dict()), assign=True)
        return shell


def geometric_median(x: Tensor, *, max_iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The point with the smallest sum of distances to the rows of `x [n, D]`: `[D]`.

    Weiszfeld's iteration from the mean, until a step is below `tolerance` of the mean distance. NaN rows give NaN.
    """
    median = x.mean(0)
    for _ in range(max_iterations):
        distance = torch.linalg.vector_norm(x - median, dim=-1)
        # A row at the median itself would weigh infinitely much.
        weight = 1 / distance.clamp_min(torch.finfo(x.dtype).eps * (1 + distance.mean()))
        step = (weight @ x) / weight.sum() - median
        median = median + step
        if torch.linalg.vector_norm(step) <= tolerance * distance.mean():
            break
    return median
