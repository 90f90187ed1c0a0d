"""Scores against a known truth, by hand, and the comparison's own rules; with SAELens' world in compat."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
from aksae import AdaptiveK, FitConfig, KMap, TopK, UserError
from aksae.study.synthetic import SetCounts, Setup, World, correlation, measure_synthetic, synth_sae_bench

from aksae_kernels import SparseCodes


def test_sets_of_features_are_counted_over_all_rows():
    # Latent 0 stands for feature 2, latent 3 for feature 0; latent 1 has no partner, nor has feature 1.
    codes = SparseCodes.from_dense(torch.tensor([[1.0, 1, 0, 0], [0, 0, 0, 2], [3, 0, 0, 1]]))
    active = torch.tensor([[False, True, True], [False, False, True], [True, False, True]])
    counts = SetCounts(torch.tensor([0, 3]), torch.tensor([2, 0]))
    for row in range(3):
        counts.update(SparseCodes(*(tensor[row : row + 1] for tensor in codes)), active[row : row + 1], 4)
    # Hits: latent 0 in the rows 0 and 2, latent 3 in row 2. Five firings, five active features.
    assert counts.result() == {"set_precision": 3 / 5, "set_recall": 3 / 5, "set_f1": 3 / 5}
    assert SetCounts(torch.tensor([0]), torch.tensor([0])).result()["set_f1"] == 0


def test_correlation():
    a, b = torch.tensor([1, 2, 3, 4], dtype=torch.int32), torch.tensor([2, 1, 4, 3])
    assert correlation(a, b) == pytest.approx(0.6)
    assert correlation(a, -2 * a) == pytest.approx(-1)
    # A k that is the same for all rows says nothing of theirs.
    assert correlation(torch.full((4,), 7), b) == 0


def test_rows_are_those_of_their_seed_and_leave_the_generator_alone():
    world = World(torch.eye(3), lambda n: (torch.randn(n, 3), torch.randn(n, 3)))
    state = torch.get_rng_state()
    (x, active), (again, _), (other, _) = (world.rows(5000, seed) for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(x, again)
    assert not torch.equal(x, other)
    assert x.shape == active.shape == (5000, 3)
    assert active.dtype == torch.bool


def test_what_cannot_be_compared_is_named():
    world = World(torch.eye(3), lambda n: (torch.randn(n, 3), torch.randn(n, 3)))
    setup = Setup(FitConfig(steps=1), d_sae=8, train_rows=8, heldout_rows=8)
    with pytest.raises(UserError, match=r"^selections: got AdaptiveK.* \(mine\), needs selections that aim at a mean"):
        next(measure_synthetic(world, {"ours": TopK(2), "mine": AdaptiveK(KMap(1, 4))}, {}, setup, seed=0))
    for field, arguments in (("n_features", (100, 8)), ("d_in", (128, 0))):
        with pytest.raises(UserError, match=f"^{field}: got "):
            synth_sae_bench(*arguments)


def test_a_world_without_its_package_says_what_to_install(monkeypatch):
    if importlib.util.find_spec("sae_lens") is not None:
        monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(UserError, match=r"needs sae-lens, .*: pip install sae-lens$"):
        synth_sae_bench()
