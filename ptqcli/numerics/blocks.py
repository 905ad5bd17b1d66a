"""The block types of GGUF files as numbers: what their codes stand for, and grids of theirs for given weights.

The legacy types have blocks of 32 weights with one fp16 scale ``d``, and where they have one a fp16 minimum ``m``,

    Q4_0, Q5_0    w = d (q - 2^(b-1))        Q4_1, Q5_1    w = d q + m        Q8_0    w = d q, q int8

the K-quants super-blocks of 256, see ``k_quants``. How both lie in bytes is ``checkpoint.gguf_blocks``'s.

To a solver, blocks are a grid like others: a scale and a zero point, no whole number as a rule, for each group of neighbouring columns.
What sets them apart is that the grids of a row are found at once, before any code is: a step is a whole multiple of ``d``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ptqcli.numerics.block_fit import fit_legacy
from ptqcli.numerics.elements import Int
from ptqcli.numerics.grids import Grid
from ptqcli.numerics.k_fit import fit_k
from ptqcli.numerics.k_quants import K_TYPES, SuperBlocks

LEGACY_BLOCK = 32


@dataclass(frozen=True, kw_only=True)
class LegacyType:
    """One type with blocks of 32. name: ggml's. bits: of a code. has_minimum: code 0 stands for ``m``."""

    name: str
    bits: int
    has_minimum: bool = False

    @property
    def columns(self) -> int:
        """Of a block."""
        return LEGACY_BLOCK


LEGACY_TYPES = {
    each.name: each
    for each in (
        LegacyType(name="Q4_0", bits=4),
        LegacyType(name="Q4_1", bits=4, has_minimum=True),
        LegacyType(name="Q5_0", bits=5),
        LegacyType(name="Q5_1", bits=5, has_minimum=True),
        LegacyType(name="Q8_0", bits=8),
    )
}


@dataclass(frozen=True, kw_only=True)
class LegacyBlocks:
    """Blocks of 32 of a matrix [out, in], B = in / 32 a row.

    codes: uint8 [out, B, 32]; those of Q8_0 are its int8 plus 128. d: float16 [out, B]. m: float16 [out, B], None for a type without.
    """

    kind: LegacyType
    codes: Tensor
    d: Tensor
    m: Tensor | None = None

    @property
    def middle(self) -> int:
        """The code of zero, of a type without minimum."""
        return 1 << (self.kind.bits - 1)

    def values(self) -> Tensor:
        """The weights that the codes stand for, float32 [out, in], to the last bit those of llama.cpp."""
        d = self.d.float()[..., None]
        if self.m is None:
            return (d * (self.codes.float() - self.middle)).flatten(1)
        return (d * self.codes.float() + self.m.float()[..., None]).flatten(1)

    def grid(self) -> Grid:
        """The same numbers as (q - zero) * scale, for a solver that chooses the codes: scale and zero are float32 [out, in / 32], and
        zero is no whole number where there is a minimum. A scale of 0 counts as 1."""
        d = self.d.float()
        usable = torch.where(d == 0, 1, d)
        return Grid(Int(self.kind.bits), usable, torch.full_like(d, self.middle) if self.m is None else -self.m.float() / usable)

    def parts(self) -> list[tuple[Tensor, Tensor]]:
        """What a row is linear in: values in units of what a block shares, float32 [out, in], with that, fp16 [out, B]."""
        if self.m is None:
            return [((self.codes.float() - self.middle).flatten(1), self.d)]
        return [(self.codes.float().flatten(1), self.d), (torch.ones_like(self.codes, dtype=torch.float32).flatten(1), self.m)]

    def with_shared(self, shared: Sequence[Tensor]) -> LegacyBlocks:
        """Other d, and m where there is one, in the order of ``parts``."""
        return replace(self, d=shared[0]) if self.m is None else replace(self, d=shared[0], m=shared[1])

    def with_codes(self, codes: Tensor) -> LegacyBlocks:
        """The same grid with other codes, whole numbers [out, in]."""
        return replace(self, codes=codes.to(torch.uint8).reshape(self.codes.shape))


Blocks = LegacyBlocks | SuperBlocks


def fit_blocks(name: str, weight: Tensor, importance: Tensor | None = None) -> Blocks:
    """The grids of the type ``name``, as ggml calls it or in small letters, for ``weight``, floating [out, in], with the nearest codes.

    importance: of each column, positive, float32 [in]; None: all are alike. Raises ValueError if super-blocks do not divide ``in``.
    """
    known = name.upper()
    if known in K_TYPES:
        return fit_k(weight.float(), K_TYPES[known], importance)
    kind = LEGACY_TYPES[known]
    codes, d, *m = fit_legacy(weight, kind.bits, kind.columns, kind.has_minimum, importance)
    return LegacyBlocks(kind=kind, codes=codes, d=d, m=m[0] if m else None)


def in_rows(blocks: Blocks, rows: int) -> Blocks:
    """``blocks`` of a matrix that was cut into shorter rows, as those of its own ``rows``."""
    return _each(blocks, lambda part: part.reshape(rows, -1, *part.shape[2:]))


def rows_of(one: Blocks, other: Blocks, wanted: Tensor) -> Blocks:
    """The rows of ``one`` where ``wanted``, bool [out], is True, those of ``other`` elsewhere."""
    mine, theirs = _parts(one), _parts(other)
    chosen: Any = {name: torch.where(wanted.reshape(-1, *[1] * (part.dim() - 1)), part, theirs[name]) for name, part in mine.items()}
    return replace(one, **chosen)


def moved(blocks: Blocks, device: torch.device) -> Blocks:
    """``blocks`` on ``device``."""
    return _each(blocks, lambda part: part.to(device))


def all_finite(blocks: Blocks) -> bool:
    """Whether every scale and minimum is a finite number."""
    return all(bool(torch.isfinite(part).all()) for part in _parts(blocks).values() if part.is_floating_point())


def _each(blocks: Blocks, change: Callable[[Tensor], Tensor]) -> Blocks:
    changed: Any = {name: change(part) for name, part in _parts(blocks).items()}
    return replace(blocks, **changed)


def _parts(blocks: Blocks) -> dict[str, Tensor]:
    values = {entry.name: getattr(blocks, entry.name) for entry in fields(blocks)}
    return {name: part for name, part in values.items() if isinstance(part, Tensor)}
