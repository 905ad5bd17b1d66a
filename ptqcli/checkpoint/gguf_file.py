"""A GGUF file, opened: what its header says, and its tensors one at a time.

    "GGUF", u32 version, u64 tensors, u64 keys          all little-endian
    keys        string, u32 type, value                 a string: u64 length, UTF-8; an array: u32 type, u64 length, values
    tensors     string, u32 dimensions, u64 each, fastest first, u32 type, u64 offset from the beginning of the data
    data        from the next multiple of ``general.alignment`` (32) on, each tensor at such a multiple

Version 2 is the same, version 1 (2023) is not read. Nothing is believed before it is checked: every length against what the file still
holds, every type against those that are known, every tensor against the end of the file and the other tensors. Long arrays, which are
vocabularies, are checked and left where they are until they are asked for.

Tensors are read, not mapped into memory, for the reason that ``checkpoint.tensors`` gives.
"""

from __future__ import annotations

import math
import os
import stat
import struct
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ptqcli.checkpoint.gguf_blocks import BY_NUMBER, BlockType
from ptqcli.checkpoint.tensors import MOST_NAME_CHARACTERS, Stamp
from ptqcli.errors import PTQError
from ptqcli.untrusted import shown

SUFFIX = ".gguf"
MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32

# The largest vocabularies, of 260,000 words with their merges, make headers of 15 MB.
MOST_HEADER_BYTES = 256 << 20
MOST_TENSORS = 200_000
MOST_KEYS = 10_000
MOST_DIMENSIONS = 4
LONGEST_KEY = 65_535  # as the specification says
LONGEST_KEPT = 4_096  # entries of an array that is handed out
DEEPEST_ARRAY = 2

STRING, ARRAY, BOOL = 8, 9, 7
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d", BOOL: "B"}  # type -> as ``struct`` calls it


@dataclass(frozen=True)
class LongArray:
    """An array that is left in the file. count: of its entries. start: of the array in the file, its type first."""

    count: int
    start: int = field(default=0, compare=False)


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """What a header says of a tensor. shape: as torch has it, slowest first."""

    name: str
    kind: BlockType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.kind.row_bytes(self.shape[-1]) * math.prod(self.shape[:-1])


@dataclass(frozen=True, kw_only=True)
class StoredTensor(TensorInfo):
    """A tensor of a file. start: of its bytes."""

    start: int


