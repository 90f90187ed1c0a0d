"""The sparse latent cache: what it keeps, that it is never dense, and that delphi reads it as its own."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import sys
import types

import numpy as np
import pytest
import torch
from aksae import AdaptiveK, AdaptiveKSAE, KMap, SAEConfig, UserError
from aksae.hosts.latent_cache import LatentCache
from safetensors.numpy import load_file

from aksae_kernels import SparseCodes

D, F, BATCH, SEQ = 16, 100, 6, 10


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_sae(seed=1) -> AdaptiveKSAE:
    sae = AdaptiveKSAE(SAEConfig(D, F, AdaptiveK(KMap(2, 24))), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        sae.probe.weight.copy_(randn(D, seed=2))
        sae.probe.bias.fill_(5.0)
        # Latents that never fire: a whole range of them, and some here and there.
        sae.b_enc[20:40] = -100.0
        sae.b_enc[::7] = -100.0
    return sae


def batches(n=3, batch=BATCH, seq=SEQ):
    for seed in range(n):
        tokens = torch.randint(0, 999, (batch, seq), generator=torch.Generator().manual_seed(seed))
        yield (
            tokens,
            {"layers.0": randn(batch, seq, D, seed=10 + seed), "layers.1": randn(batch, seq, D, seed=20 + seed)},
        )


SAES = {"layers.0": make_sae(1), "layers.1": make_sae(2)}


def make_cache(n=3, **fields) -> LatentCache:
    cache = LatentCache({name: sae.encode for name, sae in SAES.items()}, F, **fields)
    for tokens, activations in batches(n):
        cache.add(tokens, activations)
    return cache


def read(folder) -> dict[tuple[int, int, int], float]:
    """(sequence, position, latent) -> activation, of all files of a hook point."""
    found = {}
    for path in folder.glob("*.safetensors"):
        data, (start, end) = load_file(path), map(int, path.stem.split("_"))
        locations = data["locations"].astype(np.int64)
        assert (locations[:, 2] <= end - start).all()
        for (sequence, position, latent), activation in zip(locations.tolist(), data["activations"].tolist()):
            found[sequence, position, latent + start] = activation
    return found


def expected(name) -> dict[tuple[int, int, int], float]:
    acts = torch.cat([SAES[name].encode(x[name]).to_dense(F) for _, x in batches()]).detach()
    return {tuple(at): float(acts[tuple(at)].half()) for at in (acts > 1e-5).nonzero().tolist()}


def test_keeps_what_fires(tmp_path):
    make_cache().save(tmp_path, model_name="tiny", n_splits=4)
    for name in SAES:
        assert read(tmp_path / name) == expected(name)
        assert len(expected(name)) > 500
        files = sorted(path.name for path in (tmp_path / name).iterdir())
        assert files == [
            "0_24.safetensors",
            "25_49.safetensors",
            "50_74.safetensors",
            "75_99.safetensors",
            "config.json",
        ]
        tokens = torch.cat([tokens for tokens, _ in batches()])
        data = load_file(tmp_path / name / "25_49.safetensors")
        assert np.array_equal(data["tokens"], tokens.numpy())
        assert (data["locations"].dtype, data["activations"].dtype) == (np.uint16, np.float16)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["model_name"] == "tiny"
        assert (config["n_tokens"], config["cache_ctx_len"], config["n_splits"]) == (3 * BATCH * SEQ, SEQ, 4)


def test_saving_again_leaves_no_old_split(tmp_path):
    cache = make_cache()
    cache.save(tmp_path, model_name="tiny", n_splits=4)
    cache.save(tmp_path, model_name="tiny", n_splits=3, config={"dataset_repo": "some/text"})
    assert len(list((tmp_path / "layers.0").glob("*.safetensors"))) == 3
    assert read(tmp_path / "layers.0") == expected("layers.0")
    assert json.loads((tmp_path / "layers.0" / "config.json").read_text())["dataset_repo"] == "some/text"


def test_sizes_may_be_integers_of_numpy(tmp_path):
    cache = make_cache()
    again = LatentCache(cache.encoders, {name: np.int64(size) for name, size in cache.d_sae.items()})
    assert again.d_sae == cache.d_sae
    assert {type(size) for size in again.d_sae.values()} == {int}
    cache.save(tmp_path, model_name="tiny", n_splits=np.int64(3))
    assert read(tmp_path / "layers.0") == expected("layers.0")


def test_files_of_others_stay(tmp_path):
    folder = tmp_path / "layers.0"
    folder.mkdir()
    for name in ("sae_weights.safetensors", "layer_0.safetensors", "0_1.safetensors.bak"):
        (folder / name).write_text(name)
    (folder / "0_98.safetensors").touch()
    make_cache().save(tmp_path, model_name="tiny", n_splits=1)
    assert sorted(path.name for path in folder.iterdir()) == [
        "0_1.safetensors.bak", "0_99.safetensors", "config.json", "layer_0.safetensors", "sae_weights.safetensors"
    ]  # fmt: skip
    assert (folder / "layer_0.safetensors").read_text() == "layer_0.safetensors"


@pytest.mark.parametrize("text", ['{"architecture": "topk", "model_name": "tiny"}', "[]", "no JSON"])
def test_a_config_of_others_stays(tmp_path, text):
    config = tmp_path / "layers.1" / "config.json"
    config.parent.mkdir()
    config.write_text(text)
    with pytest.raises(UserError, match=r"layers.1/config.json: got a file that is"):
        make_cache().save(tmp_path, model_name="tiny")
    assert config.read_text() == text
    # Nothing else is written, either.
    assert [path.name for path in tmp_path.iterdir()] == ["layers.1"]
    assert len(list(config.parent.iterdir())) == 1


def test_tokens_are_copied(tmp_path):
    cache, (tokens, activations) = make_cache(0), next(batches(1))
    kept = tokens.clone()
    cache.add(tokens, activations)
    tokens.fill_(7)
    cache.save(tmp_path, model_name="tiny", n_splits=1)
    assert np.array_equal(load_file(tmp_path / "layers.0" / "0_99.safetensors")["tokens"], kept.numpy())


def test_only_the_latents_asked_for(tmp_path):
    wanted = torch.tensor([3, 50, 99, 30])
    make_cache(latents={"layers.0": wanted}).save(tmp_path, model_name="tiny")
    kept = {at: value for at, value in expected("layers.0").items() if at[2] in wanted.tolist()}
    assert kept
    assert read(tmp_path / "layers.0") == kept
    assert read(tmp_path / "layers.1") == expected("layers.1")


def from_codes(values, indices, counts, d_sae=F, **fields):
    codes = SparseCodes(
        torch.as_tensor(values), torch.as_tensor(indices, dtype=torch.int32), torch.as_tensor(counts, dtype=torch.int32)
    )
    return LatentCache({"h": lambda x: codes}, d_sae, **fields)


def test_codes_made_by_hand(tmp_path):
    """Unsorted, repeated (summed), tiny, negative and NaN entries; padding that must not be read."""
    nan, pad = float("nan"), -(2**31)
    values = [[3.0, 1.0, 2.0, nan], [1e-6, -2.0, nan, nan], [nan] * 4]
    cache = from_codes(values, [[9, 4, 9, pad], [1, 0, 2, 99], [pad] * 4], [3, 3, 0])
    cache.add(torch.zeros(1, 3, dtype=torch.int64), {"h": torch.zeros(1, 3, D)})
    cache.save(tmp_path, model_name="tiny", n_splits=1)
    found = read(tmp_path / "h")
    assert np.isnan(found.pop((0, 1, 2)))
    assert found == {(0, 0, 4): 1.0, (0, 0, 9): 5.0, (0, 1, 0): -2.0}


@pytest.mark.parametrize("index", [-1, F])
def test_an_index_out_of_range(index):
    cache = from_codes([[1.0]], [[index]], [1])
    with pytest.raises(IndexError, match="indices"):
        cache.add(torch.zeros(1, 1).int(), {"h": torch.zeros(1, 1, D)})


def test_never_dense(tmp_path, monkeypatch, largest):
    """At 2**24 latents the 4096 tokens of this batch would be 256 GB dense."""
    d_sae, rows, width = 2**24, 4096, 32
    monkeypatch.setattr(SparseCodes, "to_dense", lambda *_: pytest.fail("dense latents were made"))
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(0, d_sae, (rows, width), generator=generator).sort(-1).values
    counts = torch.randint(0, width + 1, (rows,), generator=generator)
    values = torch.rand(rows, width, generator=generator) + 0.1
    cache = from_codes(values, indices, counts, d_sae)
    with largest() as made:
        cache.add(torch.zeros(8, 512, dtype=torch.int64), {"h": torch.zeros(8, 512, 1)})
        cache.save(tmp_path / "narrow", model_name="tiny", n_splits=256)
        cache.save(tmp_path / "wide", model_name="tiny", n_splits=2)
    assert rows * width / 2 < made.elements <= 3 * rows * width
    fired = {
        (row // 512, row % 512, int(at)): float(value.half())
        for row in range(rows)
        for at, value in zip(indices[row, : counts[row]], values[row])
    }
    for folder, dtype in (("narrow", np.uint16), ("wide", np.uint32)):
        files = (tmp_path / folder / "h").glob("*.safetensors")
        assert {load_file(path)["locations"].dtype for path in files} == {np.dtype(dtype)}
        assert read(tmp_path / folder / "h") == fired


def test_positions_past_16_bits(tmp_path):
    seq = 70_000
    cache = from_codes(torch.ones(seq, 1), torch.zeros(seq, 1), torch.ones(seq))
    cache.add(torch.zeros(1, seq, dtype=torch.int64), {"h": torch.zeros(1, seq, 1)})
    cache.save(tmp_path, model_name="tiny", n_splits=1)
    assert len(read(tmp_path / "h")) == seq


def test_batches_of_different_sizes(tmp_path):
    cache = LatentCache({"layers.0": SAES["layers.0"].encode}, F)
    x = randn(5, SEQ, D)
    for part in x.split([2, 0, 3]):
        cache.add(torch.zeros(len(part), SEQ, dtype=torch.int64), {"layers.0": part})
    cache.save(tmp_path, model_name="tiny")
    acts = SAES["layers.0"].encode(x).to_dense(F).detach()
    assert sorted(read(tmp_path / "layers.0")) == [tuple(at) for at in (acts > 1e-5).nonzero().tolist()]


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: LatentCache({}, F), "encoders: got none"),
        (lambda: LatentCache({"../a": None}, F), "encoders: got the hook point '../a', needs a name that stays"),
        (lambda: LatentCache({"/a": None}, F), "encoders: got the hook point '/a', needs a name that stays"),
        (lambda: LatentCache({"a": None}, 0), "d_sae: got 0, needs an int from 1 up"),
        (lambda: LatentCache({"a": None}, 8.0), "d_sae: got 8.0, needs an int from 1 up"),
        (lambda: make_cache().save("x", model_name="", n_splits=2.0), "n_splits: got 2.0, needs 1 to d_sae = 100"),
        (lambda: LatentCache({"a": None}, {"b": 1}), "d_sae: got ['b'], needs the hook points ['a']"),
        (lambda: LatentCache({"a": None}, F, latents={"b": None}), "latents: got ['b'], needs some of ['a']"),
        (lambda: LatentCache({"a": None}, F).save("x", model_name=""), "save: got no batch"),
        (lambda: make_cache().save("x", model_name="", n_splits=F + 1), "n_splits: got 101, needs 1 to d_sae = 100"),
        (lambda: make_cache().add(torch.zeros(2, 3), {}), "tokens: got torch.float32 [2, 3], needs integers"),
        (lambda: make_cache().add(torch.zeros(2, 3).int(), {}), "tokens: got 3 a sequence, needs the 10 of before"),
        (lambda: make_cache().add(torch.zeros(2, SEQ).int(), {}), "activations: got [], needs the hook points"),
        (
            lambda: make_cache().add(torch.zeros(2, SEQ).int(), {name: torch.zeros(SEQ, 2, D) for name in SAES}),
            "activations: got [10, 2, 16] for layers.0, needs [2, 10, D]",
        ),
    ],
    ids=lambda value: value.split(":")[0] if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_refused(act, message):
    with pytest.raises(UserError, match=re.escape(message)):
        act()


def test_a_failed_batch_leaves_nothing_behind(tmp_path):
    encoders = {"good": SAES["layers.0"].encode, "bad": lambda x: 1 / 0}
    cache = LatentCache(encoders, F)
    with pytest.raises(ZeroDivisionError):
        cache.add(torch.zeros(1, 2).int(), {"good": torch.ones(1, 2, D), "bad": torch.ones(1, 2, D)})
    encoders = cache.encoders
    encoders["bad"] = encoders["good"]
    cache.add(torch.zeros(1, 2).int(), {"good": torch.ones(1, 2, D), "bad": torch.ones(1, 2, D)})
    cache.save(tmp_path, model_name="tiny")
    assert read(tmp_path / "good") == read(tmp_path / "bad")


# ------------------------------------------------------------------------------------------------- the real delphi


@pytest.fixture
def delphi(monkeypatch):
    """delphi's cache and loader; what they import for other purposes is stood in for where it is not installed."""
    pytest.importorskip("delphi", reason="needs the host: pip install --no-deps eai-delphi==0.1.3")
    unused = {
        "faiss": {},
        "sentence_transformers": {"SentenceTransformer": None},
        "blobfile": {},
        "orjson": {},
        "asyncer": {"asyncify": lambda function: function},
    }
    for name, attributes in unused.items():
        if importlib.util.find_spec(name) is None:
            module = types.ModuleType(name)
            vars(module).update(attributes)
            monkeypatch.setitem(sys.modules, name, module)
    from delphi import config
    from delphi.latents import cache, loader

    return types.SimpleNamespace(cache=cache, loader=loader, config=config)


