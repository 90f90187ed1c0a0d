"""Failures a user can act on, and what a user should know although nothing failed."""

from __future__ import annotations

import sys
from pathlib import Path


class UserError(ValueError):
    """Bad input: one clear line naming the argument, what it got and what it needs."""


class Notice(UserWarning):
    """Something was done otherwise than asked, and right: one line that says what. The command line prints it."""


def missing_module(error: ModuleNotFoundError) -> BaseException:
    """What to raise, `from None`, where `error` says that a package of the extra `train` is not installed.

    An ImportError that names the extra; for the command `aksae` (and `python -m aksae`), whose imports run before any
    code of ours could catch it, a SystemExit that prints the same line and nothing else. `error` itself where the
    module is one of ours, or belongs to torch: no extra would bring it.
    """
    package = (error.name or "").partition(".")[0]
    if package in ("", "aksae", "aksae_kernels", "torch"):
        return error
    line = (
        f"aksae needs {package}, which is not installed; it comes with the extra `train`: "
        "pip install --no-build-isolation 'aksae[train]' (from a checkout: '.[train]')"
    )
    # While Python looks for the module that `-m` names, the script is called "-m".
    if Path(sys.argv[0]).stem in ("aksae", "-m"):
        return SystemExit(f"aksae: {line}")
    return ImportError(line, name=error.name)
