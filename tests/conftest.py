"""Where a test runs: backend, device and dtype, and memory that does not happen to be zero."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import aksae_kernels
from aksae_kernels.backends import cuda

ALL_DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}
# The C++ backend leaves fp16 to the reference.
DTYPES = {"cpu": ("fp32", "fp64", "bf16"), "triton": ("fp32", "bf16", "fp16"), "cuda": ("fp32", "bf16", "fp16")}

# The CUDA kernels compiled for the host (`tests/test_cuda.py` builds them): with it, the `cuda` backend on CPU tensors
# is all that tests run on.
EMULATED = os.environ.get("AKSAE_CUDA_EMULATION")
if EMULATED:
    cuda._DEVICE, cuda._binary = "cpu", lambda: Path(EMULATED)
    assert cuda.unavailable() is None, cuda.unavailable()
# In the interpreter's process only the Triton backend is tested: the others have theirs.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Rows of odd shapes. The interpreter takes 10 ms a row, and to it more rows are more of the same.
MANY_ROWS = 37 if INTERPRETED else 257
# Threads a result must not depend on; these two do not use torch's.
THREADS = (1,) if INTERPRETED or EMULATED else (1, 2, 3)

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def pytest_configure(config: pytest.Config) -> None:
    if INTERPRETED:
        # NumPy, which the interpreter computes with, warns of every NaN and infinity; tests make them on purpose.
        config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning")
        # Triton 3.6's interpreter takes arrays of one element for numbers, of which NumPy warns until 2.4 refuses it.
        deprecated = "ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"
        config.addinivalue_line("filterwarnings", deprecated)


@dataclass(frozen=True)
class Case:
    """A backend on a device with data of one dtype."""

    backend: str
    device: str
    dtype: torch.dtype

    def randn(self, *shape: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.device, self.dtype)

    @property
    def draws(self) -> int:
        """How many problems `check_errors` judges together: 16-bit results lose far more when rounded at last."""
        few = 4 if INTERPRETED else 8
        return few if self.dtype in (torch.float32, torch.float64) else 1

    def integers(self, *shape: int, seed: int = 0, high: int = 3) -> torch.Tensor:
        """Integers in [-high, high]: sums are exact, so every correct result has the same bits."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(-high, high + 1, shape, generator=generator).to(self.device, self.dtype)


def _cases() -> Iterator:
    if EMULATED:
        for name in DTYPES["cuda"]:
            yield pytest.param(Case("cuda", "cpu", ALL_DTYPES[name]), id=f"cuda-emulated-{name}")
        return
    backends = aksae_kernels.available_backends()
    if INTERPRETED:
        for name in DTYPES["triton"]:
            yield pytest.param(Case("triton", "cpu", ALL_DTYPES[name]), id=f"triton-{name}")
        return
    # Always there in a full installation: where it is missing, its tests are skipped with the reason, not left out.
    for backend in dict.fromkeys(("cpu", "reference", "triton", *backends)):
        missing = pytest.mark.skipif(backend not in backends, reason=f"backend {backend!r} is not available")
        for name in DTYPES.get(backend, ALL_DTYPES):
            if backend in ("cpu", "reference"):
                yield pytest.param(Case(backend, "cpu", ALL_DTYPES[name]), id=f"{backend}-{name}", marks=missing)
            # Without a GPU one skipped case stands for all dtypes.
            if backend != "cpu" and (name == "fp32" or torch.cuda.is_available()):
                marks = (pytest.mark.gpu, no_gpu, missing)
                yield pytest.param(Case(backend, "cuda", ALL_DTYPES[name]), id=f"{backend}-cuda-{name}", marks=marks)


CASES = list(_cases())


def _entered(case: Case) -> Iterator[Case]:
    was = torch.are_deterministic_algorithms_enabled()
    # Deterministic mode fills torch.empty with NaN, so that a slot nobody wrote is seen. On CUDA it refuses ops that
    # the oracles use.
    torch.use_deterministic_algorithms(case.device == "cpu")
    try:
        with aksae_kernels.use_backend(case.backend):
            yield case
    finally:
        torch.use_deterministic_algorithms(was)


# What the contract asks of CPU tensors alone, by test.
CPU_ONLY = {
    "test_index_out_of_range_raises": "such an index is undefined on an accelerator",
    "test_too_few_latents_raise": "such an index is undefined on an accelerator",
    "test_count_out_of_range_raises": "such a count is undefined on an accelerator",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items if EMULATED else ():
        if reason := CPU_ONLY.get(getattr(item, "originalname", "")):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    """Every backend on every device with every dtype it takes; the backend is in force during the test."""
    yield from _entered(request.param)


@pytest.fixture(params=[case for case in CASES if case.id.endswith("fp32")])
def fp32(request: pytest.FixtureRequest) -> Iterator[Case]:
    """Every backend and device, fp32: for what does not depend on the dtype."""
    yield from _entered(request.param)


@pytest.fixture(params=[case for case in CASES if case.id.endswith("fp64")])
def fp64(request: pytest.FixtureRequest) -> Iterator[Case]:
    """Every backend and device that takes fp64: for gradcheck."""
    yield from _entered(request.param)


CPU_TENSORS = ("cpu-fp32", "reference-fp32", "triton-fp32", "cuda-emulated-fp32")


@pytest.fixture(params=[case for case in CASES if case.id in CPU_TENSORS])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend for CPU tensors, and nothing else set up."""
    with aksae_kernels.use_backend(request.param.backend):
        yield request.param.backend


class Largest(TorchDispatchMode):
    """How many elements the largest dense tensor has that torch makes. What a custom op makes within is not seen."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided:
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.fixture
def largest() -> type[Largest]:
    """`with largest() as made:` tells in `made.elements` how large a tensor was made."""
    return Largest


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny random language model of a family, made on demand."""
    folders: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in folders:
            from language_models import save

            folders[family] = tmp_path_factory.mktemp(family)
            save(family, folders[family])
        return folders[family]

    return make


@pytest.fixture(scope="session")
def finished(saved, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a finished run of a tiny SAE, of a kind that `finished_runs` names, made on demand. Not to be
    changed."""
    folders: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in folders:
            from finished_runs import train

            folders[kind] = train(kind, saved("llama"), tmp_path_factory.mktemp(f"run-{kind}"))
        return folders[kind]

    return make


@pytest.fixture
def load(saved, tmp_path: Path) -> Callable:
    """The language model of a family, read after a layer."""

    def loaded(family: str, layer: int = 1, **settings):
        from aksae.activations import LanguageModel
        from aksae.config import ModelConfig

        config = ModelConfig(name=str(saved(family)), layer=layer, device="cpu", **settings)
        return LanguageModel.load(config, tmp_path / "cache")

    return loaded
