"""`python -m benchmarks.peers`: the SAEs of other packages before and after `accelerate`, and our step beside them.

Contenders get the same initial weights, batch and k; `benchmarks.hosts` says what each does. Before anything is timed,
the first loss and the first reconstruction of an accelerated host have to be the host's, and a host's loss ours where
their rules are the same. Then, in interleaved runs:

* a training step: of each host, of the same accelerated, of `aksae`, and of dense PyTorch. Two of the packages clip the
  gradient by its norm and give no switch to leave it out; they stand beside a step of ours that clips as well.
* a forward pass in inference: of each host, and of the same accelerated.
* the peak memory of either, each in a process of its own: what a second call needs beyond weights, optimizer and batch,
  its gradients included.

A package that is not installed is listed as such. `make bench-peers` installs them, in an environment of their own.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import hosts, machine, memory
from .case import OURS
from .child import output_of
from .phases import PHASES, timed
from .problem import Problem, Shape
from .report import NotMeasured, Row, Target, tell
from .steps import DenseStep, OurStep, Step
from .timing import clock_of, interleaved, quantiles

CLIPPED = f"{OURS}, gradient clipped"
DENSE = "dense PyTorch"
STEP, INFERENCE = "training step", "forward pass"
_CALLS = {STEP: lambda host, x: host(x), INFERENCE: lambda host, x: host.infer(x)}
_SAME = 1e-2
"""How far two reconstructions may lie apart: a latent that rounding moves across a threshold is 0.003 of x."""
_LESS_MEMORY = Target(1 / 2, 1 / 4)


class Peer(NamedTuple):
    """A class of a package, how that is called at PyPI, and which step of ours does the same work (None: none does)."""

    name: str
    module: str
    package: str
    make: Callable[[Tensor, int], hosts.Host]
    ours: str | None = None
    target: Target | None = None
    """Of our step over the host's: of `ours` here, of a step of `fit` in `benchmarks.fit`."""
    accelerated: Target | None = None
    """Of the host's accelerated step over its own."""
    selection: str | None = None
    """The selection of ours that it trains, and stands beside in `benchmarks.fit`; None where it is left out there."""


DICTIONARY_LEARNING = ("dictionary_learning", "dictionary-learning")
SAE_LENS = ("sae_lens", "sae-lens")
A_SIXTH = Target(1 / 6, 1 / 12)
_TOPK = {"ours": CLIPPED, "target": A_SIXTH, "accelerated": Target(1 / 4, 1 / 8), "selection": "TopK"}
_BATCH_TOPK = {"target": A_SIXTH, "selection": "BatchTopK"}
_JUMPRELU = {"target": A_SIXTH, "selection": "JumpReLU"}
PEERS = (
    Peer("dictionary_learning TopKTrainer", *DICTIONARY_LEARNING, hosts.DictionaryLearning, **_TOPK),
    Peer("SAELens TopKTrainingSAE", *SAE_LENS, hosts.SAELens, **_TOPK),
    Peer(
        "sparsify SparseCoder + Adam",
        "sparsify",
        "eai-sparsify",
        hosts.Sparsify,
        ours=OURS,
        target=Target(1 / 3, 1 / 6),
        accelerated=Target(1 / 2, 1 / 4),
        selection="TopK",
    ),
    Peer(
        "dictionary_learning BatchTopKTrainer", *DICTIONARY_LEARNING, hosts.DictionaryLearningBatchTopK, **_BATCH_TOPK
    ),
    Peer("dictionary_learning JumpReluTrainer", *DICTIONARY_LEARNING, hosts.DictionaryLearningJumpReLU, **_JUMPRELU),
    Peer("SAELens BatchTopKTrainingSAE", *SAE_LENS, hosts.SAELensBatchTopK, **_BATCH_TOPK),
    Peer("SAELens JumpReLUTrainingSAE", *SAE_LENS, hosts.SAELensJumpReLU, **_JUMPRELU),
    Peer("Llamascopium SparseAutoEncoder", "llamascopium.models.sae", "llamascopium", hosts.Llamascopium),
    Peer("overcomplete TopKSAE", "overcomplete.sae", "overcomplete", hosts.Overcomplete),
)


def absence(peer: Peer) -> str | None:
    """Why a peer cannot take part; None where it can."""
    try:
        version(peer.package)
    except PackageNotFoundError:
        return f"not installed: pip install {peer.package}, or make bench-peers for all of them"
    try:
        # Some greet on stdout, which is the table's.
        with contextlib.redirect_stdout(sys.stderr):
            importlib.import_module(peer.module)
    except Exception as error:  # another's package may fail as it likes
        return f"installed, but its import fails: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return None


