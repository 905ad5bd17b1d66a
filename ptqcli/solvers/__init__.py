"""Solvers: each chooses codes. One file a method.

A matrix solver works on one weight matrix at a time: a frozen dataclass of its options that derives from ``MatrixSolver``. ``prepare``
does what depends only on the inputs of a linear (for GPTQ the factorisation); it is called once for every distinct input tensor and its
result is shared by all linears that read it (q, k, v; gate, up). ``solve`` then chooses codes for one matrix; it is all that a solver
must have, the rest is there.

A block solver sees a window of blocks at once, with batches of hidden states to run through it, gradients included; it places the codes
of every linear itself. ``per_matrix.PerMatrix`` is the block solver that applies a matrix solver to each matrix in turn.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ptqcli.calibration.statistics import Hessian, InputStatistics, StatisticsRequest
from ptqcli.numerics.ranges import RangeSearch, SquaredError
from ptqcli.numerics.scheme import Scheme
from ptqcli.numerics.weight import QuantizedWeight

if TYPE_CHECKING:
    from ptqcli.solvers.target import Aim

# Copies of a matrix, in float32, that fitting grids to it and rounding it take.
COPIES_TO_FIT = 3

# (done, total) of the work inside one matrix, called by solvers that are slow enough to be asked.
OnProgress = Callable[[int, int], None]


def ignore_progress(done: int, total: int) -> None:
    """A ``OnProgress`` that nobody watches."""


@dataclass(frozen=True, kw_only=True)
class SolveNotes:
    """What a solver had to handle, for the report.

    never_activated: input columns that calibration never reached. zero_groups: (row, group) pairs whose weights are all zero.
    damp: relative damping that was used, None where the method has none. damp_raised: it is above the one asked for.
    outlier_columns: columns kept in 16 bit, None where the scheme splits none off. alpha, beta: shares of ``target``, None where it was
    not aimed at the original model's output. bias_corrected: the bias takes up what the codes shift the mean output by.
    """

    never_activated: int = 0
    zero_groups: int = 0
    damp: float | None = None
    damp_raised: bool = False
    outlier_columns: int | None = None
    alpha: float | None = None
    beta: float | None = None
    bias_corrected: bool = False


@dataclass(frozen=True)
class Solution:
    """Codes for one matrix and what is to be said about them. bias: [out], in place of the linear's own, None to leave that.

    aimed: float32 [out, in], the weight that the codes were to answer to, None where it is the linear's own.
    """

    weight: QuantizedWeight
    notes: SolveNotes
    bias: Tensor | None = None
    aimed: Tensor | None = None


@dataclass(frozen=True)
class AlikeMatrix:
    """One of several matrices of a shape that are solved together. weight, prepared, ranges: as in ``MatrixSolver.solve``."""

    weight: Tensor
    prepared: Any
    ranges: RangeSearch | None = None


class MatrixSolver(Protocol):
    """Chooses codes for one matrix at a time."""

    name: ClassVar[str]
    summary: ClassVar[str]

    @property
    def needs_hessian(self) -> bool:
        """Whether ``prepare`` is to get the Hessian of the inputs, which takes calibration."""
        return False

    @property
    def aim(self) -> Aim | None:
        """How much of the original model's output to aim at, see ``target``; None for none of it."""
        return None

    @property
    def corrects_bias(self) -> bool:
        """Whether biases take up the shift of the mean output, see ``bias``."""
        return False

    @property
    def ranges(self) -> RangeSearch:
        """What fits its grids where no transform does; transforms try their choices out with it, too."""
        return SquaredError()

    def moves_groups(self, scheme: Scheme) -> bool:
        """Whether the groups of its codes are not neighbouring columns, so that a file needs an index."""
        return False

    def prepare(self, hessian: Hessian | None, where: str) -> Any:
        """Work shared by all linears with this input; as it stands, the Hessian itself. ``where`` names them for errors."""
        return hessian

    @abstractmethod
    def solve(
        self,
        weight: Tensor,
        prepared: Any,
        scheme: Scheme,
        scale_dtype: torch.dtype,
        ranges: RangeSearch | None = None,
        progress: OnProgress = ignore_progress,
    ) -> Solution:
        """Codes for ``weight``, float32 [out, in]; ``prepared`` is what ``prepare`` returned.

        ranges: fits the grids; None for the solver's own.
        """

    def solve_alike(
        self, matrices: Sequence[AlikeMatrix], scheme: Scheme, scale_dtype: torch.dtype, progress: OnProgress = ignore_progress
    ) -> list[Solution]:
        """Codes for matrices of one shape, such as those of experts; as it stands, one after the other."""
        return [self.solve(each.weight, each.prepared, scheme, scale_dtype, each.ranges, progress) for each in matrices]

    def workspace_bytes(self, out_features: int, in_features: int, scheme: Scheme | None = None) -> int:
        """Peak memory of solving one matrix in ``scheme``, or in any, beyond the matrix, its codes and the Hessian. As it stands, that of
        fitting a grid.
        """
        return COPIES_TO_FIT * out_features * in_features * 4

    def work(self, out_features: int, in_features: int) -> float | None:
        """Floating operations of solving one matrix, roughly; None where nobody has counted them, as it stands."""
        return None


@dataclass(frozen=True, kw_only=True)
class LinearTask:
    """A linear that waits for its codes.

    name: its path in the model. weight: float32 [out, in], not to be written into. ranges: as in ``MatrixSolver.solve``. bias: float32
    [out], None if the linear has none. writes: by what its output is multiplied before it is added to the residual stream, None where it
    is not or nobody asked.
    """

    name: str
    weight: Tensor
    scheme: Scheme
    scale_dtype: torch.dtype
    ranges: RangeSearch | None = None
    bias: Tensor | None = None
    writes: float | None = None


