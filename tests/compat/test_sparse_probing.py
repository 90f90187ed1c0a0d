"""The probe of a few latents against scikit-learn's, which is no dependency of ours but of some hosts."""

from __future__ import annotations

import pytest
import torch
from aksae.study.sparse_probing import auc, logistic_regression

linear_model = pytest.importorskip("sklearn.linear_model", reason="needs scikit-learn, which some hosts bring")
metrics = pytest.importorskip("sklearn.metrics")


@pytest.mark.parametrize("k", [1, 5])
def test_it_is_scikit_learns_logistic_regression(k):
    draw = torch.Generator().manual_seed(k)
    x = torch.randn(400, k, generator=draw, dtype=torch.float64).relu()
    labels = torch.rand(400, generator=draw) < torch.sigmoid(3 * x[:, 0] - 2)
    weight, bias = logistic_regression(x, labels)
    theirs = linear_model.LogisticRegression(tol=1e-10, max_iter=1000).fit(x.numpy(), labels.numpy())
    torch.testing.assert_close(weight, torch.from_numpy(theirs.coef_[0]), rtol=1e-4, atol=1e-5)
    assert float(bias) == pytest.approx(theirs.intercept_[0], rel=1e-4)
    # With one latent that is silent on half the rows there are many ties.
    scores = x @ weight + bias
    assert auc(scores, labels) == pytest.approx(metrics.roc_auc_score(labels.numpy(), scores.numpy()))
