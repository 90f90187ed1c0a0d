"""SAEs in the files of other projects: read by their rules, written back bit for bit, converted or refused."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from aksae import SAE, AdaptiveKSAE, FitConfig, KMap, SAEConfig, TopK, UserError, cli, fit, formats, selections
from aksae.config import to_dict
from aksae.formats import FORMATS, WRITTEN, StoredSAE
from aksae.formats.stored import AdaptiveK, JumpReLU
from aksae.k_policy import score_to_k
from safetensors.torch import load_file, save_file
from torch import Tensor

D_IN, D_OUT, D_SAE, K = 12, 9, 40, 5


class Sample(NamedTuple):
    """Files as a host writes them, and what that host makes of an input."""

    format: str
    files: dict[str, Any]
    """By name within the folder; `""` for a format of one file."""
    output: Callable[[Tensor], Tensor]
    latents: Callable[[Tensor], Tensor]
    into: set[str]
    """The other formats that hold this SAE; the others refuse it."""


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def weights(d_out: int = D_IN) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W_enc `[F, D]`, b_enc, W_dec `[F, D_out]` with rows of many lengths, b_dec."""
    W_dec = randn(D_SAE, d_out, seed=3) * torch.linspace(0.3, 2, D_SAE, dtype=torch.float64)[:, None]
    return randn(D_SAE, D_IN, seed=1), 0.3 * randn(D_SAE, seed=2), W_dec, randn(d_out, seed=4)


def topk(acts: Tensor, k: int) -> Tensor:
    values, indices = acts.topk(k)
    return torch.zeros_like(acts).scatter(-1, indices, values)


def above(acts: Tensor, threshold: Tensor | float) -> Tensor:
    return acts * (acts > threshold) * (acts > 0)


