"""`python -m benchmarks.fit`: for each selection, a step of `aksae.fit` beside the bare ops and others' trainers.

`fit` asks for a batch at every step; whoever gives it can let others take a step on the same batch before. So all
contenders are timed in turn, and `fit` as it is, with all that it does between two batches. Before anything is timed,
the error of the bare ops has to be the one that `fit` logs.

* the bare ops: encode (JumpReLU with the gradient of its thresholds), decode and squared error, backward and `SAEAdam`
  with its clip, on the same operands.
* the trainers of other packages, of the same selection. `benchmarks.hosts` says what each does.
* beside a process that spins: how many times longer a step takes, ours and the dense one in PyTorch.

Activations are rows of a file, drawn at random; reading them is part of every step, but of the bare ops.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import aksae_kernels as ak
from aksae_kernels.optim import SAEAdam

from . import hosts, machine, peers
from .case import OURS
from .peers import A_SIXTH, DICTIONARY_LEARNING, SAE_LENS, Peer, absence
from .problem import Problem, Shape
from .report import Row, Target, tell
from .steps import LR, DenseStep

BARE, DENSE, SPINNING = "bare ops", "dense PyTorch", "slow-down beside a spinning process"
_OF_BARE, _OF_DENSE = Target(1.10, 1.03), Target(1.15, 1.0)
_MATRYOSHKA = {"target": A_SIXTH, "selection": "Matryoshka"}
# `accelerate` has no subclass for these, so `benchmarks.peers` is without them.
_NOT_ACCELERATED = (
    Peer(
        "dictionary_learning MatryoshkaBatchTopKTrainer",
        *DICTIONARY_LEARNING,
        hosts.DictionaryLearningMatryoshka,
        **_MATRYOSHKA,
    ),
    Peer("SAELens MatryoshkaBatchTopKTrainingSAE", *SAE_LENS, hosts.SAELensMatryoshka, **_MATRYOSHKA),
)
PEERS = {
    name: tuple(peer for peer in (*peers.PEERS, *_NOT_ACCELERATED) if peer.selection == name)
    for name in ("TopK", "BatchTopK", "JumpReLU", "Matryoshka")
}


def selections(k: int, d_sae: int) -> dict[str, Any]:
    """By the name of its class, each selection with a mean of `k` latents."""
    from aksae import BatchTopK, JumpReLU, Matryoshka, TopK

    inner = BatchTopK(k)
    return {
        "TopK": TopK(k),
        "BatchTopK": inner,
        "JumpReLU": JumpReLU(k),
        "Matryoshka": Matryoshka(inner, hosts.matryoshka_prefixes(d_sae)),
    }


class Rows:
    """Batches `[B, D]` of an `.npy` file, its rows drawn at random."""

    def __init__(self, path: Path, batch_size: int):
        self._rows = np.load(path, mmap_mode="r")
        self._drawn, self._size = np.random.default_rng(0), batch_size

    def __call__(self) -> Tensor:
        return torch.from_numpy(self._rows[self._drawn.integers(len(self._rows), size=self._size)])


def sparse_rows(n: int, d_in: int, seed: int = 0) -> Tensor:
    """`[n, D]`: sums of 60 directions out of 4000, positive, and a little noise; what SAEs are there to take apart."""
    generator = torch.Generator().manual_seed(seed)
    directions = F.normalize(torch.randn(4000, d_in, generator=generator), dim=-1)
    latents = torch.zeros(n, len(directions))
    latents.scatter_(
        1, torch.randint(len(directions), (n, 60), generator=generator), torch.rand(n, 60, generator=generator)
    )
    return 4 * latents @ directions + 0.1 * torch.randn(n, d_in, generator=generator)


class BareStep:
    """The ops of a step of `sae`, on copies of its weights: encode, squared error, backward, `SAEAdam`."""

    def __init__(self, sae: Any, name: str):
        self.name, self.k, self.config = name, round(sae.config.selection.mean_k()), sae.config
        self.W_enc, self.b_enc, self.W_dec, self.b_dec = (
            nn.Parameter(weight.detach().clone()) for weight in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)
        )
        # As in `fit`, a row has at most so many latents.
        self.k_max = sae.width()
        self.threshold = nn.Parameter(sae.log_threshold.detach().exp()) if name == "JumpReLU" else None
        free = [self.W_enc, self.b_enc, self.b_dec, *(() if self.threshold is None else (self.threshold,))]
        groups = [{"params": free}, {"params": [self.W_dec], "unit_norm_rows": True}]
        self.optimizer = SAEAdam(groups, lr=LR, max_grad_norm=1.0)

    def encode(self, x: Tensor) -> ak.SparseCodes:
        if self.name == "TopK":
            return ak.topk_encode(x, self.W_enc, self.b_enc, k=self.k)
        if self.threshold is not None:
            from aksae.selections.jumprelu import jumprelu

            # The estimator of the thresholds' gradients needs the codes that lie a little below them, too.
            bandwidth = self.config.selection.bandwidth
            reach = self.threshold.detach() * (1 - bandwidth / 2)
            codes = ak.threshold_encode(x, self.W_enc, self.b_enc, threshold=reach, k_max=self.k_max)
            return codes._replace(values=jumprelu(codes.values, codes.gather(self.threshold), bandwidth))
        return ak.batch_topk_encode(x, self.W_enc, self.b_enc, budget=self.k * len(x), k_max=self.k_max)

    def error(self, codes: ak.SparseCodes, x: Tensor) -> Tensor:
        if self.name != "Matryoshka":
            return ak.decode_mse(codes, self.W_dec, self.b_dec, x)
        # Every prefix has an error of its own: as many decodes as there are prefixes.
        return self.config.selection.error(self, codes, x, residual=False)[0]

    def __call__(self, x: Tensor) -> float:
        loss = self.error(self.encode(x - self.b_dec.detach()), x).mean() / x.shape[-1]
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def turns(
    sae: Any,
    load: Callable[[], Tensor],
    rounds: int,
    others: Callable[[], dict[str, Callable[[Tensor], float]]],
    log: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, list[float]]:
    """Seconds of a step of everyone in each round, `fit` under `OURS`.

    `others` is asked when `fit` has started the SAE. Two steps of `fit` go first and are not kept. `log` gets a record
    of every step; without it `fit` makes one of ten, as it does by itself.
    """
    from aksae import FitConfig, fit
    from aksae.callbacks import Records

    seconds: dict[str, list[float]] = {}

    def batches() -> Iterator[Tensor]:
        yield load()
        contenders = others()
        order, shuffled = [*contenders, OURS], random.Random(0)
        for round_ in range(rounds + 2):
            start = time.perf_counter()
            x = load()
            loading = time.perf_counter() - start
            # Nobody always comes after the same one, and finds the caches and the heap as that one leaves them.
            for name in shuffled.sample(order, len(order)):
                start = time.perf_counter()
                if name == OURS:
                    # It comes back for the next batch when the step is done.
                    yield x
                else:
                    contenders[name](x)
                taken = time.perf_counter() - start + (0 if name == BARE else loading)
                if round_:
                    seconds.setdefault(name, []).append(taken)

    config = FitConfig(steps=rounds + 3, lr=LR, warmup_steps=0, log_every=1 if log else 10)
    fit(sae, batches(), config, [Records(log)] if log else [])
    # The last step of `fit` is not timed: it asks for no further batch.
    return {name: times[:rounds] for name, times in seconds.items()}


def check(make: Callable[[], Any], name: str, load: Callable[[], Tensor]) -> None:
    """Raise AssertionError unless the bare ops make the error that `fit` logs, of the same batch and weights."""
    records: list[dict[str, Any]] = []
    losses: list[float] = []
    sae = make()

    def bare() -> dict[str, Callable[[Tensor], float]]:
        step = BareStep(sae, name)
        return {BARE: lambda x: losses.append(step(x)) or 0.0}

    turns(sae, load, 0, bare, records.append)
    if not math.isclose(records[1]["mse"], losses[0], rel_tol=1e-3):
        raise AssertionError(f"the bare ops make {losses[0]:.6g}, fit logs {records[1]['mse']:.6g}")


@contextlib.contextmanager
def spinning() -> Iterator[None]:
    """A process beside us that does nothing, as fast as it can."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.3)
        yield
    finally:
        process.kill()
        process.wait()


