"""The job that looks for the first newer version of another codebase that breaks."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

sys.path.insert(0, str(Path(__file__).parent / "compat"))
import newer

from aksae_kernels import integrations


def versions(*texts):
    return [Version(text) for text in texts]


def test_every_pin_has_tests_and_is_the_tested_version():
    pins = newer.pins()
    assert pins.keys() == newer.TESTS.keys()
    assert {host.distribution: Version(host.tested) for host in integrations._HOSTS.values()} == pins
    for names in newer.TESTS.values():
        for name in names:
            assert (Path(newer.__file__).parent / f"test_{name}.py").is_file()


def test_only_what_is_newer_is_tried_oldest_first(monkeypatch):
    said = "a-package (1.10)\nAvailable versions: 1.10, 1.9, 1.2, 1.1\n  INSTALLED: 1.2\n"
    commands = []

    def run(command, **kwargs):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, said)

    monkeypatch.setattr(newer.subprocess, "run", run)
    assert newer.newer("a-package", Version("1.2")) == versions("1.9", "1.10")
    assert "--pre" not in commands[0]
    newer.newer("a-package", Version("1.2b3"))
    assert "--pre" in commands[1]


def test_the_first_that_breaks_is_named(monkeypatch, capsys):
    monkeypatch.setattr(newer, "pins", lambda: {"good": Version("1"), "bad": Version("1")})
    monkeypatch.setattr(newer, "newer", lambda package, pin: versions("2", "3", "4"))
    broken = versions("3", "4")
    monkeypatch.setattr(
        newer, "failure_of", lambda package, found: "1 failed" if package == "bad" and found in broken else None
    )
    assert newer.main() == 1
    assert capsys.readouterr().out.splitlines() == [
        "good: 3 versions newer than 1, all pass",
        "bad: 3 is the first that breaks: 1 failed",
    ]


@pytest.mark.parametrize(("status", "why"), [(0, None), (1, "3 failed, 2 passed")])
def test_a_version_is_judged_by_its_tests(monkeypatch, status, why):
    def run(command, **kwargs):
        return subprocess.CompletedProcess(command, status if "pytest" in command else 0, "F\n3 failed, 2 passed\n", "")

    monkeypatch.setattr(newer.subprocess, "run", run)
    assert newer.failure_of("overcomplete", Version("9")) == why


def test_a_version_that_cannot_be_installed_breaks(monkeypatch):
    def run(command, **kwargs):
        raise subprocess.CalledProcessError(1, command, stderr="ERROR: no\nERROR: no matching distribution\n")

    monkeypatch.setattr(newer.subprocess, "run", run)
    assert newer.failure_of("overcomplete", Version("9")) == "it cannot be installed: ERROR: no matching distribution"


@pytest.mark.parametrize(("message", "status"), [("x is 2; accelerate is tested with 1", 0), ("anything else", 1)])
def test_only_the_untested_version_may_warn(tmp_path, message, status):
    (tmp_path / "test_one.py").write_text(f"import warnings\n\ndef test():\n    warnings.warn({message!r})\n")
    done = subprocess.run([sys.executable, "-m", "pytest", *newer.OPTIONS, "test_one.py"], cwd=tmp_path)
    assert done.returncode == status


def test_what_a_new_version_asks_for_is_installed_too(tmp_path, monkeypatch):
    """And what that asks for; an old version in the environment does not do, torch is left alone."""
    asks = {"new": ["middle>1", "torch>99", "pytest>0"], "middle": ["last; extra == 'x'", "pytest>999"], "pytest": []}
    installed = []

    def run(command, **kwargs):
        name = re.match("[a-z]+", command[-1])[0]
        installed.append(command[-1])
        info = tmp_path / f"{name}.dist-info"
        info.mkdir(exist_ok=True)
        lines = [f"Name: {name}", "Version: 1000", *(f"Requires-Dist: {line}" for line in asks[name])]
        (info / "METADATA").write_text("\n".join(lines))

    monkeypatch.setattr(newer.subprocess, "run", run)
    newer._install("new==2", tmp_path)
    assert installed == ["new==2", "middle>1", "pytest>999"]
