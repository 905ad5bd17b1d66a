"""Solvers: each chooses integer codes for one weight matrix. One file a method.

A solver is a frozen dataclass of its options with the two methods of ``MatrixSolver``. ``prepare`` does what depends only on the
inputs of a linear (for GPTQ the factorisation); it is called once for every distinct input tensor and its result is shared by
all linears that read it (q, k, v; gate, up). ``solve`` then chooses codes for one matrix.

The pipeline itself works on whole blocks, since some methods learn over a block at once; ``lift`` turns any matrix solver into
a block solver. It also adds what a scheme has beside codes: the static scale of the inputs, and the columns with outliers,
which a static split takes out of the matrix before the solver sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ptqcli.calibration.statistics import Hessian, InputStatistics, Needs
from ptqcli.numerics.activations import activation_scale
from ptqcli.numerics.grids import SMALLEST_SCALE
from ptqcli.numerics.scheme import Scheme
from ptqcli.numerics.weight import OutlierColumns, QuantizedWeight

# (done, total) of the work inside one matrix, called by solvers that are slow enough to be asked.
Progress = Callable[[int, int], None]


def ignore_progress(done: int, total: int) -> None:
    """A ``Progress`` that nobody watches."""


@dataclass(frozen=True)
class SolveNotes:
    """What a solver had to handle, for the report.

    never_activated: input columns that calibration never reached. zero_groups: (row, group) pairs whose weights are all zero.
    damp: relative damping that was used, None where the method has none. damp_raised: it is above the one asked for.
    outlier_columns: columns kept in 16 bit, None where the scheme splits none off.
    """

    never_activated: int = 0
    zero_groups: int = 0
    damp: float | None = None
    damp_raised: bool = False
    outlier_columns: int | None = None


@dataclass(frozen=True)
class Solution:
    """Codes for one matrix and what is to be said about them."""

    weight: QuantizedWeight
    notes: SolveNotes


class MatrixSolver(Protocol):
    """Chooses codes for one matrix at a time."""

    name: ClassVar[str]
    summary: ClassVar[str]
    needs_hessian: ClassVar[bool]

    def moves_groups(self, scheme: Scheme) -> bool:
        """Whether the groups of its codes are not neighbouring columns, so that a file needs an index."""

    def prepare(self, hessian: Hessian | None, where: str) -> Any:
        """Work shared by all linears with this input. ``where`` names them for errors."""

    def solve(
        self,
        weight: Tensor,
        prepared: Any,
        scheme: Scheme,
        scale_dtype: torch.dtype,
        limit: Tensor | None = None,
        progress: Progress = ignore_progress,
    ) -> Solution:
        """Codes for ``weight``, float32 [out, in]; ``prepared`` is what ``prepare`` returned.

        limit: [out, groups], the largest magnitude that each group's grid may reach, see ``scheme.fit``.
        """

    def workspace_bytes(self, out_features: int, in_features: int) -> int:
        """Peak memory of solving one matrix, beyond the matrix, its codes and the Hessian."""


@dataclass(frozen=True)
class Target:
    """A linear that waits for its codes: its matrix as float32 [out, in] and its scheme. limit: as in ``MatrixSolver.solve``."""

    name: str
    weight: Tensor
    scheme: Scheme
    scale_dtype: torch.dtype
    limit: Tensor | None = None


@dataclass(frozen=True)
class Stage:
    """Linears that read one tensor, and the statistics of that tensor (None if nothing was asked for)."""

    targets: tuple[Target, ...]
    statistics: InputStatistics | None


class BlockRun(Protocol):
    """A block in the middle of its calibration run, as block solvers see it."""

    def stages(self) -> Iterator[Stage]:
        """The block's stages in the order in which they run; each is seen after all earlier ones have been placed."""

    def place(self, target: Target, solution: Solution) -> None:
        """Put the dequantized codes into the block, so that whatever runs later sees them."""

    def progress(self, target: Target, done: int, total: int) -> None:
        """``done`` of ``total`` pieces of work on ``target`` are behind us."""


BlockSolver = Callable[[BlockRun], None]


