"""Several processes that share a run: the same codes as one, one voice, and a run that goes on when one of them has died."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from commandline import Answer
from forked import ForkedPtq
from mixtures import MIXTURES
from safetensors.torch import load_file
from tiny import make_model, write_text
from torch import Tensor

from ptqcli.calibration.share import Share
from ptqcli.calibration.statistics import Hessian, InputStatistics, Pairs, StatisticsRequest
from ptqcli.cli import processes
from ptqcli.cli.processes import Place
from ptqcli.errors import UsageError
from ptqcli.pipeline.output import JOURNAL
from ptqcli.pipeline.ranks import assigned, packed, unpacked
from ptqcli.pipeline.report import read_report

CPU = torch.device("cpu")
WINDOWS = ("--calib", "text.txt", "--nsamples", "13", "--seqlen", "64", "--batch-size", "4")
GROUPS = ("--group-size", "32")
EVERYTHING = StatisticsRequest(hessian=True, magnitudes=True, samples=True, sums=True)


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text and some models."""
    folder = tmp_path_factory.mktemp("ranks")
    write_text(folder / "text.txt")
    make_model(folder / "model")
    make_model(folder / "deep", num_hidden_layers=6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.ARCHITECTURES, "mixtral", MIXTURES["mixtral"])
        make_model(folder / "experts", "mixtral")
    return folder


@pytest.fixture(scope="module")
def servers() -> Iterator[list[ForkedPtq]]:
    """One for each of three processes."""
    with ThreadPoolExecutor() as pool:
        made = list(pool.map(lambda _: ForkedPtq(), range(3)))
    yield made
    for server in made:
        server.close()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun would give a process."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in place.items()}}


def together(servers: Sequence[ForkedPtq], room: Path, lines: Sequence[Sequence[str]]) -> list[Answer]:
    """Each line in a process of one group."""
    port = free_port()

    def answer(rank: int) -> Answer:
        return servers[rank](*lines[rank], folder=room, **environment(rank, len(lines), port))

    with ThreadPoolExecutor() as pool:
        return list(pool.map(answer, range(len(lines))))


def codes(folder: Path) -> Tensor:
    """All codes of a checkpoint of 4 or 8 bits, one after the other, uint8."""
    found = []
    for name, tensor in sorted(load_file(folder / "model.safetensors").items()):
        raw = tensor.contiguous().view(torch.uint8).flatten()
        if name.endswith(".weight_packed"):
            found += [raw & 15, raw >> 4]
        elif name.endswith(".weight") and tensor.dtype == torch.int8:
            found.append(raw)
    return torch.cat(found)


def alike(one: Path, other: Path, share: float = 0.999) -> bool:
    """Whether two checkpoints have so many codes in common, and all else but for the last digits, but where a code is another."""
    here, there = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert here.keys() == there.keys()
    rest = [name for name in here if not name.endswith(".weight_packed") and here[name].dtype != torch.int8]
    close = torch.cat([torch.isclose(here[name].float(), there[name].float(), rtol=1e-3, atol=1e-6).flatten() for name in rest])
    return float(close.float().mean()) > 0.99 and float((codes(one) == codes(other)).float().mean()) >= share


# What they share


class Threads:
    """``Others`` for threads of one process: each hands in its value and gets those of all."""

    def __init__(self, size: int) -> None:
        self._values: list[Any] = [None] * size
        self._barrier = threading.Barrier(size)
        self._rank = threading.local()

    def run(self, works: Sequence[Any]) -> None:
        def work(rank: int) -> None:
            self._rank.number = rank
            works[rank](self)

        with ThreadPoolExecutor(len(works)) as pool:
            list(pool.map(work, range(len(works))))

    def everyone(self, value: Any) -> list[Any]:
        self._values[self._rank.number] = value
        self._barrier.wait()
        found = list(self._values)
        self._barrier.wait()
        return found

    def add(self, tensors: Sequence[Tensor]) -> None:
        for tensor, others in zip(tensors, zip(*self.everyone([each.clone() for each in tensors]), strict=True), strict=True):
            tensor.copy_(sum(others))

    def largest(self, tensors: Sequence[Tensor]) -> None:
        for tensor, others in zip(tensors, zip(*self.everyone([each.clone() for each in tensors]), strict=True), strict=True):
            tensor.copy_(torch.stack(others).amax(0))


