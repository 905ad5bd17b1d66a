"""Products of int8 codes in Triton, for W8A8 and LLM.int8. Importing this needs triton, not a GPU.

Both operands lie with K innermost, as the tensor cores want bytes: nothing is transposed or shuffled, at load or later. Sums are int32
and exact, so no order of them can be seen; scales and bias come once, in float32, at the end.

Three things depend on M (the table ``tuned/w8a8.json`` says where they change):

- Few tokens: the weight is the left operand (``weight_left``). A tile of the left operand has at least 64 rows, of the right one 8.
- Few tiles: K is split, so that all SMs read weights. Each part stores its sums; the last one to finish adds them up and goes on
  to the end, in the same launch. Which one is last changes from run to run, what it adds does not.
- Many tokens: tiles arrive through the copy engine (``tma``), where K is a multiple of 16, as its row strides must be. Programs are
  numbered in groups of rows, so that those that run at once share tiles in the second-level cache.

The compiler leaves sums in flight from one step of K to the next only if they are float32; for int32 it waits in every step (seen in its
output by 3.6 and 3.9). So steps are long, 128 or 256 columns, and two warp groups or two programs share an SM.

The aim is 1.6 times torch's bf16 product from 2048 tokens on. No GPU has run this yet, so whether it is reached is not known. By an H200's
limits, 4096 tokens through 4096 x 4096 take 174 us in bf16 and 87 us in int8; the quantization before takes 12 us for the 50 MB that it
moves. That leaves the product 97 us, 90 % of the limit, which is more than others' int8 products reach. At 4096 x 14336 82 % will do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from ptq_kernels.quantize_rows import Quantized
from ptq_kernels.tile_config import TileConfig, config_for, gpu_of

_GROUP = tl.constexpr(8)
# More counters than this are never needed: K is only split when there are few tiles.
MAX_COUNTERS = 1024
MOST_SPLITS = 16


# Where rows do not start at multiples of 16 bytes, bytes are loaded one by one, and larger tiles would not fit the registers; nor would
# the 16-bit part in float32, which has no tensor cores at full precision.
SMALL = TileConfig(block_m=32, block_n=32, block_k=64, num_warps=4, num_stages=2, ctas_per_sm=4)


@dataclass(frozen=True)
class Plan:
    """How one product runs: its tiles, the parts that K is split into, and int32 counters of those that are done, one for each tile."""

    config: TileConfig
    split_k: int = 1
    counters: Tensor | None = None


def plan(kernel: str, x: Tensor, codes: Tensor, config: TileConfig | None) -> Plan:
    """The plan for ``x`` [M, K] times ``codes`` [N, K]: by ``config``, else by the table. The counters are not yet zero."""
    (M, K), N = x.shape, len(codes)
    gpu = gpu_of(x.device)
    if config is None:
        config = config_for(kernel, gpu, N, K, M)
        if K % 16 or codes.data_ptr() % 16 or (kernel == "llm_int8" and x.dtype == torch.float32):
            config = SMALL
        assert config is not None, f"tuned/{kernel}.json ends before {M} tokens"
    tiles = _output_tiles(config, M, N)
    split_k = config.split_k or _split_k(config, tiles, K, gpu.sms)
    if split_k == 1:
        return Plan(config)
    return Plan(config, split_k, codes.new_empty(triton.next_power_of_2(tiles), dtype=torch.int32))


def _output_tiles(config: TileConfig, M: int, N: int) -> int:
    return triton.cdiv(M, config.block_m) * triton.cdiv(N, config.block_n)


def _split_k(config: TileConfig, tiles: int, K: int, sms: int) -> int:
    """Into how many parts to split K, so that ``tiles`` of the output become about ``ctas_per_sm`` programs an SM; with 0 it is whole."""
    if not config.ctas_per_sm or tiles > MAX_COUNTERS:
        return 1
    # Four tiles of K at least: a shorter loop does not fill its pipeline.
    most = max(triton.cdiv(K, config.block_k) // 4, 1)
    return min(max(config.ctas_per_sm * sms // tiles, 1), most, MOST_SPLITS)


def product(
    quantized: Quantized,
    codes: Tensor,  # int8 [N, K]
    scale: Tensor,  # [N] or [1]
    bias: Tensor | None,
    out: Tensor,  # [M, N]
    plan: Plan,  # its counters zero
    slots: Tensor | None = None,  # int32 [K], with outlier_weight
    outlier_weight: Tensor | None = None,  # [N, k]
) -> None:
    """Fills ``out``; with ``outlier_weight``, with what ``quantized`` holds apart."""
    M, N = out.shape
    arguments = {"token_scale": quantized.scale, "scale": scale, "bias": bias, "out": out, "M": M, "N": N, "K": codes.shape[1]}
    arguments |= {"PER_TOKEN": len(quantized.scale) == M and M > 1, "PER_CHANNEL": len(scale) > 1}
    arguments |= _operands(quantized.codes, codes, plan.config) | _launched(plan, codes, M, N)
    grid = (_output_tiles(plan.config, M, N), plan.split_k)
    if outlier_weight is None:
        w8a8_kernel[grid](**arguments)
        return
    assert quantized.outliers is not None
    llm_int8_kernel[grid](
        **arguments,
        weight=codes,
        outliers=quantized.outliers,
        outliers_stride=quantized.outliers.stride(0),
        outlier_weight=outlier_weight,
        stored=outlier_weight.shape[1],
        outlier_columns=quantized.columns,
        outlier_count=quantized.count,
        slots=None if quantized.columns is None else slots,
    )


def _operands(x: Tensor, codes: Tensor, config: TileConfig) -> dict[str, Any]:
    """Both int8 operands of a kernel, by name: as pointers, or as what the copy engine takes."""
    tma = config.tma and codes.shape[1] % 16 == 0 and codes.data_ptr() % 16 == 0
    left, right = x, codes
    if tma:
        left = TensorDescriptor.from_tensor(left, [config.block_m, config.block_k])
        right = TensorDescriptor.from_tensor(right, [config.block_n, config.block_k])
    return {"x": left, "x_stride": x.stride(0), "codes": right, "TMA": tma}


def _launched(plan: Plan, codes: Tensor, M: int, N: int) -> dict[str, Any]:
    """What a kernel takes of the plan, by name."""
    config, split_k = plan.config, plan.split_k
    sums = (split_k, _output_tiles(config, M, N), config.block_m, config.block_n)
    return {
        "partials": None if split_k == 1 else codes.new_empty(sums, dtype=torch.int32),
        "counters": plan.counters,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "SPLIT_K": split_k,
        "WEIGHT_LEFT": config.weight_left,
        "MASK": codes.shape[1] % config.block_k != 0,
        # Scale times sum plus bias in two roundings, as the reference has it.
        "enable_fp_fusion": False,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "PDL": config.pdl,
        "launch_pdl": config.pdl,
    }


@triton.jit(do_not_specialize=["M"])
def w8a8_kernel(
    x, x_stride, codes, token_scale, scale, bias, out, partials, counters, M, N, K,
    PER_TOKEN: tl.constexpr, PER_CHANNEL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr, WEIGHT_LEFT: tl.constexpr, MASK: tl.constexpr, TMA: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``out[m, n] = token_scale[m] scale[n] sum_k x[m, k] codes[n, k] + bias[n]``, x int8 [M, x_stride], codes int8 [N, K]."""
    if PDL:
        gdc_wait()
    m, n = _tile(M, N, BLOCK_M, BLOCK_N)
    sums = _sums(x, x_stride, codes, M, N, K, m, n, BLOCK_M, BLOCK_N, BLOCK_K, SPLIT_K, WEIGHT_LEFT, MASK, TMA)
    if SPLIT_K > 1:
        if not _is_last(sums, partials, counters, M - m, BLOCK_M, BLOCK_N, SPLIT_K):
            return
        sums = _total(partials, M - m, BLOCK_M, BLOCK_N, SPLIT_K)
    scaled = _scaled(sums, token_scale, scale, M, N, m, n, BLOCK_M, BLOCK_N, PER_TOKEN, PER_CHANNEL)
    _store(scaled, bias, out, M, N, m, n, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["M", "stored"])