def their_cache(delphi, n_splits, folder, latents=None):
    """The files that delphi makes of the same activations, dense."""
    theirs = delphi.cache.LatentCache(None, {name: None for name in SAES}, BATCH, filters=latents)
    theirs.width = F
    for number, (tokens, activations) in enumerate(batches()):
        for name, sae in SAES.items():
            theirs.cache.add(sae.encode(activations[name]).to_dense(F).detach(), tokens, number, name)
    theirs.cache.save()
    theirs.save_splits(n_splits, folder)
    theirs.save_config(folder, delphi.config.CacheConfig(n_splits=n_splits), "tiny")


@pytest.mark.parametrize("n_splits", [1, 2, 3])
def test_same_files_as_delphi(tmp_path, delphi, n_splits):
    their_cache(delphi, n_splits, tmp_path / "theirs")
    make_cache().save(tmp_path / "ours", model_name="tiny", n_splits=n_splits)
    files = sorted(path.relative_to(tmp_path / "theirs") for path in (tmp_path / "theirs").rglob("*.*"))
    assert files == sorted(path.relative_to(tmp_path / "ours") for path in (tmp_path / "ours").rglob("*.*"))
    compared = 0
    for file in files:
        if file.suffix == ".safetensors":
            theirs, ours = load_file(tmp_path / "theirs" / file), load_file(tmp_path / "ours" / file)
            assert theirs.keys() == ours.keys()
            for name, array in theirs.items():
                assert ours[name].dtype == array.dtype
                assert np.array_equal(ours[name], array), (file, name)
            compared += 1
        elif file.suffix == ".json":
            configs = [json.loads((tmp_path / side / file).read_text()) for side in ("theirs", "ours")]
            assert configs[0].keys() == configs[1].keys()
    assert compared == 2 * n_splits


