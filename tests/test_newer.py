"""The job that looks for the first newer version of another codebase that breaks."""

from __future__ import annotations

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
        "good: 1 and 3 newer versions pass",
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
