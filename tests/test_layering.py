"""The architecture: who may import whom, which names are public, and that importing the package is cheap."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import aksae_kernels

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "aksae_kernels"
TRAINING = ROOT / "python" / "aksae"
CSRC = ROOT / "csrc"

PUBLIC = {
    "SparseCodes",
    "available_backends",
    "batch_topk_encode",
    "batch_topk_select",
    "decode_mse",
    "encode_at",
    "explain",
    "frozen",
    "price_for",
    "price_select",
    "sparse_decode",
    "sparse_encode",
    "sparse_value_grad",
    "sparse_weight_grad",
    "threshold_encode",
    "threshold_select",
    "topk_encode",
    "topk_select",
    "use_backend",
}
# What a module of aksae_kernels may import from the package, and beyond torch and the standard library.
SIBLINGS = {
    "__init__": {"codes", "dispatch", "kept", "ops", "pricing"},
    "_arguments": {"codes"},
    "codes": set(),
    "double_double": set(),
    "ordering": set(),
    "dispatch": set(),
    "kept": set(),
    "operands": {"codes", "ordering"},
    "reference": {"codes", "operands", "ordering"},
    "testing": {"codes", "double_double", "ordering"},
    "ops": {"_arguments", "reference", "dispatch", "codes"},
    "layers": {"codes", "ops"},
    "optim": {"codes", "ops"},
    "pricing": {"codes", "ops"},
    "backends": {"dispatch", "codes", "kept", "operands"},
    "integrations": {"", "layers", "optim", "pricing"},
}
THIRD_PARTY = {"backends": {"triton"}}
# Modules of integrations named after the package they import; they are imported only for an object of that package.
HOSTS = {"dictionary_learning", "llamascopium", "overcomplete", "sae_lens", "sparsify"}
# What aksae may import of aksae_kernels.
OPEN_TO_TRAINING = {"aksae_kernels", "aksae_kernels.layers", "aksae_kernels.optim", "aksae_kernels.pricing"}


def sources(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def identity(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path, *, top_level: bool = False) -> Iterator[str]:
    """Full names of imported modules; `from a import b` gives `a.b`. With `top_level`, only those run by an import."""
    package = list(path.relative_to(ROOT).with_suffix("").parts[:-1])
    nodes = [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, node.module] if node.module else base
            yield from (".".join([*base, alias.name]) for alias in node.names)
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        if not (top_level and (lazy or typing_only)):
            nodes += ast.iter_child_nodes(node)


def kernel_modules() -> list[Path]:
    return sources(KERNELS)


def unit(path: Path) -> str:
    """The entry of SIBLINGS that governs a module: its name, or the subpackage it is in."""
    relative = path.relative_to(KERNELS)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


@pytest.mark.parametrize("path", kernel_modules(), ids=identity)
def test_imports_within_the_kernel_library(path):
    assert unit(path) in SIBLINGS, f"say in SIBLINGS what {identity(path)} may import"
    for name in imports(path):
        if not name.startswith("aksae_kernels"):
            continue
        inner = name.split(".")[1:]
        if unit(path) == "integrations" and inner[:1] == ["integrations"]:
            assert inner[1] not in HOSTS, f"{identity(path)} imports {name} of another codebase"
            continue
        if unit(path) == "backends" and inner[:1] == ["backends"]:
            # A subpackage of one backend may import within itself; backends never import each other.
            own = path.relative_to(KERNELS).parts[1:-1]
            assert own, f"{identity(path)} imports {name}"
            assert inner[1] == own[0], f"{identity(path)} imports {name}"
            continue
        module = inner[0] if inner and (KERNELS / f"{inner[0]}.py").exists() else ""
        if unit(path) == "integrations" and not module:
            assert set(inner) <= PUBLIC, f"{identity(path)} imports {name}, which is not public"
        assert module in SIBLINGS[unit(path)], f"{identity(path)} imports {name}"


@pytest.mark.parametrize("path", kernel_modules(), ids=identity)
def test_the_kernel_library_depends_on_torch_alone(path):
    allowed = sys.stdlib_module_names | {"aksae_kernels", "torch"} | THIRD_PARTY.get(unit(path), set())
    if unit(path) == "integrations" and path.stem in HOSTS:
        allowed = allowed | {path.stem}
    for name in imports(path):
        assert name.split(".")[0] in allowed, f"{identity(path)} imports {name}"


@pytest.mark.parametrize("path", sources(TRAINING), ids=identity)
def test_the_training_package_uses_public_names_only(path):
    for name in imports(path):
        if name.split(".")[0] == "aksae_kernels":
            module, _, last = name.rpartition(".")
            is_public = last in {*PUBLIC, "__version__"} if module == "aksae_kernels" else module in OPEN_TO_TRAINING
            assert name in OPEN_TO_TRAINING or is_public, f"{identity(path)} imports {name}"
    tree = ast.parse(path.read_text())
    dotted = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not [name for name in dotted if re.match(r"torch\.ops\b", name)], f"{identity(path)} uses torch.ops"


@pytest.mark.parametrize("path", sources(TRAINING), ids=identity)
def test_hosts_are_imported_by_their_own_module_alone(path):
    inside = path.parent == TRAINING / "hosts"
    found = {name.split(".")[0] for name in imports(path)} & {*HOSTS, "delphi", "sae_bench"}
    if path == TRAINING / "study" / "synthetic.py":
        # It takes its activations and their judge from a host, once they are asked for.
        found -= {"sae_lens"} - {name.split(".")[0] for name in imports(path, top_level=True)}
    # sae_bench.py and latent_cache.py do without their host.
    assert found <= ({path.stem} & HOSTS if inside else set()), identity(path)
    assert inside or not [name for name in imports(path) if ".hosts" in name], identity(path)
    assert path != TRAINING / "hosts" / "__init__.py" or not list(imports(path))


@pytest.mark.parametrize("path", [*kernel_modules(), *sources(TRAINING)], ids=identity)
def test_nothing_imports_tests_or_benchmarks(path):
    assert not {name.split(".")[0] for name in imports(path)} & {"tests", "benchmarks", "conftest"}


@pytest.mark.parametrize("path", kernel_modules(), ids=identity)
def test_only_ops_registers_gradients(path):
    text = path.read_text()
    if path.stem != "ops":
        assert "register_autograd" not in text
        assert "autograd.Function" not in text


# ---------------------------------------------------------------------------------------------------------- C++


def cpp_sources() -> list[Path]:
    return sorted(path for path in CSRC.rglob("*") if path.suffix in {".h", ".cpp", ".cu", ".cuh"})


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", cpp_sources(), ids=identity)
def test_kernels_know_nothing_of_torch(path):
    stable = ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/")
    for name in includes(path):
        if path.name.startswith("bind_"):
            assert not name.startswith(("ATen/", "c10/", "torch/")) or name.startswith(stable), (
                f"{identity(path)} includes {name}"
            )
        else:
            assert not name.startswith(("ATen/", "c10/", "torch/", "Python.h", "pybind11/")), (
                f"{identity(path)} includes {name}"
            )
        if (path.parent / name).exists():
            included = (path.parent / name).resolve()
            near = path.parent.resolve() in included.parents
            assert near or included == CSRC / "kernels.h", f"{identity(path)} includes {name}"


def test_there_is_something_to_check():
    assert len(kernel_modules()) > 5
    assert {path.suffix for path in cpp_sources()} == {".h", ".cpp", ".cu", ".cuh"}
    assert any(path.name.startswith("bind_") for path in cpp_sources())
    names = {name for path in cpp_sources() for name in includes(path)}
    assert any(name.startswith("torch/csrc/stable/") for name in names)
    assert {"torch", "aksae_kernels.codes.SparseCodes"} <= set(imports(KERNELS / "ops.py"))


# ------------------------------------------------------------------------------------------ names and importing


def test_public_names():
    assert set(aksae_kernels.__all__) == PUBLIC
    assert list(aksae_kernels.__all__) == sorted(aksae_kernels.__all__)
    for name in PUBLIC:
        value = getattr(aksae_kernels, name)
        assert value.__doc__, f"{name} has no docstring"
        assert value.__module__.startswith("aksae_kernels."), name


def python(code: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=None, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    return done.stdout.split()


def test_importing_is_lean():
    code = """
