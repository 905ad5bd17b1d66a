"""FlexRound (Lee et al. 2023, arXiv 2306.00317): rounding learned by element-wise division.

Where AutoRound adds to w / s before it is rounded, FlexRound divides (equation 2):

    W' = s (clip(round(w / (s S2 s3)) + z, 0, 2^b - 1) - z)

S2 [out, in] is learned for each weight, s3 for each row, and so is s, all by their logarithms, d2, d3 and d1: they stay positive and start
at 1, 1 and s0, which is rounding. By the reciprocal rule the gradient of S2 is proportional to w, so large weights move further than small
ones, and a code may move by more than one.

s0 has the least squared error among shrunk ranges; from a solver's codes it is the solver's. Adam, its rate falling to 0 by half a cosine:
3e-3 (2.5e-3 at 3 bits and below), 5000 steps of 2 calibration windows, as published for Llama-2-7B. Left out: the mixing of original into
quantized inputs, which the published code has as an option, and LRQ's factors of low rank in place of d2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ptqcli.numerics.ranges import SquaredError
from ptqcli.solvers.learned import SolverStart
from ptqcli.solvers.rounding import Rounding, Start

STEPS, WINDOWS = 5000, 2
RATE, NARROW_RATE = 3e-3, 2.5e-3


@dataclass(frozen=True, kw_only=True)
class FlexRound(SolverStart):
    """FlexRound with its options."""

    name: ClassVar[str] = "flexround"
    summary: ClassVar[str] = "FlexRound: rounding learned by element-wise division, from the output of blocks"

    @property
    def batch(self) -> int:
        """See ``BlockLearner``."""
        return self.batch_size or WINDOWS

    def steps(self, windows: int) -> int:
        """See ``BlockLearner``."""
        return self.iters or STEPS

    def rounding(self, start: Start) -> Rounding:
        """See ``BlockLearner``."""
        return ElementDivision(start)

    def optimizer(self, rounding: Rounding, steps: int) -> torch.optim.Optimizer:
        """See ``BlockLearner``."""
        return torch.optim.Adam(rounding.parameters(), lr=self.lr or (RATE if rounding.scheme.bits > 3 else NARROW_RATE))

    def decay(self, share: float) -> float:
        """Half a cosine, from 1 to 0."""
        return (1 + math.cos(math.pi * share)) / 2


class ElementDivision(Rounding):
    """The parameters are named as above."""

    def __init__(self, start: Start) -> None:
        super().__init__(start)
        self.scale, self.zero = start.grid() or start.fitted(SquaredError(start.signed))
        self.d1 = nn.Parameter(start.per_group(0.0))
        self.d2 = nn.Parameter(torch.zeros_like(self.weight))
        self.d3 = nn.Parameter(torch.zeros_like(self.weight[:, :1, :1]))

    def grid(self) -> tuple[Tensor, Tensor]:
        """See ``Rounding``."""
        return self.storable(self.scale * self.d1.exp()), self.zero

    def units(self, scale: Tensor) -> Tensor:
        """See ``Rounding``."""
        return self.weight / (scale * (self.d2 + self.d3).exp())
