"""SAELens before and after `accelerate`: the real package is the oracle."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

host = pytest.importorskip("sae_lens", reason="SAELens is not installed; make test-compat installs it")

from sae_lens.config import SAETrainerConfig  # noqa: E402
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput  # noqa: E402
from sae_lens.training.sae_trainer import SAETrainer  # noqa: E402

from aksae_kernels.integrations import accelerate, deaccelerate, sparse  # noqa: E402
from aksae_kernels.integrations.adam import FastAdam  # noqa: E402
from aksae_kernels.integrations.sae_lens import (  # noqa: E402
    FastBatchTopKTrainingSAE,
    FastJumpReLUSAE,
    FastJumpReLUTrainingSAE,
    FastSAETrainer,
    FastTopKSAE,
    FastTopKTrainingSAE,
    TrainStep,
)

# What the host's own code warns of: it makes COO tensors without saying whether to check them.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),
    # Its standard deviation of an empty batch.
    pytest.mark.filterwarnings(r"ignore:std\(\). degrees of freedom is <= 0"),
]

B, D, F, K = 21, 26, 163, 7
K_AUX = D // 2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOPK = {"topk": (host.TopKTrainingSAE, K), "batchtopk": (host.BatchTopKTrainingSAE, 6.3)}
JUMPRELU = {
    "jumprelu_init_threshold": 1.2,
    "jumprelu_bandwidth": 0.4,
    "l0_coefficient": 0.3,
    "target_l0": 5.0,
    "pre_act_loss_coefficient": 0.1,
}
SPARSE = {"topk": {"k": K}, "batchtopk": {"k": 6.3}, "jumprelu": JUMPRELU}
TRAINING = {**{name: cls for name, (cls, _) in TOPK.items()}, "jumprelu": host.JumpReLUTrainingSAE}
INFERENCE = {"topk": host.TopKSAE, "jumprelu": host.JumpReLUSAE}


def config_class(sae_class: type) -> type:
    return getattr(host, f"{sae_class.__name__}Config")


def build(sae_class: type, *, dtype: str = "float64", seed: int = 0, **options):
    """An SAE whose parameters are all different from each other and from 0."""
    torch.manual_seed(seed)
    sae = sae_class(config_class(sae_class)(**{"d_in": D, "d_sae": F, "dtype": dtype, **options}))
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name == "threshold":
                parameter.copy_(1.2 + 0.3 * torch.rand_like(parameter))
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
        # As after a while of training: decoder rows of different lengths.
        sae.W_dec.mul_(0.5 + torch.rand(sae.W_dec.shape[0], 1))
    return sae


def training_sae(name: str, **options):
    return build(TRAINING[name], **{**SPARSE[name], **options})


def inference_sae(name: str, **options):
    sae = build(INFERENCE[name], **({"k": K, **options} if name == "topk" else options))
    if name == "jumprelu":
        # So few fire that the scores of all latents are not kept.
        sae.threshold.data += 2.5
    return sae


def accelerated(sae):
    """An accelerated twin. No deep copy: closures that normalise and reshape stay with the SAE they were made for."""
    twin = type(sae)(copy.deepcopy(sae.cfg))
    twin.load_state_dict(sae.state_dict())
    for name, parameter in sae.named_parameters():
        twin.get_parameter(name).requires_grad_(parameter.requires_grad)
    return accelerate(twin)


def inputs(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, D, dtype=torch.float64, generator=generator).to(dtype)


def dead_mask(n_dead: int, seed: int = 2) -> Tensor:
    mask = torch.zeros(F, dtype=torch.bool)
    mask[torch.randperm(F, generator=torch.Generator().manual_seed(seed))[:n_dead]] = True
    return mask


def train_step(sae, x: Tensor, dead: Tensor | None = None) -> TrainStepOutput:
    output = sae.training_forward_pass(TrainStepInput(x, {"l0": 0.3}, dead, 0, False))
    output.loss.backward()
    return output


def assert_close(actual: Tensor, expected: Tensor, name: str, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(
        actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda message: f"{name}: {message}"
    )


def assert_same_gradients(fast, sae, tolerance: float = 1e-10) -> None:
    for name, parameter in sae.named_parameters():
        # The host holds thresholds, and sums their gradient, in fp32.
        close = 1e-6 if parameter.dtype == torch.float32 else tolerance
        assert_close(fast.get_parameter(name).grad, parameter.grad, f"gradient of {name}", close)


def assert_same_step(fast, sae, x: Tensor, dead: Tensor | None = None) -> tuple[TrainStepOutput, TrainStepOutput]:
    """One training step of each agrees in all that it hands out and leaves behind."""
    expected, actual = train_step(sae, x, dead), train_step(fast, x, dead)
    assert actual.losses.keys() == expected.losses.keys()
    for name, loss in expected.losses.items():
        assert_close(actual.losses[name], loss, name)
    assert_close(actual.loss, expected.loss, "loss")
    assert_close(actual.sae_out, expected.sae_out, "sae_out")
    assert actual.sae_in is x
    assert_close(actual.feature_acts.to_dense(), expected.feature_acts.to_dense(), "feature_acts")
    assert_close(actual.hidden_pre, expected.hidden_pre, "hidden_pre")
    assert actual.metrics.keys() == expected.metrics.keys()
    for name, metric in expected.metrics.items():
        assert_close(actual.metrics[name], metric, name)
    assert_same_gradients(fast, sae)
    return actual, expected


# ------------------------------------------------------------------------------------------------ training steps


@pytest.mark.parametrize("shape", [(B,), (3, 5)], ids=str)
@pytest.mark.parametrize("n_dead", [None, 0, 1, K_AUX - 1, K_AUX, K_AUX + 1, F])
@pytest.mark.parametrize("apply_b_dec", [True, False], ids=["b_dec", "no-b_dec"])
@pytest.mark.parametrize("rescale", [True, False], ids=["rescaled", "plain"])
@pytest.mark.parametrize("name", TOPK)
def test_a_training_step_of_topk(name, rescale, apply_b_dec, n_dead, shape):
    sae = training_sae(name, rescale_acts_by_decoder_norm=rescale, apply_b_dec_to_input=apply_b_dec)
    dead = None if n_dead is None else dead_mask(n_dead)
    actual, expected = assert_same_step(accelerated(sae), sae, inputs(*shape), dead)
    assert isinstance(actual, TrainStep)
    assert bool(expected.losses["auxiliary_reconstruction_loss"]) == bool(n_dead)


@pytest.mark.parametrize("shape", [(B,), (3, 5)], ids=str)
@pytest.mark.parametrize("n_dead", [None, 0, 9, F])
@pytest.mark.parametrize("to_input", [False, True], ids=["to-threshold", "to-input"])
@pytest.mark.parametrize("mode", ["step", "quadratic", "tanh"])
def test_a_training_step_of_jumprelu(mode, to_input, n_dead, shape):
    sae = training_sae("jumprelu", jumprelu_sparsity_loss_mode=mode, jumprelu_ste_to_input=to_input)
    dead = None if n_dead is None else dead_mask(n_dead)
    actual, expected = assert_same_step(accelerated(sae), sae, inputs(*shape), dead)
    assert isinstance(actual, TrainStep)
    assert bool(expected.losses["pre_act_loss"]) == bool(n_dead)
    # Entries on both sides of their thresholds teach them, more than are active.
    near = (expected.hidden_pre - sae.threshold).abs() < 0.5 * sae.bandwidth
    assert (near & (expected.hidden_pre <= sae.threshold)).any()
    if not n_dead:
        assert (sae.threshold.grad != 0).equal(near.flatten(0, -2).any(0))


def test_jumprelu_without_its_loss_of_dead_latents():
    sae = training_sae("jumprelu", pre_act_loss_coefficient=None)
    actual, _ = assert_same_step(accelerated(sae), sae, inputs(B), dead_mask(9))
    assert set(actual.losses) == {"mse_loss", "l0_loss"}


def test_thresholds_below_zero_are_projected_before_a_step_and_used_as_they_are_outside():
    sae = training_sae("jumprelu")
    sae.threshold.data[: F // 8] = -0.2
    # So that few latents pass, some of them with negative activations.
    sae.b_enc.data[: F // 8] -= 0.5
    fast = accelerated(sae)
    x = inputs(B)
    acts = sae.encode(x)
    assert (acts < 0).any()
    assert_close(fast.encode(x), acts, "activations")
    assert_same_step(fast, sae, x)
    assert fast.threshold.min() == 0
    assert_close(fast.threshold, sae.threshold, "threshold")


def test_where_most_latents_fire_the_host_runs():
    sae = training_sae("jumprelu")
    sae.threshold.data.zero_()
    actual, _ = assert_same_step(accelerated(sae), sae, inputs(B), dead_mask(9))
    assert type(actual) is TrainStepOutput


@pytest.mark.parametrize("name", TRAINING)
def test_a_step_after_a_step_adds_to_the_gradients(name):
    sae = training_sae(name)
    fast = accelerated(sae)
    for seed in range(2):
        assert_same_step(fast, sae, inputs(B, seed=seed), dead_mask(20))


@pytest.mark.parametrize("name", TRAINING)
def test_gradients_reach_the_input(name):
    sae = training_sae(name)
    x, y = inputs(B).requires_grad_(), inputs(B).requires_grad_()
    train_step(sae, x, dead_mask(9))
    train_step(accelerated(sae), y, dead_mask(9))
    assert_close(y.grad, x.grad, "gradient of the input")


@pytest.mark.parametrize("name", TRAINING)
@pytest.mark.parametrize("wanted", ["W_enc", "W_dec", "b_enc", "b_dec"])
def test_one_parameter_alone_learns(name, wanted):
    sae = training_sae(name)
    for parameter_name, parameter in sae.named_parameters():
        parameter.requires_grad_(parameter_name == wanted)
    fast = accelerated(sae)
    train_step(sae, inputs(B), dead_mask(9))
    train_step(fast, inputs(B), dead_mask(9))
    assert_close(fast.get_parameter(wanted).grad, sae.get_parameter(wanted).grad, wanted)
    assert sum(parameter.grad is not None for parameter in fast.parameters()) == 1


@pytest.mark.parametrize("rescale", [True, False], ids=["rescaled", "plain"])
@pytest.mark.parametrize("name", TOPK)
def test_feature_acts_carry_the_gradient_of_the_host(name, rescale):
    sae = training_sae(name, rescale_acts_by_decoder_norm=rescale)
    fast = accelerated(sae)
    weights = torch.randn(B, F, dtype=torch.float64)
    for model in (sae, fast):
        output = model.training_forward_pass(TrainStepInput(inputs(B), {}, None, 0, False))
        (output.feature_acts.to_dense() * weights).sum().backward()
    for parameter in ("W_enc", "b_enc", "b_dec", *(["W_dec"] if rescale else [])):
        assert_close(fast.get_parameter(parameter).grad, sae.get_parameter(parameter).grad, parameter)


@pytest.mark.parametrize("name", TRAINING)
def test_rows_that_lack_positives(name):
    """A latent picked at 0 or below has not fired."""
    sae = training_sae(name)
    x = inputs(B)
    with torch.no_grad():
        sae.b_enc.sub_(4)
        sae.b_enc[:5].add_(4)
    actual, _ = assert_same_step(accelerated(sae), sae, x, dead_mask(9))
    n_active = actual.feature_acts.to_dense().count_nonzero(-1)
    assert n_active.min() < 4
    assert actual.feature_acts.bool().sum() == n_active.sum()


@pytest.mark.parametrize("name", TOPK)
def test_a_whole_batch_without_positives(name):
    sae = training_sae(name)
    sae.b_enc.data.sub_(100)
    actual, _ = assert_same_step(accelerated(sae), sae, inputs(B), dead_mask(9))
    assert actual.feature_acts._nnz() == 0


@pytest.mark.parametrize("name", TRAINING)
def test_an_empty_batch(name):
    sae = training_sae(name)
    assert_same_step(accelerated(sae), sae, inputs(0), dead_mask(9))


@pytest.mark.parametrize("name", TRAINING)
def test_nan_surfaces(name):
    x = inputs(B)
    x[3, 0] = torch.nan
    output = train_step(accelerated(training_sae(name)), x)
    assert output.loss.isnan()
    assert output.sae_out.isnan().all(-1)[3]
    if name != "batchtopk":
        assert output.sae_out.isnan().any(-1).sum() == 1


@pytest.mark.parametrize("name", TRAINING)
def test_one_row_may_take_most_of_a_batch(name):
    sae = training_sae(name)
    x = 0.01 * inputs(8 * B)
    x[5] *= 10_000
    fast = accelerated(sae)
    assert_same_step(fast, sae, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_dead", [0, 40])
@pytest.mark.parametrize("name", TRAINING)
def test_lower_precision_loses_no_more_than_the_host_does(name, n_dead, dtype):
    """Losses and gradients against fp64; the host's own error is the measure."""
    exact = training_sae(name)
    # Everything is a number of the lower precision, so that all three compute the same.
    exact = exact.to(DTYPES[dtype]).to(torch.float64)
    sae = copy.deepcopy(exact).to(DTYPES[dtype])
    fast = accelerated(sae)
    x = inputs(200, dtype=DTYPES[dtype])
    dead = dead_mask(n_dead)
    outputs = [train_step(model, rows, dead) for model, rows in ((exact, x.double()), (sae, x), (fast, x))]
    eps = torch.finfo(DTYPES[dtype]).eps

    def assert_accurate(oracle: Tensor, theirs: Tensor, ours: Tensor, what: str) -> None:
        assert ours.dtype == theirs.dtype, what
        theirs, ours = ((value.double() - oracle).norm() / oracle.norm() for value in (theirs, ours))
        assert ours <= 2 * theirs + eps, f"{what}: {ours:.2g}, the host's {theirs:.2g}"

    for loss in outputs[0].losses:
        if outputs[0].losses[loss]:
            assert_accurate(*(output.losses[loss].detach() for output in outputs), loss)
    for parameter in ("W_enc", "W_dec", "b_enc", "b_dec"):
        assert_accurate(*(model.get_parameter(parameter).grad for model in (exact, sae, fast)), parameter)


