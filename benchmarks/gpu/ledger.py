"""The results of the parts, in one JSON file that is complete after each of them."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from ..report import write_json
from .bench import Outcome

SUITE = "gpu"
"""The value of the key "suite": other results may lie in the same folder."""


class Ledger:
    """What is known of one device at one commit; another device, commit or set of shapes starts anew.

    Args:
        path: the file; where it holds results of the same `identity`, they are kept.
        identity: entries that tell one run from another.
    """

    def __init__(self, path: Path, identity: dict[str, Any]):
        self.path = path
        self.document = {"suite": SUITE, **identity, "parts": {}, "running": None}
        found = read(path)
        if found and all(found.get(key) == value for key, value in identity.items()):
            self.document = found
        if cut_off := self.document["running"]:
            # It may have hung, or taken the process with it: not to be tried again and again.
            self.add(cut_off, Outcome(failed=[f"{cut_off}: the process ended while it ran"]), 0.0)

    @property
    def parts(self) -> dict[str, Any]:
        """By name, in the order they were measured."""
        return self.document["parts"]

    def facts(self, name: str) -> dict[str, Any]:
        """Of a part; empty where it has not run."""
        return self.parts.get(name, {}).get("facts", {})

    def save(self) -> bool:
        """False, after a line on stderr, where the file cannot be written."""
        return write_json(self.path, self.document)

    def start(self, name: str) -> None:
        """Note that a part runs now."""
        self.document["running"] = name
        self.save()

    def add(self, name: str, outcome: Outcome, seconds: float) -> None:
        """Keep what a part found."""
        self.parts[name] = {
            "seconds": round(seconds, 1),
            **{field.name: getattr(outcome, field.name) for field in dataclasses.fields(outcome)},
            "rows": [row.record() for row in outcome.rows],
        }
        self.document["running"] = None
        self.save()

    @property
    def wrong(self) -> list[str]:
        """Of all parts."""
        return [line for part in self.parts.values() for line in part["wrong"]]


def read(path: Path) -> dict[str, Any] | None:
    """A document of this suite; None where there is none, or something else."""
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) and document.get("suite") == SUITE else None


def slug(device: str) -> str:
    """The name of a device as that of a file: "NVIDIA H100 80GB HBM3" gives "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
