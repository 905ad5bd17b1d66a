"""Progress of long work, on stderr: a bar with the time left on a terminal, one plain line a step where nothing can be redrawn."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ptqcli.cli.console import open_console, time_text
from ptqcli.cli.signals import clean_up_first
from ptqcli.errors import printable

# Least seconds between plain lines about the parts of one step.
PART_PAUSE = 10.0


class Tracker(Protocol):
    """What a command tells while it works."""

    def say(self, text: str) -> None:
        """A new stage of the work begins; the steps that follow belong to it."""

    def note(self, text: str) -> None:
        """A detail of the step that is being done."""

    def remark(self, text: str) -> None:
        """Something that stays to be read."""

    def part(self, name: str, done: int, total: int, note: str = "") -> None:
        """``done`` of ``total`` pieces of the part ``name`` of a step are behind us; ``note`` says how it goes."""

    def step(self, done: int, total: int, text: str) -> None:
        """``done`` of ``total`` steps of this stage are behind us; ``text`` says how the last one went."""


class PartClock:
    """When the part began that is being worked on."""

    def __init__(self) -> None:
        self._name, self._start = "", 0.0

    def text(self, name: str, done: int, total: int, note: str) -> str:
        """How far it is, how it goes, and what is left: ``NAME 37%, NOTE, 20 s left``."""
        if name != self._name:
            self._name, self._start = name, time.monotonic()
        return ", ".join(filter(None, (f"{name} {done / total:.0%}", note, time_left(self._start, done, total))))


def time_left(start: float, done: int, total: int) -> str:
    """What remains if the steps go on as fast as since ``start`` (of the monotonic clock): ``40 s left``; "" at both ends.

    rich has such a column, but it looks back 30 seconds only, and a block may take minutes.
    """
    spent = time.monotonic() - start
    return f"{time_text(spent / done * (total - done))} left" if 0 < done < total else ""


class BarTracker:
    """A bar that appears with the first word, is redrawn in place, and is gone at the end."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=None, left="", note="")
        self._stage_start = time.monotonic()
        self._parts = PartClock()

    def say(self, text: str) -> None:
        self._stage_start = time.monotonic()
        clean_up_first()  # the bar hides the cursor
        self._bar.start()
        self._bar.reset(self._task, total=None, left="", note=printable(text))

    def note(self, text: str) -> None:
        self._bar.update(self._task, note=printable(text))

    def remark(self, text: str) -> None:
        self._bar.console.print(printable(text), soft_wrap=True)

    def part(self, name: str, done: int, total: int, note: str = "") -> None:
        self.note(self._parts.text(name, done, total, note))

    def step(self, done: int, total: int, text: str) -> None:
        left = time_left(self._stage_start, done, total)
        self._bar.update(self._task, completed=done, total=total, left=left, note=printable(text))


class LineTracker:
    """One line a stage and a step, but steps not more often than every ``pause`` seconds; of parts, one line in 10 seconds."""

    def __init__(self, console: Console, unit: str, pause: float) -> None:
        self._console = console
        self._unit = unit
        self._pause = pause
        self._stage_start = self._last_line = self._last_part = time.monotonic()
        self._parts = PartClock()

    def say(self, text: str) -> None:
        self._stage_start = self._last_line = time.monotonic()
        self._console.print(printable(text), soft_wrap=True)

    def note(self, text: str) -> None:
        pass

    def remark(self, text: str) -> None:
        self._console.print(printable(text), soft_wrap=True)

    def part(self, name: str, done: int, total: int, note: str = "") -> None:
        text, now = self._parts.text(name, done, total, note), time.monotonic()
        if now - max(self._last_part, self._last_line) >= PART_PAUSE:
            self._last_part = now
            self._console.print(printable(text), soft_wrap=True)

    def step(self, done: int, total: int, text: str) -> None:
        now = time.monotonic()
        if now - self._last_line < self._pause:
            return
        self._last_line = now
        parts = filter(None, (text, time_left(self._stage_start, done, total)))
        self._console.print(f"{self._unit} {done}/{total}: {printable(', '.join(parts))}", soft_wrap=True)


@contextmanager
def track(unit: str, quiet: bool = False, pause: float = 0.0) -> Iterator[Tracker]:
    """A tracker of steps named ``unit``, shown for as long as the context lasts. pause: least seconds between plain lines."""
    console = open_console(stderr=True, quiet=quiet)
    if quiet or not console.is_terminal or console.is_dumb_terminal:  # which cannot redraw a line
        yield LineTracker(console, unit, pause)
        return
    columns = (
        TextColumn(unit),
        MofNCompleteColumn(),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}  {task.fields[note]}", markup=False),
    )
    bar = Progress(*columns, console=console, transient=True)
    try:
        yield BarTracker(bar)
    finally:
        bar.stop()
