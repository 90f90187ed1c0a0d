"""Ridge regression against independent solutions, and the probe's choice of penalty against a plain loop."""

import json
import math

import numpy as np
import pytest
import torch
from aksae.errors import UserError
from aksae.probe import ComplexityProbe, _pearson, _ranks, ridge_fit


def regression(n, d, *, noise=0.1, offset=0.0, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(n, d, generator=generator, dtype=torch.float64) + offset
    w = torch.randn(d, generator=generator, dtype=torch.float64)
    y = (X - offset) @ w + 3.0 + noise * torch.randn(n, generator=generator, dtype=torch.float64)
    return X.to(dtype), y.to(dtype)


def augmented_solution(X, y, lam):
    """Ridge as least squares of extra rows sqrt(lam) I and a ones column without one; minimum norm is over w alone."""
    n, d = X.shape
    A = np.zeros((n + d, d + 1))
    A[:n, :d], A[:n, d] = X, 1.0
    A[n:, :d] = math.sqrt(lam) * np.eye(d)
    solution = np.linalg.lstsq(A, np.concatenate([y, np.zeros(d)]), rcond=None)[0]
    return solution[:d], solution[d]


@pytest.mark.parametrize(("n", "d"), [(200, 13), (5, 1), (9, 31), (4097, 3)])
@pytest.mark.parametrize("lam", [1e-3, 1.0, 1e4])
def test_ridge_matches_augmented_least_squares(n, d, lam):
    X, y = regression(n, d, offset=2.0)
    weight, bias = ridge_fit(X, y, lam)
    expected_weight, expected_bias = augmented_solution(X.numpy(), y.numpy(), lam)
    assert weight.shape == (d,)
    assert bias.shape == ()
    np.testing.assert_allclose(weight.numpy(), expected_weight, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(bias.item(), expected_bias, rtol=1e-8, atol=1e-10)


def test_gradient_of_the_objective_vanishes():
    X, y = regression(50, 7)
    lam = 2.5
    weight, bias = (part.requires_grad_() for part in ridge_fit(X, y, lam))
    ((X @ weight + bias - y).square().sum() + lam * weight.square().sum()).backward()
    assert weight.grad.abs().max() < 1e-9
    assert bias.grad.abs() < 1e-9


def test_bias_carries_no_penalty():
    X, y = regression(40, 3)
    weight, bias = ridge_fit(X, y + 1e6, 1e12)
    assert weight.abs().max() < 1e-6
    assert bias.item() == pytest.approx(y.mean().item() + 1e6, rel=1e-12)


@pytest.mark.parametrize(("n", "d"), [(6, 20), (30, 5)])
@pytest.mark.parametrize("lam", [0.0, 1e-300])
def test_no_penalty_gives_the_minimum_norm_solution(n, d, lam):
    X, y = regression(n, d)
    X[:, 1] = X[:, 0]
    weight, bias = ridge_fit(X, y, lam)
    centred = (X - X.mean(0)).numpy()
    expected = np.linalg.pinv(centred, rcond=1e-10) @ (y - y.mean()).numpy()
    np.testing.assert_allclose(weight.numpy(), expected, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(bias.item(), (y.mean() - X.mean(0) @ torch.from_numpy(expected)).item(), rtol=1e-6)


def test_dependent_columns_are_noticed_even_where_rounding_hides_them():
    # In some of these, Cholesky of the singular matrix succeeds, with a pivot of rounding errors.
    for seed in range(12):
        X, y = regression(30, 5, seed=seed)
        X = 3 * X + 2
        X[:, 4] = X[:, 0] - X[:, 1]
        expected = torch.linalg.pinv(X - X.mean(0), rtol=1e-10) @ (y - y.mean())
        torch.testing.assert_close(ridge_fit(X, y, 0.0)[0], expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_degenerate_data_predicts_the_mean(lam):
    y = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
    same_rows = torch.full((3, 4), 0.1, dtype=torch.float64)
    one_row = torch.tensor([[1.0, -2.0]])
    for X, targets, mean in [
        (same_rows, y, 3.0),
        (one_row, torch.tensor([4.0]), 4.0),
        (regression(3, 2)[0], y * 0 + 2, 2.0),
    ]:
        weight, bias = ridge_fit(X, targets, lam)
        assert weight.abs().max() < 1e-12
        assert bias.item() == pytest.approx(mean)


def test_large_mean_and_unequal_scales_lose_nothing():
    # Residual streams have a few coordinates thousands of times larger than the others.
    X, y = regression(300, 6)
    scale = torch.tensor([1e4, 1.0, 1.0, 1e-2, 1.0, 1.0], dtype=torch.float64)
    weight, _ = ridge_fit(X * scale + 1e4 * scale, y, 0.0)
    expected, _ = ridge_fit(X, y, 0.0)
    torch.testing.assert_close(weight * scale, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_of_x_is_kept_and_only_the_result_is_rounded(dtype):
    X, y = regression(100, 4, dtype=dtype)
    weight, bias = ridge_fit(X, y.double(), 0.5)
    exact_weight, exact_bias = ridge_fit(X.double(), y.double(), 0.5)
    assert weight.dtype == bias.dtype == dtype
    assert torch.equal(weight, exact_weight.to(dtype))
    assert torch.equal(bias, exact_bias.to(dtype))


def test_integer_targets_and_strided_rows():
    X, _ = regression(40, 6)
    y = torch.arange(40)
    strided, contiguous = ridge_fit(X[:, ::2], y, 1.0), ridge_fit(X[:, ::2].contiguous(), y.double(), 1.0)
    torch.testing.assert_close(strided, contiguous, rtol=1e-12, atol=1e-12)


def broken(X, row):
    X = X.clone()
    X[row] = math.nan
    return X


GOOD_X, GOOD_Y = regression(8, 3)


@pytest.mark.parametrize(
    ("X", "y", "lam", "error", "named"),
    [
        (GOOD_X, GOOD_Y[:-1], 1.0, ValueError, r"y: got shape \(7,\), needs \[8\]"),
        (GOOD_X, GOOD_Y[:, None], 1.0, ValueError, "y: got shape"),
        (GOOD_X[0], GOOD_Y, 1.0, ValueError, "X: got shape"),
        (GOOD_X[:0], GOOD_Y[:0], 1.0, ValueError, "X: got shape"),
        (broken(GOOD_X, (5, 1)), GOOD_Y, 1.0, ValueError, "X: row 5"),
        (GOOD_X, broken(GOOD_Y, 2), 1.0, ValueError, "y: row 2"),
        (GOOD_X, GOOD_Y, -0.1, ValueError, "lam: got -0.1"),
        (GOOD_X, GOOD_Y, math.nan, ValueError, "lam: got nan"),
        (GOOD_X, GOOD_Y, "1", TypeError, "lam: got '1'"),
        (GOOD_X.long(), GOOD_Y, 1.0, TypeError, "X: got torch.int64"),
        (GOOD_X.numpy(), GOOD_Y, 1.0, TypeError, "X: got ndarray"),
        (GOOD_X, [1.0], 1.0, TypeError, "y: got list"),
    ],
)
def test_bad_input_is_named(X, y, lam, error, named):
    with pytest.raises(error, match=named):
        ridge_fit(X, y, lam)


def scores(n, d, *, seed=0, noise=0.5, spread=1.5):
    X, y = regression(n, d, noise=noise, seed=seed, dtype=torch.float32)
    return X, (5 + spread * (y - y.mean()) / y.std()).clamp(0, 10)


def test_forward_is_the_clamped_product():
    probe = ComplexityProbe(3, score_min=-1.0, score_max=4.0)
    assert probe(torch.randn(2, 5, 3)).shape == (2, 5)
    assert probe(torch.randn(3)).item() == 0.0
    probe.load_state_dict({"weight": torch.tensor([1.0, 2.0, 0.0]), "bias": torch.tensor(0.5)})
    x = torch.tensor([[1.0, 1.0, 7.0], [9.0, 9.0, 0.0], [-9.0, 0.0, 0.0], [math.nan, 0.0, 0.0]])
    assert probe(x)[:3].tolist() == [3.5, 4.0, -1.0]
    assert probe(x)[3].isnan()


def test_clamped_scores_pass_no_gradient():
    probe = ComplexityProbe(1)
    probe.load_state_dict({"weight": torch.ones(1), "bias": torch.tensor(0.0)})
    probe(torch.tensor([[2.0], [50.0], [-3.0]])).sum().backward()
    assert probe.weight.grad.item() == 2.0
    assert probe.bias.grad.item() == 1.0


def test_autocast_does_not_round_scores():
    X, y = scores(100, 32)
    probe, _ = ComplexityProbe.fit(X, y, lambdas=[1.0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(probe(X), probe(X.float()))
        assert probe(X).dtype == torch.float32
    assert torch.equal(probe(X.bfloat16()), probe(X.bfloat16().float()))


def test_fit_agrees_with_a_plain_loop():
    X, y = scores(143, 40, noise=3.0, spread=4.0)
    lambdas, folds, holdout, seed = (0.1, 10.0, 100.0, 1e5), 4, 0.3, 7
    probe, report = ComplexityProbe.fit(X, y, lambdas=lambdas, folds=folds, holdout=holdout, seed=seed)

    order = torch.randperm(143, generator=torch.Generator().manual_seed(seed))
    heldout, fitted = order[:43], order[43:]
    expected, clamped = [], 0
    for lam in lambdas:
        errors = []
        for part in fitted.tensor_split(folds):
            rest = fitted[~torch.isin(fitted, part)]
            weight, bias = ridge_fit(X[rest].double(), y[rest].double(), lam)
            predicted = X[part].double() @ weight + bias
            clamped += int(((predicted < 0) | (predicted > 10)).sum())
            errors.append(predicted.clamp(0, 10) - y[part])
        expected.append(torch.cat(errors).square().mean().sqrt().item())
    assert clamped > 0
    assert report.cv_rmse == pytest.approx(expected, rel=1e-9)
    assert report.lam == lambdas[int(np.argmin(expected))]
    # The grid has a real minimum inside, so that a wrong choice shows.
    assert 0 < int(np.argmin(expected)) < len(lambdas) - 1

    weight, bias = ridge_fit(X[fitted], y[fitted], report.lam)
    torch.testing.assert_close(probe.weight.detach(), weight)
    torch.testing.assert_close(probe.bias.detach(), bias)
    assert report.heldout_n == 43
    assert report.heldout_rmse == pytest.approx(
        (probe(X[heldout]) - y[heldout]).square().mean().sqrt().item(), rel=1e-5
    )


def test_held_out_rows_do_not_touch_the_probe():
    X, y = scores(100, 8)
    probe, report = ComplexityProbe.fit(X, y, lambdas=[1.0, 10.0], seed=3)
    heldout = torch.randperm(100, generator=torch.Generator().manual_seed(3))[:20]
    changed = y.clone()
    changed[heldout] = 10 - changed[heldout]
    other, worse = ComplexityProbe.fit(X, changed, lambdas=[1.0, 10.0], seed=3)
    # Only the common centre of the sums moves with X, and X is unchanged.
    assert torch.equal(probe.weight, other.weight)
    assert torch.equal(probe.bias, other.bias)
    assert worse.heldout_rmse > report.heldout_rmse


def test_correlations_match_scipy():
    stats = pytest.importorskip("scipy.stats")
    a = torch.tensor([1.0, 5.0, 2.0, 2.0, 9.0, -4.0], dtype=torch.float64)
    b = torch.tensor([2.0, 2.0, 1.0, 3.0, 2.0, -7.0], dtype=torch.float64)
    assert _ranks(a).tolist() == stats.rankdata(a).tolist()
    assert _pearson(a, b) == pytest.approx(stats.pearsonr(a, b)[0])
    assert _pearson(_ranks(a), _ranks(b)) == pytest.approx(stats.spearmanr(a, b)[0])


def test_constant_scores_have_no_correlation_and_the_report_is_json():
    X, _ = scores(50, 4)
    _, report = ComplexityProbe.fit(X, torch.full((50,), 4.0), lambdas=[1.0])
    assert report.heldout_pearson is None
    assert report.heldout_spearman is None
    assert report.heldout_rmse == pytest.approx(0.0, abs=1e-5)
    record = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert record["lambda"] == 1.0
    assert record["cv"]["lambdas"] == [1.0]
    assert record["heldout"]["n"] == 10


def test_fit_without_holdout_uses_every_row():
    X, y = scores(60, 5)
    probe, report = ComplexityProbe.fit(X, y, lambdas=[2.0], holdout=0.0)
    torch.testing.assert_close(probe.weight.detach(), ridge_fit(X, y, 2.0)[0])
    assert report.heldout_n == 0
    assert report.heldout_rmse is None


def test_the_fitted_probe_trains_on():
    X, y = scores(60, 5)
    probe, _ = ComplexityProbe.fit(X, y, lambdas=[2.0])
    (probe(X) - y).square().mean().backward()
    assert probe.weight.grad is not None
    assert probe.bias.grad is not None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lambdas": []}, "lambdas: got none"),
        ({"lambdas": [1.0, -1.0]}, "lambdas: got -1.0"),
        ({"folds": 1}, "folds: got 1"),
        ({"folds": 17}, "folds: got 17 for 16 rows"),
        ({"holdout": 1.0}, "holdout: got 1.0"),
        ({"score_max": 4.0}, "y: got scores from"),
        ({"score_min": 12.0}, "score_max: got 10.0"),
    ],
)
def test_bad_settings_are_named(changes, named):
    X, y = scores(20, 3)
    with pytest.raises(UserError, match=named):
        ComplexityProbe.fit(X, y, **{"lambdas": [1.0], **changes})
