"""Sources of text, and the contexts cut from them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from aksae import prose, text
from aksae.config import TextConfig
from aksae.errors import Notice, UserError
from aksae.text import LONGEST_DOCUMENT, MIN_LOSS_TOKENS, ContextSet, documents, load_contexts

LENGTH = 32
END = "<end>"


def byte_tokenizer(template: str | None = None, bos: str | None = None, eos: str | None = END):
    """One token a byte, so decoding is exact; `template` wraps texts in special tokens, as real tokenizers do."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<bos>", "<sep>", END]
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE({token: i for i, token in enumerate(names + alphabet)}, merges=[])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    if template:
        specials = [(name, i) for i, name in enumerate(names)]
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single=template, special_tokens=specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token=bos, sep_token="<sep>", eos_token=eos
    )


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def write(tmp_path) -> Callable:
    """Writes one text a document to a JSONL file and gives a config that reads it."""

    def writer(texts: list[str], **settings) -> TextConfig:
        path = tmp_path / "texts.jsonl"
        path.write_text("".join(json.dumps({"text": item}) + "\n" for item in texts))
        return TextConfig(
            **{"source": str(path), "context_length": LENGTH, "heldout_fraction": 0.25, "skip_first": 0, **settings}
        )

    return writer


def letters(count: int, length: int = 75) -> list[str]:
    """Distinct documents; no context-sized piece of one occurs in another."""
    return [(f"{i:03d}" + chr(ord("a") + i % 26)) * (length // 4) + "." * (length % 4) for i in range(count)]


def assert_consistent(contexts: ContextSet, tokenizer) -> None:
    shape = len(contexts), LENGTH
    assert contexts.input_ids.shape == contexts.attention_mask.shape == contexts.loss_mask.shape == shape
    assert contexts.input_ids.dtype == contexts.document.dtype == np.int32
    assert contexts.attention_mask.dtype == contexts.loss_mask.dtype == bool
    assert len(contexts.texts) == len(contexts.document) == len(contexts)
    lengths = contexts.attention_mask.sum(1)
    np.testing.assert_array_equal(contexts.attention_mask, np.arange(LENGTH) < lengths[:, None])
    special = np.isin(contexts.input_ids, tokenizer.all_special_ids)
    np.testing.assert_array_equal(contexts.loss_mask, contexts.attention_mask & ~special)
    assert contexts.loss_mask.sum(1).min() >= MIN_LOSS_TOKENS


# Contexts


def test_a_context_stays_inside_its_document(write, tokenizer):
    texts = letters(12)
    train, heldout = load_contexts(write(texts), tokenizer)
    for contexts in (train, heldout):
        assert_consistent(contexts, tokenizer)
        for i, piece in enumerate(contexts.texts):
            assert sum(piece in document for document in texts) == 1
            assert tokenizer.decode(contexts.input_ids[i][contexts.loss_mask[i]]) == piece
    # 75 bytes are two full contexts; the 11 left over are too few for a third.
    assert len(train) + len(heldout) == 2 * len(texts)
    assert sorted(train.texts + heldout.texts) == sorted(t[i : i + 32] for t in texts for i in (0, 32))


def test_the_last_context_of_a_document_is_padded_or_dropped(write, tokenizer):
    texts = letters(4, length=LENGTH + MIN_LOSS_TOKENS) + letters(8, length=LENGTH + MIN_LOSS_TOKENS - 1)[4:]
    train, heldout = load_contexts(write(texts), tokenizer)
    lengths = sorted([*train.attention_mask.sum(1), *heldout.attention_mask.sum(1)])
    assert lengths == [MIN_LOSS_TOKENS] * 4 + [LENGTH] * 8
    assert set(train.input_ids[~train.attention_mask]) <= {tokenizer.pad_token_id}


def test_packed_contexts_are_full_and_joined_by_the_end_token(write, tokenizer):
    texts = letters(40, length=21)
    train, heldout = load_contexts(write(texts, packed=True), tokenizer)
    sides = []
    for contexts in (train, heldout):
        assert_consistent(contexts, tokenizer)
        assert contexts.attention_mask.all()
        # The contexts of a side, one after another, are its documents joined by the end token.
        stream = tokenizer.decode(contexts.input_ids.reshape(-1)).split(END)
        assert all(document in texts for document in stream[:-1])
        assert (contexts.loss_mask == (contexts.input_ids != tokenizer.eos_token_id)).all()
        sides.append(set(stream))
    assert not sides[0] & sides[1]
    assert not set(train.document) & set(heldout.document)
    assert "\n\n" in train.texts[0]
    assert END not in train.texts[0]


@pytest.mark.parametrize("packed", [False, True], ids=["bounded", "packed"])
def test_special_tokens_of_the_tokenizer_surround_each_context_outside_the_loss(write, packed):
    tokenizer = byte_tokenizer("<bos> $A <sep>", bos="<bos>")
    train, heldout = load_contexts(write(letters(12), packed=packed), tokenizer)
    for contexts in (train, heldout):
        assert_consistent(contexts, tokenizer)
        assert (contexts.input_ids[:, 0] == tokenizer.bos_token_id).all()
        last = contexts.attention_mask.sum(1) - 1
        assert (contexts.input_ids[np.arange(len(contexts)), last] == tokenizer.sep_token_id).all()
        assert not any("<bos>" in piece or "<sep>" in piece for piece in contexts.texts)
    assert (train.loss_mask.sum(1) == LENGTH - 2).any()


def test_a_bos_that_the_tokenizer_does_not_add_is_added(write):
    tokenizer = byte_tokenizer(bos="<bos>")
    for contexts in load_contexts(write(letters(12)), tokenizer):
        assert (contexts.input_ids[:, 0] == tokenizer.bos_token_id).all()
        assert not contexts.loss_mask[:, 0].any()
        assert contexts.loss_mask[:, 1].all()
        assert_consistent(contexts, tokenizer)


def test_the_first_tokens_are_read_but_not_in_the_loss(write, tokenizer):
    config = write(letters(12))
    plain, skipping = (load_contexts(dataclasses.replace(config, skip_first=n), tokenizer)[0] for n in (0, 3))
    assert skipping.texts == plain.texts
    np.testing.assert_array_equal(skipping.input_ids, plain.input_ids)
    assert not skipping.loss_mask[:, :3].any()
    np.testing.assert_array_equal(skipping.loss_mask[:, 3:], plain.loss_mask[:, 3:])


def test_special_tokens_inside_a_text_are_no_loss_tokens(write, tokenizer):
    texts = [document[:20] + END + document[20:27] for document in letters(8)]
    train, _ = load_contexts(write(texts), tokenizer)
    assert_consistent(train, tokenizer)
    assert (train.attention_mask.sum(1) == 28).all()
    assert (train.loss_mask.sum(1) == 27).all()
    assert train.texts[0][20:22] == "\n\n"


def test_texts_survive_bytes_cut_in_half_and_lone_surrogates(write, tokenizer):
    train, _ = load_contexts(write(["é" * 40 + "x", "\ud800" + "ab" * 20, "ü" * 41]), tokenizer)
    assert all(isinstance(piece, str) and piece.encode() for piece in train.texts)


def test_select_takes_indices_and_masks(write, tokenizer):
    train, _ = load_contexts(write(letters(12)), tokenizer)
    for index in ([3, 0], np.array([3, 0]), np.array([], int), np.arange(len(train)) % 2 == 0):
        chosen = train.select(index)
        expected = np.arange(len(train))[np.asarray(index, dtype=None if len(index) else int)]
        assert chosen.texts == [train.texts[i] for i in expected]
        np.testing.assert_array_equal(chosen.input_ids, train.input_ids[expected])
        np.testing.assert_array_equal(chosen.document, train.document[expected])
        assert len(chosen) == len(expected)


# Split, budget, order


@pytest.mark.parametrize("packed", [False, True], ids=["bounded", "packed"])
def test_split_is_by_document_within_budget(write, tokenizer, packed):
    config = write(letters(400), packed=packed, max_tokens=8000, heldout_fraction=0.2)
    train, heldout = load_contexts(config, tokenizer)
    assert not set(train.document) & set(heldout.document)
    assert not set(train.texts) & set(heldout.texts)
    counts = np.array([train.loss_mask.sum(), heldout.loss_mask.sum()])
    budget = np.array([6400, 1600])
    assert (counts <= budget).all()
    assert (counts > budget - LENGTH).all()


def test_a_short_source_is_split_in_proportion_too(write, tokenizer):
    train, heldout = load_contexts(write(letters(60), heldout_fraction=0.1), tokenizer)
    assert len(heldout) / (len(train) + len(heldout)) == pytest.approx(0.1, abs=0.02)


def test_equal_documents_are_kept_once(write, tokenizer):
    texts = letters(12)
    again = [f"  {document.upper()}\n" for document in texts] + texts
    once, twice = load_contexts(write(texts), tokenizer), load_contexts(write(texts + again), tokenizer)
    assert sum(map(len, once)) == sum(map(len, twice))
    assert len({*twice[0].document, *twice[1].document}) == len(texts)


def test_seed_decides_the_contexts(write, tokenizer):
    first, again, other = (load_contexts(write(letters(40), seed=seed), tokenizer)[0].texts for seed in (0, 0, 1))
    assert first == again
    assert sorted(first) != sorted(other)


def test_a_stream_is_read_no_further_than_needed(monkeypatch, tokenizer):
    read = itertools.count()
    monkeypatch.setattr(text, "documents", lambda config: (f"{next(read):05d} " * 20 for _ in itertools.count()))
    monkeypatch.setattr(text, "_BUFFER_CHARACTERS", 5_000)
    train, _ = load_contexts(TextConfig(context_length=LENGTH, max_tokens=10_000, skip_first=0), tokenizer)
    # 10,000 tokens of 120 bytes each, of which the last 24 of a document are kept too, and 41 in the buffer.
    assert next(read) < 150
    assert train.texts[0][:5] != "00000", "the buffer must shuffle"


# Sources


def test_txt_documents_end_at_form_feeds_and_two_blank_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufefffirst\n\nstill first\r\n \r\n\r\nsecond\fthird\n\n\n\n\n\ffourth\n".encode())
    assert [document.strip() for document in documents(TextConfig(source=str(path)))] == [
        "first\n\nstill first",
        "second",
        "third",
        "fourth",
    ]


def read(path, **settings) -> list[str]:
    return [document.strip() for document in documents(TextConfig(source=str(path), **settings))]


def test_end_of_text_separates_documents_and_blank_lines_then_do_not(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_bytes(b"Once.\r\n\r\n\r\n\r\nThe end.\r\n<|endoftext|>\r\n\r\nTwice.\fOver.<|endoftext|>\n<|endoftext|>")
    assert read(path) == ["Once.\n\n\n\nThe end.", "Twice.\x0cOver."]


def test_end_of_text_far_down_separates_too(tmp_path):
    path = tmp_path / "late.txt"
    path.write_text("one\n\n\n" + "two " * (LONGEST_DOCUMENT // 2) + "<|endoftext|>three\n\n\nfour")
    with pytest.warns(Notice, match="over 1,000,000 characters"):
        found = read(path)
    assert [found[0], *found[-2:]] == ["one", "three", "four"]


def test_each_txt_file_of_a_folder_is_a_document(tmp_path):
    books = tmp_path / "books"
    (books / "b" / ".hidden").mkdir(parents=True)
    (books / "b" / "second.TXT").write_text("line one\n\n\n\nline two\fline three\n")
    (books / "a.txt").write_text("\ufefffirst\n\n\nbook\n")
    (books / "c.txt").write_text("third<|endoftext|>fourth")
    (books / "d.txt").write_text(" \n")
    (books / "notes.md").write_text("no document")
    (books / "b" / ".hidden" / "x.txt").write_text("no document")
    expected = ["first\n\n\nbook", "line one\n\n\n\nline two\x0cline three", "third", "fourth"]
    assert read(books) == expected
    assert read(f"{books}/") == expected


def test_folders_that_are_no_one_thing_are_named(tmp_path):
    (tmp_path / "mixed").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed" / "a.txt").write_text("a")
    (tmp_path / "mixed" / "b.jsonl").write_text('{"text": "b"}')
    with pytest.raises(
        UserError, match=r"holds .txt files \(.*a.txt\) and others \(.*b.jsonl\); needs a folder of one"
    ):
        read(tmp_path / "mixed")
    with pytest.raises(UserError, match="an empty folder; needs python-prose"):
        read(tmp_path / "empty")
    (tmp_path / "empty" / "a.txt").touch()
    with pytest.raises(UserError, match="empty is empty; needs at least two documents"):
        read(tmp_path / "empty")


@pytest.mark.parametrize("separator", ["<|endoftext|>", "\n\n\n", "\n \n\t\n", "\f"], ids=repr)
def test_no_separator_is_lost_between_two_reads(tmp_path, monkeypatch, separator):
    draw = random.Random(0)
    texts = [draw.choice("abc") * draw.randrange(1, 20) + draw.choice(["", "\n", "\n\nx"]) for _ in range(300)]
    (tmp_path / "a.txt").write_text(separator.join(texts))
    expected = [text.strip() for text in texts]
    assert read(tmp_path / "a.txt") == expected
    for size in (1, 2, 7, 64):
        monkeypatch.setattr(text, "_READ_CHARACTERS", size)
        # Not all read at once, to see whether <|endoftext|> is there.
        monkeypatch.setattr(text, "LONGEST_DOCUMENT", 100)
        assert read(tmp_path / "a.txt") == expected


def test_a_long_document_is_read_in_parts_and_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "LONGEST_DOCUMENT", 100)
    monkeypatch.setattr(text, "_READ_CHARACTERS", 16)
    words = [f"word{i}" for i in range(200)]
    whole = " ".join(words)
    (tmp_path / "a.txt").write_text(whole)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": whole}))
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "a.txt").write_text(whole)
    pyarrow.parquet.write_table(pa.table({"text": [whole]}), tmp_path / "a.parquet")
    for name in ("a.txt", "a.jsonl", "a.parquet", "books"):
        with pytest.warns(Notice, match=r"text.source: .*a\.(txt|jsonl|parquet) has a document of over 100 characters"):
            parts = list(documents(TextConfig(source=str(tmp_path / name))))
        assert "".join(parts) == whole
        assert max(map(len, parts)) <= 100
        assert all(part[0] == " " for part in parts[1:]), "cut before white space"
    (tmp_path / "a.txt").write_text("x" * 1000)
    with pytest.warns(Notice, match="over 100 characters"):
        assert "".join(documents(TextConfig(source=str(tmp_path / "a.txt")))) == "x" * 1000


@pytest.mark.parametrize("packed", [False, True], ids=["bounded", "packed"])
def test_blocks_of_a_document_give_the_contexts_of_the_whole(write, tokenizer, monkeypatch, packed):
    config = write([" ".join(f"{i}word{j}" for j in range(200)) for i in range(8)], packed=packed)
    whole = load_contexts(config, tokenizer)
    monkeypatch.setattr(text, "_TOKENIZED_CHARACTERS", 50)
    for one, other in zip(load_contexts(config, tokenizer), whole, strict=True):
        np.testing.assert_array_equal(one.input_ids, other.input_ids)
        assert one.texts == other.texts


# Reads what a short run needs of each source; prints by how much memory grew, and how many bytes were read.
READER = """
import json, re, sys, warnings
sys.path.insert(0, sys.argv[1])
from test_text import byte_tokenizer
from aksae.config import TextConfig
from aksae.text import load_contexts

def state():
    peak = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]
    return int(peak) * 1024, int(re.search(r"rchar: (\\d+)", open("/proc/self/io").read())[1])

warnings.simplefilter("ignore")
tokenizer = byte_tokenizer()
tokenizer("some text")
for source in sys.argv[2:]:
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts again at what is there now
    before = state()
    train, heldout = load_contexts(TextConfig(source=source, context_length=32, max_tokens=2000), tokenizer)
    assert 1000 < train.loss_mask.sum() <= 1800 and 100 < heldout.loss_mask.sum() <= 200
    print(json.dumps([now - then for then, now in zip(before, state())]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_more_is_read_than_a_short_run_needs(tmp_path):
    draw = random.Random(0)
    words = " ".join(f"{draw.randrange(10**6):x}" for _ in range(100_000)) + " "
    size = 43_000_000
    long, rows = words * (size // len(words)), [f"{n} {words[n % 600_000 :][:4000]}" for n in range(0, size, 4000)]
    stored = {"compression": "none", "use_dictionary": False}
    (tmp_path / "a line.txt").write_text(long)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    pyarrow.parquet.write_table(pa.table({"text": rows}), tmp_path / "rows.parquet", **stored)
    (tmp_path / "books").mkdir()
    for number in range(10):
        (tmp_path / "books" / f"{number}.txt").write_text(f"{number}{long[: size // 10]}")
    (tmp_path / "a row.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in (long, words)))
    pyarrow.parquet.write_table(pa.table({"text": [long, words]}), tmp_path / "a row.parquet", **stored)
    names = ("a line.txt", "rows.jsonl", "rows.parquet", "books", "a row.jsonl", "a row.parquet")
    command = [sys.executable, "-c", READER, str(Path(__file__).parent), *(str(tmp_path / name) for name in names)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    for name, line in zip(names, done.stdout.splitlines(), strict=True):
        memory, read = json.loads(line)
        if name.startswith("a row"):
            # A row is read whole, but not tokenized: the line and the text, as bytes and as characters.
            assert memory < 5 * size, name
            assert read < 1.1 * size, name
        else:
            assert memory < 60_000_000, name
            assert read < 6_000_000, name


def test_jsonl_and_parquet_give_the_column_row_by_row(tmp_path):
    rows = [{"n": i, "body": f"text {i}" * (i != 1)} for i in range(600)]
    expected = [row["body"] for row in rows if row["body"]]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        assert list(documents(TextConfig(source=str(tmp_path / name), column="body"))) == expected


def test_a_dataset_is_streamed_through_datasets(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pyarrow.parquet.write_table(pa.table({"body": ["one", "two"]}), tmp_path / "train.parquet")
    assert list(documents(TextConfig(source=str(tmp_path), column="body"))) == ["one", "two"]
    with pytest.raises(UserError, match=r"has no column 'text'; it has 'body'"):
        list(documents(TextConfig(source=str(tmp_path))))
    with pytest.raises(UserError, match="split nowhere"):
        list(documents(TextConfig(source=str(tmp_path), split="nowhere")))


def fake_datasets(monkeypatch, rows) -> None:
    fake = types.SimpleNamespace(load_dataset=lambda name, subset, *, split, streaming: rows())
    monkeypatch.setitem(sys.modules, "datasets", fake)


def test_an_unreachable_dataset_says_what_to_pass_instead(monkeypatch):
    def unreachable():
        raise ConnectionError("Couldn't reach 'some/set' on the Hub\nsecond line")

    fake_datasets(monkeypatch, unreachable)
    with pytest.raises(UserError) as raised:
        next(documents(TextConfig(source="some/set")))
    message = str(raised.value)
    assert "text.source: dataset some/set cannot be read" in message
    assert "Couldn't reach 'some/set' on the Hub" in message
    assert "python-prose" in message
    assert "\n" not in message


def test_a_dataset_that_breaks_off_or_holds_no_string_is_bad_input(monkeypatch):
    def breaks_off():
        yield {"text": "fine"}
        raise TimeoutError("read timed out")

    fake_datasets(monkeypatch, breaks_off)
    with pytest.raises(UserError, match="TimeoutError: read timed out"):
        list(documents(TextConfig(source="some/set")))
    fake_datasets(monkeypatch, lambda: iter([{"text": "fine"}, {"text": None}]))
    with pytest.raises(UserError, match=r"row 2: column 'text' holds nothing \(null\), needs a string"):
        list(documents(TextConfig(source="some/set")))


def parquet_bytes(**columns) -> bytes:
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


BAD_FILES = {
    "empty txt": ("a.txt", b"", "is empty"),
    "blank txt": ("a.txt", b"\n \n\f\n", "is empty"),
    "empty jsonl": ("a.jsonl", b"", "is empty"),
    "empty parquet": ("a.parquet", b"", "as Parquet"),
    "no rows": ("a.parquet", parquet_bytes(text=pa.array([], pa.string())), "is empty"),
    "binary": ("a.txt", b"\x89PNG\r\n\x1a\n\xff\xfe", r"not UTF-8 text \(byte 0x89 at offset 0\); needs UTF-8"),
    "null bytes": ("a.txt", b"abc\0def", r"not UTF-8 text \(it holds a NUL character\)"),
    "utf-16": ("a.txt", "text".encode("utf-16"), r"byte 0xff at offset 0\); needs UTF-8: .*UTF-16\) have to be"),
    "latin 1": ("a.jsonl", '{"text": "é"}'.encode("latin-1"), r"not UTF-8 text \(byte 0xe9 at offset 10\)"),
    "latin 1 further on": ("a.txt", b"\xef\xbb\xbf" + b"x" * 300_000 + b"\xe9y", r"byte 0xe9 at offset 300003\)"),
    "latin 1 in jsonl": ("a.jsonl", b'{"text": "a"}\n' * 9999 + b"\xe9\n", r"byte 0xe9 at offset 139986\)"),
    "no parquet": ("a.parquet", b"PAR1 but not really", "as Parquet"),
    "no json": ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"row 2 is not JSON"),
    "no object": ("a.jsonl", b"[1]\n", r"row 1 holds a value of type list"),
    "no column": ("a.jsonl", b'{"text": "a"}\n\n{"body": "a"}\n', r"row 3 has no column 'text'; it has 'body'"),
    "no column in parquet": ("a.parquet", parquet_bytes(body=["a"]), r"has no column 'text'; it has 'body'"),
    "number": ("a.jsonl", b'{"text": "a"}\n{"text": 3}\n', r"row 2: column 'text' holds a value of type int"),
    "number in parquet": ("a.parquet", parquet_bytes(text=[1, 2]), r"row 1: column 'text' holds a value of type int"),
    "null": ("a.parquet", parquet_bytes(text=["a", None]), r"row 2: column 'text' holds nothing \(null\)"),
    "another type": ("a.csv", b"text\na\n", r"needs a file that ends in \.txt"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_end_in_one_clear_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        list(documents(TextConfig(source=str(tmp_path / name))))
    assert str(raised.value).startswith("text.source")
    assert str(tmp_path / name) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        list(documents(TextConfig(source=str(tmp_path / "a.txt"))))
    with pytest.raises(UserError, match=r"the folder .*nowhere does not exist"):
        list(documents(TextConfig(source=str(tmp_path / "nowhere" / "a.txt"))))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heldout_fraction": 0.0}, "text.heldout_fraction: got 0.0"),
        ({"heldout_fraction": 1.0}, "text.heldout_fraction: got 1.0"),
        ({"heldout_fraction": float("nan")}, "text.heldout_fraction: got nan"),
        ({"context_length": 15}, "text.context_length: got 15, needs a number from 16 up"),
        ({"max_tokens": 100}, "text.max_tokens: got 100, needs at least 129"),
    ],
)
def test_settings_out_of_range(write, tokenizer, settings, message):
    with pytest.raises(UserError, match=message):
        load_contexts(write(letters(12), **settings), tokenizer)


def test_what_the_tokenizer_rules_out(write):
    with pytest.raises(UserError, match="needs at least 18, since 2 special"):
        load_contexts(write(letters(12), context_length=17), byte_tokenizer("<bos> $A <sep>", bos="<bos>"))
    with pytest.raises(UserError, match=r"text.packed: .*end-of-text"):
        load_contexts(write(letters(12), packed=True), byte_tokenizer(eos=None))


@pytest.mark.parametrize("packed", [False, True], ids=["bounded", "packed"])
@pytest.mark.parametrize("texts", [["too short", "as well"], letters(1)], ids=["short", "single"])
def test_no_context_left(write, tokenizer, texts, packed):
    with pytest.raises(UserError, match=r"leaves no (train|held-out) context.*needs at least two documents") as raised:
        load_contexts(write(texts, packed=packed), tokenizer)
    assert ("has a single document" if len(texts) == 1 else "has 2 distinct documents") in str(raised.value)


# python-prose


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    return list(prose.documents())


def test_prose_is_plentiful_and_the_same_every_time(corpus):
    assert sum(map(len, corpus)) / 4 > 110_000
    assert min(map(len, corpus)) >= prose.MIN_CHARACTERS
    assert list(prose.documents()) == corpus


def test_prose_never_repeats_a_paragraph(corpus):
    paragraphs = [paragraph for document in corpus for paragraph in document.split("\n\n")]
    assert len({"".join(filter(str.isalpha, paragraph.lower()))[:80] for paragraph in paragraphs}) == len(paragraphs)
    assert not any("\n" in paragraph for paragraph in paragraphs)


def test_prose_gives_contexts(tokenizer):
    train, heldout = load_contexts(TextConfig(context_length=LENGTH, max_tokens=20_000, skip_first=0), tokenizer)
    assert train.loss_mask.sum() + heldout.loss_mask.sum() == pytest.approx(20_000, abs=2 * LENGTH)
    assert_consistent(train, tokenizer)


def test_prose_keeps_sentences_and_drops_markup_and_code(monkeypatch):
    sentence = "The first thing that is said here is repeated by nobody, and it has to be {} for the rest of the text."
    kept = [sentence.format(word) * 2 for word in ("alpha", "beta", "gamma")]
    raw = f"""
<h1>Title of the page</h1>

![badge](https://example.org/of/the/badge.svg) {kept[0].replace("thing", "[thing](https://example.org)")}

```python
this = "code, which is not the prose that is to be kept in a document"
```

- {kept[1].replace("said", "``said``")}

| a | table | of | the | values | in | it | that | is | wide |
|---|---|---|---|---|---|---|---|---|---|

>>> print("this is not the prose that is to be kept in it.")

x = f(a, b) + g(c)[0] / (n - 1) and for it in the_list: is_it(the=of, a=1, to="{{}}") += 1.

Alice Bob Carol Dave Erin Frank Grace Heidi Ivan Judy Mallory.

{kept[2].replace("rest", ":class:`~some.rest`").replace("some.rest", "rest")}

{kept[0]}
"""
    for name in ("_descriptions", "_licences", "_docstrings"):
        monkeypatch.setattr(prose, name, lambda: iter(()))
    monkeypatch.setattr(prose, "_topics", lambda: iter([raw, raw]))
    assert list(prose.documents()) == ["\n\n".join(" ".join(paragraph.split()) for paragraph in kept)]


def test_docstrings_are_read_without_running_anything(tmp_path):
    source = "# comment\n\nr'''Docs \\d here.\n\n    More.\n'''\nraise SystemExit\n"
    cases = {
        "a": source,
        "b": "import os\n'''no'''\n",
        "c": "",
        "d": "b'no'\n",
        "e": "'''open",
        "f": "'\\d old escape'",
    }
    for name, content in cases.items():
        (tmp_path / f"{name}.py").write_text(content)
    (tmp_path / "g.py").write_bytes(b"'''\xff'''")
    found = {path.stem: prose._module_docstring(path) for path in prose._sources(tmp_path)}
    assert found == {"a": "Docs \\d here.\n\nMore.", "b": "", "c": "", "d": "", "e": "", "f": "\\d old escape", "g": ""}
