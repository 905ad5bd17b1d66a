"""What the commands show: lines, tables, and the one JSON object.

Names, reports and generated text come from files of others, and a terminal obeys what it is sent. So all text goes through ``printable``,
which shows control characters instead of sending them; JSON escapes them by itself.

With ``--json`` stdout carries the JSON object and nothing else; all that is for people goes to stderr. With ``--quiet`` nothing is
shown but errors.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ptqcli.errors import printable

PLAIN_WIDTH = 10_000  # columns where the output is no terminal: nothing is folded, so that each line can be searched for
USUAL_WIDTH = 80  # of a terminal that does not say
LEAST_TABLE_WIDTH = 60  # what a narrower terminal wraps is easier to read than columns of three letters
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def open_console(stderr: bool = False, quiet: bool = False) -> Console:
    """A rich console that neither cuts lines short nor colours numbers."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else PLAIN_WIDTH
    console = Console(file=stream, quiet=quiet, width=width, highlight=False, markup=False)
    if console.width < 1:  # COLUMNS=0
        console.width = USUAL_WIDTH
    return console


@dataclass(frozen=True)
class Output:
    """Where a command's words go. as_json: stdout is kept for the JSON object. quiet: no words at all."""

    as_json: bool = False
    quiet: bool = False
    console: Console = field(init=False)

    def __post_init__(self) -> None:
        console = open_console(stderr=self.as_json, quiet=self.quiet)
        console.width = max(console.width, LEAST_TABLE_WIDTH)
        object.__setattr__(self, "console", console)

    def say(self, text: str = "") -> None:
        """One plain line."""
        self.console.print(Text(printable(text)), soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, words: bool = False) -> None:
        """A table of numbers under a title; every column but the first is right-aligned. words: no numbers, so that none is."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for index, name in enumerate(columns):
            table.add_column(name, justify="right" if index and not words else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(printable, row))
        self.say()
        self.console.print(printable(title), style="bold")
        self._show(table)

    def facts(self, rows: Iterable[Sequence[str]]) -> None:
        """Names and what is to be said of them, one a line."""
        table = Table(box=None, pad_edge=False, show_header=False)
        for row in rows:
            while len(table.columns) < len(row):
                table.add_column(overflow="fold")
            table.add_row(*map(printable, row))
        self._show(table)

    def result(self, value: Any) -> None:
        """The JSON object, if it was asked for."""
        if self.as_json:
            print(json.dumps(value, indent=2))

    def _show(self, table: Table) -> None:
        # rich fills every line up with spaces, which a log or a pasted README would keep.
        with self.console.capture() as capture:
            self.console.print(table)
        for line in capture.get().splitlines():
            print(line.rstrip(), file=self.console.file)


def size_text(count: float) -> str:
    """A number of bytes as people read it: ``11.3 MiB``."""
    for unit in UNITS:
        if abs(count) < 1024 or unit == UNITS[-1]:
            break
        count /= 1024
    return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"


def time_text(seconds: float) -> str:
    """A duration as people read it: ``0.8 s``, ``75 s``, ``12 min``, ``2 h 05 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def path_text(path: Path) -> str:
    """A path relative to the working directory when it lies below it, such that it can be typed: not a flag, if it begins with a dash."""
    here = Path.cwd()
    text = str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
    return f"./{text}" if text.startswith("-") else text
