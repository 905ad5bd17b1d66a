"""OmniQuant's learnable weight clipping (Shao et al. 2024, arXiv 2308.13137, section 3.2).

Codes are rounded to nearest; what is learned is how far each group's range reaches, through sigmoids of one number for either end:

    low = sigmoid(l) min(w, 0)        high = sigmoid(u) max(w, 0)        l = u = 4 to begin with, so that .982 of the range is kept

    asymmetric:  s = (high - low) / (2^b - 1),  z = round(-low / s)
    symmetric:   s = -m / 2^(b-1),  m the one of low and high with the larger magnitude,  z = 2^(b-1)

The paper's symmetric grid, max |w| / (2^(b-1) - 1), leaves one code unused, which ours does not. AdamW without weight decay, rate 1e-2, 20
epochs (40 at 2 bits) of steps of one calibration window. The paper's other half, the learnable equivalent transformation, is the transform
let: ``let+omniquant`` is OmniQuant whole, one half after the other. Left out: at 2 bits, the loss against the original block on quantized
inputs that the published code adds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ptqcli.numerics.scheme import Scheme
from ptqcli.solvers import LinearTask, SolveNotes
from ptqcli.solvers.learned import BlockLearner
from ptqcli.solvers.rounding import Rounding, Start, range_grid, range_of

EPOCHS, WINDOWS, RATE = 20, 1, 1e-2
BEGIN = 4.0  # l and u


@dataclass(frozen=True, kw_only=True)
class OmniQuant(BlockLearner):
    """OmniQuant with its options."""

    name: ClassVar[str] = "omniquant"
    summary: ClassVar[str] = "OmniQuant: clipping of each group learned from the output of blocks"

    @property
    def batch(self) -> int:
        """See ``BlockLearner``."""
        return self.batch_size or WINDOWS

    def steps(self, windows: int) -> int:
        """See ``BlockLearner``."""
        return self.iters or EPOCHS * windows // self.batch

    def rounding(self, start: Start) -> Rounding:
        """See ``BlockLearner``."""
        return Clipping(start)

    def optimizer(self, rounding: Rounding, steps: int) -> torch.optim.Optimizer:
        """See ``BlockLearner``."""
        return torch.optim.AdamW(rounding.parameters(), lr=self.lr or RATE, weight_decay=0.0)


class Clipping(Rounding):
    """The parameters are named as above."""

    def __init__(self, start: Start) -> None:
        super().__init__(start)
        self.hold(start.weight)
        self.l, self.u = nn.Parameter(start.per_group(BEGIN)), nn.Parameter(start.per_group(BEGIN))

    @classmethod
    def of(cls, weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype, signed: bool) -> Clipping:
        """The clipping of a float32 ``weight`` [out, in] that belongs to no task."""
        task = LinearTask(name="", weight=weight, scheme=scheme, scale_dtype=scale_dtype)
        return cls(Start(task=task, weight=weight, importance=torch.ones_like(weight[0]), notes=SolveNotes(), signed=signed))

    def hold(self, weight: Tensor) -> None:
        """Clip ``weight`` [out, in] from now on, which may have a graph."""
        self.weight = weight.reshape(len(weight), self.scheme.group_count(weight.shape[1]), -1)
        self.low, self.high = range_of(self.weight, self.scheme)

    def grid(self) -> tuple[Tensor, Tensor]:
        """See ``Rounding``."""
        return range_grid(self, self.l.sigmoid() * self.low, self.u.sigmoid() * self.high)

    def units(self, scale: Tensor) -> Tensor:
        """See ``Rounding``."""
        return self.weight / scale
