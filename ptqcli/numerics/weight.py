"""Quantized weights: codes with what is needed to read them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ptqcli.numerics.blocks import Blocks, in_rows, moved
from ptqcli.numerics.double_quant import DoubleScales
from ptqcli.numerics.grids import Grid
from ptqcli.numerics.ranges import RangeSearch
from ptqcli.numerics.scheme import Scheme


@dataclass(frozen=True)
class OutlierColumns:
    """Columns of a matrix in 16 bit. index: int32 [k], rising, without repetition. weight: floating [out, k], the original values."""

    index: Tensor
    weight: Tensor

    def to(self, device: torch.device) -> OutlierColumns:
        """The same columns on ``device``."""
        return OutlierColumns(self.index.to(device), self.weight.to(device))


@dataclass(frozen=True, kw_only=True)
class QuantizedWeight:
    """The codes of one matrix with what is needed to read them.

    codes: uint8 [out, in], each below 2^bits. scale: floating [out, groups], in the stored dtype. zero: uint8 [out, groups]; with one scale
    for the whole matrix both are [out, 1] and all rows are equal. Of a scheme of blocks both are float32, and zero is no whole number.
    g_idx: int32 [in], the group of each column, or None when the groups are neighbouring columns.
    input_scale: floating [1], of static activations. outliers: columns kept in 16 bit, where the scheme splits; in a static split their
    codes are the zero point, in a dynamic one they are codes like all others, for inputs that stay below the threshold.
    double: what ``scale`` is made of, where the scheme quantizes scales doubly. blocks: what scale and zero are made of, where the scheme
    has blocks; the codes in it count for nothing.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    scheme: Scheme
    g_idx: Tensor | None = None
    input_scale: Tensor | None = None
    outliers: OutlierColumns | None = None
    double: DoubleScales | None = None
    blocks: Blocks | None = None

    @classmethod
    def on_grid(cls, codes: Tensor, grid: Grid, scheme: Scheme, scale_dtype: torch.dtype) -> QuantizedWeight:
        """``codes``, whole numbers [out, in], on ``grid``, whose scale and zero hold the groups of one row after the other."""
        rows = len(codes)
        scale, zero = grid.scale.reshape(rows, -1), grid.zero.reshape(rows, -1)
        if grid.blocks is None:
            scale, zero = scale.to(scale_dtype), zero.to(torch.uint8)
        else:
            scale, zero = scale.float(), zero.float()
        blocks = None if grid.blocks is None else in_rows(grid.blocks, rows)
        return cls(codes=codes.to(torch.uint8), scale=scale, zero=zero, scheme=scheme, double=grid.double, blocks=blocks)

    @classmethod
    def of_blocks(cls, blocks: Blocks, scheme: Scheme) -> QuantizedWeight:
        """What ``blocks`` hold."""
        return cls.on_grid(blocks.codes.flatten(1), replace(blocks.grid(), blocks=blocks), scheme, torch.float32)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The values of the codes, [out, in], computed in float32 and rounded once to ``dtype`` (default: the scale's).

        Columns that are kept in 16 bit have their 16-bit values; blocks are computed as llama.cpp does, to the last bit.
        """
        if self.blocks is not None:
            return self.blocks.with_codes(self.codes).values().to(dtype or self.scale.dtype)
        scale, zero, codes = self.scale.float(), self.zero.float(), self.codes.float()
        if self.g_idx is not None:
            index = self.g_idx.long()
            scale, zero = scale[:, index], zero[:, index]
        else:
            scale, zero, codes = scale.unsqueeze(2), zero.unsqueeze(2), codes.unflatten(1, (scale.shape[1], -1))
        values = Grid(self.scheme.element, scale, zero).decode(codes).reshape(self.codes.shape).to(dtype or self.scale.dtype)
        if self.outliers is not None:
            values[:, self.outliers.index.long()] = self.outliers.weight.to(values.dtype)
        return values

    def to(self, device: torch.device) -> QuantizedWeight:
        """The same weight on ``device``."""
        return QuantizedWeight(
            codes=self.codes.to(device),
            scale=self.scale.to(device),
            zero=self.zero.to(device),
            scheme=self.scheme,
            g_idx=None if self.g_idx is None else self.g_idx.to(device),
            input_scale=None if self.input_scale is None else self.input_scale.to(device),
            outliers=None if self.outliers is None else self.outliers.to(device),
            double=None if self.double is None else self.double.to(device),
            blocks=None if self.blocks is None else moved(self.blocks, device),
        )


def round_to_nearest(weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype, ranges: RangeSearch) -> QuantizedWeight:
    """Every weight of a floating [out, in] as the nearest code of its group's grid, which ``ranges`` fits.

    Raises UsageError if the group size does not divide ``in``.
    """
    out_features, in_features = weight.shape
    groups = scheme.group_count(in_features)
    rows = weight.reshape(out_features * groups, -1)  # [out * groups, columns of a group]
    grid = ranges.fit(rows, scheme, scale_dtype)
    return QuantizedWeight.on_grid(grid.nearest(rows).reshape(out_features, in_features), grid, scheme, scale_dtype)
