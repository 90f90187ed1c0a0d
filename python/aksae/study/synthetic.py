"""Whether latents are the features that the data was made of: SAEs on activations whose truth is known.

Activations are made by SAELens' generator for SynthSAEBench (arXiv 2602.14687); it and its metrics are imported where
they are used. Tested with sae-lens 6.54.12.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aksae_kernels import SparseCodes

from ..config import FitConfig, SAEConfig
from ..errors import UserError
from ..fit import fit
from ..metrics import ReconstructionMetrics
from ..pricing import adapt, calibrate
from ..sae import SAE
from ..selections import Priced, Selection, TopK

_CHUNK = 4096
MATCHED = 0.7
"""The least cosine of a latent's decoder row and a feature's direction that makes the one a name of the other."""


@dataclass(frozen=True)
class World:
    """Made activations, `x = sum of the active features' magnitudes times their directions, plus a constant`."""

    directions: Tensor
    """`[G, D]`, of unit norm."""
    draw: Callable[[int], tuple[Tensor, Tensor]]
    """Of n: activations `[n, D]` and magnitudes `[n, G]`, 0 where a feature is not active, by torch's generator."""

    @torch.no_grad()
    def rows(self, n: int, seed: int) -> tuple[Tensor, Tensor]:
        """Activations `[n, D]` and which features are active, bool `[n, G]`. The same seed gives the same rows, and
        torch's generator is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            drawn = (self.draw(min(_CHUNK, n - start)) for start in range(0, n, _CHUNK))
            x, active = zip(*((x, magnitudes > 0) for x, magnitudes in drawn))
            return torch.cat(x), torch.cat(active)


def synth_sae_bench(n_features: int = 1024, d_in: int = 128, *, seed: int = 0) -> World:
    """The world of SynthSAEBench-16k with fewer features and dimensions, and otherwise of its settings.

    Rates fall as a power of the rank from 0.4 to 0.0005; two thirds of the features are in trees of four children and
    three levels, in which a child needs its parent, excludes its siblings and has a share of its parent's magnitude;
    what fires together is correlated (rank 25); directions are pushed apart a little; a constant of norm 0.5 is added.
    SynthSAEBench-16k has 16,384 features, 768 dimensions and 34 active features of a row; the default here has 1024,
    128 and about 7. Nothing is downloaded.

    Args:
        n_features: G, at least 128, of which each is a tree.
        d_in: D.
        seed: of directions, rates, trees and correlations.

    Raises:
        UserError: a size out of range, or sae-lens is not installed.
    """
    if n_features < 128:
        raise UserError(f"n_features: got {n_features}, needs at least 128")
    if d_in < 1:
        raise UserError(f"d_in: got {d_in}, needs at least 1")
    lens = _sae_lens()
    config = lens.SyntheticModelConfig(
        num_features=n_features,
        hidden_dim=d_in,
        firing_probability=lens.ZipfianFiringProbabilityConfig(exponent=0.5, max_prob=0.4, min_prob=5e-4),
        hierarchy=lens.HierarchyConfig(
            total_root_nodes=n_features // 128,
            branching_factor=4,
            max_depth=3,
            mutually_exclusive_portion=1.0,
            compensate_probabilities=True,
            scale_children_by_parent=True,
        ),
        correlation=lens.LowRankCorrelationConfig(rank=25, correlation_scale=0.1),
        mean_firing_magnitudes=lens.LinearMagnitudeConfig(start=5.0, end=4.0),
        std_firing_magnitudes=lens.FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
        seed=seed,
    )
    # The model would make the same dictionary, with a progress bar.
    dictionary = lens.FeatureDictionary(
        n_features, d_in, bias=0.5, initializer=lens.orthogonal_initializer(num_steps=100, lr=3e-4), seed=seed
    )
    model = lens.SyntheticModel(config, feature_dict=dictionary)
    return World(dictionary.feature_vectors.detach(), model.sample_with_features)


@dataclass(frozen=True)
class Setup:
    """What all SAEs of a comparison have in common."""

    fit: FitConfig
    """`lr` is each SAE's own."""
    d_sae: int = 1024
    batch_size: int = 1024
    train_rows: int = 524_288
    """Rows that are made; a longer run reads them again."""
    heldout_rows: int = 16_384
    """Rows on which mean L0 is set and everything is measured."""


