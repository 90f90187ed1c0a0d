"""Activations in files of every kind as one table of rows, and every way in which such a file can be wrong."""

from __future__ import annotations

import json
import os
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from aksae import UserError, open_activations

N, D = 50, 6
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def rows(n=N, dtype=torch.float32, seed=0):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def write_safetensors(path, x, tokens=None, contexts=None):
    beside = {} if tokens is None else {"tokens": tokens, "contexts": contexts}
    safetensors.torch.save_file({"x": x.contiguous(), **beside}, path)


def write_pt(path, x, tokens=None, contexts=None):
    torch.save(
        x.clone() if tokens is None else {"activations": x.clone(), "tokens": tokens, "contexts": contexts}, path
    )


def write_npy(path, x, tokens=None, contexts=None):
    np.save(path, x.numpy())
    if tokens is not None:
        np.save(path.with_suffix(".tokens.npy"), tokens.numpy())
        np.save(path.with_suffix(".contexts.npy"), contexts.numpy())


def write_parquet(path, x, tokens=None, contexts=None, *, fixed=True):
    flat = pa.array(x.numpy().reshape(-1))
    column = pa.FixedSizeListArray.from_arrays(flat, D) if fixed else pa.array(list(x.numpy()))
    beside = {} if tokens is None else {"tokens": tokens.numpy(), "contexts": contexts.numpy()}
    pq.write_table(pa.table({"x": column, **beside}), path, row_group_size=8)


def write_lists(path, *arguments):
    write_parquet(path, *arguments, fixed=False)


WRITERS = {
    "safetensors": (".safetensors", write_safetensors),
    "pt": (".pt", write_pt),
    "npy": (".npy", write_npy),
    "parquet": (".parquet", write_parquet),
    "parquet of lists": (".parquet", write_lists),
}
UNWRITTEN = {("npy", "bfloat16"), ("parquet", "bfloat16"), ("parquet of lists", "bfloat16")}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_of_file_and_number(tmp_path, kind, dtype):
    if (kind, dtype) in UNWRITTEN:
        pytest.skip("the format has no bfloat16")
    suffix, write = WRITERS[kind]
    x = rows(dtype=DTYPES[dtype])
    write(tmp_path / f"one{suffix}", x)
    # Shards stand in the order of their numbers, not of their characters.
    for number, part in zip((2, 9, 10), x.split([7, 30, 13])):
        (tmp_path / "shards").mkdir(exist_ok=True)
        write(tmp_path / "shards" / f"x{number}{suffix}", part)
    for path in (tmp_path / f"one{suffix}", tmp_path / "shards"):
        opened = open_activations(path)
        assert (len(opened), opened.d_in, opened.dtype) == (N, D, DTYPES[dtype])
        assert opened.tokens is opened.context is None
        index = torch.randint(N, (200,), generator=torch.Generator().manual_seed(1))
        got = opened.rows(index)
        assert got.dtype == torch.float32
        assert torch.equal(got, x[index].float())
        batch = next(iter(opened.batches(N))).x
        assert batch.dtype == DTYPES[dtype]
        assert torch.equal(batch.sort(0).values, x.sort(0).values)


@pytest.mark.parametrize("kind", WRITERS)
def test_tokens_and_contexts(tmp_path, kind):
    suffix, write = WRITERS[kind]
    tokens, contexts = torch.arange(N) * 3 % 11, torch.arange(N) // 4
    for number, part in enumerate(range(0, N, 20)):
        cut = slice(part, part + 20)
        write(tmp_path / f"{number}{suffix}", rows()[cut], tokens[cut], contexts[cut])
    opened = open_activations(tmp_path)
    assert torch.equal(opened.tokens, tokens)
    assert torch.equal(opened.context, contexts)
    assert torch.equal(opened.last_rows(), torch.tensor([*range(3, 48, 4), 49]))
    train, heldout = opened.split(0.3)
    # No context is on both sides.
    assert (len(train), len(heldout)) == (32, 18)
    assert torch.equal(train.context, contexts[:32])
    assert torch.equal(heldout.rows(torch.arange(18)), rows()[32:])
    assert torch.equal(heldout.tokens, tokens[32:])


def test_an_index_past_the_end(tmp_path):
    for number in (0, 1):
        write_npy(tmp_path / f"{number}.npy", rows())
    for wrong in (-1, 2 * N):
        with pytest.raises(IndexError):
            open_activations(tmp_path).rows(torch.tensor([0, wrong]))


