"""Grids: an element with the scale and the zero point of a group, the values that codes stand for. ``ranges`` fits them to weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ptqcli.numerics.double_quant import DoubleScales
from ptqcli.numerics.elements import Element

if TYPE_CHECKING:
    from ptqcli.numerics.blocks import Blocks


@dataclass(frozen=True)
class Grid:
    """The values that the codes of one or more groups stand for.

    element: what a code means in units of the scale. scale: values that the stored dtype holds exactly. zero: whole numbers, but of blocks.
    Both are in the dtype of the weights and broadcast to them; as a search fits them, [rows, 1]. double: the scales of all rows in 8 bits,
    where the scheme has such. blocks: what scale and zero are made of, where the scheme has blocks.
    """

    element: Element
    scale: Tensor
    zero: Tensor
    double: DoubleScales | None = None
    blocks: Blocks | None = None

    def nearest(self, weights: Tensor) -> Tensor:
        """Nearest codes of ``weights``, as whole numbers in their dtype."""
        return self.element.nearest(weights / self.scale, self.zero)

    def nearest_with_miss(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest codes, and their values less the weights in units of the scale."""
        units = weights / self.scale
        codes = self.element.nearest(units, self.zero)
        return codes, self.element.miss(codes, units, self.zero)

    def decode(self, codes: Tensor) -> Tensor:
        """The values of ``codes``, which are in the dtype of the scale."""
        return self.element.decode(codes, self.zero) * self.scale

    def round(self, weights: Tensor) -> Tensor:
        """``weights`` quantized and read back."""
        return self.decode(self.nearest(weights))

    def subtract(self, codes: Tensor, weights: Tensor, out: Tensor) -> None:
        """Write ``weights - decode(codes)`` to ``out``, in one step."""
        torch.addcmul(weights, self.element.decode(codes, self.zero), self.scale, value=-1, out=out)
