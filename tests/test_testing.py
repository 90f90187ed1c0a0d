"""The judges themselves: the total order on other devices."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from aksae_kernels import SparseCodes, reference
from aksae_kernels.testing import adversarial_rows, check_codes, codes_from_mask, topk_mask

# ------------------------------------------------------------------------------- the order of sorts on CUDA


class CudaSort(TorchDispatchMode):
    """Sorts order NaN by its sign, as CUDA's do: the positive above +inf, the negative below -inf.

    `torch.topk` is left alone: on both devices it takes every NaN for the largest.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.overloadpacket is torch.ops.aten.sort and args[0].is_floating_point():
            bits = args[0].double().view(torch.int64)
            key = torch.where(bits < 0, -(bits & 0x7FFF_FFFF_FFFF_FFFF), bits)
            dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
            index = func(key, *args[1:], **kwargs)[1]
            return args[0].gather(dim, index), index
        return func(*args, **kwargs)


def ranked(row: list[float]) -> list[int]:
    """The indices of the selectable entries, best first, by the words of the contract."""
    selectable = [i for i, value in enumerate(row) if value > 0 or math.isnan(value)]
    return sorted(selectable, key=lambda i: (not math.isnan(row[i]), -row[i] if row[i] > 0 else 0, i))


def selected(codes: SparseCodes) -> list[list[int]]:
    return [row[:count] for row, count in zip(codes.indices.tolist(), codes.counts.tolist(), strict=True)]


def test_the_emulated_sort_is_cudas():
    values = torch.tensor([1.0, -math.nan, math.nan, -math.inf])
    with CudaSort():
        assert values.argsort(descending=True, stable=True).tolist() == [2, 0, 3, 1]
        assert torch.sort(values).indices.tolist() == [1, 3, 0, 2]
    assert set(values.argsort(descending=True, stable=True)[:2].tolist()) == {1, 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["specials", "all-nan", "zeros", "denormal", "few-levels", "largest"])
def test_nan_of_either_sign_ranks_first_whatever_the_sort(name, dtype):
    """The oracle of the selections, and the backend that runs on any device."""
    row = adversarial_rows(203, dtype=dtype)[name]
    rows = torch.stack([row, -row, row.flip(0)])
    if name == "specials":
        assert (rows.isnan() & rows.signbit()).any()
    best = [ranked(values) for values in rows.double().tolist()]
    flat = ranked(rows.double().flatten().tolist())
    with CudaSort():
        for k in (1, 7, 60, 203):
            expected = [sorted(indices[:k]) for indices in best]
            assert [mask.nonzero().flatten().tolist() for mask in topk_mask(rows, k)] == expected
            assert selected(codes_from_mask(rows, topk_mask(rows, k), 203)) == expected
            per_row = torch.full((3,), k)
            codes = reference.topk_select(rows, per_row, k)
            assert selected(codes) == expected
            check_codes(codes, rows, per_row, k)
            scored = torch.eye(203, dtype=dtype)
            if not rows.isnan().any() and not rows.isinf().any():
                assert selected(reference.topk_encode(rows, scored, None, per_row, k)) == expected
            batch = reference.batch_topk_select(rows, k, 203)
            of_batch = sorted(203 * b + f for b, indices in enumerate(selected(batch)) for f in indices)
            assert of_batch == sorted(flat[:k])
        above = reference.threshold_select(rows, torch.tensor(0.5, dtype=torch.float64), 203)
        limit = lambda value: math.isnan(value) or value > 0.5
        assert selected(above) == [[i for i, v in enumerate(values) if limit(v)] for values in rows.double().tolist()]
