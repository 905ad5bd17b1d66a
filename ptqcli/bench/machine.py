"""What this machine reaches: bytes and operations per second, measured now, never read from a datasheet.

Bandwidth is the better of a copy (each byte read and each written counts) and of a pass that only reads, over buffers that no cache holds.
Arithmetic is the largest rate that torch's own square products reach in each dtype, two operations for a multiply-add. The operands are
random: on numbers that are all alike a processor runs cooler and so faster than it ever will on a model. Both are what torch reaches, so a
kernel that is better than torch's shows a share above 1.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ptqcli.bench.timing import Call, cache_bytes, time_in_turn
from ptqcli.resources import free_bytes

SIZES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}
DTYPES = {
    "cpu": {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8},
    "cuda": {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8},
}
SMALLEST_BUFFER = 128 << 20
TIMES_THE_CACHE = 8
PROCESSOR_FACTS = Path("/proc/cpuinfo")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Limits of one device. threads: of torch, on the CPU. cache_bytes: the last-level cache.

    bandwidth: bytes per second. arithmetic: by dtype ("float32", "bfloat16", "int8", on CUDA "float16", too), operations per second.
    """

    name: str
    device: str
    threads: int | None
    cache_bytes: int
    bandwidth: float
    arithmetic: dict[str, float]


def measure(device: torch.device | str, seconds: float = 0.3) -> Machine:
    """The limits of ``device``, reached just now; ``seconds`` for each of the numbers. Raises what ``time_in_turn`` raises."""
    device = torch.device(device)
    cuda = device.type == "cuda"
    return Machine(
        name=torch.cuda.get_device_name(device) if cuda else _processor_name(PROCESSOR_FACTS),
        device=str(device),
        threads=None if cuda else torch.get_num_threads(),
        cache_bytes=cache_bytes(device),
        bandwidth=_bandwidth(device, seconds),
        arithmetic={name: _arithmetic(dtype, device, seconds) for name, dtype in DTYPES[device.type].items()},
    )


def _processor_name(facts: Path) -> str:
    lines = facts.read_text(encoding="utf-8", errors="replace").splitlines() if facts.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _best(call: Call, device: torch.device, seconds: float) -> float:
    """Seconds of a call when nothing disturbs it: the 10th percentile."""
    return time_in_turn({"": [call]}, device, seconds=seconds)[""].low * 1e-6


def _bandwidth(device: torch.device, seconds: float) -> float:
    size = min(max(SMALLEST_BUFFER, TIMES_THE_CACHE * cache_bytes(device)), free_bytes(device) // 4)
    source = torch.rand(size // 4, device=device)
    target = torch.empty_like(source)
    copying = 2 * source.nbytes / _best(lambda: target.copy_(source), device, seconds)
    reading = source.nbytes / _best(source.amax, device, seconds)
    return max(copying, reading)


def _arithmetic(dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    best = 0.0
    for size in SIZES[device.type]:
        took = _best(_product(size, dtype, device), device, seconds / len(SIZES[device.type]))
        best = max(best, 2 * size**3 / took)
        if 8 * took > seconds:  # the next size takes eight times as long
            break
    return best


def _product(size: int, dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    """``x w^T`` of two random matrices [size, size], the form of a linear layer."""
    if dtype == torch.int8:
        x, w = (torch.randint(-127, 128, (size, size), dtype=dtype, device=device) for _ in range(2))
        return lambda: torch._int_mm(x, w.t())
    x, w = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return lambda: x @ w.t()
