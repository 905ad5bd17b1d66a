"""The output folder: claimed, grown, and put in its place when everything is in it.

A checkpoint grows in ``OUT.partial``, beside its final name, which a rename gives it at the end: ``OUT`` is the whole new checkpoint or as
it was. A checkpoint that is replaced changes places with the new one in one step; where the system cannot do that, it is moved aside, and
back if the run ends there, or when the next one begins. It is removed last. An output that is there and empty is written into, since it may
be a volume, or the folder that somebody works in; it is finished when its marker has gone.

Nothing is removed for its name alone. The working folder holds a marker (``output.Marker``), no other run can have it meanwhile
(``flock``), and it is reached by a descriptor, not by its path. A run that ends removes what it has made. What an earlier run has left is
removed only from a folder with a marker, or from the one that the marker of a finished checkpoint names by its inode, and never if there
is a file with a name that no checkpoint has.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ptqcli.calibration.hidden import ACTIVATIONS
from ptqcli.checkpoint.directory import Directory, named
from ptqcli.checkpoint.unfinished import JOURNAL, MARKER
from ptqcli.errors import MachineError, PTQError
from ptqcli.pipeline.journal import Journal
from ptqcli.pipeline.output import REPLACED, VOLUME_FILES, Marker, check_output, is_written_into, remove_checkpoint
from ptqcli.pipeline.report import LOGS, PARTIAL

EXCHANGE = 2  # RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS
KEPT = {MARKER, *LOGS}  # beside what the journal lists, for a run that goes on
CLAIMS = 20  # attempts to claim a folder that other runs remove meanwhile


def check_room(output: Path, needed: int) -> None:
    """Raise PTQError where ``output`` cannot be written, or its disk has less than ``needed`` bytes free. Makes nothing."""
    place = output.resolve()
    if not is_written_into(place):
        place = next(above for above in place.parents if above.exists())
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        raise PTQError(f"{place}: cannot write there; choose another --output")
    free = shutil.disk_usage(place).free
    if free < needed:
        raise PTQError(f"{place}: {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free; choose another --output")


@contextmanager
def growing(
    output: Path, model: Path | None, overwrite: bool, needed: int, inputs: Sequence[Path] = (), journal: Journal | None = None
) -> Iterator[Directory]:
    """The folder in which ``output`` grows. It is put in its place when the context ends well. When it does not, what the journal lists is
    kept, if there is something, and unless a PTQError tells that the run would not come further; else the folder is removed.

    model, inputs: what the run reads, see ``check_output``. needed: bytes of room. journal: looks for what an earlier run has left.

    Raises PTQError or UsageError for a place that cannot
    be had, and for a folder that was moved, deleted or replaced meanwhile. What ends the context is raised again; if anything of the run
    is left on disk, the message says so.
    """
    if sys.platform == "win32":
        raise PTQError("folders are written on Linux and macOS only; on Windows use WSL")
    run = _Growing(output, journal)
    try:
        run.begin(lambda: check_output(output, model, overwrite, inputs), needed)
        yield run.folder
        run.place()
    except BaseException as error:
        told = _told(error, run.end(may_go_on=not isinstance(error, PTQError) or isinstance(error, MachineError)))
        if told is error:
            raise
        raise told from error
    finally:
        run.close()


class _Growing:
    """One run's hold on its output. into: whether the output itself is the working folder."""

    def __init__(self, output: Path, journal: Journal | None) -> None:
        self.journal = journal
        self.output = output.resolve()  # a link stays, and the folder that it leads to is replaced
        self.into = is_written_into(self.output)
        self.name = self.output.name + ("" if self.into else PARTIAL)
        self.work = self.output.with_name(self.name)
        self._new_parents: list[Path] = []
        self._made = False  # whether the working folder is ours to remove
        self._claimed = False  # whether it is ours to write into
        self._finishing = False  # whether everything is in it
        self._keep = False  # whether it is finished and cannot have its name
        self._parent: Directory | None = None
        self._folder: Directory | None = None
        self._replaces: tuple[int, int] | None = None

    @property
    def parent(self) -> Directory:
        assert self._parent is not None
        return self._parent

    @property
    def folder(self) -> Directory:
        assert self._folder is not None
        return self._folder

    def close(self) -> None:
        for folder in (self._folder, self._parent):
            if folder is not None:
                folder.close()

    # The beginning

    def begin(self, check: Callable[[], None], needed: int) -> None:
        """Claim the working folder. check: is asked again when no other run can write there any more."""
        above = self.output.parent
        try:
            self._new_parents = [place for place in (above, *above.parents) if not place.exists()]
            above.mkdir(parents=True, exist_ok=True)
            check_room(self.output, needed)
            self._parent = Directory(above)
            for _ in range(CLAIMS):
                if self._claim(check):
                    return
        except OSError as error:
            raise PTQError(f"{error.filename}: cannot write there: {error.strerror}; choose another --output") from error
        raise PTQError(f"{self.work}: other runs take it again and again; choose another --output")

    def _claim(self, check: Callable[[], None]) -> bool:
        """Make or take the working folder, lock it and mark it; False if another run, which had made it, has removed it meanwhile."""
        self._made = True  # before it is so: an interruption may come right behind the call
        try:
            self.parent.make_folder(self.name)
        except FileExistsError:
            self._made = False
        try:
            self._folder = Directory(self.name, self.parent)
        except FileNotFoundError:
            return False
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                raise
            raise PTQError(f"{self.work}: is in the way and no folder; move it away, or choose another --output") from error
        lock(self.folder)
        self._settle()
        if self.parent.identity_of(self.name) == self.folder.identity:
            goes_on = self._clear_leftovers()
            self._made = not self.into
            check()
            self._replaces = None if self.into else self.parent.identity_of(self.output.name)
            self._claimed = True
            with suppress(FileNotFoundError):
                marker = Marker(output=self.output.name, into=self.into, replaces=self._replaces)
                (marker.replace if goes_on else marker.write)(self.folder)
                return True
        self._claimed = False
        self._folder.close()
        self._folder = None
        return False

    def _settle(self) -> None:
        """A checkpoint that has its name and still its marker: the run was ended before what it replaced was gone, which goes now."""
        if self.into or not self.output.is_dir():
            return
        placed = Directory(self.output.name, self.parent)
        try:
            marker = Marker.read(placed, self.output.name)
            if marker is not None and not marker.into:
                lock(placed)
                self._remove_replaced(placed, marker.replaces)
                _remove_notes(placed)
        finally:
            placed.close()

    def _clear_leftovers(self) -> bool:
        """Remove what a run that was ended has left in the working folder, but for what this one goes on from, and tell whether it does.

        Raises PTQError for anything else there.
        """
        names = [name for name in self.folder.names() if name not in VOLUME_FILES]
        if not names:
            return False
        marker = Marker.read(self.folder, self.output.name)
        if (marker is None or marker.into != self.into) and names != [MARKER]:  # a marker alone may be half-written
            raise PTQError(f"{self.work}: is in the way and holds {names[0]}; move it away, or choose another --output")
        if marker is not None:
            self._restore(marker.replaces)
        if self.journal is None and marker is not None and self.folder.identity_of(JOURNAL) is not None:
            raise PTQError(
                f"{self.work}: holds what a run of ptq quantize has finished, which can go on; remove it, or choose another --output"
            )
        if self.journal is not None and marker is not None and self.journal.look(self.folder):
            remove_checkpoint(self.folder, {*KEPT, *self.journal.files})
            return True
        remove_checkpoint(self.folder)
        return False

    # The end

    def place(self) -> None:
        """Give the folder its final name; what had it goes."""
        self.folder.sync()
        if self.parent.identity_of(self.name) != self.folder.identity:
            raise PTQError(f"{self.work}: was moved or removed while the run was at work; run it again")
        self._finishing = True
        if not self.into:
            try:
                self._rename()
            except (OSError, PTQError):
                self._keep = True
                raise
            self.parent.sync()
            self._remove_replaced(self.folder, self._replaces)
        _remove_notes(self.folder)

    def _rename(self) -> None:
        name = self.output.name
        if self.parent.identity_of(name) != self._replaces:
            raise PTQError(f"{self.output}: has changed while the run was at work, and is left as it is")
        if self._replaces is None:
            self.parent.rename(self.name, name)
        elif exchange(self.parent, self.name, self.parent, name):
            if self.parent.identity_of(self.name) != self._replaces:  # since the look above
                exchange(self.parent, self.name, self.parent, name)
                raise PTQError(f"{self.output}: has changed while the run was at work, and is left as it is")
        elif not self._is_placed():
            self._move(self.parent, name, self.folder, REPLACED)
            self.parent.rename(self.name, name)  # if this fails, end() moves the other back

    def end(self, may_go_on: bool) -> str:
        """Undo what is not finished; what there is to say of the folders, "" if the disk is as it was.

        may_go_on: what the journal lists is kept, since another attempt may come further.
        """
        if not self._claimed:
            if self._made and self._parent is not None:
                with suppress(OSError):  # not empty: another run has it
                    os.rmdir(self.name, dir_fd=self.parent.descriptor)
            self._remove_parents()
            return ""
        try:
            if self._is_placed():
                if not self.into:
                    self._remove_replaced(self.folder, self._replaces)
                _remove_notes(self.folder)
                return f"{self.output} is complete"
            self._restore(self._replaces)
            if self._keep:
                _remove_notes(self.folder)
                return f"the finished checkpoint lies in {self.work}"
            kept = self.journal.kept(self.folder) if may_go_on and self.journal is not None else ""
            if kept and self.journal is not None:
                self.folder.remove_made(but={*KEPT, *self.journal.files})
                return f"{kept} are kept in {self.work}: the same command goes on from there, with --restart it begins anew"
            self.folder.remove_made()
            if self._made:
                self.parent.remove_folder(self.name, self.folder.identity)
            self._remove_parents()
        except (OSError, PTQError, KeyboardInterrupt) as error:
            left = f"{self.output} is complete, but what it replaced is not gone" if self._is_placed() else f"{self.work} is left"
            return f"{left} ({_reason(error)})"
        return ""

    def _is_placed(self) -> bool:
        """Whether the output is finished, as the disk has it: an interruption may come between a step and our note of it."""
        if self.into:
            return self._finishing and self.folder.identity_of(MARKER) is None
        return self.parent.identity_of(self.output.name) == self.folder.identity

    def _restore(self, replaces: tuple[int, int] | None) -> None:
        """Move the checkpoint that was to be replaced back to its place, if it was moved aside."""
        if replaces is not None and self.folder.identity_of(REPLACED) == replaces:
            if self.parent.identity_of(self.output.name) is not None:
                raise PTQError(f"{self.work / REPLACED}: is what {self.output} was; move it away, or choose another --output")
            self._move(self.folder, REPLACED, self.parent, self.output.name)
            self.parent.sync()

    def _move(self, home: Directory, name: str, other: Directory, new: str) -> None:
        with named(other.path / new):
            os.rename(name, new, src_dir_fd=home.descriptor, dst_dir_fd=other.descriptor)

    def _remove_replaced(self, placed: Directory, replaces: tuple[int, int] | None) -> None:
        """Remove the checkpoint whose place another has taken, wherever it is now."""
        for home, name in ((self.parent, self.output.name + PARTIAL), (placed, REPLACED)):
            if replaces is not None and home.identity_of(name) == replaces:
                old = Directory(name, home)
                try:
                    remove_checkpoint(old)
                    home.remove_folder(name, replaces)
                finally:
                    old.close()

    def _remove_parents(self) -> None:
        """The folders above the output that were made for it, as far as nobody else uses them."""
        with suppress(OSError):
            for place in self._new_parents:
                place.rmdir()