def slow_down(make: Callable[[], Any], problem: Problem, load: Callable[[], Tensor], rounds: int) -> Row:
    """How many times longer a step takes beside a spinning process, ours beside the dense one."""
    slower: dict[str, list[float]] = {OURS: [], DENSE: []}
    for _ in range(rounds):
        sae, medians = make(), {}
        for spins in (False, True):
            with spinning() if spins else contextlib.nullcontext():
                seconds = turns(sae, load, 3, lambda: {DENSE: DenseStep(problem.W, problem.k)})
            medians[spins] = {name: sorted(times)[1] for name, times in seconds.items()}
        for name, factors in slower.items():
            factors.append(medians[True][name] / medians[False][name])
    return Row.compare(SPINNING, DENSE, problem, slower[OURS], slower[DENSE], _OF_DENSE, unit="times")


def measure(problem: Problem, names: Sequence[str], rounds: int) -> tuple[list[Row], dict[str, Any]]:
    """The rows of the table, and all that is to be kept."""
    from aksae import SAE, SAEConfig

    shape, k = problem.shape, problem.width
    rows: list[Row] = []
    absent: dict[str, str] = {}
    wrong: dict[str, str] = {}
    packages = set()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "activations.npy"
        np.save(path, sparse_rows(4 * shape.B, shape.D).numpy())
        load = Rows(path, shape.B)
        for name in names:

            def make(name: str = name) -> Any:
                sae = SAE(SAEConfig(shape.D, shape.F, selections(k, shape.F)[name]))
                sae.load_state_dict({"W_enc": problem.W, "W_dec": problem.W}, strict=False)
                return sae

            try:
                check(make, name, load)
            except AssertionError as error:
                wrong[name] = str(error)
                continue
            sae = make()
            present = [peer for peer in PEERS[name] if not absent.setdefault(peer.name, absence(peer) or "")]
            packages |= {peer.package for peer in present}

            def others(name: str = name, sae: Any = sae, present: Sequence[Peer] = present) -> dict[str, Any]:
                steps = {peer.name: peer.make(problem.W, k) for peer in present}
                return {BARE: BareStep(sae, name), DENSE: DenseStep(problem.W, problem.k), **steps}

            seconds = turns(sae, load, rounds, others)
            ours = seconds.pop(OURS)
            targets = {BARE: _OF_BARE} | {peer.name: peer.target for peer in present}
            rows += [
                Row.compare(f"fit, {name}", rival, problem, ours, theirs, targets.get(rival))
                for rival, theirs in seconds.items()
            ]
        rows.append(slow_down(functools.partial(make, names[0]), problem, load, max(3, rounds // 2)))
    return rows, {
        "machine": machine.describe() | {package: version(package) for package in sorted(packages)},
        "shape": shape._asdict(),
        "k": problem.label,
        "rounds": rounds,
        "rows": [row.record() for row in rows],
        "absent": {name: why for name, why in absent.items() if why},
        "wrong": wrong,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, metavar=("B", "D", "F"), default=(1024, 768, 24576))
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--selections", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="also keep the result there")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows, result = measure(Problem(Shape(*options.shape), str(options.k)), options.selections, options.rounds)
    return tell(rows, result, options.json)


if __name__ == "__main__":
    sys.exit(main())
