"""What measuring has found so far, so that one that was ended can go on.

A JSON file, written anew behind each group, under another name first, so that it is always whole: the fingerprint of what is measured
(``fingerprint``), and for each method the losses of its finished groups. What does not bear the fingerprint, or is no such file, counts for
nothing: of ours it is replaced, and a file that is not ours is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import ptqcli
from ptqcli.errors import PTQError
from ptqcli.sensitivity.groups import Losses, Work
from ptqcli.untrusted import read_json

ABOUT = "how far `ptq` has come with sensitivities here; the same command goes on from it"
MOST_BYTES = 64 << 20
CODE = ("sensitivity", "numerics", "model", "calibration")  # folders of this package that losses depend on


class Journal:
    """What is found is kept in the file ``path`` while measuring goes on, and in the folder ``cache`` for the next run of any command.

    Each may be None: there it is not kept. asked: the ``fingerprint``, None for what is not kept at all. Raises PTQError for a file of the
    name ``path`` that is not ours; one in the cache counts for nothing then.
    """

    def __init__(self, path: Path | None, cache: Path | None, asked: str | None) -> None:
        kept = None if cache is None or asked is None else cache / f"sensitivities-{asked[:32]}.json"
        self._asked, self._cached = asked or "", kept
        self._path = (path or kept) if asked is not None else None
        self._losses: dict[str, dict[int, Losses]] = {}
        self._seconds: dict[str, float] = {}
        if kept is not None and kept.exists():
            with contextlib.suppress(PTQError):
                self._read(kept)
        if self._path is not None and self._path != kept and self._path.exists():
            self._read(self._path)

    def losses(self, method: str, counts: list[int]) -> dict[int, Losses]:
        """Of the groups that ``method`` has finished. counts: of the candidates of each group; what does not fit them is left out."""
        kept = self._losses.get(method, {})
        return {number: row for number, row in kept.items() if number < len(counts) and len(row) == counts[number]}

    def seconds(self, method: str) -> float:
        """That ``method`` had taken when it was noted last."""
        return self._seconds.get(method, 0.0)

    def note(self, method: str, losses: Mapping[int, Losses], seconds: float) -> None:
        """These are all that ``method`` has finished, in so many seconds."""
        self._losses[method], self._seconds[method] = dict(losses), seconds
        if self._path is None:
            return
        try:
            self._write(self._path)
        except OSError as error:
            if self._path != self._cached:
                raise PTQError(f"{self._path}: what is found cannot be kept there: {error.strerror}") from error

    def finish(self) -> None:
        """All is found: it stays in the cache alone."""
        if self._cached is not None:
            with contextlib.suppress(OSError):
                self._write(self._cached)
        if self._path is not None and self._path != self._cached:
            self._path.unlink(missing_ok=True)
            _unfinished(self._path).unlink(missing_ok=True)

    def _read(self, path: Path) -> None:
        values = read_json(path, MOST_BYTES)
        if values.get("about") != ABOUT:
            raise PTQError(f"{path}: is in the place of what is found of sensitivities, and is something else; move it away")
        if values.get("asked") != self._asked or values.get("sha256") != _digest(values.get("losses")):
            return
        try:
            losses = {
                str(method): {int(number): [_loss(value) for value in row] for number, row in rows.items()}
                for method, rows in values["losses"].items()
            }
            seconds = {str(method): float(spent) for method, spent in values["seconds"].items()}
        except (KeyError, TypeError, ValueError, AttributeError):
            return
        self._losses |= losses
        self._seconds |= seconds

    def _write(self, path: Path) -> None:
        losses = {method: {str(number): row for number, row in rows.items()} for method, rows in self._losses.items()}
        values = {"about": ABOUT, "asked": self._asked, "sha256": _digest(losses), "seconds": self._seconds, "losses": losses}
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(values))


def replace_file(path: Path, text: str) -> None:
    """Make ``text`` the content of a file: whole or not at all. What a killed process leaves has one name, and goes with the next one.

    Raises OSError where the folder cannot be written to.
    """
    unfinished = _unfinished(path)
    unfinished.unlink(missing_ok=True)
    try:
        with open(unfinished, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def _unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def fingerprint(work: Work, settled: list[str]) -> str | None:
    """A hash of all that the losses depend on; None for a model in memory, which is gone with the process.

    settled: what ``work`` does not tell, such as transforms that the model has gone through.
    """
    folder = work.skeleton.source.folder
    if folder is None:
        return None
    found = sorted(path for path in (folder.iterdir() if folder.is_dir() else [folder]) if path.is_file())
    package = Path(ptqcli.__file__).parent
    values = {
        "model": str(folder.resolve()),
        "files": [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in found],
        "windows": _tokens_digest(work.windows),
        "shape": list(work.windows.shape),
        "settled": settled,
        "groups": [
            [group.linears, [None if specs is None else [str(spec) for spec in specs] for specs in group.options]] for group in work.groups
        ],
        "ranges": repr(work.ranges),
        "seed": work.seed,
        "dtype": str(work.dtype),
        "device": work.device.type,
        "batches": work.batches,
        "versions": [ptqcli.__version__, torch.__version__, transformers.__version__],
        "code": _digest([hashlib.sha256(path.read_bytes()).hexdigest() for room in CODE for path in sorted((package / room).glob("*.py"))]),
    }
    return _digest(values)


def _loss(value: Any) -> float | None:
    if value is not None and (type(value) not in (int, float) or not math.isfinite(value) or value < 0):
        raise ValueError("no loss")
    return None if value is None else float(value)


def _tokens_digest(windows: Tensor) -> str:
    return hashlib.sha256(windows.contiguous().cpu().numpy().tobytes()).hexdigest()


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
