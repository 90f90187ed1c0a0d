"""k-sparse probing, on codes whose latents are known to tell a label."""

from __future__ import annotations

import pytest
import torch
from aksae import UserError
from aksae.study.sparse_probing import auc, k_sparse_probe, logistic_regression, token_labels

from aksae_kernels import SparseCodes

F = 40


def codes_and_labels(n, seed, *, noise=0.0):
    """Codes in which latent 7 fires with the label, and latents 3 and 11 for one of its halves each."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.rand(n, generator=draw) < 0.3
    dense = torch.rand(n, F, generator=draw) * (torch.rand(n, F, generator=draw) < 0.2)
    half = torch.rand(n, generator=draw) < 0.5
    flipped = torch.rand(n, generator=draw) < noise
    dense[:, 7] = 5.0 * (labels ^ flipped)
    dense[:, 3] = 4.0 * (labels & half)
    dense[:, 11] = 4.0 * (labels & ~half)
    return SparseCodes.from_dense(dense), labels


def test_the_latent_that_tells_is_found():
    train, test = codes_and_labels(500, 0), codes_and_labels(400, 1)
    found = k_sparse_probe(*train, *test, d_sae=F, k=1)
    assert found.latents == [7]
    assert found.accuracy == found.auc == 1
    assert found.larger_class == pytest.approx(1 - float(test[1].float().mean()))


def test_more_latents_tell_more():
    train, test = codes_and_labels(2000, 0, noise=0.2), codes_and_labels(2000, 1, noise=0.2)
    one, three = (k_sparse_probe(*train, *test, d_sae=F, k=k) for k in (1, 3))
    assert set(three.latents) == {3, 7, 11}
    # A label that is read off one noisy latent: 80 % of rows of either kind are right.
    assert one.auc == pytest.approx(0.8, abs=0.04)
    assert three.accuracy == three.auc == 1


def test_what_tells_nothing_scores_as_chance():
    codes, labels = codes_and_labels(3000, 0)
    other = labels[torch.randperm(3000, generator=torch.Generator().manual_seed(5))]
    found = k_sparse_probe(codes, other, codes, other, d_sae=F, k=5)
    assert found.auc == pytest.approx(0.5, abs=0.06)
    assert found.accuracy == pytest.approx(found.larger_class, abs=0.01)


def test_latents_that_do_not_differ_are_not_read():
    dense = torch.zeros(6, F)
    dense[:3, 2] = 1.0
    labels = dense[:, 2] > 0
    codes = SparseCodes.from_dense(dense)
    assert k_sparse_probe(codes, labels, codes, labels, d_sae=F, k=5).latents == [2]


def test_auc_counts_pairs():
    scores, labels = torch.tensor([0.1, 0.4, 0.4, 0.9]), torch.tensor([False, True, False, True])
    # Of four pairs three are in order, and one is a tie.
    assert auc(scores, labels) == 3.5 / 4
    assert auc(-scores, labels) == 0.5 / 4
    assert auc(torch.zeros(4), labels) == 0.5


def test_logistic_regression_is_where_the_gradient_is_0():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(300, 3, generator=draw, dtype=torch.float64)
    labels = torch.rand(300, generator=draw) < torch.sigmoid(2 * x[:, 0] - x[:, 2] - 1)
    weight, bias = logistic_regression(x, labels)
    left = torch.sigmoid(x @ weight + bias) - labels.double()
    assert (x.T @ left + weight).abs().max() < 1e-4
    assert left.sum().abs() < 1e-4
    # What can be told without a fault has finite weights too.
    weight, bias = logistic_regression(x, x[:, 0] > 0)
    assert weight.isfinite().all()
    assert ((x @ weight + bias > 0) == (x[:, 0] > 0)).double().mean() > 0.98


def test_labels_of_tokens():
    tokens = ["A", " cat", " (", "not", " 2", ")", " sat", ".", "\n", "It", " sat", '."', " I", "'m"]
    labels = token_labels(tokens)
    true = {name: [token for token, here in zip(tokens, column.tolist()) if here] for name, column in labels.items()}
    assert true == {
        "starts_word": [" cat", " (", " 2", " sat", "It", " sat", " I"],
        "capitalised": ["A", "It", " I"],
        "digits": [" 2"],
        "punctuation": [" (", ")", ".", '."'],
        "starts_sentence": ["It", " I"],
        "starts_line": ["It"],
        "in_brackets": ["not", " 2", ")"],
        "repeated": [" sat"],
    }
    assert token_labels([]) == {}


def test_wrong_arguments_are_named():
    codes, labels = codes_and_labels(20, 0)
    for name, arguments, k in (
        ("k", (codes, labels, codes, labels), 0),
        ("k", (codes, labels, codes, labels), F + 1),
        ("train_labels", (codes, labels[:-1], codes, labels), 1),
        ("test_labels", (codes, labels, codes, torch.ones(20, dtype=torch.bool)), 1),
        ("train_labels", (codes, torch.zeros(20, dtype=torch.bool), codes, labels), 1),
    ):
        with pytest.raises(UserError, match=f"^{name}: got "):
            k_sparse_probe(*arguments, d_sae=F, k=k)
