"""A folder held open, so that what is written and removed stays in that very folder.

While a run is at work its path may come to mean something else: the folder is moved or deleted, a link is put in its place. Everything here
goes through a descriptor of the folder instead. Files are created only where nothing is (``O_EXCL``) and no link is followed. What was
created is remembered with the SHA-256 of the bytes that were handed over, so that a run can compare them with the disk, and remove its
own work and nothing else. Every OSError that leaves this module names a whole path.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ptqcli.errors import PTQError

PIECE = 16 << 20  # bytes that are read or written at once

# In the place of the SHA-256 of a file that was made.
ASKED_FOR, UNFINISHED, GROWING = "asked for", "unfinished", "growing"


class Directory:
    """An open folder; with ``within``, the one of that name in another. A link is no folder.

    path: for messages, and for libraries that open files by name. made: what was created here, oldest first, with the SHA-256 of its bytes,
    or how far it is.
    """

    def __init__(self, path: str | Path, within: Directory | None = None) -> None:
        self.path: Path = Path(path) if within is None else within.path / path
        with named(self.path):
            flags = os.O_RDONLY | os.O_DIRECTORY | (0 if within is None else os.O_NOFOLLOW)
            self.descriptor: int = os.open(path, flags, dir_fd=None if within is None else within.descriptor)
        self.made: dict[str, str] = {}
        self._folders: list[str] = []  # the names of those that were made, or asked for
        self._inside: dict[str, Directory] = {}

    def close(self) -> None:
        """Give the descriptors back."""
        for folder in self._inside.values():
            folder.close()
        os.close(self.descriptor)

    # What it is, and what is in it

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode, which tell it from any other folder that exists."""
        found = os.fstat(self.descriptor)
        return found.st_dev, found.st_ino

    def identity_of(self, name: str) -> tuple[int, int] | None:
        """Device and inode of what is called ``name`` here, None for nothing. A link counts by itself."""
        try:
            with named(self.path / name):
                found = os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return None
        return found.st_dev, found.st_ino

    def names(self) -> list[str]:
        """Everything in it, sorted; a folder's name ends in ``/``."""
        with named(self.path), os.scandir(self.descriptor) as entries:
            return sorted(entry.name + ("/" if entry.is_dir(follow_symlinks=False) else "") for entry in entries)

    def pieces(self, name: str) -> Iterator[bytes]:
        """The bytes of a file, from the disk where the system lets go of what it holds in memory."""
        path = self.path / name
        with named(path):
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=self.descriptor)
        try:
            with named(path):
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise PTQError(f"{path}: is no file")
                if hasattr(os, "posix_fadvise"):
                    with suppress(OSError):  # a file system that keeps nothing
                        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            while piece := _read(descriptor, path):
                yield piece
        finally:
            os.close(descriptor)

    # Files that are made here

    def write(self, name: str, pieces: Iterable[Any]) -> None:
        """Create the file ``name`` of ``pieces``, buffers of bytes, and force it to the disk. ``folder/name`` makes the folder, too.

        Raises FileExistsError if there is anything of that name.
        """
        folder, _, leaf = name.rpartition("/")
        if folder:
            self._subfolder(folder).write(leaf, pieces)
            return
        path, digest = self.path / name, hashlib.sha256()
        self.made[name] = ASKED_FOR  # before it is there: an interruption may come right behind the call
        try:
            with named(path):
                descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666, dir_fd=self.descriptor)
        except OSError:
            del self.made[name]
            raise
        self.made[name] = UNFINISHED
        try:
            for piece in pieces:
                digest.update(piece)
                with named(path):
                    rest = memoryview(piece)
                    while rest:
                        rest = rest[os.write(descriptor, rest) :]
            with named(path):
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self.made[name] = digest.hexdigest()

    def append(self, name: str) -> int:
        """A descriptor that writes to the end of the file ``name``, behind a whole line: a log, which is made here but not compared.

        What has its name and is no file of this user's alone, such as a link, goes.
        """
        with named(self.path / name):
            try:
                found = os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)
                if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_nlink != 1:
                    os.unlink(name, dir_fd=self.descriptor)
            except FileNotFoundError:
                pass
            self.made[name] = GROWING
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
            descriptor = os.open(name, flags, 0o666, dir_fd=self.descriptor)
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                os.write(descriptor, b"\n")  # the line in which a run was ended
            return descriptor

    def replace(self, name: str, pieces: Iterable[Any]) -> None:
        """``write`` in the place of what is called ``name``, if anything is, in one step that lasts."""
        temporary = f"{name}.tmp"
        self.remove(temporary)
        self.write(temporary, pieces)
        self.rename(temporary, name, self.identity_of(name))
        self.sync()

    def read_own(self, name: str, most: int) -> bytes | None:
        """The bytes of a file that another process of this user has made; None for nothing, or something else: a link, a larger file."""
        try:
            found = os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return None
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_nlink != 1 or found.st_size > most:
            return None
        return b"".join(self.pieces(name))

    def read(self, name: str) -> bytes:
        """The bytes of a file that was made here. Raises PTQError if they are not those that were written."""
        content = b"".join(self.pieces(name))
        self._compare(name, hashlib.sha256(content).hexdigest())
        return content

    def adopt(self, name: str, digest: str) -> None:
        """Take a file that an earlier run has made, of this SHA-256, for one that was made here."""
        self.made[name] = digest

    def check(self) -> None:
        """Compare every file that was made here with what was written. Raises PTQError, naming it, for one that is gone or differs."""
        for name, digest in self.made.items():
            if digest != GROWING:
                self.check_file(name)
        for folder in self._inside.values():
            folder.check()

    def check_file(self, name: str, advice: str = "") -> None:
        """``check`` of one file. advice: ends the message for one that is gone or differs."""
        digest = hashlib.sha256()
        try:
            for piece in self.pieces(name):
                digest.update(piece)
        except FileNotFoundError as error:
            raise PTQError(f"{self.path / name}: has gone while the run was at work{advice or '; run it again'}") from error
        self._compare(name, digest.hexdigest(), advice)

    def _compare(self, name: str, digest: str, advice: str = "") -> None:
        if digest != self.made[name]:
            wrong = "does not hold what was written; the disk is failing or another program writes there"
            raise PTQError(f"{self.path / name}: {wrong}{advice}")

    def rename(self, old: str, new: str, replaced: tuple[int, int] | None = None) -> None:
        """Rename what is called ``old``. Raises FileExistsError if there is anything that is called ``new``, but for what has the identity
        ``replaced``, which goes in the same step.
        """
        if self.identity_of(new) not in (None, replaced):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self.path / new))
        if old in self.made:
            self.made[new] = self.made[old]
        with named(self.path / new):
            os.rename(old, new, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)
        self.made.pop(old, None)

    def remove(self, name: str) -> None:
        """Remove a file, or the link itself; nothing if it is gone already."""
        with suppress(FileNotFoundError), named(self.path / name):
            os.unlink(name, dir_fd=self.descriptor)
        self.made.pop(name, None)

    def remove_folder(self, name: str, identity: tuple[int, int]) -> None:
        """Remove the empty folder ``name``, if it is still the one of this identity."""
        if self.identity_of(name) == identity:
            with named(self.path / name):
                os.rmdir(name, dir_fd=self.descriptor)

    def digests(self) -> dict[str, str]:
        """The SHA-256 of all files that were made here, by name; names in a folder that was made begin with its name."""
        inside = {f"{name}/{leaf}": digest for name, folder in self._inside.items() for leaf, digest in folder.made.items()}
        return {**self.made, **inside}

    def made_names(self) -> list[str]:
        """The names of all files that were made here, as in ``digests``, sorted."""
        return sorted(self.digests())

    def size_of(self, name: str) -> int:
        """Bytes of the file ``name``, which may lie in a folder that was made here."""
        folder, _, leaf = name.rpartition("/")
        home = self._inside[folder] if folder else self
        with named(self.path / name):
            return os.stat(leaf, dir_fd=home.descriptor, follow_symlinks=False).st_size

    def remove_made(self, but: Collection[str] = ()) -> None:
        """Remove what was made here, the latest first, and nothing else. but: files that stay."""
        for folder in self._inside.values():
            folder.remove_made()
        for name in self._folders:
            identity = self.identity_of(name)
            if identity is not None:
                self.remove_folder(name, identity)
        for name in reversed(list(self.made)):
            if name not in but and (self.made[name] != ASKED_FOR or self._is_empty_file(name)):
                self.remove(name)

    def _is_empty_file(self, name: str) -> bool:
        try:
            found = os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return stat.S_ISREG(found.st_mode) and found.st_size == 0

    def sync(self) -> None:
        """Make what was created, renamed and removed here durable."""
        for folder in self._inside.values():
            folder.sync()
        try:
            with named(self.path):
                os.fsync(self.descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # some file systems over a network have no such thing
                raise

    def make_folder(self, name: str) -> None:
        """Create the folder ``name``. Raises FileExistsError if there is anything of that name."""
        with named(self.path / name):
            os.mkdir(name, dir_fd=self.descriptor)

    def _subfolder(self, name: str) -> Directory:
        if name not in self._inside:
            self._folders.append(name)
            self.make_folder(name)
            self._inside[name] = Directory(name, self)
        return self._inside[name]


@contextmanager
def named(path: str | Path) -> Iterator[None]:
    """Whatever fails in the context names ``path``: a call by descriptor tells a bare name, and one that reads or writes none at all."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _read(descriptor: int, path: Path) -> bytes:
    with named(path):
        return os.read(descriptor, PIECE)
