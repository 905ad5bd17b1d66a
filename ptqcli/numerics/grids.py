"""Grids: scale and zero point of a group, and the searches that fit them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ptqcli.errors import UsageError
from ptqcli.numerics.scheme import WHOLE_MATRIX, Scheme

# Candidate shrink factors of the squared-error search. Below 0.35 no group of a trained model won at 2 bits, the width
# that clips hardest, so the grid stops there.
SHRINK_FACTORS = tuple(1.0 - 0.05 * step for step in range(14))

# float16 ends its normal numbers at 6e-5, above the scales of real 8-bit groups. 2^-20 still has 4 bits of mantissa there, and codes are
# chosen for the rounded scale anyway. The other dtypes have no scale to lose: their normal numbers end at 1e-38.
SMALLEST_SCALE = {torch.float16: 2.0**-20}


@dataclass(frozen=True)
class GroupGrid:
    """Scale and zero point of one group for each row.

    scale: [rows, 1] with values that the stored dtype holds exactly; zero: [rows, 1] with integer values; both in the dtype of the weights.
    """

    scale: Tensor
    zero: Tensor


def fit(weights: Tensor, scheme: Scheme, scale_dtype: torch.dtype, search: str = "minmax", limit: Tensor | None = None) -> GroupGrid:
    """Scale and zero point for each row of ``weights``, float32 or float64 [rows, columns of one group].

    ``minmax``: symmetric ``2 * absmax / (2^b - 1)``; asymmetric ``(max - min) / (2^b - 1)`` over a range that includes zero, so that
    zero stays exact. ``mse``: the range is shrunk by each of SHRINK_FACTORS and the one with the least summed squared error is kept.
    A row of zeros gets scale 1. The scale is rounded to ``scale_dtype``; one too small or too large for it is held at the smallest or
    largest that it can hold (see SMALLEST_SCALE). limit, [rows, 1]: the largest magnitude that the range may reach, found by a search of
    its own (AWQ's clipping); then nothing more is searched here. With one scale for the whole matrix all rows get the same.
    """
    if scheme.group_size == WHOLE_MATRIX and len(weights) > 1:
        whole = None if limit is None else limit.amax().reshape(1, 1)
        grid = fit(weights.reshape(1, -1), scheme, scale_dtype, search, whole)
        return GroupGrid(grid.scale.expand(len(weights), 1).clone(), grid.zero.expand(len(weights), 1).clone())
    if search not in ("minmax", "mse"):
        raise UsageError(f"scale search '{search}' is unknown; use minmax or mse")
    low = weights.amin(dim=1, keepdim=True).clamp(max=0)
    high = weights.amax(dim=1, keepdim=True).clamp(min=0)
    if limit is not None:
        low, high = torch.maximum(low, -limit), torch.minimum(high, limit)
    if scheme.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    best = _grid(low, high, scheme, scale_dtype)
    if search == "minmax" or limit is not None:
        return best
    best_error = _squared_error(weights, best, scheme)
    scale, zero = best.scale, best.zero
    for factor in SHRINK_FACTORS[1:]:
        candidate = _grid(low * factor, high * factor, scheme, scale_dtype)
        error = _squared_error(weights, candidate, scheme)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        scale = torch.where(better, candidate.scale, scale)
        zero = torch.where(better, candidate.zero, zero)
    return GroupGrid(scale, zero)


def _grid(low: Tensor, high: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> GroupGrid:
    steps = scheme.levels - 1
    scale = (high - low) / steps
    limits = torch.finfo(scale_dtype)
    smallest = SMALLEST_SCALE.get(scale_dtype, limits.tiny)
    scale = torch.where(scale > 0, scale.clamp(smallest, limits.max), torch.ones_like(scale))
    scale = scale.to(scale_dtype).to(low.dtype)
    if scheme.symmetric:
        return GroupGrid(scale, torch.full_like(scale, scheme.middle))
    return GroupGrid(scale, torch.round(-low / scale).clamp(0, steps))


def _squared_error(weights: Tensor, grid: GroupGrid, scheme: Scheme) -> Tensor:
    codes = encode(weights, grid, scheme)
    return ((codes - grid.zero) * grid.scale - weights).square().sum(dim=1, keepdim=True)


def encode(weights: Tensor, grid: GroupGrid, scheme: Scheme) -> Tensor:
    """Nearest codes of ``weights`` [rows, columns] on the grid, as integers in [0, 2^bits) in the dtype of the weights."""
    return torch.round(weights / grid.scale + grid.zero).clamp_(0, scheme.levels - 1)
