"""What the public functions of `ops.py` ask of their arguments: checks, casts, and leading dimensions made rows."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from .codes import MAX_LATENTS, SparseCodes, acc_dtype, as_int, describe, readable


def split_lead(name: str, tensor: Tensor) -> tuple[tuple[int, ...], int]:
    if tensor.ndim == 0:
        raise ValueError(f"{name} must have at least one dimension, got a 0-dimensional tensor")
    return tuple(tensor.shape[:-1]), tensor.shape[-1]


def as_rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors as autocast casts them, where it is on; None stays None."""
    first = tensors[0]
    if not isinstance(first, Tensor) or not autocasting(first.device):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)
    # Autocast leaves fp64 alone in torch's own products too.
    return tuple(t.to(dtype) if isinstance(t, Tensor) and _is_castable(t.dtype) else t for t in tensors)


def autocasting(device: torch.device) -> bool:
    # torch knows no autocast of the meta device, and raises.
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def _is_castable(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype != torch.float64


def wrong(name: str, value: object, needs: str) -> Exception:
    kind = ValueError if isinstance(value, Tensor) else TypeError
    return kind(f"{name} must be {needs}, got {describe(value)}")


def require_float(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {describe(tensor)}")


def require_shape(name: str, tensor: object, shape: tuple[int | None, ...], needs: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor {needs}, got {describe(tensor)}")
    fits = tensor.ndim == len(shape) and all(want is None or have == want for have, want in zip(tensor.shape, shape))
    if not fits:
        wanted = ["any" if size is None else int(size) for size in shape]
        raise ValueError(f"{name} must have shape {wanted}, {needs}, got {list(tensor.shape)}")


def require_decoder(W_dec: Tensor, b_dec: Tensor | None, name: str = "W_dec") -> None:
    require_shape(name, W_dec, (None, None), "[F, D]")
    if b_dec is not None:
        require_shape("b_dec", b_dec, (W_dec.shape[1],), f"[D], with D the columns of {name}")


def require_encoder(x: object, W_enc: object, b_enc: object) -> tuple[int, ...]:
    """Raise unless these are the operands of an encoder; the leading shape of `x`."""
    require_float("x", x)
    x = cast(Tensor, x)
    lead, d_in = split_lead("x", x)
    require_shape("W_enc", W_enc, (None, d_in), "[F, D], with D the last dimension of x")
    W_enc = cast(Tensor, W_enc)
    if b_enc is not None:
        require_shape("b_enc", b_enc, (W_enc.shape[0],), "[F], with F the rows of W_enc")
    require_alike(x=x, W_enc=W_enc, b_enc=cast("Tensor | None", b_enc))
    return lead


def threshold_of(threshold: object, latents: str, n_latents: int, **data: Tensor) -> Tensor:
    """A threshold, `[]` or `[F]`, for `data`, a tensor under its name; a number is kept in fp64, as it is."""
    ((name, tensor),) = data.items()
    if isinstance(threshold, Tensor):
        require_float("threshold", threshold)
        if threshold.ndim:
            require_shape("threshold", threshold, (n_latents,), f"[F], with {latents}, or []")
        if threshold.device != tensor.device or not autocasting(tensor.device):
            require_alike(**{name: tensor, "threshold": threshold})
        return threshold.detach()
    if isinstance(threshold, (int, float)) and not isinstance(threshold, bool):
        return torch.full((), float(threshold), dtype=torch.float64, device=tensor.device)
    raise TypeError(f"threshold must be a number or a floating tensor, got {type(threshold).__name__}")


def require_alike(**tensors: Tensor | None) -> None:
    """One device, and one floating dtype; indices only share the device."""
    (first_name, first), *others = ((name, tensor) for name, tensor in tensors.items() if tensor is not None)
    require_float(first_name, first)
    for name, tensor in others:
        if tensor.device != first.device:
            raise ValueError(f"{name} must be on the device of {first_name}, {first.device}; got {tensor.device}")
        if name != "indices" and tensor.dtype != first.dtype:
            raise TypeError(f"{name} must have the dtype of {first_name}, {first.dtype}; got {tensor.dtype}")


def require_codes(codes: object) -> None:
    if not isinstance(codes, SparseCodes):
        raise TypeError(f"codes must be SparseCodes, got {type(codes).__name__}")
    require_float("codes.values", codes.values)


def flat_codes(codes: SparseCodes, values: Tensor) -> tuple[tuple[int, ...], tuple[Tensor, Tensor, Tensor]]:
    """Leading shape and flattened tensors of codes, `values` standing in for `codes.values`."""
    _, indices, counts = codes
    lead, width = split_lead("codes.values", values)
    require_shape("codes.indices", indices, (*lead, width), "the shape of codes.values")
    require_shape("codes.counts", counts, lead, "the shape of codes.values without its last dimension")
    for name, tensor in (("codes.indices", indices), ("codes.counts", counts)):
        if tensor.dtype != torch.int32:
            raise TypeError(f"{name} must be int32, got {tensor.dtype}")
        if tensor.device != values.device:
            raise ValueError(f"{name} must be on the device of codes.values, {values.device}; got {tensor.device}")
    return lead, (as_rows(values), as_rows(indices), counts.reshape(-1))


def code_width(k_max: int | None, n_latents: int) -> int:
    if n_latents > MAX_LATENTS:
        raise ValueError(f"F must be at most {MAX_LATENTS}, since indices are int32; got {n_latents} latents")
    if k_max is None:
        return n_latents
    k_max = as_int("k_max", k_max)
    if k_max < 0:
        raise ValueError(f"k_max must not be negative, got {k_max}")
    return min(k_max, n_latents)


def rows_of_k(
    k: int | Tensor, k_max: int | None, lead: tuple[int, ...], n_latents: int, device: torch.device
) -> tuple[Tensor, int]:
    """Per-row k as int32 `[rows]`, clamped to `[0, width]`, and the width `min(k_max, F)`."""
    n_rows = math.prod(lead)
    if isinstance(k, Tensor):
        if k.dtype == torch.bool or k.is_floating_point() or k.is_complex():
            raise TypeError(f"k must be an int or an integer tensor, got {describe(k)}")
        require_shape("k", k, lead, "the leading shape of the data")
        if k.device != device:
            raise ValueError(f"k must be on the device of the data, {device}; got {k.device}")
        k = k.reshape(-1)
        if k.dtype == torch.uint64:
            # From 2^63 on the values would turn negative in int64.
            k = k.view(torch.int64)
            k = torch.where(k < 0, torch.iinfo(torch.int64).max, k)
        k = k.to(torch.int64)
        width = code_width(_largest(k) if k_max is None else k_max, n_latents)
        return k.clamp(0, width).to(torch.int32), width
    k = max(0, as_int("k", k))
    width = code_width(k if k_max is None else k_max, n_latents)
    return torch.full((n_rows,), min(k, width), dtype=torch.int32, device=device), width


def rows_of_price(price: float | Tensor, lead: tuple[int, ...], data: Tensor) -> Tensor:
    """A price for each row, `[rows]` in the dtype that sums of `data` are held in; NaN is refused where it is seen."""
    if isinstance(price, Tensor):
        require_float("price", price)
        if price.ndim:
            require_shape("price", price, lead, "[] or the leading shape of codes")
        if price.device != data.device:
            raise ValueError(f"price must be on the device of x, {data.device}; got {price.device}")
        is_nan = readable(price) and bool(price.isnan().any())
    elif isinstance(price, (int, float)) and not isinstance(price, bool):
        is_nan = price != price
        price = torch.full((), float(price), dtype=torch.float64, device=data.device)
    else:
        raise TypeError(f"price must be a number or a floating-point tensor, got {describe(price)}")
    if is_nan:
        raise ValueError("price must not be NaN")
    return price.detach().to(acc_dtype(data.dtype)).expand(lead).reshape(-1)


def _largest(k: Tensor) -> int:
    if not readable(k):
        raise ValueError(
            "k_max must be given when k is a tensor on an accelerator or the call is traced: "
            "reading its maximum would synchronise with the host"
        )
    return max(0, int(k.max())) if k.numel() else 0
