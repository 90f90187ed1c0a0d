"""Sources of text, and the contexts cut from them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import types
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from aksae import prose, text
from aksae.config import TextConfig
from aksae.errors import UserError
from aksae.text import MIN_LOSS_TOKENS, ContextSet, documents, load_contexts

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
    "binary": ("a.txt", b"\x89PNG\r\n\x1a\n\xff\xfe", "not UTF-8"),
    "null bytes": ("a.txt", b"abc\0def", "not UTF-8"),
    "latin 1": ("a.jsonl", '{"text": "é"}'.encode("latin-1"), "not UTF-8"),
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
        ({"context_length": 15}, "text.context_length: got 15, needs at least 16"),
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
    with pytest.raises(UserError, match=r"leaves no (train|held-out) context"):
        load_contexts(write(texts, packed=packed), tokenizer)


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