def layer_norm(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.mean(-1, keepdim=True)
    std = (x - mean).std(-1, keepdim=True)
    return (x - mean) / (std + 1e-5), mean, std


SAMPLES: dict[str, Callable[[], Sample]] = {}


def sample(function: Callable[[], Sample]) -> Callable[[], Sample]:
    SAMPLES[function.__name__] = function
    return function


TOPK_HOSTS = {"native", "sparsify", "sae_lens", "dictionary_learning", "llamascopium"}
ADAPTIVE_HOSTS = {"native", "adaptivek", "sae_lens", "dictionary_learning"}
THRESHOLD_HOSTS = {"sae_lens", "dictionary_learning", "llamascopium"}


def selection_for(k: int | None, k_max: int = 12) -> selections.Selection:
    return TopK(k) if k is not None else selections.AdaptiveK(KMap(k_min=1, k_max=k_max))


@sample
def native_adaptive():
    W_enc, b_enc, W_dec, b_dec = weights()
    weight, bias = randn(D_IN, seed=5), torch.tensor(5.0, dtype=torch.float64)
    config = SAEConfig(D_IN, D_SAE, k_min=1, k_max=12, probe_lambda=3.0)

    def latents(x):
        k = score_to_k((x @ weight + bias).clamp(0, 10), k_min=1, k_max=12)
        acts = F.linear(x - b_dec, W_enc, b_enc).relu()
        return torch.stack([topk(row, int(n)) for row, n in zip(acts, k)])

    tensors = {
        "W_enc": W_enc,
        "b_enc": b_enc,
        "W_dec": W_dec,
        "b_dec": b_dec,
        "probe.weight": weight,
        "probe.bias": bias,
    }
    files = {"config.json": to_dict(config), "sae.safetensors": tensors}
    return Sample("native", files, lambda x: latents(x) @ W_dec + b_dec, latents, ADAPTIVE_HOSTS - {"native"})


@sample
def native_topk():
    W_enc, b_enc, W_dec, b_dec = weights()
    tensors = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    latents = lambda x: topk(F.linear(x - b_dec, W_enc, b_enc).relu(), K)
    files = {"config.json": to_dict(SAEConfig(D_IN, D_SAE, TopK(K))), "sae.safetensors": tensors}
    return Sample("native", files, lambda x: latents(x) @ W_dec + b_dec, latents, TOPK_HOSTS - {"native"})


@sample
def adaptivek():
    native = native_adaptive()
    t = native.files["sae.safetensors"]
    files = {
        "dynamic_config.json": {
            "activation_dim": D_IN,
            "dict_size": D_SAE,
            "base_k": 4,
            "min_k": 1,
            "max_k": 12,
            "l1_weight": 0.005,
            "probe_weight": 0.05,
            "trainer_type": "DynamicTopKTrainer",
        },
        "probe.pt": {"weights": t["probe.weight"][:, None], "bias": t["probe.bias"][None]},
        "ae.pt": {
            "b_dec": t["b_dec"],
            "encoder.weight": t["W_enc"],
            "encoder.bias": t["b_enc"],
            "decoder.weight": t["W_dec"].T,
        },
    }
    return Sample("adaptivek", files, native.output, native.latents, ADAPTIVE_HOSTS - {"adaptivek"})


@sample
def sparsify_of_expansion_factor():
    W_enc, b_enc, W_dec, b_dec = weights()
    W_enc, b_enc, W_dec = W_enc[:36], b_enc[:36], W_dec[:36]
    latents = lambda x: topk(F.linear(x - b_dec, W_enc, b_enc).relu(), K)
    files = {
        "cfg.json": {
            "activation": "topk",
            "expansion_factor": 3,
            "normalize_decoder": True,
            "num_latents": 0,
            "k": K,
            "multi_topk": False,
            "skip_connection": False,
            "transcode": False,
            "d_in": D_IN,
        },
        "sae.safetensors": {"encoder.weight": W_enc, "encoder.bias": b_enc, "W_dec": W_dec, "b_dec": b_dec},
    }
    return Sample("sparsify", files, lambda x: latents(x) @ W_dec + b_dec, latents, TOPK_HOSTS - {"sparsify"})


@sample
def sparsify_skip_transcoder():
    W_enc, b_enc, W_dec, b_dec = weights()
    W_skip = randn(D_IN, D_IN, seed=5)
    latents = lambda x: topk(F.linear(x, W_enc, b_enc).relu(), K)
    files = {
        # As old as they come: no activation, no multi_topk.
        "cfg.json": {
            "expansion_factor": 32,
            "num_latents": D_SAE,
            "k": K,
            "signed": False,
            "skip_connection": True,
            "transcode": True,
            "d_in": D_IN,
        },
        "sae.safetensors": {
            "encoder.weight": W_enc,
            "encoder.bias": b_enc,
            "W_dec": W_dec,
            "b_dec": b_dec,
            "W_skip": W_skip,
        },
    }
    return Sample("sparsify", files, lambda x: latents(x) @ W_dec + b_dec + x @ W_skip.T, latents, set())


def sae_lens_files(architecture, tensors, *, d_out=D_IN, **fields):
    W_enc, b_enc, W_dec, b_dec = weights(d_out)
    config = {
        "d_in": D_IN,
        "d_sae": D_SAE,
        "dtype": "float64",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.54.12", "model_name": "gpt2", "hook_name": "blocks.3.hook_resid_post"},
        "architecture": architecture,
    }
    tensors = {"W_enc": W_enc.T, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec, **tensors}
    return {"cfg.json": {**config, **fields}, "sae_weights.safetensors": tensors}


@sample
def sae_lens_topk_by_decoder_norm():
    W_enc, b_enc, W_dec, b_dec = weights()
    norm = W_dec.norm(dim=-1)
    # TopK first, ReLU after: the values are the same.
    latents = lambda x: topk(F.linear(x - b_dec, W_enc, b_enc) * norm, K).relu()
    files = sae_lens_files("topk", {}, k=K, rescale_acts_by_decoder_norm=True, apply_b_dec_to_input=True)
    output = lambda x: (latents(x) / norm) @ W_dec + b_dec
    return Sample("sae_lens", files, output, latents, TOPK_HOSTS - {"sae_lens"})


@sample
def sae_lens_topk_of_version_5():
    W_enc, b_enc, W_dec, b_dec = weights()
    latents = lambda x: topk(F.linear(x, W_enc, b_enc), K).relu()
    files = sae_lens_files(
        "standard",
        {"scaling_factor": torch.ones(D_SAE, dtype=torch.float64)},
        activation_fn_str="topk",
        activation_fn_kwargs={"k": K},
        normalize_activations=False,
        hook_point="blocks.3.hook_resid_post",
    )
    del files["cfg.json"]["metadata"]
    return Sample("sae_lens", files, lambda x: latents(x) @ W_dec + b_dec, latents, TOPK_HOSTS - {"sae_lens"})


@sample
def sae_lens_adaptivek():
    """Of `aksae.hosts.sae_lens`."""
    native = native_adaptive()
    probe = {name: t for name, t in native.files["sae.safetensors"].items() if name.startswith("probe")}
    fields = {"k_min": 1, "k_max": 12, "probe_reads": "token", "apply_b_dec_to_input": True}
    files = sae_lens_files("adaptivek", probe, **fields)
    return Sample("sae_lens", files, native.output, native.latents, ADAPTIVE_HOSTS - {"sae_lens"})


@sample
def sae_lens_jumprelu():
    W_enc, b_enc, W_dec, b_dec = weights()
    threshold = randn(D_SAE, seed=6).abs()
    latents = lambda x: above(F.linear(x - b_dec, W_enc, b_enc), threshold)
    files = sae_lens_files("jumprelu", {"threshold": threshold}, apply_b_dec_to_input=True)
    return Sample("sae_lens", files, lambda x: latents(x) @ W_dec + b_dec, latents, THRESHOLD_HOSTS - {"sae_lens"})


@sample
def sae_lens_batchtopk_checkpoint():
    W_enc, b_enc, W_dec, b_dec = weights()
    norm = W_dec.norm(dim=-1)
    latents = lambda x: above(F.linear(x - b_dec, W_enc, b_enc) * norm, 1.25)
    files = sae_lens_files(
        "batchtopk",
        {"topk_threshold": torch.tensor(1.25, dtype=torch.float64)},
        k=5.5,
        rescale_acts_by_decoder_norm=True,
        apply_b_dec_to_input=True,
    )
    output = lambda x: (latents(x) / norm) @ W_dec + b_dec
    return Sample("sae_lens", files, output, latents, THRESHOLD_HOSTS - {"sae_lens"})


@sample
def sae_lens_standard_with_layer_norm():
    W_enc, b_enc, W_dec, b_dec = weights()
    latents = lambda x: F.linear(layer_norm(x)[0] - b_dec, W_enc, b_enc).relu()
    files = sae_lens_files("standard", {}, normalize_activations="layer_norm", apply_b_dec_to_input=True)

    def output(x):
        _, mean, std = layer_norm(x)
        return (latents(x) @ W_dec + b_dec) * std + mean

    return Sample("sae_lens", files, output, latents, set())


@sample
def sae_lens_standard_of_constant_norm():
    W_enc, b_enc, W_dec, b_dec = weights()
    factor = lambda x: D_IN**0.5 / x.norm(dim=-1, keepdim=True)
    latents = lambda x: F.linear(x * factor(x), W_enc, b_enc).relu()
    files = sae_lens_files("standard", {}, normalize_activations="constant_norm_rescale")
    output = lambda x: (latents(x) @ W_dec + b_dec) / factor(x)
    return Sample("sae_lens", files, output, latents, {"llamascopium"})


@sample
def sae_lens_transcoder_of_another_width():
    W_enc, b_enc, W_dec, b_dec = weights(D_OUT)
    latents = lambda x: F.linear(x, W_enc, b_enc).relu()
    files = sae_lens_files("transcoder", {}, d_out=D_OUT)
    files["cfg.json"]["d_out"] = D_OUT
    return Sample("sae_lens", files, lambda x: latents(x) @ W_dec + b_dec, latents, set())


@sample
def sae_lens_jumprelu_skip_transcoder():
    W_enc, b_enc, W_dec, b_dec = weights()
    W_skip, threshold = randn(D_IN, D_IN, seed=5), randn(D_SAE, seed=6).abs()
    latents = lambda x: above(F.linear(x, W_enc, b_enc), threshold)
    files = sae_lens_files("jumprelu_skip_transcoder", {"W_skip": W_skip, "threshold": threshold})
    files["cfg.json"]["d_out"] = D_IN
    output = lambda x: latents(x) @ W_dec + b_dec + x @ W_skip.T
    return Sample("sae_lens", files, output, latents, {"circuit_tracer"})


def dictionary_learning_files(kind, tensors, **fields):
    trainer = {
        "dict_class": kind,
        "activation_dim": D_IN,
        "dict_size": D_SAE,
        "layer": 3,
        "lm_name": "pythia",
        **fields,
    }
    return {"config.json": {"trainer": trainer, "buffer": {"ctx_len": 128}}, "ae.pt": tensors}


def linear(b_dec_name):
    W_enc, b_enc, W_dec, b_dec = weights()
    return {"encoder.weight": W_enc, "encoder.bias": b_enc, "decoder.weight": W_dec.T, b_dec_name: b_dec}


@sample
def dictionary_learning_topk():
    W_enc, b_enc, W_dec, b_dec = weights()
    buffers = {"k": torch.tensor(K, dtype=torch.int32), "threshold": torch.tensor(0.7)}
    latents = lambda x: topk(F.linear(x - b_dec, W_enc, b_enc).relu(), K)
    files = dictionary_learning_files("AutoEncoderTopK", {**linear("b_dec"), **buffers}, k=K)
    into = TOPK_HOSTS - {"dictionary_learning"}
    return Sample("dictionary_learning", files, lambda x: latents(x) @ W_dec + b_dec, latents, into)


@sample
def dictionary_learning_adaptivek():
    """Of `aksae.hosts.dictionary_learning`."""
    native = native_adaptive()
    tensors = {name: t for name, t in native.files["sae.safetensors"].items() if name.startswith("probe")}
    tensors["_extra_state"] = torch.tensor([1, 12, 6, 0, 10], dtype=torch.float64)
    tensors |= {"k": torch.tensor(12, dtype=torch.int32), "threshold": torch.tensor(-1.0), **linear("b_dec")}
    files = dictionary_learning_files("AutoEncoderAdaptiveK", tensors, k=12)
    into = ADAPTIVE_HOSTS - {"dictionary_learning"}
    return Sample("dictionary_learning", files, native.output, native.latents, into)


@sample
def dictionary_learning_batchtopk():
    W_enc, b_enc, W_dec, b_dec = weights()
    buffers = {"k": torch.tensor(K, dtype=torch.int32), "threshold": torch.tensor(0.7)}
    latents = lambda x: above(F.linear(x - b_dec, W_enc, b_enc), buffers["threshold"])
    files = dictionary_learning_files("BatchTopKSAE", {**linear("b_dec"), **buffers}, k=K)
    into = THRESHOLD_HOSTS - {"dictionary_learning"}
    return Sample("dictionary_learning", files, lambda x: latents(x) @ W_dec + b_dec, latents, into)


@sample
def dictionary_learning_matryoshka_untrained():
    W_enc, b_enc, W_dec, b_dec = weights()
    tensors = {
        "W_enc": W_enc.T,
        "b_enc": b_enc,
        "W_dec": W_dec,
        "b_dec": b_dec,
        "k": torch.tensor(K, dtype=torch.int32),
        "threshold": torch.tensor(-1.0),
        "group_sizes": torch.tensor([10, 30]),
    }
    latents = lambda x: F.linear(x - b_dec, W_enc, b_enc).relu()
    files = dictionary_learning_files("MatryoshkaBatchTopKSAE", tensors, k=K)
    into = THRESHOLD_HOSTS - {"dictionary_learning"}
    return Sample("dictionary_learning", files, lambda x: latents(x) @ W_dec + b_dec, latents, into)


@sample
def dictionary_learning_jumprelu():
    W_enc, b_enc, W_dec, b_dec = weights()
    threshold = randn(D_SAE, seed=6).abs()
    tensors = {"W_enc": W_enc.T, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec, "threshold": threshold}
    latents = lambda x: above(F.linear(x, W_enc, b_enc), threshold)
    files = dictionary_learning_files("JumpReluAutoEncoder", tensors)
    into = THRESHOLD_HOSTS - {"dictionary_learning"}
    return Sample("dictionary_learning", files, lambda x: latents(x) @ W_dec + b_dec, latents, into)


@sample
def dictionary_learning_relu():
    W_enc, b_enc, W_dec, b_dec = weights()
    latents = lambda x: F.linear(x - b_dec, W_enc, b_enc).relu()
    files = dictionary_learning_files("AutoEncoder", linear("bias"))
    into = {"sae_lens", "openai", "llamascopium"}
    return Sample("dictionary_learning", files, lambda x: latents(x) @ W_dec + b_dec, latents, into)


@sample
def dictionary_learning_relu_of_april():
    W_enc, b_enc, W_dec, b_dec = weights()
    latents = lambda x: F.linear(x, W_enc, b_enc).relu()
    files = dictionary_learning_files("AutoEncoderNew", linear("decoder.bias"))
    into = {"sae_lens", "openai", "llamascopium"}
    return Sample("dictionary_learning", files, lambda x: latents(x) @ W_dec + b_dec, latents, into)


def openai_files(activation, state):
    W_enc, b_enc, W_dec, b_dec = weights()
    tensors = {
        "pre_bias": b_dec,
        "latent_bias": b_enc,
        "stats_last_nonzero": torch.arange(D_SAE),
        "latents_activation_frequency": torch.rand(D_SAE),
        "latents_mean_square": torch.rand(D_SAE),
        "encoder.weight": W_enc,
        "decoder.weight": W_dec.T,
    }
    return {"": {**tensors, "activation": activation, "activation_state_dict": state}}


@sample
def openai_topk():
    W_enc, b_enc, W_dec, b_dec = weights()
    latents = lambda x: topk(F.linear(layer_norm(x)[0] - b_dec, W_enc, b_enc), K).relu()

    def output(x):
        _, mean, std = layer_norm(x)
        return (latents(x) @ W_dec + b_dec) * std + mean

    files = openai_files("TopK", {"k": K, "postact_fn": "ReLU"})
    return Sample("openai", files, output, latents, {"sae_lens"})


@sample
def openai_relu():
    W_enc, b_enc, W_dec, b_dec = weights()
    latents = lambda x: F.linear(x - b_dec, W_enc, b_enc).relu()
    into = {"sae_lens", "dictionary_learning", "llamascopium"}
    return Sample("openai", openai_files("ReLU", {}), lambda x: latents(x) @ W_dec + b_dec, latents, into)


def llamascopium_files(act_fn, tensors, **fields):
    W_enc, b_enc, W_dec, b_dec = weights()
    config = {
        "sae_type": "sae",
        "d_model": D_IN,
        "expansion_factor": D_SAE / D_IN,
        "use_decoder_bias": True,
        "act_fn": act_fn,
        "norm_activation": "inference",
        "sparsity_include_decoder_norm": True,
        "top_k": K,
        "use_triton_kernel": False,
        "jumprelu_threshold_window": 2.0,
        "hook_point_in": "blocks.3.in",
        "hook_point_out": "blocks.3.in",
        "use_glu_encoder": False,
    }
    tensors = {"W_E": W_enc.T, "b_E": b_enc, "W_D": W_dec, "b_D": b_dec, **tensors}
    return {"config.json": {**config, **fields}, "sae_weights.safetensors": tensors}


@sample
def llamascopium_topk_by_decoder_norm():
    W_enc, b_enc, W_dec, b_dec = weights()
    norm = W_dec.norm(dim=-1)
    latents = lambda x: topk((F.linear(x, W_enc, b_enc) * norm).relu(), K) / norm
    # What stands there when no norm was ever set is whatever memory held.
    files = llamascopium_files("topk", {"dataset_average_activation_norm.blocks.3.in": torch.tensor(float("nan"))})
    into = TOPK_HOSTS - {"llamascopium"}
    return Sample("llamascopium", files, lambda x: latents(x) @ W_dec + b_dec, latents, into)


@sample
def llamascopium_jumprelu_by_decoder_norm_and_scale():
    W_enc, b_enc, W_dec, b_dec = weights()
    norm, scale = W_dec.norm(dim=-1), D_IN**0.5 / 2.5
    log = randn(D_SAE, seed=6)
    latents = lambda x: above(F.linear(x * scale, W_enc, b_enc) * norm, log.exp()) / norm
    tensors = {
        "activation_function.log_jumprelu_threshold": log,
        "dataset_average_activation_norm.blocks.3.in": torch.tensor(2.5),
    }
    files = llamascopium_files("jumprelu", tensors, norm_activation="dataset-wise")
    into = THRESHOLD_HOSTS - {"llamascopium"}
    return Sample("llamascopium", files, lambda x: (latents(x) @ W_dec + b_dec) / scale, latents, into)


@sample
def llamascopium_relu_normalised_by_token():
    W_enc, b_enc, W_dec, b_dec = weights()
    factor = lambda x: D_IN**0.5 / x.norm(dim=-1, keepdim=True)
    latents = lambda x: F.linear(x * factor(x), W_enc, b_enc).relu()
    files = llamascopium_files("relu", {}, norm_activation="token-wise")
    output = lambda x: (latents(x) @ W_dec + b_dec) / factor(x)
    return Sample("llamascopium", files, output, latents, {"sae_lens"})


@sample
def llamascopium_transcoder_of_two_scales():
    W_enc, b_enc, W_dec, b_dec = weights()
    scale_in, scale_out = D_IN**0.5 / 2.5, D_IN**0.5 / 4
    latents = lambda x: topk(F.linear(x * scale_in, W_enc, b_enc).relu(), K)
    norms = {"blocks.3.in": torch.tensor(2.5), "blocks.3.out": torch.tensor(4.0)}
    tensors = {f"dataset_average_activation_norm.{hook}": norm for hook, norm in norms.items()}
    fields = {"hook_point_out": "blocks.3.out", "sparsity_include_decoder_norm": False}
    files = llamascopium_files("topk", tensors, norm_activation="dataset-wise", **fields)
    return Sample("llamascopium", files, lambda x: (latents(x) @ W_dec + b_dec) / scale_out, latents, {"sparsify"})


@sample
def llamascopium_pickled_without_decoder_bias():
    W_enc, b_enc, W_dec, _ = weights()
    files = llamascopium_files("relu", {}, use_decoder_bias=False, sparsity_include_decoder_norm=False)
    tensors = files.pop("sae_weights.safetensors")
    del tensors["b_D"]
    files["sae_weights.pt"] = {"sae": tensors, "version": "2.0.0"}
    latents = lambda x: F.linear(x, W_enc, b_enc).relu()
    into = {"sae_lens", "dictionary_learning", "openai"}
    return Sample("llamascopium", files, lambda x: latents(x) @ W_dec, latents, into)


@sample
def circuit_tracer_jumprelu():
    W_enc, b_enc, W_dec, b_dec = weights()
    threshold = randn(D_SAE, seed=6).abs()
    tensors = {
        "W_enc": W_enc,
        "W_dec": W_dec,
        "b_enc": b_enc,
        "b_dec": b_dec,
        "activation_function.threshold": threshold,
    }
    latents = lambda x: above(F.linear(x, W_enc, b_enc), threshold)
    into = {"sae_lens", "llamascopium"}
    return Sample("circuit_tracer", {"": tensors}, lambda x: latents(x) @ W_dec + b_dec, latents, into)


@sample
def circuit_tracer_relu_with_skip():
    W_enc, b_enc, W_dec, b_dec = weights()
    W_skip = randn(D_IN, D_IN, seed=5)
    tensors = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec, "W_skip": W_skip}
    latents = lambda x: F.linear(x, W_enc, b_enc).relu()
    output = lambda x: latents(x) @ W_dec + b_dec + x @ W_skip.T
    return Sample("circuit_tracer", {"": tensors}, output, latents, {"sae_lens"})


def gemma_scope_arrays(W: str, d_out: int = D_IN) -> dict[str, Tensor]:
    W_enc, b_enc, W_dec, b_dec = weights(d_out)
    threshold = randn(D_SAE, seed=6).abs()
    return {f"{W}_enc": W_enc.T, "b_enc": b_enc, f"{W}_dec": W_dec, "b_dec": b_dec, "threshold": threshold}


def gemma_scope_latents(x: Tensor) -> Tensor:
    W_enc, b_enc, _, _ = weights()
    return above(F.linear(x, W_enc, b_enc), gemma_scope_arrays("W")["threshold"])


@sample
def gemma_scope():
    _, _, W_dec, b_dec = weights()
    output = lambda x: gemma_scope_latents(x) @ W_dec + b_dec
    return Sample("gemma_scope", {"params.npz": gemma_scope_arrays("W")}, output, gemma_scope_latents, THRESHOLD_HOSTS)


def gemma_scope_2_files(kind: str, *, skip: Tensor | None = None, d_out: int = D_IN) -> dict[str, Any]:
    config = {
        "hf_hook_point_in": "model.layers.3.pre_feedforward_layernorm.output",
        "hf_hook_point_out": "model.layers.3.post_feedforward_layernorm.output",
        "width": D_SAE,
        "model_name": "google/gemma-3-1b-pt",
        "architecture": "jump_relu",
        "l0": 20,
        "affine_connection": skip is not None,
        "type": kind,
    }
    arrays = gemma_scope_arrays("w", d_out) | ({} if skip is None else {"affine_skip_connection": skip})
    return {"config.json": config, "params.safetensors": arrays}


