"""Every op on every backend and dtype against fp64 oracles, on small shapes: odd sizes, hostile rows, poisoned padding.

`python -m benchmarks.gpu.correctness --device cuda --backend NAME` runs the checks of one backend and raises where one
fails: what a memory checker is given to watch.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import aksae_kernels as ak
from aksae_kernels.optim import SAEAdam
from aksae_kernels.testing import (
    adversarial_rows,
    check_codes,
    check_errors,
    codes_from_mask,
    dense_codes,
    encode_scores,
    keep_slots,
    poison_padding,
    price_mask,
    random_codes,
    selectable,
    topk_mask,
)

from ..problem import Problem, Shape
from ..report import NotMeasured
from .bench import Bench, Outcome, accepts, same_bits
from .oracles import at_codes, within
from .ratios import Step

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WIDTHS = (1, 37, 517, 4099)
"""Numbers of latents that no tile divides."""
PRODUCTS = ((33, 1, 5, 7), (40, 19, 517, 70), (65, 64, 300, 257))
"""Rows, width of the codes, latents, width of the activations."""
DRAWS = 16
"""Problems of each shape on which an fp32 product is judged."""
SMALL = Shape(64, 96, 1031)


Judged = dict[str, tuple[Tensor, Tensor, Tensor]]
"""By name: a result, its oracle in fp64, and what PyTorch makes of it in the dtype under test."""


class Site(NamedTuple):
    """Where the data of a check is."""

    device: torch.device
    dtype: torch.dtype

    def randn(self, seed: int, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.device, self.dtype)

    @property
    def draws(self) -> int:
        """How many problems `check_errors` judges together: 16-bit results lose far more when rounded at last."""
        return DRAWS if self.dtype == torch.float32 else 1

    def ks(self, n_rows: int, d_sae: int) -> Tensor:
        """A k for each row, from below 0 to past F."""
        generator = torch.Generator().manual_seed(n_rows)
        drawn = torch.randint(-1, d_sae + 4, (n_rows,), generator=generator)
        drawn[:3] = torch.tensor([0, d_sae + 9, 1])[:n_rows]
        return drawn.to(self.device)


def topk_select(site: Site) -> None:
    for d_sae in WIDTHS:
        rows = _hostile_rows(site, d_sae)
        k = site.ks(len(rows), d_sae)
        for k_max in (d_sae + 5, max(1, d_sae // 3)):
            check_codes(_twice(ak.topk_select, rows, k, k_max), rows, k, k_max)


def topk_encode(site: Site) -> None:
    for n_rows, d_in, d_sae in ((5, 1, 37), (33, 70, 517), (70, 257, 1031)):
        x, W, b = site.randn(1, n_rows, d_in), site.randn(2, d_sae, d_in), site.randn(3, d_sae)
        # Latents in runs of equals: ties that a product's rounding does not break.
        W[d_sae // 2 :], b[d_sae // 2 :] = W[d_sae // 2], 0
        k, (scores, tolerance) = site.ks(n_rows, d_sae), encode_scores(x, W, b)
        check_codes(_twice(ak.topk_encode, x, W, b, k=k, k_max=d_sae), scores, k, d_sae, tolerance=tolerance)
    x, W, b, scores = _integers(site)
    k = site.ks(9, 300)
    check_codes(_twice(ak.topk_encode, x, W, b, k=k, k_max=40), scores, k, 40)
    _encode_gradients(site, lambda x, W, b: ak.topk_encode(x, W, b, k=site.ks(40, 60), k_max=60))


def batch_topk_encode(site: Site) -> None:
    x, W, b, scores = _integers(site)
    for budget, k_max in ((40, 40), (900, 300), (0, 40)):
        rows = torch.where(topk_mask(scores, k_max), scores, 0)
        mask = topk_mask(rows.flatten(), budget).view_as(rows)
        codes = _twice(ak.batch_topk_encode, x, W, b, budget=budget, k_max=k_max)
        _exactly(codes, codes_from_mask(rows, mask, k_max))
    _encode_gradients(site, lambda x, W, b: ak.batch_topk_encode(x, W, b, budget=1000, k_max=60))


def threshold_encode(site: Site) -> None:
    x, W, b, scores = _integers(site)
    for threshold in (-1.0, 5.5, site.randn(5, 300).abs() * 8):
        rows = torch.where(topk_mask(scores, 40), scores, 0)
        limit = threshold.double() if isinstance(threshold, Tensor) else threshold
        mask = selectable(rows) & ((rows > limit) | rows.isnan())
        codes = _twice(ak.threshold_encode, x, W, b, threshold=threshold, k_max=40)
        _exactly(codes, codes_from_mask(rows, mask, 40))
    _encode_gradients(site, lambda x, W, b: ak.threshold_encode(x, W, b, threshold=2.0, k_max=60))


def _integers(site: Site) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, W, b and their scores: integers, whose sums are exact, with NaN and infinities among them."""
    generator = torch.Generator().manual_seed(0)
    shapes = (9, 12), (300, 12), (300,)
    x, W, b = (torch.randint(-3, 4, shape, generator=generator).to(site.device, site.dtype) for shape in shapes)
    x[1, 3], x[2, 4], W[77, 5], b[200] = torch.nan, torch.inf, torch.nan, torch.inf
    return x, W, b, encode_scores(x, W, b)[0]


