"""Runs the W4A16 kernels in Triton's interpreter and prints, as JSON, how far they are from float64. A program of its own, not a test.

The interpreter is chosen by the environment when triton is imported, for the whole process, and only here. Everything that a kernel must
not read is poisoned: memory around x and beyond the last row holds NaN, codes beyond the last row and column are arbitrary, and memory
that torch hands out is filled with NaN.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from importlib import import_module
from itertools import cycle

os.environ["TRITON_INTERPRET"] = "1"

import torch
from ptq_kernels.packing import TILE_K, pack_groups, pack_tiles
from ptq_kernels.tile_config import TileConfig, shipped
from torch import Tensor
from torch.nn import functional

w4a16 = import_module("ptq_kernels.w4a16")  # the package may name the operator like its module

TOKENS = (1, 2, 3, 16, 17)
# rows, columns, group size: column counts that no block divides, odd row counts, and a row length that is not even a multiple of 8
SHAPES = ((101, 96, 32), (67, 320, 64), (131, 256, 128), (70, 99, -1))
LONG_SHAPES = ((33, 704, 64), (33, 2112, 32), (33, 2112, -1))


@dataclasses.dataclass(frozen=True)
class Layer:
    """A random layer as stored and as it is, in float64."""

    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    bias: Tensor
    weight: Tensor


def layer(N: int, K: int, group_size: int, bits: int, symmetric: bool, flip: bool = False) -> Layer:
    """flip: what is stored differs from the float64 weight in one bit of one code."""
    generator = torch.Generator().manual_seed(N * K + bits)
    groups = 1 if group_size == -1 else K // group_size
    codes = torch.randint(0, 1 << bits, (N, K), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(N, groups, generator=generator) * 0.02 + 0.001).half()
    scale *= torch.where(torch.rand(N, groups, generator=generator) < 0.5, -1, 1)
    zero = torch.randint(0, 1 << bits, (N, groups), generator=generator, dtype=torch.uint8)
    if symmetric:
        zero.fill_(1 << (bits - 1))
    signed = codes.double().view(N, groups, -1) - zero.double().unsqueeze(-1)
    weight = (signed * scale.double().unsqueeze(-1)).view(N, K)
    around = torch.randint(0, 1 << bits, (-(-N // 64) * 64, -(-K // TILE_K[bits]) * TILE_K[bits]), generator=generator)
    stored = around.to(torch.uint8)
    stored[:N, :K] = codes
    if flip:
        stored[N // 2, K // 2] ^= 1 << (bits - 1)
    beyond = (0, 0, 0, -N % 64)
    return Layer(
        pack_tiles(stored, bits),
        pack_groups(functional.pad(scale, beyond, value=float("nan")), torch.float16),
        None if symmetric else pack_groups(functional.pad(zero, beyond, value=1), torch.int16),
        torch.randn(N, generator=generator).half(),
        weight,
    )


def tokens_among_poison(tokens: int, K: int) -> Tensor:
    around = torch.full((tokens + 3, K + 72), float("nan"), dtype=torch.float16)
    around[:tokens, :K] = torch.randn(tokens, K, generator=torch.Generator().manual_seed(tokens))
    return around[:tokens, :K]


def distance(found: Tensor, truth: Tensor) -> float:
    """Relative Frobenius distance; NaN stays NaN."""
    return ((found.double() - truth).norm() / truth.norm()).item()


def fused(config: TileConfig, bits: int, tokens: int, shape: tuple[int, int, int], symmetric: bool) -> dict[str, object]:
    N, K, group_size = shape
    x = tokens_among_poison(tokens, K)
    results = []
    for flip in (False, True):
        made = layer(N, K, group_size, bits, symmetric, flip)
        results.append(w4a16.launch(x, made.packed, made.scale, made.zero, bits, group_size, N, made.bias, config))
    truth = x.double() @ made.weight.T + made.bias.double()
    return {
        "case": f"{config} bits={bits} M={tokens} N,K,group={shape} symmetric={symmetric}",
        "error": distance(results[0], truth),
        "flipped": distance(results[1], truth),
    }


def through_the_door(bits: int, tokens: int, shape: tuple[int, int, int], symmetric: bool) -> dict[str, object]:
    """The CUDA implementation whole: table, column order, leading dimensions, and beyond the table the expanded weight."""
    N, K, group_size = shape
    x = torch.randn(2, tokens, K, generator=torch.Generator().manual_seed(1)).half()
    order = torch.randperm(K, generator=torch.Generator().manual_seed(2)).to(torch.int32)
    results = []
    for flip in (False, False, True):
        made = layer(N, K, group_size, bits, symmetric, flip)
        results.append(w4a16._on_cuda(x, made.packed, made.scale, made.zero, bits, group_size, N, made.bias, order))
    truth = x.double()[..., order.long()] @ made.weight.T + made.bias.double()
    return {
        "case": f"whole operator bits={bits} M=2x{tokens} N,K,group={shape} symmetric={symmetric}",
        "error": distance(results[0], truth),
        "repeats": torch.equal(results[0], results[1]),
        "flipped": distance(results[2], truth),
    }


def main() -> None:
    torch.set_num_threads(1)
    # Memory that torch hands out uninitialised is filled with NaN.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    symmetric = cycle((True, False, False))
    shapes, tokens, splits = cycle(SHAPES), cycle(TOKENS), cycle((1, 2, 3))
    results = []
    for _, entry in shipped("w4a16"):
        config = dataclasses.replace(entry.config, split_k=next(splits))
        results.append(fused(config, entry.bits, next(tokens), next(shapes), next(symmetric)))
    small = TileConfig(block_m=16, block_n=64, block_k=128, num_warps=4, num_stages=3, ctas_per_sm=1)
    for bits in TILE_K:
        for shape in LONG_SHAPES:
            for scale_weights in (False, True):
                config = dataclasses.replace(small, scale_weights=scale_weights, split_k=next(splits))
                results.append(fused(config, bits, next(tokens), shape, next(symmetric)))
        results.append(through_the_door(bits, 32, SHAPES[2], next(symmetric)))
        results.append(through_the_door(bits, 150, SHAPES[1], next(symmetric)))
    results.append(fused(dataclasses.replace(small, block_m=128, scale_weights=True), 4, 300, SHAPES[0], False))
    results.append(fused(dataclasses.replace(small, block_m=128), 8, 300, SHAPES[2], True))
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
