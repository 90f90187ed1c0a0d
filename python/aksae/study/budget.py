"""SAEs at exactly the mean L0 that they are compared at."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from aksae_kernels import SparseCodes, price_select

from ..pricing import adapt, settle
from ..sae import SAE
from ..selections import AdaptiveK, Priced, TopK
from .rows import Rows

TOLERANCE = 0.004
"""How far, as a share of the budget, mean L0 may be off it."""
_GOLDEN = (math.sqrt(5) - 1) / 2
_FIRST = 512
"""Rows that give a price from which all rows go on."""
_MOVED = ("price", "threshold", "need_bias", "log_threshold")
"""Constants of an SAE by which its mean L0 is moved; it has one of them at most."""


class Chooser:
    """Gives the rows of a set their codes by an SAE's own rule, with one number that moves their mean L0.

    `shift` 0 is the rule as it stands. Prices and thresholds are multiplied by `exp(-shift)`, need's bias grows by
    `shift` budgets, the k of the paper's AdaptiveK is multiplied by `exp(shift)`: L0 never falls with it. TopK has
    nothing that could be moved.
    """

    def __init__(self, sae: SAE, rows: Rows):
        self.sae, self.rows, self.selection = sae, rows, sae.config.selection
        self.shift = 0.0
        self.base = {name: tensor.clone() for name, tensor in sae.state_dict().items() if name in _MOVED}
        # Candidates of a priced row do not depend on the price.
        self.candidates: list[SparseCodes] | None = None

    def on(self, rows: Rows) -> Chooser:
        """The same rule, as it stands, for other rows."""
        other = Chooser(self.sae, rows)
        if isinstance(self.selection, AdaptiveK):
            other.shift = self.shift
        return other

    @property
    def moves(self) -> bool:
        return not isinstance(self.selection, TopK)

    @torch.no_grad()
    def move(self, shift: float) -> None:
        self.shift = shift
        state = self.sae.state_dict()
        for name, base in self.base.items():
            if name == "log_threshold":
                state[name].copy_(base - shift)
            elif name == "need_bias":
                state[name].copy_(base + shift * self.selection.budget)
            else:
                state[name].copy_(base * math.exp(-shift))

    @torch.no_grad()
    def codes(self) -> Iterator[tuple[slice, SparseCodes]]:
        """The codes of chunk after chunk of the rows."""
        for number, (part, x) in enumerate(self.rows.chunks()):
            yield part, self._codes(number, part, x)

    def all_codes(self) -> SparseCodes:
        """The codes of all rows."""
        return SparseCodes(*(torch.cat(parts) for parts in zip(*(codes for _, codes in self.codes()))))

    def _codes(self, number: int, part: slice, x: Tensor) -> SparseCodes:
        sae, selection = self.sae, self.selection
        if isinstance(selection, AdaptiveK):
            k = sae.k_for(self.rows.probed)[self.rows.context[part]] * math.exp(self.shift)
            # Rows of one context have one k, and would all gain a latent at the same shift. So k is rounded up in as
            # many of them as its fraction says, by a sequence that fills the unit interval evenly.
            even = torch.arange(part.start, part.start + len(x), device=k.device) * _GOLDEN % 1
            most = min(sae.config.d_sae, math.ceil(selection.k_map.k_max * math.exp(self.shift)) + 1)
            return sae.encode(x, (k + even).floor().clamp(1, most).int(), k_max=most)
        if isinstance(selection, Priced):
            if self.candidates is None:
                self.candidates = [sae.encoder(rows).topk(sae.width()) for _, rows in self.rows.chunks()]
            walks = selection.walks(training=False)
            wanted = sae.wanted(x)
            return price_select(self.candidates[number], sae.W_dec, sae.b_dec, wanted, price=sae.price, passes=walks)
        return sae.encode(x)

    def mean_l0(self) -> float:
        return sum(float(codes.counts.sum()) for _, codes in self.codes()) / len(self.rows)


def at_budget(chooser: Chooser, budget: float) -> float:
    """Move the rule of `chooser` until mean L0 is `budget`, and return the L0 that it had before.

    Where no shift gives the budget, since too few latents of the rows are positive, L0 stays below it.
    """
    tried: list[float] = []

    def mean_l0(shift: float) -> float:
        chooser.move(start + shift)
        tried.append(chooser.mean_l0())
        return tried[-1]

    start = chooser.shift
    if chooser.moves:
        settle(mean_l0, budget, tolerance=TOLERANCE)
    else:
        tried.append(chooser.mean_l0())
    return tried[0]


def own(sae: SAE, calibration: Rows, judged: Rows, budget: float) -> tuple[Chooser, float]:
    """An SAE by its own rule at a mean L0 of `budget` on the rows that judge; and the L0 that these had with the
    constant to which the others led."""
    chooser = Chooser(sae, calibration)
    at_budget(chooser, budget)
    judge = chooser.on(judged)
    return judge, at_budget(judge, budget)


def priced(sae: SAE, calibration: Rows, judged: Rows, budget: float) -> tuple[Chooser, float]:
    """The weights of an SAE at a price, by the same measure."""
    adapted = adapt(sae, calibration.x[:_FIRST], budget)
    return own(adapted, calibration, judged, budget)
