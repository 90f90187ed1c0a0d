"""Train a SparseCoder of EleutherAI's sparsify as ever, and with one line faster."""

import copy
import time

import torch
from sparsify import SparseCoder, SparseCoderConfig

from aksae_kernels.integrations import accelerate

ROWS, D, F, K = 512, 256, 8192, 32
torch.manual_seed(0)
directions = torch.randn(1024, D)


def batch() -> torch.Tensor:
    return torch.randn(ROWS, 1024).relu().pow(3) @ directions


def train(coder: SparseCoder, steps: int) -> tuple[float, float]:
    """FVU at the end, and milliseconds of a step."""
    optimizer = torch.optim.Adam(coder.parameters(), lr=1e-3)
    data = [batch() for _ in range(steps)]
    start = time.perf_counter()
    for x in data:
        coder.set_decoder_norm_to_unit_norm()
        out = coder(x)
        out.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
    return out.fvu.item(), (time.perf_counter() - start) / steps * 1e3


coder = SparseCoder(D, SparseCoderConfig(num_latents=F, k=K))
fast = accelerate(copy.deepcopy(coder))
for name, one in (("sparsify", coder), ("accelerated", fast)):
    torch.manual_seed(1)
    train(one, 1)
    fvu, milliseconds = train(one, 10)
    print(f"{name}: {milliseconds:.0f} ms a step, FVU {fvu:.3f}")
with torch.no_grad():
    theirs, ours = (one(x).sae_out for x in [batch()] for one in (coder, fast))
print(f"their reconstructions differ by {(ours - theirs).norm() / theirs.norm():.0e} of their size")
