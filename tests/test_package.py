"""The installed package: its version, its type information, and what an installation that lacks something says."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import aksae
import pytest

import aksae_kernels

ROOT = Path(__file__).resolve().parent.parent


def run(code: str, *arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120)


def without(module: str) -> str:
    """A line of Python after which `import module` fails as if it were not installed."""
    return f"import sys; sys.modules[{module!r}] = None; "


def test_version_is_one_number():
    assert re.fullmatch(r"\d+\.\d+\.\d+", aksae_kernels.__version__)
    assert aksae.__version__ == aksae_kernels.__version__
    assert f"\n## {aksae.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_type_checkers_may_read_both_packages():
    for package in (aksae, aksae_kernels):
        assert (Path(package.__file__).parent / "py.typed").exists()
    assert (ROOT / "pyproject.toml").read_text().count('"py.typed"') == 2


def test_every_package_is_installed():
    # An editable installation has all that lies in the folders; a wheel has what is listed.
    listed = re.search(r"^packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)[1]
    found = {
        ".".join(init.parent.relative_to(base).parts)
        for base, name in ((ROOT, "aksae_kernels"), (ROOT / "python", "aksae"))
        for init in (base / name).rglob("__init__.py")
    }
    assert sorted(re.findall(r'"(.*?)"', listed)) == sorted(found)


@pytest.mark.parametrize("command", ["bdist_wheel", "editable_wheel", "build_ext"])
def test_a_build_without_torch_ends_with_one_line(command, tmp_path):
    shutil.copytree(ROOT / "aksae_kernels", tmp_path / "aksae_kernels", ignore=shutil.ignore_patterns("*.so"))
    shutil.copytree(ROOT / "python", tmp_path / "python")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    build = f"import runpy; sys.argv = ['setup.py', {command!r}]; runpy.run_path('setup.py', run_name='__main__')"
    done = run(without("torch") + build, folder=tmp_path)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert "install torch first, then run pip install --no-build-isolation" in done.stderr.splitlines()[-1]
    assert "copying" not in done.stdout + done.stderr


@pytest.mark.parametrize("module", ["numpy", "tqdm"])
def test_importing_aksae_without_its_extra_names_it(module):
    done = run(without(module) + "import aksae")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"ImportError: aksae needs {module}, which is not installed")
    assert "pip install --no-build-isolation 'aksae[train]'" in last
    assert "During handling" not in done.stderr


@pytest.mark.parametrize("module", ["numpy", "tyro"])
def test_the_command_without_its_extra_is_one_line(module):
    # What the script that pip makes does: the name it is called by, then the import.
    script = without(module) + "sys.argv[0] = '/somewhere/bin/aksae'; from aksae.cli import main; sys.exit(main())"
    done = run(script, "--help")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"aksae: aksae needs {module}, which is not installed")


def test_python_m_aksae_without_its_extra_is_one_line(tmp_path):
    (tmp_path / "numpy.py").write_text("raise ModuleNotFoundError('no numpy here', name='numpy')\n")
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT / 'python'}:{ROOT}", "PATH": ""}
    command = [sys.executable, "-W", "ignore", "-m", "aksae", "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith("aksae: aksae needs numpy")
    assert len(done.stderr.splitlines()) == 1


def test_a_broken_module_of_ours_is_not_blamed_on_the_extra():
    done = run(without("aksae.losses") + "import aksae")
    assert "ModuleNotFoundError" in done.stderr.splitlines()[-1]
    assert "extra" not in done.stderr
