"""Text for training: sources of documents, and contexts of tokens cut from them, split by document."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from .config import TextConfig
from .errors import UserError

MIN_LOSS_TOKENS = 16
"""A context with fewer loss tokens than this is dropped: too short to judge its complexity."""

_BUFFER_CHARACTERS = 8_000_000
_FILE_TYPES = (".txt", ".jsonl", ".parquet")
_OTHER_SOURCES = "python-prose (offline), a .txt, .jsonl or .parquet file, or a Hugging Face dataset name"


@dataclass
class ContextSet:
    """N contexts of at most L tokens, padded on the right."""

    input_ids: np.ndarray
    """`[N, L]` int32."""
    attention_mask: np.ndarray
    """`[N, L]` bool, False on padding."""
    loss_mask: np.ndarray
    """`[N, L]` bool, True for the tokens that enter an SAE loss: neither padding nor special tokens."""
    texts: list[str]
    """Decoded loss tokens of each context; in packed contexts the documents' pieces are joined by a blank line."""
    document: np.ndarray
    """`[N]` int32, number of the document a context starts in; train and held-out share one numbering."""

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, index) -> ContextSet:
        """The contexts at `index` (integers in any order, or a boolean mask `[N]`)."""
        chosen = np.arange(len(self))[np.asarray(index)].reshape(-1)
        arrays = {f.name: getattr(self, f.name)[chosen] for f in fields(self) if f.name != "texts"}
        return ContextSet(texts=[self.texts[i] for i in chosen], **arrays)


def documents(config: TextConfig) -> Iterator[str]:
    """The documents of `config.source` in the order of the source, as a stream: nothing large is held in memory.

    - `python-prose`: see `aksae.prose.documents`.
    - `.txt`: UTF-8; a form feed, or two or more blank lines in a row, end a document. One blank line does not.
    - `.jsonl`, `.parquet`: one document a row, in column `config.column`.
    - anything else: a Hugging Face dataset, or a folder `datasets` can read, streamed.

    Documents of white space only are skipped. Raises `UserError` for a source that is missing, empty, unreadable, not
    UTF-8, or has a row without a string in the column; since this is a generator, at the first such row.
    """
    source = config.source
    path = user_path(source, "text.source")
    if source == "python-prose":
        from . import prose

        found = prose.documents()
    elif path.suffix.lower() in _FILE_TYPES or path.is_file() or source.startswith(("/", "./", "../", "~")):
        found = _hub_documents(config, str(path)) if path.is_dir() else _file_documents(path, config.column)
    else:
        found = _hub_documents(config, source)
    empty = True
    for text in found:
        if text.strip():
            empty = False
            # A lone surrogate, which JSON allows, is no Unicode text: tokenizers refuse it.
            yield text.encode("utf-8", "replace").decode("utf-8")
    if empty:
        raise UserError(f"text.source: {source} is empty; needs at least two documents of text")


