"""`python -m benchmarks.gpu_check`: whether the kernels work on the GPU at hand, within 6 minutes.

It needs no package index, and of packages only torch, Triton and pytest: it builds the kernels in place, for this
device's architecture alone, runs the GPU tests, one call of every op under each tool of compute-sanitizer, and the
headline of `benchmarks.gpu_suite`. Every step has a time limit of its own, and what is left of the 6 minutes bounds it,
too. A step that fails does not stop the others.

Last, one page says what every step found, and what was cut off, left out or not there; `DIR/<device>-check.json` holds
the same. The exit status is 1 if a step failed. A build, tests or a suite that do not end have failed; a sanitizer that
does not has found nothing until then.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import machine
from .child import Ended, run_within
from .gpu import ledger, sanitizer, table
from .report import NotMeasured, write_json

PASSED, FAILED, CUT_OFF, LEFT_OUT, MISSING = "passed", "failed", "cut off", "left out", "missing"
# What a step needs at least, and what starting Python and writing the page take.
_LEAST_S, _RESERVE_S = 10, 15
_ROOT = Path(__file__).parent.parent
_BUILD_REPORT = _ROOT / "aksae_kernels" / "_build_report.json"
# The suite starts no part that would not end in its time, and may be wrong about one.
_SUITE_MARGIN_S = 15
_MOST_WORKERS = 12
_MOST_LINES = 6


class Finding(NamedTuple):
    """What came of a step: one of the states above, and lines that say more, the first of which is the summary."""

    state: str
    lines: list[str]


@dataclass(frozen=True)
class Step:
    """Something to run for at most so many seconds. `run` is given its limit, and may raise NotMeasured."""

    name: str
    limit_s: float
    run: Callable[[float], Finding]


def build(limit_s: float) -> Finding:
    """Both binaries, next to the Python files. `--force`: what was built before may be for another device."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace", "--force"]
    architecture = architecture_of(*torch.cuda.get_device_capability())
    env = {"TORCH_CUDA_ARCH_LIST": architecture, "MAX_JOBS": str(os.cpu_count() or 1)}
    ended = run_within(limit_s, command, env)
    if ended.status != 0:
        return _failed(ended)
    reasons = json.loads(_BUILD_REPORT.read_text())
    missing = [f"{name}: {reason}" for name, reason in reasons.items() if reason]
    if missing:
        print(ended.output)
        return Finding(FAILED, missing)
    return Finding(PASSED, [f"{' and '.join(name.rpartition('.')[2] for name in reasons)} for {architecture}"])


def architecture_of(major: int, minor: int) -> str:
    """As TORCH_CUDA_ARCH_LIST has it. Of 9.0 the kernels need the instructions that no later device has."""
    return f"{major}.{minor}" + "a" * ((major, minor) == (9, 0))


def gpu_test_files() -> list[str]:
    """Those with tests that are marked for a GPU, or take a backend and a device from conftest.py. Not all there are:
    others import what only the training package needs."""
    on_a_gpu = re.compile(r"pytest\.mark\.gpu\b|^def test_\w+\((?:.*\b)?(?:case|fp32|fp64)\b", re.MULTILINE)
    paths = sorted((_ROOT / "tests").glob("test_*.py"))
    return [str(path.relative_to(_ROOT)) for path in paths if on_a_gpu.search(path.read_text())]


def gpu_tests(limit_s: float) -> Finding:
    """On several processes where pytest-xdist is there: most of the time goes to oracles and to Triton's compiler."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *gpu_test_files()]
    env = {}
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(_MOST_WORKERS, os.cpu_count() or 1))]
        env["OMP_NUM_THREADS"] = "1"
    ended = run_within(limit_s, command, env)
    if ended.status != 0:
        return _failed(ended, r"(?m)^(?:FAILED|ERROR) .*")
    # Tests that find no device are skipped, all of them.
    counts = _last_line(ended)
    return Finding(PASSED if re.search(r"\b[1-9]\d* passed", counts) else FAILED, [counts])


def sanitized(tool: str, limit_s: float) -> Finding:
    ended = sanitizer.watched(tool, limit_s, "benchmarks.gpu.calls")
    reached = re.findall(r"(?m)^\d+ of \d+ calls ended.*", ended.output)
    how_far = reached[-1] if reached else "no call ended"
    try:
        return Finding(PASSED, [sanitizer.verdict(ended).strip("= "), how_far])
    except NotMeasured as error:
        return Finding(CUT_OFF, [f"{error}: {how_far}"])
    except (AssertionError, RuntimeError) as error:
        print(ended.output)
        return Finding(FAILED, [str(error), how_far])


def headline(found: dict[str, Any], limit_s: float) -> Finding:
    """As much of the suite as there is time for, in a folder of its own, so that no earlier result is continued or
    replaced. `found` is given the suite's document."""
    minutes = max(0.0, limit_s - _SUITE_MARGIN_S) / 60
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.gpu_suite", "--minutes", f"{minutes:.2f}", "--out", folder]
        ended = run_within(limit_s, command, {})
        for path in Path(folder).glob("*.json"):
            found |= ledger.read(path) or {}
    parts = found.get("parts", {})
    amiss = [reason for part in parts.values() for reason in (*part["wrong"], *part["failed"])]
    if ended.status != 0 or amiss:
        failed = _failed(ended)
        return failed._replace(lines=amiss or failed.lines)
    return Finding(PASSED, [f"{len(parts)} parts of the suite: {', '.join(parts)}"])


