"""Equalised columns: the columns of what a norm feeds are scaled to one mean magnitude, and the norm takes the scales back.

In a group of ``n`` weights that share a scale, small columns are rounded as coarsely as the largest beside them. For every fold whose
producer is a norm, with ``W`` [rows, in] the rows of all linears that read it,

    s_c = g / m_c,    m_c = mean_r |W_rc|,    g = (Π_c m_c)^(1 / in)

multiplies column ``c``, which then has the mean magnitude ``g`` as every other, and divides channel ``c`` of the norm's gain. Error
feedback weighs the columns by their inputs, which the division has changed the other way: the cost of rounding spreads over all columns.

It is the data-free relative of AWQ's scales (Lin et al. 2023; there the inputs decide), and of cross-layer equalization (Nagel et al. 2019,
"Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.1), which equalises the ranges of both sides of a pair;
a norm's gain is not quantized and has no range to lose. Left out: pairs of two linears, such as v and o, where that would hold.

A column of zeros keeps the scale 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ptqcli.transforms import BlockTransform
from ptqcli.transforms.folded import FoldedBlock, FoldNote
from ptqcli.transforms.folds import Fold


@dataclass(frozen=True)
class Equalize(BlockTransform):
    """Equalised columns; there is nothing to set."""

    name: ClassVar[str] = "equalize"
    summary: ClassVar[str] = "equalised columns: one mean magnitude for all columns behind a norm, without data"

    @property
    def tries(self) -> bool:
        """What it does follows from the weights."""
        return False

    def apply(self, block: FoldedBlock) -> list[FoldNote]:
        """Scale the columns behind every norm that a linear to quantize reads."""
        return [_equalize(block, fold) for fold in block.folds if block.readers(fold) and fold.offsets]


def _equalize(block: FoldedBlock, fold: Fold) -> FoldNote:
    scales = column_scales(fold, [block.weight(local) for local in block.readers(fold)])
    block.scale(fold, scales)
    return FoldNote(producer=fold.producer, readers=fold.readers, choice="equal columns")


def column_scales(fold: Fold, weights: list[Tensor]) -> Tensor:
    """The scale of every channel of the fold's producer, float32 [fold.width].

    weights: of its readers, float32 [out, in] each.
    """
    rows = sum(len(weight) for weight in weights)
    mean = fold.largest(torch.stack([weight.abs().sum(dim=0) for weight in weights]).sum(dim=0) / rows)  # m
    usable = mean > 0
    if not usable.any():
        return torch.ones_like(mean)
    return torch.where(usable, mean[usable].log().mean().exp() / mean, 1.0)
