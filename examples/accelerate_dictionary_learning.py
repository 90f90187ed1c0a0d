"""Speed up a trainer of dictionary_learning with one line; what it saves loads in dictionary_learning as ever.

The data are made up. Most users of dictionary_learning call `trainSAE`, which makes its trainers from their classes:
there the one line is `"trainer": FastTopKTrainer`, from `aksae_kernels.integrations.dictionary_learning`.
"""

import tempfile
import time

import torch
from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer

from aksae_kernels.integrations import accelerate

ROWS, D, F, K, STEPS = 512, 256, 8192, 32, 8
torch.manual_seed(0)
directions = torch.nn.functional.normalize(torch.randn(1024, D), dim=-1)


def batch() -> torch.Tensor:
    return (torch.rand(ROWS, 1024) < 0.01).float() @ directions


def train(steps: range) -> float:
    """Milliseconds of a step, of all steps the median."""
    times = []
    for step in steps:
        x, begin = batch(), time.perf_counter()
        losses.append(trainer.update(step, x))
        times.append(1e3 * (time.perf_counter() - begin))
    return sorted(times)[len(times) // 2]


losses = []
sizes = {"activation_dim": D, "dict_size": F, "k": K}
trainer = TopKTrainer(steps=100, warmup_steps=2, lr=1e-3, layer=0, lm_name="none", device="cpu", **sizes)
before = train(range(STEPS))
accelerate(trainer)
after = train(range(STEPS, 3 * STEPS))
print(f"a training step takes {before:.0f} ms before and {after:.0f} ms after accelerate")
print(f"loss {losses[0]:.3f}, {losses[STEPS]:.3f} at the change, {losses[-1]:.3f} in the end")

with tempfile.NamedTemporaryFile(suffix=".pt") as file:
    torch.save(trainer.ae.state_dict(), file.name)
    loaded = AutoEncoderTopK.from_pretrained(file.name)
x = batch()
print(f"{type(loaded).__name__} from its file differs by {(loaded(x) - trainer.ae(x)).abs().max():.0e}")
