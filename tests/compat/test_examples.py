"""Every example runs as it stands, from another folder and without a network."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def hosts(path: Path) -> set[str]:
    """Top-level packages that an example imports."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, tmp_path):
    for name in sorted(hosts(path)):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs the package {name}")
    search = [str(ROOT / "python"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, search)), "HF_HUB_OFFLINE": "1"}
    runner = ["-m", "benchmarks.bare_overcomplete"] if "overcomplete" in hosts(path) else []
    done = subprocess.run(
        [sys.executable, *runner, str(path)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 1, "an example prints what it found"


def test_there_are_examples():
    assert {
        "accelerate_dictionary_learning",
        "accelerate_overcomplete",
        "adaptivek_in_sae_lens",
        "fit_own_activations",
        "latent_cache",
    } <= {path.stem for path in EXAMPLES}
