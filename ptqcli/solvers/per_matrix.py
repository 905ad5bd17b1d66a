"""The block solver that applies a matrix solver to each matrix, in the order in which the linears run.

It also adds what a scheme has beside codes: the static scale of the inputs, and the columns with outliers, which a static split takes out
of the matrix before the solver sees it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from ptqcli.calibration.statistics import StatisticsRequest
from ptqcli.numerics.activations import static_scale
from ptqcli.numerics.grids import RangeSearch
from ptqcli.numerics.scheme import Scheme
from ptqcli.numerics.weight import OutlierColumns, QuantizedWeight
from ptqcli.solvers import BlockSolver, BlockWork, LinearTask, MatrixSolver, OnProgress, Solution, SolveNotes, Stage


class PerMatrix:
    """Each matrix by itself. solver: what chooses its codes."""

    name: ClassVar[str] = "per-matrix"
    summary: ClassVar[str] = "a matrix solver on each matrix by itself"
    window = 1

    def __init__(self, solver: MatrixSolver) -> None:
        self.solver = solver
        self.needs = StatisticsRequest(hessian=solver.needs_hessian)

    def solve(self, work: BlockWork) -> None:
        """Place every linear, stage by stage."""
        for stage in work.stages():
            stage_work = StageWork(self.solver, stage)
            for task in stage.linears:
                name = task.name
                work.place(name, stage_work.solve(task, lambda done, total, name=name: work.progress(name, done, total)))  # type: ignore[misc]

    @property
    def ranges(self) -> RangeSearch:
        """Those of the matrix solver."""
        return self.solver.ranges

    def moves_groups(self, scheme: Scheme) -> bool:
        """What the matrix solver says."""
        return self.solver.moves_groups(scheme)

    def workspace_bytes(self, out_features: int, in_features: int) -> int:
        """Those of the matrix solver."""
        return self.solver.workspace_bytes(out_features, in_features)


def as_block_solver(solver: MatrixSolver | BlockSolver) -> BlockSolver:
    """``solver`` itself if it works on blocks, else each matrix by it."""
    if hasattr(solver, "prepare"):
        return PerMatrix(cast("MatrixSolver", solver))
    return solver


def statistics_for(scheme: Scheme) -> StatisticsRequest:
    """What is to be known of the inputs of a linear in ``scheme``."""
    static = scheme.activations is not None and not scheme.activations.dynamic
    return StatisticsRequest(magnitudes=static or scheme.outliers is not None)


class StageWork:
    """The linears of one stage; what they share is prepared once for each set of columns that a split takes out."""

    def __init__(self, solver: MatrixSolver, stage: Stage) -> None:
        self.solver, self.statistics = solver, stage.statistics
        self.where = ", ".join(task.name for task in stage.linears)
        self._prepared: dict[float | None, Any] = {}  # threshold of a static split, None without

    def solve(self, task: LinearTask, progress: OnProgress) -> Solution:
        """Codes, static input scale and outlier columns of ``task``."""
        split, activations = task.scheme.outliers, task.scheme.activations
        outliers = None if split is None else self._largest() > split.threshold  # bool [in]
        if split is None or outliers is None or split.dynamic:
            solution = self._codes(task, task.weight, None, progress)
        else:
            solution = self._codes(task, task.weight[:, ~outliers], split.threshold, progress)
            solution = replace(solution, weight=_with_gaps(solution.weight, outliers))
        if outliers is not None:
            solution = _with_outliers(solution, task, outliers)
        if activations is not None and not activations.dynamic:
            scale = static_scale(self._largest(), task.scale_dtype)
            solution = replace(solution, weight=replace(solution.weight, input_scale=scale))
        return solution

    def _codes(self, task: LinearTask, weight: Tensor, threshold: float | None, progress: OnProgress) -> Solution:
        if weight.shape[1] == 0:
            return Solution(_no_codes(task), SolveNotes())
        prepared = self._prepare(threshold)
        return self.solver.solve(weight, prepared, task.scheme, task.scale_dtype, task.ranges, progress)

    def _prepare(self, threshold: float | None) -> Any:
        if threshold not in self._prepared:
            hessian = None if self.statistics is None else self.statistics.hessian
            if hessian is not None and threshold is not None:
                hessian = hessian.without(self._largest() > threshold)
            self._prepared[threshold] = self.solver.prepare(hessian, self.where)
        return self._prepared[threshold]

    def _largest(self) -> Tensor:
        assert self.statistics is not None
        assert self.statistics.largest is not None
        return self.statistics.largest


def _no_codes(task: LinearTask) -> QuantizedWeight:
    rows = task.weight.shape[0]
    empty = torch.empty(rows, 0, dtype=torch.uint8, device=task.weight.device)
    scale = torch.ones(rows, 1, dtype=task.scale_dtype, device=task.weight.device)
    return QuantizedWeight(codes=empty, scale=scale, zero=torch.full_like(scale, task.scheme.middle, dtype=torch.uint8), scheme=task.scheme)


def _with_gaps(weight: QuantizedWeight, outliers: Tensor) -> QuantizedWeight:
    """``weight`` widened by the columns that were taken out; their codes are the zero point."""
    codes = torch.full((len(weight.codes), len(outliers)), weight.scheme.middle, dtype=torch.uint8, device=weight.codes.device)
    codes[:, ~outliers] = weight.codes
    return replace(weight, codes=codes)


def _with_outliers(solution: Solution, task: LinearTask, outliers: Tensor) -> Solution:
    index = torch.nonzero(outliers).squeeze(1)
    columns = OutlierColumns(index.to(torch.int32), task.weight[:, index].to(task.scale_dtype))
    notes = replace(solution.notes, outlier_columns=len(index))
    return Solution(replace(solution.weight, outliers=columns), notes)