import sys, torch
before = set(sys.modules)
import aksae_kernels, aksae_kernels.layers, aksae_kernels.optim
new = set(sys.modules) - before
print(*sorted(name for name in new if name.split(".")[0] not in sys.stdlib_module_names))
assert not torch.cuda.is_initialized()
assert not any(name.split(".")[0] == "triton" for name in sys.modules)
assert not any(name.startswith(("torch.utils.cpp_extension", "torch._dynamo", "torch._inductor")) for name in new)
assert not [path for path in torch.ops.loaded_libraries if "aksae" in path]
"""
    new = python(code)
    assert "aksae_kernels" in new
    assert not [name for name in new if name.split(".")[0] not in ("aksae_kernels", "torch")], new
    unneeded = ("aksae_kernels.backends.", "aksae_kernels.integrations", "aksae_kernels.testing")
    assert not [name for name in new if name.startswith(unneeded)], new


def test_importing_adds_little_to_importing_torch():
    # Counted in what -X importtime measures itself, so that a busy machine slows both sides.
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import torch, aksae_kernels"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    cumulative = {}
    for line in done.stderr.splitlines():
        _, total, name = line.removeprefix("import time:").split("|")
        cumulative[name.strip()] = int(total) if total.strip().isdigit() else 0
    assert cumulative["aksae_kernels"] < cumulative["torch"] / 4
