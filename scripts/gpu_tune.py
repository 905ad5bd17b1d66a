"""Tuning for ``gpu_check.py --tune``: which configuration of each kernel is fastest on this GPU, as tables for ``ptq_kernels/tuned``.

A configuration that does not compile, does not fit the GPU or computes something else is passed over. A run that was cut short leaves out
what it did not get through: for a shape, or an int8 kernel, without all its numbers of tokens there are no entries, because a table's last
entry says what happens beyond it. What is left out is run as the generation's table says.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from importlib import import_module
from itertools import product
from typing import Any

import torch
from gpu_correctness import int8_configs, int8_launcher
from gpu_layers import (
    OURS,
    SCHEMES,
    TOLERANCE,
    WHAT_CASES_RAISE,
    Case,
    GpuRun,
    Values,
    copied,
    error,
    first_rows,
    make_input,
    make_layer,
    tiles,
    timed_outliers,
    truth,
)
from torch import Tensor
from torch.nn import functional

from ptqcli.bench import timing
from ptqcli.numerics.scheme import Scheme

W4A16_TOKENS = (1, 16, 32, 64, 128, 256, 512)
INT8_TOKENS = (16, 64, 256, 4096)
INT8_KERNELS = {"w8a8": "W8A8", "llm_int8": "LLM.int8"}
INT8_TUNED_SHAPES = ("qkv", "down")
MOST_SUMS = 128  # float32, of a thread: half of its registers

Product = Callable[[Tensor], Tensor]


def tuning_cases(run: GpuRun) -> Iterator[tuple[str, Case]]:
    """4-bit weights first, then the int8 products, then 8-bit weights; one shape after another, so that most are whole if time runs out."""
    for shape, count in product(run.shapes, W4A16_TOKENS):
        yield f"tune W4A16 {shape} {count}", functools.partial(tune_w4a16, run, 4, shape, count)
    for kernel, count in product(INT8_KERNELS, INT8_TOKENS):
        yield f"tune {kernel} {count}", functools.partial(tune_int8, run, kernel, count)
    for shape, count in product(run.shapes, W4A16_TOKENS):
        yield f"tune W8A16 {shape} {count}", functools.partial(tune_w4a16, run, 8, shape, count)


def tune_w4a16(run: GpuRun, bits: int, shape: str, tokens: int) -> Values:
    """All configurations for one shape and number of tokens, the fastest first; None: to expand the weight first."""
    in_features, out_features = run.shapes[shape]
    entry = {"bits": bits, "shape": [out_features, in_features], "max_m": tokens}
    if run.rehearse:
        return {"w4a16": entry, "ranked": [[1.0, {"block_m": 16}], [2.0, None]]}
    w4a16 = import_module("ptq_kernels.w4a16")
    layer = replace(make_layer(Scheme(bits, 128), out_features, in_features, torch.bfloat16, run.device), bias=None)
    x = make_input(tokens, in_features, torch.bfloat16, run.device)
    expected = truth(first_rows(layer, 64), x)
    weights = [tiles(copied(layer).weight, x.dtype) for _ in range(copies(run, out_features * in_features * bits // 8))]

    def expanded(weight: tuple[Tensor, Tensor, Tensor | None], x: Tensor) -> Tensor:
        return functional.linear(x, w4a16.dequantized(*weight, bits, 128, out_features, in_features, x.dtype))

    def fused(config: Any, weight: tuple[Tensor, Tensor, Tensor | None], x: Tensor) -> Tensor:
        return w4a16.launch(x, *weight, bits, 128, out_features, None, config)

    ranked: list[tuple[float, Values | None]] = []
    for config in (*w4a16_candidates(bits, tokens), None):
        call = expanded if config is None else functools.partial(fused, config)
        took = time_candidate(run, [functools.partial(call, weight) for weight in weights], x, expected)
        if took is not None:
            ranked.append((took, None if config is None else plain(config)))
    assert ranked, "nothing runs"
    return {"w4a16": entry, "ranked": sorted(ranked, key=lambda each: each[0])}


def copies(run: GpuRun, size: int) -> int:
    """How many weights of so many bytes leave the cache, within a quarter of the memory."""
    return max(timing.copies(size, run.device, torch.cuda.mem_get_info()[0] // 4), 1)


def time_candidate(run: GpuRun, calls: Sequence[Product], x: Tensor, expected: Tensor) -> float | None:
    """Microseconds of a call, from a CUDA graph; None if it fails or is not near ``expected`` [M, n], the first n outputs.

    Raises RuntimeError when CUDA itself fails, since every further call of this process would, too.
    """
    try:
        if not error(calls[0](x)[:, : expected.shape[1]], expected) < TOLERANCE:
            return None
        timed = {OURS: [functools.partial(call, x) for call in calls]}
        return timing.time_in_turn(timed, run.device, True, 0.02)[OURS].microseconds
    except WHAT_CASES_RAISE as problem:
        if "CUDA" in str(problem):
            raise
        return None


def w4a16_candidates(bits: int, tokens: int) -> list[Any]:
    """Configurations worth timing for so many tokens: a grid around them, and the shipped ones that are not far off."""
    tile_config = import_module("ptq_kernels.tile_config")
    largest = min(max(16, 1 << (tokens - 1).bit_length()), 256)
    blocks_m = [block for block in (largest, largest // 2) if block == largest or block >= 64]
    steps = [(64, 64, 4), (64, 64, 6), (64, 128, 3), (64, 128, 4), (64, 128, 6), (128, 64, 4), (128, 128, 3), (128, 128, 4)]
    found = []
    for block_m, (block_n, block_k, num_stages), num_warps in product(blocks_m, steps, (4, 8)):
        sums = block_m * block_n // (32 * num_warps)
        if sums > MOST_SUMS or (num_warps == 8 and max(block_m, block_n) < 128):
            continue
        tile = {"block_m": block_m, "block_n": block_n, "block_k": block_k, "num_warps": num_warps, "num_stages": num_stages}
        for ctas_per_sm, scale_weights in product((1, 2) if block_m >= 128 else (1, 2, 3, 4), (False, True)):
            found.append(tile_config.TileConfig(**tile, ctas_per_sm=ctas_per_sm, scale_weights=scale_weights))
    shipped = [entry.config for _, entry in tile_config.shipped("w4a16") if entry.bits == bits]
    return list(dict.fromkeys([*(config for config in shipped if largest // 4 <= config.block_m <= largest), *found]))


def plain(config: Any) -> Values:
    """The fields that are not left at none, no, or zero."""
    return {name: value for name, value in asdict(config).items() if value not in (None, False, 0)}


def tune_int8(run: GpuRun, kernel: str, tokens: int) -> Values:
    """The configuration with the least time over the shapes together, as an entry of the table."""
    if run.rehearse:
        return {kernel: {"max_m": tokens}, "microseconds": 0.0}
    timed = [(total, config) for config in int8_candidates(kernel, tokens) if (total := time_int8(run, kernel, config, tokens))]
    assert timed, "no configuration fits"
    total, config = min(timed, key=lambda each: each[0])
    return {kernel: {"max_m": tokens, "config": plain(config)}, "microseconds": total}


def int8_candidates(kernel: str, tokens: int) -> Iterator[Any]:
    """The shipped configurations whose blocks are about what so many tokens need, with other numbers of stages and programs."""
    block_m = min(max(16, 1 << (tokens - 1).bit_length()), 128)
    near = [config for config in int8_configs(kernel) if block_m // 2 <= config.block_m <= block_m]
    changes = product(near, (0, -1), (0, 2, 4))
    varied = (replace(each, num_stages=max(each.num_stages + more, 2), ctas_per_sm=ctas) for each, more, ctas in changes)
    yield from dict.fromkeys(varied)


def time_int8(run: GpuRun, kernel: str, config: Any, tokens: int) -> float | None:
    """Microseconds of a product of each shape, added up; None if it fails."""
    total = 0.0
    for shape in INT8_TUNED_SHAPES:
        launchers, x, expected = int8_launchers(run, kernel, shape, tokens)
        calls = [functools.partial(launch, config=config) for launch in launchers]
        took = time_candidate(run, calls, x, expected)
        if took is None:
            return None
        total += took
    return total


@functools.lru_cache(maxsize=len(INT8_TUNED_SHAPES))
def int8_launchers(run: GpuRun, kernel: str, shape: str, tokens: int) -> tuple[list[Callable[..., Tensor]], Tensor, Tensor]:
    """Launchers, one for each copy of the weight; the input; a few outputs in float64."""
    name = INT8_KERNELS[kernel]
    in_features, out_features = run.shapes[shape]
    layer = replace(make_layer(SCHEMES[name], out_features, in_features, torch.bfloat16, run.device), bias=None)
    x = make_input(tokens, in_features, torch.bfloat16, run.device, timed_outliers(name))
    launchers = [int8_launcher(copied(layer)) for _ in range(copies(run, out_features * in_features))]
    return launchers, x, truth(first_rows(layer, 64), x)


def tuned_tables(lines: Iterable[Values]) -> Values:
    """What the cases found, as the files in ``tuned`` have it under this GPU's name; a kernel with nothing to say is not in it.

    For W4A16 each shape that was timed has entries of its own; those for all other shapes take the configuration that loses least in
    the worst of them. Where expanding the weight first was fastest, there is no entry for so many tokens.
    """
    lines = [line for line in lines if line["ok"]]
    tables = {"w4a16": w4a16_table([line for line in lines if "w4a16" in line])}
    for kernel in INT8_KERNELS:
        entries = sorted((line[kernel] for line in lines if kernel in line), key=lambda entry: entry["max_m"])
        whole = [entry["max_m"] for entry in entries] == list(INT8_TOKENS)
        tables[kernel] = [*entries[:-1], {**entries[-1], "max_m": 2**31 - 1}] if whole else []
    return {kernel: entries for kernel, entries in tables.items() if entries}


def w4a16_table(lines: Sequence[Values]) -> list[Values]:
    """The entries, by bits, then by shape (those for any shape first), then by tokens."""
    shapes: dict[tuple[int, int, int], dict[int, list[tuple[float, Values | None]]]] = {}
    for line in lines:
        entry = line["w4a16"]
        shapes.setdefault((entry["bits"], *entry["shape"]), {})[entry["max_m"]] = line["ranked"]
    whole = {at: ranked for at, ranked in shapes.items() if set(ranked) == set(W4A16_TOKENS)}
    table = []
    for bits in sorted({at[0] for at in whole}):
        own = {at[1:]: ranked for at, ranked in whole.items() if at[0] == bits}
        chosen: list[tuple[Values, int, Values | None]] = []
        chosen += [({}, tokens, least_loss([ranked[tokens] for ranked in own.values()])) for tokens in W4A16_TOKENS]
        chosen += [({"shape": list(at)}, tokens, own[at][tokens][0][1]) for at, tokens in product(sorted(own), W4A16_TOKENS)]
        table += [{"bits": bits, **shape, "max_m": tokens, "config": config} for shape, tokens, config in chosen if config]
    return table


def least_loss(ranked: Sequence[Sequence[tuple[float, Values | None]]]) -> Values | None:
    """The configuration whose time over the fastest one's, in the shape where that is largest, is least."""
    losses = [{json.dumps(config): took / each[0][0] for took, config in each} for each in ranked]
    common = [config for config in losses[0] if all(config in other for other in losses)]
    return json.loads(min(common, key=lambda config: max(loss[config] for loss in losses), default="null"))
