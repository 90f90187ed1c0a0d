"""A language model's activations at the loss tokens of contexts, collected into folders shard by shard."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from .activations import LanguageModel
from .errors import UserError
from .files import check_space, dtype_name
from .identity import digest_of_json
from .reading import Activations, open_activations
from .sites import Site
from .store import check_shards, is_store, publish_shard, stored_info

if TYPE_CHECKING:
    from .text import ContextSet

StoredDtype = Literal["float32", "bfloat16", "float16"]


def collect(
    model: LanguageModel,
    contexts: ContextSet,
    folders: Mapping[Site, Path],
    *,
    batch_size: int,
    dtype: StoredDtype = "float32",
    shard_mb: float = 64,
    heldout: int | None = None,
    verify: bool = False,
    announce: Callable[[str], None] | None = None,
    progress: bool = True,
) -> dict[Site, Activations]:
    """Run the model once over all contexts and keep what it says at their loss tokens, a folder for each site.

    A row for each loss token, contexts in order, with its token and the number of its context: shards in safetensors,
    and `manifest.json`, which says of what model, site and contexts they are. A shard has its name when it is whole on
    the disk. So whatever cuts collecting off, Ctrl-C, a full disk or a killed process, the shards that were done stay,
    and the same call makes those that are missing; with none missing it opens the folder. Several processes may do so
    at once.

    Whether a folder fits is told from the model's identity (its weights' digest among others), the site, the tokens
    and the masks. Within a shard contexts are batched by length, longest first, and batches cut to their longest.

    Args:
        folders: of the sites; made, parents included.
        batch_size: contexts per forward, 1 or more.
        dtype: what is stored.
        shard_mb: size of a shard, of whole contexts; a folder goes on with that which it was begun with.
        heldout: the last so many contexts are held out, and the folder says so.
        verify: hold the shards that are there against their digests, which reads them.
        announce: is told how much disk and, after a first batch, how much time it will take.
        progress: show a bar with tokens per second on stderr.

    Raises:
        UserError: there is no context, or one without loss tokens; an activation is NaN or infinite, or too large for
            `dtype` (the context is named); the disk is too small; a folder holds something else, or activations of
            another model or other contexts; a shard is damaged.
    """
    if batch_size < 1:
        raise UserError(f"model.batch_size: got {batch_size}, needs 1 or more")
    if not 0 < shard_mb < float("inf"):
        raise UserError(f"shard_mb: got {shard_mb}, needs a number above 0")
    if not len(contexts):
        raise UserError("contexts: got none, needs at least one")
    counts = contexts.loss_mask.sum(1)
    if not counts.all():
        raise UserError(f"contexts: context {int(counts.argmin())} has no loss token, needs at least one")
    model.check_sites(folders)
    row_bytes = model.d_model * getattr(torch, dtype).itemsize
    cuts = _cuts(counts, max(1, int(shard_mb * 2**20) // row_bytes))
    stores = [
        _open_or_plan(model, contexts, site, Path(folder), dtype, counts, cuts, heldout, verify)
        for site, folder in folders.items()
    ]
    say = announce or (lambda line: None)
    missing = {store.folder: row_bytes * store.missing_rows for store in stores}
    check_space(*((f"activations of {store.site}", store.folder, missing[store.folder]) for store in stores))
    for store in stores:
        if not store.shards:
            continue
        rows = store.info["rows"]
        size = f"{rows:,} tokens x {model.d_model} in {dtype}, {rows * row_bytes / 1e6:,.1f} MB"
        there = f", of which {missing[store.folder] / 1e6:,.1f} MB are missing" if store.missing_rows < rows else ""
        say(f"{store.site}: {size}{there} in {store.folder}")
    work = _Work(model, contexts, batch_size, say, progress)
    # There is one plan for all, unless folders were begun at different times.
    for plan in dict.fromkeys(store.plan for store in stores if store.missing_rows):
        work.collect([store for store in stores if store.plan == plan])
    return {store.site: open_activations(store.folder) for store in stores}


@dataclass
class _Store:
    """A folder that is there, or is to be."""

    site: Site
    folder: Path
    info: dict[str, Any]
    """Its manifest; of version 0.1, its record."""

    @property
    def shards(self) -> list[dict[str, Any]]:
        return self.info.get("shards", [])

    @property
    def missing(self) -> list[int]:
        return [number for number, entry in enumerate(self.shards) if entry["sha256"] is None]

    @property
    def missing_rows(self) -> int:
        return sum(self.shards[number]["rows"] for number in self.missing)

    @property
    def plan(self) -> tuple[int, ...]:
        """Contexts of each shard."""
        return tuple(entry["contexts"] for entry in self.shards)


@dataclass
class _Work:
    """What is run to fill folders."""

    model: LanguageModel
    contexts: ContextSet
    batch_size: int
    say: Callable[[str], None]
    progress: bool
    counts: np.ndarray = field(init=False)
    lengths: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        attended = self.contexts.attention_mask
        self.counts = self.contexts.loss_mask.sum(1)
        # Up to the last token that is not padding.
        self.lengths = attended.shape[1] - attended[:, ::-1].argmax(1)

    def collect(self, stores: list[_Store]) -> None:
        """Make the shards that any of the stores, all of one plan, is without."""
        from tqdm import tqdm

        starts = np.concatenate([[0], np.cumsum(stores[0].plan)])
        numbers = sorted({number for store in stores for number in store.missing})
        shards = {number: np.arange(starts[number], starts[number + 1]) for number in numbers}
        total = int(sum(self.lengths[shard].sum() for shard in shards.values()))
        start = time.perf_counter()
        done = 0
        with tqdm(total=total, unit="tok", unit_scale=True, desc="activations", disable=not self.progress) as bar:
            for number, shard in shards.items():
                # Another process may have made it meanwhile.
                waiting = [store for store in stores if number in store.missing]
                if not waiting:
                    continue
                rows = {
                    store.site: torch.empty(int(self.counts[shard].sum()), self.model.d_model, dtype=_dtype(store))
                    for store in waiting
                }
                for batch in self._batches(shard):
                    self._run(batch, shard, rows)
                    if not done:
                        done = int(self.lengths[batch].sum())
                        seconds = (time.perf_counter() - start) * total / done
                        # Not into the line of the bar.
                        bar.clear()
                        self.say(f"about {seconds:,.0f} s for {total:,} tokens, by a first batch of {done:,}")
                    bar.update(int(self.lengths[batch].sum()))
                for store in waiting:
                    store.info = publish_shard(store.folder, store.info, number, self._beside(shard, rows[store.site]))

    def _batches(self, shard: np.ndarray) -> Iterator[np.ndarray]:
        """Contexts of a shard, longest first, so that padding costs little and too large a batch fails at once."""
        by_length = shard[np.argsort(-self.lengths[shard], kind="stable")]
        return iter(np.array_split(by_length, np.arange(self.batch_size, len(by_length), self.batch_size)))

    def _run(self, batch: np.ndarray, shard: np.ndarray, rows: dict[Site, Tensor]) -> None:
        """Put what the model says of the contexts of a batch into the rows of their shard."""
        first_row = np.concatenate([[0], self.counts[shard].cumsum()])
        cut = slice(self.lengths[batch].max())
        loss_mask = torch.from_numpy(self.contexts.loss_mask[batch, cut])
        read = self.model.read(
            self.contexts.input_ids[batch, cut], self.contexts.attention_mask[batch, cut], list(rows)
        )
        for site, hidden in read.items():
            of_contexts = hidden[loss_mask.to(hidden.device)].cpu().split(self.counts[batch].tolist())
            for context, values in zip(batch.tolist(), of_contexts, strict=True):
                begin = int(first_row[context - shard[0]])
                place = rows[site][begin : begin + len(values)]
                place.copy_(values)
                if not place.isfinite().all():
                    limit = f" that {dtype_name(place.dtype)} can hold" if values.isfinite().all() else ""
                    raise UserError(
                        f"activations: got NaN or infinity in context {context} ({self.model.described(site)}), needs "
                        f"numbers{limit}"
                    )

    def _beside(self, shard: np.ndarray, x: Tensor) -> dict[str, Tensor]:
        mask = self.contexts.loss_mask[shard]
        return {
            "x": x,
            "tokens": torch.from_numpy(self.contexts.input_ids[shard][mask].astype(np.int32)),
            "contexts": torch.from_numpy(np.repeat(shard, self.counts[shard]).astype(np.int32)),
        }


def _open_or_plan(
    model: LanguageModel,
    contexts: ContextSet,
    site: Site,
    folder: Path,
    dtype: StoredDtype,
    counts: np.ndarray,
    cuts: list[int],
    heldout: int | None,
    verify: bool,
) -> _Store:
    """The store of a site as it is, or as it will be."""
    identity = model.identity_at(site) | ({} if dtype == "float32" else {"stored dtype": dtype})
    key = _fingerprint(identity, contexts)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: got a file, needs a new or empty folder")
    if is_store(folder):
        info = stored_info(folder)
        if info.get("key") != key:
            had = info.get("identity", {})
            other = [name for name, value in identity.items() if name in had and had[name] != value]
            raise UserError(
                f"{folder}: got activations of another model or of other contexts (other: "
                f"{', '.join(other) or 'contexts'}), needs a new or empty folder"
            )
        return _Store(site, folder, check_shards(folder, info, verify=verify))
    if folder.exists() and not all(path.name.startswith(".") for path in folder.iterdir()):
        raise UserError(f"{folder}: got other files, needs a new or empty folder")
    info = {
        "format": "aksae activations 1",
        "model": str(model.name),
        "identity": identity,
        "key": key,
        "layer": site.layer,
        "site": site.hook,
        "dtype": dtype,
        "d_in": model.d_model,
        "rows": int(counts.sum()),
        "contexts": len(counts),
        "heldout_rows": None if heldout is None else int(counts[len(counts) - heldout :].sum()),
        "shards": [
            {
                "file": f"shard-{number:05d}.safetensors",
                "rows": int(counts[start:stop].sum()),
                "contexts": stop - start,
                "sha256": None,
            }
            for number, (start, stop) in enumerate(pairwise(cuts))
        ],
    }
    return _Store(site, folder, info)


def _cuts(counts: np.ndarray, rows: int) -> list[int]:
    """Where contexts are cut into shards of about so many rows, 0 and their number included."""
    ends = counts.cumsum()
    shard = (ends - 1) // rows
    return [0, *(np.flatnonzero(np.diff(shard)) + 1).tolist(), len(counts)]


def _fingerprint(identity: dict[str, Any], contexts: ContextSet) -> str:
    digest = hashlib.sha256(digest_of_json(identity).encode())
    for array in (contexts.input_ids, contexts.attention_mask, contexts.loss_mask):
        digest.update(str(array.shape).encode())
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def _dtype(store: _Store) -> torch.dtype:
    return getattr(torch, store.info["dtype"])
