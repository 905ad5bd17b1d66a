"""Standard output and error that outlive their readers.

Words that cannot be shown (a closed pipe, a full disk, a terminal that is gone) must not end hours of work, so writing to these streams
never raises: what cannot be written is dropped, and the reason is kept. Whether that matters is decided when the work is done.
"""

from __future__ import annotations

import io
import os
import select
import sys
from typing import Any


class LastingStream(io.RawIOBase):
    """The raw end of ``stream``. failure: why something was dropped, None as long as all is written; then nothing more is tried."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream  # which would close its raw end if nobody held it
        self._raw = getattr(stream.buffer, "raw", stream.buffer)  # `python -u` has no buffer between them
        self.failure: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return int(self._raw.fileno())

    def isatty(self) -> bool:
        return bool(self._raw.isatty())

    def write(self, data: Any) -> int:
        while self.failure is None:
            try:
                written: int | None = self._raw.write(data)
            except OSError as error:
                self.failure = error
                break
            if written is not None:
                return written
            select.select([], [self._raw], [])  # another program has made the terminal or pipe non-blocking, and it is full
        return memoryview(data).nbytes


def protect_streams() -> None:
    """Put lasting streams in the place of stdout and stderr; where a shell has closed one (``>&-``), words go nowhere.

    A character that the terminal's encoding lacks is written as its number.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # and the next file that is opened would get its number
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  for as long as the process lives
            continue
        lasting = io.TextIOWrapper(
            io.BufferedWriter(LastingStream(stream)),
            encoding=stream.encoding,
            errors="backslashreplace",
            line_buffering=True,  # so that a file that holds both streams has them in order
            write_through=stream.write_through,
        )
        setattr(sys, name, lasting)


def output_failure() -> OSError | None:
    """Why standard output is not complete, None if it is."""
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw.failure if isinstance(raw, LastingStream) else None
