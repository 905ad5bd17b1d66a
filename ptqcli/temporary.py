"""Files and folders that are needed for a moment, because a library takes nothing else, and that no way of ending leaves behind.

A process that is killed cleans nothing up. So a file lives in memory where the system has such (Linux), and a folder carries the number of
its process in its name and is locked by it: the next one that is made removes those of processes that are gone.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

OURS = re.compile(r"ptqcli-temporary-(\d{1,10})-\w{8}")


@contextmanager
def written_file(content: bytes = b"") -> Iterator[Path]:
    """A file with ``content``, readable and writable under this path for the duration."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("ptqcli")
        try:
            path = Path(f"/proc/self/fd/{descriptor}")
            if path.is_file():
                path.write_bytes(content)
                yield path
                return
        finally:
            os.close(descriptor)
    with temporary_folder() as folder:
        (folder / "file").write_bytes(content)
        yield folder / "file"


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """An empty folder for the duration."""
    folder, lock = held_folder()
    try:
        yield folder
    finally:
        remove_held(folder, lock)


def held_folder() -> tuple[Path, int]:
    """As ``temporary_folder``, to be given to ``remove_held``."""
    _remove_left()
    folder = Path(tempfile.mkdtemp(prefix=f"ptqcli-temporary-{os.getpid()}-"))
    lock = os.open(folder, os.O_RDONLY)
    _is_locked(lock)
    return folder, lock


def remove_held(folder: Path, lock: int) -> None:
    """Remove what ``held_folder`` gave."""
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)


def growing_file(path: Path) -> tuple[Path, int]:
    """An empty file beside ``path``, in which that may grow, and a descriptor that locks it until it is closed.

    What processes that are gone have left of such files for this ``path`` goes.
    """
    ours = re.compile(rf"\.{re.escape(path.name)}\.(\d{{1,10}})-\w{{8}}\.partial")
    for name in os.listdir(path.parent):
        found = ours.fullmatch(name)
        if found is not None and not _lives(int(found[1])):
            _remove_if_left(path.parent / name, _is_a_file_alone, os.unlink, os.O_NONBLOCK)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.{os.getpid()}-", suffix=".partial", dir=path.parent)
    _is_locked(descriptor)
    return Path(name), descriptor


def _is_a_file_alone(found: os.stat_result) -> bool:
    return stat.S_ISREG(found.st_mode) and found.st_nlink == 1


def _remove_left() -> None:
    """Remove the folders of this user whose processes are gone: a name of ours, private, and locked by nobody."""
    place = Path(tempfile.gettempdir())
    for name in os.listdir(place):
        found = OURS.fullmatch(name)
        if found is not None and not _lives(int(found[1])):
            _remove_if_left(place / name, lambda left: stat.S_IMODE(left.st_mode) == 0o700, shutil.rmtree, os.O_DIRECTORY)


def _remove_if_left(path: Path, is_ours: Callable[[os.stat_result], bool], remove: Callable[[Path], object], flags: int) -> None:
    """Remove what is no link, belongs to this user, ``is_ours`` by its form, and is locked by nobody."""
    with suppress(OSError):  # another process of ours is doing the same
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | flags)
        try:
            found = os.fstat(descriptor)
            if found.st_uid == os.geteuid() and is_ours(found) and _is_locked(descriptor):
                remove(path)
        finally:
            os.close(descriptor)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _is_locked(descriptor: int) -> bool:
    """Lock an open folder until it is closed; False if somebody else has, or where there are no locks."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True
