"""How a kernel cuts a product into tiles, and the tables in ``tuned`` that say what to choose. Imports no triton.

``tuned/<kernel>.json`` is ``{"about": text, "tables": {key: entries}}``, for ``w4a16``, ``w8a8`` and ``llm_int8`` alike. A key is the name
of a GPU, or a generation such as ``sm_90``; another key in place of entries refers to its table. An entry is
``{"max_m": 16, "config": {...}}``, with ``bits`` where a kernel has several and ``shape`` [N, K] where it is for one shape only; ``config``
are the fields of ``TileConfig`` that are not at their defaults.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import resources
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class TileConfig:
    """How a product of [M, K] and [N, K] is launched.

    block_m, block_n, block_k: of a program's step. ctas_per_sm: programs (CTAs) that a processor of the GPU (SM) is meant to run at a
    time, from which it follows into how many parts K is split, unless ``split_k`` says so.
    scale_weights (w4a16): scale the weights, not the sums.
    weight_left, tma, pdl (int8 products): the weight is the left operand; tiles arrive through the copy engine; the product is launched
    while the activations are still being quantized, and waits for them inside (programmatic dependent launch, Hopper and later).
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    ctas_per_sm: int = 0
    split_k: int | None = None
    scale_weights: bool = False
    weight_left: bool = False
    tma: bool = False
    pdl: bool = False


@dataclass(frozen=True, kw_only=True)
class Entry:
    """``config`` for up to ``max_m`` tokens; bits: of the weight, None: of any. shape: (N, K), None: of any."""

    max_m: int
    config: TileConfig
    bits: int | None = None
    shape: tuple[int, int] | None = None


@dataclass(frozen=True)
class GPU:
    name: str
    capability: int  # 90 for 9.0
    sms: int


@cache
def gpu_of(device: torch.device) -> GPU:
    """Anything but a GPU has one SM, and the capability 0."""
    if device.type != "cuda":
        return GPU(device.type, 0, 1)
    properties = torch.cuda.get_device_properties(device)
    return GPU(properties.name, 10 * properties.major + properties.minor, properties.multi_processor_count)


@lru_cache(maxsize=4096)
def config_for(kernel: str, gpu: GPU, N: int, K: int, M: int, bits: int | None = None) -> TileConfig | None:
    """What the tables of ``kernel`` say; None for more tokens than they know.

    A table under the GPU's own name goes before that of its generation, and in each the entries for this very shape before those for
    any. The first of these four that has entries counts, so that a table may leave out what it has nothing to say about; of its
    entries the first for at least so many tokens.
    """
    for table in tables_for(kernel, gpu.name, gpu.capability):
        entries = [entry for entry in table if entry.bits == bits]
        own = [entry for entry in entries if entry.shape == (N, K)]
        if chosen := own or [entry for entry in entries if entry.shape is None]:
            return next((entry.config for entry in chosen if entry.max_m >= M), None)
    return None


@cache
def tables_for(kernel: str, name: str, capability: int) -> tuple[tuple[Entry, ...], ...]:
    """The entries for a GPU: those under its name, then those of the latest generation not later than its own, else of the earliest."""
    tables = _tables(kernel)
    generations = sorted(int(key[3:]) for key in tables if key.startswith("sm_"))
    known = [generation for generation in generations if generation <= capability]
    found = [tables[key] for key in (name, f"sm_{known[-1] if known else generations[0]}") if key in tables]
    return tuple(_entries(tables[table] if isinstance(table, str) else table) for table in found)


def shipped(kernel: str) -> Iterator[tuple[str, Entry]]:
    """Every entry in the tables of ``kernel``, with the key of its table."""
    for key, table in _tables(kernel).items():
        for entry in () if isinstance(table, str) else _entries(table):
            yield key, entry


@cache
def _tables(kernel: str) -> dict[str, Any]:
    file = resources.files("ptq_kernels") / "tuned" / f"{kernel}.json"
    return json.loads(file.read_text(encoding="utf-8"))["tables"]


def _entries(table: list[dict[str, Any]]) -> tuple[Entry, ...]:
    return tuple(
        Entry(
            max_m=entry["max_m"],
            config=TileConfig(**entry["config"]),
            bits=entry.get("bits"),
            shape=tuple(entry["shape"]) if "shape" in entry else None,
        )
        for entry in table
    )
