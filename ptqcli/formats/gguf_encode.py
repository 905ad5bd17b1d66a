"""Matrices as blocks of a GGUF file: weights rounded to a block type, and codes that stand already.

Which type holds the codes of a scheme, as they are:

    symmetric, 2 to 4 bits       Q4_0    w = s (u - z), so q = u - z + 8 is exact
    asymmetric, 2 and 3 bits     Q4_0    |u - z| < 8, so exact as well
    asymmetric, 4 bits           Q4_1    d = s, and m = -z s rounded to fp16
    symmetric, 8 bits            Q8_0    q = u - z

in groups that are multiples of 32 neighbouring columns. Scales are fp16 in a file; those in bfloat16 fit but for very small ones. Anything
else (8 bits with zero points, act-order, columns in 16 bit, groups of 16) has no block type and becomes the plain numbers that it stands
for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptqcli.checkpoint.gguf_blocks import BlockType, encode, plain_bytes
from ptqcli.numerics.block_fit import to_fp16
from ptqcli.numerics.blocks import LEGACY_BLOCK, LEGACY_TYPES, LegacyBlocks, fit_blocks
from ptqcli.numerics.scheme import Scheme
from ptqcli.numerics.weight import QuantizedWeight


def encode_weight(kind: BlockType, weight: Tensor, importance: Tensor | None = None) -> Tensor:
    """``weight``, floating [out, in], rounded to ``kind``: uint8 [out, bytes of a row].

    importance: of each column, positive, float32 [in]; None: all are alike. Raises PTQError where a plain type cannot hold a value.
    """
    return encode(fit_blocks(kind.name, weight, importance)) if kind.quantized else plain_bytes(kind, weight)


def holding_type(scheme: Scheme, in_features: int) -> str | None:
    """The block type that holds the codes of ``scheme`` in rows of ``in_features``, None if none does."""
    if scheme.blocks is not None:
        return scheme.blocks.upper()
    if scheme.codebook is not None or scheme.columns_per_group(in_features) % LEGACY_BLOCK or in_features % LEGACY_BLOCK:
        return None
    if scheme.bits == 8:
        return "Q8_0" if scheme.symmetric else None
    return "Q4_1" if scheme.bits == 4 and not scheme.symmetric else "Q4_0"


def is_in_blocks(weight: QuantizedWeight) -> bool:
    """Whether the groups of ``weight`` are neighbouring columns, and all of its columns codes."""
    return weight.g_idx is None and weight.outliers is None


def encode_codes(weight: QuantizedWeight) -> tuple[Tensor, bool]:
    """The blocks of ``holding_type`` for ``weight``, which is ``is_in_blocks``: uint8 [out, bytes of a row], and whether they stand for the
    very same numbers."""
    name = holding_type(weight.scheme, weight.codes.shape[1])
    assert name is not None
    if weight.blocks is not None:
        return encode(weight.blocks.with_codes(weight.codes)), True
    kind = LEGACY_TYPES[name]
    blocks = weight.codes.shape[1] // kind.columns
    scale, zero = (part.float().repeat_interleave(blocks // part.shape[1], dim=1) for part in (weight.scale, weight.zero))
    d = to_fp16(scale)
    codes = weight.codes.unflatten(1, (blocks, kind.columns))
    if name == "Q4_1":
        m = to_fp16(-zero * scale)
        exact = torch.equal(d, scale) and torch.equal(m, -zero * scale)
        return encode(LegacyBlocks(kind=kind, codes=codes, d=d.half(), m=m.half())), exact
    moved = codes.short() - zero.short()[..., None] + (1 << (kind.bits - 1))
    return encode(LegacyBlocks(kind=kind, codes=moved.to(torch.uint8), d=d.half())), torch.equal(d, scale)
