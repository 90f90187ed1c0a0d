"""Finished runs of tiny SAEs, of every kind of input."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
from command_line import call
from language_models import VOCABULARY, WIDTH

F, TOKENS, DOCUMENTS = 32, 20, 40
TEXT = ("topk", "batch-topk", "jumprelu", "matryoshka", "priced", "stream", "adaptivek", "mean")
"""Kinds of runs on text: selections, TopK on a stream, and AdaptiveK with a probe on last tokens and on means."""
KINDS = (*TEXT, "collected", "files")
"""Runs on a folder of `aksae collect` and on files of one's own, too."""


def train(kind: str, model: Path, folder: Path) -> Path:
    """Train a run of that kind on `model` below `folder`, and return its own folder."""
    source = {
        "model.name": model,
        "model.layer": 1,
        "model.device": "cpu",
        "text.source": _text(folder / "documents.txt"),
        "text.context-length": TOKENS,
        "text.heldout-fraction": 0.2,
        "cache": folder / "cache",
    }
    settings = {"d-sae": F, "steps": 20, "batch-size": 32, "dead-after": 300, "device": "cpu", "output": folder / "run"}
    k_map, k = {"k-min": 2, "k-max": 8}, {"k": 4}
    if kind == "collected":
        assert call("collect", *("--sites", "mlp_out"), **source, out=folder / "acts") == 0
        settings |= {"activations": folder / "acts" / "layers.1.mlp_out", "selection": "topk", **k}
    elif kind == "files":
        np.save(folder / "x.npy", np.random.default_rng(0).standard_normal((400, WIDTH)).astype(np.float32))
        settings |= {"activations": folder / "x.npy", "selection": "topk", **k}
    elif kind in ("adaptivek", "mean"):
        settings |= {**source, **k_map, "selection": "adaptivek", "probe-reads": "mean" if kind == "mean" else "last"}
    else:
        settings |= {**source, **k, "selection": "topk" if kind == "stream" else kind}
    assert call("train", *(["--stream"] if kind == "stream" else []), **settings) == 0
    return folder / "run"


def _text(path: Path) -> Path:
    """Documents of words, one context each, some rarer than others."""
    draw, words = random.Random(0), [f"w{i}" for i in range(1, VOCABULARY)]
    weights = [1 / (1 + i) for i in range(len(words))]
    path.write_text("\n\f\n".join(" ".join(draw.choices(words, weights, k=TOKENS)) for _ in range(DOCUMENTS)))
    return path
