"""Checkpoint folders of safetensors files: one tensor read by name, one part written at a time, parts joined.

A safetensors file is an 8-byte little-endian length, that many bytes of JSON which give each tensor's dtype,
shape and byte range, and then the bytes of the tensors one after the other. A model is one such file,
``model.safetensors``, or several with ``model.safetensors.index.json``, which maps each tensor to its file.

Tensors are read with plain file reads into memory of their own. A memory map would be shorter to write, but
the pages that it has touched count as resident until it goes, and one live tensor keeps all of it mapped.

Pickled checkpoints (``.bin``, ``.pt``) are never opened: unpickling runs whatever code the file holds.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptqcli.errors import PTQError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DEFAULT_SHARD_BYTES = 4_000_000_000

# The safetensors library refuses longer headers, so a longer one means garbage and not a large model.
_MAX_HEADER_BYTES = 100_000_000
_CHUNK_BYTES = 4 << 20

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class _Spec:
    """What a header says of one tensor, before it says where."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class _Entry(_Spec):
    """A stored tensor: its bytes begin at ``offset`` from the start of ``file``."""

    file: Path
    offset: int


class CheckpointReader:
    """Tensors of a checkpoint folder by name. Opening checks every header; no tensor is read before ``read``.

    Raises PTQError, naming the file, for: a missing folder; no safetensors weights; a truncated or corrupt
    file; an index that names a missing file or tensor.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._entries = {entry.name: entry for entry in _folder_entries(self.folder)}

    @property
    def names(self) -> tuple[str, ...]:
        """All tensor names, sorted."""
        return tuple(sorted(self._entries))

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors together, headers not counted."""
        return sum(entry.nbytes for entry in self._entries.values())

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of ``name``."""
        return self._entry(name).dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Stored shape of ``name``."""
        return self._entry(name).shape

    def nbytes(self, name: str) -> int:
        """Bytes that ``name`` takes on disk and, once read, in memory."""
        return self._entry(name).nbytes

    def read(self, name: str) -> Tensor:
        """The tensor ``name`` in its stored dtype and shape, on the CPU and in memory of its own.

        Raises PTQError if there is no such tensor or its file has become shorter since it was opened.
        """
        entry = self._entry(name)
        data = torch.empty(entry.nbytes, dtype=torch.uint8)
        with open(entry.file, "rb") as file:
            file.seek(entry.offset)
            if file.readinto(data.numpy().data) != entry.nbytes:
                raise PTQError(f"{entry.file} was cut short while it was read (tensor {name})")
        return data.view(entry.dtype).reshape(entry.shape)

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise PTQError(f"{self.folder} holds no tensor {name}")
        return self._entries[name]


def _folder_entries(folder: Path) -> list[_Entry]:
    if not folder.is_dir():
        raise PTQError(f"{folder} is not a folder; give the one that holds config.json and the weights")
    if (folder / SINGLE_FILE).is_file():
        return _file_entries(folder / SINGLE_FILE)
    if (folder / INDEX_FILE).is_file():
        return _indexed_entries(folder)
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        found = f"{folder} holds only pickled weights ({pickles[0]})"
        raise PTQError(f"{found}, which are never opened; convert them to safetensors")
    raise PTQError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}")


def _indexed_entries(folder: Path) -> list[_Entry]:
    index_path = folder / INDEX_FILE
    try:
        weight_map = json.loads(index_path.read_bytes())["weight_map"]
        files = sorted(set(weight_map.values()))
        by_file = {file: {entry.name: entry for entry in _shard_entries(index_path, file)} for file in files}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PTQError(f"{index_path} is not a safetensors index: {error!r}") from error
    for name, file in weight_map.items():
        if name not in by_file[file]:
            raise PTQError(f"{index_path} places tensor {name} in {file}, which does not hold it")
    return [by_file[file][name] for name, file in weight_map.items()]


def _shard_entries(index_path: Path, file: str) -> list[_Entry]:
    if Path(file).name != file:
        raise PTQError(f"{index_path} names {file}, which is not a file name in the same folder")
    path = index_path.parent / file
    if not path.is_file():
        raise PTQError(f"{index_path} names {file}, which is missing; download it again")
    return _file_entries(path)


def _file_entries(path: Path) -> list[_Entry]:
    """Entries of one safetensors file, checked to cover the rest of the file exactly."""
    header, start = _read_header(path)
    header.pop("__metadata__", None)
    entries = [_parse_entry(path, start, name, item) for name, item in header.items()]
    end = start
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset != end:
            raise PTQError(f"{path} is corrupt: tensor {entry.name} overlaps another or leaves a hole")
        end += entry.nbytes
    size = path.stat().st_size
    if size < end:
        raise PTQError(f"{path} is truncated: {size} bytes of {end}; download or write it again")
    if size > end:
        raise PTQError(f"{path} is corrupt: {size - end} bytes after the last tensor")
    return entries


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The parsed JSON header and the offset at which tensor bytes start."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > _MAX_HEADER_BYTES or length > size - 8:
            raise PTQError(f"{path} is truncated or not a safetensors file: {size} bytes, header {length}")
        text = file.read(length)
    try:
        header = json.loads(text)
    except ValueError as error:
        raise PTQError(f"{path} is not a safetensors file: its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise PTQError(f"{path} is not a safetensors file: its header is not a JSON object")
    return header, 8 + length


def _parse_entry(path: Path, start: int, name: str, item: Any) -> _Entry:
    try:
        dtype_name, shape, (begin, end) = str(item["dtype"]), tuple(item["shape"]), item["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise PTQError(f"{path} is corrupt: the header entry of tensor {name} is malformed") from error
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, begin, end)):
        raise PTQError(f"{path} is corrupt: the header entry of tensor {name} is malformed")
    if dtype_name not in _DTYPES:
        raise PTQError(f"{path}: tensor {name} has dtype {dtype_name}, which is not supported")
    entry = _Entry(name, _DTYPES[dtype_name], shape, path, start + begin)
    if end - begin != entry.nbytes:
        raise PTQError(f"{path} is corrupt: tensor {name} has {end - begin} bytes and needs {entry.nbytes}")
    return entry


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
