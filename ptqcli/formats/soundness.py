"""Whether everything in a checkpoint can be read and fits its model: what loading it finds out, without keeping any of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from ptqcli.checkpoint.tensors import TensorSource
from ptqcli.errors import PTQError
from ptqcli.formats.packed_checkpoint import PackedCheckpoint


def flaws(packed: PackedCheckpoint, tell: Callable[[int, int, str], None] = lambda *_: None) -> Iterator[str]:
    """Every tensor of ``packed`` that a reader would refuse, in a line that names it and its file: codes and zero points out of range,
    scales that are none, numbers that are not finite, shapes and dtypes that are not the model's, what is missing.

    One tensor, or one linear, is in memory at a time. tell: is told how many are behind us, of how many, and the name of the next.
    """
    plain = packed.plain()
    total = len(packed.schemes) + len(plain)
    for done, name in enumerate(packed.schemes):
        tell(done, total, name)
        try:
            packed.weight(name)
            bias = packed.names.disk(f"{name}.bias")
            if bias is not None:
                packed.read_plain(f"{name}.bias", bias)
        except PTQError as error:
            yield _with_file(error, packed.path(name))
    for done, (name, stored) in enumerate(plain.items(), start=len(packed.schemes)):
        tell(done, total, name)
        try:
            packed.read_plain(name, stored)
        except PTQError as error:
            yield _with_file(error, packed.path(name))
    for name in packed.names.missing:
        yield f"{packed.folder}: no tensor is stored for {name}"


def plain_flaws(tensors: TensorSource, tell: Callable[[int, int, str], None] = lambda *_: None) -> Iterator[str]:
    """As ``flaws``, of a model that is not quantized: tensors that cannot be read, or hold numbers that are not finite."""
    names = tensors.names
    for done, name in enumerate(names):
        tell(done, len(names), name)
        try:
            tensors.read(name)
        except PTQError as error:
            yield str(error)


def _with_file(error: PTQError, file: Path) -> str:
    return str(error) if file.name in str(error) else f"{file}: {error}"
