"""What a report draws of a run with a k for each row: curves at equal L0, walks, and where latents go."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from aksae import SAE, Need, Priced, SAEConfig, TopK, UserError, calibrate
from aksae.comparison import compare, walks
from aksae.heldout import HeldOut, HeldOutText
from aksae.pareto import budgets_around, codes_at, pareto
from aksae.spending import kind_of, l0_histogram, spending
from aksae.walk import walk

from aksae_kernels import SparseCodes, price_select

D, F, N = 16, 64, 600


@pytest.fixture
def x():
    """Sparse sums of few directions: some rows need more latents than others."""
    generator = torch.Generator().manual_seed(0)
    active = torch.rand(N, 40, generator=generator)
    return (active * (active > 0.85)) @ torch.randn(40, D, generator=generator) * 2 + 1


def make(selection, x, **fields) -> SAE:
    sae = SAE(SAEConfig(D, F, selection, **fields), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        sae.b_dec.copy_(x.mean(0) * sae.config.output_scale)
        sae.W_enc.copy_(0.4 * sae.W_dec)
        if isinstance(selection, Need):
            sae.need_weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(2))
    if selection.calibrated:
        calibrate(sae, x)
    return sae.eval().requires_grad_(False)


@pytest.fixture
def models(x):
    return {"priced": make(Priced(8), x, input_scale=0.5, output_scale=0.5), "topk": make(TopK(8), x)}


def test_budgets_are_shares_of_that_of_training():
    assert budgets_around(64, 256, 4096) == [16, 32, 48, 64, 96]
    assert budgets_around(64, 80) == [16, 32, 48, 64]
    assert budgets_around(2, 8) == [1, 2, 3]


@pytest.mark.parametrize("selection", [Priced(8), Need(8), TopK(8)], ids=str)
@pytest.mark.parametrize("budget", [2, 6, 8, 12])
def test_codes_have_the_budget_in_the_mean_and_the_sae_stays_as_it_was(x, selection, budget):
    sae = make(selection, x)
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    (codes,) = codes_at(sae, x, budget)
    assert float(codes.counts.double().mean()) == pytest.approx(budget, rel=2e-3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in sae.state_dict().items())
    if selection.calibrated:
        # As if it had been calibrated there: but for the last thousandth, the same latents.
        calibrate(sae, x, budget)
        same = sae.encode(x).to_dense(F).bool() == codes.to_dense(F).bool()
        assert same.double().mean() > 0.999


@pytest.mark.parametrize("price", [0.0, float("inf"), 1e-30, 1e30])
def test_a_price_that_is_far_away_does_not_matter(x, price):
    sae = make(Priced(8), x)
    sae.price.fill_(price)
    (codes,) = codes_at(sae, x, 8)
    assert float(codes.counts.double().mean()) == pytest.approx(8, rel=2e-3)


def test_a_budget_that_no_row_can_have(x):
    with pytest.raises(UserError, match=r"budget: got 33, needs a number above 0 and at most 32, a row's candidates"):
        codes_at(make(Priced(8, k_max=32), x), x, 33)


def test_curves_and_differences_are_those_of_the_rows(x, models):
    units = torch.arange(N) // 20
    found = pareto(models, x, units, [4, 8], rng=np.random.default_rng(0))
    assert (found["rows"], found["units"], found["budgets"]) == (N, 30, [4, 8])
    spread = (x.double() - x.double().mean(0)).square().sum()
    fvu = {}
    for name, sae in models.items():
        for place, budget in enumerate((4, 8)):
            (codes,) = codes_at(sae, x, budget)
            point = found["models"][name][place]
            fvu[name, budget] = float((x - sae.decode(codes, x)).double().square().sum() / spread)
            assert point["fvu"] == pytest.approx(fvu[name, budget], rel=1e-9)
            assert point["l0"] == float(codes.counts.double().mean())
            assert point["low"] < point["fvu"] < point["high"]
    for place, budget in enumerate((4, 8)):
        own, other = fvu["priced", budget], fvu["topk", budget]
        point = found["differences"]["topk"][place]
        assert point["difference"][0] == pytest.approx(own - other, rel=1e-9)
        assert point["change"][0] == pytest.approx(own / other - 1, rel=1e-9)
        low, high = point["difference"][1:]
        assert low < own - other < high
    again = pareto(models, x, units, [4, 8], rng=np.random.default_rng(0))
    assert again == found


def test_differences_are_paired(x, models):
    """What documents have in common does not widen them: an SAE does not differ from itself at all."""
    twice = {"priced": models["priced"], "again": models["priced"]}
    found = pareto(twice, x, torch.arange(N) // 20, [8], rng=np.random.default_rng(0))
    assert found["differences"]["again"] == [{"difference": [0, 0, 0], "change": [0, 0, 0]}]
    assert found["models"]["priced"] != found["models"]["again"], "each curve has draws of its own"


def test_a_walk_by_hand():
    """Two latents say the same, a third is of another direction, a fourth would not pay in any case."""
    W_dec = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, -1]])
    candidates = SparseCodes(torch.tensor([1.0, 3, 0.1, 2]), torch.tensor([2, 0, 3, 1]).int(), torch.tensor(4).int())
    done = walk(candidates, W_dec, None, torch.tensor([3.0, 1]), price=0.5)
    assert (done.latents, done.values, done.price) == ([0, 2], [3.0, 1.0], 0.5)
    # |(3, 1)|^2, then |(0, 1)|^2, then nothing.
    assert done.errors == pytest.approx([10, 1, 0])
    same, never = done.passed
    # Alone 2 * 2 * 3 - 4; beside the others nothing is left, and it would add 4; the difference is the first one's.
    assert (same.latent, same.value, same.after) == (1, 2.0, 1)
    assert (same.alone, same.gain, same.explained_by, same.share) == (8, -4, 0, 1)
    assert (never.latent, never.after, never.explained_by, never.share) == (3, 2, None, 0)
    assert never.alone == pytest.approx(-0.21)


@pytest.mark.parametrize("passes", [1, 2])
def test_a_walk_is_what_price_select_does_and_what_removing_latents_says(x, passes):
    sae = make(Priced(8), x)
    W_dec, b_dec = sae.W_dec.detach().double(), sae.b_dec.detach().double()
    candidates = sae.encoder(x[:4]).topk(32)
    for row in range(4):
        wanted = x[row].double()
        own = SparseCodes(candidates.values[row].detach().double(), candidates.indices[row], candidates.counts[row])
        done = walk(own, W_dec, b_dec, wanted, price=float(sae.price), passes=passes)
        kept = price_select(own, W_dec, b_dec, wanted, price=float(sae.price), passes=passes)
        n = int(kept.counts)
        assert sorted(done.latents) == kept.indices[:n].tolist()
        assert len(done.latents) + len(done.passed) == int(own.counts)
        assert done.values == sorted(done.values, reverse=True)
        value = dict(zip(own.indices.tolist(), own.values))

        def error(latents, wanted=wanted, value=value):
            return float((wanted - b_dec - sum(value[s] * W_dec[s] for s in latents)).square().sum())

        assert done.errors == pytest.approx([error(done.latents[:j]) for j in range(n + 1)])
        for passed in done.passed:
            c = passed.latent
            assert passed.after == sum(v > passed.value for v in done.values)
            assert passed.alone == pytest.approx(error([]) - error([c]))
            assert passed.gain == pytest.approx(error(done.latents) - error([*done.latents, c]), abs=1e-9)
            if passed.explained_by is None:
                assert passed.alone <= done.price
                continue
            # What each kept one takes off the gain, by leaving it out.
            lowered = {}
            for s in done.latents:
                without = [other for other in done.latents if other != s]
                lowered[s] = error(without) - error([*without, c]) - passed.gain
            assert passed.explained_by == max(lowered, key=lowered.__getitem__)
            lowering = sum(part for part in lowered.values() if part > 0)
            assert passed.share == pytest.approx(lowered[passed.explained_by] / lowering)


def test_walks_are_in_shares_of_the_rows_variance(x, models):
    l0 = models["priced"].encode(x).counts.long()
    shown = walks(models["priced"], {"topk": models["topk"]}, x, l0, None)
    assert len(shown) == 6
    assert [entry["l0"] for entry in shown] == sorted(entry["l0"] for entry in shown)
    assert shown[0]["l0"] < shown[-1]["l0"]
    for entry in shown:
        row = entry["row"]
        variance = (x[row] - x.mean(0)).square().sum()
        assert entry["l0"] == l0[row] == len(entry["errors"]) - 1
        error = (models["priced"](x[row]) - x[row]).square().sum() / variance
        assert entry["errors"][-1] == pytest.approx(float(error), rel=1e-4)
        theirs = models["topk"]
        by_value = (theirs.decode(theirs.encode(x[row], k=entry["l0"])) - x[row]).square().sum() / variance
        assert entry["others"]["topk"][-1] == pytest.approx(float(by_value), rel=1e-4)
        assert len(entry["others"]["topk"]) == entry["l0"] + 1
        assert all(passed["gain"] <= entry["price"] + 1e-6 for passed in entry["passed"] if passed["explained_by"])


class Words:
    """A tokenizer of a few words."""

    words = (" the", " cat", "s", ".", " 12", "\n")

    def decode(self, tokens):
        return "".join(self.words[token] for token in tokens)


def test_kinds_of_tokens():
    assert list(map(kind_of, Words.words)) == [
        "beginning of a word", "beginning of a word", "rest of a word", "punctuation", "number", "white space",
    ]  # fmt: skip


def test_where_latents_go():
    tokens = torch.tensor([0, 1, 2, 3, 0, 1, 3, 5, 4, 4])
    contexts = torch.tensor([7, 7, 7, 7, 2, 2, 2, 2, 9, 9])
    l0 = torch.tensor([1, 9, 8, 2, 2, 7, 3, 4, 6, 6])
    found = spending(l0, HeldOutText(contexts, tokens, Words()))
    assert [context["mean"] for context in found["contexts"]] == [4, 5, 6]
    assert found["contexts"][1] == {"mean": 5, "tokens": [" the", " cat", "s", "."], "l0": [1, 9, 8, 2]}
    # Of each context and each token one at most: the second " cat" and the rest of its context's are left out.
    assert [(entry["token"], entry["l0"]) for entry in found["most"]] == [(" cat", 9), (" 12", 6), ("\n", 4)]
    assert found["most"][0] == {"before": " the", "token": " cat", "after": "s.", "l0": 9}
    assert [(entry["token"], entry["l0"]) for entry in found["fewest"]] == [(" the", 1), (".", 3), (" 12", 6)]
    assert {kind["kind"]: (kind["rows"], kind["l0"]) for kind in found["kinds"]} == {
        "beginning of a word": (4, 4.75),
        "rest of a word": (1, 8),
        "number": (2, 6),
        "punctuation": (2, 2.5),
        "white space": (1, 4),
    }
    assert l0_histogram(l0) == {"l0": [1, 2, 3, 4, 6, 7, 8, 9], "rows": [1, 2, 1, 1, 2, 1, 1, 1]}


class Rows:
    """A block in memory."""

    def __init__(self, x):
        self.x, self.n = x, len(x)

    def checked(self):
        return self.x


def test_what_is_known_of_the_rows_decides_what_is_said(x, models):
    blocks = [Rows(part) for part in x.split(250)]
    unknown = compare(models, HeldOut(blocks), 8, seed=0)
    assert set(unknown) == {"sample", "pareto", "l0_histogram", "walks"}
    assert unknown["sample"] == {"rows": N, "unit": "rows"}
    assert unknown["pareto"]["units"] == N
    contexts, tokens = torch.arange(N) // 10, torch.arange(N) % 6
    text = HeldOutText(contexts, tokens, Words())
    known = compare(models, HeldOut(blocks, "documents", 5 + contexts // 4, text), 8, seed=0)
    assert known["pareto"]["units"] == 15
    l0 = models["priced"].encode(x).counts.double()
    dense = models["priced"].encode(x).to_dense(F).detach()
    for latent in known["top_contexts"]:
        first = latent["examples"][0]
        assert latent["max"] == pytest.approx(float(dense[:, latent["latent"]].max()))
        number = int(dense[:, latent["latent"]].argmax()) // 10
        rows = slice(10 * number, 10 * number + 10)
        assert first["activations"] == pytest.approx(dense[rows, latent["latent"]].tolist())
        assert first["tokens"] == [Words.words[token] for token in tokens[rows].tolist()]
        assert first["l0"] == pytest.approx(float(l0[rows].mean()))
    by_need = {"need": make(Need(8), x), "topk": models["topk"]}
    assert "walks" not in compare(by_need, HeldOut(blocks), 8, seed=0)
