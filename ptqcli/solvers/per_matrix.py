"""The block solver that applies a matrix solver to each matrix, in the order in which the linears run.

What the solver gets is the weight that answers to the target (``target.py``), under the Hessian about the mean where a bias can be
corrected (``bias.py``). It also adds what a scheme has beside codes: the static scale of the inputs, and the columns with outliers, which a
static split takes out of the matrix before the solver sees it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from ptqcli.calibration.statistics import StatisticsRequest
from ptqcli.numerics.activations import static_scale
from ptqcli.numerics.ranges import RangeSearch
from ptqcli.numerics.scheme import Scheme
from ptqcli.numerics.weight import OutlierColumns, QuantizedWeight
from ptqcli.solvers import AlikeMatrix, BlockSolver, BlockWork, LinearTask, MatrixSolver, OnProgress, Solution, SolveNotes, Stage
from ptqcli.solvers.bias import centred, corrected_bias, corrected_towards
from ptqcli.solvers.target import Factors, Moments, Targeted, aim_at


class PerMatrix(BlockSolver):
    """Each matrix by itself. solver: what chooses its codes."""

    name: ClassVar[str] = "per-matrix"
    summary: ClassVar[str] = "a matrix solver on each matrix by itself"
    window, shares = 1, True

    def __init__(self, solver: MatrixSolver) -> None:
        self.solver = solver

    @property
    def needs(self) -> StatisticsRequest:
        """What the matrix solver asks for."""
        solver = self.solver
        aims = solver.aim is not None
        sums = solver.corrects_bias and solver.needs_hessian
        return StatisticsRequest(hessian=solver.needs_hessian or aims, pairs=aims, original=aims, sums=sums)

    def solve(self, work: BlockWork) -> None:
        """Place every linear, stage by stage."""
        for stages in work.alike_stages():
            works = [(StageWork(self.solver, stage), stage) for stage in stages]
            tasks = {task.name: (each, task) for each, stage in works for task in stage.linears}
            alike = zip_longest(*(stage.linears for stage in stages))  # one linear, or the same linear of several experts
            groups = [[task.name for task in group if task is not None] for group in alike]
            work.place_each(groups, partial(self._solutions, work, tasks))

    def _solutions(self, work: BlockWork, tasks: Mapping[str, tuple[StageWork, LinearTask]], names: Sequence[str]) -> Sequence[Solution]:
        return solve_alike([tasks[name] for name in names], lambda done, total: work.progress(names[0], done, total))

    def refusal(self, scheme: Scheme) -> str | None:
        """Columns that are taken out before the solver works have no place in the closed form of the target."""
        if self.solver.aim is not None and scheme.outliers is not None and not scheme.outliers.dynamic:
            return "target original does not go with a static outlier split; give --outliers dynamic or none, or leave the target out"
        return None

    @property
    def ranges(self) -> RangeSearch:
        """Those of the matrix solver."""
        return self.solver.ranges

    def moves_groups(self, scheme: Scheme) -> bool:
        """What the matrix solver says."""
        return self.solver.moves_groups(scheme)

    def workspace_bytes(self, out_features: int, in_features: int, scheme: Scheme | None = None) -> int:
        """Those of the matrix solver."""
        return self.solver.workspace_bytes(out_features, in_features, scheme)


def as_block_solver(solver: MatrixSolver | BlockSolver) -> BlockSolver:
    """``solver`` itself if it works on blocks, else each matrix by it."""
    if hasattr(solver, "prepare"):
        return PerMatrix(cast("MatrixSolver", solver))
    return solver


def statistics_for(scheme: Scheme) -> StatisticsRequest:
    """What is to be known of the inputs of a linear in ``scheme``."""
    static = scheme.activations is not None and not scheme.activations.dynamic
    return StatisticsRequest(magnitudes=static or scheme.outliers is not None)


def solve_alike(tasks: Sequence[tuple[StageWork, LinearTask]], progress: OnProgress) -> list[Solution]:
    """The solutions of ``tasks``, together where they are alike and all that is asked for are codes."""
    first, task = tasks[0]
    like = {(each.scheme, each.scale_dtype, each.weight.shape) for _, each in tasks}
    matrices = [work.matrix(each) for work, each in tasks] if len(tasks) > 1 and len(like) == 1 else [None]
    together = [matrix for matrix in matrices if matrix is not None]
    if len(together) < len(tasks):
        return [work.solve(each, progress) for work, each in tasks]
    solutions = first.solver.solve_alike(together, task.scheme, task.scale_dtype, progress)
    return [work.with_input_scale(each, solution) for (work, each), solution in zip(tasks, solutions, strict=True)]


class StageWork:
    """The linears of one stage; what they share is prepared once for each set of columns that a split takes out."""

    def __init__(self, solver: MatrixSolver, stage: Stage) -> None:
        self.solver, self.statistics = solver, stage.statistics
        self.where = ", ".join(task.name for task in stage.linears)
        self._prepared: dict[tuple[float | None, bool], Any] = {}  # by the threshold of a static split, None without, and about the mean
        self._factors = Factors(keep=len(stage.linears) > 1)

    def solve(self, task: LinearTask, progress: OnProgress) -> Solution:
        """Codes, static input scale and outlier columns of ``task``."""
        split = task.scheme.outliers
        outliers = None if split is None else self._largest() > split.threshold  # bool [in]
        if split is None or outliers is None or split.dynamic:
            solution = self._codes(task, task.weight, None, progress)
        else:
            solution = self._codes(task, task.weight[:, ~outliers], split.threshold, progress)
            solution = replace(solution, weight=_with_gaps(solution.weight, outliers))
        if outliers is not None:
            solution = _with_outliers(solution, task, outliers)
        return self.with_input_scale(task, solution)

    def with_input_scale(self, task: LinearTask, solution: Solution) -> Solution:
        """``solution`` with the scale of the inputs, where the scheme has one that is known beforehand."""
        activations = task.scheme.activations
        if activations is None or activations.dynamic:
            return solution
        scale = static_scale(self._largest(), task.scale_dtype)
        return replace(solution, weight=replace(solution.weight, input_scale=scale))

    def matrix(self, task: LinearTask) -> AlikeMatrix | None:
        """``task`` as a matrix solver sees it, None where more is to be done than to choose codes for it."""
        if task.scheme.outliers is not None or self.solver.aim is not None or self._corrects(task, None):
            return None
        return AlikeMatrix(task.weight, self._prepare(None, False), task.ranges)

    def _codes(self, task: LinearTask, weight: Tensor, threshold: float | None, progress: OnProgress) -> Solution:
        if weight.shape[1] == 0:
            return Solution(_no_codes(task), SolveNotes())
        centred = self._corrects(task, threshold)
        targeted = self._targeted(task, centred)
        prepared = self._prepare(threshold, centred)
        wanted = weight if targeted is None else targeted.weight
        solution = self.solver.solve(wanted, prepared, task.scheme, task.scale_dtype, task.ranges, progress)
        if targeted is not None:
            notes = replace(solution.notes, alpha=targeted.alpha, beta=targeted.beta)
            solution = replace(solution, aimed=targeted.weight, notes=notes)
        return self._with_bias(solution, task, targeted) if centred else solution

    def _corrects(self, task: LinearTask, threshold: float | None) -> bool:
        """Whether the bias of ``task`` is corrected; columns that a split takes out would have to be left out of the means."""
        sums = None if self.statistics is None else self.statistics.sums
        return self.solver.corrects_bias and task.bias is not None and sums is not None and threshold is None

    def _targeted(self, task: LinearTask, centred: bool) -> Targeted | None:
        aim = self.solver.aim
        if aim is None:
            return None
        moments, held = self._moments(task), self._held_moments(task)
        return aim_at(task.weight, moments, held, aim, task.name, centred, self._factors)

    def _moments(self, task: LinearTask) -> Moments:
        seen = self.statistics
        assert seen is not None
        assert seen.hessian is not None
        assert seen.pairs is not None
        return Moments.of(seen.hessian, seen.sums, seen.pairs, task.writes)

    def _held_moments(self, task: LinearTask) -> Moments | None:
        held = None if self.statistics is None or self.statistics.pairs is None else self.statistics.pairs.held
        return None if held is None else Moments.of(held.hessian, held.sums, held.pairs, task.writes)

    def _with_bias(self, solution: Solution, task: LinearTask, targeted: Targeted | None) -> Solution:
        assert self.statistics is not None
        assert self.statistics.sums is not None
        assert task.bias is not None
        if targeted is None:
            mean = self.statistics.sums / max(self.statistics.tokens, 1)
            bias = corrected_bias(task.bias, task.weight, solution.weight, mean)
        else:
            bias = corrected_towards(task.bias, task.weight, solution.weight, self._moments(task), targeted)
        return replace(solution, bias=bias, notes=replace(solution.notes, bias_corrected=True))

    def _prepare(self, threshold: float | None, about_mean: bool) -> Any:
        key = threshold, about_mean
        if key not in self._prepared:
            hessian = None if self.statistics is None else self.statistics.hessian
            if hessian is not None and threshold is not None:
                hessian = hessian.without(self._largest() > threshold)
            if hessian is not None and about_mean:
                assert self.statistics is not None
                assert self.statistics.sums is not None
                hessian = centred(hessian, self.statistics.sums)
            self._prepared[key] = self.solver.prepare(hessian, self.where)
        return self._prepared[key]

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
