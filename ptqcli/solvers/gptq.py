"""GPTQ (Frantar et al. 2022), written as Babai's nearest plane: one factorisation, no inverse.

The paper quantizes columns one by one and spreads each column's error over the columns still to come, with rows of the Cholesky
factor U of the inverse Hessian (``H^-1 = U^T U``, U upper triangular; Algorithm 1). U is never needed. With the columns reversed, one
Cholesky factorisation gives the upper triangular R with ``H = R R^T``, and ``U = R^-1``. For the error ``E = W - W'`` the objective is

    tr(E H E^T) = |E R|^2,        (E R)_j = e_j R_jj + sum_{k<j} e_k R_kj

so column j, whatever was chosen before it, is served best by rounding the target

    t_j = w_j + sum_{k<j} e_k N_kj,        N_kj = R_kj / R_jj

which is the number that the paper's updates leave in column j. Errors are always taken against the original weights, and the feedback
sums are matrix products: the columns are halved recursively, and a right half receives the feedback of its left half in one
product, so nearly all of the work is in large products and what is left for the column loop is LEAF columns wide.

A group's grid is fitted on the weights that the feedback of all earlier columns leaves for it, ``w' = w + B R_gg^-1`` (``B`` the feedback
sums of the group's columns, ``R_gg`` the group's triangle of R): the recursion is cut so that a group is a node of it.

Ranges that clip (``scale_search="mse"``) suit most rows at 3 and 4 bits and few at 2, where they clip what feedback has widened. So a
matrix is solved with both, and every row keeps the codes with the smaller ``|E R|^2``, which the targets give for nothing.

Order of the columns (``act_order``): by falling diagonal of H, so that the columns which carry the most are rounded while there are
still many others to take up their error. With ``static_groups`` a group stays ``group_size`` neighbouring columns and its grid is
fitted before the first column is rounded, so that the file needs no index; without, groups are neighbours in the new order, as in
the original code, and ``QuantizedWeight.g_idx`` says which column belongs to which. Doubly quantized scales are fitted beforehand, too,
whatever the order, since all scales of a matrix are rounded together, and so are grids of blocks, whose steps hang together within a row.
Of those each row has the better of two: fitted with all columns alike, and with the diagonal of H as their importance.

Damping, columns that calibration never activated, and Hessians that are not positive definite: see ``ptqcli.solvers.damping``. A
column without activation is then rounded to nearest (the original code sets its weights to zero, which destroys them for inputs that
calibration happened not to reach).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ptqcli.calibration.statistics import Hessian
from ptqcli.errors import UsageError
from ptqcli.numerics.blocks import rows_of
from ptqcli.numerics.grids import Grid
from ptqcli.numerics.ranges import RangeSearch, WeightedBlocks, takes_sign
from ptqcli.numerics.scheme import Scheme
from ptqcli.numerics.weight import QuantizedWeight
from ptqcli.options import check_choices, option
from ptqcli.solvers import AlikeMatrix, MatrixSolver, OnProgress, Solution, SolveNotes, ignore_progress
from ptqcli.solvers.bias import CorrectsBias, bias_option
from ptqcli.solvers.columns import one_of, round_in_order, side_by_side
from ptqcli.solvers.damping import check_damp, damp_option, factorise
from ptqcli.solvers.refine import Polishes, polish_bytes, polish_option, polished_alike
from ptqcli.solvers.scale_search import FitsGrids, scale_search_option, signed_option
from ptqcli.solvers.target import AimsAtTarget, alpha_option, beta_option, target_option

# Columns rounded one after the other before their errors are sent on by a product. At 4096 rows on two cores 16, 32 and 64 took the same
# time within noise; larger leaves move work from products into the loop.
LEAF = 32


@dataclass(frozen=True, kw_only=True)
class Factor:
    """The damped Hessian, factored in processing order.

    order: int64 [in], processing position -> column. feedback: N [in, in], unit upper triangular, ``N[k, j] = R_kj / R_jj``. pivots:
    R_jj [in]. hessian: the damped one, columns in their original order; None where nothing is polished. importance: its diagonal [in].
    """

    order: Tensor
    feedback: Tensor
    pivots: Tensor
    hessian: Tensor | None
    importance: Tensor
    damp: float
    damp_raised: bool
    never_activated: int


@dataclass(frozen=True)
class GPTQ(FitsGrids, Polishes, AimsAtTarget, CorrectsBias, MatrixSolver):
    """GPTQ with its options.

    damp: added to the diagonal of H, as a share of its mean. act_order, static_groups: see the module. scale_search,
    signed: see ``ptqcli.solvers.scale_search``. polish: rounds, see ``ptqcli.solvers.refine``. target, alpha, beta: see
    ``ptqcli.solvers.target``. correct_bias: see ``ptqcli.solvers.bias``.
    """

    name: ClassVar[str] = "gptq"
    summary: ClassVar[str] = "GPTQ: error feedback through the Hessian of the calibration inputs"
    needs_hessian: ClassVar[bool] = True
    damp: float = damp_option()
    act_order: bool = option(True, "most active columns first")
    static_groups: bool = option(True, "with act-order, groups stay neighbours, so the file needs no index")
    usual_rounds: ClassVar[int] = 3
    usual_searches: ClassVar[tuple[str, ...]] = ("minmax", "mse")
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
        if not self.act_order and not self.static_groups:
            raise UsageError("static groups have no effect without act order, where groups are neighbours anyway; leave one of the two out")

    def moves_groups(self, scheme: Scheme) -> bool:
        """With act-order and without static groups, groups are neighbours in the new order only."""
        return self.act_order and not self.static_groups and scheme.group_size > 0

    def prepare(self, hessian: Hessian | None, where: str) -> Factor:
        """Order the columns and factor the Hessian. Raises PTQError if no damping makes it positive definite."""
        assert hessian is not None
        matrix = hessian.matrix
        importance = matrix.diagonal() if self.act_order else torch.zeros_like(matrix.diagonal())
        order = torch.argsort(importance, descending=True, stable=True)
        reverse = order.flip(0)
        reordered = matrix.index_select(0, reverse).index_select(1, reverse)
        damped = factorise(reordered, self.damp, where)
        diagonal = reordered.diagonal()[torch.argsort(reverse)]
        del reordered  # it has the size of H, as each of what follows
        feedback = damped.lower.flip(0, 1)  # R
        damp, dead = damped.damp, damped.never_activated
        del damped
        pivots = feedback.diagonal().clone()
        feedback /= pivots
        kept = None
        if self.rounds:
            kept = matrix.clone()
            kept.diagonal().copy_(diagonal)
        return Factor(
            order=order,
            feedback=feedback,
            pivots=pivots,
            hessian=kept,
            importance=diagonal,
            damp=damp,
            damp_raised=damp > self.damp,
            never_activated=dead,
        )

    def solve(
        self,
        weight: Tensor,
        prepared: Factor,
        scheme: Scheme,
        scale_dtype: torch.dtype,
        ranges: RangeSearch | None = None,
        progress: OnProgress = ignore_progress,
    ) -> Solution:
        """Codes for ``weight``, float32 or float64 [out, in]. Raises UsageError if the group size does not divide ``in``."""
        [solution] = self.solve_alike([AlikeMatrix(weight, prepared, ranges)], scheme, scale_dtype, progress)
        return solution

    def solve_alike(
        self, matrices: Sequence[AlikeMatrix], scheme: Scheme, scale_dtype: torch.dtype, progress: OnProgress = ignore_progress
    ) -> list[Solution]:
        """Codes for matrices of one shape, each of which goes through the loops over columns beside the others."""
        found = self._best(matrices, scheme, scale_dtype)
        quantized = [one.result() for one in found]
        if self.rounds:
            hessians = [matrix.prepared.hessian for matrix in matrices]
            weights = [matrix.weight for matrix in matrices]
            quantized = polished_alike(weights, hessians, quantized, self.rounds, takes_sign(scheme, self.signed))
        return [
            Solution(
                codes,
                SolveNotes(
                    never_activated=matrix.prepared.never_activated,
                    zero_groups=one.zero_groups,
                    damp=matrix.prepared.damp,
                    damp_raised=matrix.prepared.damp_raised,
                ),
            )
            for codes, one, matrix in zip(quantized, found, matrices, strict=True)
        ]

    def _searches(self, scheme: Scheme, matrix: AlikeMatrix) -> Sequence[RangeSearch]:
        """What fits the grids; every row has the better of them."""
        if scheme.blocks is not None:
            return (matrix.ranges or WeightedBlocks(), WeightedBlocks(matrix.prepared.importance))
        return (matrix.ranges,) if matrix.ranges else self.searches

    def _best(self, matrices: Sequence[AlikeMatrix], scheme: Scheme, scale_dtype: torch.dtype) -> list[_Best]:
        """What error feedback gives each matrix, with the one of its searches that leaves a row the least error."""
        searches = [self._searches(scheme, matrix) for matrix in matrices]
        best = [_Best(scheme) for _ in matrices]
        for number in range(max(map(len, searches))):
            chosen = [which for which, each in enumerate(searches) if number < len(each)]
            works = [self._columns(matrices[which], scheme, scale_dtype, searches[which][number]) for which in chosen]
            _run(works, 0, matrices[0].weight.shape[1])
            for which, work in zip(chosen, works, strict=True):
                best[which].take(work)
            del works, work  # before those of the next search are made
        return best

    def _columns(self, matrix: AlikeMatrix, scheme: Scheme, scale_dtype: torch.dtype, ranges: RangeSearch) -> _Columns:
        groups = scheme.group_count(matrix.weight.shape[1])
        # One group for the whole row needs no index, whatever the order: its grid is the same either way.
        fixed = (self.act_order and (self.static_groups or groups == 1)) or scheme.fitted_together
        work = _Columns(matrix.weight, matrix.prepared, scheme, scale_dtype, ranges)
        work.moving = self.act_order and not fixed
        if fixed:
            work.fit_beforehand()
        return work

    def work(self, out_features: int, in_features: int) -> float:
        """The factorisation; error feedback for each search; of polishing ``H W^T`` and, in each round, a refit and a descent."""
        polish = 2 + 3 * self.rounds if self.rounds else 0
        return in_features**3 / 3 + (len(self.searches) + polish) * out_features * in_features**2

    def workspace_bytes(self, out_features: int, in_features: int, scheme: Scheme | None = None) -> int:
        """Two matrices of the Hessian's size, whether it is factored or the factor used; the solve four of the weight's, and polishing what
        it takes after that.
        """
        solve = 2 * in_features**2 * 4 + 5 * out_features * in_features * 4
        polish = 2 * in_features**2 * 4 + polish_bytes(out_features, in_features, scheme, scheme is None or self.moves_groups(scheme))
        return max(solve, polish) if self.rounds else solve


class _Best:
    """The codes of one matrix, each row with the better ones of what was found so far."""

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme
        self.quantized: QuantizedWeight | None = None
        self.least: Tensor | None = None  # [out]
        self.zero_groups = 0

    def take(self, work: _Columns) -> None:
        """Rows of ``work`` where they leave less error."""
        found, error = work.result(moving_groups=work.moving), work.row_errors()
        if not self.scheme.rows_stand_alone:
            error = error.sum().expand_as(error)
        if self.quantized is None or self.least is None:
            self.quantized, self.least, self.zero_groups = found, error, work.zero_groups()
            return
        better = error < self.least
        if self.scheme.rows_stand_alone:
            self.quantized = _rows_of(found, self.quantized, better)
        elif bool(better.all()):
            self.quantized = found
        self.least = torch.minimum(error, self.least)

    def result(self) -> QuantizedWeight:
        """The codes."""
        assert self.quantized is not None
        return self.quantized


def _rows_of(one: QuantizedWeight, other: QuantizedWeight, wanted: Tensor) -> QuantizedWeight:
    """The rows of ``one`` where ``wanted`` [out] is True, of ``other`` elsewhere; their groups are the same."""
    rows = wanted.unsqueeze(1)
    return replace(
        one,
        codes=torch.where(rows, one.codes, other.codes),
        scale=torch.where(rows, one.scale, other.scale),
        zero=torch.where(rows, one.zero, other.zero),
        blocks=None if one.blocks is None or other.blocks is None else rows_of(one.blocks, other.blocks, wanted),
    )


class _Columns:
    """One matrix while its columns are rounded; everything is [in, out] in processing order, so that a column is contiguous."""

    def __init__(self, weight: Tensor, factor: Factor, scheme: Scheme, scale_dtype: torch.dtype, ranges: RangeSearch) -> None:
        out_features, in_features = weight.shape
        self.scheme, self.scale_dtype, self.ranges = scheme, scale_dtype, ranges
        self.element = scheme.element
        self.group = scheme.columns_per_group(in_features)
        self.order = factor.order
        self.feedback, self.pivots = factor.feedback.to(weight.dtype), factor.pivots
        self.weight = weight.t().contiguous()[factor.order]  # [in, out]; gathered as whole rows
        self.target = self.weight.clone()
        self.error = torch.empty_like(self.weight)
        self.codes = torch.empty(in_features, out_features, dtype=torch.uint8, device=weight.device)
        groups = in_features // self.group
        self.scale = torch.empty(groups, out_features, dtype=weight.dtype, device=weight.device)
        self.zero = torch.empty_like(self.scale)
        # the group of each processing position
        self.group_of = [position // self.group for position in range(in_features)]
        self.fitted = self.moving = False
        self.grid: Grid | None = None  # of all groups, where they are fitted together

    def fit_beforehand(self) -> None:
        """Fit every grid on the original weights, with groups of neighbouring columns in the original order."""
        original = torch.empty_like(self.weight)
        original[self.order] = self.weight
        if self.scheme.fitted_together:
            self._fit_together(original)
        else:
            for index in range(self.scale.shape[0]):
                self._fit(index, original[index * self.group : (index + 1) * self.group])
        self.group_of = [column // self.group for column in self.order.tolist()]
        self.fitted = True

    def enter(self, low: int, high: int) -> None:
        """Fit the grid of the columns low..high if they are a group; their targets already hold the feedback of everything before."""
        if not self.fitted and high - low == self.group:
            self._fit(low // self.group, self._left_by_feedback(low, low + self.group))

    def rounds(self, low: int, high: int) -> bool:
        """Whether the columns low..high are few enough to be rounded, on one grid."""
        return high - low <= LEAF and (self.fitted or high - low <= self.group)

    def feed(self, low: int, middle: int, high: int) -> None:
        """Add the feedback of the columns low..middle to the targets up to ``high``."""
        self.target[middle:high].addmm_(self.feedback[low:middle, middle:high].t(), self.error[low:middle])

    def cut(self, low: int, high: int) -> int:
        """Where the columns low..high are halved, at the end of a group where their grids are not there yet."""
        if not self.fitted and high - low > self.group:
            return low + (high - low) // self.group // 2 * self.group
        return low + max(LEAF, (high - low) // 2 // LEAF * LEAF)

    def _left_by_feedback(self, low: int, high: int) -> Tensor:
        if low == 0:
            return self.weight[low:high]
        # Inverting the small triangle and multiplying is 2.5 times as fast as solving with 4096 right-hand sides.
        triangle = self.feedback[low:high, low:high]
        inverse = torch.linalg.solve_triangular(triangle, torch.eye(high - low).to(triangle), upper=True, unitriangular=True)
        return torch.addmm(self.weight[low:high], inverse.t(), self.target[low:high] - self.weight[low:high])

    def _fit(self, index: int, columns: Tensor) -> None:
        grid = self.ranges.fit(columns.t(), self.scheme, self.scale_dtype, slice(index, index + 1))
        self.scale[index] = grid.scale.squeeze(1)
        self.zero[index] = grid.zero.squeeze(1)

    def _fit_together(self, columns: Tensor) -> None:
        rows = columns.t().reshape(-1, self.group)  # [out * groups, columns of a group]
        self.grid = self.ranges.fit(rows, self.scheme, self.scale_dtype)
        self.scale, self.zero = (each.view(-1, len(self.scale)).t().contiguous() for each in (self.grid.scale, self.grid.zero))

    def row_errors(self) -> Tensor:
        """``|E R|^2`` of each row, [out]: ``(E R)_j = R_jj (t_j - w'_j)``, and all targets are there."""
        miss = (self.target - self.weight).add_(self.error).mul_(self.pivots.to(self.target).unsqueeze(1))
        return miss.square_().sum(dim=0)

    def zero_groups(self) -> int:
        """Groups of a row whose original weights are all zero."""
        groups = torch.tensor(self.group_of, device=self.weight.device)
        sums = torch.zeros_like(self.scale).index_add_(0, groups, self.weight.abs())
        return int((sums == 0).sum())

    def result(self, moving_groups: bool) -> QuantizedWeight:
        """Codes and grids, columns back in their original order."""
        codes = torch.empty_like(self.codes)
        codes[self.order] = self.codes
        g_idx = None
        if moving_groups:
            g_idx = torch.empty(len(self.group_of), dtype=torch.int32, device=codes.device)
            g_idx[self.order] = torch.tensor(self.group_of, dtype=torch.int32, device=codes.device)
        grid = self.grid or Grid(self.element, self.scale.t().contiguous(), self.zero.t().contiguous())
        return replace(QuantizedWeight.on_grid(codes.t().contiguous(), grid, self.scheme, self.scale_dtype), g_idx=g_idx)


def _run(works: Sequence[_Columns], low: int, high: int) -> None:
    """Round the columns low..high of matrices of one shape."""
    for work in works:
        work.enter(low, high)
    if works[0].rounds(low, high):
        _round(works, low, high)
        return
    middle = works[0].cut(low, high)
    _run(works, low, middle)
    for work in works:
        work.feed(low, middle, high)
    _run(works, middle, high)


def _round(works: Sequence[_Columns], low: int, high: int) -> None:
    place = slice(low, high)
    coupling = side_by_side([work.feedback[place, place].t().contiguous() for work in works], 0)
    groups = [work.group_of[place] for work in works]
    target, base, scale, zero = (
        side_by_side(columns, 1)
        for columns in (
            [work.target[place] for work in works],
            [work.weight[place] for work in works],
            [work.scale[group] for work, group in zip(works, groups, strict=True)],
            [work.zero[group] for work, group in zip(works, groups, strict=True)],
        )
    )
    codes, error = round_in_order(target, coupling, base, scale, zero, works[0].element)
    for number, work in enumerate(works):
        work.codes[place], work.error[place] = one_of(codes, number, 1), one_of(error, number, 1)
        if len(works) > 1:
            work.target[place] = target[:, number]
