"""Reading JSON of a run that may lack anything, and showing it."""

from __future__ import annotations

import math
from typing import Any

# Control characters may not stand in HTML; the Unicode control pictures say what was there.
VISIBLE = {code: chr(0x2400 + code) for code in range(32)} | {0x0A: "↵", 0x09: "⇥", 0x7F: "␡"}


def as_dict(value: Any) -> dict:
    """`value` where it is a dictionary, else an empty one."""
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list:
    """`value` where it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def count(value: Any) -> str:
    """A number of things as text."""
    return f"{value:,.0f}" if is_number(value) else "unknown"


def shown(value: Any, spec: str) -> str:
    """A number by its format, and "n/a" for anything else."""
    return format(value, spec) if is_number(value) else "n/a"