def accelerated(name: str) -> str:
    """The contender that is the peer of that name, accelerated."""
    return f"{name}, accelerated"


def build(peer: Peer, problem: Problem, fast: bool) -> hosts.Host:
    """The peer's SAE on the weights of the problem."""
    host = peer.make(problem.W, problem.width)
    if fast:
        host.accelerate()
    return host


def measure(problem: Problem, rounds: int) -> tuple[list[Row], dict[str, Any]]:
    """The rows of the table, and all that is to be kept, from interleaved runs of everyone who can take part.

    Of what is kept, `steps` has the seconds of a whole step, "total", and of each of its phases, for ours, dense
    PyTorch and the peers beside ours; `absent` and `wrong` say why a contender is not among the rows.
    """
    absent = {peer.name: why for peer in PEERS if (why := absence(peer))}
    present = [peer for peer in PEERS if peer.name not in absent]
    rows, wrong, kept = _time_steps(problem, present, rounds)
    right = [peer for peer in present if not {peer.name, accelerated(peer.name)} & wrong.keys()]
    inference, wrong_inference = _time_inference(problem, right, rounds)
    right = [peer for peer in right if accelerated(peer.name) not in wrong_inference]
    memory_rows, unmeasured = _weigh(problem, right)
    return rows + inference + memory_rows, {
        "machine": machine.describe() | {peer.package: version(peer.package) for peer in present},
        "shape": problem.shape._asdict(),
        "k": problem.label,
        "rounds": rounds,
        "rows": [row.record() for row in rows + inference + memory_rows],
        "steps": kept,
        "absent": absent | unmeasured,
        "wrong": wrong | wrong_inference,
    }


def _time_steps(
    problem: Problem, peers: Sequence[Peer], rounds: int
) -> tuple[list[Row], dict[str, str], dict[str, Any]]:
    steps: dict[str, Step] = {
        OURS: OurStep(problem.W, problem.k),
        CLIPPED: OurStep(problem.W, problem.k, max_grad_norm=1.0),
        DENSE: DenseStep(problem.W, problem.k),
    }
    for peer in peers:
        steps[peer.name], steps[accelerated(peer.name)] = (build(peer, problem, fast) for fast in (False, True))
    losses = {name: step(problem.x) for name, step in steps.items()}
    same = {DENSE: OURS} | {accelerated(peer.name): peer.name for peer in peers}
    same |= {peer.name: peer.ours for peer in peers if peer.ours}
    wrong = {
        name: f"its first loss is {losses[name]:.6g}, that of {other} is {losses[other]:.6g}"
        for name, other in same.items()
        if not math.isclose(losses[name], losses[other], rel_tol=1e-3)
    }

    phases: dict[str, list[dict[str, float]]] = {name: [] for name in steps if name not in wrong}

    def run(name: str) -> None:
        with timed(steps[name].spans) as seconds:
            steps[name](problem.x)
        phases[name].append(seconds)

    contenders = {name: functools.partial(run, name) for name in phases}
    totals = interleaved(contenders, rounds, clock_of(problem.device))
    pairs = [(STEP, peer.name, peer.ours, peer.target) for peer in peers if peer.ours]
    pairs += [(STEP, DENSE, OURS, None)]
    pairs += [(f"{STEP}, accelerated", peer.name, accelerated(peer.name), peer.accelerated) for peer in peers]
    rows = [
        Row.compare(what, rival, problem, totals[ours], totals[rival], target)
        for what, rival, ours, target in pairs
        if rival in totals and ours in totals
    ]
    drawn = {OURS, CLIPPED, DENSE}
    drawn |= {name for peer in peers if peer.ours for name in (peer.name, accelerated(peer.name))}
    kept = {
        name: {"total": quantiles(total)._asdict()}
        # The first is the warm-up round.
        | {phase: quantiles([seconds[phase] for seconds in phases[name][1:]])._asdict() for phase in PHASES}
        for name, total in totals.items()
        if name in drawn
    }
    return rows, wrong, kept


def _time_inference(problem: Problem, peers: Sequence[Peer], rounds: int) -> tuple[list[Row], dict[str, str]]:
    contenders, wrong = {}, {}
    for peer in peers:
        slow, fast = (build(peer, problem, fast) for fast in (False, True))
        error = (fast.infer(problem.x) - slow.infer(problem.x)).norm() / problem.x.norm()
        if not error < _SAME:
            wrong[accelerated(peer.name)] = f"its reconstruction is off by {error:.2g} of the norm of x"
            continue
        contenders[peer.name] = functools.partial(slow.infer, problem.x)
        contenders[accelerated(peer.name)] = functools.partial(fast.infer, problem.x)
    seconds = interleaved(contenders, rounds, clock_of(problem.device))
    what = f"{INFERENCE}, accelerated"
    names = [peer.name for peer in peers if peer.name in seconds]
    return [Row.compare(what, name, problem, seconds[accelerated(name)], seconds[name]) for name in names], wrong


