"""What ``ptq compare`` and ``ptq eval`` do between their flags and their tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptqcli.cli.console import Output, path_text
from ptqcli.cli.load import tell_decoded
from ptqcli.cli.locate import find_checkpoint
from ptqcli.cli.progress import Tracker, track
from ptqcli.errors import PTQError, UsageError
from ptqcli.model.locate import find_model

if TYPE_CHECKING:
    from ptqcli.comparing.results import Compared, Measured
    from ptqcli.comparing.run import Settings

SECONDS_BETWEEN_LINES = 15.0


def find_checkpoints(names: Sequence[str]) -> dict[str, Path]:
    """What each is called -> where it is; without a name the newest one here. Raises UsageError for one not there, or named twice."""
    if not names:
        newest = find_checkpoint(None)
        return {path_text(newest): newest}
    folders = {name: find_checkpoint(name) for name in names}
    if len({folder.resolve() for folder in folders.values()}) < len(names):
        raise UsageError("a checkpoint is named twice; name each once")
    return folders


def common_baseline(folders: Mapping[str, Path], wanted: str | None, output: Output) -> Path | None:
    """The model that all are compared with: ``wanted``, or the one that their reports name; None where none names any, or it is gone.

    Raises UsageError where they name several.
    """
    from ptqcli.comparing.run import common_source

    named = find_model(wanted) if wanted is not None else common_source(folders)
    if named is not None and not named.exists():
        output.say(f"{named}, which the checkpoint came from, is gone; name it with --baseline to compare")
        return None
    return named


class _Told:
    """Hands on to a tracker and a terminal what a comparison tells."""

    def __init__(self, tracker: Tracker, output: Output, several: bool) -> None:
        self._tracker, self._output, self._several = tracker, output, several

    def say(self, text: str) -> None:
        self._output.say(text)

    def stage(self, text: str) -> None:
        self._tracker.say(text)

    def step(self, done: int, total: int, text: str) -> None:
        self._tracker.step(done, total, text)

    def found(self, measured: Measured) -> None:
        """Of several, what is known by now, for whoever interrupts the rest."""
        if self._several:
            numbers = (f"{each.text}: perplexity {each.perplexity:.4f}" + _kl_text(each.mean_kl) for each in measured.evaluations)
            self._tracker.remark(f"{measured.identity.name}: {'; '.join(numbers)}")


def _kl_text(mean_kl: float | None) -> str:
    return "" if mean_kl is None else f", mean KL {mean_kl:.5f}"


def measured_together(folders: Mapping[str, Path], reference: Path | None, settings: Settings, output: Output) -> Compared:
    """All that is found out about ``folders`` beside ``reference``."""
    from ptqcli.comparing.run import compare_checkpoints

    for folder in folders.values():
        tell_decoded(folder, output)
    with track("window", output.quiet, pause=SECONDS_BETWEEN_LINES) as tracker:
        return compare_checkpoints(folders, reference, settings, _Told(tracker, output, len(folders) > 1))


def write_files(found: Mapping[str, Any], flags: Mapping[str, Any], output: Output) -> None:
    """The files that the flags ask for. found: as ``Compared.to_json`` has it."""
    if not found["checkpoints"]:
        return
    if flags["csv"] is not None:
        from ptqcli.comparing.table import as_csv

        flags["csv"].write_text(as_csv(found), encoding="utf-8", newline="")
    if flags["html"] is not None:
        from ptqcli.comparing.page import as_page

        flags["html"].write_text(as_page(found), encoding="utf-8")
    if flags["plot"] is not None:
        from ptqcli.comparing.picture import draw

        draw(found, flags["plot"])
    for kind in ("csv", "html", "plot"):
        if flags[kind] is not None:
            output.say(f"{kind:10}  {path_text(flags[kind])}")


def raise_failures(found: Compared, asked: int) -> None:
    """Raise PTQError if a checkpoint has no numbers."""
    if found.failures:
        told = "; ".join(error if error.startswith(name) else f"{name}: {error}" for name, error in found.failures.items())
        raise PTQError(f"{len(found.failures)} of {asked} checkpoints could not be measured: {told}")
