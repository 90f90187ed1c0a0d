"""What every way to choose a row's latents has in common."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor

from aksae_kernels import SparseCodes, decode_mse, sparse_decode, topk_encode

from ..errors import UserError

if TYPE_CHECKING:
    from ..sae import SAE

CAP = 8
"""How many times the budget of an average row a row may have, where a selection does not say."""


class Encoder(NamedTuple):
    """The product that a selection selects from: `x @ W_enc.T + b_enc`, with gradients where they are wanted."""

    x: Tensor
    """`[..., D]`, scaled and centred."""
    W_enc: Tensor
    """`[F, D]`."""
    b_enc: Tensor
    """`[F]`."""

    def topk(self, k: int | Tensor, k_max: int | None = None) -> SparseCodes:
        """Each row's k largest positive scores: `topk_encode`."""
        return topk_encode(self.x, self.W_enc, self.b_enc, k=k, k_max=k_max)


class Chosen(NamedTuple):
    """The codes of a training step, and what they cost beside their error."""

    codes: SparseCodes
    penalty: Tensor | None = None
    """`[]`, relative to the variance of what is to be reconstructed; None for a selection that needs none."""


@dataclass(frozen=True)
class Selection:
    """How an SAE chooses the latents of a row, in training and at inference.

    A selection is a small frozen dataclass; a new one is one file in `aksae.selections`, named in its `__init__`. What
    it learns or remembers it registers on the SAE in `attach`, so that checkpoints, devices and dtypes follow.
    Each defines `width`, `encode`, `choose` and `__str__`; the other methods have defaults.
    """

    exact: ClassVar[tuple[str, ...]] = ()
    """Names of what `attach` registers that keeps its precision where weights have 16 bits: what changes by little in
    many steps."""
    calibrated: ClassVar[bool] = False
    """Whether rows have latents of their own number, whose mean a constant sets that `calibrate` finds: codes are no
    wider than `width`, whatever the mean that is asked for."""

    def check(self, d_sae: int) -> None:
        """Raise UserError, naming the field, what it got and what it needs, where an SAE of `d_sae` cannot have it."""

    def attach(self, sae: SAE) -> None:
        """Register parameters and buffers on an SAE that is being made."""

    def rates(self) -> dict[str, float]:
        """By the name of a parameter that `attach` registers, how many times as fast as the weights it learns."""
        return {}

    def width(self, d_sae: int) -> int:
        """The most latents of a row, and the width of the codes."""
        raise NotImplementedError

    def mean_k(self) -> float | None:
        """The mean number of latents that training aims at; None where rows decide alone. It can be annealed."""
        return None

    def is_topk_at(self, step: int, steps: int) -> bool:
        """Whether a step of a run of `steps` keeps the mean k of every row: for selections that need latents which mean
        something before they choose."""
        return False

    def start(self, sae: SAE, encoder: Encoder, wanted: Tensor) -> None:
        """Set what depends on the first batch of a training run; `wanted [B, D_out]` is what is to be reconstructed, in
        the units of training."""

    @torch.no_grad()
    def k_for(self, sae: SAE, x: Tensor) -> Tensor:
        """k of each vector of `x [..., D]`, `[...]` int32, where it is known before the encode; UserError elsewhere."""
        raise UserError(
            f"selection: got {self}, needs TopK, AdaptiveK or Need: it gives no row a k before it is encoded"
        )

    def measures(self, steps: int) -> tuple[Sequence[int], int]:
        """After how many steps of a run of `steps` `measure` is called, ascending, and on how many rows of all
        processes together: for selections that learn by other means than gradients."""
        return (), 0

    def measure(self, sae: SAE, rows: Sequence[tuple[Tensor, Tensor | None]]) -> None:
        """Learn from the rows of the last steps, batches of `x [B, D]` and a transcoder's `target [B, D_out]` or None:
        whole steps, as many as have the rows asked for, or all since it was last called. Every process is called with
        its own rows, and learns the same. It may wait for an accelerator."""

    def encode(self, sae: SAE, x: Tensor, encoder: Encoder, wanted: Tensor | None) -> SparseCodes:
        """The codes at inference. `x` is what the SAE was given, as it was given, `wanted [..., D_out]` what is to be
        reconstructed, in the units of training; None for a transcoder that was not told."""
        raise NotImplementedError

    def choose(self, sae: SAE, x: Tensor, encoder: Encoder, k: int | Tensor | None, wanted: Tensor) -> Chosen:
        """The codes of a training step, for rows `x` and `wanted`. `k` stands in for the mean k, or is each row's own;
        None for neither."""
        raise NotImplementedError

    def error(self, sae: SAE, codes: SparseCodes, target: Tensor, *, residual: bool) -> tuple[Tensor, Tensor | None]:
        """Squared error of each row, `[B]`, that training minimises, and with `residual` `target - y_hat [B, D]`."""
        if not residual:
            return decode_mse(codes, sae.W_dec, sae.b_dec, target), None
        left = target - sparse_decode(codes, sae.W_dec, sae.b_dec)
        return left.square().sum(-1), left

    def after_step(self, sae: SAE, codes: SparseCodes, k: int | Tensor | None) -> None:
        """Take in the codes of a training step and the `k` it had, after it. Nothing may wait for an accelerator."""

    def calibrate(self, sae: SAE, rows: Iterable[tuple[Tensor, Tensor | None]], budget: float) -> Tensor:
        """Set the constant at which rows, in batches of `x [B, D]` and a transcoder's `target [B, D_out]` or None, keep
        `budget` latents in the mean, and return it: `[]`. UserError for a budget out of range."""
        raise UserError(
            f"sae: got {self}, whose rows have a k that no mean sets, needs Priced, Need, BatchTopK, JumpReLU or "
            "Matryoshka; aksae.adapt gives any SAE a price"
        )

    def __str__(self) -> str:
        raise NotImplementedError


def check_budget(budget: float, width: int) -> None:
    """Raise UserError unless rows of at most `width` latents can have `budget` of them in the mean."""
    if not 0 < budget <= width:
        raise UserError(f"budget: got {budget}, needs a number above 0 and at most {width}, the most latents of a row")


def at_least(name: str, value: int, low: int, d_sae: int) -> None:
    """Raise UserError unless `low <= value <= d_sae`."""
    if type(value) is not int:
        raise UserError(f"{name}: got {value!r}, needs an int")
    if not low <= value <= d_sae:
        raise UserError(f"{name}: got {value}, needs a number from {low} to d_sae = {d_sae}")
