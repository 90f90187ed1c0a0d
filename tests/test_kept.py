"""Frozen weights: the same codes, and a weight that changes is noticed."""

from __future__ import annotations

import threading

import pytest
import torch

from aksae_kernels import frozen, kept, topk_encode

D_IN, D_SAE, ROWS, K = 40, 3000, 40, 12


@pytest.fixture
def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Integers that bf16 rounds and whose sums fp32 holds: scores have the same bits in every order of summation."""
    generator = torch.Generator().manual_seed(0)
    shapes = (ROWS, D_IN), (D_SAE, D_IN), (D_SAE,)
    return tuple(torch.randint(-300, 301, shape, generator=generator).float() for shape in shapes)


def same(a, b) -> bool:
    return all(torch.equal(left, right) for left, right in zip(a, b, strict=True))


def test_same_bits(problem, backend):
    x, W, b = problem
    expected = topk_encode(x, W, b, k=K)
    with frozen(W):
        assert same(topk_encode(x, W, b, k=K), expected)
        assert same(topk_encode(x, W, b, k=K), expected)
        assert same(topk_encode(x[:2], W, b, k=K), [part[:2] for part in expected])


@pytest.mark.parametrize("grad", [False, True], ids=["plain", "parameter"])
def test_a_weight_changed_in_place_is_noticed(problem, backend, grad):
    x, W, b = problem
    W.requires_grad_(grad)
    with frozen(W):
        before = topk_encode(x, W, b, k=K)
        with torch.no_grad():
            W.copy_(W.flip(0))
        after = topk_encode(x, W, b, k=K)
    assert not same(before, after)
    assert same(after, topk_encode(x, W.detach().clone(), b, k=K))


def test_other_weights_and_views_are_left_alone(problem, backend):
    x, W, b = problem
    with frozen(W):
        topk_encode(x, W, b, k=K)
        assert same(topk_encode(x, W[1:], b[1:], k=K), topk_encode(x, W[1:].clone(), b[1:], k=K))
        assert same(topk_encode(x, W[:-1], b[1:], k=K), topk_encode(x, W[:-1].clone(), b[1:], k=K))


def test_what_is_prepared_is_prepared_once_and_given_back(problem):
    _, W, _ = problem
    calls = []
    assert kept.prepared(W, calls.append) is None
    with frozen(W, W):
        with frozen(W):
            for _ in range(3):
                kept.prepared(W, lambda weight: calls.append(weight.shape) or "packed")
        assert kept.prepared(W, calls.append) == "packed"
    assert calls == [W.shape]
    assert not kept._kept.weights


def test_inference_tensors(problem, backend):
    x, W, b = problem
    expected = topk_encode(x, W, b, k=K)
    with torch.inference_mode():
        W = W.clone()
        with frozen(W):
            assert same(topk_encode(x, W, b, k=K), expected)


def test_given_back_after_an_error(problem):
    with pytest.raises(KeyError), frozen(problem[1]):
        raise KeyError
    assert not kept._kept.weights


def test_a_promise_is_the_threads_own(problem):
    """What one thread promises and leaves changes nothing for another, not even while that one prepares a weight."""
    _, W, _ = problem
    inside, left, seen = threading.Event(), threading.Event(), []

    def other():
        seen.append(kept.prepared(W, lambda weight: "not promised here"))
        with frozen(W):
            inside.wait(10)
            seen.append(kept.prepared(W, lambda weight: left.wait(10) and "prepared here"))
            seen.append(kept.prepared(W, lambda weight: "prepared again"))
        seen.append(dict(kept._kept.weights))

    thread = threading.Thread(target=other)
    with frozen(W):
        thread.start()
        assert kept.prepared(W, lambda weight: "of the main thread") == "of the main thread"
        inside.set()
    left.set()
    thread.join(10)
    assert seen == [None, "prepared here", "prepared here", {}]
    assert not kept._kept.weights


def test_memory_of_a_replaced_weight_is_not_found_by_another(problem):
    _, W, _ = problem
    with frozen(W):
        kept.prepared(W, lambda weight: "packed")
        W.data = W.data.clone()
        others = [torch.zeros_like(W) for _ in range(8)]
        assert not [other for other in others if kept.prepared(other, lambda weight: "stale")]
