"""What stands in somebody else's file, before anything in it is believed.

Whoever wrote a model folder or a recipe may have meant harm, and a disk may have done some. So a file is opened only if it is one, and no
larger than any that is meant for this use; JSON may not nest deeper than any real one; and whatever a library raises over such a file,
which is seldom what its documentation says, becomes one line that names the file.
"""

from __future__ import annotations

import json
import os
import reprlib
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ptqcli.errors import PTQError

# The index of a model with 200,000 tensors takes 23 MB, and what Python makes of JSON ten times as much.
MOST_JSON_BYTES = 32 << 20
# Real files nest some ten levels. Python's own limit is higher, and then other code fails on copying or writing the value.
DEEPEST = 64

_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = _SHOWN.maxlong = 100


def shown(value: object) -> str:
    """``value`` as Python writes it, cut short: what a message quotes of a file. Never longer than a few lines, whatever the value."""
    try:
        return _SHOWN.repr(value)
    except ValueError:  # Python refuses to write a number of more than 4,300 digits
        return f"a number of type {type(value).__name__}"


def one_line(error: BaseException) -> str:
    """What an error says, as one line of bounded length, to stand inside a message; the name of its class if it says nothing."""
    return " ".join(str(error)[:3_000].split())[:300].rstrip(".") or type(error).__name__


@contextmanager
def foreign(what: str, advice: str = "") -> Iterator[None]:
    """For a call of a library that reads somebody's file: whatever it raises becomes a PTQError, ``what (the library's words)advice``.

    A broad net, and only here: these readers raise whatever the code behind them happens to stumble over, tokenizers a bare
    Exception and, where its Rust code panics, what is no Exception at all. PTQErrors, Ctrl-C and the like pass through.
    """
    try:
        yield
    except BaseException as error:
        panicked = type(error).__module__ == "pyo3_runtime"
        if isinstance(error, PTQError) or not (panicked or isinstance(error, Exception)):
            raise
        raise PTQError(f"{what} ({one_line(error)}){advice}") from error


def read_bytes(path: Path, most: int) -> bytes:
    """A whole file of at most ``most`` bytes. Raises PTQError, naming it, for a larger one, for what is no file (a pipe, a device, a
    folder), and for one that cannot be read."""
    with _opened(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise PTQError(f"{path}: is larger than {most >> 10} KiB, which no file of this kind is")
    return data


def read_lines(path: Path, longest: int, most: int) -> Iterator[bytes]:
    """The first ``most`` lines of a file, one in memory at a time; what is longer than ``longest`` bytes comes in pieces. Raises PTQError
    as ``read_bytes``."""
    with _opened(path) as file:
        for _ in range(most):
            line = file.readline(longest)
            if not line:
                return
            yield line


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """A file to be read. Raises PTQError, naming it, for what is none, and where it cannot be read."""
    try:
        # Not blocking: otherwise opening a pipe waits until somebody writes into it.
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise PTQError(f"{path}: is no file but a pipe, a device or the like")
            yield file
    except (OSError, ValueError) as error:  # the latter for a name that no file can have
        raise PTQError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or one_line(error)}") from error


def read_text(path: Path, most: int) -> str:
    """As ``read_bytes``, decoded. Raises PTQError, too, for what is not UTF-8."""
    try:
        return read_bytes(path, most).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PTQError(f"{path}: is not UTF-8 text (byte {error.start})") from error


def read_json(path: Path, most: int = MOST_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file. Raises PTQError, naming the file, for anything else, and for values that cannot be handed on: deeper than
    ``DEEPEST``, numbers of thousands of digits, half surrogate pairs."""
    text = read_text(path, most)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PTQError(f"{path}: is not valid JSON ({one_line(error)})") from error
    if not isinstance(value, dict):
        raise PTQError(f"{path}: is no JSON object but {shown(value)}")
    _check_values(value, path)
    return value


def _check_values(value: Any, path: Path) -> None:
    level: list[Any] = [value]
    for _ in range(DEEPEST):
        inner: list[Any] = []
        for entry in level:
            if isinstance(entry, dict):
                inner += entry.keys()
                inner += entry.values()
            elif isinstance(entry, list):
                inner += entry
            elif isinstance(entry, str) and not encodes(entry):
                raise PTQError(f"{path}: {shown(entry)} holds half a surrogate pair, which is no character")
        level = inner
    if level:
        raise PTQError(f"{path}: nests deeper than {DEEPEST} levels")


def encodes(text: str) -> bool:
    """Whether ``text`` can be written as UTF-8: half a surrogate pair, which JSON and YAML can escape, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