def statistics_of(x: Tensor, f: Tensor, d: Tensor, held: Tensor, tokens: int, before: int) -> InputStatistics:
    seen = InputStatistics.empty(x.shape[1], EVERYTHING, tokens, CPU, before)
    seen.pairs = Pairs.empty(x.shape[1], d.shape[1], CPU)
    seen.add(x)
    seen.pairs.add(x, f, d, held)
    return seen


@pytest.mark.parametrize("cut", [0, 700, 1501])
def test_statistics_of_parts_are_those_of_the_whole(cut: int) -> None:
    count = 3000  # more than are sampled, so that samples are some of them
    x, f, d = torch.randn(count, 6), torch.randn(count, 6), torch.randn(count, 4)
    held = torch.arange(count) % 5 == 0
    whole = statistics_of(x, f, d, held, count, 0)
    parts = [
        statistics_of(x[:cut], f[:cut], d[:cut], held[:cut], count, 0),
        statistics_of(x[cut:], f[cut:], d[cut:], held[cut:], count, cut),
    ]
    Threads(2).run([part.merge for part in parts])
    for part in parts:
        assert part.tokens == count
        assert torch.equal(part.sampled(), x[:: whole.stride])
        for name, own, expected in _tensors(part, whole):
            torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-4, msg=name)