def _encode_gradients(site: Site, encode: Callable[..., ak.SparseCodes]) -> None:
    check_errors(_encode_gradients_of(site, encode, 10 * draw) for draw in range(site.draws))


def _encode_gradients_of(site: Site, encode: Callable[..., ak.SparseCodes], seed: int) -> Judged:
    shapes = (40, 33), (207, 33), (207,)
    x, W, b = (site.randn(seed + i, *shape).requires_grad_() for i, shape in enumerate(shapes, 1))
    codes = encode(x, W, b)
    upstream = site.randn(seed + 4, *codes.values.shape)
    grads = _twice(torch.autograd.grad, codes.values, (x, W, b), upstream, retain_graph=True)
    grad = dense_codes(codes._replace(values=upstream), 207)
    exact = grad @ W.double(), grad.T @ x.double(), grad.sum(0)
    lossy = grad.to(site.dtype) @ W, grad.to(site.dtype).T @ x, grad.to(site.dtype).sum(0)
    names = (f"the gradient of {name}" for name in ("x", "W_enc", "b_enc"))
    return dict(zip(names, zip(grads, exact, lossy)))


def encode_at(site: Site) -> None:
    def scores_and_gradients(codes: ak.SparseCodes, W: Tensor, x: Tensor) -> Judged:
        x, W, b = inputs = tuple(t.clone().requires_grad_() for t in (x, W, W[:, 0]))
        scores = _twice(ak.encode_at, codes, x, W, b).values
        # The values of the codes, which no score depends on, are the upstream gradient: NaN in the padding.
        grads = _twice(torch.autograd.grad, scores, inputs, codes.values, retain_graph=True)
        grad = dense_codes(codes, len(W))
        exact, lossy = (_sampled_in(dtype, codes, grad, x, W, b) for dtype in (torch.float64, site.dtype))
        names = ("the scores", *(f"the scores' gradient of {name}" for name in ("x", "W_enc", "b_enc")))
        return dict(zip(names, zip((scores, *grads), exact, lossy)))

    _judge(site, scores_and_gradients)


def _sampled_in(
    dtype: torch.dtype, codes: ak.SparseCodes, grad: Tensor, x: Tensor, W: Tensor, b: Tensor
) -> tuple[Tensor, ...]:
    """Scores at the codes and the gradients by dense products in `dtype`."""
    grad, x, W, b = (tensor.detach().to(dtype) for tensor in (grad, x, W, b))
    return at_codes(x @ W.T + b, codes), grad @ W, grad.T @ x, grad.sum(0)


def batch_topk_select(site: Site) -> None:
    for d_sae in WIDTHS:
        rows = _hostile_rows(site, d_sae)
        for budget in (-1, 0, d_sae + 3, rows.numel() + 1):
            mask = topk_mask(rows.flatten(), max(0, budget)).view_as(rows)
            _exactly(_twice(ak.batch_topk_select, rows, budget), codes_from_mask(rows, mask, d_sae))


def threshold_select(site: Site) -> None:
    for d_sae in WIDTHS:
        rows = _hostile_rows(site, d_sae)
        for threshold in (-1.0, 0.3, site.randn(5, d_sae)):
            limit = threshold.double() if isinstance(threshold, Tensor) else threshold
            mask = selectable(rows) & ((rows.double() > limit) | rows.isnan())
            _exactly(_twice(ak.threshold_select, rows, threshold), codes_from_mask(rows, mask, d_sae))


