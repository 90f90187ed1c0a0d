"""Latents at a price: the selection, its price in training, and prices for SAEs that are there."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from aksae import SAE, BatchTopK, FitConfig, JumpReLU, Priced, SAEConfig, TopK, UserError, adapt, calibrate, fit
from aksae.callbacks import Records
from aksae.errors import Notice

from aksae_kernels import price_select, topk_select
from aksae_kernels.pricing import candidates_of

D, N_LATENTS = 24, 96


def rows(n: int, seed: int = 0, active: float = 6) -> torch.Tensor:
    """`[n, D]` sums of some of 64 directions, a different number in each row, and a little noise."""
    directions = F.normalize(torch.randn(64, D, generator=torch.Generator().manual_seed(5)), dim=-1)
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(n, 1, generator=generator) * 2 * active / len(directions)
    fires = torch.rand(n, len(directions), generator=generator) < share
    amounts = 0.5 + torch.rand(n, len(directions), generator=generator)
    return (fires * amounts) @ directions + 0.02 * torch.randn(n, D, generator=generator)


def made(selection, **options) -> SAE:
    return SAE(SAEConfig(D, N_LATENTS, selection, **options), generator=torch.Generator().manual_seed(0))


def trained(selection, steps: int = 150, **options) -> SAE:
    sae, records = made(selection), []
    data = [rows(256, seed) for seed in range(steps)]
    config = FitConfig(steps, lr=3e-3, warmup_steps=5, log_every=10, device="cpu", **options)
    fit(sae, data, config, [Records(records.append)])
    sae.records = records
    return sae


@pytest.fixture(scope="module")
def topk() -> SAE:
    return trained(TopK(6))


@pytest.fixture(scope="module")
def priced() -> SAE:
    return trained(Priced(6, k_max=24))


def fvu(sae: SAE, x: torch.Tensor) -> tuple[float, float]:
    """FVU, and mean L0."""
    with torch.no_grad():
        codes = sae.encode(x)
        error = (x - sae.decode(codes)).square().sum()
    return float(error / (x - x.mean(0)).square().sum()), float(codes.counts.float().mean())


# -------------------------------------------------------------------------------------------------- training


def test_the_mean_l0_of_training_is_the_budget(priced):
    last = [record["l0"] for record in priced.records[-4:]]
    assert all(abs(l0 / 6 - 1) < 0.1 for l0 in last), last
    # The first sixth of the steps keeps the budget of every row.
    assert [record["l0"] for record in priced.records[:3]] == [6, 6, 6]
    assert priced.price > 0


def test_at_equal_l0_it_leaves_less_error_than_topk(topk, priced):
    calibrate(priced, rows(4096, seed=1000))
    error, l0 = fvu(priced, rows(4096, seed=1001))
    assert abs(l0 / 6 - 1) < 0.02
    assert error < 0.7 * fvu(topk, rows(4096, seed=1001))[0]


def test_a_step_selects_at_the_price_and_gradients_are_those_of_the_kept_latents(priced):
    sae, x = made(Priced(6, k_max=24)).double(), rows(32).double()
    sae.load_state_dict({name: tensor.double() for name, tensor in priced.state_dict().items()})
    sae.train()
    selection, encoder = sae.config.selection, sae.encoder(x)
    codes = selection.choose(sae, x, encoder, None, sae.wanted(x)).codes
    kept = price_select(encoder.topk(24), sae.W_dec, sae.b_dec, x, price=sae.price)
    assert torch.equal(codes.indices, kept.indices)
    torch.testing.assert_close(codes.values, kept.values)
    parameters = (sae.W_enc, sae.b_enc)
    grads = [torch.autograd.grad(c.values.square().sum(), parameters, retain_graph=True) for c in (codes, kept)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)
    # Rows' own k, as a first part of a run has them, is no matter of prices.
    own = torch.arange(32, dtype=torch.int32) % 5
    assert torch.equal(selection.choose(sae, x, encoder, own, sae.wanted(x)).codes.counts.clamp(max=4), own)


def test_the_price_follows_l0():
    sae = made(Priced(4))
    sae.price.fill_(2.0)
    codes = sae.encoder(rows(16)).topk(6)
    for k, share in ((None, 6 / 4), (8, 6 / 8)):
        sae.price.fill_(2.0)
        sae.config.selection.after_step(sae, codes, k)
        torch.testing.assert_close(sae.price, 2 * torch.tensor(share - 1).exp())
    # Steps of another k than the selection's own say nothing about the price.
    sae.price.fill_(2.0)
    sae.config.selection.after_step(sae, codes, torch.full((16,), 6))
    assert sae.price == 2


def test_a_price_of_rows_with_too_few_latents_comes_back():
    sae = made(Priced(4))
    selection, codes = sae.config.selection, sae.encoder(rows(16)).topk(6)
    few = topk_select(codes.to_dense(sae.config.d_sae), k=2, k_max=6)
    sae.price.fill_(2.0)
    for _ in range(1000):
        selection.after_step(sae, few, None)
    lowest = 1e-6 * few.values.square().sum() / few.counts.sum()
    torch.testing.assert_close(sae.price, lowest.detach())
    # There are more again: within 30 steps of half a budget too many the price is what it was.
    for _ in range(30):
        selection.after_step(sae, codes, None)
    assert sae.price > 2


def test_rows_do_not_depend_on_their_batch(priced):
    x = rows(64, seed=7)
    codes = priced.encode(x)
    for row in (0, 17, 63):
        alone = priced.encode(x[row : row + 1])
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone[1:], codes[1:]))
    assert len(set(codes.counts.tolist())) > 5


def test_passes_at_inference(priced):
    selection = dataclasses.replace(priced.config.selection, passes_at_inference=4)
    more = SAE(dataclasses.replace(priced.config, selection=selection))
    more.load_state_dict(priced.state_dict())
    x = rows(512, seed=9)
    objectives = []
    for sae in (priced.eval(), more.eval()):
        codes = sae.encode(x)
        error = (x - sae.decode(codes)).square().sum(-1)
        objectives.append(error + sae.price * codes.counts)
    assert (objectives[1] <= objectives[0] + 1e-4).all()
    assert (objectives[1] < objectives[0] - 1e-4).any()


def test_it_is_saved_and_read(priced, tmp_path):
    priced.save_pretrained(tmp_path)
    again = SAE.from_pretrained(tmp_path)
    assert again.config == priced.config
    x = rows(40, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(again.encode(x), priced.encode(x), strict=True))


def test_weights_of_16_bits_keep_the_price(priced):
    half = SAE(priced.config)
    half.load_state_dict(priced.state_dict())
    half.to_precision(torch.bfloat16)
    assert half.price.dtype == torch.float32
    assert half.encode(rows(8).bfloat16()).values.dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------- SAEs that are there


@pytest.mark.parametrize("selection", [TopK(6), BatchTopK(6), JumpReLU(6)], ids=str)
def test_any_sae_gets_a_price(selection):
    sae = trained(selection, steps=60)
    held, others = rows(4096, seed=1000), rows(4096, seed=1001)
    before, l0 = fvu(sae, others)
    for budget in (3, 6):
        adapted = adapt(sae, held, budget)
        error, mean = fvu(adapted, others)
        assert abs(mean / budget - 1) < 0.05
        assert adapted.W_dec.data_ptr() == sae.W_dec.data_ptr()
    assert isinstance(sae.config.selection, type(selection))
    if abs(l0 / 6 - 1) < 0.1:
        assert error < before


def test_the_mean_l0_of_the_rows_is_the_budget_to_half_a_percent(priced):
    x = rows(5000, seed=11)
    for budget in (3, 4.5, 6, 9):
        price = calibrate(priced, x, budget, batch_size=999)
        assert price == float(priced.price)
        assert abs(float(priced.encode(x).counts.float().mean()) / budget - 1) < 0.005


def test_a_budget_beyond_what_lowers_the_error_is_said(priced, recwarn):
    x = rows(512, seed=11)
    calibrate(priced, x, 9)
    assert not recwarn
    # Pairs of latents that fire together for one direction: a second one adds nothing.
    sae = SAE(SAEConfig(D, 12, Priced(6)), generator=torch.Generator().manual_seed(0))
    sae.W_enc.data[6:], sae.W_dec.data[6:] = sae.W_enc[:6], sae.W_dec[:6]
    with pytest.warns(
        Notice, match=r"^budget: got 6 latents of a row in the mean, and only \S+ of 12 candidates"
    ) as said:
        calibrate(sae, x)
    kept = float(sae.encode(x).counts.double().mean())
    # At no price at all some of the second ones are kept for what rounding leaves.
    assert float(str(said[0].message).split()[12]) == pytest.approx(kept, rel=0.1)
    assert 0 < kept < 5.8


def test_scales_do_not_matter(topk):
    """An SAE in other units, with its scale, chooses the same latents."""
    x = rows(512, seed=4)
    scaled = SAE(dataclasses.replace(topk.config, input_scale=0.25, output_scale=0.25))
    scaled.load_state_dict(topk.state_dict())
    ours, theirs = adapt(topk, x, 5), adapt(scaled, 4 * x, 5)
    assert torch.equal(ours.encode(x).indices, theirs.encode(4 * x).indices)
    torch.testing.assert_close(theirs(4 * x), 4 * ours(x))


@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoder_prices_against_its_target(skip):
    x = rows(256)
    y = x.flip(-1) + 0.1
    sae = made(Priced(6, k_max=20), d_out=D, skip=skip)
    config = FitConfig(steps=30, lr=3e-3, warmup_steps=2, log_every=1, device="cpu", normalize="mean-norm")
    records = []
    fit(sae, [(x, y)], config, [Records(records.append)])
    assert abs(records[-1]["l0"] / 6 - 1) < 0.25
    calibrate(sae, x, 4, target=y)
    codes = sae.encode(x, target=y)
    assert abs(float(codes.counts.float().mean()) / 4 - 1) < 0.02
    wanted = sae.wanted(x, y)
    kept = price_select(sae.encoder(x).topk(20), sae.W_dec, sae.b_dec, wanted, price=sae.price, passes=2)
    assert torch.equal(codes.indices, kept.indices)
    for call in (lambda: sae.encode(x), lambda: sae(x), lambda: calibrate(sae, x)):
        with pytest.raises(ValueError, match="target"):
            call()


# ------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("name", "selection"),
    [
        ("budget", Priced(0)),
        ("budget", Priced(N_LATENTS + 1)),
        ("budget", Priced(2.5)),
        ("k_max", Priced(6, k_max=5)),
        ("k_max", Priced(6, k_max=N_LATENTS + 1)),
        ("passes", Priced(6, passes=0)),
        ("passes", Priced(6, passes=None)),
        ("passes_at_inference", Priced(6, passes_at_inference=0)),
        ("topk_share", Priced(6, topk_share=1.0)),
        ("rate", Priced(6, rate=0.0)),
    ],
)
def test_a_wrong_setting_is_named(name, selection):
    with pytest.raises(UserError, match=f"^{name}: got "):
        made(selection)


def test_wrong_rows_and_budgets_are_named(topk):
    sae = made(Priced(6))
    for name, call in (
        ("sae", lambda: calibrate(topk, rows(8))),
        ("rows", lambda: calibrate(sae, rows(0))),
        ("budget", lambda: calibrate(sae, rows(8), 0)),
        ("budget", lambda: calibrate(sae, rows(8), N_LATENTS + 1)),
        ("budget", lambda: adapt(topk, rows(8), 0)),
        ("k_max", lambda: adapt(topk, rows(8), 6, k_max=3)),
    ):
        with pytest.raises(UserError, match=f"^{name}: got "):
            call()


def test_candidates_of_a_row():
    # Never fewer than 256 where there are as many, since a small budget leaves little to choose from.
    assert [candidates_of(budget) for budget in (16, 64, 66.3, 80)] == [256, 256, 266, 320]
    assert made(Priced(6)).width() == N_LATENTS
    assert made(Priced(6, k_max=24)).width() == 24