def test_same_latents_as_delphis_filter(tmp_path, delphi):
    wanted = {name: torch.tensor([3, 50, 99]) for name in SAES}
    their_cache(delphi, 1, tmp_path / "theirs", wanted)
    make_cache(latents=wanted).save(tmp_path / "ours", model_name="tiny", n_splits=1)
    for name in SAES:
        assert read(tmp_path / "ours" / name) == read(tmp_path / "theirs" / name)


@pytest.mark.parametrize("n_splits", [1, 7])
def test_delphis_loader_reads_it(tmp_path, delphi, n_splits):
    make_cache().save(tmp_path, model_name="tiny", n_splits=n_splits)
    dataset = delphi.loader.LatentDataset(
        tmp_path,
        delphi.config.SamplerConfig(),
        delphi.config.ConstructorConfig(),
        tokenizer=object(),
        modules=list(SAES),
    )
    assert len(dataset) == len(SAES) * n_splits
    assert torch.equal(dataset.tokens, torch.cat([tokens for tokens, _ in batches()]))
    found = {name: {} for name in SAES}
    for buffer in dataset.buffers:
        for latent in buffer:
            data = latent.activation_data
            assert set(data.locations[:, 2].tolist()) == {latent.latent.latent_index}
            for at, activation in zip(data.locations.tolist(), data.activations.tolist()):
                found[latent.module][tuple(at)] = activation
    assert found == {name: expected(name) for name in SAES}


