"""A language model's cross-entropy with what passes one site replaced: what an SAE's errors cost the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from .activations import LOSS_TOKENS, LanguageModel, divergences_of, losses_of
from .errors import UserError
from .sites import Site

if TYPE_CHECKING:
    from .text import ContextSet


@dataclass(frozen=True)
class CrossEntropy:
    """Losses and divergences of contexts, in nats per token: each is `[N]` float64, the mean over a context's tokens.

    A number for all contexts is the mean over these, so that every context weighs the same. Differences between two
    of these tensors are paired: documents may be drawn anew from them.
    """

    clean: Tensor
    """Of the model as it is."""
    mean_ablated: Tensor
    """With every row the same, the mean."""
    zero_ablated: Tensor
    """With every row 0."""
    spliced: Mapping[str, Tensor]
    """With what each of the functions makes of the rows, by name."""
    divergence: Mapping[str, Tensor]
    """`KL(clean || spliced)` of the next-token distributions, by name: `aksae.activations.divergences_of`. Unlike the
    damage, it does not forgive a changed prediction that happens to suit the text."""

    def means(self) -> dict[str, float]:
        """`clean`, `mean_ablated` and `zero_ablated` of all contexts."""
        return {name: float(getattr(self, name).mean()) for name in ("clean", "mean_ablated", "zero_ablated")}

    def damage(self, name: str) -> float:
        """`L(spliced) - L(clean)`."""
        return float((self.spliced[name] - self.clean).mean())

    def kl(self, name: str) -> float:
        """The mean of `divergence`."""
        return float(self.divergence[name].mean())

    def recovered(self, name: str, ablation: Literal["mean", "zero"] = "mean") -> float:
        """`(L(ablated) - L(spliced)) / (L(ablated) - L(clean))`: 1 without damage, 0 where an ablation is as good."""
        ablated = self.mean_ablated if ablation == "mean" else self.zero_ablated
        return float((ablated - self.spliced[name]).mean() / (ablated - self.clean).mean())

    def summary(self, name: str) -> dict[str, float]:
        """`ce_damage`, `kl`, `recovered_mean` and `recovered_zero` of one of the functions."""
        return {
            "ce_damage": self.damage(name),
            "kl": self.kl(name),
            "recovered_mean": self.recovered(name, "mean"),
            "recovered_zero": self.recovered(name, "zero"),
        }


def cross_entropy(
    model: LanguageModel,
    contexts: ContextSet,
    site: Site,
    functions: Mapping[str, Callable[[Tensor], Tensor]],
    *,
    mean: Tensor,
    progress: bool = True,
) -> CrossEntropy:
    """Run `model` on `contexts` as it is, with each ablation, and with each of `functions` at `site`.

    The rows of loss tokens (`ContextSet.loss_mask`) are replaced, those that SAEs are trained on; what passes at
    padding, special and skipped tokens is left as it is. The loss is that of every token that is not padding but the
    first: `LanguageModel.token_losses`.

    Args:
        site: where in the model.
        functions: from rows `[n, D]` float32 on the model's device to what replaces them, `[n, D]` of any dtype. Each
            is given every row once, in the order of contexts and tokens.
        mean: `[D]`, what `mean_ablated` puts in place of every row.
        progress: show a bar on stderr.

    Raises:
        UserError: there is no context, the model predicts no next token, or it has no such site.
    """
    from tqdm import tqdm

    if not len(contexts):
        raise UserError("contexts: got none, needs at least one")
    ablations = [mean.to(model.device).expand_as, torch.zeros_like]
    losses = torch.empty(1 + len(ablations) + len(functions), len(contexts), dtype=torch.float64)
    divergences = torch.empty(len(functions), len(contexts), dtype=torch.float64)
    size = max(1, LOSS_TOKENS // contexts.input_ids.shape[1])
    with tqdm(total=losses.numel(), desc="cross-entropy", unit="context", disable=not progress) as bar:
        for start in range(0, len(contexts), size):
            batch = slice(start, start + size)
            ids, attention = contexts.input_ids[batch], contexts.attention_mask[batch]
            replaced = torch.as_tensor(contexts.loss_mask[batch]).to(model.device)
            clean = model.logits(ids, attention)
            losses[0, batch] = losses_of(clean, ids, attention).double().cpu()
            bar.update(len(ids))
            for run, function in enumerate([*ablations, *functions.values()]):
                logits = model.logits(ids, attention, {site: _at(replaced, function)})
                losses[1 + run, batch] = losses_of(logits, ids, attention).double().cpu()
                if run >= len(ablations):
                    divergences[run - len(ablations), batch] = divergences_of(clean, logits, attention).double().cpu()
                bar.update(len(ids))
    unchanged, mean_ablated, zero_ablated, *spliced = losses
    by_name = [dict(zip(functions, of_functions, strict=True)) for of_functions in (spliced, divergences)]
    return CrossEntropy(unchanged, mean_ablated, zero_ablated, *by_name)


def _at(replaced: Tensor, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What puts `function(rows)` in the place of the rows of hidden states `[n, L, D]` that `replaced [n, L]` marks."""

    def change(hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        hidden[replaced] = function(hidden[replaced]).to(hidden.dtype)
        return hidden

    return change
