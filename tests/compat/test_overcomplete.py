"""overcomplete before and after `accelerate`: the same numbers, by the host's own rules."""

from __future__ import annotations

import contextlib
import copy
import pickle

import pytest
import torch
from torch import nn

from aksae_kernels.integrations import accelerate, deaccelerate

pytest.importorskip("overcomplete.sae", reason="overcomplete is not installed; make test-compat installs it")

from overcomplete.sae import EncoderFactory, RATopKSAE, RelaxedArchetypalDictionary, TopKSAE, mse_l1, train_sae

D, F, K = 12, 83, 7
ROWS = 24
EXACT = {"rtol": 1e-10, "atol": 1e-10}
# The default; those with more layers and normalisations before the ReLU; those tied to the dictionary or once so.
ENCODERS = (None, "linear", "mlp_ln_1", "mlp_ln_3", "mlp_bn_1", "mlp_bn_3", "tied", "untied")
SPARSE = (None, "linear", "tied", "untied")
"""Those whose gradients from the codes are sparse."""


def sae(encoder: str | None = None, dtype: torch.dtype = torch.float64, k: int = K, **dictionary_params) -> TopKSAE:
    torch.manual_seed(0)
    named = None if encoder in ("tied", "untied") else encoder
    made = TopKSAE(D, F, top_k=k, encoder_module=named, dictionary_params=dictionary_params)
    if encoder in ("tied", "untied"):
        getattr(made, encoder)(bias=True)
        nn.init.normal_(made.encoder.bias, std=0.2)
    return made.to(dtype)


