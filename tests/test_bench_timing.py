"""How calls are timed: on a clock that only the timed calls move, so that every number is known beforehand."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ptqcli.bench import machine, timing
from ptqcli.bench.timing import Timing, copies, time_in_turn
from ptqcli.errors import UsageError

MICROSECOND = 1e-6


@dataclass
class Clock:
    """Time passes only in calls; ``log`` has the name of each."""

    now: float = 0.0
    log: list[str] = field(default_factory=list)

    def perf_counter(self) -> float:
        return self.now

    def call(self, name: str, seconds: float | Callable[[float], float]) -> Callable[[], None]:
        """A call that takes ``seconds``, or what they are at the time."""

        def run() -> None:
            self.log.append(name)
            self.now += seconds(self.now) if callable(seconds) else seconds

        return run

    def several(self, name: str, seconds: float | Callable[[float], float], count: int) -> list[Callable[[], None]]:
        return [self.call(f"{name}{number}", seconds) for number in range(count)]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(timing, "time", made)
    return made


def turns(log: list[str]) -> list[str]:
    """The names in ``log`` without their numbers, each row of equal ones as one."""
    names = [name[0] for name in log]
    return [name for place, name in enumerate(names) if place == 0 or names[place - 1] != name]


def test_a_call_that_always_takes_as_long_is_timed_exactly(clock: Clock) -> None:
    found = time_in_turn({"a": clock.several("a", 30 * MICROSECOND, 3), "b": clock.several("b", 0.007, 2)}, "cpu", seconds=0.5)
    assert [found["a"].low, found["a"].microseconds, found["a"].high] == pytest.approx([30, 30, 30])
    assert found["b"].microseconds == pytest.approx(7000)


def test_contenders_take_turns_in_one_run(clock: Clock) -> None:
    time_in_turn({name: clock.several(name, 1e-3, 2) for name in "abc"}, "cpu", seconds=0.1)
    measured = turns(clock.log)[3:]  # after the warm-up of each
    assert measured == ["a", "b", "c"] * (len(measured) // 3)
    assert len(measured) // 3 == 100


def test_a_disturbance_of_all_does_not_change_the_ratio_unless_they_are_timed_one_after_the_other(clock: Clock) -> None:
    """From some time on everything takes three times as long, as on a machine that got hot."""

    def lasting(seconds: float, slow_from: float) -> Callable[[float], float]:
        return lambda now: seconds * (3 if now >= slow_from else 1)

    calls = {name: clock.several(name, lasting(seconds, 0.25), 2) for name, seconds in (("a", 1e-3), ("b", 2e-3))}
    found = time_in_turn(calls, "cpu", seconds=0.2)
    assert found["b"].microseconds / found["a"].microseconds == pytest.approx(2)
    assert found["a"].high == pytest.approx(3 * found["a"].low)
    start = clock.now
    calls = {name: clock.several(name, lasting(seconds, start + 0.25), 2) for name, seconds in (("a", 1e-3), ("b", 2e-3))}
    alone = {name: time_in_turn({name: copied}, "cpu", seconds=0.2)[name] for name, copied in calls.items()}
    assert alone["b"].microseconds / alone["a"].microseconds == pytest.approx(6)


def test_a_call_now_and_then_that_is_disturbed_moves_the_90th_percentile_and_not_the_median(clock: Clock) -> None:
    seen = iter(range(10**6))
    found = time_in_turn({"a": clock.several("a", lambda _now: 0.05 if next(seen) % 7 == 6 else 1e-3, 2)}, "cpu", seconds=1)["a"]
    assert [found.low, found.microseconds] == pytest.approx([1000, 1000])
    assert found.high == pytest.approx(50_000)


def test_copies_are_gone_through_in_turn_and_each_is_called_before_it_counts(clock: Clock) -> None:
    time_in_turn({"a": clock.several("a", 1e-3, 5)}, "cpu", seconds=0.05)
    assert clock.log == [f"a{number % 5}" for number in range(len(clock.log))]
    assert len(clock.log) > 30


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_call_of_seconds_is_made_three_times_after_the_warm_up(clock: Clock, count: int) -> None:
    found = time_in_turn({"a": clock.several("a", 6.0, count)}, "cpu")["a"]
    assert found == Timing(microseconds=pytest.approx(6e6), low=pytest.approx(6e6), high=pytest.approx(6e6), calls=3)
    assert len(clock.log) == max(2, count) + 3


def test_a_slow_contender_does_not_cost_a_fast_one_its_samples(clock: Clock) -> None:
    found = time_in_turn({"a": clock.several("a", 1e-3, 2), "b": clock.several("b", 6.0, 1)}, "cpu", seconds=0.3)
    assert found["b"].calls == 3
    assert found["a"].calls == pytest.approx(300, abs=6)


def test_short_calls_are_joined_to_a_sample_that_a_clock_can_time(clock: Clock) -> None:
    runs: list[int] = []

    def stopwatch(run: Callable[[], object], times: int) -> float:
        runs.append(times)
        return original(run, times)

    original = timing._cpu_seconds
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "_cpu_seconds", stopwatch)
        time_in_turn({"a": clock.several("a", 3 * MICROSECOND, 2)}, "cpu", seconds=0.1)
    assert runs[0] == 1
    assert set(runs[2:]) == {67}  # 201 microseconds


def test_the_time_that_was_given_is_kept_even_if_calls_get_slower(clock: Clock) -> None:
    copied = clock.several("a", lambda now: 1e-3 if now < 0.01 else 0.03, 2)
    time_in_turn({"a": copied}, "cpu", seconds=0.2)
    assert clock.now < 0.45
    steady = clock.several("b", 1e-4, 2)
    start = clock.now
    time_in_turn({"b": steady}, "cpu", seconds=0.2)
    assert clock.now - start == pytest.approx(0.2, rel=0.1)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40), st.sampled_from([0.1, 0.5, 0.9]))
def test_percentiles_are_torchs(values: list[float], share: float) -> None:
    expected = torch.tensor(values, dtype=torch.float64).quantile(share).item()
    assert timing._percentile(sorted(values), share) == pytest.approx(expected, abs=1e-6)


def test_what_cannot_be_timed_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^nothing can be timed on the device meta; choose cpu or cuda$"):
        time_in_turn({"a": [lambda: None]}, "meta")
    with pytest.raises(UsageError, match=r"^CUDA graphs cannot be timed on the device cpu; leave graphs out$"):
        time_in_turn({"a": [lambda: None]}, "cpu", graphs=True)
    with pytest.raises(UsageError, match=r"^a has no call to time$"):
        time_in_turn({"a": []}, "cpu")
    assert time_in_turn({}, "cpu") == {}


def test_what_a_call_raises_passes_through() -> None:
    def broken() -> None:
        raise ZeroDivisionError("of its own")

    with pytest.raises(ZeroDivisionError, match="of its own"):
        time_in_turn({"a": [broken]}, "cpu")


class FakeCuda:
    """The parts of ``torch.cuda`` that timing uses, on the clock: calls take no time outside of a stream, replays 1 us a call."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.stream = "the first"
        fake = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = fake.clock.now

            def synchronize(self) -> None:
                self.reached = True

            def elapsed_time(self, end: Event) -> float:
                assert end.reached, "an event is read before the device has reached it"
                return (end.at - self.at) * 1e3

        class CUDAGraph:
            def __init__(self) -> None:
                self.calls: list[str] = []

            def replay(self) -> None:
                fake.clock.now += MICROSECOND * len(self.calls)

        self.Event, self.CUDAGraph = Event, CUDAGraph

    @contextmanager
    def graph(self, made: SimpleNamespace):
        """As torch's own: when its body fails it leaves its stream behind."""
        before, stream = len(self.clock.log), self.stream
        self.stream = "of the capture"
        yield
        self.stream = stream
        made.calls = self.clock.log[before:]

    def current_stream(self) -> str:
        return self.stream

    def set_stream(self, stream: str) -> None:
        self.stream = stream

    @contextmanager
    def device(self, _device: torch.device):
        yield

    def synchronize(self) -> None:
        pass


