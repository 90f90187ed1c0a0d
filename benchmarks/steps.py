"""A training step of a TopK SAE, ours and in dense PyTorch: forward, loss, backward, Adam on unit decoder rows.

Both train the same parameters by the same rules from the same weights: `z = TopK_k(ReLU(W_enc (x - b_dec) + b_enc))`,
the loss is the squared error of `W_dec z + b_dec` summed over a row and averaged over rows, and the part of a decoder
gradient along its row is taken out before the update. So their losses agree, step by step.
"""

from __future__ import annotations

import functools
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import aksae_kernels as ak
from aksae_kernels.optim import SAEAdam

from .case import Contest, Rival
from .ops import MKL, ONEDNN, fp32_gemms
from .phases import Span
from .problem import Problem
from .report import NotMeasured, Target

LR = 1e-4


class Step(Protocol):
    """`step(x)` trains on a batch and returns the loss before it; `spans` name the calls that make up each phase."""

    @property
    def spans(self) -> tuple[Span, ...]: ...

    def __call__(self, x: Tensor) -> float: ...


class OurStep:
    """`aksae`'s SAE on the kernels, with `SAEAdam`.

    Args:
        W: `[F, D]` with unit rows, the initial encoder and decoder; it is copied.
        k: `[B]`, of each row of a batch.
        max_grad_norm: clips the gradient as `SAEAdam` does.
    """

    def __init__(self, W: Tensor, k: Tensor, max_grad_norm: float | None = None):
        # Other measurements need nothing of what the training package does.
        try:
            from aksae import SAE, SAEConfig, TopK
        except ImportError as error:
            raise NotMeasured(str(error)) from None
        self.k, self.width = k, int(k.max())
        with W.device:
            self.sae = SAE(SAEConfig(W.shape[1], W.shape[0], TopK(self.width))).to(W.dtype)
        self.sae.load_state_dict({"W_enc": W, "W_dec": W}, strict=False)
        sae = self.sae
        groups = [{"params": [sae.W_enc, sae.b_enc, sae.b_dec]}, {"params": [sae.W_dec], "unit_norm_rows": True}]
        self.optimizer = SAEAdam(groups, lr=LR, max_grad_norm=max_grad_norm)

    @property
    def spans(self) -> tuple[Span, ...]:
        return (
            Span(self.sae, "encode", "encode"),
            Span(self, "forward", "decode + loss"),
            Span(torch.Tensor, "backward", "backward"),
            Span(self.optimizer, "step", "optimizer"),
        )

    def forward(self, x: Tensor) -> Tensor:
        codes = self.sae.encode(x, self.k, k_max=self.width)
        return ak.decode_mse(codes, self.sae.W_dec, self.sae.b_dec, x).mean()

    def update(self, loss: Tensor) -> None:
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def __call__(self, x: Tensor) -> float:
        loss = self.forward(x)
        self.update(loss)
        return loss.item()


class DenseStep:
    """The same in plain PyTorch, as it is usually written: top-k, scatter into `[B, F]`, dense products, fused Adam."""

    def __init__(self, W: Tensor, k: Tensor):
        self.k, self.width = k, int(k.max())
        self.ragged = bool((k < self.width).any())
        self.W_enc, self.W_dec = (nn.Parameter(W.clone()) for _ in range(2))
        self.b_enc, self.b_dec = (nn.Parameter(W.new_zeros(size)) for size in W.shape)
        self.optimizer = torch.optim.Adam([self.W_enc, self.b_enc, self.W_dec, self.b_dec], lr=LR, fused=True)

    @property
    def spans(self) -> tuple[Span, ...]:
        return (
            Span(F, "linear", "encode"),
            Span(self, "select", "select"),
            Span(self, "forward", "decode + loss"),
            Span(torch.Tensor, "backward", "backward"),
            Span(self, "step", "optimizer"),
        )

    def select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        # torch knows one k for all rows: of the largest, in order, the rows of a smaller k keep the first ones.
        values, indices = scores.relu().topk(self.width, sorted=self.ragged)
        if self.ragged:
            rank = torch.arange(self.width, device=values.device)
            values = values.masked_fill(rank >= self.k.unsqueeze(-1), 0)
        return values, indices

    def forward(self, x: Tensor) -> Tensor:
        scores = F.linear(x - self.b_dec, self.W_enc, self.b_enc)
        values, indices = self.select(scores)
        z = torch.zeros_like(scores).scatter(-1, indices, values)
        return (z @ self.W_dec + self.b_dec - x).square().sum(-1).mean()

    @torch.no_grad()
    def step(self) -> None:
        grad, weight = self.W_dec.grad, self.W_dec
        grad.sub_((grad * weight).sum(-1, keepdim=True) * weight)
        self.optimizer.step()
        weight.div_(weight.norm(dim=-1, keepdim=True))

    def update(self, loss: Tensor) -> None:
        loss.backward()
        self.step()
        self.optimizer.zero_grad(set_to_none=True)

    def __call__(self, x: Tensor) -> float:
        loss = self.forward(x)
        self.update(loss)
        return loss.item()


def step(problem: Problem) -> Contest:
    """A whole step of ours against nothing but the product in its encoder, and against the dense step."""
    x = problem.x
    ours, dense = OurStep(problem.W, problem.k), DenseStep(problem.W, problem.k)

    def check() -> None:
        # The first loss judges the forward, the second what gradients and optimizer made of the weights. Latents that
        # the two products rank differently, within their error, move it a little.
        for _ in range(2):
            torch.testing.assert_close(ours(x), dense(x), rtol=1e-3, atol=0)

    gemms = fp32_gemms(x, problem.W, problem.b_enc)
    rivals = [Rival(ONEDNN, gemms[ONEDNN], Target(1.4, 1.0))] if ONEDNN in gemms else [Rival(MKL, gemms[MKL])]
    return Contest(functools.partial(ours, x), check, (*rivals, Rival("dense PyTorch", functools.partial(dense, x))))
