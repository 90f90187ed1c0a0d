"""What a selection drops of another's firings, counted and shown."""

from __future__ import annotations

import torch
from aksae import SAE, Priced, SAEConfig, calibrate
from aksae.study.firings import described_drops, dropped_examples, firing_changes

from aksae_kernels import SparseCodes


class Tokenizer:
    words = ("the", " cat", " sat", " on", "\n", " mats")

    def decode(self, ids):
        return "".join(self.words[i] for i in ids)


def test_firings_are_counted_by_latent():
    before = SparseCodes.from_dense(torch.tensor([[1.0, 2, 0, 0], [3, 0, 4, 0], [0, 5, 6, 0]]))
    after = SparseCodes.from_dense(torch.tensor([[1.0, 0, 0, 0], [9, 0, 0, 7], [0, 5, 6, 8]]))
    changes = firing_changes(before, after, 4)
    assert [column.tolist() for column in changes] == [[2, 2, 2, 0], [0, 1, 1, 0], [0, 0, 0, 2]]
    assert changes.dropped_share[:3].tolist() == [0, 0.5, 0.5]
    assert changes.dropped_share[3].isnan()


def test_prices_drop_of_their_candidates_and_add_none():
    sae = SAE(SAEConfig(16, 64, Priced(4)), generator=torch.Generator().manual_seed(0)).eval()
    x = torch.randn(500, 16, generator=torch.Generator().manual_seed(1))
    calibrate(sae, x)
    candidates, kept = sae.encode(x, k=sae.k_bound), sae.encode(x)
    changes = firing_changes(candidates, kept, 64)
    assert not changes.gained.any()
    assert int(changes.fired.sum()) == int(candidates.counts.sum())
    assert int((changes.fired - changes.dropped).sum()) == int(kept.counts.sum())
    # Against TopK at the same L0 as many join as leave, in the sum.
    against_topk = firing_changes(sae.encode(x, k=4), kept, 64)
    assert against_topk.gained.any()
    assert abs(int(against_topk.gained.sum() - against_topk.dropped.sum())) <= 0.005 * 4 * 500


def test_dropped_firings_are_shown_in_their_contexts():
    latent = torch.tensor([0.0, 2, 3, 0, 1, 5, 0, 4])
    kept = torch.tensor([0.0, 2, 0, 0, 0, 5, 0, 0])
    tokens, contexts = torch.tensor([0, 1, 2, 4, 0, 1, 3, 5]), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    before, after = (SparseCodes.from_dense(torch.stack([column, torch.ones(8)], 1)) for column in (latent, kept))
    examples = dropped_examples(before, after, 0, tokens, contexts, 5, Tokenizer())
    assert [described_drops(example) for example in examples] == ["~the~ «cat» on ~mats~", "the «cat» ~sat~⏎"]
    assert examples[0]["activations"] == [1, 5, 0, 4]
    assert examples[0]["dropped"] == [True, False, False, True]
    assert len(dropped_examples(before, after, 0, tokens, contexts, 1, Tokenizer())) == 1
    assert dropped_examples(before, after, 1, tokens, contexts, 5, Tokenizer()) == []


def test_long_contexts_are_cut_around_the_strongest():
    activations = [0.0] * 100
    activations[60] = 1.0
    example = {"tokens": [" a"] * 100, "activations": activations, "dropped": [a > 0 for a in activations]}
    assert described_drops(example) == "…" + " a" * 20 + " ~a~" + " a" * 10 + "…"
