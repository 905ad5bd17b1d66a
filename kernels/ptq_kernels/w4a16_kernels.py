"""The Triton kernels of ``w4a16``; imported when one is launched, so that the package needs no triton to be imported.

They compute the transpose, ``y^T = W x^T``, because the matrix unit takes its left operand from registers, which is where unpacked
weights are, and because x^T then is the side that may be as narrow as 16. ``packing`` says how the codes lie.

A code becomes a 16-bit float without an integer conversion: put into the low mantissa bits of a power of two, it is that power plus the
code, and subtracting the power plus the zero point leaves ``code - zero``, exactly.

    fp16  0x6400 | q          = 1024 + q,        minus (1024 + z)
          0x6400 | 16 q       = 1024 + 16 q,     over 16, minus (64 + z): a nibble that stands four bits higher saves its shift
    bf16  0x4300 | q          = 128 + q,         minus (128 + z), for four bits; eight do not fit its mantissa:
    fp32  0x4B000000 | q      = 2^23 + q,        minus (2^23 + z), of which bf16, with eight significant bits, is the upper half
"""

# constants of a kernel are written in capitals

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_AND_OR = "0xea"  # the truth table of (a & b) | c, for lop3


def assembly(bits: int, bfloat16: bool, scaled: bool) -> str:
    """PTX that turns the codes of one fragment into its eight values, two to a register.

    Operands: 0 to 7 the values; 8 and 9 the words, one and the same for four bits; 10 and 11 the zero points of rows g and g + 8 as
    ``_zero_operands`` makes them; 12 and 13 the scales of both rows, each twice in a register, for what is ``scaled``.
    """
    lines = {
        (4, False): _four_bits_to_fp16,
        (4, True): _four_bits_to_bf16,
        (8, False): _eight_bits_to_fp16,
        (8, True): _eight_bits_to_bf16,
    }[bits, bfloat16]()
    for pair in range(4 if scaled else 0):
        scale = f"${12 + pair % 2}"
        # bf16x2 has no mul before sm_90; minus zero is what can be added without a trace.
        lines.append(f"fma.rn.bf16x2 p{pair}, p{pair}, {scale}, n;" if bfloat16 else f"mul.f16x2 p{pair}, p{pair}, {scale};")
    lines += [f"mov.b32 {{${2 * pair}, ${2 * pair + 1}}}, p{pair};" for pair in range(4)]
    registers = ".reg .b32 p<4>, b, c, n, u; .reg .f32 f<3>; mov.b32 n, 0x80008000;"
    return "{ " + registers + " " + " ".join(lines) + " }"


def _four_bits_to_fp16() -> list[str]:
    lines = ["mov.b32 c, 0x2c002c00;", "shr.u32 u, $8, 8;"]  # 1/16 in both halves
    for pair, word in enumerate(["$8", "$8", "u", "u"]):
        low = pair % 2 == 0
        lines.append(f"lop3.b32 p{pair}, {word}, {'0x000f000f' if low else '0x00f000f0'}, 0x64006400, {_AND_OR};")
        lines.append(f"sub.f16x2 p{pair}, p{pair}, $10;" if low else f"fma.rn.f16x2 p{pair}, p{pair}, c, $11;")
    return lines


def _four_bits_to_bf16() -> list[str]:
    lines = ["mov.b32 c, 0x3f803f80;"]  # one in both halves: bf16x2 has no sub before sm_90
    for pair in range(4):
        lines.append(f"shr.u32 u, $8, {4 * pair};")
        lines.append(f"lop3.b32 p{pair}, u, 0x000f000f, 0x43004300, {_AND_OR};")
        lines.append(f"fma.rn.bf16x2 p{pair}, p{pair}, c, ${10 + pair % 2};")
    return lines


def _eight_bits_to_fp16() -> list[str]:
    lines = ["mov.b32 c, 0x64646464;"]
    for pair in range(4):
        lines.append(f"prmt.b32 p{pair}, ${8 + pair // 2}, c, {'0x4342' if pair % 2 else '0x4140'};")
        lines.append(f"sub.f16x2 p{pair}, p{pair}, ${10 + pair % 2};")
    return lines


def _eight_bits_to_bf16() -> list[str]:
    lines = ["mov.b32 c, 0x4b000000;"]
    for pair in range(4):
        for half in (0, 1):
            lines.append(f"prmt.b32 b, ${8 + pair // 2}, c, {hex(0x7440 + 2 * (pair % 2) + half)};")
            lines.append(f"mov.b32 f{half}, b; mov.b32 f2, ${10 + pair % 2}; sub.f32 f{half}, f{half}, f2;")
        lines.append(f"mov.b32 b, f0; mov.b32 u, f1; prmt.b32 p{pair}, b, u, 0x7632;")
    return lines


