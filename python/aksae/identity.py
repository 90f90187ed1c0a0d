"""Digests of content, which tell a thing from another of the same name, and the refusal of what differs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import UserError


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bits, whatever devices and strides they have."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        # Flat first: a tensor without dimensions cannot be viewed as bytes.
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def digest_of_file(path: Path) -> str:
    """SHA-256 of the bytes of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def digest_of_json(value: Any) -> str:
    """SHA-256 of what `value` is as JSON, with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def require_same(subject: str, had: Any, got: Mapping[str, Any], hint: str = "") -> None:
    """Raise UserError where `got` differs from `had`: it names `subject`, each entry that differs, and both its values.

    Args:
        subject: what is refused, the start of the message.
        had: entries by name as they were recorded; anything else than a mapping counts as an empty one.
        got: the entries as they are now; of `had`, only these are compared.
        hint: ends the message.
    """
    had = had if isinstance(had, Mapping) else {}
    other = [name for name, value in got.items() if had.get(name) != value]
    if other:
        values = ", ".join(f"{name} (had {_short(had.get(name))}, got {_short(got[name])})" for name in other)
        raise UserError(f"{subject} differs in {values}; needs the same{hint and f': {hint}'}")


def _short(value: Any) -> str:
    """Twelve hexadecimal digits of a digest tell it apart."""
    if value is None:
        return "none"
    text = str(value)
    return text[:12] if len(text) == 64 else text
