"""SHA256SUMS: the size and the SHA-256 of each file that carries the model, so that a bit that changes on the way is found.

The file has the form that ``sha256sum -c SHA256SUMS`` reads; the sizes stand in comments above the lines, where that program passes over
them. It does not list itself, nor the model card and the report, which are changed later (``ptq eval --write-card``, ``ptq push``) and
which no program needs to run the model. Its text is settled by what it lists, down to the last character, so a bit that changes in it is
found as well.
"""

from __future__ import annotations

import hashlib
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ptqcli.checkpoint.auxiliary import belongs_to_a_checkpoint
from ptqcli.checkpoint.directory import PIECE, Directory
from ptqcli.errors import PTQError
from ptqcli.untrusted import read_bytes

CHECKSUMS_NAME = "SHA256SUMS"
MOST_BYTES = 1 << 20
HEADER = "# The files that carry this model, each with its bytes. To check them: ptq inspect --verify FOLDER, or sha256sum -c SHA256SUMS"
LISTED = re.compile(r"# (\d{1,18}) bytes\n([0-9a-f]{64})  ([^\n]+)\n")


@dataclass(frozen=True)
class Checksum:
    """Of one file. sha256: 64 hexadecimal digits."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Difference:
    """A file that is not what was written, and in which way."""

    file: str
    what: str


def write_checksums(folder: Directory) -> None:
    """Put SHA256SUMS into ``folder``, of every file of a checkpoint that was made there so far. To be called before card and report are."""
    digests = folder.digests()
    listed = [name for name in sorted(digests) if belongs_to_a_checkpoint(name) and _is_plain(name)]
    folder.write(CHECKSUMS_NAME, [_text({name: Checksum(folder.size_of(name), digests[name]) for name in listed})])


def read_checksums(folder: Path) -> dict[str, Checksum] | None:
    """What SHA256SUMS in ``folder`` lists, by file name; None where there is no such file.

    Raises PTQError for one that is not as it was written, or that names anything but files of a checkpoint.
    """
    path = folder / CHECKSUMS_NAME
    if not path.is_file():
        return None
    content = read_bytes(path, MOST_BYTES)
    found = LISTED.findall(content.decode(errors="replace"))
    listed = {name: Checksum(int(size), digest) for size, digest, name in found}
    if _text(listed) != content or not all(belongs_to_a_checkpoint(name) and _is_plain(name) for name in listed):
        raise PTQError(f"{path}: is damaged, or was not written by ptqcli")
    return listed


def differences(
    folder: Path, listed: Mapping[str, Checksum], on_bytes: Callable[[str, int], None] = lambda *_: None
) -> Iterator[Difference]:
    """Every file of ``folder`` that is not as ``listed``, and every safetensors file that is not listed at all.

    on_bytes: is told of the bytes of a file that were read since it was told last.
    """
    for name, checksum in listed.items():
        what = _difference(folder / name, checksum, lambda count, name=name: on_bytes(name, count))  # type: ignore[misc]
        if what is not None:
            yield Difference(name, what)
    for place in (folder, *(folder / name for name in sorted({str(Path(name).parent) for name in listed} - {"."}))):
        for path in sorted(place.glob("*.safetensors")):
            if str(path.relative_to(folder)) not in listed:
                yield Difference(str(path.relative_to(folder)), f"is not in {CHECKSUMS_NAME}: it was added later")


def _difference(path: Path, checksum: Checksum, on_bytes: Callable[[int], None]) -> str | None:
    """In which way a file is not what was written. What has another size, or is no file, is not read."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            return "is no file"
        if found.st_size != checksum.bytes:
            return f"has {found.st_size} bytes, and was written with {checksum.bytes}"
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while piece := file.read(PIECE):
                digest.update(piece)
                on_bytes(len(piece))
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None if digest.hexdigest() == checksum.sha256 else "does not have the SHA-256 with which it was written"


def _text(listed: dict[str, Checksum]) -> bytes:
    lines = [HEADER]
    for name, checksum in sorted(listed.items()):
        lines += [f"# {checksum.bytes} bytes", f"{checksum.sha256}  {name}"]
    return ("\n".join(lines) + "\n").encode()


def _is_plain(name: str) -> bool:
    """Whether a name stands in the file as it is: sha256sum has a way of its own to write others, which only licences could have."""
    return name.isprintable() and "\\" not in name
