"""What the hosts need before they can be imported where warnings are errors."""

from __future__ import annotations

import builtins
import os
import sys
import warnings

import pytest
import torch

from benchmarks.bare_overcomplete import make_importable

# sparsify looks for Triton once, at import, and then insists on a GPU.
os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")

make_importable()

# Each names one warning of one host: of its import or of its own code, never of ours.
HOST_WARNINGS = (
    r"ignore:The 'utils' module has been deprecated:DeprecationWarning:sae_lens",
    r"ignore:Importing \w+ from transformer_lens:DeprecationWarning:sae_bench",
    r"ignore:Using `@model_validator` with mode='after' on a classmethod:DeprecationWarning:sae_bench",
)


def pytest_configure(config: pytest.Config) -> None:
    for line in HOST_WARNINGS:
        config.addinivalue_line("filterwarnings", line)
        # Where this file is found only while tests are being collected, the filters of the imports are already set.
        action, message, category, module = line.split(":")
        warnings.filterwarnings(action, message, getattr(builtins, category), module)


@pytest.fixture(autouse=True)
def _unpatched() -> None:
    # nnsight, which two hosts import, patches torch.autocast and FakeTensor for the whole process: trainers of other
    # hosts fail then, and so does torch.compile.
    if "nnsight" in sys.modules:
        for patch in sys.modules["nnsight"].DEFAULT_PATCHER.patches:
            patch.restore()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
