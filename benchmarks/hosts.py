"""The SAEs of other packages, each with a training step and an inference pass, as they are and accelerated.

Each is made from the same initial weights `W [F, D]` (unit decoder rows, the encoder equal to them, biases 0) and k,
and does what its own code does in a step: forward, loss, backward, Adam, and whatever it has to keep decoder rows at
unit norm. Nobody has an auxiliary loss to compute, since no latent is dead.
"""

from __future__ import annotations

import os
from typing import Protocol

import torch
from torch import Tensor

from aksae_kernels import integrations

from .phases import Span
from .steps import LR, Step

# sparsify reads it when it is imported: where Triton is installed and no GPU is, its decode fails without.
if not torch.cuda.is_available():
    os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")


class Host(Step, Protocol):
    """A step that trains, as `benchmarks.steps` has them, and what else is measured of a package."""

    def accelerate(self) -> None: ...

    def infer(self, x: Tensor) -> Tensor:
        """The reconstruction of `x [B, D]`, without gradients."""
        ...


class DictionaryLearning:
    """`TopKTrainer.update`. It subtracts `b_dec`, projects, clips at 1, steps Adam and renormalises."""

    def __init__(self, W: Tensor, k: int):
        from dictionary_learning.trainers.top_k import TopKTrainer

        d_sae, d_in = W.shape
        self.trainer = TopKTrainer(
            steps=1_000_000,
            activation_dim=d_in,
            dict_size=d_sae,
            k=k,
            layer=0,
            lm_name="",
            lr=LR,
            warmup_steps=0,
            device=str(W.device),
        )
        with torch.no_grad():
            self.trainer.ae.encoder.weight.copy_(W)
            self.trainer.ae.decoder.weight.copy_(W.T)
            self.trainer.ae.encoder.bias.zero_()

    def accelerate(self) -> None:
        integrations.accelerate(self.trainer)

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

    @torch.no_grad()
    def infer(self, x: Tensor) -> Tensor:
        return self.trainer.ae(x)


class SAELens:
    """`SAETrainer.step` of a `TopKTrainingSAE`. It clips at 1, and scales by decoder norms where others normalise."""

    def __init__(self, W: Tensor, k: int):
        from sae_lens.config import LoggingConfig, SAETrainerConfig
        from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.training.sae_trainer import SAETrainer

        d_sae, d_in = W.shape
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d_in, d_sae=d_sae, k=k, device=str(W.device)))
        with torch.no_grad():
            sae.W_enc.copy_(W.T)
            sae.W_dec.copy_(W)
        config = SAETrainerConfig(
            total_training_samples=1_000_000_000,
            train_batch_size_samples=1024,
            device=str(W.device),
            lr=LR,
            lr_end=LR,
            logger=LoggingConfig(log_to_wandb=False),
        )
        self.trainer = SAETrainer(config, sae, data_provider=iter(()))

    def accelerate(self) -> None:
        integrations.accelerate(self.trainer)

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

    @torch.no_grad()
    def infer(self, x: Tensor) -> Tensor:
        return self.trainer.sae(x)


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

    def accelerate(self) -> None:
        integrations.accelerate(self.coder)

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

    @torch.no_grad()
    def infer(self, x: Tensor) -> Tensor:
        return self.coder(x).sae_out
