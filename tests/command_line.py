"""The command `aksae`, called in this process."""

from __future__ import annotations

import re

from aksae import cli


def call(*words, **options) -> int:
    flags = [str(part) for key, value in options.items() for part in (f"--{key}", value)]
    return cli.main([*map(str, words), *flags])


def fails(capsys, message, *words, status=2, **options) -> str:
    """The command ends with `status` and one line on stderr that matches `message`."""
    capsys.readouterr()
    got = call(*words, **options)
    assert got == status, got
    # Progress bars rewrite their line.
    lines = [line for line in re.split(r"[\r\n]+", capsys.readouterr().err) if line.startswith("aksae: ")]
    assert len(lines) == 1, lines
    assert re.search(message, lines[0]), lines[0]
    return lines[0]
