"""Activations in folders: what they hold, and what is left and gone on with when collecting is cut off."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from aksae import UserError, open_activations
from aksae.collect import collect as collect_sites
from aksae.sites import Site
from language_models import WIDTH, block_outputs, ragged

ROOT = Path(__file__).resolve().parent.parent


def collect(lm, contexts, folder, *, batch_size=2, progress=False, **options):
    """Of the residual stream after the layer of the model."""
    site = Site(lm.layer)
    return collect_sites(lm, contexts, {site: folder}, batch_size=batch_size, progress=progress, **options)[site]


@pytest.fixture
def runs(monkeypatch):
    """How many times a model was run, and what happens then: `runs.then[n]`, before the n-th."""
    from aksae.activations import LanguageModel

    class Runs:
        def __init__(self):
            self.shapes, self.then = [], {}

    seen, read = Runs(), LanguageModel.read

    def counted(self, ids, mask, sites):
        seen.shapes.append(ids.shape)
        if len(seen.shapes) in seen.then:
            seen.then[len(seen.shapes)]()
        return read(self, ids, mask, sites)

    monkeypatch.setattr(LanguageModel, "read", counted)
    return seen


def raises(error):
    def act():
        raise error

    return act


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_rows_are_those_of_each_context_alone(load, tmp_path, family, batch_size):
    lm = load(family)
    contexts = ragged()
    store = collect(lm, contexts, tmp_path / "deep" / "store", batch_size=batch_size, progress=False)
    keep = [mask[attended] for mask, attended in zip(contexts.loss_mask, contexts.attention_mask, strict=True)]
    expected = [rows[torch.from_numpy(mask)] for rows, mask in zip(block_outputs(lm, contexts), keep, strict=True)]
    assert len(store) == contexts.loss_mask.sum()
    assert store.d_in == WIDTH
    torch.testing.assert_close(store.rows(torch.arange(len(store))), torch.cat(expected), rtol=1e-4, atol=1e-5)
    assert store.context.dtype == torch.int64
    assert store.context.tolist() == [i for i, rows in enumerate(expected) for _ in rows]
    torch.testing.assert_close(
        store.rows(store.last_rows()), torch.stack([rows[-1] for rows in expected]), rtol=1e-4, atol=1e-5
    )


def test_batches_are_cut_to_their_longest(load, tmp_path, runs):
    collect(load("llama"), ragged(), tmp_path / "store")
    assert runs.shapes == [(2, 12), (2, 7), (1, 3)]


def test_tokens_contexts_and_what_the_manifest_says(load, tmp_path):
    lm, contexts = load("llama"), ragged()
    store = collect(lm, contexts, tmp_path / "store", heldout=2, shard_mb=0.001)
    assert torch.equal(store.tokens, torch.from_numpy(contexts.input_ids[contexts.loss_mask]).long())
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    counts = contexts.loss_mask.sum(1)
    assert manifest["rows"] == counts.sum() == sum(shard["rows"] for shard in manifest["shards"])
    assert len(manifest["shards"]) > 1
    assert (manifest["site"], manifest["layer"], manifest["dtype"]) == ("resid_post", 1, "float32")
    assert manifest["identity"] == lm.identity
    # The last contexts are those held out, whatever share is asked for.
    assert [len(side) for side in store.split(0.5)] == [counts[:3].sum(), counts[3:].sum()]
    for shard in manifest["shards"]:
        assert len(open_activations(tmp_path / "store" / shard["file"])) == shard["rows"]


def test_several_sites_in_one_pass(load, tmp_path, runs):
    lm, contexts = load("gpt2"), ragged()
    sites = [Site(0), Site(1, "mlp_out"), Site(1, "attn_out"), Site(2, "resid_pre")]
    options = {"batch_size": 2, "progress": False, "shard_mb": 0.001}
    folders = {site: tmp_path / str(site) for site in sites}
    together = collect_sites(lm, contexts, folders, **options)
    assert list(together) == sites
    passes = len(runs.shapes)
    for site in sites:
        alone = collect_sites(lm, contexts, {site: tmp_path / "alone" / str(site)}, **options)[site]
        assert len(runs.shapes) % passes == 0
        assert torch.equal(alone.rows(torch.arange(len(alone))), together[site].rows(torch.arange(len(alone))))
        assert alone.info["site"] == site.hook
    # A site more is a pass for that one alone.
    more = Site(2, "mlp_out")
    del runs.shapes[:]
    both = collect_sites(lm, contexts, {**folders, more: tmp_path / str(more)}, **options)
    assert len(runs.shapes) == passes
    assert len(both) == 5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_is_stored_in_fewer_bits(load, tmp_path, dtype):
    lm, contexts = load("llama"), ragged()
    exact = collect(lm, contexts, tmp_path / "exact")
    rounded = collect(lm, contexts, tmp_path / "rounded", dtype=dtype)
    rows = torch.arange(len(exact))
    assert rounded.dtype == getattr(torch, dtype)
    assert torch.equal(rounded.rows(rows), exact.rows(rows).to(rounded.dtype).float())
    with pytest.raises(UserError, match=r"got activations of another model or of other contexts \(other: "):
        collect(lm, contexts, tmp_path / "rounded")


def test_what_it_will_take_is_said_first(load, tmp_path):
    lines = []
    lm, contexts = load("llama"), ragged()
    options = {"shard_mb": 0.001, "announce": lines.append}
    collect(lm, contexts, tmp_path / "store", **options)
    assert lines[0].startswith("layers.1.resid_post: 30 tokens x 16 in float32, 0.0 MB in ")
    assert lines[1].startswith("about 0 s for ")
    (tmp_path / "store" / "shard-00001.safetensors").rename(tmp_path / "elsewhere")
    collect(lm, contexts, tmp_path / "store", **options)
    assert "of which 0.0 MB are missing" in lines[2]


def test_rows_are_fresh_and_writable(load, tmp_path):
    store = collect(load("llama"), ragged(), tmp_path / "store", batch_size=4, progress=False)
    index = torch.tensor([5, 0, 5])
    first = store.rows(index)
    assert first.dtype == torch.float32
    assert torch.equal(first[0], first[2])
    before = first.clone()
    first.zero_()
    assert torch.equal(store.rows(index), before)
    for outside in (-1, len(store)):
        with pytest.raises(IndexError):
            store.rows(torch.tensor([outside]))


def test_finished_store_is_opened_again(load, tmp_path, runs):
    lm = load("llama")
    first = collect(lm, ragged(), tmp_path / "store")
    del runs.shapes[:]
    again = collect(lm, ragged(), tmp_path / "store", batch_size=1)
    everything = torch.arange(len(first))
    assert torch.equal(again.rows(everything), first.rows(everything))
    assert not runs.shapes


def test_a_store_of_something_else_is_refused_and_says_of_what(load, tmp_path):
    collect(load("llama", 1), ragged(), tmp_path / "store")
    before = {path: path.read_bytes() for path in (tmp_path / "store").iterdir()}
    for lm, contexts, other in [
        (load("llama", 0), ragged(), "model.layer"),
        (load("llama", 1), ragged(seed=1), "contexts"),
        (load("gpt2", 1), ragged(), "model weights, model configuration"),
    ]:
        with pytest.raises(UserError, match=rf"another model or of other contexts \(other: {other}\), needs a new"):
            collect(lm, contexts, tmp_path / "store")
    assert {path: path.read_bytes() for path in (tmp_path / "store").iterdir()} == before


def test_a_folder_of_other_files_is_refused(load, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    with pytest.raises(UserError, match="mine: got other files, needs a new or empty folder"):
        collect(load("llama"), ragged(), tmp_path / "mine")
    with pytest.raises(UserError, match=r"thesis.txt: got a file, needs a new or empty folder"):
        collect(load("llama"), ragged(), tmp_path / "mine" / "thesis.txt")
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]


def test_the_store_of_version_0_1_is_opened(load, tmp_path, runs):
    lm, contexts = load("llama"), ragged()
    new = collect(lm, contexts, tmp_path / "new")
    old = tmp_path / "old"
    old.mkdir()
    np.save(old / "x.npy", new.rows(torch.arange(len(new))).numpy())
    np.save(old / "context.npy", new.context.int().numpy())
    record = {"shape": [len(new), WIDTH], "dtype": "float32", "contexts": 5, "model": str(lm), "key": new.info["key"]}
    (old / "store.json").write_text(json.dumps(record))
    del runs.shapes[:]
    opened = collect(lm, contexts, old)
    assert torch.equal(opened.rows(torch.arange(len(new))), new.rows(torch.arange(len(new))))
    assert not runs.shapes
    with pytest.raises(UserError, match="another model or of other contexts"):
        collect(lm, ragged(seed=1), old)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_what_was_collected_stays_and_goes_on(load, tmp_path, runs, error):
    lm, options = load("llama"), {"shard_mb": 0.0005, "batch_size": 1}
    whole = collect(lm, ragged(), tmp_path / "whole", **options)
    passes = len(runs.shapes)
    del runs.shapes[:]
    runs.then[4] = raises(error)
    with pytest.raises(error):
        collect(lm, ragged(), tmp_path / "store", **options)
    left = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").glob("shard-*")}
    assert left
    with pytest.raises(UserError, match=rf"got {len(left)} of \d shards, needs all of them: .* the same command"):
        open_activations(tmp_path / "store")
    del runs.shapes[:], runs.then[4]
    # Whatever the size of shards asked for now.
    store = collect(lm, ragged(), tmp_path / "store", batch_size=1)
    assert len(runs.shapes) < passes
    assert {path: path.stat().st_mtime_ns for path in left} == left
    assert torch.equal(store.rows(torch.arange(len(store))), whole.rows(torch.arange(len(whole))))
    assert sorted(os.listdir(tmp_path / "store")) == sorted(os.listdir(tmp_path / "whole"))


def test_a_full_disk_leaves_whole_shards(load, tmp_path, monkeypatch):
    from aksae import store

    write, calls = store.write_files, []

    def full(files):
        calls.append(files)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        write(files)

    monkeypatch.setattr(store, "write_files", full)
    lm, options = load("llama"), {"shard_mb": 0.0005}
    with pytest.raises(UserError, match=r"\(No space left on device\); the shards that were done are kept"):
        collect(lm, ragged(), tmp_path / "store", **options)
    assert sorted(os.listdir(tmp_path / "store")) == ["manifest.json", "shard-00000.safetensors"]
    assert len(collect(lm, ragged(), tmp_path / "store", **options)) == ragged().loss_mask.sum()


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, "tests")
from language_models import ragged
from aksae import store
from aksae.activations import LanguageModel
from aksae.collect import collect
from aksae.config import ModelConfig
from aksae.sites import Site
write, calls = store.write_files, []
def killed(files):
    calls.append(files)
    if len(calls) == 3:
        path = next(iter(files))
        path.with_name(f".{path.name}.tmp").write_bytes(b"half of it")
        os.kill(os.getpid(), signal.SIGKILL)
    write(files)
store.write_files = killed
lm = LanguageModel.load(ModelConfig(name=sys.argv[1], layer=1, device="cpu"), Path(sys.argv[2]))
collect(lm, ragged(), {Site(1): Path(sys.argv[2])}, batch_size=2, shard_mb=0.0005, progress=False)
"""