@pytest.mark.parametrize("name", TRAINING)
def test_under_autocast(name):
    sae = training_sae(name, dtype="float32").to(torch.bfloat16).to(torch.float32)
    fast = accelerated(sae)
    x = inputs(200, dtype=torch.bfloat16).float()
    exact = train_step(copy.deepcopy(sae), x, dead_mask(40)).loss.detach()
    outputs = []
    for model in (sae, fast):
        with torch.autocast("cpu", torch.bfloat16):
            output = model.training_forward_pass(TrainStepInput(x, {"l0": 0.3}, dead_mask(40), 0, False))
        output.loss.backward()
        outputs.append(output)
    expected, actual = outputs
    assert (actual.loss - exact).abs() <= 2 * (expected.loss - exact).abs() + 2**-8 * exact
    assert actual.sae_out.dtype == expected.sae_out.dtype
    for parameter_name, parameter in sae.named_parameters():
        ours = fast.get_parameter(parameter_name).grad
        assert ours.dtype == parameter.grad.dtype
        assert torch.cosine_similarity(ours.flatten(), parameter.grad.flatten(), dim=0) > 0.98, parameter_name


@pytest.mark.parametrize("name", TRAINING)
def test_the_input_is_cast_to_the_dtype_of_the_sae(name):
    sae = training_sae(name, dtype="float32")
    fast = accelerated(sae)
    x = inputs(B)
    expected, actual = (
        model.training_forward_pass(TrainStepInput(x, {"l0": 0.3}, None, 0, False)) for model in (sae, fast)
    )
    assert actual.sae_out.dtype == torch.float32
    torch.testing.assert_close(actual.loss, expected.loss)
    torch.testing.assert_close(fast.encode(x), sae.encode(x))


