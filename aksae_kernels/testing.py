"""What a correct kernel must satisfy, as plain torch code: oracles, invariants, an error judge and hostile inputs.

For tests, for benchmarks (which may not report a time before the result has passed) and for anyone who writes another
backend. Everything here is slow and obvious on purpose. Where precision matters it computes in fp64, and in
`DoubleDouble` what judges fp64: an oracle must hold more digits than what it judges, whatever BLAS it runs on.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .codes import MAX_LATENTS, SparseCodes, live_slots
from .double_double import DoubleDouble
from .ordering import best_first, selectable

__all__ = [
    "INT_MIN",
    "DoubleDouble",
    "adversarial_rows",
    "check_codes",
    "check_errors",
    "codes_from_mask",
    "dense_codes",
    "encode_scores",
    "error_ratio",
    "exact_codes",
    "keep_slots",
    "poison_padding",
    "price_mask",
    "random_codes",
    "selectable",
    "topk_mask",
]

INT_MIN = torch.iinfo(torch.int32).min


def topk_mask(scores: Tensor, k: int | Tensor) -> Tensor:
    """True on the `k[b]` best selectable entries of each row of `scores [..., F]`.

    The total order is: NaN, then larger value, then smaller index. `k` is an int or an integer tensor `[...]`.
    """
    best = best_first(scores)
    rank = torch.empty_like(best).scatter_(-1, best, torch.arange(scores.shape[-1], device=best.device).expand_as(best))
    limit = k.to(torch.int64).unsqueeze(-1) if isinstance(k, Tensor) else min(k, scores.shape[-1])
    return selectable(scores) & (rank < limit)


def codes_from_mask(scores: Tensor, mask: Tensor, width: int) -> SparseCodes:
    """The entries of `scores [..., F]` under `mask`, packed by ascending index into rows of `width` slots.

    Values are `scores` themselves, unused slots hold value 0 and index -1. Raises ValueError where a row has more
    than `width` entries.
    """
    counts = mask.sum(-1)
    if counts.numel() and int(counts.max()) > width:
        raise ValueError(f"width must be at least {int(counts.max())}, the entries of a row under mask; got {width}")
    order = mask.logical_not().to(torch.uint8).argsort(dim=-1, stable=True)[..., :width]
    live = torch.arange(width, device=order.device) < counts.unsqueeze(-1)
    values = torch.where(live, scores.gather(-1, order), 0)
    return SparseCodes(values, torch.where(live, order, -1).to(torch.int32), counts.to(torch.int32))


def encode_scores(x: Tensor, W_enc: Tensor, b_enc: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`x @ W_enc.T + b_enc` in fp64, and the error the contract allows for each score, both `[..., F]`.

    The bound is `(8 + 3 sqrt(D)) * u * (sum |x w| + |b|)` with `u` the unit roundoff of the accumulator: 2^-24, or
    2^-53 for fp64 inputs, whose scores are rounded once from a `DoubleDouble`. It is NaN where the score is not finite.
    """
    in_fp64 = x.dtype == torch.float64
    roundoff = 2.0**-53 if in_fp64 else 2.0**-24
    x, W_enc = x.double(), W_enc.double()
    scores: DoubleDouble | Tensor = DoubleDouble(x) @ W_enc.T if in_fp64 else x @ W_enc.T
    magnitude = x.abs() @ W_enc.abs().T
    if b_enc is not None:
        scores, magnitude = scores + b_enc.double(), magnitude + b_enc.double().abs()
    rounded = scores.round() if isinstance(scores, DoubleDouble) else scores
    return rounded, (8 + 3 * math.sqrt(x.shape[-1])) * roundoff * magnitude


def dense_codes(codes: SparseCodes, d_sae: int) -> Tensor:
    """The live slots of `codes` as a dense fp64 `[..., d_sae]`, repeated indices summed: with it, every product of
    codes is a matrix product. Codes in fp64 that repeat an index need `exact_codes`.
    """
    live = live_slots(codes)
    dense = torch.zeros(*codes.counts.shape, d_sae, dtype=torch.float64, device=codes.values.device)
    if d_sae == 0:
        return dense
    return dense.scatter_add(-1, codes.indices.where(live, 0).long(), codes.values.double().where(live, 0))


def exact_codes(codes: SparseCodes, d_sae: int) -> DoubleDouble:
    """The same with the digits to judge fp64: repeated indices are summed, slot by slot, in double-double."""
    live = live_slots(codes)
    dense = DoubleDouble(codes.values.new_zeros(*codes.counts.shape, d_sae, dtype=torch.float64))
    for slot in range(codes.indices.shape[-1] if d_sae else 0):
        at = codes.indices.where(live, 0)[..., slot : slot + 1].long()
        total = dense.gather(-1, at) + codes.values.where(live, 0)[..., slot : slot + 1]
        dense = DoubleDouble(dense.high.scatter(-1, at, total.high), dense.low.scatter(-1, at, total.low))
    return dense


