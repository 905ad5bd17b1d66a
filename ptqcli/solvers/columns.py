"""Columns rounded one after the other, each behind what became of those before it: the loop that GPTQ and the descent of polishing share.

The loop takes a handful of small operations a column, whatever the number of rows. Matrices of one shape, such as those of the experts of
a layer, go through it side by side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ptqcli.numerics.elements import Element
from ptqcli.numerics.grids import Grid


def round_in_order(target: Tensor, coupling: Tensor, base: Tensor, scale: Tensor, zero: Tensor, element: Element) -> tuple[Tensor, Tensor]:
    """Round n columns to their grids, in order; return the codes and ``base`` minus their values, both as ``target``.

    target: [n, out], or [n, matrices, out]; what column j is to be, and takes up ``sum_{k<j} coupling_jk (base - value)_k`` in place.
    coupling: [n, n], or [matrices, n, n]. base, scale, zero: as ``target``.
    """
    change, codes = torch.empty_like(target), torch.empty_like(target)
    for j, t in enumerate(target):
        if j and target.dim() == 2:
            t.addmv_(change[:j].t(), coupling[j, :j])
        elif j:
            t += (coupling[:, j : j + 1, :j] @ change[:j].transpose(0, 1)).squeeze(1)
        grid = Grid(element, scale[j], zero[j])
        codes[j] = grid.nearest(t)
        grid.subtract(codes[j], base[j], out=change[j])
    return codes, change


def side_by_side(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """Those of several matrices along a new dimension ``dim``, or the only one as it is."""
    return tensors[0] if len(tensors) == 1 else torch.stack(list(tensors), dim)


def one_of(tensors: Tensor, number: int, dim: int) -> Tensor:
    """Those of one matrix of what ``round_in_order`` returns."""
    return tensors if tensors.dim() == 2 else tensors.select(dim, number)
