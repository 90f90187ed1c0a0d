"""The frame of `accelerate`, without any host: refusals, layouts, codes in the forms of hosts, the optimizer.

Hosts themselves are in `tests/compat`, which needs them installed.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import types
import warnings
from abc import ABC
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from test_dispatch import run_python
from torch import Tensor, distributed, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

with warnings.catch_warnings():
    # It compiles functions by torch.jit, of which torch itself warns.
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch.distributed.optim import ZeroRedundancyOptimizer

from aksae_kernels import SparseCodes, integrations, topk_encode
from aksae_kernels.integrations import accelerate, deaccelerate, sparse, weights
from aksae_kernels.integrations.accelerated import AbstractFirst, AcceleratedModule, has_hooks, is_plain_linear
from aksae_kernels.integrations.adam import FastAdam, slow_down, speed_up
from aksae_kernels.testing import random_codes

# torch.compile brings in parts of torch that are compiled by torch.jit, of which torch itself warns.
imports_torch_jit = pytest.mark.filterwarnings("ignore:.torch.jit.script")


class Coder(nn.Module):
    """Of a host: `W_enc [D, F]`."""

    def __init__(self):
        super().__init__()
        self.W_enc = nn.Parameter(torch.arange(12.0).view(3, 4))
        self.groups = 1

    def forward(self, x):
        return x @ self.W_enc


class FastCoder(AcceleratedModule, Coder):
    host_class = Coder
    transposed = ("W_enc",)

    @classmethod
    def refusal(cls, obj):
        return f"groups={obj.groups}" if obj.groups > 1 else None

    def forward(self, x):
        return nn.functional.linear(x, self.W_enc.T)


class Unknown(Coder):
    """Somebody's own subclass."""


def install_host(patch: pytest.MonkeyPatch) -> None:
    """A host package `hosted` with the class Coder, and our module for it."""
    patch.setattr(Coder, "__module__", "hosted.coder")
    patch.setitem(integrations._HOSTS, "hosted", integrations._Host("torch", version("torch"), "Coder"))
    name = "aksae_kernels.integrations.hosted"
    patch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[name].FastCoder = FastCoder
    sys.modules[name].AcceleratedModule = AcceleratedModule  # as an import leaves it there


@pytest.fixture
def host(monkeypatch):
    install_host(monkeypatch)


# ------------------------------------------------------------------------------------------------ accelerate


def test_accelerate_and_back(host):
    coder = Coder()
    W_enc, values = coder.W_enc, coder.W_enc.detach().clone()
    assert accelerate(coder) is coder
    assert type(coder) is FastCoder
    assert accelerate(coder) is coder
    assert coder.W_enc is W_enc
    assert coder.W_enc.T.is_contiguous()
    assert torch.equal(W_enc, values)
    assert coder.state_dict()["W_enc"].is_contiguous()
    assert torch.equal(coder.state_dict()["W_enc"], values)
    twin = copy.deepcopy(coder)
    twin.load_state_dict({"W_enc": 2 * values})
    assert twin.W_enc.T.is_contiguous()
    assert deaccelerate(coder) is coder
    assert type(coder) is Coder
    assert coder.W_enc is W_enc
    assert W_enc.is_contiguous()
    assert deaccelerate(coder) is coder


def test_an_accelerated_class_may_be_constructed(host, monkeypatch):
    coder = FastCoder()
    assert coder.W_enc.T.is_contiguous()
    assert accelerate(coder) is coder
    assert type(deaccelerate(coder)) is Coder
    monkeypatch.setattr(FastCoder, "refusal", classmethod(lambda cls, obj: "groups=2"))
    with pytest.raises(ValueError, match=r"FastCoder .* with groups=2"):
        FastCoder()


def test_a_state_dict_within_a_larger_one_is_contiguous(host):
    whole = nn.Sequential(accelerate(Coder()), nn.Linear(4, 2))
    assert list(whole.state_dict()) == ["0.W_enc", "1.weight", "1.bias"]
    assert all(tensor.is_contiguous() for tensor in whole.state_dict().values())


def test_a_state_dict_touches_only_transposed_weights(host):
    """Others of a larger module may have layouts on purpose, and with `keep_vars` there are no copies."""
    coder = accelerate(Coder())
    whole = nn.Sequential(nn.Linear(4, 2), coder)
    weights.as_latent_major(whole[0].weight)
    assert not whole.state_dict()["0.weight"].is_contiguous()
    assert whole.state_dict()["0.weight"].data_ptr() == whole[0].weight.data_ptr()
    assert whole.state_dict(prefix="a.")["a.1.W_enc"].is_contiguous()
    assert whole.state_dict(keep_vars=True)["1.W_enc"] is coder.W_enc
    with pytest.warns(FutureWarning, match="Positional args"):
        assert coder.state_dict({}, "b.")["b.W_enc"].is_contiguous()


def test_a_fast_class_may_be_constructed(host):
    coder = FastCoder()
    assert coder.W_enc.T.is_contiguous()
    assert torch.equal(coder.W_enc, Coder().W_enc)
    assert type(deaccelerate(coder)) is Coder

    class Grouped(FastCoder):
        def refusal(self, obj):
            return "groups"

    with pytest.raises(ValueError, match="Grouped must be something the kernels can do, got one with groups"):
        Grouped()


class Abstract(ABC, nn.Module):
    """As some hosts begin their classes."""

    def __init__(self):
        super().__init__()
        self.W_enc = nn.Parameter(torch.arange(12.0).view(3, 4))


