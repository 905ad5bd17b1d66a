"""Searches for the grids of given weights: where a group's lowest and highest code should stand.

The codes of a symmetric scheme reach from -2^(b-1) to 2^(b-1) - 1: one step farther below zero than above. A *signed* grid uses that step:
with w* the weight of largest magnitude in a group,

    s = -w* / 2^(b-1)

puts w* on the lowest code whatever its sign is, so a scale is negative where w* is positive, and no code is wasted on a value that no
weight has (the "full-range" symmetric form of Intel's Neural Compressor and of AutoRound, Cheng et al. 2023). Its step is
1 - 2^-b of that of the *unsigned* grid, 2 |w*| / (2^b - 1), which formats want whose readers take positive scales only. Asymmetric
schemes have zero points for this; their scales are positive.

The levels of codebooks end at -1 and 1, so their scale is the largest magnitude of a group. Doubly quantized, it is rounded with those of
all other groups once they are found (``double_quant``), which takes the whole matrix in one call.

How far a grid should reach is a search: ``MinMax`` takes all weights in, ``SquaredError`` clips, or widens, where that lowers the rounding
error, ``Clipped`` takes limits that were found elsewhere. Grids of GGUF blocks have a search of their own (``numerics.blocks``), which
all of them hand on to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ptqcli.errors import UsageError
from ptqcli.numerics.blocks import fit_blocks
from ptqcli.numerics.double_quant import DoubleScales
from ptqcli.numerics.grids import Grid
from ptqcli.numerics.scheme import WHOLE_MATRIX, Scheme

# Candidate shrink factors of the squared-error search. Below 0.35 no group of a trained model won at 2 bits, the width
# that clips hardest, so the grid stops there.
SHRINK_FACTORS = tuple(1.0 - 0.05 * step for step in range(14))

# Those of signed grids, against 1 for the full range; with the other sign the largest weight is clipped to the highest code. On a trained
# model 96 % of the groups at 2 bits and all at 8 won within these, and a step of 0.01 lowered the error by less than 2 %.
SIGNED_FACTORS = (1.0, *(sign * (1.1 - 0.05 * step) for sign in (1, -1) for step in range(14) if sign * step != 2))

# float16 ends its normal numbers at 6e-5, above the scales of real 8-bit groups. 2^-20 still has 4 bits of mantissa there, and codes are
# chosen for the rounded scale anyway. The other dtypes have no scale to lose: their normal numbers end at 1e-38.
SMALLEST_SCALE = {torch.float16: 2.0**-20}

EVERY_GROUP = slice(None)

# Weights that a search looks at together, by device: on a CPU what its caches hold, so that the system is not asked for memory with every
# candidate, which took three quarters of the time on a matrix of 45 million weights.
PIECE = {"cpu": 1 << 17, "cuda": 1 << 27}


class RangeSearch(Protocol):
    """Fits grids to weights. Groups are rows here: a matrix [out, in] comes as [out * groups, columns of a group] or group by group.

    signed: whether scales of symmetric schemes have a sign, see the module.
    """

    @property
    def signed(self) -> bool: ...

    def fit(self, weights: Tensor, scheme: Scheme, scale_dtype: torch.dtype, groups: slice = EVERY_GROUP) -> Grid:
        """The grid of each row of ``weights``, float32 or float64; scale and zero point are [rows, 1].

        groups: which groups of each row of the matrix these are. A row of zeros gets scale 1. The scale is rounded to ``scale_dtype``; one
        whose magnitude is too small or too large for it is held at the smallest or largest that it can hold (see SMALLEST_SCALE). With one
        scale for the whole matrix all rows get the same; with doubly quantized ones ``weights`` are all groups of a matrix, and with
        blocks all groups of some of its rows.
        """


class _Search(RangeSearch):
    """What the searches here share."""

    def fit(self, weights: Tensor, scheme: Scheme, scale_dtype: torch.dtype, groups: slice = EVERY_GROUP) -> Grid:
        """See ``RangeSearch``."""
        limit = self._limit(scheme, groups)
        if scheme.blocks is not None:
            return WeightedBlocks().fit(weights if limit is None else weights.clamp(-limit, limit), scheme, scale_dtype)
        return _final(self._found(_sharing(weights, scheme), scheme, scale_dtype, limit), weights, scheme)

    def _limit(self, scheme: Scheme, groups: slice) -> Tensor | None:
        """The largest magnitude of each row, [rows, 1], where that is limited."""
        return None

    def _found(self, rows: Tensor, scheme: Scheme, scale_dtype: torch.dtype, limit: Tensor | None) -> Grid:
        """The grid of each of ``rows``. As it stands, over all that a row reaches."""
        return _grid(_ends(rows, scheme, self.signed, limit), scheme, scale_dtype)


@dataclass(frozen=True)
class MinMax(_Search):
    """All weights are in range, but for those of a signed grid that stand within a step of its upper end.

    Symmetric: see the module. Asymmetric: scale ``(max - min) / (2^b - 1)`` over a range that includes zero, so that zero stays exact.
    """

    signed: bool = True


@dataclass(frozen=True)
class SquaredError(_Search):
    """The range of ``MinMax`` times that of SIGNED_FACTORS, or SHRINK_FACTORS, which leaves the least summed squared error."""

    signed: bool = True

    def _found(self, rows: Tensor, scheme: Scheme, scale_dtype: torch.dtype, limit: Tensor | None) -> Grid:
        low, high = _ends(rows, scheme, self.signed)
        best = _grid((low, high), scheme, scale_dtype)
        count = max(1, PIECE[rows.device.type] // rows.shape[1])
        if count >= len(rows):
            return self._best(rows, low, high, best, scheme, scale_dtype)
        pieces = [
            self._best(
                rows[start : start + count],
                low[start : start + count],
                high[start : start + count],
                Grid(best.element, best.scale[start : start + count], best.zero[start : start + count]),
                scheme,
                scale_dtype,
            )
            for start in range(0, len(rows), count)
        ]
        return Grid(best.element, torch.cat([piece.scale for piece in pieces]), torch.cat([piece.zero for piece in pieces]))

    def _best(self, rows: Tensor, low: Tensor, high: Tensor, best: Grid, scheme: Scheme, scale_dtype: torch.dtype) -> Grid:
        """The best of the factors for each of ``rows``, from the ends and the grid of the first."""
        best_error = _squared_error(rows, best)
        factors = SIGNED_FACTORS if takes_sign(scheme, self.signed) else SHRINK_FACTORS
        for factor in factors[1:]:
            candidate = _grid((low * factor, high * factor), scheme, scale_dtype)
            error = _squared_error(rows, candidate)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            scale = torch.where(better, candidate.scale, best.scale)
            best = Grid(best.element, scale, torch.where(better, candidate.zero, best.zero))
        return best


@dataclass(frozen=True)
class Clipped(_Search):
    """The range of ``MinMax``, but no magnitude beyond ``limits`` [out, groups], which a search of its own has found (AWQ's clipping)."""

    limits: Tensor
    signed: bool = True

    def _limit(self, scheme: Scheme, groups: slice) -> Tensor:
        limit = self.limits[:, groups].reshape(-1, 1)
        return limit.amax().reshape(1, 1) if scheme.group_size == WHOLE_MATRIX else limit


@dataclass(frozen=True)
class WeightedBlocks(RangeSearch):
    """Grids of blocks, whose steps are whole multiples of each other, with the least squared error.

    importance: by which the error of each column counts, positive, float32 [in], such as the diagonal of a Hessian; None: all count alike.
    """

    importance: Tensor | None = None
    signed: bool = True

    def fit(self, weights: Tensor, scheme: Scheme, scale_dtype: torch.dtype, groups: slice = EVERY_GROUP) -> Grid:
        """See ``RangeSearch``; scales are those of the blocks, whatever ``scale_dtype`` is."""
        assert scheme.blocks is not None
        columns = scheme.columns_per_block if self.importance is None else len(self.importance)
        blocks = fit_blocks(scheme.blocks, weights.float().reshape(-1, columns), self.importance)
        grid = blocks.grid()
        scale, zero = (each.to(weights.dtype).reshape(-1, 1) for each in (grid.scale, grid.zero))
        return Grid(grid.element, scale, zero, blocks=blocks)


SEARCHES: dict[str, Callable[[bool], RangeSearch]] = {"minmax": MinMax, "mse": SquaredError}


def range_search(name: str, signed: bool = True) -> RangeSearch:
    """The search called ``name``. Raises UsageError for an unknown one."""
    if name not in SEARCHES:
        raise UsageError(f"scale search '{name}' is unknown; use {' or '.join(SEARCHES)}")
    return SEARCHES[name](signed)


def takes_sign(scheme: Scheme, signed: bool) -> bool:
    """Whether grids of ``scheme`` have signed scales where ``signed`` ones are wanted: if its element reaches farther below zero."""
    lowest, highest = scheme.element.ends
    return signed and scheme.symmetric and -lowest > highest


def _sharing(weights: Tensor, scheme: Scheme) -> Tensor:
    """``weights`` with what shares a scale in one row."""
    return weights.reshape(1, -1) if scheme.group_size == WHOLE_MATRIX else weights


def _final(grid: Grid, weights: Tensor, scheme: Scheme) -> Grid:
    """``grid`` with a row for each of ``weights``, its scales doubly quantized where they are to be."""
    rows = len(weights)
    if scheme.double:
        empty = weights.abs().amax(dim=1, keepdim=True) == 0
        double = DoubleScales.of(torch.where(empty, 0, grid.scale).float().flatten())
        return Grid(grid.element, double.scale().to(grid.scale.dtype).unsqueeze(1), grid.zero, double)
    if len(grid.scale) == rows:
        return grid
    return Grid(grid.element, grid.scale.expand(rows, 1).clone(), grid.zero.expand(rows, 1).clone())


def _ends(weights: Tensor, scheme: Scheme, signed: bool, limit: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What the lowest and the highest code of each row stand for, each [rows, 1]; limit, [rows, 1]: the largest magnitude."""
    if takes_sign(scheme, signed):
        lowest, highest = scheme.element.ends
        low = weights.gather(1, weights.abs().argmax(dim=1, keepdim=True))  # w*
        if limit is not None:
            low = torch.minimum(low.abs(), limit).copysign(low)
        return low, low * highest / lowest
    low = weights.amin(dim=1, keepdim=True).clamp(max=0)
    high = weights.amax(dim=1, keepdim=True).clamp(min=0)
    if limit is not None:
        low, high = torch.maximum(low, -limit), torch.minimum(high, limit)
    if scheme.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    return low, high


def _grid(ends: tuple[Tensor, Tensor], scheme: Scheme, scale_dtype: torch.dtype) -> Grid:
    """The grid whose lowest and highest codes stand for ``ends``."""
    low, high = ends
    element = scheme.element
    scale = (high - low) / element.span
    limits = torch.finfo(scale_dtype)
    smallest = SMALLEST_SCALE.get(scale_dtype, limits.tiny)
    magnitude = scale.abs().clamp(smallest, limits.max)
    scale = torch.where(scale != 0, magnitude.copysign(scale), torch.ones_like(scale))
    scale = scale.to(scale_dtype).to(low.dtype)
    if scheme.symmetric:
        return Grid(element, scale, torch.full_like(scale, scheme.middle))
    return Grid(element, scale, torch.round(-low / scale).clamp(0, element.span))


def _squared_error(weights: Tensor, grid: Grid) -> Tensor:
    return (grid.round(weights) - weights).square().sum(dim=1, keepdim=True)
