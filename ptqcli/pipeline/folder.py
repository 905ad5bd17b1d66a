"""The output folder: claimed, grown beside its final name, and put in its place when everything is in it."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ptqcli.errors import PTQError, UsageError
from ptqcli.pipeline.report import REPORT_NAME


def check_output(output: Path, model: Path | None, overwrite: bool) -> None:
    """Raise UsageError when ``output`` must not be written. model: the folder of the model, None for one in memory."""
    try:
        resolved = output.resolve()
    except (OSError, RuntimeError) as error:  # before Python 3.13 a RuntimeError
        raise UsageError(f"{output}: is a link that leads back to itself; choose another --output") from error
    if model is not None and resolved == model.resolve():
        raise UsageError(f"{output}: is the model itself; choose another --output")
    if not output.exists():
        return
    if not output.is_dir():
        raise UsageError(f"{output}: is a file; choose another --output")
    if not overwrite:
        raise UsageError(f"{output}: already exists; choose another --output, or replace it with --overwrite")
    if any(output.iterdir()) and not (output / REPORT_NAME).is_file():
        raise UsageError(f"{output}: was not written by ptq quantize and will not be replaced; choose another --output")


def check_room(output: Path, needed: int) -> None:
    """Raise PTQError where ``output`` cannot be written, or its disk has less than ``needed`` bytes free. Makes nothing."""
    parent = output.resolve().parent
    while not parent.exists():
        parent = parent.parent
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        raise PTQError(f"{parent}: cannot write there; choose another --output")
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise PTQError(f"{parent}: {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free; choose another --output")


@contextmanager
def growing(output: Path, overwrite: bool, needed: int) -> Iterator[Path]:
    """A folder beside ``output`` that becomes ``output`` when the context ends well and is removed when it does not."""
    output = output.resolve()  # a link stays, and the folder that it leads to is replaced
    folder = output.with_name(output.name + ".partial")
    parent = output.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        check_room(output, needed)
        lock = _claim(folder)
    except OSError as error:
        raise PTQError(f"{error.filename or parent}: cannot write there: {error.strerror}; choose another --output") from error
    try:
        if output.exists() and not overwrite:  # another run has finished since the first look
            raise UsageError(f"{output}: already exists; choose another --output, or replace it with --overwrite")
        yield folder
        if overwrite and output.exists():
            _replace(output, folder)
        else:
            folder.rename(output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _unlock(lock)


def _replace(output: Path, folder: Path) -> None:
    """Put ``folder`` in the place of ``output``, which is moved aside first and removed last."""
    aside = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    output.rename(aside / "old")
    folder.rename(output)
    shutil.rmtree(aside)


def _claim(folder: Path) -> int | None:
    """Make ``folder`` and lock it; return what holds the lock. What a killed run has left in it goes.

    Raises PTQError if another run holds it, or if it holds something else.
    """
    folder.mkdir(exist_ok=True)
    lock = _lock(folder)
    leftovers = sorted(folder.iterdir())
    if leftovers and not any(left.match("*.safetensors*") for left in leftovers):  # a run's first file is one of weights
        _unlock(lock)
        raise PTQError(f"{folder}: is in the way and holds {leftovers[0].name}; move it, or choose another --output")
    for left in leftovers:
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    return lock


def _lock(folder: Path) -> int | None:
    """An open descriptor that holds a lock on ``folder``, which ends with the process, however it ends.

    None on Windows, which opens no folder: there a second run into the same folder is not noticed.
    """
    if sys.platform == "win32":
        return None
    import fcntl

    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise PTQError(f"{folder}: another run is writing there; wait for it, or choose another --output") from error
    return lock


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)
