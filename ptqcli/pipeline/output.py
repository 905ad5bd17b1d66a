"""Whether an output may be written or replaced, and the marker by which a working folder is known to be ours."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import ptqcli
from ptqcli.calibration.hidden import ACTIVATIONS
from ptqcli.checkpoint.auxiliary import belongs_to_a_checkpoint, is_folder_of_a_checkpoint
from ptqcli.checkpoint.directory import Directory
from ptqcli.checkpoint.unfinished import JOURNAL, MARKER
from ptqcli.errors import PTQError, UsageError
from ptqcli.pipeline.card import CARD_NAME, is_card
from ptqcli.pipeline.report import LOGS, PARTIAL, REPORT_NAME, read_report

REPLACED = "replaced"  # in that folder, the checkpoint that is being replaced, where two folders cannot change places in one step
MARKER_BYTES = 4096
JOURNAL_BYTES = 1 << 30
OWN_FILES = (MARKER, f"{MARKER}.tmp", JOURNAL, f"{JOURNAL}.tmp", *LOGS)
VOLUME_FILES = {"lost+found/"}  # what an empty volume holds

PATH_BYTES = 4096  # longest path that Linux takes, its end included
LONGEST_INSIDE = 64  # bytes of the names that are made in the folder, but for the model's own files


@dataclass(frozen=True, kw_only=True)
class Marker:
    """What a run says of its working folder, in a file in it.

    output: the name of the output. into: whether the folder is the output itself, which was empty. replaces: device and inode of the folder
    that the output was when the run began.
    """

    output: str
    into: bool
    replaces: tuple[int, int] | None

    def write(self, folder: Directory) -> None:
        """Put it into ``folder``. Raises FileExistsError if anything has its name."""
        folder.write(MARKER, [self._text()])

    def replace(self, folder: Directory) -> None:
        """Put it in the place of the one that is in ``folder``."""
        folder.replace(MARKER, [self._text()])

    def _text(self) -> bytes:
        about = "`ptq quantize` is writing here, or was ended while it did; its next run with this output goes on, or removes what is left"
        return json.dumps({"about": about, "ptqcli": ptqcli.__version__, **asdict(self)}, indent=2).encode()

    @classmethod
    def read(cls, folder: Directory, output: str) -> Marker | None:
        """The marker in ``folder`` for this output; None if there is none, or something else: a link, a file of another user."""
        try:
            content = folder.read_own(MARKER, MARKER_BYTES)
            if content is None:
                return None
            values = json.loads(content)
            replaces = values["replaces"]
            marker = cls(output=values["output"], into=values["into"] is True, replaces=None if replaces is None else tuple(replaces))
        except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
            return None
        return marker if marker.output == output else None


def check_output(output: Path, model: Path | None, overwrite: bool, inputs: Sequence[Path] = ()) -> None:
    """Raise UsageError when ``output`` must not be written.

    model: the folder of the model, None for one in memory. inputs: what else the run reads.
    """
    try:
        resolved = output.resolve()
    except (OSError, RuntimeError) as error:  # before Python 3.13 a RuntimeError
        raise UsageError(f"{output}: is a link that leads back to itself; choose another --output") from error
    except ValueError as error:
        raise UsageError(f"{str(output)!r}: is no path ({error}); choose another --output") from error
    if resolved == resolved.parent:
        raise UsageError(f"{output}: is the root of the file system; choose another --output")
    _check_outside(output, resolved, model, inputs)
    into = is_written_into(resolved)
    _check_names(output, resolved, "" if into else PARTIAL)
    if into or not os.path.lexists(resolved):
        return
    if not resolved.is_dir():
        raise UsageError(f"{output}: is a file; choose another --output")
    _check_sources(output, resolved, model, inputs)
    if not overwrite:
        raise UsageError(f"{output}: already exists; choose another --output, or replace it with --overwrite")
    _check_replaceable(output, resolved)


def is_written_into(output: Path) -> bool:
    """Whether ``output`` is a folder that stays: it is empty, or a run began to write into it when it was."""
    if not os.path.isdir(output):
        return False
    folder = Directory(output)
    try:
        marker = Marker.read(folder, output.name)
        return set(folder.names()) <= {MARKER, *VOLUME_FILES} or (marker is not None and marker.into)
    finally:
        folder.close()


def foreign_names(folder: Directory) -> Iterator[str]:
    """What `ptq quantize` cannot have written into ``folder``, going by the names."""
    for name in folder.names():
        if name.endswith("/") and is_folder_of_a_checkpoint(name[:-1]):
            inside = Directory(name[:-1], folder)
            try:
                yield from (f"{name}{leaf}" for leaf in inside.names() if not belongs_to_a_checkpoint(f"{name}{leaf}"))
            finally:
                inside.close()
        elif name in VOLUME_FILES:
            continue
        elif not (belongs_to_a_checkpoint(name) or name in (*OWN_FILES, REPORT_NAME, f"{REPORT_NAME}.tmp") or name.startswith(ACTIVATIONS)):
            yield name


def remove_checkpoint(folder: Directory, but: Collection[str] = ()) -> None:
    """Remove all files of a checkpoint, finished or not; the folder stays, and files of the names ``but``.

    Raises PTQError, before anything goes, if there is anything else in it. To be called for a folder that is proved to be ours.
    """
    foreign = next(foreign_names(folder), None)
    if foreign is not None:
        raise PTQError(f"{folder.path}: holds {foreign}, which ptq quantize did not write; move it away, or choose another --output")
    for name in sorted(set(folder.names()) - VOLUME_FILES - set(but), key=lambda name: name == MARKER):  # the proof goes last
        if name.endswith("/"):
            inside = Directory(name[:-1], folder)
            try:
                for leaf in inside.names():
                    inside.remove(leaf)
                folder.remove_folder(name[:-1], inside.identity)
            finally:
                inside.close()
        else:
            folder.remove(name)


def _check_names(output: Path, resolved: Path, ending: str) -> None:
    """Every name that will be made is checked before the work; the output's is the longest while it has its ``ending``."""
    parent = next(place for place in resolved.parents if os.path.isdir(place))
    made = [*resolved.relative_to(parent).parts[:-1], resolved.name + ending]
    longest = max(made, key=lambda name: len(os.fsencode(name)))
    limit = os.pathconf(parent, "PC_NAME_MAX")
    if len(os.fsencode(longest)) > limit:
        more = f" with {ending}, under which it is written" if ending and longest == made[-1] else ""
        raise UsageError(
            f"{output}: {longest[:40]}... takes {len(os.fsencode(longest))} bytes{more}, and names there {limit}; choose a shorter --output"
        )
    if len(os.fsencode(resolved)) + len(ending) + LONGEST_INSIDE >= PATH_BYTES:
        raise UsageError(f"{str(output)[:40]}...: the path is too long for the files in it; choose a shorter --output")


