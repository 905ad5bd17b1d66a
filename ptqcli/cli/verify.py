"""``ptq inspect --verify``: whether a checkpoint is still what was written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ptqcli.cli.console import Output, path_text, size_text
from ptqcli.cli.progress import Tracker, track
from ptqcli.errors import PTQError

if TYPE_CHECKING:
    from ptqcli.pipeline.verifying import Verified

MOST_FLAWS = 20  # that are shown; the JSON object has all of them
NO_CHECKSUMS = "none: no SHA256SUMS is here, as in what other programs wrote; a bit that changed into a number in range cannot be seen"
SECONDS_BETWEEN_LINES = 10.0


def show_verified(checkpoint: Path, output: Output) -> None:
    """Verify ``checkpoint`` and say what was found, a line each. Raises PTQError if anything is wrong."""
    from ptqcli.pipeline.progress import NoProgress
    from ptqcli.pipeline.verifying import verify

    class Telling(NoProgress):
        """Hands on to a tracker."""

        def __init__(self, tracker: Tracker) -> None:
            self._tracker = tracker

        def phase(self, text: str) -> None:
            self._tracker.say(text)

        def step(self, done: int, total: int, text: str) -> None:
            self._tracker.step(done, total, text)

    with track("", pause=SECONDS_BETWEEN_LINES) as tracker:
        found = verify(checkpoint, Telling(tracker))
    for difference in found.differences:
        output.say(f"{difference.file}: {difference.what}")
    for flaw in found.flaws[:MOST_FLAWS]:
        output.say(flaw)
    if len(found.flaws) > MOST_FLAWS:
        output.say(f"and {len(found.flaws) - MOST_FLAWS} more tensors; --json has all of them")
    if found.sound:
        output.facts(_facts(checkpoint, found))
    output.result(found.to_json())
    if not found.sound:
        parts = [(len(found.differences), "file that differs", "files that differ"), (len(found.flaws), "flaw", "flaws")]
        told = " and ".join(f"{count} {one if count == 1 else many}" for count, one, many in parts if count)
        raise PTQError(f"{checkpoint}: is not sound ({told}); take another copy, or make it again")


def _facts(checkpoint: Path, found: Verified) -> Iterator[tuple[str, str]]:
    yield "checkpoint", path_text(checkpoint)
    yield "checksums", NO_CHECKSUMS if found.files is None else f"{found.files} files, {size_text(found.bytes or 0)}: all as written"
    yield "tensors", "all can be read and fit the model"
