"""Train a BatchTopK SAE on activations of your own: a folder of `.npy` files, `[N, D]` each.

    python examples/fit_own_activations.py [FOLDER]

Without a folder it makes a small one up.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from aksae import SAE, BatchTopK, FitConfig, SAEConfig, fit, open_activations

D, F, K, BATCH = 32, 256, 8, 256

with tempfile.TemporaryDirectory() as made_up:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else made_up)
    if len(sys.argv) == 1:
        random = np.random.default_rng(0)
        directions = random.standard_normal((4 * D, D))
        for number in range(4):
            strengths = random.random((5000, 4 * D)) * (random.random((5000, 4 * D)) < 0.05)
            np.save(folder / f"activations-{number}.npy", (strengths @ directions).astype(np.float32))

    train, heldout = open_activations(folder).split(heldout_fraction=0.1)
    sae = SAE(SAEConfig(train.d_in, F, BatchTopK(K)))
    result = fit(sae, train.batches(BATCH), FitConfig(steps=400, lr=3e-3, normalize="mean-norm"))

    with torch.no_grad():
        x = heldout.rows(torch.arange(len(heldout)))
        fvu = (sae(x) - x).square().sum() / (x - x.mean(0)).square().sum()
    print(f"{len(train):,} rows of width {train.d_in}, {len(heldout):,} held out")
    print(f"FVU {fvu:.3f} at {sae.encode(x).counts.float().mean():.1f} latents a row")
    print(f"{result.record['data_wait']:.1%} of the last steps was spent waiting for data")
