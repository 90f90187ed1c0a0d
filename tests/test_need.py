"""Need: prefix errors, the probe, what it learns in a run, and the k that it gives."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from aksae import SAE, BatchTopK, FitConfig, Need, SAEConfig, TopK, UserError, calibrate, fit, formats
from aksae.batches import Batch
from aksae.callbacks import Callback, Records
from aksae.learner import Learner
from aksae.probe import ridge_fit
from aksae.selections.need import _probe, need_of, prefix_errors

D, N_LATENTS, BUDGET = 24, 96, 6


def counted(n: int, seed: int = 0, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """`[n, D]` sums of some of 64 directions, a different number in each row, and these numbers `[n]`."""
    directions = F.normalize(torch.randn(64, D, generator=torch.Generator().manual_seed(5)), dim=-1)
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(n, 1, generator=generator) * 2 * BUDGET / len(directions)
    fires = torch.rand(n, len(directions), generator=generator) < share
    amounts = 0.5 + torch.rand(n, len(directions), generator=generator)
    x = (fires * amounts) @ directions + 0.02 * torch.randn(n, D, generator=generator)
    return x.to(dtype), fires.sum(1)


def rows(n: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return counted(n, seed, dtype)[0]


def made(selection, **options) -> SAE:
    return SAE(SAEConfig(D, N_LATENTS, selection, **options), generator=torch.Generator().manual_seed(0))


def trained(selection, steps: int = 150) -> SAE:
    sae, records = made(selection), []
    config = FitConfig(steps, lr=3e-3, warmup_steps=5, log_every=10, device="cpu")
    fit(sae, [rows(256, seed) for seed in range(steps)], config, [Records(records.append)])
    sae.records = records
    return sae


@pytest.fixture(scope="module")
def topk() -> SAE:
    return trained(TopK(BUDGET))


@pytest.fixture(scope="module")
def need() -> SAE:
    return trained(Need(BUDGET))


@pytest.fixture
def own(need) -> SAE:
    """The same SAE, to be changed."""
    sae = SAE(need.config)
    sae.load_state_dict(need.state_dict())
    return sae.eval()


def fvu(sae: SAE, x: torch.Tensor, k: torch.Tensor | None = None) -> float:
    with torch.no_grad():
        error = (x - sae.decode(sae.encode(x, k))).square().sum()
    return float(error / (x - x.mean(0)).square().sum())


# -------------------------------------------------------------------------------------------- need, and the probe


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_prefix_errors_are_those_of_the_j_largest(topk, dtype):
    sae = SAE(topk.config).to(dtype)
    sae.load_state_dict(topk.state_dict())
    x = rows(33, seed=3).to(dtype)
    with torch.no_grad():
        # Two latents that are the same: the smaller index goes first.
        sae.W_enc[7], sae.b_enc[7] = sae.W_enc[20], sae.b_enc[20]
        candidates = sae.encoder(x).topk(40)
        errors = prefix_errors(candidates, sae.W_dec, sae.b_dec, x)
        assert candidates.counts.min() < 40
        assert errors.shape == (33, 41)
        assert errors.dtype == torch.promote_types(dtype, torch.float32)
        for j in (0, 1, 2, 5, 17, 39, 40):
            codes = sae.encoder(x).topk(j)
            y = sae.b_dec.double() + codes.to_dense(N_LATENTS).double() @ sae.W_dec.double()
            expected = (x.double() - y).square().sum(-1)
            torch.testing.assert_close(errors[:, j].double(), expected, rtol=1e-4, atol=1e-5)
    assert prefix_errors(sae.encoder(x[:0]).topk(4), sae.W_dec, sae.b_dec, x[:0]).shape == (0, 5)


def test_prefix_errors_make_no_large_tensor(topk, largest):
    x, k = rows(200), 40
    with torch.no_grad():
        candidates = topk.encoder(x).topk(k)
        with largest() as seen:
            prefix_errors(candidates, topk.W_dec, topk.b_dec, x)
    assert seen.elements <= 200 * (k + 1)


def test_need_is_the_prefix_whose_error_and_price_are_least():
    torch.manual_seed(0)
    gains = torch.rand(500, 30, dtype=torch.float64).sort(descending=True).values * 4 * torch.rand(500, 1).double()
    errors = F.pad(gains.flip(-1).cumsum(-1).flip(-1), (0, 1))
    first, second = need_of([errors[:200], errors[200:]], 7)
    found = torch.cat([first, second])
    assert float(found.double().mean()) == pytest.approx(7, abs=1 / 500)
    # Gains fall, so one price separates those that are taken from the others, of all rows.
    taken = torch.arange(30) < found[:, None]
    assert gains[taken].min() >= gains[~taken].max()


def test_the_probe_is_a_ridge_regression_on_standardised_rows():
    torch.manual_seed(0)
    x = torch.randn(3000, 7, dtype=torch.float64) * torch.logspace(-2, 2, 7).double() + torch.linspace(-50, 50, 7)
    x[:, 3] = 0.1
    y = (x @ torch.randn(7, dtype=torch.float64)).round().long()
    deviation = (x - x.mean(0)).square().mean(0).sqrt()
    deviation[3] = 1
    expected = ridge_fit((x - x.mean(0)) / deviation, y, 100.0)[0] / deviation
    torch.testing.assert_close(_probe(x.split(700), y.split(700), 100.0), expected, rtol=1e-8, atol=1e-10)
    assert _probe([x.float()], [y], 100.0)[3] == 0
    with pytest.raises(UserError, match="activations: got NaN or infinity where need is measured"):
        _probe([x.index_fill(0, torch.tensor([5]), torch.nan)], [y], 100.0)


def test_measured_need_is_read_off_the_activation(need):
    """On rows that the probe has not seen."""
    x, count = counted(4000, seed=77)
    with torch.no_grad():
        errors = prefix_errors(need.encoder(x).topk(need.width()), need.W_dec, need.b_dec, x)
    (measured,) = need_of([errors], BUDGET)
    k = need.k_for(x)
    assert float(torch.corrcoef(torch.stack([k, measured]).double())[0, 1]) > 0.7
    # Of as many directions as the row truly holds.
    assert float(torch.corrcoef(torch.stack([k, count]).double())[0, 1]) > 0.5


# ------------------------------------------------------------------------------------------------------ training


def test_at_equal_l0_it_leaves_less_error_than_topk(topk, own):
    calibrate(own, rows(4096, seed=1000))
    x = rows(4096, seed=1001)
    k = own.k_for(x)
    assert float(own.encode(x).counts.float().mean()) == pytest.approx(BUDGET, rel=0.02)
    least = fvu(own, x)
    assert least < 0.95 * fvu(topk, x)
    # It is the assignment that counts, not the spread.
    shuffled = fvu(own, x, k[torch.randperm(len(k), generator=torch.Generator().manual_seed(0))])
    assert least < 0.95 * fvu(own, x, torch.full_like(k, BUDGET))
    assert shuffled > fvu(own, x, torch.full_like(k, BUDGET))


def test_the_mean_l0_of_training_is_the_budget(need):
    l0 = [record["l0"] for record in need.records]
    # A third of the 150 steps keeps the budget of every row.
    assert l0[:5] == [BUDGET] * 5
    assert all(abs(mean / BUDGET - 1) < 0.1 for mean in l0[5:]), l0
    assert l0[-1] != BUDGET
    assert {record["k_mean"] for record in need.records} == {BUDGET}


@pytest.mark.parametrize(
    ("steps", "expected"), [(600, [200, 300, 400, 500]), (30, [10, 15, 20, 25]), (5, [2, 3, 4]), (2, [1, 2]), (1, [1])]
)
def test_when_need_is_measured(steps, expected):
    selection = Need(BUDGET)
    assert selection.measures(steps) == (expected, 20_000)
    assert [step for step in range(steps) if selection.is_topk_at(step, steps)] == list(range(expected[0]))


class Kept(Callback):
    """How many rows a learner keeps after each step."""

    def __init__(self):
        self.rows, self.probes = [], []

    def on_step(self, run, group):
        (learner,) = run.learners
        self.rows.append(sum(len(x) for x, _ in learner.recent))
        self.probes.append(learner.sae.need_weight.clone())


def test_only_the_rows_that_are_measured_are_kept():
    kept = Kept()
    selection = Need(BUDGET, measured_rows=100)
    fit(made(selection), [rows(32, seed) for seed in range(24)], FitConfig(24, device="cpu"), [kept])
    # Measured after 8, 12, 16 and 20 steps, on those of four steps, which hold 100 rows.
    assert kept.rows == [0, 0, 0, 0, 32, 64, 96, *(0, 32, 64, 96) * 3, 0, 0, 0, 0, 0]
    changed = [step for step in range(1, 24) if not torch.equal(kept.probes[step - 1], kept.probes[step])]
    assert changed == [7, 11, 15, 19]


def test_a_source_may_use_its_memory_again():
    class Reused:
        def __iter__(self):
            memory = torch.empty(64, D)
            return (memory.copy_(rows(64, seed)) for seed in range(20))

    ours, theirs = made(Need(BUDGET)), made(Need(BUDGET))
    fit(ours, Reused(), FitConfig(20, device="cpu"))
    fit(theirs, [rows(64, seed) for seed in range(20)], FitConfig(20, device="cpu"))
    assert torch.equal(ours.need_weight, theirs.need_weight)
    assert ours.need_weight.any()


def test_other_selections_keep_no_rows():
    learner = Learner(made(TopK(BUDGET)), FitConfig(30), torch.device("cpu"))
    batch = Batch(rows(32))
    learner.start([batch])
    learner.update([batch], 0, look=False)
    assert learner.recent == []


def test_a_mean_that_is_annealed_moves_every_k(own):
    x = rows(400, seed=6)
    selection, encoder = own.config.selection, own.encoder(x)
    codes = selection.choose(own, x, encoder, BUDGET + 3, x).codes
    expected = encoder.topk((own.k_for(x) + 3).clamp(max=own.width()), own.width())
    # The clip to k_min comes after the shift.
    inside = own.k_for(x) > 1
    assert inside.sum() > 300
    assert torch.equal(codes.indices[inside], expected.indices[inside])
    given = torch.arange(400, dtype=torch.int32) % 5
    assert torch.equal(selection.choose(own, x, encoder, given, x).codes.counts, given)


# ----------------------------------------------------------------------------------------------------- inference


def test_encode_is_topk_with_the_k_of_the_probe(own):
    x = rows(300, seed=8)
    k = own.k_for(x)
    assert k.dtype == torch.int32
    assert len(k.unique()) > 5
    by_hand = (x @ own.need_weight + own.need_bias).clamp(1, own.width()).round()
    assert torch.equal(k, by_hand.int())
    codes = own.encode(x)
    assert all(torch.equal(a, b) for a, b in zip(codes, own.encode(x, k, k_max=own.width()), strict=True))
    assert own.k_for(x.view(3, 100, D)).shape == (3, 100)
    # Nothing depends on the batch.
    for row in (0, 17, 299):
        alone = own.encode(x[row : row + 1])
        assert torch.equal(alone.indices[0], codes.indices[row])


def test_before_a_first_fit_every_row_has_the_budget():
    assert made(Need(BUDGET)).k_for(rows(9)).tolist() == [BUDGET] * 9


def test_nan_is_seen_in_the_codes(own):
    x = rows(3)
    x[1, 2] = torch.nan
    assert own.encode(x).values.isnan().any(-1).tolist() == [False, True, False]


def test_the_mean_l0_of_the_rows_is_the_budget(own):
    x = rows(5000, seed=11)
    for budget in (3, 4.5, 6, 9):
        bias = calibrate(own, x, budget, batch_size=999)
        assert bias == float(own.need_bias)
        assert float(own.encode(x).counts.double().mean()) == pytest.approx(budget, abs=0.01)
    # An SAE without a probe: a k for all, far from where it changes.
    flat = made(Need(BUDGET))
    flat.load_state_dict({**own.state_dict(), "need_weight": torch.zeros(D)})
    assert calibrate(flat, x, 5) == pytest.approx(5, abs=0.1)


def test_more_than_there_are_positive_candidates(own):
    with torch.no_grad():
        own.b_enc -= 10
    calibrate(own, rows(50))
    assert torch.equal(own.k_for(rows(50)), torch.full((50,), own.width(), dtype=torch.int32))


def test_scales_do_not_matter(own):
    """An SAE in other units, with its scale, gives the same k."""
    x = rows(512, seed=4)
    scaled = SAE(dataclasses.replace(own.config, input_scale=0.25, output_scale=0.25))
    scaled.load_state_dict(own.state_dict())
    assert torch.equal(own.k_for(x), scaled.k_for(4 * x))


def test_it_is_saved_and_read(need, tmp_path):
    need.save_pretrained(tmp_path)
    again = SAE.from_pretrained(tmp_path)
    assert again.config == need.config
    x = rows(40, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(again.encode(x), need.encode(x), strict=True))


def test_weights_of_16_bits_keep_the_probe(own, tmp_path):
    x = rows(64, seed=2).bfloat16()
    expected = own.k_for(x.float())
    own.to_precision(torch.bfloat16)
    assert own.need_weight.dtype == own.need_bias.dtype == torch.float32
    assert torch.equal(own.k_for(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(own.k_for(x), expected)
    own.save_pretrained(tmp_path)
    assert torch.equal(SAE.from_pretrained(tmp_path).need_weight, own.need_weight)


def test_other_formats_get_a_topk_of_the_budget(need, tmp_path):
    need.save_pretrained(tmp_path)
    stored = formats.load(tmp_path)
    assert repr(stored.activation) == f"TopK(k={BUDGET})"
    assert stored.notes == (f"left out: the probe of need; a TopK of its mean L0, {BUDGET}",)


@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoders_need_is_that_of_its_target(skip):
    """The target holds half of the directions of the input: what need is measured on is not the input."""
    x = rows(256, seed=1)
    y = torch.cat([x[:, : D // 2] * 2, torch.zeros(256, D // 2)], 1)
    sae = made(Need(BUDGET), d_out=D, skip=skip)
    config = FitConfig(steps=60, lr=3e-3, warmup_steps=2, log_every=1, device="cpu", normalize="mean-norm")
    fit(sae, [(x, y)], config)
    selection = sae.config.selection
    selection.measure(sae, [(x, y)])
    with torch.no_grad():
        errors = prefix_errors(sae.encoder(x).topk(sae.width()), sae.W_dec, sae.b_dec, sae.wanted(x, y))
    expected = _probe([sae.scaled(x)], need_of([errors], BUDGET), selection.ridge_lambda)
    torch.testing.assert_close(sae.need_weight, expected.float())
    # At inference it needs none, nor does the mean.
    assert float(sae.encode(x).counts.float().mean()) == pytest.approx(BUDGET, rel=0.05)
    assert calibrate(sae, x) == calibrate(sae, x, target=y)
    assert sae(x).shape == y.shape


# ------------------------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    ("name", "selection"),
    [
        ("budget", Need(0)),
        ("budget", Need(N_LATENTS + 1)),
        ("budget", Need(2.5)),
        ("k_min", Need(6, k_min=7)),
        ("k_min", Need(6, k_min=-1)),
        ("k_min", Need(6, k_min=0.5)),
        ("k_max", Need(6, k_max=5)),
        ("k_max", Need(6, k_max=N_LATENTS + 1)),
        ("topk_share", Need(6, topk_share=0.0)),
        ("topk_share", Need(6, topk_share=1.0)),
        ("fits", Need(6, fits=0)),
        ("measured_rows", Need(6, measured_rows=0)),
        ("measured_rows", Need(6, measured_rows=1e4)),
        ("ridge_lambda", Need(6, ridge_lambda=0.0)),
    ],
)
def test_a_wrong_setting_is_named(name, selection):
    with pytest.raises(UserError, match=f"^{name}: got "):
        made(selection)


def test_wrong_rows_and_budgets_are_named(topk, own):
    for name, call in (
        ("sae", lambda: calibrate(topk, rows(8))),
        ("rows", lambda: calibrate(own, rows(0))),
        ("budget", lambda: calibrate(own, rows(8), 0.5)),
        ("budget", lambda: calibrate(own, rows(8), 49)),
        ("selection", lambda: made(BatchTopK(6)).k_for(rows(8))),
    ):
        with pytest.raises(UserError, match=f"^{name}: got "):
            call()
    assert own.width() == 4 * BUDGET
    assert made(Need(60)).width() == N_LATENTS
