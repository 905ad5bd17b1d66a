"""Single files that a command writes where it is told to."""

from __future__ import annotations

import os
from pathlib import Path

from ptqcli.errors import PTQError, UsageError


def check_file(flag: str, file: Path, overwrite: bool, *endings: str) -> None:
    """Raise UsageError, or PTQError where that is not allowed, unless a file with one of these endings can be written, as ``flag`` asks."""
    if file.suffix.lower() not in endings:
        forms = " and ".join(ending.removeprefix(".").upper() for ending in endings)
        raise UsageError(f"{flag} {file}: only {forms} is written; name a file that ends in {' or '.join(endings)}")
    if file.is_dir():
        raise UsageError(f"{flag} {file}: is a folder; name a file in it")
    if not file.parent.is_dir():
        raise UsageError(f"{flag} {file}: there is no folder {file.parent}; make it first")
    if file.exists() and not overwrite:
        raise UsageError(f"{flag} {file}: already exists; give --overwrite to replace it")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise PTQError(f"{flag} {file}: cannot write there; name a file in a folder of yours")