@sample
def gemma_scope_2():
    return gemma_scope()._replace(files=gemma_scope_2_files("sae"))


@sample
def gemma_scope_2_skip_transcoder_of_another_width():
    _, _, W_dec, b_dec = weights(D_OUT)
    # `[D, D_out]`, multiplied from the right.
    skip = randn(D_IN, D_OUT, seed=5)
    files = gemma_scope_2_files("transcoder", skip=skip, d_out=D_OUT)
    output = lambda x: gemma_scope_latents(x) @ W_dec + b_dec + x @ skip
    return Sample("gemma_scope", files, output, gemma_scope_latents, {"sae_lens"})


def llama_scope_files(**fields):
    config = {
        "hook_point_in": "blocks.3.hook_resid_post",
        "hook_point_out": "blocks.3.hook_resid_post",
        "d_model": D_IN,
        "d_sae": D_SAE,
        "expansion_factor": 3,
        "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False,
        "use_glu_encoder": False,
        "act_fn": "jumprelu",
        "jump_relu_threshold": 0.75,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": 2.5, "out": 2.5},
        "sparsity_include_decoder_norm": True,
        "top_k": K,
    }
    return {"hyperparams.json": {**config, **fields}, "checkpoints/final.safetensors": linear("decoder.bias")}


def llama_scope_loaded(s_in: float, s_out: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The weights as the host changes them while it loads them."""
    W_enc, b_enc, W_dec, b_dec = weights()
    W_dec = W_dec * s_in / s_out
    norm = W_dec.norm(dim=-1)
    return W_enc * norm[:, None], b_enc / s_in * norm, W_dec / norm[:, None], b_dec / s_out


@sample
def llama_scope_jumprelu():
    scale = D_IN**0.5 / 2.5
    W_enc, b_enc, W_dec, b_dec = llama_scope_loaded(scale, scale)
    latents = lambda x: above(F.linear(x, W_enc, b_enc), 0.75)
    output = lambda x: latents(x) @ W_dec + b_dec
    # A TopK SAE with a threshold is run as JumpReLU.
    return Sample("llama_scope", llama_scope_files(act_fn="topk"), output, latents, THRESHOLD_HOSTS)


@sample
def llama_scope_topk_transcoder():
    W_enc, b_enc, W_dec, b_dec = llama_scope_loaded(D_IN**0.5 / 2.5, D_IN**0.5 / 4)
    latents = lambda x: topk(F.linear(x, W_enc, b_enc).relu(), K)
    fields = {"hook_point_out": "blocks.3.hook_mlp_out", "dataset_average_activation_norm": {"in": 2.5, "out": 4.0}}
    files = llama_scope_files(act_fn="topk", jump_relu_threshold=0.0, **fields)
    return Sample("llama_scope", files, lambda x: latents(x) @ W_dec + b_dec, latents, {"sparsify", "llamascopium"})


@sample
def llama_scope_relu_of_tokens():
    """As its defaults were: normalised by token, and b_dec subtracted after that."""
    W_enc, b_enc, W_dec, b_dec = llama_scope_loaded(1, 1)
    factor = lambda x: D_IN**0.5 / x.norm(dim=-1, keepdim=True)
    latents = lambda x: F.linear(x * factor(x) - b_dec, W_enc, b_enc).relu()
    files = llama_scope_files(act_fn="ReLU")
    for name in ("norm_activation", "dataset_average_activation_norm", "apply_decoder_bias_to_pre_encoder"):
        del files["hyperparams.json"][name]
    output = lambda x: (latents(x) @ W_dec + b_dec) / factor(x)
    return Sample("llama_scope", files, output, latents, {"sae_lens", "llamascopium"})


@sample
def llamascopium_of_linear_layers():
    """Of early 2025, as Llama-Scope-R1-Distill."""
    example = llamascopium_jumprelu_by_decoder_norm_and_scale()
    tensors = example.files["sae_weights.safetensors"]
    older = {"log_jumprelu_threshold": tensors["activation_function.log_jumprelu_threshold"], **linear("decoder.bias")}
    older |= {name: tensor for name, tensor in tensors.items() if name.startswith("dataset_average")}
    return example._replace(files={**example.files, "sae_weights.safetensors": older})


# ------------------------------------------------------------------------------------------------------ helpers

SUFFIXES = {"openai": ".pt", "circuit_tracer": ".safetensors"}


def place(folder: Path, format: str, name: str = "layer_3") -> Path:
    if format == "circuit_tracer" and name != "layer_3":
        name = f"layer_3_{name}"
    return folder / f"{name}{SUFFIXES.get(format, '')}"


def put(path: Path, files: dict[str, Any]) -> Path:
    """Write files the way hosts do."""
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        if (path / name).suffix == ".npz":
            np.savez(path / name, **{key: tensor.numpy() for key, tensor in content.items()})
        elif (path / name).suffix == ".json":
            (path / name).write_text(json.dumps(content))
        elif (path / name).suffix == ".safetensors":
            save_file({key: tensor.contiguous() for key, tensor in content.items()}, path / name)
        else:
            torch.save(content, path / name)
    return path


def contents(path: Path) -> dict[str, Any]:
    """What is in a file or in those of a folder, tensors as their bytes and shapes."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, Tensor):
            return value.dtype, list(value.shape), value.contiguous().flatten().view(torch.uint8).tolist()
        return value

    files = [path] if path.is_file() else sorted(path.iterdir())
    read = {".json": lambda file: json.loads(file.read_text()), ".safetensors": load_file, ".pt": torch.load}
    return {file.name: plain(read[file.suffix](file)) for file in files}


@pytest.fixture(params=SAMPLES)
def example(request) -> Sample:
    return SAMPLES[request.param]()


# The others are only read.
WRITTEN_SAMPLES = [name for name, make in SAMPLES.items() if make().format in WRITTEN]
X = randn(60, D_IN, seed=9)


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


# -------------------------------------------------------------------------------------------------------- tests


def test_every_format_has_samples():
    assert {make().format for make in SAMPLES.values()} == set(FORMATS)


def test_loading_follows_the_host(example, tmp_path):
    sae = formats.load(put(place(tmp_path, example.format), example.files))
    assert sae.origin.format == example.format
    codes = sae.encode(X)
    assert len(codes.counts.unique()) > 1 or codes.counts[0] == K
    close(codes.to_dense(sae.d_sae), example.latents(X))
    close(sae.decode(codes, X), example.output(X))
    close(sae(X.reshape(3, 20, D_IN)), example.output(X).reshape(3, 20, -1))


@pytest.mark.parametrize("name", WRITTEN_SAMPLES)
def test_saving_in_the_same_format_changes_no_bit(name, tmp_path):
    example = SAMPLES[name]()
    source = put(place(tmp_path, example.format, "source"), example.files)
    target = place(tmp_path / "deep", example.format, "source")
    notes = formats.save(formats.load(source, example.format), target, example.format)
    assert all(note.startswith("assumed") for note in notes)
    assert contents(target) == contents(source)


@pytest.mark.parametrize("target", WRITTEN)
def test_each_pair_of_formats_is_equal_or_refused(example, tmp_path, target):
    sae = formats.load(put(place(tmp_path, example.format), example.files))
    path = place(tmp_path, target, "converted")
    if target == example.format:
        # Without its origin an SAE is written anew.
        sae = dataclasses.replace(sae)
    elif target not in example.into:
        with pytest.raises(UserError, match=rf"^{target}: got .*needs "):
            formats.save(sae, path, target)
        assert not path.exists()
        return
    notes = formats.save(sae, path, target)
    converted = formats.load(path)
    close(converted(X), example.output(X))
    latents = converted.encode(X).to_dense(sae.d_sae)
    if any("larger by their norms" in note for note in notes):
        close(latents, example.latents(X) * sae.W_dec.norm(dim=-1))
    else:
        close(latents, example.latents(X))
    for name in ("model_name", "hook_name"):
        assert getattr(converted, name) in (getattr(sae, name), None, "unknown")


# Where nothing needs folding, by sample; an empty set stands for the rest.
UNFOLDED = {
    "native_adaptive": ADAPTIVE_HOSTS - {"native"},
    "sae_lens_adaptivek": ADAPTIVE_HOSTS - {"sae_lens"},
    "dictionary_learning_adaptivek": ADAPTIVE_HOSTS - {"dictionary_learning"},
    "native_topk": {"sparsify", "sae_lens", "dictionary_learning"},
    "adaptivek": ADAPTIVE_HOSTS - {"adaptivek"},
    "sparsify_of_expansion_factor": {"native", "sae_lens", "dictionary_learning"},
    "sae_lens_topk_of_version_5": {"llamascopium"},
    "sae_lens_standard_of_constant_norm": {"llamascopium"},
    "sae_lens_jumprelu_skip_transcoder": {"circuit_tracer"},
    "dictionary_learning_topk": {"native", "sparsify", "sae_lens"},
    "dictionary_learning_jumprelu": {"sae_lens"},
    "dictionary_learning_relu": {"sae_lens", "openai"},
    "dictionary_learning_relu_of_april": {"sae_lens", "llamascopium"},
    "openai_topk": {"sae_lens"},
    "openai_relu": {"sae_lens", "dictionary_learning"},
    "llamascopium_relu_normalised_by_token": {"sae_lens"},
    "llamascopium_pickled_without_decoder_bias": {"sae_lens", "dictionary_learning"},
    "circuit_tracer_jumprelu": {"sae_lens"},
    "circuit_tracer_relu_with_skip": {"sae_lens"},
}


def activation_bits(sae: StoredSAE) -> tuple:
    """The activation and the numbers that it computes with."""
    activation = sae.activation
    if isinstance(activation, AdaptiveK):
        k_map = ("k_min", "k_max", "steepness", "score_min", "score_max")
        numbers = (parameter.tolist() for parameter in activation.probe.parameters())
        return *(getattr(activation.selection.k_map, name) for name in k_map), *numbers
    return str(activation), activation.threshold.tolist() if isinstance(activation, JumpReLU) else None


@pytest.mark.parametrize("name", WRITTEN_SAMPLES)
def test_what_is_not_folded_comes_back_bit_for_bit(name, tmp_path):
    example, unfolded = SAMPLES[name](), set()
    sae = formats.load(put(place(tmp_path, example.format), example.files))
    for target in example.into:
        there, back = place(tmp_path, target, f"in-{target}"), place(tmp_path, example.format, f"from-{target}")
        notes = [*formats.save(sae, there, target), *formats.save(formats.load(there), back, example.format)]
        if not re.search("folded|b_dec|logarithm", "".join(notes)):
            unfolded.add(target)
            returned = formats.load(back)
            for part in ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip"):
                before, after = getattr(sae, part), getattr(returned, part)
                assert (before is None and after is None) or torch.equal(before, after), (target, part)
            assert activation_bits(returned) == activation_bits(sae), target
            # Equal weights in other strides may be multiplied in another order.
            close(returned(X), sae(X))
    assert unfolded == UNFOLDED.get(name, set())


@pytest.mark.parametrize(
    ("make", "file", "fields"),
    [
        (sae_lens_jumprelu, "cfg.json", ["apply_b_dec_to_input", "normalize_activations", "metadata", "dtype"]),
        (sae_lens_transcoder_of_another_width, "cfg.json", ["apply_b_dec_to_input"]),
        (sparsify_of_expansion_factor, "cfg.json", ["activation", "num_latents", "skip_connection", "transcode"]),
        (openai_relu, "", ["activation", "activation_state_dict", "latents_mean_square"]),
        (llamascopium_topk_by_decoder_norm, "config.json", ["sparsity_include_decoder_norm", "use_glu_encoder"]),
        (adaptivek, "dynamic_config.json", ["activation_dim", "dict_size", "base_k"]),
    ],
)
def test_what_a_file_leaves_out_is_the_hosts_default(tmp_path, make, file, fields):
    example = make()
    files = changed(json_copy(example.files), file, **dict.fromkeys(fields))
    close(formats.load(put(place(tmp_path, example.format), files))(X), example.output(X))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_folding_rounds_the_weights_once(tmp_path, dtype):
    example = sae_lens_topk_by_decoder_norm()
    tensors = example.files["sae_weights.safetensors"]
    tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})
    sae = formats.load(put(tmp_path / "a", example.files))
    rounded = ", rounded to bfloat16" if dtype == torch.bfloat16 else ""
    assert formats.save(sae, tmp_path / "b", "native") == (
        f"decoder norms folded into W_enc, b_enc and W_dec{rounded}",
    )
    folded = formats.load(tmp_path / "b")
    norm = sae.W_dec.double().norm(dim=-1)
    for got, wanted in ((folded.W_enc, sae.W_enc.double() * norm[:, None]), (folded.b_enc, sae.b_enc.double() * norm)):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), wanted, rtol=1.01 * torch.finfo(dtype).eps, atol=0)