def lift(solver: MatrixSolver) -> BlockSolver:
    """A block solver that applies ``solver`` to each matrix in the order in which the linears run."""

    def solve_block(run: BlockRun) -> None:
        for stage in run.stages():
            work = _StageWork(solver, stage)
            for target in stage.targets:
                run.place(target, work.solve(target, lambda done, total, target=target: run.progress(target, done, total)))  # type: ignore[misc]

    return solve_block


def needs_of(scheme: Scheme) -> Needs:
    """What ``lift`` wants to know of the inputs of a linear in ``scheme``."""
    static = scheme.activations is not None and not scheme.activations.dynamic
    return Needs(magnitudes=static or scheme.outliers is not None)


class _StageWork:
    """The targets of one stage; what they share is prepared once for each set of columns that a split takes out."""

    def __init__(self, solver: MatrixSolver, stage: Stage) -> None:
        self.solver, self.statistics = solver, stage.statistics
        self.where = ", ".join(target.name for target in stage.targets)
        self._prepared: dict[float | None, Any] = {}  # threshold of a static split, None without

    def solve(self, target: Target, progress: Progress) -> Solution:
        """Codes, static input scale and outlier columns of ``target``."""
        split, activations = target.scheme.outliers, target.scheme.activations
        outliers = None if split is None else self._largest() > split.threshold  # bool [in]
        if split is None or outliers is None or split.dynamic:
            solution = self._codes(target, target.weight, None, progress)
        else:
            solution = self._codes(target, target.weight[:, ~outliers], split.threshold, progress)
            solution = replace(solution, weight=_with_gaps(solution.weight, outliers))
        if outliers is not None:
            solution = _with_outliers(solution, target, outliers)
        if activations is not None and not activations.dynamic:
            scale = activation_scale(self._largest(), replace(activations, dynamic=True))
            smallest = SMALLEST_SCALE.get(target.scale_dtype, 0.0)
            solution = replace(solution, weight=replace(solution.weight, input_scale=scale.clamp(min=smallest).to(target.scale_dtype)))
        return solution

    def _codes(self, target: Target, weight: Tensor, threshold: float | None, progress: Progress) -> Solution:
        if weight.shape[1] == 0:
            return Solution(_no_codes(target), SolveNotes())
        prepared = self._prepare(threshold)
        return self.solver.solve(weight, prepared, target.scheme, target.scale_dtype, target.limit, progress)

    def _prepare(self, threshold: float | None) -> Any:
        if threshold not in self._prepared:
            hessian = None if self.statistics is None else self.statistics.hessian
            if hessian is not None and threshold is not None:
                hessian = hessian.without(self._largest() > threshold)
                if not hessian.sums.diagonal().any():
                    hessian.sums.fill_diagonal_(1)  # calibration reached none of these columns: each is rounded by itself
            self._prepared[threshold] = self.solver.prepare(hessian, self.where)
        return self._prepared[threshold]

    def _largest(self) -> Tensor:
        assert self.statistics is not None
        assert self.statistics.largest is not None
        return self.statistics.largest


def _no_codes(target: Target) -> QuantizedWeight:
    rows = target.weight.shape[0]
    empty = torch.empty(rows, 0, dtype=torch.uint8, device=target.weight.device)
    scale = torch.ones(rows, 1, dtype=target.scale_dtype, device=target.weight.device)
    return QuantizedWeight(empty, scale, torch.full_like(scale, target.scheme.middle, dtype=torch.uint8), target.scheme)


def _with_gaps(weight: QuantizedWeight, outliers: Tensor) -> QuantizedWeight:
    """``weight`` widened by the columns that were taken out; their codes are the zero point."""
    codes = torch.full((len(weight.codes), len(outliers)), weight.scheme.middle, dtype=torch.uint8, device=weight.codes.device)
    codes[:, ~outliers] = weight.codes
    return replace(weight, codes=codes)


def _with_outliers(solution: Solution, target: Target, outliers: Tensor) -> Solution:
    index = torch.nonzero(outliers).squeeze(1)
    columns = OutlierColumns(index.to(torch.int32), target.weight[:, index].to(target.scale_dtype))
    notes = replace(solution.notes, outlier_columns=len(index))
    return Solution(replace(solution.weight, outliers=columns), notes)
