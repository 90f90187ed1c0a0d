"""How much memory a training step needs beyond its weights, their gradients and the state of the optimizer.

Counted in a fresh process, which is this module as a program, from the pages that the kernel gave it (`/proc/self`):

* The base is the resident size with the weights and the batch in place, after a step of a tiny shape has loaded the
  libraries and started their threads.
* Two steps follow. The first makes the optimizer's state, and whatever a library keeps from step to step: that stays
  in the count. The second is measured.
* The forward: the high-water mark (VmHWM, set back through `clear_refs`), less base and optimizer state. No gradient
  exists yet.
* Backward and optimizer: the same, less the gradients too, as `zero_grad(set_to_none=True)` has them appear here. The
  mark may be reached before the last of them is there; then this is too low by what is missing, for both contenders.
* The larger of the two is the result; below one page it is called a page.

Memory that is freed goes back to the system at once, as far as glibc can be told so by its environment variables.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import re
import resource
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .child import output_of
from .problem import Problem, Shape
from .report import NotMeasured, Row, Target
from .steps import DenseStep, OurStep

STEPS = {"ours": OurStep, "dense": DenseStep}
_PROC = Path("/proc/self")
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}


class MemoryCase(NamedTuple):
    """A step of ours against a dense one. The stretch target is to stay below a single `[B, F]` in fp32."""

    what: str
    problem: Problem

    def measure(self, rounds: int) -> list[Row]:
        """Once, whatever `rounds`. Raises AssertionError where the losses differ, NotMeasured without `clear_refs`."""
        _require_count()
        shape, k = self.problem.shape, self.problem.label
        ours, dense = (output_of("memory", name, *shape, k, env=MALLOC) for name in STEPS)
        assert math.isclose(ours["loss"], dense["loss"], rel_tol=1e-3), (
            f"the loss is {ours['loss']}, not {dense['loss']}"
        )
        target = Target(0.25, min(0.25, 4 * shape.B * shape.F / dense["bytes"]))
        samples = [ours["bytes"]], [dense["bytes"]]
        return [Row.compare(self.what, "dense PyTorch", self.problem, *samples, target, unit="bytes")]


def peak(step: OurStep | DenseStep, x: Tensor) -> tuple[int, float]:
    """Bytes that the second step needs, as the module says, and its loss."""
    gc.collect()
    base = _status("VmRSS")
    step(x)
    parameters = [parameter for group in step.optimizer.param_groups for parameter in group["params"]]
    gradients = _bytes(parameters)
    state = _bytes(value for values in step.optimizer.state.values() for value in values.values())
    _reset()
    loss = step.forward(x)
    forward = _status("VmHWM") - base - state
    _reset()
    step.update(loss)
    update = _status("VmHWM") - base - state - gradients
    return max(forward, update, resource.getpagesize()), loss.item()


def peak_of(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that `call` needs beyond what is there before it: pages of this process, or memory of a CUDA device.

    Raises NotMeasured where the system keeps no such count.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        base = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - base
    _require_count()
    base = _status("VmRSS")
    _reset()
    call()
    return max(_status("VmHWM") - base, resource.getpagesize())


def _require_count() -> None:
    if not (_PROC / "clear_refs").exists():
        raise NotMeasured("there is no /proc/self/clear_refs")


def _reset() -> None:
    (_PROC / "clear_refs").write_text("5")


def _status(name: str) -> int:
    return 1024 * int(re.search(rf"{name}:\s*(\d+) kB", (_PROC / "status").read_text())[1])


def _bytes(values: Iterable[Any]) -> int:
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("shape", type=int, nargs=3, metavar=("B", "D", "F"))
    parser.add_argument("k", help="64, or 20..320")
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    make = STEPS[options.step]
    tiny = Problem(Shape(8, 16, 64), "8")
    make(tiny.W, tiny.k)(tiny.x)
    problem = Problem(Shape(*options.shape), options.k)
    found, loss = peak(make(problem.W, problem.k), problem.x)
    print(json.dumps({"bytes": found, "loss": loss}))


if __name__ == "__main__":
    main()
