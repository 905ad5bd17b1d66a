"""Tokens a second of a checkpoint, timed in turn with its baseline, so that both meet the same machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from ptqcli.bench.generation import bench_generation, positions_of
from ptqcli.bench.machine import Machine

PROMPT, NEW_TOKENS = 128, 32  # as `ptq bench` takes them
SECONDS = 2.0  # for each model


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Medians of one sequence: tokens a second of a prompt, and made behind it. ..._gain: as a multiple of the baseline's."""

    prompt: int
    new_tokens: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    prefill_gain: float | None = None
    decode_gain: float | None = None


def measure_speed(model: Any, baseline: Any, device: torch.device, machine: Machine, seconds: float = SECONDS) -> dict[str, Any]:
    """``Speed`` of ``model``, as plain values. baseline: None for the model alone. Raises what ``bench_generation`` raises."""
    models = {"checkpoint": model} if baseline is None else {"original": baseline, "checkpoint": model}
    prompt = min([PROMPT, *(positions_of(each.config) - NEW_TOKENS for each in models.values())])
    points = {point.model: point for point in bench_generation(models, 1, prompt, NEW_TOKENS, device, machine, seconds=seconds)}
    own, its = points["checkpoint"], points.get("original")
    speed = Speed(
        prompt=prompt,
        new_tokens=NEW_TOKENS,
        prefill_tokens_per_second=own.prefill_tokens_per_second,
        decode_tokens_per_second=own.decode_tokens_per_second,
        prefill_gain=None if its is None else own.prefill_tokens_per_second / its.prefill_tokens_per_second,
        decode_gain=None if its is None else own.decode_tokens_per_second / its.decode_tokens_per_second,
    )
    return asdict(speed)
