"""Blocks of GGUF files: numbers to bytes and back, every type an exact inverse pair.

A row of a matrix is a row of blocks: of 32 weights in the legacy types (``numerics.blocks``), of 256 in the K-quants
(``numerics.k_quants``). F32, F16 and BF16 are plain numbers. Layouts are ggml's
(``ggml-common.h``, ``block_q4_0`` and its like), little-endian.

Codes lie in bit planes. In a run of ``n`` neighbouring bytes the lowest ``b`` bits hold the first ``n`` codes, the next ``b`` the following
``n``, and so on. Q4_K, say, has four runs of 32 bytes with two planes of four bits each. Types of 3, 5 and 6 bits keep the high bits of
their codes apart, in planes of one or two bits. Of the types that ggml has beyond these (IQ*, TQ*, MXFP4, Q8_K) none is read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ptqcli.errors import PTQError
from ptqcli.numerics.blocks import LEGACY_BLOCK, LEGACY_TYPES, Blocks, LegacyBlocks
from ptqcli.numerics.k_quants import K_TYPES, SuperBlocks
from ptqcli.numerics.scheme import SUPER_BLOCK


@dataclass(frozen=True, kw_only=True)
class BlockType:
    """A type of tensor. name, number: ggml's. columns: weights in a block. nbytes: of a block. bits: of a code, None for plain numbers."""

    name: str
    number: int
    columns: int
    nbytes: int
    bits: int | None = None

    @property
    def quantized(self) -> bool:
        """Whether it holds codes."""
        return self.bits is not None

    def row_bytes(self, in_features: int) -> int:
        """Bytes of a row. Raises PTQError if blocks do not divide it."""
        if in_features % self.columns:
            raise PTQError(f"{self.name} has blocks of {self.columns} weights, which do not divide rows of {in_features}")
        return in_features // self.columns * self.nbytes


BLOCK_TYPES = {
    each.name: each
    for each in (
        BlockType(name="F32", number=0, columns=1, nbytes=4),
        BlockType(name="F16", number=1, columns=1, nbytes=2),
        BlockType(name="BF16", number=30, columns=1, nbytes=2),
        BlockType(name="Q4_0", number=2, columns=LEGACY_BLOCK, nbytes=18, bits=4),
        BlockType(name="Q4_1", number=3, columns=LEGACY_BLOCK, nbytes=20, bits=4),
        BlockType(name="Q5_0", number=6, columns=LEGACY_BLOCK, nbytes=22, bits=5),
        BlockType(name="Q5_1", number=7, columns=LEGACY_BLOCK, nbytes=24, bits=5),
        BlockType(name="Q8_0", number=8, columns=LEGACY_BLOCK, nbytes=34, bits=8),
        BlockType(name="Q2_K", number=10, columns=SUPER_BLOCK, nbytes=84, bits=2),
        BlockType(name="Q3_K", number=11, columns=SUPER_BLOCK, nbytes=110, bits=3),
        BlockType(name="Q4_K", number=12, columns=SUPER_BLOCK, nbytes=144, bits=4),
        BlockType(name="Q5_K", number=13, columns=SUPER_BLOCK, nbytes=176, bits=5),
        BlockType(name="Q6_K", number=14, columns=SUPER_BLOCK, nbytes=210, bits=6),
    )
}
PLAIN_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BY_NUMBER = {each.number: each for each in BLOCK_TYPES.values()}


def encode(blocks: Blocks) -> Tensor:
    """The bytes of ``blocks``, uint8 [out, bytes of a row]."""
    parts = _super_parts(blocks) if isinstance(blocks, SuperBlocks) else _legacy_parts(blocks)
    return torch.cat([part.reshape(*blocks.d.shape, -1) for part in parts], dim=-1).flatten(1)


def decode(kind: BlockType, data: Tensor) -> Blocks:
    """The blocks in ``data``, uint8 [out, bytes of a row], of a quantized type."""
    rows = data.reshape(len(data), -1, kind.nbytes)
    return _READERS[kind.name](kind, rows)


