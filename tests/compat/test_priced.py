"""SAEs of other codebases whose latents have a price: the host's own scores and decoder are the oracle."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from aksae_kernels import SparseCodes, price_select, topk_select
from aksae_kernels.integrations import accelerate, deaccelerate, priced

D, F, K, K_MAX, PASSES = 24, 96, 6, 20, 2


class Encoded(NamedTuple):
    """What the rule is about, made by the host's formulas alone."""

    scores: Tensor
    """`[..., F]`, as the host ranks them."""
    W_dec: Tensor
    b_dec: Tensor
    target: Tensor
    scale: Tensor | float = 1.0
    """What the host hands out is scores divided by it."""


class Case(NamedTuple):
    build: Callable[[], nn.Module]
    encoded: Callable[[Any, Tensor], Encoded]
    threshold: str | None = None
    """The attribute that sets the host's own L0."""


# ------------------------------------------------------------------------------------------------------- the hosts


def _sae_lens(kind: str, **options: Any) -> Case:
    def build() -> nn.Module:
        host = pytest.importorskip("sae_lens")
        config = getattr(host, f"{kind}Config")
        return getattr(host, kind)(config(d_in=D, d_sae=F, dtype="float64", **options))

    def encoded(sae: Any, x: Tensor) -> Encoded:
        target = x
        if sae.cfg.normalize_activations == "constant_norm_rescale":
            target = x * (D**0.5 / x.norm(dim=-1, keepdim=True))
        z = target - sae.b_dec if sae.cfg.apply_b_dec_to_input else target
        scores, W_dec = z @ sae.W_enc + sae.b_enc, sae.W_dec
        if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
            norm = W_dec.norm(dim=1)
            scores, W_dec = scores * norm, W_dec / norm[:, None]
        return Encoded(scores, W_dec, sae.b_dec, target)

    return Case(build, encoded, "threshold" if kind.startswith("JumpReLU") else None)


def _dictionary_learning(kind: str, *, centred: bool = True) -> Case:
    def build() -> nn.Module:
        pytest.importorskip("dictionary_learning")
        from dictionary_learning.dictionary import AutoEncoder, JumpReluAutoEncoder
        from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
        from dictionary_learning.trainers.top_k import AutoEncoderTopK

        classes = (AutoEncoder, JumpReluAutoEncoder, BatchTopKSAE, AutoEncoderTopK)
        cls = next(cls for cls in classes if cls.__name__ == kind)
        ae = cls(D, F, K) if "TopK" in kind else cls(D, F)
        if kind == "JumpReluAutoEncoder":
            ae.apply_b_dec_to_input = centred
        return ae.double()

    def encoded(ae: Any, x: Tensor) -> Encoded:
        b_dec = ae.bias if hasattr(ae, "bias") else ae.b_dec
        z = x - b_dec if centred else x
        if hasattr(ae, "W_enc"):
            return Encoded(z @ ae.W_enc + ae.b_enc, ae.W_dec, b_dec, x)
        return Encoded(z @ ae.encoder.weight.T + ae.encoder.bias, ae.decoder.weight.T, b_dec, x)

    return Case(build, encoded, "threshold" if kind in ("JumpReluAutoEncoder", "BatchTopKSAE") else None)


def _sparsify(**options: Any) -> Case:
    def build() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            host = pytest.importorskip("sparsify")
        return host.SparseCoder(D, host.SparseCoderConfig(num_latents=F, k=K, **options), dtype=torch.float64)

    def encoded(coder: Any, x: Tensor) -> Encoded:
        target = x if coder.W_skip is None else x - x @ coder.W_skip.T
        scores = (x - coder.b_dec) @ coder.encoder.weight.T + coder.encoder.bias
        return Encoded(scores, coder.W_dec, coder.b_dec, target)

    return Case(build, encoded)


