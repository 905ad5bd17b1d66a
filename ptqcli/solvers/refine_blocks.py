"""Polishing of blocks: what a super-block shares, refitted to the codes under the solver's own objective.

The refit of ``refine`` moves the scale of each group by itself, which blocks do not allow: the steps of a super-block are whole multiples
of its ``d``, its minima of its ``dmin`` (``numerics.k_quants``). But for given codes and whole numbers a row is linear in these,

    w' = sum_B d_B p_B + e_B v_B

with ``p_B`` the codes of super-block ``B`` times their whole numbers, ``v_B`` its whole minima with their sign, and zero elsewhere; and so
it is in the legacy types, where ``p`` holds the codes and ``v`` ones (``Blocks.parts``). So the best ``d`` and ``e`` solve the same small
system, with ``p_B`` and ``v_B`` in the place of ``c_g``. They are rounded to fp16, keep their signs, and a row takes them only if its
objective falls. The whole numbers stay as the fit has found them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptqcli.numerics.weight import QuantizedWeight
from ptqcli.solvers.refine import ROWS, Refinement, stepped


class BlockRefinement(Refinement):
    """One matrix of blocks while it is polished."""

    def __init__(self, weight: Tensor, hessian: Tensor, quantized: QuantizedWeight, signed: bool = True) -> None:
        super().__init__(weight, hessian, quantized, signed)
        assert quantized.blocks is not None
        self.blocks = quantized.blocks

    def refit(self) -> None:
        """New d and dmin, or m, for the codes."""
        self.blocks = self.blocks.with_codes(self.codes.t())
        values, shared = zip(*self.blocks.parts(), strict=True)  # each [out, in] and [out, B]
        bases = torch.stack(values).transpose(1, 2).to(self.weight.dtype).contiguous()  # [parts, in, out]
        old = torch.cat(shared, dim=1).double()  # [out, parts * B]
        pieces = zip(bases.split(ROWS, dim=2), self.correlation.split(ROWS, dim=1), old.split(ROWS), strict=True)
        new = torch.cat([stepped(*self._block_system(p, c), rows, torch.float16, _same_signs) for p, c, rows in pieces])
        self.blocks = self.blocks.with_shared(new.to(torch.float16).chunk(len(shared), dim=1))
        grid = self.blocks.grid()
        self.scale, self.zero = (each.t().to(self.weight.dtype).contiguous() for each in (grid.scale, grid.zero))
        self.error = self.weight - self._reached()

    def _block_system(self, bases: Tensor, correlation: Tensor) -> tuple[Tensor, Tensor]:
        """A [rows, parts * B, parts * B] and b [rows, parts * B] of some rows, float64; bases: [parts, in, rows]."""
        parts, columns, rows = bases.shape
        count = self.blocks.d.shape[1]
        span = columns // count
        b = (bases * correlation).view(parts * count, span, rows).sum(dim=1)
        A = bases.new_empty(parts, count, parts, count, rows)
        for block in range(count):
            first, behind = block * span, (block + 1) * span
            for part in range(parts):
                product = self.hessian[first:, first:behind] @ bases[part, first:behind]
                sums = (bases[:, first:] * product).view(parts, count - block, span, rows).sum(dim=2)  # [parts, B - block, rows]
                A[part, block, :, block:] = sums
                A[:, block:, part, block] = sums
        return A.view(parts * count, parts * count, rows).permute(2, 0, 1).double(), b.t().double()

    def result(self) -> QuantizedWeight:
        """Codes and blocks."""
        return QuantizedWeight.of_blocks(self.blocks.with_codes(self.codes.t()), self.quantized.scheme)


def _same_signs(new: Tensor, old: Tensor) -> Tensor:
    """Where ``new`` can stand for ``old``: d does not vanish and dmin is not negative. (m of the legacy types could change its sign, but
    hardly ever wants to.)"""
    return torch.where(old == 0, new >= 0, new * old > 0)
