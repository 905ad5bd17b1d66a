"""Activations to 8 bits on the GPU, in Triton: what the integer products take. Importing this needs triton, not a GPU.

    s = max|x| / 127.5 (1 where that is 0)        q = clamp(round half even(x / s), -128, 127)

One program a token: it reads its row once from memory for the maximum and again, from cache, for the codes. The arithmetic is that of
``reference``, division included, so codes and scales are the same bits.

- Maxima are taken over the bits of ``|x|`` as an integer. For floats without sign that is the same order, and NaN comes out above
  everything: it ends up in the scale, and so in every output of its token, where a floating-point maximum would drop it.
- Rounding adds ``1.5 * 2^23``: a float that large has no bits for fractions, the sum is rounded half even, and its lowest byte is the
  code as int8. What lies beyond [-128, 127] is clamped before, which is the same because the bounds are integers.
- A correctly rounded division costs some 30 instructions a value, more than memory takes to deliver it. ``1 / s`` once a row, a product
  and two fused steps of Newton's correction give the same quotient (Markstein 1990), as long as nothing in them under- or overflows;
  rows with scales that could make that happen divide. So do static scales, and the interpreter, whose multiply-add rounds twice.
- One scale for all tokens takes a kernel of its own before (``largest_parts``): the maximum of everything is known to no program earlier.

``split_rows`` does the same for LLM.int8: columns with outliers count as zero, and their values go, side by side, to a buffer of 16 bit.
Rows of the codes are padded with zeros to a multiple of 16, so that the product can load 16 bytes at a time for any K.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

# Values a program holds at a time: 4096 bf16 in 16 warps are one load of 16 bytes for each thread.
LARGEST_BLOCK = 4096
VALUES_PER_WARP = 256
# Programs that share the search for one maximum, and with that the number of partial maxima that every program reads afterwards.
PARTS = 512
# Up to so many tokens every program looks through all of them for outliers by itself, which costs less than another launch.
FEW_ROWS = 8
# Columns and tokens that a program of ``column_flags`` looks at.
FLAG_COLUMNS = 256
FLAG_ROWS = 128
_FLAG_ROWS_AT_ONCE = tl.constexpr(16)
_ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23
_NO_SIGN = tl.constexpr(0x7FFFFFFF)
# Scales between these leave the residual of any value that does not round to zero, some 2^-25 of the scale, a normal number.
_SMALL_SCALE = tl.constexpr(1e-27)
_LARGE_SCALE = tl.constexpr(1e27)


@dataclass(frozen=True)
class Quantized:
    """Tokens in 8 bits, and what was split off.

    codes: int8 [M, K rounded up to a multiple of 16]. scale: float32 [M], or [1] for all tokens.
    outliers: dtype of x [M, >= k], the values split off; only the first ``k`` columns are ever written.
    columns: int32 [>= k], where they were, and count: int32 [1], k; None where ``outlier_index`` says both.
    """

    codes: Tensor
    scale: Tensor
    outliers: Tensor | None = None
    columns: Tensor | None = None
    count: Tensor | None = None


@dataclass(frozen=True)
class Flags:
    """Where kernels learn which columns are split off: ``kind`` says how ``source`` is read (see ``_flagged``)."""

    kind: str
    source: Tensor
    rows: int = 0
    stride: int = 0
    threshold: float = 0.0


def quantize(tokens: Tensor, per_token: bool, input_scale: Tensor | None, counters: Tensor | None, early: bool = False) -> Quantized:
    """``tokens`` [M, K], unit stride along K, in 8 bits.

    counters: int32 [2^n] to set to zero on the way. early: let the launch that comes next begin before this one ends.
    """
    rows, columns = tokens.shape
    quantized = _allocate(tokens, per_token)
    given = _parts(tokens, Flags("none", tokens)) if input_scale is None and not per_token else input_scale
    kind = "token" if per_token else "tensor" if input_scale is None else "static"
    block, warps = _block(columns)
    quantize_rows[(rows,)](
        tokens, tokens.stride(0), quantized.codes, quantized.codes.stride(0), quantized.scale, tokens if given is None else given,
        tokens if counters is None else counters, columns,
        SCALE=kind, PARTS=1 if given is None else given.numel(), COUNTERS=0 if counters is None else counters.numel(),
        BLOCK=block, FMA=_has_fma(), EARLY=early, num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip
    return quantized


def split(
    tokens: Tensor,
    slots: Tensor,
    stored: int,
    threshold: float | None,
    per_token: bool,
    counters: Tensor | None,
    early: bool = False,
) -> Quantized:
    """``tokens`` [M, K], unit stride along K: outlier columns apart, the rest in 8 bits.

    slots: int32 [K], the position of each column among the ``stored`` ones of ``outlier_index``, else -1. counters, early: as above.
    """
    rows, columns = tokens.shape
    quantized = _allocate(tokens, per_token)
    outliers = tokens.new_empty((rows, stored if threshold is None else columns))
    where, count = (None, None) if threshold is None else (slots.new_empty(columns), slots.new_empty(1))
    flags = Flags("slots", slots) if threshold is None else _column_flags(tokens, threshold)
    parts = None if per_token else _parts(tokens, flags)
    block, warps = _block(columns)
    split_rows[(rows,)](
        tokens, tokens.stride(0), quantized.codes, quantized.codes.stride(0), quantized.scale, tokens if parts is None else parts,
        tokens if counters is None else counters, columns, flags.source, flags.rows, flags.stride, flags.threshold,
        outliers, outliers.stride(0), tokens if where is None else where, tokens if count is None else count,
        FLAGS=flags.kind, SCALE="token" if per_token else "tensor", PARTS=1 if parts is None else parts.numel(),
        COUNTERS=0 if counters is None else counters.numel(), BLOCK=block, FMA=_has_fma(), EARLY=early,
        num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip
    return Quantized(quantized.codes, quantized.scale, outliers, where, count)


def _allocate(tokens: Tensor, per_token: bool) -> Quantized:
    rows, columns = tokens.shape
    codes = tokens.new_empty((rows, -(-columns // 16) * 16), dtype=torch.int8)
    return Quantized(codes, tokens.new_empty(rows if per_token else 1, dtype=torch.float32))


def _has_fma() -> bool:
    return isinstance(quantize_rows, triton.JITFunction)


def _block(columns: int) -> tuple[int, int]:
    """Columns a program holds at a time, and its warps."""
    block = min(max(triton.next_power_of_2(columns), 32), LARGEST_BLOCK)
    return block, max(block // VALUES_PER_WARP, 1)


def _parts(tokens: Tensor, flags: Flags) -> Tensor:
    """Partial maxima of ``|tokens|`` but for flagged columns, as bits: int32 [2^n]."""
    rows, columns = tokens.shape
    block, warps = _block(columns)
    parts = tokens.new_empty(min(triton.next_power_of_2(rows), PARTS), dtype=torch.int32)
    largest_parts[(len(parts),)](
        tokens, tokens.stride(0), parts, rows, columns, flags.source, flags.rows, flags.stride, flags.threshold,
        FLAGS=flags.kind, BLOCK=block, num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip
    return parts


def _column_flags(tokens: Tensor, threshold: float) -> Flags:
    rows, columns = tokens.shape
    if rows <= FEW_ROWS:
        return Flags("rows", tokens, rows, tokens.stride(0), threshold)
    parts, blocks = triton.cdiv(rows, FLAG_ROWS), triton.cdiv(columns, FLAG_COLUMNS)
    words = tokens.new_empty((parts, blocks * FLAG_COLUMNS // 32), dtype=torch.int32)
    column_flags[(blocks, parts)](
        tokens, tokens.stride(0), words, words.stride(0), rows, columns, threshold,
        ROWS=FLAG_ROWS, COLUMNS=FLAG_COLUMNS, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return Flags("words", words, parts, words.stride(0))


@triton.jit(do_not_specialize=["rows"])
def column_flags(
    x, x_stride, words, words_stride, rows, columns, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Bit ``k % 32`` of ``words[part, k // 32]``: whether any of ROWS tokens exceeds the threshold in column ``k``."""
    offs = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * ROWS
    found = tl.zeros([_FLAG_ROWS_AT_ONCE, COLUMNS], tl.int32)
    for start in range(0, ROWS, _FLAG_ROWS_AT_ONCE):
        row = (first + start + tl.arange(0, _FLAG_ROWS_AT_ONCE)).to(tl.int64)
        mask = (row < rows)[:, None] & (offs < columns)[None, :]
        value = tl.load(x + row[:, None] * x_stride + offs[None, :], mask=mask, other=0).to(tl.float32)
        found |= (tl.abs(value) > threshold).to(tl.int32)
    flags = tl.max(found, axis=0).reshape(COLUMNS // 32, 32)
    packed = tl.sum(flags << tl.arange(0, 32)[None, :], axis=1)
    tl.store(words + tl.program_id(1) * words_stride + tl.program_id(0) * (COLUMNS // 32) + tl.arange(0, COLUMNS // 32), packed)


@triton.jit(do_not_specialize=["rows", "flag_rows"])
def largest_parts(
    x, x_stride, parts, rows, columns, flags, flag_rows, flag_stride, threshold, FLAGS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The largest ``|x|`` of every n-th token, as bits; a program without tokens writes 0."""
    largest = tl.zeros([BLOCK], tl.int32)
    row = tl.program_id(0).to(tl.int64)
    while row < rows:
        found = _row_bits(x + row * x_stride, columns, flags, flag_rows, flag_stride, threshold, FLAGS, BLOCK)
        largest = tl.maximum(largest, found)
        row += tl.num_programs(0)
    tl.store(parts + tl.program_id(0), tl.max(largest, axis=0))


@triton.jit
def quantize_rows(
    x, x_stride, codes, codes_stride, scales, given, counters, columns,
    SCALE: tl.constexpr, PARTS: tl.constexpr, COUNTERS: tl.constexpr, BLOCK: tl.constexpr, FMA: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Token ``program_id(0)`` of ``x`` to ``codes`` and ``scales``.

    SCALE: "token": from the row. "tensor": from PARTS maxima in ``given``. "static": ``given``.
    """
    if EARLY:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    codes += row * codes_stride
    if SCALE == "static":
        scale = tl.load(given).to(tl.float32)
    elif SCALE == "tensor":
        scale = _scale_of(tl.max(tl.load(given + tl.arange(0, PARTS)), axis=0))
    else:
        scale = _scale_of(tl.max(_row_bits(x, columns, x, 0, 0, 0.0, "none", BLOCK), axis=0))
    _store_scale(scales, scale, SCALE)
    inverse = tl.div_rn(1.0, scale)
    for start in range(0, columns, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        value = tl.load(x + offs, mask=offs < columns, other=0).to(tl.float32)
        tl.store(codes + offs, _code(value, scale, inverse, FMA and SCALE != "static"), mask=offs < codes_stride)
    _clear(counters, COUNTERS)


@triton.jit(do_not_specialize=["flag_rows"])
def split_rows(
    x, x_stride, codes, codes_stride, scales, given, counters, columns, flags, flag_rows, flag_stride, threshold,
    outliers, outliers_stride, outlier_columns, outlier_count,
    FLAGS: tl.constexpr, SCALE: tl.constexpr, PARTS: tl.constexpr, COUNTERS: tl.constexpr, BLOCK: tl.constexpr, FMA: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """``quantize_rows`` of what is not flagged; what is flagged goes to ``outliers``.

    FLAGS "slots": to where ``flags`` says. Otherwise in rising order of the columns, which the first program lists with their number.
    """
    if EARLY:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    codes += row * codes_stride
    outliers += row * outliers_stride
    if SCALE == "tensor":
        scale = _scale_of(tl.max(tl.load(given + tl.arange(0, PARTS)), axis=0))
    else:
        scale = _scale_of(tl.max(_row_bits(x, columns, flags, flag_rows, flag_stride, threshold, FLAGS, BLOCK), axis=0))
    inverse = tl.div_rn(1.0, scale)
    before = 0
    for start in range(0, columns, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        raw = tl.load(x + offs, mask=offs < columns, other=0)
        flagged = _flagged(flags, flag_rows, flag_stride, threshold, columns, start, FLAGS, BLOCK)
        value = tl.where(flagged, 0.0, raw.to(tl.float32))
        tl.store(codes + offs, _code(value, scale, inverse, FMA), mask=offs < codes_stride)
        if FLAGS == "slots":
            place = tl.load(flags + offs, mask=offs < columns, other=-1)
            tl.store(outliers + place, raw, mask=flagged)
        else:
            found = flagged.to(tl.int32)
            number = tl.sum(found, axis=0)
            if number > 0:  # the prefix sum costs more than the rest, and most calls of most layers have no outlier
                place = before + tl.cumsum(found, axis=0) - 1
                tl.store(outliers + place, raw, mask=flagged)
                if row == 0:
                    tl.store(outlier_columns + place, offs, mask=flagged)
            before += number
    # Both at the end: whether this program writes them would otherwise stay in a register throughout.
    _store_scale(scales, scale, SCALE)
    if FLAGS != "slots":
        if row == 0:
            tl.store(outlier_count, before)
    _clear(counters, COUNTERS)


@triton.jit
def _row_bits(x, columns, flags, flag_rows, flag_stride, threshold, FLAGS: tl.constexpr, BLOCK: tl.constexpr):
    """Bits of the largest ``|x|`` of a row without flagged columns, int32 [BLOCK], still to be joined to one."""
    largest = tl.zeros([BLOCK], tl.int32)
    for start in range(0, columns, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        value = tl.load(x + offs, mask=offs < columns, other=0).to(tl.float32)
        bits = value.to(tl.int32, bitcast=True) & _NO_SIGN
        if FLAGS != "none":
            bits = tl.where(_flagged(flags, flag_rows, flag_stride, threshold, columns, start, FLAGS, BLOCK), 0, bits)
        largest = tl.maximum(largest, bits)
    return largest


@triton.jit
def _flagged(flags, flag_rows, flag_stride, threshold, columns, start, FLAGS: tl.constexpr, BLOCK: tl.constexpr):
    """Whether columns ``start`` and on are split off, bool [BLOCK].

    FLAGS "slots": where ``flags`` int32 [K] is not negative. "words": where a bit is set in any of the ``flag_rows`` rows of bits.
    "rows": where any of ``flag_rows`` tokens exceeds the threshold.
    """
    offs = start + tl.arange(0, BLOCK)
    if FLAGS == "slots":
        return tl.load(flags + offs, mask=offs < columns, other=-1) >= 0
    elif FLAGS == "words":
        word = start // 32 + tl.arange(0, BLOCK // 32)
        bits = tl.zeros([BLOCK // 32], tl.int32)
        for row in range(flag_rows):
            bits |= tl.load(flags + row * flag_stride + word, mask=word < flag_stride, other=0)
        return ((bits[:, None] >> tl.arange(0, 32)[None, :]) & 1).reshape(BLOCK) != 0
    else:
        found = tl.zeros([BLOCK], tl.int32)
        for row in range(flag_rows):
            value = tl.load(flags + row * flag_stride + offs, mask=offs < columns, other=0).to(tl.float32)
            found |= (tl.abs(value) > threshold).to(tl.int32)
        return found != 0


@triton.jit
def _scale_of(bits):
    scale = tl.div_rn(bits.to(tl.float32, bitcast=True), 127.5)
    return tl.where(scale == 0.0, 1.0, scale)


@triton.jit
def _store_scale(scales, scale, SCALE: tl.constexpr):
    row = tl.program_id(0)
    if SCALE == "token":
        tl.store(scales + row, scale)
    elif row == 0:
        tl.store(scales, scale)


@triton.jit
def _code(value, scale, inverse, FMA: tl.constexpr):
    if FMA and scale > _SMALL_SCALE and scale < _LARGE_SCALE:
        near = value * inverse
        quotient = tl.fma(tl.fma(-near, scale, value), inverse, near)
    else:
        quotient = tl.div_rn(value, scale)
    clamped = tl.minimum(tl.maximum(quotient, -128.0), 127.0)
    return (clamped + _ROUNDER).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _clear(counters, COUNTERS: tl.constexpr):
    """The product's counters of finished parts start at zero. Doing it here saves a launch."""
    if COUNTERS > 0:
        if tl.program_id(0) == 0:
            tl.store(counters + tl.arange(0, COUNTERS), tl.zeros([COUNTERS], tl.int32))
