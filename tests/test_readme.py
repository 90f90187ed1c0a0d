"""The README's Python examples run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parent.parent / "README.md").read_text(), re.DOTALL)


def test_there_are_examples():
    assert len(BLOCKS) >= 2


@pytest.mark.parametrize("block", BLOCKS, ids=[f"block {i}" for i in range(len(BLOCKS))])
def test_example_runs(block, capsys):
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["x_hat"].shape == names["x"].shape
    assert torch.isfinite(names["x_hat"]).all()