def _llamascopium(act_fn: str, *, hook_point_out: str = "in", **options: Any) -> Case:
    def build() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pytest.importorskip("llamascopium")
            from llamascopium.models.sae import SAEConfig, SparseAutoEncoder
        options_ = {"d_model": D, "expansion_factor": F / D, "top_k": K, "dtype": torch.float64, **options}
        sae = SparseAutoEncoder(SAEConfig(act_fn=act_fn, hook_point_in="in", hook_point_out=hook_point_out, **options_))
        for name, parameter in sae.named_parameters():
            parameter.data.fill_(0.8) if "threshold" in name else None
        return sae

    def encoded(sae: Any, x: Tensor) -> Encoded:
        scores, W_dec = x @ sae.W_E + sae.b_E, sae.W_D
        if not sae.cfg.sparsity_include_decoder_norm:
            return Encoded(scores, W_dec, sae.b_D, x)
        norm = W_dec.norm(dim=1)
        return Encoded(scores * norm, W_dec / norm[:, None], sae.b_D, x, norm)

    return Case(build, encoded)


def _overcomplete() -> Case:
    def build() -> nn.Module:
        return pytest.importorskip("overcomplete.sae").TopKSAE(D, F, top_k=K).double()

    def encoded(sae: Any, x: Tensor) -> Encoded:
        pre_codes, _ = sae.encoder(x)
        return Encoded(pre_codes, sae.get_dictionary(), torch.zeros(D, dtype=x.dtype), x)

    return Case(build, encoded)


CASES = {
    "sae_lens-TopKSAE": _sae_lens("TopKSAE", k=K),
    "sae_lens-TopKSAE-rescaled": _sae_lens("TopKSAE", k=K, rescale_acts_by_decoder_norm=True),
    "sae_lens-TopKSAE-uncentred": _sae_lens("TopKSAE", k=K, apply_b_dec_to_input=False),
    "sae_lens-TopKSAE-normalised": _sae_lens("TopKSAE", k=K, normalize_activations="constant_norm_rescale"),
    "sae_lens-JumpReLUSAE": _sae_lens("JumpReLUSAE"),
    "sae_lens-StandardSAE": _sae_lens("StandardSAE"),
    "sae_lens-TopKTrainingSAE": _sae_lens("TopKTrainingSAE", k=K),
    "sae_lens-BatchTopKTrainingSAE": _sae_lens("BatchTopKTrainingSAE", k=K),
    "sae_lens-JumpReLUTrainingSAE": _sae_lens("JumpReLUTrainingSAE"),
    "dictionary_learning-AutoEncoderTopK": _dictionary_learning("AutoEncoderTopK"),
    "dictionary_learning-BatchTopKSAE": _dictionary_learning("BatchTopKSAE"),
    "dictionary_learning-JumpReluAutoEncoder": _dictionary_learning("JumpReluAutoEncoder"),
    "dictionary_learning-JumpReluAutoEncoder-uncentred": _dictionary_learning("JumpReluAutoEncoder", centred=False),
    "dictionary_learning-AutoEncoder": _dictionary_learning("AutoEncoder"),
    "sparsify-SparseCoder": _sparsify(),
    "sparsify-SparseCoder-skip": _sparsify(skip_connection=True),
    "sparsify-SparseCoder-multi": _sparsify(multi_topk=True),
    "llamascopium-topk": _llamascopium("topk"),
    "llamascopium-topk-plain": _llamascopium("topk", sparsity_include_decoder_norm=False),
    "llamascopium-jumprelu": _llamascopium("jumprelu"),
    "overcomplete-TopKSAE": _overcomplete(),
}
every_case = pytest.mark.parametrize("name", CASES)


