"""The score-to-k map against the published table and its own formula."""

import math

import pytest
import torch
from aksae.errors import UserError
from aksae.k_policy import score_to_k

TABLE = [34, 45, 63, 89, 126, 170, 214, 251, 277, 295, 306]


def test_defaults_give_the_published_table():
    k = score_to_k(torch.arange(11.0))
    assert k.dtype == torch.int32
    assert k.tolist() == TABLE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_every_real_dtype_gives_the_same_table(dtype):
    assert score_to_k(torch.arange(11).to(dtype)).tolist() == TABLE


def test_sixteen_bit_scores_are_mapped_in_full_precision():
    scores = torch.linspace(0, 10, 997).bfloat16()
    assert torch.equal(score_to_k(scores), score_to_k(scores.double()))


def test_shape_is_kept_and_numbers_are_accepted():
    assert score_to_k(torch.zeros(2, 3, 4)).shape == (2, 3, 4)
    assert score_to_k(torch.zeros(0)).shape == (0,)
    for number in (5, 5.0):
        k = score_to_k(number)
        assert k.shape == ()
        assert k.dtype == torch.int32
        assert k.item() == 170


def test_other_parameters_follow_the_formula():
    scores = [-2.0, -1.0, 0.3, 2.5, 3.0]
    k = score_to_k(torch.tensor(scores), k_min=3, k_max=50, steepness=-4.0, score_min=-1.0, score_max=3.0)
    expected = [round(3 + 47 / (1 + math.exp(4.0 * ((c + 1) / 4 - 0.5)))) for c in scores]
    assert k.tolist() == expected


def test_halves_round_to_even():
    # At the middle score the sigmoid is exactly 1/2.
    assert [score_to_k(5.0, k_min=0, k_max=top).item() for top in (1, 3, 5, 7)] == [0, 2, 2, 4]


def test_range_is_never_left():
    scores = torch.tensor([-math.inf, -1e30, -5.0, 15.0, 1e30, math.inf])
    k = score_to_k(scores, steepness=1e6)
    assert k.tolist() == [20, 20, 20, 320, 320, 320]
    assert score_to_k(scores, k_min=7, k_max=7).unique().tolist() == [7]
    assert score_to_k(torch.tensor([0.0, 9.0]), steepness=0.0).tolist() == [170, 170]


def test_no_gradient_flows():
    assert not score_to_k(torch.ones(3, requires_grad=True)).requires_grad


def test_nan_score_raises_on_the_cpu():
    with pytest.raises(UserError, match="score: got NaN in 2 of 3"):
        score_to_k(torch.tensor([math.nan, 1.0, math.nan]))


def test_traces_without_a_graph_break_and_maps_nan_to_k_min():
    traced = torch.compile(score_to_k, fullgraph=True, backend="eager")
    assert traced(torch.tensor([math.nan, 5.0])).tolist() == [20, 170]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"k_min": 30, "k_max": 20}, "k_min: got 30, needs at most k_max = 20"),
        ({"k_min": -1}, "k_min: got -1"),
        ({"k_max": 2**31}, "k_max: got 2147483648"),
        ({"score_min": 10.0}, "score_min: got 10.0"),
        ({"score_min": math.nan}, "score_min: got nan"),
        ({"steepness": math.inf}, "steepness: got inf"),
    ],
)
def test_bad_parameters_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        score_to_k(torch.zeros(2), **arguments)


@pytest.mark.parametrize("arguments", [{"k_min": 2.0}, {"k_max": True}])
def test_k_bounds_must_be_integers(arguments):
    with pytest.raises(TypeError, match=next(iter(arguments))):
        score_to_k(torch.zeros(2), **arguments)


@pytest.mark.parametrize("score", ["5", None, True, torch.tensor([True]), torch.zeros(2, dtype=torch.complex64)])
def test_score_must_be_real(score):
    with pytest.raises(TypeError, match="score: got"):
        score_to_k(score)
