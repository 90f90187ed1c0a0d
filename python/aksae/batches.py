"""What a training loop is given: any iterable of activations, read once or again and again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checkpoints import rng_state, set_rng_state
from .config import SAEConfig
from .errors import UserError


@dataclass(frozen=True)
class Batch:
    """Rows to train on, and what may come with them."""

    x: Tensor
    """`[B, D]`."""
    target: Tensor | None = None
    """`[B, D_out]`, what a transcoder reconstructs."""
    probed: Tensor | None = None
    """`[n, D]`, what AdaptiveK's probe reads of each context in the batch; without it, or where it gives each token a k
    of its own, it reads the rows."""
    place: Tensor | None = None
    """`[B]`, the context of each row as an index into `probed`."""
    scores: Tensor | None = None
    """`[n]`, the complexity score of each context, or `[B]`, of each row."""
    k: Tensor | None = None
    """`[B]` integers, a k for each row; at most the width of the SAE's codes counts."""
    contexts: Tensor | None = None
    """`[n]` numbers of the contexts, for messages; on the CPU."""

    @classmethod
    def of(cls, item: Any, number: int) -> Batch:
        """Batch `number` as an iterable gave it: a tensor, a pair `(x, target)`, or a mapping of these fields.

        Raises UserError for anything else.
        """
        name = f"batch {number}"
        if isinstance(item, Batch):
            batch = item
        elif isinstance(item, Tensor):
            batch = cls(item)
        elif isinstance(item, Mapping):
            fields = cls.__dataclass_fields__
            if unknown := sorted(set(item) - set(fields)):
                raise UserError(f"{name}: got the field {unknown[0]}, needs {', '.join(fields)}")
            if "x" not in item:
                raise UserError(f"{name}: got no field x, needs one")
            batch = cls(**item)
        elif isinstance(item, (tuple, list)) and len(item) == 2:
            batch = cls(*item)
        else:
            raise UserError(f"{name}: got {type(item).__name__}, needs a tensor, a pair (x, target) or a mapping")
        for field, value in (("x", batch.x), ("target", batch.target)):
            if value is not None and (
                not isinstance(value, Tensor) or value.ndim != 2 or not value.is_floating_point()
            ):
                got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise UserError(f"{name}: {field}: got {got}, needs a floating tensor [B, D]")
        if len(batch.x) == 0:
            raise UserError(f"{name}: x: got no rows, needs at least one")
        if batch.target is not None and len(batch.target) != len(batch.x):
            raise UserError(f"{name}: target: got {len(batch.target)} rows, needs {len(batch.x)}, those of x")
        k = batch.k
        if k is not None and (k.shape != batch.x.shape[:1] or k.is_floating_point() or k.dtype == torch.bool):
            raise UserError(
                f"{name}: k: got {k.dtype} {list(k.shape)}, needs integers [{len(batch.x)}], one for each row"
            )
        return batch

    def check_widths(self, config: SAEConfig, number: int) -> None:
        """Raise UserError where batch `number` has another width than an SAE of that config reads or reconstructs."""
        for field, value, name in (("x", self.x, "d_in"), ("target", self.target, "d_out")):
            width = config.d_in if field == "x" else config.width_out
            if value is not None and value.shape[-1] != width:
                raise UserError(
                    f"batch {number}: {field}: got width {value.shape[-1]}, needs {width}, the SAE's {name}"
                )

    def to(self, device: torch.device, dtype: torch.dtype) -> Batch:
        """The same on a device, activations in a dtype."""

        def moved(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return to_device(value, device, dtype if value.is_floating_point() else value.dtype)

        fields = {name: moved(getattr(self, name)) for name in self.__dataclass_fields__ if name != "contexts"}
        return Batch(**fields, contexts=self.contexts)

    def named(self, rows: Tensor) -> str:
        """The rows `[n]`, in words: by their contexts, where those are known."""
        if self.contexts is None or self.place is None:
            return listed("row", rows.cpu())
        return listed("context", self.contexts[self.place[rows].cpu()])


def to_device(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """`tensor` on a device, in a dtype or its own; to a GPU from pinned memory, so that the host does not wait."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, dtype or tensor.dtype, non_blocking=True)


def broken_rows(x: Tensor) -> Tensor:
    """Which of the rows `x [B, D]` hold a NaN or an infinity: `[n]`, ascending. Waits for an accelerator."""
    # A sum is finite only if all its terms are, and costs a third of looking at each. It may overflow although they
    # are, so 16-bit numbers are summed in fp32, and rows whose sum is not finite are looked at.
    suspected = (~x.sum(-1, dtype=torch.promote_types(x.dtype, torch.float32)).isfinite()).nonzero().squeeze(1)
    return suspected[~x[suspected].isfinite().all(-1)]


def listed(what: str, numbers: Tensor) -> str:
    """`context 3`, `contexts 3, 5`, at most five of them."""
    distinct = numbers.unique().tolist()
    shown = ", ".join(map(str, distinct[:5])) + (", ..." if len(distinct) > 5 else "")
    return f"{what}{'s' if len(distinct) > 1 else ''} {shown}"


class BatchStream:
    """Batches without end, and where it stands, so that a run can go on where it was cut off.

    `source` is iterated; at its end it is iterated again. One with `state_dict` and `load_state_dict` is asked for its
    position, and put back to it. Any other is read again: its earlier passes, and the batches that were taken of this
    one, are dropped. The random generators (torch's, NumPy's, Python's) are set back to the start of the first pass and
    of this one for it, so a DataLoader that shuffles gives the same order again.

    Raises UserError for a source that ends and cannot be iterated again, or has no batch at all.
    """

    def __init__(self, source: Iterable[Any]):
        self.source, self.taken = source, 0
        self._iterator: Iterator[Any] | None = None
        self._passes, self._in_pass = 0, 0
        # The states of the generators at the start of the first pass and of this one.
        self._rng: list[dict[str, Any]] = []

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._begin()
        assert self._iterator is not None
        try:
            item = next(self._iterator)
        except StopIteration:
            if self._in_pass == 0:
                raise UserError("batches: got none, needs at least one") from None
            self._begin()
            return next(self)
        batch = Batch.of(item, self.taken)
        self.taken += 1
        self._in_pass += 1
        return batch

    def _begin(self) -> None:
        """A new pass."""
        rng, iterator = rng_state(), iter(self.source)
        if iterator is self._iterator:
            raise UserError(
                f"batches: ended after {self.taken} batches, needs more steps' worth of them, or an iterable that can "
                "be iterated again (a list, a DataLoader), not a generator"
            )
        self._rng = [*self._rng[:1], rng]
        self._passes += self._in_pass > 0
        self._iterator, self._in_pass = iterator, 0

    def state_dict(self) -> dict[str, Any]:
        inner = self.source.state_dict() if hasattr(self.source, "state_dict") else None
        counts = {"taken": self.taken, "passes": self._passes, "in_pass": self._in_pass}
        return {**counts, "source": inner, "rng": self._rng if inner is None else []}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put the source back; the generators are left as reading it left them."""
        if state["source"] is not None and hasattr(self.source, "load_state_dict"):
            self.source.load_state_dict(state["source"])
            self._iterator = iter(self.source)
        elif state["taken"]:
            set_rng_state(state["rng"][0])
            for _ in range(state["passes"]):
                for _ in self.source:
                    pass
            set_rng_state(state["rng"][-1])
            self._iterator = iter(self.source)
            for number in range(state["in_pass"]):
                if next(self._iterator, None) is None:
                    raise UserError(
                        f"batches: ended after {number} batches of a pass, needs at least the {state['in_pass']} that "
                        "the run which is to go on had taken of it"
                    )
        self.taken, self._passes, self._in_pass = state["taken"], state["passes"], state["in_pass"]
        self._rng = state["rng"]
