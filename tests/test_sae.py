"""The SAE module: the paper's equations, initialisation, checkpoints."""

from __future__ import annotations

import json
import os
import re

import pytest
import safetensors.torch
import torch
from aksae import AdaptiveK, AdaptiveKSAE, KMap, SAEConfig, TopK, UserError
from aksae.k_policy import score_to_k
from aksae.sae import geometric_median
from safetensors import SafetensorError


def make_sae(*, k=None, d_in=6, d_sae=20, dtype=torch.float64, **fields) -> AdaptiveKSAE:
    generator = torch.Generator().manual_seed(1)
    if k is not None:
        config = SAEConfig(d_in, d_sae, TopK(k))
    else:
        config = SAEConfig(d_in, d_sae, **{"k_min": 1, "k_max": 8, "probe_lambda": 3.0, **fields})
    sae = AdaptiveKSAE(config, generator=generator).to(dtype)
    with torch.no_grad():
        sae.b_enc.normal_(generator=generator)
        sae.b_dec.normal_(generator=generator)
        sae.W_enc.normal_(generator=generator)
        if sae.probe is not None:
            sae.probe.weight.normal_(generator=generator)
            sae.probe.bias.fill_(5.0)
    return sae


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def row_by_row(sae, x, k):
    """z `[B, F]` and x_hat `[B, D]` by the equations, one row at a time."""
    z = []
    for row, row_k in zip(x, k.tolist()):
        activations = torch.relu(sae.W_enc @ (row - sae.b_dec) + sae.b_enc)
        kept = activations.argsort(descending=True, stable=True)[:row_k]
        z.append(torch.zeros_like(activations).scatter(0, kept, activations[kept]))
    z = torch.stack(z)
    return z, z @ sae.W_dec + sae.b_dec


def test_encode_and_forward_follow_the_equations():
    sae, x = make_sae(), randn(40, 6)
    k = score_to_k(sae.probe(x), k_min=1, k_max=8)
    assert len(k.unique()) > 3
    z, x_hat = row_by_row(sae, x, k)
    codes = sae.encode(x)
    torch.testing.assert_close(codes.to_dense(20), z)
    torch.testing.assert_close(sae(x), x_hat)
    torch.testing.assert_close(sae.decode(codes), x_hat)
    assert torch.equal(sae.k_for(x), k)
    assert codes.values.shape == (40, 8)


def test_gradients_follow_the_equations():
    sae, x = make_sae(), randn(12, 6).requires_grad_()
    sae(x).pow(3).sum().backward()
    got = {"x": x.grad, **{name: p.grad for name, p in sae.named_parameters()}}
    sae.zero_grad()
    x.grad = None
    row_by_row(sae, x, sae.k_for(x))[1].pow(3).sum().backward()
    for name, parameter in (("x", x), *sae.named_parameters()):
        if name.startswith("probe"):
            assert got[name] is None, "k is rounded: nothing may reach the probe"
        else:
            torch.testing.assert_close(got[name], parameter.grad, msg=name)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,), (2, 0)], ids=str)
def test_leading_dimensions_are_kept(shape):
    sae, x = make_sae(), randn(*shape, 6)
    codes = sae.encode(x)
    assert codes.counts.shape == shape
    assert sae.k_for(x).shape == shape
    assert sae(x).shape == x.shape
    torch.testing.assert_close(sae(x).reshape(-1, 6), sae(x.reshape(-1, 6)))


def test_k_may_be_given_or_fixed():
    sae, fixed, x = make_sae(), make_sae(k=5), randn(10, 6)
    per_row = torch.arange(10)
    for k in (3, per_row):
        rows = torch.as_tensor(k).expand(10)
        torch.testing.assert_close(sae.encode(x, k).to_dense(20), row_by_row(sae, x, rows)[0])
    assert fixed.probe is None
    assert fixed.k_for(x).tolist() == [5] * 10
    torch.testing.assert_close(fixed.encode(x).to_dense(20), row_by_row(fixed, x, torch.full((10,), 5))[0])
    assert fixed.encode(x).values.shape == (10, 5)


def test_autocast_leaves_k_alone():
    sae, x = make_sae(dtype=torch.float32), randn(50, 6, dtype=torch.float32)
    k, x_hat = sae.k_for(x), sae(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sae.k_for(x), k)
        # A rounded score may swap the last latent of a row; the rest is close.
        assert ((sae(x) - x_hat).abs() < 0.2).float().mean() > 0.9


def test_initialisation():
    sae = AdaptiveKSAE(SAEConfig(6, 400), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(400))
    assert torch.equal(sae.W_enc, sae.W_dec)
    assert sae.W_enc.data_ptr() != sae.W_dec.data_ptr()
    assert not sae.b_enc.any()
    same = AdaptiveKSAE(SAEConfig(6, 400), generator=torch.Generator().manual_seed(0))
    assert torch.equal(sae.W_dec, same.W_dec)

    x = randn(5, 20, 6, dtype=torch.float32)
    sae.start(x)
    torch.testing.assert_close(sae.b_dec.detach(), geometric_median(x.reshape(-1, 6)))
    with pytest.raises(UserError, match="x: got no rows, needs at least one"):
        sae.start(x[:0])