def values_of(kind: BlockType, data: Tensor) -> Tensor:
    """The weights in ``data``, uint8 [out, bytes of a row]: float32 [out, in] for codes, otherwise in the stored dtype."""
    if kind.name in PLAIN_DTYPES:
        return data.contiguous().view(PLAIN_DTYPES[kind.name])
    return decode(kind, data).values()


def plain_bytes(kind: BlockType, values: Tensor) -> Tensor:
    """``values`` [out, in] rounded to a plain type, uint8 [out, bytes of a row]. Raises PTQError where the type cannot hold one."""
    rounded = values.to(PLAIN_DTYPES[kind.name]).contiguous()
    if not torch.isfinite(rounded).all():
        raise PTQError(f"values up to {values.abs().max().item():.3g} leave the range of {kind.name}; choose BF16 or F32")
    return rounded.view(torch.uint8)


# Bit planes


def _split(data: Tensor, bits: int, run: int) -> Tensor:
    """The codes of ``bits`` bits in the planes of each ``run`` neighbouring bytes of [..., n], uint8 [..., n * 8 / bits]."""
    runs = data.unflatten(-1, (-1, 1, run))  # [..., runs, 1, run]
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=data.device)[:, None]
    return ((runs >> shifts) & ((1 << bits) - 1)).flatten(-3)


