"""SparseCodes, the padded-row (ELL with counts) form in which latents travel, and its conversions."""

from __future__ import annotations

import math
import operator
from typing import Any, NamedTuple, SupportsIndex, cast

import torch
from torch import Tensor

MAX_LATENTS = 2**31 - 1
"""Indices are int32."""


class SparseCodes(NamedTuple):
    """Active latents of each row.

    Row `b` holds `counts[b]` pairs `(indices[b, j], values[b, j])`, `j < counts[b]`. Codes made by this library have
    ascending indices within a row, and value 0 and index -1 in the slots from `counts[b]` on. Codes made by hand may be
    unsorted and may repeat an index (repeats are summed). Slots from `counts[b]` on are never read.
    """

    values: Tensor
    """`[..., K]`, floating point; gradients flow through it."""
    indices: Tensor
    """`[..., K]` int32, in `[0, d_sae)`."""
    counts: Tensor
    """`[...]` int32, in `[0, K]`."""

    def to(self, *args: Any, **kwargs: Any) -> SparseCodes:
        """The codes on another device, of another dtype, or both: all that `torch.Tensor.to` takes.

        A dtype is that of the values; indices and counts stay int32. Carries the gradient of `values`. Raises
        TypeError for a dtype that is not floating.
        """
        values = self.values.to(*args, **kwargs)
        if not values.is_floating_point():
            raise TypeError(f"dtype must be floating, since it is that of the values; got {values.dtype}")
        # non_blocking and copy, which are the flags among the arguments.
        flags = [flag for flag in args if isinstance(flag, bool)]
        named = {name: kwargs[name] for name in ("non_blocking", "copy") if name in kwargs}
        indices, counts = (tensor.to(values.device, tensor.dtype, *flags, **named) for tensor in self[1:])
        return SparseCodes(values, indices, counts)

    def cpu(self) -> SparseCodes:
        """The codes on the CPU."""
        return self.to("cpu")

    def detach(self) -> SparseCodes:
        """The same codes, without the gradient of their values."""
        return self._replace(values=self.values.detach())

    def mask(self) -> Tensor:
        """`[..., K]` bool: True in the slots before a row's count, those that hold a latent."""
        return live_slots(self)

    def gather(self, dense: Tensor) -> Tensor:
        """What `dense` has at the latents of each row: `[..., K]`, 0 past the counts.

        `dense` is `[F]`, one number for each latent, or `[..., F]` with the leading shape of the codes; any dtype.
        Carries its gradient. Raises TypeError for what is no tensor, ValueError for another shape or device, IndexError
        on CPU for an index outside `[0, F)`; on an accelerator such an index is undefined behaviour.
        """
        lead = self.counts.shape
        if not isinstance(dense, Tensor):
            raise TypeError(f"dense must be a tensor [F] or [..., F], got {describe(dense)}")
        if dense.ndim == 0 or dense.shape[:-1] not in (lead, ()):
            either = "".join(f"{size}, " for size in lead)
            raise ValueError(f"dense must have shape [F] or [{either}F], got {list(dense.shape)}")
        if dense.device != self.indices.device:
            raise ValueError(f"dense must be on the device of the codes, {self.indices.device}; got {dense.device}")
        check_codes(self.indices, self.counts, dense.shape[-1])
        return gather_at(dense, self.indices, self.counts)

    @classmethod
    def from_dense(cls, dense: Tensor, k_max: int | None = None) -> SparseCodes:
        """The entries of `dense [..., F]` that are not 0, NaN and negative ones among them.

        Indices ascend. `k_max` is the width of the result; None means that of the longest row. Carries the gradient of
        those entries. Synchronises with the host, since how many there are is data. Raises TypeError for a dtype that
        is not floating, ValueError for a row of more than `k_max` entries.
        """
        if not isinstance(dense, Tensor) or not dense.is_floating_point() or dense.ndim == 0:
            raise TypeError(f"dense must be a floating-point tensor [..., F], got {describe(dense)}")
        rows = dense.reshape(math.prod(dense.shape[:-1]), dense.shape[-1])
        # In row-major order, so a row's entries lie together and ascend.
        row, latent = rows.nonzero(as_tuple=True)
        first = torch.searchsorted(row, torch.arange(len(rows) + 1, device=row.device))
        counts = first.diff()
        longest = int(counts.max()) if counts.numel() else 0
        width = longest if k_max is None else as_int("k_max", k_max)
        if width < longest:
            raise ValueError(f"k_max must be at least {longest}, the entries of a row that are not 0; got {width}")
        slot = torch.arange(len(row), device=row.device) - first[row]
        values = rows.new_zeros(len(rows), width).index_put((row, slot), rows[row, latent])
        indices = torch.full((len(rows), width), -1, dtype=torch.int32, device=rows.device)
        indices[row, slot] = latent.int()
        lead = dense.shape[:-1]
        return cls(values.view(*lead, width), indices.view(*lead, width), counts.int().view(lead))

    def to_dense(self, d_sae: int) -> Tensor:
        """The codes as a dense `[..., d_sae]` tensor; repeated indices are summed.

        Carries the gradient of `values`. Raises IndexError on CPU for an index outside `[0, d_sae)`; on an accelerator
        such an index is undefined behaviour.
        """
        d_sae = as_d_sae(d_sae)
        check_codes(self.indices, self.counts, d_sae)
        live = live_slots(self)
        dense = self.values.new_zeros(*self.counts.shape, d_sae)
        if self.indices.shape[-1] == 0 or d_sae == 0:
            return dense
        index = torch.where(live, self.indices, 0).long()
        return dense.scatter_add_(-1, index, torch.where(live, self.values, 0))

    def to_coo(self, d_sae: int) -> Tensor:
        """The codes as a coalesced `torch.sparse_coo_tensor` `[..., d_sae]`, columns ascending.

        Carries the gradient of `values`. Synchronises with the host, since the number of stored entries is data.
        Repeated indices are summed; NaN and explicit zero values stay stored. Raises IndexError on CPU for an index
        outside `[0, d_sae)`; on an accelerator such an index is undefined behaviour.
        """
        d_sae = as_d_sae(d_sae)
        check_codes(self.indices, self.counts, d_sae)
        live = live_slots(self)
        *rows, _ = live.nonzero(as_tuple=True)
        place = torch.stack([*rows, self.indices[live].long()])
        values, shape = self.values[live], (*self.counts.shape, d_sae)
        options: dict[str, Any] = {"device": values.device, "check_invariants": False}
        if bool(((self.indices[..., 1:] > self.indices[..., :-1]) | ~live[..., 1:]).all()):
            # As this library makes them: nothing is left to sort or to add up.
            return torch.sparse_coo_tensor(place, values, shape, is_coalesced=True, **options)
        sums = torch.sparse_coo_tensor(place, values.to(acc_dtype(values.dtype)), shape, **options).coalesce()
        return sums.to(values.dtype)

    def to_csr(self, d_sae: int) -> Tensor:
        """The codes as a `torch.sparse_csr_tensor` `[rows, d_sae]`, leading dimensions flattened, columns ascending.

        Synchronises with the host, since the number of stored entries is data. Repeated indices are summed; NaN and
        explicit zero values stay stored. No gradient flows.
        """
        rows, width = self.counts.numel(), self.indices.shape[-1]
        with torch.no_grad():
            values = self.values.reshape(rows, width).to(acc_dtype(self.values.dtype))
            flat = SparseCodes(values, self.indices.reshape(rows, width), self.counts.reshape(rows))
            return flat.to_coo(d_sae).to_sparse_csr().to(self.values.dtype)