def price_select(site: Site) -> None:
    generator = torch.Generator().manual_seed(0)
    integers = lambda *shape: torch.randint(-2, 3, shape, generator=generator).to(site.device, site.dtype)
    for lead, d_in, d_sae, width in ((5,), 33, 40, 17), ((3,), 768, 300, 64):
        codes = random_codes(lead, width, d_sae, dtype=site.dtype, device=site.device, integers=True)
        W, b = integers(d_sae, d_in).clamp(-1, 1), integers(d_in)
        # What some of the candidates sum up to, and something else: these pay, and the others do not.
        some = torch.where(torch.arange(width, device=site.device) % 3 > 0, codes.values, 0)
        x = (dense_codes(codes._replace(values=some), d_sae) @ W.double()).to(site.dtype) + b + integers(*lead, d_in)
        for price, passes in ((0.0, 1), (4.0 * d_in, 3), (torch.full(lead, -7.0, device=site.device), 2)):
            # Sums of integers are exact, and so is every decision.
            expected = keep_slots(codes, price_mask(codes, W, b, x, price, passes))
            _exactly(_twice(ak.price_select, poison_padding(codes), W, b, x, price=price, passes=passes), expected)


def sparse_decode(site: Site) -> None:
    def decode(codes: ak.SparseCodes, W: Tensor, x: Tensor) -> Judged:
        dense, b = dense_codes(codes, len(W)), x[0]
        y = _twice(ak.sparse_decode, codes, W, b)
        return {"the decode": (y, dense @ W.double() + b.double(), dense.to(site.dtype) @ W + b)}

    _judge(site, decode)


def decode_mse(site: Site) -> None:
    def loss_and_gradients(codes: ak.SparseCodes, W: Tensor, x: Tensor) -> Judged:
        inputs = values, W_dec, b_dec, target = tuple(t.clone().requires_grad_() for t in (codes.values, W, x[0], x))
        loss = _twice(ak.decode_mse, codes._replace(values=values), W_dec, b_dec, target)
        grads = _twice(torch.autograd.grad, loss.sum(), inputs, retain_graph=True)
        exact, lossy = (_mse_in(dtype, codes, W, x) for dtype in (torch.float64, site.dtype))
        names = ("the loss", *(f"the loss's gradient of {name}" for name in ("values", "W_dec", "b_dec", "target")))
        return dict(zip(names, zip((loss, *grads), exact, lossy)))

    _judge(site, loss_and_gradients)