@pytest.fixture
def cuda(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    made = FakeCuda(clock)
    monkeypatch.setattr(torch, "cuda", made)
    return made


def test_events_on_a_gpu_are_read_in_seconds(clock: Clock, cuda: FakeCuda) -> None:
    found = time_in_turn({"a": clock.several("a", 25 * MICROSECOND, 3)}, "cuda", seconds=0.1)
    assert found["a"].microseconds == pytest.approx(25)


def test_a_graph_holds_one_pass_over_all_copies_and_gives_the_time_of_one_call(clock: Clock, cuda: FakeCuda) -> None:
    copied = clock.several("a", 25 * MICROSECOND, 5)
    found = time_in_turn({"a": copied}, "cuda", graphs=True, seconds=0.1)
    assert found["a"].microseconds == pytest.approx(1)
    assert clock.log[-5:] == ["a0", "a1", "a2", "a3", "a4"]
    assert found["a"].calls % 5 == 0


def test_a_call_that_cannot_be_captured_is_missing_and_the_others_are_there(clock: Clock, cuda: FakeCuda) -> None:
    def waits() -> None:
        if len(calls) > 1:
            raise RuntimeError("operation not permitted when stream is capturing")
        calls.append(1)

    calls: list[int] = []
    found = time_in_turn({"waits": [waits, waits], "a": clock.several("a", 1e-5, 2)}, "cuda", graphs=True, seconds=0.05)
    assert found["a"].microseconds == pytest.approx(1)
    assert list(found) == ["a"]
    assert cuda.stream == "the first"


@given(bytes_each=st.integers(1, 10**10), limit=st.integers(0, 10**11), cache=st.integers(1, 10**9))
def test_a_pass_over_the_copies_is_larger_than_the_cache_wherever_memory_allows(bytes_each: int, limit: int, cache: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "cache_bytes", lambda _device: cache)
        count = copies(bytes_each, "cpu", limit)
    assert count * bytes_each <= limit
    if count not in (limit // bytes_each, timing.MOST_COPIES):
        assert count * bytes_each >= 3 * cache
        assert count >= 2 or bytes_each >= 8 * cache
        assert (count - 1) * bytes_each < 3 * cache or count == 2


def write_caches(root: Path, caches: dict[int, list[tuple[int, str, str, str]]]) -> Path:
    """For each processor its caches: level, type, size, processors that share it."""
    for processor, entries in caches.items():
        for number, entry in enumerate(entries):
            folder = root / f"cpu{processor}" / "cache" / f"index{number}"
            folder.mkdir(parents=True)
            for leaf, value in zip(("level", "type", "size", "shared_cpu_list"), entry, strict=True):
                (folder / leaf).write_text(f"{value}\n")
    return root


def test_the_last_level_caches_of_the_usable_processors_are_counted_once_each(tmp_path: Path) -> None:
    def own(processor: int, shared: str) -> list[tuple[int, str, str, str]]:
        return [
            (1, "Data", "32K", str(processor)),
            (1, "Instruction", "65536K", str(processor)),
            (2, "Unified", "1024K", str(processor)),
            (3, "Unified", "32768K", shared),
        ]

    root = write_caches(tmp_path, {0: own(0, "0-1"), 1: own(1, "0-1"), 2: own(2, "2-3"), 3: own(3, "2-3")})
    assert timing._linux_cache_bytes(root, [0, 1]) == 32 << 20
    assert timing._linux_cache_bytes(root, [1, 2]) == 64 << 20
    assert timing._linux_cache_bytes(root, range(4)) == 64 << 20
    assert timing._linux_cache_bytes(root, [7]) == 0


def test_a_machine_that_does_not_tell_has_an_assumed_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "PROCESSORS", tmp_path)
    assert timing.cache_bytes("cpu") == timing.UNKNOWN_CACHE


def test_limits_count_bytes_and_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call takes a second, so that a limit is what one call moves or does."""
    second = Timing(microseconds=1e6, low=1e6, high=1e6, calls=1)
    monkeypatch.setattr(machine, "time_in_turn", lambda calls, *_args, **_more: dict.fromkeys(calls, second))
    monkeypatch.setattr(machine, "SMALLEST_BUFFER", 1 << 20)
    monkeypatch.setattr(machine, "cache_bytes", lambda _device: 1 << 10)
    monkeypatch.setattr(machine, "SIZES", {"cpu": (64, 128)})
    found = machine.measure("cpu", seconds=100)
    assert found.bandwidth == 2 << 20  # a copy reads and writes it
    assert found.arithmetic == dict.fromkeys(["float32", "bfloat16", "int8"], 2.0 * 128**3)
    assert found.threads == torch.get_num_threads()
    assert machine.measure("cpu", seconds=7).arithmetic["int8"] == 2.0 * 64**3  # the next size would take eight seconds


def test_limits_of_this_machine_are_of_a_machines_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "SIZES", {"cpu": (128, 256)})
    monkeypatch.setattr(machine, "SMALLEST_BUFFER", 16 << 20)
    monkeypatch.setattr(machine, "TIMES_THE_CACHE", 0)
    found = machine.measure("cpu", seconds=0.02)
    assert 1e8 < found.bandwidth < 1e13
    assert all(1e7 < rate < 1e15 for rate in found.arithmetic.values())
    assert found.name


def test_the_product_of_bytes_is_exact() -> None:
    product = machine._product(64, torch.int8, torch.device("cpu"))()
    assert product.dtype == torch.int32
    assert product.abs().max() > 1000


def test_a_processor_without_a_name_has_that_of_its_kind(tmp_path: Path) -> None:
    facts = tmp_path / "cpuinfo"
    facts.write_text("processor\t: 0\nmodel name\t: Some Processor: 9\n\nmodel name\t: another\n")
    assert machine._processor_name(facts) == "Some Processor: 9"
    assert machine._processor_name(tmp_path / "missing")
