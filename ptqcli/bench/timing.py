"""Time of short calls, several contenders side by side in one run.

What makes such a number wrong, and what is done about it:

- The machine is not the same from second to second (other programs, heat, clocks). All contenders run in turn, round by round, so that
  a disturbance hits all of them; the median over the rounds is what counts, and the 10th and 90th percentile say how calm it was.
- A weight that was used a moment ago lies in the cache, one of a real model does not: a model's other layers came in between. Each
  contender has several copies of its buffers, together larger than the cache, and goes through them in turn (``copies``).
- A clock cannot time one short call. Calls are joined until a sample is long enough (SHORTEST_SAMPLE).
- The first calls are slow: libraries choose kernels, pages are touched for the first time. Every copy is called once before it counts.
- On a GPU a short kernel takes less time than its launch. Both are of interest: calls as Python makes them, or replays of a captured CUDA
  graph that holds one pass over all copies (``graphs``), in which the launches are gone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import cycle
from math import ceil
from pathlib import Path

import torch

from ptqcli.errors import UsageError

# Seconds. Below, the clock itself (CPU), or the way of the first launch to the device (CUDA), would be a good part of a sample.
SHORTEST_SAMPLE = {"cpu": 200e-6, "cuda": 1e-3}
FEWEST_ROUNDS = 3
MOST_ROUNDS = 100

TIMES_THE_CACHE = 3  # all copies together
MANY_TIMES_THE_CACHE = 8  # one buffer that needs no second one: what is left of it from the last call is at most an eighth
# Buffers so small that more would be needed are calls' overhead more than memory, and take longer to make than to time.
MOST_COPIES = 256
UNKNOWN_CACHE = 64 << 20
PROCESSORS = Path("/sys/devices/system/cpu")

Call = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Time of one call. microseconds: the median over all samples. low, high: 10th and 90th percentile. calls: how many were timed."""

    microseconds: float
    low: float
    high: float
    calls: int


def time_in_turn(
    calls: Mapping[str, Sequence[Call]], device: torch.device | str, graphs: bool = False, seconds: float = 0.2
) -> dict[str, Timing]:
    """Time of one call of each contender, all measured in alternation.

    calls: by contender, one callable for each copy of its buffers; they are gone through in turn. graphs: CUDA graphs of one pass each; a
    contender that cannot be captured is missing from the result. seconds: for each contender, without its warm-up, but no fewer than
    three samples are taken. What a call raises passes through. Raises UsageError for a contender without callables, for graphs on
    the CPU and for a device other than CPU and CUDA.
    """
    device = torch.device(device)
    if device.type not in SHORTEST_SAMPLE:
        raise UsageError(f"nothing can be timed on the device {device}; choose cpu or cuda")
    if graphs and device.type != "cuda":
        raise UsageError(f"CUDA graphs cannot be timed on the device {device}; leave graphs out")
    empty = [name for name, copied in calls.items() if not copied]
    if empty:
        raise UsageError(f"{empty[0]} has no call to time")
    stopwatch = _cuda_seconds if device.type == "cuda" else _cpu_seconds
    with _current(device):
        runners = [runner for name, copied in calls.items() if (runner := _runner(name, copied, stopwatch, graphs)) is not None]
        rounds = _rounds(runners, SHORTEST_SAMPLE[device.type], seconds)
        end = time.perf_counter() + 2 * seconds * len(runners)  # reached only if the machine got much busier than when rounds were counted
        for number in range(rounds):
            if number >= FEWEST_ROUNDS and time.perf_counter() > end:
                break
            for runner in runners:
                runner.take_turn(seconds / rounds)
    return {runner.name: runner.timing() for runner in runners}


@dataclass(kw_only=True)
class _Runner:
    """One contender. run: one call, or all calls of a graph (calls_per_run). estimate: seconds of a run."""

    name: str
    run: Call
    calls_per_run: int
    stopwatch: Callable[[Call, int], float]
    estimate: float
    runs_per_sample: int = 1
    samples: list[float] = field(default_factory=list)  # seconds of one call

    def take_turn(self, seconds: float) -> None:
        """Samples for ``seconds``, at least one. By the clock, not by number: the machine may be busier than when the estimate was made."""
        end = time.perf_counter() + seconds
        while True:
            self.samples.append(self.stopwatch(self.run, self.runs_per_sample) / (self.runs_per_sample * self.calls_per_run))
            if time.perf_counter() >= end:
                return

    def timing(self) -> Timing:
        ordered = sorted(1e6 * sample for sample in self.samples)
        low, middle, high = (_percentile(ordered, share) for share in (0.1, 0.5, 0.9))
        return Timing(microseconds=middle, low=low, high=high, calls=len(ordered) * self.runs_per_sample * self.calls_per_run)


