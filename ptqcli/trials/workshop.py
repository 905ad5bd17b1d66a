"""The folder in which trials lie, beside the output: what is known of those that are done, and the checkpoint that is the best so far.

``OUT.trials/trials.json`` has what was asked for and every trial's numbers, with a digest of all that; it takes its name by a rename, so it
is always whole, and a search that is ended goes on from it. ``OUT.trials/003/OUT`` is the checkpoint of the fourth trial. Only the one that
would be the result stays; it gets the output's name at the end. Nothing is removed but from a folder that such a file proves to be ours.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from ptqcli.checkpoint.directory import Directory, named
from ptqcli.errors import PTQError, UsageError
from ptqcli.pipeline.folder import exchange, lock
from ptqcli.pipeline.output import check_output, remove_checkpoint
from ptqcli.pipeline.report import PARTIAL
from ptqcli.trials.trial import Trial
from ptqcli.untrusted import shown

ENDING = ".trials"
RECORD = "trials.json"
RECORD_BYTES = 256 << 20
NUMBER = re.compile(r"[0-9]{3,6}/")
MOST_DIFFERENCES = 3


@dataclass
class Record:
    """What is known. asked: for what; two searches with the same are one. trials: by their keys, in order. placed: device and inode of the
    checkpoint that gets, or has got, the output's name; placed_key: of its trial."""

    asked: dict[str, Any]
    trials: dict[str, Trial] = field(default_factory=dict)
    placed: tuple[int, int] | None = None
    placed_key: str | None = None

    def text(self) -> bytes:
        """As a file."""
        values: dict[str, Any] = {"asked": self.asked, "trials": [trial.to_json() for trial in self.trials.values()]}
        values |= {"placed": self.placed, "placed_key": self.placed_key}
        about = "the trials of `ptq tune`; the same command goes on from them"
        return json.dumps({"about": about, "sha256": _digest(values), **values}, indent=1).encode()

    @classmethod
    def read(cls, content: bytes, path: Path) -> Record:
        """Raises PTQError for a damaged one."""
        try:
            values = json.loads(content)
            found = {key: values[key] for key in ("asked", "trials", "placed", "placed_key")}
            if values["sha256"] != _digest(found):
                raise ValueError("another digest")
            trials = [Trial(**trial) for trial in found["trials"]]
            placed = None if found["placed"] is None else (int(found["placed"][0]), int(found["placed"][1]))
            return cls(
                asked=dict(found["asked"]), trials={trial.key: trial for trial in trials}, placed=placed, placed_key=found["placed_key"]
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise PTQError(f"{path}: is damaged, so the search cannot go on from it; --restart begins anew") from error


def _digest(values: Mapping[str, Any]) -> str:
    return sha256(json.dumps(values).encode()).hexdigest()


class Workshop:
    """The folder of one search, locked while it is open.

    Raises PTQError where something else has its name or another search is at work, and UsageError where it was made for another request.
    """

    def __init__(self, output: Path, asked: Mapping[str, Any], restart: bool) -> None:
        self.output = output.resolve()
        self.path = self.output.with_name(self.output.name + ENDING)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with named(self.path):
            os.makedirs(self.path, exist_ok=True)
        self.folder = Directory(self.path)
        try:
            lock(self.folder)
            self.record = self._found(json.loads(json.dumps(dict(asked))), restart)
        except BaseException:
            self.folder.close()
            raise

    def _found(self, asked: dict[str, Any], restart: bool) -> Record:
        content = self.folder.read_own(RECORD, RECORD_BYTES)
        if content is None:
            names = [name for name in self.folder.names() if name != f"{RECORD}.tmp"]
            if names:
                raise PTQError(f"{self.path}: is in the way and holds {names[0]}; move it away, or choose another --output")
            return self._begun(asked)
        record = Record({}) if restart else Record.read(content, self.path / RECORD)
        if not record.trials and record.asked != asked:
            self.clear()
            return self._begun(asked)
        if record.placed is not None and _identity(self.output) != record.placed and not self._holds(record.placed):
            self.clear()  # that search is finished, and its result has gone elsewhere
            return self._begun(asked)
        differ = [key for key in {**record.asked, **asked} if record.asked.get(key) != asked.get(key)]
        if differ:
            told = "; ".join(f"{key} {shown(record.asked.get(key))}, now {shown(asked.get(key))}" for key in differ[:MOST_DIFFERENCES])
            raise UsageError(
                f"{self.path}: holds {len(record.trials)} trials of a search that was asked for something else ({told}); "
                "the same command as then goes on, --restart begins anew, or choose another --output"
            )
        return record

    def _begun(self, asked: dict[str, Any]) -> Record:
        record = Record(asked)
        self.folder.replace(RECORD, [record.text()])
        return record

    def close(self) -> None:
        """Give the lock back. A search that was refused before its first trial began leaves nothing."""
        try:
            if not self.record.trials and not any(map(NUMBER.fullmatch, self.folder.names())):
                self.clear()
                with suppress(OSError):  # somebody has put something there
                    os.rmdir(self.path)
        finally:
            self.folder.close()

    # Trials

    def add(self, trial: Trial) -> None:
        """Keep its numbers."""
        self.record.trials[trial.key] = trial
        self.folder.replace(RECORD, [self.record.text()])

    def number(self, key: str) -> int:
        """Of the trial of this key, the next one for a new trial."""
        return list(self.record.trials).index(key) if key in self.record.trials else len(self.record.trials)

    def checkpoint(self, key: str) -> Path:
        """Where its checkpoint is, or will be."""
        place = f"{self.number(key):03d}"
        if self.folder.identity_of(place) is None:
            self.folder.make_folder(place)
        return self.path / place / self.output.name

    def remove(self, key: str) -> None:
        """Remove its checkpoint, or what there is of it."""
        self._remove(f"{self.number(key):03d}")

    def _remove(self, place: str) -> None:
        if self.folder.identity_of(place) is None:
            return
        inside = Directory(place, self.folder)
        try:
            for name in (self.output.name, self.output.name + PARTIAL):
                identity = inside.identity_of(name)
                if identity is not None:
                    checkpoint = Directory(name, inside)
                    try:
                        remove_checkpoint(checkpoint)
                    finally:
                        checkpoint.close()
                    inside.remove_folder(name, identity)
            self.folder.remove_folder(place, inside.identity)
        finally:
            inside.close()

    def clear(self) -> None:
        """Remove all checkpoints and the record. Raises PTQError for what is not ours."""
        foreign = next((name for name in self.folder.names() if name not in (RECORD, f"{RECORD}.tmp") and not NUMBER.fullmatch(name)), None)
        if foreign is not None:
            raise PTQError(f"{self.path}: holds {foreign}, which ptq tune did not write; move it away, or choose another --output")
        self.keep_only(None)
        self.folder.remove(RECORD)

    def keep_only(self, key: str | None) -> None:
        """Remove the checkpoints of all other trials."""
        kept = None if key is None else f"{self.number(key):03d}/"
        for name in self.folder.names():
            if NUMBER.fullmatch(name) and name != kept:
                self._remove(name[:-1])

    # The result

    @property
    def is_placed(self) -> bool:
        """Whether a result of this search has the output's name."""
        return self.record.placed is not None and self.record.placed == _identity(self.output)

    def _holds(self, identity: tuple[int, int]) -> bool:
        places = [name[:-1] for name in self.folder.names() if NUMBER.fullmatch(name)]
        return any(_identity(self.path / place / self.output.name) == identity for place in places)

    def place(self, key: str, model: Path | None, overwrite: bool) -> None:
        """Give the checkpoint of a trial the output's name; what had it goes, if it may. In one step, where the system can."""
        source = Directory(f"{self.number(key):03d}", self.folder)
        parent = Directory(self.output.parent)
        name = self.output.name
        try:
            check_output(self.output, model, overwrite)
            self.record.placed, self.record.placed_key = source.identity_of(name), key
            self.folder.replace(RECORD, [self.record.text()])
            replaced = parent.identity_of(name)
            if replaced is not None and any(Directory(name, parent).names()):
                if not exchange(source, name, parent, name):
                    raise PTQError(f"{self.output}: cannot be replaced in one step here; remove it, and give the command again")
            else:
                with named(self.output):
                    os.rename(name, name, src_dir_fd=source.descriptor, dst_dir_fd=parent.descriptor)
            parent.sync()
        finally:
            source.close()
            parent.close()


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path, follow_symlinks=False)
    except OSError:
        return None
    return found.st_dev, found.st_ino
