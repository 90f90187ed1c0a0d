"""One training loop for every SAE."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .activations import resolve_device
from .batches import Batch, BatchStream, broken_rows
from .callbacks import Callback, JsonLines
from .checkpoints import LOG, checkpoints, claim, read_state, rng_state, set_rng_state, write_checkpoint
from .config import FitConfig, validate_fit
from .distributed import (
    from_rank_0,
    gathered_objects,
    global_max,
    global_sum,
    join_process_group,
    on_rank_0,
    own_device,
    rank,
    world_size,
)
from .errors import UserError
from .files import check_pickle
from .learner import Learner
from .losses import SAELoss
from .sae import SAE

__all__ = ["FitConfig", "FitResult", "fit"]


@dataclass
class FitResult:
    """A finished run."""

    saes: list[SAE]
    records: list[dict[str, Any]]
    """The last record of the log, of each SAE; after a resumed run without a step left, that of the checkpoint."""
    steps: int
    """Steps done, fewer than asked for where a callback stopped the run."""

    @property
    def sae(self) -> SAE:
        return self.saes[0]

    @property
    def record(self) -> dict[str, Any]:
        """The last record of the log."""
        return self.records[0]


def fit(
    sae: SAE | Sequence[SAE],
    batches: Iterable[Any],
    config: FitConfig,
    callbacks: Sequence[Callback] = (),
) -> FitResult:
    """Train an SAE, or several on one pass over the batches, in place.

    Args:
        sae: where it stands after `SAE(config)`, or anywhere else. A run starts by `SAE.start` on its first batch.
        batches: iterable of activations `[B, D]`, pairs `(x, target)` for a transcoder, or mappings or `Batch`es with
            a k, contexts or scores beside them. B may change from batch to batch; device and dtype may be any. At its
            end it is iterated again.
        config: see `FitConfig`.
        callbacks: see `aksae.callbacks`; with an output folder the log is always written there.

    Under `torchrun` every process gets batches of its own, and the SAE that of rank 0: gradients, losses and dead
    latents are those of all of them together; rank 0 writes, into a folder that all can read.

    A run that is killed at any moment and resumed with the same arguments ends with the same bits as one that was not.
    A run that is interrupted (Ctrl-C) leaves its last checkpoint.

    Raises:
        UserError: a setting or a batch is bad, the output folder cannot be written or holds another run, batches end
            and cannot be iterated again, what is resumed was another run, or activations or the loss become NaN (looked
            for at every step on the CPU, at log steps and checkpoints elsewhere).
        OSError: the disk refuses a checkpoint. Checkpoints written before that stay, in this as in every case.
    """
    saes = [sae] if isinstance(sae, SAE) else list(sae)
    validate_fit(config)
    _check(config, saes)
    device = own_device(resolve_device(config.device) if config.device else saes[0].W_dec.device)
    join_process_group(device)
    return Run(saes, batches, config, callbacks, device).run()


class Run:
    """One call of `fit`, as its callbacks see it."""

    def __init__(
        self,
        saes: Sequence[SAE],
        batches: Iterable[Any],
        config: FitConfig,
        callbacks: Sequence[Callback],
        device: torch.device,
    ):
        self.config, self.device, self.callbacks = config, device, list(callbacks)
        self.step, self.rows = 0, 0
        """Steps done, and rows that this process has read for them."""
        self.waited = 0.0
        """Seconds that steps have waited for their batches."""
        self.stopped = False
        """Set it to end the run."""
        self.look = False
        """Whether the step at hand looks for NaN, for which it waits for the device."""
        self.folder = config.output or config.resume
        self.stream = BatchStream(batches)
        self.learners = [Learner(sae, config, device) for sae in saes]
        if self.folder is not None and not any(isinstance(callback, JsonLines) for callback in callbacks):
            self.callbacks.append(JsonLines(self.folder / LOG))
        if rank() > 0:
            self.callbacks = [callback for callback in self.callbacks if not callback.rank_0_only]

    def run(self) -> FitResult:
        if (folder := self.folder) is not None:
            goes_on = self.config.resume is not None and folder.resolve() == self.config.resume.resolve()
            on_rank_0(lambda: claim(folder, resume=goes_on, overwrite=self.config.overwrite))
        rng = self.resume()
        for callback in self.callbacks:
            callback.on_start(self, rng is not None)
            check_pickle(callback.state_dict(), f"{type(callback).__name__}.state_dict")
        if rng is not None:
            set_rng_state(rng)
        try:
            self.train()
        finally:
            for callback in self.callbacks:
                callback.on_end(self)
        for learner in self.learners:
            learner.finish()
        if folder is not None:
            on_rank_0(lambda: self.write_saes(folder))
        records = [learner.record for learner in self.learners]
        return FitResult([learner.sae for learner in self.learners], records, self.step)

    def train(self) -> None:
        config, clock = self.config, _Clock(self.rows * world_size())
        ended = self.ends(together=True)
        while self.step < config.steps and not ended:
            group = [self.read() for _ in range(config.accumulate)]
            if self.step == 0:
                for learner in self.learners:
                    learner.start(group)
            last = self.step == config.steps - 1
            logged = last or self.step % config.log_every == 0
            saved = last or (self.step + 1) % config.checkpoint_every == 0
            self.look = logged or saved or self.device.type == "cpu"
            losses = [learner.update(group, self.step, self.look) for learner in self.learners]
            self.step += 1
            self.rows += sum(len(batch.x) for batch in group)
            for callback in self.callbacks:
                callback.on_step(self, group)
            if logged:
                self.log(losses, group[-1], clock)
            ended = self.ends(together=logged)
            if saved or ended:
                self.save()

    def ends(self, *, together: bool) -> bool:
        """Whether a callback has stopped the run. Several processes stop `together`, at steps where the host waits in
        any case."""
        if world_size() == 1:
            return self.stopped
        return together and bool(self.over_all(global_max, self.stopped))

    def read(self) -> Batch:
        number, start = self.stream.taken, time.perf_counter()
        batch = next(self.stream)
        self.waited += time.perf_counter() - start
        for learner in self.learners:
            batch.check_widths(learner.sae.config, number)
        batch = batch.to(self.device, self.learners[0].sae.W_dec.dtype)
        # Also where the source has looked: in the dtype of the weights a number may have become infinite.
        if self.device.type == "cpu" and len(broken := broken_rows(batch.x)):
            raise UserError(
                f"activations: got NaN or infinity in {batch.named(broken)} of batch {number}, needs numbers"
            )
        return batch

    def log(self, losses: list[SAELoss], batch: Batch, clock: _Clock) -> None:
        rows = int(self.over_all(global_sum, self.rows))
        times = clock.since(rows, self.waited)
        for number, (learner, loss) in enumerate(zip(self.learners, losses)):
            name = {} if len(self.learners) == 1 else {"sae": number}
            terms = learner.terms(loss, batch)
            learner.record = {**name, "step": self.step - 1, "rows": rows, **terms, **times}
            for callback in self.callbacks:
                callback.on_log(self, learner.record)

    def over_all(self, reduce: Callable[[Tensor], Tensor], number: int) -> Tensor:
        """A number of this process, reduced over all."""
        return reduce(torch.tensor(int(number), device=self.device))

    def save(self) -> None:
        """Write a checkpoint, on rank 0."""
        if (folder := self.folder) is None:
            return
        for callback in self.callbacks:
            check_pickle(callback.state_dict(), f"{type(callback).__name__}.state_dict")
        batches = self.stream.state_dict()
        check_pickle(batches["source"], "batches.state_dict")
        # What every process has of its own.
        processes = gathered_objects(
            {
                "batches": batches,
                "rows": self.rows,
                "callbacks": [[type(callback).__name__, callback.state_dict()] for callback in self.callbacks],
                "rng": rng_state(),
                "recent": [learner.recent_rows() for learner in self.learners],
            }
        )
        learners = [learner.state_dict() for learner in self.learners]
        state = {"step": self.step, "learners": learners, "processes": processes}

        def write() -> None:
            write_checkpoint(folder, self.step, state, self.write_saes, self.config.keep)
            self.write_saes(folder)

        on_rank_0(write)

    def write_saes(self, folder: Path) -> None:
        for number, learner in enumerate(self.learners):
            learner.trained().save_pretrained(folder if len(self.learners) == 1 else folder / f"sae-{number}")

    def resume(self) -> dict[str, Any] | None:
        """Put everything back to the last complete checkpoint; the state of the random generators that is still to be
        set. None where there is no checkpoint."""
        found = checkpoints(self.config.resume) if self.config.resume is not None else []
        path = from_rank_0(found[-1] if found else None)
        if path is None:
            return None
        state = read_state(path)
        for name, got, needed in (
            ("SAEs", len(state["learners"]), len(self.learners)),
            ("processes", len(state["processes"]), world_size()),
        ):
            if got != needed:
                raise UserError(f"{path}: got a run of {got} {name}, needs one of {needed}")
        for learner, kept in zip(self.learners, state["learners"]):
            learner.load_state_dict(kept, str(path))
        own = state["processes"][rank()]
        self.step, self.rows = state["step"], own["rows"]
        self.stream.load_state_dict(own["batches"])
        for learner, recent in zip(self.learners, own["recent"]):
            learner.load_recent_rows(recent)
        # By their class, and in order within it: a run may go on with more of them, or fewer.
        left = own["callbacks"]
        for callback in self.callbacks:
            place = next((at for at, (kind, _) in enumerate(left) if kind == type(callback).__name__), None)
            if place is not None:
                callback.load_state_dict(left.pop(place)[1], self.step)
        return own["rng"]


class _Clock:
    """Where the time has gone since it was last asked."""

    def __init__(self, rows: int) -> None:
        self.time, self.rows, self.waited = time.perf_counter(), rows, 0.0

    def since(self, rows: int, waited: float) -> dict[str, float]:
        """Rows per second, and the share of the time in which a step waited for its batch."""
        now = time.perf_counter()
        passed = now - self.time
        terms = {"tokens_per_s": (rows - self.rows) / passed, "data_wait": (waited - self.waited) / passed}
        self.time, self.rows, self.waited = now, rows, waited
        return terms


def _check(config: FitConfig, saes: Sequence[SAE]) -> None:
    """Raise UserError for SAEs that no run, or not this one, could train."""
    if not saes:
        raise UserError("sae: got none, needs at least one")
    for sae in saes:
        if not isinstance(sae, SAE):
            raise UserError(
                f"sae: got {type(sae).__name__}, needs an SAE, or several; no wrapper: processes under torchrun add up "
                "their gradients without one"
            )
        selection = sae.config.selection
        if config.k_start is None:
            continue
        # Rows that decide alone have codes no wider than their largest k, or their candidates.
        alone = selection.mean_k() is None or selection.calibrated
        most = sae.k_bound if alone else sae.config.d_sae
        if not 1 <= config.k_start <= most:
            raise UserError(f"k_start: got {config.k_start} for {selection}, needs a number from 1 to {most}")