def directions() -> Tensor:
    """`[F, D]`: families of four that overlap by some 0.8, of lengths 0.7 to 1.3."""
    generator = torch.Generator().manual_seed(5)
    family = torch.randn(F // 4, 1, D, generator=generator, dtype=torch.float64)
    W = family + 0.5 * torch.randn(F // 4, 4, D, generator=generator, dtype=torch.float64)
    length = 0.7 + 0.6 * torch.rand(F, 1, generator=generator, dtype=torch.float64)
    return length * functional.normalize(W.reshape(F, D), dim=1)


def rows(n: int, seed: int = 1) -> Tensor:
    """`[n, D]`: sums of some of the directions, a different number in each row, off the origin."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(n, 1, generator=generator, dtype=torch.float64) * 2 * K / F
    fires = torch.rand(n, F, generator=generator, dtype=torch.float64) < share
    amounts = 0.5 + torch.rand(n, F, generator=generator, dtype=torch.float64)
    return (fires * amounts) @ directions() + 0.1 + 0.01 * torch.randn(n, D, generator=generator, dtype=torch.float64)


def build(name: str) -> Any:
    """The SAE of a case, whose dictionary is that of the data."""
    torch.manual_seed(0)
    sae = CASES[name].build()
    W = directions()
    weights = {
        "W_dec": W, "W_D": W, "decoder.weight": W.T, "dictionary._weights": W,
        "W_enc": W.T, "W_E": W.T, "encoder.weight": W, "encoder.final_block.0.weight": W,
    }  # fmt: skip
    with torch.no_grad():
        for key, parameter in sae.named_parameters():
            if key in weights:
                parameter.copy_(weights[key])
            elif key in ("b_dec", "b_D", "bias"):
                parameter.fill_(0.1)
            elif key in ("b_enc", "b_E", "encoder.bias"):
                parameter.fill_(-0.05)
            elif key == "W_skip":
                parameter.copy_(0.05 * torch.eye(D))
        if getattr(sae, "threshold", None) is not None:
            sae.threshold.data.fill_(1.5)
    return sae


def dense(out: Any) -> Tensor:
    """The activations `[..., F]` in what an encode returns."""
    if hasattr(out, "top_acts"):
        # As caches of latents make them: a latent that is named twice would lose its activation.
        assert not (out.top_indices.sort(-1).values.diff(dim=-1) == 0).any()
        zeros = out.pre_acts.new_zeros(out.pre_acts.shape)
        return zeros.scatter_(-1, out.top_indices, out.top_acts)
    if isinstance(out, tuple):
        out = out[-1]
    return out.to_dense() if out.is_sparse else out


def reconstruction(out: Any) -> Tensor:
    if isinstance(out, Tensor):
        return out
    return out.sae_out if hasattr(out, "sae_out") else out[-1]


def expected(name: str, sae: Any, x: Tensor, price: float, k_max: int = K_MAX) -> Tensor:
    scores, W_dec, b_dec, target, scale = CASES[name].encoded(sae, x)
    candidates = topk_select(scores, min(k_max, F))
    return price_select(candidates, W_dec, b_dec, target, price=price, passes=PASSES).to_dense(F) / scale


def fvu(sae: Any, x: Tensor) -> float:
    error = x - reconstruction(sae(x))
    return float(error.square().sum() / (x - x.mean(0)).square().sum())


def same(actual: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10)


# --------------------------------------------------------------------------------------------------------- the rule


@every_case
@torch.no_grad()
def test_free_latents_are_the_k_max_largest(name):
    sae, x = build(name), rows(30)
    assert priced(sae, -math.inf, k_max=K_MAX) is sae
    encoded = CASES[name].encoded(sae, x)
    same(dense(sae.encode(x)), topk_select(encoded.scores, K_MAX).to_dense(F) / encoded.scale)
    assert not dense(priced(sae, math.inf, k_max=K_MAX).encode(x)).any()
    # All there are.
    same(dense(priced(sae, -math.inf, k_max=10 * F).encode(x)), encoded.scores.relu() / encoded.scale)


@every_case
@torch.no_grad()
def test_latents_that_pay_are_kept(name):
    sae, x = build(name), rows(40)
    wanted = expected(name, sae, x, 0.1)
    free = expected(name, sae, x, -math.inf)
    assert 0 < int((wanted != 0).sum()) < int((free != 0).sum())
    priced(sae, 0.1, k_max=K_MAX, passes=PASSES)
    acts = dense(sae.encode(x))
    same(acts, wanted)
    # No row depends on its batch.
    same(dense(sae.encode(x[7:9])), wanted[7:9])
    # decode and forward are the host's, of these activations.
    encoded = CASES[name].encoded(sae, x)
    recons = (acts * encoded.scale) @ encoded.W_dec + encoded.b_dec + (x - encoded.target)
    if name.endswith("normalised"):
        recons = ((acts @ encoded.W_dec) + encoded.b_dec) / (D**0.5 / x.norm(dim=-1, keepdim=True))
    same(reconstruction(sae(x)), recons)
    if hasattr(sae, "cfg") and hasattr(sae.cfg, "num_latents"):
        if sae.W_skip is None:
            same(sae.decode(*sae.encode(x)[:2]), recons)
    else:
        same(sae.decode(dense(sae.encode(x))), recons)


@every_case
@torch.no_grad()
def test_less_error_than_the_hosts_own_rule_at_equal_l0(name):
    sae, x = build(name), rows(400)
    accelerate(sae).eval()
    before, l0 = fvu(sae, x), float((dense(sae.encode(x)) != 0).sum()) / len(x)
    if name.endswith(("StandardSAE", "-AutoEncoder")):
        # A ReLU alone lets half of the latents fire; no more than a few of them pay.
        l0 = 8.0
    assert 2 < l0 < 9
    priced(sae, budget=l0, rows=x, k_max=F, passes=PASSES)
    assert float((dense(sae.encode(x)) != 0).sum()) / len(x) == pytest.approx(l0, rel=0.01)
    assert fvu(sae, x) < before


@every_case
def test_gradients_reach_what_is_kept(name):
    sae, x = priced(build(name), 0.1, k_max=K_MAX), rows(5).requires_grad_()
    dense(sae.encode(x)).sum().backward()
    assert x.grad is not None
    assert x.grad.any()


# ----------------------------------------------------------------------------------------------------- on and off


@every_case
@torch.no_grad()
def test_prices_are_replaced_and_taken_away(name):
    sae, x = build(name), rows(20)
    # overcomplete normalises its dictionary in place whenever it is used.
    sae(x)
    state = copy.deepcopy(sae.state_dict())
    host_class, fast_class = type(sae), type(accelerate(sae))
    own = dense(sae.encode(x))
    priced(sae, 0.3, k_max=8, passes=1)
    assert type(sae) is fast_class
    assert not sae.training
    assert sae.pricing == (0.3, 8, 1)
    assert not torch.equal(dense(sae.encode(x)), own)
    # Training has the host's own rule.
    same(dense(sae.train().encode(x)), own)
    priced(sae.eval(), 0.1, k_max=K_MAX, passes=PASSES)
    same(dense(sae.encode(x)), expected(name, sae, x, 0.1))
    assert sae.state_dict().keys() == state.keys()
    is_picklable = not name.startswith(("sae_lens", "llamascopium"))
    for twin in (copy.deepcopy(sae), pickle.loads(pickle.dumps(sae)) if is_picklable else sae):
        assert twin.pricing == sae.pricing
    assert priced(sae, None) is sae
    assert sae.pricing is None
    assert sae.training
    same(dense(sae.encode(x)), own)
    deaccelerate(priced(sae, 0.1, k_max=K_MAX))
    assert type(sae) is host_class
    assert sae.training
    assert "pricing" not in vars(sae)
    for key, value in sae.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=1e-6, atol=0)
    same(dense(sae.encode(x)), own)


@every_case
@torch.no_grad()
def test_the_price_of_a_budget(name):
    sae, held_out = build(name), rows(300, seed=3)
    assert priced(sae, budget=2.25, rows=held_out).pricing.k_max == 256
    priced(sae, budget=2.25, rows=held_out, k_max=K_MAX)
    assert float((dense(sae.encode(held_out)) != 0).sum()) / 300 == pytest.approx(2.25, rel=0.02)
    price = sae.pricing.price
    same(dense(sae.encode(held_out)), expected(name, sae, held_out, price))


# ------------------------------------------------------------------------------------------- each host's own forms


@torch.no_grad()
def test_sae_lens_hooks_caches_and_error_terms():
    host = pytest.importorskip("sae_lens")
    name = "sae_lens-TopKSAE-rescaled"
    sae, x = priced(build(name), 0.1, k_max=K_MAX, passes=PASSES), rows(3 * 7).reshape(3, 7, D)
    wanted = expected(name, sae, x, 0.1)
    out, cache = sae.run_with_cache(x)
    same(cache["hook_sae_acts_post"], wanted)
    same(cache["hook_sae_acts_pre"] * sae.W_dec.norm(dim=1), CASES[name].encoded(sae, x).scores)
    same(out, sae(x))
    # A hook that silences a latent silences it.
    loudest = int(wanted.sum((0, 1)).argmax())

    def silence(scores: Tensor, hook: Any) -> Tensor:
        scores[..., loudest] = -1
        return scores

    with sae.hooks(fwd_hooks=[("hook_sae_acts_pre", silence)]):
        assert not sae.encode(x)[..., loudest].any()
    with sae.hooks(fwd_hooks=[("hook_sae_acts_post", silence)]):
        acts = wanted.clone()
        acts[..., loudest] = -1
        same(sae(x), sae.decode(acts))
    with pytest.warns(DeprecationWarning, match="use_error_term"):
        sae.use_error_term = True
    same(sae(x), x)
    assert host.TopKSAE in type(sae).__mro__


def test_sae_lens_training_steps_have_their_own_rule():
    pytest.importorskip("sae_lens")
    from sae_lens.saes.sae import TrainStepInput

    for name in ("TopKTrainingSAE", "BatchTopKTrainingSAE", "JumpReLUTrainingSAE"):
        sae, x = build(f"sae_lens-{name}"), rows(20)
        step_input = TrainStepInput(x, {"l0": 0.1}, None, 0, False)
        before = accelerate(sae).training_forward_pass(step_input).loss
        assert torch.equal(priced(sae, 0.1, k_max=K_MAX).training_forward_pass(step_input).loss, before)


def test_dictionary_learning_steps_have_their_own_rule():
    pytest.importorskip("dictionary_learning")
    from dictionary_learning.trainers.top_k import TopKTrainer

    options = {"activation_dim": D, "dict_size": F, "k": K, "layer": 0, "lm_name": "none", "warmup_steps": 1}
    trainer, x = accelerate(TopKTrainer(steps=10, seed=0, device="cpu", **options)), rows(20).float()
    before = trainer.loss(x, step=1)
    priced(trainer.ae, 0.1, k_max=K_MAX)
    assert torch.equal(trainer.loss(x, step=1), before)


@torch.no_grad()
def test_sparsify_outputs():
    coder, x = priced(build("sparsify-SparseCoder"), 0.1, k_max=K_MAX), rows(25)
    encoded, out = coder.encode(x), coder(x)
    assert encoded.top_acts.shape == encoded.top_indices.shape == out.latent_acts.shape == (25, K_MAX)
    same(encoded.pre_acts, CASES["sparsify-SparseCoder"].encoded(coder, x).scores.relu())
    same(torch.zeros(25, F, dtype=x.dtype).scatter_(-1, out.latent_indices, out.latent_acts), dense(encoded))
    same(out.fvu, (x - out.sae_out).square().sum() / (x - x.mean(0)).square().sum())
    assert out.auxk_loss == out.multi_topk_fvu == 0


@torch.no_grad()
def test_dictionary_learning_extra_results_and_hooks():
    x = rows(25)
    ae = priced(build("dictionary_learning-AutoEncoderTopK"), 0.1, k_max=K_MAX)
    f, acts, indices, post_relu = ae.encode(x, return_topk=True)
    same(torch.zeros_like(f).scatter_(-1, indices, acts), f)
    same(f, ae.encode(x, use_threshold=True))
    same(post_relu, CASES["dictionary_learning-AutoEncoderTopK"].encoded(ae, x).scores.relu())
    x_hat = ae(x)
    # Whoever watches the layers sees them called.
    seen: list[Tensor] = []
    ae.encoder.register_forward_hook(lambda module, args, out: seen.append(out))
    same(ae.encode(x), f)
    same(seen[0].relu(), post_relu)
    same(ae(x, output_features=True)[0], x_hat)
    ae = priced(build("dictionary_learning-BatchTopKSAE"), 0.1, k_max=K_MAX)
    f, active, _ = ae.encode(x, return_active=True, use_threshold=False)
    same(f, ae.encode(x))
    assert torch.equal(active, f.sum(0) > 0)
    same(ae(x, output_features=True)[1], f)
    ae = priced(build("dictionary_learning-JumpReluAutoEncoder"), 0.1, k_max=K_MAX)
    f, pre_jump = ae.encode(x, output_pre_jump=True)
    same(f, ae(x, output_features=True)[1])
    same(pre_jump, CASES["dictionary_learning-JumpReluAutoEncoder"].encoded(ae, x).scores)


@torch.no_grad()
def test_llamascopium_hooks():
    sae, x = build("llamascopium-topk"), rows(25)
    priced(sae, 0.1, k_max=K_MAX, passes=PASSES)
    acts, hidden_pre = sae.encode(x, return_hidden_pre=True)
    same(hidden_pre, x @ sae.W_E + sae.b_E)
    x_hat, seen = sae(x), []
    for point in (sae.hook_hidden_pre, sae.hook_feature_acts):
        point.register_forward_hook(lambda module, args, out: seen.append(out))
    same(sae(x), x_hat)
    same(seen[0], hidden_pre)
    same(seen[1], acts)


@pytest.mark.parametrize("name", ["sae_lens-StandardSAE", "dictionary_learning-AutoEncoder"])
@pytest.mark.parametrize("sparse", [True, False])
def test_relu_saes_are_accelerated(name, sparse):
    sae, x = build(name), rows(40)
    bias = sae.b_enc if hasattr(sae, "b_enc") else sae.encoder.bias
    # A few latents of a row fire, or most.
    bias.data.fill_(-1.2 if sparse else 0.5)
    twin = copy.deepcopy(sae) if "lens" not in name else build(name)
    twin.load_state_dict(sae.state_dict())
    accelerate(twin)
    for run in (lambda sae: sae(x), lambda sae: sae.encode(x), lambda sae: sae.decode(sae.encode(x))):
        host_out, out = run(sae), run(twin)
        same(out, host_out)
        for model, result in ((sae, host_out), (twin, out)):
            model.zero_grad()
            result.square().sum().backward()
        for (key, parameter), (_, other) in zip(sae.named_parameters(), twin.named_parameters(), strict=True):
            wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            same(torch.zeros_like(other) if other.grad is None else other.grad, wanted), key


# ----------------------------------------------------------------------------------------------------------- errors


def refused(error: type[Exception], text: str, sae: Any, *args: Any, **options: Any) -> None:
    before = type(sae), getattr(sae, "training", None)
    with pytest.raises(error, match=text):
        priced(sae, *args, **options)
    assert (type(sae), getattr(sae, "training", None)) == before


def test_what_cannot_be_priced_is_named():
    options = {"k_max": 8}
    refused(TypeError, "got torch.nn.modules.linear.Linear", nn.Linear(2, 3), 0.1, **options)
    refused(ValueError, "transcode=True, where encode is not given", _sparsify(transcode=True).build(), 0.1, **options)
    refused(ValueError, "activation 'groupmax'", _sparsify(activation="groupmax").build(), 0.1, **options)
    coder = _sparsify().build()
    coder.W_dec = None
    refused(ValueError, "no decoder", coder, 0.1, **options)
    refused(ValueError, "hook_point_out 'out'", _llamascopium("topk", hook_point_out="out").build(), 0.1, **options)


def test_what_cannot_be_priced_of_sae_lens_and_dictionary_learning():
    host = pytest.importorskip("sae_lens")
    for kind, reason in {
        "GatedSAE": "two pre-activations",
        "MatchingPursuitSAE": "have no pre-activations",
        "AbsTopKSAE": "either sign",
    }.items():
        sae = getattr(host, kind)(getattr(host, f"{kind}Config")(d_in=D, d_sae=F))
        refused(TypeError, f"{kind}: .*{reason}", sae, 0.1, k_max=8)
    transcoder = host.Transcoder(host.TranscoderConfig(d_in=D, d_sae=F, d_out=D, apply_b_dec_to_input=False))
    refused(TypeError, "Transcoder: its encode is not given", transcoder, 0.1, k_max=8)
    pytest.importorskip("dictionary_learning")
    from dictionary_learning.dictionary import GatedAutoEncoder
    from dictionary_learning.trainers.top_k import TopKTrainer

    refused(TypeError, "GatedAutoEncoder: .*two pre-activations", GatedAutoEncoder(D, F), 0.1, k_max=8)
    trainer = TopKTrainer(steps=10, activation_dim=D, dict_size=F, k=K, layer=0, lm_name="none", warmup_steps=1)
    refused(TypeError, "TopKTrainer: price the SAE in it", trainer, 0.1, k_max=8)


def test_wrong_arguments_are_named():
    sae, x = build("dictionary_learning-AutoEncoderTopK"), rows(9)
    for text, args, options in (
        ("either a price or a budget and rows, got price, budget", (0.1,), {"budget": 3}),
        ("either a price or a budget and rows, got budget", (), {"budget": 3}),
        ("either a price or a budget and rows, got rows", (), {"rows": x}),
        ("either a price or a budget and rows, got price, rows", (0.1,), {"rows": x}),
        ("price must be a number, got '0.1'", ("0.1",), {"k_max": 3}),
        ("price must be a number, got nan", (math.nan,), {"k_max": 3}),
        ("k_max must be given with a price", (0.1,), {}),
        ("k_max must be an int from 1 up, got 0", (0.1,), {"k_max": 0}),
        ("passes must be an int from 1 up, got 1.5", (0.1,), {"k_max": 3, "passes": 1.5}),
        ("budget must be a number above 0, got 0", (), {"budget": 0, "rows": x}),
        ("budget must be at most k_max, 2, the candidates of a row; got 3", (), {"budget": 3, "rows": x, "k_max": 2}),
        (r"rows must be a tensor \[N, ...\] of at least one row .* got \[0, 24\]", (), {"budget": 3, "rows": x[:0]}),
        ("rows must be a tensor .* got list", (), {"budget": 3, "rows": [1.0]}),
    ):  # fmt: skip
        refused(ValueError, text, sae, *args, **options)
    for price in (np.float32(0.5), torch.tensor(0.5), 1):
        assert priced(sae, price, k_max=8).pricing.price == float(price)
    # It was priced, and stays at that price.
    refused(ValueError, "rows must be", sae, budget=3, rows=x[:0])
    assert sae.pricing == (1.0, 8, 2)
    assert isinstance(priced(nn.Linear(2, 3), None), nn.Linear)


def test_padding_names_no_latent_twice():
    from aksae_kernels.integrations.sparse import padded_apart

    codes = SparseCodes(
        torch.tensor([[3.0, 2.0, 9.0], [1.0, 9.0, 9.0], [9.0, 9.0, 9.0], [1.0, 2.0, 3.0]]),
        torch.tensor([[0, 7, -1], [1, -1, -1], [-1, -1, -1], [4, 5, 6]], dtype=torch.int32),
        torch.tensor([2, 1, 0, 3], dtype=torch.int32),
    )
    values, indices = padded_apart(codes)
    assert values.tolist() == [[3, 2, 0], [1, 0, 0], [0, 0, 0], [1, 2, 3]]
    assert indices.tolist() == [[0, 7, 1], [1, 0, 2], [0, 1, 2], [4, 5, 6]]
