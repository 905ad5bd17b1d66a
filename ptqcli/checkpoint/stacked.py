"""Matrices of a stored stack, such as the experts of a layer, each as a tensor of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ptqcli.checkpoint.tensors import TensorSource


@dataclass(frozen=True)
class StackPart:
    """Rows start..stop of matrix number ``index`` of the tensor ``stack``, [count, rows, columns], or where it is ``turned``
    [count, columns, rows]."""

    stack: str
    index: int
    start: int
    stop: int
    turned: bool


class UnstackedTensors(TensorSource):
    """Another source in which ``parts`` are in the place of the stacks that they are cut out of."""

    def __init__(self, stored: TensorSource, parts: Mapping[str, StackPart]) -> None:
        self._stored, self._parts = stored, dict(parts)
        self._stacks = {part.stack for part in parts.values()}

    @property
    def names(self) -> tuple[str, ...]:
        """All tensor names, sorted."""
        return tuple(sorted({*self._stored.names, *self._parts} - self._stacks))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of ``name``. Raises PTQError, here and below, if there is no such tensor."""
        if name not in self._parts:
            return self._stored.shape(name)
        part = self._parts[name]
        _count, *matrix = self._stored.shape(part.stack)
        return part.stop - part.start, matrix[0 if part.turned else 1]

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of ``name``."""
        return self._stored.dtype(self._parts[name].stack if name in self._parts else name)

    def read(self, name: str) -> Tensor:
        """The tensor ``name``, contiguous and in memory of its own."""
        if name not in self._parts:
            return self._stored.read(name)
        part = self._parts[name]
        matrix = self._stored.read_entry(part.stack, part.index)
        rows = matrix.t() if part.turned else matrix
        return rows[part.start : part.stop].clone(memory_format=torch.contiguous_format)
