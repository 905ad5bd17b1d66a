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
from gpu_cases import (
    OURS,
    SCHEMES,
    TOLERANCE,
    WHAT_CASES_RAISE,
    Case,
    Setting,
    Values,
    copied,
    error,
    first_rows,
    int8_launcher,
    int8_tilings,
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


def tuning_cases(setting: Setting) -> Iterator[tuple[str, Case]]:
    """4-bit weights first, then the int8 products, then 8-bit weights; one shape after another, so that most are whole if time runs out."""
    for shape, count in product(setting.shapes, W4A16_TOKENS):
        yield f"tune W4A16 {shape} {count}", functools.partial(tune_w4a16, setting, 4, shape, count)
    for kernel, count in product(INT8_KERNELS, INT8_TOKENS):
        yield f"tune {kernel} {count}", functools.partial(tune_int8, setting, kernel, count)
    for shape, count in product(setting.shapes, W4A16_TOKENS):
        yield f"tune W8A16 {shape} {count}", functools.partial(tune_w4a16, setting, 8, shape, count)


def tune_w4a16(setting: Setting, bits: int, shape: str, tokens: int) -> Values:
    """All configurations for one shape and number of tokens, the fastest first; None: to expand the weight first."""
    columns, rows = setting.shapes[shape]
    entry = {"bits": bits, "shape": [rows, columns], "up_to": tokens}
    if setting.rehearse:
        return {"w4a16": entry, "ranked": [[1.0, {"block_m": 16}], [2.0, None]]}
    w4a16 = import_module("ptq_kernels.w4a16")
    layer = replace(make_layer(Scheme(bits, 128), rows, columns, torch.bfloat16, setting.device), bias=None)
    x = make_input(tokens, columns, torch.bfloat16, setting.device)
    expected = truth(first_rows(layer, 64), x)
    weights = [tiles(copied(layer).weight, x.dtype) for _ in range(copies(setting, rows * columns * bits // 8))]

    def expanded(weight: tuple[Tensor, Tensor, Tensor | None], x: Tensor) -> Tensor:
        return functional.linear(x, w4a16.dequantized(*weight, bits, 128, rows, columns, x.dtype))

    def fused(config: Any, weight: tuple[Tensor, Tensor, Tensor | None], x: Tensor) -> Tensor:
        return w4a16.launch(x, *weight, bits, 128, rows, None, config)

    ranked: list[tuple[float, Values | None]] = []
    for config in (*w4a16_candidates(bits, tokens), None):
        call = expanded if config is None else functools.partial(fused, config)
        took = time_candidate(setting, [functools.partial(call, weight) for weight in weights], x, expected)
        if took is not None:
            ranked.append((took, None if config is None else plain(config)))
    assert ranked, "nothing runs"
    return {"w4a16": entry, "ranked": sorted(ranked, key=lambda each: each[0])}


def copies(setting: Setting, size: int) -> int:
    """How many weights of so many bytes leave the cache, within a quarter of the memory."""
    return max(timing.copies(size, setting.device, torch.cuda.mem_get_info()[0] // 4), 1)


def time_candidate(setting: Setting, calls: Sequence[Product], x: Tensor, expected: Tensor) -> float | None:
    """Microseconds of a call, from a CUDA graph; None if it fails or is not near ``expected`` [M, n], the first n outputs.

    Raises RuntimeError when CUDA itself fails, since every further call of this process would, too.
    """
    try:
        if not error(calls[0](x)[:, : expected.shape[1]], expected) < TOLERANCE:
            return None
        timed = {OURS: [functools.partial(call, x) for call in calls]}
        return timing.time_in_turn(timed, setting.device, True, 0.02)[OURS].microseconds
    except WHAT_CASES_RAISE as problem:
        if "CUDA" in str(problem):
            raise
        return None


def w4a16_candidates(bits: int, tokens: int) -> list[Any]:
    """Configurations worth timing for so many tokens: a grid around them, and the shipped ones that are not far off."""
    w4a16 = import_module("ptq_kernels.w4a16")
    largest = min(max(16, 1 << (tokens - 1).bit_length()), 256)
    blocks_m = [block for block in (largest, largest // 2) if block == largest or block >= 64]
    steps = [(64, 64, 4), (64, 64, 6), (64, 128, 3), (64, 128, 4), (64, 128, 6), (128, 64, 4), (128, 128, 3), (128, 128, 4)]
    found = []
    for block_m, (block_n, block_k, stages), warps in product(blocks_m, steps, (4, 8)):
        sums = block_m * block_n // (32 * warps)
        if sums > MOST_SUMS or (warps == 8 and max(block_m, block_n) < 128):
            continue
        for per_processor, fold in product((1, 2) if block_m >= 128 else (1, 2, 3, 4), (False, True)):
            found.append(w4a16.Config(block_m, block_n, block_k, warps, stages, per_processor, fold))
    shipped = [config for _, each, config in w4a16.configs() if each == bits and largest // 4 <= config.block_m <= largest]
    return list(dict.fromkeys([*shipped, *found]))


def plain(config: Any) -> Values:
    """The fields that are not left at none, no, or zero."""
    return {name: value for name, value in asdict(config).items() if value not in (None, False, 0)}


def tune_int8(setting: Setting, kernel: str, tokens: int) -> Values:
    """The tiling with the least time over the shapes together, as an entry of the table."""
    if setting.rehearse:
        return {kernel: {"up_to_m": tokens}, "microseconds": 0.0}
    timed = [(total, tiling) for tiling in int8_candidates(kernel, tokens) if (total := time_tiling(setting, kernel, tiling, tokens))]
    assert timed, "no tiling fits"
    total, tiling = min(timed, key=lambda each: each[0])
    return {kernel: {"up_to_m": tokens, **plain(tiling)}, "microseconds": total}


def int8_candidates(kernel: str, tokens: int) -> Iterator[Any]:
    """The shipped tilings whose blocks are about what so many tokens need, with other numbers of stages and programs."""
    block_m = min(max(16, 1 << (tokens - 1).bit_length()), 128)
    near = [tiling for tiling in int8_tilings(kernel) if block_m // 2 <= tiling.block_m <= block_m]
    varied = (replace(t, stages=max(t.stages + more, 2), programs=n) for t, more, n in product(near, (0, -1), (0, 2, 4)))
    yield from dict.fromkeys(varied)


def time_tiling(setting: Setting, kernel: str, tiling: Any, tokens: int) -> float | None:
    """Microseconds of a product of each shape, added up; None if it fails."""
    total = 0.0
    for shape in INT8_TUNED_SHAPES:
        columns, rows = setting.shapes[shape]
        launchers, x, expected = int8_launchers(setting, kernel, shape, tokens)
        parts = tiling.parts(tokens, rows, columns, torch.cuda.get_device_properties(0).multi_processor_count)
        calls = [functools.partial(launch, tiling=tiling, parts=parts) for launch in launchers]
        took = time_candidate(setting, calls, x, expected)
        if took is None:
            return None
        total += took
    return total


@functools.lru_cache(maxsize=len(INT8_TUNED_SHAPES))
def int8_launchers(setting: Setting, kernel: str, shape: str, tokens: int) -> tuple[list[Callable[..., Tensor]], Tensor, Tensor]:
    """Launchers, one for each copy of the weight; the input; a few outputs in float64."""
    name = INT8_KERNELS[kernel]
    columns, rows = setting.shapes[shape]
    layer = replace(make_layer(SCHEMES[name], rows, columns, torch.bfloat16, setting.device), bias=None)
    x = make_input(tokens, columns, torch.bfloat16, setting.device, timed_outliers(name))
    launchers = [int8_launcher(copied(layer)) for _ in range(copies(setting, rows * columns))]
    return launchers, x, truth(first_rows(layer, 64), x)


def tuned_tables(lines: Iterable[Values]) -> Values:
    """What the cases found, as the files in ``tuned`` have it under this GPU's name; a kernel with nothing to say is not in it.

    For W4A16 each shape that was timed has entries of its own; those for all other shapes take the configuration that loses least in
    the worst of them. Where expanding the weight first was fastest, there is no entry for so many tokens.
    """
    lines = [line for line in lines if line["ok"]]
    tables = {"w4a16": w4a16_table([line for line in lines if "w4a16" in line])}
    for kernel in INT8_KERNELS:
        rows = sorted((line[kernel] for line in lines if kernel in line), key=lambda row: row["up_to_m"])
        whole = [row["up_to_m"] for row in rows] == list(INT8_TOKENS)
        tables[kernel] = [*rows[:-1], {**rows[-1], "up_to_m": 2**31 - 1}] if whole else []
    return {kernel: entries for kernel, entries in tables.items() if entries}


def w4a16_table(lines: Sequence[Values]) -> list[Values]:
    """The entries, by bits, then by shape (those for any shape first), then by tokens."""
    shapes: dict[tuple[int, int, int], dict[int, list[tuple[float, Values | None]]]] = {}
    for line in lines:
        entry = line["w4a16"]
        shapes.setdefault((entry["bits"], *entry["shape"]), {})[entry["up_to"]] = line["ranked"]
    whole = {at: ranked for at, ranked in shapes.items() if set(ranked) == set(W4A16_TOKENS)}
    table = []
    for bits in sorted({at[0] for at in whole}):
        own = {at[1:]: ranked for at, ranked in whole.items() if at[0] == bits}
        chosen: list[tuple[Values, int, Values | None]] = []
        chosen += [({}, tokens, least_loss([ranked[tokens] for ranked in own.values()])) for tokens in W4A16_TOKENS]
        chosen += [({"shape": list(at)}, tokens, own[at][tokens][0][1]) for at, tokens in product(sorted(own), W4A16_TOKENS)]
        table += [{"bits": bits, **shape, "up_to": tokens, "config": config} for shape, tokens, config in chosen if config]
    return table


def least_loss(ranked: Sequence[Sequence[tuple[float, Values | None]]]) -> Values | None:
    """The configuration whose time over the fastest one's, in the shape where that is largest, is least."""
    losses = [{json.dumps(config): took / each[0][0] for took, config in each} for each in ranked]
    common = [config for config in losses[0] if all(config in other for other in losses)]
    return json.loads(min(common, key=lambda config: max(loss[config] for loss in losses), default="null"))
