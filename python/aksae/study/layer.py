"""One block of the language model in a study: its rows, the SAEs trained on them, and what is found of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..activations import LanguageModel
from ..callbacks import Callback, Progress
from ..config import FitConfig, SAEConfig, TrainConfig
from ..data import BatchReader, Split
from ..files import CONFIG, read_json, write_json
from ..fit import fit
from ..sae import SAE
from ..selections import AdaptiveK
from ..sites import Site
from ..splice import cross_entropy
from ..train import ProbeTuner, fit_probe
from .budget import Chooser, own, priced
from .controls import controls
from .firings import described_drops, dropped_examples, firing_changes
from .measure import measured, variance
from .plan import PROBE_READS, StudyConfig, Trial, selection_at
from .rows import split_rows
from .sparse_probing import k_sparse_probe

OWN, PRICED = "own", "price"
"""The rules by which an SAE is judged: its own, and a price whatever it was trained by."""
_RULES = {OWN: own, PRICED: priced}
PROBED = (1, 5)
"""Numbers of latents that a probe reads."""
FIRED, SHOWN = 20, 9
"""Of latents that fired at least so often, how many are shown with what a price drops of them, from the one that keeps
most of its firings to the one that keeps fewest."""
CONTROLLED = ("topk", "priced")
"""Selections with whose weights the controls are measured."""


class Layer:
    """One block of a study's model. All that is found lies in the study's folder: see `study`."""

    def __init__(self, config: StudyConfig, number: int, train: Split, heldout: Split, device: torch.device):
        self.config, self.number, self.train, self.device = config, number, train, device
        self.calibration, self.judged = split_rows(heldout, config.calibration_share, device)
        self._reader = BatchReader(train.store, probe_reads=PROBE_READS, train_on="all", device=device)
        self._probe: dict[str, Tensor] | None = None
        self._labels: list[dict[str, Tensor]] | None = None

    def described(self) -> dict[str, Any]:
        """What a summary needs to know of the rows."""
        spread = variance(self.judged.x)
        return {
            "train_rows": len(self.train.store),
            "calibration_rows": len(self.calibration),
            "rows": len(self.judged),
            "documents": self.judged.n_documents,
            "far_rows": int((~self.judged.near).sum()),
            "variance": self.judged.sums(spread),
            "variance_near": self.judged.sums(spread * self.judged.near),
        }

    def fit_missing(self, group: Sequence[Trial], steps: int) -> None:
        """Train those SAEs of a group, which share all but their selection, that are not there, on one pass."""
        missing = [trial for trial in group if not (self.config.folder(trial) / CONFIG).is_file()]
        if not missing:
            return
        config, (_, budget, seed, lr) = self.config, missing[0].group()
        settings = FitConfig(
            steps,
            lr=lr,
            # A tenth of the steps: with fewer, high rates kill latents before there is anything to learn from.
            warmup_steps=steps // 10,
            normalize="mean-norm",
            dead_after=config.dead_after,
            device=str(self.device),
        )
        saes, callbacks = [], []
        for trial in missing:
            selection = selection_at(trial.selection, budget, config.d_sae)
            shape = SAEConfig(self.train.store.d_in, config.d_sae, selection)
            saes.append(SAE(shape, generator=torch.Generator().manual_seed(seed)))
            if isinstance(selection, AdaptiveK):
                callbacks.append(self._paper_phases(saes[-1], settings))
        callbacks.append(Progress(f"block {self.number}, L0 {budget}, seed {seed}, lr {lr:g}, {len(missing)} SAEs"))
        fit(saes, self._reader.training(config.batch_size, seed, self.train.labels), settings, callbacks)
        for trial, sae in zip(missing, saes):
            sae.save_pretrained(config.folder(trial))

    def _paper_phases(self, sae: SAE, settings: FitConfig) -> Callback:
        """Fit the probe of the paper's AdaptiveK; what tunes it in the last part of training."""
        published = TrainConfig(
            steps=settings.steps,
            lr=settings.lr,
            warmup_steps=settings.warmup_steps,
            probe_reads=PROBE_READS,
            phase3_penalty="fitted",
        )
        if self._probe is None:
            self._probe = fit_probe(self.train, published)[0].state_dict()
        sae.probe.load_state_dict(self._probe)
        return ProbeTuner(sae, published, len(self.train.labels))

    def search_fvu(self, trial: Trial) -> float:
        """FVU at the budget on the rows that calibrate, by which learning rates are chosen."""

        def find() -> dict[str, Any]:
            chooser, _ = own(self._load(trial), self.calibration, self.calibration, trial.budget)
            return measured(chooser.sae, chooser.codes(), self.calibration)

        return self._kept("search", trial, find)["fvu"]

    def judge(self, trial: Trial) -> None:
        """Measure an SAE by its own rule and at a price, and the controls where it has some."""

        def find() -> dict[str, Any]:
            records = {}
            for rule, made in _RULES.items():
                if rule == PRICED and trial.selection == "priced":
                    continue
                chooser, before = made(self._load(trial), self.calibration, self.judged, trial.budget)
                records[rule] = {"l0_calibrated": before, **measured(chooser.sae, chooser.codes(), self.judged)}
                chooser.sae.save_pretrained(self.config.folder(trial) / rule)
            if self.number == self.config.layers[0] and trial.selection in CONTROLLED:
                rows = self.judged.first(self.config.control_rows)
                records["controls"] = controls(self._load(trial), rows, trial.budget, trial.seed)
            return {**trial._asdict(), **records}

        self._kept("records", trial, find)

    def probe(self, trial: Trial, tokenizer: Any) -> None:
        """Measure how well a few latents tell what the text says of a token (`sparse_probing`), on the rows that judge;
        probes are fitted on those that calibrate."""

        def find() -> dict[str, Any]:
            if self._labels is None:
                self._labels = [rows.token_labels(tokenizer) for rows in (self.calibration, self.judged)]
            found: dict[str, Any] = trial._asdict()
            for rule in self._rules(trial):
                chooser = self._judged_by(trial, rule)
                fitted, judged = chooser.on(self.calibration).all_codes(), chooser.all_codes()
                found[rule] = {
                    f"{name}, {k}": k_sparse_probe(
                        fitted, self._labels[0][name], judged, self._labels[1][name], d_sae=self.config.d_sae, k=k
                    ).auc
                    for name in self._labels[0]
                    # A label that all rows of one side share, or none, has nothing to tell.
                    if all(0 < int(side[name].sum()) < len(side[name]) for side in self._labels)
                    for k in PROBED
                }
            return found

        self._kept("probing", trial, find)

    def drops(self, trial: Trial, tokenizer: Any) -> None:
        """Find which firings of a TopK SAE's latents a price drops (`firings`), in numbers and in text."""

        def find() -> dict[str, Any]:
            before, after = (self._judged_by(trial, rule).all_codes() for rule in (OWN, PRICED))
            changes = firing_changes(before, after, self.config.d_sae)
            fired = changes.fired >= FIRED
            shares = changes.dropped_share[fired]
            latents = fired.nonzero()[:, 0][shares.argsort(stable=True)]
            shown = latents[torch.linspace(0, len(latents) - 1, min(SHOWN, len(latents))).long()].tolist()
            contexts = self.judged.contexts
            tokens = torch.from_numpy(contexts.input_ids[contexts.loss_mask])
            return {
                **trial._asdict(),
                "dropped": float(changes.dropped.sum() / changes.fired.sum()),
                "gained": float(changes.gained.sum() / changes.fired.sum()),
                "share_by_latent": shares.quantile(torch.linspace(0, 1, 11, dtype=shares.dtype)).tolist(),
                "examples": [
                    {
                        "latent": latent,
                        "fired": int(changes.fired[latent]),
                        "dropped_share": float(changes.dropped_share[latent]),
                        "text": [
                            described_drops(example)
                            for example in dropped_examples(
                                before, after, latent, tokens, self.judged.context, 3, tokenizer
                            )
                        ],
                    }
                    for latent in shown
                ],
            }

        self._kept("firings", trial, find)

    def splice(self, planned: Sequence[Trial], model: LanguageModel) -> None:
        """Measure what the SAEs of one seed cost the model, all of them in one pass over the text."""
        chosen = [trial for trial in planned if trial.selection in self.config.ce_selections]
        if not chosen:
            return
        path = self.config.output / "ce" / f"layer-{self.number}_seed-{chosen[0].seed}.json"
        wanted = {
            f"{trial}/{rule}": self.config.folder(trial) / rule for trial in chosen for rule in self._rules(trial)
        }
        if path.is_file() and set(wanted) <= read_json(path, needs=dict)["spliced"].keys():
            return
        documents = self.judged.contexts.document
        # The first context of every document, then the second, ...
        turn = np.array([(documents[:at] == document).sum() for at, document in enumerate(documents)])
        at = np.sort(np.argsort(turn, kind="stable")[: self.config.ce_contexts])
        contexts = self.judged.contexts.select(at)
        saes = {name: SAE.from_pretrained(folder).to(self.device) for name, folder in wanted.items()}
        with torch.no_grad():
            losses = cross_entropy(model, contexts, Site(self.number), saes, mean=self.judged.x.mean(0))
        write_json(
            path,
            {
                "document": contexts.document.tolist(),
                "clean": losses.clean.tolist(),
                "mean_ablated": losses.mean_ablated.tolist(),
                "zero_ablated": losses.zero_ablated.tolist(),
                "spliced": {name: loss.tolist() for name, loss in losses.spliced.items()},
                "divergence": {name: kl.tolist() for name, kl in losses.divergence.items()},
            },
        )

    @staticmethod
    def _rules(trial: Trial) -> tuple[str, ...]:
        return (OWN, PRICED) if trial.selection == "topk" else (OWN,)

    def _load(self, trial: Trial) -> SAE:
        return SAE.from_pretrained(self.config.folder(trial)).to(self.device)

    def _judged_by(self, trial: Trial, rule: str) -> Chooser:
        """The rule at the budget on the rows that judge, as `judge` left it."""
        if trial.selection == "adaptivek":
            # What moves the k of its rows is no part of the SAE.
            return _RULES[rule](self._load(trial), self.calibration, self.judged, trial.budget)[0]
        return Chooser(SAE.from_pretrained(self.config.folder(trial) / rule).to(self.device), self.judged)

    def _kept(self, kind: str, trial: Trial, find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What was found before, or is found now and kept."""
        path = self.config.output / kind / f"{trial}.json"
        if not path.is_file():
            write_json(path, find())
        return read_json(path, needs=dict)