def _tensors(one: Any, other: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
    """All tensors of two dataclasses of one kind but for the samples, with the names of their fields."""
    for name, value in vars(one).items():
        if isinstance(value, Tensor):
            yield name, value, getattr(other, name)
        elif isinstance(value, Hessian):
            assert value.tokens == getattr(other, name).tokens
            yield name, value.matrix, getattr(other, name).matrix
        elif hasattr(value, "__dict__"):
            yield from _tensors(value, getattr(other, name))


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("batch", [1, 4, 100])
def test_each_window_is_in_one_share_and_in_one_batch_of_it(size: int, batch: int) -> None:
    windows = torch.ones(13, 7, dtype=torch.long)
    windows[3, 4:] = -1  # padding
    shares = [Share.of(windows, batch, rank, size) for rank in range(size)]
    borders = [share.first for share in shares]
    assert all(border % batch == 0 for border in borders) or batch * size > 13
    assert [window for share in shares for window in range(share.first, share.stop)] == list(range(13))
    for share in shares:
        assert share.tokens == 13 * 7 - 3
        assert share.before == int((windows[: share.first] != -1).sum())
        pieces = [(share.first + start, share.first + stop) for start, stop in share.batches(batch)]
        assert [window for start, stop in pieces for window in range(start, stop)] == list(range(share.first, share.stop))
        assert all(start // batch == (stop - 1) // batch for start, stop in pieces)  # of one batch of all windows


def test_the_longest_is_given_out_first() -> None:
    owners = assigned([1, 5, 2, 2, 4], 2)
    loads = [sum(cost for cost, owner in zip([1, 5, 2, 2, 4], owners, strict=True) if owner == rank) for rank in range(2)]
    assert owners[1] != owners[4]
    assert sorted(loads) == [7, 7]
    assert assigned([], 3) == []


def test_what_is_sent_is_what_comes() -> None:
    window = torch.arange(12.0).view(3, 4)
    value = {
        "strided": window.t(),
        "half": torch.randn(3, dtype=torch.bfloat16),
        "none": torch.empty(0, 5),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "words": ("a", None, [Share.whole(2, 3)]),
    }
    back = unpacked(packed(value), CPU)
    assert back["words"] == value["words"]
    for name in ("strided", "half", "none", "bool", "scalar"):
        assert torch.equal(back[name], value[name])
        assert back[name].dtype == value[name].dtype


# The same codes

WAYS = {
    "rtn": ("model", *GROUPS, "--algo", "rtn"),
    "gptq": ("model", *GROUPS),
    "gptq in 3": ("model", *GROUPS),
    "awq+gptq": ("model", *GROUPS, "--algo", "awq+gptq"),
    "target": ("model", *GROUPS, "--target", "original"),
    "smoothquant": ("model", "--algo", "smoothquant", "--smooth-alpha", "auto", "--act-scales", "static"),
    "autoround": ("model", *GROUPS, "--algo", "autoround", "--iters", "12", "--learn-batch", "4"),
    "two blocks": ("model", *GROUPS, "--algo", "omniquant", "--iters", "6", "--learn-window", "2", "--learn-batch", "3"),
    "gptq start": ("model", *GROUPS, "--algo", "autoround", "--start", "gptq", "--iters", "5"),
    "head": ("model", *GROUPS, "--lm-head", "w4", "--embeddings", "w4", "--adapter-rank", "4"),
    "obq": ("model", *GROUPS, "--algo", "let+obq", "--let-iters", "5"),
    "experts": ("experts", *GROUPS, "--min-expert-tokens", "100"),
    "at once": ("experts", *GROUPS, "--algo", "rtn", "--expert-calibration", "all"),
}


LEARNED = {"autoround", "two blocks", "gptq start"}


@pytest.mark.parametrize("way", WAYS)
def test_codes_are_those_of_one_process(servers: list[ForkedPtq], room: Path, way: str) -> None:
    count, name = 3 if way.endswith("3") else 2, re.sub(r"\W", "-", way)
    line = ["quantize", *WAYS[way], *WINDOWS]
    alone = servers[0](*line, "--output", f"{name}-1", folder=room)
    assert alone.code == 0, alone.err
    answers = together(servers, room, [[*line, "--output", f"{name}-2"]] * count)
    assert [answer.code for answer in answers] == [0] * count, answers[0].err
    assert f"{count} processes share the work" in answers[0].err
    assert all(answer.out + answer.err == "" for answer in answers[1:])
    if way in LEARNED:  # gradients of parts of a batch are added up in float32
        assert alike(room / f"{name}-1", room / f"{name}-2")
    else:
        here, there = (room / f"{name}-{number}" for number in (1, 2))
        files = [path.relative_to(here) for path in here.rglob("*.safetensors")]
        assert len(files) == (2 if "--adapter-rank" in line else 1)
        assert [file for file in files if (here / file).read_bytes() != (there / file).read_bytes()] == []
    reports = [read_report(room / f"{name}-{number}") for number in (1, 2)]
    kept = ("name", "scheme", "bits_per_weight", "tokens", "pooled", "inputs_all_zero")
    layers, others = ([{key: layer[key] for key in kept} for layer in report["layers"]] for report in reports)
    assert layers == others
    errors = [torch.tensor([layer["relative_error"] for layer in report["layers"]]) for report in reports]
    torch.testing.assert_close(*errors, rtol=1e-2, atol=1e-4)


def test_other_codes_are_found(room: Path, servers: list[ForkedPtq]) -> None:
    """The twin of the test above: another text gives fewer codes in common than float sums do."""
    for name, extra in (("seed-0", ()), ("seed-1", ("--seed", "1"))):
        assert servers[0]("quantize", "model", *GROUPS, *WINDOWS, *extra, "--output", name, folder=room).code == 0
    assert not alike(room / "seed-0", room / "seed-1")


# One voice


def test_an_error_of_all_is_told_once(servers: list[ForkedPtq], room: Path) -> None:
    line = ["quantize", "model", *GROUPS, *WINDOWS, "--nsamples", "2", "--output", "few"]
    answers = together(servers, room, [line] * 3)
    assert [answer.code for answer in answers] == [2] * 3
    told = "error: nsamples 2: is fewer than the 3 processes that share the calibration windows; give more, or start fewer processes\n"
    assert answers[0].err.endswith(told)
    assert [answer.err for answer in answers[1:]] == ["", ""]


def test_an_error_of_another_process_is_told_by_the_first(servers: list[ForkedPtq], room: Path) -> None:
    good = ["quantize", "model", *GROUPS, *WINDOWS, "--output", "broken"]
    answers = together(servers, room, [good, ["quantize", "no-model", *good[2:]]])
    assert [answer.code for answer in answers] == [2, 2]
    assert answers[0].err.splitlines()[-1].startswith("error: no-model")
    assert answers[1].err == ""
    assert not (room / "broken.partial").exists()


def test_a_line_that_is_not_understood_is_told_once(servers: list[ForkedPtq], room: Path) -> None:
    answers = together(servers, room, [["quantize", "model", "--nsample"]] * 2)
    assert [answer.code for answer in answers] == [2, 2]
    assert "--nsample" in answers[0].err
    assert answers[1].err == ""


def test_a_rehearsal_is_that_of_the_first(servers: list[ForkedPtq], room: Path) -> None:
    answers = together(servers, room, [["quantize", "model", *GROUPS, *WINDOWS, "--dry-run", "--json", "--output", "dry"]] * 2)
    assert [answer.code for answer in answers] == [0, 0]
    assert json.loads(answers[0].out)["output"].endswith("dry")
    assert answers[1].out + answers[1].err == ""


def test_one_that_does_not_find_the_others(servers: list[ForkedPtq], room: Path) -> None:
    line = ("quantize", "model", *WINDOWS, "--output", "none")
    answer = servers[0](*line, folder=room, RANK="0", WORLD_SIZE="2")
    assert answer.code == 1
    assert answer.err.startswith("error: process 0 of 2 does not find the others: ")
    assert "MASTER_ADDR" in answer.err


@pytest.mark.parametrize(
    ("variables", "flags", "told"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, (), "error: RANK 2 of WORLD_SIZE 2, LOCAL_RANK 0 in the environment make no sense"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, (), "error: RANK and WORLD_SIZE and LOCAL_RANK of the environment are no whole numbers"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, ("--processes", "3"), "error: processes 3: there are 2 already"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, ("--nsamples", "0"), "error: nsamples 0"),
    ],
)
def test_an_environment_that_makes_no_sense(
    servers: list[ForkedPtq], room: Path, variables: dict[str, str], flags: tuple[str, ...], told: str
) -> None:
    answer = servers[0]("quantize", "model", *WINDOWS, *flags, "--output", "none", folder=room, **variables)
    assert answer.code == 2
    assert told in answer.err


def test_a_solver_that_does_not_share_is_refused(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ptqcli.pipeline.pipeline import quantize
    from ptqcli.pipeline.ranks import Ranks
    from ptqcli.recipe import Recipe
    from ptqcli.solvers.autoround import AutoRound

    two = Ranks()
    monkeypatch.setattr(two, "size", 2, raising=False)
    monkeypatch.setattr(AutoRound, "shares", False)
    request = replace(Recipe(), algo="autoround", calib=str(room / "text.txt"), nsamples=4, seqlen=32)
    with pytest.raises(UsageError, match="algo autoround: autoround does not work in several processes; run it in one"):
        quantize(room / "model", request, room / "refused", ranks=two)


# How processes are started


def test_several_gpus_are_used_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert processes.processes_for("cuda", lambda: 100) == 3
    assert processes.processes_for("cuda", lambda: 2) == 2
    assert processes.processes_for("cuda:1", lambda: 100) == processes.processes_for("cpu", lambda: 100) == 1
    assert [str(processes.device_of("cuda", Place(5, 6, local))) for local in (0, 2)] == ["cuda:0", "cuda:2"]
    assert str(processes.device_of("cuda:1", None)) == "cuda:1"
    with pytest.raises(UsageError, match="device cuda:1: is one device, and 6 processes share the run; give --device cuda"):
        processes.device_of("cuda:1", Place(5, 6, 1))
    with pytest.raises(UsageError, match="process 3 of this machine finds 3 CUDA devices; start one process for each"):
        processes.device_of("cuda", Place(5, 6, 3))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert processes.processes_for("cuda", lambda: 100) == 1
    assert str(processes.device_of("cuda", Place(1, 2, 1))) == "cuda:0"  # each process is shown one of its own


def test_what_would_start_a_process_for_each_gpu_starts_them(servers: list[ForkedPtq], room: Path) -> None:
    """The same way on the CPU, where a number stands for the GPUs."""
    line = ("quantize", "model", *GROUPS, *WINDOWS)
    assert servers[0](*line, "--output", "alone", folder=room).code == 0
    answer = servers[0](*line, "--processes", "2", "--json", "--output", "started", folder=room)
    assert answer.code == 0, answer.err
    assert "2 processes share the work" in answer.err
    assert json.loads(answer.out)["output"].endswith("started")
    assert codes(room / "alone").equal(codes(room / "started"))


def test_one_that_cannot_start_is_told(servers: list[ForkedPtq], room: Path) -> None:
    line = ("quantize", "model", *GROUPS, *WINDOWS, "--processes", "2", "--output", "unstarted")
    answer = servers[0](*line, folder=room, PYTHONHOME="/nowhere")
    assert answer.code == 1
    assert answer.err.splitlines()[-1] == "error: process 1 of 0 to 1 does not come; look at what it says, and start all again"


@pytest.mark.slow
def test_torchrun(servers: list[ForkedPtq], room: Path) -> None:
    line = ("quantize", "model", *GROUPS, *WINDOWS, "--output")
    assert servers[0](*line, "untouched", folder=room).code == 0
    started = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "ptqcli", *line, "run")
    done = subprocess.run(started, cwd=room, env={**os.environ, "PYTHONWARNINGS": "ignore"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written ") == 1
    assert codes(room / "untouched").equal(codes(room / "run"))


# Death and resumption


class Started:
    """`python -m ptqcli quantize` as so many processes of a group, on a model of six blocks."""

    def __init__(self, room: Path, output: str, size: int, *flags: str, short: int | None = None) -> None:
        """short: the process that cannot write files beyond 50 kB, as if its disk were full."""

        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))

        port = free_port()
        command = [sys.executable, "-m", "ptqcli", "quantize", "deep", *GROUPS, *WINDOWS, *flags, "--output", output]
        self.processes = [
            subprocess.Popen(
                command,
                cwd=room,
                env={**os.environ, "PYTHONWARNINGS": "ignore", **(environment(rank, size, port) if size > 1 else {})},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                preexec_fn=limit if rank == short else None,
            )
            for rank in range(size)
        ]
        self.said = ""

    def until(self, text: str) -> None:
        """Read what the first process says up to a line with ``text``."""
        stream = self.processes[0].stderr
        assert stream is not None
        for line in stream:
            self.said += line
            if text in line:
                return
        raise AssertionError(self.said)

    def end(self) -> tuple[list[int], list[str]]:
        """Exit codes, and what is said from here on."""
        texts = [process.communicate(timeout=120)[1] for process in self.processes]
        return [process.returncode for process in self.processes], texts


@pytest.fixture(scope="module")
def whole(room: Path, servers: list[ForkedPtq]) -> Path:
    """The six blocks by one process that nobody ended."""
    assert servers[0]("quantize", "deep", *GROUPS, *WINDOWS, "--output", "whole", folder=room).code == 0
    return room / "whole"


@pytest.mark.parametrize(("rank", "sizes"), [(1, (2, 1)), pytest.param(2, (3, 2), marks=pytest.mark.slow)])
def test_a_process_that_dies_ends_the_run_which_goes_on(
    room: Path, whole: Path, servers: list[ForkedPtq], rank: int, sizes: tuple[int, int]
) -> None:
    output = f"killed-{rank}"
    run = Started(room, output, sizes[0])
    run.until("block 2/6")
    start = time.monotonic()
    run.processes[rank].send_signal(signal.SIGKILL)
    returned, said = run.end()
    assert time.monotonic() - start < 60
    assert returned == [-signal.SIGKILL if number == rank else 1 for number in range(sizes[0])]
    last = said[0].splitlines()[-1]
    assert last.startswith(f"error: process {rank} of 0 to {sizes[0] - 1} has died, or cannot be reached any more; ")
    assert re.search(rf"\d of 6 blocks are kept in .*{output}.partial: the same command goes on from there", last)
    assert "Traceback" not in "".join(said)
    assert "".join(said[1:]) == ""
    _goes_on(room, whole, servers, output, sizes[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("short", "told"),
    [
        (0, r"error: .*/shard-\d+.safetensors.tmp: File too large"),
        (1, r"error: .*: cannot hold 0.00 GB of activations, which --activation-budget keeps out of memory: File too large; make room .*"),
    ],
)
def test_a_disk_that_is_full_ends_all_with_one_message(room: Path, short: int, told: str) -> None:
    run = Started(room, f"full-{short}", 2, *(("--activation-budget", "0") if short else ()), short=short)
    returned, said = run.end()
    assert returned == [1, 1]
    assert re.fullmatch(told, said[0].splitlines()[-1])
    assert said[0].count("error:") == 1
    assert said[1] == ""


@pytest.mark.slow
def test_the_first_process_dies(room: Path, whole: Path, servers: list[ForkedPtq]) -> None:
    run = Started(room, "headless", 2)
    run.until("block 2/6")
    run.processes[0].send_signal(signal.SIGKILL)
    returned, said = run.end()
    assert returned == [-signal.SIGKILL, 1]
    assert said[1].startswith("error: process 0 of 0 to 1 has died, or cannot be reached any more; what is finished is kept ")
    assert len(said[1].splitlines()) == 1
    _goes_on(room, whole, servers, "headless", 1)


@pytest.mark.slow
def test_an_interruption_is_told_once_and_goes_on_in_two(room: Path, whole: Path, servers: list[ForkedPtq]) -> None:
    run = Started(room, "stopped", 2)
    run.until("block 3/6")
    for process in run.processes:
        process.send_signal(signal.SIGTERM)
    returned, said = run.end()
    assert returned == [130, 130]
    assert re.search(r"^interrupted; \d of 6 blocks are kept in .*stopped.partial", said[0], re.MULTILINE)
    assert said[1] == ""
    _goes_on(room, whole, servers, "stopped", 2)


@pytest.mark.parametrize("flags", [(), pytest.param(("--algo", "autoround", "--iters", "4"), marks=pytest.mark.slow)])
def test_what_one_process_began_two_go_on_with(room: Path, servers: list[ForkedPtq], flags: tuple[str, ...]) -> None:
    output = f"begun-{len(flags)}"
    assert servers[0]("quantize", "deep", *GROUPS, *WINDOWS, *flags, "--output", f"{output}-whole", folder=room).code == 0
    run = Started(room, output, 1, *flags)
    run.until("block 2/6")
    run.processes[0].send_signal(signal.SIGKILL)
    run.end()
    _goes_on(room, room / f"{output}-whole", servers, output, 2, *flags)


def _goes_on(room: Path, whole: Path, servers: list[ForkedPtq], output: str, size: int, *flags: str) -> None:
    assert (room / f"{output}.partial" / JOURNAL).exists()
    answers = together(servers, room, [["quantize", "deep", *GROUPS, *WINDOWS, *flags, "--output", output]] * size)
    assert [answer.code for answer in answers] == [0] * size, answers[0].err
    assert re.search(r"^going on behind \d of 6 blocks", answers[0].err, re.MULTILINE)
    assert alike(whole, room / output)
    assert not (room / f"{output}.partial").exists()