@triton.jit
def _zero_operands(low, high, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """The zero points of rows g and g + 8, int32, as what ``assembly`` subtracts or, where it multiplies and adds, adds."""
    if BITS == 8 and tl.bfloat16 == DTYPE:
        return low | 0x4B000000, high | 0x4B000000
    if BITS == 8:
        return low * 0x00010001 + 0x64006400, high * 0x00010001 + 0x64006400
    if tl.bfloat16 == DTYPE:
        return low * 0x00010001 - 0x3CFF3D00, high * 0x00010001 - 0x3CFF3D00  # 0xC300C300
    return low * 0x00010001 + 0x64006400, high * 0x00100010 - 0x2BFF2C00  # 0xD400D400


@triton.jit
def _unpack_portable(word, first: tl.constexpr, low, high, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Values ``first`` to ``first + 3`` of a fragment, minus their zero points, by shifts and masks."""
    if BITS == 4:
        P: tl.constexpr = first // 2
        v0 = ((word >> (4 * P)) & 15) - low
        v1 = ((word >> (4 * P + 16)) & 15) - low
        v2 = ((word >> (4 * P + 4)) & 15) - high
        v3 = ((word >> (4 * P + 20)) & 15) - high
    else:
        v0 = (word & 255) - low
        v1 = ((word >> 8) & 255) - low
        v2 = ((word >> 16) & 255) - high
        v3 = ((word >> 24) & 255) - high
    return v0.to(DTYPE), v1.to(DTYPE), v2.to(DTYPE), v3.to(DTYPE)


@triton.jit
def _halves(words, DTYPE: tl.constexpr):
    """The two 16-bit floats in each 32-bit word."""
    low = (words & 0xFFFF).to(tl.uint16).to(DTYPE, bitcast=True)
    high = ((words >> 16) & 0xFFFF).to(tl.uint16).to(DTYPE, bitcast=True)
    return low, high


@triton.jit
def _group_words(base, tile_offset, first, G, stride, GROUPS: tl.constexpr, PER_TILE: tl.constexpr):
    """The words with scales or zero points of ``GROUPS`` groups from ``first``, to be broadcast against the fragments' words."""
    group = tl.minimum(first + tl.arange(0, GROUPS), G - 1)
    offsets = group[:, None, None] * stride + tile_offset[None, :, None] * 32 + tl.arange(0, 32)[None, None, :]
    words = tl.load(base + offsets)  # [GROUPS, TILES_N, w g]
    words = tl.reshape(words, (GROUPS // PER_TILE, PER_TILE, tile_offset.shape[0], 32))
    words = tl.permute(words, (0, 2, 3, 1))
    return tl.reshape(words, (GROUPS // PER_TILE, 1, tile_offset.shape[0], 4, 8, 1, PER_TILE, 1))


@triton.jit
def _weights(
    words,  # [TILES_K, TILES_N, 512]
    zeros,  # words as _group_words gives them, if ZEROS
    scales,  # likewise, if SCALED
    BITS: tl.constexpr,
    DTYPE: tl.constexpr,
    ZEROS: tl.constexpr,
    SCALED: tl.constexpr,
    GROUPS: tl.constexpr,  # that the tiles hold
    PER_TILE: tl.constexpr,  # of which in a tile
    ASSEMBLY: tl.constexpr,  # empty: by Triton's own operations, for the interpreter
):
    """The weights (code - zero) [* scale] of a block, [64 TILES_N, columns] in DTYPE, in the layout of a left operand."""
    TILES_K: tl.constexpr = words.shape[0]
    TILES_N: tl.constexpr = words.shape[1]
    OUTER: tl.constexpr = GROUPS // PER_TILE
    INNER: tl.constexpr = TILES_K // OUTER
    STEPS: tl.constexpr = (BITS == 4) * 2 + 2  # of 16 columns in a tile
    if ZEROS:
        low = zeros & 0xFFFF
        high = (zeros >> 16) & 0xFFFF
    else:
        low = tl.full((1, 1, 1, 1, 1, 1, 1, 1), 2 ** (BITS - 1), tl.int32)
        high = low
    if BITS == 4:
        first = tl.reshape(words, (OUTER, INNER, TILES_N, 4, 8, 4, PER_TILE, STEPS // PER_TILE))
        second = first
    else:
        first, second = tl.split(tl.reshape(words, (OUTER, INNER, TILES_N, 4, 8, 4, PER_TILE, STEPS // PER_TILE, 2)))
    s0, s1 = 0, 0
    if ASSEMBLY == "":
        v0, v1, v2, v3 = _unpack_portable(first, 0, low, high, BITS, DTYPE)
        v4, v5, v6, v7 = _unpack_portable(second, 4, low, high, BITS, DTYPE)
        if SCALED:
            s0, s1 = _halves(scales, DTYPE)
            v0, v1, v2, v3 = v0 * s0, v1 * s0, v2 * s1, v3 * s1
            v4, v5, v6, v7 = v4 * s0, v5 * s0, v6 * s1, v7 * s1
    else:
        low, high = _zero_operands(low, high, BITS, DTYPE)
        if SCALED:
            s0 = (scales & 0xFFFF) * 0x00010001
            s1 = ((scales >> 16) & 0xFFFF) * 0x00010001
        v0, v1, v2, v3, v4, v5, v6, v7 = tl.inline_asm_elementwise(
            ASSEMBLY,
            "=h,=h,=h,=h,=h,=h,=h,=h,r,r,r,r,r,r",
            [first, second, low, high, s0, s1],
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16),
            is_pure=True,
            pack=1,
        )
    left = tl.join(tl.join(v0, v1), tl.join(v2, v3))  # [..., c0, r]
    right = tl.join(tl.join(v4, v5), tl.join(v6, v7))
    values = tl.join(left, right).to(DTYPE, bitcast=True)  # [outer, inner, tiles_n, w, g, t, per tile, steps, c0, r, c3]
    values = tl.permute(values, (2, 3, 9, 4, 0, 1, 6, 7, 10, 5, 8))
    return tl.reshape(values, (64 * TILES_N, TILES_K * STEPS * 16))


@triton.jit
def w4a16_kernel(  # noqa: C901  # all but the loop are choices made while compiling
    x,  # [M, K]
    packed,
    scale,  # int32 words [G, stride]
    zero,  # likewise, if ZEROS
    bias,  # [N], if BIAS
    out,  # [split_k, M, N]
    M,
    N,
    K,
    G,
    tiles_n,
    tiles_k,
    stride_x,
    split_k,
    DTYPE: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,  # 0: a row is one group
    ZEROS: tl.constexpr,
    BIAS: tl.constexpr,
    SCALE_WEIGHTS: tl.constexpr,  # scale the weights, not the sums
    EVEN: tl.constexpr,  # BLOCK_K divides K
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,  # of loads under way
    PDL: tl.constexpr,  # begin while the kernel before ends (programmatic dependent launch)
    ASSEMBLY: tl.constexpr,
):
    """``out[split] = (W x^T)^T`` over the split's share of K, for one [BLOCK_N, BLOCK_M] block."""
    TILES_N: tl.constexpr = BLOCK_N // 64
    TILE_K: tl.constexpr = 256 // BITS
    TILES_K: tl.constexpr = BLOCK_K // TILE_K
    SPANNED: tl.constexpr = BLOCK_K // GROUP if GROUP > 0 else 1
    GROUPS: tl.constexpr = SPANNED if SPANNED > 1 else 1
    PER_TILE: tl.constexpr = 2 if GROUPS > TILES_K else 1
    block_n = tl.program_id(0)
    block_m = tl.program_id(1)
    split = tl.program_id(2)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()

    blocks_k = tl.cdiv(K, BLOCK_K)
    begin = split * blocks_k // split_k
    end = (split + 1) * blocks_k // split_k
    # Clamped, not masked: what lies beyond the last row tile is not stored, beyond the last column meets zeros of x.
    tile_n = tl.minimum(block_n * TILES_N + tl.arange(0, TILES_N), tiles_n - 1)
    tile_k = tl.arange(0, TILES_K)
    word = tl.arange(0, 512)
    tile_words = tile_n[None, :, None].to(tl.int64) * tiles_k * 512 + word[None, None, :]
    m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    x_rows = x + m[:, None].to(tl.int64) * stride_x + k[None, :]
    stride_g = tiles_n * 32

    row_zeros = 0
    row_scales = 0
    if GROUP == 0:
        row_scales = _group_words(scale, tile_n, 0, G, stride_g, 1, 1)
        if ZEROS:
            row_zeros = _group_words(zero, tile_n, 0, G, stride_g, 1, 1)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for i in tl.range(begin, end, num_stages=NUM_STAGES):
        if EVEN:
            words = tl.load(packed + tile_words + (i * TILES_K + tile_k)[:, None, None] * 512)
            xs = tl.load(x_rows + i * BLOCK_K, mask=m[:, None] < M, other=0.0)
        else:
            column = tl.minimum(i * TILES_K + tile_k, tiles_k - 1)
            words = tl.load(packed + tile_words + column[:, None, None] * 512)
            xs = tl.load(x_rows + i * BLOCK_K, mask=(m[:, None] < M) & (i * BLOCK_K + k[None, :] < K), other=0.0)
        scales = row_scales
        zeros = row_zeros
        if GROUP > 0:
            scales = _group_words(scale, tile_n, i * BLOCK_K // GROUP, G, stride_g, GROUPS, PER_TILE)
            if ZEROS:
                zeros = _group_words(zero, tile_n, i * BLOCK_K // GROUP, G, stride_g, GROUPS, PER_TILE)
        weights = _weights(words, zeros, scales, BITS, DTYPE, ZEROS, SCALE_WEIGHTS, GROUPS, PER_TILE, ASSEMBLY)
        if SCALE_WEIGHTS or GROUP == 0:
            acc = tl.dot(weights, tl.trans(xs), acc)
        else:
            acc += tl.dot(weights, tl.trans(xs)) * _row_scale(scales, BLOCK_N, DTYPE)
    if GROUP == 0 and not SCALE_WEIGHTS:
        acc *= _row_scale(row_scales, BLOCK_N, DTYPE)

    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    pointers = out + (split * M + m)[None, :].to(tl.int64) * N + n[:, None]
    tl.store(pointers, acc.to(out.dtype.element_ty), mask=(m[None, :] < M) & (n[:, None] < N))


@triton.jit
def _row_scale(words, BLOCK_N: tl.constexpr, DTYPE: tl.constexpr):
    """Scale words of one group as a column of float32, [BLOCK_N, 1]."""
    low, high = _halves(tl.reshape(words, (BLOCK_N // 16, 8)), DTYPE)
    rows = tl.permute(tl.join(low, high), (0, 2, 1))  # [16 rows, r, g]
    return tl.reshape(rows, (BLOCK_N, 1)).to(tl.float32)


@triton.jit
def reduce_kernel(
    partial,  # float32 [split_k, M, N]
    bias,
    out,  # [M, N]
    elements,  # M N
    N,
    split_k,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """``out = sum of partial over split_k + bias``: always in the same order, so that two runs give the same bits."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    acc = tl.zeros((BLOCK,), tl.float32)
    pointers = partial + at
    for _ in range(split_k):
        acc += tl.load(pointers, mask=inside, other=0.0)
        pointers += elements
    if BIAS:
        acc += tl.load(bias + at % N, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def dequantize_kernel(
    packed,
    scale,
    zero,
    out,  # [N, K]
    N,
    K,
    G,
    tiles_n,
    tiles_k,
    DTYPE: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """The weight in 16 bits, for the products that are bound by arithmetic."""
    TILES_N: tl.constexpr = BLOCK_N // 64
    TILES_K: tl.constexpr = BLOCK_K // (256 // BITS)
    SPANNED: tl.constexpr = BLOCK_K // GROUP if GROUP > 0 else 1
    GROUPS: tl.constexpr = SPANNED if SPANNED > 1 else 1
    PER_TILE: tl.constexpr = 2 if GROUPS > TILES_K else 1
    block_k = tl.program_id(0)
    block_n = tl.program_id(1)
    tile_n = tl.minimum(block_n * TILES_N + tl.arange(0, TILES_N), tiles_n - 1)
    tile_k = tl.minimum(block_k * TILES_K + tl.arange(0, TILES_K), tiles_k - 1)
    offsets = tile_n[None, :, None].to(tl.int64) * tiles_k * 512 + tile_k[:, None, None] * 512
    words = tl.load(packed + offsets + tl.arange(0, 512)[None, None, :])
    group = block_k * BLOCK_K // GROUP if GROUP > 0 else 0
    s = _group_words(scale, tile_n, group, G, tiles_n * 32, GROUPS, PER_TILE)
    z = 0
    if ZEROS:
        z = _group_words(zero, tile_n, group, G, tiles_n * 32, GROUPS, PER_TILE)
    weights = _weights(words, z, s, BITS, DTYPE, ZEROS, True, GROUPS, PER_TILE, ASSEMBLY)
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = block_k * BLOCK_K + tl.arange(0, BLOCK_K)
    tl.store(out + n[:, None].to(tl.int64) * K + k[None, :], weights, mask=(n[:, None] < N) & (k[None, :] < K))
