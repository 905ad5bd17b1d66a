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

    A level may stand twice, as zero does in FP4: what lies below it gets the lower code, what lies above it the higher one.
    Raises UsageError unless ``levels`` are 2 to 256 rising numbers.
    """

    levels: tuple[float, ...]

    def __post_init__(self) -> None:
        steps = [high - low for low, high in pairwise(self.levels)]
        if not 2 <= len(self.levels) <= 256 or not all(step >= 0 for step in steps) or not any(steps):
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


# The levels to the last bit of float32, as the files of QLoRA's authors hold them. NF4: Dettmers et al. 2023, appendix E. FP4: a sign, two
# bits of exponent, one of fraction, over the largest.
NF4 = Codebook((
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495,
    0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
))  # fmt: skip
_FP4_MAGNITUDES = (
    0.0, 0.0052083334885537624, 0.1666666716337204, 0.25, 0.3333333432674408, 0.5, 0.6666666865348816, 1.0,
)  # fmt: skip
FP4 = Codebook((*(0.0 - level for level in reversed(_FP4_MAGNITUDES)), *_FP4_MAGNITUDES))

CODEBOOKS = {"nf4": NF4, "fp4": FP4}


@functools.lru_cache(maxsize=16)
def _tensor(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Made once: a solver asks for every column."""
    return torch.tensor(values, dtype=dtype, device=device)
