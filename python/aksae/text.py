"""Text for training: sources of documents, and contexts of tokens cut from them, split by document."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TextIO

import numpy as np

from .config import BUNDLED_TEXT, MIN_LOSS_TOKENS, TextConfig, user_path, validate_text
from .errors import Notice, UserError

LONGEST_DOCUMENT = 1_000_000
"""Characters of the longest document; a longer one is read in parts, each a document of its own."""

_BUFFER_CHARACTERS = 8_000_000
# Some 16 times the characters of a token: enough to mix, and no more of a long source is read than a short run needs.
_BUFFER_PER_TOKEN = 64
_READ_CHARACTERS = 1 << 16
_TOKENIZED_CHARACTERS = 100_000
_PARQUET_BYTES, _PARQUET_ROWS = 1 << 20, 256

_END_OF_TEXT = re.compile(r"<\|endoftext\|>")
_GAP = re.compile(rf"{_END_OF_TEXT.pattern}|\f|\n(?:[^\S\n\f]*\n){{2,}}")
_FILE_TYPES = (".txt", ".jsonl", ".parquet")
_UTF8_NEEDED = "needs UTF-8: a binary file is no text, and other encodings (Latin-1, UTF-16) have to be converted"
_OTHER_SOURCES = "python-prose (offline), a .txt, .jsonl or .parquet file, a folder, or a Hugging Face dataset name"


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

    def followed_by(self, others: ContextSet) -> ContextSet:
        """These contexts, then others of the same length."""
        names = [f.name for f in fields(self) if f.name != "texts"]
        arrays = {name: np.concatenate([getattr(self, name), getattr(others, name)]) for name in names}
        return ContextSet(texts=[*self.texts, *others.texts], **arrays)


def documents(config: TextConfig) -> Iterator[str]:
    """The documents of `config.source` in the order of the source, as a stream: nothing large is held in memory.

    - `python-prose`: see `aksae.prose.documents`.
    - a `.txt` file: UTF-8, with or without a byte order mark, any line ends. If `<|endoftext|>` occurs in the first
      million characters, that separates the documents; else form feeds, two or more blank lines in a row, and
      `<|endoftext|>` where it occurs further on. A single blank line separates nothing.
    - a folder that holds `.txt` files, at any depth: each is one document, or several separated by `<|endoftext|>`, in
      the order of their paths. Hidden files are left out.
    - `.jsonl`, `.parquet`: one document a row, in column `config.column`; a row is read whole.
    - anything else: a Hugging Face dataset, or a folder that `datasets` can read, streamed.

    A document of more than a million characters is given in parts of at most that, cut before white space where there
    is some, each a document of its own; a `Notice` says so. Documents of white space only are skipped.

    Raises `UserError` for a source that is missing, empty, unreadable, not UTF-8 (the byte and its place are named),
    or has a row without a string in the column; since this is a generator, at the first such row.
    """
    source = config.source
    path = user_path(source, "text.source")
    if source == BUNDLED_TEXT:
        from . import prose

        found = prose.documents()
    elif path.is_dir():
        files = _text_files(path)
        found = _folder_documents(files) if files else _hub_documents(config, str(path))
    elif path.suffix.lower() in _FILE_TYPES or path.is_file() or source.startswith(("/", "./", "../", "~")):
        found = _file_documents(path, config.column)
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


def check_source(config: TextConfig) -> None:
    """Read the first document, to no other end than to raise what `documents` raises before anything is spent."""
    next(documents(config))


def load_contexts(config: TextConfig, tokenizer) -> tuple[ContextSet, ContextSet]:
    """Train and held-out contexts of `config.context_length` tokens, split by document.

    Documents are shuffled with `config.seed` through a buffer of 64 characters for each of `max_tokens`, at most 8
    million (more than all of `python-prose`; a longer stream is mixed locally and read no further than needed) and
    de-duplicated: a text equal to an earlier one up to case and white space is dropped. A document goes to the held-out
    side whenever that side has less than `heldout_fraction` of the loss tokens so far, so both sides grow together and
    no document is on both. Reading stops when each side has its share of `max_tokens` loss tokens; the total never
    exceeds `max_tokens`. A document of over 100,000 characters is tokenized in blocks, and no further than needed.

    Not packed: contexts never cross a document boundary; the last one of a document is padded. Packed: the documents
    of each side are joined by the tokenizer's end-of-text token and cut into full contexts (the remainder is dropped),
    and attention does cross boundaries. A context with fewer than 16 loss tokens is dropped.

    Special tokens that the tokenizer adds by itself (a BOS, or `[CLS]` and `[SEP]`) surround every context and count
    towards its length; a tokenizer that adds none before the text but has a BOS gets it added. These, and any special
    token inside a text, are False in `loss_mask`, as are the first `skip_first` tokens after them. The same settings,
    source and tokenizer give the same contexts.

    Raises `UserError` where `documents` does, for a setting out of range, and if either side stays empty.
    """
    validate_text(config)
    heldout_budget = round(config.max_tokens * config.heldout_fraction)
    cutter = _Cutter(tokenizer, config)
    train, heldout = _Side(cutter, config.max_tokens - heldout_budget), _Side(cutter, heldout_budget)
    document = 0
    for document, text in enumerate(_distinct(config)):
        behind = heldout.tokens < config.heldout_fraction * (train.tokens + heldout.tokens)
        side = heldout if (behind and not heldout.full) or train.full else train
        side.add(document, text)
        if train.full and heldout.full:
            break
    for name, side in (("train", train), ("held-out", heldout)):
        if not side.rows:
            number = f"{document + 1} distinct documents" if document else "a single document"
            raise UserError(
                f"text.source: {config.source} has {number}, which leaves no {name} context of at least "
                f"{cutter.needed} loss tokens; needs at least two documents that long, since a document is never on "
                "both sides (in a .txt file, <|endoftext|>, form feeds or two blank lines separate documents; in a "
                "folder of .txt files each is one)"
            )
    return train.contexts(), heldout.contexts()


def whole_contexts(config: TextConfig, tokenizer) -> ContextSet:
    """The contexts that `load_contexts` would share out, all on one side; `config.heldout_fraction` is not looked at.

    Raises `UserError` where `documents` does, for a setting out of range, and where there is no context.
    """
    validate_text(config, whole=True)
    cutter = _Cutter(tokenizer, config)
    side = _Side(cutter, config.max_tokens)
    for document, text in enumerate(_distinct(config)):
        side.add(document, text)
        if side.full:
            break
    if not side.rows:
        raise UserError(
            f"text.source: {config.source} has no context of at least {cutter.needed} loss tokens, needs one"
        )
    return side.contexts()


def normalised(text: str) -> str:
    """`text` with every run of white space replaced by one space, none at the ends."""
    return " ".join(text.split())


def read_rows(path: Path, columns: Sequence[str], argument: str) -> Iterator[tuple[str, list]]:
    """Streams a `.jsonl` or `.parquet` file as (`"FILE, row N"`, values of `columns`), N from 1 (jsonl: the line).

    A JSON value of any type, null included, is handed on as it is. Raises `UserError`, starting with `argument` and
    naming file and row, for a missing file, a missing column, malformed JSON or Parquet, or text that is not UTF-8.
    """
    if path.suffix.lower() == ".parquet":
        return _parquet_rows(path, columns, argument)
    return _jsonl_rows(path, columns, argument)


class _Cutter:
    """What cutting needs to know of the tokenizer and the settings; shared by both sides."""

    def __init__(self, tokenizer, config: TextConfig):
        self.tokenizer, self.length, self.packed = tokenizer, config.context_length, config.packed
        self.prefix, self.suffix = special_tokens(tokenizer)
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

    def ids(self, text: str) -> Iterator[np.ndarray]:
        """The tokens of a document, and the end-of-text token if contexts are packed; a long document's block by block.

        Whoever has enough stops early: tokenizing takes a hundred bytes of memory for each character.
        """
        for block in _pieces(text, _TOKENIZED_CHARACTERS):
            # `verbose` silences the warning that it is longer than the model's window: it is cut here.
            yield np.asarray(self.tokenizer(block, add_special_tokens=False, verbose=False)["input_ids"], np.int32)
        if self.packed:
            yield np.array([self.end], np.int32)


def special_tokens(tokenizer) -> tuple[list[int], list[int]]:
    """What stands before and after each context: what the tokenizer puts there by itself, and a BOS before it where
    the tokenizer has one and puts nothing there."""
    before, after = _own_special_tokens(tokenizer)
    if not before and tokenizer.bos_token_id is not None:
        # The token that language models park attention on had better be one outside the loss.
        before = [tokenizer.bos_token_id]
    return before, after


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

    def add(self, document: int, text: str) -> None:
        """Cut contexts from a document until it ends or the budget is spent."""
        body = self.cutter.body
        stream = self._pending
        for ids in self.cutter.ids(text):
            stream = np.concatenate([stream, np.stack([ids, np.full_like(ids, document)], axis=1)])
            stop = len(stream) - len(stream) % body
            self._cut(stream[:stop])
            stream = stream[stop:]
            if self.full:
                return
        if self.cutter.packed:
            self._pending = stream
        else:
            self._cut(stream)

    def _cut(self, stream: np.ndarray) -> None:
        cutter = self.cutter
        for start in range(0, len(stream), cutter.body):
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


def _distinct(config: TextConfig) -> Iterator[str]:
    """The documents, shuffled, without those that equal an earlier one up to case and white space."""
    seen: set[bytes] = set()
    buffer = min(_BUFFER_CHARACTERS, _BUFFER_PER_TOKEN * config.max_tokens)
    for text in _shuffled(documents(config), config.seed, buffer):
        digest = hashlib.blake2b(normalised(text).lower().encode(), digest_size=16).digest()
        if digest not in seen:
            seen.add(digest)
            yield text


def _shuffled(texts: Iterable[str], seed: int, size: int) -> Iterator[str]:
    rng = random.Random(seed)
    buffer: list[str] = []
    held = 0
    for text in texts:
        buffer.append(text)
        held += len(text)
        while held > size:
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
        chunks = _chunks(path, "text.source")
        head = "".join(itertools.islice(chunks, LONGEST_DOCUMENT // _READ_CHARACTERS + 1))
        separator = _END_OF_TEXT if _END_OF_TEXT.search(head) else _GAP
        yield from _split(itertools.chain([head], chunks), separator, str(path))
        return
    for place, (text,) in read_rows(path, [column], "text.source"):
        if not isinstance(text, str):
            raise UserError(f"text.source: {place}: column {column!r} holds {_kind(text)}, needs a string")
        yield from _parts(text, str(path))


def _text_files(folder: Path) -> list[Path]:
    """The `.txt` files of a folder; none where it is a matter for `datasets`."""
    files = [path for path in folder.rglob("*") if path.is_file() and not _hidden(path.relative_to(folder))]
    texts = [path for path in files if path.suffix.lower() == ".txt"]
    rows = [path for path in files if path.suffix.lower() in _FILE_TYPES and path not in texts]
    if not files:
        raise UserError(f"text.source: got {folder}, an empty folder; needs {_OTHER_SOURCES}")
    if texts and rows:
        raise UserError(
            f"text.source: got {folder}, which holds .txt files ({min(texts)}) and others ({min(rows)}); needs a "
            "folder of one kind, or one of the files"
        )
    return sorted(texts)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _folder_documents(files: Iterable[Path]) -> Iterator[str]:
    for path in files:
        yield from _split(_chunks(path, "text.source"), _END_OF_TEXT, str(path))


def _split(chunks: Iterable[str], separator: re.Pattern[str], name: str) -> Iterator[str]:
    """What `separator` separates in the text that `chunks` make up, a long document in parts."""
    held = ""
    for chunk in chunks:
        *whole, held = separator.split(held + chunk)
        for document in whole:
            yield from _parts(document, name)
        # So much longer that no separator can begin in a part and end behind it.
        if len(held) >= LONGEST_DOCUMENT + _READ_CHARACTERS:
            *parts, held = _parts(held, name)
            yield from parts
    yield from _parts(held, name)


def _parts(document: str, name: str) -> Iterator[str]:
    """The document, or its parts if it is too long for one, which a `Notice` says."""
    if len(document) > LONGEST_DOCUMENT:
        warnings.warn(
            f"text.source: {name} has a document of over {LONGEST_DOCUMENT:,} characters; it is read in parts of at "
            "most that, each a document of its own, so train and held-out may hold parts of the same one",
            Notice,
            stacklevel=2,
        )
    return _pieces(document, LONGEST_DOCUMENT)


def _pieces(text: str, length: int) -> Iterator[str]:
    """`text` in pieces of at most `length` characters, cut before a line end or a space of a piece's second half."""
    start = 0
    while len(text) - start > length:
        middle, end = start + length // 2, start + length
        breaks = (text.rfind(character, middle, end) for character in "\n ")
        cut = next((place for place in breaks if place > start), end)
        yield text[start:cut]
        start = cut
    yield text[start:]


