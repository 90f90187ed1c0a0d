"""The losses against the equations written out row by row in fp64, values and gradients."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from aksae import SAE, AdaptiveK, BatchTopK, JumpReLU, KMap, Matryoshka, Need, SAEConfig, TopK
from aksae.losses import DeadLatents, DeviationWeight, deviation, probe_loss, sae_loss
from aksae.probe import ComplexityProbe
from torch.utils._python_dispatch import TorchDispatchMode

from aksae_kernels import SparseCodes

D, F, B = 6, 30, 16
ALPHA, BETA = 0.3, 0.7


SELECTIONS = (TopK(3), BatchTopK(3), JumpReLU(3), Matryoshka(BatchTopK(3), (4, 9, F)), Need(3), AdaptiveK(KMap(1, 5)))


def make_sae(dtype=torch.float64, selection=SELECTIONS[-1]) -> SAE:
    generator = torch.Generator().manual_seed(2)
    sae = SAE(SAEConfig(D, F, selection), generator=generator).to(dtype)
    with torch.no_grad():
        sae.W_enc.normal_(generator=generator)
        sae.b_enc.normal_(generator=generator)
        sae.b_dec.normal_(generator=generator)
        # Strong latents and weak ones, which win no row of the main selection.
        sae.b_enc[:15] += 4
        sae.W_enc[15:] *= 0.1
    return sae


def make_rows(dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(B, D, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, 6, (B,), generator=generator)


def make_dead(n_dead: int, dead_after=1000) -> DeadLatents:
    """The last `n_dead` latents have been silent for long."""
    dead = DeadLatents(F, dead_after)
    dead.rows_since_fired[F - n_dead :] = dead_after
    return dead


def by_the_equations(sae, x, k, silent):
    """Terms of the loss; `silent [F]` counts the rows since a latent fired, before this batch."""
    z, activations = [], []
    for row, row_k in zip(x, k.tolist()):
        activation = torch.relu(sae.W_enc @ (row - sae.b_dec) + sae.b_enc)
        kept = activation.argsort(descending=True, stable=True)[:row_k]
        z.append(torch.zeros_like(activation).scatter(0, kept, activation[kept]))
        activations.append(activation)
    z = torch.stack(z)
    e = x - (z @ sae.W_dec + sae.b_dec)
    recon = (e**2).mean()
    sparsity = torch.stack([row.abs().sum() for row in z]).mean() / torch.stack([row.norm() for row in x]).mean()

    is_dead = [f for f in range(F) if not z[:, f].any() and silent[f] + len(x) >= 1000]
    if not is_dead:
        return recon, sparsity, torch.zeros(())
    e_hat = []
    for activation in activations:
        of_dead = activation[is_dead]
        kept = of_dead.argsort(descending=True, stable=True)[: min(D // 2, len(is_dead))]
        e_hat.append(of_dead[kept] @ sae.W_dec[is_dead][kept])
    mean = e.mean(0)
    variance = torch.stack([((row - mean) ** 2).sum() for row in e]).mean()
    error = torch.stack([((row - hat) ** 2).sum() for row, hat in zip(e, e_hat)]).mean()
    return recon, sparsity, error / variance


@pytest.mark.parametrize("n_dead", [0, 1, D // 2, 12, F], ids=lambda n: f"{n} dead")
def test_values_and_gradients_follow_the_equations(n_dead):
    sae, (x, k), dead = make_sae(), make_rows(), make_dead(n_dead)
    expected = by_the_equations(sae, x, k, dead.rows_since_fired.clone())
    total = expected[0] + ALPHA * expected[1] + BETA * expected[2]
    total.backward()
    gradients = {name: p.grad for name, p in sae.named_parameters() if not name.startswith("probe")}
    sae.zero_grad()

    loss = sae_loss(sae, x, k, dead, sparsity_coef=ALPHA, aux_coef=BETA)
    loss.total.backward()
    torch.testing.assert_close(
        torch.stack([loss.recon, loss.sparsity, loss.aux]), torch.stack([t.double() for t in expected])
    )
    torch.testing.assert_close(loss.total, total)
    assert (loss.aux > 0) == (n_dead > 0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(sae.get_parameter(name).grad, gradient, msg=name)


def test_the_auxiliary_loss_trains_the_encoder_of_dead_latents():
    sae, (x, k), dead = make_sae(), make_rows(), make_dead(8)
    loss = sae_loss(sae, x, k, dead, sparsity_coef=0, aux_coef=BETA)
    loss.total.backward()
    is_dead = dead.mask()
    assert is_dead.any()
    assert not torch.isin(loss.codes.indices, is_dead.nonzero()).any()
    for name in ("W_enc", "b_enc", "W_dec"):
        gradient = sae.get_parameter(name).grad[is_dead].reshape(int(is_dead.sum()), -1)
        assert gradient.abs().sum(1).gt(0).sum() >= 3, name


def test_a_latent_that_fires_is_dead_no_more():
    sae, (x, k), dead = make_sae(), make_rows(), make_dead(F)
    codes = sae_loss(sae, x, k, dead, sparsity_coef=0, aux_coef=0).codes
    fired = torch.zeros(F, dtype=torch.bool)
    fired[codes.indices[codes.indices >= 0].long()] = True
    assert torch.equal(dead.mask(), ~fired)
    assert torch.equal(dead.rows_since_fired == 0, fired)


def test_one_row_has_no_variance_to_explain():
    sae, (x, k), dead = make_sae(), make_rows(), make_dead(F)
    loss = sae_loss(sae, x[:1], k[:1], dead, sparsity_coef=ALPHA, aux_coef=BETA)
    loss.total.backward()
    assert loss.aux == 0
    assert all(p.grad.isfinite().all() for name, p in sae.named_parameters() if not name.startswith("probe"))


class Dense(TorchDispatchMode):
    """The ops that make a `[B, F]`, but for those of a backend: outside of it nothing may."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (F,) and tensor.numel() >= B * F:
                self.seen[op._schema.name] += 1
        return out