def _weigh(problem: Problem, peers: Sequence[Peer]) -> tuple[list[Row], dict[str, str]]:
    rows, unmeasured = [], {}
    device = ("--device", str(problem.device))
    for peer in peers:
        try:
            for what, target in ((STEP, _LESS_MEMORY), (INFERENCE, None)):
                slow, fast = (
                    output_of(
                        "peers",
                        *("--shape", *problem.shape, "--k", problem.label, *device),
                        *("--weigh", peer.name, what, *(["--accelerated"] if fast else [])),
                        env=memory.MALLOC,
                    )
                    for fast in (False, True)
                )
                rows.append(
                    Row.compare(
                        f"memory of a {what}, accelerated", peer.name, problem, [fast], [slow], target, unit="bytes"
                    )
                )
        except NotMeasured as error:
            unmeasured[f"memory of {peer.name}"] = str(error)
    return rows, unmeasured


def markdown(result: dict[str, Any]) -> str:
    """The README's table of a kept result: each host before and after `accelerate`."""
    rows = {(row["what"], row["rival"]): row for row in result["rows"]}
    lines = ["| class | training step | | its memory | | forward pass | | its memory | |", f"|{'---|' * 9}"]
    for peer in (peer for peer in PEERS if (f"{STEP}, accelerated", peer.name) in rows):
        cells = [f"{peer.package} {result['machine'][peer.package]}, {peer.name.partition(' ')[2]}"]
        for what in (STEP, f"memory of a {STEP}", INFERENCE, f"memory of a {INFERENCE}"):
            row = rows.get((f"{what}, accelerated", peer.name))
            cells += _before_and_after(row) if row else ["not measured", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _before_and_after(row: dict[str, Any]) -> tuple[str, str]:
    scale, unit = (1e3, "ms") if row["unit"] == "seconds" else (2.0**-20, "MB")
    theirs, ours = (f"{row[side]['p50'] * scale:.0f}" for side in ("theirs", "ours"))
    ratio = f"{1 / row['ratio']['p50']:.1f}x" if row["unit"] == "seconds" else f"{row['ratio']['p50']:.2f}"
    return f"{theirs} to {ours} {unit}", f"**{ratio}**" if row["verdict"] == "missed" else ratio


def weigh(peer: Peer, what: str, fast: bool, problem: Problem) -> int:
    """Bytes that the second call of a fresh process needs, as the module says."""
    # Libraries are loaded and threads started by a tiny shape.
    tiny = Problem(Shape(8, 16, 64), "8", problem.device)
    with contextlib.redirect_stdout(sys.stderr):
        _CALLS[what](build(peer, tiny, fast), tiny.x)
        host = build(peer, problem, fast)
    _CALLS[what](host, problem.x)
    return memory.peak_of(lambda: _CALLS[what](host, problem.x), problem.device)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, metavar=("B", "D", "F"), default=(1024, 768, 24576))
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="also keep the result there: benchmarks.train_step draws it")
    parser.add_argument(
        "--readme", type=Path, metavar="FILE", help="print the README's table of a kept result, and no more"
    )
    parser.add_argument("--weigh", nargs=2, metavar=("PEER", "WHAT"), help="print bytes of peak memory, and no more")
    parser.add_argument("--accelerated", action="store_true", help="with --weigh: of the accelerated peer")
    options = parser.parse_args(arguments)
    if options.readme:
        print(markdown(json.loads(options.readme.read_text())))
        return 0
    torch.set_num_threads(options.threads)
    problem = Problem(Shape(*options.shape), str(options.k), options.device)
    if options.weigh:
        peer = next((peer for peer in PEERS if peer.name == options.weigh[0]), None)
        if peer is None or options.weigh[1] not in _CALLS:
            parser.error(f"--weigh: got {options.weigh}, needs a peer's name, and one of {', '.join(_CALLS)}")
        print(json.dumps(weigh(peer, options.weigh[1], options.accelerated, problem)))
        return 0

    rows, result = measure(problem, options.rounds)
    return tell(rows, result, options.json)


if __name__ == "__main__":
    sys.exit(main())
