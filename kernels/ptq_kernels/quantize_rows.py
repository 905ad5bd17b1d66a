"""Activations to 8 bits on the GPU, by the kernels of ``quantize_rows_kernels``. Importing this needs triton.

    s = max|x| / 127.5 (1 where that is 0)        q = clamp(round half even(x / s), -128, 127)

One program a token. A row of up to 4096 columns is read once and stays in registers (8 values a thread) between its maximum and its codes;
a longer one is read again, from cache. The arithmetic is that of ``reference``, division included, so codes and scales are the same bits.

One scale for all tokens takes a kernel of its own before (``partial_maxima``): the maximum of everything is known to no program earlier.
``split_rows`` does the same for LLM.int8: columns with outliers count as zero, and their values go, side by side, to a buffer of 16 bit.
Rows of the codes are padded with zeros to a multiple of 16, so that the product can load 16 bytes at a time for any K.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from ptq_kernels import quantize_rows_kernels as kernels

# Values a program holds at a time: 4096 bf16 in 16 warps are one load of 16 bytes for each thread. With twice as many a thread, registers
# leave no room for more rows at once (on sm_90, 38 instead of 24 in ``quantize_rows``, 98 instead of 55 in ``split_rows``).
LARGEST_BLOCK = 4096
VALUES_PER_WARP = 256
# Programs that share the search for one maximum, and with that the number of partial maxima that every program reads afterwards.
MAXIMA = 512
# Columns and, at least, tokens that a program of ``column_flags`` looks at; rows of flags at most: every token's program reads all of them.
FLAG_COLUMNS = 64
LEAST_HEIGHT = 128
MOST_FLAG_ROWS = 8


@dataclass(frozen=True, kw_only=True)
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


@dataclass(frozen=True, kw_only=True)
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


def quantize(x: Tensor, per_token: bool, input_scale: Tensor | None, counters: Tensor | None, pdl: bool = False) -> Quantized:
    """``x`` [M, K], unit stride along K, in 8 bits.

    counters: int32 [2^n] to set to zero on the way. pdl: let the launch that comes next begin before this one ends.
    """
    quantized = _allocate(x, per_token or input_scale is not None)
    given = _maxima(x, Flags(kind="none")) if input_scale is None and not per_token else input_scale
    kind = "token" if per_token else "tensor" if input_scale is None else "static"
    kernels.quantize_rows[(len(x),)](**_arguments(x, quantized, kind, given, counters, pdl))
    return quantized


def split(
    x: Tensor,
    index: Tensor,
    slots: Tensor,
    threshold: float | None,
    per_token: bool,
    counters: Tensor | None,
    pdl: bool = False,
) -> Quantized:
    """``x`` [M, K], unit stride along K: outlier columns apart, the rest in 8 bits.

    index: int32 [k], the columns without a threshold. slots: int32 [K], the position of each column there, else -1. counters, pdl: as
    above.
    """
    M, K = x.shape
    quantized = _allocate(x, per_token)
    fixed = threshold is None
    outliers = x.new_empty((M, len(index) if fixed else K))
    where, count = (None, None) if fixed else (index.new_empty(K), index.new_empty(1))
    flags = Flags(kind="slots", source=slots) if threshold is None else _column_flags(x, threshold)
    maxima = None if per_token else _maxima(x, flags)
    kernels.split_rows[(M,)](
        **_arguments(x, quantized, "token" if per_token else "tensor", maxima, counters, pdl),
        **flags.arguments(),
        outliers=outliers,
        outliers_stride=outliers.stride(0),
        index=index if fixed else None,
        stored=len(index),
        outlier_columns=where,
        outlier_count=count,
    )
    return replace(quantized, outliers=outliers, columns=where, count=count)


def _arguments(x: Tensor, quantized: Quantized, kind: str, given: Tensor | None, counters: Tensor | None, pdl: bool) -> dict[str, Any]:
    """What ``quantize_rows`` and ``split_rows`` both take, by name."""
    K = x.shape[1]
    block, warps = _block(K)
    return {
        "x": x,
        "x_stride": x.stride(0),
        "codes": quantized.codes,
        "codes_stride": quantized.codes.stride(0),
        "scales": quantized.scale,
        "given": given,
        "counters": counters,
        "K": K,
        "SCALE": kind,
        "GIVEN": 0 if given is None else given.numel(),
        "COUNTERS": 0 if counters is None else counters.numel(),
        "BLOCK": block,
        "WHOLE": block >= K,
        "FMA": isinstance(kernels.quantize_rows, triton.JITFunction),
        "PDL": pdl,
        "num_warps": warps,
        "enable_fp_fusion": False,
    }


def _allocate(x: Tensor, per_token: bool) -> Quantized:
    M, K = x.shape
    codes = x.new_empty((M, -(-K // 16) * 16), dtype=torch.int8)
    return Quantized(codes=codes, scale=x.new_empty(M if per_token else 1, dtype=torch.float32))


def _block(K: int) -> tuple[int, int]:
    """Columns a program holds at a time, and its warps."""
    block = min(max(triton.next_power_of_2(K), 32), LARGEST_BLOCK)
    return block, max(block // VALUES_PER_WARP, 1)


def _maxima(x: Tensor, flags: Flags) -> Tensor:
    """Partial maxima of ``|x|`` but for flagged columns, as bits: int32 [2^n]."""
    M, K = x.shape
    block, warps = _block(K)
    maxima = x.new_empty(min(triton.next_power_of_2(M), MAXIMA), dtype=torch.int32)
    kernels.partial_maxima[(len(maxima),)](
        x=x,
        x_stride=x.stride(0),
        maxima=maxima,
        M=M,
        K=K,
        **flags.arguments(),
        BLOCK=block,
        num_warps=warps,
        enable_fp_fusion=False,
    )
    return maxima


def _column_flags(x: Tensor, threshold: float) -> Flags:
    M, K = x.shape
    if M <= kernels.FEW_ROWS:
        return Flags(kind="rows", source=x, rows=M, stride=x.stride(0), threshold=threshold)
    height = max(triton.next_power_of_2(triton.cdiv(M, MOST_FLAG_ROWS)), LEAST_HEIGHT)
    flag_rows, blocks = triton.cdiv(M, height), triton.cdiv(K, FLAG_COLUMNS)
    words = x.new_empty((flag_rows, blocks * FLAG_COLUMNS // 32), dtype=torch.int32)
    kernels.column_flags[(blocks, flag_rows)](
        x=x,
        x_stride=x.stride(0),
        words=words,
        words_stride=words.stride(0),
        M=M,
        K=K,
        threshold=threshold,
        height=height,
        COLUMNS=FLAG_COLUMNS,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return Flags(kind="words", source=words, rows=flag_rows, stride=words.stride(0))
