"""The sparse autoencoder: an encoder, a selection of latents, a decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aksae_kernels import SparseCodes, sparse_decode, topk_encode

from .config import SAEConfig, from_dict, to_dict, validate_sae
from .errors import UserError
from .files import CONFIG, load_checkpoint, read_json, save_checkpoint
from .selections import Encoder


class SAE(nn.Module):
    """`z = select(W_enc (s x - b_dec) + b_enc)`, `x_hat = (W_dec z + b_dec) / s`.

    `select` is `config.selection`: TopK, BatchTopK, JumpReLU, Matryoshka, AdaptiveK, Need or Priced; s is
    `config.input_scale`. A transcoder (`config.d_out`) reconstructs something else than its input: it does not subtract
    `b_dec` from it, divides by `config.output_scale`, and with `config.skip` adds `W_skip s x`.

    Parameters are latent-major: `W_enc [F, D]`, `W_dec [F, D_out]` (rows of unit norm), `b_enc [F]`, `b_dec [D_out]`,
    `W_skip [D_out, D]`, and what the selection has of its own: `probe` (AdaptiveK), `log_threshold` (JumpReLU); it may
    have buffers, too: `threshold` (BatchTopK), `need_weight` and `need_bias` (Need), `price` (Priced). The decoder
    starts with random directions, the encoder equal to it where it has the same width, biases and `W_skip` at 0; see
    `start`.

    `sae.eval()` is inference, where no row depends on its batch; a BatchTopK SAE in training mode shares its budget
    among the rows it is given. `aksae.fit` and `from_pretrained` leave an SAE in eval mode.

    Args:
        config: shape and selection.
        generator: source of the initial weights; None for torch's global one.

    Raises:
        UserError: a field of `config` out of range.
    """

    def __init__(self, config: SAEConfig, *, generator: torch.Generator | None = None):
        super().__init__()
        validate_sae(config)
        self.config = config
        self.W_dec = nn.Parameter(_directions(config.d_sae, config.width_out, generator))
        if config.width_out == config.d_in:
            self.W_enc = nn.Parameter(self.W_dec.detach().clone())
        else:
            self.W_enc = nn.Parameter(_directions(config.d_sae, config.d_in, generator))
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae))
        self.b_dec = nn.Parameter(torch.zeros(config.width_out))
        self.register_parameter(
            "W_skip", nn.Parameter(torch.zeros(config.width_out, config.d_in)) if config.skip else None
        )
        self.probe = None
        config.selection.attach(self)

    @torch.no_grad()
    def start(self, x: Tensor, target: Tensor | None = None) -> None:
        """Set what depends on the first batch: `b_dec` to the geometric median of `x [..., D]` (of the target for a
        transcoder), then what the selection sets. UserError for a batch without rows."""
        wanted = self.target(x, target)
        if wanted.numel() == 0:
            raise UserError("x: got no rows, needs at least one to start b_dec from")
        self.b_dec.copy_(geometric_median(wanted.reshape(-1, self.config.width_out)))
        self.config.selection.start(self, self.encoder(x), self.wanted(x, target))

    def width(self, k: int | Tensor | None = None) -> int:
        """The width of codes with a `k` that stands in for the selection's own."""
        own = min(self.config.selection.width(self.config.d_sae), self.config.d_sae)
        return min(max(own, k), self.config.d_sae) if isinstance(k, int) else own

    @property
    def k_bound(self) -> int:
        """The largest number of latents a row can have: the width of the codes."""
        return self.width()

    @torch.no_grad()
    def k_for(self, x: Tensor) -> Tensor:
        """k of each vector of `x [..., D]`, `[...]` int32. UserError for a selection that is not by a k of each row."""
        return self.config.selection.k_for(self, x)

    def encode(
        self, x: Tensor, k: int | Tensor | None = None, *, k_max: int | None = None, target: Tensor | None = None
    ) -> SparseCodes:
        """Codes of `x [..., D]`, as the selection says, or with a `k` as TopK.

        Args:
            x: `[..., D]`, the dtype of the weights.
            k: None for the selection. Else an int, or an int tensor `[...]`: each row keeps its k largest positive
                pre-activations, whatever the selection. The probe of AdaptiveK reads each vector itself; where it was
                fitted to read a context as a whole, give each vector `k_for` of its context.
            k_max: width of the codes, needed for a `k` tensor on an accelerator; else the largest k is read off `k`.
            target: `[..., D_out]`, what a transcoder is to reconstruct. Read where latents have a price, and needed
                there: ValueError without it.

        Ties go to the smaller index and NaN is selected, as `aksae_kernels.topk_encode` says; gradients reach every
        SAE parameter and `x`, and none the probe or the thresholds. Raises TypeError or ValueError as that function
        does.
        """
        encoder = self.encoder(x)
        if k is not None:
            return topk_encode(*encoder, k=k, k_max=k_max)
        known = target is not None or not self.config.transcoder
        return self.config.selection.encode(self, x, encoder, self.wanted(x, target) if known else None)

    def decode(self, codes: SparseCodes, x: Tensor | None = None) -> Tensor:
        """The reconstruction `[..., D_out]` of codes `[..., K]`.

        `x [..., D]`, what was encoded, is needed for a skip connection: ValueError without it.
        """
        y = self.decode_scaled(codes, x)
        return y if self.config.output_scale == 1 else y / self.config.output_scale

    def decode_scaled(self, codes: SparseCodes, x: Tensor | None = None) -> Tensor:
        """The same in the units of training, `W_dec z + b_dec`."""
        y = sparse_decode(codes, self.W_dec, self.b_dec)
        if self.W_skip is None:
            return y
        if x is None:
            raise ValueError("x: got None, needs what was encoded: this transcoder has a skip connection")
        return y + self.skip(x)

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction of `x [..., D]`."""
        return self.decode(self.encode(x), x)

    def encoder(self, x: Tensor) -> Encoder:
        """The operands of the encoder's product on `x`: scaled and centred rows, weight, bias."""
        return Encoder(self.center(x), self.W_enc, self.encoder_bias())

    def target(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        """What is reconstructed, in the units of training: a transcoder's `target [..., D_out]`, else `x`.

        Raises ValueError for a transcoder without a target, and for an autoencoder with one.
        """
        if (target is not None) != self.config.transcoder:
            got, needs = ("none", "a target") if target is None else ("one", "no target, which is its input")
            kind = "transcoder" if self.config.transcoder else "autoencoder"
            raise ValueError(f"target: got {got}, needs {needs}: this SAE is a{'n' * (kind[0] == 'a')} {kind}")
        scale = self.config.output_scale
        wanted = x if target is None else target
        return wanted if scale == 1 else wanted * scale

    def wanted(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        """What the decoder is to make of the codes: `target`, less a skip connection's share."""
        wanted = self.target(x, target)
        return wanted if self.W_skip is None else wanted - self.skip(x)

    def scaled(self, x: Tensor) -> Tensor:
        """`s x`."""
        return x if self.config.input_scale == 1 else x * self.config.input_scale

    def center(self, x: Tensor) -> Tensor:
        """`s x - b_dec`, as the encoder reads it; `s x` for a transcoder. The gradient of this use of `b_dec` flows
        through `encoder_bias`."""
        scaled = self.scaled(x)
        if self.config.transcoder:
            return scaled
        return scaled - (self.b_dec.detach() if self._trains_b_dec() else self.b_dec)

    def encoder_bias(self) -> Tensor:
        """`b_enc`, plus a zero that carries the gradient of the pre-encoder bias: `-W_enc^T` of the summed gradients.

        One matrix-vector product; through `x - b_dec` it would gather k rows of `W_enc` for every row of the batch.
        """
        if self.config.transcoder or not self._trains_b_dec():
            return self.b_enc
        return self.b_enc - F.linear(self.b_dec - self.b_dec.detach(), self.W_enc.detach())

    def skip(self, x: Tensor) -> Tensor:
        """`W_skip s x`."""
        return F.linear(self.scaled(x), self.get_parameter("W_skip"))

    def _trains_b_dec(self) -> bool:
        return torch.is_grad_enabled() and self.b_dec.requires_grad

    @torch.no_grad()
    def to_precision(self, dtype: torch.dtype) -> None:
        """Weights and biases to `dtype`, in place. What `Selection.exact` names is not rounded, as `to` would do."""
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            if name not in self.config.selection.exact:
                tensor.data = tensor.data.to(dtype)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write weights and config to `folder`: `sae.safetensors` and `config.json`, each replaced as a whole."""
        save_checkpoint(Path(folder), self.state_dict(), to_dict(self.config))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> SAE:
        """The SAE that `save_pretrained` wrote to `folder`, version 0.1's too, on the CPU and in eval mode.

        Raises UserError for a missing or truncated file, a config that does not fit, or a tensor of another shape,
        naming the file, the tensor or field, what it got and what it needs.
        """
        path = Path(folder) / CONFIG
        config: Any = from_dict(SAEConfig, read_json(path), str(path))
        with torch.device("meta"):
            shell = cls(config)
        shell.load_state_dict(load_checkpoint(Path(folder), shell.state_dict(), config.selection.exact), assign=True)
        return shell.eval()


AdaptiveKSAE = SAE
"""The name of version 0.1, when AdaptiveK and TopK were all there was."""


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


def _directions(n: int, width: int, generator: torch.Generator | None) -> Tensor:
    """`[n, width]` random rows of unit norm."""
    return F.normalize(torch.empty(n, width).uniform_(-1, 1, generator=generator), dim=-1)
