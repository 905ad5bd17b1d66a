"""Activations to 8 bits on the GPU, in Triton: what the integer products take. Importing this needs triton, not a GPU.

    s = max|x| / 127.5 (1 where that is 0)        q = clamp(round half even(x / s), -128, 127)

One program a token. A row of up to 4096 columns is read once and stays in registers (8 values a thread) between its maximum and its codes;
a longer one is read again, from cache. The arithmetic is that of ``reference``, division included, so codes and scales are the same bits.

- Maxima are taken over the bits of ``|x|`` as an integer. For floats without sign that is the same order, and NaN comes out above
  everything: it ends up in the scale, and so in every output of its token, where a floating-point maximum would drop it.
- Rounding adds ``1.5 * 2^23``: a float that large has no bits for fractions, the sum is rounded half even, and its lowest byte is the
  code as int8. What lies beyond [-128, 127] is clamped before, which is the same because the bounds are integers.
- A correctly rounded division costs some 30 instructions a value, more than memory takes to deliver it. ``1 / s`` once a row, a product
  and two fused steps of Newton's correction give the same quotient (Markstein 1990), as long as nothing in them under- or overflows;
  rows with scales that could make that happen divide. So do static scales, and the interpreter, whose multiply-add rounds twice.
- One scale for all tokens takes a kernel of its own before (``partial_maxima``): the maximum of everything is known to no program earlier.

``split_rows`` does the same for LLM.int8: columns with outliers count as zero, and their values go, side by side, to a buffer of 16 bit.
Blocks of columns lie as [BLOCK / 32, 32] there and everywhere: a row of that is a word of flags, and counting flags goes word by word.
Rows of the codes are padded with zeros to a multiple of 16, so that the product can load 16 bytes at a time for any K.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

# Values a program holds at a time: 4096 bf16 in 16 warps are one load of 16 bytes for each thread. With twice as many a thread, registers
# leave no room for more rows at once (on sm_90, 38 instead of 24 in ``quantize_rows``, 98 instead of 55 in ``split_rows``).
LARGEST_BLOCK = 4096
VALUES_PER_WARP = 256
# Programs that share the search for one maximum, and with that the number of partial maxima that every program reads afterwards.
MAXIMA = 512
# Up to so many tokens every program looks through all of them for outliers by itself, which costs less than another launch.
FEW_ROWS = 8
# Columns and, at least, tokens that a program of ``column_flags`` looks at; rows of flags at most: every token's program reads all of them.
FLAG_COLUMNS = 64
LEAST_HEIGHT = 128
MOST_FLAG_ROWS = 8
_ROWS_AT_ONCE = tl.constexpr(64)
_FEW_ROWS = tl.constexpr(FEW_ROWS)
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
    """Where kernels learn which columns are split off: ``kind`` says how ``source`` and its ``rows`` are read (see ``_flagged``)."""

    kind: str
    source: Tensor | None = None
    rows: int = 0
    stride: int = 0
    threshold: float = 0.0

    def arguments(self) -> dict[str, Any]:
        """What a kernel takes, by name."""
        return {
            "flags": self.source,
            "flag_rows": self.rows,
            "flag_stride": self.stride,
            "threshold": self.threshold,
            "FLAGS": self.kind,
        }


def quantize(tokens: Tensor, per_token: bool, input_scale: Tensor | None, counters: Tensor | None, early: bool = False) -> Quantized:
    """``tokens`` [M, K], unit stride along K, in 8 bits.

    counters: int32 [2^n] to set to zero on the way. early: let the launch that comes next begin before this one ends.
    """
    quantized = _allocate(tokens, per_token)
    given = _maxima(tokens, Flags("none")) if input_scale is None and not per_token else input_scale
    kind = "token" if per_token else "tensor" if input_scale is None else "static"
    quantize_rows[(len(tokens),)](**_arguments(tokens, quantized, kind, given, counters, early))
    return quantized


def split(
    tokens: Tensor,
    index: Tensor,
    slots: Tensor,
    threshold: float | None,
    per_token: bool,
    counters: Tensor | None,
    early: bool = False,
) -> Quantized:
    """``tokens`` [M, K], unit stride along K: outlier columns apart, the rest in 8 bits.

    index: int32 [k], the columns without a threshold. slots: int32 [K], the position of each column there, else -1. counters, early: as
    above.
    """
    rows, columns = tokens.shape
    quantized = _allocate(tokens, per_token)
    fixed = threshold is None
    outliers = tokens.new_empty((rows, len(index) if fixed else columns))
    where, count = (None, None) if fixed else (index.new_empty(columns), index.new_empty(1))
    flags = Flags("slots", slots) if threshold is None else _column_flags(tokens, threshold)
    maxima = None if per_token else _maxima(tokens, flags)
    split_rows[(rows,)](
        **_arguments(tokens, quantized, "token" if per_token else "tensor", maxima, counters, early),
        **flags.arguments(),
        outliers=outliers,
        outliers_stride=outliers.stride(0),
        index=index if fixed else None,
        stored=len(index),
        outlier_columns=where,
        outlier_count=count,
    )
    return Quantized(quantized.codes, quantized.scale, outliers, where, count)


def _arguments(
    tokens: Tensor, quantized: Quantized, kind: str, given: Tensor | None, counters: Tensor | None, early: bool
) -> dict[str, Any]:
    """What ``quantize_rows`` and ``split_rows`` both take, by name."""
    columns = tokens.shape[1]
    block, warps = _block(columns)
    return {
        "x": tokens,
        "x_stride": tokens.stride(0),
        "codes": quantized.codes,
        "codes_stride": quantized.codes.stride(0),
        "scales": quantized.scale,
        "given": given,
        "counters": counters,
        "columns": columns,
        "SCALE": kind,
        "GIVEN": 0 if given is None else given.numel(),
        "COUNTERS": 0 if counters is None else counters.numel(),
        "BLOCK": block,
        "WHOLE": columns <= block,
        "FMA": isinstance(quantize_rows, triton.JITFunction),
        "EARLY": early,
        "num_warps": warps,
        "enable_fp_fusion": False,
    }


def _allocate(tokens: Tensor, per_token: bool) -> Quantized:
    rows, columns = tokens.shape
    codes = tokens.new_empty((rows, -(-columns // 16) * 16), dtype=torch.int8)
    return Quantized(codes, tokens.new_empty(rows if per_token else 1, dtype=torch.float32))


def _block(columns: int) -> tuple[int, int]:
    """Columns a program holds at a time, and its warps."""
    block = min(max(triton.next_power_of_2(columns), 32), LARGEST_BLOCK)
    return block, max(block // VALUES_PER_WARP, 1)


def _maxima(tokens: Tensor, flags: Flags) -> Tensor:
    """Partial maxima of ``|tokens|`` but for flagged columns, as bits: int32 [2^n]."""
    rows, columns = tokens.shape
    block, warps = _block(columns)
    maxima = tokens.new_empty(min(triton.next_power_of_2(rows), MAXIMA), dtype=torch.int32)
    partial_maxima[(len(maxima),)](
        x=tokens,
        x_stride=tokens.stride(0),
        maxima=maxima,
        rows=rows,
        columns=columns,
        **flags.arguments(),
        BLOCK=block,
        num_warps=warps,
        enable_fp_fusion=False,
    )
    return maxima


def _column_flags(tokens: Tensor, threshold: float) -> Flags:
    rows, columns = tokens.shape
    if rows <= FEW_ROWS:
        return Flags("rows", tokens, rows, tokens.stride(0), threshold)
    height = max(triton.next_power_of_2(triton.cdiv(rows, MOST_FLAG_ROWS)), LEAST_HEIGHT)
    flag_rows, blocks = triton.cdiv(rows, height), triton.cdiv(columns, FLAG_COLUMNS)
    words = tokens.new_empty((flag_rows, blocks * FLAG_COLUMNS // 32), dtype=torch.int32)
    column_flags[(blocks, flag_rows)](
        x=tokens,
        x_stride=tokens.stride(0),
        words=words,
        words_stride=words.stride(0),
        rows=rows,
        columns=columns,
        threshold=threshold,
        height=height,
        COLUMNS=FLAG_COLUMNS,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return Flags("words", words, flag_rows, words.stride(0))


@triton.jit(do_not_specialize=["rows", "height"])
def column_flags(x, x_stride, words, words_stride, rows, columns, threshold, height, COLUMNS: tl.constexpr):
    """Bit ``k % 32`` of ``words[i, k // 32]``: whether any token from ``i height`` on, ``height`` of them, exceeds the threshold in ``k``.

    height: a multiple of _ROWS_AT_ONCE.
    """
    offs = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * height
    found = tl.zeros([_ROWS_AT_ONCE, COLUMNS], tl.int32)
    for start in range(first, tl.minimum(first + height, rows), _ROWS_AT_ONCE):
        row = (start + tl.arange(0, _ROWS_AT_ONCE)).to(tl.int64)
        mask = (row < rows)[:, None] & (offs < columns)[None, :]
        value = tl.load(x + row[:, None] * x_stride + offs[None, :], mask=mask, other=0).to(tl.float32)
        found |= (tl.abs(value) > threshold).to(tl.int32)
    flags = tl.max(found, axis=0).reshape(COLUMNS // 32, 32)
    packed = tl.sum(flags << tl.arange(0, 32)[None, :], axis=1)
    tl.store(words + tl.program_id(1) * words_stride + tl.program_id(0) * (COLUMNS // 32) + tl.arange(0, COLUMNS // 32), packed)


@triton.jit(do_not_specialize=["rows", "flag_rows"])
def partial_maxima(
    x, x_stride, maxima, rows, columns, flags, flag_rows, flag_stride, threshold, FLAGS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The largest ``|x|`` of every n-th token, as bits; a program without tokens writes 0."""
    largest = tl.zeros([BLOCK // 32, 32], tl.int32)
    for start in range(0, columns, BLOCK):
        flagged = _flagged(flags, flag_rows, flag_stride, threshold, columns, start, FLAGS, BLOCK)
        row = tl.program_id(0).to(tl.int64)
        while row < rows:
            largest = tl.maximum(largest, tl.where(flagged, 0, _bits(_load(x + row * x_stride, columns, start, BLOCK))))
            row += tl.num_programs(0)
    tl.store(maxima + tl.program_id(0), _maximum(largest))


@triton.jit
def quantize_rows(
    x, x_stride, codes, codes_stride, scales, given, counters, columns,
    SCALE: tl.constexpr, GIVEN: tl.constexpr, COUNTERS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr, FMA: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Token ``program_id(0)`` of ``x`` to ``codes`` and ``scales``.

    SCALE: "token": from the row. "tensor": from GIVEN maxima in ``given``. "static": ``given``. WHOLE: a block is no shorter than a row.
    """
    if EARLY:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    codes += row * codes_stride
    stop = BLOCK if WHOLE else columns
    raw = _load(x, columns, 0, BLOCK)
    if SCALE == "static":
        scale = tl.load(given).to(tl.float32)
    elif SCALE == "tensor":
        scale = _scale_of(tl.max(tl.load(given + tl.arange(0, GIVEN)), axis=0))
    else:
        largest = _bits(raw)
        for start in range(BLOCK, stop, BLOCK):
            largest = tl.maximum(largest, _bits(_load(x, columns, start, BLOCK)))
        scale = _scale_of(_maximum(largest))
    _store_scale(scales, scale, SCALE)
    inverse = tl.div_rn(1.0, scale)
    for start in range(0, stop, BLOCK):
        if not WHOLE:
            raw = _load(x, columns, start, BLOCK)
        _store_codes(codes, codes_stride, start, raw.to(tl.float32), scale, inverse, FMA and SCALE != "static", BLOCK)
    _clear(counters, COUNTERS)


@triton.jit(do_not_specialize=["flag_rows", "stored"])
def split_rows(
    x, x_stride, codes, codes_stride, scales, given, counters, columns, flags, flag_rows, flag_stride, threshold,
    outliers, outliers_stride, index, stored, outlier_columns, outlier_count,
    FLAGS: tl.constexpr, SCALE: tl.constexpr, GIVEN: tl.constexpr, COUNTERS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
    FMA: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """``quantize_rows`` of what is not flagged; what is flagged goes to ``outliers``.

    With ``index``, int32 [stored], its columns. Otherwise in rising order of the columns, which the first program lists with their number.
    """
    if EARLY:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    codes += row * codes_stride
    outliers += row * outliers_stride
    stop = BLOCK if WHOLE else columns
    raw = _load(x, columns, 0, BLOCK)
    flagged = _flagged(flags, flag_rows, flag_stride, threshold, columns, 0, FLAGS, BLOCK)
    if SCALE == "tensor":
        scale = _scale_of(tl.max(tl.load(given + tl.arange(0, GIVEN)), axis=0))
    else:
        largest = tl.where(flagged, 0, _bits(raw))
        for start in range(BLOCK, stop, BLOCK):
            other = _flagged(flags, flag_rows, flag_stride, threshold, columns, start, FLAGS, BLOCK)
            largest = tl.maximum(largest, tl.where(other, 0, _bits(_load(x, columns, start, BLOCK))))
        scale = _scale_of(_maximum(largest))
    inverse = tl.div_rn(1.0, scale)
    before = 0
    for start in range(0, stop, BLOCK):
        if not WHOLE:
            raw = _load(x, columns, start, BLOCK)
            flagged = _flagged(flags, flag_rows, flag_stride, threshold, columns, start, FLAGS, BLOCK)
        if index is None:
            # Before the codes: the other way round the compiler keeps more in registers, and on sm_90 one too many.
            before += _set_apart(raw, flagged, start, before, outliers, outlier_columns, BLOCK)
        _store_codes(codes, codes_stride, start, tl.where(flagged, 0.0, raw.to(tl.float32)), scale, inverse, FMA, BLOCK)
    if index is not None:
        _gather(x, index, stored, outliers)
    # Both at the end: whether this program writes them would otherwise stay in a register throughout.
    _store_scale(scales, scale, SCALE)
    if index is None:
        if row == 0:
            tl.store(outlier_count, before)
    _clear(counters, COUNTERS)


@triton.jit
def _gather(x, index, stored, outliers):
    """``outliers[i] = x[index[i]]``."""
    for start in range(0, stored, 32):
        place = start + tl.arange(0, 32)
        column = tl.load(index + place, mask=place < stored, other=0)
        tl.store(outliers + place, tl.load(x + column, mask=place < stored, other=0), mask=place < stored)


@triton.jit
def _set_apart(raw, flagged, start, before, outliers, outlier_columns, BLOCK: tl.constexpr):
    """Stores what is flagged of ``raw`` to ``outliers`` from ``before`` on, and its columns, if this is the first program. Their number."""
    found = flagged.to(tl.int32)
    in_word = tl.sum(found, axis=1)
    number = tl.sum(in_word, axis=0)
    if number > 0:  # what follows costs about as much as the rest, and most calls of most layers have no outlier
        place = (before + tl.cumsum(in_word, axis=0) - in_word - 1)[:, None] + tl.cumsum(found, axis=1)
        # Addresses that do not follow on one another are stored one value a thread at a time. A thread has eight: taken apart they stay
        # where they are, while as a whole they would be dealt out anew among threads, through 32 KB of shared memory.
        values, places, flags = _eighths(raw), _eighths(place), _eighths(found)
        for i in tl.static_range(8):
            tl.store(outliers + places[i], values[i], mask=flags[i] != 0)
        if tl.program_id(0) == 0:
            columns = _eighths(_columns(start, BLOCK))
            for i in tl.static_range(8):
                tl.store(outlier_columns + places[i], columns[i], mask=flags[i] != 0)
    return number


@triton.jit
def _eighths(block):
    """Eight tensors: of every eight neighbours in ``block`` [BLOCK / 32, 32] one each."""
    even, odd = tl.split(block.reshape(block.numel // 8, 2, 2, 2))
    a, b = tl.split(even)
    c, d = tl.split(odd)
    return tl.split(a) + tl.split(b) + tl.split(c) + tl.split(d)


@triton.jit
def _columns(start, BLOCK: tl.constexpr):
    """``start`` and on, int32 [BLOCK / 32, 32]."""
    return start + tl.arange(0, BLOCK // 32)[:, None] * 32 + tl.arange(0, 32)[None, :]


@triton.jit
def _load(x, columns, start, BLOCK: tl.constexpr):
    """A block of a row, zero beyond its end."""
    offs = _columns(start, BLOCK)
    return tl.load(x + offs, mask=offs < columns, other=0)


@triton.jit
def _bits(raw):
    return raw.to(tl.float32).to(tl.int32, bitcast=True) & _NO_SIGN


@triton.jit
def _maximum(block):
    return tl.max(tl.max(block, axis=1), axis=0)


@triton.jit
def _flagged(flags, flag_rows, flag_stride, threshold, columns, start, FLAGS: tl.constexpr, BLOCK: tl.constexpr):
    """Whether columns ``start`` and on are split off, bool [BLOCK / 32, 32].

    FLAGS "none": none is. "slots": where ``flags`` int32 [K] is not negative. "words": where a bit is set in any of the ``flag_rows`` rows
    of bits. "rows": where any of ``flag_rows`` tokens exceeds the threshold.
    """
    offs = _columns(start, BLOCK)
    if FLAGS == "none":
        return tl.zeros([BLOCK // 32, 32], tl.int1)
    elif FLAGS == "slots":
        return tl.load(flags + offs, mask=offs < columns, other=-1) >= 0
    elif FLAGS == "words":
        word = start // 32 + tl.arange(0, BLOCK // 32)
        bits = tl.zeros([BLOCK // 32], tl.int32)
        for row in range(flag_rows):
            bits |= tl.load(flags + row * flag_stride + word, mask=word < flag_stride, other=0)
        return ((bits[:, None] >> tl.arange(0, 32)[None, :]) & 1) != 0
    else:
        found = tl.zeros([BLOCK // 32, 32], tl.int32)
        for row in tl.static_range(_FEW_ROWS):
            token = tl.minimum(row, flag_rows - 1)  # always eight, so that all loads are under way at once
            value = tl.load(flags + token * flag_stride + offs, mask=offs < columns, other=0).to(tl.float32)
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
def _store_codes(codes, codes_stride, start, value, scale, inverse, FMA: tl.constexpr, BLOCK: tl.constexpr):
    offs = _columns(start, BLOCK)
    tl.store(codes + offs, _code(value, scale, inverse, FMA), mask=offs < codes_stride)


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