def test_geometric_median_minimises_the_sum_of_distances():
    x = randn(101, 4).exp()
    # There the unit vectors towards all rows cancel out.
    towards = torch.nn.functional.normalize(x - geometric_median(x), dim=-1)
    assert towards.sum(0).norm() < 1e-3


@pytest.mark.parametrize(
    "rows",
    [[[2.0, 3.0]], [[2.0, 3.0]] * 4, [[2.0, 3.0]] * 4 + [[1e3, -1e3]] * 3],
    ids=["one row", "equal rows", "outliers in the minority"],
)
def test_geometric_median_of_repeated_rows(rows):
    torch.testing.assert_close(geometric_median(torch.tensor(rows)), torch.tensor([2.0, 3.0]), rtol=0, atol=1e-2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k_min": 9}, "k_min: got 9, needs at most k_max = 8"),
        ({"k_max": 21}, "k_max: got 21, needs a number from 0 to d_sae = 20"),
        ({"k": 21}, "k: got 21, needs a number from 0 to d_sae = 20"),
        ({"d_in": 0}, "d_in: got 0, needs a number from 1 up"),
        ({"score_min": 10.0}, "score_min: got 10.0, needs a number below score_max = 10.0"),
        ({"steepness": float("nan")}, "steepness: got nan, needs a finite number"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_config_out_of_range(fields, message):
    with pytest.raises(UserError, match=re.escape(message)):
        make_sae(**fields)


@pytest.mark.parametrize("k", [None, 5])
def test_checkpoints_of_version_0_1_load(tmp_path, k):
    sae = make_sae(k=k, probe_lambda=3.0) if k is None else make_sae(k=k)
    sae.save_pretrained(tmp_path)
    old = {"d_in": 6, "d_sae": 20, "k": k, "k_min": 1, "k_max": 8, "steepness": 6.0, "score_min": 0.0}
    old |= {"score_max": 10.0, "probe_reads": "last", "probe_lambda": 3.0}
    (tmp_path / "config.json").write_text(json.dumps(old))
    loaded = AdaptiveKSAE.from_pretrained(tmp_path)
    assert loaded.config == sae.config
    x = randn(30, 6)
    assert torch.equal(loaded(x), sae(x))


def test_k_of_version_0_1_is_taken_with_a_warning():
    with pytest.warns(DeprecationWarning, match="selection=TopK"):
        assert SAEConfig(6, 20, k=4) == SAEConfig(6, 20, TopK(4))
    assert SAEConfig(6, 20) == SAEConfig(6, 20, AdaptiveK())
    with pytest.raises(TypeError, match="k_min: got a value beside selection"):
        SAEConfig(6, 20, TopK(4), k_min=4)
    with pytest.raises(TypeError, match="no field kmax"):
        SAEConfig(6, 20, kmax=4)


@pytest.mark.parametrize("k", [None, 5])
def test_checkpoint_carries_everything(tmp_path, k):
    sae, x = make_sae(k=k, dtype=torch.float32, steepness=4.0, score_max=8.0), randn(7, 6, dtype=torch.float32)
    sae.save_pretrained(tmp_path / "deep" / "sae")
    loaded = AdaptiveKSAE.from_pretrained(tmp_path / "deep" / "sae")
    assert loaded.config == sae.config
    assert loaded.state_dict().keys() == sae.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in sae.state_dict().items())
    torch.testing.assert_close(loaded(x), sae(x))
    assert all(p.requires_grad for p in loaded.parameters())
    assert sorted(os.listdir(tmp_path / "deep" / "sae")) == ["config.json", "sae.safetensors"]
    assert json.loads((tmp_path / "deep" / "sae" / "config.json").read_text())["d_sae"] == 20


@pytest.fixture
def checkpoint(tmp_path):
    make_sae(dtype=torch.float32).save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder, change):
    path = folder / "sae.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)