class FastAbstract(AbstractFirst, AcceleratedModule, Abstract):
    host_class = Abstract
    transposed = ("W_enc",)


def test_a_host_class_that_starts_with_abc():
    coder = Abstract()
    coder.__class__ = FastAbstract
    coder.__class__ = Abstract
    assert FastAbstract().W_enc.T.is_contiguous()
    assert FastAbstract().state_dict()["W_enc"].is_contiguous()


@pytest.mark.parametrize(
    "register", ["register_forward_pre_hook", "register_forward_hook", "register_full_backward_hook"]
)
def test_a_linear_layer_with_hooks_is_not_plain(register):
    linear = nn.Linear(3, 4)
    assert is_plain_linear(linear)
    handle = getattr(linear, register)(lambda *args: None)
    assert has_hooks(linear)
    assert not is_plain_linear(linear)
    handle.remove()
    assert is_plain_linear(linear)
    assert not is_plain_linear(nn.Identity())


def test_what_cannot_be_accelerated_is_refused(host):
    for obj in (nn.Linear(2, 2), None, 3, Unknown()):
        with pytest.raises(TypeError, match=r"got .*; there are .*SparseCoder.*TopKTrainingSAE.*AutoEncoderTopK"):
            accelerate(obj)
    grouped = Coder()
    grouped.groups = 2
    with pytest.raises(ValueError, match=r"hosted\.coder\.Coder with groups=2"):
        accelerate(grouped)
    assert type(grouped) is Coder
    assert grouped.W_enc.is_contiguous()


@pytest.mark.parametrize("name", ["forward", "state_dict"])
def test_a_method_of_the_instance_is_refused(host, name):
    """It would hide the accelerated one, without a word: as where a host's method has been compiled."""
    coder = Coder()
    coder.note = print
    setattr(coder, name, getattr(coder, name))
    with pytest.raises(ValueError, match=rf"hosted\.coder\.Coder with a {name} of its own, .* accelerate first"):
        accelerate(coder)
    assert type(coder) is Coder
    assert coder.W_enc.is_contiguous()
    delattr(coder, name)
    setattr(accelerate(coder), name, print)


class Pair(nn.Module):
    """Of a host: two coders, of which the second need not be one that can be accelerated."""

    def __init__(self, second):
        super().__init__()
        self.first, self.second = Coder(), second


class FastPair(AcceleratedModule, Pair):
    host_class = Pair

    def _attach(self):
        for coder in (self.first, self.second):
            accelerate(coder)

    def _detach(self):
        for coder in (self.first, self.second):
            deaccelerate(coder)


def test_accelerate_is_all_or_nothing(host, monkeypatch):
    monkeypatch.setattr(Pair, "__module__", "hosted.pair")
    sys.modules["aksae_kernels.integrations.hosted"].FastPair = FastPair
    pair = Pair(Unknown())
    with pytest.raises(TypeError, match="Unknown"):
        accelerate(pair)
    assert [type(module) for module in (pair, pair.first, pair.second)] == [Pair, Coder, Unknown]
    assert pair.first.W_enc.is_contiguous()


