"""Speed up a TopKSAE of overcomplete with one line, and train it with overcomplete's own loop. The data are made up."""

import time

import torch
from overcomplete.sae import TopKSAE, train_sae

from aksae_kernels.integrations import accelerate

ROWS, D, F, K, STEPS, EPOCHS = 512, 256, 8192, 32, 5, 2
torch.manual_seed(0)
directions = torch.nn.functional.normalize(torch.randn(1024, D), dim=-1)
batches = (torch.rand(STEPS, ROWS, 1024) < 0.01).float() @ directions


def criterion(x, x_hat, pre_codes, codes, dictionary):
    return (x - x_hat).square().mean()


def train() -> float:
    """Milliseconds of a step."""
    begin = time.perf_counter()
    train_sae(sae, batches, criterion, optimizer, nb_epochs=EPOCHS, monitoring=0)
    return 1e3 * (time.perf_counter() - begin) / (EPOCHS * STEPS)


sae = TopKSAE(D, F, top_k=K)
optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
before = train()
accelerate(sae)
after = train()
print(f"a training step takes {before:.0f} ms before and {after:.0f} ms after accelerate")
with torch.no_grad():
    _, codes, x_hat = sae.eval()(batches[0])
print(f"{type(sae).__name__}: error {criterion(batches[0], x_hat, None, codes, None):.5f}, {K} latents of {F} a row")