def load_error(folder) -> str:
    with pytest.raises(UserError) as caught:
        AdaptiveKSAE.from_pretrained(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_truncated_checkpoint_names_the_tensor(checkpoint):
    path = checkpoint / "sae.safetensors"
    data = path.read_bytes()
    for size in range(len(data) - 1, 8, -97):
        path.write_bytes(data[:size])
        assert "truncated" in load_error(checkpoint)
    path.write_bytes(data[:-1])
    assert re.search(rf"tensor [\w.]+: got a file of {len(data) - 1} bytes, needs {len(data)}", load_error(checkpoint))
    for size in (0, 5, 8):
        path.write_bytes(data[:size])
        load_error(checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(W_enc=t["W_enc"].T.contiguous()), "tensor W_enc: got shape [6, 20], needs [20, 6]"),
        (lambda t: t.pop("b_dec"), "tensor b_dec: got none, needs one"),
        (lambda t: t.pop("probe.weight"), "tensor probe.weight: got none, needs one"),
        (lambda t: t.update(extra=torch.zeros(1)), "tensor extra: got one, needs only W_dec"),
    ],
    ids=["shape", "missing", "no probe", "unknown"],
)
def test_checkpoint_of_another_shape(checkpoint, change, message):
    rewrite(checkpoint, change)
    assert message in load_error(checkpoint)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("sae.safetensors", None, "got no such file"),
        ("sae.safetensors", b"\x10\0\0\0\0\0\0\0 no safetensors ", "not safetensors"),
        ("config.json", None, "got no such file, needs a JSON file"),
        ("config.json", b"{", "is not readable JSON"),
        ("config.json", b"[]", "got list, needs an object"),
        ("config.json", b'{"d_in": 6}', "got no field d_sae, needs one"),
        ("config.json", b'{"d_in": 6, "d_sae": 20, "depth": 2}', "unknown field depth"),
        ("config.json", b'{"d_in": 6, "d_sae": "many"}', "config.json.d_sae: got 'many', needs int"),
        ("config.json", b'{"d_in": 6, "d_sae": 20, "k_max": 21}', "k_max: got 21"),
    ],
)
def test_unreadable_checkpoint(checkpoint, name, content, message):
    if content is None:
        (checkpoint / name).unlink()
    else:
        (checkpoint / name).write_bytes(content)
    assert message in load_error(checkpoint)


def test_a_failed_save_keeps_the_old_checkpoint(checkpoint, monkeypatch):
    def full(tensors, path):
        path.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    other = make_sae(d_sae=20, dtype=torch.float32)
    other.W_enc.data.zero_()
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space left on device"):
        other.save_pretrained(checkpoint)
    assert AdaptiveKSAE.from_pretrained(checkpoint).W_enc.any()
    assert sorted(os.listdir(checkpoint)) == ["config.json", "sae.safetensors"]


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("requires_grad", [False, True], ids=["constants", "parameters"])
@pytest.mark.parametrize("name", ["x", "W_enc", "b_enc", "W_dec", "b_dec"])
def test_forward_mode_finds_every_parameter(name, requires_grad):
    """b_dec too, which without its gradient is not led around the encoder's input."""
    sae = AdaptiveKSAE(SAEConfig(6, 20, TopK(3)), generator=torch.Generator().manual_seed(0)).double()
    sae.requires_grad_(requires_grad)
    generator = torch.Generator().manual_seed(1)
    inputs = {"x": torch.randn(4, 6, generator=generator, dtype=torch.float64)} | dict(sae.named_parameters())
    direction = torch.randn(inputs[name].shape, generator=generator, dtype=torch.float64)

    def reconstruction(value):
        values = inputs | {name: value}
        return torch.func.functional_call(sae, values, (values.pop("x"),))

    with torch.no_grad():
        step = 1e-6 * direction
        expected = (reconstruction(inputs[name] + step) - reconstruction(inputs[name] - step)) / 2e-6
    torch.testing.assert_close(torch.func.jvp(reconstruction, (inputs[name],), (direction,))[1], expected)
    with torch.autograd.forward_ad.dual_level():
        dual = reconstruction(torch.autograd.forward_ad.make_dual(inputs[name], direction))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, expected)


@pytest.mark.parametrize("k", [4, None], ids=["fixed", "adaptive"])
def test_a_batch_without_rows(k):
    sae = AdaptiveKSAE(SAEConfig(16, 64, AdaptiveK(KMap(2, 9)) if k is None else TopK(k)))
    x = torch.randn(0, 16, requires_grad=True)
    sae(x).sum().backward()
    assert x.grad.shape == (0, 16)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert not getattr(sae, name).grad.any()


@pytest.mark.parametrize("dynamic", [None, True, False], ids=str)
@pytest.mark.parametrize("k", [4, None], ids=["fixed", "adaptive"])
def test_compiles_whole(k, dynamic):
    torch._dynamo.reset()
    sae = AdaptiveKSAE(SAEConfig(16, 64, AdaptiveK(KMap(2, 9, 5.5)) if k is None else TopK(k)))
    compiled = torch.compile(sae, dynamic=dynamic, fullgraph=True, backend="aot_eager")
    for rows in (5, 8):
        x = torch.randn(rows, 16)
        torch.testing.assert_close(compiled(x), sae(x))
        grads = [torch.autograd.grad(model(x).square().sum(), sae.W_enc)[0] for model in (compiled, sae)]
        torch.testing.assert_close(*grads)
