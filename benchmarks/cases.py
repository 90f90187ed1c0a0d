"""What is measured: each case is one of our ops beside what PyTorch offers for the same result, and a check of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import aksae_kernels as ak
from aksae_kernels.optim import SAEAdam
from aksae_kernels.testing import check_codes, encode_scores

OURS = "aksae"


@dataclass(frozen=True)
class Case:
    """`contenders` maps a name to a callable; `OURS` is the library's. `check` raises where its result is wrong."""

    name: str
    k: str
    contenders: dict[str, Callable[[], object]]
    check: Callable[[], None]


@dataclass(frozen=True)
class Shape:
    """Rows, width of the activations, number of latents."""

    B: int
    D: int
    F: int


def cpu_cases(shape: Shape) -> Iterator[Case]:
    """The cases of the `cpu` suite: fp32, a constant k of 64, and k uniform in 20..320."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(shape.B, shape.D, generator=rng)
    W_enc = F.normalize(torch.randn(shape.F, shape.D, generator=rng), dim=-1)
    W_dec, b_enc = W_enc.clone(), torch.zeros(shape.F)
    k_max = min(320, shape.F)
    ks = {
        "64": torch.full((shape.B,), min(64, shape.F)),
        "20..320": torch.randint(min(20, k_max), k_max + 1, (shape.B,), generator=rng),
    }
    for label, k in ks.items():
        yield from _cases(x, W_enc, b_enc, W_dec, k, k_max, label)
    yield _optimizer_case(W_dec)


def _cases(x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, k: Tensor, k_max: int, label: str) -> Iterator[Case]:
    width = int(k.max())
    pre_acts = F.linear(x, W_enc, b_enc)
    codes = ak.topk_select(pre_acts, k, width)
    indices = codes.indices.clamp(min=0).long()
    d_sae = W_dec.shape[0]

    def padded_topk(scores: Tensor) -> tuple[Tensor, Tensor]:
        """Per-row k with torch's scalar one: the largest k for all rows, then a mask."""
        values, found = scores.relu().topk(width)
        return values.masked_fill(torch.arange(width) >= k.unsqueeze(-1), 0), found

    def check_encode() -> None:
        scores, tolerance = encode_scores(x, W_enc, b_enc)
        check_codes(ak.topk_encode(x, W_enc, b_enc, k=k, k_max=width), scores, k, width, tolerance=tolerance)

    yield Case(
        "topk_select",
        label,
        {OURS: lambda: ak.topk_select(pre_acts, k, width), "relu + topk + mask": lambda: padded_topk(pre_acts)},
        lambda: check_codes(ak.topk_select(pre_acts, k, width), pre_acts, k, width),
    )
    yield Case(
        "topk_encode",
        label,
        {
            OURS: lambda: ak.topk_encode(x, W_enc, b_enc, k=k, k_max=width),
            "linear alone": lambda: F.linear(x, W_enc, b_enc),
            "linear + relu + topk + mask": lambda: padded_topk(F.linear(x, W_enc, b_enc)),
        },
        check_encode,
    )

    tight = {"rtol": 1e-4, "atol": 1e-4}

    def bag(weight: Tensor = W_dec, values: Tensor = codes.values) -> Tensor:
        return F.embedding_bag(indices, weight, mode="sum", per_sample_weights=values)

    yield Case(
        "sparse_decode",
        label,
        {OURS: lambda: ak.sparse_decode(codes, W_dec), "embedding_bag": bag},
        lambda: torch.testing.assert_close(ak.sparse_decode(codes, W_dec), bag(), **tight),
    )

    live = codes._replace(values=codes.values.clone().requires_grad_())

    def check_mse() -> None:
        loss = ak.decode_mse(live, W_dec, None, x)
        (dots,) = torch.autograd.grad(loss.sum(), live.values)
        error = bag() - x
        torch.testing.assert_close(loss.detach(), error.square().sum(-1), rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(dots, 2 * ak.sparse_value_grad(error, codes, W_dec), rtol=1e-3, atol=1e-3)

    yield Case(
        "decode_mse with value gradient",
        label,
        {OURS: lambda: ak.decode_mse(live, W_dec, None, x), "embedding_bag (decode alone)": bag},
        check_mse,
    )

    weight = W_dec.clone().requires_grad_()

    def bag_backward() -> Tensor:
        return torch.autograd.grad(bag(weight), weight, x)[0]

    yield Case(
        "sparse_weight_grad",
        label,
        {OURS: lambda: ak.sparse_weight_grad(codes, x, d_sae), "embedding_bag forward + backward": bag_backward},
        lambda: torch.testing.assert_close(ak.sparse_weight_grad(codes, x, d_sae), bag_backward(), **tight),
    )

    ours = [t.clone().requires_grad_() for t in (W_enc, b_enc, W_dec)]
    dense = [t.clone().requires_grad_() for t in (W_enc, b_enc, W_dec)]

    def our_step(parameters: list[Tensor] = ours) -> list[Tensor]:
        W, b, decoder = parameters
        loss = ak.decode_mse(ak.topk_encode(x, W, b, k=k, k_max=width), decoder, None, x).sum()
        return [loss.detach(), *torch.autograd.grad(loss, parameters)]

    def dense_step(parameters: list[Tensor] = dense) -> list[Tensor]:
        W, b, decoder = parameters
        scores = F.linear(x, W, b)
        values, found = padded_topk(scores)
        error = torch.zeros_like(scores).scatter(1, found, values) @ decoder - x
        loss = error.square().sum()
        return [loss.detach(), *torch.autograd.grad(loss, parameters)]

    def check_step() -> None:
        # A latent that the two products rank differently, within their error, gets its row's whole gradient in one of
        # them alone: norms are compared, not elements.
        for got, expected in zip(our_step(), dense_step()):
            assert (got - expected).norm() <= 1e-2 * expected.norm(), "gradients differ"

    yield Case(
        "forward + backward of a training step", label, {OURS: our_step, "dense PyTorch": dense_step}, check_step
    )


def _optimizer_case(W_dec: Tensor) -> Case:
    gradient = torch.randn(W_dec.shape, generator=torch.Generator().manual_seed(1))
    first = [torch.nn.Parameter(W_dec.clone()) for _ in range(2)]
    first[0].grad, first[1].grad = gradient, gradient.clone()
    ours = SAEAdam([{"params": [first[0]], "unit_norm_rows": True}])
    adam = torch.optim.Adam([first[1]], fused=True)

    @torch.no_grad()
    def torch_step() -> None:
        weight = first[1]
        weight.grad = gradient - (gradient * weight).sum(-1, keepdim=True) * weight
        adam.step()
        weight.div_(weight.norm(dim=-1, keepdim=True))

    def check() -> None:
        ours.step()
        torch_step()
        torch.testing.assert_close(first[0], first[1], rtol=1e-4, atol=1e-5)

    return Case("SAEAdam step", "-", {OURS: ours.step, "project + fused Adam + renormalise": torch_step}, check)
