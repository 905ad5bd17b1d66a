"""Named tensors of a model, read one at a time: from a folder of safetensors files, or from a model in memory.

A model on disk is one safetensors file, ``model.safetensors``, or several with ``model.safetensors.index.json``, which maps each tensor
to its file.

The safetensors library reads them, with its ``pread`` backend, into memory of their own. A memory map, its default, counts every page
that was touched as resident for as long as it is open: read tensor by tensor, a file of 1.9 GB raised resident memory by 1906 MB with a
map held open, by 91 MB with a map opened for each tensor and copied from, and by 69 MB, the size of the largest tensor, with ``pread``.

Pickled checkpoints (``.bin``, ``.pt``) are never opened: unpickling runs whatever code the file holds.

Every floating tensor is looked at when it is read: NaN or infinity, which no trained model has, tells of a damaged file or of a training
that diverged, and nothing that is made of it means anything.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ptqcli.errors import PTQError
from ptqcli.untrusted import one_line, read_json, shown

SINGLE_FILE = "model.safetensors"

INDEX_FILE = "model.safetensors.index.json"

# Headers of one checkpoint together. The largest public one, of 200,000 tensors, has 29 MB, and a MB takes a fifth of a second to read.
MOST_HEADER_BYTES = 48 << 20

MOST_NAME_CHARACTERS = 1_000

# The library's names of dtypes. It tells them without reading the tensor, but not as torch's.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


# Those in which weights are trained: whatever is stored otherwise is quantized, or no weight.
FLOATING = (torch.float32, torch.float16, torch.bfloat16)


class NoTensorError(PTQError, LookupError):
    """There is no tensor of that name."""


class TensorSource(Protocol):
    """Named tensors of a model, wherever they are stored."""

    @property
    def names(self) -> tuple[str, ...]:
        """All tensor names, sorted."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Stored shape of ``name``. Raises PTQError, here and below, if there is no such tensor."""

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of ``name``."""

    def read(self, name: str) -> Tensor:
        """The tensor ``name`` in its stored dtype and shape, on the CPU and in memory of its own."""

    def read_entry(self, name: str, index: int) -> Tensor:
        """Entry ``index`` of the first dimension of ``name``, as ``read`` gives the whole."""
        return self.read(name)[index]

    def nbytes(self, name: str) -> int:
        """Bytes that ``name`` takes on disk and, once read, in memory."""
        return math.prod(self.shape(name)) * self.dtype(name).itemsize

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(self.nbytes(name) for name in self.names)


class MemoryTensors(TensorSource):
    """The tensors of a model in memory, such as its ``state_dict()``; what is read is a copy."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)

    @property
    def names(self) -> tuple[str, ...]:
        """All tensor names, sorted."""
        return tuple(sorted(self._tensors))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of ``name``. Raises PTQError, here and below, if there is no such tensor."""
        return tuple(self._tensor(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of ``name``."""
        return self._tensor(name).dtype

    def read(self, name: str) -> Tensor:
        """A copy of ``name``, contiguous and on the CPU. Raises PTQError if it holds NaN or infinity."""
        tensor = self._tensor(name).detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        refuse_not_finite(tensor, f"the model in memory: tensor {name}")
        return tensor

    def _tensor(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise NoTensorError(f"the model in memory holds no tensor {name}")
        return self._tensors[name]


@dataclass(frozen=True)
class NewTensor:
    """A tensor made of stored ones. origin: the one whose shape and dtype it has. make: gives it, in any dtype, with what reads them."""

    origin: str
    make: Callable[[Callable[[str], Tensor]], Tensor]


class RewrittenTensors(TensorSource):
    """Another source in which ``new`` tensors take the place of stored ones of their names, or join them. Each is made when it is read."""

    def __init__(self, stored: TensorSource, new: Mapping[str, NewTensor]) -> None:
        self._stored, self._new = stored, dict(new)

    @property
    def names(self) -> tuple[str, ...]:
        """All tensor names, sorted."""
        return tuple(sorted({*self._stored.names, *self._new}))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of ``name``. Raises PTQError, here and below, if there is no such tensor."""
        return self._stored.shape(self._origin(name))

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of ``name``."""
        return self._stored.dtype(self._origin(name))

    def read(self, name: str) -> Tensor:
        """The tensor ``name``, rounded once to the dtype that it is stored in. Raises PTQError if that cannot hold it."""
        if name not in self._new:
            return self._stored.read(name)
        made = self._new[name].make(self._stored.read).to(self.dtype(name)).contiguous()
        if made.shape != self.shape(name):
            raise PTQError(f"{name}: is rewritten to {list(made.shape)}, and takes {list(self.shape(name))}")
        if not torch.isfinite(made).all():
            raise PTQError(f"{name}: rewriting leaves the range of {made.dtype}; start from a wider dtype")
        return made

    def _origin(self, name: str) -> str:
        return self._new[name].origin if name in self._new else name


class WidenedTensors(TensorSource):
    """Another source as if it stored every floating tensor in float32."""

    def __init__(self, stored: TensorSource) -> None:
        self._stored = stored

    @property
    def names(self) -> tuple[str, ...]:
        """All tensor names, sorted."""
        return self._stored.names

    def shape(self, name: str) -> tuple[int, ...]:
        """Stored shape of ``name``. Raises PTQError, here and below, if there is no such tensor."""
        return self._stored.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """float32 for a floating tensor."""
        stored = self._stored.dtype(name)
        return torch.float32 if stored in FLOATING else stored

    def read(self, name: str) -> Tensor:
        """The tensor ``name`` in that dtype."""
        return self._stored.read(name).to(self.dtype(name))

    def read_entry(self, name: str, index: int) -> Tensor:
        """Entry ``index`` of the first dimension of ``name``, in that dtype."""
        return self._stored.read_entry(name, index).to(self.dtype(name))


class SafetensorsFolder(TensorSource):
    """Tensors of a folder of safetensors files. Opening checks every header; no tensor is read before ``read``.

    single: the name of the file, where there is one for all tensors.
    Raises PTQError, naming the file, for: a missing folder; no safetensors weights; a truncated or corrupt
    file; an index that names a missing file or tensor.
    """

    def __init__(self, folder: str | Path, single: str = SINGLE_FILE) -> None:
        self.folder = Path(folder)
        self._index = Stamp(self.folder / INDEX_FILE)
        self._files: dict[str, _File] = _open_folder(self.folder, single)  # tensor -> the file that holds it

    def check_unchanged(self) -> None:
        """Raise PTQError, naming it, if a file was replaced, cut or written to since it was opened."""
        for stamp in (self._index, *dict.fromkeys(file.stamp for file in self._files.values())):
            stamp.check()

    @property
    def names(self) -> tuple[str, ...]:
        """All tensor names, sorted."""
        return tuple(sorted(self._files))

    @property
    def by_file(self) -> dict[str, list[str]]:
        """File name -> the tensors that are read from it."""
        found: dict[str, list[str]] = {}
        for name, file in self._files.items():
            found.setdefault(file.path.name, []).append(name)
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        """Stored shape of ``name``. Raises PTQError, here and below, if there is no such tensor."""
        return self._file(name).entries[name][0]

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of ``name``."""
        return self._file(name).entries[name][1]

    def read(self, name: str) -> Tensor:
        """The tensor ``name`` in its stored dtype and shape, on the CPU and in memory of its own.

        Raises PTQError if its file has become shorter since it was opened, or if it holds NaN or infinity.
        """
        return self._file(name).read(name)

    def read_entry(self, name: str, index: int) -> Tensor:
        """Entry ``index`` of the first dimension of ``name``, read by itself. Raises PTQError as ``read``."""
        return self._file(name).read(name, index)

    def _file(self, name: str) -> _File:
        if name not in self._files:
            raise NoTensorError(f"{self.folder} holds no tensor {name}")
        return self._files[name]


class Stamp:
    """What a file was when it was first looked at: its size, when it was written, and which file of that name it is.

    That it is another one of the same size and time, only its inode tells; but a file system over a network may number its files anew at
    any time, and so a new number counts only with a new time of change, which the copy of a file has.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._seen = path, self._look(path)

    @staticmethod
    def _look(path: Path) -> os.stat_result | None:
        try:
            return path.stat()
        except OSError:
            return None

    def _is_the_same(self, now: os.stat_result | None) -> bool:
        before = self._seen
        if before is None or now is None:
            return before is now
        if (before.st_size, before.st_mtime_ns) != (now.st_size, now.st_mtime_ns):
            return False
        return (before.st_dev, before.st_ino) == (now.st_dev, now.st_ino) or before.st_ctime_ns == now.st_ctime_ns

    def check(self) -> None:
        """Raise PTQError if it is no longer what it was."""
        if not self._is_the_same(self._look(self.path)):
            raise PTQError(f"{self.path}: has changed since the run began, so the result would be made of two models; run it again")


class _File:
    """One safetensors file, held open. entries: (shape, dtype) by tensor name, as its header gives them."""

    def __init__(self, path: Path) -> None:
        self.path, self.stamp = path, Stamp(path)
        try:
            self._opened: Any = safe_open(path, framework="pt", backend="pread")
            self.entries = {name: self._entry(name) for name in self._opened.keys()}  # noqa: SIM118 - it cannot be iterated
        except (SafetensorError, OSError, OverflowError) as error:
            raise PTQError(f"{path} is truncated or no safetensors file; download or write it again ({one_line(error)})") from error

    def _entry(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        if len(name) > MOST_NAME_CHARACTERS:
            raise PTQError(f"{self.path}: the tensor {name[:80]}... has a name of {len(name)} characters; {MOST_NAME_CHARACTERS} are read")
        described = self._opened.get_slice(name)
        if described.get_dtype() not in DTYPES:
            raise PTQError(f"{self.path}: tensor {name} has dtype {described.get_dtype()}, which is not supported")
        return tuple(described.get_shape()), DTYPES[described.get_dtype()]

    def read(self, name: str, entry: int | None = None) -> Tensor:
        try:
            tensor: Tensor = self._opened.get_tensor(name) if entry is None else self._opened.get_slice(name)[entry]
        except (SafetensorError, OSError) as error:
            raise PTQError(f"{self.path}: tensor {name} cannot be read any more; has the file changed? ({one_line(error)})") from error
        refuse_not_finite(tensor, f"{self.path}: tensor {name}")
        return tensor


def refuse_not_finite(tensor: Tensor, what: str) -> None:
    """Raise PTQError if a floating tensor holds NaN or infinity. what: how the message calls it."""
    if not tensor.is_floating_point() or not tensor.numel():
        return
    # 8-bit floats have no such reduction. The others: a tenth of the time of isfinite, and no memory, since NaN wins over all numbers.
    smallest, largest = (tensor.to(torch.float16) if tensor.itemsize == 1 else tensor).aminmax()
    if not (math.isfinite(smallest) and math.isfinite(largest)):
        raise PTQError(f"{what} holds NaN or infinity; the file is damaged, or the training diverged: take another copy or checkpoint")


def _open_folder(folder: Path, single: str) -> dict[str, _File]:
    if not folder.is_dir():
        raise PTQError(f"{folder} is not a folder; give the one that holds config.json and the weights")
    if (folder / single).is_file():
        _check_headers([folder / single])
        file = _File(folder / single)
        return dict.fromkeys(file.entries, file)
    if (folder / INDEX_FILE).is_file():
        return _open_indexed(folder / INDEX_FILE)
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        found = f"{folder} holds only pickled weights ({pickles[0]})"
        raise PTQError(f"{found}, which are never opened; convert them to safetensors")
    raise PTQError(f"{folder} holds neither {single} nor {INDEX_FILE}")


def _open_indexed(index: Path) -> dict[str, _File]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise PTQError(f"{index} is not a safetensors index: weight_map is {shown(weight_map)}, not a file for each tensor")
    shards = {file: _shard(index, file) for file in sorted(set(weight_map.values()))}
    _check_headers(shards.values())
    files = {file: _File(path) for file, path in shards.items()}
    for name, file in weight_map.items():
        if name not in files[file].entries:
            raise PTQError(f"{index} places tensor {name} in {file}, which does not hold it")
    _refuse_two_values(files.values())
    return {name: files[file] for name, file in weight_map.items()}


def _refuse_two_values(files: Iterable[_File]) -> None:
    """Some readers take the tensor of the shard that the index names, others that of the last shard which they open."""
    first: dict[str, _File] = {}
    for file in files:
        for name in file.entries:
            other = first.setdefault(name, file)
            if other is not file and not torch.equal(other.read(name), file.read(name)):
                raise PTQError(f"{file.path}: tensor {name} stands in {other.path.name} too, with other values; download both again")


def _shard(index: Path, file: str) -> Path:
    if Path(file).name != file:
        raise PTQError(f"{index} names {shown(file)}, which is not a file name in the same folder")
    path = index.parent / file
    if not os.path.isfile(path):  # where Path would raise if no file can have that name
        raise PTQError(f"{index} names {shown(file)}, which is missing; download it again")
    return path


def _check_headers(paths: Iterable[Path]) -> None:
    """Compare the lengths of the headers, with which the files begin, with what a checkpoint can need, before any is parsed."""
    total = 0
    for path in paths:
        with open(path, "rb") as file:
            total += min(int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size)
        if total > MOST_HEADER_BYTES:
            raise PTQError(f"{path}: the headers of the checkpoint have more than {MOST_HEADER_BYTES >> 20} MiB, which no model needs")
