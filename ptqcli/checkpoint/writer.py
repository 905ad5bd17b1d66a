"""Checkpoint folders, written a finished shard at a time.

Each file is written under a temporary name; forced to disk and renamed, it is whole, and nothing copies it again. So a checkpoint needs
the room of what it holds, and what an interrupted run has finished can be told by the names of its files.

The bytes are those that the safetensors library would write: the length of the header in 8 bytes, the header as JSON filled up with
spaces to a multiple of 8, then the tensors, those of the larger dtypes first. They are written here because the library opens its file by
name and follows a link that lies there, and so that their SHA-256 is known before they reach the disk.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from ptqcli.checkpoint.directory import PIECE, Directory
from ptqcli.checkpoint.tensors import DTYPES, INDEX_FILE, SINGLE_FILE
from ptqcli.errors import PTQError

DEFAULT_SHARD_BYTES = 4_000_000_000

# A checkpoint smaller than this is joined into one file at the end: small models are handed around as one, and it costs no time.
JOIN_BELOW = 64 << 20

# In the order of their tensors in a file.
FILE_ORDER = ("U64", "I64", "F64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL")
DTYPE_NAMES = {DTYPES[name]: name for name in FILE_ORDER}


@dataclass(frozen=True)
class _Shard:
    """A finished file. sizes: bytes of each tensor in it by name."""

    file: str
    sizes: dict[str, int]


class CheckpointWriter:
    """Writes a checkpoint folder shard by shard, so that the whole model is never in memory.

    ``write`` stores one shard, or several where the tensors exceed ``max_shard_bytes``, and each is final: ``finish`` only renames them
    and writes the index, last of all. Until then the folder does not pass for a checkpoint. Together smaller than JOIN_BELOW, and than
    ``max_shard_bytes``, they are joined into one file. The same tensors in the same parts give the same files.
    Raises PTQError if the folder already holds safetensors files, but for ``known`` ones.
    """

    def __init__(self, folder: Directory, max_shard_bytes: int = DEFAULT_SHARD_BYTES, known: Collection[str] = ()) -> None:
        self.folder = folder
        self.max_shard_bytes = max_shard_bytes
        self._shards: list[_Shard] = []
        self._written: set[str] = set()
        present = [name for name in folder.names() if name.endswith(".safetensors") and name not in known]
        if present:
            raise PTQError(f"{folder.path} already holds {present[0]}; choose another folder")

    def write(self, tensors: Mapping[str, Tensor]) -> list[Path]:
        """Store ``tensors`` and return the shards. Raises PTQError for a name that was written before or a dtype that no file can hold."""
        repeated = sorted(self._written & tensors.keys())
        if repeated:
            raise PTQError(f"tensor {repeated[0]} was written twice to {self.folder.path}")
        for name, tensor in tensors.items():
            if tensor.dtype not in DTYPE_NAMES:
                raise PTQError(f"tensor {name} has dtype {tensor.dtype}, which a safetensors file cannot hold")
        written = []
        for part in _parts(tensors, self.max_shard_bytes):
            shard = _Shard(f"shard-{len(self._shards) + 1:05d}.safetensors", {name: tensor.nbytes for name, tensor in part.items()})
            _save(self.folder, shard.file, part)
            self._shards.append(shard)
            self._written.update(part)
            written.append(self.folder.path / shard.file)
        return written

    @property
    def shards(self) -> list[tuple[str, dict[str, int]]]:
        """Every finished file and the bytes of each tensor in it."""
        return [(shard.file, shard.sizes) for shard in self._shards]

    def restore(self, shards: Sequence[tuple[str, dict[str, int]]]) -> None:
        """Go on behind files that another writer has finished here."""
        self._shards = [_Shard(file, sizes) for file, sizes in shards]
        self._written = {name for shard in self._shards for name in shard.sizes}

    def finish(self, joined: Callable[[], None] = lambda: None) -> list[Path]:
        """Give the shards their names: ``model.safetensors``, or numbered ones with an index. Returns their paths.

        joined: is called when one file has taken the place of several, which are still there.
        """
        total = sum(size for shard in self._shards for size in shard.sizes.values())
        if len(self._shards) > 1 and total < JOIN_BELOW and total <= self.max_shard_bytes:
            self._join(joined)
        count = len(self._shards)
        names = final_names(count)
        for shard, name in zip(self._shards, names, strict=True):
            self.folder.rename(shard.file, name)
        self.folder.sync()
        if count > 1:
            weight_map = {tensor: name for shard, name in zip(self._shards, names, strict=True) for tensor in shard.sizes}
            write_json(self.folder, INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
        return [self.folder.path / name for name in names]

    def _join(self, then: Callable[[], None]) -> None:
        """One shard in the place of several. Their tensors are all in memory at once, which JOIN_BELOW keeps small.

        Raises PTQError for a shard that does not hold what was written.
        """
        tensors = {name: tensor for shard in self._shards for name, tensor in load(self.folder.read(shard.file)).items()}
        joined = _Shard("joined.safetensors", {name: size for shard in self._shards for name, size in shard.sizes.items()})
        _save(self.folder, joined.file, tensors)
        parts, self._shards = self._shards, [joined]
        then()
        for shard in parts:
            self.folder.remove(shard.file)


def final_names(count: int) -> list[str]:
    """What so many shards are called in a checkpoint."""
    return [SINGLE_FILE] if count == 1 else [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def write_json(folder: Directory, name: str, obj: Any) -> None:
    """Write ``obj`` as indented JSON. Raises FileExistsError if there is anything called ``name``, and OSError for what else fails."""
    text = json.dumps(obj, indent=2, ensure_ascii=False)
    if not _is_unicode(text):  # half of a surrogate pair: a path that is no UTF-8, as Python spells it
        text = json.dumps(obj, indent=2)
    _put(folder, name, iter([text.encode() + b"\n"]))


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


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


def _save(folder: Directory, name: str, tensors: Mapping[str, Tensor]) -> None:
    _put(folder, name, safetensors_pieces(tensors))


def safetensors_pieces(tensors: Mapping[str, Tensor]) -> Iterator[Any]:
    """The bytes of a safetensors file of ``tensors``, a buffer at a time; no tensor is copied that lies contiguous on the CPU."""
    rank = {name: number for number, name in enumerate(FILE_ORDER)}
    order = sorted(tensors, key=lambda name: (rank[DTYPE_NAMES[tensors[name].dtype]], name))
    yield safetensors_header({name: (tensors[name].dtype, tuple(tensors[name].shape)) for name in order})
    for name in order:
        yield from flat_pieces(tensors[name])


def safetensors_header(order: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> bytes:
    """What a safetensors file begins with; the bytes of the tensors of these dtypes and shapes follow it in their order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, (dtype, shape) in order.items():
        end = begin + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def flat_pieces(tensor: Tensor) -> Iterator[Any]:
    """The bytes of a tensor, a buffer at a time."""
    alone = tensor.detach().cpu().contiguous()
    flat = alone.as_strided((alone.numel(),), (1,)).view(torch.uint8)  # a dimension of one element may have any stride
    for start in range(0, flat.numel(), PIECE):
        yield flat[start : start + PIECE].numpy()


def _put(folder: Directory, name: str, pieces: Iterator[Any]) -> None:
    """Write a file under a temporary name, force it to disk and rename it: what has its name is whole."""
    folder.write(f"{name}.tmp", pieces)
    folder.rename(f"{name}.tmp", name)
    folder.sync()
