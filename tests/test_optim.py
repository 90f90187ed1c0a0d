"""SAEAdam against the plain formulas in fp64."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from conftest import THREADS

from aksae_kernels import use_backend
from aksae_kernels.optim import SAEAdam

# An eps this large keeps the step well-conditioned where a gradient is near 0, and makes clipping visible.
LR, BETAS, EPS = 0.05, (0.8, 0.95), 0.1


def unit_rows(case, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(case.randn(rows, columns, seed=seed).double(), dim=1).to(case.dtype)


def model(case, rows: int = 30, columns: int = 17) -> list[torch.nn.Parameter]:
    """A decoder with unit-norm rows, an encoder and a bias."""
    tensors = (unit_rows(case, rows, columns), case.randn(rows, columns, seed=1), case.randn(rows, seed=2))
    return [torch.nn.Parameter(t) for t in tensors]


def optimizer(params: list[torch.nn.Parameter], **kwargs) -> SAEAdam:
    decoder, *others = params
    groups = [{"params": [decoder], "unit_norm_rows": True}]
    if others:
        groups.append({"params": others})
    return SAEAdam(groups, lr=LR, betas=BETAS, eps=EPS, **kwargs)


class Oracle:
    """The four lines of the algorithm in fp64; the first parameter has unit-norm rows."""

    def __init__(self, max_grad_norm: float | None):
        self.max_grad_norm, self.moments, self.steps = max_grad_norm, {}, 0

    def step(self, params: list[torch.Tensor], grads: list[torch.Tensor]) -> list[torch.Tensor]:
        self.steps += 1
        params, grads = [p.double() for p in params], [g.double() for g in grads]
        grads[0] = grads[0] - (grads[0] * params[0]).sum(1, keepdim=True) * params[0]
        self.norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
        scale = 1.0 if self.max_grad_norm is None else min(1.0, self.max_grad_norm / float(self.norm))
        out = []
        for i, (p, g) in enumerate(zip(params, grads, strict=True)):
            m, v = self.moments.get(i, (torch.zeros_like(p), torch.zeros_like(p)))
            m = BETAS[0] * m + (1 - BETAS[0]) * scale * g
            v = BETAS[1] * v + (1 - BETAS[1]) * (scale * g).square()
            self.moments[i] = m, v
            m_hat, v_hat = m / (1 - BETAS[0] ** self.steps), v / (1 - BETAS[1] ** self.steps)
            p = p - LR * m_hat / (v_hat.sqrt() + EPS)
            out.append(p / p.norm(dim=1, keepdim=True) if i == 0 else p)
        return out


def test_a_graph_of_the_old_weights_is_refused(fp32):
    p = torch.nn.Parameter(unit_rows(fp32, 8, 5))
    loss = (fp32.randn(3, 5).requires_grad_() @ p.T).square().sum()
    loss.backward(retain_graph=True)
    optimizer([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_copies_and_pickles(fp32):
    ours = optimizer(model(fp32), max_grad_norm=0.5)
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        params = [p for group in again.param_groups for p in group["params"]]
        for p in params:
            p.grad = 100 * torch.ones_like(p)
        again.step()
        assert again.last_grad_norm > 0.5


@pytest.mark.parametrize("max_grad_norm", [None, 1.0, 1e9], ids=str)
def test_matches_the_formulas(case, max_grad_norm):
    params = model(case)
    ours, oracle = optimizer(params, max_grad_norm=max_grad_norm), Oracle(max_grad_norm)
    for step in range(6):
        before = [p.detach().clone() for p in params]
        grads = [case.randn(*p.shape, seed=10 * step + i) * 4.0**-step for i, p in enumerate(params)]
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        ours.step()
        # Rounded once per step, to the weight's dtype, from where the weight was.
        for p, expected in zip(params, oracle.step(before, grads), strict=True):
            tolerance = 4 * torch.finfo(case.dtype).eps
            torch.testing.assert_close(p.detach().double(), expected, rtol=tolerance, atol=tolerance)
        for p, g in zip(params, grads, strict=True):
            assert torch.equal(p.grad, g), "the gradient was written to"
        if max_grad_norm is not None:
            torch.testing.assert_close(float(ours.last_grad_norm), float(oracle.norm), rtol=1e-3, atol=0)


@pytest.mark.parametrize("shape", [(40,), (5, 8), (2, 3, 4), (), (0,), (0, 4), (4, 0)], ids=str)
def test_is_adam_without_the_constraint(fp64, shape):
    ours, theirs = (torch.nn.Parameter(fp64.randn(*shape)) for _ in range(2))
    steps = (SAEAdam([ours], lr=LR, betas=BETAS, eps=EPS), torch.optim.Adam([theirs], lr=LR, betas=BETAS, eps=EPS))
    for seed in range(5):
        for p, optimizer_ in zip((ours, theirs), steps, strict=True):
            p.grad = fp64.randn(*shape, seed=seed)
            optimizer_.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_defaults_are_those_of_adam():
    defaults = SAEAdam([torch.nn.Parameter(torch.ones(2))]).defaults
    assert (defaults["lr"], defaults["betas"], defaults["eps"]) == (1e-3, (0.9, 0.999), 1e-8)


def test_rows_stay_on_the_sphere(case):
    params = model(case, 50, 33)
    ours = optimizer(params)
    for step in range(30):
        for i, p in enumerate(params):
            p.grad = case.randn(*p.shape, seed=step + i)
        ours.step()
    norm = params[0].detach().double().norm(dim=1)
    torch.testing.assert_close(norm, torch.ones_like(norm), rtol=0, atol=2 * torch.finfo(case.dtype).eps)


def test_a_gradient_along_the_row_moves_nothing(case):
    decoder = torch.nn.Parameter(torch.eye(4, 6, dtype=case.dtype, device=case.device))
    ours = SAEAdam([{"params": [decoder], "unit_norm_rows": True}], lr=0.1, max_grad_norm=1.0)
    decoder.grad = 3 * decoder.detach()
    ours.step()
    assert torch.equal(decoder, torch.eye(4, 6, dtype=case.dtype, device=case.device))
    assert float(ours.last_grad_norm) == 0


def test_a_zero_row_stays_zero(case):
    decoder = torch.nn.Parameter(unit_rows(case, 4, 6))
    with torch.no_grad():
        decoder[2] = 0
    ours = SAEAdam([{"params": [decoder], "unit_norm_rows": True}], lr=0.1)
    decoder.grad = case.randn(4, 6, seed=1)
    decoder.grad[2] = 0
    ours.step()
    assert (decoder[2] == 0).all()
    assert decoder.isfinite().all()


@pytest.mark.parametrize("max_grad_norm", [None, 1.0], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_a_diverged_gradient_surfaces(case, bad, max_grad_norm):
    params = model(case)
    ours = optimizer(params, max_grad_norm=max_grad_norm)
    for p in params:
        p.grad = torch.zeros_like(p)
    params[0].grad[3, 4] = bad
    ours.step()
    assert params[0][3].isnan().any()
    if max_grad_norm is not None:
        assert not ours.last_grad_norm.isfinite()


def test_parameters_without_gradient_are_left_alone(fp32):
    params = model(fp32)
    before = [p.detach().clone() for p in params]
    ours = optimizer(params, max_grad_norm=1.0)
    ours.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    params[1].grad = torch.ones_like(params[1])
    ours.step()
    assert torch.equal(params[0], before[0])
    assert not torch.equal(params[1], before[1])
    assert params[0] not in ours.state


def test_any_strides(case):
    def run(layout):
        decoder = torch.nn.Parameter(layout(unit_rows(case, 12, 7)))
        plain = torch.nn.Parameter(layout(case.randn(12, 7, seed=5)))
        ours = SAEAdam([{"params": [decoder], "unit_norm_rows": True}, {"params": [plain]}], lr=0.1, max_grad_norm=0.5)
        for seed in range(3):
            decoder.grad, plain.grad = (layout(case.randn(12, 7, seed=10 + seed + i)) for i in range(2))
            ours.step()
        return decoder.detach(), plain.detach()

    expected = run(torch.Tensor.contiguous)
    for layout in (
        lambda t: t.T.contiguous().T,
        lambda t: torch.stack([t, t], 1)[:, 0],
        lambda t: torch.stack([t, t], 2)[..., 0],
    ):
        for actual, e in zip(run(layout), expected, strict=True):
            tolerance = torch.finfo(case.dtype).eps
            torch.testing.assert_close(actual, e, rtol=tolerance, atol=tolerance)


def test_expanded_gradient(fp32):
    results = []
    for grad in (torch.tensor(2.0, device=fp32.device).expand(12, 7), torch.full((12, 7), 2.0, device=fp32.device)):
        decoder = torch.nn.Parameter(unit_rows(fp32, 12, 7))
        decoder.grad = grad
        SAEAdam([{"params": [decoder], "unit_norm_rows": True}]).step()
        results.append(decoder.detach())
    assert torch.equal(*results)


def test_state_dict_resumes(case):
    def steps(params, ours, seeds):
        for seed in seeds:
            for i, p in enumerate(params):
                p.grad = case.randn(*p.shape, seed=seed + i)
            ours.step()

    params = model(case)
    ours = optimizer(params, max_grad_norm=1.0)
    steps(params, ours, (0, 7))
    resumed = [torch.nn.Parameter(p.detach().clone()) for p in params]
    again = optimizer(resumed, max_grad_norm=1.0)
    again.load_state_dict(copy.deepcopy(ours.state_dict()))
    steps(params, ours, (20, 30))
    steps(resumed, again, (20, 30))
    assert all(torch.equal(a, b) for a, b in zip(params, resumed, strict=True))


def test_learning_rate_schedule_and_closure(fp64):
    params = [torch.nn.Parameter(fp64.randn(5)) for _ in range(2)]
    pair = [cls([p], lr=0.1) for cls, p in zip((SAEAdam, torch.optim.Adam), params, strict=True)]
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.5**step) for o in pair]
    for _ in range(4):
        for p, o, schedule in zip(params, pair, schedules, strict=True):

            def closure(p=p, o=o):
                o.zero_grad()
                loss = p.square().sum()
                loss.backward()
                return loss

            assert o.step(closure) == p.grad.square().sum() / 4
            schedule.step()
    torch.testing.assert_close(*params, rtol=1e-12, atol=1e-12)


def test_same_bits_again_and_with_other_threads(case):
    def run():
        params = model(case, 400, 65)
        ours = optimizer(params, max_grad_norm=1e9)
        for seed in range(3):
            for i, p in enumerate(params):
                p.grad = case.randn(*p.shape, seed=seed + i)
            ours.step()
        return params

    threads = torch.get_num_threads()
    first = run()
    try:
        for n in THREADS:
            torch.set_num_threads(n)
            assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))
    finally:
        torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------------ lazy

IDLE = torch.tensor([True, False, False, True, False] * 8)


def lazy_steps(case, unit_norm_rows: bool, lazy: bool, max_grad_norm: float | None = None, steps: int = 3):
    """A matrix [40, 9] of which the rows IDLE get gradients of 0 after the first step; the parameter and its state."""
    param = torch.nn.Parameter(unit_rows(case, 40, 9))
    group = {"params": [param], "unit_norm_rows": unit_norm_rows, "lazy": lazy}
    ours = SAEAdam([group], lr=LR, betas=BETAS, eps=EPS, max_grad_norm=max_grad_norm)
    kept = []
    for step in range(steps):
        param.grad = case.randn(40, 9, seed=step)
        if step:
            # A zero of either sign is one.
            param.grad[IDLE.to(case.device)] = 0.0 if step % 2 else -0.0
        ours.step()
        state = ours.state[param]
        kept.append([t.detach().clone() for t in (param, state["exp_avg"], state["exp_avg_sq"])])
    return kept


@pytest.mark.parametrize("max_grad_norm", [None, 0.5], ids=str)
@pytest.mark.parametrize("unit_norm_rows", [True, False], ids=["unit", "plain"])
def test_lazy_rows_keep_their_bits_and_others_are_adams(case, unit_norm_rows, max_grad_norm):
    lazy, full = (lazy_steps(case, unit_norm_rows, lazy, max_grad_norm) for lazy in (True, False))
    idle = IDLE.to(case.device)
    for step in range(3):
        for ours, adams in zip(lazy[step], full[step], strict=True):
            assert torch.equal(ours[~idle], adams[~idle])
        for ours, first in zip(lazy[step], lazy[0], strict=True):
            assert torch.equal(ours[idle], first[idle])
    assert not torch.equal(full[2][0][idle], full[0][0][idle]), "Adam goes on by its momentum"


def test_lazy_on_the_reference_and_on_the_kernels_is_one_optimizer(case):
    ours = lazy_steps(case, True, True, 0.5)[-1]
    with use_backend("reference"):
        references = lazy_steps(case, True, True, 0.5)[-1]
    for a, b in zip(ours, references, strict=True):
        tolerance = 4 * torch.finfo(case.dtype).eps
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_lazy_counts_the_steps_of_the_parameter(fp64):
    """A row that wakes up in step 2 has the bias correction of step 2."""
    param = torch.nn.Parameter(torch.zeros(2, 3, dtype=torch.float64, device=fp64.device))
    ours = SAEAdam([{"params": [param], "lazy": True}], lr=LR, betas=BETAS, eps=EPS)
    grad = torch.ones_like(param)
    grad[1] = 0
    for g in (grad, torch.ones_like(param)):
        param.grad = g.clone()
        ours.step()
    m, v = (1 - BETAS[0]) / (1 - BETAS[0] ** 2), (1 - BETAS[1]) / (1 - BETAS[1] ** 2)
    torch.testing.assert_close(param[1], torch.full_like(param[1], -LR * m / (math.sqrt(v) + EPS)))


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_a_nan_row_is_not_idle(case, bad):
    param = torch.nn.Parameter(unit_rows(case, 6, 9))
    before = param.detach().clone()
    param.grad = torch.zeros_like(param)
    param.grad[2, 8] = bad
    SAEAdam([{"params": [param], "lazy": True}]).step()
    assert param[2, 8].isnan()
    assert torch.equal(param[[0, 1, 3, 4, 5]], before[[0, 1, 3, 4, 5]])


def test_a_nan_norm_reaches_lazy_rows(case):
    params = [torch.nn.Parameter(unit_rows(case, 6, 9)) for _ in range(2)]
    for p in params:
        p.grad = torch.zeros_like(p)
    params[1].grad[2, 8] = math.nan
    SAEAdam([{"params": params, "lazy": True}], max_grad_norm=1.0).step()
    assert all(p.isnan().all() for p in params)


@pytest.mark.parametrize("lazy", [False, True], ids=["full", "lazy"])
@pytest.mark.parametrize("bad", [math.inf, 1e30], ids=["inf", "overflow"])
def test_an_infinite_norm_surfaces(fp32, bad, lazy):
    """Of infinite gradients, and of finite ones whose squares overflow: a factor of 0 would freeze the run."""
    param = torch.nn.Parameter(unit_rows(fp32, 6, 9))
    param.grad = torch.zeros_like(param)
    param.grad[2] = bad
    ours = SAEAdam([{"params": [param], "lazy": lazy}], max_grad_norm=1.0)
    ours.step()
    assert ours.last_grad_norm.isinf()
    assert param.isnan().all()


def test_vectors_are_never_lazy(fp32):
    kept = []
    for lazy in (True, False):
        param = torch.nn.Parameter(fp32.randn(7))
        ours = SAEAdam([{"params": [param], "lazy": lazy}])
        for grad in (torch.ones(7), torch.zeros(7)):
            param.grad = grad.to(param)
            ours.step()
        kept.append(param.detach())
    assert torch.equal(*kept)


def test_lazy_is_kept_by_checkpoints_and_absent_from_old_ones(fp32):
    def step(param, ours):
        param.grad = fp32.randn(5, 4, seed=3)
        param.grad[1] = 0
        ours.step()
        return param.detach()

    param = torch.nn.Parameter(fp32.randn(5, 4))
    ours = SAEAdam([{"params": [param], "lazy": True}])
    param.grad = torch.ones_like(param)
    ours.step()
    start, saved = param.detach().clone(), copy.deepcopy(ours.state_dict())
    old = copy.deepcopy(saved)
    for group in old["param_groups"]:
        del group["lazy"]
    after = {}
    for name, checkpoint in (("saved", saved), ("old", old)):
        again = torch.nn.Parameter(start.clone())
        loaded = SAEAdam([again])
        loaded.load_state_dict(checkpoint)
        after[name] = step(again, loaded)
    assert torch.equal(after["saved"], step(param, ours))
    assert torch.equal(after["saved"][1], start[1])
    # Of the time when all rows took every step.
    assert not torch.equal(after["old"][1], start[1])
    pickled = ours.__getstate__()
    for group in (pickled["defaults"], *pickled["param_groups"]):
        del group["lazy"]
    unpickled = SAEAdam.__new__(SAEAdam)
    unpickled.__setstate__(pickled)
    unpickled.step()


# ------------------------------------------------------------------------------------- the state of torch's Adam


def run_steps(optimizer_: torch.optim.Optimizer, case, seeds) -> list[torch.Tensor]:
    params = [p for group in optimizer_.param_groups for p in group["params"]]
    for seed in seeds:
        for i, p in enumerate(params):
            p.grad = case.randn(*p.shape, seed=seed + i)
        optimizer_.step()
    return [p.detach() for p in params]


def copies(params: list[torch.Tensor]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("how", [{}, {"foreach": True}, {"fused": True}], ids=["plain", "foreach", "fused"])
def test_goes_on_where_adam_was(fp64, kind, how, tmp_path):
    theirs = kind(model(fp64), lr=LR, betas=BETAS, eps=EPS, weight_decay=0, **how)
    params = run_steps(theirs, fp64, (0, 7))
    torch.save(theirs.state_dict(), tmp_path / "adam.pt")
    ours = SAEAdam(copies(params), lr=1.0, max_grad_norm=1e9)
    ours.load_state_dict(torch.load(tmp_path / "adam.pt"))
    expected = run_steps(theirs, fp64, (20, 30))
    for a, b in zip(run_steps(ours, fp64, (20, 30)), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert ours.last_grad_norm > 0
    # And once more, from our own state.
    again = SAEAdam(copies(expected))
    again.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("lazy", [False, True], ids=["full", "lazy"])
def test_options_of_ours_stay_where_adams_state_is_loaded(fp64, lazy):
    params = model(fp64)
    theirs = torch.optim.Adam([{"params": params[:1]}, {"params": params[1:], "lr": 0.5}], lr=LR)
    run_steps(theirs, fp64, (0,))
    groups = [{"params": copies(params[:1]), "unit_norm_rows": True}, {"params": copies(params[1:]), "lazy": lazy}]
    ours = SAEAdam(groups, max_grad_norm=0.5)
    ours.load_state_dict(theirs.state_dict())
    assert [group["unit_norm_rows"] for group in ours.param_groups] == [True, False]
    assert [group["lazy"] for group in ours.param_groups] == [False, lazy]
    assert [group["lr"] for group in ours.param_groups] == [LR, 0.5]
    decoder, *_ = run_steps(ours, fp64, (20,))
    torch.testing.assert_close(decoder.norm(dim=1), torch.ones(30, dtype=fp64.dtype, device=fp64.device))


def test_adam_goes_on_where_ours_was(fp64):
    ours = SAEAdam(model(fp64), lr=LR, betas=BETAS, eps=EPS)
    params = run_steps(ours, fp64, (0, 7))
    theirs = torch.optim.Adam(copies(params), lr=1.0)
    # Adam would go on with the very tensors of a state, and not with copies.
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    for a, b in zip(run_steps(theirs, fp64, (20, 30)), run_steps(ours, fp64, (20, 30)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_state_without_steps_loads(fp64):
    ours = SAEAdam(model(fp64))
    ours.load_state_dict(torch.optim.Adam(model(fp64), lr=LR).state_dict())
    assert ours.param_groups[0]["lr"] == LR
    run_steps(ours, fp64, (0,))


OTHERS = {
    "weight_decay": lambda p: torch.optim.Adam(p, weight_decay=0.1),
    "weight_decay ": lambda p: torch.optim.AdamW(p),
    "amsgrad": lambda p: torch.optim.Adam(p, amsgrad=True),
    "maximize": lambda p: torch.optim.Adam(p, maximize=True),
    "momentum": lambda p: torch.optim.SGD(p, momentum=0.9),
    "state_dict": lambda p: torch.optim.RAdam(p),
    "state_dict ": lambda p: torch.optim.NAdam(p),
}


@pytest.mark.parametrize(("name", "make"), OTHERS.items(), ids=OTHERS.keys())
def test_the_state_of_another_algorithm_is_refused(fp64, name, make):
    params = model(fp64)
    theirs = make(params)
    run_steps(theirs, fp64, (0,))
    ours = SAEAdam(copies(params))
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(ValueError, match=name.strip()):
        ours.load_state_dict(theirs.state_dict())
    assert ours.state_dict() == before


@pytest.mark.parametrize("name", ["weight_decay", "amsgrad", "maximize"])
def test_an_option_of_adams_in_a_group_is_refused(name):
    with pytest.raises(ValueError, match=name):
        SAEAdam([{"params": [torch.nn.Parameter(torch.ones(3))], name: True}])


MATRIX, VECTOR = torch.nn.Parameter(torch.eye(3)), torch.nn.Parameter(torch.ones(3))
WRONG = {
    "lr": lambda: SAEAdam([VECTOR], lr=-1.0),
    "lr ": lambda: SAEAdam([VECTOR], lr=math.nan),
    "betas": lambda: SAEAdam([VECTOR], betas=(1.0, 0.9)),
    "betas ": lambda: SAEAdam([VECTOR], betas=(0.9, -0.1)),
    "eps": lambda: SAEAdam([VECTOR], eps=-1e-8),
    "max_grad_norm": lambda: SAEAdam([VECTOR], max_grad_norm=0.0),
    "max_grad_norm ": lambda: SAEAdam([VECTOR], max_grad_norm=-1.0),
    "unit_norm_rows": lambda: SAEAdam([{"params": [VECTOR], "unit_norm_rows": True}]),
    "lr of a group": lambda: SAEAdam([{"params": [VECTOR], "lr": -1.0}]),
}


@pytest.mark.parametrize(("name", "call"), WRONG.items(), ids=WRONG.keys())
def test_wrong_arguments_are_named(name, call):
    with pytest.raises(ValueError, match=name.split()[0]):
        call()


def test_sparse_gradients_are_refused(fp32):
    matrix = torch.nn.Parameter(torch.eye(3, device=fp32.device))
    matrix.grad = torch.eye(3, device=fp32.device).to_sparse()
    with pytest.raises(ValueError, match="sparse"):
        SAEAdam([matrix]).step()