def load_contexts(config: TextConfig, tokenizer) -> tuple[ContextSet, ContextSet]:
    """Train and held-out contexts of `config.context_length` tokens, split by document.

    Documents are shuffled with `config.seed` through a buffer of 8 million characters (more than all of
    `python-prose`; a longer stream is mixed locally and read no further than needed) and de-duplicated: a text equal
    to an earlier one up to case and white space is dropped. A document goes to the held-out side whenever that side has
    less than `heldout_fraction` of the loss tokens so far, so both sides grow together and no document is on both.
    Reading stops when each side has its share of `max_tokens` loss tokens; the total never exceeds `max_tokens`.

    Not packed: contexts never cross a document boundary; the last one of a document is padded. Packed: the documents
    of each side are joined by the tokenizer's end-of-text token and cut into full contexts (the remainder is dropped),
    and attention does cross boundaries. A context with fewer than 16 loss tokens is dropped.

    Special tokens that the tokenizer adds by itself (a BOS, or `[CLS]` and `[SEP]`) surround every context and count
    towards its length; a tokenizer that adds none before the text but has a BOS gets it added. These, and any special
    token inside a text, are False in `loss_mask`, as are the first `skip_first` tokens after them. The same settings,
    source and tokenizer give the same contexts.

    Raises `UserError` where `documents` does, for a setting out of range, and if either side stays empty.
    """
    _check(config)
    heldout_budget = round(config.max_tokens * config.heldout_fraction)
    cutter = _Cutter(tokenizer, config)
    train, heldout = _Side(cutter, config.max_tokens - heldout_budget), _Side(cutter, heldout_budget)
    seen: set[bytes] = set()
    for text in _shuffled(documents(config), config.seed):
        digest = hashlib.blake2b(normalised(text).lower().encode(), digest_size=16).digest()
        if digest in seen:
            continue
        document = len(seen)
        seen.add(digest)
        # `verbose` silences the warning that a document is longer than the model's window: it is cut right here.
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        behind = heldout.tokens < config.heldout_fraction * (train.tokens + heldout.tokens)
        side = heldout if (behind and not heldout.full) or train.full else train
        side.add(document, ids)
        if train.full and heldout.full:
            break
    for name, side in (("train", train), ("held-out", heldout)):
        if not side.rows:
            raise UserError(
                f"text.source: {config.source} ({len(seen)} distinct documents) leaves no {name} context of at least "
                f"{cutter.needed} loss tokens; needs at least two documents that long (in a .txt file, form feeds or "
                "two blank lines separate documents), since a document is never on both sides"
            )
    return train.contexts(), heldout.contexts()


def normalised(text: str) -> str:
    """`text` with every run of white space replaced by one space, none at the ends."""
    return " ".join(text.split())


def user_path(name: str | Path, argument: str) -> Path:
    """`name` with its `~` resolved. Raises UserError, starting with `argument`, for the home of an unknown user."""
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise UserError(f"{argument}: got {name}, needs a path: {error}") from error


def read_rows(path: Path, columns: Sequence[str], argument: str) -> Iterator[tuple[str, list]]:
    """Streams a `.jsonl` or `.parquet` file as (`"FILE, row N"`, values of `columns`), N from 1 (jsonl: the line).

    A JSON value of any type, null included, is handed on as it is. Raises `UserError`, starting with `argument` and
    naming file and row, for a missing file, a missing column, malformed JSON or Parquet, or text that is not UTF-8.
    """
    if path.suffix.lower() == ".parquet":
        return _parquet_rows(path, columns, argument)
    return _jsonl_rows(path, columns, argument)


def _check(config: TextConfig) -> None:
    length, fraction = config.context_length, config.heldout_fraction
    if length < MIN_LOSS_TOKENS:
        raise UserError(f"text.context_length: got {length}, needs at least {MIN_LOSS_TOKENS}")
    if not 0 < fraction < 1:
        raise UserError(f"text.heldout_fraction: got {fraction}, needs a number strictly between 0 and 1")
    smaller = min(fraction, 1 - fraction)
    if config.max_tokens * smaller < length:
        raise UserError(
            f"text.max_tokens: got {config.max_tokens}, needs at least {int(length / smaller) + 1}, so that train and "
            f"held-out (text.heldout_fraction {fraction}) each hold a context of {length} tokens"
        )


