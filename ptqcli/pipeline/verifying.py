"""Whether a checkpoint is still what was written: every file against its checksum, and every tensor as a reader takes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ptqcli.adapters.files import read_adapter
from ptqcli.checkpoint.auxiliary import ADAPTER
from ptqcli.checkpoint.checksums import Checksum, Difference, differences, read_checksums
from ptqcli.checkpoint.tensors import SafetensorsFolder
from ptqcli.checkpoint.unfinished import unfinished_run
from ptqcli.errors import PTQError
from ptqcli.formats.packed_checkpoint import open_checkpoint
from ptqcli.formats.soundness import flaws, plain_flaws
from ptqcli.model.config import CONFIG_FILE, load_config
from ptqcli.model.gguf import is_gguf
from ptqcli.pipeline.progress import Progress
from ptqcli.pipeline.report import folder_of


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What was found. files, bytes: that have checksums, None where the folder has none. differences: files that are not what was written.
    flaws: what a reader would refuse, a line each."""

    checkpoint: str
    files: int | None
    bytes: int | None
    differences: list[Difference]
    flaws: list[str]

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        return not (self.differences or self.flaws)

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return {**asdict(self), "sound": self.sound}


def verify(checkpoint: Path, progress: Progress) -> Verified:
    """Read every file of ``checkpoint`` that has a checksum, then every tensor, in the memory of the largest one.

    Raises PTQError for a run that is not finished.
    """
    folder = folder_of(checkpoint)
    unfinished = unfinished_run(folder)
    if unfinished is not None and not (folder / CONFIG_FILE).is_file():
        raise PTQError(f"{folder}: {unfinished}")
    listed, damaged = None, []
    try:
        listed = read_checksums(folder) if folder.is_dir() else None
    except PTQError as error:
        damaged = [str(error)]
    found = [] if listed is None else _compared(folder, listed, progress)
    progress.phase("reading every tensor")
    return Verified(
        checkpoint=str(checkpoint),
        files=None if listed is None else len(listed),
        bytes=None if listed is None else sum(each.bytes for each in listed.values()),
        differences=found,
        flaws=[*damaged, *_flaws(checkpoint, progress)],
    )


def _compared(folder: Path, listed: Mapping[str, Checksum], progress: Progress) -> list[Difference]:
    progress.phase(f"comparing {len(listed)} files with their checksums")
    total = sum(each.bytes for each in listed.values())
    done = 0

    def on_bytes(name: str, count: int) -> None:
        nonlocal done
        done += count
        progress.step(done >> 20, total >> 20, name)

    return list(differences(folder, listed, on_bytes))


def _flaws(checkpoint: Path, progress: Progress) -> Iterator[str]:
    """What a reader would refuse; what keeps it from going on ends the list."""

    def tell(done: int, total: int, name: str) -> None:
        progress.step(done + 1, total, name)

    try:
        if is_gguf(checkpoint) or getattr(load_config(checkpoint), "quantization_config", None) is not None:
            yield from flaws(open_checkpoint(checkpoint), tell)
        else:
            yield from plain_flaws(SafetensorsFolder(checkpoint), tell)
        if (checkpoint / ADAPTER).is_dir():
            read_adapter(checkpoint / ADAPTER)
    except PTQError as error:
        yield str(error) if str(checkpoint) in str(error) else f"{checkpoint}: {error}"
