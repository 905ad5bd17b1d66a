"""GGUF files, written a tensor at a time.

The header needs names, types and shapes only, so that it is written first, by the gguf package; tensors follow in any order, each in the
place that it has. The file grows under a temporary name beside its own. When everything is in it, it is forced to the disk, opened as any
other file, compared with what was to be written, and renamed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ptqcli.checkpoint.directory import named
from ptqcli.checkpoint.gguf_file import ALIGNMENT, SUFFIX, GGUFFile, StoredTensor, TensorInfo
from ptqcli.errors import PTQError, UsageError
from ptqcli.model.gguf_architectures import gguf_package
from ptqcli.temporary import growing_file, written_file

WRITER_KEY, WRITER = "general.quantized_by", "ptqcli"  # by which a file is known to be ours

INTEGERS = ("tokenizer.ggml.token_type",)  # arrays of signed numbers; all others are unsigned


class GGUFWriting:
    """A file that is being written; a context, at whose good end the file is in its place and at whose bad end nothing is left.

    metadata: keys and values, ``general.architecture`` among them. partial: where the file grows. Raises UsageError if there is such a file
    and it is not to be overwritten, PTQError for a tensor that is written twice, not at all, or in another size.
    """

    def __init__(self, path: Path, metadata: Mapping[str, Any], tensors: Sequence[TensorInfo], overwrite: bool = False) -> None:
        check_target(path, overwrite)
        self.path, self._tensors, self._left = path, {tensor.name: tensor for tensor in tensors}, {tensor.name for tensor in tensors}
        with named(path):
            self.partial, self._lock = growing_file(path)
        try:
            self._write_header(metadata, tensors)
            self._stored = self._places()
        except BaseException:
            self._remove()
            raise

    def _remove(self) -> None:
        self.partial.unlink(missing_ok=True)
        os.close(self._lock)

    def __enter__(self) -> GGUFWriting:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._remove()

    def write(self, name: str, data: Tensor) -> None:
        """Write the bytes of tensor ``name``, uint8 [rows, bytes of a row]."""
        if name not in self._left:
            raise PTQError(f"{self.path}: tensor {name} was written twice, or is none of the file's")
        stored = self._stored[name]
        if data.nbytes != stored.nbytes:
            raise PTQError(f"{self.path}: tensor {name} has {data.nbytes} bytes and takes {stored.nbytes}")
        with named(self.path), open(self.partial, "r+b") as file:
            file.seek(stored.start)
            file.write(data.contiguous().numpy().data)
        self._left.discard(name)

    def _write_header(self, metadata: Mapping[str, Any], tensors: Sequence[TensorInfo]) -> None:
        header = header_bytes(metadata, tensors)
        with named(self.path):
            self.partial.write_bytes(header)
            os.truncate(self.partial, len(header) + sum(-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors))

    def _places(self) -> dict[str, StoredTensor]:
        """Where each tensor is to be, as a reader of the header finds it."""
        found = GGUFFile(self.partial).stored
        for name, tensor in self._tensors.items():
            if found[name].shape != tensor.shape or found[name].kind != tensor.kind:
                raise PTQError(f"{self.path}: the gguf package describes tensor {name} as another one; take another version of it")
        return found

    def _finish(self) -> None:
        if self._left:
            raise PTQError(f"{self.path}: tensor {min(self._left)} was not written; this is a defect")
        with named(self.path):
            with open(self.partial, "r+b") as file:
                os.fsync(file.fileno())
            os.chmod(self.partial, 0o666 & ~_umask())
            os.replace(self.partial, self.path)


def header_bytes(metadata: Mapping[str, Any], tensors: Sequence[TensorInfo]) -> bytes:
    """What stands before the bytes of the tensors, which follow in this order, each filled up to a multiple of ALIGNMENT."""
    import numpy as np

    gguf = gguf_package()
    with written_file() as path:  # the package writes to files only
        writer = gguf.GGUFWriter(path, metadata["general.architecture"])
        for key, value in metadata.items():
            if key != "general.architecture":  # which the writer puts first
                writer.add_key_value(key, value, *_value_type(gguf, key, value))
        for tensor in tensors:
            number = gguf.GGMLQuantizationType(tensor.kind.number)
            byte_shape = (*tensor.shape[:-1], tensor.kind.row_bytes(tensor.shape[-1]))
            writer.add_tensor_info(tensor.name, byte_shape, np.dtype(np.uint8), tensor.nbytes, raw_dtype=number)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        header = path.read_bytes()
    return header + bytes(-len(header) % ALIGNMENT)


def check_target(path: Path, overwrite: bool) -> None:
    """Raise UsageError if a file must not be written to ``path``."""
    if path.suffix != SUFFIX:
        raise UsageError(f"{path}: a GGUF file is called something{SUFFIX}; choose such a name")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: there is no folder {path.parent}; make it first")
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise UsageError(f"{path}: already exists; choose another name, or replace it with --overwrite")
    if not _is_ours(path):
        raise UsageError(f"{path}: was not written by ptqcli and will not be replaced; choose another name")


def _is_ours(path: Path) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    try:
        return str(GGUFFile(path).metadata.get(WRITER_KEY, "")).startswith(WRITER)
    except PTQError:
        return False


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _value_type(gguf: Any, key: str, value: Any) -> tuple[Any, ...]:
    """The type of ``value`` in the file, and that of its entries."""
    types = gguf.GGUFValueType
    if isinstance(value, list):
        entry = types.INT32 if key in INTEGERS else _value_type(gguf, key, value[0])[0] if value else types.STRING
        return types.ARRAY, entry
    if isinstance(value, bool):
        return (types.BOOL,)
    return ({str: types.STRING, int: types.UINT32, float: types.FLOAT32}[type(value)],)
