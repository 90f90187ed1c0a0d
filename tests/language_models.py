"""Tiny random language models of several families, and contexts for them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")

VOCABULARY = 50
WIDTH = 16
LAYERS = 3

COMMON = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
FAMILIES = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON, intermediate_size=24)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=2, n_positions=32)
    ),
    "gpt_neox": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**COMMON, intermediate_size=24)),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**COMMON, intermediate_size=24, num_key_value_heads=1, head_dim=8)
    ),
    "qwen2_moe": lambda: transformers.Qwen2MoeForCausalLM(
        transformers.Qwen2MoeConfig(**COMMON, intermediate_size=24, num_key_value_heads=2, num_experts=8)
    ),
    "bert": lambda: transformers.BertForMaskedLM(
        transformers.BertConfig(**COMMON, intermediate_size=24, max_position_embeddings=32)
    ),
    "roberta": lambda: transformers.RobertaForMaskedLM(
        transformers.RobertaConfig(**COMMON, intermediate_size=24, max_position_embeddings=34)
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=24, num_layers=LAYERS, num_heads=2)
    ),
    # Its blocks are each a list of two sub-layers, longer than the list of blocks.
    "t5_one_block": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    ),
}
CAUSAL = ("llama", "gpt2", "gpt_neox", "gemma2", "qwen2_moe")


def save(family: str, folder) -> None:
    """Write a random model of the family, and a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    torch.manual_seed(0)
    FAMILIES[family]().save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)


@dataclass
class Contexts:
    """What `collect` needs of a `text.ContextSet`."""

    input_ids: np.ndarray
    attention_mask: np.ndarray
    loss_mask: np.ndarray

    def __len__(self):
        return len(self.input_ids)


def write_documents(path: Path, n: int, words_each: int) -> Path:
    """Write `n` documents of random words that `save`'s tokenizer knows to a text file; its path."""
    draw = random.Random(0)
    words = [f"w{i}" for i in range(1, VOCABULARY)]
    path.write_text("\n\f\n".join(" ".join(draw.choices(words, k=words_each)) for _ in range(n)))
    return path


def ragged(lengths=(7, 3, 12, 5, 9), width=12, seed=0):
    rng = np.random.default_rng(seed)
    attention = np.arange(width) < np.array(lengths)[:, None]
    loss = attention.copy()
    # A special token at the start stays out of the losses, as does one further in.
    loss[:, 0] = False
    loss[2:3, 6] = False
    # Poison: the id on padding must not matter.
    ids = np.where(attention, rng.integers(1, VOCABULARY, attention.shape), 49).astype(np.int32)
    return Contexts(ids, attention, loss)


def block_outputs(lm, contexts):
    """Block outputs `[length, D]` of each context alone and unpadded, by the test's own hook and a full forward."""
    outputs = []
    stack = next(m for m in lm.model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == lm.n_layers)

    def keep(module, args, output):
        outputs.append((output[0] if isinstance(output, tuple) else output)[0])

    handle = stack[lm.layer].register_forward_hook(keep)
    with torch.no_grad():
        for ids, mask in zip(contexts.input_ids, contexts.attention_mask, strict=True):
            lm.model(input_ids=torch.from_numpy(ids[mask]).long()[None])
    handle.remove()
    return outputs
