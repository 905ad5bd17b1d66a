"""The Triton kernels of ``quantize_rows``, which says what they compute; imported by it, needs triton and no GPU.

Blocks of columns lie as [BLOCK / 32, 32]: a row of that is a word of flags, and counting flags goes word by word.

- Maxima are taken over the bits of ``|x|`` as an integer. For floats without sign that is the same order, and NaN comes out above
  everything: it ends up in the scale, and so in every output of its token, where a floating-point maximum would drop it.
- Rounding adds ``1.5 * 2^23``: a float that large has no bits for fractions, the sum is rounded half even, and its lowest byte is the
  code as int8. What lies beyond [-128, 127] is clamped before, which is the same because the bounds are integers.
- A correctly rounded division costs some 30 instructions a value, more than memory takes to deliver it. ``1 / s`` once a row, a product
  and two fused steps of Newton's correction give the same quotient (Markstein 1990), as long as nothing in them under- or overflows;
  rows with scales that could make that happen divide. So do static scales, and the interpreter, whose multiply-add rounds twice.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

# Up to so many tokens every program looks through all of them for outliers by itself, which costs less than another launch.
FEW_ROWS = 8
_ROWS_AT_ONCE = tl.constexpr(64)
_FEW_ROWS = tl.constexpr(FEW_ROWS)
_ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23
_NO_SIGN = tl.constexpr(0x7FFFFFFF)
_INFINITY = tl.constexpr(0x7F800000)  # its bits; those of NaN are above
# Scales between these leave the residual of any value that does not round to zero, some 2^-25 of the scale, a normal number.
_SMALL_SCALE = tl.constexpr(1e-27)
_LARGE_SCALE = tl.constexpr(1e27)


@triton.jit(do_not_specialize=["M", "height"])
def column_flags(x, x_stride, words, words_stride, M, K, threshold, height, COLUMNS: tl.constexpr):
    """Bit ``k % 32`` of ``words[i, k // 32]``: whether any token from ``i height`` on, ``height`` of them, exceeds the threshold in ``k``.

    height: a multiple of _ROWS_AT_ONCE.
    """
    offs = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * height
    found = tl.zeros([_ROWS_AT_ONCE, COLUMNS], tl.int32)
    for start in range(first, tl.minimum(first + height, M), _ROWS_AT_ONCE):
        row = (start + tl.arange(0, _ROWS_AT_ONCE)).to(tl.int64)
        mask = (row < M)[:, None] & (offs < K)[None, :]
        value = tl.load(x + row[:, None] * x_stride + offs[None, :], mask=mask, other=0).to(tl.float32)
        found |= (tl.abs(value) > threshold).to(tl.int32)
    flags = tl.max(found, axis=0).reshape(COLUMNS // 32, 32)
    packed = tl.sum(flags << tl.arange(0, 32)[None, :], axis=1)
    tl.store(words + tl.program_id(1) * words_stride + tl.program_id(0) * (COLUMNS // 32) + tl.arange(0, COLUMNS // 32), packed)


@triton.jit(do_not_specialize=["M", "flag_rows"])
def partial_maxima(
    x, x_stride, maxima, M, K, flags, flag_rows, flag_stride, threshold, FLAGS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The largest ``|x|`` of every n-th token, as bits; a program without tokens writes 0."""
    largest = tl.zeros([BLOCK // 32, 32], tl.int32)
    for start in range(0, K, BLOCK):
        flagged = _flagged(flags, flag_rows, flag_stride, threshold, K, start, FLAGS, BLOCK)
        row = tl.program_id(0).to(tl.int64)
        while row < M:
            largest = tl.maximum(largest, tl.where(flagged, 0, _bits(_load(x + row * x_stride, K, start, BLOCK))))
            row += tl.num_programs(0)
    tl.store(maxima + tl.program_id(0), _maximum(largest))


@triton.jit
def quantize_rows(
    x, x_stride, codes, codes_stride, scales, given, counters, K,
    SCALE: tl.constexpr, GIVEN: tl.constexpr, COUNTERS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr, FMA: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Token ``program_id(0)`` of ``x`` to ``codes`` and ``scales``.

    SCALE: "token": from the row. "tensor": from GIVEN maxima in ``given``. "static": ``given``, stored for each token, NaN where it is not
    finite. WHOLE: a block is no shorter than a row.
    """
    if PDL:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    codes += row * codes_stride
    stop = BLOCK if WHOLE else K
    raw = _load(x, K, 0, BLOCK)
    if SCALE == "static":
        scale = tl.load(given).to(tl.float32)
    elif SCALE == "tensor":
        scale = _scale_of(tl.max(tl.load(given + tl.arange(0, GIVEN)), axis=0))
    else:
        largest = _bits(raw)
        for start in range(BLOCK, stop, BLOCK):
            largest = tl.maximum(largest, _bits(_load(x, K, start, BLOCK)))
        scale = _scale_of(_maximum(largest))
    if SCALE != "static":
        _store_scale(scales, scale, SCALE)
    inverse = tl.div_rn(1.0, scale)
    seen = tl.zeros([BLOCK // 32, 32], tl.int32)
    for start in range(0, stop, BLOCK):
        if not WHOLE:
            raw = _load(x, K, start, BLOCK)
        if SCALE == "static":
            seen = tl.maximum(seen, _bits(raw))
        _store_codes(codes, codes_stride, start, raw.to(tl.float32), scale, inverse, FMA and SCALE != "static", BLOCK)
    if SCALE == "static":
        tl.store(scales + row, tl.where(_maximum(seen) >= _INFINITY, float("nan"), scale))
    _clear(counters, COUNTERS)


@triton.jit(do_not_specialize=["flag_rows", "stored"])
def split_rows(
    x, x_stride, codes, codes_stride, scales, given, counters, K, flags, flag_rows, flag_stride, threshold,
    outliers, outliers_stride, index, stored, outlier_columns, outlier_count,
    FLAGS: tl.constexpr, SCALE: tl.constexpr, GIVEN: tl.constexpr, COUNTERS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
    FMA: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``quantize_rows`` of what is not flagged; what is flagged goes to ``outliers``.

    With ``index``, int32 [stored], its columns. Otherwise in rising order of the columns, which the first program lists with their number.
    """
    if PDL:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    codes += row * codes_stride
    outliers += row * outliers_stride
    stop = BLOCK if WHOLE else K
    raw = _load(x, K, 0, BLOCK)
    flagged = _flagged(flags, flag_rows, flag_stride, threshold, K, 0, FLAGS, BLOCK)
    if SCALE == "tensor":
        scale = _scale_of(tl.max(tl.load(given + tl.arange(0, GIVEN)), axis=0))
    else:
        largest = tl.where(flagged, 0, _bits(raw))
        for start in range(BLOCK, stop, BLOCK):
            other = _flagged(flags, flag_rows, flag_stride, threshold, K, start, FLAGS, BLOCK)
            largest = tl.maximum(largest, tl.where(other, 0, _bits(_load(x, K, start, BLOCK))))
        scale = _scale_of(_maximum(largest))
    inverse = tl.div_rn(1.0, scale)
    before = 0
    for start in range(0, stop, BLOCK):
        if not WHOLE:
            raw = _load(x, K, start, BLOCK)
            flagged = _flagged(flags, flag_rows, flag_stride, threshold, K, start, FLAGS, BLOCK)
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
            where = _eighths(_columns(start, BLOCK))
            for i in tl.static_range(8):
                tl.store(outlier_columns + places[i], where[i], mask=flags[i] != 0)
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
def _load(x, K, start, BLOCK: tl.constexpr):
    """A block of a row, zero beyond its end."""
    offs = _columns(start, BLOCK)
    return tl.load(x + offs, mask=offs < K, other=0)


@triton.jit
def _bits(raw):
    return raw.to(tl.float32).to(tl.int32, bitcast=True) & _NO_SIGN


@triton.jit
def _maximum(block):
    return tl.max(tl.max(block, axis=1), axis=0)


@triton.jit
def _flagged(flags, flag_rows, flag_stride, threshold, K, start, FLAGS: tl.constexpr, BLOCK: tl.constexpr):
    """Whether columns ``start`` and on are split off, bool [BLOCK / 32, 32].

    FLAGS "none": none is. "slots": where ``flags`` int32 [K] is not negative. "words": where a bit is set in any of the ``flag_rows`` rows
    of bits. "rows": where any of ``flag_rows`` tokens exceeds the threshold.
    """
    offs = _columns(start, BLOCK)
    if FLAGS == "none":
        return tl.zeros([BLOCK // 32, 32], tl.int1)
    elif FLAGS == "slots":
        return tl.load(flags + offs, mask=offs < K, other=-1) >= 0
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
            value = tl.load(flags + token * flag_stride + offs, mask=offs < K, other=0).to(tl.float32)
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
