"""Attention, MLP and the residual stream around them, read from blocks of many architectures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from aksae.activations import LanguageModel
from aksae.errors import UserError
from aksae.sites import HOOKS, Site
from language_models import COMMON, FAMILIES, LAYERS, WIDTH, ragged, transformers

# By their own names, what gives attention and MLP of a block.
NAMES = {
    "llama": ("self_attn", "mlp"),
    "gpt2": ("attn", "mlp"),
    "gpt_neox": ("attention", "mlp"),
    "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "qwen2_moe": ("self_attn", "mlp"),
    "bert": ("attention.output.dense", "output.dense"),
    "roberta": ("attention.output.dense", "output.dense"),
    "t5": ("layer.0.SelfAttention", "layer.1.DenseReluDense"),
    "opt": ("self_attn", "fc2"),
    "bloom": ("self_attention.dense", "mlp.dense_4h_to_h"),
    "phi": ("self_attn", "mlp"),
    "distilbert": ("attention", "ffn"),
}
OTHERS = {
    "opt": lambda: transformers.OPTForCausalLM(transformers.OPTConfig(**COMMON, ffn_dim=24, word_embed_proj_dim=WIDTH)),
    "bloom": lambda: transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=50, hidden_size=WIDTH, n_layer=LAYERS, n_head=2)
    ),
    "phi": lambda: transformers.PhiForCausalLM(transformers.PhiConfig(**COMMON, intermediate_size=24)),
    "distilbert": lambda: transformers.DistilBertModel(
        transformers.DistilBertConfig(vocab_size=50, dim=WIDTH, n_layers=LAYERS, n_heads=2, hidden_dim=24)
    ),
}
# Their blocks end in a norm.
POST_NORM = {"bert", "roberta", "distilbert"}


def made(family):
    torch.manual_seed(0)
    model = {**FAMILIES, **OTHERS}[family]()
    return LanguageModel(model.get_encoder() if family == "t5" else model, None, layer=1, name=family)


@pytest.mark.parametrize("family", NAMES)
def test_what_is_read_is_what_the_modules_gave(family):
    lm = made(family)
    contexts = ragged()
    names = dict(zip(("attn_out", "mlp_out"), NAMES[family]))
    block, given = lm._blocks[1], {}

    def keep(hook):
        def record(module, args, output):
            given[hook] = (output[0] if isinstance(output, tuple) else output).clone()

        return record

    handles = [block.get_submodule(name).register_forward_hook(keep(hook)) for hook, name in names.items()]
    ids, mask = torch.from_numpy(contexts.input_ids).long(), torch.from_numpy(contexts.attention_mask)
    with torch.no_grad():
        hidden = lm.model(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    sites = [Site(layer, hook) for layer in (1, 0) for hook in HOOKS]
    read = lm.read(contexts.input_ids, contexts.attention_mask, sites)
    assert list(read) == sites
    at = {hook: read[Site(1, hook)][mask] for hook in HOOKS}
    assert torch.equal(at["resid_pre"], hidden[1][mask])
    assert torch.equal(at["resid_post"], hidden[2][mask])
    assert torch.equal(read[Site(0, "resid_post")][mask], at["resid_pre"])
    for hook in names:
        assert torch.equal(at[hook], given[hook].view(*mask.shape, WIDTH)[mask]), hook
    if family not in POST_NORM:
        torch.testing.assert_close(at["resid_pre"] + at["attn_out"] + at["mlp_out"], at["resid_post"])


def test_one_site_is_read_as_with_others(load):
    lm = load("llama")
    contexts = ragged()
    together = lm.read(contexts.input_ids, contexts.attention_mask, [Site(2, hook) for hook in HOOKS])
    for site, hidden in together.items():
        assert torch.equal(lm.read(contexts.input_ids, contexts.attention_mask, [site])[site], hidden)


def test_blocks_behind_the_last_site_do_not_run(load):
    lm = load("gpt2")
    ran = []
    for index, block in enumerate(lm._blocks):
        block.register_forward_pre_hook(lambda module, args, index=index: ran.append(index))
    lm.check_sites([Site(1, "attn_out")])
    ran.clear()
    ids = np.ones((1, 4), dtype=np.int32)
    lm.read(ids, ids, [Site(1, "attn_out"), Site(0)])
    assert ran == [0, 1]


def test_what_a_block_does_not_have_is_named():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mixer, self.gate = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

        def forward(self, x):
            return x + self.gate(self.mixer(x))

    class Model(torch.nn.Module):
        config = transformers.LlamaConfig(**COMMON)
        dtype, device = torch.float32, torch.device("cpu")

        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList(Block() for _ in range(2))

        def forward(self, input_ids, attention_mask):
            x = torch.nn.functional.one_hot(input_ids, 8).float()
            for block in self.blocks:
                x = block(x)

    lm = LanguageModel(Model(), None, layer=0, name="made up")
    for hook, what in (("attn_out", "an attention"), ("mlp_out", "an MLP")):
        message = (
            rf"found no module for {hook} in block 1 of made up \(Block\), whose modules are mixer, gate; needs {what}"
        )
        with pytest.raises(UserError, match=message):
            lm.check_sites([Site(1, hook)])
    with pytest.raises(UserError, match=r"model.layer: got 2, needs 0 to 1"):
        lm.check_sites([Site(2)])


def test_the_identity_names_the_site(load):
    lm = load("llama", 1)
    assert lm.identity_at(Site(1)) == lm.identity
    other = lm.identity_at(Site(2, "mlp_out"))
    assert {name for name in other if other[name] != lm.identity.get(name)} == {"model.layer", "site"}