def error_ratio(actual: Tensor, expected: Tensor | DoubleDouble, torch_result: Tensor) -> float:
    """Largest error of `actual`, in units of what PyTorch itself loses: a kernel passes at 2 or less.

    Both errors are maxima over the tensor against `expected`, the oracle: fp64 for narrower dtypes, `DoubleDouble` for
    fp64, which would else be judged by what one BLAS makes of it. `torch_result` is the same quantity by plain torch
    ops in the dtype under test. Its error counts as at least half an ulp of the largest expected value, so that a
    lucky exact result of PyTorch does not fail a correctly rounded one. Infinite where the shapes differ, or where one
    of `actual` and `expected` is NaN or infinite and the other is not the same. Raises TypeError for an fp64 `actual`
    and an `expected` of no more digits.
    """
    return _ratio([_errors(actual, expected, torch_result)])


def check_errors(draws: Iterable[Mapping[str, tuple[Tensor, Tensor | DoubleDouble, Tensor]]]) -> None:
    """Raise AssertionError where a result loses more than twice what PyTorch loses on the same problems.

    Each draw is one problem: by name, the three arguments of `error_ratio`. The largest error of a few sums is a matter
    of luck, for PyTorch as for a kernel, and so of the order in which this CPU's BLAS adds; in fp32 and fp64, where
    nothing else is rounded, one draw says little. So the largest error on all draws is compared with PyTorch's largest
    on all of them, each draw in a unit of its own, the power of two above its largest expected value.
    """
    errors: dict[str, list[tuple[float, float]]] = {}
    for draw in draws:
        for name, judged in draw.items():
            errors.setdefault(name, []).append(_errors(*judged))
    for name, of_draws in errors.items():
        ratio = _ratio(of_draws)
        assert ratio <= 2, f"{name} loses {ratio:.3g} times what PyTorch loses"


def _ratio(errors: list[tuple[float, float]]) -> float:
    # NaN, which PyTorch may have where the oracle has none, stays NaN: no kernel passes by that.
    ours, torchs = torch.tensor(errors, dtype=torch.float64, device="cpu").amax(0).tolist()
    return ours / torchs if ours else 0.0


def _errors(actual: Tensor, expected: Tensor | DoubleDouble, torch_result: Tensor) -> tuple[float, float]:
    """The largest errors of `actual` and of PyTorch, in units of the power of two above the largest expected value."""
    if actual.dtype == torch.float64 and not isinstance(expected, DoubleDouble):
        raise TypeError("expected must be a DoubleDouble to judge float64, got a tensor")
    actual, expected, torch_result = actual.detach(), DoubleDouble.of(expected), torch_result.detach()
    if actual.shape != expected.shape:
        return math.inf, 1.0
    finite = expected.high.isfinite()
    if not torch.equal(finite, actual.isfinite()) or not torch.allclose(
        actual.double()[~finite], expected.high[~finite], rtol=0, atol=0, equal_nan=True
    ):
        return math.inf, 1.0
    if not finite.any():
        return 0.0, 0.0
    expected = expected[finite]
    largest = float(expected.high.abs().max())
    unit = 0.5 ** math.frexp(largest)[1]
    floor = 0.5 * torch.finfo(actual.dtype).eps * largest
    lost = float((expected - torch_result[finite]).high.abs().max())
    error = float((expected - actual[finite]).high.abs().max())
    return unit * error, unit * max(lost, floor)


