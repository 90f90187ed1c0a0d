"""`python -m benchmarks.fvu --train X.npy --heldout Y.npy`: what each selection learns, by `fit` and others' trainers.

All see the same batches, in the same order, with the same learning rate, warm-up and decay; rows are scaled to a mean
norm of sqrt(D) before, for everyone. What else a trainer does is its own. Then, on the held-out rows, as at inference:
FVU, mean L0, the share of latents that fire nowhere; and tokens per second of training.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import machine
from .fit import PEERS, selections
from .peers import absence
from .report import write_json

_LR, _WARMUP, _DECAY = 1e-3, 15, 0.8


class Trained(NamedTuple):
    """A trained SAE: the latents `[B, F]` of rows `[B, D]`, and their reconstruction."""

    latents: Callable[[Tensor], Tensor]
    infer: Callable[[Tensor], Tensor]


class Batches:
    """`steps` batches of rows of a tensor, each epoch in another order; the same in every iteration."""

    def __init__(self, rows: Tensor, batch_size: int, steps: int):
        self.rows, self.batch_size, self.steps = rows, batch_size, steps

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(0)
        left = torch.empty(0, dtype=torch.int64)
        for _ in range(self.steps):
            while len(left) < self.batch_size:
                left = torch.cat([left, torch.randperm(len(self.rows), generator=generator)])
            yield self.rows[left[: self.batch_size]]
            left = left[self.batch_size :]


def ours(name: str, k: int, d_sae: int, batches: Batches) -> Trained:
    """`aksae.fit`."""
    from aksae import SAE, FitConfig, SAEConfig, fit

    config = SAEConfig(batches.rows.shape[1], d_sae, selections(k, d_sae)[name])
    sae = SAE(config, generator=torch.Generator().manual_seed(0))
    fit(sae, batches, FitConfig(batches.steps, lr=_LR, warmup_steps=_WARMUP, decay_start=_DECAY, dead_after=10_000))
    return Trained(lambda x: sae.encode(x).to_dense(d_sae), sae)


def dictionary_learning(make: Any, W: Tensor, k: int, batches: Batches) -> Trained:
    """Its trainer's `update` of every step; thresholds are followed, and sparsity asked for, from the warm-up on."""
    options = {"steps": batches.steps, "lr": _LR, "warmup_steps": _WARMUP, "decay_start": int(_DECAY * batches.steps)}
    trainer = make.make_trainer(k, **make.sizes(W), **options, **{make.starts: _WARMUP})
    for step, x in enumerate(batches):
        trainer.update(step, x)
    return Trained(trainer.ae.encode, trainer.ae)


def sae_lens(make: Any, W: Tensor, k: int, batches: Batches) -> Trained:
    """Its `SAETrainer.fit`. A JumpReLU there has no L0 to aim at, but a coefficient: its default."""
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sae = make.make_sae(k, **make.sizes(W))
    config = SAETrainerConfig(
        total_training_samples=batches.steps * batches.batch_size,
        train_batch_size_samples=batches.batch_size,
        device="cpu",
        lr=_LR,
        lr_end=0.0,
        lr_warm_up_steps=_WARMUP,
        lr_decay_steps=batches.steps - int(_DECAY * batches.steps),
        logger=LoggingConfig(log_to_wandb=False),
    )
    SAETrainer(config, sae, data_provider=iter(batches)).fit()
    return Trained(sae.encode, sae)


def sparsify(make: Any, W: Tensor, k: int, batches: Batches) -> Trained:
    """`SparseCoder` with Adam, in the order of its `Trainer`."""
    host = make(W, k)
    for step, x in enumerate(batches):
        decay = (batches.steps - step) / (batches.steps * (1 - _DECAY))
        host.optimizer.param_groups[0]["lr"] = _LR * min(1, step / _WARMUP, decay)
        host(x)

    def latents(x: Tensor) -> Tensor:
        values, indices, *_ = host.coder.encode(x)
        return x.new_zeros(len(x), len(W)).scatter_(1, indices, values)

    return Trained(latents, host.infer)


TRAINERS = {"dictionary_learning": dictionary_learning, "sae_lens": sae_lens, "sparsify": sparsify}


@torch.no_grad()
def judged(trained: Trained, rows: Tensor, batch_size: int) -> dict[str, float]:
    """FVU, mean L0 and the share of latents that fire nowhere, on rows `[N, D]`."""
    error, fires, total = 0.0, 0, 0
    for x in rows.split(batch_size):
        error += float((x - trained.infer(x)).square().sum())
        latents = trained.latents(x) > 0
        fires, total = fires + latents.sum(0), total + int(latents.sum())
    return {
        "fvu": error / float((rows - rows.mean(0)).square().sum()),
        "l0": total / len(rows),
        "dead": float((fires == 0).float().mean()),
    }


def measure(train: Tensor, heldout: Tensor, d_sae: int, k: int, steps: int, batch_size: int, names: Sequence[str]):
    """A record of each contender; those that are not installed say so."""
    scale = train.shape[1] ** 0.5 / train.norm(dim=-1).mean()
    batches, heldout = Batches(train * scale, batch_size, steps), heldout * scale
    W = F.normalize(torch.randn(d_sae, train.shape[1], generator=torch.Generator().manual_seed(0)), dim=-1)
    for name in names:
        contenders: dict[str, Callable[[], Trained]] = {
            f"aksae.fit, {name}": lambda name=name: ours(name, k, d_sae, batches)
        }
        for peer in PEERS[name]:
            if why := absence(peer):
                yield {"name": peer.name, "absent": why}
                continue
            contenders[peer.name] = lambda peer=peer: TRAINERS[peer.module](peer.make, W, k, batches)
        for contender, run in contenders.items():
            torch.manual_seed(0)
            start = time.perf_counter()
            with contextlib.redirect_stdout(sys.stderr):
                trained = run()
            rate = steps * batch_size / (time.perf_counter() - start)
            yield {"name": contender, **judged(trained, heldout, batch_size), "tokens_per_s": rate}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, metavar="X.npy", help="rows [N, D] to train on")
    parser.add_argument("--heldout", type=Path, required=True, metavar="Y.npy", help="rows [N, D] to judge by")
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--selections", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--json", type=Path, help="also keep the result there")
    options = parser.parse_args(arguments)
    train, heldout = (torch.from_numpy(np.load(path)).float() for path in (options.train, options.heldout))
    described = machine.describe()
    print(", ".join(f"{key} {value}" for key, value in described.items()))
    print(f"\n{'trainer':50s} {'FVU':>8s} {'L0':>8s} {'dead':>7s} {'tokens/s':>9s}")
    records = []
    sizes = options.d_sae, options.k, options.steps, options.batch_size
    for record in measure(train, heldout, *sizes, options.selections):
        records.append(record)
        if why := record.get("absent"):
            print(f"{record['name']:50s} {why}")
            continue
        numbers = f"{record['fvu']:8.4f} {record['l0']:8.1f} {record['dead']:7.1%} {record['tokens_per_s']:9,.0f}"
        print(f"{record['name']:50s} {numbers}", flush=True)
    result = {"machine": described, "steps": options.steps, "batch_size": options.batch_size, "records": records}
    return 0 if options.json is None or write_json(options.json, result) else 1


if __name__ == "__main__":
    sys.exit(main())