def test_delphis_loader_picks_latents(tmp_path, delphi):
    make_cache().save(tmp_path, model_name="tiny", n_splits=7)
    wanted = torch.tensor([3, 25, 50, 99])
    dataset = delphi.loader.LatentDataset(
        tmp_path,
        delphi.config.SamplerConfig(),
        delphi.config.ConstructorConfig(),
        tokenizer=object(),
        modules=["layers.0"],
        latents={"layers.0": wanted},
    )
    found = {latent.latent.latent_index for buffer in dataset.buffers for latent in buffer}
    assert found == {at[2] for at in expected("layers.0")} & set(wanted.tolist())
    assert 25 not in found


def test_delphi_fails_where_a_range_is_silent(tmp_path, delphi):
    """A defect of the host: latents 20 to 39 never fire, and the largest of nothing is not defined."""
    with pytest.raises(ValueError, match="zero-size array"):
        their_cache(delphi, 5, tmp_path)
    make_cache().save(tmp_path, model_name="tiny", n_splits=5)
    assert len(load_file(tmp_path / "layers.0" / "20_39.safetensors")["activations"]) == 0


def test_delphis_positions_wrap(tmp_path, delphi, caplog):
    """A defect of the host: it chooses 16 bits by sequence and latent alone."""
    theirs = delphi.cache.LatentCache(None, {"h": None}, 1)
    theirs.width = 2
    theirs.cache.add(torch.ones(1, 70_000, 2), torch.zeros(1, 70_000, dtype=torch.int64), 0, "h")
    theirs.cache.save()
    with caplog.at_level(logging.WARNING):
        theirs.save_splits(1, tmp_path)
    assert load_file(tmp_path / "h" / "0_1.safetensors")["locations"][:, 1].max() == 2**16 - 1
    assert len(read(tmp_path / "h")) == 2 * 2**16