def inputs(*lead: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> torch.Tensor:
    return torch.randn(*lead, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_same(got: tuple, expected: tuple, **tolerance) -> None:
    assert len(got) == len(expected)
    for one, other in zip(got, expected):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, equal_nan=True, **tolerance)


# What a criterion may look at, of x, x_hat, pre-codes, codes and dictionary.
CRITERIA = {
    "reconstruction": lambda x, x_hat, pre_codes, codes, dictionary: (x - x_hat).square().mean(),
    "mse_l1": mse_l1,
    "everything": lambda x, x_hat, pre_codes, codes, dictionary: (
        (x - x_hat).square().mean() + pre_codes.sigmoid().mean() + codes.square().mean() + dictionary.abs().mean()
    ),
}


def step(model: nn.Module, criterion: str, x: torch.Tensor) -> tuple:
    """Outputs, loss and every gradient."""
    x = x.clone().requires_grad_()
    pre_codes, codes, x_hat = model(x)
    loss = CRITERIA[criterion](x, x_hat, pre_codes, codes, model.get_dictionary())
    loss.backward()
    return pre_codes, codes, x_hat, loss, x.grad, *(param.grad for param in model.parameters())


@contextlib.contextmanager
def without_dense_methods():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("encode", "forward"):
            patch.delattr(TopKSAE if name in vars(TopKSAE) else TopKSAE.__mro__[1], name)
        yield


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_training_step(encoder, criterion):
    host = sae(encoder)
    fast = accelerate(copy.deepcopy(host))
    expected = step(host, criterion, inputs(ROWS))
    with without_dense_methods():
        assert_same(step(fast, criterion, inputs(ROWS)), expected, **EXACT)
    assert ((expected[1] > 0).sum(-1) == K).all()


@pytest.mark.parametrize("k", [1, 40, F])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_other_k(encoder, k):
    """With k = F there are fewer positive codes than k."""
    host = sae(encoder, k=k)
    fast = accelerate(copy.deepcopy(host))
    assert_same(step(fast, "mse_l1", inputs(ROWS)), step(host, "mse_l1", inputs(ROWS)), **EXACT)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_eval(encoder):
    host = sae(encoder)
    fast = accelerate(copy.deepcopy(host))
    for model in (host, fast):
        model.eval()
    with torch.no_grad():
        assert_same(fast(inputs(ROWS)), host(inputs(ROWS)), **EXACT)
        assert_same(fast.encode(inputs(ROWS)), host.encode(inputs(ROWS)), **EXACT)
        codes = host.encode(inputs(ROWS))[1]
        assert torch.equal(fast.decode(codes), host.decode(codes))


@pytest.mark.parametrize("normalization", ["l2", "max_l2", "l1", "max_l1", "identity"])
@pytest.mark.parametrize("use_multiplier", [False, True])
def test_dictionaries(normalization, use_multiplier):
    host = sae(normalization=normalization, use_multiplier=use_multiplier)
    fast = accelerate(copy.deepcopy(host))
    assert_same(step(fast, "mse_l1", inputs(ROWS)), step(host, "mse_l1", inputs(ROWS)), **EXACT)
    # Normalised once more at every call: the weights themselves, too.
    assert_same(tuple(fast.parameters()), tuple(host.parameters()), **EXACT)


def test_an_archetypal_dictionary():
    host = sae(dtype=torch.float32)
    host.dictionary = RelaxedArchetypalDictionary(D, F, torch.randn(9, D))
    fast = accelerate(copy.deepcopy(host))
    x = inputs(ROWS, dtype=torch.float32)
    assert_same(step(fast, "mse_l1", x), step(host, "mse_l1", x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("lead", [(0,), (1,), (2, 3), ()], ids=str)
def test_leading_shapes(lead):
    """The tied encoder takes any; the default one two dimensions, and says so."""
    host = sae("untied")
    fast = accelerate(copy.deepcopy(host))
    assert_same(fast(inputs(*lead)), host(inputs(*lead)), **EXACT)
    if len(lead) != 1:
        with pytest.raises(AssertionError, match="must have 2 dimensions"):
            accelerate(sae())(inputs(*lead))


@pytest.mark.parametrize("shape", [(3, 5, D), (3, D, 2, 2)], ids=["attention_1b", "resnet_1b"])
def test_encoders_of_tokens_and_images(shape, request):
    torch.manual_seed(0)
    name = request.node.callspec.id
    input_shape = shape[1:] if name == "attention_1b" else (D, 2, 2)
    host = TopKSAE(
        input_shape,
        F,
        top_k=K,
        encoder_module=EncoderFactory.create_module(
            name, input_shape, F, **({"attention_heads": 2} if name == "attention_1b" else {})
        ),
    )
    fast = accelerate(copy.deepcopy(host))
    x = torch.randn(shape)
    assert_same(fast(x), host(x), rtol=1e-5, atol=1e-6)


def test_rows_with_fewer_positive_codes():
    host = sae()
    nn.init.constant_(host.encoder.final_block[0].bias, -1.5)
    fast = accelerate(copy.deepcopy(host))
    expected = step(host, "mse_l1", inputs(ROWS))
    counts = (expected[1] > 0).sum(-1)
    assert (counts == 0).any()
    assert ((counts > 0) & (counts < K)).any()
    assert_same(step(fast, "mse_l1", inputs(ROWS)), expected, **EXACT)


class Signed(nn.Module):
    """An encoder of somebody's own, with negative codes."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, F)

    def forward(self, x):
        codes = self.linear(x)
        return codes, codes - 1


def test_negative_codes_may_be_picked():
    torch.manual_seed(0)
    host = TopKSAE(D, F, top_k=K, encoder_module=Signed())
    fast = accelerate(copy.deepcopy(host))
    x = inputs(ROWS, dtype=torch.float32)
    expected = step(host, "mse_l1", x)
    assert (expected[1] < 0).any()
    assert_same(step(fast, "mse_l1", x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("part", ["encoder", "encoder.final_block.0", "dictionary"])
def test_hooks_see_what_they_saw(part):
    host = sae()
    fast = accelerate(copy.deepcopy(host))
    seen = {}
    for model in (host, fast):
        seen[model] = []
        model.get_submodule(part).register_forward_hook(
            lambda module, args, output, log=seen[model]: log.append(output[1] if part == "encoder" else output)
        )
        model(inputs(ROWS))
    assert len(seen[fast]) == 1
    assert_same(tuple(seen[fast]), tuple(seen[host]), **EXACT)


def test_a_nan_row_surfaces():
    fast = accelerate(sae())
    x = inputs(ROWS)
    x[3] = torch.nan
    _, codes, x_hat = fast(x)
    assert codes[3].isnan().any()
    assert x_hat[3].isnan().all()
    assert not x_hat[:3].isnan().any()


@pytest.mark.parametrize("encoder", SPARSE)
def test_autocast(encoder):
    host = sae(encoder, torch.float32)
    fast = accelerate(copy.deepcopy(host))
    with torch.autocast("cpu", torch.bfloat16):
        for got, expected in zip(fast(inputs(ROWS, dtype=torch.float32)), host(inputs(ROWS, dtype=torch.float32))):
            assert got.dtype == expected.dtype
            # Ranks may differ where codes are within a rounding of each other: of few rows.
            assert ((got - expected).abs().amax(-1) > 0.05).float().mean() < 0.2


@pytest.mark.parametrize("encoder", SPARSE)
def test_gradients_of_the_encoder_are_sparse(encoder):
    """No gradient `[B, F]` but that of the dense codes, and of the pre-codes where a criterion uses them."""
    fast = accelerate(sae(encoder))
    pre_codes, codes, x_hat = fast(inputs(ROWS))
    pre_codes.register_hook(lambda grad: pytest.fail("the pre-codes have a gradient"))
    x_hat.square().sum().backward()
    touched = (codes > 0).any(0)
    weight = fast.encoder.final_block[0].weight if encoder in (None, "linear") else fast.encoder.weight
    if weight is not None:
        assert torch.equal(weight.grad.any(1), touched)


def train(model: nn.Module, batches: torch.Tensor, epochs: int) -> dict:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    logs = train_sae(model, batches, mse_l1, optimizer, nb_epochs=epochs, monitoring=2)
    del logs["time_epoch"]
    return logs


@pytest.mark.parametrize("encoder", [None, "mlp_ln_1", "tied"])
def test_the_hosts_training_loop(encoder, capsys):
    host = sae(encoder)
    fast = accelerate(copy.deepcopy(host))
    batches = torch.stack([inputs(ROWS, seed=seed) for seed in range(10)])
    expected, got = train(host, batches, 5), train(fast, batches, 5)
    assert got.keys() == expected.keys()
    assert len(got["step_loss"]) == 50
    for name in expected:
        assert got[name] == pytest.approx(expected[name], rel=1e-6, abs=1e-9), name
    assert got["step_loss"][-1] != got["step_loss"][0]
    assert_same(tuple(fast.state_dict().values()), tuple(host.state_dict().values()), rtol=1e-6, atol=1e-8)
    assert "Dead Features" in capsys.readouterr().out


def test_there_and_back_and_files(tmp_path):
    host = sae(dtype=torch.float32)
    torch.save(host.state_dict(), tmp_path / "host.pt")
    fast = accelerate(copy.deepcopy(host))
    torch.save(fast.state_dict(), tmp_path / "fast.pt")
    saved, expected = torch.load(tmp_path / "fast.pt"), torch.load(tmp_path / "host.pt")
    assert saved.keys() == expected.keys()
    assert_same(tuple(saved.values()), tuple(expected.values()), rtol=0, atol=0)
    assert [p.stride() for p in fast.parameters()] == [p.stride() for p in host.parameters()]
    x = inputs(ROWS, dtype=torch.float32)
    assert type(deaccelerate(fast)) is TopKSAE
    assert_same(fast(x), host(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    "twin_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies(twin_of):
    fast = accelerate(sae())
    twin = twin_of(fast)
    assert type(twin) is type(fast)
    assert_same(twin(inputs(ROWS)), fast(inputs(ROWS)), rtol=0, atol=0)


def test_the_fast_class_can_be_constructed():
    fast = accelerate(sae())
    torch.manual_seed(0)
    made = type(fast)(D, F, top_k=K).double()
    assert_same(made(inputs(ROWS)), fast(inputs(ROWS)), rtol=0, atol=0)


def test_a_subclass_is_refused():
    with pytest.raises(TypeError, match=r"RATopKSAE, a subclass of .*TopKSAE: .*; there are .*overcomplete: TopKSAE"):
        accelerate(RATopKSAE(D, F, torch.randn(9, D), top_k=K))
