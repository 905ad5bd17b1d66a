"""Codes in memory: as many as fit whole into a byte, so that reading one back is a shift and a mask.

For ``W[n, k]`` and ``per = {2: 4, 4: 2}.get(bits, 1)`` codes to a byte,

    packed[n, k // per]  holds code k in bits  [bits * (k % per), bits * (k % per) + bits)

Codes of 3, 5, 6 and 7 bits take a whole byte each: packed tightly they straddle bytes, which saves memory but not the time this reference
is for.
The unused high codes of a row's last byte are zero.

Integer products take signed codes, one to a byte at every width: ``code - 2^(bits-1)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

CODES_PER_BYTE = {2: 4, 3: 1, 4: 2, 5: 1, 6: 1, 7: 1, 8: 1}


def packed_width(K: int, bits: int) -> int:
    """Bytes in a row of ``K`` codes. Raises ValueError for a width other than 2 to 8."""
    return -(-K // _per_byte(bits))


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes, uint8 [N, K] each below 2^bits, as uint8 [N, packed_width(K, bits)].

    Raises TypeError or ValueError for another dtype, number of dimensions, width, or a code that is too large.
    """
    _check_codes(codes, bits)
    per_byte = _per_byte(bits)
    N, K = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -K % per_byte)).view(N, -1, per_byte)
    packed = padded[:, :, 0].clone()
    for position in range(1, per_byte):
        packed |= padded[:, :, position] << (bits * position)
    return packed


def unpack_codes(packed: Tensor, bits: int, K: int) -> Tensor:
    """Inverse of ``pack_codes``: uint8 [N, packed_width(K, bits)] to uint8 [N, K]."""
    per_byte = _per_byte(bits)
    if per_byte == 1:
        return packed
    codes = torch.stack([(packed >> shift) & ((1 << bits) - 1) for shift in range(0, per_byte * bits, bits)], dim=-1)
    return codes.flatten(1)[:, :K]


def signed_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes, uint8 [N, K] each below 2^bits, as int8 [N, K] with 2^(bits-1) taken off. Raises TypeError or ValueError."""
    _check_codes(codes, bits)
    return (codes - (1 << (bits - 1))).view(torch.int8)  # an unsigned byte wraps around; read as signed it is the difference


def _check_codes(codes: Tensor, bits: int) -> None:
    _per_byte(bits)
    if codes.dtype != torch.uint8:
        raise TypeError(f"codes must be uint8, not {codes.dtype}")
    if codes.dim() != 2:
        raise ValueError(f"codes must be [N, K], not {list(codes.shape)}")
    if codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"codes must be below 2^{bits}, found {int(codes.max())}")


def _per_byte(bits: int) -> int:
    if bits not in CODES_PER_BYTE:
        raise ValueError(f"bits must be one of {tuple(CODES_PER_BYTE)}, not {bits}")
    return CODES_PER_BYTE[bits]
