"""Products of int8 codes in Triton, for W8A8 and LLM.int8. Importing this needs triton, not a GPU.

Both operands lie with K innermost, as the tensor cores want bytes: nothing is transposed or shuffled, at load or later. Sums are int32
and exact, so no order of them can be seen; scales and bias come once, in float32, at the end.

Three things depend on M (the table ``tuned/w8a8.json`` says where they change):

- Few tokens: the weight is the left operand (``weight_left``). A tile of the left operand has at least 64 rows, of the right one 8.
- Few tiles: K is split, so that all processors read weights. Each part stores its sums; the last one to finish adds them up and goes on
  to the end, in the same launch. Which one is last changes from run to run, what it adds does not.
- Many tokens: tiles arrive through the copy engine (``tma``), where K is a multiple of 16, as its row strides must be. Programs are
  numbered in groups of rows, so that those that run at once share tiles in the second-level cache.

The compiler leaves sums in flight from one step of K to the next only if they are float32; for int32 it waits in every step (seen in its
output by 3.6 and 3.9). So steps are long, 128 or 256 columns, and two warp groups or two programs share a processor.

The aim is 1.6 times torch's bf16 product from 2048 tokens on. No GPU has run this yet, so whether it is reached is not known. By an H200's
limits, 4096 tokens through 4096 x 4096 take 174 us in bf16 and 87 us in int8; the quantization before takes 12 us for the 50 MB that it
moves. That leaves the product 97 us, 90 % of the limit, which is more than others' int8 products reach. At 4096 x 14336 82 % will do.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from ptq_kernels.quantize_rows import Quantized

TABLES = Path(__file__).parent / "tuned"
_GROUP = tl.constexpr(8)
# More counters than this are never needed: K is only split when there are few tiles.
MAX_COUNTERS = 1024
MOST_PARTS = 16


@dataclass(frozen=True)
class Tiling:
    """How a product is cut into programs.

    programs: K is split until a processor has about so many; 0 never splits. early: the product is launched while the activations are
    still being quantized, and waits for them inside (programmatic dependent launch, Hopper and later).
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    weight_left: bool = False
    tma: bool = False
    programs: int = 0
    early: bool = False

    def tiles(self, tokens: int, outs: int) -> int:
        """Tiles of the output."""
        return triton.cdiv(tokens, self.block_m) * triton.cdiv(outs, self.block_n)

    def parts(self, tokens: int, outs: int, columns: int, processors: int) -> int:
        """Into how many parts K is split."""
        tiles = self.tiles(tokens, outs)
        if not self.programs or tiles > MAX_COUNTERS:
            return 1
        # Four tiles of K at least: a shorter loop does not fill its pipeline.
        most = max(triton.cdiv(columns, self.block_k) // 4, 1)
        return min(max(self.programs * processors // tiles, 1), most, MOST_PARTS)


# Where rows do not start at multiples of 16 bytes, bytes are loaded one by one, and larger tiles would not fit the registers; nor would
# the 16-bit part in float32, which has no tensor cores at full precision.
SMALL = Tiling(32, 32, 64, 4, 2, programs=4)


@cache
def tilings(kernel: str, device: str, capability: int) -> tuple[tuple[int, Tiling], ...]:
    """(largest M, tiling), rising, for ``kernel``: measured ones for this device, else those for its generation, else the plainest."""
    tables = json.loads((TABLES / f"{kernel}.json").read_text(encoding="utf-8"))["tables"]
    rows = tables.get(device) or tables.get(f"sm_{capability}") or tables["default"]
    return tuple((row["up_to_m"], Tiling(**{name: row[name] for name in row if name != "up_to_m"})) for row in rows)


@dataclass(frozen=True)
class Plan:
    """How one product runs: its tiling, the parts that K is split into, and int32 counters of those that are done, one for each tile."""

    tiling: Tiling
    parts: int = 1
    counters: Tensor | None = None


def plan_for(kernel: str, tokens: Tensor, codes: Tensor, tiling: Tiling | None, parts: int | None) -> Plan:
    """The plan for ``tokens`` [M, K] times ``codes`` [N, K]: what the table says but for what is given. The counters are not yet zero."""
    rows, columns = tokens.shape
    properties = torch.cuda.get_device_properties(tokens.device) if tokens.is_cuda or tiling is None else None
    if tiling is None:
        assert properties is not None
        table = tilings(kernel, properties.name, properties.major * 10)
        tiling = next((entry for up_to, entry in table if rows <= up_to), table[-1][1])
        if columns % 16 or codes.data_ptr() % 16 or (kernel == "llm_int8" and tokens.dtype == torch.float32):
            tiling = SMALL
    if parts is None:
        parts = tiling.parts(rows, len(codes), columns, properties.multi_processor_count if properties else 1)
    if parts == 1:
        return Plan(tiling)
    return Plan(tiling, parts, codes.new_empty(triton.next_power_of_2(tiling.tiles(rows, len(codes))), dtype=torch.int32))


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
    tiling, parts = plan.tiling, plan.parts
    rows, outs = out.shape
    columns = codes.shape[1]
    tiles = tiling.tiles(rows, outs)
    tma = tiling.tma and columns % 16 == 0 and codes.data_ptr() % 16 == 0
    left, right = quantized.codes, codes
    if tma:
        left = TensorDescriptor.from_tensor(left, [tiling.block_m, tiling.block_k])
        right = TensorDescriptor.from_tensor(right, [tiling.block_n, tiling.block_k])
    arguments = {
        "x": left,
        "x_stride": quantized.codes.stride(0),
        "codes": right,
        "token_scale": quantized.scale,
        "scale": scale,
        "bias": bias,
        "out": out,
        "partials": None if parts == 1 else codes.new_empty((parts, tiles, tiling.block_m, tiling.block_n), dtype=torch.int32),
        "counters": plan.counters,
        "rows": rows,
        "outs": outs,
        "columns": columns,
        "PER_TOKEN": len(quantized.scale) == rows and rows > 1,
        "PER_OUT": len(scale) > 1,
        "BLOCK_M": tiling.block_m,
        "BLOCK_N": tiling.block_n,
        "BLOCK_K": tiling.block_k,
        "PARTS": parts,
        "WEIGHT_LEFT": tiling.weight_left,
        "MASK": columns % tiling.block_k != 0,
        "TMA": tma,
        # Scale times sum plus bias in two roundings, as the reference has it.
        "enable_fp_fusion": False,
        "num_warps": tiling.warps,
        "num_stages": tiling.stages,
        "EARLY": tiling.early,
        "launch_pdl": tiling.early,
    }
    if outlier_weight is None:
        w8a8_kernel[(tiles, parts)](**arguments)
        return
    assert quantized.outliers is not None
    llm_int8_kernel[(tiles, parts)](
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


@triton.jit(do_not_specialize=["rows"])
def w8a8_kernel(
    x, x_stride, codes, token_scale, scale, bias, out, partials, counters, rows, outs, columns,
    PER_TOKEN: tl.constexpr, PER_OUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr, WEIGHT_LEFT: tl.constexpr, MASK: tl.constexpr, TMA: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """``out[m, n] = token_scale[m] scale[n] sum_k x[m, k] codes[n, k] + bias[n]``, x int8 [M, x_stride], codes int8 [N, K]."""
    if EARLY:
        gdc_wait()
    m, n = _tile(rows, outs, BLOCK_M, BLOCK_N)
    sums = _sums(x, x_stride, codes, rows, outs, columns, m, n, BLOCK_M, BLOCK_N, BLOCK_K, PARTS, WEIGHT_LEFT, MASK, TMA)
    if PARTS > 1:
        if not _is_last(sums, partials, counters, rows - m, BLOCK_M, BLOCK_N, PARTS):
            return
        sums = _total(partials, rows - m, BLOCK_M, BLOCK_N, PARTS)
    scaled = _scaled(sums, token_scale, scale, rows, outs, m, n, BLOCK_M, BLOCK_N, PER_TOKEN, PER_OUT)
    _store(scaled, bias, out, rows, outs, m, n, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["rows", "stored"])
def llm_int8_kernel(
    x, x_stride, codes, token_scale, scale, bias, out, partials, counters, rows, outs, columns,
    weight, outliers, outliers_stride, outlier_weight, stored, outlier_columns, outlier_count, slots,
    PER_TOKEN: tl.constexpr, PER_OUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr, WEIGHT_LEFT: tl.constexpr, MASK: tl.constexpr, TMA: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """``w8a8_kernel`` plus the product of ``outliers`` [M, k] with their columns of the weight. ``weight``: ``codes`` as a pointer."""
    if EARLY:
        gdc_wait()
    m, n = _tile(rows, outs, BLOCK_M, BLOCK_N)
    sums = _sums(x, x_stride, codes, rows, outs, columns, m, n, BLOCK_M, BLOCK_N, BLOCK_K, PARTS, WEIGHT_LEFT, MASK, TMA)
    if PARTS > 1:
        if not _is_last(sums, partials, counters, rows - m, BLOCK_M, BLOCK_N, PARTS):
            return
        sums = _total(partials, rows - m, BLOCK_M, BLOCK_N, PARTS)
    scaled = _scaled(sums, token_scale, scale, rows, outs, m, n, BLOCK_M, BLOCK_N, PER_TOKEN, PER_OUT)
    scaled = _add_outliers(
        scaled, weight, scale, outliers, outliers_stride, outlier_weight, stored, outlier_columns, outlier_count, slots,
        rows, outs, columns, m, n, BLOCK_M, BLOCK_N, PER_OUT, WEIGHT_LEFT,
    )  # fmt: skip
    _store(scaled, bias, out, rows, outs, m, n, BLOCK_M, BLOCK_N)


@triton.jit
def _tile(rows, outs, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """First row and first output of this program's tile: down _GROUP tiles of rows, then on to the next tile of outputs."""
    program = tl.program_id(0)
    tiles_m = tl.cdiv(rows, BLOCK_M)
    in_group = _GROUP * tl.cdiv(outs, BLOCK_N)
    first = program // in_group * _GROUP
    height = tl.minimum(tiles_m - first, _GROUP)
    return (first + program % in_group % height) * BLOCK_M, program % in_group // height * BLOCK_N


@triton.jit
def _sums(
    x, x_stride, codes, rows, outs, columns, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr, WEIGHT_LEFT: tl.constexpr, MASK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """This part's sums over K, int32 [BLOCK_M, BLOCK_N]."""
    length = tl.cdiv(tl.cdiv(columns, BLOCK_K), PARTS) * BLOCK_K
    start = tl.program_id(1) * length
    stop = tl.minimum(start + length, columns)
    sums = tl.zeros([BLOCK_N, BLOCK_M] if WEIGHT_LEFT else [BLOCK_M, BLOCK_N], tl.int32)
    if TMA:
        for k in range(start, stop, BLOCK_K):
            sums = _add(sums, x.load([m, k]), codes.load([n, k]), WEIGHT_LEFT)
    else:
        # Beyond the last row its values are read again: that needs no mask, and those results are not stored.
        row = tl.minimum(tl.arange(0, BLOCK_M), rows - m - 1)[:, None]
        out = tl.minimum(tl.arange(0, BLOCK_N), outs - n - 1)[:, None]
        offs = tl.arange(0, BLOCK_K)
        left = x + m.to(tl.int64) * x_stride + start + (row * x_stride + offs[None, :])
        right = codes + n.to(tl.int64) * columns + start + (out * columns + offs[None, :])
        for k in range(start, stop, BLOCK_K):
            if MASK:
                a = tl.load(left, mask=(offs < x_stride - k)[None, :], other=0)
                b = tl.load(right, mask=(offs < columns - k)[None, :], other=0)
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
def _is_last(sums, partials, counters, height, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr):
    """Stores this part's sums; whether it is the last of its tile, to which then all are visible."""
    place, inside = _place(partials, tl.program_id(1), height, BLOCK_M, BLOCK_N)
    tl.store(place, sums, mask=inside)
    # The barrier orders the stores of all threads before the release by the one that counts.
    tl.debug_barrier()
    return tl.atomic_add(counters + tl.program_id(0), 1, sem="acq_rel") == PARTS - 1


@triton.jit
def _total(partials, height, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr):
    """Sums of all parts of this tile."""
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for part in range(PARTS):
        place, inside = _place(partials, part, height, BLOCK_M, BLOCK_N)
        # Past the first-level cache, which does not follow what other processors write.
        total += tl.load(place, mask=inside, other=0, cache_modifier=".cg")
    return total


@triton.jit
def _place(partials, part, height, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where ``part`` of this tile lies, and which of its rows are among the ``height`` that remain.

    Tile by tile, not like ``out``: offsets are constants, which take no registers, and 16 bytes go at once for any N.
    """
    row = tl.arange(0, BLOCK_M)[:, None]
    first = (part * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * (BLOCK_M * BLOCK_N)
    return partials + first + (row * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]), row < height


@triton.jit
def _scaled(
    sums, token_scale, scale, rows, outs, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PER_TOKEN: tl.constexpr, PER_OUT: tl.constexpr
):  # fmt: skip
    """Sums times both scales, float32 [BLOCK_M, BLOCK_N], in the order of the reference."""
    if PER_TOKEN:
        row = m + tl.arange(0, BLOCK_M)
        scaled = sums.to(tl.float32) * tl.load(token_scale + row, mask=row < rows, other=0)[:, None]
    else:
        scaled = sums.to(tl.float32) * tl.load(token_scale)
    return scaled * _out_scale(scale, outs, n, BLOCK_N, PER_OUT)[None, :]


@triton.jit
def _out_scale(scale, outs, n, BLOCK_N: tl.constexpr, PER_OUT: tl.constexpr):
    out = n + tl.arange(0, BLOCK_N)
    return tl.load(scale + (out if PER_OUT else out * 0), mask=out < outs, other=0).to(tl.float32)


@triton.jit
def _add_outliers(
    scaled, weight, scale, outliers, outliers_stride, outlier_weight, stored, outlier_columns, outlier_count, slots,
    rows, outs, columns, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PER_OUT: tl.constexpr, WEIGHT_LEFT: tl.constexpr,
):  # fmt: skip
    """``scaled`` plus the 16-bit product of the columns that were split off; the weight's are stored, or dequantized here.

    outlier_columns: None, if they are exactly those that are stored.
    """
    DYNAMIC: tl.constexpr = outlier_columns is not None
    row = tl.minimum(tl.arange(0, BLOCK_M), rows - m - 1)[:, None]
    out = tl.minimum(tl.arange(0, BLOCK_N), outs - n - 1)[:, None]
    outliers += m.to(tl.int64) * outliers_stride
    outlier_weight += n.to(tl.int64) * stored
    weight += n.to(tl.int64) * columns
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
            code = tl.load(weight + out * columns + column[None, :], mask=inside & (slot < 0), other=0)
            dequantized = code.to(tl.float32) * _out_scale(scale, outs, n, BLOCK_N, PER_OUT)[:, None]
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
def _store(scaled, bias, out, rows, outs, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    if bias is not None:
        column = n + tl.arange(0, BLOCK_N)
        scaled += tl.load(bias + column, mask=column < outs, other=0).to(tl.float32)[None, :]
    # Offsets in 32 bits from the start of the tile's first row, though the whole may need more.
    row = tl.arange(0, BLOCK_M)[:, None]
    column = n + tl.arange(0, BLOCK_N)[None, :]
    place = out + m.to(tl.int64) * outs + (row * outs + column)
    tl.store(place, scaled.to(out.dtype.element_ty), mask=(row < rows - m) & (column < outs))