def measure_synthetic(
    world: World, selections: Mapping[str, Selection], lrs: Mapping[str, float], setup: Setup, *, seed: int
) -> Iterator[dict[str, Any]]:
    """Train an SAE for each selection on the same batches, and measure them all at the same mean L0 on other rows.

    Before it is measured an SAE's threshold, price or bias is set such that the held-out rows have its selection's mean
    L0 (`aksae.calibrate`). Then its weights are measured once more with latents at a price (`aksae.adapt`), but for
    those that were trained so. SAEs of one learning rate share a pass over the batches.

    Compare at a mean L0 of no more than the true one. Rows of few features have few latents that pay, and few positive
    pre-activations, in a good SAE: beyond that some have no price, and no k, that gives them so many. `l0` says what
    each had.

    Args:
        world: where activations come from.
        selections: by name; each aims at a mean L0.
        lrs: the learning rate of each, by name: see `search_lrs`.
        setup: what they have in common.
        seed: of initial weights and rows; a name's SAE is the same whatever others are trained beside it.

    Yields:
        A record as soon as it is measured: `trained` (the name), `selection` (how it was read), `seed`, `lr`, the
        numbers of `scores`, and `l0_uncalibrated`, the mean L0 as training left it; None for weights that get a price.

    Raises:
        UserError: a selection without a mean L0, or one that the setup cannot have.
    """
    x, heldout = _rows(world, setup, seed)
    for name, lr, sae in _trained(x, selections, lrs, setup, seed):
        record = {"trained": name, "seed": seed, "lr": lr}
        budget = sae.config.selection.mean_k()
        yield {**record, "selection": name, **_at_budget(sae, *heldout, world, budget)}
        if not isinstance(sae.config.selection, Priced):
            priced = adapt(sae, heldout[0], budget)
            yield {**record, "selection": "Priced", **scores(priced, *heldout, world), "l0_uncalibrated": None}