def test_only_a_side_of_its_own_is_held_out(tmp_path):
    write_npy(tmp_path / "x.npy", rows())
    assert [len(side) for side in open_activations(tmp_path).split(0.2)] == [40, 10]
    with pytest.raises(UserError, match=r"got 50 rows, of which 0 would be held out \(heldout_fraction 0.001\)"):
        open_activations(tmp_path).split(0.001)


def test_what_is_read_is_mapped(tmp_path):
    """Of a file of 80 MB hardly any is held: the data is the file's."""
    x = torch.zeros(200_000, 100)
    for suffix, write in ((".safetensors", write_safetensors), (".pt", write_pt), (".npy", write_npy)):
        path = tmp_path / f"x{suffix}"
        write(path, x)
        before = anonymous_memory()
        opened = open_activations(path)
        opened.rows(torch.arange(0, 200_000, 1000))
        assert anonymous_memory() - before < 8e6, suffix


def anonymous_memory() -> int:
    with open("/proc/self/status") as status:
        return int(re.search(r"RssAnon:\s+(\d+) kB", status.read())[1]) * 1000


def test_the_identity_is_that_of_the_content(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        write_npy(tmp_path / name / "x.npy", rows(seed=seed))
    a, b, c = (open_activations(tmp_path / name).identity() for name in "abc")
    assert a == b != c


def test_the_store_of_version_0_1_is_read(tmp_path):
    np.save(tmp_path / "x.npy", rows().numpy())
    np.save(tmp_path / "context.npy", (np.arange(N) // 5).astype(np.int32))
    record = {"shape": [N, D], "dtype": "float32", "contexts": 10, "model": "m", "key": "k"}
    (tmp_path / "store.json").write_text(json.dumps(record))
    opened = open_activations(tmp_path)
    assert torch.equal(opened.rows(torch.arange(N)), rows())
    assert torch.equal(opened.context, torch.arange(N) // 5)
    (tmp_path / "store.json").write_text(json.dumps(record | {"shape": [N, 7]}))
    with pytest.raises(UserError, match=r"got 50 rows of width 6 and 50 contexts, needs \[50, 7\], as store.json says"):
        open_activations(tmp_path)


def truncated(path):
    write_by_suffix(path)
    os.truncate(path, path.stat().st_size - 100)


def write_by_suffix(path, x=None):
    write = {suffix: write for suffix, write in reversed(WRITERS.values())}[path.suffix]
    write(path, rows() if x is None else x)


def with_bad_numbers(path, tokens):
    safetensors.torch.save_file({"x": rows(), "tokens": tokens}, path)


def short_list(path):
    column = pa.array([*(row.tolist() for row in rows(20)), [1.0, 2.0]])
    pq.write_table(pa.table({"x": column}), path)


def null_number(path):
    column = pa.array([[0.0] * D, [None, *[0.0] * (D - 1)]])
    pq.write_table(pa.table({"x": column}), path)


def nan(path, value=float("nan")):
    x = rows()
    x[33, 2] = value
    write_by_suffix(path, x)


WRONG = {
    "nothing there": ("x.npy", lambda path: None, r"activations: got .*x.npy, which does not exist, needs a file or"),
    "another type": ("x.csv", lambda path: path.touch(), r"x.csv: got a file of the type .csv, needs .safetensors, "),
    "truncated safetensors": ("x.safetensors", truncated, r"tensor x: got a file of \d+ bytes, needs \d+: the"),
    "truncated npy": ("x.npy", truncated, r"x.npy: got \d+ bytes that NumPy cannot read .*, needs a whole .npy file"),
    "truncated pt": ("x.pt", truncated, r"x.pt: got a file that torch cannot read"),
    "truncated parquet": ("x.parquet", truncated, r"x.parquet: got \d+ bytes that are no whole Parquet file"),
    "empty": ("x.npy", lambda path: path.touch(), r"x.npy: got 0 bytes that NumPy cannot read"),
    "garbage": ("x.safetensors", lambda path: path.write_bytes(b"\7" * 500), r"x.safetensors: got "),
    "code": ("x.pt", lambda path: torch.save(open_activations, path), r"a pickle that is refused \(GLOBAL aksae"),
    "a list": ("x.pt", lambda path: torch.save([1], path), r"x.pt: got list, needs a tensor, or tensors by name"),
    "one dimension": ("x.npy", lambda path: np.save(path, np.zeros(5)), r"x: got float64 \[5\], needs float16, "),
    "three dimensions": ("x.pt", lambda path: torch.save(torch.zeros(2, 3, 4), path), r"got float32 \[2, 3, 4\]"),
    "integers": ("x.npy", lambda path: np.save(path, np.zeros((5, 2), int)), r"x: got int64 \[5, 2\], needs float16"),
    "objects": ("x.npy", lambda path: np.save(path, np.array([None, 1])), r"x.npy: got .*Python objects"),
    "other byte order": ("x.npy", lambda path: np.save(path, np.zeros((5, 2), ">f4")), r"got >f4 \[5, 2\], needs"),
    "two candidates": (
        "x.safetensors",
        lambda path: safetensors.torch.save_file({"a": rows(), "b": rows()}, path),
        r"got the tensors a float32 \[50, 6\], b float32 \[50, 6\], needs one named x or activations",
    ),
    "tokens of another length": (
        "x.safetensors",
        lambda path: with_bad_numbers(path, torch.zeros(3, dtype=torch.int64)),
        r"tensor tokens: got torch.int64 \[3\], needs integers \[50\]",
    ),
    "tokens that are floats": (
        "x.safetensors",
        lambda path: with_bad_numbers(path, torch.zeros(N)),
        r"tensor tokens: got torch.float32 \[50\], needs integers \[50\]",
    ),
    "no lists": (
        "x.parquet",
        lambda path: pq.write_table(pa.table({"x": [1.0, 2.0]}), path),
        r"column x: got double, needs lists of floats",
    ),
    "no column": (
        "x.parquet",
        lambda path: pq.write_table(pa.table({"text": ["a"]}), path),
        r"got the columns text string, needs one of lists of floats named x or activations",
    ),
    "no rows": ("x.npy", lambda path: np.save(path, np.zeros((0, 3))), r"x.npy: got no rows, needs at least one"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "write", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named_and_stays(tmp_path, name, write, message):
    write(tmp_path / name)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=message) as caught:
        open_activations(tmp_path / name)
    assert "delete" not in str(caught.value)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


READ = {
    "NaN": ("x.npy", nan, r"x.npy: row 33: got nan, needs finite numbers"),
    "infinity": ("x.safetensors", lambda path: nan(path, -float("inf")), r"row 33: got -inf, needs finite numbers"),
    "NaN in Parquet": ("x.parquet", nan, r"x.parquet: row 33: got nan, needs finite numbers"),
    "a short list": ("x.parquet", short_list, r"column x, row 20: got 2 numbers, needs 6"),
    "null": ("x.parquet", null_number, r"column x, row 1: got null, needs numbers"),
}


@pytest.mark.parametrize(("name", "write", "message"), READ.values(), ids=READ)
def test_wrong_rows_are_named_when_they_are_read(tmp_path, name, write, message):
    write(tmp_path / name)
    with pytest.raises(UserError, match=message):
        next(iter(open_activations(tmp_path).batches(4)))


def test_large_finite_numbers_are_no_infinity(tmp_path):
    x = torch.full((3, 5), 3e38)
    np.save(tmp_path / "x.npy", x.numpy())
    assert torch.equal(next(iter(open_activations(tmp_path).batches(3))).x, x)


def test_shards_that_do_not_fit_together(tmp_path):
    for name, second, message in (
        ("width", rows()[:, :4], "1.safetensors: got rows of width 4, needs 6, as in .*0.safetensors"),
        ("dtype", rows(dtype=torch.float16), "1.safetensors: got numbers in float16, needs float32, as in"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        write_safetensors(folder / "0.safetensors", rows())
        write_safetensors(folder / "1.safetensors", second)
        with pytest.raises(UserError, match=message):
            open_activations(folder)
    (tmp_path / "names").mkdir()
    write_safetensors(tmp_path / "names" / "0.safetensors", rows())
    write_safetensors(tmp_path / "names" / "1.safetensors", rows(), torch.arange(N), torch.arange(N))
    with pytest.raises(UserError, match="got rows with contexts and tokens, needs neither tokens nor contexts, as in"):
        open_activations(tmp_path / "names")


def test_folders_that_hold_nothing_or_too_much(tmp_path):
    with pytest.raises(UserError, match=r"got no file of activations, needs .safetensors, .npy, .pt, .pth, .parquet$"):
        open_activations(tmp_path)
    (tmp_path / "inside").mkdir()
    write_npy(tmp_path / "inside" / "x.npy", rows())
    with pytest.raises(UserError, match="or one of the folders in it: inside"):
        open_activations(tmp_path)
    write_npy(tmp_path / "x.npy", rows())
    (tmp_path / ".hidden.npy").touch()
    assert len(open_activations(tmp_path)) == N
    write_pt(tmp_path / "x.pt", rows())
    with pytest.raises(UserError, match=r"got files of the types .npy and .pt, needs those of one type"):
        open_activations(tmp_path)
