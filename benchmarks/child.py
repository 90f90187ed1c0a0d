"""Measurements that need a process of their own: for a switch that is read once, or for a memory still clean."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .report import NotMeasured


def output_of(module: str, *arguments: object, env: Mapping[str, str]) -> Any:
    """What `python -m benchmarks.MODULE ARGUMENTS --threads N` prints as JSON, with `env` added to the environment.

    Raises AssertionError where the child does, with its message, and NotMeasured where it fails otherwise.
    """
    command = [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)]
    done = subprocess.run(
        [*command, "--threads", str(torch.get_num_threads())],
        capture_output=True,
        text=True,
        env=os.environ | dict(env),
        cwd=Path(__file__).parent.parent,
    )
    if done.returncode == 0:
        return json.loads(done.stdout)
    kind, _, message = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1].partition(": ")
    raise AssertionError(message) if kind == "AssertionError" else NotMeasured(f"{kind}: {message}")
