"""What a training run tells others, and what others do in it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .batches import Batch
from .checkpoints import cut_log
from .errors import UserError
from .files import finite

if TYPE_CHECKING:
    from .fit import Run


Log = Callable[[dict[str, Any]], None]
"""Takes a record."""


class Callback:
    """Called by `fit`; each method may be left out. `run.step` counts the steps done, `run.learners` has the SAEs, and
    `run.stopped = True` ends the run after the step, with a checkpoint; in a data-parallel run after the next log step,
    where any process may ask for it."""

    rank_0_only = False
    """Whether it is for one process of a data-parallel run alone, as what writes a log is. Such a callback must not
    talk to the other processes."""

    def on_start(self, run: Run, resumed: bool) -> None:
        """Before the first step."""

    def on_step(self, run: Run, batches: Sequence[Batch]) -> None:
        """After each step, with the batches that it was on."""

    def on_log(self, run: Run, record: dict[str, Any]) -> None:
        """At log steps, for each SAE; callbacks that come later see what is put into the record."""

    def on_end(self, run: Run) -> None:
        """After the last step, or where the run is cut off."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: tensors, numbers, strings and containers of them, of Python's own types. Every
        process of a data-parallel run has its own put back."""
        return {}

    def load_state_dict(self, state: dict[str, Any], step: int) -> None:
        """Put back what `state_dict` gave, when `step` steps were done."""


class JsonLines(Callback):
    """A record a line, in a file; a resumed run goes on where its checkpoint was written."""

    rank_0_only = True

    def __init__(self, path: Path, **common: Any):
        """`common` is in every record; records of other runs in the same file are told by it, and stay."""
        self.path, self.common = path, common

    def on_start(self, run: Run, resumed: bool) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        cut_log(self.path, run.step if resumed else 0, self.common)

    def on_log(self, run: Run, record: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(finite(self.common | record)) + "\n")


class Records(Callback):
    """Each record to a function."""

    rank_0_only = True

    def __init__(self, log: Log, **common: Any):
        self.log, self.common = log, common

    def on_log(self, run: Run, record: dict[str, Any]) -> None:
        self.log(self.common | record)


class Progress(Callback):
    """A bar in the terminal, by tqdm."""

    rank_0_only = True

    def __init__(self, name: str = "fit"):
        self.name = name

    def on_start(self, run: Run, resumed: bool) -> None:
        from tqdm import tqdm

        self.bar = tqdm(total=run.config.steps, initial=run.step, desc=self.name)

    def on_step(self, run: Run, batches: Sequence[Batch]) -> None:
        self.bar.update()

    def on_log(self, run: Run, record: dict[str, Any]) -> None:
        self.bar.set_postfix(fvu=f"{record['fvu']:.3f}", l0=f"{record['l0']:.0f}", dead=f"{record['dead']:.1%}")

    def on_end(self, run: Run) -> None:
        self.bar.close()


class Wandb(Callback):
    """Records to Weights & Biases, with the arguments of `wandb.init`. Raises UserError where it is not installed."""

    rank_0_only = True

    def __init__(self, **options: Any):
        self.module, self.options = _installed("wandb"), options

    def on_start(self, run: Run, resumed: bool) -> None:
        self.session = self.module.init(**self.options)

    def on_log(self, run: Run, record: dict[str, Any]) -> None:
        self.session.log(record, step=record["step"])

    def on_end(self, run: Run) -> None:
        self.session.finish()


class Trackio(Wandb):
    """The same to trackio."""

    def __init__(self, **options: Any):
        self.module, self.options = _installed("trackio"), options


class TensorBoard(Callback):
    """Records to TensorBoard event files in a folder. Raises UserError where tensorboard is not installed."""

    rank_0_only = True

    def __init__(self, folder: str | Path):
        _installed("tensorboard")
        self.folder = folder

    def on_start(self, run: Run, resumed: bool) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(self.folder), purge_step=run.step if resumed else None)

    def on_log(self, run: Run, record: dict[str, Any]) -> None:
        prefix = f"sae-{record['sae']}/" if "sae" in record else ""
        for name, value in record.items():
            if isinstance(value, (int, float)) and name not in ("step", "sae"):
                self.writer.add_scalar(prefix + name, value, record["step"])

    def on_end(self, run: Run) -> None:
        self.writer.close()


class Evaluate(Callback):
    """Call `evaluate(run)` every `every` steps, with the SAEs in eval mode, and put what it returns, numbers by name,
    into the next record; `results` has all of it. In a data-parallel run every process calls it."""

    def __init__(self, every: int, evaluate: Callable[[Run], dict[str, float]]):
        self.every, self.evaluate = every, evaluate
        self.results: list[dict[str, Any]] = []
        self.pending: dict[str, float] = {}

    def on_step(self, run: Run, batches: Sequence[Batch]) -> None:
        if run.step % self.every:
            return
        for learner in run.learners:
            learner.sae.eval()
        self.pending = {name: float(value) for name, value in self.evaluate(run).items()}
        self.results.append({"step": run.step, **self.pending})

    def on_log(self, run: Run, record: dict[str, Any]) -> None:
        record |= self.pending
        self.pending = {}

    def state_dict(self) -> dict[str, Any]:
        return {"results": self.results, "pending": self.pending}

    def load_state_dict(self, state: dict[str, Any], step: int) -> None:
        self.results, self.pending = state["results"], state["pending"]


class EarlyStop(Callback):
    """End the run when `name` of the records has not fallen by more than `margin` over the last `patience` records."""

    def __init__(self, name: str = "fvu", patience: int = 10, margin: float = 0.0):
        self.name, self.patience, self.margin = name, patience, margin
        self.best, self.since = float("inf"), 0

    def on_start(self, run: Run, resumed: bool) -> None:
        # A run that was ended has nothing left to do.
        run.stopped = run.stopped or self.since >= self.patience

    def on_log(self, run: Run, record: dict[str, Any]) -> None:
        if record[self.name] < self.best - self.margin:
            self.best, self.since = record[self.name], 0
        else:
            self.since += 1
        run.stopped = run.stopped or self.since >= self.patience

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "since": self.since}

    def load_state_dict(self, state: dict[str, Any], step: int) -> None:
        self.best, self.since = state["best"], state["since"]


def _installed(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{name}: got no such package, needs it installed for its callback") from error
