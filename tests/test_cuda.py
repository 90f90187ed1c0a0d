"""The CUDA C++ kernels where there is no GPU: they compile for every architecture, within bounds, and pass the tests of
the ops under an emulation of CUDA on the host.

The emulation (`tests/emulation`) compiles the same `.cu` files with g++; the library it makes has the same entry points
and the same binding, so whole files of tests run on it, in a process of their own.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from emulation.build import build

from aksae_kernels.backends import cuda

ROOT = Path(__file__).resolve().parent.parent
SETUP = runpy.run_path(str(ROOT / "setup.py"))
KERNEL_FILES = [name for name in SETUP["CUDA_SOURCES"] if "/" in name]
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")

pytestmark = pytest.mark.slow
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
needs_nvcc = pytest.mark.skipif(SETUP["find_nvcc"]() is None, reason="there is no nvcc")

# ------------------------------------------------------------------------------------------------- under emulation


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("emulation")
    return {major: build(folder, major) for major in (8, 9)}


# By emulated device and file: which of the tests, and how many at least. Of test_screen.py, those that are not about
# the CPU; sm_90a has a product of its own, and else the kernels of sm_80.
OP_TESTS = [
    (8, "select", "", 700),
    (8, "encode", "", 190),
    (8, "capped_encode", "(exact_on_integers and not 257) or infinity or win or rounding or real_numbers", 140),
    (8, "screen", "other_backends", 27),
    (8, "decode", "", 400),
    (8, "optim", "", 70),
    (9, "encode", "exact_on_integers or accurate or infinity or agrees or strides", 90),
    (9, "capped_encode", "win or rounding", 5),
]


def run_on(library: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "AKSAE_CUDA_EMULATION": str(library)},
        capture_output=True,
        text=True,
        timeout=1200,
    )


@needs_compiler
@pytest.mark.parametrize(("major", "name", "which", "at_least"), OP_TESTS, ids=lambda value: str(value)[:8])
def test_the_op_tests_pass_under_emulation(libraries, major, name, which, at_least):
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/test_{name}.py", "-k", which]
    done = run_on(libraries[major], *command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= at_least, done.stdout


# --------------------------------------------------------------------------------------------------- with compilers

MOST_REGISTERS = 128
# One block a multiprocessor: wgmma's sums take 128 of its 168, and a screen's bounds more than there would be for two.
PRODUCTS = {"sm90::product_kernel": 168, "sm80::product_kernel<bf16, Scores<float, true>": 255}


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """Every file of kernels compiled as setup.py does it, with what ptxas said."""
    folder = tmp_path_factory.mktemp("nvcc")
    flags = [*SETUP["NVCC_FLAGS"], *SETUP["gencode"](SETUP["CUDA_ARCHITECTURES"]), "-Werror=all-warnings"]
    started = {}
    for name in KERNEL_FILES:
        target = folder / f"{Path(name).name}.o"
        command = [SETUP["find_nvcc"](), *flags, "-Xptxas=-v", "-c", f"csrc/{name}.cu", "-o", str(target)]
        started[name] = target, subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    compiled = {}
    for name, (target, process) in started.items():
        said = process.communicate()[1]
        assert process.returncode == 0, said
        compiled[name] = target, said
    return compiled


def kernels(said: str) -> list[dict]:
    """What ptxas -v says of each kernel: architecture, name, registers, bytes of spills, stack and shared memory."""
    found = []
    for entry in said.split("Compiling entry function '")[1:]:
        name, arch = re.match(r"(\S+)' for '(\w+)'", entry).groups()
        numbers = {
            key: sum(map(int, re.findall(pattern, entry)))
            for key, pattern in {
                "registers": r"Used (\d+) registers",
                "spills": r"(\d+) bytes spill",
                "stack": r"(\d+) bytes stack frame",
                "shared": r"(\d+) bytes smem",
            }.items()
        }
        found.append({"name": name, "arch": arch, **numbers})
    return found


def readable(names: list[str]) -> list[str]:
    plain = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    for old, new in (("aksae::", ""), ("(anonymous namespace)::", ""), ("__nv_bfloat16", "bf16"), ("__half", "f16")):
        plain = plain.replace(old, new)
    return [re.sub(r"^void |\(.*", "", name) for name in plain.splitlines()]


@needs_nvcc
def test_kernels_compile_within_bounds(objects, capsys):
    found = [kernel for _, said in objects.values() for kernel in kernels(said)]
    assert {kernel["arch"] for kernel in found} == set(ARCHITECTURES)
    for kernel, name in zip(found, readable([kernel["name"] for kernel in found]), strict=True):
        kernel["name"] = name
    with capsys.disabled():
        print("\nregisters / bytes of shared memory; no spills, no stack")
        for name in sorted({kernel["name"] for kernel in found}):
            row = {kernel["arch"]: kernel for kernel in found if kernel["name"] == name}
            print(f"  {name:52}" + "".join(f"{row[a]['registers']:5} /{row[a]['shared']:6}" for a in ARCHITECTURES))
    for kernel in found:
        assert kernel["spills"] == kernel["stack"] == 0, kernel
        most = [most for name, most in PRODUCTS.items() if kernel["name"].startswith(name)]
        assert 0 < kernel["registers"] <= (most or [MOST_REGISTERS])[0], kernel
        # Beside the 32 KB of dynamic memory that need not be asked for.
        assert kernel["shared"] <= 16 << 10, kernel


def host_functions_that_exit(compiled: Path) -> set[str]:
    """Host functions of an object that call `exit`: nvcc's body for a function that is `__device__` alone."""
    command = ["objdump", "--disassemble", "--reloc", "--demangle", str(compiled)]
    found, function = set(), ""
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        if header := re.fullmatch(r"[0-9a-f]+ <(.+)>:", line):
            function = header[1]
        elif re.search(r"\bR_\w+\s+exit\b", line):
            found.add(function)
    return found