class Within(nn.Module):
    """Of a host: a weight of a submodule."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(4, 3, bias=False)


class FastWithin(AcceleratedModule, Within):
    host_class = Within
    transposed = ("decoder.weight",)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_a_weight_that_is_no_parameter(host, monkeypatch):
    """It is made by others at each use, and so is its layout."""
    monkeypatch.setattr(Within, "__module__", "hosted.within")
    sys.modules["aksae_kernels.integrations.hosted"].FastWithin = FastWithin
    module = Within()
    parametrize.register_parametrization(module.decoder, "weight", Doubled())
    original = module.decoder.parametrizations.weight.original
    assert type(accelerate(module)) is FastWithin
    assert original.is_contiguous()
    assert type(deaccelerate(module)) is Within
    module = accelerate(Within())
    assert module.state_dict()["decoder.weight"].is_contiguous()
    assert not module.decoder.state_dict()["weight"].is_contiguous()
    parametrize.register_parametrization(module.decoder, "weight", Doubled())
    assert type(deaccelerate(module)) is Within
    flat = Coder()
    flat.W_enc = nn.Parameter(torch.zeros(3))
    assert type(deaccelerate(accelerate(flat))) is Coder


def test_a_subclass_of_a_fast_class_is_left_as_it_is(host):
    class Mine(FastCoder):
        def forward(self, x):
            return 2 * super().forward(x)

    coder = Mine()
    assert accelerate(coder) is coder
    assert type(deaccelerate(coder)) is Mine
    assert coder.W_enc.T.is_contiguous()


def test_an_untested_version_warns_once(host, monkeypatch):
    monkeypatch.setattr(integrations, "_warned", set())
    monkeypatch.setitem(integrations._HOSTS, "hosted", integrations._Host("torch", "0.1", "Coder"))
    with pytest.warns(UserWarning, match=r"torch is .*; accelerate is tested with 0\.1"):
        accelerate(Coder())
    accelerate(Coder())


def test_a_host_off_the_index_warns_too(host, monkeypatch):
    monkeypatch.setattr(integrations, "_warned", set())
    monkeypatch.setitem(integrations._HOSTS, "hosted", integrations._Host("aksae-no-such-package", "0.1", "Coder"))
    with pytest.warns(UserWarning, match="unknown version"):
        accelerate(Coder())


def test_no_host_is_imported_unasked():
    said = run_python(
        "import sys, torch, aksae_kernels.integrations as i\n"
        "try: i.accelerate(torch.nn.Linear(2, 2))\n"
        "except TypeError: pass\n"
        "print(sorted(name for name in i._HOSTS if name in sys.modules))"
    )
    assert said.splitlines()[-1] == "[]"


@imports_torch_jit
def test_a_refusal_says_what_to_accelerate(host):
    coder = Coder()
    nested = nn.Sequential(nn.ReLU(), nn.ModuleDict({"sae": coder}))
    expected = {
        Coder: r"the class hosted\.coder\.Coder itself: accelerate an instance",
        "sae/cfg.json": r"'sae/cfg\.json': load what it names",
        Path("sae"): r"Path\('sae'\): load what it names",
        (coder,): r"a tuple: accelerate each of its elements",
        nn.ModuleList([coder]): r"a ModuleList: accelerate each of its elements",
        nn.ModuleDict({"sae": coder}): r"a ModuleDict: accelerate each value",
        nested: r"a torch\.nn\.modules\.container\.Sequential: accelerate\(obj\.get_submodule\('1\.sae'\)\)",
        torch.compile(coder): r"OptimizedModule: accelerate\(obj\._orig_mod\), best before it is wrapped",
        nn.DataParallel(coder): r"DataParallel: accelerate\(obj\.module\), best before",
        torch.optim.swa_utils.AveragedModel(coder): r"AveragedModel: accelerate\(obj\.module\), best before",
        nn.DataParallel(accelerate(Coder())): r"DataParallel, in which obj\.module is accelerated already",
        Unknown(): r"Unknown, a subclass of hosted\.coder\.Coder: what it overrides would be lost",
    }
    for obj, message in expected.items():
        with pytest.raises(TypeError, match=rf"got .*{message}.*; there are .*sae_lens"):
            accelerate(obj)
    for obj, message in (
        ([coder], "a list: accelerate each of its elements"),
        ({"sae": coder}, "a dict: accelerate each value"),
        (coder.state_dict(), r"a OrderedDict of tensors: load them into an object of their host"),
    ):
        with pytest.raises(TypeError, match=rf"got .*{message}.*; there are .*sae_lens"):
            accelerate(obj)
    assert type(coder) is Coder


@pytest.mark.parametrize("assign", [False, True])
def test_what_is_loaded_is_laid_out(host, assign):
    coder = accelerate(Coder())
    coder.load_state_dict({"W_enc": torch.ones(3, 4)}, assign=assign)
    assert coder.W_enc.T.is_contiguous()
    assert (coder.W_enc == 1).all()


# -------------------------------------------------------------------------------- wrappers that remember parameters

STEPS = 3


def data(rank: int, step: int) -> Tensor:
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(10 * rank + step))


def train_steps(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, *steps: int) -> None:
    for step in range(*steps):
        optimizer.zero_grad()
        (model(data(rank, step)).square().sum() / 100).backward()
        optimizer.step()


def trained_alone(world: int) -> Tensor:
    """The weight after all steps, of the mean loss of all ranks."""
    coder = Coder()
    optimizer = torch.optim.SGD(coder.parameters(), lr=0.1, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        (sum(coder(data(rank, step)).square().sum() / 100 for rank in range(world)) / world).backward()
        optimizer.step()
    return coder.W_enc.detach()


def whole_weight(model: nn.Module) -> Tensor:
    """Of a model that may be sharded."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model):
            return model.module.W_enc.detach().clone()
    weight = inner(model).W_enc.detach()
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def inner(model: nn.Module) -> nn.Module:
    return getattr(model, "module", model)


def sharded(coder: nn.Module) -> nn.Module:
    return fully_shard(coder, mesh=init_device_mesh("cpu", (distributed.get_world_size(),)))


def wrapped_by_fsdp(coder: nn.Module, use_orig_params: bool) -> nn.Module:
    with warnings.catch_warnings():
        # That there is nothing to shard among one process.
        warnings.filterwarnings("ignore", "FSDP is switching to use `NO_SHARD`")
        return FullyShardedDataParallel(coder, device_id=torch.device("cpu"), use_orig_params=use_orig_params)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ddp": DistributedDataParallel,
    "ddp-views": lambda coder: DistributedDataParallel(coder, gradient_as_bucket_view=True),
    "ddp-static": lambda coder: DistributedDataParallel(coder, static_graph=True),
    # Its buckets are never made again.
    "ddp-unused": lambda coder: DistributedDataParallel(coder, find_unused_parameters=True),
    "fsdp": lambda coder: wrapped_by_fsdp(coder, use_orig_params=False),
    "fsdp-original": lambda coder: wrapped_by_fsdp(coder, use_orig_params=True),
    "fully_shard": sharded,
}


def check_wrapped_first(wrap: str, rank: int, world: int, steps_before: int) -> None:
    """Accelerated after it was wrapped, perhaps in the middle of a training; and back."""
    model = WRAPPERS[wrap](Coder())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train_steps(model, optimizer, rank, steps_before)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        accelerate(inner(model))
    assert isinstance(inner(model), FastCoder)
    assert ["W_enc keeps its layout" in str(warning.message) for warning in warned] == [True] * wrap.startswith("ddp")
    train_steps(model, optimizer, rank, steps_before, STEPS - 1)
    deaccelerate(inner(model))
    assert not isinstance(inner(model), FastCoder)
    train_steps(model, optimizer, rank, STEPS - 1, STEPS)
    torch.testing.assert_close(whole_weight(model), trained_alone(world))


