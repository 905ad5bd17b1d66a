"""Double quantization: scales of 8 bits, with scales of their own (Dettmers et al. 2023, QLoRA, section 3).

The float32 scales ``c`` of all groups of a matrix, one row after the other, are positive, so their mean is taken off first. What is left is
cut into blocks of BLOCK and coded by the levels ``q`` of an 8-bit map on [-1, 1]:

    m = mean(c)        a_b = max |c - m| over block b        u = argmin |q_u - (c - m) / a_b|        c' = q_u a_b + m

That is 8 + 32 / BLOCK bits a scale in the place of 32. The map is dynamic (Dettmers et al. 2021, "8-bit Optimizers via Block-wise
Quantization", section 2): for each e from 0 to 6 it has 2^e levels of either sign in the decade below 10^(e-6), evenly spread; and 0
and 1.

Everything is computed in float32, in the order of the authors' library, so that the same scales give the same bytes. Scales of zero, those
of groups without a weight, take part in the mean; for these, and wherever ``c'`` is too small to divide by, ``scale`` is 1 and the codes
stand for zero. ``c'`` may come out negative, where a group's scale is far below the others: the codes are chosen for it all the same.

All scales of a matrix hang together through the mean. So they are fitted together, before any code is chosen, and stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import chain

import torch
from torch import Tensor

BLOCK = 256
EXPONENTS = range(7)
SMALLEST_DIVISOR = 1e-38


@dataclass(frozen=True, kw_only=True)
class DoubleScales:
    """Scales of the groups of a matrix, doubly quantized, G groups in all, row after row.

    codes: uint8 [G]. absmax: float32 [G / BLOCK, rounded up]. offset: a float32 number. levels: float32 [256], the map.
    """

    codes: Tensor
    absmax: Tensor
    offset: float
    levels: Tensor

    @classmethod
    def of(cls, scales: Tensor) -> DoubleScales:
        """What comes nearest to ``scales``, float32 [G], none negative."""
        offset = scales.mean()
        left = scales - offset
        blocks = torch.nn.functional.pad(left, (0, -len(left) % BLOCK)).view(-1, BLOCK)
        absmax = blocks.abs().amax(dim=1)
        units = (blocks * (1.0 / absmax.clamp(min=SMALLEST_DIVISOR)).unsqueeze(1)).clamp_(-1, 1).flatten()[: len(left)]
        levels = dynamic_map().to(scales.device)
        codes = torch.bucketize(units, (levels[:-1] + levels[1:]) / 2)
        return cls(codes=codes.to(torch.uint8), absmax=absmax, offset=float(offset), levels=levels)

    def values(self) -> Tensor:
        """``c'``, float32 [G]."""
        spread = self.absmax.repeat_interleave(BLOCK)[: len(self.codes)]
        return self.levels[self.codes.long()] * spread + self.offset

    def scale(self) -> Tensor:
        """``c'`` as scales that can be divided by: 1 in the place of what is too small. float32 [G]."""
        return usable(self.values())

    def to(self, device: torch.device) -> DoubleScales:
        """The same scales on ``device``."""
        moved = {part: getattr(self, part).to(device) for part in ("codes", "absmax", "levels")}
        return DoubleScales(offset=self.offset, **moved)


def too_small(scales: Tensor) -> Tensor:
    """Where ``scales``, float32, are no normal numbers, so that nothing is divided by them."""
    return scales.abs() < torch.finfo(torch.float32).tiny


def usable(scales: Tensor) -> Tensor:
    """``scales`` with 1 in the place of those that are ``too_small``."""
    return torch.where(too_small(scales), torch.ones_like(scales), scales)


@cache
def dynamic_map() -> Tensor:
    """The levels of the 8-bit map, rising, float32 [256]."""
    decades = [_middles(1 << exponent) * 10.0 ** (exponent - EXPONENTS[-1]) for exponent in EXPONENTS]
    signed = chain.from_iterable((decade, -decade) for decade in decades)
    return torch.cat([torch.tensor([0.0, 1.0]), *signed]).sort().values


def _middles(count: int) -> Tensor:
    """The middles of ``count`` equal parts of [0.1, 1]."""
    ends = torch.linspace(0.1, 1, count + 1)
    return (ends[:-1] + ends[1:]) / 2
