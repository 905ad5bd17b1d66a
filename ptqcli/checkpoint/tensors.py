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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ptqcli.errors import PTQError

SINGLE_FILE = "model.safetensors"

INDEX_FILE = "model.safetensors.index.json"

# The safetensors library refuses longer headers, so a longer one means garbage and not a large model.
_MAX_HEADER_BYTES = 100_000_000

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


class TensorSource(Protocol):
    """Named tensors of a model, wherever they are stored."""

    @property
    def names(self) -> tuple[str, ...]:
        """All tensor names, sorted."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Stored shape of ``name``. Raises PTQError, here and below, if there is no such tensor."""

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of ``name``."""

    def nbytes(self, name: str) -> int:
        """Bytes that ``name`` takes on disk and, once read, in memory."""

    def read(self, name: str) -> Tensor:
        """The tensor ``name`` in its stored dtype and shape, on the CPU and in memory of its own."""


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