def search_lrs(
    world: World, selections: Mapping[str, Selection], lrs: Sequence[float], setup: Setup, *, seed: int
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The rate of `lrs` with which each selection has the least held-out FVU at its mean L0, and all of them.

    Arguments and errors are those of `measure_synthetic`; take a seed that is not reported. The truth has no say.
    """
    x, heldout = _rows(world, setup, seed)
    tried = []
    for lr in lrs:
        for name, _, sae in _trained(x, selections, dict.fromkeys(selections, lr), setup, seed):
            measured = _at_budget(sae, *heldout, world, sae.config.selection.mean_k())
            tried.append({"trained": name, "seed": seed, "lr": lr, "fvu": measured["fvu"], "l0": measured["l0"]})
    best = {name: min((t for t in tried if t["trained"] == name), key=lambda t: t["fvu"])["lr"] for name in selections}
    return best, tried


@torch.no_grad()
def scores(sae: SAE, x: Tensor, active: Tensor, world: World) -> dict[str, float]:
    """How an SAE does on activations `x [n, D]` of which features are `active`, bool `[n, G]`.

    * fvu, l0, dead: as `ReconstructionMetrics`;
    * precision, recall, f1: as SynthSAEBench. Every latent is a detector of the feature to whose direction its decoder
      row has the largest absolute cosine; means over latents, silent ones at 0;
    * mcc, uniqueness: as SynthSAEBench. The mean absolute cosine of decoder rows and directions under the best
      one-to-one matching; the share of latents that are the only one of their feature;
    * set_precision, set_recall, set_f1, found: see `set_scores`, with the pairs of `matched`;
    * count_correlation: see `correlation`, of latents and of features of a row;
    * true_l0: the mean number of active features.

    Dense masks of a few thousand rows at a time are made, `[n, F]` and `[n, G]`.
    """
    lens = _sae_lens()
    directions = world.directions.to(sae.W_dec)
    detectors = lens.ClassificationMetricsCalculator(sae.W_dec, directions)
    reconstruction = ReconstructionMetrics(sae.config.d_in, sae.config.d_sae)
    latents, features = matched(sae.W_dec, directions)
    sets = SetCounts(latents, features)
    counts = []
    for rows, truth in zip(x.split(_CHUNK), active.split(_CHUNK), strict=True):
        codes = sae.encode(rows)
        reconstruction.update(rows, sae.decode(codes), codes, codes.counts)
        detectors.add_batch(codes.to_dense(sae.config.d_sae), truth)
        sets.update(codes, truth, sae.config.d_sae)
        counts.append(codes.counts)
    means, detected = reconstruction.result(), detectors.compute()
    true_counts = active.sum(-1)
    return {
        "fvu": means["fvu"],
        "l0": means["l0_mean"],
        "true_l0": float(true_counts.double().mean()),
        "dead": means["dead"],
        "precision": detected.precision,
        "recall": detected.recall,
        "f1": detected.f1_score,
        "mcc": lens.mean_correlation_coefficient(sae.W_dec, directions),
        "uniqueness": lens.feature_uniqueness(sae.W_dec, directions),
        **sets.result(),
        "found": len(latents) / len(directions),
        "count_correlation": correlation(torch.cat(counts), true_counts),
    }


def matched(W_dec: Tensor, directions: Tensor, least: float = MATCHED) -> tuple[Tensor, Tensor]:
    """Latents and the features that they stand for: two tensors `[P]` of numbers, in pairs.

    The one-to-one matching of decoder rows `W_dec [F, D]` and `directions [G, D]` with the largest sum of cosines
    (Hungarian method), of which pairs with a cosine below `least` are left out. A latent that points away from a
    feature does not stand for it: codes are positive.
    """
    from scipy.optimize import linear_sum_assignment  # comes with sae-lens

    cosine = torch.nn.functional.normalize(W_dec, dim=-1) @ torch.nn.functional.normalize(directions, dim=-1).T
    latents, features = map(torch.from_numpy, linear_sum_assignment(cosine.cpu().numpy(), maximize=True))
    close = (cosine.cpu()[latents, features] >= least).nonzero()[:, 0]
    return latents[close], features[close]


class SetCounts:
    """Precision and recall of the set of a row's features, of all rows together.

        precision = hits / firings,   recall = hits / active,   f1 = 2 hits / (firings + active)

    A hit is a firing of a latent whose feature is active in the row. Firings are those of all latents, and active
    features all of a row's, whether or not they have a partner: so what was not learned counts against an SAE. 0 where
    there is none.
    """

    def __init__(self, latents: Tensor, features: Tensor):
        """Of pairs of latents and features, `[P]` numbers each."""
        self.latents, self.features = latents, features
        self.hits = self.firings = self.active = 0

    def update(self, codes: SparseCodes, active: Tensor, d_sae: int) -> None:
        """Take in codes of some rows `[n, K]` and their truth, bool `[n, G]`."""
        fires = codes.to_dense(d_sae) > 0
        self.hits += int((fires[:, self.latents] & active[:, self.features]).sum())
        self.firings += int(fires.sum())
        self.active += int(active.sum())

    def result(self) -> dict[str, float]:
        """`set_precision`, `set_recall` and `set_f1`."""
        return {
            "set_precision": self.hits / max(1, self.firings),
            "set_recall": self.hits / max(1, self.active),
            "set_f1": 2 * self.hits / max(1, self.firings + self.active),
        }


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation of two tensors `[n]`, in float64; 0 where one does not vary, and says nothing."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    norms = torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b)
    return float(a @ b / norms) if norms > 0 else 0.0


def _rows(world: World, setup: Setup, seed: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Activations to train on, and held-out ones with their truth."""
    return world.rows(setup.train_rows, 2 * seed)[0], world.rows(setup.heldout_rows, 2 * seed + 1)


def _trained(
    x: Tensor, selections: Mapping[str, Selection], lrs: Mapping[str, float], setup: Setup, seed: int
) -> Iterator[tuple[str, float, SAE]]:
    """The SAEs of `selections`, as soon as those of a learning rate are trained."""
    for name, selection in selections.items():
        if selection.mean_k() is None:
            raise UserError(f"selections: got {selection} ({name}), needs selections that aim at a mean L0")
    by_lr = defaultdict(list)
    for name in selections:
        by_lr[lrs[name]].append(name)
    batches = x.split(setup.batch_size)
    for lr, names in by_lr.items():
        saes = [
            SAE(SAEConfig(x.shape[-1], setup.d_sae, selections[name]), generator=torch.Generator().manual_seed(seed))
            for name in names
        ]
        fit(saes, batches, dataclasses.replace(setup.fit, lr=lr))
        yield from ((name, lr, sae) for name, sae in zip(names, saes))


def _at_budget(sae: SAE, x: Tensor, active: Tensor, world: World, budget: float) -> dict[str, float]:
    with torch.no_grad():
        counts = torch.cat([sae.encode(rows).counts for rows in x.split(_CHUNK)])
    if not isinstance(sae.config.selection, TopK):
        calibrate(sae, x, budget)
    return {**scores(sae, x, active, world), "l0_uncalibrated": float(counts.double().mean())}


def _sae_lens() -> Any:
    try:
        from sae_lens import synthetic
    except ModuleNotFoundError as error:
        raise UserError(
            f"sae-lens: got no package {error.name}, needs sae-lens, which makes the activations and judges: "
            "pip install sae-lens"
        ) from None
    return synthetic
