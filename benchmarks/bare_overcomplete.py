"""`python -m benchmarks.bare_overcomplete SCRIPT`: runs a script where overcomplete cannot be imported as it is.

Its `__init__` also imports vision models and plots. Those want a torchvision, and that of the package index does not
load beside a CPU torch (merely being there, it breaks transformers); and a matplotlib before 3.9. The autoencoders of
`overcomplete.sae` need neither.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys


def make_importable() -> None:
    """Have the package without what its own `__init__` would do; its modules are imported as ever."""
    spec = importlib.util.find_spec("overcomplete")
    if spec is not None and "overcomplete" not in sys.modules:
        sys.modules["overcomplete"] = importlib.util.module_from_spec(spec)


if __name__ == "__main__":
    make_importable()
    runpy.run_path(sys.argv[1], run_name="__main__")
