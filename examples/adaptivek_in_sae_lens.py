"""Train an AdaptiveK SAE with SAELens' own trainer, and load its file with SAELens' own loader.

The data are made up: a row is a sum of 1 to 16 random directions, and how many there are is its complexity.
"""

import tempfile

import torch
from aksae.hosts.sae_lens import AdaptiveKTrainingSAELens, AdaptiveKTrainingSAELensConfig
from aksae.probe import ComplexityProbe
from sae_lens import SAE, LoggingConfig, SAETrainer
from sae_lens.config import SAETrainerConfig

D, F, ROWS, STEPS = 32, 256, 256, 150
torch.manual_seed(0)
directions = torch.nn.functional.normalize(torch.randn(128, D), dim=-1) + torch.eye(D)[0] / 2


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    n = torch.randint(1, 17, (ROWS, 1))
    chosen = torch.rand(ROWS, 128).argsort(-1) < n
    return (chosen * (1 + torch.rand(ROWS, 128))) @ directions, n.squeeze(1).float()


x, n = batch()
probe, report = ComplexityProbe.fit(x, n / 1.6, lambdas=(0.1, 1.0, 10.0))
print(f"probe: error {report.heldout_rmse:.2f} on a scale of 0 to 10")
sae = AdaptiveKTrainingSAELens(AdaptiveKTrainingSAELensConfig(d_in=D, d_sae=F, k_min=2, k_max=32))
sae.set_probe(probe)
config = SAETrainerConfig(
    total_training_samples=ROWS * STEPS,
    train_batch_size_samples=ROWS,
    device="cpu",
    autocast=False,
    lr=3e-3,
    lr_end=3e-4,
    lr_scheduler_name="constant",
    lr_warm_up_steps=10,
    lr_decay_steps=50,
    n_restart_cycles=1,
    adam_beta1=0.9,
    adam_beta2=0.999,
    dead_feature_window=50,
    feature_sampling_window=1000,
    n_checkpoints=0,
    checkpoint_path=None,
    save_final_checkpoint=False,
    logger=LoggingConfig(log_to_wandb=False),
)
SAETrainer(config, sae, (batch()[0] for _ in iter(int, 1))).fit()

with tempfile.TemporaryDirectory() as folder:
    sae.save_inference_model(folder)
    loaded = SAE.load_from_disk(folder)
unexplained = (loaded(x) - x).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
print(f"{type(loaded).__name__} of architecture {loaded.cfg.architecture()}: FVU {unexplained:.3f}")
for low, high in ((1, 4), (5, 8), (9, 12), (13, 16)):
    l0 = (loaded.encode(x[(n >= low) & (n <= high)]) > 0).sum(-1).float().mean()
    print(f"{low:2} to {high:2} directions: {l0:.1f} latents")