def llm_int8_kernel(
    x, x_stride, codes, token_scale, scale, bias, out, partials, counters, M, N, K,
    weight, outliers, outliers_stride, outlier_weight, stored, outlier_columns, outlier_count, slots,
    PER_TOKEN: tl.constexpr, PER_CHANNEL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr, WEIGHT_LEFT: tl.constexpr, MASK: tl.constexpr, TMA: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``w8a8_kernel`` plus the product of ``outliers`` [M, k] with their columns of the weight. ``weight``: ``codes`` as a pointer."""
    if PDL:
        gdc_wait()
    m, n = _tile(M, N, BLOCK_M, BLOCK_N)
    sums = _sums(x, x_stride, codes, M, N, K, m, n, BLOCK_M, BLOCK_N, BLOCK_K, SPLIT_K, WEIGHT_LEFT, MASK, TMA)
    if SPLIT_K > 1:
        if not _is_last(sums, partials, counters, M - m, BLOCK_M, BLOCK_N, SPLIT_K):
            return
        sums = _total(partials, M - m, BLOCK_M, BLOCK_N, SPLIT_K)
    scaled = _scaled(sums, token_scale, scale, M, N, m, n, BLOCK_M, BLOCK_N, PER_TOKEN, PER_CHANNEL)
    scaled = _add_outliers(
        scaled, weight, scale, outliers, outliers_stride, outlier_weight, stored, outlier_columns, outlier_count, slots,
        M, N, K, m, n, BLOCK_M, BLOCK_N, PER_CHANNEL, WEIGHT_LEFT,
    )  # fmt: skip
    _store(scaled, bias, out, M, N, m, n, BLOCK_M, BLOCK_N)


@triton.jit
def _tile(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """First row and first output of this program's tile: down _GROUP tiles of M, then on to the next tile of outputs."""
    program = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    in_group = _GROUP * tl.cdiv(N, BLOCK_N)
    first = program // in_group * _GROUP
    height = tl.minimum(tiles_m - first, _GROUP)
    return (first + program % in_group % height) * BLOCK_M, program % in_group // height * BLOCK_N


@triton.jit
def _sums(
    x, x_stride, codes, M, N, K, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr, WEIGHT_LEFT: tl.constexpr, MASK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """This split's sums over K, int32 [BLOCK_M, BLOCK_N]."""
    length = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K) * BLOCK_K
    start = tl.program_id(1) * length
    stop = tl.minimum(start + length, K)
    sums = tl.zeros([BLOCK_N, BLOCK_M] if WEIGHT_LEFT else [BLOCK_M, BLOCK_N], tl.int32)
    if TMA:
        for k in range(start, stop, BLOCK_K):
            sums = _add(sums, x.load([m, k]), codes.load([n, k]), WEIGHT_LEFT)
    else:
        # Beyond the last row its values are read again: that needs no mask, and those results are not stored.
        row = tl.minimum(tl.arange(0, BLOCK_M), M - m - 1)[:, None]
        out = tl.minimum(tl.arange(0, BLOCK_N), N - n - 1)[:, None]
        offs = tl.arange(0, BLOCK_K)
        left = x + m.to(tl.int64) * x_stride + start + (row * x_stride + offs[None, :])
        right = codes + n.to(tl.int64) * K + start + (out * K + offs[None, :])
        for k in range(start, stop, BLOCK_K):
            if MASK:
                a = tl.load(left, mask=(offs < x_stride - k)[None, :], other=0)
                b = tl.load(right, mask=(offs < K - k)[None, :], other=0)
            else:
                a = tl.load(left)
                b = tl.load(right)
            sums = _add(sums, a, b, WEIGHT_LEFT)
            left += BLOCK_K
            right += BLOCK_K
    return tl.trans(sums) if WEIGHT_LEFT else sums


@triton.jit
def _add(sums, x, codes, WEIGHT_LEFT: tl.constexpr):
    if WEIGHT_LEFT:
        return tl.dot(codes, tl.trans(x), sums, out_dtype=tl.int32)
    else:
        return tl.dot(x, tl.trans(codes), sums, out_dtype=tl.int32)


@triton.jit
def _is_last(sums, partials, counters, height, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT_K: tl.constexpr):
    """Stores this split's sums; whether it is the last of its tile, to which then all are visible."""
    place, inside = _place(partials, tl.program_id(1), height, BLOCK_M, BLOCK_N)
    tl.store(place, sums, mask=inside)
    # The barrier orders the stores of all threads before the release by the one that counts.
    tl.debug_barrier()
    return tl.atomic_add(counters + tl.program_id(0), 1, sem="acq_rel") == SPLIT_K - 1


@triton.jit
def _total(partials, height, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT_K: tl.constexpr):
    """Sums of all splits of this tile."""
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for split in range(SPLIT_K):
        place, inside = _place(partials, split, height, BLOCK_M, BLOCK_N)
        # Past the first-level cache, which does not follow what other SMs write.
        total += tl.load(place, mask=inside, other=0, cache_modifier=".cg")
    return total


@triton.jit
def _place(partials, split, height, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where ``split`` of this tile lies, and which of its rows are among the ``height`` that remain.

    Tile by tile, not like ``out``: offsets are constants, which take no registers, and 16 bytes go at once for any N.
    """
    row = tl.arange(0, BLOCK_M)[:, None]
    first = (split * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * (BLOCK_M * BLOCK_N)
    return partials + first + (row * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]), row < height


@triton.jit
def _scaled(
    sums, token_scale, scale, M, N, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PER_TOKEN: tl.constexpr, PER_CHANNEL: tl.constexpr
):  # fmt: skip
    """Sums times both scales, float32 [BLOCK_M, BLOCK_N], in the order of the reference."""
    if PER_TOKEN:
        row = m + tl.arange(0, BLOCK_M)
        scaled = sums.to(tl.float32) * tl.load(token_scale + row, mask=row < M, other=0)[:, None]
    else:
        scaled = sums.to(tl.float32) * tl.load(token_scale)
    return scaled * _channel_scale(scale, N, n, BLOCK_N, PER_CHANNEL)[None, :]


@triton.jit
def _channel_scale(scale, N, n, BLOCK_N: tl.constexpr, PER_CHANNEL: tl.constexpr):
    out = n + tl.arange(0, BLOCK_N)
    return tl.load(scale + (out if PER_CHANNEL else out * 0), mask=out < N, other=0).to(tl.float32)


@triton.jit
def _add_outliers(
    scaled, weight, scale, outliers, outliers_stride, outlier_weight, stored, outlier_columns, outlier_count, slots,
    M, N, K, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PER_CHANNEL: tl.constexpr, WEIGHT_LEFT: tl.constexpr,
):  # fmt: skip
    """``scaled`` plus the 16-bit product of the columns that were split off; the weight's are stored, or dequantized here.

    outlier_columns: None, if they are exactly those that are stored.
    """
    DYNAMIC: tl.constexpr = outlier_columns is not None
    row = tl.minimum(tl.arange(0, BLOCK_M), M - m - 1)[:, None]
    out = tl.minimum(tl.arange(0, BLOCK_N), N - n - 1)[:, None]
    outliers += m.to(tl.int64) * outliers_stride
    outlier_weight += n.to(tl.int64) * stored
    weight += n.to(tl.int64) * K
    number = tl.load(outlier_count) if DYNAMIC else stored
    sums = tl.trans(scaled) if WEIGHT_LEFT else scaled
    # One stage: the loop is short, and its buffers must not crowd out those of the other.
    BLOCK: tl.constexpr = 16 if DYNAMIC else 32
    for start in tl.range(0, number, BLOCK, num_stages=1):
        offs = start + tl.arange(0, BLOCK)
        inside = (offs < number)[None, :]
        x = tl.load(outliers + row * outliers_stride + offs[None, :], mask=inside, other=0)
        if DYNAMIC:
            column = tl.load(outlier_columns + offs, mask=offs < number, other=0)
            slot = tl.load(slots + column, mask=offs < number, other=-1)[None, :]
            code = tl.load(weight + out * K + column[None, :], mask=inside & (slot < 0), other=0)
            dequantized = code.to(tl.float32) * _channel_scale(scale, N, n, BLOCK_N, PER_CHANNEL)[:, None]
            kept = tl.load(outlier_weight + out * stored + slot, mask=slot >= 0, other=0).to(x.dtype)
            w = tl.where(slot >= 0, kept, dequantized.to(x.dtype))
        else:
            w = tl.load(outlier_weight + out * stored + offs[None, :], mask=inside, other=0).to(x.dtype)
        if WEIGHT_LEFT:
            sums = tl.dot(w, tl.trans(x), sums, input_precision="ieee")
        else:
            sums = tl.dot(x, tl.trans(w), sums, input_precision="ieee")
    return tl.trans(sums) if WEIGHT_LEFT else sums


@triton.jit
def _store(scaled, bias, out, M, N, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    if bias is not None:
        column = n + tl.arange(0, BLOCK_N)
        scaled += tl.load(bias + column, mask=column < N, other=0).to(tl.float32)[None, :]
    # Offsets in 32 bits from the start of the tile's first row, though the whole may need more.
    row = tl.arange(0, BLOCK_M)[:, None]
    column = n + tl.arange(0, BLOCK_N)[None, :]
    place = out + m.to(tl.int64) * N + (row * N + column)
    tl.store(place, scaled.to(out.dtype.element_ty), mask=(row < M - m) & (column < N))
