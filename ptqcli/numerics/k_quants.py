"""The numbers of llama.cpp's K-quants: grids of two levels, in super-blocks of 256 weights.

A super-block of a row has one fp16 scale ``d``, and where minima are stored one more, ``dmin``; each of its sub-blocks of 16 or 32 weights
has a whole number ``s`` that multiplies ``d``, and ``m`` that multiplies ``dmin``. A weight with code ``q`` stands for

    Q2_K, Q4_K, Q5_K    w = (d s) q - (dmin m)        0 <= s, m < 16 (Q2_K) or 64
    Q3_K, Q6_K          w = (d s) (q - z)             -32 <= s < 32, z = 4 (Q3_K); -128 <= s < 128, z = 32 (Q6_K)

computed in float32 in this order, as ``dequantize_row_q4_K`` and its like in ggml do. How it lies in bytes is
``checkpoint.gguf_blocks``'s, how ``d``, ``s``, ``dmin`` and ``m`` are found ``numerics.k_fit``'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ptqcli.numerics.elements import Int
from ptqcli.numerics.grids import Grid
from ptqcli.numerics.scheme import SUPER_BLOCK


@dataclass(frozen=True, kw_only=True)
class KType:
    """One K-quant. name: as ggml calls it. bits: of a code. columns: of a sub-block. scales: the lowest and the highest ``s``.
    middle: ``z``, None for one with minima, which have the range of the scales."""

    name: str
    bits: int
    columns: int
    scales: tuple[int, int]
    middle: int | None = None

    @property
    def sub_blocks(self) -> int:
        """In a super-block."""
        return SUPER_BLOCK // self.columns

    @property
    def levels(self) -> int:
        """Number of codes."""
        return 1 << self.bits


K_TYPES = {
    each.name: each
    for each in (
        KType(name="Q2_K", bits=2, columns=16, scales=(0, 15)),
        KType(name="Q3_K", bits=3, columns=16, scales=(-32, 31), middle=4),
        KType(name="Q4_K", bits=4, columns=32, scales=(0, 63)),
        KType(name="Q5_K", bits=5, columns=32, scales=(0, 63)),
        KType(name="Q6_K", bits=6, columns=16, scales=(-128, 127), middle=32),
    )
}


@dataclass(frozen=True, kw_only=True)
class SuperBlocks:
    """Super-blocks of a matrix [out, in], B = in / 256 a row.

    codes: uint8 [out, B, 256]. scales, mins: int16 [out, B, sub-blocks]. d, dmin: float16 [out, B]. mins and dmin are None where the
    type has no minima.
    """

    kind: KType
    codes: Tensor
    scales: Tensor
    d: Tensor
    mins: Tensor | None = None
    dmin: Tensor | None = None

    @property
    def step(self) -> Tensor:
        """``d s`` of each sub-block, float32 [out, B, sub-blocks]."""
        return self.d.float()[..., None] * self.scales.float()

    @property
    def offset(self) -> Tensor:
        """What code 0 lies below zero, float32 [out, B, sub-blocks]: ``dmin m``, or ``z`` steps."""
        if self.kind.middle is not None:
            return self.step * self.kind.middle
        assert self.mins is not None
        assert self.dmin is not None
        return self.dmin.float()[..., None] * self.mins.float()

    def values(self) -> Tensor:
        """The weights that the codes stand for, float32 [out, in], to the last bit those of llama.cpp."""
        codes = self.codes.reshape(*self.scales.shape, self.kind.columns).float()
        step = self.step[..., None]
        if self.kind.middle is not None:
            return (step * (codes - self.kind.middle)).flatten(1)
        return (step * codes - self.offset[..., None]).flatten(1)

    def grid(self) -> Grid:
        """The same numbers as (q - zero) * scale, for a solver that chooses the codes: scale and zero are float32 [out, in / columns], and
        zero is no whole number where there are minima. A step of 0 counts as 1 whose only code is 0, or ``z``."""
        step = self.step.flatten(1)
        usable = torch.where(step == 0, torch.ones_like(step), step)
        return Grid(Int(self.kind.bits), usable, self.offset.flatten(1) / usable if self.kind.middle is None else self._middle(usable))

    def _middle(self, like: Tensor) -> Tensor:
        assert self.kind.middle is not None
        return torch.full_like(like, self.kind.middle)

    def parts(self) -> list[tuple[Tensor, Tensor]]:
        """What a row is linear in: values in units of what a super-block shares, float32 [out, in], with that, fp16 [out, B]."""
        codes = self.codes.reshape(*self.scales.shape, self.kind.columns).float() - (self.kind.middle or 0)
        steps = (self.scales.float()[..., None] * codes).flatten(1)
        if self.mins is None or self.dmin is None:
            return [(steps, self.d)]
        return [(steps, self.d), (-self.mins.float().repeat_interleave(self.kind.columns, dim=-1).flatten(1), self.dmin)]

    def with_shared(self, shared: Sequence[Tensor]) -> SuperBlocks:
        """Other d, and dmin where there is one, in the order of ``parts``."""
        return replace(self, d=shared[0]) if self.dmin is None else replace(self, d=shared[0], dmin=shared[1])

    def with_codes(self, codes: Tensor) -> SuperBlocks:
        """The same grid with other codes, whole numbers [out, in]."""
        return replace(self, codes=codes.to(torch.uint8).reshape(self.codes.shape))

    def nearest(self, weight: Tensor) -> SuperBlocks:
        """The same grid with the codes nearest to ``weight``, float32 [out, in]."""
        grid = self.grid()
        columns = weight.reshape(*grid.scale.shape, self.kind.columns)
        codes = Grid(grid.element, grid.scale[..., None], grid.zero[..., None]).nearest(columns)
        return self.with_codes(codes.reshape(weight.shape))

    def rows(self, order: Tensor | slice) -> SuperBlocks:
        """The rows ``order``, in that order."""
        parts = {name: getattr(self, name)[order] for name in ("codes", "scales", "d")}
        if self.mins is not None and self.dmin is not None:
            parts |= {"mins": self.mins[order], "dmin": self.dmin[order]}
        return replace(self, **parts)
