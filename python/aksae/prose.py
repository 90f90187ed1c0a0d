"""The offline corpus `python-prose`: English prose that every Python installation carries, made into documents."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import itertools
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

MIN_CHARACTERS = 400
"""A document shorter than this, after cleaning, is dropped: about 90 tokens."""
MAX_CHARACTERS = 12_000
"""A document takes paragraphs up to this many characters, so that no change log outweighs the rest."""
FILES_PER_PACKAGE = 500
"""Source files read per top-level package, in sorted order, so that no package dominates and the walk is bounded."""

_OWN = {"aksae", "aksae_kernels"}
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
_LICENCE_NAME = re.compile(r"LICEN[CS]E|COPYING|NOTICE", re.IGNORECASE)
_COMMON = """
    a an and are as at be but by can for from has have if in is it its may not of on or such that the their there
    these they this to was when which will with you your
"""
_FUNCTION_WORDS = frozenset(_COMMON.split())
_CLOSING = ")\"'\u201d\u2019"
_MARKUP = (
    (re.compile(r"^\s*(```|~~~).*?^\s*\1[^\n]*$", re.DOTALL | re.MULTILINE), ""),  # fenced code
    (re.compile(r"<!--.*?-->", re.DOTALL), ""),
    (re.compile(r"</?[a-zA-Z][^<>\n]*>(?!`)"), ""),  # HTML tags, but not the target of an rst link
    (re.compile(r"!\[[^\]]*\](\([^)]*\)|\[[^\]]*\])"), ""),  # markdown images
    (re.compile(r"\[([^\]]+)\](\([^)]*\)|\[[^\]]*\])"), r"\1"),  # markdown links
    (re.compile(r"`([^`<>]+?)\s*<[^>`]+>`_+"), r"\1"),  # rst links
    (re.compile(r":[a-z:]+:`[~!]?([^`<>]+?)(\s*<[^>`]+>)?`"), r"\1"),  # rst roles
    (re.compile(r"\s?\[[#*\w]+\]_"), ""),  # rst footnotes
    (re.compile(r"`([^`]+)`_+"), r"\1"),
    (re.compile(r"`+|\*{1,3}"), ""),  # code marks and emphasis
)


def documents() -> Iterator[str]:
    """Documentation topics, package descriptions, licences and module docstrings, in that order, each cleaned.

    Nothing is imported or executed: docstrings are read from the sources. A paragraph is kept when it reads as English
    prose (see `_is_prose`), its lines are joined, and it appears once in the whole corpus: two paragraphs count as the
    same if their first 80 letters agree, which also folds the many variants of one licence. Files are visited in sorted
    order, so the same installation gives the same documents; another set of packages gives another corpus.
    """
    seen: set[str] = set()
    for raw in itertools.chain(_topics(), _descriptions(), _licences(), _docstrings()):
        paragraphs: list[str] = []
        room = MAX_CHARACTERS
        for paragraph in _paragraphs(raw):
            key = re.sub(r"[\W\d_]", "", paragraph.lower())[:80]
            if len(paragraph) <= room and key not in seen and _is_prose(paragraph):
                seen.add(key)
                paragraphs.append(paragraph)
                room -= len(paragraph)
        document = "\n\n".join(paragraphs)
        if len(document) >= MIN_CHARACTERS:
            yield document


def _paragraphs(raw: str) -> Iterator[str]:
    text = raw.expandtabs()
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    for block in re.split(r"\n\s*\n", text):
        if ">>>" not in block:  # an interpreter session
            yield " ".join(" ".join(line.strip().lstrip("#>-+| ") for line in block.splitlines()).split())


def _is_prose(paragraph: str) -> bool:
    """Whether it is at least 8 words long, ends like a sentence, is mostly letters and has English function words.

    Code, tables, headings, lists of names and other languages fail one of these.
    """
    words = paragraph.split()
    if len(words) < 8 or paragraph.rstrip(_CLOSING)[-1:] not in {".", ":", "!", "?", ";"}:
        return False
    letters = sum(character.isalpha() for character in paragraph)
    function_words = sum(word.lower() in _FUNCTION_WORDS for word in words)
    return letters >= 0.85 * sum(map(len, words)) and function_words >= 0.2 * len(words)


def _topics() -> Iterator[str]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name]


def _distributions() -> list[importlib.metadata.Distribution]:
    named = {}
    for found in importlib.metadata.distributions():
        named.setdefault((found.metadata.get("Name") or "").lower().replace("-", "_"), found)
    return [named[name] for name in sorted(named) if name not in _OWN]


def _descriptions() -> Iterator[str]:
    for distribution in _distributions():
        # Old metadata carries the description as a header, newer metadata as the message body.
        yield distribution.metadata.get("Description") or str(distribution.metadata.get_payload() or "")


def _licences() -> Iterator[str]:
    for distribution in _distributions():
        for file in sorted(distribution.files or [], key=str):
            if _LICENCE_NAME.search(file.name) and file.suffix not in {".py", ".pyc"}:
                path = Path(str(file.locate()))
                if path.is_file():
                    yield path.read_text(encoding="utf-8", errors="ignore")


def _docstrings() -> Iterator[str]:
    paths = sysconfig.get_paths()
    for root in dict.fromkeys(Path(paths[name]) for name in ("stdlib", "purelib", "platlib")):
        for entry in sorted(root.iterdir()) if root.is_dir() else ():
            if entry.name in _OWN | _SKIPPED_FOLDERS:
                continue
            files = _sources(entry) if entry.is_dir() else iter([entry] if entry.suffix == ".py" else [])
            for file in itertools.islice(files, FILES_PER_PACKAGE):
                yield _module_docstring(file)


def _sources(folder: Path) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        if entry.is_dir():
            if entry.name not in _SKIPPED_FOLDERS and not entry.is_symlink():
                yield from _sources(entry)
        elif entry.suffix == ".py":
            yield entry


def _module_docstring(path: Path) -> str:
    """The docstring, "" if there is none; tokenises the head of the file only, where a parse would read all of it."""
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE}
    try:
        with tokenize.open(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in other people's docstrings
            token = next((token for token in tokenize.generate_tokens(file.readline) if token.type not in layout), None)
            value = ast.literal_eval(token.string) if token and token.type == tokenize.STRING else None
    except (OSError, SyntaxError, ValueError, tokenize.TokenError):
        return ""
    return inspect.cleandoc(value) if isinstance(value, str) else ""