class GGUFFile:
    """A GGUF file whose header is checked. Raises PTQError, naming it, for one that is damaged or of a kind that is not read.

    metadata: its keys and values, strings, numbers, bools and lists of those; a vocabulary is a ``LongArray``.
    stored: its tensors by name.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.stamp = path, Stamp(path)
        try:
            self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        except (OSError, ValueError) as error:
            raise PTQError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
        weakref.finalize(self, os.close, self._descriptor)
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise PTQError(f"{path}: is no file but a pipe, a device or the like")
        self.size = status.st_size
        with open(self._descriptor, "rb", closefd=False) as file:
            self.metadata, self.stored = _Header(file, path, self.size).read()

    def read(self, name: str) -> Tensor:
        """The bytes of a tensor, uint8 [rows, bytes of a row], with all dimensions but the last as rows.

        Raises PTQError if there is no such tensor, or if the file has become shorter.
        """
        if name not in self.stored:
            raise PTQError(f"{self.path}: holds no tensor {name}")
        tensor = self.stored[name]
        data = bytearray(tensor.nbytes)
        with open(self._descriptor, "rb", closefd=False) as file:
            file.seek(tensor.start)
            done = file.readinto(data)
        if done != len(data):
            raise PTQError(f"{self.path}: tensor {name} cannot be read any more; has the file changed?")
        return torch.frombuffer(data, dtype=torch.uint8).reshape(-1, tensor.kind.row_bytes(tensor.shape[-1]))

    def array(self, key: str, kind: type[str] | type[int] | type[float]) -> list[Any]:
        """The array under ``key``, however long; empty where there is none. Raises PTQError for anything else."""
        value = self.metadata.get(key, [])
        if isinstance(value, LongArray):
            with open(self._descriptor, "rb", closefd=False) as file:
                file.seek(value.start)
                header = _Header(file, self.path, self.size)
                header.longest = value.count
                value = header.array(0)
        if not isinstance(value, list) or not all(type(entry) is kind for entry in value):
            raise PTQError(f"{self.path}: {key} is {shown(value)}, not an array of the right kind; the file is damaged")
        return value

    def text(self, key: str) -> str:
        """The text under ``key``. Raises PTQError for anything else."""
        value = self.metadata.get(key)
        if not isinstance(value, str):
            raise PTQError(f"{self.path}: {key} is {shown(value)}, not a text; the file is incomplete")
        return value

    def number(self, key: str, kind: type[int] | type[float], default: Any = None) -> Any:
        """The positive number under ``key``, ``default`` where there is none. Raises PTQError for anything else."""
        value = self.metadata.get(key, default)
        if value is default and key not in self.metadata and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int) or not 0 < value < 2**31:
            raise PTQError(f"{self.path}: {key} is {shown(value)}, not a positive number; the file is damaged or incomplete")
        return value


class _Header:
    """Reads the header of a file, and no byte further."""

    def __init__(self, file: BinaryIO, path: Path, size: int) -> None:
        self.file, self.path, self.size = file, path, size
        self.end = min(size, MOST_HEADER_BYTES)
        self.longest = LONGEST_KEPT

    def read(self) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
        """Metadata and tensors."""
        if self.bytes(4) != MAGIC:
            raise PTQError(f"{self.path}: is no GGUF file")
        (version,) = self.numbers("I", 1)
        if version not in VERSIONS:
            raise PTQError(f"{self.path}: is GGUF of version {version} or big-endian; what is read: versions 2 and 3, little-endian")
        tensors, keys = self.numbers("Q", 2)
        if tensors > MOST_TENSORS or keys > MOST_KEYS:
            raise PTQError(f"{self.path}: names {tensors} tensors and {keys} keys, more than any model has; the file is damaged")
        metadata = dict(self.pairs(keys))
        stored = self.tensors(tensors, self.alignment(metadata))
        return metadata, stored

    def pairs(self, count: int) -> Iterator[tuple[str, Any]]:
        """Keys and values. Raises PTQError for a key that comes twice."""
        seen = set()
        for _ in range(count):
            key = self.string(LONGEST_KEY)
            if key in seen:
                raise PTQError(f"{self.path}: the key {shown(key)} stands in it twice; the file is damaged")
            seen.add(key)
            yield key, self.value(self.numbers("I", 1)[0], 0)

    def value(self, kind: int, depth: int) -> Any:
        """A value of type ``kind``."""
        if kind == STRING:
            return self.string(MOST_HEADER_BYTES)
        if kind == ARRAY:
            return self.array(depth)
        return self.items(kind, 1)[0]

    def array(self, depth: int) -> Any:
        """A list, or a LongArray."""
        if depth == DEEPEST_ARRAY:
            raise PTQError(f"{self.path}: an array in its metadata nests deeper than any real one")
        start = self.file.tell()
        kind, count = self.numbers("I", 1)[0], self.numbers("Q", 1)[0]
        if kind == STRING and count > self.longest:
            for _ in range(self.fitting(count, 8)):
                self.bytes(self.numbers("Q", 1)[0])
            return LongArray(count, start)
        if kind in (STRING, ARRAY):
            return [self.value(kind, depth + 1) for _ in range(self.fitting(count, 8))]
        values = self.items(kind, count)
        return values if count <= self.longest else LongArray(count, start)

    def items(self, kind: int, count: int) -> list[Any]:
        """``count`` numbers or truth values."""
        if kind not in NUMBERS:
            raise PTQError(f"{self.path}: a value in its metadata is of type {kind}, which does not exist; the file is damaged")
        values = list(self.numbers(NUMBERS[kind], count))
        return [bool(value) for value in values] if kind == BOOL else values

    def alignment(self, metadata: dict[str, Any]) -> int:
        """What offsets are multiples of."""
        value = metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(value, int) or not 8 <= value <= 1 << 20 or value & (value - 1):
            raise PTQError(f"{self.path}: general.alignment is {shown(value)}, not a power of two from 8 on; the file is damaged")
        return value

    def tensors(self, count: int, alignment: int) -> dict[str, StoredTensor]:
        """The tensors by name, each inside the file and apart from the others."""
        described = [self.tensor() for _ in range(count)]
        begin = -(-self.file.tell() // alignment) * alignment
        found: dict[str, StoredTensor] = {}
        for name, kind, shape, offset in described:
            tensor = StoredTensor(name=name, kind=kind, shape=shape, start=begin + offset)
            if offset % alignment or tensor.start + tensor.nbytes > self.size:
                raise PTQError(f"{self.path}: tensor {shown(name)} reaches beyond the end of the file; it is truncated, download it again")
            if name in found:
                raise PTQError(f"{self.path}: tensor {shown(name)} stands in it twice; the file is damaged")
            found[name] = tensor
        self.refuse_overlap(sorted(found.values(), key=lambda tensor: tensor.start))
        return found

    def tensor(self) -> tuple[str, BlockType, tuple[int, ...], int]:
        """Name, type, shape and offset of one."""
        name = self.string(4 * MOST_NAME_CHARACTERS)
        (dimensions,) = self.numbers("I", 1)
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise PTQError(f"{self.path}: tensor {shown(name)} has {dimensions} dimensions; the file is damaged")
        shape = self.numbers("Q", dimensions)[::-1]
        number, offset = self.numbers("I", 1)[0], self.numbers("Q", 1)[0]
        if number not in BY_NUMBER:
            read = ", ".join(kind.name for kind in BY_NUMBER.values())
            raise PTQError(f"{self.path}: tensor {shown(name)} is of type {number} of ggml, which is not read; what is read: {read}")
        kind = BY_NUMBER[number]
        if not all(shape) or math.prod(shape) > 1 << 48 or shape[-1] % kind.columns:
            raise PTQError(f"{self.path}: tensor {shown(name)} of type {kind.name} has the shape {list(shape)}; the file is damaged")
        return name, kind, shape, offset

    def refuse_overlap(self, tensors: list[StoredTensor]) -> None:
        for before, after in pairwise(tensors):
            if before.start + before.nbytes > after.start:
                raise PTQError(f"{self.path}: tensors {shown(before.name)} and {shown(after.name)} overlap; the file is damaged")

    # Bytes

    def fitting(self, count: int, least: int) -> int:
        """``count``, if so many values of at least so many bytes can follow."""
        if count * least > self.end - self.file.tell():
            raise PTQError(f"{self.path}: its header ends early or is too long; the file is truncated or damaged, download it again")
        return count

    def bytes(self, count: int) -> bytes:
        return self.file.read(self.fitting(count, 1))

    def numbers(self, form: str, count: int) -> tuple[Any, ...]:
        width = struct.calcsize(f"<{form}")
        return struct.unpack(f"<{count}{form}", self.bytes(self.fitting(count, width) * width))

    def string(self, longest: int) -> str:
        (length,) = self.numbers("Q", 1)
        if length > longest:
            raise PTQError(f"{self.path}: a name in it has {length} bytes; the file is damaged")
        try:
            return self.bytes(length).decode()
        except UnicodeDecodeError as error:
            raise PTQError(f"{self.path}: a text in its header is not UTF-8; the file is damaged") from error
