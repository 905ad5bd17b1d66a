"""Round to nearest: every weight takes the closest code of its group's grid. Needs no calibration, unless what it finds is to be polished.

The baseline of every paper in the field. Each group's range is fitted to the least squared error first (``scale_search="mse"``), which is
what makes it usable at 2 and 3 bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ptqcli.calibration.statistics import Hessian
from ptqcli.numerics.ranges import SIGNED_FACTORS, RangeSearch, takes_sign
from ptqcli.numerics.scheme import Scheme
from ptqcli.numerics.weight import round_to_nearest
from ptqcli.options import check_choices
from ptqcli.solvers import MatrixSolver, OnProgress, Solution, SolveNotes, ignore_progress
from ptqcli.solvers.damping import DAMP, factorise
from ptqcli.solvers.refine import Polishes, polish_bytes, polish_option, polished
from ptqcli.solvers.scale_search import FitsGrids, scale_search_option, signed_option
from ptqcli.solvers.target import AimsAtTarget, alpha_option, beta_option, target_option

# For a weight and a candidate of the search: divide, add, round, two clamps, subtract, multiply, subtract, square, add.
OPERATIONS = 10


@dataclass(frozen=True)
class DampedHessian:
    """matrix: [in, in], damped by ``damp``. never_activated: columns."""

    matrix: Tensor
    damp: float
    never_activated: int


@dataclass(frozen=True)
class RTN(FitsGrids, Polishes, AimsAtTarget, MatrixSolver):
    """Round to nearest. scale_search, signed: see ``ptqcli.solvers.scale_search``. polish: rounds, see ``ptqcli.solvers.refine``. target,
    alpha, beta: see ``ptqcli.solvers.target``.
    """

    name: ClassVar[str] = "rtn"
    summary: ClassVar[str] = "round to nearest"
    usual_rounds: ClassVar[int] = 0
    usual_searches: ClassVar[tuple[str, ...]] = ("mse",)
    scale_search: str = scale_search_option()
    signed: bool = signed_option()
    polish: int | None = polish_option()
    target: str = target_option()
    alpha: float | str = alpha_option()
    beta: float | str = beta_option()

    def __post_init__(self) -> None:
        check_choices(self)
        self.check_target()
        self.check_polish()

    @property
    def needs_hessian(self) -> bool:
        """To polish."""
        return self.rounds > 0

    def prepare(self, hessian: Hessian | None, where: str) -> DampedHessian | None:
        """The Hessian damped by DAMP, where it is needed. Raises PTQError if no damping makes it positive definite."""
        if not self.rounds:
            return None
        assert hessian is not None
        matrix = hessian.matrix.clone()
        damped = factorise(matrix, DAMP, where)
        return DampedHessian(matrix, damped.damp, damped.never_activated)

    def solve(
        self,
        weight: Tensor,
        prepared: DampedHessian | None,
        scheme: Scheme,
        scale_dtype: torch.dtype,
        ranges: RangeSearch | None = None,
        progress: OnProgress = ignore_progress,
    ) -> Solution:
        """Nearest codes for ``weight``, float [out, in]. Raises UsageError if the group size does not divide ``in``."""
        quantized = round_to_nearest(weight, scheme, scale_dtype, ranges or self.ranges)
        groups = weight.reshape(*quantized.scale.shape, -1)  # [out, groups, columns of a group]
        notes = SolveNotes(zero_groups=int((groups == 0).all(dim=2).sum()))
        if prepared is None:
            return Solution(quantized, notes)
        notes = replace(notes, never_activated=prepared.never_activated, damp=prepared.damp, damp_raised=prepared.damp > DAMP)
        return Solution(polished(weight, prepared.matrix, quantized, self.rounds, takes_sign(scheme, self.signed)), notes)

    def work(self, out_features: int, in_features: int) -> float | None:
        """Some operations for each weight and candidate of the search; that of polishing is not counted."""
        return None if self.rounds else OPERATIONS * len(SIGNED_FACTORS) * out_features * in_features

    def workspace_bytes(self, out_features: int, in_features: int, scheme: Scheme | None = None) -> int:
        """Fitting the grids; polishing comes after it, with the damped Hessian and, before that, its factor."""
        fit = super().workspace_bytes(out_features, in_features, scheme)
        polish = 2 * in_features**2 * 4 + polish_bytes(out_features, in_features, scheme, scheme is None)
        return max(fit, polish) if self.rounds else fit
