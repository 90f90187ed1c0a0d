"""Cross-entropy with the activations of a site replaced, on tiny random models of several families."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from aksae import UserError
from aksae.activations import LanguageModel
from aksae.sites import HOOKS, Site
from aksae.splice import cross_entropy
from language_models import CAUSAL, FAMILIES, WIDTH, Contexts, ragged
from test_sites import OTHERS

FUNCTIONS = {"identity": lambda rows: rows, "half": lambda rows: rows / 2, "mean": lambda rows: MEAN.expand_as(rows)}
# Behind the last block a norm undoes a factor.
MOVED = {"moved": lambda rows: rows / 2 + MEAN}
MEAN = torch.linspace(-1, 1, WIDTH)


def made(family: str, dtype: torch.dtype = torch.float32) -> LanguageModel:
    torch.manual_seed(0)
    model = {**FAMILIES, **OTHERS}[family]().to(dtype)
    # Random models hardly read what passes them: larger weights make a replacement tell.
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data *= 4
    return LanguageModel(model, None, layer=1, name=family)


@pytest.mark.parametrize("family", [*CAUSAL, "opt", "bloom", "phi"])
@pytest.mark.parametrize("hook", HOOKS)
def test_identity_changes_nothing_and_the_mean_is_the_mean(family, hook):
    lm, contexts = made(family), ragged()
    losses = cross_entropy(lm, contexts, Site(1, hook), FUNCTIONS, mean=MEAN, progress=False)
    assert torch.equal(losses.spliced["identity"], losses.clean)
    assert torch.equal(losses.spliced["mean"], losses.mean_ablated)
    assert (losses.mean_ablated - losses.zero_ablated).abs().min() > 1e-6
    assert (losses.spliced["half"] - losses.clean).abs().min() > 1e-6
    assert losses.damage("identity") == losses.kl("identity") == 0
    assert losses.recovered("identity") == losses.recovered("identity", "zero") == 1
    assert losses.recovered("mean") == 0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules())


@pytest.mark.parametrize(("family", "module", "hook"), [("llama", "", "resid_post"), ("gpt2", "mlp", "mlp_out")])
def test_losses_are_those_of_a_hook_by_hand(family, module, hook):
    """Each context alone and unpadded, its loss tokens replaced by a hook of the test's own."""
    lm, contexts = made(family), ragged()
    losses = cross_entropy(lm, contexts, Site(2, hook), MOVED, mean=MEAN, progress=False)
    block = next(m for m in lm.model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 3)[2]
    for make, got in (
        (lambda rows: MEAN, losses.mean_ablated),
        (lambda rows: 0 * rows, losses.zero_ablated),
        (MOVED["moved"], losses.spliced["moved"]),
    ):
        for number, attended in enumerate(contexts.attention_mask):
            ids = torch.from_numpy(contexts.input_ids[number][attended]).long()[None]
            with torch.no_grad():
                clean = lm.model(input_ids=ids).logits[0, :-1].double().softmax(-1)
            here = torch.from_numpy(contexts.loss_mask[number][attended])

            def replace(module, args, output, here=here, make=make):
                hidden = output[0] if isinstance(output, tuple) else output
                hidden = torch.where(here[None, :, None], make(hidden), hidden)
                return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

            handle = block.get_submodule(module).register_forward_hook(replace)
            with torch.no_grad():
                logits = lm.model(input_ids=ids).logits
            handle.remove()
            wanted = F.cross_entropy(logits[0, :-1], ids[0, 1:])
            assert float(got[number]) == pytest.approx(float(wanted), rel=1e-5)
            if make is MOVED["moved"]:
                q = logits[0, :-1].double().softmax(-1)
                kl = sum(float(row @ (row / other).log()) for row, other in zip(clean, q)) / len(q)
                assert float(losses.divergence["moved"][number]) == pytest.approx(kl, rel=1e-4, abs=1e-6)
                assert kl > 1e-3


@pytest.mark.parametrize("hook", HOOKS)
def test_only_the_rows_of_loss_tokens_are_given(hook):
    lm, contexts, seen = made("llama"), ragged(), []
    site = Site(1, hook)
    rows = lm.read(contexts.input_ids, contexts.attention_mask, [site])[site][torch.from_numpy(contexts.loss_mask)]

    def keep(x):
        seen.append(x)
        return x

    cross_entropy(lm, contexts, site, {"keep": keep}, mean=MEAN, progress=False)
    assert torch.equal(torch.cat(seen), rows)
    # Where no token is a loss token, no ablation does anything.
    none = Contexts(contexts.input_ids, contexts.attention_mask, np.zeros_like(contexts.loss_mask))
    losses = cross_entropy(lm, none, site, {}, mean=MEAN, progress=False)
    assert torch.equal(losses.mean_ablated, losses.clean)
    assert torch.equal(losses.zero_ablated, losses.clean)


def test_batches_and_16_bits(monkeypatch):
    from aksae import splice

    contexts, site = ragged(), Site(0)
    for dtype in (torch.float32, torch.bfloat16):
        lm = made("llama", dtype)
        whole = cross_entropy(lm, contexts, site, FUNCTIONS, mean=MEAN, progress=False)
        assert torch.equal(whole.spliced["identity"], whole.clean)
        with monkeypatch.context() as patch:
            patch.setattr(splice, "LOSS_TOKENS", 24)
            parts = cross_entropy(lm, contexts, site, FUNCTIONS, mean=MEAN, progress=False)
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(parts.zero_ablated, whole.zero_ablated, rtol=tolerance, atol=0)
        torch.testing.assert_close(parts.spliced["half"], whole.spliced["half"], rtol=tolerance, atol=0)
        torch.testing.assert_close(parts.divergence["half"], whole.divergence["half"], rtol=10 * tolerance, atol=0)


def test_what_has_no_cross_entropy(load):
    contexts = ragged()
    with pytest.raises(
        UserError, match="predicts no next token, surprisal or cross-entropy needs a causal language model"
    ):
        cross_entropy(load("bert"), contexts, Site(1), {}, mean=MEAN)
    with pytest.raises(UserError, match=r"model\.layer: got 3, needs 0 to 2"):
        cross_entropy(load("llama"), contexts, Site(3), {}, mean=MEAN)
    with pytest.raises(UserError, match="contexts: got none"):
        cross_entropy(load("llama"), Contexts(*np.zeros((3, 0, 4), bool)), Site(1), {}, mean=MEAN)
