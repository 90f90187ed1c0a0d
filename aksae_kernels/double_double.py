"""Arithmetic with twice the digits of fp64, for oracles that judge what is computed in fp64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_BITS = 53
"""Of the significand of fp64."""


class DoubleDouble:
    """The unevaluated sum `high + low` of two fp64 tensors, where `low` is at most half an ulp of `high`.

    Sums, products and matrix products carry some 100 bits, on every CPU and with every BLAS: additions and elementwise
    products use the error-free transformations of Knuth and Dekker, matrix products Ozaki's splitting. Where a result
    is NaN or infinite, `high` is what fp64 gives, and `low` is 0.

    The other operand of an operator may be a tensor of any real dtype, taken as it is, or a number. Factors must be
    below 2^900 and products above 2^-900 in magnitude, or digits are lost. No gradient flows.
    """

    def __init__(self, high: Tensor, low: Tensor | None = None):
        self.high = high.detach().double()
        self.low = torch.zeros_like(self.high) if low is None else low

    @classmethod
    def of(cls, value: DoubleDouble | Tensor | float) -> DoubleDouble:
        """The value itself if it is one, else a `high` without a `low`."""
        if isinstance(value, DoubleDouble):
            return value
        return cls(value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64, device="cpu"))

    def round(self) -> Tensor:
        """The nearest fp64 tensor."""
        return self.high

    @property
    def shape(self) -> torch.Size:
        return self.high.shape

    def map(self, rearrange: Callable[[Tensor], Tensor]) -> DoubleDouble:
        """Both parts through `rearrange`, a function that selects or moves entries, or changes signs."""
        return DoubleDouble(rearrange(self.high), rearrange(self.low))

    @property
    def T(self) -> DoubleDouble:
        return self.map(lambda part: part.T)

    def __getitem__(self, index: object) -> DoubleDouble:
        return self.map(lambda part: part[index])

    def gather(self, dim: int, index: Tensor) -> DoubleDouble:
        return self.map(lambda part: part.gather(dim, index))

    def where(self, condition: Tensor, other: float) -> DoubleDouble:
        """Itself where the condition holds, else the number `other`."""
        return DoubleDouble(self.high.where(condition, other), self.low.where(condition, 0))

    def __neg__(self) -> DoubleDouble:
        return self.map(torch.neg)

    def __add__(self, other: DoubleDouble | Tensor | float) -> DoubleDouble:
        other = DoubleDouble.of(other)
        high, error = _two_sum(self.high, other.high)
        low, error_of_low = _two_sum(self.low, other.low)
        high, error = _two_sum(high, error + low)
        return DoubleDouble(*_two_sum(high, error + error_of_low))

    def __sub__(self, other: DoubleDouble | Tensor | float) -> DoubleDouble:
        return self + -DoubleDouble.of(other)

    def __mul__(self, other: DoubleDouble | Tensor | float) -> DoubleDouble:
        other = DoubleDouble.of(other)
        high, error = _two_product(self.high, other.high)
        return DoubleDouble(*_two_sum(high, error + _finite(self.high * other.low + self.low * other.high)))

    __radd__, __rmul__ = __add__, __mul__

    def square(self) -> DoubleDouble:
        return self * self

    def __matmul__(self, other: DoubleDouble | Tensor) -> DoubleDouble:
        """The matrix product; both have at least two dimensions.

        Both operands become sums of slices whose rows (columns, of the right one) are short integers times a power of
        two. Of two slices, fp64 holds every sum of products, so that their matrix product is exact in whatever order a
        BLAS adds. Only the sum of these products is rounded.
        """
        other = DoubleDouble.of(other)
        bits = (_BITS - max(0, self.shape[-1] - 1).bit_length()) // 2
        plain = self.high @ other.high
        high, low = torch.zeros_like(plain), torch.zeros_like(plain)
        right = other.map(lambda part: part.mT)._slices(bits)
        for rows in self._slices(bits):
            for columns in right:
                high, error = _two_sum(high, rows @ columns.mT)
                low += error
        high, low = _two_sum(high, low)
        finite = plain.isfinite()
        return DoubleDouble(high.where(finite, plain), low.where(finite, 0))

    def sum(self, dim: int) -> DoubleDouble:
        """The sum over a dimension."""
        rows = self.map(lambda part: part.movedim(dim, -1).unsqueeze(-2))
        return (rows @ rows.high.new_ones(rows.shape[-1], 1)).map(lambda part: part[..., 0, 0])

    def _slices(self, bits: int) -> list[Tensor]:
        """Tensors whose sum is this one; a row of each is integers up to 2^bits times one power of two.

        NaN and infinities are left out.
        """
        slices = []
        for part in (self.high, self.low):
            rest = _finite(part)
            while rest.any():
                largest = rest.abs().amax(-1, keepdim=True)
                significand = largest.frexp().mantissa
                power_of_two = largest / significand.where(largest > 0, 1)
                # The last bit of this constant is the unit of the slice: adding it rounds to integers of that unit.
                shift = power_of_two * (1.5 * 2.0 ** (_BITS - 1 - bits))
                slices.append((rest + shift) - shift)
                rest = rest - slices[-1]
        return slices


def _finite(tensor: Tensor) -> Tensor:
    """The tensor with 0 for NaN and infinities."""
    return tensor.where(tensor.isfinite(), 0)


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """`a + b` in fp64, and what that rounds away (Knuth)."""
    total = a + b
    b_rounded = total - a
    return total, _finite((a - (total - b_rounded)) + (b - b_rounded))


def _two_product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """`a * b` elementwise in fp64, and what that rounds away (Dekker)."""
    product = a * b
    (a_high, a_low), (b_high, b_low) = _halves(a), _halves(b)
    error = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    return product, _finite(error)


def _halves(a: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors of at most 26 bits each whose sum is `a` (Veltkamp)."""
    scaled = a * (2.0**27 + 1)
    high = scaled - (scaled - a)
    return high, a - high