def test_hidden_pre_is_that_of_the_weights_when_it_is_read():
    sae = training_sae("topk")
    fast = accelerated(sae)
    output = train_step(fast, inputs(B))
    with torch.no_grad():
        for model in (sae, fast):
            model.b_enc.add_(1)
    assert_close(output.hidden_pre, sae.encode_with_hidden_pre(inputs(B))[1], "hidden_pre")
    assert output.hidden_pre is output.hidden_pre


@pytest.mark.parametrize("n_dead", [0, K_AUX, 50, F])
@pytest.mark.parametrize("name", TRAINING)
def test_a_training_step_makes_no_dense_activations(name, n_dead, largest):
    sae = training_sae(name, d_sae=10 * F)
    sae.threshold.data.fill_(2.0) if name == "jumprelu" else None
    dead = torch.zeros(10 * F, dtype=torch.bool)
    dead[:n_dead] = True
    elements = {}
    for model in (sae, accelerated(sae)):
        with largest() as mode:
            train_step(model, inputs(8 * B), dead)
        elements[type(model)] = mode.elements
    n_rows, d_sae = 8 * B, 10 * F
    assert elements.pop(type(sae)) == n_rows * d_sae
    # Weights and codes are all there is.
    assert elements.popitem()[1] <= max(d_sae * D, n_rows * d_sae // 8)


# --------------------------------------------------------------------------------------------- where the host is wrong


@pytest.mark.parametrize("rescale", [True, False], ids=["rescaled", "plain"])
def test_sparse_activations(rescale):
    """On CPUs the host cannot differentiate a COO tensor times a vector: its option fails with its own default."""
    sae = training_sae("topk", rescale_acts_by_decoder_norm=rescale, use_sparse_activations=True)
    dense = training_sae("topk", rescale_acts_by_decoder_norm=rescale)
    dead = dead_mask(9)
    if rescale:
        with pytest.raises((RuntimeError, NotImplementedError)):
            train_step(sae, inputs(B), dead)
        sae.zero_grad()
    fast = accelerated(sae)
    train_step(dense, inputs(B), dead)
    train_step(fast, inputs(B), dead)
    assert_same_gradients(fast, dense)
    acts = fast.encode(inputs(B))
    assert acts.is_sparse
    assert_close(acts.to_dense(), dense.encode(inputs(B)), "activations")
    fast.zero_grad()
    dense.zero_grad()
    for model in (fast, dense):
        model.decode(model.encode(inputs(B))).square().sum().backward()
    assert_same_gradients(fast, dense)


def test_a_decoder_row_of_zeros():
    """The host multiplies 0 by 1 / |W_dec[f]|, and everything is NaN."""
    sae = training_sae("topk")
    sae.W_dec.data[4] = 0
    x = inputs(B)
    assert sae(x).isnan().all()
    fast = accelerated(sae)
    sae.W_dec.data[4] = 1e-9  # far from being chosen, and as good as 0 in what is decoded
    assert_close(fast(x), sae(x), "output")
    assert not train_step(fast, x).loss.isnan()


# ---------------------------------------------------------------------------------------------------------- inference

OPTIONS = {
    "default": {},
    "no-b_dec": {"apply_b_dec_to_input": False},
    "layer_norm": {"normalize_activations": "layer_norm"},
    "constant_norm": {"normalize_activations": "constant_norm_rescale"},
    "expected_average": {"normalize_activations": "expected_average_only_in"},
    "rescaled": {"rescale_acts_by_decoder_norm": True},
}


@pytest.mark.parametrize("shape", [(), (B,), (0,), (3, 5)], ids=str)
@pytest.mark.parametrize(
    ("name", "options"),
    [(name, options) for name in INFERENCE for options in OPTIONS if (name, options) != ("jumprelu", "rescaled")],
)
def test_inference(name, options, shape):
    sae = inference_sae(name, **OPTIONS[options])
    fast = accelerated(sae)
    x = inputs(*shape)
    with torch.no_grad():
        acts = sae.encode(x)
        assert_close(fast.encode(x), acts, "encode")
        assert_close(fast.decode(acts), sae.decode(acts), "decode")
        assert_close(fast(x), sae(x), "forward")
    # With gradients, of the input as well.
    grads = []
    for model in (sae, fast):
        rows = x.clone().requires_grad_()
        model(rows).square().sum().backward()
        grads.append(rows.grad)
    assert_close(grads[1], grads[0], "gradient of the input")
    for parameter_name, parameter in sae.named_parameters():
        if parameter_name != "threshold":
            assert_close(fast.get_parameter(parameter_name).grad, parameter.grad, parameter_name)


@pytest.mark.parametrize("name", INFERENCE)
def test_encode_then_decode_with_gradients(name):
    sae = inference_sae(name)
    fast = accelerated(sae)
    for model in (sae, fast):
        model.decode(model.encode(inputs(B))).square().sum().backward()
    for parameter_name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        expected = sae.get_parameter(parameter_name).grad
        assert_close(fast.get_parameter(parameter_name).grad, expected, parameter_name)


@pytest.mark.parametrize("rescale", [True, False], ids=["rescaled", "plain"])
@pytest.mark.parametrize("kind", ["few", "negative", "many", "nan", "learning"])
def test_decode_reads_any_activations(kind, rescale):
    sae = inference_sae("topk", rescale_acts_by_decoder_norm=rescale)
    fast = accelerated(sae)
    acts = torch.zeros(B, F, dtype=torch.float64)
    acts[:, ::40] = torch.rand(B, len(range(0, F, 40)), dtype=torch.float64)
    if kind == "negative":
        acts[2, 5] = -1
    elif kind == "many":
        acts[2] = 1
    elif kind == "nan":
        acts[2, 5] = torch.nan
    results = []
    for model in (sae, fast):
        given = acts.clone().requires_grad_(kind == "learning")
        out = model.decode(given)
        out.square().sum().backward()
        results.append((out, given.grad, model.W_dec.grad))
    for name, expected, actual in zip(("output", "acts", "W_dec"), *results):
        if expected is not None:
            assert_close(actual, expected, name)


@pytest.mark.parametrize("name", INFERENCE)
def test_where_most_latents_fire_inference_is_the_hosts(name):
    sae = inference_sae(name, **({"k": F - 3} if name == "topk" else {}))
    if name == "jumprelu":
        sae.threshold.data.fill_(-1.0)
    assert_close(accelerated(sae)(inputs(B)), sae(inputs(B)), "forward")


@pytest.mark.parametrize("threshold", [torch.inf, -torch.inf, torch.nan, -0.3])
def test_odd_thresholds(threshold):
    sae = inference_sae("jumprelu")
    sae.threshold.data[::40] = threshold
    fast = accelerated(sae)
    assert_close(fast.encode(inputs(B)), sae.encode(inputs(B)), "encode")
    assert_close(fast(inputs(B)), sae(inputs(B)), "forward")


@pytest.mark.parametrize("name", INFERENCE)
def test_heads_are_reshaped(name):
    sae = inference_sae(name, reshape_activations="hook_z")
    fast = accelerated(sae)
    x = torch.randn(3, 5, 2, D // 2, dtype=torch.float64)
    assert fast(x).shape == x.shape
    assert_close(fast(x), sae(x), "forward")
    assert_close(fast.encode(x), sae.encode(x), "encode")


@pytest.mark.parametrize("name", [*INFERENCE, "training"])
def test_the_error_term(name):
    sae = training_sae("topk") if name == "training" else inference_sae(name)
    fast = accelerated(sae)
    x = inputs(B)
    for model in (sae, fast):
        with pytest.warns(DeprecationWarning, match="use_error_term"):
            model.use_error_term = True
        handle = model.hook_sae_acts_post.register_forward_hook(lambda _module, _inputs, acts: 2 * acts)
        assert not torch.allclose(model(x), x)
        handle.remove()
    assert_close(fast(x), x, "forward")


@pytest.mark.parametrize("name", TRAINING)
def test_inference_of_training_saes(name):
    sae = training_sae(name)
    fast = accelerated(sae)
    x = inputs(3, 5)
    assert_close(fast.encode(x), sae.encode(x), "encode")
    assert_close(fast(x), sae(x), "forward")
    for actual, expected in zip(fast.encode_with_hidden_pre(x), sae.encode_with_hidden_pre(x)):
        assert_close(actual, expected, "encode_with_hidden_pre")


# -------------------------------------------------------------------------------------------------------------- hooks

POINTS = ["hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons", "hook_sae_output"]


@pytest.mark.parametrize("point", [*POINTS, "activation_fn"])
@pytest.mark.parametrize("name", [*INFERENCE, "training"])
def test_hooks_see_and_change_what_they_do_in_the_host(name, point):
    if (name, point) == ("jumprelu", "activation_fn"):
        change = lambda _module, _inputs, value: value + 1
    else:
        change = lambda _module, _inputs, value: 1.5 * value
    sae = training_sae("topk") if name == "training" else inference_sae(name)
    fast = accelerated(sae)
    x = inputs(B)
    seen = []
    for model in (sae, fast):
        before = model(x)
        calls = []
        getattr(model, point).register_forward_hook(change)
        getattr(model, point).register_forward_hook(lambda _module, _inputs, value, calls=calls: calls.append(value))
        with torch.no_grad():
            seen.append((model(x), calls))
        assert not torch.allclose(before, seen[-1][0])
    (expected, theirs), (actual, ours) = seen
    assert_close(actual, expected, "forward")
    assert len(theirs) == len(ours) == 1
    assert_close(ours[0], theirs[0], point)


@pytest.mark.parametrize("point", POINTS[:4])
@pytest.mark.parametrize("name", TRAINING)
def test_hooks_in_a_training_step(name, point):
    sae = training_sae(name)
    for direction in ("fwd", "bwd"):
        fast = accelerated(sae)
        theirs, ours = [], []
        sae.add_hook(point, lambda value, hook, seen=theirs: seen.append(value), dir=direction)
        fast.add_hook(point, lambda value, hook, seen=ours: seen.append(value), dir=direction)
        assert_same_step(fast, sae, inputs(B).requires_grad_(), dead_mask(9))
        assert len(theirs) == len(ours) == 1
        assert_close(ours[0], theirs[0], point)
        sae.reset_hooks()
        sae.zero_grad()


@pytest.mark.parametrize("name", INFERENCE)
def test_run_with_cache(name):
    sae = inference_sae(name)
    fast = accelerated(sae)
    (expected, theirs), (actual, ours) = (model.run_with_cache(inputs(B)) for model in (sae, fast))
    assert_close(actual, expected, "forward")
    assert list(ours) == list(theirs)
    for point in theirs:
        assert_close(ours[point], theirs[point], point)


# ---------------------------------------------------------------------------------------------------- the object itself


@pytest.mark.parametrize("name", TRAINING)
def test_it_is_the_same_object_and_comes_back(name):
    sae = training_sae(name)
    parameters, state = dict(sae.named_parameters()), copy.deepcopy(sae.state_dict())
    fast = accelerate(sae)
    assert fast is sae
    assert isinstance(fast, TRAINING[name])
    assert dict(fast.named_parameters()) == parameters
    assert fast.W_enc.T.is_contiguous()
    assert accelerate(fast) is fast
    for saved in (fast.state_dict(), deaccelerate(fast).state_dict()):
        assert list(saved) == list(state)
        for key, value in state.items():
            assert torch.equal(saved[key], value), key
            assert saved[key].is_contiguous()
    assert type(sae) is TRAINING[name]
    assert all(parameter.is_contiguous() for parameter in sae.parameters())


@pytest.mark.parametrize("name", TRAINING)
def test_constructed_directly(name):
    fast_class = type(accelerated(training_sae(name)))
    sae = training_sae(name)
    fast = fast_class(sae.cfg)
    fast.load_state_dict(sae.state_dict())
    assert_same_step(fast, sae, inputs(B), dead_mask(9))
    assert fast.W_enc.T.is_contiguous()


@pytest.mark.parametrize("name", TRAINING)
def test_a_deep_copy_is_its_own(name):
    sae = training_sae(name)
    fast = copy.deepcopy(accelerated(sae))
    other = copy.deepcopy(fast)
    other.b_enc.data.zero_()
    assert_same_step(fast, sae, inputs(B), dead_mask(9))


def test_k_may_change_between_steps():
    sae = training_sae("topk")
    fast = accelerated(sae)
    for model in (sae, fast):
        model.activation_fn.k = 3
    actual, _ = assert_same_step(fast, sae, inputs(B))
    assert actual.feature_acts._nnz() == 3 * B


def test_what_is_refused():
    sae = training_sae("topk")
    sae.activation_fn = torch.nn.ReLU()
    with pytest.raises(ValueError, match="activation_fn that is not TopK, but ReLU"):
        accelerate(sae)
    standard = host.StandardTrainingSAE(host.StandardTrainingSAEConfig(d_in=D, d_sae=F))
    with pytest.raises(TypeError, match=r"StandardTrainingSAE; there are .*sae_lens: TopKSAE"):
        accelerate(standard)
    for unsupported in (sae, standard):
        with pytest.raises(ValueError, match="SAETrainer with an"):
            accelerate(trainer(unsupported))


def test_an_activation_function_set_later_is_the_hosts_business():
    sae = training_sae("topk")
    fast = accelerated(sae)
    for model in (sae, fast):
        model.activation_fn = torch.nn.ReLU()
    actual, _ = assert_same_step(fast, sae, inputs(B))
    assert type(actual) is TrainStepOutput


@pytest.mark.parametrize("kind", ["constant_norm_rescale", "layer_norm"])
@pytest.mark.parametrize("name", TOPK)
def test_normalisation_and_the_auxiliary_loss_exclude_each_other(name, kind):
    sae = training_sae(name, normalize_activations=kind)
    fast = accelerated(sae)
    assert_same_step(fast, sae, inputs(B), dead_mask(0))
    for model in (sae, fast):
        with pytest.raises(ValueError, match="normal"):
            train_step(model, inputs(B), dead_mask(9))


# ---------------------------------------------------------------------------------------------------------------- files


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("rescale", [True, False], ids=["rescaled", "plain"])
@pytest.mark.parametrize("name", TRAINING)
def test_saved_files_are_the_same(name, rescale, tmp_path):
    options = {} if name == "jumprelu" else {"rescale_acts_by_decoder_norm": rescale}
    sae = training_sae(name, dtype="float32", **options)
    fast = accelerated(sae)
    for model in (sae, fast):
        folder = tmp_path / type(model).__name__
        model.save_model(folder / "training")
        model.save_inference_model(folder / "inference")
        model.fold_activation_norm_scaling_factor(1.7)
        if name == "jumprelu" or rescale:
            model.fold_W_dec_norm()
        model.save_model(folder / "folded")
    for kind in ("training", "inference", "folded"):
        theirs, ours = files(tmp_path / type(sae).__name__ / kind), files(tmp_path / type(fast).__name__ / kind)
        assert set(theirs) == {"cfg.json", "sae_weights.safetensors"}
        assert ours == theirs, kind


@pytest.mark.parametrize("name", TRAINING)
def test_saved_weights_are_loaded_and_accelerated(name, tmp_path):
    sae = training_sae(name, dtype="float32")
    accelerated(sae).save_model(tmp_path / "training")
    accelerated(sae).save_inference_model(tmp_path / "inference")
    again = host.TrainingSAE.load_from_disk(tmp_path / "training").to(torch.float64)
    assert type(again) is TRAINING[name]
    assert_same_step(accelerated(again), again, inputs(B), dead_mask(9))
    inference = host.SAE.load_from_disk(tmp_path / "inference")
    fast = accelerated(inference)
    x = inputs(B, dtype=torch.float32)
    torch.testing.assert_close(fast.encode(x), inference.encode(x))
    torch.testing.assert_close(fast(x), inference(x))


@pytest.mark.parametrize(
    ("fast_class", "name"),
    [
        (FastTopKTrainingSAE, "topk"),
        (FastBatchTopKTrainingSAE, "batchtopk"),
        (FastJumpReLUTrainingSAE, "jumprelu"),
        (FastTopKSAE, "topk"),
        (FastJumpReLUSAE, "batchtopk"),
    ],
)
def test_accelerated_classes_load_what_their_hosts_load(fast_class, name, tmp_path):
    sae = training_sae(name, dtype="float32")
    sae.save_model(tmp_path) if issubclass(fast_class, host.TrainingSAE) else sae.save_inference_model(tmp_path)
    fast, slow = fast_class.load_from_disk(tmp_path), fast_class.host_class.load_from_disk(tmp_path)
    assert type(fast) is fast_class
    x = inputs(B, dtype=torch.float32)
    torch.testing.assert_close(fast(x), slow(x))
    assert fast.W_enc.T.is_contiguous()


# -------------------------------------------------------------------------------------------------------------- trainer


def batches(seed: int = 3) -> Iterator[Tensor]:
    """Sums of a few directions, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(3 * D, D, generator=generator)
    while True:
        strengths = torch.rand(64, 3 * D, generator=generator) * (torch.rand(64, 3 * D, generator=generator) < 0.05)
        yield strengths @ directions


def trainer(sae, steps: int = 50, **options) -> SAETrainer:
    config = SAETrainerConfig(
        total_training_samples=64 * steps,
        train_batch_size_samples=64,
        lr=3e-3,
        lr_end=3e-4,
        lr_scheduler_name="cosineannealing",
        lr_warm_up_steps=5,
        lr_decay_steps=5,
        dead_feature_window=4,
        feature_sampling_window=20,
        n_batches_for_norm_estimate=3,
        **options,
    )
    return SAETrainer(config, sae, batches())


def curve(fitted: SAETrainer, monkeypatch) -> tuple[list[dict[str, float]], list[bool]]:
    """What the trainer would log of each of its steps, and whether the step was ours."""
    log, is_sparse = [], []
    step = type(fitted).step

    def logged(self, batch):
        output = step(self, batch)
        log.append(self.build_train_step_log_dict(output, self.n_training_samples))
        is_sparse.append(isinstance(output, TrainStep))
        return output

    with monkeypatch.context() as patch:
        patch.setattr(type(fitted), "step", logged)
        fitted.fit()
    return log, is_sparse


@pytest.mark.parametrize("normalize", ["none", "expected_average_only_in", "covariance_whitening"])
@pytest.mark.parametrize("name", TRAINING)
def test_the_trainer_takes_fifty_steps_along_the_same_curve(name, normalize, monkeypatch):
    # Of 163 latents, more than one in sixteen fire.
    monkeypatch.setattr(sparse, "_CROWD", 8)
    sae = training_sae(name, dtype="float32", normalize_activations=normalize)
    fast = copy.deepcopy(sae)
    slow_trainer, fast_trainer = trainer(sae), accelerate(trainer(fast))
    assert isinstance(fast_trainer, SAETrainer)
    assert type(fast_trainer.optimizer) is FastAdam
    (expected, _), (actual, is_sparse) = curve(slow_trainer, monkeypatch), curve(fast_trainer, monkeypatch)
    assert len(actual) == len(expected) == 50
    assert all(is_sparse)
    assert expected[-1]["losses/mse_loss"] < 0.8 * expected[0]["losses/mse_loss"]
    # Both branches of what is done about dead latents have run.
    assert {0} < {step["sparsity/dead_features"] for step in expected}
    for theirs, ours in zip(expected, actual):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            # Rounding decides a tie here and there, which a loss curve forgets and a single count does not.
            slack = 1e-2 if key.startswith(("losses", "metrics")) else 0.05
            assert ours[key] == pytest.approx(value, rel=slack, abs=slack), key
    torch.testing.assert_close(fast_trainer.act_freq_scores, slow_trainer.act_freq_scores, rtol=0.02, atol=2)
    assert fast_trainer.n_frac_active_samples == slow_trainer.n_frac_active_samples
    assert fast.cfg.metadata.l0 == pytest.approx(sae.cfg.metadata.l0, rel=1e-3)
    torch.testing.assert_close(fast.W_dec, sae.W_dec, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", TRAINING)
def test_the_books_of_the_trainer_are_the_same(name):
    """In fp64 nothing is left to rounding."""
    sae = training_sae(name)
    fast = copy.deepcopy(sae)
    slow_trainer, fast_trainer = trainer(sae), accelerate(trainer(fast))
    for x in (next(slow_trainer.data_provider).double() for _ in range(12)):
        outputs = [each.step(x) for each in (slow_trainer, fast_trainer)]
        assert_close(outputs[1].loss, outputs[0].loss, "loss", 1e-6)
    assert slow_trainer.dead_neurons.any()
    for book in ("n_forward_passes_since_fired", "act_freq_scores", "dead_neurons"):
        assert torch.equal(getattr(fast_trainer, book), getattr(slow_trainer, book)), book
    for parameter_name, parameter in sae.named_parameters():
        assert_close(fast.get_parameter(parameter_name), parameter, parameter_name, 1e-5)


def test_with_autocast():
    sae = training_sae("topk", dtype="float32")
    fast = copy.deepcopy(sae)
    losses = {}
    for each in (trainer(sae, autocast=True), accelerate(trainer(fast, autocast=True))):
        each.n_training_samples = 0
        losses[type(each)] = torch.stack([each.step(next(each.data_provider)).loss.detach() for _ in range(50)])
    expected, actual = losses.values()
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.0)


@pytest.mark.parametrize("fast_first", [True, False], ids=["fast-then-slow", "slow-then-fast"])
@pytest.mark.parametrize("name", TRAINING)
def test_work_moves_between_host_and_accelerated(name, fast_first, tmp_path):
    """A checkpoint of one is resumed by the other."""
    straight = trainer(training_sae(name))
    first = trainer(training_sae(name), checkpoint_path=str(tmp_path))
    first = accelerate(first) if fast_first else first
    data = [next(straight.data_provider).double() for _ in range(10)]
    for x in data:
        straight.step(x)
    for x in data[:5]:
        first.step(x)
    first.save_checkpoint("half")
    second = trainer(host.TrainingSAE.load_from_disk(tmp_path / "half"))
    second.load_trainer_state(tmp_path / "half")
    second = second if fast_first else accelerate(second)
    for x in data[5:]:
        second.step(x)
    for parameter_name, parameter in straight.sae.named_parameters():
        assert_close(second.sae.get_parameter(parameter_name), parameter, parameter_name, 1e-5)


@pytest.mark.parametrize("name", TRAINING)
def test_a_trainer_goes_back_in_the_middle(name):
    straight, moving = trainer(training_sae(name)), trainer(training_sae(name))
    data = [next(straight.data_provider).double() for _ in range(9)]
    for i, x in enumerate(data):
        if i % 3 == 1:
            accelerate(moving)
        elif i % 3 == 2:
            deaccelerate(moving)
        assert_close(moving.step(x).loss, straight.step(x).loss, f"loss of step {i}", 1e-6)
    assert type(moving) is SAETrainer
    assert type(moving.sae) is TRAINING[name]
    assert type(moving.optimizer) is torch.optim.Adam
    assert all(parameter.is_contiguous() for parameter in moving.sae.parameters())
    assert all(state["exp_avg"].is_contiguous() for state in moving.optimizer.state.values())


def test_a_trainer_constructed_directly():
    slow_trainer = trainer(training_sae("topk"))
    fast_trainer = FastSAETrainer(slow_trainer.cfg, training_sae("topk"), batches())
    assert type(fast_trainer.sae) is FastTopKTrainingSAE
    assert type(fast_trainer.optimizer) is FastAdam
    x = next(slow_trainer.data_provider).double()
    assert_close(fast_trainer.step(x).loss, slow_trainer.step(x).loss, "loss")


def test_an_sae_that_is_accelerated_already_may_get_a_trainer():
    sae = training_sae("topk", dtype="float32")
    fast = accelerated(sae)
    slow_trainer, fast_trainer = trainer(sae), trainer(fast)
    x = next(slow_trainer.data_provider)
    assert_close(fast_trainer.step(x).loss, slow_trainer.step(x).loss, "loss", 1e-5)
    accelerate(fast_trainer)
    assert_close(fast_trainer.step(x).loss, slow_trainer.step(x).loss, "loss", 1e-5)


@pytest.mark.parametrize("width", [F - 9, 2 * F])
def test_decode_takes_latents_of_its_own_width_only(width):
    sae = accelerate(inference_sae("topk"))
    with torch.no_grad(), pytest.raises(RuntimeError):
        sae.decode(torch.zeros(3, width, dtype=torch.float64))


@pytest.mark.parametrize("name", TOPK)
def test_a_k_of_more_than_all_latents_is_refused_as_by_the_host(name):
    sae = training_sae(name, k=F + 1)
    for one in (sae, accelerated(sae)):
        with pytest.raises((RuntimeError, ValueError)):
            train_step(one, inputs(B))


# torch.compile looks at the gradient of everything it meets, and says where it breaks the graph.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
@pytest.mark.parametrize("name", TRAINING)
def test_a_compiled_step(name):
    torch._dynamo.reset()
    sae = training_sae(name)
    plain, traced = accelerated(sae), accelerated(sae)
    traced.training_forward_pass = torch.compile(traced.training_forward_pass, backend="eager")
    expected, actual = (train_step(one, inputs(B)) for one in (plain, traced))
    assert_close(actual.loss, expected.loss, "loss")
    assert_same_gradients(traced, plain)
    torch._dynamo.reset()


def test_the_output_of_a_step_is_a_dataclass_that_can_be_changed_and_kept():
    sae = accelerated(training_sae("topk"))
    output = train_step(sae, inputs(B))
    hidden_pre = sae.encode_with_hidden_pre(inputs(B))[1]
    assert_close(dataclasses.replace(output, loss=output.loss * 2).hidden_pre, hidden_pre, "hidden_pre")
    with torch.no_grad():
        kept = pickle.loads(pickle.dumps(sae.training_forward_pass(TrainStepInput(inputs(B), {}, None, 0, False))))
    assert_close(kept.hidden_pre, hidden_pre, "hidden_pre")