def _remove_notes(folder: Directory) -> None:
    """What a run says of itself in a folder, when it is finished."""
    folder.remove(MARKER)
    folder.remove(JOURNAL)
    for name in folder.names():
        if name.startswith(ACTIVATIONS):
            folder.remove(name)
    folder.sync()


def _told(error: BaseException, left: str) -> BaseException:
    """``error``, or one that also says what it has left on disk."""
    if isinstance(error, KeyboardInterrupt):
        return KeyboardInterrupt(left or "nothing of it is left on disk")
    if isinstance(error, OSError) or (left and isinstance(error, Exception)):
        return PTQError("; ".join(filter(None, (_reason(error), left))))
    return error


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror is not None:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) if isinstance(error, (PTQError, OSError)) else f"{type(error).__name__} {error}".strip()


def exchange(home: Directory, name: str, other: Directory, its_name: str) -> bool:
    """Let ``name`` in one folder and ``its_name`` in another change places in one step; False where that cannot be done."""
    library = ctypes.CDLL(None)
    call = getattr(library, "renameat2", None) or getattr(library, "renameatx_np", None)
    return call is not None and call(home.descriptor, os.fsencode(name), other.descriptor, os.fsencode(its_name), EXCHANGE) == 0


def lock(folder: Directory) -> None:
    """Lock ``folder`` for as long as it is open; the lock ends with the process, however it ends."""
    import fcntl

    try:
        with named(folder.path):
            fcntl.flock(folder.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise PTQError(f"{folder.path}: another run is writing there; wait for it, or choose another --output") from error