def test_a_killed_process_leaves_whole_shards(load, saved, tmp_path):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'python'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, str(saved("llama")), str(tmp_path / "store")]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    lm, options = load("llama"), {"shard_mb": 0.0005}
    store = collect(lm, ragged(), tmp_path / "store", **options)
    whole = collect(lm, ragged(), tmp_path / "whole", **options)
    assert torch.equal(store.rows(torch.arange(len(store))), whole.rows(torch.arange(len(whole))))
    assert sorted(os.listdir(tmp_path / "store")) == sorted(os.listdir(tmp_path / "whole"))


def test_too_small_a_disk_is_noticed_before_the_model_runs(load, tmp_path, runs, monkeypatch):
    lm = load("llama")
    monkeypatch.setattr("shutil.disk_usage", lambda path: namedtuple("usage", "total used free")(10, 0, 10))
    (tmp_path / "runs").mkdir()
    message = r"activations of layers.1.resid_post \(.*\): got 0.00 GB of free disk, needs"
    with pytest.raises(UserError, match=message):
        collect(lm, ragged(), tmp_path / "runs" / "store")
    assert not os.listdir(tmp_path / "runs")
    assert not runs.shapes


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_activations_name_the_context(load, tmp_path, monkeypatch, bad):
    lm = load("llama")
    read = lm.read

    def broken(ids, mask, sites):
        (hidden,) = read(ids, mask, sites).values()
        # Context 3 is the only one of length 5. Position 0 carries no loss, so that one is nobody's concern.
        hidden[:, 0] = bad
        hidden[torch.from_numpy(mask).sum(1) == 5, 4, 2] = bad
        return {sites[0]: hidden}

    monkeypatch.setattr(lm, "read", broken)
    with pytest.raises(UserError, match=r"NaN or infinity in context 3 .*layer 1.*, needs numbers$"):
        collect(lm, ragged(), tmp_path / "runs" / "store")
    assert not (tmp_path / "runs").exists()


