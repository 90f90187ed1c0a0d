"""`python tests/compat/newer.py`: which newer version of another codebase is the first that breaks the tests here.

For each pin of the extra `compat`, the versions that the package index has beyond it are installed in turn, oldest
first, each into a folder of its own that comes before the environment's packages, with whatever newer dependency it
asks for; then its tests run. Prints a line for each package, and ends with status 1 where a version breaks.
`.ci/nightly` runs it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, PathDistribution, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
TESTS = {
    "dictionary-learning": ("dictionary_learning", "adaptivek_dictionary_learning", "formats_hosts"),
    "eai-sparsify": ("sparsify", "formats_hosts"),
    "llamascopium": ("llamascopium", "formats_hosts"),
    "overcomplete": ("overcomplete",),
    "sae-lens": ("sae_lens", "adaptivek_sae_lens", "formats_hosts"),
}
"""The test modules of `tests/compat`, without `test_`, that a package is judged by."""

FILTERS = "error\nignore:.*accelerate is tested with:UserWarning"
"""As in pyproject.toml, but that this is not the tested version is no news here."""
# Not -W, which takes no pattern.
OPTIONS = ("-q", "-x", "-p", "no:cacheprovider", "-o", f"filterwarnings={FILTERS}")


def pins() -> dict[str, Version]:
    """The other codebases in the extra `compat`, and their versions."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    requirements = [Requirement(line) for line in extras["compat"]]
    return {r.name: Version(next(iter(r.specifier)).version) for r in requirements if r.name in TESTS}


def newer(package: str, pin: Version) -> list[Version]:
    """Versions on the index beyond the pin, oldest first; pre-releases only where the pin is one."""
    command = [sys.executable, "-m", "pip", "index", "versions", package, *(["--pre"] if pin.is_prerelease else [])]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    listed = re.search(r"^Available versions: (.*)$", said, re.MULTILINE)[1]
    return sorted(found for found in map(Version, listed.split(", ")) if found > pin)


def failure_of(package: str, candidate: Version) -> str | None:
    """Why the tests of `package` fail with this version; None where they pass."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            _install(f"{package}=={candidate}", Path(folder))
        except subprocess.CalledProcessError as error:
            return f"it cannot be installed: {_last_line(error.stderr)}"
        path = os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        modules = [f"tests/compat/test_{name}.py" for name in TESTS[package]]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *OPTIONS, *modules],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": path},
        )
        return None if done.returncode == 0 else _last_line(done.stdout or done.stderr)


def _install(requirement: str, folder: Path) -> None:
    """The package, and what it and those it brings ask for beyond the environment."""
    wanted = {requirement}
    while wanted:
        for line in sorted(wanted):
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), line]
            subprocess.run(pip, check=True, capture_output=True, text=True)
        wanted = {str(unmet) for unmet in _unmet(folder)} - wanted


def _unmet(folder: Path) -> Iterator[Requirement]:
    """What the packages in the folder require and neither it nor the environment has; torch stays the one it has."""
    here = [PathDistribution(info) for info in folder.glob("*.dist-info")]
    versions = {canonicalize_name(package.metadata["Name"]): package.version for package in here}
    for requirement in (Requirement(line) for package in here for line in package.requires or ()):
        name = canonicalize_name(requirement.name)
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        found = versions.get(name) or _installed(name)
        fits = found is not None and requirement.specifier.contains(found, prereleases=True)
        if wanted and name not in ("torch", "torchvision") and not fits:
            yield requirement


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no output"])[-1]


def main() -> int:
    status = 0
    for package, pin in pins().items():
        candidates = newer(package, pin)
        failures = ((found, failure_of(package, found)) for found in candidates)
        broken = next((failure for failure in failures if failure[1] is not None), None)
        if broken:
            status = 1
            print(f"{package}: {broken[0]} is the first that breaks: {broken[1]}", flush=True)
        else:
            print(f"{package}: {len(candidates)} versions newer than {pin}, all pass", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
