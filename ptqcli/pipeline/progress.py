"""How a run tells how far it is."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from ptqcli.plan import Plan


class Progress(Protocol):
    """Who wants to know how far the work is."""

    def planned(self, plan: Plan, output: Path) -> None:
        """Everything is decided, and ``output`` will hold the checkpoint; the inputs are opened, and work begins."""

    def phase(self, text: str) -> None:
        """What is being done now, in words."""

    def remark(self, text: str) -> None:
        """Something that a person should know before the work goes on."""

    def block_started(self, index: int, count: int) -> None:
        """Block ``index`` of ``count`` begins."""

    def detail(self, text: str) -> None:
        """What is being done inside a block, in words."""

    def layer_progress(self, name: str, done: int, total: int, note: str = "") -> None:
        """``done`` of ``total`` pieces of the work on one linear or block are behind us, and how it goes; only slow solvers tell."""

    def layer_done(self, name: str, error: float) -> None:
        """A linear has its codes; ``error`` is its relative output error."""

    def block_done(self, index: int, count: int) -> None:
        """Block ``index`` of ``count`` is written."""


class NoProgress:
    """A progress that ignores everything."""

    def planned(self, plan: Plan, output: Path) -> None:
        pass

    def phase(self, text: str) -> None:
        pass

    def remark(self, text: str) -> None:
        pass

    def block_started(self, index: int, count: int) -> None:
        pass

    def detail(self, text: str) -> None:
        pass

    def layer_progress(self, name: str, done: int, total: int, note: str = "") -> None:
        pass

    def layer_done(self, name: str, error: float) -> None:
        pass

    def block_done(self, index: int, count: int) -> None:
        pass