def _chunks(path: Path, argument: str) -> Iterator[str]:
    """The text of a file, some characters at a time: UTF-8, a byte order mark left out, line ends as one newline."""
    with _text_file(path, argument) as file:
        while chunk := file.read(_READ_CHARACTERS):
            yield _without_nul(chunk, path, argument)


def _lines(path: Path, argument: str) -> Iterator[str]:
    with _text_file(path, argument) as file:
        for line in file:
            yield _without_nul(line, path, argument)


@contextmanager
def _text_file(path: Path, argument: str) -> Iterator[TextIO]:
    """The file, open for reading; what goes wrong in the block is the file's fault."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            try:
                yield file
            except UnicodeDecodeError as error:
                # The decoder has been given all that was read so far; `error.object` is the end of it.
                place = file.buffer.tell() - len(error.object) + error.start
                found = f"byte 0x{error.object[error.start]:02x} at offset {place}"
                raise UserError(f"{argument}: {path} is not UTF-8 text ({found}); {_UTF8_NEEDED}") from error
    except OSError as error:
        raise UserError(f"{argument}: cannot read {path}: {error.strerror}") from error


def _without_nul(text: str, path: Path, argument: str) -> str:
    if "\0" in text:
        raise UserError(f"{argument}: {path} is not UTF-8 text (it holds a NUL character); {_UTF8_NEEDED}")
    return text


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
        # Neither a whole column nor a whole row group: as much as a batch of about a megabyte takes.
        with pyarrow.parquet.ParquetFile(path, buffer_size=_PARQUET_BYTES, pre_buffer=False) as file:
            _need_columns(file.schema_arrow.names, columns, f"{argument}: {path}")
            for group in range(file.num_row_groups):
                content = file.metadata.row_group(group)
                bytes_of_row = max(1, content.total_byte_size // max(1, content.num_rows))
                rows = max(1, min(_PARQUET_ROWS, _PARQUET_BYTES // bytes_of_row))
                for batch in file.iter_batches(rows, row_groups=[group], columns=list(columns)):
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
            yield from _parts(text, name)
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
