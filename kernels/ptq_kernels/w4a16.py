"""A linear layer with 4-bit or 8-bit weights and 16-bit inputs: ``y = x W^T + b``, ``W[n, k] = (code[n, k] - zero[n, g]) * scale[n, g]``.

At a few tokens the time is that of reading the weights, so the kernel reads each code once, in the order that ``packing`` lays down, and
turns it into a float in registers (``w4a16_kernels``). Three choices depend on the numbers of rows, columns and tokens:

    scale    of few tokens, the float32 sums of a group are scaled: one multiplication for a group, and an exact weight in the product. Of
             many, the weights are, rounded once to 16 bits as the reference does.
    splits   a weight of 4096 rows has 64 blocks, half as many as a large GPU has processors. So K is split among programs, each writes
             its float32 sums to a workspace of its own, and a second kernel adds them up in order: no atomics, the same bits each time.
    product  with so many tokens that arithmetic takes longer than reading, the weight is expanded and given to torch's own product.

They are made from ``tuned/w4a16.json``, by the GPU's name or else by the generation it belongs to. Left out: a column order inside the
kernel (the columns of x are gathered beforehand, a pass over x and not over the weights).

On a machine without a GPU the operator runs the reference.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import resources
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ptq_kernels.layout import pack_codes
from ptq_kernels.packing import TILE_COLUMNS, TILE_ROWS, unpack_groups, unpack_tiles
from ptq_kernels.reference import dequantize

GROUP_SIZES = (32, 64, 128, -1)
DEQUANTIZE_BLOCK = (64, 128)  # rows, columns of a program
OPERATIONS_PER_BYTE = 180  # that an H200 does in the time in which it reads a byte; others are near


@dataclass(frozen=True)
class Config:
    """How the fused kernel is launched.

    block_m, block_n, block_k: tokens, rows and columns of a program's step. fold: scale the weights, not the sums. per_processor: programs
    that one processor of the GPU is meant to run at a time, from which the number of splits follows, unless ``splits`` says it.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    per_processor: int
    fold: bool = False
    splits: int | None = None

    def fitted(self, group_size: int, bits: int) -> Config:
        """This with steps that the group size allows; ``group_size`` 0 stands for whole rows.

        Scaled sums need a step within one group. Steps of 32 columns would read half of each 16 bytes, so such groups scale the weights.
        """
        fold = self.fold or 0 < group_size < 64
        block_k = max(self.block_k, TILE_COLUMNS[bits])
        if group_size and not fold:
            block_k = min(block_k, group_size)
        return dataclasses.replace(self, fold=fold, block_k=block_k)


@torch.library.custom_op("ptq_kernels::w4a16", mutates_args=())
def w4a16(
    x: Tensor,  # [..., K]
    packed: Tensor,  # int32, from packing.pack_tiles
    scale: Tensor,  # [G, N rounded up], from packing.pack_groups
    zero: Tensor | None,  # int16, likewise; None: 2^(bits-1) everywhere
    bits: int,
    group_size: int,
    N: int,
    bias: Tensor | None = None,  # [N]
    perm: Tensor | None = None,  # int32 [K]
) -> Tensor:
    """``x`` (float16 or bfloat16) times the packed weight, [..., N] in ``x.dtype``.

    group_size: 32, 64, 128, or -1 for whole rows. perm: the weight's column k is multiplied with ``x[..., perm[k]]``, for files whose
    columns were sorted by group. Raises TypeError or ValueError, naming the argument, when a dtype, shape or layout does not fit.
    """
    check_w4a16(x, packed, scale, zero, bits, group_size, N, bias, perm)
    ordered = x if perm is None else x.index_select(-1, perm)
    codes = pack_codes(unpack_tiles(packed, bits, N, x.shape[-1]), bits)
    zeros = None if zero is None else unpack_groups(zero, N).to(torch.uint8)
    weight = dequantize(codes, unpack_groups(scale, N), zeros, bits, x.shape[-1], x.dtype)
    return functional.linear(ordered, weight, bias)


@w4a16.register_fake
def _shape_only(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    N: int,
    bias: Tensor | None = None,
    perm: Tensor | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], N))


@w4a16.register_kernel("cuda")
def _on_cuda(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    N: int,
    bias: Tensor | None = None,
    perm: Tensor | None = None,
) -> Tensor:
    check_w4a16(x, packed, scale, zero, bits, group_size, N, bias, perm)
    ordered = x if perm is None else x.index_select(-1, perm)
    tokens = ordered.reshape(-1, x.shape[-1])
    config = config_for(gpu_of(x.device), N, x.shape[-1], len(tokens), bits)
    with torch.cuda.device_of(x):
        if config is None:
            weight = dequantized(packed, scale, zero, bits, group_size, N, x.shape[-1], x.dtype)
            return functional.linear(ordered, weight, bias)
        return launch(tokens, packed, scale, zero, bits, group_size, N, bias, config).view(*x.shape[:-1], N)