def test_a_latent_without_a_direction_stays_silent(tmp_path):
    example = sae_lens_topk_by_decoder_norm()
    example.files["sae_weights.safetensors"]["W_dec"][::3] = 0
    sae = formats.load(put(tmp_path / "a", example.files))
    formats.save(sae, tmp_path / "b", "native")
    folded = formats.load(tmp_path / "b")
    latents = sae.encode(X).to_dense(D_SAE)
    assert not latents[:, ::3].any()
    close(folded.encode(X).to_dense(D_SAE), latents)
    close(folded(X), sae(X))
    assert torch.isfinite(folded.W_dec).all()

    by_norm = llamascopium_jumprelu_by_decoder_norm_and_scale()
    tensors = by_norm.files["sae_weights.safetensors"]
    tensors["W_D"][::3] = 0
    tensors["activation_function.log_jumprelu_threshold"][:10] = -torch.inf
    sae = formats.load(put(tmp_path / "c", by_norm.files))
    codes = sae.encode(X)
    assert torch.isfinite(codes.values).all()
    assert not codes.to_dense(D_SAE)[:, ::3].any()
    formats.save(sae, tmp_path / "d", "sae_lens")
    folded = formats.load(tmp_path / "d")
    assert not folded.activation.threshold.isnan().any()
    close(folded.encode(X).to_dense(D_SAE), codes.to_dense(D_SAE))


@pytest.mark.parametrize(
    ("name", "target", "reason"),
    [
        ("sae_lens_jumprelu", "sparsify", "got JumpReLU, which keeps whatever is above its thresholds, needs TopK"),
        ("native_adaptive", "sparsify", "got AdaptiveK, which keeps as many scores of a row as its probe says, needs"),
        ("native_topk", "adaptivek", "got TopK, which keeps the k largest scores of a row, needs AdaptiveK"),
        ("native_topk", "openai", "got the input normalisation none, needs layer_norm"),
        ("sae_lens_standard_with_layer_norm", "openai", "got the input normalisation layer_norm, needs none"),
        ("sparsify_skip_transcoder", "native", "got a transcoder, needs an autoencoder"),
        ("dictionary_learning_relu", "circuit_tracer", "got an autoencoder, needs a transcoder"),
        ("circuit_tracer_relu_with_skip", "llamascopium", "got a skip connection, needs an SAE without"),
        ("sae_lens_transcoder_of_another_width", "circuit_tracer", "got 12 inputs and 9 outputs, needs as many"),
    ],
)
def test_a_refusal_gives_the_reason(tmp_path, name, target, reason):
    example = SAMPLES[name]()
    sae = formats.load(put(place(tmp_path, example.format), example.files))
    with pytest.raises(UserError, match=re.escape(f"{target}: {reason}")):
        formats.save(sae, place(tmp_path, target, "out"), target)


def changed(files: dict[str, Any], *keys: str, **values: Any) -> dict[str, Any]:
    """The files with `values` set (None: taken out) in what stands under `keys`."""
    inner = files
    for key in keys:
        inner = inner[key]
    for name, value in values.items():
        inner[name] = value
        if value is None:
            del inner[name]
    return files


@pytest.mark.parametrize(
    ("keys", "values", "message"),
    [
        (["k_map"], {"steepness": 4.0}, "steepness: got 4, needs 6"),
        (["k_map"], {"score_max": 5.0}, "score_max: got 5, needs 10"),
        ([], {"probe": "mean"}, "adaptivek: probe_reads: got mean, needs last or token"),
    ],
)
def test_what_the_adaptivek_authors_cannot_say(tmp_path, keys, values, message):
    files = changed(native_adaptive().files, "config.json", "selection", *keys, **values)
    sae = formats.load(put(tmp_path / "a", files))
    with pytest.raises(UserError, match=message):
        formats.save(sae, tmp_path / "b", "adaptivek")


def test_what_adaptivek_files_leave_open_may_be_given(tmp_path):
    path = put(tmp_path / "a", adaptivek().files)
    given = {"steepness": 4.0, "score_min": 1.0, "score_max": 8.0, "probe_reads": "token", "probe_lambda": 3.0}
    sae = formats.load(path, **given)
    assert not sae.notes
    assert formats.save(sae, tmp_path / "b", "native") == ()
    config = AdaptiveKSAE.from_pretrained(tmp_path / "b").config
    assert config == SAEConfig(D_IN, D_SAE, k_min=1, k_max=12, **given)

    assumed = formats.load(path, steepness=4.0)
    assert assumed.notes == (
        "assumed, since the files do not say: score_min = 0, score_max = 10, probe_reads = last "
        "(other values: --score-min, --score-max, --probe-reads)",
    )
    assert assumed.activation.selection == selections.AdaptiveK(KMap(k_min=1, k_max=12, steepness=4.0))
    with pytest.raises(UserError, match="steepness: got it for native, needs adaptivek"):
        formats.load(tmp_path / "b", steepness=4.0)


def test_what_was_given_is_not_dropped_in_the_same_format(tmp_path):
    path = put(tmp_path / "a", adaptivek().files)
    with pytest.raises(UserError, match="adaptivek: steepness: got 4, needs 6"):
        formats.save(formats.load(path, steepness=4.0), tmp_path / "b", "adaptivek")
    sae = formats.load(path, steepness=6.0, score_min=0.0, score_max=10.0, probe_reads="token", probe_lambda=3.0)
    notes = formats.save(sae, tmp_path / "b", "adaptivek")
    assert notes == ("not written: probe_reads = token, probe_lambda = 3.0",)
    close(formats.load(tmp_path / "b")(X), adaptivek().output(X))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"probe_reads": "first"}, "probe_reads: got 'first', needs last or mean or token"),
        ({"probe_lambda": -1.0}, "probe_lambda: got -1.0, needs a number from 0 up"),
        ({"probe_lambda": float("nan")}, "probe_lambda: got nan, needs a number from 0 up"),
    ],
)
def test_what_may_not_be_given(tmp_path, given, message):
    with pytest.raises(UserError, match=message):
        formats.load(put(tmp_path / "a", adaptivek().files), **given)
    with pytest.raises(UserError, match=message):
        AdaptiveKSAE(SAEConfig(D_IN, D_SAE, k_max=K, k_min=1, **given))


def test_the_reshaping_of_hook_z_is_left_to_the_caller(tmp_path):
    hook = "blocks.3.attn.hook_z"
    files = changed(sae_lens_jumprelu().files, "cfg.json", "metadata", hook_name=hook)
    sae = formats.load(put(tmp_path / "a", files))
    assert formats.save(sae, tmp_path / "b", "sae_lens") == ()
    notes = formats.save(sae, tmp_path / "c", "dictionary_learning")
    assert notes[0] == f"reshaping {hook} from [..., heads, d_head] to one vector is left to the caller"
    assert "left to the caller" not in "".join(formats.save(formats.load(tmp_path / "c"), tmp_path / "d", "sae_lens"))
    # SAELens does it if its settings say so; for files of its version 6 the hook's name alone does not.
    assert json.loads((tmp_path / "d" / "cfg.json").read_text())["reshape_activations"] == "hook_z"


@pytest.mark.parametrize("k", [None, K])
def test_models_of_this_project_are_saved_and_read(tmp_path, k):
    model = AdaptiveKSAE(SAEConfig(D_IN, D_SAE, selection_for(k)), generator=torch.Generator().manual_seed(0))
    x = X.float()
    with torch.no_grad():
        model.b_dec.copy_(randn(D_IN, seed=4))
        if k is None:
            model.probe.weight.copy_(randn(D_IN, seed=5))
            model.probe.bias.fill_(5)
    assert formats.save(model, tmp_path / "a") == ()
    model.save_pretrained(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    with torch.no_grad():
        torch.testing.assert_close(formats.load(tmp_path / "a")(x), model(x))
        # Through the files of another project and back into a model.
        other = "adaptivek" if k is None else "dictionary_learning"
        formats.save(model, tmp_path / "c", other)
        formats.save(formats.load(tmp_path / "c"), tmp_path / "d")
        returned = AdaptiveKSAE.from_pretrained(tmp_path / "d")
        assert all(map(torch.equal, returned.parameters(), model.parameters()))


@pytest.mark.parametrize(
    "fields",
    [{}, {"d_out": D_IN}, {"d_out": D_OUT, "skip": True}],
    ids=["autoencoder", "transcoder", "transcoder that skips"],
)
def test_models_of_scaled_activations_are_read(tmp_path, fields):
    output_scale = 0.25 if fields else 2.0
    config = SAEConfig(D_IN, D_SAE, TopK(K), input_scale=2.0, output_scale=output_scale, **fields)
    model = AdaptiveKSAE(config, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=seed))
        formats.save(model, tmp_path / "a")
        torch.testing.assert_close(formats.load(tmp_path / "a")(X.double()), model(X.double()))
        if not fields:
            formats.save(model, tmp_path / "b", "sparsify")
            torch.testing.assert_close(formats.load(tmp_path / "b")(X.double()), model(X.double()))


def test_an_edited_sae_is_written_as_edited(tmp_path):
    sae = formats.load(put(tmp_path / "a", dictionary_learning_topk().files))
    edited = dataclasses.replace(sae, W_enc=2 * sae.W_enc)
    formats.save(edited, tmp_path / "b", "dictionary_learning")
    assert torch.equal(formats.load(tmp_path / "b").W_enc, 2 * sae.W_enc)


@pytest.mark.parametrize("make", [adaptivek, sae_lens_jumprelu, openai_topk, circuit_tracer_relu_with_skip])
def test_moving_takes_every_tensor_along(tmp_path, make):
    example = make()
    sae = formats.load(put(place(tmp_path, example.format), example.files))
    moved = sae.to(torch.float32)
    assert moved.origin is None
    assert sae.W_enc.dtype == torch.float64
    assert moved(X.float()).dtype == torch.float32
    torch.testing.assert_close(moved(X.float()).double(), example.output(X), rtol=1e-4, atol=1e-4)
    formats.save(moved, place(tmp_path, example.format, "moved"), example.format)
    close(sae(X), example.output(X))


def test_decoding_needs_the_input_where_it_counts(tmp_path):
    for make in (openai_topk, circuit_tracer_relu_with_skip):
        example = make()
        sae = formats.load(put(place(tmp_path, example.format), example.files))
        with pytest.raises(ValueError, match="x: got None, needs what was encoded"):
            sae.decode(sae.encode(X))


# ------------------------------------------------------------------------------------------ files that are refused


