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


def pins() -> dict[str, Version]:
    """Packages and versions of the extra `compat`."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    requirements = [Requirement(line) for line in extras["compat"]]
    return {r.name: Version(next(iter(r.specifier)).version) for r in requirements}


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
        # The warning that it is not the tested version is no news here.
        ignored = ("-W", "ignore:.*accelerate is tested with:UserWarning")
        modules = [f"tests/compat/test_{name}.py" for name in TESTS[package]]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *ignored, *modules],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": path},
        )
        return None if done.returncode == 0 else _last_line(done.stdout or done.stderr)


def _install(requirement: str, folder: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    subprocess.run([*pip, requirement], check=True, capture_output=True, text=True)
    for unmet in {str(r) for r in _unmet(folder)}:
        subprocess.run([*pip, unmet], check=True, capture_output=True, text=True)


def _unmet(folder: Path) -> Iterator[Requirement]:
    """What the packages in the folder require that the environment does not have; torch stays the one it has."""
    for info in folder.glob("*.dist-info"):
        for line in PathDistribution(info).requires or ():
            requirement = Requirement(line)
            wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if wanted and requirement.name not in ("torch", "torchvision") and not _has(requirement):
                yield requirement


def _has(requirement: Requirement) -> bool:
    try:
        return requirement.specifier.contains(version(requirement.name), prereleases=True)
    except PackageNotFoundError:
        return False


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
            print(f"{package}: {pin} and {len(candidates)} newer versions pass", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
