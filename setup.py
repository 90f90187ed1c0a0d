"""Builds the C++ kernels where it can, and says what it decided and why.

Without torch or a C++ compiler the package installs all the same and runs on its PyTorch reference. The reason is kept
in `aksae_kernels/_build_report.json`, from where `aksae_kernels.explain` tells it.
"""

import json
import os
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
REPORT = Path("aksae_kernels") / "_build_report.json"

CPU_SOURCES = (
    "bind_cpu",
    "cpu/dispatch",
    "cpu/bf16_units",
    "cpu/isa_baseline",
    "cpu/isa_avx2",
    "cpu/isa_avx512",
)


class BuildKernels(build_ext):
    """Builds what can be built; a failure is reported and kept, and does not stop the installation."""

    def run(self):
        self.report = {}
        super().run()
        target = ROOT if self.inplace or self.editable_mode else Path(self.build_lib)
        (target / REPORT).parent.mkdir(parents=True, exist_ok=True)
        (target / REPORT).write_text(json.dumps(self.report, indent=2) + "\n")

    def build_extension(self, ext):
        try:
            use_stable_torch(ext)
            super().build_extension(ext)
            reason, said = None, "built"
        except Exception as error:  # whatever a missing torch, a missing compiler or a compiler may throw
            # The compiler's own words are in the build output; its command line would bury the message.
            # An older binary must not stand in for the one that failed.
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
            reason = f"it could not be built: {textwrap.shorten(str(error), 200)}"
            said = f"left out, the package runs on its PyTorch reference: {reason}"
        self.report[ext.name] = reason
        print(f"aksae: {ext.name}: {said}", file=sys.stderr)

    def build_extensions(self):
        compile_all = self.compiler.compile

        def compile_side_by_side(sources, *args, **kwargs):
            with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", 0)) or os.cpu_count()) as pool:
                objects = pool.map(lambda source: compile_all([source], *args, **kwargs), sources)
                # Where the linker merges inline functions the first copy wins: let it be one that every machine runs.
                return sorted((path for paths in objects for path in paths), key=lambda path: "avx" in path)

        self.compiler.compile = compile_side_by_side
        super().build_extensions()


def use_stable_torch(ext):
    """Compile against the stable ABI of torch 2.11: one binary serves every later torch and Python."""
    try:
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError as error:
        raise RuntimeError(f"torch cannot be imported ({error}): install it first, use --no-build-isolation") from error
    ext.include_dirs += include_paths()
    ext.library_dirs += library_paths()
    ext.libraries += ["torch_cpu", "c10"]
    ext.define_macros += [("TORCH_TARGET_VERSION", "0x020b000000000000"), ("Py_LIMITED_API", "0x030a0000")]


setup(
    ext_modules=[
        Extension(
            "aksae_kernels._C",
            [f"csrc/{name}.cpp" for name in CPU_SOURCES],
            depends=[str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.h"))],
            # No -march: the instruction sets are chosen at run time. No -ffast-math: NaN must stay NaN.
            extra_compile_args=[
                "-O3",
                "-g0",
                "-std=c++20",
                "-ffp-contract=fast",
                "-fno-math-errno",
                "-fvisibility=hidden",
                "-Wall",
                "-Wno-psabi",
            ],
            py_limited_api=True,
            optional=True,
            language="c++",
        )
    ],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
