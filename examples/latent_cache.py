"""Cache which latents fire where, without a dense activation, and look a latent up in the files.

The files are those that delphi's `LatentDataset` reads. Tokens, activations and SAE are made up.
"""

import tempfile
from pathlib import Path

import torch
from aksae import AdaptiveK, AdaptiveKSAE, KMap, SAEConfig
from aksae.hosts.latent_cache import LatentCache
from safetensors.torch import load_file

D, F, BATCH, SEQ = 64, 16384, 8, 128
torch.manual_seed(0)
sae = AdaptiveKSAE(SAEConfig(D, F, AdaptiveK(KMap(k_min=20, k_max=320))))
sae.probe.weight.data.normal_(std=0.25)
sae.probe.bias.data.fill_(5.0)
embedding = torch.randn(500, D)

cache = LatentCache({"layers.15": sae.encode}, F)
for _ in range(8):
    tokens = torch.randint(0, 500, (BATCH, SEQ))
    cache.add(tokens, {"layers.15": embedding[tokens]})

with tempfile.TemporaryDirectory() as folder:
    cache.save(folder, model_name="made-up", n_splits=4)
    files = sorted(Path(folder, "layers.15").glob("*.safetensors"))
    stored = sum(file.stat().st_size for file in files)
    print(f"{8 * BATCH * SEQ} tokens, {F} latents: {stored / 1e6:.0f} MB in {len(files)} files")
    print(f"dense, in fp32: {8 * BATCH * SEQ * F * 4 / 1e6:.0f} MB")

    data = load_file(files[0])
    sequence, position, latent = data["locations"].long().unbind(1)
    counts = latent.bincount()
    busiest = int(counts.argmax())
    mine = latent == busiest
    best = data["activations"][mine].float().argmax()
    token = int(data["tokens"][sequence[mine][best], position[mine][best]])
    print(f"latent {busiest} fires on {int(counts[busiest])} tokens, most on token {token}")
    expected = sae.encode(embedding[token]).to_dense(F)[busiest]
    print(f"there its activation is {data['activations'][mine].max():.3f}; the SAE says {expected:.3f}")
