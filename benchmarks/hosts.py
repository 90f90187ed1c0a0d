"""The SAEs of other packages, each with a training step and an inference pass, as they are and accelerated.

Each is made from the same initial weights `W [F, D]` (unit decoder rows, the encoder equal to them, biases 0) and k,
and does what its own code does in a step: forward, loss, backward, Adam, and whatever it has to keep decoder rows at
unit norm. Nobody has an auxiliary loss to compute, since no latent is dead.
"""

from __future__ import annotations

import os
import sys
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from aksae_kernels import integrations
from aksae_kernels.integrations.adam import speed_up

from .bare_overcomplete import make_importable
from .phases import Span
from .steps import LR, Step

# sparsify reads it when it is imported: where Triton is installed and no GPU is, its decode fails without.
if not torch.cuda.is_available():
    os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
make_importable()

_BANDWIDTH = 0.01
"""Of the estimator by which a JumpReLU learns its thresholds."""


class Host(Step, Protocol):
    """A step that trains, as `benchmarks.steps` has them, and what else is measured of a package."""

    def accelerate(self) -> None: ...

    def infer(self, x: Tensor) -> Tensor:
        """The reconstruction of `x [B, D]`, without gradients."""
        ...


def threshold(W: Tensor, k: int) -> float:
    """What k of the latents exceed on average, of rows of unit norm and an input that is standard normal."""
    return torch.special.ndtri(torch.tensor(1 - min(k, len(W)) / len(W), dtype=torch.float64)).item()


