"""Train a TopK SAE with Llamascopium's own Trainer, as ever and with one line faster."""

import tempfile
import time
import warnings

import torch

from aksae_kernels.integrations import accelerate

warnings.simplefilter("ignore")  # of Llamascopium's imports, and of its autocast on a CPU

from llamascopium.models.sae import SAEConfig, SparseAutoEncoder  # noqa: E402
from llamascopium.trainer import Trainer, TrainerConfig  # noqa: E402

ROWS, D, F, K, STEPS = 512, 256, 8192, 32, 10
torch.manual_seed(0)
x = torch.randn(STEPS, ROWS, 1024).relu().pow(3) @ torch.randn(1024, D)
tokens = {"tokens": torch.zeros(ROWS, dtype=torch.long), "mask": torch.ones(ROWS, dtype=torch.long)}
stream = [{"resid": rows, **tokens} for rows in x]


def make_sae() -> SparseAutoEncoder:
    hooks = {"hook_point_in": "resid", "hook_point_out": "resid", "norm_activation": "token-wise"}
    sae = SparseAutoEncoder(SAEConfig(d_model=D, expansion_factor=F / D, act_fn="topk", top_k=K, **hooks))
    torch.manual_seed(1)
    sae.init_parameters(encoder_uniform_bound=0.1, decoder_uniform_bound=0.1)
    return sae


def make_trainer(folder: str) -> Trainer:
    schedule = {"total_training_tokens": STEPS * ROWS, "lr": 1e-3, "lr_warm_up_steps": 1, "initial_k": K}
    config = {"amp_dtype": torch.float32, "n_checkpoints": 0, "log_frequency": 1000, **schedule}
    return Trainer(TrainerConfig(exp_result_path=folder, **config))


with tempfile.TemporaryDirectory() as folder:
    for name, trainer in (("Llamascopium", make_trainer(folder)), ("accelerated", accelerate(make_trainer(folder)))):
        sae = make_sae()
        start = time.perf_counter()
        trainer.fit(sae, stream)
        milliseconds = (time.perf_counter() - start) / STEPS * 1e3
        with torch.no_grad():
            batch = sae.normalize_activations(stream[0])
            loss = sae.compute_loss(batch, return_aux_data=False)
        print(f"{name}: {milliseconds:.0f} ms a step, loss {loss:.2f}")
