"""Latents that are edited while a model runs: the equation, on every selection, family, place and dtype."""

from __future__ import annotations

import math

import pytest
import torch
from aksae import SAE, AdaptiveK, BatchTopK, JumpReLU, KMap, Matryoshka, Priced, SAEConfig, Scale, Set, TopK, intervene
from aksae.errors import UserError
from aksae.sites import HOOKS, Site
from language_models import CAUSAL, VOCABULARY, WIDTH

F = 48
EDITS = {3: Set(2.5), 11: Set(0.0), 20: Scale(-1.5), 40: Set(-1.0)}
SELECTIONS = {
    "topk": TopK(6),
    "batch-topk": BatchTopK(6),
    "jumprelu": JumpReLU(6),
    "matryoshka": Matryoshka(BatchTopK(6), (8, F)),
    "adaptivek": AdaptiveK(KMap(k_min=2, k_max=12), "token"),
    "priced": Priced(6),
}


def made(selection=SELECTIONS["topk"], **settings) -> SAE:
    generator = torch.Generator().manual_seed(0)
    sae = SAE(SAEConfig(WIDTH, F, selection, **settings), generator=generator).eval()
    with torch.no_grad():
        for name in ("b_enc", "b_dec"):
            sae.get_parameter(name).normal_(std=0.1, generator=generator)
        if sae.probe is not None:
            sae.probe.weight.normal_(generator=generator)
        if isinstance(selection, Priced):
            sae.price.fill_(0.05)
    return sae


def tokens(rows=2, length=7):
    ids = torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def edited(sae, x, edits):
    """The equation as it stands, by dense codes and two decodes, in float64."""
    z = sae.encode(x.to(sae.W_dec.dtype)).to_dense(F).double()
    new = z.clone()
    for latent, edit in edits.items():
        new[..., latent] = edit.value if isinstance(edit, Set) else edit.factor * z[..., latent]
    assert not torch.equal(new, z)
    decoded = [(codes @ sae.W_dec.double() + sae.b_dec.double()) / sae.config.output_scale for codes in (z, new)]
    return x.double() + decoded[1] - decoded[0]


