"""Round to nearest: every weight takes the closest code of its group's grid. StatisticsRequest no calibration.

The baseline of every paper in the field. Each group's range is fitted to the least squared error first (``scale_search="mse"``), which is
what makes it usable at 2 and 3 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ptqcli.numerics.grids import RangeSearch
from ptqcli.numerics.scheme import Scheme
from ptqcli.numerics.weight import round_to_nearest
from ptqcli.options import check_choices
from ptqcli.solvers import MatrixSolver, OnProgress, Solution, SolveNotes, ignore_progress
from ptqcli.solvers.scale_search import FitsGrids, scale_search_option, signed_option


@dataclass(frozen=True)
class RTN(FitsGrids, MatrixSolver):
    """Round to nearest. scale_search, signed: see ``ptqcli.solvers.scale_search``."""

    name: ClassVar[str] = "rtn"
    summary: ClassVar[str] = "round to nearest"
    usual_search: ClassVar[str] = "mse"
    scale_search: str = scale_search_option()
    signed: bool = signed_option()

    def __post_init__(self) -> None:
        check_choices(self)

    def solve(
        self,
        weight: Tensor,
        prepared: object,
        scheme: Scheme,
        scale_dtype: torch.dtype,
        ranges: RangeSearch | None = None,
        progress: OnProgress = ignore_progress,
    ) -> Solution:
        """Nearest codes for ``weight``, float [out, in]. Raises UsageError if the group size does not divide ``in``."""
        quantized = round_to_nearest(weight, scheme, scale_dtype, ranges or self.ranges)
        groups = weight.reshape(*quantized.scale.shape, -1)  # [out, groups, columns of a group]
        return Solution(quantized, SolveNotes(zero_groups=int((groups == 0).all(dim=2).sum())))