def check_accelerated_first(wrap: str, rank: int, world: int) -> None:
    """And taken back while it is wrapped."""
    if wrap == "fully_shard":
        # In the words of torch, which the docstring of `accelerate` quotes.
        with pytest.raises(NotImplementedError, match="non-contiguous parameters"):
            sharded(accelerate(Coder()))
        return
    model = WRAPPERS[wrap](accelerate(Coder()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train_steps(model, optimizer, rank, 2)
    deaccelerate(inner(model))
    assert type(inner(model)) is Coder
    train_steps(model, optimizer, rank, 2, STEPS)
    torch.testing.assert_close(whole_weight(model), trained_alone(world))


# Whether it keeps parameters as views into its buckets, and whether the coder was accelerated before. Not both: with
# views it lays parameters out as it likes, of which DistributedDataParallel knows nothing if it came between.
ZERO_REDUNDANCY = [(False, True), (False, False), (True, False)]


def check_zero_redundancy(rank: int, world: int, as_views: bool, first: bool) -> None:
    """Of an optimizer that keeps parameters in buckets, and updates some on each rank."""
    coder = accelerate(Coder()) if first else Coder()
    model = DistributedDataParallel(coder)
    options = {"lr": 0.1, "momentum": 0.9, "parameters_as_bucket_view": as_views}
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, **options)
    if not first:
        with pytest.warns(UserWarning, match="W_enc keeps its layout"):
            accelerate(coder)
    train_steps(model, optimizer, rank, STEPS)
    torch.testing.assert_close(whole_weight(model), trained_alone(world))


def check_all(rank: int, world: int, folder: str) -> None:
    """Of one process among several."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    with pytest.MonkeyPatch.context() as patch:
        install_host(patch)
        for wrap in WRAPPERS:
            check_accelerated_first(wrap, rank, world)
            check_wrapped_first(wrap, rank, world, steps_before=1)
        for as_views, first in ZERO_REDUNDANCY:
            check_zero_redundancy(rank, world, as_views, first)
    distributed.destroy_process_group()


@pytest.fixture
def process_group() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


# With one process nothing is sharded, and torch then takes gradients of original parameters for row-major ones.
@pytest.mark.parametrize("wrap", [wrap for wrap in WRAPPERS if wrap != "fsdp-original"])
def test_accelerated_then_wrapped(wrap, host, process_group):
    check_accelerated_first(wrap, rank=0, world=1)


@pytest.mark.parametrize("steps_before", [0, 1], ids=["at-once", "later"])
@pytest.mark.parametrize("wrap", WRAPPERS)
def test_wrapped_then_accelerated(wrap, steps_before, host, process_group):
    """DistributedDataParallel would scramble gradients by the strides that its buckets were made with."""
    check_wrapped_first(wrap, rank=0, world=1, steps_before=steps_before)


@pytest.mark.parametrize(("as_views", "first"), ZERO_REDUNDANCY)
def test_among_the_parameters_of_a_zero_redundancy_optimizer(as_views, first, host, process_group):
    check_zero_redundancy(0, 1, as_views, first)


def test_wrappers_among_two_processes():
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(check_all, (2, folder), nprocs=2)


def test_a_sharded_class_is_fsdps_and_ours(host, process_group):
    model = accelerate(sharded(Coder()))
    assert type(model).__name__ == "FSDPFastCoder"
    assert isinstance(model, FSDPModule)
    assert type(accelerate(sharded(Coder()))) is type(model)
    assert accelerate(model) is model
    model.load_state_dict(model.state_dict())
    assert type(deaccelerate(model)).__name__ == "FSDPCoder"


def test_what_is_loaded_into_a_held_weight_leaves_its_layout(host, process_group):
    model = DistributedDataParallel(Coder())
    with pytest.warns(UserWarning, match="DistributedDataParallel has made buckets .* accelerate before wrapping"):
        accelerate(model.module)
    model.module.load_state_dict({"W_enc": torch.ones(3, 4)})
    assert model.module.W_enc.is_contiguous()
    assert (model.module.W_enc == 1).all()


def test_a_wrapper_of_something_else_holds_nothing(host, process_group):
    other = DistributedDataParallel(Coder())
    coder = accelerate(Coder())
    assert coder.W_enc.T.is_contiguous()
    assert other.module.W_enc.is_contiguous()


def test_a_part_of_a_larger_buffer_stays_one(host):
    """Whoever owns the buffer updates its parts by it."""
    flat = torch.arange(20.0)
    coder = Coder()
    coder.W_enc.data = flat[:12].view(3, 4)
    accelerate(coder)
    flat.mul_(2)
    assert torch.equal(coder(torch.eye(3)), flat[:12].view(3, 4))


@pytest.mark.parametrize("first", [True, False], ids=["accelerated-first", "wrapped-first"])
def test_moving_averages(first, host):
    """Of `torch.optim.swa_utils`: the copy may be older than the layout, or of it."""
    coder = accelerate(Coder()) if first else Coder()
    average = torch.optim.swa_utils.AveragedModel(coder, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    accelerate(coder)
    average.update_parameters(coder)
    coder.W_enc.data.mul_(3)
    average.update_parameters(coder)
    torch.testing.assert_close(average.module.W_enc, 2 * Coder().W_enc)
    torch.testing.assert_close(average(torch.eye(3)), 2 * Coder().W_enc)


def test_called_with_other_parameters(host):
    coder = accelerate(Coder())
    weight = torch.randn(3, 4, requires_grad=True)
    torch.func.functional_call(coder, {"W_enc": weight}, (torch.eye(3),)).sum().backward()
    assert torch.equal(weight.grad, torch.ones(3, 4))
    assert coder.W_enc.T.is_contiguous()


@imports_torch_jit
@pytest.mark.parametrize("in_place", [True, False], ids=["in-place", "wrapped"])
def test_compiled_then_accelerated(in_place, host):
    """What was traced of the host's method does not run in place of ours."""
    torch._dynamo.reset()
    coder = Coder()
    compiled = coder if in_place else torch.compile(coder, backend="eager")
    if in_place:
        coder.compile(backend="eager")
    expected = compiled(data(0, 0))
    coder.W_enc.data = coder.W_enc.data.clone()
    accelerate(coder)
    assert type(coder) is FastCoder
    torch.testing.assert_close(compiled(data(0, 0)), expected)
    compiled(data(0, 0)).sum().backward()
    torch.testing.assert_close(coder.W_enc.grad, data(0, 0).sum(0).unsqueeze(1).expand(3, 4))
    torch._dynamo.reset()


# --------------------------------------------------------------------------------------------------- weights


def test_a_gradient_follows_its_weight():
    parameter = nn.Parameter(torch.randn(3, 4))
    parameter.grad = torch.randn(3, 4)
    grad = parameter.grad.clone()
    for change in (weights.as_latent_major, weights.as_row_major):
        change(parameter)
        assert parameter.grad.stride() == parameter.stride()
        assert torch.equal(parameter.grad, grad)


CHANGES = [weights.as_latent_major, weights.as_row_major]


@pytest.mark.parametrize("change", CHANGES)
def test_a_weight_laid_out_in_inference_mode_can_be_trained(change):
    parameter = nn.Parameter(torch.randn(4, 3).T if change is weights.as_row_major else torch.randn(3, 4))
    parameter.grad = torch.randn_like(parameter)
    with torch.inference_mode():
        change(parameter)
    assert not parameter.is_inference()
    assert not parameter.grad.is_inference()
    (parameter.sum() * parameter).sum().backward()


@pytest.mark.parametrize("change", CHANGES)
def test_a_weight_of_inference_mode_stays_one(change):
    with torch.inference_mode():
        parameter = nn.Parameter(torch.randn(3, 4))
    change(parameter)
    assert parameter.is_inference()


@pytest.mark.parametrize("change", CHANGES)
def test_a_shared_weight_stays_shared(change):
    parameter = nn.Parameter(torch.randn(4, 3).T if change is weights.as_row_major else torch.randn(3, 4))
    parameter.grad = torch.randn_like(parameter)
    change(parameter)
    assert not parameter.is_shared()
    parameter = nn.Parameter(torch.randn(4, 3).T if change is weights.as_row_major else torch.randn(3, 4))
    parameter.grad = torch.randn_like(parameter)
    parameter.data.share_memory_()
    parameter.grad.share_memory_()
    change(parameter)
    assert parameter.is_shared()
    assert parameter.grad.is_shared()


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_no_parameter_is_left_alone_without_a_warning(change):
    """As a parametrised weight is, and one within FSDP."""
    weight = torch.randn(4, 3, requires_grad=True).T * 2
    stride = weight.stride()
    change(weight)
    assert weight.stride() == stride


@pytest.mark.parametrize("shape", [(300, 7), (5, 70000), (0, 4), (3, 0)], ids=str)
def test_project_and_normalize_rows(shape):
    torch.manual_seed(0)
    W, grad = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    unit = W / (W.norm(dim=1, keepdim=True) + 0.1)
    for eps, direction in ((None, W), (0.1, unit)):
        projected = grad.clone()
        weights.project_rows_(projected, W, norm_eps=eps)
        torch.testing.assert_close(projected, grad - (grad * direction).sum(1, keepdim=True) * direction)
    weights.normalize_rows_(W, 0.1)
    torch.testing.assert_close(W, unit)


# ---------------------------------------------------------------------------------------------------- codes


def problem(rows=(6,), d_in=5, d_sae=40):
    generator = torch.Generator().manual_seed(0)
    x, W, b = (
        torch.randn(*shape, dtype=torch.float64, generator=generator)
        for shape in ((*rows, d_in), (d_sae, d_in), (d_sae,))
    )
    return x.requires_grad_(), W.requires_grad_(), b.requires_grad_()


def dense_gradients(kept, operands, upstream):
    x, W, b = operands
    return torch.autograd.grad(((x @ W.T + b) * kept * upstream).sum(), operands)


def assert_gradients(codes, kept, operands):
    d_sae = kept.shape[-1]
    upstream = torch.randn(kept.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad((codes.to_dense(d_sae) * upstream).sum(), operands)
    for a, b in zip(ours, dense_gradients(kept, operands, upstream), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("rows", [(6,), (2, 3), ()], ids=str)
def test_topk_by_scaled_scores(rows):
    operands = x, W, b = problem(rows)
    scale = torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) + 0.1
    codes = sparse.topk(x, W, b, 7, scale)
    scores = x @ W.T + b
    kept = torch.zeros_like(scores).scatter(-1, (scores * scale).topk(7).indices, 1) * (scores > 0)
    torch.testing.assert_close(codes.to_dense(40), scores * kept)
    assert_gradients(codes, kept, operands)


@pytest.mark.parametrize("rows", [(6,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_batch_topk(rows, scaled):
    operands = x, W, b = problem(rows)
    scale = torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) + 0.1 if scaled else None
    scores = x @ W.T + b
    ranked = (scores if scale is None else scores * scale).relu().flatten()
    budget = min(25, ranked.numel())
    kept = torch.zeros_like(ranked).scatter(0, ranked.topk(budget).indices, 1).view(scores.shape) * (scores > 0)
    codes = sparse.batch_topk(x, W, b, budget, scale)
    torch.testing.assert_close(codes.to_dense(40), scores * kept)
    if kept.numel():
        assert codes.indices.shape[-1] == kept.sum(-1).max()
        assert_gradients(codes, kept, operands)


def test_batch_topk_of_a_batch_that_is_one_row():
    x, W, b = problem((50,))
    x = torch.where(torch.arange(50).unsqueeze(1) == 3, 1e3 * x.detach(), 0)
    codes = sparse.batch_topk(x, W, 0 * b, 30)
    assert codes.counts[3] == (x[3] @ W.T > 0).sum().clamp(max=30)
    assert codes.counts.sum() == codes.counts[3]


@pytest.mark.parametrize("rows", [(6,), (2, 3), (0,)], ids=str)
def test_above(rows):
    operands = x, W, b = problem(rows)
    threshold = torch.linspace(-1, 3, 40, dtype=torch.float64)
    codes = sparse.above(x, W, b, threshold)
    scores = x @ W.T + b
    kept = (scores > threshold) & (scores > 0)
    torch.testing.assert_close(codes.to_dense(40), scores * kept)
    if kept.numel():
        assert_gradients(codes, kept.double(), operands)


@pytest.mark.parametrize("learning", [False, True], ids=["inference", "learning"])
@pytest.mark.parametrize("threshold", [4.0, 0.0, torch.nan, -torch.inf], ids=str)
def test_above_where_few_are(threshold, learning):
    """Whether a row has more latents than are looked for at first, or none has."""
    operands = x, W, b = problem(d_sae=400)
    thresholds = torch.full((400,), 4.0, dtype=torch.float64)
    thresholds[:40] = threshold
    scores = x @ W.T + b
    kept = (scores > thresholds) & (scores > 0)
    with torch.set_grad_enabled(learning):
        codes = sparse.above(x, W, b, thresholds)
    torch.testing.assert_close(codes.to_dense(400), scores * kept)
    assert codes.indices.shape[-1] == kept.sum(-1).max()
    if learning:
        assert_gradients(codes, kept.double(), operands)


@pytest.mark.parametrize("threshold", [0.5, 6.0])
def test_above_takes_one_threshold_for_all(threshold):
    x, W, b = problem(d_sae=400)
    scores = x @ W.T + b
    codes = sparse.above(x, W, b, torch.tensor(threshold, dtype=torch.float64))
    torch.testing.assert_close(codes.to_dense(400), scores * (scores > threshold))


@pytest.mark.parametrize("lead", [(5,), (2, 3), ()], ids=str)
def test_active_codes(lead):
    acts = random_codes(lead, 4, 200, dtype=torch.float64).to_dense(200).abs()
    codes = sparse.active_codes(acts)
    assert torch.equal(codes.to_dense(200), acts)
    assert codes.indices.shape[-1] == (acts > 0).sum(-1).max()


@pytest.mark.parametrize("value", [-1.0, torch.nan, -torch.inf])
def test_active_codes_refuses_what_codes_do_not_hold(value):
    acts = torch.zeros(5, 200)
    assert sparse.active_codes(acts) is not None
    acts[3, 7] = value
    assert sparse.active_codes(acts) is None


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_active_codes_refuses_what_has_a_tangent():
    acts = torch.zeros(4, 160)
    acts[:, 3] = 1
    with torch.autograd.forward_ad.dual_level():
        assert sparse.active_codes(torch.autograd.forward_ad.make_dual(acts, torch.ones_like(acts))) is None
    assert sparse.active_codes(acts) is not None


def test_active_codes_refuses_many_and_what_learns():
    acts = torch.zeros(5, 200)
    acts[3, :100] = 1
    assert sparse.active_codes(acts) is None
    learning = torch.zeros(5, 200, requires_grad=True)
    assert sparse.active_codes(learning) is None
    with torch.no_grad():
        assert sparse.active_codes(learning) is not None


def test_above_keeps_nan():
    x, W, b = problem()
    x = x.detach().clone()
    x[2] = torch.nan
    codes = sparse.above(x, W, b, torch.full((), 100.0, dtype=torch.float64))
    assert codes.counts.tolist() == [0, 0, 40, 0, 0, 0]


def test_padded_never_names_a_latent_that_did_not_fire():
    indices = torch.tensor([[-1, -1, -1], [4, 9, -1], [2, 5, 7]], dtype=torch.int32)
    counts = torch.tensor([0, 2, 3], dtype=torch.int32)
    acts, latents = sparse.padded(SparseCodes(torch.full((3, 3), 2.0), indices, counts))
    assert latents.tolist() == [[4, 4, 4], [4, 9, 4], [2, 5, 7]]
    assert latents.dtype == torch.int64
    assert acts.tolist() == [[0, 0, 0], [2, 2, 0], [2, 2, 2]]


# -------------------------------------------------------------------------------------------------- optimizer


def optimizer_of(parameters, cls=torch.optim.Adam, **options):
    optimizer = cls(parameters, lr=1e-2, **options)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def train(parameters, optimizer, scheduler, *steps):
    for step in range(*steps):
        for i, parameter in enumerate(parameters):
            parameter.grad = torch.empty_like(parameter).copy_(torch.sin(parameter.detach() * (i + 2) + step))
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"betas": (0.0, 0.99), "eps": 1e-5}, {"weight_decay": 0.1}, {"amsgrad": True}], ids=str
)
def test_the_optimizer_is_adam(dtype, options):
    torch.manual_seed(0)
    theirs = [torch.randn(shape).to(dtype).requires_grad_() for shape in ((4, 5), (3,), ())]
    mine = copy.deepcopy(theirs)
    mine[0].data = mine[0].data.T.contiguous().T
    slow, fast = optimizer_of(theirs, **options), optimizer_of(mine, **options)
    speed_up(fast[0])
    assert type(fast[0]) is FastAdam
    train(theirs, *slow, 5)
    train(mine, *fast, 5)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)
    states = fast[0].state_dict()["state"], slow[0].state_dict()["state"]
    for a, b in zip(*(state.values() for state in states), strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            torch.testing.assert_close(value, b[name])


def test_the_optimizer_changes_sides_in_the_middle():
    torch.manual_seed(0)
    theirs = [torch.randn(4, 5, requires_grad=True)]
    mine = copy.deepcopy(theirs)
    slow, (fast, scheduler) = optimizer_of(theirs), optimizer_of(mine)
    train(theirs, *slow, 6)
    train(mine, fast, scheduler, 0, 2)
    weights.as_latent_major(mine[0])
    speed_up(fast)
    assert fast.state[mine[0]]["exp_avg"].stride() == mine[0].stride()
    train(mine, fast, scheduler, 2, 4)
    weights.as_row_major(mine[0])
    slow_down(fast)
    assert type(fast) is torch.optim.Adam
    assert fast.state[mine[0]]["exp_avg"].is_contiguous()
    train(mine, fast, scheduler, 4, 6)
    torch.testing.assert_close(mine[0], theirs[0])


def test_the_optimizer_goes_on_from_a_file():
    """What is loaded has the layout of the file."""
    torch.manual_seed(0)
    theirs = [torch.randn(4, 5, requires_grad=True)]
    mine = copy.deepcopy(theirs)
    weights.as_latent_major(mine[0])
    slow, (fast, scheduler) = optimizer_of(theirs), optimizer_of(mine)
    train(theirs, *slow, 2)
    mine[0].data.copy_(theirs[0])
    speed_up(fast)
    fast.load_state_dict(copy.deepcopy(slow[0].state_dict()))
    scheduler.load_state_dict(slow[1].state_dict())
    assert fast.state[mine[0]]["exp_avg"].is_contiguous()
    for parameters, optimizer in ((theirs, slow), (mine, (fast, scheduler))):
        train(parameters, *optimizer, 2, 4)
    assert fast.state[mine[0]]["exp_avg"].stride() == mine[0].stride()
    torch.testing.assert_close(mine[0], theirs[0])


FUSED = [(torch.optim.Adam, {}), (torch.optim.AdamW, {}), (torch.optim.SGD, {"momentum": 0.9})]


@pytest.mark.parametrize(("cls", "options"), FUSED, ids=lambda value: getattr(value, "__name__", ""))
def test_a_fused_optimizer_changes_sides_in_the_middle(cls, options):
    """torch's go through weights and moments by their order in memory."""
    torch.manual_seed(0)
    theirs = [torch.randn(4, 5, requires_grad=True)]
    mine = copy.deepcopy(theirs)
    slow, (fast, scheduler) = (optimizer_of(parameters, cls, fused=True, **options) for parameters in (theirs, mine))
    train(theirs, *slow, 8)
    train(mine, fast, scheduler, 0, 2)
    saved = copy.deepcopy(fast.state_dict())
    weights.as_latent_major(mine[0])
    speed_up(fast)
    speed_up(fast)
    assert type(fast) is cls
    fast.load_state_dict(saved)
    train(mine, fast, scheduler, 2, 5)
    weights.as_row_major(mine[0])
    slow_down(fast)
    assert not fast._optimizer_step_pre_hooks
    train(mine, fast, scheduler, 5, 8)
    torch.testing.assert_close(mine[0], theirs[0])


@pytest.mark.parametrize(("cls", "options"), FUSED, ids=lambda value: getattr(value, "__name__", ""))
def test_a_fused_optimizer_of_ones_own(cls, options, host):
    """Made before the layout changes, or loading moments that were: nobody tells us of either."""
    theirs, mine = Coder(), Coder()
    slow, (fast, scheduler) = (optimizer_of(coder.parameters(), cls, fused=True, **options) for coder in (theirs, mine))
    train(list(theirs.parameters()), *slow, 8)
    train(list(mine.parameters()), fast, scheduler, 0, 2)
    accelerate(mine)
    train(list(mine.parameters()), fast, scheduler, 2, 4)
    saved = copy.deepcopy(fast.state_dict())
    for state in saved["state"].values():
        state.update((name, value.contiguous()) for name, value in state.items() if isinstance(value, Tensor))
    fast, _ = optimizer_of(mine.parameters(), cls, fused=True, **options)
    scheduler.optimizer = fast
    fast.load_state_dict(saved)
    train(list(mine.parameters()), fast, scheduler, 4, 6)
    deaccelerate(mine)
    train(list(mine.parameters()), fast, scheduler, 6, 8)
    torch.testing.assert_close(mine.W_enc, theirs.W_enc)


@imports_torch_jit
def test_a_step_of_others_is_compiled_as_before():
    """The hook that lays out fused moments is traced, and does nothing."""
    torch._dynamo.reset()
    parameter = torch.ones(3, 4, requires_grad=True)
    parameter.grad = torch.ones(3, 4)
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    torch.compile(optimizer.step, backend="eager")()
    assert torch.equal(parameter.detach(), torch.full((3, 4), 0.5))
    torch._dynamo.reset()


def test_a_fast_optimizer_that_loads_a_fused_one():
    """Options come with the state."""
    torch.manual_seed(0)
    theirs = [torch.randn(4, 5, requires_grad=True)]
    mine = copy.deepcopy(theirs)
    slow, (fast, scheduler) = optimizer_of(theirs, fused=True), optimizer_of(mine)
    train(theirs, *slow, 2)
    mine[0].data.copy_(theirs[0])
    weights.as_latent_major(mine[0])
    speed_up(fast)
    fast.load_state_dict(copy.deepcopy(slow[0].state_dict()))
    scheduler.load_state_dict(slow[1].state_dict())
    train(theirs, *slow, 2, 4)
    train(mine, fast, scheduler, 2, 4)
    torch.testing.assert_close(mine[0], theirs[0])


@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=str)
def test_the_optimizer_under_a_gradient_scaler(options):
    """It skips a step with infinite gradients; a fused optimizer unscales them itself."""
    torch.manual_seed(0)
    theirs = [torch.randn(4, 5, requires_grad=True)]
    mine = copy.deepcopy(theirs)
    slow, fast = (torch.optim.Adam(parameters, lr=0.1, **options) for parameters in (theirs, mine))
    speed_up(fast)
    for parameters, optimizer in ((theirs, slow), (mine, fast)):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for factor in (1.0, torch.inf, 1.0):
            optimizer.zero_grad()
            scaler.scale(parameters[0].square().sum() * factor).backward()
            scaler.step(optimizer)
            scaler.update()
    assert mine[0].isfinite().all()
    torch.testing.assert_close(mine[0], theirs[0])