def refused(path: str | Path, format: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        formats.load(path, format)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


class Malicious:
    def __init__(self, witness: Path):
        self.witness = witness

    def __reduce__(self):
        return open, (str(self.witness), "w")


@pytest.mark.parametrize("by_torch", [True, False], ids=["torch.save", "pickle.dump"])
@pytest.mark.parametrize(
    ("make", "file"),
    [(adaptivek, "ae.pt"), (adaptivek, "probe.pt"), (dictionary_learning_topk, "ae.pt"), (openai_topk, "")],
)
def test_a_malicious_pickle_is_refused(tmp_path, make, file, by_torch):
    example, witness = make(), tmp_path / "witness"
    path = put(place(tmp_path, example.format), example.files)
    content = {**example.files[file], "b_dec": Malicious(witness)}
    if by_torch:
        torch.save(content, path / file)
    else:
        (path / file).write_bytes(pickle.dumps(content))
    message = refused(path, example.format)
    assert "got a pickle that is refused" in message
    assert "anything else could run code" in message
    assert not witness.exists()


def test_a_truncated_or_missing_file_is_named(example, tmp_path):
    path = put(place(tmp_path, example.format), example.files)
    for name in example.files:
        file = path / name
        data = file.read_bytes()
        for size in (0, 5, len(data) // 2, len(data) - 1):
            file.write_bytes(data[:size])
            assert str(file) in refused(path, example.format)
        file.unlink()
        # Two formats do without their settings, if the tensors tell enough: tests of their own say when.
        if name != "config.json" or example.format not in ("dictionary_learning", "gemma_scope"):
            refused(path, example.format)
        file.write_bytes(data)
    assert isinstance(formats.load(path), StoredSAE)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_pickle_cut_anywhere_is_refused(tmp_path, zipped):
    path, tensors = put(tmp_path / "a", dictionary_learning_topk().files) / "ae.pt", linear("b_dec")
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    for size in range(0, len(data), 97):
        path.write_bytes(data[:size])
        assert str(path) in refused(path.parent)
    path.write_bytes(b"\x80\x02K\x01K")
    assert str(path) in refused(path.parent)


def test_json_nested_too_deep(tmp_path):
    path = put(tmp_path / "a", native_topk().files)
    (path / "config.json").write_text("[" * 100_000 + "]" * 100_000)
    assert "config.json: got a file that is not readable JSON" in refused(path)


def test_every_tensor_is_checked(example, tmp_path):
    unchecked = ("k", "stats_", "latents_", "scaling_factor", "dataset_average", "group_sizes")
    if example.files.get("config.json", {}).get("trainer", {}).get("dict_class", "").endswith(("TopK", "AdaptiveK")):
        # It is for training.
        unchecked += ("threshold",)
    for file, content in example.files.items():
        keys = [file, "sae"] if "sae" in content else [file]
        for name, tensor in content.get("sae", content).items():
            if not isinstance(tensor, Tensor) or name.startswith(unchecked):
                continue
            for wrong in (tensor.new_zeros(*tensor.shape, 2), tensor.long()):
                files = changed(json_copy(example.files), *keys, **{name: wrong})
                message = refused(put(place(tmp_path, example.format), files))
                assert re.search(rf"tensor {re.escape(name)}: got .*, needs ", message), message


FP16 = torch.zeros(D_IN, dtype=torch.float16)


@pytest.mark.parametrize(
    ("make", "keys", "values", "message"),
    [
        (native_topk, ["sae.safetensors"], {"b_dec": None}, "tensor b_dec: got none, needs one of shape [12]"),
        (native_topk, ["sae.safetensors"], {"b_dec": FP16}, "tensor b_dec: got torch.float16, needs torch.float64"),
        (native_topk, ["sae.safetensors"], {"new": FP16}, "tensor new: got one, needs none"),
        (native_topk, ["config.json"], {"d_sae": 41}, "tensor W_enc: got shape [40, 12], needs [41, 12]"),
        (native_topk, ["config.json", "selection"], {"k": 41}, "k: got 41, needs a number from 0 to d_sae = 40"),
        (adaptivek, ["dynamic_config.json"], {"min_k": None}, "dynamic_config.json: min_k: got none, needs int"),
        (adaptivek, ["dynamic_config.json"], {"dict_size": 7}, "dict_size: got 7, needs 40, what the tensors have"),
        (adaptivek, ["probe.pt"], {"weights": None}, "probe.pt: tensor weights: got none"),
        (sparsify_of_expansion_factor, ["cfg.json"], {"num_latents": 7}, "got 7, needs 36, what the tensors have"),
        (sparsify_of_expansion_factor, ["cfg.json"], {"k": 37}, "k: got 37, needs a number from 0 to d_sae = 36"),
        (sparsify_of_expansion_factor, ["cfg.json"], {"d_in": "12"}, "cfg.json: d_in: got '12', needs int"),
        (
            sparsify_of_expansion_factor,
            ["cfg.json"],
            {"activation": "groupmax"},
            "got 'groupmax', needs 'topk': the best",
        ),
        (sparsify_of_expansion_factor, ["cfg.json"], {"signed": True}, "signed: got True, needs False"),
        (sparsify_skip_transcoder, ["cfg.json"], {"skip_connection": None}, "tensor W_skip: got one, needs none"),
        (sae_lens_jumprelu, ["cfg.json"], {"architecture": "gated"}, "architecture: got gated, needs one of standard"),
        (sae_lens_jumprelu, ["cfg.json"], {"d_sae": 39}, "d_sae: got 39, needs 40, what the tensors have"),
        (
            sae_lens_jumprelu,
            ["cfg.json"],
            {"normalize_activations": "expected_average_only_in"},
            "got expected_average_only_in, whose statistics are not in sae_weights.safetensors, needs none or",
        ),
        (
            sae_lens_topk_of_version_5,
            ["cfg.json"],
            {"normalize_activations": True},
            "got expected_average_only_in, whose",
        ),
        (sae_lens_topk_of_version_5, ["cfg.json"], {"activation_fn_str": "tanh-relu"}, "activation_fn: got tanh-relu"),
        (
            sae_lens_topk_of_version_5,
            ["sae_weights.safetensors"],
            {"scaling_factor": torch.full((D_SAE,), 2.0)},
            "tensor scaling_factor: got other values, needs all 1",
        ),
        (
            sae_lens_transcoder_of_another_width,
            ["cfg.json"],
            {"normalize_activations": "layer_norm"},
            "normalize_activations: got layer_norm, needs none",
        ),
        (dictionary_learning_topk, ["config.json", "trainer"], {"dict_class": None}, "dict_class: got none, needs str"),
        (
            dictionary_learning_topk,
            ["config.json", "trainer"],
            {"dict_class": "Fancy"},
            "got Fancy, needs one of AutoEn",
        ),
        (dictionary_learning_topk, ["config.json", "trainer"], {"dict_class": "GatedAutoEncoder"}, "a second encoder"),
        (dictionary_learning_topk, ["config.json", "trainer"], {"k": 6}, "k: got 6, needs 5, what the tensors have"),
        (openai_topk, [""], {"activation": "Identity"}, "activation: got 'Identity', needs TopK or ReLU"),
        (openai_topk, ["", "activation_state_dict"], {"postact_fn": "Identity"}, "got 'Identity', needs 'ReLU'"),
        (llamascopium_topk_by_decoder_norm, ["config.json"], {"sae_type": "clt"}, "sae_type: got 'clt', needs 'sae'"),
        (llamascopium_topk_by_decoder_norm, ["config.json"], {"use_glu_encoder": True}, "its gate is a second encoder"),
        (
            llamascopium_topk_by_decoder_norm,
            ["config.json"],
            {"act_fn": "batchtopk"},
            "depends on the batch, needs topk",
        ),
        (llamascopium_topk_by_decoder_norm, ["config.json"], {"act_fn": "molt"}, "act_fn: got molt, needs topk"),
        (
            llamascopium_topk_by_decoder_norm,
            ["config.json"],
            {"norm_activation": "batch-wise"},
            "got batch-wise, whose",
        ),
        (
            llamascopium_topk_by_decoder_norm,
            ["config.json"],
            {"norm_activation": None},
            "got nan, needs a finite number",
        ),
        (llamascopium_topk_by_decoder_norm, ["config.json"], {"expansion_factor": 3}, "got 36, needs 40, what the"),
        (
            circuit_tracer_jumprelu,
            [""],
            {"activation_function.threshold": torch.full((D_SAE,), -0.5)},
            "tensor activation_function.threshold: got -0.5, needs 0 or more",
        ),
    ],
)
def test_what_a_file_may_not_say(tmp_path, make, keys, values, message):
    example = make()
    path = put(place(tmp_path, example.format), changed(json_copy(example.files), *keys, **values))
    assert message in refused(path)


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (torch.tensor([K, K]), "a tensor of shape [2], needs a finite number"),
        (torch.tensor(2.5), "2.5, needs an integer"),
        (torch.tensor(float("nan")), "nan, needs a finite number"),
        (torch.tensor(float("inf")), "inf, needs a finite number"),
        (torch.tensor(True), "True, needs a finite number"),
        (torch.tensor(5j), "5j, needs a finite number"),
        ("5", "'5', needs a finite number"),
        ([[5]], "[[5]], needs a finite number"),
    ],
    ids=str,
)
def test_a_number_in_a_pickle(tmp_path, value, got):
    files = changed(dictionary_learning_topk().files, "ae.pt", k=value)
    assert f"ae.pt: tensor k: got {got}" in refused(put(tmp_path / "a", files))

    files = llamascopium_pickled_without_decoder_bias().files
    files["sae_weights.pt"]["sae"]["dataset_average_activation_norm.blocks.3.in"] = value
    files["config.json"]["norm_activation"] = "dataset-wise"
    path = put(tmp_path / "b", files)
    if got.startswith("2.5"):
        assert formats.load(path).input_scale == D_IN**0.5 / 2.5
    else:
        assert f"tensor dataset_average_activation_norm.blocks.3.in: got {got}" in refused(path)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, float("nan"), "ae.pt: tensor _extra_state: got NaN in 1 of 5 entries, needs numbers"),
        (0, 1.5, "ae.pt: tensor _extra_state: k_min: got 1.5, needs an integer"),
        (1, float("inf"), "ae.pt: tensor _extra_state: k_max: got inf, needs a finite number"),
        (1, D_SAE + 1, "k_max: got 41, needs a number from 0 to d_sae = 40"),
        (2, float("inf"), "steepness: got inf, needs a finite number"),
    ],
)
def test_an_extra_state_out_of_range(tmp_path, position, value, message):
    files = dictionary_learning_adaptivek().files
    files["ae.pt"]["_extra_state"][position] = value
    assert message in refused(put(tmp_path / "a", files))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**400, "4"], ids=lambda value: str(value)[:9])
def test_an_expansion_factor_that_is_no_number(tmp_path, value):
    path = put(
        tmp_path / "a", changed(llamascopium_topk_by_decoder_norm().files, "config.json", expansion_factor=value)
    )
    assert f"config.json: expansion_factor: got {value!r}, needs a finite number" in refused(path)


@pytest.mark.parametrize("shape", [(0, D_IN), (D_SAE, 0), (0, 0)])
def test_nothing_to_encode(tmp_path, shape):
    d_sae, d_in = shape
    tensors = {
        "bias": torch.zeros(d_in),
        "encoder.weight": torch.zeros(d_sae, d_in),
        "encoder.bias": torch.zeros(d_sae),
        "decoder.weight": torch.zeros(d_in, d_sae),
    }
    files = dictionary_learning_files("AutoEncoder", tensors, activation_dim=d_in, dict_size=d_sae)
    message = f"W_enc: got {d_sae} latents of {d_in} inputs, needs at least one of each"
    assert message in refused(put(tmp_path / "a", files))


@pytest.mark.parametrize("name", ["encoder.weight", "threshold"])
@pytest.mark.parametrize(
    "hollow", [torch.zeros(1).expand(2**20, 2**20), torch.empty(D_SAE, D_IN, device="meta")], ids=["expanded", "meta"]
)
def test_a_tensor_without_its_entries(tmp_path, name, hollow):
    path = put(tmp_path / "a", changed(dictionary_learning_topk().files, "ae.pt", **{name: hollow}))
    assert f"ae.pt: tensor {name}: got a tensor of shape {list(hollow.shape)} without its entries" in refused(path)


def test_a_trainer_that_names_the_wrong_class(tmp_path):
    """What TopKTrainer's settings say of any `dict_class`."""
    example = dictionary_learning_adaptivek()
    files = changed(example.files, "config.json", "trainer", dict_class="AutoEncoderTopK")
    close(formats.load(put(tmp_path / "a", files))(X), example.output(X))


@pytest.mark.parametrize("format", [*FORMATS, "elsewhere"])
def test_files_of_another_format(tmp_path, format):
    for make in SAMPLES.values():
        example = make()
        if example.format != format:
            path = put(place(tmp_path, example.format, make.__name__), example.files)
            with pytest.raises(UserError, match="got"):
                formats.load(path, format)


def test_cross_layer_transcoders_are_refused(tmp_path):
    path = put(tmp_path, {"W_enc_0.safetensors": {"W_enc_0": torch.zeros(4, 3)}})
    assert "got a cross-layer transcoder, needs one layer's: its latents write to several" in refused(path)
    assert "got a cross-layer transcoder" in refused(path / "W_enc_0.safetensors")


def test_a_folder_of_layers(tmp_path):
    for layer in (10, 2):
        put(tmp_path / f"layer_{layer}.safetensors", circuit_tracer_jumprelu().files)
    for format in (None, "circuit_tracer"):
        got = "got a folder of 2 files of weights, needs one of them: layer_2.safetensors, layer_10.safetensors"
        assert got in refused(tmp_path, format)
    close(formats.load(tmp_path / "layer_2.safetensors")(X), circuit_tracer_jumprelu().output(X))


def test_a_file_of_a_folder_is_not_taken_for_an_sae(example, tmp_path):
    path = put(place(tmp_path, example.format), example.files)
    for name in set(example.files) - {"", "params.npz"}:
        assert "got one of the files of a folder, needs the folder" in refused(path / name)


