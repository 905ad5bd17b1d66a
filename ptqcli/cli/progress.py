"""Progress of long work, on stderr: a bar with the time left on a terminal, one plain line a step where the output goes to a file."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ptqcli.cli.console import open_console, time_text


class Tracker(Protocol):
    """What a command tells while it works."""

    def note(self, text: str) -> None:
        """What is being done now."""

    def step(self, done: int, total: int, text: str) -> None:
        """``done`` of ``total`` steps are behind us; ``text`` says how the last one went."""


class BarTracker:
    """A bar that is redrawn in place and gone at the end."""

    def __init__(self, bar: Progress, unit: str) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=None, note="", unit=unit)

    def note(self, text: str) -> None:
        self._bar.update(self._task, note=text)

    def step(self, done: int, total: int, text: str) -> None:
        self._bar.update(self._task, completed=done, total=total, note=text)


class LineTracker:
    """One line a step, but not more than one in ``pause`` seconds; notes are left out. A log would fill up with all of them."""

    def __init__(self, console: Console, unit: str, pause: float) -> None:
        self._console = console
        self._unit = unit
        self._pause = pause
        self._start = self._last_line = time.monotonic()

    def note(self, text: str) -> None:
        pass

    def step(self, done: int, total: int, text: str) -> None:
        now = time.monotonic()
        if now - self._last_line < self._pause:
            return
        self._last_line = now
        spent = now - self._start
        left = f", {time_text(spent / done * (total - done))} left" if done < total else ""
        self._console.print(f"{self._unit} {done}/{total}: {text}{left}", soft_wrap=True)


@contextmanager
def track(unit: str, quiet: bool = False, pause: float = 0.0) -> Iterator[Tracker]:
    """A tracker of steps named ``unit``, shown for as long as the context lasts. pause: least seconds between plain lines."""
    console = open_console(stderr=True, quiet=quiet)
    if quiet or not console.is_terminal:
        yield LineTracker(console, unit, pause)
        return
    columns = (
        TextColumn("{task.fields[unit]} {task.completed}/{task.total}"),
        BarColumn(bar_width=24),
        TimeRemainingColumn(),
        TextColumn("left  {task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        yield BarTracker(bar, unit)