def check_codes(
    codes: SparseCodes, scores: Tensor, k: int | Tensor, k_max: int | None = None, *, tolerance: float | Tensor = 0.0
) -> None:
    """Raise AssertionError unless `codes` is a top-k selection of `scores [..., F]` by the rules of the contract.

    Checked: dtypes and shapes, `K = min(k_max, F)` (the largest `k` for `k_max=None`), counts = min(k, selectable
    entries), strictly ascending indices, value 0 and index -1 past the counts, the total order with ties to the
    smaller index, and the values. With the default `tolerance` of 0 the selection is a function of `scores` and must
    be met exactly. Where `scores` only approximate what the kernel ranked, as after a matrix product, `tolerance`
    (a float or `[..., F]`) bounds their error, and near-ties within it may go either way; the values may differ by it
    and by one rounding to their dtype.
    """
    n_latents = scores.shape[-1]
    largest = (int(k.max()) if k.numel() else 0) if isinstance(k, Tensor) else k
    limit = min(largest if k_max is None else k_max, n_latents)
    width = max(0, limit)
    k = k.clamp(0, width) if isinstance(k, Tensor) else torch.tensor(min(max(k, 0), width), device=scores.device)
    _check_structure(codes, scores.shape[:-1], n_latents, width)
    live = live_slots(codes)

    if isinstance(tolerance, float) and tolerance == 0:
        expected = codes_from_mask(scores, topk_mask(scores, k.expand(scores.shape[:-1])), width)
        assert torch.equal(codes.counts, expected.counts), "counts are not min(k, selectable entries)"
        assert torch.equal(codes.indices, expected.indices), "selection differs from the total order"
        torch.testing.assert_close(codes.values, expected.values.to(codes.values.dtype), rtol=0, atol=0, equal_nan=True)
        return

    # NaN ranks first: as +inf it never loses to a finite score, and no tolerance applies to it.
    nan = scores.isnan()
    slack = torch.as_tensor(tolerance, dtype=torch.float64, device=scores.device).expand(scores.shape).nan_to_num(0)
    upper = (scores + slack).masked_fill(nan, math.inf)
    lower = (scores - slack).masked_fill(nan, math.inf)
    index = codes.indices.where(live, 0).long()
    selected = torch.zeros_like(nan, dtype=torch.int64).scatter_add(-1, index, live.long()) > 0
    assert (upper[selected] > 0).all(), "an entry that is not positive was selected"
    assert (codes.counts <= k).all(), "a row has more than k entries"
    weakest = upper.masked_fill(~selected, math.inf).amin(-1) if n_latents else upper.sum(-1)
    excluded = lower.masked_fill(selected, -math.inf).amax(-1) if n_latents else lower.sum(-1)
    full = codes.counts == k
    assert (full | (excluded <= 0)).all(), "a positive entry was left out of a row with fewer than k"
    assert (~full | (codes.counts == 0) | (weakest >= excluded)).all(), "a better entry was left out"
    if width:
        chosen, margin = scores.gather(-1, index)[live], slack.gather(-1, index)[live]
        roundoff = torch.finfo(codes.values.dtype).eps / 2
        tiny = torch.finfo(codes.values.dtype).smallest_normal * roundoff
        margin = margin + roundoff * (chosen.abs() + margin) + tiny
        values = codes.values.double()[live]
        same = (values == chosen) | (values.isnan() & chosen.isnan())
        assert (same | ((values - chosen).abs() <= margin)).all(), "values are further from the scores than tolerance"


def _check_structure(codes: SparseCodes, leading: torch.Size, n_latents: int, width: int) -> None:
    values, indices, counts = codes
    assert indices.dtype == counts.dtype == torch.int32, f"int32 expected, got {indices.dtype} and {counts.dtype}"
    assert values.shape == indices.shape == (*leading, width), f"{tuple(values.shape)} is not {(*leading, width)}"
    assert counts.shape == leading, f"counts are {tuple(counts.shape)}, not {tuple(leading)}"
    assert ((counts >= 0) & (counts <= width)).all(), "counts outside [0, K]"
    live = live_slots(codes)
    assert (indices[~live] == -1).all(), "padding is not index -1"
    assert (values[~live] == 0).all(), "padding is not value 0"
    inside = (indices >= 0) & (indices < n_latents)
    assert inside[live].all(), "index outside [0, F)"
    ascending = indices[..., 1:] > indices[..., :-1]
    assert ascending[live[..., 1:]].all(), "indices of a row do not ascend"


def price_mask(
    codes: SparseCodes, W_dec: Tensor, b_dec: Tensor | None, x: Tensor, price: float | Tensor, passes: int
) -> Tensor:
    """Which slots `price_select` keeps, `[..., K]` bool: its rule, a row and a candidate at a time, in fp64."""
    kept = torch.zeros(codes.indices.shape, dtype=torch.bool, device="cpu")
    prices = torch.as_tensor(price, dtype=torch.float64).cpu().expand(codes.counts.shape)
    W, target = W_dec.double().cpu(), x.double().cpu() - (0 if b_dec is None else b_dec.double().cpu())
    for row in itertools.product(*map(range, codes.counts.shape)):
        count, limit, r = int(codes.counts[row]), float(prices[row]), target[row]
        values, indices = codes.values[row][:count].double().tolist(), codes.indices[row][:count].tolist()
        order = sorted(range(count), key=lambda j: (not math.isnan(values[j]), -values[j], indices[j], j))
        for j in order * passes:
            v, w = values[j], W[indices[j]]
            linear, quadratic = 2 * v * float(r @ w), v * v * float(w @ w)
            if kept[row][j]:
                moves = linear + quadratic < limit
            else:
                # Not `>`: NaN joins.
                moves = not linear - quadratic <= limit or limit == -math.inf
            if moves:
                r = r + (v if kept[row][j] else -v) * w
                kept[row][j] = ~kept[row][j]
    return kept.to(codes.indices.device)


