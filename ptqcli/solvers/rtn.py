"""Round to nearest: every weight takes the closest code of its group's grid. Needs no calibration.

The baseline of every paper in the field. With ``scale_search="mse"`` each group's range is shrunk to the least squared error first,
which is what makes it usable at 2 and 3 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ptqcli.calibration.statistics import Hessian
from ptqcli.scheme import QuantizedWeight, Scheme, encode, fit
from ptqcli.solvers import Solution, SolveNotes


@dataclass(frozen=True)
class RTN:
    """Round to nearest with the scale search of ``ptqcli.scheme.fit``."""

    needs_hessian: ClassVar[bool] = False
    scale_search: str = "minmax"

    def prepare(self, hessian: Hessian | None, where: str) -> None:
        """Nothing to share."""

    def solve(self, weight: Tensor, prepared: None, scheme: Scheme, scale_dtype: torch.dtype) -> Solution:
        """Nearest codes for ``weight``, float [out, in]. Raises UsageError if the group size does not divide ``in``."""
        out_features, in_features = weight.shape
        groups = scheme.group_count(in_features)
        rows = weight.reshape(out_features * groups, -1)  # [out * groups, columns of a group]
        grid = fit(rows, scheme, scale_dtype, self.scale_search)
        codes = encode(rows, grid, scheme).to(torch.uint8).reshape(out_features, in_features)
        quantized = QuantizedWeight(
            codes=codes,
            scale=grid.scale.to(scale_dtype).reshape(out_features, groups),
            zero=grid.zero.to(torch.uint8).reshape(out_features, groups),
            scheme=scheme,
        )
        return Solution(quantized, SolveNotes(zero_groups=int((rows == 0).all(dim=1).sum())))