@dataclass(frozen=True)
class Stage:
    """Linears that read one tensor, and the statistics of that tensor (None if nothing was asked for)."""

    linears: tuple[LinearTask, ...]
    statistics: InputStatistics | None


@dataclass(frozen=True)
class Batch:
    """Some calibration windows at the door of the blocks at work.

    inputs: the quantized model's hidden states [windows, tokens, features] before them. targets: the original model's behind them, None
    unless the solver asks for the original stream. forward: runs modules in the place of the blocks, as the model calls them. Where several
    processes share the windows, each has its own of them, perhaps none.
    """

    inputs: Tensor
    targets: Tensor | None
    forward: Callable[[Sequence[nn.Module], Tensor], Tensor]

    def run(self, blocks: Sequence[nn.Module]) -> Tensor:
        """The output of ``blocks``, which stand in for those at work, on ``inputs``. Gradients are recorded if they are switched on."""
        return self.forward(blocks, self.inputs.clone())  # a block may change its input in place


class CalibrationBatches(Protocol):
    """The calibration windows, batch by batch, as often as they are asked for."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...

    @property
    def windows(self) -> Sequence[Sequence[int]]:
        """The numbers of the windows of each batch."""

    @property
    def mixes(self) -> bool:
        """Whether any windows can share a batch, because the model calls its blocks alike whatever the text is."""

    def of(self, windows: Sequence[int]) -> Batch:
        """The batch of these windows: one of ``windows``, or, where it mixes, any as large as the first."""


class BlockWork(Protocol):
    """A window of blocks, loaded, as block solvers see it: after the transforms, every weight still unquantized.

    Gradients are off, and parameters do not require any; a solver that learns switches them on and trains tensors of its own. A parameter
    may share its memory with the model file's tensors: ``place`` and ``replace`` put new ones in its place, nothing writes into it.
    """

    @property
    def linears(self) -> Mapping[str, LinearTask]:
        """Every linear of the window that has to be placed, by its path in the model, in running order."""

    @property
    def module(self) -> nn.ModuleList:
        """The blocks."""

    @property
    def paths(self) -> Sequence[str]:
        """Path in the model of each block."""

    @property
    def final(self) -> int:
        """How many of the blocks have to be placed; those behind them come again at the head of the next window."""

    @property
    def carried(self) -> MutableMapping[str, Any]:
        """What the solver wants to find again in the next window."""

    def stages(self) -> Iterator[Stage]:
        """The stages in the order in which they run; each is seen after all earlier ones have been placed, but for those of other experts,
        on which it does not depend.

        A solver that works on batches, too, asks for them first.
        """

    def alike_stages(self) -> Iterator[Sequence[Stage]]:
        """The stages, those together that are the same linears of several experts. Each of them has as many linears, of the same shapes."""

    def batches(self) -> CalibrationBatches:
        """The hidden states before the window, to run through it."""

    def place_each(self, groups: Sequence[Sequence[str]], solve: Callable[[Sequence[str]], Sequence[Solution]]) -> None:
        """Place all linears of ``groups``. Where several processes share the work, each is solved by one of them; ``solve`` gets some of
        the linears of a group, and every process has to ask for the same.
        """

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Put the sum over all processes that share the calibration windows into each tensor."""

    def place(self, name: str, solution: Solution) -> None:
        """Give the linear ``name`` its codes, and the block their dequantized values, so that whatever runs later sees them."""

    def replace(self, parameter: str, value: Tensor) -> None:
        """Give ``parameter`` (its path in the model), which is not quantized, another value, in the block and in the file."""

    def progress(self, name: str, done: int, total: int, note: str = "") -> None:
        """``done`` of ``total`` pieces of work on ``name`` are behind us; ``note`` says how it goes."""


class BlockSolver(Protocol):
    """Works on a window of blocks.

    needs: what it wants to know of the inputs; ``original`` asks for the original model's hidden states beside the quantized model's.
    window: blocks worked on together. overlap: how many of them come again at the head of the next window. batch: the most calibration
    windows in one pass, None for what suits the machine. shares: whether it works in several processes, each of which has its own windows:
    it places by ``place_each``, and adds up what it learns from batches.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    shares: ClassVar[bool] = False

    @property
    def needs(self) -> StatisticsRequest: ...

    @property
    def window(self) -> int: ...

    @property
    def overlap(self) -> int:
        """As it stands, none."""
        return 0

    @property
    def batch(self) -> int | None:
        """As it stands, None."""
        return None

    @abstractmethod
    def solve(self, work: BlockWork) -> None:
        """Place every linear of the window."""

    def refusal(self, scheme: Scheme) -> str | None:
        """Why it has no codes in this scheme, None if it has."""
        return None

    def notes(self, windows: int) -> list[str]:
        """What to say beforehand of a run on so many calibration windows; as it stands, nothing."""
        return []

    @property
    def ranges(self) -> RangeSearch:
        """As in ``MatrixSolver``."""
        return SquaredError()

    def moves_groups(self, scheme: Scheme) -> bool:
        """As in ``MatrixSolver``."""
        return False

    @abstractmethod
    def workspace_bytes(self, out_features: int, in_features: int, scheme: Scheme | None = None) -> int:
        """As in ``MatrixSolver``."""

    def window_bytes(self, weights: int, features: int, tokens: int) -> int:
        """Memory held while a window is at work, beside its blocks; as it stands, none.

        weights: of the window's linears together. features: of what its modules read and return for a token. tokens: of a batch.
        """
        return 0