def test_a_step_of_a_scaler_is_left_to_torch():
    """By what a scaler sets: torch's Adam that is not fused will not have it."""
    parameter = torch.ones(3, requires_grad=True)
    parameter.grad = torch.ones(3)
    optimizer = torch.optim.Adam([parameter])
    speed_up(optimizer)
    optimizer.grad_scale = optimizer.found_inf = torch.ones(())
    with pytest.raises(AssertionError):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_closure_makes_the_gradients(dtype):
    theirs = torch.linspace(-1, 1, 5).to(dtype).requires_grad_()
    mine = theirs.detach().clone().requires_grad_()
    slow, fast = torch.optim.Adam([theirs], lr=0.1), torch.optim.Adam([mine], lr=0.1)
    speed_up(fast)
    for parameter, optimizer in ((theirs, slow), (mine, fast)):

        def closure(parameter=parameter, optimizer=optimizer):
            optimizer.zero_grad()
            loss = parameter.square().sum()
            loss.backward()
            return loss

        losses = [optimizer.step(closure).item() for _ in range(3)]
        assert losses == sorted(losses, reverse=True)
    torch.testing.assert_close(mine, theirs)


def test_a_closure_that_makes_sparse_gradients():
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = torch.optim.Adam(embedding.parameters())
    speed_up(optimizer)
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step(lambda: embedding(torch.tensor([1])).sum().backward())