def matryoshka_prefixes(d_sae: int) -> tuple[int, ...]:
    """A thirty-second of the latents, a sixteenth, an eighth, a quarter, all."""
    return tuple(max(1, d_sae // share) for share in (32, 16, 8, 4, 1))


def _selection(sae: Any) -> tuple[Span, ...]:
    """What an accelerated SAE calls to encode without its host's method of that name."""
    places = ((sae, "_select"), (sys.modules[type(sae).__module__], "topk"))
    return tuple(Span(owner, name, "encode") for owner, name in places if hasattr(owner, name))


class DictionaryLearning:
    """`TopKTrainer.update`. It subtracts `b_dec`, projects, clips at 1, steps Adam and renormalises."""

    starts: ClassVar[str] = "threshold_start_step"
    """The trainer's option for the step from which on it follows thresholds, or asks for sparsity in full."""
    timed: ClassVar[dict[str, Any]] = {}
    """Options of the trainer whose step is timed."""

    def __init__(self, W: Tensor, k: int):
        self.trainer = self.make_trainer(k, **self.sizes(W), steps=1_000_000, lr=LR, warmup_steps=0, **self.timed)
        self.fill(W, k)

    @staticmethod
    def sizes(W: Tensor) -> dict[str, Any]:
        """Options for an SAE of the shape of `W [F, D]`."""
        d_sae, d_in = W.shape
        return {"activation_dim": d_in, "dict_size": d_sae, "layer": 0, "lm_name": "", "device": str(W.device)}

    @staticmethod
    def make_trainer(k: int, **options: Any) -> Any:
        from dictionary_learning.trainers.top_k import TopKTrainer

        return TopKTrainer(k=k, **options)

    @torch.no_grad()
    def fill(self, W: Tensor, k: int) -> None:
        self.trainer.ae.encoder.weight.copy_(W)
        self.trainer.ae.decoder.weight.copy_(W.T)
        self.trainer.ae.encoder.bias.zero_()

    def accelerate(self) -> None:
        integrations.accelerate(self.trainer)

    @property
    def spans(self) -> tuple[Span, ...]:
        return (
            Span(self.trainer.ae, "encode", "encode"),
            *_selection(self.trainer.ae),
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


class DictionaryLearningBatchTopK(DictionaryLearning):
    """`BatchTopKTrainer.update`; inference goes by the threshold, here one that k latents of a row pass on average."""

    @staticmethod
    def make_trainer(k: int, **options: Any) -> Any:
        from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer

        return BatchTopKTrainer(k=k, **options)

    def fill(self, W: Tensor, k: int) -> None:
        super().fill(W, k)
        self.trainer.ae.threshold.fill_(threshold(W, k))


class DictionaryLearningJumpReLU(DictionaryLearning):
    """`JumpReluTrainer.update`, from thresholds that k latents of a row pass on average."""

    starts = "sparsity_warmup_steps"
    timed: ClassVar[dict[str, Any]] = {"bandwidth": _BANDWIDTH, starts: 0}

    @staticmethod
    def make_trainer(k: int, **options: Any) -> Any:
        from dictionary_learning.trainers.jumprelu import JumpReluTrainer

        return JumpReluTrainer(target_l0=float(k), **options)

    @torch.no_grad()
    def fill(self, W: Tensor, k: int) -> None:
        self.trainer.ae.W_enc.copy_(W.T)
        self.trainer.ae.W_dec.copy_(W)
        self.trainer.ae.threshold.fill_(threshold(W, k))


class DictionaryLearningMatryoshka(DictionaryLearningBatchTopK):
    """`MatryoshkaBatchTopKTrainer.update`, with the prefixes of `matryoshka_prefixes`."""

    @staticmethod
    def make_trainer(k: int, **options: Any) -> Any:
        from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer

        ends = matryoshka_prefixes(options["dict_size"])
        shares = [(end - start) / ends[-1] for start, end in zip((0, *ends), ends)]
        return MatryoshkaBatchTopKTrainer(k=k, group_fractions=shares, **options)

    @torch.no_grad()
    def fill(self, W: Tensor, k: int) -> None:
        self.trainer.ae.W_enc.copy_(W.T)
        self.trainer.ae.W_dec.copy_(W)
        self.trainer.ae.threshold.fill_(threshold(W, k))


class SAELens:
    """`SAETrainer.step` of a `TopKTrainingSAE`. It clips at 1, and scales by decoder norms where others normalise."""

    def __init__(self, W: Tensor, k: int):
        from sae_lens.config import LoggingConfig, SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        sae = self.make_sae(k, **self.sizes(W))
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

    @staticmethod
    def sizes(W: Tensor) -> dict[str, Any]:
        """Options for an SAE of the shape of `W [F, D]`."""
        d_sae, d_in = W.shape
        return {"d_in": d_in, "d_sae": d_sae, "device": str(W.device)}

    @staticmethod
    def make_sae(k: int, **sizes: Any) -> Any:
        from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

        return TopKTrainingSAE(TopKTrainingSAEConfig(k=k, **sizes))

    def accelerate(self) -> None:
        integrations.accelerate(self.trainer)

    @property
    def spans(self) -> tuple[Span, ...]:
        return (
            Span(self.trainer.sae, "encode_with_hidden_pre", "encode"),
            *_selection(self.trainer.sae),
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


class SAELensBatchTopK(SAELens):
    """`SAETrainer.step` of a `BatchTopKTrainingSAE`."""

    @staticmethod
    def make_sae(k: int, **sizes: Any) -> Any:
        from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig

        return BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(k=k, **sizes))


class SAELensMatryoshka(SAELens):
    """`SAETrainer.step` of a `MatryoshkaBatchTopKTrainingSAE`, with the prefixes of `matryoshka_prefixes`."""

    @staticmethod
    def make_sae(k: int, **sizes: Any) -> Any:
        from sae_lens.saes.matryoshka_batchtopk_sae import (
            MatryoshkaBatchTopKTrainingSAE,
            MatryoshkaBatchTopKTrainingSAEConfig,
        )

        widths = list(matryoshka_prefixes(sizes["d_sae"]))
        return MatryoshkaBatchTopKTrainingSAE(
            MatryoshkaBatchTopKTrainingSAEConfig(k=k, matryoshka_widths=widths, **sizes)
        )


class SAELensJumpReLU(SAELens):
    """`SAETrainer.step` of a `JumpReLUTrainingSAE`, from thresholds that k latents of a row pass on average."""

    def __init__(self, W: Tensor, k: int):
        super().__init__(W, k)
        self.trainer.sae.threshold.data.fill_(threshold(W, k))

    @staticmethod
    def make_sae(k: int, **sizes: Any) -> Any:
        from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig

        return JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(jumprelu_bandwidth=_BANDWIDTH, **sizes))


class Sparsify:
    """`SparseCoder` with Adam, in the order of its `Trainer`, which itself only trains behind a language model.

    Left out are its counts of dead latents, to its advantage. Accelerated, coder and Adam are what they are in an
    accelerated `Trainer`.
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
        speed_up(self.optimizer)

    @property
    def spans(self) -> tuple[Span, ...]:
        return (
            Span(self.coder, "encode", "encode"),
            *_selection(self.coder),
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


class _OwnLoop:
    """An SAE that is trained by a few lines of the user's own: a loss, its backward, Adam."""

    loss_method: str
    """The method that decodes."""

    def __init__(self, sae: Any, W_enc: Tensor, W_dec: Tensor, W: Tensor):
        self.sae = sae
        with torch.no_grad():
            W_enc.copy_(W if W_enc.shape == W.shape else W.T)
            W_dec.copy_(W)
        self.optimizer = torch.optim.Adam(sae.parameters(), lr=LR)

    def accelerate(self) -> None:
        integrations.accelerate(self.sae)

    @property
    def spans(self) -> tuple[Span, ...]:
        return (
            Span(self.sae, "encode", "encode"),
            Span(torch, "topk", "select"),
            Span(torch.Tensor, "topk", "select"),
            Span(self.sae, self.loss_method, "decode + loss"),
            Span(torch.Tensor, "backward", "backward"),
            Span(self.optimizer, "step", "optimizer"),
        )

    def loss(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def __call__(self, x: Tensor) -> float:
        loss = self.loss(x)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


class Llamascopium(_OwnLoop):
    """`SparseAutoEncoder.compute_loss`. Nothing holds decoder rows or clips; Adam is as in an accelerated `Trainer`."""

    loss_method = "compute_loss"

    def __init__(self, W: Tensor, k: int):
        from llamascopium.models.sae import SAEConfig, SparseAutoEncoder

        d_sae, d_in = W.shape
        places = {"hook_point_in": "x", "hook_point_out": "x", "device": str(W.device)}
        config = SAEConfig(d_model=d_in, expansion_factor=d_sae / d_in, act_fn="topk", top_k=k, **places)
        sae = SparseAutoEncoder(config)
        sae.init_parameters(encoder_uniform_bound=0.1, decoder_uniform_bound=0.1)
        super().__init__(sae, sae.W_E, sae.W_D, W)

    def accelerate(self) -> None:
        super().accelerate()
        speed_up(self.optimizer)

    def loss(self, x: Tensor) -> Tensor:
        return self.sae.compute_loss({"x": x, "tokens": x[:, 0]})["loss"]

    @torch.no_grad()
    def infer(self, x: Tensor) -> Tensor:
        return self.sae(x)


class Overcomplete(_OwnLoop):
    """`TopKSAE` with its linear encoder, on the squared error; it normalises its dictionary whenever it decodes."""

    loss_method = "forward"

    def __init__(self, W: Tensor, k: int):
        from overcomplete.sae import TopKSAE

        d_sae, d_in = W.shape
        sae = TopKSAE(d_in, d_sae, top_k=k, device=str(W.device))
        linear = sae.encoder.final_block[0]
        super().__init__(sae, linear.weight, sae.dictionary._weights, W)
        torch.nn.init.zeros_(linear.bias)

    def loss(self, x: Tensor) -> Tensor:
        self.sae.train()
        return (x - self.sae(x)[2]).square().sum(-1).mean()

    @torch.no_grad()
    def infer(self, x: Tensor) -> Tensor:
        self.sae.eval()
        return self.sae(x)[2]
