"""What needs a process of its own: for a switch that is read once, for a memory still clean, or for a time limit."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .report import NotMeasured

_ROOT = Path(__file__).parent.parent


class Ended(NamedTuple):
    """How a command ended: its exit status, or None where the time limit ended it, and what it printed until then."""

    status: int | None
    output: str
    seconds: float


def run_within(limit_s: float, command: Sequence[str], env: Mapping[str, str]) -> Ended:
    """Run a command in the root of the repository, with `env` added to the environment.

    At the limit it is killed together with every process it started, which `subprocess.run` would wait for. A command
    that cannot be started has the exit status 127, as in a shell.
    """
    start = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        try:
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | env, cwd=_ROOT, start_new_session=True
            )
        except OSError as error:
            return Ended(127, str(error), time.monotonic() - start)
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.seek(0)
        return Ended(status, log.read(), time.monotonic() - start)


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
        cwd=_ROOT,
    )
    if done.returncode == 0:
        return json.loads(done.stdout)
    kind, _, message = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1].partition(": ")
    raise AssertionError(message) if kind == "AssertionError" else NotMeasured(f"{kind}: {message}")