# `torch.load` opens files that hold codes without being told to trust them.
torch.serialization.add_safe_globals([SparseCodes])


def live_slots(codes: SparseCodes) -> Tensor:
    """`[..., K]` bool: True where a slot lies before its row's count."""
    slot = torch.arange(codes.indices.shape[-1], device=codes.counts.device)
    return slot < codes.counts.unsqueeze(-1)


def gather_at(dense: Tensor, indices: Tensor, counts: Tensor) -> Tensor:
    """`SparseCodes.gather` of arguments that are known to fit; reads nothing on the host."""
    if dense.shape[-1] == 0:
        # Nothing is live; the sum of nothing is a 0 that backward finds its way from.
        return dense.sum().to(dense.dtype).expand(indices.shape).clone()
    live = live_slots(SparseCodes(indices, indices, counts))
    index = torch.where(live, indices, 0).long()
    return torch.where(live, dense[index] if dense.ndim == 1 else dense.gather(-1, index), 0)


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are held in: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def describe(value: object) -> str:
    """What a message says that it got."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r}"


def as_int(name: str, value: object) -> int:
    """The int that `operator.index` makes of `value`: an int, NumPy's, a 0-dimensional tensor that is free to read.

    Raises TypeError, which calls it `name`, for everything else, bool included.
    """
    if isinstance(value, Tensor):
        is_taken = value.dtype != torch.bool and readable(value)
    else:
        # By name: NumPy's bool is an index up to NumPy 2, with a warning, and torch.compile traces no dtype of NumPy's.
        is_taken = type(value).__name__ not in ("bool", "bool_")
    if not is_taken:
        raise TypeError(f"{name} must be an int, got {describe(value)}")
    if isinstance(value, (int, torch.SymInt)):
        return cast(int, value)
    try:
        return operator.index(cast(SupportsIndex, value))
    except TypeError:
        raise TypeError(f"{name} must be an int, got {describe(value)}") from None


def as_d_sae(d_sae: object) -> int:
    """`as_int` of a number of latents; raises ValueError for a negative one or one past int32."""
    d_sae = as_int("d_sae", d_sae)
    if not 0 <= d_sae <= MAX_LATENTS:
        raise ValueError(f"d_sae must not be negative and at most {MAX_LATENTS}, got {d_sae}")
    return d_sae


def readable(tensor: Tensor) -> bool:
    """Whether the host can read the tensor's data for free: it is on the CPU, and not traced."""
    traced = torch.compiler.is_compiling() or isinstance(tensor, torch._subclasses.FakeTensor)
    return tensor.device.type == "cpu" and not traced


def check_codes(indices: Tensor, counts: Tensor, d_sae: int) -> None:
    """`raise_for_codes` where reading the codes is free."""
    if readable(indices):
        raise_for_codes(indices, counts, d_sae)


def raise_for_codes(indices: Tensor, counts: Tensor, d_sae: int) -> None:
    """Raise ValueError for counts outside `[0, K]`, IndexError for live indices outside `[0, d_sae)`."""
    width = indices.shape[-1]
    bad_counts = counts[(counts < 0) | (counts > width)]
    if bad_counts.numel():
        raise ValueError(f"codes.counts must lie in [0, {width}], the width of the rows, got {int(bad_counts[0])}")
    live = live_slots(SparseCodes(indices, indices, counts))
    bad_indices = indices[live & ((indices < 0) | (indices >= d_sae))]
    if bad_indices.numel():
        raise IndexError(f"codes.indices must lie in [0, {d_sae}), got {int(bad_indices[0])}")
