"""`python -m benchmarks.peers`: one training step of ours beside the same step of other SAE packages, as they are.

Every contender gets the same initial weights (unit decoder rows, the encoder equal to them, biases 0), the same batch
and k, and does what its own code does in a step: forward, squared error, backward, Adam, and whatever it has to keep
decoder rows at unit norm. Nobody has an auxiliary loss to compute, since no latent is dead. Before anything is timed,
a peer's first loss has to be ours.

Two of the packages clip the gradient by its norm and give no switch to leave it out. They are compared with a step of
ours that clips as well.

A peer that is not installed is listed as such. `make bench-peers` installs them, in an environment of their own.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import machine
from .case import OURS
from .phases import PHASES, Span, timed
from .problem import Problem, Shape
from .report import HEADER, Row, Target, write_json
from .steps import LR, DenseStep, OurStep, Step
from .timing import interleaved, quantiles

# sparsify reads it when it is imported: where Triton is installed and no GPU is, its decode fails without.
if not torch.cuda.is_available():
    os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")

CLIPPED = f"{OURS}, gradient clipped"
DENSE = "dense PyTorch"


class DictionaryLearning:
    """`TopKTrainer.update`. It subtracts `b_dec`, projects, clips at 1, steps Adam and renormalises."""

    def __init__(self, W: Tensor, k: int):
        from dictionary_learning.trainers.top_k import TopKTrainer

        d_sae, d_in = W.shape
        self.trainer = TopKTrainer(
            steps=1_000_000, activation_dim=d_in, dict_size=d_sae, k=k, layer=0, lm_name="", lr=LR, warmup_steps=0
        )
        with torch.no_grad():
            self.trainer.ae.encoder.weight.copy_(W)
            self.trainer.ae.decoder.weight.copy_(W.T)
            self.trainer.ae.encoder.bias.zero_()

    @property
    def spans(self) -> tuple[Span, ...]:
        return (
            Span(self.trainer.ae, "encode", "encode"),
            Span(torch.Tensor, "topk", "select"),
            Span(self.trainer, "loss", "decode + loss"),
            Span(torch.Tensor, "backward", "backward"),
            Span(self.trainer, "update", "optimizer"),
        )

    def __call__(self, x: Tensor) -> float:
        # Not step 0, which starts b_dec at the median of the batch.
        return self.trainer.update(1, x)


class SAELens:
    """`SAETrainer.step` of a `TopKTrainingSAE`. It clips at 1, and scales by decoder norms where others normalise."""

    def __init__(self, W: Tensor, k: int):
        from sae_lens.config import LoggingConfig, SAETrainerConfig
        from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.training.sae_trainer import SAETrainer

        d_sae, d_in = W.shape
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d_in, d_sae=d_sae, k=k))
        with torch.no_grad():
            sae.W_enc.copy_(W.T)
            sae.W_dec.copy_(W)
        config = SAETrainerConfig(
            total_training_samples=1_000_000_000,
            train_batch_size_samples=1024,
            lr=LR,
            lr_end=LR,
            logger=LoggingConfig(log_to_wandb=False),
        )
        self.trainer = SAETrainer(config, sae, data_provider=iter(()))

    @property
    def spans(self) -> tuple[Span, ...]:
        return (
            Span(self.trainer.sae, "encode_with_hidden_pre", "encode"),
            Span(torch, "topk", "select"),
            Span(self.trainer.sae, "training_forward_pass", "decode + loss"),
            Span(torch.Tensor, "backward", "backward"),
            Span(torch.nn.utils, "clip_grad_norm_", "optimizer"),
            Span(self.trainer.optimizer, "step", "optimizer"),
        )

    def __call__(self, x: Tensor) -> float:
        return self.trainer.step(x).loss.item()


class Sparsify:
    """`SparseCoder` with Adam, in the order of its `Trainer`, which itself only trains behind a language model.

    Left out are its counts of dead latents, to its advantage.
    """

    def __init__(self, W: Tensor, k: int):
        from sparsify import SparseCoder, SparseCoderConfig

        d_sae, d_in = W.shape
        self.coder = SparseCoder(d_in, SparseCoderConfig(num_latents=d_sae, k=k), W.device, W.dtype)
        with torch.no_grad():
            self.coder.encoder.weight.copy_(W)
            self.coder.W_dec.copy_(W)
        self.optimizer = torch.optim.Adam(self.coder.parameters(), lr=LR)

    @property
    def spans(self) -> tuple[Span, ...]:
        return (
            Span(self.coder, "encode", "encode"),
            Span(torch, "topk", "select"),
            Span(self.coder, "forward", "decode + loss"),
            Span(torch.Tensor, "backward", "backward"),
            Span(self, "optimize", "optimizer"),
        )

    def optimize(self) -> None:
        self.coder.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.coder.set_decoder_norm_to_unit_norm()

    def __call__(self, x: Tensor) -> float:
        variance = (x - x.mean(0)).pow(2).sum()
        fvu = self.coder(x, total_variance=variance).fvu
        fvu.backward()
        self.optimize()
        return (fvu.detach() * variance / len(x)).item()


class Peer(NamedTuple):
    """A package, how it is called at PyPI, and which step of ours does the same work."""

    name: str
    module: str
    package: str
    make: Callable[[Tensor, int], Step]
    ours: str
    target: Target


PEERS = (
    Peer(
        "dictionary_learning TopKTrainer",
        "dictionary_learning",
        "dictionary-learning",
        DictionaryLearning,
        CLIPPED,
        Target(1 / 6, 1 / 12),
    ),
    Peer("SAELens TopKTrainingSAE", "sae_lens", "sae-lens", SAELens, CLIPPED, Target(1 / 6, 1 / 12)),
    Peer("sparsify SparseCoder + Adam", "sparsify", "eai-sparsify", Sparsify, OURS, Target(1 / 3, 1 / 6)),
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


def measure(shape: Shape, k: int, rounds: int) -> tuple[list[Row], dict[str, Any]]:
    """The rows of the table, and all that is to be kept, from one interleaved run of everyone who can take part.

    Of what is kept, `steps` has for each contender the seconds of a whole step, "total", and of each of its phases;
    `absent` and `wrong` say why a peer is not among them.
    """
    problem = Problem(shape, str(k))
    absent = {peer.name: why for peer in PEERS if (why := absence(peer))}
    present = [peer for peer in PEERS if peer.name not in absent]
    steps: dict[str, Step] = {
        OURS: OurStep(problem.W, problem.k),
        CLIPPED: OurStep(problem.W, problem.k, max_grad_norm=1.0),
        DENSE: DenseStep(problem.W, problem.k),
    }
    steps |= {peer.name: peer.make(problem.W, problem.width) for peer in present}

    losses = {name: step(problem.x) for name, step in steps.items()}
    wrong = {
        name: f"its first loss is {loss:.6g}, ours is {losses[OURS]:.6g}"
        for name, loss in losses.items()
        if not math.isclose(loss, losses[OURS], rel_tol=1e-3)
    }
    phases: dict[str, list[dict[str, float]]] = {name: [] for name in steps if name not in wrong}

    def run(name: str) -> None:
        with timed(steps[name].spans) as seconds:
            steps[name](problem.x)
        phases[name].append(seconds)

    totals = interleaved({name: functools.partial(run, name) for name in phases}, rounds)
    rivals = [(peer.name, peer.ours, peer.target) for peer in present] + [(DENSE, OURS, None)]
    rows = [
        Row.compare("training step", rival, problem, totals[ours], totals[rival], target)
        for rival, ours, target in rivals
        if rival in totals and ours in totals
    ]
    return (
        rows,
        {
            "machine": machine.describe() | {peer.package: version(peer.package) for peer in present},
            "shape": shape._asdict(),
            "k": problem.label,
            "rounds": rounds,
            "rows": [row.record() for row in rows],
            "steps": {
                name: {"total": quantiles(total)._asdict()}
                # The first is the warm-up round.
                | {phase: quantiles([seconds[phase] for seconds in phases[name][1:]])._asdict() for phase in PHASES}
                for name, total in totals.items()
            },
            "absent": absent,
            "wrong": wrong,
        },
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=int, nargs=3, metavar=("B", "D", "F"), default=(1024, 768, 24576))
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="also keep the result there: benchmarks.train_step draws it")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)

    rows, result = measure(Shape(*options.shape), options.k, options.rounds)
    print(", ".join(f"{key} {value}" for key, value in result["machine"].items()))
    print(f"medians of {options.rounds} interleaved rounds; a ratio below 1 is faster\n\n{HEADER}")
    for row in rows:
        print(row.line())
    for name, why in (result["absent"] | result["wrong"]).items():
        print(f"{name}: {why}")
    kept = options.json is None or write_json(options.json, result)
    return 0 if kept and not result["wrong"] else 1


if __name__ == "__main__":
    sys.exit(main())