class _Cutter:
    """What cutting needs to know of the tokenizer and the settings; shared by both sides."""

    def __init__(self, tokenizer, config: TextConfig):
        self.tokenizer, self.length, self.packed = tokenizer, config.context_length, config.packed
        self.prefix, self.suffix = _own_special_tokens(tokenizer)
        if not self.prefix and tokenizer.bos_token_id is not None:
            # The token that language models park attention on had better be one outside the loss.
            self.prefix = [tokenizer.bos_token_id]
        self.skip = config.skip_first
        self.body = self.length - len(self.prefix) - len(self.suffix)
        self.needed = self.body if self.packed else MIN_LOSS_TOKENS
        self.end = tokenizer.eos_token_id
        added = getattr(tokenizer, "added_tokens_decoder", {}).items()
        self.special = np.array([*tokenizer.all_special_ids, *(i for i, token in added if token.special)], np.int32)
        pad = tokenizer.pad_token_id
        self.pad = pad if pad is not None else self.end if self.end is not None else 0
        outside = self.length - self.body + self.skip
        if self.length - outside < MIN_LOSS_TOKENS:
            raise UserError(
                f"text.context_length: got {self.length}, needs at least {outside + MIN_LOSS_TOKENS}, since "
                f"{self.length - self.body} special tokens and the first {self.skip} others are kept out of the loss"
            )
        if self.packed and self.end is None:
            raise UserError("text.packed: got True, needs a tokenizer with an end-of-text token; this one has none")


def _own_special_tokens(tokenizer) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text by itself."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    return [], []


class _Side:
    """Train or held-out: the contexts cut so far, up to a budget of loss tokens."""

    def __init__(self, cutter: _Cutter, budget: int):
        self.cutter, self.budget = cutter, budget
        self.tokens = 0
        self.full = False
        self.rows: list[tuple[int, np.ndarray, np.ndarray]] = []  # document, ids, which are not special
        self._pending = np.empty((0, 2), np.int32)  # packed: (id, document) not yet cut

    def add(self, document: int, ids: Sequence[int]) -> None:
        cutter = self.cutter
        if cutter.packed:
            ids = [*ids, cutter.end]
        stream = np.stack([np.asarray(ids, np.int32), np.full(len(ids), document, np.int32)], axis=1)
        stop = len(stream)
        if cutter.packed:
            stream = np.concatenate([self._pending, stream])
            stop = len(stream) - len(stream) % cutter.body
            self._pending = stream[stop:]
        for start in range(0, stop, cutter.body):
            piece = stream[start : start + cutter.body]
            loss = ~np.isin(piece[:, 0], cutter.special)
            count = int(loss.sum()) - cutter.skip
            if self.full or self.tokens + count > self.budget:
                self.full = True
                return
            if count >= MIN_LOSS_TOKENS:
                self.tokens += count
                self.rows.append((int(piece[0, 1]), piece[:, 0], loss))

    def contexts(self) -> ContextSet:
        cutter = self.cutter
        shape = len(self.rows), cutter.length
        input_ids = np.full(shape, cutter.pad, np.int32)
        attention_mask, loss_mask = np.zeros(shape, bool), np.zeros(shape, bool)
        texts = []
        for row, (_, ids, loss) in enumerate(self.rows):
            whole = [*cutter.prefix, *ids, *cutter.suffix]
            input_ids[row, : len(whole)] = whole
            attention_mask[row, : len(whole)] = True
            loss_mask[row, len(cutter.prefix) + np.flatnonzero(loss)[cutter.skip :]] = True
            pieces = np.split(ids, np.flatnonzero(np.diff(loss.astype(np.int8))) + 1)
            pieces = pieces[0 if loss[0] else 1 :: 2]  # runs of loss tokens alternate with runs of special ones
            decode = (cutter.tokenizer.decode(piece.tolist(), clean_up_tokenization_spaces=False) for piece in pieces)
            texts.append("\n\n".join(decode))
        document = np.array([document for document, _, _ in self.rows], np.int32)
        return ContextSet(input_ids, attention_mask, loss_mask, texts, document)


def _shuffled(texts: Iterable[str], seed: int) -> Iterator[str]:
    rng = random.Random(seed)
    buffer: list[str] = []
    held = 0
    for text in texts:
        buffer.append(text)
        held += len(text)
        while held > _BUFFER_CHARACTERS:
            index = rng.randrange(len(buffer))
            buffer[index], buffer[-1] = buffer[-1], buffer[index]
            held -= len(buffer[-1])
            yield buffer.pop()
    rng.shuffle(buffer)
    yield from buffer