def _mse_in(dtype: torch.dtype, codes: ak.SparseCodes, W: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """Loss and gradients by dense products in `dtype`: the oracle in fp64, what PyTorch loses in the dtype of W."""
    dense, W, target = dense_codes(codes, len(W)).to(dtype), W.to(dtype), x.to(dtype)
    error = dense @ W + target[0] - target
    dots = at_codes(2 * error @ W.T, codes)
    return error.square().sum(-1), dots, dense.T @ (2 * error), (2 * error).sum(0), -2 * error


def sparse_value_grad(site: Site) -> None:
    def value_grad(codes: ak.SparseCodes, W: Tensor, x: Tensor) -> Judged:
        dots = _twice(ak.sparse_value_grad, x, codes, W)
        return {"the gradient of values": (dots, at_codes(x.double() @ W.double().T, codes), at_codes(x @ W.T, codes))}

    _judge(site, value_grad)


def sparse_weight_grad(site: Site) -> None:
    def weight_grad(codes: ak.SparseCodes, W: Tensor, x: Tensor) -> Judged:
        dense = dense_codes(codes, len(W))
        grad = _twice(ak.sparse_weight_grad, codes, x, len(W))
        return {"the gradient of the weight": (grad, dense.T @ x.double(), dense.to(site.dtype).T @ x)}

    _judge(site, weight_grad)


def optimizer(site: Site) -> None:
    """Three steps of `SAEAdam` with all its options, against the reference in fp64 from the same start."""
    start = torch.nn.functional.normalize(site.randn(1, 131, 77), dim=-1)
    grads = [0.1 * site.randn(seed, 131, 77) for seed in (2, 3, 4)]
    stepped = lambda dtype: _adam(start.to(dtype), [grad.to(dtype) for grad in grads])
    actual = _twice(stepped, site.dtype)
    with ak.use_backend("reference"):
        within(actual, stepped(torch.float64), stepped(site.dtype), "SAEAdam")


def _adam(start: Tensor, grads: list[Tensor]) -> Tensor:
    weight = torch.nn.Parameter(start.clone())
    adam = SAEAdam([{"params": [weight], "unit_norm_rows": True, "lazy": True}], lr=1e-2, max_grad_norm=1.0)
    for grad in grads:
        weight.grad = grad.clone()
        weight.grad[:7] = 0
        adam.step()
    return weight.detach()


CHECKS: dict[str, Callable[[Site], None]] = {
    check.__name__: check
    for check in (
        topk_select,
        topk_encode,
        batch_topk_encode,
        threshold_encode,
        encode_at,
        batch_topk_select,
        threshold_select,
        price_select,
        sparse_decode,
        decode_mse,
        sparse_value_grad,
        sparse_weight_grad,
        optimizer,
    )
}


def correctness(bench: Bench, op: str, outcome: Outcome) -> None:
    """The check of one op; `passed` lists the backends and dtypes that did."""
    passed = outcome.facts["passed"] = []
    for backend in bench.backends:
        if not accepts(op, backend, bench.device):
            outcome.facts.setdefault("refused", []).append(backend)
            continue
        for name, dtype in DTYPES.items():
            with outcome.judging(f"{op}, {backend}, {name}"), ak.use_backend(backend):
                CHECKS[op](Site(bench.device, dtype))
                passed.append(f"{backend} {name}")


def graphs(bench: Bench, outcome: Outcome) -> None:
    """A forward, and a whole step, captured into a CUDA graph: replays give the bits of the eager calls."""
    if bench.device.type != "cuda":
        raise NotMeasured("CUDA graphs need a CUDA device")
    for backend in bench.backends:
        step = Step(Problem(SMALL, "0..80", bench.device, torch.bfloat16))
        for what, call in {"forward": lambda step=step: _forward(step), "step": step}.items():
            with outcome.judging(f"graph of a {what}, {backend}"), ak.use_backend(backend):
                _replays(call, step.problem.x)
                outcome.facts.setdefault("captured", []).append(f"{what}, {backend}")


def _forward(step: Step) -> tuple[Tensor, ...]:
    with torch.no_grad():
        codes, loss = step.forward()
    return *codes, loss


def _replays(call: Callable[[], tuple[Tensor, ...]], x: Tensor) -> None:
    """Raise AssertionError unless a capture of `call` follows a change of its input `x`."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for seed in (1, 2):
        x.copy_(torch.randn(x.shape, device=x.device, generator=torch.Generator(x.device).manual_seed(seed)))
        graph.replay()
        assert same_bits(captured, call()), "a replay differs from the eager call"


def _hostile_rows(site: Site, d_sae: int) -> Tensor:
    return torch.stack(tuple(adversarial_rows(d_sae, dtype=site.dtype, device=site.device).values()))


def _judge(site: Site, results: Callable[[ak.SparseCodes, Tensor, Tensor], Judged]) -> None:
    """Raise AssertionError where a result on codes, a weight and activations loses too much."""
    for shape in PRODUCTS:
        for by_hand in (False, True):
            check_errors(results(*_product(site, *shape, by_hand, draw)) for draw in range(site.draws))


def _product(
    site: Site, B: int, K: int, F: int, D: int, by_hand: bool, draw: int
) -> tuple[ak.SparseCodes, Tensor, Tensor]:
    """Codes with poisoned padding, as if selected or such as a user might make; a weight and activations."""
    seed = 1000 * draw
    codes = random_codes((B,), K, F, dtype=site.dtype, device=site.device, by_hand=by_hand, seed=seed + K)
    return poison_padding(codes), site.randn(seed + 6, F, D), site.randn(seed + 7, B, D)


def _twice(call: Callable, *args, **kwargs):
    """The result of a call that gives the same bits when it is repeated, in memory that holds something else."""
    first = call(*args, **kwargs)
    _soil(first)
    assert same_bits(first, call(*args, **kwargs)), "two calls differ"
    return first


def _soil(result: Tensor | Sequence) -> None:
    """Leave 0x5A in freed memory of the sizes of a result: the allocator has it at hand for the next one."""
    tensors = [result] if isinstance(result, Tensor) else list(result)
    blocks = [torch.empty(tensor.nbytes, dtype=torch.uint8, device=tensor.device) for tensor in tensors * 3]
    for block in blocks:
        block.fill_(0x5A)


def _exactly(codes: ak.SparseCodes, expected: ak.SparseCodes) -> None:
    for name, actual, wanted in zip(codes._fields, codes, expected):
        wanted = wanted.to(actual.dtype)
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0, equal_nan=True, msg=f"{name} differ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", required=True)
    options = parser.parse_args()
    with ak.use_backend(options.backend):
        for check in CHECKS.values():
            check(Site(torch.device(options.device), torch.bfloat16))


if __name__ == "__main__":
    main()
