"""`python -m benchmarks.tune`: which launch configurations of the Triton backend are best on this GPU.

Every kernel's configuration comes from a heuristic. For each that the ops ask for at the shapes S1..S3, this tries
others in its place, timed in interleaved rounds, and keeps one that wins clearly, in
`aksae_kernels/backends/triton/tuned.json` under the name of the device. Results are the same bits or the same sums in
another order; the op tests run on whatever is in force.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

import aksae_kernels as ak
from aksae_kernels.backends.triton import tuning
from aksae_kernels.backends.triton.tuning import Config

from .gpu.targets import SHAPES as REFERENCE
from .gpu.targets import SPREAD
from .problem import Problem, Shape
from .report import write_json
from .timing import clock_of, interleaved, quantiles

SHAPES = [REFERENCE[name] for name in ("S1", "S2", "S3")]
WARPS = (1, 2, 4, 8)
# Sizes to try for each constant. Lists of candidates are made for the one BLOCK of `select`; the configurations of
# `exact` and `rounding` matter to rare or short kernels.
CANDIDATES = {
    "select": {},
    "scan": {"BLOCK": (256, 512, 1024)},
    "gather": {"BLOCK_K": (4, 8, 16, 32)},
    "weight_grad": {"BLOCK_K": (4, 8, 16)},
    "optimizer": {},
    "price": {},
}
# Less than that is noise, or not worth a table.
_GAIN = 0.97


def workloads(problem: Problem) -> dict[str, Callable[[], object]]:
    """By family of configurations, the calls that spend their time in it."""
    x, W, codes = problem.x, problem.W, problem.codes
    moments = [torch.zeros_like(W, dtype=torch.float32) for _ in range(2)]
    param, scale = W.clone(), torch.ones((), device=W.device)
    step = (*moments, scale, 1, 1e-3, 0.9, 0.999, 1e-8, True, False, "triton")
    return {
        "select": lambda: ak.topk_select(problem.scores, problem.k, problem.width),
        "scan": lambda: ak.topk_encode(x, W, problem.b_enc, k=problem.k, k_max=problem.width),
        "gather": lambda: ak.sparse_decode(codes, W),
        "weight_grad": lambda: ak.sparse_weight_grad(codes, x, len(W)),
        "optimizer": lambda: torch.ops.aksae.adam_step_(param, W, *step),
        "price": lambda: ak.price_select(codes, W, None, x, price=1.0),
    }


def alternatives(chosen: Config) -> Iterator[Config]:
    """The heuristic's choice first, then every other combination of sizes and warps."""
    yield chosen
    sizes = CANDIDATES[chosen.family]
    for values in itertools.product(*sizes.values()):
        blocks = dict(chosen.blocks) | dict(zip(sizes, values))
        for num_warps in WARPS:
            config = Config(chosen.family, tuple(blocks.items()), num_warps)
            if config != chosen:
                yield config


def asked_for(call: Callable[[], object], family: str) -> set[Config]:
    """The heuristic's choices of a family during a call."""
    asked: set[Config] = set()

    class Recorder(dict):
        def get(self, key: str, config: Config) -> Config:
            asked.add(config)
            return config

    with tuning.trying(Recorder()):
        call()
    return {config for config in asked if config.family == family}


def best(call: Callable[[], object], chosen: Config, device: torch.device, rounds: int) -> Config:
    """The fastest of the alternatives, or the heuristic's where it is about as fast."""

    def under(config: Config) -> None:
        with tuning.trying({chosen.key: config}):
            call()

    usable = []
    for config in alternatives(chosen):
        try:
            under(config)
            usable.append(config)
        except Exception as error:  # too many registers, too much shared memory: whatever the compiler refuses
            print(f"  {config.key}, {config.num_warps} warps: {str(error).splitlines()[0]}")
    samples = interleaved({c: lambda c=c: under(c) for c in usable}, rounds, clock_of(device))
    times = {config: quantiles(seconds).p50 for config, seconds in samples.items()}
    winner = min(times, key=times.get)
    gain = times[winner] / times[chosen]
    print(f"{chosen.key}: {winner.key}, {winner.num_warps} warps, takes {gain:.3f} of it", flush=True)
    return winner if gain < _GAIN else chosen


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, action="append", metavar=("B", "D", "F"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--families", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=tuning.TUNED)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    tried: set[str] = set()
    found: dict[str, dict] = {}
    for shape in [Shape(*shape) for shape in options.shape] if options.shape else SHAPES:
        problem = Problem(shape, SPREAD, device, torch.bfloat16)
        with ak.use_backend("triton"):
            calls = workloads(problem)
            for family in options.families:
                for chosen in sorted(asked_for(calls[family], family)):
                    if chosen.key in tried:
                        continue
                    tried.add(chosen.key)
                    winner = best(calls[family], chosen, device, options.rounds)
                    if winner != chosen:
                        found[chosen.key] = {"blocks": dict(winner.blocks), "num_warps": winner.num_warps}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    table = json.loads(options.out.read_text()) if options.out.exists() else {}
    return 0 if write_json(options.out, table | {name: found}) else 1


if __name__ == "__main__":
    sys.exit(main())