@pytest.mark.parametrize("name", ["checkpoints/pruned.safetensors", "checkpoints/final.pt"])
def test_llamascopium_has_other_names_for_its_weights(tmp_path, name):
    files = llamascopium_topk_by_decoder_norm().files
    tensors = files.pop("sae_weights.safetensors")
    files[name] = {"sae": tensors} if name.endswith(".pt") else tensors
    (tmp_path / "a" / "checkpoints").mkdir(parents=True)
    sae = formats.load(put(tmp_path / "a", files))
    close(sae(X), llamascopium_topk_by_decoder_norm().output(X))
    formats.save(sae, tmp_path / "b", "llamascopium")
    assert contents(tmp_path / "b" / name) == contents(tmp_path / "a" / name)


def test_distributed_checkpoints_are_refused(tmp_path):
    (tmp_path / "sae_weights.dcp").mkdir()
    (tmp_path / "config.json").write_text("{}")
    assert "sae_weights.dcp: got a distributed checkpoint, needs one file" in refused(tmp_path)


def test_a_format_that_is_not_clear(tmp_path):
    assert "got no such file or folder" in refused(tmp_path / "nowhere")
    message = refused(tmp_path)
    assert "got an empty folder, files of no format known here, needs those of one (native: config.json and" in message
    assert all(f"{format}: " in message for format in FORMATS)
    (tmp_path / "notes.txt").touch()
    assert "got a folder of notes.txt, files of no format known here" in refused(tmp_path)
    assert refused(tmp_path, "sparsify").endswith("needs those of one (sparsify: cfg.json and sae.safetensors)")
    put(tmp_path, {**sparsify_of_expansion_factor().files, "config.json": {}})
    assert "got files of native and sparsify, needs the format to be given: native, sparsify" in refused(tmp_path)
    assert formats.load(tmp_path, "sparsify").d_sae == 36


def test_16_bit_thresholds_that_would_be_rounded(tmp_path):
    """bf16 weights beside fp32 thresholds, as SAELens trains them: its own files would round them."""
    example = dictionary_learning_jumprelu()
    tensors = example.files["ae.pt"]
    tensors.update(
        {name: t.to(torch.float32 if name == "threshold" else torch.bfloat16) for name, t in tensors.items()}
    )
    sae = formats.load(put(tmp_path / "a", example.files))
    with pytest.raises(UserError, match=r"threshold: got torch.float32 values that are not exact in torch.bfloat16"):
        formats.save(sae, tmp_path / "b", "sae_lens")
    with pytest.raises(UserError, match=r"threshold: got values whose logarithms torch.bfloat16 cannot hold"):
        formats.save(sae, tmp_path / "b", "llamascopium")
    exact = tensors["threshold"].bfloat16().float()
    sae = dataclasses.replace(sae, activation=dataclasses.replace(sae.activation, threshold=exact))
    formats.save(sae, tmp_path / "b", "sae_lens")
    assert torch.equal(formats.load(tmp_path / "b").activation.threshold.float(), exact)


def test_folders_of_saes_are_named(tmp_path):
    """The root of a run, whatever its folders are called: what can be loaded is named, in the order of numbers."""
    for layer in (10, 9, 8, 2, 1):
        put(tmp_path / "sparsify" / f"layers.{layer}", sparsify_of_expansion_factor().files)
    put(tmp_path / "sparsify", {"config.json": {}, "state.pt": {}, "optimizer_0.pt": {}})
    for trainer in (0, 1):
        put(tmp_path / "dl" / "resid_post_layer_3" / f"trainer_{trainer}", dictionary_learning_topk().files)
    put(tmp_path / "lens" / "blocks.3.hook_resid_post", sae_lens_jumprelu().files)
    put(tmp_path / "scope" / "layer_12" / "width_16k" / "average_l0_82", gemma_scope().files)
    put(tmp_path / "scope" / "layer_12" / "width_16k" / "average_l0_22", gemma_scope().files)
    for folder, message in {
        "sparsify": "got a folder of 5 SAEs, needs one of them: layers.1, layers.2, layers.8, layers.9 and 1 more",
        "dl": "got a folder of 2 SAEs, needs one of them: resid_post_layer_3/trainer_0, resid_post_layer_3/trainer_1",
        "lens": "got a folder of 1 SAE, needs one of them: blocks.3.hook_resid_post",
        "scope": "needs one of them: layer_12/width_16k/average_l0_22/params.npz, layer_12/width_16k/average_l0_82/",
    }.items():
        assert message in refused(tmp_path / folder)
    assert "got a folder of 5 SAEs" in refused(tmp_path / "sparsify", "sparsify")


def test_a_file_that_is_missing_from_several_is_named(tmp_path):
    path = put(tmp_path / "a", adaptivek().files)
    (path / "probe.pt").unlink()
    message = "got dynamic_config.json and ae.pt without probe.pt, needs all files of adaptivek"
    assert message in refused(path)


def test_weights_without_their_settings(tmp_path):
    """What only looks like a format of one file is not taken for one."""
    native = put(tmp_path / "native", {"sae.safetensors": native_topk().files["sae.safetensors"]})
    for path in (native, native / "sae.safetensors"):
        assert "needs the folder of native (config.json, sae.safetensors) or the folder of sparsify" in refused(path)
    renamed = put(tmp_path / "mine.safetensors", {"": native_topk().files["sae.safetensors"]})
    message = refused(renamed)
    assert "got W_dec, W_enc, b_dec, b_enc in mine.safetensors, no SAE that is known here" in message
    assert "activation_function.threshold for circuit_tracer" in message
    put(tmp_path / "lens.safetensors", {"": sae_lens_files("transcoder", {})["sae_weights.safetensors"]})
    assert "no SAE that is known here" in refused(tmp_path / "lens.safetensors")


STATE = {"encoder.weight": torch.ones(2, 2)}


@pytest.mark.parametrize(
    ("content", "got", "needed"),
    [
        ({"epoch": 3, "state_dict": STATE}, "epoch, state_dict (with encoder.weight)", "pre_bias, latent_bias"),
        ({"sae": {"W_E": 1}, "version": "2"}, "sae (with W_E), version", "pre_bias, latent_bias"),
        (
            {"pre_bias": 1, "latent_bias": 1, "encoder.weight": 1},
            "pre_bias, latent_bias",
            "decoder.weight for openai, or",
        ),
        ({}, "nothing", "pre_bias, latent_bias"),
        (torch.ones(3), "Tensor", "a state dictionary"),
        ([STATE], "list", "a state dictionary"),
    ],
    ids=["nested", "llamascopium", "openai without one", "empty", "tensor", "list"],
)
def test_a_pickle_is_looked_into(tmp_path, content, got, needed):
    message = refused(put(tmp_path / "some.pt", {"": content}))
    assert f"got {got}" in message
    assert f"needs {needed}" in message


def wrapped(files: dict[str, Any], *prefixes: str) -> dict[str, Any]:
    """The files with each of `prefixes` before some of the names of tensors."""
    renamed = {}
    for file, content in files.items():
        if not file.endswith(".json"):
            inner = content.get("sae", content)
            inner = {f"{prefixes[index % len(prefixes)]}{name}": inner[name] for index, name in enumerate(inner)}
            content = {**content, "sae": inner} if "sae" in content else inner
        renamed[file] = content
    return renamed


def test_names_inside_wrappers(example, tmp_path):
    """What DistributedDataParallel, torch.compile, FSDP and activation checkpointing put before them."""
    wrappers = ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "_fsdp_wrapped_module.")
    files = wrapped(example.files, *wrappers, "_fsdp_wrapped_module._checkpoint_wrapped_module.")
    close(formats.load(put(place(tmp_path, example.format), files))(X), example.output(X))


def test_one_layer_compiled_by_itself(tmp_path):
    files = dictionary_learning_relu().files
    files["ae.pt"] = {name.replace("encoder.", "encoder._orig_mod."): t for name, t in files["ae.pt"].items()}
    close(formats.load(put(tmp_path / "a", files))(X), dictionary_learning_relu().output(X))


def test_a_name_inside_and_outside_a_wrapper(tmp_path):
    files = dictionary_learning_relu().files
    files["ae.pt"]["module.bias"] = torch.zeros(D_IN)
    assert "ae.pt: tensor module.bias: got bias a second time, needs it once" in refused(put(tmp_path / "a", files))


def test_nan_weights_are_refused(tmp_path):
    for make, file, name in [
        (native_topk, "sae.safetensors", "W_dec"),
        (gemma_scope, "params.npz", "threshold"),
        (openai_topk, "", "latent_bias"),
    ]:
        example = make()
        example.files[file][name].view(-1)[7] = float("nan")
        path = put(place(tmp_path, example.format, make.__name__), example.files)
        size = example.files[file][name].numel()
        assert f"tensor {name}: got NaN in 1 of {size} entries, needs numbers" in refused(path)


# ------------------------------------------------------------------------------- dictionary_learning without settings

ALONE = {
    dictionary_learning_adaptivek: {},
    dictionary_learning_matryoshka_untrained: {},
    dictionary_learning_jumprelu: {},
    dictionary_learning_relu: {},
    dictionary_learning_relu_of_april: {},
    dictionary_learning_topk: {"dict_class": "AutoEncoderTopK"},
    dictionary_learning_batchtopk: {"dict_class": "BatchTopKSAE"},
}


