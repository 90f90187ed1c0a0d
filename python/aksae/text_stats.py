"""Text complexity from text statistics alone: offline, deterministic, for English."""

from __future__ import annotations

import functools
import importlib.metadata
import math
import re
from pathlib import Path

from .identity import digest_of_file
from .rubric import SCORE_MAX, combine


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_WORD = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*")
_CLAUSE_MARK = re.compile(r"[,;:(\u2013\u2014]")
_ABSTRACT = re.compile(r"\w{3}(?:[ts]ion|ment|ness|[aei]nce|[ae]ncy|ity|ship|ism|ure|acy|logy|ties|cies)s?$")
# Digits, snake_case, dotted.names, paths/and/URLs, calls(), camelCase, ACRONYMS.
_TECHNICAL = re.compile(r"\d|\w[_.=\\/]\w|\(\)|[a-z][A-Z]|^\W*[A-Z]{2,}\W*$")
_SUBORDINATORS = _words(
    "after although as because before if once since than that though unless until when whenever where whereas whereby "
    "wherever whether which while who whom whose"
)
_CONNECTIVES = _words(
    "although because consequently despite either else even hence however if instead neither nevertheless nonetheless "
    "nor not otherwise provided since so than then therefore though thus unless until whereas whether while yet"
)
_REFERENCES = _words(
    "above aforementioned another below both former following foregoing he her hereby herein hereof hereunder him his "
    "it its itself latter other others previous previously same she such that their them themselves then there thereof "
    "therefore these they this those"
)
_GRAMMAR = _words(
    "a about across again against all almost along already also always am among an and any anyone anything are around "
    "at away be been being between beyond but by can cannot could did do does doing done down during each ever every "
    "everyone everything few for from further get gets got had has have having here how i in inside into is just "
    "least less many may me might mine more most much must my myself never no nobody none nothing now of off often on "
    "only onto or our ours ourselves out outside over own per perhaps quite rather really shall should some someone "
    "something still the through throughout till to too toward towards under up upon us very via was we were what "
    "whatever will with within without would you your yours yourself"
)
_FUNCTION_WORDS = _GRAMMAR | _SUBORDINATORS | _CONNECTIVES | _REFERENCES
"""Words that carry grammar rather than content."""


@functools.cache
def identity() -> str:
    """What decides over a score beside the text: this file, the weights, and the packages that count."""
    from . import rubric

    packages = [f"{name} {importlib.metadata.version(name)}" for name in ("textstat", "pyphen")]
    return "; ".join([*packages, *(digest_of_file(Path(file)) for file in (__file__, rubric.__file__))])


def score(text: str) -> float:
    """`rubric.combine` of the six `ratings`: 0 to 10, one decimal; NaN for a text without a word."""
    return combine(rated) if (rated := ratings(text)) else math.nan


def ratings(text: str) -> dict[str, float]:
    """The six dimensions of `text`, 0 to 10 each; {} for a text without a word.

    A dimension is the mean of one or two measures, each rated on a fixed scale (`_rate`) anchored at a low value, rated
    2, and a high one, rated 8: about the 15th and 85th percentile of 128-token contexts of technical English prose (the
    `python-prose` corpus). A rating thus depends on the text alone, never on the other texts.

    | dimension | measure | 2 | 8 |
    |---|---|---|---|
    | lexical | letters per word (`textstat`) | 4.7 | 5.7 |
    |  | syllables per word (`pyphen`'s hyphenation points + 1) | 1.44 | 1.73 |
    | syntactic | words per sentence (`textstat`) | 11 | 22 |
    |  | subordinators and inner punctuation marks per sentence | 0.9 | 3.2 |
    | conceptual | share of content words (all but articles, pronouns, prepositions, auxiliaries, ...) | 0.5 | 0.62 |
    |  | share of words with an abstract suffix (-tion, -ness, -ity, ...) | 0.02 | 0.09 |
    | domain | share of words whose stem is off the Dale-Chall list of familiar words (from `textstat`) | 0.3 | 0.46 |
    |  | share of technical tokens: digits, identifiers, paths, acronyms | 0.01 | 0.11 |
    | logic | connectives and negations per 100 words | 0 | 4.5 |
    | context | pronouns, demonstratives and words that point elsewhere, per 100 words | 1.5 | 7.5 |

    `textstat`'s own syllable counts are left alone: they need a dictionary from the network, and would change with it.
    """
    import textstat

    words = _WORD.findall(text)
    if not words:
        return {}
    lower = [word.lower() for word in words]
    sentences = textstat.sentence_count(text) or 1
    tokens = text.split()
    clauses = sum(word in _SUBORDINATORS for word in lower) + len(_CLAUSE_MARK.findall(text))

    def share(matches) -> float:
        return sum(map(bool, matches)) / len(words)

    return {
        "lexical": _mean(
            _rate(textstat.avg_letter_per_word(text), 4.7, 5.7),
            _rate(sum(map(_syllables, lower)) / len(words), 1.44, 1.73),
        ),
        "syntactic": _mean(
            _rate(textstat.lexicon_count(text) / sentences, 11, 22), _rate(clauses / sentences, 0.9, 3.2)
        ),
        "conceptual": _mean(
            _rate(share(word not in _FUNCTION_WORDS for word in lower), 0.5, 0.62),
            _rate(share(_ABSTRACT.search(word) for word in lower), 0.02, 0.09),
        ),
        "domain": _mean(
            _rate(share(not _familiar(word) for word in lower), 0.3, 0.46),
            _rate(sum(bool(_TECHNICAL.search(token)) for token in tokens) / len(tokens), 0.01, 0.11),
        ),
        "logic": _rate(100 * share(word in _CONNECTIVES for word in lower), 0, 4.5),
        "context": _rate(100 * share(word in _REFERENCES for word in lower), 1.5, 7.5),
    }


def _rate(value: float, low: float, high: float) -> float:
    """A logistic curve through 2 at `low` and 8 at `high`: strictly increasing, so no text saturates it."""
    steepness = 2 * math.log(4) / (high - low)
    # Past 40 the exponential rounds the rating to 0 or 10 anyway, and further out it would overflow.
    return SCORE_MAX / (1 + math.exp(-max(-40.0, min(40.0, steepness * (value - (low + high) / 2)))))


def _mean(*rates: float) -> float:
    return sum(rates) / len(rates)


@functools.lru_cache(maxsize=100_000)
def _syllables(word: str) -> int:
    return len(_hyphenation().positions(word)) + 1


@functools.lru_cache(maxsize=100_000)
def _familiar(word: str) -> bool:
    familiar = _familiar_words()
    stems = (word.removesuffix(ending) for ending in ("s", "es", "ed", "ing", "ly", "'s", "\u2019s"))
    return word in familiar or any(stem in familiar or stem + "e" in familiar for stem in stems)


@functools.cache
def _hyphenation():
    import pyphen

    return pyphen.Pyphen(lang="en_US")


@functools.cache
def _familiar_words() -> frozenset[str]:
    from importlib import resources

    return frozenset(resources.files("textstat").joinpath("resources/en/easy_words.txt").read_text("utf-8").split())
