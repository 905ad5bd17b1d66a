"""What the numbers are: bits, groups and zero points, and the arithmetic between weights and codes.

A weight matrix ``W[out, in]`` is cut along ``in`` into groups of ``group_size`` neighbouring columns (``-1``: the whole row is one
group). Each group of each row has a scale ``s`` and an integer zero point ``z``; with ``b`` bits a weight is stored as an unsigned code

    u = clamp(round(w / s + z), 0, 2^b - 1)        and read back as        w' = (u - z) * s

A symmetric scheme fixes ``z = 2^(b-1)``, so the range is the full two's complement one, -2^(b-1) .. 2^(b-1) - 1.
Rounding is to the nearest, ties to even. Scales are rounded to the dtype in which they are stored *before* codes are chosen,
so that the codes are the best ones for the scale that a reader will see.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ptqcli.errors import UsageError

SUPPORTED_BITS = (2, 3, 4, 8)

# Candidate shrink factors of the squared-error search. Below 0.35 no group of a trained model won at 2 bits, the width
# that clips hardest, so the grid stops there.
SHRINK_FACTORS = tuple(1.0 - 0.05 * step for step in range(14))

# float16 ends its normal numbers at 6e-5, above the scales of real 8-bit groups. 2^-20 still has 4 bits of mantissa there, and codes are
# chosen for the rounded scale anyway. The other dtypes have no scale to lose: their normal numbers end at 1e-38.
SMALLEST_SCALE = {torch.float16: 2.0**-20}


@dataclass(frozen=True)
class Scheme:
    """Number format of one weight matrix.

    bits: code width, one of 2, 3, 4, 8. group_size: columns per scale, -1 for the whole row. symmetric: zero point fixed in the middle.
    Raises UsageError for a width or group size that does not exist.
    """

    bits: int
    group_size: int
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in SUPPORTED_BITS:
            raise UsageError(f"{self.bits} bits per weight is not supported; choose one of {SUPPORTED_BITS}")
        if self.group_size != -1 and self.group_size < 1:
            raise UsageError(f"group size {self.group_size} is not valid; give a positive number, or -1 for whole rows")

    @property
    def levels(self) -> int:
        """Number of codes, 2^bits."""
        return 1 << self.bits

    @property
    def middle(self) -> int:
        """The zero point of a symmetric scheme, 2^(bits-1)."""
        return 1 << (self.bits - 1)

    def columns_per_group(self, in_features: int) -> int:
        """Group size with -1 resolved to the row length."""
        return in_features if self.group_size == -1 else self.group_size

    def group_count(self, in_features: int) -> int:
        """Groups in a row of ``in_features`` columns. Raises UsageError if the group size does not divide it."""
        columns = self.columns_per_group(in_features)
        if in_features % columns:
            raise UsageError(f"group size {columns} does not divide {in_features} input features")
        return in_features // columns

    def describe(self) -> str:
        """Short name for tables, such as ``W4 g128 sym``."""
        group = "per row" if self.group_size == -1 else f"g{self.group_size}"
        return f"W{self.bits} {group} {'sym' if self.symmetric else 'asym'}"


@dataclass(frozen=True)
class QuantizedWeight:
    """Integer codes of one matrix with what is needed to read them.

    codes: uint8 [out, in], each below 2^bits. scale: floating [out, groups], in the stored dtype. zero: uint8 [out, groups].
    g_idx: int32 [in], the group of each column, or None when the groups are neighbouring columns.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    scheme: Scheme
    g_idx: Tensor | None = None

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """``(codes - zero) * scale`` as [out, in], computed in float32 and rounded once to ``dtype`` (default: the scale's)."""
        _out, columns = self.codes.shape
        index = self.g_idx.long() if self.g_idx is not None else _neighbour_groups(columns, self.scale.shape[1], self.codes.device)
        centred = self.codes.float() - self.zero.float()[:, index]
        return (centred * self.scale.float()[:, index]).to(dtype or self.scale.dtype)

    def to(self, device: torch.device) -> QuantizedWeight:
        """The same weight on ``device``."""
        g_idx = None if self.g_idx is None else self.g_idx.to(device)
        return QuantizedWeight(self.codes.to(device), self.scale.to(device), self.zero.to(device), self.scheme, g_idx)


def _neighbour_groups(columns: int, groups: int, device: torch.device) -> Tensor:
    return torch.arange(columns, device=device) // (columns // groups)


@dataclass(frozen=True)
class GroupGrid:
    """Scale and zero point of one group for each row.

    scale: [rows, 1] with values that the stored dtype holds exactly; zero: [rows, 1] with integer values; both in the dtype of the weights.
    """

    scale: Tensor
    zero: Tensor


def fit(weights: Tensor, scheme: Scheme, scale_dtype: torch.dtype, search: str = "minmax") -> GroupGrid:
    """Scale and zero point for each row of ``weights``, float32 or float64 [rows, columns of one group].

    ``minmax``: symmetric ``2 * absmax / (2^b - 1)``; asymmetric ``(max - min) / (2^b - 1)`` over a range that includes zero, so that
    zero stays exact. ``mse``: the range is shrunk by each of SHRINK_FACTORS and the one with the least summed squared error is kept.
    A row of zeros gets scale 1. The scale is rounded to ``scale_dtype``; one too small or too large for it is held at the smallest or
    largest that it can hold (see SMALLEST_SCALE).
    """
    if search not in ("minmax", "mse"):
        raise UsageError(f"scale search '{search}' is unknown; use minmax or mse")
    low = weights.amin(dim=1, keepdim=True).clamp(max=0)
    high = weights.amax(dim=1, keepdim=True).clamp(min=0)
    if scheme.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    best = _grid(low, high, scheme, scale_dtype)
    if search == "minmax":
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