def test_numbers_that_do_not_fit_name_the_context(load, tmp_path, monkeypatch):
    lm = load("llama")
    read = lm.read
    monkeypatch.setattr(lm, "read", lambda *a: {site: hidden * 1e9 for site, hidden in read(*a).items()})
    with pytest.raises(UserError, match=r"in context \d .*, needs numbers that float16 can hold"):
        collect(lm, ragged(), tmp_path / "store", dtype="float16")
    assert len(collect(lm, ragged(), tmp_path / "store", dtype="bfloat16")) == 30


def test_contexts_without_loss_tokens(load, tmp_path):
    lm = load("llama")
    empty = ragged()
    empty.loss_mask[2] = False
    with pytest.raises(UserError, match="context 2 has no loss token"):
        collect(lm, empty, tmp_path / "store", batch_size=2)
    with pytest.raises(UserError, match="contexts: got none"):
        collect(lm, ragged(lengths=()), tmp_path / "store", batch_size=2)
    with pytest.raises(UserError, match="batch_size: got 0"):
        collect(lm, ragged(), tmp_path / "store", batch_size=0)


DAMAGES = {
    "truncated": (
        lambda store: os.truncate(store / "shard-00001.safetensors", 300),
        r"shard-00001.safetensors: tensor \w+: got a file of 300 bytes, needs \d+",
    ),
    "no manifest": (
        lambda store: (store / "manifest.json").unlink(),
        "store: got other files, needs a new or empty",
    ),
    "garbage": (
        lambda store: (store / "manifest.json").write_text("{"),
        "manifest.json: got a file that is not",
    ),
    "no shards": (
        lambda store: edit(store, shards=None),
        "manifest.json: shards: got None, needs list",
    ),
    "other width": (
        lambda store: edit(store, d_in=3),
        r"shard-00000.safetensors: d_in: got 16, needs 3, as manifest.json says",
    ),
    "other bytes": (
        lambda store: change(store / "shard-00000.safetensors"),
        r"shard-00000.safetensors: got other bytes than were collected, needs those; with the file moved elsewhere",
    ),
}


