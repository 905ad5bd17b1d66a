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
from collections.abc import Iterator
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


def _remove_left() -> None:
    """Remove the folders of this user whose processes are gone: a name of ours, private, and locked by nobody."""
    place = Path(tempfile.gettempdir())
    for name in os.listdir(place):
        found = OURS.fullmatch(name)
        if found is None or _lives(int(found[1])):
            continue
        with suppress(OSError):  # another process of ours is doing the same
            descriptor = os.open(place / name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                about = os.fstat(descriptor)
                if (about.st_uid, stat.S_IMODE(about.st_mode)) == (os.geteuid(), 0o700) and _is_locked(descriptor):
                    shutil.rmtree(place / name)
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