def keep_slots(codes: SparseCodes, kept: Tensor) -> SparseCodes:
    """The slots of codes under `kept [..., K]`, in rows of the same width: indices ascend, and where one repeats, slots
    do."""
    order = torch.where(kept, codes.indices, MAX_LATENTS).argsort(dim=-1, stable=True)
    counts = kept.sum(-1, dtype=torch.int32)
    live = torch.arange(order.shape[-1], device=order.device) < counts.unsqueeze(-1)
    values, indices = codes.values.gather(-1, order), codes.indices.gather(-1, order)
    return SparseCodes(torch.where(live, values, 0), torch.where(live, indices, -1), counts)


def poison_padding(codes: SparseCodes) -> SparseCodes:
    """The same codes with NaN values and INT_MIN indices past the counts: whoever reads there is found out."""
    live = live_slots(codes)
    return SparseCodes(codes.values.where(live, math.nan), codes.indices.where(live, INT_MIN), codes.counts)


def adversarial_rows(
    d_sae: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Named rows `[d_sae]` of pre-activations on which selections have been known to fail.

    Ties, sorted rows, winners crowded into one block, differences near the resolution of fp32, nothing positive,
    signed zeros, NaN of both signs, infinities, the largest and the smallest numbers of the dtype.
    """
    generator = torch.Generator("cpu").manual_seed(d_sae)
    normal = torch.randn(d_sae, generator=generator, dtype=torch.float64, device="cpu")
    position = torch.arange(d_sae, dtype=torch.float64, device="cpu")
    info = torch.finfo(dtype)
    every = torch.randint(0, 7, (d_sae,), generator=generator, device="cpu")

    block = normal.clone()
    start = d_sae // 3
    block[start : start + max(1, d_sae // 16)] += 10
    specials = normal.clone()
    for remainder, special in enumerate((math.nan, -math.nan, math.inf, -math.inf)):
        specials[every == remainder] = special
    rows = {
        "normal": normal,
        "all-equal": torch.ones_like(normal),
        "ascending": position - d_sae // 4,
        "descending": d_sae - d_sae // 4 - position,
        "one-block": block,
        "near-ties": 1 + 1e-7 * torch.randint(0, 4, (d_sae,), generator=generator, device="cpu"),
        "few-levels": torch.randint(-2, 3, (d_sae,), generator=generator, device="cpu").double(),
        "all-negative": -normal.abs() - 1,
        "zeros": torch.where(every < 3, 0.0, -0.0),
        "specials": specials,
        "all-nan": torch.full_like(normal, math.nan),
        "largest": torch.full_like(normal, info.max).masked_fill(every > 4, math.inf),
        "denormal": (every - 2).double() * (info.smallest_normal * info.eps),
    }
    return {name: _rounded(row, dtype).to(device) for name, row in rows.items()}


def _rounded(row: Tensor, dtype: torch.dtype) -> Tensor:
    """`row.to(dtype)`, NaN with its sign: on some CPUs torch makes it positive when it rounds to 16 bits."""
    bits = row.to(dtype).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize])
    return torch.where(row.isnan() & row.signbit(), bits | torch.iinfo(bits.dtype).min, bits).view(dtype)


def random_codes(
    leading: tuple[int, ...],
    width: int,
    d_sae: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    integers: bool = False,
    by_hand: bool = False,
    seed: int = 0,
) -> SparseCodes:
    """Random codes `[*leading, width]` with counts from 0 to `min(width, d_sae)`.

    `integers` draws values from -3..3, so that sums are exact and any summation order gives the same bits. `by_hand`
    makes what a user might: unsorted rows that repeat indices, up to `width` of them.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    rows = math.prod(leading)
    if by_hand and d_sae:
        indices = torch.randint(0, d_sae, (rows, width), generator=generator, device="cpu")
        counts = torch.randint(0, width + 1, (rows,), generator=generator, device="cpu")
    else:
        counts = torch.randint(0, min(width, d_sae) + 1, (rows,), generator=generator, device="cpu")
        shuffled = torch.rand(rows, d_sae, generator=generator, device="cpu").argsort(-1)[:, :width]
        indices = torch.full((rows, width), d_sae, device="cpu")
        indices[:, : shuffled.shape[1]] = shuffled
        live = torch.arange(width, device="cpu") < counts.unsqueeze(-1)
        indices = indices.where(live, d_sae).sort(-1).values
    live = torch.arange(width, device="cpu") < counts.unsqueeze(-1)
    if integers:
        values = torch.randint(-3, 4, (rows, width), generator=generator, device="cpu").to(dtype)
    else:
        values = torch.randn(rows, width, generator=generator, dtype=torch.float64, device="cpu").to(dtype)
    return SparseCodes(
        values.where(live, 0).view(*leading, width).to(device),
        indices.where(live, -1).to(torch.int32).view(*leading, width).to(device),
        counts.to(torch.int32).view(leading).to(device),
    )