def _runner(name: str, copied: Sequence[Call], stopwatch: Callable[[Call, int], float], graphs: bool) -> _Runner | None:
    """The warmed-up contender, or None if it cannot be captured in a graph."""
    in_turn = cycle(copied)

    def run() -> object:
        return next(in_turn)()

    for _ in range(max(1, len(copied) - 1)):  # the last copy's first call is the one that is timed below
        run()
    if not graphs:
        return _Runner(name=name, run=run, calls_per_run=1, stopwatch=stopwatch, estimate=stopwatch(run, 1))
    graph = _capture(copied)
    if graph is None:
        return None
    return _Runner(name=name, run=graph.replay, calls_per_run=len(copied), stopwatch=stopwatch, estimate=stopwatch(graph.replay, 1))


def _current(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _rounds(runners: Sequence[_Runner], shortest: float, seconds: float) -> int:
    """Choose how many runs make a sample of each runner, and the number of rounds, such that a round gives the slowest one a sample."""
    for runner in runners:
        if runner.estimate < shortest:  # one run was too short to time
            times = max(1, int(shortest / runner.estimate))
            runner.estimate = runner.stopwatch(runner.run, times) / times
        runner.runs_per_sample = max(1, ceil(shortest / runner.estimate))
    slowest = max((runner.runs_per_sample * runner.estimate for runner in runners), default=seconds)
    return min(MOST_ROUNDS, max(FEWEST_ROUNDS, int(seconds / slowest)))


def _percentile(ordered: Sequence[float], share: float) -> float:
    """Linear between the two nearest of the ``ordered`` values."""
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def _cpu_seconds(run: Call, times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        run()
    return time.perf_counter() - start


def _cuda_seconds(run: Call, times: int) -> float:
    """Seconds between two marks in the current stream."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3  # elapsed_time is in milliseconds


def _capture(copied: Sequence[Call]) -> torch.cuda.CUDAGraph | None:
    """A graph of one pass over all copies, or None for calls that wait for the device or otherwise cannot be captured."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    torch.cuda.synchronize()
    try:
        with torch.cuda.graph(graph):  # on a stream of its own
            for call in copied:
                call()
    except RuntimeError:  # CUDA's own refusals are of this class, too
        torch.cuda.set_stream(stream)  # a capture that cannot be ended leaves its own stream behind
        torch.cuda.synchronize()
        return None
    graph.replay()
    torch.cuda.synchronize()
    return graph


def copies(bytes_each: int, device: torch.device | str, limit_bytes: int) -> int:
    """How many buffers of ``bytes_each`` to go through in turn, so that each has left the last-level cache when its turn comes.

    Together they are three times the cache, at least two; one is enough if it alone is eight times the cache. Held below ``limit_bytes``
    and MOST_COPIES; 0 if not even one fits.
    """
    cache = cache_bytes(device)
    wanted = 1 if bytes_each >= MANY_TIMES_THE_CACHE * cache else max(2, ceil(TIMES_THE_CACHE * cache / max(1, bytes_each)))
    return min(wanted, MOST_COPIES, limit_bytes // max(1, bytes_each))


def cache_bytes(device: torch.device | str) -> int:
    """Size of the last-level cache: L2 on CUDA; on the CPU all that the usable processors have, 64 MiB if Linux does not tell."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    return _linux_cache_bytes(PROCESSORS, usable) or UNKNOWN_CACHE


def _linux_cache_bytes(root: Path, usable: Iterable[int]) -> int:
    """The caches of the highest level of the ``usable`` processors, each shared one counted once; 0 if the files do not tell."""
    found: dict[tuple[str, str], tuple[int, int]] = {}  # (level, processors that share it): level, bytes
    for processor in usable:
        for folder in (root / f"cpu{processor}" / "cache").glob("index*"):
            try:
                level, size, shared = ((folder / leaf).read_text().strip() for leaf in ("level", "size", "shared_cpu_list"))
            except OSError:
                continue
            if size.endswith("K") and (folder / "type").read_text().strip() != "Instruction":
                found[level, shared] = (int(level), int(size[:-1]) << 10)
    highest = max((level for level, _ in found.values()), default=0)
    return sum(size for level, size in found.values() if level == highest)