@needs_nvcc
def test_host_code_calls_no_device_function(objects):
    """From a template or a lambda it gets no warning, and the process ends without a word. The emulation, in which all
    is host code, cannot see it."""
    assert {name: host_functions_that_exit(target) for name, (target, _) in objects.items()} == {
        name: set() for name in KERNEL_FILES
    }


@needs_nvcc
def test_a_device_function_called_by_host_code_is_found(tmp_path):
    source = tmp_path / "host.cu"
    source.write_text(
        "template <class T> __device__ __forceinline__ T* row_of(T* data, long row) { return data + row; }\n"
        "template <class T> T* chunk_of(T* data) { return row_of(data, 3); }\n"
        "float* host_code(float* data) { return chunk_of(data); }\n"
    )
    compiled = source.with_suffix(".o")
    subprocess.run([SETUP["find_nvcc"](), *SETUP["NVCC_FLAGS"], "-c", source, "-o", compiled], check=True)
    (found,) = host_functions_that_exit(compiled)
    assert found.startswith("host_code(float*)")


@needs_nvcc
def test_encode_has_the_instructions_it_is_made_of(objects):
    triton = pytest.importorskip("triton")
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    for arch, kernel, wanted in (
        ("sm_90a", "sm90", ("HGMMA.64x256x16", "UTMALDG.2D", "USETMAXREG")),
        ("sm_80", "sm80", ("HMMA.16816", "LDSM", "LDGSTS")),
        ("sm_100", "sm80", ("HMMA.16816", "LDSM", "LDGSTS")),
    ):
        command = [str(tools / "cuobjdump"), "-sass", "-arch", arch, str(objects["cuda/encode"][0])]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        functions = [text for text in sass.split("Function : ")[1:] if text.startswith(f"_ZN5aksae4{kernel}14product")]
        # bf16, fp16, and the screen of fp32.
        assert len(functions) == 3, arch
        for text in functions:
            assert all(instruction in text for instruction in wanted), text[:200]
            assert not re.search(r"\b(LDL|STL)\b", text), text[:200]


@needs_nvcc
def test_the_binding_compiles_and_links(objects, tmp_path):
    """Against the stable ABI of the torch that is here; what a CUDA torch has to add is one function."""
    from torch.utils.cpp_extension import include_paths, library_paths

    includes = [flag for path in include_paths() for flag in ("-isystem", path)]
    defined = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA"]
    binding, library = tmp_path / "bind.o", tmp_path / "_C_cuda.so"
    cxx = ["g++", *SETUP["CXX_FLAGS"], "-fPIC", "-Werror"]
    subprocess.run([*cxx, *defined, *includes, "-c", "csrc/bind_cuda.cpp", "-o", binding], cwd=ROOT, check=True)
    home = Path("/usr/local/cuda/lib64")
    libraries = [f"-L{path}" for path in (*library_paths(), home)]
    libraries += ["-ltorch_cpu", "-lc10", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    targets = [target for target, _ in objects.values()]
    unresolved = ["-Wl,--no-undefined", "-Wl,--warn-unresolved-symbols"]
    done = subprocess.run(
        ["g++", "-shared", binding, *targets, *libraries, *unresolved, "-o", library],
        capture_output=True,
        text=True,
        check=True,
    )
    missing = set(re.findall(r"undefined reference to `(\w+)'", done.stderr))
    assert missing == {"aoti_torch_get_current_cuda_stream"}


def test_the_bindings_use_no_macro_that_the_oldest_torch_lacks():
    """TORCH_TARGET_VERSION hides functions of a newer torch from the compiler, but not its macros. Those named here are
    in the headers of torch 2.11."""
    known = {
        "STABLE_TORCH_LIBRARY",
        "STABLE_TORCH_LIBRARY_IMPL",
        "STD_TORCH_CHECK",
        "TORCH_BOX",
        "TORCH_ERROR_CODE_CHECK",
    }
    for source in sorted((ROOT / "csrc").glob("bind_*.cpp")):
        assert set(re.findall(r"\b(?:[A-Z]+_)?TORCH_[A-Z_]+\b", source.read_text())) <= known, source.name


# --------------------------------------------------------------------------------------------------- the backend


def test_the_build_says_what_it_is_for():
    gencode = SETUP["gencode"]
    assert gencode("8.0;9.0a, 10.0+PTX") == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-DAKSAE_SM90A",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]
    assert gencode("7.5 8.6") == ["-gencode=arch=compute_86,code=sm_86"]
    with pytest.raises(ValueError, match="Hopper"):
        gencode("8.0 Hopper")


def test_without_a_device_it_says_why(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    reason = cuda.unavailable()
    assert reason
    for tensor, refused in (
        (torch.ones(2), "cuda tensors, not cpu"),
        (torch.ones(2, dtype=torch.float64, device="meta"), "not meta"),
    ):
        assert refused in cuda.refuse("topk_select", tensor)
    monkeypatch.setattr(cuda, "_DEVICE", "cpu")
    assert "not float64" in cuda.refuse("topk_select", torch.ones(2, dtype=torch.float64))
    assert cuda.refuse("topk_select", torch.ones(2, dtype=torch.float16)) is None


def test_it_refuses_devices_older_than_its_instructions(monkeypatch):
    tensor = SimpleNamespace(device=torch.device("cuda", 1), dtype=torch.float32)
    for capability, refused in (((7, 5), True), ((8, 0), False), ((12, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert (cuda.refuse("topk_select", tensor) is not None) == refused