def _failed(ended: Ended, pattern: str = "") -> Finding:
    """Whatever it printed, too, since the page has room for a few lines."""
    print(ended.output)
    named = re.findall(pattern, ended.output) if pattern else []
    if ended.status is None:
        return Finding(FAILED, [f"it did not end within {ended.seconds:.0f} s", *named, _last_line(ended)])
    return Finding(FAILED, [_last_line(ended), *named])


def _last_line(ended: Ended) -> str:
    lines = ended.output.strip().splitlines() or [f"exit status {ended.status}, nothing printed"]
    return lines[-1].strip("= ")


def steps(found: dict[str, Any]) -> tuple[Step, ...]:
    """In their order; `found` is given the suite's document."""
    return (
        Step("build", 80, build),
        Step("tests", 120, gpu_tests),
        *(Step(tool, 30, lambda limit_s, tool=tool: sanitized(tool, limit_s)) for tool in sanitizer.TOOLS),
        Step("headline", 120, lambda limit_s: headline(found, limit_s)),
    )


def taken(plan: Sequence[Step], minutes: float) -> Iterator[dict[str, Any]]:
    """Take the steps, one after the other, and give the record of each."""
    end = time.monotonic() + 60 * minutes - _RESERVE_S
    for step in plan:
        start = time.monotonic()
        limit_s = min(step.limit_s, end - start)
        if limit_s < _LEAST_S:
            finding = Finding(LEFT_OUT, ["no time was left for it"])
        else:
            try:
                finding = step.run(limit_s)
            except NotMeasured as error:
                finding = Finding(MISSING, [str(error)])
            except Exception as error:  # a step may fail as it likes: the others are still wanted
                finding = Finding(FAILED, [f"{type(error).__name__}: {error}"])
        seconds = round(time.monotonic() - start, 1)
        yield {"step": step.name, "state": finding.state, "seconds": seconds, "lines": finding.lines}


def line(record: dict[str, Any]) -> str:
    """The one that the page has of a step."""
    return f"{record['step']:10s} {record['state']:8s} {record['seconds']:6.1f} s  {record['lines'][0]:.120s}"


def page(document: dict[str, Any]) -> str:
    """For the terminal, less than 60 lines with the few rows that the headline has."""
    lines = [", ".join(f"{key} {value}" for key, value in document["machine"].items())]
    if document["headline"]:
        lines += ["", table.text(document["headline"])]
    lines.append("")
    for record in document["steps"]:
        lines.append(line(record))
        lines += [f"{'':10s} {more:.140s}" for more in record["lines"][1:_MOST_LINES]]
    others = [
        f"{state}: {', '.join(names)}"
        for state in (FAILED, CUT_OFF, LEFT_OUT, MISSING)
        if (names := [record["step"] for record in document["steps"] if record["state"] == state])
    ]
    return "\n".join([*lines, "", "; ".join(others) or "all steps passed"])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="the folder of the result")
    parser.add_argument("--minutes", type=float, default=6.0, help="for all steps together")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("torch sees no CUDA device, and this is a check of the kernels on one", file=sys.stderr)
        return 1
    facts, found, records = machine.describe_device(torch.device("cuda")), {}, []
    for record in taken(steps(found), options.minutes):
        records.append(record)
        print(line(record), flush=True)
    document = {
        "suite": "gpu-check",
        "commit": machine.revision(),
        "machine": facts,
        "steps": records,
        "headline": found,
    }
    written = write_json(options.out / f"{ledger.slug(facts['device'])}-check.json", document)
    print(f"\n{page(document)}")
    return 0 if written and all(record["state"] != FAILED for record in records) else 1


if __name__ == "__main__":
    sys.exit(main())
