"""Checkpoint folders, written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptqcli.checkpoint.tensors import _DTYPE_NAMES, INDEX_FILE, SINGLE_FILE, _Entry, _Spec
from ptqcli.errors import PTQError

DEFAULT_SHARD_BYTES = 4_000_000_000

_CHUNK_BYTES = 4 << 20


class CheckpointWriter:
    """Writes a checkpoint folder part by part, so that the whole model is never in memory.

    ``write`` stores one part as a whole file or not at all. ``finish`` copies the parts' bytes into the final
    files and then removes the parts, so for a while the folder needs room for the model twice. The same
    tensors give the same files, in whatever parts they came.
    Raises PTQError if the folder already holds safetensors files.
    """

    def __init__(self, folder: str | Path, max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> None:
        self.folder = Path(folder)
        self.max_shard_bytes = max_shard_bytes
        self._parts: list[Path] = []
        self._entries: dict[str, _Entry] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        present = sorted(self.folder.glob("*.safetensors"))
        if present:
            raise PTQError(f"{self.folder} already holds {present[0].name}; choose another folder")

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Store ``tensors`` as one part. Raises PTQError for a name that was written before."""
        repeated = sorted(self._entries.keys() & tensors.keys())
        if repeated:
            raise PTQError(f"tensor {repeated[0]} was written twice to {self.folder}")
        path = self.folder / f"part-{len(self._parts):05d}.safetensors"
        specs = [_Spec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
        entries = _write_safetensors(path, specs, lambda name: [_bytes_of(tensors[name])])
        self._parts.append(path)
        self._entries.update((entry.name, entry) for entry in entries)

    def finish(self) -> list[Path]:
        """Join the parts into ``model.safetensors``, or numbered files with an index; return their paths."""
        shards = self._shards()
        files = dict(zip(_shard_names(len(shards)), shards, strict=True))
        for file, entries in files.items():
            _write_safetensors(self.folder / file, entries, lambda name: _stored_bytes(self._entries[name]))
        if len(shards) > 1:
            # The index comes last: until it is there, the folder does not pass for a checkpoint.
            write_json(self.folder / INDEX_FILE, _index(files))
        for part in self._parts:
            part.unlink()
        return [self.folder / file for file in files]

    def _shards(self) -> list[list[_Entry]]:
        """Entries sorted by name, cut where the next one would take a file over ``max_shard_bytes``."""
        shards: list[list[_Entry]] = [[]]
        size = 0
        for _, entry in sorted(self._entries.items()):
            if shards[-1] and size + entry.nbytes > self.max_shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append(entry)
            size += entry.nbytes
        return shards


def write_json(path: str | Path, obj: Any) -> None:
    """Write ``obj`` as indented JSON, replacing the file at ``path`` in one step or leaving it as it was."""
    _write_atomically(Path(path), [json.dumps(obj, indent=2, ensure_ascii=False).encode() + b"\n"])


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE_FILE]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _index(files: Mapping[str, Sequence[_Entry]]) -> dict[str, Any]:
    total = sum(entry.nbytes for entries in files.values() for entry in entries)
    weight_map = {entry.name: file for file, entries in files.items() for entry in entries}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def _write_safetensors(path: Path, specs: Sequence[_Spec], body: Callable[[str], Iterable[Any]]) -> list[_Entry]:
    """Write one file atomically, taking each tensor's bytes from ``body(name)``; return where they now lie.

    Wide dtypes come first, as in the safetensors library, so that each tensor is aligned to its element size.
    """
    ordered = sorted(specs, key=lambda spec: (-spec.dtype.itemsize, spec.name))
    header = _header(ordered)
    _write_atomically(path, chain([header], chain.from_iterable(body(spec.name) for spec in ordered)))
    starts = accumulate((spec.nbytes for spec in ordered), initial=len(header))
    placed = zip(ordered, starts, strict=False)  # one start more: the end of the file
    return [_Entry(spec.name, spec.dtype, spec.shape, path, start) for spec, start in placed]


def _header(specs: Sequence[_Spec]) -> bytes:
    """Length field and JSON of a file that holds ``specs`` in this order, padded with spaces to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in specs:
        begin, end = end, end + spec.nbytes
        if spec.dtype not in _DTYPE_NAMES:
            raise PTQError(f"tensor {spec.name} has dtype {spec.dtype}, which a safetensors file cannot hold")
        dtype = _DTYPE_NAMES[spec.dtype]
        header[spec.name] = {"dtype": dtype, "shape": list(spec.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: Tensor) -> Any:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    # of a single element any stride counts as contiguous, but its bytes can only be seen through a stride of 1
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8).numpy()


def _stored_bytes(entry: _Entry) -> Iterator[bytes]:
    """The bytes of a stored tensor in pieces of bounded size."""
    with open(entry.file, "rb") as file:
        file.seek(entry.offset)
        for start in range(0, entry.nbytes, _CHUNK_BYTES):
            yield file.read(min(_CHUNK_BYTES, entry.nbytes - start))


def _write_atomically(path: Path, pieces: Iterable[Any]) -> None:
    """Write under a temporary name, force it to disk, rename: ``path`` is the whole new file or as it was."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.writelines(pieces)
        file.flush()
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
