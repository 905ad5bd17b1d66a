"""Checkpoint folders, written a finished shard at a time.

The safetensors library writes each file under a temporary name; forced to disk and renamed, it is whole, and nothing copies it again. So
a checkpoint needs the room of what it holds, and what an interrupted run has finished can be told by the names of its files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ptqcli.checkpoint.tensors import DTYPES, INDEX_FILE, SINGLE_FILE
from ptqcli.errors import PTQError

DEFAULT_SHARD_BYTES = 4_000_000_000

# A checkpoint smaller than this is joined into one file at the end: small models are handed around as one, and it costs no time.
JOIN_BELOW = 64 << 20


@dataclass(frozen=True)
class _Shard:
    """A finished file. sizes: bytes of each tensor in it by name."""

    path: Path
    sizes: dict[str, int]


class CheckpointWriter:
    """Writes a checkpoint folder shard by shard, so that the whole model is never in memory.

    ``write`` stores one shard, or several where the tensors exceed ``max_shard_bytes``, and each is final: ``finish`` only renames them
    and writes the index, last of all. Until then the folder does not pass for a checkpoint. Together smaller than JOIN_BELOW, and than
    ``max_shard_bytes``, they are joined into one file. The same tensors in the same parts give the same files.
    Raises PTQError if the folder already holds safetensors files.
    """

    def __init__(self, folder: str | Path, max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> None:
        self.folder = Path(folder)
        self.max_shard_bytes = max_shard_bytes
        self._shards: list[_Shard] = []
        self._written: set[str] = set()
        self.folder.mkdir(parents=True, exist_ok=True)
        present = sorted(self.folder.glob("*.safetensors"))
        if present:
            raise PTQError(f"{self.folder} already holds {present[0].name}; choose another folder")

    def write(self, tensors: Mapping[str, Tensor]) -> list[Path]:
        """Store ``tensors`` and return the shards. Raises PTQError for a name that was written before or a dtype that no file can hold."""
        repeated = sorted(self._written & tensors.keys())
        if repeated:
            raise PTQError(f"tensor {repeated[0]} was written twice to {self.folder}")
        for name, tensor in tensors.items():
            if tensor.dtype not in DTYPES.values():
                raise PTQError(f"tensor {name} has dtype {tensor.dtype}, which a safetensors file cannot hold")
        written = []
        for part in _parts(tensors, self.max_shard_bytes):
            path = self.folder / f"shard-{len(self._shards) + 1:05d}.safetensors"
            _save(path, part)
            self._shards.append(_Shard(path, {name: tensor.nbytes for name, tensor in part.items()}))
            self._written.update(part)
            written.append(path)
        return written

    def finish(self) -> list[Path]:
        """Give the shards their names: ``model.safetensors``, or numbered ones with an index. Returns their paths."""
        total = sum(size for shard in self._shards for size in shard.sizes.values())
        if len(self._shards) > 1 and total < JOIN_BELOW and total <= self.max_shard_bytes:
            self._join()
        count = len(self._shards)
        names = [SINGLE_FILE] if count == 1 else [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        self._shards = [_renamed(shard, self.folder / name) for shard, name in zip(self._shards, names, strict=True)]
        _sync_folder(self.folder)
        if count > 1:
            weight_map = {tensor: shard.path.name for shard in self._shards for tensor in shard.sizes}
            write_json(self.folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
        return [shard.path for shard in self._shards]

    def _join(self) -> None:
        """One shard in the place of several. Their tensors are all in memory at once, which JOIN_BELOW keeps small."""
        tensors = {name: tensor for shard in self._shards for name, tensor in load_file(shard.path, backend="pread").items()}
        joined = _Shard(self.folder / "joined.safetensors", {name: size for shard in self._shards for name, size in shard.sizes.items()})
        _save(joined.path, tensors)
        for shard in self._shards:
            shard.path.unlink()
        self._shards = [joined]


def write_json(path: str | Path, obj: Any) -> None:
    """Write ``obj`` as indented JSON, replacing the file at ``path`` in one step or leaving it as it was."""
    path, text = Path(path), json.dumps(obj, indent=2, ensure_ascii=False) + "\n"
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(text.encode())
    _put_in_place(temporary, path)


def _parts(tensors: Mapping[str, Tensor], max_bytes: int) -> Iterator[dict[str, Tensor]]:
    """The tensors sorted by name, cut where the next one would take a file over ``max_bytes``."""
    part: dict[str, Tensor] = {}
    size = 0
    for name, tensor in sorted(tensors.items()):
        if part and size + tensor.nbytes > max_bytes:
            yield part
            part, size = {}, 0
        part[name] = tensor
        size += tensor.nbytes
    if part:
        yield part


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file(_apart(tensors), temporary, metadata={"format": "pt"})
    except SafetensorError as error:
        temporary.unlink(missing_ok=True)
        raise PTQError(f"{path}: cannot be written ({' '.join(str(error).split())})") from error
    _put_in_place(temporary, path)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as the library takes them: contiguous and each in memory of its own. Those that are so already are not copied."""
    apart: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        alone = tensor.detach().cpu().contiguous()
        storage = alone.untyped_storage()
        if storage.nbytes() != alone.nbytes or storage.data_ptr() in seen:
            alone = alone.clone()
        seen.add(alone.untyped_storage().data_ptr())
        apart[name] = alone
    return apart


def _renamed(shard: _Shard, path: Path) -> _Shard:
    os.replace(shard.path, path)
    return _Shard(path, shard.sizes)


def _put_in_place(temporary: Path, path: Path) -> None:
    """Force ``temporary`` to disk and rename it: ``path`` is the whole new file or as it was."""
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` durable. Windows cannot open a folder, and there is nothing to do."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
