"""The layout that the W4A16 and W8A16 kernels read: codes in the order in which a tensor core's registers want them.

The matrix instructions of sm_80 and later (``mma.m16n8k16`` and ``wgmma.m64nNk16``; PTX ISA, "matrix fragments") take their left operand
16 columns at a time, from registers. Thread ``4 g + t`` of warp ``w``, with ``g`` in 0..7 and ``t`` in 0..3, holds eight values of the
64 x 16 piece that four warps multiply together:

    value i = (c3 r c0 in binary):    row 16 w + 8 r + g,    column 8 c3 + 2 t + c0

So the weight is cut into tiles of 64 rows by ``TILE_K[bits]`` columns, and for every thread the codes of its fragments lie side by
side in 16 bytes. A thread loads them at once, and what it unpacks stays in its own registers on the way to the matrix unit: no code is
loaded twice, and none goes through shared memory after it is unpacked.

    packed [tiles of N, tiles of K, thread = 32 w + 4 g + t, word]  int32

    4 bit, 64 columns to a tile: word s has the eight codes of columns 16 s to 16 s + 15, code i in bits 4 p, p = i // 2 + 4 (i % 2).
           ``(word >> 4 j) & 0x000F000F`` therefore is a pair of neighbouring columns in the two halves of a register.
    8 bit, 32 columns to a tile: words 2 s and 2 s + 1 have codes 0 to 3 and 4 to 7 of columns 16 s to 16 s + 15, in rising order.

Scales and zero points are [G, N], with the rows ``g`` and ``8 + g`` of each 16 next to one another, so that a thread finds both of its
own in one 32-bit word. Codes, scales and zero points beyond the last row or column are zero.

All of this is done once, when a checkpoint is loaded; each function has its inverse beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

TILE_N = 64
TILE_K = {4: 64, 8: 32}
_WORDS = 512  # 32-bit words to a tile


def pack_tiles(codes: Tensor, bits: int) -> Tensor:
    """Codes, uint8 [N, K] below 2^bits, as int32 [ceil(N / 64), ceil(K / TILE_K[bits]), 128, 4].

    Raises TypeError or ValueError for another dtype, number of dimensions, width, or a code that is too large.
    """
    _check_codes(codes, bits)
    N, K = codes.shape
    padded = functional.pad(codes, (0, -K % TILE_K[bits], 0, -N % TILE_N))
    # [tile of N, w, r, g, tile of K, s, c3, t, c0] to [tile of N, tile of K, w, g, t, s, c3, r, c0]
    pieces = padded.view(padded.shape[0] // TILE_N, 4, 2, 8, padded.shape[1] // TILE_K[bits], -1, 2, 4, 2)
    values = pieces.permute(0, 4, 1, 3, 7, 5, 6, 2, 8)
    if bits == 4:  # [..., c3, r, c0] to [..., c0, c3, r]: the order of the nibbles; two make a byte
        nibbles = values.movedim(-1, -3).reshape(*values.shape[:6], 4, 2)
        values = nibbles[..., 0] | (nibbles[..., 1] << 4)
    return values.reshape(values.shape[0], values.shape[1], 128, 16).view(torch.int32)


def unpack_tiles(packed: Tensor, bits: int, N: int, K: int) -> Tensor:
    """Inverse of ``pack_tiles``: uint8 [N, K]."""
    tiles_n, tiles_k = packed.shape[:2]
    values = packed.contiguous().view(torch.uint8).view(tiles_n, tiles_k, 4, 8, 4, -1)
    if bits == 4:
        nibbles = torch.stack((values & 15, values >> 4), dim=-1)
        values = nibbles.view(tiles_n, tiles_k, 4, 8, 4, -1, 2, 2, 2).movedim(-3, -1)
    pieces = values.reshape(tiles_n, tiles_k, 4, 8, 4, -1, 2, 2, 2).permute(0, 2, 7, 3, 1, 5, 6, 4, 8)
    return pieces.reshape(tiles_n * TILE_N, -1)[:N, :K].contiguous()


def pack_groups(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales or zero points, [N, G], as ``dtype`` (of 16 bits: a float for scales, int16 for zero points) [G, N rounded up to 64]."""
    if values.dim() != 2:
        raise ValueError(f"scales and zero points must be [N, G], not {list(values.shape)}")
    if dtype.itemsize != 2:
        raise TypeError(f"scales and zero points are stored in 16 bits, not as {dtype}")
    padded = functional.pad(values.to(dtype).t(), (0, -values.shape[0] % TILE_N))
    return padded.reshape(len(padded), -1, 2, 8).transpose(2, 3).reshape(len(padded), -1).contiguous()


def unpack_groups(packed: Tensor, N: int) -> Tensor:
    """Inverse of ``pack_groups`` but for the dtype: [N, G]."""
    natural = packed.reshape(len(packed), -1, 8, 2).transpose(2, 3).reshape(len(packed), -1)
    return natural[:, :N].t().contiguous()


def _check_codes(codes: Tensor, bits: int) -> None:
    if bits not in TILE_K:
        raise ValueError(f"bits must be one of {tuple(TILE_K)}, not {bits}")
    if codes.dtype != torch.uint8:
        raise TypeError(f"codes must be uint8, not {codes.dtype}")
    if codes.dim() != 2:
        raise ValueError(f"codes must be [N, K], not {list(codes.shape)}")
    if codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"codes must be below 2^{bits}, found {int(codes.max())}")
