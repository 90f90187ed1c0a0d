"""Builds the CUDA kernels and their binding for the host: `python tests/emulation/build.py FOLDER`.

Tests run on the result as the backend `cuda` on CPU tensors: `AKSAE_CUDA_EMULATION=FOLDER/_C_cuda_sm80.so pytest ...`.
"""

from __future__ import annotations

import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# -ffp-contract=off: a device multiplies and adds in one rounding where the kernels say so (fmaf), and nowhere else.
FLAGS = "-std=c++20 -O2 -fPIC -march=native -ffp-contract=off -fvisibility=hidden -U_FORTIFY_SOURCE -Wall -Wno-psabi"
BINDING = "-DTORCH_TARGET_VERSION=0x020b000000000000 -DUSE_CUDA -DAKSAE_DISPATCH_KEY=CPU"


def build(folder: Path, major: int = 8) -> Path:
    """The library, made for an emulated device of compute capability `major`.0."""
    setup = runpy.run_path(str(ROOT / "setup.py"))
    jobs = []
    for name in (*setup["CUDA_SOURCES"], "emulation"):
        if name == "emulation":
            source = [str(HERE / "emulation.cpp"), f"-DEMULATED_MAJOR={major}"]
        elif name.startswith("bind"):
            includes = [flag for path in include_paths() for flag in ("-isystem", path)]
            source = [str(ROOT / "csrc" / f"{name}.cpp"), *BINDING.split(), *includes]
        else:
            # nvcc knows these pragmas; g++ unrolls as it likes.
            source = ["-x", "c++", "-Wno-unknown-pragmas", "-include", str(HERE / "ptx.h")]
            # Chunks of one tile of rows.
            source += ["-DAKSAE_SM90A", "-DAKSAE_CHUNK_ROWS=128", str(ROOT / "csrc" / f"{name}.cu")]
        target = folder / f"sm{major}0_{Path(name).name}.o"
        jobs.append(["g++", *FLAGS.split(), "-I", str(HERE), "-c", *source, "-o", str(target)])
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda job: subprocess.run(job, check=True), jobs))
    library = folder / f"_C_cuda_sm{major}0.so"
    # -Bsymbolic: the two functions of torch that emulation.cpp stands in for are its own.
    link = ["g++", "-shared", "-Wl,-Bsymbolic", *(job[-1] for job in jobs), "-o", str(library)]
    libraries = [flag for path in library_paths() for flag in ("-L", path)]
    subprocess.run([*link, *libraries, "-ltorch_cpu", "-lc10", "-pthread"], check=True)
    return library


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