def _check_outside(output: Path, resolved: Path, model: Path | None, inputs: Sequence[Path]) -> None:
    """A checkpoint in the folder of a model would go with it when that is copied, moved or removed. A folder of texts is no such folder:
    what lies in its subfolders is not read, and it may be the one that the user works in."""
    above = [place for place in resolved.parents if os.path.exists(place)]  # also of names that are too long
    for source in filter(None, (model, *inputs)):
        if os.path.isfile(source / "config.json") and any(os.path.samefile(place, source) for place in above):
            raise UsageError(f"{output}: lies in {source}, the folder of a model that this run reads; choose an --output outside of it")


def _check_sources(output: Path, resolved: Path, model: Path | None, inputs: Sequence[Path]) -> None:
    """Nothing that the run reads may go with what it replaces, by whatever links or mounts it is reached."""
    if model is not None and os.path.samefile(model, resolved):
        raise UsageError(f"{output}: is the model itself; choose another --output")
    for source in filter(None, (model, *inputs)):
        for file in (source, *(source.iterdir() if source.is_dir() else ())):
            real = file.resolve()
            if any(os.path.samefile(place, resolved) for place in (real, *real.parents) if place.exists()):
                raise UsageError(f"{output}: holds {real}, which this run reads; choose another --output")


def _check_replaceable(output: Path, resolved: Path) -> None:
    try:
        report = read_report(resolved)
    except PTQError as error:
        raise UsageError(f"{output}: will not be replaced, since its report is damaged ({error}); choose another --output") from error
    folder = Directory(resolved)
    try:
        marker = Marker.read(folder, resolved.name)
        ours = marker is not None and marker.replaces is not None and folder.identity_of(REPLACED) == marker.replaces
        added = _added_files(folder, report["files"]) if report is not None and "files" in report else []
        foreign = next((name for name in (*foreign_names(folder), *added) if not (ours and name == f"{REPLACED}/")), None)
        if foreign is None and not _has_our_card(folder):
            foreign = CARD_NAME
    finally:
        folder.close()
    if report is None:
        raise UsageError(f"{output}: was not written by ptq quantize and will not be replaced; choose another --output")
    if foreign is not None:
        raise UsageError(f"{output}: holds {foreign}, which ptq quantize did not write; move it away, or choose another --output")
    if _is_mount_point(resolved):
        raise UsageError(f"{output}: is a mount point and cannot be replaced; empty it, or choose a folder in it: --output {output}/NAME")
    if not os.access(resolved, os.W_OK | os.X_OK):
        raise UsageError(f"{output}: what is in it may not be removed by this user; choose another --output")


def _added_files(folder: Directory, files: Sequence[str]) -> list[str]:
    """What is in ``folder`` and not among ``files``, those that the run has written there; what it writes in every folder is left out."""
    known = {*files, *(f"{file.partition('/')[0]}/" for file in files if "/" in file), *OWN_FILES, REPORT_NAME, CARD_NAME, *VOLUME_FILES}
    return [name for name in folder.names() if name not in known]


def _has_our_card(folder: Directory) -> bool:
    """False for a README that somebody else wrote, or a link to one."""
    if folder.identity_of(CARD_NAME) is None:
        return True
    try:
        return is_card(next(folder.pieces(CARD_NAME), b"").decode(errors="replace"))
    except (OSError, PTQError):
        return False


def _is_mount_point(folder: Path) -> bool:
    """Also for a folder that is mounted on another one of the same device, which ``os.path.ismount`` takes for a plain folder."""
    if os.path.ismount(folder):
        return True
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False  # not Linux
    escaped = os.fsencode(folder).replace(b"\\", b"\\134").replace(b" ", b"\\040").replace(b"\t", b"\\011").replace(b"\n", b"\\012")
    return any(line.split(b" ")[4] == escaped for line in lines)