@pytest.mark.parametrize("n_dead", [0, 12, F])
@pytest.mark.parametrize("selection", SELECTIONS, ids=lambda selection: type(selection).__name__)
def test_nothing_of_the_size_of_all_pre_activations(selection, n_dead):
    sae, (x, _), dead = make_sae(selection=selection), make_rows(), make_dead(n_dead)
    with Dense() as dense:
        sae_loss(sae, x, None, dead, sparsity_coef=ALPHA, aux_coef=BETA).total.backward()
    assert not dense.seen


@pytest.mark.parametrize("n_dead", [0, 12])
def test_autocast(n_dead):
    sae, (x, k) = make_sae(torch.float32), make_rows(torch.float32)
    exact = sae_loss(sae, x, k, make_dead(n_dead), sparsity_coef=ALPHA, aux_coef=BETA)
    with torch.autocast("cpu", torch.bfloat16):
        loss = sae_loss(sae, x, k, make_dead(n_dead), sparsity_coef=ALPHA, aux_coef=BETA)
    loss.total.backward()
    torch.testing.assert_close(loss.total, exact.total, rtol=0.05, atol=0.05)
    assert all(
        p.grad.dtype == torch.float32 and p.grad.isfinite().all()
        for name, p in sae.named_parameters()
        if not name.startswith("probe")
    )


def test_dead_latents_are_counted_in_rows():
    dead = DeadLatents(4, dead_after=5)
    indices = torch.tensor([[0, 2], [2, -1]], dtype=torch.int32)
    codes = SparseCodes(torch.ones(2, 2), indices, torch.tensor([2, 1], dtype=torch.int32))
    for n_batches, expected in ((1, [0, 2, 0, 2]), (2, [0, 4, 0, 4]), (3, [0, 6, 0, 6])):
        dead.update(codes)
        assert dead.rows_since_fired.tolist() == expected
        assert dead.mask().tolist() == [False, n_batches == 3, False, n_batches == 3]
        assert dead.may_be() == bool(dead.mask().any())


def test_what_a_selection_holds_at_0_has_not_fired():
    dead = DeadLatents(3, dead_after=1)
    codes = SparseCodes(torch.tensor([[0.0, 2.0]]), torch.tensor([[0, 2]], dtype=torch.int32), torch.tensor([2]).int())
    dead.update(codes)
    assert dead.rows_since_fired.tolist() == [1, 1, 0]


def test_of_more_dead_latents_than_the_cap_the_longest_dead_count():
    sae, (x, _), dead = make_sae(), make_rows(), make_dead(12)
    few = DeadLatents(F, dead.dead_after, cap=5)
    few.rows_since_fired.copy_(dead.rows_since_fired)
    few.rows_since_fired[[F - 12, F - 3, F - 7, F - 1, F - 9]] += torch.tensor([5, 4, 3, 2, 1])
    encoder = sae.encoder(x)
    only = DeadLatents(F, dead.dead_after)
    only.rows_since_fired[[F - 12, F - 3, F - 7, F - 1, F - 9]] = dead.dead_after
    for capped, exact in zip(few.codes(encoder, 3), only.codes(encoder, 3), strict=True):
        assert torch.equal(capped, exact)


def test_deviation_weight_follows_the_loss():
    weight, history, expected = DeviationWeight(), [], 0.2
    for loss in [5.0, 4.9, 4.8, 4.7, 4.0, 3.0, 3.0, 3.0, 3.0, *[3 * 0.9**i for i in range(30)], *[0.1] * 30]:
        history.append(loss)
        weight.update(torch.tensor(loss))
        if len(history) >= 3:
            fell = (history[-3] - history[-1]) / history[-3] > 0.05
            expected = max(0.01, 0.8 * expected) if fell else min(0.5, 1.2 * expected)
        assert float(weight.value) == pytest.approx(expected, rel=1e-5)
    assert expected == 0.5


def test_probe_loss_and_deviation():
    probe = ComplexityProbe(2)
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [100.0, 0.0]])
    with torch.no_grad():
        probe.weight.copy_(torch.tensor([1.0, 0.5]))
        probe.bias.fill_(0.5)
    labels = torch.tensor([2.0, 6.0, 9.0])
    # Scores 2.5, 5.5 and 100.5, which is clamped to 10.
    loss = probe_loss(probe, x, labels, penalty=3.0)
    torch.testing.assert_close(loss, torch.tensor((0.25 + 0.25 + 1) / 3 + 1.5 * 1.25))
    loss.backward()
    residuals = torch.tensor([0.5, -0.5, 0.0])
    torch.testing.assert_close(probe.weight.grad, 2 / 3 * residuals @ x + 3.0 * probe.weight.detach())
    torch.testing.assert_close(probe.bias.grad, torch.tensor(0.0))

    moved = deviation(probe, torch.tensor([1.0 - 3.0, 0.5 - 4.0]), torch.tensor(1.5))
    torch.testing.assert_close(moved, torch.tensor(5.0 + 1.0))


def test_deviation_has_no_gradient_where_the_probe_starts():
    probe = ComplexityProbe(2)
    moved = deviation(probe, probe.weight.detach().clone(), probe.bias.detach().clone())
    moved.backward()
    assert moved == 0
    assert not probe.weight.grad.any()
    assert not probe.bias.grad
