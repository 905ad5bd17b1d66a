"""Solvers: each chooses integer codes for one weight matrix. One file a method.

A solver is a frozen dataclass of its options with the two methods of ``MatrixSolver``. ``prepare`` does what depends only on the
inputs of a linear (for GPTQ the factorisation); it is called once for every distinct input tensor and its result is shared by
all linears that read it (q, k, v; gate, up). ``solve`` then chooses codes for one matrix.

The pipeline itself works on whole blocks, since some methods learn over a block at once; ``lift`` turns any matrix solver into
a block solver.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ptqcli.calibration.statistics import Hessian
from ptqcli.scheme import QuantizedWeight, Scheme


@dataclass(frozen=True)
class SolverOptions:
    """The options of all solvers; each takes those that it knows. They are explained in the solvers' modules."""

    damp: float = 0.01
    act_order: bool = True
    static_groups: bool = True
    scale_search: str = "mse"


@dataclass(frozen=True)
class SolveNotes:
    """What a solver had to handle, for the report.

    never_activated: input columns that calibration never reached. zero_groups: (row, group) pairs whose weights are all zero.
    damp: relative damping that was used, None where the method has none. damp_raised: it is above the one asked for.
    """

    never_activated: int = 0
    zero_groups: int = 0
    damp: float | None = None
    damp_raised: bool = False


@dataclass(frozen=True)
class Solution:
    """Codes for one matrix and what is to be said about them."""

    weight: QuantizedWeight
    notes: SolveNotes


class MatrixSolver(Protocol):
    """Chooses codes for one matrix at a time."""

    needs_hessian: ClassVar[bool]

    def prepare(self, hessian: Hessian | None, where: str) -> Any:
        """Work shared by all linears with this input. ``where`` names them for errors."""

    def solve(self, weight: Tensor, prepared: Any, scheme: Scheme, scale_dtype: torch.dtype) -> Solution:
        """Codes for ``weight``, float32 [out, in]; ``prepared`` is what ``prepare`` returned."""


@dataclass(frozen=True)
class Target:
    """A linear that waits for its codes: its matrix as float32 [out, in] and its scheme."""

    name: str
    weight: Tensor
    scheme: Scheme
    scale_dtype: torch.dtype


@dataclass(frozen=True)
class Stage:
    """Linears that read one tensor, and the statistics of that tensor (None if the solver asked for none)."""

    targets: tuple[Target, ...]
    hessian: Hessian | None


class BlockRun(Protocol):
    """A block in the middle of its calibration run, as block solvers see it."""

    def stages(self) -> Iterator[Stage]:
        """The block's stages in the order in which they run; each is seen after all earlier ones have been placed."""

    def place(self, target: Target, solution: Solution) -> None:
        """Put the dequantized codes into the block, so that whatever runs later sees them."""


BlockSolver = Callable[[BlockRun], None]


def lift(solver: MatrixSolver) -> BlockSolver:
    """A block solver that applies ``solver`` to each matrix in the order in which the linears run."""

    def solve_block(run: BlockRun) -> None:
        for stage in run.stages():
            where = ", ".join(target.name for target in stage.targets)
            prepared = solver.prepare(stage.hessian, where)
            for target in stage.targets:
                run.place(target, solver.solve(target.weight, prepared, target.scheme, target.scale_dtype))

    return solve_block
