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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
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
    config = config_for(_gpu(x.device), N, x.shape[-1], len(tokens), bits)
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
    group = _group(group_size, columns)
    config = config.fitted(group, bits)
    gpu = _gpu(x.device)
    blocks = (-(-N // config.block_n), -(-tokens // config.block_m))
    steps = -(-columns // config.block_k)
    splits = min(config.splits or _splits(blocks[0] * blocks[1], steps, config.per_processor * gpu.processors), steps)
    target = out if splits == 1 else x.new_empty((splits, tokens, N), dtype=torch.float32)
    overlap = gpu.capability >= 90
    options: dict[str, Any] = {"launch_pdl": True} if overlap else {}
    grid = (*blocks, splits)
    kernels.w4a16_kernel[grid](
        x,
        packed,
        scale.view(torch.int32),
        None if zero is None else zero.view(torch.int32),
        bias if splits == 1 else None,
        target,
        tokens,
        N,
        columns,
        len(scale),
        packed.shape[0],
        packed.shape[1],
        x.stride(0),
        splits,
        EVEN=columns % config.block_k == 0,
        OVERLAP=overlap,
        num_warps=config.warps,
        **constants(config, x.dtype, bits, group, zero is not None, bias is not None and splits == 1, x.is_cuda),
        **options,
    )
    if splits > 1:
        kernels.reduce_kernel[(-(-out.numel() // 1024),)](
            target, bias, out, out.numel(), N, splits, BIAS=bias is not None, BLOCK=1024, OVERLAP=overlap, num_warps=4, **options
        )
    return out


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


def _splits(blocks: int, steps: int, programs: int) -> int:
    """Into how many parts to split K: those with the least time, in steps, for ``programs`` that run at a time.

    A program waits about two steps' time for its first data, and a split weight costs another for adding up.
    """

    def time(splits: int) -> int:
        waves = -(-blocks * splits // programs)
        return waves * (-(-steps // splits) + 2) + (splits > 1)

    return min(range(1, min(steps, 32) + 1), key=time)


@dataclass(frozen=True)
class _GPU:
    name: str
    capability: int  # 90 for 9.0
    processors: int


@cache
def _gpu(device: torch.device) -> _GPU:
    if device.type != "cuda":
        return _GPU(device.type, 0, 1)
    properties = torch.cuda.get_device_properties(device)
    return _GPU(properties.name, 10 * properties.major + properties.minor, properties.multi_processor_count)


def config_for(gpu: _GPU, rows: int, columns: int, tokens: int, bits: int) -> Config | None:
    """The table's entry; None where the weight is to be expanded first.

    Entries for this very shape go before those for any; of each, the first for at least so many tokens counts.
    """
    entries = [entry for entry in _table(gpu.name, gpu.capability) if entry["bits"] == bits]
    own = [entry for entry in entries if entry.get("shape") == [rows, columns]]
    for entry in own or [entry for entry in entries if "shape" not in entry]:
        if tokens <= entry["up_to"]:
            return Config(**entry["config"])
    return None


@cache
def _table(name: str, capability: int) -> list[dict[str, Any]]:
    """The entries for a GPU: under its name, else of the latest generation that is not later than its own, else of the earliest.

    A name in place of entries refers to another table: sm_120 has the matrix instructions and the shared memory of sm_86.
    """
    tables = _tables()
    generations = sorted(int(key[3:]) for key in tables if key.startswith("sm_"))
    known = [generation for generation in generations if generation <= capability]
    found = tables.get(name, tables[f"sm_{known[-1] if known else generations[0]}"])
    return tables[found] if isinstance(found, str) else found


@cache
def _tables() -> dict[str, Any]:
    return json.loads((resources.files("ptq_kernels") / "tuned" / "w4a16.json").read_text(encoding="utf-8"))


def configs() -> Iterator[tuple[str, int, Config]]:
    """Every configuration in the tables: the key of its table, bits, configuration."""
    for name, entries in _tables().items():
        for entry in [] if isinstance(entries, str) else entries:
            yield name, entry["bits"], Config(**entry["config"])


def candidates(tokens: int) -> list[Config]:
    """Configurations worth timing for so many tokens."""
    block_m = min(max(16, 1 << (tokens - 1).bit_length()), 128)
    found = []
    for block_n, block_k, stages in [
        (64, 64, 4),
        (64, 64, 6),
        (64, 128, 3),
        (64, 128, 4),
        (64, 128, 6),
        (128, 64, 4),
        (128, 128, 3),
        (128, 128, 4),
    ]:
        for warps in (4, 8) if block_n == 128 else (4,):
            for per_processor in (1, 2, 3, 4):
                for fold in (False, True):
                    found.append(Config(block_m, block_n, block_k, warps, stages, per_processor, fold))
    return found


def tune(
    x: Tensor,  # [M, K], on the GPU
    weights: list[tuple[Tensor, Tensor, Tensor | None]],  # packed, scale, zero
    bits: int,
    group_size: int,
    N: int,
    tried: Iterable[Config],
) -> list[tuple[float, Config | None]]:
    """Median microseconds of each configuration, the fastest first; None stands for expanding the weight first.

    ``weights`` are several of one shape, more than the GPU's cache holds, and are gone through in turn. Called by scripts only.
    """
    import triton

    def expanded(packed: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        return functional.linear(x, dequantized(packed, scale, zero, bits, group_size, N, x.shape[1], x.dtype))

    def timed(config: Config | None) -> float:
        def once() -> None:
            for packed, scale, zero in weights:
                if config is None:
                    expanded(packed, scale, zero)
                else:
                    launch(x, packed, scale, zero, bits, group_size, N, None, config)

        return 1000 * triton.testing.do_bench_cudagraph(once, rep=20, return_mode="median") / len(weights)

    results: list[tuple[float, Config | None]] = []
    for config in [*tried, None]:
        try:
            results.append((timed(config), config))
        except triton.runtime.errors.OutOfResources:  # a GPU with less shared memory
            continue
    return sorted(results, key=lambda result: result[0])
