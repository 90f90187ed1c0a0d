"""Train a TopK SAE with SAELens' own trainer, first as it is, then with one more line. The data are made up."""

import time
from collections.abc import Iterator

import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

from aksae_kernels.integrations import accelerate

B, D, F, K = 512, 256, 8192, 32
directions = torch.randn(4 * D, D)


def batches() -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    while True:
        yield (torch.rand(B, 4 * D, generator=generator) < 0.01).float() @ directions


def trainer() -> SAETrainer:
    torch.manual_seed(0)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D, d_sae=F, k=K))
    config = SAETrainerConfig(total_training_samples=100 * B, train_batch_size_samples=B, lr=1e-3, lr_end=1e-4)
    return SAETrainer(config, sae, batches())


def steps(of: SAETrainer, n: int = 10) -> None:
    milliseconds, losses = [], []
    for _ in range(n):
        batch = next(of.data_provider)
        start = time.perf_counter()
        losses.append(of.step(batch).loss.item())
        milliseconds.append(1000 * (time.perf_counter() - start))
    print(f"{type(of.sae).__name__:20} {min(milliseconds):6.1f} ms a step, loss {losses[0]:.3f} to {losses[-1]:.3f}")


steps(trainer())
accelerated = accelerate(trainer())
steps(accelerated)

x = next(accelerated.data_provider)
print("encode:", list(accelerated.sae.encode(x).shape), " reconstruction:", list(accelerated.sae(x).shape))
