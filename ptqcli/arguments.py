"""What a program passes to the public functions, checked at the door: a wrong type is told by the argument's name, in one line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ptqcli.errors import UsageError


def as_path(value: Any, name: str) -> Path:
    """``value`` as a path, ``~`` expanded. Raises UsageError for anything but a path or a text that is not empty."""
    if not isinstance(value, (str, os.PathLike)):
        raise UsageError(f"{name} is a path, not {type(value).__name__}; give a text or a Path")
    path = os.fspath(value)
    if not isinstance(path, str) or not path or "\0" in path:
        raise UsageError(f"{name} {path!r} is no path; give the path of a folder or file")
    return Path(path).expanduser()


def check_argument(value: Any, name: str, *kinds: type, optional: bool = False) -> None:
    """Raise UsageError if ``value`` is of none of ``kinds``; true and false are no numbers. optional: None is allowed."""
    fits = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
    if not fits and not (optional and value is None):
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise UsageError(f"{name} must be {wanted}{', or None' if optional else ''}, not {value!r}"[:300])
