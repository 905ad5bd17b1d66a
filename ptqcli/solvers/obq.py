"""OBQ, the Optimal Brain Quantizer (Frantar and Alistarh 2022, "Optimal Brain Compression", section 5): greedy order for every row.

A row ``w`` of the matrix is quantized one weight at a time, and after each the weights that are left are moved to where they make up
for it best. With ``H^-1`` the inverse Hessian of the columns that are left and ``q(w)`` the nearest grid point, a step is

    p = argmin_p (q(w_p) - w_p)^2 / [H^-1]_pp                 the weight that costs least
    w <- w - (w_p - q(w_p)) / [H^-1]_pp * [H^-1]_:p           its error, spread over the others
    H^-1 <- H^-1 - [H^-1]_:p [H^-1]_p: / [H^-1]_pp            column p eliminated

Every row has an order of its own and so an inverse of its own, which makes this the slowest of the solvers: in^3 work for each row,
where GPTQ, which takes all rows in one order, has in^2. Grids must be known beforehand, whatever the order: they are fitted on the
original weights, each group being ``group_size`` neighbouring columns.

Outliers: a weight that lies beyond the ends of its grid has an error of more than half a step, and the greedy order would leave it
to the end, when nothing is left to make up for it. As in the paper (section 5, "Quantization Outliers"), such a weight is quantized as
soon as it appears; of several in a row, the one that is farthest off, in steps of its grid. Without this rule the output error at 3
bits was 1.4 times as large on five layers of the demo model with clipped scales (``mse``), and 1.02 times with unclipped ones.

How it is computed: rewriting ``H^-1`` at each step would move 2 in^2 numbers per row. Instead the downdates of up to BLOCK steps
are collected as ``V``, with rows ``v = [H^-1]_:p / sqrt([H^-1]_pp)``; the column that a step needs and the diagonal are

    [H^-1]_:p - V^T V_:p        diag(H^-1) - sum_k v_k^2

and after a block ``V^T V`` is subtracted in one product while the columns that are done are dropped, so that nearly all of the work is
in large products over what is left. The first block of every row reads the same inverse. Rows are independent of each other; as
many as fit into WORKSPACE are worked on at once. A diagonal entry of the inverse of any part of ``H`` is at least ``1 / max(H_jj)``,
which is what rounding errors are kept from going below.

Columns that calibration never activated and Hessians that are not positive definite are treated as in ``ptqcli.solvers.damping``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ptqcli.calibration.statistics import Hessian
from ptqcli.numerics.grids import Grid
from ptqcli.numerics.ranges import RangeSearch, takes_sign
from ptqcli.numerics.scheme import Scheme
from ptqcli.numerics.weight import QuantizedWeight
from ptqcli.options import check_choices
from ptqcli.solvers import MatrixSolver, OnProgress, Solution, SolveNotes, ignore_progress
from ptqcli.solvers.bias import CorrectsBias, bias_option
from ptqcli.solvers.damping import check_damp, damp_option, factorise
from ptqcli.solvers.refine import Polishes, polish_bytes, polish_option, polished
from ptqcli.solvers.scale_search import FitsGrids, scale_search_option, signed_option
from ptqcli.solvers.target import AimsAtTarget, alpha_option, beta_option, target_option

# Steps between two rewrites of the inverses. At 4096 columns on one core a row took 2.3 s with 128 and 3.2 s with 64.
BLOCK = 128

WORKSPACE = 1 << 30  # bytes for the rows that are worked on at once


@dataclass(frozen=True, kw_only=True)
class Inverse:
    """The inverse of the damped Hessian, [in, in]. floor: the least that a diagonal entry can become. hessian: the damped one itself, None
    where nothing is polished.
    """

    matrix: Tensor
    hessian: Tensor | None
    floor: float
    damp: float
    damp_raised: bool
    never_activated: int


@dataclass(frozen=True)
class OBQ(FitsGrids, Polishes, AimsAtTarget, CorrectsBias, MatrixSolver):
    """OBQ with its options. damp: added to the diagonal of H, as a share of its mean. scale_search, signed: see
    ``ptqcli.solvers.scale_search``. polish: rounds, see ``ptqcli.solvers.refine``. target, alpha, beta: see
    ``ptqcli.solvers.target``. correct_bias: see ``ptqcli.solvers.bias``.
    """

    name: ClassVar[str] = "obq"
    summary: ClassVar[str] = "OBQ: the least harmful weight first, row by row"
    needs_hessian: ClassVar[bool] = True
    damp: float = damp_option()
    usual_rounds: ClassVar[int] = 3
    usual_searches: ClassVar[tuple[str, ...]] = ("minmax",)
    scale_search: str = scale_search_option()
    signed: bool = signed_option()
    target: str = target_option()
    alpha: float | str = alpha_option()
    beta: float | str = beta_option()
    correct_bias: bool = bias_option()
    polish: int | None = polish_option()

    def __post_init__(self) -> None:
        check_damp(self.damp)
        self.check_polish()
        check_choices(self)
        self.check_target()

    def prepare(self, hessian: Hessian | None, where: str) -> Inverse:
        """Damp and invert the Hessian. Raises PTQError if no damping makes it positive definite."""
        assert hessian is not None
        matrix = hessian.matrix.clone()
        damped = factorise(matrix, self.damp, where)
        floor = 1 / float(matrix.diagonal().max())
        return Inverse(
            matrix=torch.cholesky_inverse(damped.lower),
            hessian=matrix if self.rounds else None,
            floor=floor,
            damp=damped.damp,
            damp_raised=damped.damp > self.damp,
            never_activated=damped.never_activated,
        )

    def solve(
        self,
        weight: Tensor,
        prepared: Inverse,
        scheme: Scheme,
        scale_dtype: torch.dtype,
        ranges: RangeSearch | None = None,
        progress: OnProgress = ignore_progress,
    ) -> Solution:
        """Codes for ``weight``, float32 or float64 [out, in]. Raises UsageError if the group size does not divide ``in``.

        progress counts weights.
        """
        out_features, in_features = weight.shape
        groups = scheme.group_count(in_features)
        grouped = weight.reshape(out_features * groups, -1)  # [out * groups, columns of a group]
        grid = (ranges or self.ranges).fit(grouped, scheme, scale_dtype)
        scale, zero = grid.scale.reshape(out_features, groups), grid.zero.reshape(out_features, groups)
        codes = self._greedy(weight, Grid(grid.element, scale, zero), prepared, progress)
        quantized = QuantizedWeight.on_grid(codes, grid, scheme, scale_dtype)
        if prepared.hessian is not None:
            quantized = polished(weight, prepared.hessian, quantized, self.rounds, takes_sign(scheme, self.signed))
        notes = SolveNotes(
            never_activated=prepared.never_activated,
            zero_groups=int((grouped == 0).all(dim=1).sum()),
            damp=prepared.damp,
            damp_raised=prepared.damp_raised,
        )
        return Solution(quantized, notes)

    def _greedy(self, weight: Tensor, grid: Grid, prepared: Inverse, progress: OnProgress) -> Tensor:
        """The codes, uint8 [out, in]; grid: its scale and zero are [out, groups]."""
        out_features, in_features = weight.shape
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        columns = in_features // grid.scale.shape[1]
        batch = min(out_features, _rows_at_once(in_features, weight.element_size()))
        inverses = weight.new_empty(batch, max(0, in_features - BLOCK) ** 2)
        for start in range(0, out_features, batch):
            rows = slice(start, start + batch)
            work = _Rows(weight[rows], Grid(grid.element, grid.scale[rows], grid.zero[rows]), columns, prepared, inverses, codes[rows])
            while work.left:
                work.quantize_block(lambda done, start=start: progress(start * in_features + done, out_features * in_features))  # type: ignore[misc]
        return codes

    def workspace_bytes(self, out_features: int, in_features: int, scheme: Scheme | None = None) -> int:
        """For float32: the inverse Hessian, two more of its size while one row's is rewritten, and the rows that are worked on at once
        (WORKSPACE, or what a single row needs); fitting the grids, before that, holds four matrices of the weight's size, and polishing
        comes after it.
        """
        rows = min(out_features, _rows_at_once(in_features, 4))
        solve = 2 * in_features**2 * 4 + max(rows * _row_bytes(in_features, 4), 4 * out_features * in_features * 4)
        if not self.rounds:
            return in_features**2 * 4 + solve
        return 2 * in_features**2 * 4 + max(solve, polish_bytes(out_features, in_features, scheme, scheme is None))


def _row_bytes(in_features: int, itemsize: int) -> int:
    """Memory of one row: its inverse, the downdates of a block before and after dropping columns, and some 16 vectors."""
    return (in_features**2 + 2 * BLOCK * in_features + 16 * in_features) * itemsize


def _rows_at_once(in_features: int, itemsize: int) -> int:
    return max(1, WORKSPACE // _row_bytes(in_features, itemsize))


class _Rows:
    """Some rows of one matrix while their weights are quantized; of each row the columns that are left, side by side.

    weight, grid (scale and zero), column (its number in the matrix): [rows, left]. inverse: [rows, left, left], first the shared one,
    then views into ``inverses``.
    """

    def __init__(
        self,
        weight: Tensor,
        grid: Grid,
        columns: int,
        prepared: Inverse,
        inverses: Tensor,
        codes: Tensor,
    ) -> None:
        rows, self.left = weight.shape
        self.columns = self.left
        self.weight = weight.clone()
        scale, zero = (each.repeat_interleave(columns, dim=1) for each in (grid.scale, grid.zero))
        self.grid = Grid(grid.element, scale, zero)
        self.column = torch.arange(self.left, device=weight.device).repeat(rows, 1)
        self.inverse = prepared.matrix.to(weight.dtype).expand(rows, -1, -1)
        self.floor = prepared.floor
        self.inverses, self.codes = inverses, codes
        self.row = torch.arange(rows, device=weight.device)

    def quantize_block(self, tell: Callable[[int], None]) -> None:
        """Quantize BLOCK weights of each row, or all that are left, then drop their columns. tell: called with the weights done so far."""
        rows, left = self.weight.shape
        earlier = rows * (self.columns - left)
        steps = min(BLOCK, left)
        diagonal = self.inverse.diagonal(dim1=1, dim2=2).clamp(min=self.floor)  # [rows, left]
        downdates = self.weight.new_empty(rows, steps, left)  # V
        barred = torch.zeros_like(self.weight)  # infinite where a weight is done
        for step in range(steps):
            error, at = self._quantize_one(diagonal, barred)
            column = self.inverse[at]  # [rows, left]
            if step:
                mine = downdates[self.row, :step, at[1]]  # [rows, step]
                column = column.unsqueeze(1).baddbmm(mine.unsqueeze(1), downdates[:, :step], alpha=-1).squeeze(1)
            pivot = diagonal[at].unsqueeze(1)
            self.weight.addcmul_(column, error / pivot)
            downdate = column.div_(pivot.sqrt())
            diagonal.addcmul_(downdate, downdate, value=-1).clamp_(min=self.floor)
            downdates[:, step] = downdate
            tell(earlier + rows * (step + 1))
        self.left -= steps
        if self.left:
            self._drop(barred, downdates)

    def _quantize_one(self, diagonal: Tensor, barred: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Choose a weight of each row and write down its code. Returns q(w_p) - w_p, [rows, 1], and where the weights stand."""
        codes, miss = self.grid.nearest_with_miss(self.weight)
        farthest = miss.abs().max(dim=1)
        error = miss.mul_(self.grid.scale)
        cheapest = (error.square() / diagonal).add_(barred).argmin(dim=1)
        place = torch.where(farthest.values > self.grid.element.slack, farthest.indices, cheapest)
        at = self.row, place
        self.codes[self.row, self.column[at]] = codes[at].to(torch.uint8)
        barred[at] = torch.inf
        return error[at].unsqueeze(1), at

    def _drop(self, barred: Tensor, downdates: Tensor) -> None:
        """Subtract what the downdates hold from the inverses and keep the columns that are left, in their order."""
        kept = torch.argsort(barred, dim=1, stable=True)[:, : self.left]
        smaller = self.inverses[: len(kept), : self.left**2].view(len(kept), self.left, self.left)
        for row, index in enumerate(kept):
            columns = downdates[row].index_select(1, index)
            chosen = self.inverse[row].index_select(0, index).index_select(1, index)
            torch.addmm(chosen, columns.t(), columns, alpha=-1, out=smaller[row])
        self.inverse = smaller
        self.weight, self.column = self.weight.gather(1, kept), self.column.gather(1, kept)
        self.grid = Grid(self.grid.element, self.grid.scale.gather(1, kept), self.grid.zero.gather(1, kept))
