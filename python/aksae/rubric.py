"""The six dimensions of text complexity and their weights: what `text-stats` measures and `llm` asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

SCORE_MAX = 10.0
"""Ratings and scores run from 0 (simplest) to this."""


class Dimension(NamedTuple):
    weight: float
    question: str


DIMENSIONS: dict[str, Dimension] = {
    "lexical": Dimension(0.20, "How rare, long and varied are the words?"),
    "syntactic": Dimension(0.20, "How long and nested are the sentences: subordinate clauses, insertions, lists?"),
    "conceptual": Dimension(0.25, "How many ideas, and how abstract, does each sentence carry?"),
    "domain": Dimension(0.15, "How much specialist knowledge and terminology does a reader need?"),
    "logic": Dimension(0.10, "How intricate is the reasoning: conditions, contrasts, causes, exceptions?"),
    "context": Dimension(0.10, "How much must be carried over from elsewhere: references, pronouns, implied facts?"),
}
"""Dimensions and weights of the AdaptiveK paper (arXiv 2508.17320); the weights sum to 1."""


def combine(ratings: Mapping[str, float]) -> float:
    """`sum_d weight_d * rating_d` over the six dimensions, rounded to one decimal; ratings 0 to 10, so is the score."""
    return round(sum(dimension.weight * ratings[name] for name, dimension in DIMENSIONS.items()), 1)
