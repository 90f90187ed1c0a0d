"""The price at which latents make up a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .codes import SparseCodes, acc_dtype
from .ops import price_select


def candidates_of(budget: float) -> int:
    """How many latents a row chooses from, where nobody says: 4 budgets, and at least 256.

    More lower the error by little, at a cost that is proportional. Of a small budget 4 times as many are few: what a
    row lacks most is then often not among them.
    """
    return max(math.ceil(4 * budget), 256)


@torch.no_grad()
def price_for(
    parts: Sequence[tuple[SparseCodes, Tensor]],
    W_dec: Tensor,
    b_dec: Tensor | None,
    budget: float | Tensor,
    passes: int = 1,
) -> Tensor:
    """The price at which rows keep `budget` of their candidates in the mean, by `price_select`.

    Found by bisection over nine decades below the largest squared error of a row, on the device, without synchronising.
    Where even free latents do not make up the budget, it is the lowest of these prices.

    Args:
        parts: candidates `[..., K]` and what they reconstruct, `[..., D]`; as many as fit into memory.
        W_dec, b_dec, passes: as in `price_select`.
        budget: mean number of latents of a row; a number, or a tensor `[]`.

    Returns:
        `[]`, in fp64 for fp64, else in fp32.

    Raises:
        ValueError: no rows.
        IndexError, TypeError, ValueError: as `price_select`.
    """
    targets = [wanted if b_dec is None else wanted - b_dec for _, wanted in parts if wanted.numel()]
    if not targets:
        raise ValueError("parts must have at least one row to find a price, got none")
    norms = [torch.linalg.vector_norm(target, dim=-1).amax() for target in targets]
    n_rows = sum(codes.counts.numel() for codes, _ in parts)

    def n_kept(price: Tensor) -> Tensor:
        kept = [price_select(codes, W_dec, b_dec, wanted, price=price, passes=passes) for codes, wanted in parts]
        return torch.stack([codes.counts.sum() for codes in kept]).sum()

    return lowest_price(n_kept, budget * n_rows, torch.stack(norms).amax().to(acc_dtype(W_dec.dtype)).square())


def lowest_price(n_kept: Callable[[Tensor], Tensor], at_most: float | Tensor, highest: Tensor) -> Tensor:
    """The lowest price `[]`, to a millionth, at which `n_kept(price)`, which falls with it, is no more than `at_most`.

    Found by bisection over nine decades below `highest []`, on the device, without synchronising.
    """
    high = highest.log()
    low = high - 9 * math.log(10)
    for _ in range(32):
        middle = (low + high) / 2
        is_low = n_kept(middle.exp()) > at_most
        low, high = torch.where(is_low, middle, low), torch.where(is_low, high, middle)
    return high.exp()
