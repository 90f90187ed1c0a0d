"""What holds for the SAEs of every host: within wrappers that remember parameters, in forward mode, without data."""

from __future__ import annotations

import contextlib
import copy
import os
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.autograd import forward_ad
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from aksae_kernels.integrations import accelerate, deaccelerate

# Parts of torch are compiled by torch.jit when they are first used, of which torch itself warns.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script")

# sparsify looks for Triton once, at import, and then insists on a GPU.
os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")

B, D, F, K = 12, 16, 192, 4


def _sae_lens(kind: str) -> nn.Module:
    host = pytest.importorskip("sae_lens")
    options = {
        "TopKSAE": {"k": K},
        "JumpReLUSAE": {},
        "StandardSAE": {},
        "TopKTrainingSAE": {"k": K},
        "BatchTopKTrainingSAE": {"k": K},
        "JumpReLUTrainingSAE": {"jumprelu_init_threshold": 2.5, "l0_coefficient": 0.1},
    }[kind]
    config = getattr(host, f"{kind}Config")(d_in=D, d_sae=F, dtype="float64", **options)
    sae = getattr(host, kind)(config)
    if kind == "JumpReLUSAE":
        sae.threshold.data.fill_(2.5)
    return sae


def _dictionary_learning(kind: str) -> nn.Module:
    pytest.importorskip("dictionary_learning")
    from dictionary_learning.dictionary import AutoEncoder, JumpReluAutoEncoder
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    classes = {"AutoEncoderTopK": AutoEncoderTopK, "BatchTopKSAE": BatchTopKSAE}
    if kind == "AutoEncoder":
        return AutoEncoder(D, F).double()
    sae = classes[kind](D, F, K) if kind in classes else JumpReluAutoEncoder(D, F)
    sae.threshold.data.fill_(2.2)
    return sae.double()


