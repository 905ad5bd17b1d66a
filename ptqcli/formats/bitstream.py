"""Rows of small integers as one string of bits, cut into 32-bit words.

Element ``e`` of a row, ``b`` bits wide, occupies bits ``[e*b, (e+1)*b)`` of the row's bit string; bit 0 is the lowest bit of the first
word. Words are little-endian, so the string can be read as bytes just as well, and a few elements always fill whole bytes: two of
4 bits one byte, eight of 3 bits three. That is how it is done here: for each position in such a cell, the byte and the shift at which
the element starts are fixed, and so is the byte into which it may run over. A row ends with zero bits up to the next whole word.

compressed-tensors, from version 0.18, packs all widths so; for 2, 4 and 8 bits every version does. GPTQ's ``qweight`` is the same
string run down the columns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

_WORD_BITS = 32


def word_count(elements: int, bits: int) -> int:
    """32-bit words that hold ``elements`` codes of ``bits`` bits."""
    return -(-elements * bits // _WORD_BITS)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes, uint8 [rows, elements] each below 2^bits with 1 <= bits <= 8, as int32 [rows, word_count(elements, bits)]."""
    rows, elements = codes.shape
    in_cell, cell_bytes = _cell(bits)
    cells = functional.pad(codes, (0, -elements % _WORD_BITS)).view(rows, -1, in_cell)
    data = torch.zeros(rows, cells.shape[1], cell_bytes, dtype=torch.uint8, device=codes.device)
    for position in range(in_cell):
        byte, shift = divmod(position * bits, 8)
        data[:, :, byte] |= cells[:, :, position] << shift
        if shift + bits > 8:
            data[:, :, byte + 1] |= cells[:, :, position] >> (8 - shift)
    words = data.view(rows, -1).view(torch.int32)
    return words[:, : word_count(elements, bits)].contiguous()


def unpack(words: Tensor, bits: int, elements: int) -> Tensor:
    """Inverse of ``pack``: int32 [rows, word_count(elements, bits)] to uint8 [rows, elements]."""
    rows, width = words.shape
    in_cell, cell_bytes = _cell(bits)
    padded = functional.pad(words, (0, -width % bits)).contiguous()  # 32 elements fill ``bits`` words
    data = padded.view(torch.uint8).view(rows, -1, cell_bytes)
    cells = torch.empty(rows, data.shape[1], in_cell, dtype=torch.uint8, device=words.device)
    for position in range(in_cell):
        byte, shift = divmod(position * bits, 8)
        code = data[:, :, byte] >> shift
        if shift + bits > 8:
            code = code | (data[:, :, byte + 1] << (8 - shift))
        cells[:, :, position] = code & ((1 << bits) - 1)
    return cells.view(rows, -1)[:, :elements].contiguous()


def _cell(bits: int) -> tuple[int, int]:
    """The fewest elements that fill whole bytes, and how many bytes that is."""
    common = math.gcd(bits, 8)
    return 8 // common, bits // common