@pytest.mark.parametrize("weight_decay", [0, 0.1], ids=["ours", "torch's"])
@pytest.mark.parametrize("make", ["sped up", "constructed"])
def test_hooks_of_a_step_run_once(weight_decay, make):
    parameter = torch.ones(3, requires_grad=True)
    parameter.grad = torch.ones(3)
    cls = FastAdam if make == "constructed" else torch.optim.Adam
    optimizer = cls([parameter], weight_decay=weight_decay)
    speed_up(optimizer)
    ran = []
    optimizer.register_step_pre_hook(lambda *_: ran.append("before"))
    optimizer.register_step_post_hook(lambda *_: ran.append("after"))
    optimizer.step()
    slow_down(optimizer)
    optimizer.step()
    assert ran == ["before", "after"] * 2


def test_a_step_left_to_torch_before_any_adam_was_made():
    """Only the first instance has torch wrap the method for hooks."""
    said = run_python(
        "import torch\n"
        "from aksae_kernels.integrations.adam import FastAdam, slow_down\n"
        "parameter = torch.ones(3, requires_grad=True)\n"
        "parameter.grad = torch.ones(3)\n"
        "optimizer, ran = FastAdam([parameter], lr=0.5, weight_decay=0.1), []\n"
        "assert not hasattr(torch.optim.Adam.step, 'hooked')\n"
        "optimizer.register_step_pre_hook(lambda *_: ran.append(1))\n"
        "optimizer.step()\n"
        "slow_down(optimizer)\n"
        "optimizer.step()\n"
        "print(ran, [round(value, 3) for value in parameter.tolist()])"
    )
    assert said.splitlines()[-1] == "[1, 1] [0.001, 0.001, 0.001]"


def test_other_optimizers_are_left_alone():
    for cls in (torch.optim.AdamW, torch.optim.SGD):
        optimizer, _ = optimizer_of([torch.zeros(2, requires_grad=True)], cls)
        step = optimizer.step
        speed_up(optimizer)
        slow_down(optimizer)
        assert type(optimizer) is cls
        assert optimizer.step is step


def test_selections_agree_with_the_encode():
    operands = problem()
    ours = sparse.topk(*operands, 5, torch.ones(40).double())
    for a, b in zip(ours, topk_encode(*operands, k=5), strict=True):
        torch.testing.assert_close(a, b)
