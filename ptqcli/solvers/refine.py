"""Polishing: the scales and the codes that a solver found, improved in turn under the solver's own objective.

With ``W'`` what codes and scales stand for, ``E = W - W'`` and the damped Hessian ``H``, the objective is ``tr(E H E^T)``, a sum over rows.
A row ``w`` whose codes stand for ``c`` in units of the scales has ``w' = sum_g s_g c_g``, where ``c_g`` is ``c`` on the columns of group
``g`` and zero elsewhere. A round is

    refit      the scales for these codes, by least squares: a small system a row,
                   A s = b,    A_gh = c_g^T H c_h,    b_g = c_g^T H w
    descent    the codes for these scales, one column after the other while all others stand still: column ``j`` is served best by
                   t_j = w'_j + (E H)_j / H_jj
               rounded to the nearest code; columns by falling ``H_jj``

Each half can only lower the objective, so rounds never undo what came before. GPTQ settles a column before it knows what becomes of the
later ones; descent comes back to it. LNQ ("GuidedQuant", Kim et al. 2025) fits a codebook where the refit has only scales to choose; the
descent is that of QuantEase (Behdin et al. 2023, arXiv 2309.01885) and COMQ (Zhang et al. 2024).

How it is computed: a block of columns gets its ``E H`` in one product from all errors as they stand, and within the block a change
reaches the later columns as in GPTQ, so that a pass is one product of H and a matrix of W's size. A is symmetric and takes half of
one; ``H W^T``, which b needs, is the same in all rounds.

What is solved for is the step from the old scales, with RIDGE, as a share of A's mean diagonal, added to A: a group of zero codes, which
has no say in the objective, keeps its scale. Scales are rounded to their stored dtype, and a row takes the new ones only if its
objective falls with them. A scale may become negative, where the grid has signed ones, but neither zero nor too small for its dtype. Zero
points stay, and so do doubly quantized scales, which are not free to move by themselves; blocks have a refit of their own
(``refine_blocks``). With one scale for the whole matrix the systems of all rows are summed.

Left out: the best column at each step, or pairs of columns (CDQuant, arXiv 2406.17542), which save a few per cent more for many
times the work; new zero points, with which a row's system would be twice as wide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ptqcli.errors import UsageError
from ptqcli.numerics.ranges import SMALLEST_SCALE
from ptqcli.numerics.scheme import WHOLE_MATRIX, Scheme
from ptqcli.numerics.weight import QuantizedWeight
from ptqcli.options import option
from ptqcli.solvers.columns import one_of, round_in_order, side_by_side

# Columns of the descent whose share of H E^T comes of one product. At 4096 rows and columns 64 took a tenth longer, 256 as long.
BLOCK = 128

RIDGE = 1e-6

# Rows refitted at once: few enough that the products of one group stay in the cache. At 4096 columns, all 4096 rows took 1.5 times as long.
ROWS = 256

# Bytes of a row's system, each of groups^2 numbers: A in float32, A in float64, with the ridge, and its factor.
SYSTEM_BYTES = 4 + 3 * 8
SMALLEST_GROUP = 32

# At 2 bits, on a trained model, three rounds, the default of solvers that feed errors back, took 20 % off the objective, eight 23 %.
MOST_ROUNDS = 100


def polish_option() -> Any:
    """The field ``polish`` of a solver."""
    return option(None, "rounds of refitting scales and codes to the Hessian afterwards; 0: none (rtn: 0, others: 3)")


class Polishes:
    """A solver with the option. usual_rounds: where it is None."""

    usual_rounds: ClassVar[int]
    polish: int | None

    @property
    def rounds(self) -> int:
        """Rounds of refit and descent."""
        return self.usual_rounds if self.polish is None else self.polish

    def check_polish(self) -> None:
        """Raise UsageError for a number of rounds that makes no sense."""
        if not 0 <= self.rounds <= MOST_ROUNDS:
            raise UsageError(f"polish {self.polish} is out of range; give 0 to {MOST_ROUNDS} rounds")


def polished(weight: Tensor, hessian: Tensor, quantized: QuantizedWeight, rounds: int, signed: bool = True) -> QuantizedWeight:
    """``quantized`` with codes and scales that serve ``weight`` better.

    weight: float32 or float64 [out, in]. hessian: the damped one [in, in], positive definite. rounds: of refit and descent. signed:
    whether a scale may become negative.
    """
    return polished_alike([weight], [hessian], [quantized], rounds, signed)[0]


def polished_alike(
    weights: Sequence[Tensor], hessians: Sequence[Tensor], quantized: Sequence[QuantizedWeight], rounds: int, signed: bool = True
) -> list[QuantizedWeight]:
    """``polished`` of matrices of one shape and scheme; descent takes their columns side by side."""
    if not rounds:
        return list(quantized)
    works = [_refinement(*given, signed) for given in zip(weights, hessians, quantized, strict=True)]
    for _ in range(rounds):
        for work in works:
            if not work.quantized.scheme.double:
                work.refit()
        descend(works)
    return [work.result() for work in works]


def _refinement(weight: Tensor, hessian: Tensor, quantized: QuantizedWeight, signed: bool) -> Refinement:
    if quantized.blocks is None:
        return Refinement(weight, hessian, quantized, signed)
    from ptqcli.solvers.refine_blocks import BlockRefinement  # which derives from the class here

    return BlockRefinement(weight, hessian, quantized, signed)


def polish_bytes(out_features: int, in_features: int, scheme: Scheme | None = None, moving: bool = True) -> int:
    """Peak memory of ``polished`` in float32, beyond its arguments: six matrices of the weight's size, the systems of the rows that are
    refitted at once, and, if groups are ``moving``, the Hessian with its columns sorted. scheme: None for groups of SMALLEST_GROUP.
    """
    known = scheme is not None and scheme.blocks is None
    groups = scheme.group_count(in_features) if scheme is not None and known else -(-in_features // SMALLEST_GROUP)
    systems = min(ROWS, out_features) * SYSTEM_BYTES * groups**2
    return 4 * in_features**2 * moving + 6 * 4 * out_features * in_features + systems


class Refinement:
    """One matrix while it is polished; [in, out], groups side by side, so that a column is contiguous and a group a slice."""

    def __init__(self, weight: Tensor, hessian: Tensor, quantized: QuantizedWeight, signed: bool = True) -> None:
        self.quantized, self.element, self.signed = quantized, quantized.scheme.element, signed
        self.place = None if quantized.g_idx is None else torch.argsort(quantized.g_idx, stable=True)
        self.hessian = hessian.to(weight.dtype) if self.place is None else hessian[self.place][:, self.place].to(weight.dtype)
        self.weight = self._sorted(weight.t())
        self.codes = self._sorted(quantized.codes.t()).to(weight.dtype)
        self.scale, self.zero = (each.t().to(weight.dtype).contiguous() for each in (quantized.scale, quantized.zero))  # [groups, out]
        self.group = len(self.weight) // len(self.scale)
        self.error = self.weight - self._reached()
        self.correlation = self.hessian @ self.weight  # H W^T
        self.order = torch.argsort(self.hessian.diagonal(), descending=True, stable=True)

    def _sorted(self, columns: Tensor) -> Tensor:
        return columns.contiguous() if self.place is None else columns.index_select(0, self.place)

    def _in_groups(self, columns: Tensor) -> Tensor:
        """[in, out] as [groups, columns of a group, out]."""
        return columns.unflatten(0, (-1, self.group))

    def _values(self) -> Tensor:
        """c, what the codes stand for in units of the scale."""
        return self.element.decode(self._in_groups(self.codes), self.zero.unsqueeze(1)).flatten(0, 1)

    def _reached(self) -> Tensor:
        """w', what the codes stand for."""
        values = self._values()
        self._in_groups(values).mul_(self.scale.unsqueeze(1))
        return values

    def refit(self) -> None:
        """New scales for the codes."""
        values, out = self._values(), self.weight.shape[1]
        rows = out if self.quantized.scheme.group_size == WHOLE_MATRIX else ROWS
        pieces = zip(*(each.split(rows, dim=1) for each in (values, self.correlation, self.scale)), strict=True)
        self.scale = torch.cat([self._solve(*self._system(c, correlation), scale) for c, correlation, scale in pieces], dim=1)
        error = self._in_groups(self.error)
        torch.addcmul(self._in_groups(self.weight), self._in_groups(values), self.scale.unsqueeze(1), value=-1, out=error)

    def _system(self, values: Tensor, correlation: Tensor) -> tuple[Tensor, Tensor]:
        """A [rows, groups, groups] and b [rows, groups] of some rows, float64; their c and H w, [in, rows]."""
        groups, rows = len(self.scale), values.shape[1]
        values = values.contiguous()
        b = (values * correlation).view(groups, self.group, rows).sum(dim=1)
        A = values.new_empty(groups, groups, rows)
        for g in range(groups):
            first, behind = g * self.group, (g + 1) * self.group
            product = self.hessian[first:, first:behind] @ values[first:behind]
            A[g, g:] = product.mul_(values[first:]).view(groups - g, self.group, rows).sum(dim=1)
            A[g + 1 :, g] = A[g, g + 1 :]
        return A.permute(2, 0, 1).double(), b.t().double()

    def _solve(self, A: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        """The best scales that the stored dtype holds, [groups, rows]; of rows that would not gain, those of ``scale``."""
        if self.quantized.scheme.group_size == WHOLE_MATRIX:
            A, b = A.sum(dim=0, keepdim=True), b.sum(dim=0, keepdim=True)
        old = scale.t()[: len(b)].double()  # [rows, groups]
        return stepped(A, b, old, self.quantized.scale.dtype, self._usable).t().to(scale.dtype).expand_as(scale)

    def _usable(self, new: Tensor, old: Tensor) -> Tensor:
        dtype = self.quantized.scale.dtype
        size = new.abs() if self.signed else new
        return size >= SMALLEST_SCALE.get(dtype, torch.finfo(dtype).tiny)

    def result(self) -> QuantizedWeight:
        """Codes and scales, columns back in their original order."""
        codes = self.codes.to(torch.uint8)
        if self.place is not None:
            codes = torch.empty_like(codes).index_copy_(0, self.place, codes)
        scale = self.scale.t().to(self.quantized.scale.dtype)
        return replace(self.quantized, codes=codes.t().contiguous(), scale=scale.contiguous())


def descend(works: Sequence[Refinement]) -> None:
    """Each column once takes the codes that are best for the others as they stand, in matrices of one shape side by side."""
    for columns in zip(*(work.order.split(BLOCK) for work in works), strict=True):
        parts = [_block(work, own) for work, own in zip(works, columns, strict=True)]
        coupling, *rest = zip(*parts, strict=True)
        target, now, scale, zero = (side_by_side(each, 1) for each in rest)
        codes, change = round_in_order(target, side_by_side(coupling, 0), now, scale, zero, works[0].element)
        for number, (work, own) in enumerate(zip(works, columns, strict=True)):
            work.error[own] += one_of(change, number, 1)
            work.codes[own] = one_of(codes, number, 1)


def _block(work: Refinement, columns: Tensor) -> tuple[Tensor, ...]:
    """Of some columns of one matrix: how they hang together, their best values if none of them moved, those that they have, their grids."""
    groups, diagonal = columns // work.group, work.hessian.diagonal()[columns].unsqueeze(1)
    H = work.hessian[columns]  # [block, in]
    now = work.weight[columns] - work.error[columns]  # w'
    target = torch.addcdiv(now, H @ work.error, diagonal)
    return H[:, columns] / diagonal, target, now, work.scale[groups], work.zero[groups]


def stepped(A: Tensor, b: Tensor, old: Tensor, dtype: torch.dtype, usable: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The best unknowns of ``A s = b`` in what ``dtype`` holds, for rows that gain by them; for others ``old``, float64 [rows, unknowns].

    usable: of new ones and old ones, where the new ones may stand.
    """
    left = b - torch.einsum("rgh,rh->rg", A, old)
    diagonal = A.diagonal(dim1=1, dim2=2)
    ridge = RIDGE * diagonal.mean(dim=1, keepdim=True) + (diagonal == 0)
    factor, failed = torch.linalg.cholesky_ex(A + torch.diag_embed(ridge))
    new = (old + torch.cholesky_solve(left.unsqueeze(2), factor).squeeze(2)).to(dtype).double()
    d = new - old
    rise = (d * (torch.einsum("rgh,rh->rg", A, d) - 2 * left)).sum(dim=1)
    gains = (rise < 0) & (failed == 0) & (torch.isfinite(new) & usable(new, old)).all(dim=1)
    return torch.where(gains.unsqueeze(1), new, old)