def _llamascopium(act_fn: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("llamascopium")
        from llamascopium.models.sae import SAEConfig, SparseAutoEncoder
    options = {"hook_point_in": "in", "hook_point_out": "out", "d_model": D, "expansion_factor": F / D, "top_k": K}
    sae = SparseAutoEncoder(SAEConfig(act_fn=act_fn, dtype=torch.float64, **options))
    for name, parameter in sae.named_parameters():
        # The host leaves it as it comes from memory.
        parameter.data.fill_(0.7) if "threshold" in name else None
    return sae


def _sparsify() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        host = pytest.importorskip("sparsify")
    return host.SparseCoder(D, host.SparseCoderConfig(num_latents=F, k=K), dtype=torch.float64)


def _overcomplete() -> nn.Module:
    return pytest.importorskip("overcomplete.sae").TopKSAE(D, F, top_k=K).double()


HOSTS: dict[str, Callable[[], nn.Module]] = {
    **{
        f"sae_lens-{kind}": lambda kind=kind: _sae_lens(kind)
        for kind in (
            "TopKSAE",
            "JumpReLUSAE",
            "StandardSAE",
            "TopKTrainingSAE",
            "BatchTopKTrainingSAE",
            "JumpReLUTrainingSAE",
        )
    },
    **{
        f"dictionary_learning-{kind}": lambda kind=kind: _dictionary_learning(kind)
        for kind in ("AutoEncoderTopK", "BatchTopKSAE", "JumpReluAutoEncoder", "AutoEncoder")
    },
    **{
        f"llamascopium-{act_fn}": lambda act_fn=act_fn: _llamascopium(act_fn)
        for act_fn in ("topk", "batchtopk", "jumprelu")
    },
    "sparsify-SparseCoder": _sparsify,
    "overcomplete-TopKSAE": _overcomplete,
}

# Few of their latents fire where the encoder's bias is negative.
HAVE_NO_THRESHOLD = ("sae_lens-StandardSAE", "dictionary_learning-AutoEncoder")


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    sae = HOSTS[name]()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter_name, parameter in sae.named_parameters():
            if "threshold" not in parameter_name:
                values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                # So that scores and outputs are of the order of 1, and few scores are above the thresholds.
                parameter.copy_(values / (4 if values.ndim == 2 else 2))
                if name in HAVE_NO_THRESHOLD and parameter_name in ("b_enc", "encoder.bias"):
                    parameter.sub_(2.4)
    return sae


def inputs(seed: int = 2) -> Tensor:
    return torch.randn(B, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reconstruction(out: object) -> Tensor:
    """Of what a host's forward gives."""
    if isinstance(out, Tensor):
        return out
    return out.sae_out if hasattr(out, "sae_out") else out[-1]


def step(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Output and gradients."""
    model.zero_grad()
    out = reconstruction(model(x))
    out.square().sum().backward()
    return out.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same(found: tuple, expected: tuple) -> None:
    torch.testing.assert_close(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        message = lambda text, name=name: f"{name}: {text}"
        torch.testing.assert_close(found[1][name], grad, rtol=1e-6, atol=1e-8, msg=message)


def hosts_but(*names: str) -> pytest.MarkDecorator:
    assert set(names) <= HOSTS.keys()
    return pytest.mark.parametrize("name", [name for name in HOSTS if name not in names])


every_host = hosts_but()


@every_host
def test_codes_are_sparse_here(name):
    """Else these tests would be of the host's own code; the one host that trains by it is tested in inference."""
    fast = accelerate(build(name))
    acts = fast.encode(inputs())
    acts = acts[-1] if isinstance(acts, tuple) else acts
    assert (acts != 0).double().mean() < 1 / 16 or name.startswith("sparsify")


# -------------------------------------------------------------------------------- wrappers that remember parameters


@pytest.fixture
def process_group() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def fsdp(sae: nn.Module, use_orig_params: bool) -> nn.Module:
    with warnings.catch_warnings():
        # That there is nothing to shard among one process.
        warnings.filterwarnings("ignore", "FSDP is switching to use `NO_SHARD`")
        return FullyShardedDataParallel(sae, device_id=torch.device("cpu"), use_orig_params=use_orig_params)


WRAPPERS = {
    "ddp": lambda sae: DistributedDataParallel(sae, find_unused_parameters=True),
    "fsdp": lambda sae: fsdp(sae, use_orig_params=False),
    "fsdp-original": lambda sae: fsdp(sae, use_orig_params=True),
}


# It learns thresholds in fp32 beside weights of any dtype, and FSDP wants one dtype.
OF_TWO_DTYPES = ("sae_lens-JumpReLUTrainingSAE",)
# Their own weights are not contiguous; the class of the last begins with ABC, and cannot become one of FSDP.
NEVER_SHARDED = (
    "dictionary_learning-AutoEncoderTopK",
    "dictionary_learning-BatchTopKSAE",
    "dictionary_learning-JumpReluAutoEncoder",
    "dictionary_learning-AutoEncoder",
    "overcomplete-TopKSAE",
)


def trained(model: nn.Module, *between: Callable[[], object]) -> dict[str, Tensor]:
    """The weights after four steps, with `between[i]` called before the i-th."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    for i in range(4):
        if i < len(between):
            between[i]()
        optimizer.zero_grad()
        reconstruction(model(inputs(seed=i))).square().sum().backward()
        optimizer.step()
    sae = getattr(model, "module", model)
    is_flat = isinstance(model, FullyShardedDataParallel)
    with FullyShardedDataParallel.summon_full_params(model) if is_flat else contextlib.nullcontext():
        return {name: parameter.detach().clone() for name, parameter in sae.named_parameters()}


def check_wrapped(wrap: str, name: str, accelerate_before: int, expected: dict[str, Tensor]) -> None:
    """Accelerated before it is wrapped (-1) or before a step; and taken back before the last one."""
    sae = build(name)
    model = WRAPPERS[wrap](accelerate(sae) if accelerate_before < 0 else sae)

    def go() -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"[\w.]+ keeps its layout")
            accelerate(sae)

    changes = [lambda: None, lambda: None, lambda: None, lambda: deaccelerate(sae)]
    if accelerate_before >= 0:
        changes[accelerate_before] = go
    found = trained(model, *changes)
    assert found.keys() == expected.keys()
    for key, weight in expected.items():
        message = lambda text, key=key: f"{key}: {text}"
        torch.testing.assert_close(found[key], weight, rtol=1e-6, atol=1e-8, msg=message)


@pytest.mark.parametrize("accelerate_before", [-1, 0, 1])
@every_host
def test_in_distributed_data_parallel(name, accelerate_before, process_group):
    """Some thresholds have no gradient: of a wrapper that minds, its buckets are never made again."""
    check_wrapped("ddp", name, accelerate_before, expected=trained(build(name)))


@pytest.mark.parametrize("accelerate_before", [-1, 1])
@hosts_but(*OF_TWO_DTYPES)
def test_in_fully_sharded_data_parallel(name, accelerate_before, process_group):
    check_wrapped("fsdp", name, accelerate_before, expected=trained(WRAPPERS["fsdp"](build(name))))


# Without shards, torch takes gradients of original parameters for row-major ones: of a host's own as of ours.
@hosts_but(*OF_TWO_DTYPES, *NEVER_SHARDED)
def test_in_fully_sharded_data_parallel_with_original_parameters(name, process_group):
    check_wrapped("fsdp-original", name, 1, expected=trained(build(name)))


def whole(gradients: tuple) -> tuple:
    """Of a sharded model."""
    out, grads = gradients
    return out, {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()}


def sharded(sae: nn.Module) -> nn.Module:
    return fully_shard(sae, mesh=init_device_mesh("cpu", (distributed.get_world_size(),)))


@hosts_but(*OF_TWO_DTYPES, *NEVER_SHARDED)
def test_fully_sharded(name, process_group):
    expected = whole(step(sharded(build(name)), inputs()))
    model = accelerate(sharded(build(name)))
    assert isinstance(model, FSDPModule)
    assert_same(whole(step(model, inputs())), expected)
    assert type(deaccelerate(model)) is type(sharded(build(name)))
    assert_same(whole(step(model, inputs())), expected)


@hosts_but(*OF_TWO_DTYPES, *NEVER_SHARDED)
def test_fully_sharded_within_a_larger_model(name, process_group):
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.sae = build(name)

        def forward(self, x):
            return reconstruction(self.sae(x))

    model = Whole()
    expected = step(model, inputs())
    model = sharded(Whole())
    accelerate(model.sae)
    assert_same(whole(step(model, inputs())), expected)


def train_sharded(rank: int, world: int, folder: str) -> None:
    """Of one process among several: a training step of SAELens, of which FSDP has to be told."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    from sae_lens.saes.sae import TrainStepInput

    grads = []
    for change in (lambda sae: sae, accelerate):
        sae = change(sharded(build("sae_lens-TopKTrainingSAE")))
        register_fsdp_forward_method(sae, "training_forward_pass")
        sae.training_forward_pass(TrainStepInput(inputs(seed=rank), {}, None, 0, False)).loss.backward()
        grads.append({name: parameter.grad.full_tensor() for name, parameter in sae.named_parameters()})
    assert_same((torch.zeros(()), grads[1]), (torch.zeros(()), grads[0]))
    distributed.destroy_process_group()


def test_a_training_step_that_is_sharded_among_two_processes(tmp_path):
    pytest.importorskip("sae_lens")
    multiprocessing.spawn(train_sharded, (2, str(tmp_path)), nprocs=2)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated")
@every_host
def test_compiled_by_its_user(name):
    torch._dynamo.reset()
    model = build(name)
    compiled = torch.compile(model, backend="eager")
    expected = step(model, inputs())
    assert_same((step(compiled, inputs())[0], expected[1]), expected)
    accelerate(model)
    found = step(compiled, inputs())[0], {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_same(found, expected)
    torch._dynamo.reset()


# -------------------------------------------------------------------------------------------------- forward mode


def directional(model: nn.Module, parameters: dict[str, Tensor], tangents: dict[str, Tensor]) -> Tensor:
    """The derivative of the output along `tangents`, by central differences, with `x` one of the parameters."""
    ends = []
    for sign in (1, -1):
        moved = {key: value + sign * 1e-6 * tangents[key] for key, value in parameters.items()}
        x = moved.pop("x")
        ends.append(reconstruction(torch.func.functional_call(model, moved, (x,))))
    return (ends[0] - ends[1]) / 2e-6


def by_jvp(model: nn.Module, parameters: dict[str, Tensor], tangents: dict[str, Tensor]) -> Tensor:
    def function(given: dict[str, Tensor]) -> Tensor:
        given = dict(given)
        x = given.pop("x")
        return reconstruction(torch.func.functional_call(model, given, (x,)))

    return torch.func.jvp(function, (parameters,), (tangents,))[1]


def by_dual_numbers(model: nn.Module, parameters: dict[str, Tensor], tangents: dict[str, Tensor]) -> Tensor:
    with forward_ad.dual_level():
        dual = {key: forward_ad.make_dual(value, tangents[key]) for key, value in parameters.items()}
        x = dual.pop("x")
        tangent = forward_ad.unpack_dual(reconstruction(torch.func.functional_call(model, dual, (x,)))).tangent
    return torch.zeros_like(x) if tangent is None else tangent


@pytest.mark.parametrize("of", ["input", "weights"])
@pytest.mark.parametrize("learning", [True, False], ids=["learning", "frozen"])
@pytest.mark.parametrize("take", [by_jvp, by_dual_numbers])
@hosts_but("overcomplete-TopKSAE")
def test_forward_mode(name, take, learning, of):
    """Never a tangent of 0 for what is no constant."""
    model = accelerate(build(name)).requires_grad_(learning)
    generator = torch.Generator().manual_seed(7)
    parameters = {key: value for key, value in model.named_parameters() if value.dtype == torch.float64}
    parameters = {"x": inputs()} if of == "input" else {"x": inputs(), **parameters}
    tangents = {
        key: torch.randn(value.shape, generator=generator, dtype=value.dtype) for key, value in parameters.items()
    }
    if of == "weights":
        tangents["x"].zero_()
    with torch.no_grad():
        expected = directional(build(name), parameters, tangents)
    assert expected.abs().max() > 0.1
    # In training this one is the host's own code, which raises.
    with torch.set_grad_enabled(name != "llamascopium-jumprelu"):
        found = take(model, parameters, tangents)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("of", ["input", "weights"])
def test_forward_mode_of_a_host_that_normalises_in_place(of):
    """Which torch.func does not allow, and central differences do not see through."""
    name = "overcomplete-TopKSAE"
    parameters = {"x": inputs(), **({} if of == "input" else dict(build(name).named_parameters()))}
    tangents = {key: torch.ones_like(value) for key, value in parameters.items()}
    expected = by_dual_numbers(build(name), copy.deepcopy(parameters), tangents)
    torch.testing.assert_close(by_dual_numbers(accelerate(build(name)), parameters, tangents), expected)


@pytest.mark.parametrize("kind", ["TopKTrainingSAE", "BatchTopKTrainingSAE", "JumpReLUTrainingSAE"])
def test_forward_mode_of_a_training_step_raises(kind):
    """What it hands out is a sparse tensor, which torch gives no tangent; one host sets its thresholds in place."""
    pytest.importorskip("sae_lens")
    from sae_lens.saes.sae import TrainStepInput

    sae = accelerate(build(f"sae_lens-{kind}"))
    with forward_ad.dual_level():
        x = forward_ad.make_dual(inputs(), inputs(seed=7))
        with pytest.raises(RuntimeError, match="forward AD"):
            sae.training_forward_pass(TrainStepInput(x, {"l0": 0.1}, None, 0, False))


def test_forward_mode_of_a_decode_of_dense_latents():
    """Zeros have tangents, too."""
    pytest.importorskip("sae_lens")
    model = accelerate(build("sae_lens-TopKSAE"))
    with torch.no_grad():
        acts, tangent = model.encode(inputs()), torch.randn(B, F, dtype=torch.float64)
        found = torch.func.jvp(model.decode, (acts,), (tangent,))[1]
        torch.testing.assert_close(found, tangent @ model.W_dec)


# -------------------------------------------------------------------------------------------------- without data


def assert_same_shapes(found: object, expected: object) -> None:
    leaves, expected = pytree.tree_leaves(found), pytree.tree_leaves(expected)
    assert [leaf.shape for leaf in leaves] == [leaf.shape for leaf in expected]
    assert {leaf.device for leaf in leaves} == {leaf.device for leaf in expected}


# Where k is a buffer, the width is data; and one host moves scalars to the CPU.
NEED_DATA = (
    "dictionary_learning-AutoEncoderTopK",
    "llamascopium-topk",
    "llamascopium-batchtopk",
    "llamascopium-jumprelu",
)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
@pytest.mark.parametrize("method", ["forward", "encode"])
@hosts_but(*NEED_DATA)
def test_on_the_meta_device(name, method, grad):
    x = inputs().to("meta")
    with torch.set_grad_enabled(grad):
        expected = getattr(build(name).to("meta"), method)(x)
        for model in (accelerate(build(name).to("meta")), accelerate(build(name)).to("meta")):
            assert_same_shapes(getattr(model, method)(x), expected)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
@hosts_but("dictionary_learning-AutoEncoderTopK")
def test_with_fake_tensors(name, grad):
    host, fast = build(name), accelerate(build(name))
    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        host, fast, x = copy.deepcopy((host, fast, inputs()))
    with torch.set_grad_enabled(grad), mode:
        assert_same_shapes(fast(x), host(x))


# The host's BatchTopK asks for autocast there, which torch does not know.
@pytest.mark.parametrize("kind", ["TopKTrainingSAE", "JumpReLUTrainingSAE"])
def test_a_training_step_on_the_meta_device(kind):
    pytest.importorskip("sae_lens")
    from sae_lens.saes.sae import TrainStepInput

    sae = accelerate(build(f"sae_lens-{kind}")).to("meta")
    output = sae.training_forward_pass(TrainStepInput(inputs().to("meta"), {"l0": 0.1}, None, 0, False))
    assert output.loss.is_meta
    assert output.feature_acts.shape == (B, F)


# ---------------------------------------------------------------------------------------------------------- k


K_OF = {
    "sae_lens-TopKSAE": lambda sae, k: setattr(sae.activation_fn, "k", k),
    "sae_lens-TopKTrainingSAE": lambda sae, k: setattr(sae.activation_fn, "k", k),
    "sae_lens-BatchTopKTrainingSAE": lambda sae, k: setattr(sae.activation_fn, "k", k),
    "dictionary_learning-AutoEncoderTopK": lambda sae, k: setattr(sae, "k", torch.tensor(k)),
    "llamascopium-topk": lambda sae, k: setattr(sae, "current_k", k),
    "llamascopium-batchtopk": lambda sae, k: setattr(sae, "current_k", k),
    "sparsify-SparseCoder": lambda sae, k: setattr(sae.cfg, "k", k),
    "overcomplete-TopKSAE": lambda sae, k: setattr(sae, "top_k", k),
}


@pytest.mark.parametrize("name", K_OF)
def test_k_may_be_an_integer_of_numpy(name):
    model = accelerate(build(name))
    expected = reconstruction(model(inputs()))
    K_OF[name](model, np.int64(K))
    torch.testing.assert_close(reconstruction(model(inputs())), expected)


# -------------------------------------------------------------------------------------------- AdaptiveK in the hosts


def adaptivek(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "sae_lens":
        pytest.importorskip("sae_lens")
        from aksae.hosts.sae_lens import AdaptiveKSAELens, AdaptiveKSAELensConfig

        sae = AdaptiveKSAELens(
            AdaptiveKSAELensConfig(d_in=D, d_sae=F, k_min=np.int64(2), k_max=np.int64(K), dtype="float64")
        )
    else:
        pytest.importorskip("dictionary_learning")
        from aksae.hosts.dictionary_learning import AutoEncoderAdaptiveK

        sae = AutoEncoderAdaptiveK(D, F, np.int64(K), k_min=np.int64(2))
    for parameter in sae.parameters():
        nn.init.normal_(parameter, std=0.3)
    return sae.double()


@pytest.mark.parametrize("take", [by_jvp, by_dual_numbers])
@pytest.mark.parametrize("learning", [True, False], ids=["learning", "frozen"])
@pytest.mark.parametrize("kind", ["sae_lens", "dictionary_learning"])
def test_forward_mode_of_adaptivek(kind, learning, take):
    """Of the bias of the decoder too, whose gradient takes a way of its own."""
    sae = adaptivek(kind).requires_grad_(learning)
    parameters = {"x": inputs()} | {name: value for name, value in sae.named_parameters() if "probe" not in name}
    tangents = {key: torch.ones_like(value) for key, value in parameters.items()}
    with torch.no_grad():
        expected = directional(sae, parameters, tangents)
    torch.testing.assert_close(take(sae, parameters, tangents), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["sae_lens", "dictionary_learning"])
def test_a_decode_by_adaptivek_of_dense_latents(kind):
    """Zeros have tangents, too; and without data none are found."""
    sae = adaptivek(kind)
    acts, tangent = sae.encode(inputs()).detach(), torch.randn(B, F, dtype=torch.float64)
    W_dec = sae.W_dec if kind == "sae_lens" else sae.decoder.weight.T
    torch.testing.assert_close(torch.func.jvp(sae.decode, (acts,), (tangent,))[1], tangent @ W_dec)
    assert sae.to("meta").decode(acts.to("meta")).shape == (B, D)


def test_a_file_holds_a_k_of_numpy(tmp_path):
    sae = adaptivek("sae_lens")
    sae.save_model(tmp_path)
    config = type(sae).load_from_disk(tmp_path).cfg
    assert (config.k_min, config.k_max) == (2, K)
