"""A cache of latent activations in delphi's file layout, made from sparse codes without ever holding them dense.

Imports nothing of delphi; its loader of eai-delphi 0.1.3 reads the files.
"""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from aksae_kernels import SparseCodes

from ..errors import UserError
from ..files import atomic_file, read_json, write_json

# delphi leaves out what is closer to 0.
_SMALLEST = 1e-5
_SPLIT = re.compile(r"\d+_\d+\.safetensors")
# What every delphi says of a cache, and no other file named config.json does.
_OF_A_CACHE = {"cache_ctx_len", "n_tokens", "n_splits", "model_name"}


class _Batch(NamedTuple):
    locations: np.ndarray
    """`[n, 3]` int32: sequence, position in it, latent; ascending."""
    activations: np.ndarray
    """`[n]` fp16."""


class LatentCache:
    """Which latents fire where, hook point by hook point: `add` batches, then `save`.

        cache = LatentCache({"layers.15": sae.encode}, d_sae)
        for tokens, activations in batches:
            cache.add(tokens, {"layers.15": activations})
        cache.save(folder, model_name="...")

    It keeps 14 bytes for every activation above 1e-5 in size, beside the tokens: memory goes as the number of
    activations, not as `d_sae`.

    Args:
        encoders: for each hook point a function from activations `[n, D]` to `SparseCodes`.
        d_sae: F, for all hook points or for each.
        latents: for each hook point the latents to keep; None keeps all, here and for a hook point not named.

    Raises:
        UserError: no encoder, a hook point whose folder would lie elsewhere, a `d_sae` that is no int from 1 up, or
            `d_sae` or `latents` of hook points that have none.
    """

    def __init__(
        self,
        encoders: Mapping[str, Callable[[Tensor], SparseCodes]],
        d_sae: int | Mapping[str, int],
        *,
        latents: Mapping[str, Tensor] | None = None,
    ):
        self.encoders = dict(encoders)
        if not self.encoders:
            raise UserError("encoders: got none, needs one for each hook point")
        for name in self.encoders:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise UserError(f"encoders: got the hook point {name!r}, needs a name that stays within a folder")
        self.d_sae = dict(d_sae) if isinstance(d_sae, Mapping) else dict.fromkeys(self.encoders, d_sae)
        self.latents = dict(latents or {})
        if self.d_sae.keys() != self.encoders.keys():
            raise UserError(f"d_sae: got {sorted(self.d_sae)}, needs the hook points {sorted(self.encoders)}")
        for name, size in self.d_sae.items():
            if not _is_int(size) or size < 1:
                raise UserError(f"d_sae: got {size!r}, needs an int from 1 up")
            self.d_sae[name] = operator.index(size)
        if not self.latents.keys() <= self.encoders.keys():
            raise UserError(f"latents: got {sorted(self.latents)}, needs some of {sorted(self.encoders)}")
        self._batches: dict[str, list[_Batch]] = {name: [] for name in self.encoders}
        self._tokens: list[np.ndarray] = []

    @torch.no_grad()
    def add(self, tokens: Tensor, activations: Mapping[str, Tensor]) -> None:
        """Encode a batch and keep what fires.

        Args:
            tokens: `[batch, seq]` integer; seq is that of the first batch, batch may differ.
            activations: for each hook point `[batch, seq, D]`, on any device.

        Raises:
            UserError: shapes or hook points that do not fit.
            IndexError: codes with an index outside `[0, d_sae)`.
        """
        self._check(tokens, activations)
        first, seq = sum(map(len, self._tokens)), tokens.shape[1]
        batches = {}
        for name, encode in self.encoders.items():
            codes = encode(activations[name].flatten(0, 1))
            batches[name] = _fired(codes, self.d_sae[name], first, seq, self.latents.get(name))
        # Only now, so that a batch that failed has left nothing behind.
        for name, batch in batches.items():
            self._batches[name].append(batch)
        # The caller may fill the same tensor again.
        self._tokens.append(tokens.cpu().numpy().copy())

    def save(
        self,
        folder: str | os.PathLike[str],
        *,
        model_name: str,
        n_splits: int = 5,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Write for each hook point a folder in `folder`, with `config.json` and files `START_END.safetensors`.

        A file holds the latents START to END (inclusive): `locations` `[n, 3]` (sequence, position, latent - START;
        uint16, or uint32 where one of them passes 65535), `activations` `[n]` fp16, infinite past 65504, and `tokens`
        `[batch, seq]`. A range without activations has an empty file. Files named START_END.safetensors of other
        ranges, left from an earlier save, are removed; no other file is.

        Args:
            model_name: whose activations these are; delphi loads its tokenizer by it.
            n_splits: files of a hook point, 1 to d_sae.
            config: further fields of delphi's `CacheConfig`, as `dataset_repo`, or others in place of those counted
                here (`batch_size`, `cache_ctx_len`, `n_tokens`, `n_splits`).

        Raises:
            UserError: nothing was added, `n_splits` is no int or out of range, or a `config.json` that is no cache's
                stands where one is to be written.
            OSError: the disk refuses; each file is replaced as a whole or not at all.
        """
        if not self._tokens:
            raise UserError("save: got no batch, needs at least one added before")
        if not _is_int(n_splits) or not 1 <= n_splits <= min(self.d_sae.values()):
            raise UserError(f"n_splits: got {n_splits!r}, needs 1 to d_sae = {min(self.d_sae.values())}")
        n_splits = operator.index(n_splits)
        for name in self.encoders:
            _refuse_others(Path(folder) / name / "config.json")
        tokens = np.concatenate(self._tokens)
        fields = {
            "dataset_repo": "",
            "dataset_split": "",
            "dataset_name": "",
            "dataset_column": "text",
            "batch_size": len(self._tokens[0]),
            "cache_ctx_len": tokens.shape[1],
            "n_tokens": tokens.size,
            "n_splits": n_splits,
            **(config or {}),
            "model_name": model_name,
        }
        for name, batches in self._batches.items():
            _write(Path(folder) / name, batches, tokens, self.d_sae[name], n_splits)
            write_json(Path(folder) / name / "config.json", fields)

    def _check(self, tokens: Tensor, activations: Mapping[str, Tensor]) -> None:
        if tokens.ndim != 2 or tokens.is_floating_point():
            raise UserError(f"tokens: got {tokens.dtype} {list(tokens.shape)}, needs integers [batch, seq]")
        if self._tokens and tokens.shape[1] != self._tokens[0].shape[1]:
            raise UserError(f"tokens: got {tokens.shape[1]} a sequence, needs the {self._tokens[0].shape[1]} of before")
        if activations.keys() != self.encoders.keys():
            raise UserError(f"activations: got {sorted(activations)}, needs the hook points {sorted(self.encoders)}")
        for name, tensor in activations.items():
            if tensor.ndim != 3 or tensor.shape[:2] != tokens.shape:
                raise UserError(
                    f"activations: got {list(tensor.shape)} for {name}, needs [{len(tokens)}, {tokens.shape[1]}, D]"
                )


def _is_int(value: object) -> bool:
    """Whether it is an integer, Python's or NumPy's."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _fired(codes: SparseCodes, d_sae: int, first: int, seq: int, latents: Tensor | None) -> _Batch:
    """What `codes [batch * seq, K]` say of the sequences from number `first` on."""
    # Wide enough for the sum of a latent that codes made by hand may repeat.
    values = codes.values.to(torch.promote_types(codes.values.dtype, torch.float32))
    coo = codes._replace(values=values).to_coo(d_sae)
    (token, latent), values = coo.indices(), coo.values()
    # NaN is kept: a diverged model must not look like a silent one.
    kept = ~(values.abs() <= _SMALLEST)
    if latents is not None:
        kept &= torch.isin(latent, latents.to(latent.device))
    token, latent, values = token[kept], latent[kept], values[kept]
    locations = torch.stack([token // seq + first, token % seq, latent], dim=1)
    return _Batch(locations.int().cpu().numpy(), values.half().cpu().numpy())


def _write(folder: Path, batches: list[_Batch], tokens: np.ndarray, d_sae: int, n_splits: int) -> None:
    from safetensors.numpy import save

    folder.mkdir(parents=True, exist_ok=True)
    files = []
    bounds = [split * d_sae // n_splits for split in range(n_splits + 1)]
    for start, stop in pairwise(bounds):
        locations, activations = [], []
        for batch in batches:
            inside = (batch.locations[:, 2] >= start) & (batch.locations[:, 2] < stop)
            locations.append(batch.locations[inside])
            activations.append(batch.activations[inside])
        within = np.concatenate(locations)
        within[:, 2] -= start
        small = within.max(initial=0) < 2**16
        data = {
            "locations": within.astype(np.uint16 if small else np.uint32),
            "activations": np.concatenate(activations),
            "tokens": tokens,
        }
        files.append(folder / f"{start}_{stop - 1}.safetensors")
        with atomic_file(files[-1]) as temporary:
            temporary.write_bytes(save(data))
    for old in set(folder.iterdir()).difference(files):
        # Another number of splits has other names, and the loader reads all that it finds.
        if _SPLIT.fullmatch(old.name):
            old.unlink()


def _refuse_others(config: Path) -> None:
    """UserError where `config` is there and does not describe a cache: the folder is somebody else's."""
    if config.exists():
        found = read_json(config)
        if not (isinstance(found, dict) and found.keys() >= _OF_A_CACHE):
            raise UserError(f"{config}: got a file that is no cache's, needs a folder of the cache's own")
