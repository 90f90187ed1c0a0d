"""What each selection does beyond choosing: estimators, running means, prefixes."""

from __future__ import annotations

import pytest
import torch
from aksae import SAE, AdaptiveK, BatchTopK, JumpReLU, Matryoshka, SAEConfig, TopK, UserError, calibrate
from aksae.selections.batch_topk import running_threshold, threshold_for
from aksae.selections.jumprelu import jumprelu, step
from aksae.selections.matryoshka import groups

from aksae_kernels import SparseCodes, topk_select


def rectangle(pre_acts, threshold, bandwidth):
    return ((pre_acts - threshold).abs() < bandwidth * threshold / 2).double()


def test_jumprelu_and_its_estimator():
    torch.manual_seed(0)
    threshold = torch.rand(400, dtype=torch.float64) + 0.1
    # A third of them within the rectangle, the rest on both sides of it.
    pre_acts = threshold * (1 + 0.3 * (torch.rand(400, dtype=torch.float64) - 0.5))
    grad, bandwidth = torch.randn(400, dtype=torch.float64), 0.1
    for tensor in (pre_acts, threshold):
        tensor.requires_grad_()
    values = jumprelu(pre_acts, threshold, bandwidth)
    above = (pre_acts > threshold).double()
    torch.testing.assert_close(values, pre_acts * above, rtol=0, atol=0)
    to_pre_acts, to_threshold = torch.autograd.grad(values, (pre_acts, threshold), grad)
    torch.testing.assert_close(to_pre_acts, grad * above, rtol=0, atol=0)
    # -theta / e in the rectangle, with e = bandwidth theta.
    inside = rectangle(pre_acts, threshold, bandwidth)
    assert 0.2 < inside.mean() < 0.5
    torch.testing.assert_close(to_threshold, -grad / bandwidth * inside)


def test_the_step_and_its_estimator():
    torch.manual_seed(1)
    threshold = torch.rand(400, dtype=torch.float64) + 0.1
    pre_acts = (threshold * (1 + 0.3 * (torch.rand(400, dtype=torch.float64) - 0.5))).requires_grad_()
    grad = torch.randn(400, dtype=torch.float64)
    threshold.requires_grad_()
    fires = step(pre_acts, threshold, 0.1)
    assert torch.equal(fires, (pre_acts > threshold).double())
    to_pre_acts, to_threshold = torch.autograd.grad(fires, (pre_acts, threshold), grad)
    assert not to_pre_acts.any()
    torch.testing.assert_close(to_threshold, -grad / (0.1 * threshold) * rectangle(pre_acts, threshold, 0.1))


def test_the_threshold_follows_the_smallest_activation_selected():
    threshold, steps = torch.zeros(()), torch.zeros(())
    expected = 0.0
    for number, smallest in enumerate((2.0, 3.0, 1.0, 4.0)):
        codes = topk_select(torch.tensor([[5.0, smallest, -1.0], [7.0, 6.0, 0.5]]), k=2)
        threshold, steps = running_threshold(threshold, steps, codes, decay=0.999)
        kept = number / (number + 9)
        expected = kept * expected + (1 - kept) * smallest
        torch.testing.assert_close(threshold, torch.tensor(expected))
    assert steps == 4


@pytest.mark.parametrize("values", [[[0.0, 0.0]], [[float("nan"), 1.0]]], ids=["nothing", "NaN"])
def test_a_batch_without_a_smallest_activation_changes_no_threshold(values):
    values = torch.tensor(values)
    counts = (values != 0).sum(-1, dtype=torch.int32)
    codes = SparseCodes(values, torch.tensor([[0, 1]], dtype=torch.int32), counts)
    after = running_threshold(torch.tensor(3.0), torch.tensor(5.0), codes, 0.999)
    if values.isnan().any():
        # NaN is not above 0: the other one counts.
        assert after[1] == 6
    else:
        assert after == (3.0, 5.0)


def test_groups_are_the_codes_of_ranges_of_latents():
    torch.manual_seed(0)
    codes = topk_select(torch.randn(7, 40), k=torch.tensor([0, 1, 5, 12, 20, 40, 3]), k_max=20)
    ends = (3, 10, 11, 40)
    dense, start = codes.to_dense(40), 0
    for group, end in zip(groups(codes, ends), ends):
        assert torch.equal(group.to_dense(end - start), dense[:, start:end])
        start = end


