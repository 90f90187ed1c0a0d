"""Bootstrap intervals: they cover, they are paired, and their edges."""

from __future__ import annotations

import math

import aksae.bootstrap
import numpy as np
import pytest
from aksae.bootstrap import bootstrap


def ratios(rng: np.random.Generator, n: int, error: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    """Squared errors and variances of n documents of uneven length: the ratio of their means is `error`."""
    variances = rng.gamma(3.0, 1.0, n)
    return error * variances * rng.gamma(4.0, 0.25, n), variances


def test_intervals_cover():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        interval = bootstrap(np.divide, *ratios(rng, 60), rng=rng, draws=400)
        covered += interval.low <= 0.2 <= interval.high
    # 380 are expected, with a deviation of 4.4; intervals of 60 documents are a little narrow.
    assert 400 * 0.91 <= covered <= 400 * 0.985


def test_a_narrower_level_is_inside_and_has_the_spread_of_the_mean():
    rng = np.random.default_rng(1)
    sums, ones = rng.normal(3.0, 2.0, 500), np.ones(500)
    wide = bootstrap(np.divide, sums, ones, rng=rng)
    narrow = bootstrap(np.divide, sums, ones, rng=rng, level=0.5)
    assert wide.low < narrow.low < wide.value < narrow.high < wide.high
    expected = 1.96 * sums.std() / math.sqrt(500)
    assert wide.high - wide.low == pytest.approx(2 * expected, rel=0.1)


def test_differences_are_paired_and_models_have_an_axis():
    rng = np.random.default_rng(2)
    a, variances = ratios(rng, 80)
    b = a + 0.01 * variances
    both = bootstrap(np.divide, np.stack([a, b]), variances, rng=np.random.default_rng(3))
    alone = bootstrap(np.divide, b, variances, rng=np.random.default_rng(3))
    assert both.value.shape == both.low.shape == (2,)
    assert (both.low[1], both.high[1]) == pytest.approx((float(alone.low), float(alone.high)), rel=1e-12)
    # Every document has the same difference, so that it does not vary at all, however much the two do.
    difference = bootstrap(lambda a, b, v: (b - a) / v, a, b, variances, rng=rng)
    assert [float(part) for part in difference] == pytest.approx([0.01] * 3)
    assert both.high[0] - both.low[0] > 0.01


def test_many_units_are_drawn_in_parts(monkeypatch):
    sums = ratios(np.random.default_rng(4), 50)
    whole = bootstrap(np.divide, *sums, rng=np.random.default_rng(5), draws=300)
    monkeypatch.setattr(aksae.bootstrap, "_COUNTS", 50 * 7)
    in_parts = bootstrap(np.divide, *sums, rng=np.random.default_rng(5), draws=300)
    assert [float(part) for part in in_parts] == pytest.approx([float(part) for part in whole], rel=1e-12)


def test_seeds_and_documents_are_both_resampled():
    rng = np.random.default_rng(6)
    # Documents are all alike, seeds are not: only seeds make the interval, as wide as that of their mean.
    of_seed = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    sums, ones = np.repeat(of_seed[:, None], 40, 1), np.ones((5, 40))
    crossed = bootstrap(np.divide, sums, ones, rng=rng, axes=2)
    assert crossed.value == 3.0
    assert crossed.high - crossed.low == pytest.approx(2 * 1.96 * of_seed.std() / math.sqrt(5), rel=0.1)
    # With one seed what is left is the interval over documents.
    a, variances = ratios(rng, 60)
    one_seed = bootstrap(np.divide, a[None], variances[None], rng=np.random.default_rng(7), axes=2)
    plain = bootstrap(np.divide, a, variances, rng=np.random.default_rng(8))
    assert one_seed.value == pytest.approx(float(plain.value), rel=1e-12)
    assert one_seed.high - one_seed.low == pytest.approx(float(plain.high - plain.low), rel=0.1)


def test_one_unit_has_no_interval():
    interval = bootstrap(np.divide, [1.0], [4.0], rng=np.random.default_rng(0))
    assert interval.value == 0.25
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)


@pytest.mark.parametrize("sums", [([1.0, 2.0], [1.0]), ([], []), (1.0, 2.0)])
def test_sums_that_do_not_fit(sums):
    with pytest.raises(ValueError, match="must agree in their last 1 axes"):
        bootstrap(np.divide, *sums, rng=np.random.default_rng(0))


def test_a_level_outside_of_its_range():
    with pytest.raises(ValueError, match="level"):
        bootstrap(np.divide, [1.0, 2.0], [1.0, 1.0], rng=np.random.default_rng(0), level=95)
