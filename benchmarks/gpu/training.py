"""Whole training steps, optimizer included: ours beside dense PyTorch, that compiled, and the kernels of others.

Parameters and batch are bf16. Our optimizer holds its moments in fp32, torch's fused Adam in the dtype of the weights,
which is in its favour. Neither reads its loss back, so that the device is not made to wait for the host.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch

from .. import peers
from ..case import Contest, Rival
from ..problem import Problem
from ..report import NotMeasured
from ..steps import DenseStep, OurStep
from .bench import Bench, Outcome
from .targets import COMPILED, DENSE, SPARSIFY, TRAINING

_CLOSE = 2e-2
"""How far the first losses of two contenders may lie apart: bf16 scores are ranked in different precisions."""


def training(bench: Bench, shape: str, outcome: Outcome) -> None:
    """One contest with everybody who can take part."""
    problem = bench.problem(shape)
    rivals: dict[str, Callable[[], object]] = {}
    losses: dict[str, float] = {}
    for name, make in _RIVALS.items():
        with outcome.judging(f"{TRAINING}, {shape}, {name}"):
            call = make(problem)
            losses[name] = float(call())
            rivals[name] = call
    prepare = functools.partial(_contest, rivals, losses)
    bench.measure(outcome, shape, TRAINING, problem, prepare, repeats=False)


def _contest(rivals: dict[str, Callable[[], object]], losses: dict[str, float], problem: Problem) -> Contest:
    ours = functools.partial(_update, OurStep(problem.W, problem.k), problem.x)

    def check() -> None:
        loss = float(ours())
        for name, theirs in losses.items():
            assert math.isclose(loss, theirs, rel_tol=_CLOSE), f"the first loss is {loss:.6g}; of {name}, {theirs:.6g}"

    return Contest(ours, check, tuple(Rival(name, call) for name, call in rivals.items()))


def _dense(problem: Problem) -> Callable[[], torch.Tensor]:
    return functools.partial(_update, DenseStep(problem.W, problem.k), problem.x)


def _compiled(problem: Problem) -> Callable[[], torch.Tensor]:
    if problem.device.type != "cuda":
        raise NotMeasured("compiled for GPUs only")
    step = DenseStep(problem.W, problem.k)
    step.forward = torch.compile(step.forward)
    return functools.partial(_update, step, problem.x)


def _sparsify(problem: Problem) -> Callable[[], float]:
    (peer,) = (peer for peer in peers.PEERS if peer.name == SPARSIFY)
    if reason := peers.absence(peer):
        raise NotMeasured(reason)
    return functools.partial(peer.make(problem.W, problem.width), problem.x)


_RIVALS = {DENSE: _dense, COMPILED: _compiled, SPARSIFY: _sparsify}


def _update(step: OurStep | DenseStep, x: torch.Tensor) -> torch.Tensor:
    loss = step.forward(x)
    step.update(loss)
    return loss.detach()