def _file_documents(path: Path, column: str) -> Iterator[str]:
    if not path.parent.is_dir():
        raise UserError(f"text.source: the folder {path.parent} does not exist; needs {_OTHER_SOURCES}")
    if not path.is_file():
        raise UserError(f"text.source: there is no file {path}; needs {_OTHER_SOURCES}")
    if path.suffix.lower() not in _FILE_TYPES:
        raise UserError(f"text.source: got {path}, needs a file that ends in {', '.join(_FILE_TYPES)}")
    if path.suffix.lower() == ".txt":
        yield from _split_at_blank_lines(_lines(path, "text.source"))
        return
    for place, (text,) in read_rows(path, [column], "text.source"):
        if not isinstance(text, str):
            raise UserError(f"text.source: {place}: column {column!r} holds {_kind(text)}, needs a string")
        yield text


def _split_at_blank_lines(lines: Iterable[str]) -> Iterator[str]:
    block: list[str] = []
    blank = 0
    for line in lines:
        *finished, line = line.split("\f")
        for piece in finished:
            yield "".join([*block, piece])
            block, blank = [], 0
        blank = 0 if line.strip() else blank + 1
        block.append(line)
        if blank == 2:
            yield "".join(block)
            block = []
    yield "".join(block)


def _lines(path: Path, argument: str) -> Iterator[str]:
    problem = f"{argument}: {path} is not UTF-8 text (it looks binary); needs a text file in UTF-8"
    try:
        with path.open(encoding="utf-8-sig") as file:
            for line in file:
                if "\0" in line:
                    raise UserError(problem)
                yield line
    except UnicodeDecodeError as error:
        raise UserError(problem) from error
    except OSError as error:
        raise UserError(f"{argument}: cannot read {path}: {error.strerror}") from error


def _jsonl_rows(path: Path, columns: Sequence[str], argument: str) -> Iterator[tuple[str, list]]:
    for number, line in enumerate(_lines(path, argument), 1):
        if not line.strip():
            continue
        place = f"{path}, row {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{argument}: {place} is not JSON ({error}); needs one JSON object a line") from error
        if not isinstance(row, dict):
            raise UserError(f"{argument}: {place} holds {_kind(row)}, needs a JSON object")
        _need_columns(row, columns, f"{argument}: {place}")
        yield place, [row[column] for column in columns]


def _parquet_rows(path: Path, columns: Sequence[str], argument: str) -> Iterator[tuple[str, list]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _need_columns(file.schema_arrow.names, columns, f"{argument}: {path}")
            for batch in file.iter_batches(batch_size=256, columns=list(columns)):
                for values in zip(*(batch.column(column).to_pylist() for column in columns), strict=True):
                    number += 1
                    yield f"{path}, row {number}", list(values)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{argument}: cannot read {path} as Parquet: {_first_line(error)}") from error


def _hub_documents(config: TextConfig, name: str) -> Iterator[str]:
    import datasets

    column, argument = config.column, f"text.source: dataset {name}"
    number = 0
    try:
        for row in datasets.load_dataset(name, config.subset, split=config.split, streaming=True):
            number += 1
            _need_columns(row, [column], argument)
            text = row[column]
            if not isinstance(text, str):
                raise UserError(f"{argument}, row {number}: column {column!r} holds {_kind(text)}, needs a string")
            yield text
    except UserError:
        raise
    except Exception as error:  # the library, its readers and its network stack raise many unrelated types
        raise UserError(
            f"{argument} cannot be read (subset {config.subset}, split {config.split}; {type(error).__name__}: "
            f"{_first_line(error)}); pass {_OTHER_SOURCES} that can be reached"
        ) from error


def _need_columns(found: Iterable[str], columns: Iterable[str], where: str) -> None:
    for column in columns:
        if column not in found:
            raise UserError(f"{where} has no column {column!r}; it has {', '.join(map(repr, found)) or 'none'}")


def _kind(value) -> str:
    return "nothing (null)" if value is None else f"a value of type {type(value).__name__}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