def close(got, wanted):
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("name", SELECTIONS)
def test_the_equation_on_every_selection(load, name, scale):
    model, sae = load("llama"), made(SELECTIONS[name], input_scale=4 * scale, output_scale=scale)
    x = model.residual(**tokens())
    with intervene(model, sae, EDITS):
        got = model.residual(**tokens())
    close(got, edited(sae, x, EDITS))
    assert torch.equal(model.residual(**tokens()), x)


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("family", CAUSAL)
def test_every_family_and_place(load, family, hook):
    model, sae, site = load(family), made(), Site(1, hook)
    later = Site(2)
    before = model.read(**tokens(), sites=[site, later])
    with intervene(model, sae, EDITS, site):
        after = model.read(**tokens(), sites=[site, later])
    close(after[site], edited(sae, before[site], EDITS))
    assert not torch.allclose(after[later], before[later])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_generation_with_a_cache(load, family):
    model, sae = load(family), made()
    edits = {latent: Set(30.0) for latent in range(5)}

    def generated(use_cache):
        options = {"max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None, "output_logits": True}
        done = model.model.generate(**tokens(1), **options, use_cache=use_cache, return_dict_in_generate=True)
        return done.sequences, torch.stack(done.logits)

    plain, plain_logits = generated(use_cache=True)
    with intervene(model, sae, edits):
        (cached, logits), (uncached, _) = generated(use_cache=True), generated(use_cache=False)
        # What a cache remembers is what one forward of all tokens sees.
        whole = model.model(input_ids=cached).logits[0, -13:-1]
    assert torch.equal(cached, uncached)
    torch.testing.assert_close(logits[:, 0], whole, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits, plain_logits, rtol=1e-2, atol=1e-3)
    assert torch.equal(generated(use_cache=True)[0], plain)


def test_a_transformers_model_of_ones_own(load):
    wrapped, sae = load("llama"), made()
    model = wrapped.model.train()
    model.config.use_cache = True
    site = Site(1)
    with torch.no_grad():
        plain = model(**tokens()).logits
        with intervene(model, sae, EDITS, site):
            got = model(**tokens()).logits
        with intervene(wrapped, sae, EDITS):
            wanted = model(**tokens()).logits
    assert torch.equal(got, wanted)
    assert not torch.allclose(got, plain)
    assert model.training
    assert model.config.use_cache


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_models_and_weights_of_16_bits(load, dtype, weights):
    model, sae = load("llama", dtype=dtype), made()
    sae.to_precision(weights)
    x = model.residual(**tokens())
    with intervene(model, sae, EDITS):
        got = model.residual(**tokens())
    wanted = edited(sae, x, EDITS)
    # Rounded once, to the model's dtype.
    limit = 0.51 * torch.finfo(getattr(torch, dtype)).eps * wanted.abs() + 1e-4
    assert ((got.double() - wanted).abs() <= limit).all()


def test_what_changes_nothing_changes_no_bit(load):
    model, sae = load("llama"), made()
    x = model.residual(**tokens())
    silent = next(f for f in range(F) if not (sae.encode(x).indices == f).any())
    for edits in ({}, {3: Scale(1.0)}, {silent: Set(0.0), 5: Scale(1)}):
        with intervene(model, sae, edits):
            assert torch.equal(model.residual(**tokens()), x)


def test_all_latents_ablated(load):
    model, sae = load("llama"), made(output_scale=0.5)
    x = model.residual(**tokens())
    with torch.no_grad(), intervene(model, sae, dict.fromkeys(range(F), Set(0))):
        close(model.residual(**tokens()), x.double() - sae(x) + sae.b_dec / 0.5)


def test_no_tensor_of_all_latents_is_made(load, largest):
    model = load("llama")
    sae = SAE(SAEConfig(WIDTH, 4096, TopK(6))).eval()
    rows = tokens(4, 20)
    with intervene(model, sae, EDITS), largest() as made_:
        model.residual(**rows)
    # The weights, seen once more.
    assert made_.elements == 4096 * WIDTH < 80 * 4096


def test_the_change_is_a_constant_to_gradients(load):
    model, sae = load("llama"), made()
    embedded = model.model.get_input_embeddings()(tokens()["input_ids"]).requires_grad_()
    with intervene(model, sae, EDITS):
        model.model(inputs_embeds=embedded).logits.sum().backward()
    assert embedded.grad.isfinite().all()
    assert embedded.grad.any()
    assert all(parameter.grad is None for parameter in sae.parameters())


def test_hooks_are_gone_after_an_error(load):
    model, sae = load("llama"), made()
    x = model.residual(**tokens())
    with pytest.raises(KeyboardInterrupt), intervene(model, sae, EDITS):
        raise KeyboardInterrupt
    assert torch.equal(model.residual(**tokens()), x)


def transcoder():
    return SAE(SAEConfig(WIDTH, F, TopK(3), d_out=WIDTH)).eval()


WRONG = {
    "latent": ({"edits": {F: Set(1)}}, "edits: got the latent 48, needs a number from 0 to 47"),
    "no number": ({"edits": {"3": Set(1)}}, "edits: got the latent '3', needs a number from 0 to 47"),
    "edit": ({"edits": {3: 1.0}}, r"edits: got 1.0 for latent 3, needs Set\(value\) or Scale\(factor\)"),
    "site": ({"site": Site(3)}, "model.layer: got 3, needs 0 to 2"),
    "width": ({"sae": lambda: SAE(SAEConfig(8, F, TopK(3))).eval()}, "sae: got d_in 8, needs 16, the width"),
    "training": ({"sae": lambda: made().train()}, r"sae: got one in training mode, needs sae.eval\(\)"),
    "transcoder": ({"sae": transcoder}, "sae: got a transcoder, needs an autoencoder"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_errors_name_the_argument(load, changes, message):
    arguments = {"edits": EDITS, "site": None, **changes}
    sae = arguments.pop("sae", made)()
    with pytest.raises(UserError, match=message), intervene(load("llama"), sae, **arguments):
        pass


def test_a_model_without_a_site_and_numbers_that_are_none(load):
    with pytest.raises(UserError, match="site: got None, needs a Site"), intervene(load("llama").model, made(), EDITS):
        pass
    with pytest.raises(UserError, match="value: got nan, needs a finite number"):
        Set(math.nan)
    with pytest.raises(UserError, match="factor: got '2', needs a finite number"):
        Scale("2")