@pytest.mark.parametrize("name", ["ae.pt", "ae_1000.pt", "checkpoints/ae_1000.pt"])
@pytest.mark.parametrize(("make", "given"), ALONE.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_an_autoencoder_without_its_settings(tmp_path, make, given, name):
    example = make()
    put(tmp_path, {name: example.files["ae.pt"]})
    sae = formats.load(tmp_path / name, **given)
    close(sae(X), example.output(X))
    if "/" not in name:
        close(formats.load(tmp_path, **given)(X), example.output(X))
    # Written back, it has settings again.
    formats.save(sae, tmp_path / "back", "dictionary_learning")
    close(formats.load(tmp_path / "back")(X), example.output(X))


def test_the_settings_of_a_checkpoint_are_those_of_its_run(tmp_path):
    example = dictionary_learning_topk()
    put(tmp_path / "trainer_0", {**example.files, "checkpoints/ae_1000.pt": example.files["ae.pt"]})
    sae = formats.load(tmp_path / "trainer_0" / "checkpoints" / "ae_1000.pt")
    assert sae.model_name == "pythia"
    close(sae(X), example.output(X))
    with pytest.raises(UserError, match="dict_class: got 'BatchTopKSAE', needs 'AutoEncoderTopK', what config"):
        formats.load(tmp_path / "trainer_0" / "checkpoints" / "ae_1000.pt", dict_class="BatchTopKSAE")
    with pytest.raises(UserError, match="k: got 6, needs 5"):
        formats.load(tmp_path / "trainer_0", k=6)


def test_what_the_tensors_of_an_autoencoder_do_not_tell(tmp_path):
    example = dictionary_learning_topk()
    path = put(tmp_path, {"ae.pt": example.files["ae.pt"]}) / "ae.pt"
    assert "got the tensors of AutoEncoderTopK, which keeps the k largest" in refused(path)
    assert refused(path).endswith("needs config.json beside it, or dict_class (--dict-class)")
    with pytest.raises(UserError, match="dict_class: got Fancy, needs one of AutoEncoder, "):
        formats.load(path, dict_class="Fancy")
    with pytest.raises(UserError, match="k: got 6, needs 5, what the tensors have"):
        formats.load(path, dict_class="AutoEncoderTopK", k=6)
    # Before it had buffers.
    put(tmp_path, {"ae.pt": linear("b_dec")})
    assert re.search(r"instead of config.json \(--dict-class, --k\): k: got none, needs int", refused(path))
    close(formats.load(path, k=K)(X), example.output(X))
    with pytest.raises(UserError, match="tensor threshold: got none"):
        formats.load(path, dict_class="BatchTopKSAE")
    gated = {"encoder.weight": 1, "decoder.weight": 1, "gate_bias": 1, "mag_bias": 1, "r_mag": 1, "decoder_bias": 1}
    put(tmp_path, {"ae.pt": gated})
    assert "dict_class: got GatedAutoEncoder, whose gate is a second encoder, needs one encoder" in refused(path)
    with pytest.raises(UserError, match="k: got it for sparsify, needs dictionary_learning: others do not leave it"):
        formats.load(put(tmp_path / "b", sparsify_of_expansion_factor().files), k=K)


# ------------------------------------------------------------------------------------------- Gemma and Llama Scope


@pytest.mark.parametrize(
    ("names", "model", "hook", "transcoder"),
    [
        ("gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82", "gemma-2-2b", "blocks.12.hook_resid_post", False),
        ("gemma-scope-9b-it-res/layer_9/width_16k/average_l0_8", "gemma-2-9b-it", "blocks.9.hook_resid_post", False),
        ("gemma-scope-2b-pt-mlp/layer_0/width_16k/average_l0_1", "gemma-2-2b", "blocks.0.hook_mlp_out", False),
        ("gemma-scope-9b-pt-att/layer_3/width_16k/average_l0_1", "gemma-2-9b", "blocks.3.attn.hook_z", False),
        ("gemma-scope-2b-pt-transcoders/layer_3/width_16k/average_l0_1", "gemma-2-2b", None, True),
        ("gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6", "gemma-2-2b", None, False),
        (
            "models--google--gemma-scope-2b-pt-res/snapshots/a/layer_1",
            "gemma-2-2b",
            "blocks.1.hook_resid_post",
            False,
        ),
    ],
)
def test_gemma_scope_is_told_by_its_names(tmp_path, monkeypatch, names, model, hook, transcoder):
    folder = put(tmp_path / names, gemma_scope().files)
    for path in (folder, folder / "params.npz"):
        sae = formats.load(path)
        assert (sae.model_name, sae.hook_name, sae.transcoder) == (model, hook, transcoder)
        assert not sae.notes
        close(sae(X), gemma_scope().output(X))
    monkeypatch.chdir(folder)
    assert formats.load(".").hook_name == hook


def test_gemma_scope_without_its_names(tmp_path):
    path = put(tmp_path / "a", gemma_scope().files)
    note = "assumed, since the files do not say: transcoder = False (other values: --transcoder)"
    assert formats.load(path).notes == (note,)
    sae = formats.load(path, transcoder=True)
    assert not sae.notes
    formats.save(sae, tmp_path / "layer_0.safetensors", "circuit_tracer")
    close(formats.load(tmp_path / "layer_0.safetensors")(X), gemma_scope().output(X))
    renamed = put(tmp_path / "b", {"mine.npz": gemma_scope().files["params.npz"]}) / "mine.npz"
    close(formats.load(renamed)(X), gemma_scope().output(X))


@pytest.mark.parametrize(("site", "transcoder"), [("transcoder_all", True), ("resid_post", False), ("other", None)])
def test_gemma_scope_2_without_its_settings(tmp_path, site, transcoder):
    files = gemma_scope_2_files("sae")
    del files["config.json"]
    path = put(tmp_path / "gemma-scope-2-1b-pt" / site / "layer_3_width_16k_l0_big", files)
    sae = formats.load(path)
    close(sae(X), gemma_scope().output(X))
    assert sae.transcoder == bool(transcoder)
    assert bool(sae.notes) == (transcoder is None)


def test_gemma_scope_2_says_what_it_is(tmp_path):
    sae = formats.load(put(tmp_path / "a", gemma_scope_2_files("transcoder", skip=torch.eye(D_IN).double())))
    assert sae.transcoder
    assert sae.model_name == "google/gemma-3-1b-pt"
    assert sae.hook_name == "model.layers.3.pre_feedforward_layernorm.output"
    assert sae.hook_name_out == "model.layers.3.post_feedforward_layernorm.output"
    by_hooks = changed(gemma_scope_2_files("transcoder"), "config.json", type=None)
    assert formats.load(put(tmp_path / "c", by_hooks)).transcoder
    alone = gemma_scope_2_files("transcoder", skip=torch.eye(D_IN).double())["params.safetensors"]
    path = put(tmp_path / "b", {"params.safetensors": alone}) / "params.safetensors"
    close(formats.load(path)(X), sae(X))
    assert formats.load(path).transcoder
    with pytest.raises(UserError, match="transcoder: got False, needs True, what the files say"):
        formats.load(path, transcoder=False)


@pytest.mark.parametrize(
    ("make", "file", "values", "message"),
    [
        (gemma_scope, "params.npz", {"threshold": None}, "no SAE that is known here, needs threshold for gemma_scope"),
        (gemma_scope, "params.npz", {"b_dec": torch.zeros(3)}, "tensor b_dec: got shape [3], needs [12]"),
        (gemma_scope, "params.npz", {"W_dec": torch.zeros(D_SAE, 2, D_IN)}, "got shape [40, 2, 12], needs [40, any]"),
        (gemma_scope, "params.npz", {"b_enc": torch.zeros(D_SAE).int()}, "b_enc: got torch.int32 in layout"),
        (gemma_scope, "params.npz", {"extra": torch.zeros(3)}, "tensor extra: got one, needs none"),
        (gemma_scope_2, "params.safetensors", {"w_dec": None}, "tensor w_dec: got none, needs one of shape [40, any]"),
        (gemma_scope_2, "config.json", {"type": "crosscoder"}, "type: got crosscoder, whose latents write to several"),
        (gemma_scope_2, "config.json", {"architecture": "topk"}, "architecture: got 'topk', needs 'jump_relu'"),
        (gemma_scope_2, "config.json", {"width": 41}, "width: got 41, needs 40, what the tensors have"),
        (gemma_scope_2, "config.json", {"affine_connection": True}, "tensor affine_skip_connection: got none"),
        (
            gemma_scope_2_skip_transcoder_of_another_width,
            "config.json",
            {"affine_connection": False},
            "tensor affine_skip_connection: got one, needs none",
        ),
        (llama_scope_jumprelu, "hyperparams.json", {"use_glu_encoder": True}, "its gate is a second encoder"),
        (llama_scope_jumprelu, "hyperparams.json", {"d_sae": 41}, "d_sae: got 41, needs 40, what the tensors have"),
        (llama_scope_jumprelu, "hyperparams.json", {"norm_activation": "batch-wise"}, "got batch-wise, whose factor"),
        (llama_scope_topk_transcoder, "hyperparams.json", {"norm_activation": "token-wise"}, "got token-wise, whose"),
        (llama_scope_jumprelu, "hyperparams.json", {"jump_relu_threshold": -1.0}, "threshold: got -1.0, needs 0 or"),
        (llama_scope_jumprelu, "hyperparams.json", {"act_fn": "gelu"}, "act_fn: got gelu, needs topk, jumprelu or"),
        (
            llama_scope_jumprelu,
            "hyperparams.json",
            {"dataset_average_activation_norm": {"in": 0.0, "out": 2.0}},
            "dataset_average_activation_norm: in: got 0.0, needs a number above 0",
        ),
        (
            llama_scope_jumprelu,
            "hyperparams.json",
            {"dataset_average_activation_norm": None},
            "dataset_average_activation_norm: in: got none, needs float",
        ),
        (
            llama_scope_jumprelu,
            "checkpoints/final.safetensors",
            {"decoder.bias": None},
            "tensor decoder.bias: got none, needs one of shape [12]",
        ),
    ],
)
def test_what_a_scope_may_not_say(tmp_path, make, file, values, message):
    path = put(tmp_path / "a", changed(make().files, file, **values))
    assert message in refused(path)


def test_an_array_of_objects_is_not_unpickled(tmp_path):
    witness = tmp_path / "witness"
    arrays = {name: tensor.numpy() for name, tensor in gemma_scope().files["params.npz"].items()}
    np.savez(tmp_path / "params.npz", **{**arrays, "b_dec": np.array([Malicious(witness)], dtype=object)})
    assert "params.npz: got a file that numpy cannot read as numbers" in refused(tmp_path / "params.npz")
    assert not witness.exists()


@pytest.mark.parametrize("format", [format for format in FORMATS if format not in WRITTEN])
def test_a_format_that_is_only_read(tmp_path, format, capsys):
    sae = formats.load(put(tmp_path / "a", sae_lens_jumprelu().files))
    with pytest.raises(UserError, match=f"format: got '{format}', which is only read, needs one of native, "):
        formats.save(sae, tmp_path / "b", format)
    with pytest.raises(SystemExit):
        convert("--to", format, tmp_path / "a", tmp_path / "b")
    assert "sae_lens" in re.sub(r"\W+", " ", capsys.readouterr().err)
    assert not (tmp_path / "b").exists()


# -------------------------------------------------------------------------------------------------------- the hub


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A folder in the place of the hub, with `owner/name` in it."""
    import huggingface_hub

    top, cache = tmp_path / "hub", tmp_path / "cache"

    def model_info(self, repository, *, revision=None, timeout):
        assert timeout <= 5
        if not (top / repository).is_dir() or revision not in (None, "main", "refs/pr/1"):
            raise ConnectionError("no route\nto host")
        files = [path for path in (top / repository).rglob("*") if path.is_file()]
        names = [path.relative_to(top / repository).as_posix() for path in files]
        siblings = [types.SimpleNamespace(rfilename=name) for name in names]
        return types.SimpleNamespace(siblings=siblings)

    def download(repository, name, *, revision):
        assert revision in (None, "main", "refs/pr/1")
        target = cache / repository / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(top / repository / name, target)
        return str(target)

    def cached(repository, *, revision, local_files_only):
        assert local_files_only
        if not (cache / repository).is_dir():
            raise FileNotFoundError("nothing cached")
        return str(cache / repository)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    monkeypatch.chdir(tmp_path)
    return top


def test_an_sae_of_the_hub(hub, tmp_path, capsys):
    repository = hub / "google" / "gemma-scope-2b-pt-res"
    put(repository / "layer_12" / "width_16k" / "average_l0_82", gemma_scope().files)
    put(repository / "layer_12" / "width_16k" / "average_l0_22", gemma_scope().files)
    name = "google/gemma-scope-2b-pt-res"
    inner = "layer_12/width_16k/average_l0_82"
    file = f"hf://{name}@refs%2Fpr%2F1/{inner}/params.npz"
    for path in (f"{name}/{inner}", f"{name}@main/{inner}/", file, Path(name, inner)):
        sae = formats.load(path)
        assert sae.hook_name == "blocks.12.hook_resid_post"
        assert not sae.notes
        close(sae(X), gemma_scope().output(X))
    assert [path.parent.name for path in (tmp_path / "cache").rglob("*.npz")] == ["average_l0_82"]
    for path in (name, f"{name}/layer_12"):
        assert "got a folder of 2 files of weights, needs one of them: " in refused(path)
    got = f"got no 'layer_9' in {name}, needs one of its folders: layer_12/width_16k/average_l0_22, layer_12/width_16k"
    assert got in refused(f"{name}/layer_9")
    assert convert("--to", "sae_lens", f"{name}/{inner}", "out") == 0
    assert f": {name}/{inner} (gemma_scope) -> out (sae_lens); weights unchanged" in capsys.readouterr().out
    # Once the hub is gone, what was downloaded counts.
    shutil.rmtree(hub)
    assert formats.load(f"{name}/{inner}").d_sae == D_SAE


SERVED = """
import http.server, json, os, sys, threading
from pathlib import Path

top, commit = Path(sys.argv[1]), "0" * 40

class Hub(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/api/models/some/saes":
            names = [path.relative_to(top).as_posix() for path in top.rglob("*") if path.is_file()]
            body = json.dumps({"id": "some/saes", "sha": commit, "siblings": [{"rfilename": name} for name in names]})
            body = body.encode()
        else:
            body = (top / self.path.removeprefix("/some/saes/resolve/main/")).read_bytes()
        self.send_response(200)
        headers = {"Content-Length": len(body), "ETag": f'"{abs(hash(body)):x}"', "X-Repo-Commit": commit}
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET
    log_message = lambda *args: None

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": sys.argv[2]}
os.environ |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

from aksae import UserError, formats

first = formats.load("some/saes/layers.3")
server.shutdown()
server.server_close()
again = formats.load("some/saes/layers.3")
assert (first.W_enc == again.W_enc).all()
try:
    formats.load("some/others")
except UserError as error:
    print(error)
"""


def test_the_client_of_the_hub(tmp_path):
    """The real one, with a server that is there for one load and gone for the next."""
    put(tmp_path / "top" / "layers.3", sparsify_of_expansion_factor().files)
    put(tmp_path / "top" / "layers.4", sparsify_of_expansion_factor().files)
    command = [sys.executable, "-c", SERVED, tmp_path / "top", tmp_path / "cache"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "some/others: got no such file or folder here, and nothing from the Hugging Face hub" in done.stdout
    downloaded = [path for path in (tmp_path / "cache").rglob("*.safetensors")]
    assert [path.parent.name for path in downloaded] == ["layers.3"]


def test_a_hub_that_does_not_answer(hub):
    for name in ("nobody/nothing", "nobody/nothing@v1", "nobody/nothing/layer_3", "hf://nobody/nothing"):
        message = refused(name)
        assert "got no such file or folder here, and nothing from the Hugging Face hub (" in message
        assert "ConnectionError: no route); needs a path, or the hub: a name that it has, a network" in message


def test_a_file_that_the_hub_does_not_give(hub, monkeypatch):
    import huggingface_hub

    def refuse(*args, **options):
        raise PermissionError("403 Forbidden\ngated")

    put(hub / "some" / "sae", native_topk().files)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    assert "from the hub, but not config.json (PermissionError: 403 Forbidden); needs access" in refused("some/sae")


@pytest.mark.parametrize("name", ["./a/b", "../a/b", "~/a/b", "/a/b", "a", "runs/layers.9", "runs/a/b", "a b/c"])
def test_what_is_a_path_never_asks_the_hub(hub, monkeypatch, name):
    import huggingface_hub

    Path("runs").mkdir()
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **options: pytest.fail("asked the hub"))
    assert "got no such file or folder, needs an SAE's, or owner/name[@revision][/folder] on the hub" in refused(name)


# ------------------------------------------------------------------------------------- destinations, command line


def test_a_destination_that_is_there(tmp_path):
    sae = formats.load(put(tmp_path / "a", native_topk().files))
    formats.save(sae, tmp_path / "b", "sparsify")
    other = dataclasses.replace(sae, b_dec=sae.b_dec + 1)
    with pytest.raises(UserError, match=r"b: got a destination that exists, needs a new one, or overwrite"):
        formats.save(other, tmp_path / "b", "sparsify")
    assert torch.equal(formats.load(tmp_path / "b").b_dec, sae.b_dec)
    formats.save(other, tmp_path / "b", "sparsify", overwrite=True)
    assert torch.equal(formats.load(tmp_path / "b").b_dec, other.b_dec)
    # In place, while the tensors being written are those of the file that is replaced.
    formats.save(formats.load(tmp_path / "b"), tmp_path / "b", "sparsify", overwrite=True)
    assert torch.equal(formats.load(tmp_path / "b").b_dec, other.b_dec)
    assert sorted(os.listdir(tmp_path / "b")) == ["cfg.json", "sae.safetensors"]

    (tmp_path / "empty").mkdir()
    formats.save(sae, tmp_path / "empty", "sparsify")
    with pytest.raises(UserError, match="got a file, needs the other for sparsify"):
        formats.save(sae, tmp_path / "empty" / "cfg.json", "sparsify", overwrite=True)
    with pytest.raises(UserError, match=r"got a name for openai, needs one that ends in \.pt"):
        formats.save(sae, tmp_path / "c", "openai")
    with pytest.raises(UserError, match="format: got 'elsewhere', needs one of native"):
        formats.save(sae, tmp_path / "c", "elsewhere")


def test_a_failed_write_leaves_no_half_file(tmp_path, monkeypatch):
    def full(value, file):
        file.write(b"half")
        raise error

    sae = formats.load(put(tmp_path / "a", native_topk().files))
    formats.save(sae, tmp_path / "b", "dictionary_learning")
    before = contents(tmp_path / "b")
    other = dataclasses.replace(sae, activation=formats.stored.TopK(K + 1))
    for error in (OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()):
        monkeypatch.setattr(torch, "save", full)
        with pytest.raises(type(error)) as caught:
            formats.save(other, tmp_path / "b", "dictionary_learning", overwrite=True)
        # The settings, written first, are the old ones as well.
        assert contents(tmp_path / "b") == before
    assert isinstance(caught.value, KeyboardInterrupt)


LIMITED = """
import resource, signal, sys
import torch
from aksae import cli
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("target", "file"),
    [("native", "sae.safetensors"), ("sae_lens", "sae_weights.safetensors"), ("dictionary_learning", "ae.pt")],
)
def test_a_disk_that_refuses_leaves_the_old_sae(tmp_path, target, file):
    """In a process that may write 5000 bytes to a file, fewer than the weights have and more than the settings."""
    sae = formats.load(put(tmp_path / "a", native_topk().files))
    formats.save(sae, tmp_path / "old", target)
    formats.save(dataclasses.replace(sae, activation=formats.stored.TopK(K + 1)), tmp_path / "new", "sparsify")
    before = contents(tmp_path / "old")
    arguments = ["convert", tmp_path / "new", tmp_path / "old", "--to", target, "--overwrite"]
    done = subprocess.run([sys.executable, "-c", LIMITED, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr == f"aksae: {tmp_path / 'old' / file}: File too large; files written before stay valid\n"
    assert contents(tmp_path / "old") == before


@pytest.mark.parametrize("k", [None, K])
def test_a_model_is_replaced_as_a_whole(tmp_path, monkeypatch, k):
    first, second = (AdaptiveKSAE(SAEConfig(D_IN, D_SAE, selection_for(k, k_max))) for k_max in (12, 13))
    first.save_pretrained(tmp_path)
    before = contents(tmp_path)

    def full(tensors, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        second.save_pretrained(tmp_path)
    assert contents(tmp_path) == before


def test_tensors_in_one_memory(tmp_path):
    """Tied weights, and views of one long tensor: written each by itself, and no longer than it is."""
    W_enc, b_enc, _, b_dec = weights()
    flat = torch.cat([W_enc.flatten(), b_enc, torch.zeros(100_000), b_dec])
    tensors = {
        "bias": flat[-D_IN:],
        "encoder.weight": flat[: W_enc.numel()].view_as(W_enc),
        "encoder.bias": flat[W_enc.numel() :][:D_SAE],
        "decoder.weight": flat[: W_enc.numel()].view_as(W_enc).T,
    }
    sae = formats.load(put(tmp_path / "a", dictionary_learning_files("AutoEncoder", tensors)))
    assert sae.W_enc.data_ptr() == sae.W_dec.data_ptr()
    for target in ("sae_lens", "dictionary_learning", "openai"):
        path = place(tmp_path, target, f"in-{target}")
        formats.save(sae, path, target)
        files = [path] if path.is_file() else path.iterdir()
        assert sum(file.stat().st_size for file in files) < 20_000
        close(formats.load(path)(X), sae(X))


def convert(*arguments: object) -> int:
    return cli.main(["convert", *map(str, arguments)])


def test_convert_on_the_command_line(tmp_path, capsys):
    source = put(tmp_path / "layers.3", sparsify_of_expansion_factor().files)
    assert convert("--from", "sparsify", "--to", "sae_lens", source, tmp_path / "b") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("SAE (TopK, k = 5; 36 latents of 12 inputs): ")
    assert printed.endswith(f"{source} (sparsify) -> {tmp_path / 'b'} (sae_lens); weights unchanged\n")
    # The format of the source is told by its files.
    assert convert("--to", "llamascopium", tmp_path / "b", tmp_path / "c") == 0
    assert capsys.readouterr().out.endswith("(llamascopium); W_enc b_dec subtracted from b_enc\n")
    close(formats.load(tmp_path / "c")(X), sparsify_of_expansion_factor().output(X))

    assert convert("--to", "llamascopium", tmp_path / "b", tmp_path / "c") == 2
    assert "got a destination that exists" in capsys.readouterr().err
    assert convert("--to", "llamascopium", "--overwrite", tmp_path / "b", tmp_path / "c") == 0
    assert convert("--from", "sae_lens", "--to", "adaptivek", tmp_path / "b", tmp_path / "d") == 2
    assert "adaptivek: got TopK, which keeps the k largest scores of a row" in capsys.readouterr().err

    put(tmp_path / "authors", adaptivek().files)
    assert convert("--to", "native", tmp_path / "authors", tmp_path / "e") == 0
    assert capsys.readouterr().out.endswith(
        "; assumed, since the files do not say: steepness = 6, score_min = 0, score_max = 10, probe_reads = last "
        "(other values: --steepness, --score-min, --score-max, --probe-reads)\n"
    )
    given = {"steepness": 4.0, "score_min": 1.0, "score_max": 8.0, "probe_reads": "token"}
    flags = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", value)]
    assert convert("--to", "native", *flags, tmp_path / "authors", tmp_path / "f") == 0
    assert "assumed" not in capsys.readouterr().out
    assert AdaptiveKSAE.from_pretrained(tmp_path / "f").config == SAEConfig(D_IN, D_SAE, k_min=1, k_max=12, **given)
    assert convert("--to", "native", "--steepness", 4, tmp_path / "b", tmp_path / "g") == 2
    assert "steepness: got it for sae_lens, needs adaptivek" in capsys.readouterr().err


def test_a_destination_that_cannot_be(tmp_path, capsys):
    put(tmp_path / "a", native_topk().files)
    (tmp_path / "dangling").symlink_to("/nowhere/at/all")
    (tmp_path / "loop").symlink_to("loop")
    for name, reason in (("dangling", "File exists"), ("loop", "File exists"), ("a/config.json/b", "Not a directory")):
        assert convert("--to", "sparsify", tmp_path / "a", tmp_path / name) == 2
        assert re.search(f"^aksae: .*{name}.*: {reason}; files written before stay valid\n$", capsys.readouterr().err)


def test_a_destination_that_is_gone(tmp_path, monkeypatch, capsys):
    source = put(tmp_path / "a", native_topk().files)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here").rmdir()
    assert convert("--to", "sparsify", source, "b") == 2
    assert capsys.readouterr().err == "aksae: b: got No such file or directory, needs a place that can be written\n"


def json_copy(files: dict[str, Any]) -> dict[str, Any]:
    """A copy of the nested dictionaries; tensors are shared."""
    return {name: json_copy(item) if isinstance(item, dict) else item for name, item in files.items()}


# ------------------------------------------------------------------------------------------- what fit has trained


BATCH_TOPK = selections.BatchTopK(K, k_max=D_SAE)
TRAINED = {
    "TopK": selections.TopK(K),
    "BatchTopK": BATCH_TOPK,
    "JumpReLU": selections.JumpReLU(K, k_max=D_SAE),
    "Matryoshka": selections.Matryoshka(BATCH_TOPK, (10, D_SAE)),
    "AdaptiveK": selections.AdaptiveK(KMap(1, 12), "token"),
}
SHAPES = {
    "SAE": {},
    "transcoder": {"d_out": D_IN},
    "skip transcoder": {"d_out": D_IN, "skip": True},
    "transcoder of another width": {"d_out": D_OUT},
}
# By shape, the formats that hold a TopK, a thresholded (BatchTopK, JumpReLU, Matryoshka) and an AdaptiveK SAE.
HELD = {
    "SAE": (
        {"native", "sparsify", "sae_lens", "dictionary_learning", "llamascopium"},
        {"native", "sae_lens", "dictionary_learning", "llamascopium"},
        {"native", "adaptivek", "sae_lens", "dictionary_learning"},
    ),
    "transcoder": (
        {"native", "sparsify", "llamascopium"},
        {"native", "sae_lens", "llamascopium", "circuit_tracer"},
        {"native"},
    ),
    "skip transcoder": ({"native", "sparsify"}, {"native", "sae_lens", "circuit_tracer"}, {"native"}),
    "transcoder of another width": ({"native"}, {"native", "sae_lens"}, {"native"}),
}


def trained(selection: selections.Selection, **shape: Any) -> SAE:
    """An SAE after a few steps on normalised activations, so that its scales are not 1, nor its biases 0."""
    sae = SAE(SAEConfig(D_IN, D_SAE, selection, **shape), generator=torch.Generator().manual_seed(0)).double()
    if sae.probe is not None:
        with torch.no_grad():
            sae.probe.weight.copy_(randn(D_IN, seed=8) / 3)
            sae.probe.bias.fill_(5)
    x = 3 * randn(64, D_IN, seed=9) + 1
    target = x @ randn(D_IN, shape["d_out"], seed=10) * 2 if shape else None
    fit(sae, [x if target is None else (x, target)], FitConfig(steps=20, lr=1e-2, normalize="mean-norm"))
    return sae


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_was_trained_reconstructs_the_same_from_every_format(tmp_path, name, shape):
    sae = trained(TRAINED[name], **SHAPES[shape])
    assert sae.config.input_scale != 1
    if shape != "SAE":
        assert sae.config.input_scale != sae.config.output_scale
    x = 3 * randn(50, D_IN, seed=11) + 1
    expected, held, refusals = sae(x), set(), []
    for format in WRITTEN:
        path = tmp_path / (format + {"openai": ".pt", "circuit_tracer": ".safetensors"}.get(format, ""))
        try:
            notes = formats.save(sae, path, format)
        except UserError as error:
            refusals.append((format, path, str(error)))
            continue
        held.add(format)
        torch.testing.assert_close(formats.load(path, format)(x), expected)
        assert format == "native" or any("scale" in note for note in notes)
    for format, path, message in refusals:
        assert re.match(rf"{format}: .*got .*, needs ", message), message
        assert not path.exists()
    assert held == HELD[shape][{"TopK": 0, "AdaptiveK": 2}.get(name, 1)]
