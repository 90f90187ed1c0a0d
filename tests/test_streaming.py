"""Activations straight from a model: every loss token once an epoch, the same after a resume."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from aksae import SAE, FitConfig, SAEConfig, TopK, UserError, fit
from aksae.sites import Site
from aksae.streaming import stream_activations
from language_models import WIDTH, Contexts, block_outputs, ragged


def sorted_rows(x):
    return x[np.lexsort(x.numpy().T)]


def expected(lm, contexts):
    keep = [mask[attended] for mask, attended in zip(contexts.loss_mask, contexts.attention_mask, strict=True)]
    outputs = zip(block_outputs(lm, contexts), keep, strict=True)
    return torch.cat([rows[torch.from_numpy(mask)] for rows, mask in outputs])


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("contexts_per_forward", [1, 2, 8])
def test_an_epoch_is_every_loss_token_once(load, family, contexts_per_forward):
    lm, contexts = load(family), ragged()
    wanted = expected(lm, contexts)
    batches = iter(
        stream_activations(lm, contexts, len(wanted), contexts_per_forward=contexts_per_forward, buffer_rows=12)
    )
    for _ in range(2):
        got = next(batches).x
        torch.testing.assert_close(sorted_rows(got), sorted_rows(wanted), rtol=1e-4, atol=1e-5)


def test_left_padding_and_packed_contexts(load):
    """Of left-padded contexts the rows are those of the tokens; a context without padding is read whole."""
    lm, right = load("llama"), ragged()
    flipped = Contexts(
        *(np.ascontiguousarray(a[:, ::-1]) for a in (right.input_ids, right.attention_mask, right.loss_mask))
    )
    for contexts in (flipped, ragged(lengths=(12, 12, 12))):
        got = next(iter(stream_activations(lm, contexts, int(contexts.loss_mask.sum()), contexts_per_forward=2))).x
        full = lm.residual(contexts.input_ids, contexts.attention_mask)[torch.from_numpy(contexts.loss_mask)]
        torch.testing.assert_close(sorted_rows(got), sorted_rows(full), rtol=1e-4, atol=1e-5)


def test_the_very_batches_go_on_after_a_resume(load):
    lm, contexts = load("llama"), ragged(lengths=(7, 3, 12, 5, 9) * 6)
    options = {"contexts_per_forward": 3, "buffer_rows": 40, "seed": 3}
    batches = stream_activations(lm, contexts, 16, **options)
    iterator = iter(batches)
    whole = [next(iterator).x for _ in range(30)]
    for taken in (1, 7, 11, 25):
        resumed = stream_activations(lm, contexts, 16, **options)
        resumed.load_state_dict({**batches.state_dict(), "taken": taken})
        assert all(torch.equal(batch.x, x) for batch, x in zip(resumed, whole[taken:]))


def test_another_site_and_a_run(load):
    lm, contexts = load("gpt2"), ragged()
    site = Site(2, "mlp_out")
    batches = stream_activations(lm, contexts, 8, site=site, contexts_per_forward=2, buffer_rows=16)
    rows = lm.read(contexts.input_ids, contexts.attention_mask, [site])[site][torch.from_numpy(contexts.loss_mask)]
    x = next(iter(batches)).x
    assert (torch.cdist(x, rows).min(1).values < 1e-4).all()
    result = fit(SAE(SAEConfig(WIDTH, 32, TopK(4))), batches, FitConfig(steps=5))
    assert result.steps == 5


def test_what_is_wrong_is_named(load, monkeypatch):
    lm, contexts = load("llama"), ragged()
    with pytest.raises(UserError, match=r"model.batch_size: got 0, needs 1 or more"):
        stream_activations(lm, contexts, 8, contexts_per_forward=0)
    with pytest.raises(UserError, match="contexts: got none, needs at least one"):
        stream_activations(lm, ragged(lengths=()), 8)
    with pytest.raises(UserError, match=r"model.layer: got 9, needs 0 to 2"):
        stream_activations(lm, contexts, 8, site=Site(9))
    read = lm.read

    def broken(ids, mask, sites):
        (hidden,) = read(ids, mask, sites).values()
        # Context 3 is the only one of length 5.
        hidden[torch.from_numpy(np.ascontiguousarray(mask)).sum(1) == 5, 4, 2] = float("nan")
        return {sites[0]: hidden}

    monkeypatch.setattr(lm, "read", broken)
    with pytest.raises(UserError, match=r"activations: got NaN or infinity in context 3 \(.*, layer 1, float32\)"):
        next(iter(stream_activations(lm, contexts, 8, contexts_per_forward=2)))
