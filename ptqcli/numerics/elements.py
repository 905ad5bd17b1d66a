"""Elements: what a code stands for before its group's scale is applied.

An element turns a weight in units of its group's scale, ``w / s``, into a code, and a code back into such a value:

    Int         codes 0 .. 2^bits - 1 stand for the integers around a zero point, u - z
    Codebook    codes count the levels of a sorted list, such as NF4's or FP4's; there is no zero point

Codes are whole numbers in the dtype of the weights, so that solvers go on computing with them.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from ptqcli.errors import UsageError


class Element(Protocol):
    """The values that codes stand for. units, codes, zero are floating tensors that broadcast; none is changed."""

    @property
    def ends(self) -> tuple[float, float]:
        """The lowest value and the highest, with the zero point of a symmetric scheme."""

    @property
    def span(self) -> float:
        """Distance from the lowest value to the highest."""

    @property
    def slack(self) -> float:
        """The most by which the nearest code misses a value between the ends; what is missed by more lies beyond them."""

    def nearest(self, units: Tensor, zero: Tensor) -> Tensor:
        """The codes whose values are nearest to ``units``."""

    def decode(self, codes: Tensor, zero: Tensor) -> Tensor:
        """The values of ``codes``."""

    def miss(self, codes: Tensor, units: Tensor, zero: Tensor) -> Tensor:
        """``decode(codes, zero) - units``, rounded in the element's own way."""


@dataclass(frozen=True)
class Int:
    """Integers of ``bits`` bits: code ``u`` with zero point ``z`` stands for ``u - z``. Ties go to the even code."""

    bits: int

    @property
    def ends(self) -> tuple[int, int]:
        """Those of two's complement."""
        return -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1

    @property
    def span(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def slack(self) -> float:
        """Half a step."""
        return 0.5

    def nearest(self, units: Tensor, zero: Tensor) -> Tensor:
        """``clamp(round(units + zero), 0, 2^bits - 1)``."""
        return (units + zero).round_().clamp_(0, self.span)

    def decode(self, codes: Tensor, zero: Tensor) -> Tensor:
        """``codes - zero``."""
        return codes - zero

    def miss(self, codes: Tensor, units: Tensor, zero: Tensor) -> Tensor:
        """Taken among the codes, ``codes - (units + zero)``, as ``nearest`` sees it: never above half a step between the ends."""
        return codes - (units + zero)


@dataclass(frozen=True)
class Codebook:
    """Code ``u`` stands for ``levels[u]``. Ties go to the lower code; zero points are ignored.

    Raises UsageError unless ``levels`` are 2 to 256 numbers that rise.
    """

    levels: tuple[float, ...]

    def __post_init__(self) -> None:
        if not 2 <= len(self.levels) <= 256 or not all(low < high for low, high in pairwise(self.levels)):
            raise UsageError(f"the levels of a codebook are 2 to 256 rising numbers, not {self.levels}")

    @property
    def ends(self) -> tuple[float, float]:
        """The first level and the last."""
        return self.levels[0], self.levels[-1]

    @property
    def span(self) -> float:
        """From the first level to the last."""
        return self.levels[-1] - self.levels[0]

    @property
    def slack(self) -> float:
        """Half the widest gap between two levels."""
        return max(high - low for low, high in pairwise(self.levels)) / 2

    def nearest(self, units: Tensor, zero: Tensor) -> Tensor:
        """The place of the nearest level."""
        middles = tuple((low + high) / 2 for low, high in pairwise(self.levels))
        return torch.bucketize(units.contiguous(), _tensor(middles, units.dtype, units.device)).to(units.dtype)

    def decode(self, codes: Tensor, zero: Tensor) -> Tensor:
        """``levels[codes]`` in the dtype of the codes."""
        return _tensor(self.levels, codes.dtype, codes.device)[codes.long()]

    def miss(self, codes: Tensor, units: Tensor, zero: Tensor) -> Tensor:
        """``levels[codes] - units``."""
        return self.decode(codes, zero) - units


@functools.lru_cache(maxsize=16)
def _tensor(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Made once: a solver asks for every column."""
    return torch.tensor(values, dtype=dtype, device=device)
