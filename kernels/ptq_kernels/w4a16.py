"""A linear layer with 4-bit or 8-bit weights and 16-bit inputs: ``y = x W^T + b``, ``W[n, k] = (code[n, k] - zero[n, g]) * scale[n, g]``.

At a few tokens the time is that of reading the weights, so the kernel reads each code once, in the order that ``packing`` lays down, and
turns it into a float in registers (``w4a16_kernels``). Three choices depend on N, K and M, the number of tokens:

    scale    of few tokens, the float32 sums of a group are scaled: one multiplication for a group, and an exact weight in the product. Of
             many, the weights are, rounded once to 16 bits as the reference does.
    split-K  a weight of 4096 rows has 64 blocks, half as many as a large GPU has SMs. So K is split among programs, each writes
             its float32 sums to a workspace of its own, and a second kernel adds them up in order: no atomics, the same bits each time.
    product  with so many tokens that arithmetic takes longer than reading, the weight is expanded and given to torch's own product.

They are made from ``tuned/w4a16.json``, by the GPU's name or else by the generation it belongs to. Left out: a column order inside the
kernel (the columns of x are gathered beforehand, a pass over x and not over the weights).

On a machine without a GPU the operator runs the reference.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ptq_kernels.layout import pack_codes
from ptq_kernels.packing import TILE_K, TILE_N, unpack_groups, unpack_tiles
from ptq_kernels.reference import dequantize
from ptq_kernels.tile_config import GPU, TileConfig, config_for, gpu_of

GROUP_SIZES = (32, 64, 128, -1)
DEQUANTIZE_BLOCK = (64, 128)  # of N and K, of a program
OPERATIONS_PER_BYTE = 180  # that an H200 does in the time in which it reads a byte; others are near


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
    config = config_for("w4a16", gpu_of(x.device), N, x.shape[-1], len(tokens), bits)
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
    if bits not in TILE_K:
        raise ValueError(f"bits must be one of {tuple(TILE_K)}, not {bits}")
    if x.dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"x must be float16 or bfloat16, not {x.dtype}")
    if x.dim() == 0:
        raise ValueError("x must have one dimension at least, the columns")
    K = x.shape[-1]
    if group_size not in GROUP_SIZES or K % group_size:
        raise ValueError(f"group_size must be one of {GROUP_SIZES} and divide the {K} columns of x, not {group_size}")
    groups = 1 if group_size == -1 else K // group_size
    tiles_n, tiles_k = -(-N // TILE_N), -(-K // TILE_K[bits])
    expected: dict[str, tuple[Tensor | None, torch.dtype, tuple[int, ...]]] = {
        "packed": (packed, torch.int32, (tiles_n, tiles_k, 128, 4)),
        "scale": (scale, x.dtype, (groups, tiles_n * TILE_N)),
        "zero": (zero, torch.int16, (groups, tiles_n * TILE_N)),
        "bias": (bias, x.dtype, (N,)),
        "perm": (perm, torch.int32, (K,)),
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
    config: TileConfig,
) -> Tensor:
    """The fused kernel with a given configuration, [M, N]. Tensors of the CPU need Triton's interpreter. Checks nothing."""
    from ptq_kernels import w4a16_kernels as kernels

    M, K = x.shape
    out = x.new_empty((M, N))
    if out.numel() == 0:
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    chosen = plan(gpu_of(x.device), config, x.dtype, bits, group_size, M, N, K, zero is not None, bias is not None)
    whole = chosen.split_k == 1
    target = out if whole else x.new_empty((chosen.split_k, M, N), dtype=torch.float32)
    kernels.w4a16_kernel[chosen.grid](
        x=x,
        packed=packed,
        scale=scale.view(torch.int32),
        zero=None if zero is None else zero.view(torch.int32),
        bias=bias if whole else None,
        out=target,
        M=M,
        N=N,
        K=K,
        G=len(scale),
        tiles_n=packed.shape[0],
        tiles_k=packed.shape[1],
        stride_x=x.stride(0),
        split_k=chosen.split_k,
        **chosen.options,
    )
    if not whole:
        kernels.reduce_kernel[(-(-out.numel() // 1024),)](
            partial=target, bias=bias, out=out, elements=out.numel(), N=N, split_k=chosen.split_k, **chosen.reduce_options
        )
    return out


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a launch needs besides the tensors: the programs, the parts that K is split into, what both kernels are compiled with."""

    grid: tuple[int, int, int]
    split_k: int
    options: dict[str, Any]
    reduce_options: dict[str, Any]


@lru_cache(maxsize=4096)  # decoding asks for the same few again and again, and deciding takes as long as launching
def plan(
    gpu: GPU, config: TileConfig, dtype: torch.dtype, bits: int, group_size: int, M: int, N: int, K: int, zeros: bool, bias: bool
) -> Plan:
    """How ``launch`` runs [M, K] times a weight [N, K] with ``config``. zeros, bias: whether there are zero points, a bias."""
    group = _group(group_size, K)
    config = fitted(config, group, bits)
    blocks = (-(-N // config.block_n), -(-M // config.block_m))
    steps = -(-K // config.block_k)
    programs = config.ctas_per_sm * gpu.sms
    split_k = config.split_k or _split_k(blocks[0] * blocks[1], steps, programs, _partial_steps(config, M, bits))
    split_k = min(split_k, steps)
    pdl = gpu.capability >= 90
    launched: dict[str, Any] = {"PDL": pdl, **({"launch_pdl": True} if pdl else {})}
    options = constants(config, dtype, bits, group, zeros, bias and split_k == 1, gpu.capability > 0)
    options |= {"EVEN": K % config.block_k == 0, "num_warps": config.num_warps, **launched}
    reduce_options = {"BIAS": bias, "BLOCK": 1024, "num_warps": 4, **launched}
    return Plan(grid=(*blocks, split_k), split_k=split_k, options=options, reduce_options=reduce_options)


def fitted(config: TileConfig, group_size: int, bits: int) -> TileConfig:
    """``config`` with steps that the group size allows; ``group_size`` 0 stands for whole rows.

    Scaled sums need a step within one group. Steps of 32 columns would read half of each 16 bytes, so such groups scale the weights.
    """
    scale_weights = config.scale_weights or 0 < group_size < 64
    block_k = max(config.block_k, TILE_K[bits])
    if group_size and not scale_weights:
        block_k = min(block_k, group_size)
    return replace(config, scale_weights=scale_weights, block_k=block_k)


def dequantized(
    packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int, N: int, K: int, dtype: torch.dtype
) -> Tensor:
    """The weight in ``dtype``, [N, K], by the Triton kernel. Checks nothing."""
    from ptq_kernels import w4a16_kernels as kernels

    out = torch.empty((N, K), dtype=dtype, device=packed.device)
    block_n, block_k = DEQUANTIZE_BLOCK
    kernels.dequantize_kernel[(-(-K // block_k), -(-N // block_n))](
        packed=packed,
        scale=scale.view(torch.int32),
        zero=None if zero is None else zero.view(torch.int32),
        out=out,
        N=N,
        K=K,
        G=len(scale),
        tiles_n=packed.shape[0],
        tiles_k=packed.shape[1],
        DTYPE=_triton_dtype(dtype),
        BITS=bits,
        GROUP=_group(group_size, K),
        ZEROS=zero is not None,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        ASSEMBLY=kernels.assembly(bits, dtype == torch.bfloat16, True) if packed.is_cuda else "",
        num_warps=4,
    )
    return out


def constants(config: TileConfig, dtype: torch.dtype, bits: int, group: int, zeros: bool, bias: bool, assembly: bool) -> dict[str, Any]:
    """What the fused kernel is specialised on, but for EVEN and PDL. ``config`` is a fitted one, ``group`` 0 for whole rows."""
    from ptq_kernels import w4a16_kernels as kernels

    return {
        "DTYPE": _triton_dtype(dtype),
        "BITS": bits,
        "GROUP": group,
        "ZEROS": zeros,
        "BIAS": bias,
        "SCALE_WEIGHTS": config.scale_weights,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "NUM_STAGES": config.num_stages,
        "ASSEMBLY": kernels.assembly(bits, dtype == torch.bfloat16, config.scale_weights) if assembly else "",
    }


def _triton_dtype(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]


def _group(group_size: int, K: int) -> int:
    return 0 if group_size in (-1, K) else group_size


def _split_k(blocks: int, steps: int, programs: int, partial: float) -> int:
    """Into how many parts to split K: those with the least time, in steps, for ``programs`` that run at a time.

    A program waits about two steps' time for its first data. A split one writes its sums for another to read, which takes ``partial``
    steps, and the second kernel takes one more to begin.
    """

    def time(split_k: int) -> float:
        waves = -(-blocks * split_k // programs)
        return waves * (-(-steps // split_k) + 2 + (partial if split_k > 1 else 0)) + (split_k > 1)

    return min(range(1, min(steps, 32) + 1), key=time)


def _partial_steps(config: TileConfig, M: int, bits: int) -> float:
    """How many steps' time it takes to write the float32 sums of a block and to read them again.

    A step takes as long as reading its codes or as multiplying them, whichever is longer.
    """
    stored = min(M, config.block_m)  # of each row of the block's N
    step = config.block_k * max(bits / 8, 2 * stored / OPERATIONS_PER_BYTE)  # likewise, in bytes of memory traffic
    return 8 * stored / step