def check_w4a16(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    N: int,
    bias: Tensor | None,
    perm: Tensor | None,
) -> None:
    """The contract of ``w4a16``; what the codes and the column order hold is not looked at."""
    if bits not in TILE_COLUMNS:
        raise ValueError(f"bits must be one of {tuple(TILE_COLUMNS)}, not {bits}")
    if x.dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"x must be float16 or bfloat16, not {x.dtype}")
    if x.dim() == 0:
        raise ValueError("x must have one dimension at least, the columns")
    columns = x.shape[-1]
    if group_size not in GROUP_SIZES or columns % group_size:
        raise ValueError(f"group_size must be one of {GROUP_SIZES} and divide the {columns} columns of x, not {group_size}")
    groups = 1 if group_size == -1 else columns // group_size
    row_tiles, column_tiles = -(-N // TILE_ROWS), -(-columns // TILE_COLUMNS[bits])
    expected: dict[str, tuple[Tensor | None, torch.dtype, tuple[int, ...]]] = {
        "packed": (packed, torch.int32, (row_tiles, column_tiles, 128, 4)),
        "scale": (scale, x.dtype, (groups, row_tiles * TILE_ROWS)),
        "zero": (zero, torch.int16, (groups, row_tiles * TILE_ROWS)),
        "bias": (bias, x.dtype, (N,)),
        "perm": (perm, torch.int32, (columns,)),
    }
    for name, (tensor, dtype, shape) in expected.items():
        if tensor is not None:
            _expect(name, tensor, dtype, shape, x.device)


def _expect(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, not {tensor.dtype}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, not {list(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} as x is, not on {tensor.device}")


def launch(
    x: Tensor,  # [M, K]
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    N: int,
    bias: Tensor | None,
    config: Config,
) -> Tensor:
    """The fused kernel with a given configuration, [M, N]. Tensors of the CPU need Triton's interpreter. Checks nothing."""
    from ptq_kernels import w4a16_kernels as kernels

    tokens, columns = x.shape
    out = x.new_empty((tokens, N))
    if out.numel() == 0:
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    plan = _plan(gpu_of(x.device), config, x.dtype, bits, group_size, tokens, N, columns, zero is not None, bias is not None)
    whole = plan.splits == 1
    target = out if whole else x.new_empty((plan.splits, tokens, N), dtype=torch.float32)
    kernels.w4a16_kernel[plan.grid](
        x,
        packed,
        scale.view(torch.int32),
        None if zero is None else zero.view(torch.int32),
        bias if whole else None,
        target,
        tokens,
        N,
        columns,
        len(scale),
        packed.shape[0],
        packed.shape[1],
        x.stride(0),
        plan.splits,
        **plan.options,
    )
    if not whole:
        kernels.reduce_kernel[(-(-out.numel() // 1024),)](target, bias, out, out.numel(), N, plan.splits, **plan.reduce_options)
    return out


@dataclass(frozen=True)
class _Plan:
    """What a launch needs besides the tensors: the programs, the parts that K is split into, what both kernels are compiled with."""

    grid: tuple[int, int, int]
    splits: int
    options: dict[str, Any]
    reduce_options: dict[str, Any]


@lru_cache(maxsize=4096)  # decoding asks for the same few again and again, and deciding takes as long as launching
def _plan(
    gpu: GPU, config: Config, dtype: torch.dtype, bits: int, group_size: int, tokens: int, rows: int, columns: int, zeros: bool, bias: bool
) -> _Plan:
    group = _group(group_size, columns)
    config = config.fitted(group, bits)
    blocks = (-(-rows // config.block_n), -(-tokens // config.block_m))
    steps = -(-columns // config.block_k)
    programs = config.per_processor * gpu.processors
    splits = config.splits or _splits(blocks[0] * blocks[1], steps, programs, _partial_steps(config, tokens, bits))
    splits = min(splits, steps)
    overlap = gpu.capability >= 90
    launched: dict[str, Any] = {"OVERLAP": overlap, **({"launch_pdl": True} if overlap else {})}
    options = constants(config, dtype, bits, group, zeros, bias and splits == 1, gpu.capability > 0)
    options |= {"EVEN": columns % config.block_k == 0, "num_warps": config.warps, **launched}
    return _Plan((*blocks, splits), splits, options, {"BIAS": bias, "BLOCK": 1024, "num_warps": 4, **launched})


def dequantized(
    packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int, rows: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """The weight in ``dtype``, [rows, columns], by the Triton kernel. Checks nothing."""
    from ptq_kernels import w4a16_kernels as kernels

    out = torch.empty((rows, columns), dtype=dtype, device=packed.device)
    block_n, block_k = DEQUANTIZE_BLOCK
    group = _group(group_size, columns)
    kernels.dequantize_kernel[(-(-columns // block_k), -(-rows // block_n))](
        packed,
        scale.view(torch.int32),
        None if zero is None else zero.view(torch.int32),
        out,
        rows,
        columns,
        len(scale),
        packed.shape[0],
        packed.shape[1],
        DTYPE=_triton_dtype(dtype),
        BITS=bits,
        GROUP=group,
        ZEROS=zero is not None,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        ASSEMBLY=kernels.assembly(bits, dtype == torch.bfloat16, True) if packed.is_cuda else "",
        num_warps=4,
    )
    return out


def constants(config: Config, dtype: torch.dtype, bits: int, group: int, zeros: bool, bias: bool, assembly: bool) -> dict[str, Any]:
    """What the fused kernel is specialised on, but for EVEN and OVERLAP. ``config`` is a fitted one, ``group`` 0 for whole rows."""
    from ptq_kernels import w4a16_kernels as kernels

    return {
        "DTYPE": _triton_dtype(dtype),
        "BITS": bits,
        "GROUP": group,
        "ZEROS": zeros,
        "BIAS": bias,
        "FOLD": config.fold,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "STAGES": config.stages,
        "ASSEMBLY": kernels.assembly(bits, dtype == torch.bfloat16, config.fold) if assembly else "",
    }


def _triton_dtype(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]


def _group(group_size: int, columns: int) -> int:
    return 0 if group_size in (-1, columns) else group_size


def _splits(blocks: int, steps: int, programs: int, partial: float) -> int:
    """Into how many parts to split K: those with the least time, in steps, for ``programs`` that run at a time.

    A program waits about two steps' time for its first data. A split one writes its sums for another to read, which takes ``partial``
    steps, and the second kernel takes one more to begin.
    """

    def time(splits: int) -> float:
        waves = -(-blocks * splits // programs)
        return waves * (-(-steps // splits) + 2 + (partial if splits > 1 else 0)) + (splits > 1)

    return min(range(1, min(steps, 32) + 1), key=time)


def _partial_steps(config: Config, tokens: int, bits: int) -> float:
    """How many steps' time it takes to write the float32 sums of a block and to read them again.

    A step takes as long as reading its codes or as multiplying them, whichever is longer.
    """
    columns = min(tokens, config.block_m)  # of the block, which is transposed; the others are not stored
    step = config.block_k * max(bits / 8, 2 * columns / OPERATIONS_PER_BYTE)  # for each row, in bytes of memory traffic
    return 8 * columns / step


@dataclass(frozen=True)
class GPU:
    name: str
    capability: int  # 90 for 9.0
    processors: int


@cache
def gpu_of(device: torch.device) -> GPU:
    if device.type != "cuda":
        return GPU(device.type, 0, 1)
    properties = torch.cuda.get_device_properties(device)
    return GPU(properties.name, 10 * properties.major + properties.minor, properties.multi_processor_count)


@lru_cache(maxsize=4096)
def config_for(gpu: GPU, rows: int, columns: int, tokens: int, bits: int) -> Config | None:
    """The tables' entry; None where the weight is to be expanded first.

    A table under the GPU's own name goes before that of its generation, and in each the entries for this very shape before those for
    any. The first of these four that has entries counts, so that a table may leave out what it has nothing to say about; of its
    entries the first for at least so many tokens.
    """
    for table in tables_for(gpu.name, gpu.capability):
        entries = [entry for entry in table if entry["bits"] == bits]
        own = [entry for entry in entries if entry.get("shape") == [rows, columns]]
        if chosen := own or [entry for entry in entries if "shape" not in entry]:
            return next((Config(**entry["config"]) for entry in chosen if tokens <= entry["up_to"]), None)
    return None


@cache
def tables_for(name: str, capability: int) -> tuple[list[dict[str, Any]], ...]:
    """The entries for a GPU: those under its name, then those of the latest generation not later than its own, else of the earliest.

    A name in place of entries refers to another table: sm_120 has the matrix instructions and the shared memory of sm_86.
    """
    tables = _tables()
    generations = sorted(int(key[3:]) for key in tables if key.startswith("sm_"))
    known = [generation for generation in generations if generation <= capability]
    found = [tables[key] for key in (name, f"sm_{known[-1] if known else generations[0]}") if key in tables]
    return tuple(tables[entries] if isinstance(entries, str) else entries for entries in found)


@cache
def _tables() -> dict[str, Any]:
    return json.loads((resources.files("ptq_kernels") / "tuned" / "w4a16.json").read_text(encoding="utf-8"))


def configs() -> Iterator[tuple[str, int, Config]]:
    """Every configuration in the tables: the key of its table, bits, configuration."""
    for name, entries in _tables().items():
        for entry in [] if isinstance(entries, str) else entries:
            yield name, entry["bits"], Config(**entry["config"])