def edit(store, **changes):
    path = store / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change(path):
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file({name: tensor + 1 for name, tensor in tensors.items()}, path)


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_store_is_refused_and_stays(load, tmp_path, damage, message):
    lm, folder, options = load("llama"), tmp_path / "store", {"shard_mb": 0.001}
    collect(lm, ragged(), folder, **options)
    damage(folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match=message) as caught:
        collect(lm, ragged(), folder, verify=True, **options)
    assert "delete" not in str(caught.value)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_two_runs_at_once_end_in_one_store(load, tmp_path, runs):
    """The second to finish a shard finds the first one's and takes it."""
    first, second = load("llama"), load("llama")
    folder, options = tmp_path / "runs" / "store", {"shard_mb": 0.001}
    runs.then[2] = lambda: collect(first, ragged(), folder, **options)
    store = collect(second, ragged(), folder, batch_size=1, **options)
    assert len(store) == ragged().loss_mask.sum()
    whole = collect(first, ragged(), tmp_path / "whole", **options)
    assert torch.equal(store.rows(torch.arange(len(store))), whole.rows(torch.arange(len(whole))))
    assert sorted(os.listdir(folder)) == sorted(os.listdir(tmp_path / "whole"))


def test_rows_from_threads(load, tmp_path):
    store = collect(load("llama"), ragged(), tmp_path / "store", batch_size=4, progress=False)
    everything = store.rows(torch.arange(len(store)))
    wrong = []

    def read(seed):
        for index in torch.randint(len(store), (200, 16), generator=torch.Generator().manual_seed(seed)):
            if not torch.equal(store.rows(index), everything[index]):
                wrong.append(index)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_progress_counts_tokens(load, tmp_path, capfd):
    collect(load("llama"), ragged(), tmp_path / "store", batch_size=4, progress=True)
    shown = capfd.readouterr().err
    assert "tok/s" in shown
    assert f"{ragged().attention_mask.sum():.1f}/" in shown