@pytest.mark.parametrize("selection", [BatchTopK(4), JumpReLU(4)], ids=lambda selection: type(selection).__name__)
def test_in_training_and_at_inference_a_row_keeps_at_most_k_max(selection):
    torch.manual_seed(0)
    sae = SAE(SAEConfig(8, 64, selection))
    x = torch.randn(50, 8)
    for mode in (True, False):
        codes = sae.train(mode).encode(x)
        assert codes.indices.shape == (50, 32)
        assert codes.counts.max() <= 32


def test_a_running_mean_does_not_stand_still_in_16_bits(tmp_path):
    sae = SAE(SAEConfig(4, 8, BatchTopK(2)))
    sae.to_precision(torch.bfloat16)
    assert sae.W_dec.dtype == torch.bfloat16
    assert sae.threshold.dtype == torch.float32
    for _ in range(400):
        sae.config.selection.after_step(sae, topk_select(torch.tensor([[1.0, 2.0]]).bfloat16(), k=2), None)
    for _ in range(2000):
        sae.config.selection.after_step(sae, topk_select(torch.tensor([[1.1, 2.0]]).bfloat16(), k=2), None)
    assert sae.threshold_steps == 2400
    assert abs(float(sae.threshold) - 1.1) < 0.005
    sae.save_pretrained(tmp_path)
    again = SAE.from_pretrained(tmp_path)
    assert again.threshold.dtype == torch.float32
    assert again.W_dec.dtype == torch.bfloat16
    assert torch.equal(again.threshold, sae.threshold)


def untrained(selection) -> SAE:
    sae = SAE(SAEConfig(16, 64, selection), generator=torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        if isinstance(selection, JumpReLU):
            sae.log_threshold.copy_(torch.linspace(-2, 1, 64))
    return sae


THRESHOLDS = [BatchTopK(4), Matryoshka(BatchTopK(4), (16, 64)), JumpReLU(4)]


@pytest.mark.parametrize("selection", THRESHOLDS, ids=lambda selection: type(selection).__name__)
@pytest.mark.parametrize("budget", [None, 1.5, 6, 20])
def test_a_calibrated_threshold_gives_rows_their_budget(selection, budget):
    sae = untrained(selection)
    x = torch.randn(1000, 16, generator=torch.Generator().manual_seed(1))
    before = sae.log_threshold.detach().clone() if isinstance(selection, JumpReLU) else None
    constant = calibrate(sae, x, budget, batch_size=333)
    # To the nearest whole number of latents of all rows; one more or less where a product has other bits.
    assert abs(int(sae.encode(x).counts.sum()) - 1000 * (budget or 4)) <= 1
    if before is None:
        assert constant == float(sae.threshold)
    else:
        # All by one factor, so that what one latent needs beside another stays.
        torch.testing.assert_close(sae.log_threshold.exp(), constant * before.exp())


@pytest.mark.parametrize("selection", THRESHOLDS, ids=lambda selection: type(selection).__name__)
def test_a_budget_beyond_what_is_positive_keeps_all_of_that(selection):
    sae, x = untrained(selection), torch.ones(5, 16)
    positive = int((x @ sae.W_enc.T > 0).sum(-1)[0])
    assert positive > 32 - 8
    width = sae.width()
    calibrate(sae, x, width)
    assert sae.encode(x).counts.tolist() == [min(positive, width)] * 5


@pytest.mark.parametrize("selection", THRESHOLDS, ids=lambda selection: type(selection).__name__)
def test_what_no_row_can_have_is_named(selection):
    sae = untrained(selection)
    for budget in (0, 33):
        with pytest.raises(UserError, match=r"^budget: got .* at most 32"):
            calibrate(sae, torch.ones(5, 16), budget)


@pytest.mark.parametrize("selection", [TopK(4), AdaptiveK()], ids=lambda selection: type(selection).__name__)
def test_a_k_of_each_row_has_no_constant(selection):
    with pytest.raises(UserError, match=r"^sae: got .* needs Priced, Need, BatchTopK"):
        calibrate(SAE(SAEConfig(16, 400, selection)), torch.ones(5, 16), 4)


def test_a_threshold_lies_between_what_is_kept_and_what_is_not():
    codes = topk_select(torch.tensor([[5.0, 3.0, -1.0], [7.0, 6.0, 0.5]]), k=3)
    assert [float(threshold_for([codes], n / 2)) for n in (0.1, 1, 2, 3, 4, 5, 6)] == [6.5, 6.5, 5.5, 4, 1.75, 0, 0]
