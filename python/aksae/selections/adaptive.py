"""AdaptiveK: a k for each row, read off a linear probe."""

from __future__ import annotations

import typing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from aksae_kernels import SparseCodes

from ..errors import UserError
from ..k_policy import KMap
from ..probe import ComplexityProbe
from .selection import Chosen, Encoder, Selection, at_least

if TYPE_CHECKING:
    from ..sae import SAE

ProbeReads = typing.Literal["last", "mean", "token"]


_K_MAP = KMap()


@dataclass(frozen=True)
class AdaptiveK(Selection):
    """Each row keeps its k largest positive pre-activations, `k = k_map(probe(x))` (AdaptiveK, arXiv 2508.17320).

    The SAE gets a `probe`, a `ComplexityProbe` of width d_in.
    """

    k_map: KMap = _K_MAP
    probe: ProbeReads = "last"
    """What the probe was fitted to read: see `TrainConfig.probe_reads`."""
    probe_lambda: float | None = None
    """Ridge penalty the probe was fitted with; None before it is fitted."""

    def check(self, d_sae: int) -> None:
        at_least("k_max", self.k_map.k_max, 0, d_sae)
        if self.probe not in typing.get_args(ProbeReads):
            needs = " or ".join(typing.get_args(ProbeReads))
            raise UserError(f"probe_reads: got {self.probe!r}, needs {needs}")
        if self.probe_lambda is not None and not 0 <= self.probe_lambda < float("inf"):
            raise UserError(f"probe_lambda: got {self.probe_lambda}, needs a number from 0 up")

    def attach(self, sae: SAE) -> None:
        sae.probe = ComplexityProbe(sae.config.d_in, score_min=self.k_map.score_min, score_max=self.k_map.score_max)

    def width(self, d_sae: int) -> int:
        return self.k_map.k_max

    @torch.no_grad()
    def k_for(self, sae: SAE, x: Tensor) -> Tensor:
        return self.k_map(sae.probe(x))

    def encode(self, sae: SAE, x: Tensor, encoder: Encoder, wanted: Tensor | None) -> SparseCodes:
        return encoder.topk(self.k_for(sae, x), self.k_map.k_max)

    def choose(self, sae: SAE, x: Tensor, encoder: Encoder, k: int | Tensor | None, wanted: Tensor) -> Chosen:
        return Chosen(encoder.topk(self.k_for(sae, x) if k is None else k, sae.width(k)))

    def __str__(self) -> str:
        return f"AdaptiveK, k = {self.k_map.k_min}..{self.k_map.k_max}"
