"""The two halves of a sparse autoencoder as nn.Modules. Weights are latent-major `[F, D]`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .codes import SparseCodes, as_int
from .ops import sparse_decode, topk_encode


class TopKEncoder(nn.Module):
    """`topk_encode(x, weight, bias, k=k)` with parameters `weight [F, D]` and `bias [F]`.

    Args:
        d_in: D.
        d_sae: F.
        k: the int used where a call gives none.
        k_max: width of the codes; None for `k`. Needed for calls whose `k` is a tensor on an accelerator.
        bias: whether there is a `bias`; it starts at 0.

    Rows of `weight` start as random unit vectors.
    """

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        *,
        k: int | None = None,
        k_max: int | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        # Python's ints, whatever was given: torch.compile takes NumPy's for data, whose values no shape can follow.
        self.k, self.k_max = (None if n is None else as_int(name, n) for name, n in (("k", k), ("k_max", k_max)))
        self.weight = nn.Parameter(_unit_rows(d_sae, d_in, device, dtype))
        self.bias = nn.Parameter(torch.zeros(d_sae, device=device, dtype=dtype)) if bias else None

    def forward(self, x: Tensor, k: int | Tensor | None = None) -> SparseCodes:
        """Codes of `x [..., D]`; `k` is an int or an integer tensor `[...]`. Raises ValueError where no k is known."""
        k = self.k if k is None else k
        if k is None:
            raise ValueError("k must be given, to the call or to TopKEncoder")
        return topk_encode(x, self.weight, self.bias, k=k, k_max=self.k_max)

    def extra_repr(self) -> str:
        d_sae, d_in = self.weight.shape
        return f"d_in={d_in}, d_sae={d_sae}, k={self.k}, k_max={self.k_max}, bias={self.bias is not None}"


class SparseDecoder(nn.Module):
    """`sparse_decode(codes, weight, bias)` with parameters `weight [F, D]`, of unit rows at first, and `bias [D]`."""

    def __init__(
        self,
        d_sae: int,
        d_in: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.weight = nn.Parameter(_unit_rows(d_sae, d_in, device, dtype))
        self.bias = nn.Parameter(torch.zeros(d_in, device=device, dtype=dtype)) if bias else None

    def forward(self, codes: SparseCodes) -> Tensor:
        """The decode `[..., D]` of codes `[..., K]`."""
        return sparse_decode(codes, self.weight, self.bias)

    def extra_repr(self) -> str:
        d_sae, d_in = self.weight.shape
        return f"d_sae={d_sae}, d_in={d_in}, bias={self.bias is not None}"


def _unit_rows(rows: int, columns: int, device, dtype) -> Tensor:
    return nn.functional.normalize(torch.randn(rows, columns, device=device, dtype=dtype), dim=-1)
