"""Latents of an SAE that are set or scaled while the language model runs."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aksae_kernels import frozen

from .activations import LanguageModel, find_site
from .errors import UserError
from .sae import SAE
from .sites import Site, replaced_sites


@dataclass(frozen=True)
class Set:
    """`z' = value`: the latent has this activation at every token, also where the SAE does not select it. `Set(0)`
    ablates it."""

    value: float

    def __post_init__(self) -> None:
        _check_finite("value", self.value)


@dataclass(frozen=True)
class Scale:
    """`z' = factor z`: nothing changes where the SAE does not select the latent."""

    factor: float

    def __post_init__(self) -> None:
        _check_finite("factor", self.factor)


@contextmanager
def intervene(
    model: LanguageModel | nn.Module, sae: SAE, edits: Mapping[int, Set | Scale], site: Site | None = None
) -> Iterator[None]:
    """Within it, forwards of `model` run on with edited latents of `sae`, in `generate` and with its cache, too.

        x' = x + decode(z') - decode(z) = x + sum over edited f of (z'_f - z_f) W_dec[f] / output_scale

    for every token's activation x at the site, with `z = sae.encode(x)` (0 for a latent that is not selected) and `z'`
    the same with the edits. So the error of the SAE stays where it was, and no other latent is decoded: a token costs
    its encode, and D multiplications an edited latent.

        with torch.no_grad(), intervene(model, sae, {17: Set(8.0), 23: Set(0.0), 31: Scale(2.0)}):
            model.model.generate(**tokens)

    The sum is taken in float32 at least, and rounded once to the dtype of the model. The change counts as a constant:
    gradients of what comes after the site reach x as if nothing were edited. An AdaptiveK SAE gives each token the k
    of its own activation, whatever its probe was fitted to read. Tokens that no SAE is trained on, such as the first,
    are edited like all others.

    Args:
        model: a `LanguageModel`, or a `transformers` model, whose blocks are found by a forward of two tokens.
        sae: in eval mode, on any device; fastest on that of the site. Its weights must not change meanwhile but by
            operations that torch's version counter sees.
        edits: by the number of the latent.
        site: where the SAE was trained; None for the residual stream after the layer of a `LanguageModel`.

    Raises:
        UserError: no site for a model that has none of its own; no such site; a transcoder, an SAE in training mode or
            of another width; a latent that the SAE does not have; an edit that is neither `Set` nor `Scale`.
    """
    if isinstance(model, LanguageModel):
        site = Site(model.layer) if site is None else site
        module, width = model.module(site), model.d_model
    elif site is None:
        raise UserError("site: got None, needs a Site(layer, hook): only a LanguageModel has one of its own")
    else:
        module, width = find_site(model, site)
    change = _Change(sae, edits, width)
    with frozen(sae.W_enc), replaced_sites({site: module}, {site: change}):
        yield


class _Change:
    """From the activations at a site to the edited ones."""

    def __init__(self, sae: SAE, edits: Mapping[int, Set | Scale], width: int) -> None:
        _check_sae(sae, width)
        self.sae, self.n = sae, len(edits)
        latents = [_latent(latent, sae.config.d_sae) for latent in edits]
        for latent, edit in edits.items():
            if not isinstance(edit, (Set, Scale)):
                raise UserError(f"edits: got {edit!r} for latent {latent}, needs Set(value) or Scale(factor)")
        factors = [edit.factor if isinstance(edit, Scale) else 0.0 for edit in edits.values()]
        values = [edit.value if isinstance(edit, Set) else 0.0 for edit in edits.values()]
        device, dtype = sae.W_dec.device, torch.promote_types(sae.W_dec.dtype, torch.float32)
        index = torch.tensor(latents, dtype=torch.int64, device=device)
        rows = sae.W_dec.detach()[index].to(dtype) / sae.config.output_scale
        factor, value = (torch.tensor(numbers, dtype=dtype, device=device) for numbers in (factors, values))
        # z' - z = (factor - 1) z + value: what does not depend on z is one vector for all tokens.
        self.gain = (factor - 1).unsqueeze(-1) * rows
        self.shift = value @ rows
        # Of each latent its number among the edited ones, n for the others; index -1, that of padding, is the last.
        self.place = torch.full((sae.config.d_sae + 1,), self.n, device=device)
        self.place[index] = torch.arange(self.n, device=device)

    @torch.no_grad()
    def delta(self, x: Tensor) -> Tensor:
        """`x' - x`, `[..., D]`, where and in what the SAE computes."""
        codes = self.sae.encode(x.to(self.sae.W_dec.device, self.sae.W_dec.dtype))
        z = self.gain.new_zeros(*codes.counts.shape, self.n + 1)
        z.scatter_(-1, self.place[codes.indices.long()], codes.values.to(z.dtype))
        return z[..., : self.n] @ self.gain + self.shift

    def __call__(self, x: Tensor) -> Tensor:
        return (x + self.delta(x).to(x.device)).to(x.dtype)


def _check_sae(sae: SAE, width: int) -> None:
    if sae.config.transcoder:
        raise UserError("sae: got a transcoder, needs an autoencoder, whose latents are of what passes the site")
    if sae.training:
        raise UserError("sae: got one in training mode, needs sae.eval(), where no token depends on the others")
    if sae.config.d_in != width:
        raise UserError(f"sae: got d_in {sae.config.d_in}, needs {width}, the width of the model")


def _latent(latent: int, d_sae: int) -> int:
    try:
        number = operator.index(latent)
    except TypeError:
        number = -1
    if not 0 <= number < d_sae:
        raise UserError(f"edits: got the latent {latent!r}, needs a number from 0 to {d_sae - 1}")
    return number


def _check_finite(name: str, value: float) -> None:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"{name}: got {value!r}, needs a finite number")
