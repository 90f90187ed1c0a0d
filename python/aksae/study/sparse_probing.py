"""k-sparse probing: how much of what a text says of its tokens stands in a few latents.

The labels are read off the text itself, so nothing is downloaded and nobody is asked. They are simple ones; for the
data sets of SAEBench and sae-probes, which lie on a hub, see `aksae.hosts.sae_bench`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from aksae_kernels import SparseCodes

from ..errors import UserError
from ..evaluate import activations_of

_SENTENCE_ENDS = (".", "!", "?")
_CLOSING = ")]\"'\u00bb\u201d\u2019"


def token_labels(tokens: Sequence[str]) -> dict[str, Tensor]:
    """What is true of the tokens of one context, as decoded, in their order: bool `[n]` by name.

    * of the token: `starts_word` (white space before it), `capitalised`, `digits`, `punctuation` (neither letter nor
      digit in it, and not white space alone);
    * of its place: `starts_sentence` (a word behind one of `.!?`, closing quotes and brackets aside), `starts_line`,
      `in_brackets` (behind a round bracket that is not closed yet), `repeated` (the same token was there before).

    The first token of a context starts no sentence and no line, since what was before it is not known.
    """
    rows, seen, depth, before, word_before = [], set(), 0, "", ""
    for token in tokens:
        text = token.strip()
        starts_word = bool(text) and (before[-1:] + token[:1]).strip() != before[-1:] + token[:1]
        rows.append(
            {
                "starts_word": starts_word,
                "capitalised": text[:1].isupper(),
                "digits": any(letter.isdigit() for letter in text),
                "punctuation": bool(text) and not any(letter.isalnum() for letter in text),
                "starts_sentence": starts_word and word_before.rstrip(_CLOSING).endswith(_SENTENCE_ENDS),
                "starts_line": before.endswith("\n"),
                "in_brackets": depth > 0,
                "repeated": token in seen,
            }
        )
        seen.add(token)
        depth = max(0, depth + token.count("(") - token.count(")"))
        before, word_before = token, text or word_before
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]} if rows else {}


class Probing(NamedTuple):
    """What a probe of a few latents tells of a label on rows that it was not fitted on."""

    latents: list[int]
    """What it reads, the most telling first."""
    accuracy: float
    """Share of rows that it gives their label."""
    larger_class: float
    """The same of who always says what most rows are: what accuracy has to be measured against."""
    auc: float
    """Probability that it scores a row with the label above one without."""


@torch.no_grad()
def k_sparse_probe(
    train: SparseCodes, train_labels: Tensor, test: SparseCodes, test_labels: Tensor, *, d_sae: int, k: int
) -> Probing:
    """Read a label off the `k` latents whose mean differs most between rows with and without it.

    The latents are those with the largest `|mean of z with the label - mean of z without|` on the train rows, fewer
    than `k` where fewer differ; the probe is `logistic_regression` on their standardised activations there.

    Args:
        train, test: codes of rows, `[n, K]` each. Take rows of other documents to test.
        train_labels, test_labels: bool `[n]`.
        d_sae: F.
        k: how many latents are read.

    Raises:
        UserError: `k` out of range, labels of another length than their codes, or all alike.
    """
    if not 1 <= k <= d_sae:
        raise UserError(f"k: got {k}, needs a number from 1 to d_sae = {d_sae}")
    for name, codes, labels in (("train_labels", train, train_labels), ("test_labels", test, test_labels)):
        if labels.shape != codes.counts.shape:
            raise UserError(f"{name}: got shape {tuple(labels.shape)}, needs {tuple(codes.counts.shape)}, as the codes")
        if bool(labels.all()) or not bool(labels.any()):
            raise UserError(f"{name}: got {len(labels)} labels that are all alike, needs both kinds")
    difference = _mean_difference(train, train_labels, d_sae).abs()
    best = difference.sort(descending=True, stable=True)
    latents = best.indices[:k][best.values[:k] > 0]
    x, x_test = (activations_of(latents, codes).double() for codes in (train, test))
    mean, deviation = x.mean(0), x.std(0, correction=0).clamp_min(torch.finfo(torch.float32).tiny)
    weight, bias = logistic_regression((x - mean) / deviation, train_labels.cpu())
    scores = (x_test - mean) / deviation @ weight + bias
    labels = test_labels.cpu()
    share = float(labels.double().mean())
    accuracy = float(((scores > 0) == labels).double().mean())
    return Probing(latents.tolist(), accuracy, max(share, 1 - share), auc(scores, labels))


def logistic_regression(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Weights `[k]` and bias `[]` that make labels, bool `[n]`, most likely given `x [n, k]`, float64:

        minimise  sum_i log(1 + exp(-y_i (w . x_i + b))) + |w|^2 / 2,   y_i = 1 or -1

    (scikit-learn's default), by L-BFGS.
    """
    targets = labels.to(x.dtype)
    parameters = x.new_zeros(x.shape[-1] + 1).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [parameters], max_iter=500, tolerance_grad=1e-8, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        scores = x @ parameters[:-1] + parameters[-1]
        # The mean keeps L-BFGS's tolerances apart from the number of rows.
        total = torch.nn.functional.binary_cross_entropy_with_logits(scores, targets)
        total = total + parameters[:-1].square().sum() / (2 * len(x))
        total.backward()
        return total

    with torch.enable_grad():
        optimizer.step(loss)
    return parameters.detach()[:-1], parameters.detach()[-1]


def auc(scores: Tensor, labels: Tensor) -> float:
    """The probability that a row with the label has a larger score than one without, equal scores half counted.

    `scores [n]`, labels bool `[n]` of both kinds.
    """
    _, place, counts = scores.unique(return_inverse=True, return_counts=True)
    # The mean rank of each value among all rows, from 1 on.
    ranks = (counts.cumsum(0) - (counts - 1) / 2).double()[place]
    n_with = int(labels.sum())
    n_pairs = n_with * (len(labels) - n_with)
    return float((ranks[labels].sum() - n_with * (n_with + 1) / 2) / n_pairs)


def _mean_difference(codes: SparseCodes, labels: Tensor, d_sae: int) -> Tensor:
    """`[F]` float64, mean activation of rows with the label less that of the others."""
    live = codes.mask()
    signed = torch.where(labels, 1 / labels.sum(), -1 / (~labels).sum()).double()
    values = codes.values.double() * signed.unsqueeze(-1)
    return values.new_zeros(d_sae).index_add_(0, codes.indices[live].long(), values[live])
