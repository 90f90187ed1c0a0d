"""Builds the C++ and CUDA kernels where it can, and says what it decided and why.

The kernels are built against the torch they will run with, so a build that sees none, as an isolated one, ends with one
line that says what to do. Without a C++ compiler the package installs all the same and runs on its PyTorch reference.
The CUDA kernels are built where there are nvcc and a torch made with CUDA, whether or not a GPU is in sight;
AKSAE_SKIP_CUDA_BUILD=1 leaves them out. The reasons are kept in `aksae_kernels/_build_report.json`, from where
`aksae_kernels.explain` tells them.
"""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
REPORT = Path("aksae_kernels") / "_build_report.json"

CPU_SOURCES = (
    "bind_cpu",
    "cpu/dispatch",
    "cpu/bf16_units",
    "cpu/bf16_emulated",
    "cpu/isa_baseline",
    "cpu/isa_avx2",
    "cpu/isa_avx512",
)

CUDA_SOURCES = ("bind_cuda", "cuda/scan", "cuda/select", "cuda/encode", "cuda/sparse", "cuda/adam")
# As TORCH_CUDA_ARCH_LIST has them.
CUDA_ARCHITECTURES = "8.0;9.0a;10.0+PTX"
NVCC_FLAGS = ["-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]


class Build(build):
    """Looks for torch before anything is built, so that what it says is not lost among what was copied."""

    def run(self):
        require_torch()
        super().run()


class BuildKernels(build_ext):
    """Builds what can be built; a failure is reported and kept, and does not stop the installation."""

    def run(self):
        require_torch()
        self.report = {}
        super().run()
        target = ROOT if self.inplace or self.editable_mode else Path(self.build_lib)
        (target / REPORT).parent.mkdir(parents=True, exist_ok=True)
        (target / REPORT).write_text(json.dumps(self.report, indent=2) + "\n")

    def build_extension(self, ext):
        is_cuda = ext.name.endswith("_C_cuda")
        try:
            use_stable_torch(ext)
            if is_cuda:
                use_cuda(ext)
            super().build_extension(ext)
            reason, said = None, "built" + (f" for {self.architectures()}" if is_cuda else "")
        except Exception as error:  # whatever a missing torch, a missing compiler or a compiler may throw
            # The compiler's own words are in the build output; its command line would bury the message.
            # An older binary must not stand in for the one that failed.
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
            reason = f"it could not be built: {textwrap.shorten(str(error), 200)}"
            said = f"left out, the package runs without it: {reason}"
        self.report[ext.name] = reason
        print(f"aksae: {ext.name}: {said}", file=sys.stderr)

    def build_extensions(self):
        compile_all = self.compiler.compile
        self.compiler.src_extensions.append(".cu")

        def compile_one(source, **kwargs):
            if not source.endswith(".cu"):
                return compile_all([source], **kwargs)
            target = Path(kwargs["output_dir"], source).with_suffix(".cu.o")
            target.parent.mkdir(parents=True, exist_ok=True)
            flags = [*NVCC_FLAGS, *gencode(self.architectures())]
            subprocess.run([find_nvcc(), *flags, "-c", source, "-o", str(target)], check=True)
            return [str(target)]

        def compile_side_by_side(sources, **kwargs):
            with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", 0)) or os.cpu_count()) as pool:
                objects = pool.map(lambda source: compile_one(source, **kwargs), sources)
                # Where the linker merges inline functions the first copy wins: let it be one that every machine runs.
                return sorted((path for paths in objects for path in paths), key=lambda path: "avx" in path)

        self.compiler.compile = compile_side_by_side
        super().build_extensions()

    def architectures(self):
        return os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES


def require_torch():
    """End the build with one line where torch cannot be imported: it would leave all kernels out and look well."""
    try:
        importlib.import_module("torch")
    except ImportError as error:
        raise SystemExit(
            f"aksae: the kernels are built against the torch they run with, and none can be imported here ({error}): "
            "install torch first, then run pip install --no-build-isolation"
        ) from None


def use_stable_torch(ext):
    """Compile against the stable ABI of torch 2.11: one binary serves every later torch and Python."""
    from torch.utils.cpp_extension import include_paths, library_paths

    ext.include_dirs += include_paths()
    ext.library_dirs += library_paths()
    ext.libraries += ["torch_cpu", "c10"]
    ext.define_macros += [("TORCH_TARGET_VERSION", "0x020b000000000000"), ("Py_LIMITED_API", "0x030a0000")]


def find_nvcc():
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = home and shutil.which("nvcc", path=str(Path(home, "bin")))
    return found or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def gencode(architectures):
    """nvcc's words for a TORCH_CUDA_ARCH_LIST."""
    flags = []
    for name in re.split(r"[;,\s]+", architectures.strip(";, ")):
        parts = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", name)
        if parts is None:
            raise ValueError(f"TORCH_CUDA_ARCH_LIST must list numbers such as 9.0a or 10.0+PTX, got {name!r}")
        if int(parts[1]) < 8:
            # The kernels need instructions of 8.0; lists that serve older devices too should not cost the newer ones.
            continue
        number = parts[1] + parts[2]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if parts[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        if number == "90a":
            # Plain 9.0 has no wgmma; the host code must know which of the two was built.
            flags.append("-DAKSAE_SM90A")
    return flags


def use_cuda(ext):
    """Check what a CUDA build needs, never a device: wheels are built where there is none."""
    import torch

    if os.environ.get("AKSAE_SKIP_CUDA_BUILD", "0") not in ("", "0"):
        raise RuntimeError("AKSAE_SKIP_CUDA_BUILD is set")
    if torch.version.cuda is None:
        raise RuntimeError(f"torch {torch.__version__} was made without CUDA")
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("there is no nvcc, neither in CUDA_HOME nor on the PATH")
    release = re.search(r"release (\d+)\.", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        raise RuntimeError(f"nvcc is of CUDA {release and release[1]}, torch of {torch.version.cuda}")
    for home in (Path(nvcc).resolve().parent.parent, Path("/usr/local/cuda")):
        ext.library_dirs += [str(home / "lib64"), str(home / "lib")]
    # The stream comes from libtorch_cuda. A runtime of our own fits every torch of the same CUDA.
    ext.libraries += ["torch_cuda", "cudart_static", "dl", "rt", "pthread"]
    ext.define_macros += [("USE_CUDA", None)]


CXX_FLAGS = ["-O3", "-g0", "-std=c++20", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
HEADERS = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*")) if path.suffix in (".h", ".cuh")]

if __name__ == "__main__":
    setup(
        ext_modules=[
            Extension(
                "aksae_kernels._C",
                [f"csrc/{name}.cpp" for name in CPU_SOURCES],
                depends=HEADERS,
                # No -march: the instruction sets are chosen at run time. No -ffast-math: NaN must stay NaN.
                extra_compile_args=[*CXX_FLAGS, "-ffp-contract=fast", "-fno-math-errno"],
                py_limited_api=True,
                optional=True,
                language="c++",
            ),
            Extension(
                "aksae_kernels._C_cuda",
                [f"csrc/{name}.{'cu' if '/' in name else 'cpp'}" for name in CUDA_SOURCES],
                depends=HEADERS,
                extra_compile_args=CXX_FLAGS,
                py_limited_api=True,
                optional=True,
                language="c++",
            ),
        ],
        cmdclass={"build": Build, "build_ext": BuildKernels},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
