"""What a run has finished so far, so that one that was ended can go on.

Behind every block the hidden states are written, then the journal: what the run was asked for, how many blocks are finished, every file
that the rest builds on, with the SHA-256 of its bytes, and one of all that the journal says. It takes its name by a rename, so it is always
whole, and what it lists is on the disk. The next run with the same output goes on from it, if it is asked for the same: what is cheap is
made again (the plan, the tokens, how the model calls its blocks), all else is compared with its SHA-256 before it is believed. What lies in
the folder and is not listed was not finished, and goes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor

import ptqcli
from ptqcli.adapters.low_rank import LowRank
from ptqcli.calibration.hidden import ACTIVATIONS
from ptqcli.checkpoint.auxiliary import belongs_to_a_checkpoint
from ptqcli.checkpoint.directory import Directory
from ptqcli.checkpoint.unfinished import JOURNAL
from ptqcli.checkpoint.writer import final_names, safetensors_pieces
from ptqcli.errors import PTQError, UsageError
from ptqcli.pipeline.output import JOURNAL_BYTES
from ptqcli.pipeline.report import FoldReport, LayerReport
from ptqcli.pipeline.streams import Streams
from ptqcli.untrusted import shown

if TYPE_CHECKING:
    from ptqcli.pipeline.prepare import Prepared  # which looks at folders, as what looks for a journal does

STATES, ADAPTERS = f"{ACTIVATIONS}behind-", f"{ACTIVATIONS}adapters-"
NAMES = re.compile(rf"(shard-\d{{5,}}|joined|({STATES}|{ADAPTERS})\d{{5,}})\.safetensors")  # of the files that are listed
MOST_DIFFERENCES = 3  # that a message names
RESTART = "--restart begins anew"


@dataclass(frozen=True, kw_only=True)
class Committed:
    """What is finished. asked: the ``fingerprint`` of the run. blocks: finished ones. all_written: whether what is left was written behind
    them. shards: (file, bytes of each tensor in it), in order. files: of the folder, with their SHA-256. layers, folds: for the report.
    halved_at: how many blocks were finished each time that the batch had to be halved."""

    asked: dict[str, Any]
    blocks: int
    count: int
    all_written: bool
    shards: list[tuple[str, dict[str, int]]]
    files: dict[str, str]
    layers: list[LayerReport]
    folds: list[FoldReport]
    halved_at: list[int] = field(default_factory=list)

    def write(self, folder: Directory) -> None:
        """Make it what a later run finds in ``folder``."""
        about = "how far `ptq quantize` has come here; the same command goes on from it"
        values = asdict(self)
        text = json.dumps({"about": about, "sha256": _digest([json.dumps(values).encode()]), **values}, indent=1)
        folder.replace(JOURNAL, [text.encode()])

    @classmethod
    def read(cls, folder: Directory) -> Committed | None:
        """The journal in ``folder``; None if there is none, or something else. Raises PTQError for a damaged one."""
        content = folder.read_own(JOURNAL, JOURNAL_BYTES)
        if content is None:
            return None
        try:
            values = json.loads(content)
            digest = values.pop("sha256")
            del values["about"]
            if digest != _digest([json.dumps(values).encode()]):
                raise ValueError("another digest")
            if not all(NAMES.fullmatch(name) for name in (*values["files"], *(file for file, _ in values["shards"]))):
                raise ValueError("a file that no run writes")
            return cls(
                asked=dict(values["asked"]),
                blocks=int(values["blocks"]),
                count=int(values["count"]),
                all_written=values["all_written"] is True,
                shards=[(str(file), {str(name): int(size) for name, size in sizes.items()}) for file, sizes in values["shards"]],
                files={str(name): str(digest) for name, digest in values["files"].items()},
                layers=[LayerReport(**layer) for layer in values["layers"]],
                folds=[_fold(entry) for entry in values["folds"]],
                halved_at=[int(blocks) for blocks in values["halved_at"]],
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise PTQError(f"{folder.path / JOURNAL}: is damaged, so this run cannot go on from it; {RESTART}") from error


def _fold(entry: Mapping[str, Any]) -> FoldReport:
    choices = tuple((str(name), str(choice), error) for name, choice, error in entry["choices"])
    return FoldReport(**{**entry, "readers": tuple(entry["readers"]), "choices": choices})


def fingerprint(ready: Prepared, model: Path | None, batch_size: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any] | None:
    """All that the bytes of the result depend on, by the words in which a person knows it; None for a model in memory, which is gone with
    the process."""
    if model is None:
        return None
    tokens = None if ready.calibration is None else ready.calibration.windows
    files = sorted(path for path in model.iterdir() if path.is_file() and _is_read(path)) if model.is_dir() else [model]
    schemes = {linear.name: str(linear.scheme) for linear in ready.plan.linears}
    return {
        **{f"recipe {key}": value for key, value in _flat(ready.plan.recipe.stored())},
        "model": str(model.resolve()),
        **{f"model file {path.name}": [path.stat().st_size, path.stat().st_mtime_ns] for path in files},
        "schemes of the linears": _digest([json.dumps(schemes).encode()]),
        "tokens of the calibration text": None if tokens is None else _digest([tokens.contiguous().numpy()]),
        "batch size": batch_size,
        "dtype": str(dtype),
        "device": device.type,
        "ptqcli": f"{ptqcli.__version__}, torch {torch.__version__}, transformers {transformers.__version__}",
        "code of ptqcli": _digest(path.read_bytes() for path in sorted(Path(ptqcli.__file__).parent.rglob("*.py"))),
    }


def _is_read(path: Path) -> bool:
    return path.suffix in (".safetensors", ".gguf") or belongs_to_a_checkpoint(path.name)


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _digest(pieces: Any) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


@dataclass
class Journal:
    """What a run writes of itself, and finds of an earlier one. asked: its ``fingerprint``. restart: what is there is not gone on from."""

    asked: dict[str, Any]
    restart: bool = False
    found: Committed | None = None  # what this run goes on from
    latest: Committed | None = None  # what the next one would go on from
    _adapters: dict[str, str] = field(default_factory=dict)  # files of adapters, with their SHA-256
    _stored: set[str] = field(default_factory=set)  # linears whose adapters are in them

    def look(self, folder: Directory) -> bool:
        """Whether ``folder`` holds what this run goes on from; it is then known to the folder, and what was not finished has gone.

        Raises UsageError where it was made for another request and PTQError where it is not what was written.
        """
        found = None if self.restart else Committed.read(folder)
        if found is None:
            return False
        self._compare(found, folder)
        _restore_names(found, folder)
        for name, digest in found.files.items():
            folder.adopt(name, digest)
            folder.check_file(name, f"; {RESTART}")
        self._adapters = {name: digest for name, digest in found.files.items() if name.startswith(ADAPTERS)}
        self.found = self.latest = found
        return True

    def _compare(self, found: Committed, folder: Directory) -> None:
        now = json.loads(json.dumps(self.asked))
        differ = [key for key in {**found.asked, **now} if found.asked.get(key) != now.get(key)]
        if not differ:
            return
        told = [_difference(key, found.asked.get(key), now.get(key)) for key in differ[:MOST_DIFFERENCES]]
        more = f", and {len(differ) - MOST_DIFFERENCES} more" if len(differ) > MOST_DIFFERENCES else ""
        raise UsageError(
            f"{folder.path}: holds {found.blocks} of {found.count} blocks of a run that was asked for something else "
            f"({'; '.join(told)}{more}); the same command as then goes on, {RESTART}, or choose another --output"
        )

    def kept(self, folder: Directory) -> str:
        """What a run that ends now leaves for the next, in words; empty where that is nothing, or not all there.

        That is what the journal on the disk says: an interruption, or a disk that is full, may come between any two steps of ``commit``.
        """
        try:
            self.latest = None if self.latest is None else Committed.read(folder)
        except PTQError:
            self.latest = None
        if self.latest is None or not self.latest.blocks:
            return ""
        _restore_names(self.latest, folder)
        if any(folder.identity_of(name) is None for name in self.files):
            return ""
        return f"{self.latest.blocks} of {self.latest.count} blocks"

    @property
    def files(self) -> set[str]:
        """The names of what it leaves."""
        return set() if self.latest is None else {JOURNAL, *self.latest.files}

    def commit(self, folder: Directory, committed: Committed, streams: Streams | None, adapters: Mapping[str, LowRank]) -> None:
        """Write what the next block builds on, then that so much is finished; what the one before it built on goes. committed: its files
        are the shards."""
        states: dict[str, str] = {}
        if streams is not None:
            name = f"{STATES}{committed.blocks:05d}.safetensors"
            folder.remove(name)
            folder.write(name, streams.pieces())
            states[name] = folder.made[name]
        new = {name: adapter for name, adapter in adapters.items() if name not in self._stored}
        if new:
            file = f"{ADAPTERS}{committed.blocks:05d}.safetensors"
            folder.write(file, safetensors_pieces({f"{name}.{part}": getattr(each, part) for name, each in new.items() for part in "AB"}))
            self._adapters[file] = folder.made[file]
            self._stored.update(new)
        before = self.files
        self.latest = Committed(**{**vars(committed), "files": {**committed.files, **self._adapters, **states}})
        self.latest.write(folder)
        for name in before - self.files:
            folder.remove(name)

    def read_states(self, folder: Directory, streams: Streams) -> None:
        """Put the hidden states behind the last finished block into ``streams``."""
        assert self.found is not None
        file = next(name for name in self.found.files if name.startswith(STATES))
        with safe_open(folder.path / file, "pt") as stored:
            streams.restore(lambda name, start, stop: stored.get_slice(name)[start:stop])

    def read_adapters(self, folder: Directory) -> dict[str, LowRank]:
        """The adapters of the finished blocks, by the names of the linears."""
        read: dict[str, Tensor] = {}
        for file in self._adapters:
            with safe_open(folder.path / file, "pt") as stored:
                read |= {name: stored.get_tensor(name).clone() for name in stored.keys()}  # noqa: SIM118  it is no mapping
        names = {name.removesuffix(".A"): name for name in read if name.endswith(".A")}
        self._stored.update(names)
        return {name: LowRank(read[f"{name}.A"], read[f"{name}.B"]) for name in names}

    def drop(self, folder: Directory) -> None:
        """Nothing can be gone on from any more, since what was finished is being changed; or all of it is done."""
        for name in self.files:
            if name == JOURNAL or name.startswith(ACTIVATIONS):
                folder.remove(name)
        self.latest = None


def _difference(key: str, then: Any, now: Any) -> str:
    if key.startswith("recipe ") or key in ("batch size", "dtype", "device", "model", "ptqcli"):
        return f"{key.removeprefix('recipe ')} {shown(then)}, now {shown(now)}"
    return f"other {key}"


def _restore_names(found: Committed, folder: Directory) -> None:
    """Shards that have got their final names at the end of a run that then was ended get back those of the journal."""
    for (file, _), final in zip(found.shards, final_names(len(found.shards)), strict=True):
        if folder.identity_of(file) is None and folder.identity_of(final) is not None:
            folder.rename(final, file)
