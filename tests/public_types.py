"""What a type checker must see of the public names: `make lint` runs mypy over this file, and nothing runs it."""

from __future__ import annotations

from pathlib import Path
from typing import assert_type

import aksae
import torch
from aksae import formats
from torch import Tensor

import aksae_kernels as ak
from aksae_kernels.integrations import accelerate, priced
from aksae_kernels.layers import SparseDecoder, TopKEncoder
from aksae_kernels.optim import SAEAdam


def ops(x: Tensor, W: Tensor, b: Tensor | None, k: Tensor) -> None:
    codes = ak.topk_encode(x, W, b, k=k, k_max=320)
    assert_type(codes, ak.SparseCodes)
    assert_type(codes.values, Tensor)
    assert_type(codes.counts, Tensor)
    assert_type(ak.batch_topk_encode(x, W, b, budget=64, k_max=320), ak.SparseCodes)
    assert_type(ak.threshold_encode(x, W, b, threshold=0.5, k_max=320), ak.SparseCodes)
    assert_type(ak.encode_at(codes, x, W, b), ak.SparseCodes)
    assert_type(ak.topk_select(x, 4), ak.SparseCodes)
    assert_type(ak.batch_topk_select(x, 4 * len(x)), ak.SparseCodes)
    assert_type(ak.threshold_select(x, 0.5), ak.SparseCodes)
    assert_type(ak.price_select(codes, W, b, x, price=0.5), ak.SparseCodes)
    assert_type(ak.price_for([(codes, x)], W, b, 32), Tensor)
    assert_type(ak.sparse_decode(codes, W, b), Tensor)
    assert_type(ak.decode_mse(codes, W, b, x), Tensor)
    assert_type(ak.sparse_encode(codes, x, W), Tensor)
    assert_type(ak.sparse_value_grad(x, codes, W), Tensor)
    assert_type(ak.sparse_weight_grad(codes, x, 4096), Tensor)
    assert_type(codes.to_dense(4096), Tensor)
    assert_type(codes.mask(), Tensor)
    assert_type(codes.gather(x), Tensor)
    assert_type(ak.SparseCodes.from_dense(x, 32), ak.SparseCodes)
    assert_type(codes.to("cpu", torch.float64), ak.SparseCodes)
    assert_type(codes.cpu().detach(), ak.SparseCodes)
    assert_type(ak.available_backends(), tuple[str, ...])
    assert_type(ak.explain("topk_encode", x, W, b, k=4), str)
    with ak.use_backend("reference"), ak.frozen(W):
        pass


def modules(x: Tensor) -> None:
    encoder, decoder = TopKEncoder(16, 64, k=4), SparseDecoder(64, 16)
    assert_type(encoder.forward(x), ak.SparseCodes)
    assert_type(decoder.forward(encoder.forward(x)), Tensor)
    assert_type(encoder.weight, torch.nn.Parameter)
    optimizer = SAEAdam([{"params": [decoder.weight], "unit_norm_rows": True}], lr=1e-3, max_grad_norm=1.0)
    assert_type(optimizer.last_grad_norm, Tensor | None)
    optimizer.step()
    assert_type(accelerate(encoder), TopKEncoder)
    assert_type(priced(encoder, 0.5, k_max=32), TopKEncoder)


def training(x: Tensor, folder: Path) -> None:
    sae = aksae.SAE(aksae.SAEConfig(d_in=16, d_sae=64, selection=aksae.TopK(4)))
    assert_type(sae.encode(x), ak.SparseCodes)
    assert_type(sae.decode(sae.encode(x)), Tensor)
    assert_type(aksae.AdaptiveKSAE.from_pretrained(folder), aksae.AdaptiveKSAE)
    assert_type(aksae.train(aksae.TrainConfig(output=folder)), aksae.TrainResult)
    assert_type(formats.load(folder), formats.StoredSAE)
    assert_type(aksae.__version__, str)