def _join(codes: Tensor, bits: int, run: int) -> Tensor:
    """Inverse of ``_split``, of codes uint8 below 2^bits."""
    planes = codes.unflatten(-1, (-1, 8 // bits, run))  # [..., runs, planes, run]
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)[:, None]
    return (planes << shifts).sum(-2, dtype=torch.uint8).flatten(-2)


def _bytes(numbers: Tensor) -> Tensor:
    """fp16 [...] as uint8 [..., 2]."""
    return numbers.to(torch.float16)[..., None].contiguous().view(torch.uint8)


def _half(data: Tensor) -> Tensor:
    """Inverse of ``_bytes``."""
    return data.contiguous().view(torch.float16).squeeze(-1)


# Legacy blocks


def _legacy_parts(blocks: LegacyBlocks) -> list[Tensor]:
    head = [_bytes(blocks.d), *([] if blocks.m is None else [_bytes(blocks.m)])]
    if blocks.kind.bits == 8:
        return [*head, blocks.codes ^ 0x80]  # u - 128 as int8
    high = [_join(blocks.codes >> 4, 1, 1)] if blocks.kind.bits == 5 else []
    return [*head, *high, _join(blocks.codes & 15, 4, 16)]


def _read_legacy(kind: BlockType, rows: Tensor) -> LegacyBlocks:
    legacy = LEGACY_TYPES[kind.name]
    start = 4 if legacy.has_minimum else 2
    d, m = _half(rows[..., :2]), _half(rows[..., 2:4]) if legacy.has_minimum else None
    if kind.bits == 8:
        codes = rows[..., start:] ^ 0x80
    elif kind.bits == 5:
        codes = _split(rows[..., start + 4 :], 4, 16) | (_split(rows[..., start : start + 4], 1, 1) << 4)
    else:
        codes = _split(rows[..., start:], 4, 16)
    return LegacyBlocks(kind=legacy, codes=codes, d=d, m=m)


# Super-blocks


def _super_parts(blocks: SuperBlocks) -> list[Tensor]:
    codes, d = blocks.codes, _bytes(blocks.d)
    scales = blocks.scales.to(torch.uint8)  # two's complement of negative ones
    name = blocks.kind.name
    if name == "Q3_K":
        return [_join(codes >> 2, 1, 32), _join(codes & 3, 2, 32), _scales_of_16(blocks.scales + 32), d]
    if name == "Q6_K":
        return [_join(codes & 15, 4, 64), _join(codes >> 4, 2, 32), scales, d]
    assert blocks.mins is not None
    assert blocks.dmin is not None
    mins, dmin = blocks.mins.to(torch.uint8), _bytes(blocks.dmin)
    if name == "Q2_K":
        return [scales | (mins << 4), _join(codes, 2, 32), d, dmin]
    high = [_join(codes >> 4, 1, 32)] if name == "Q5_K" else []
    return [d, dmin, _scales_and_mins(scales, mins), *high, _join(codes & 15, 4, 32)]


def _read_q2_k(kind: BlockType, rows: Tensor) -> SuperBlocks:
    both = rows[..., :16]
    return SuperBlocks(
        kind=K_TYPES[kind.name],
        codes=_split(rows[..., 16:80], 2, 32),
        scales=(both & 15).short(),
        d=_half(rows[..., 80:82]),
        mins=(both >> 4).short(),
        dmin=_half(rows[..., 82:84]),
    )


def _read_q3_k(kind: BlockType, rows: Tensor) -> SuperBlocks:
    codes = _split(rows[..., 32:96], 2, 32) | (_split(rows[..., :32], 1, 32) << 2)
    scales = _split(rows[..., 96:104], 4, 8) | (_split(rows[..., 104:108], 2, 4) << 4)
    return SuperBlocks(kind=K_TYPES[kind.name], codes=codes, scales=scales.short() - 32, d=_half(rows[..., 108:110]))


def _scales_of_16(scales: Tensor) -> Tensor:
    """16 numbers of 6 bits in 12 bytes: the low 4 bits of all, then the high 2."""
    unsigned = scales.to(torch.uint8)
    return torch.cat([_join(unsigned & 15, 4, 8), _join(unsigned >> 4, 2, 4)], dim=-1)


def _read_q4_k(kind: BlockType, rows: Tensor) -> SuperBlocks:
    high = _split(rows[..., 16:48], 1, 32) if kind.bits == 5 else None
    codes = _split(rows[..., -128:], 4, 32)
    scales, mins = _split_scales_and_mins(rows[..., 4:16])
    return SuperBlocks(
        kind=K_TYPES[kind.name],
        codes=codes if high is None else codes | (high << 4),
        scales=scales,
        d=_half(rows[..., :2]),
        mins=mins,
        dmin=_half(rows[..., 2:4]),
    )


def _scales_and_mins(scales: Tensor, mins: Tensor) -> Tensor:
    """8 scales and 8 minima of 6 bits in 12 bytes: the first four of each whole, the high 2 bits of the others above them, and the low 4
    bits of those, scale and minimum in one byte."""
    above = [(numbers[..., 4:] >> 4) << 6 | numbers[..., :4] for numbers in (scales, mins)]
    return torch.cat([*above, (scales[..., 4:] & 15) | ((mins[..., 4:] & 15) << 4)], dim=-1)


def _split_scales_and_mins(data: Tensor) -> tuple[Tensor, Tensor]:
    low = data[..., 8:]
    found = []
    for first, nibbles in ((data[..., :4], low & 15), (data[..., 4:8], low >> 4)):
        found.append(torch.cat([first & 63, nibbles | ((first >> 6) << 4)], dim=-1).short())
    return found[0], found[1]


def _read_q6_k(kind: BlockType, rows: Tensor) -> SuperBlocks:
    codes = _split(rows[..., :128], 4, 64) | (_split(rows[..., 128:192], 2, 32) << 4)
    scales = rows[..., 192:208].contiguous().view(torch.int8).short()
    return SuperBlocks(kind=K_TYPES[kind.name], codes=codes, scales=scales, d=_half(rows[..., 208:210]))


_READERS: dict[str, Callable[[BlockType, Tensor], Blocks]] = {
    **dict.fromkeys(LEGACY_TYPES, _read_legacy),
    "Q2_K": _read_q2_k,
    "Q3_K": _read_q3_k,
    "Q4_K": _read_q4_k,
    "Q5_K": _read_q4_k,
    "Q6_K": _read_q6_k,
}
