"""Kind: a run that dies of memory that was short for a moment. The batch is halved and the work goes on, which is said and written down;
with one window it is an error that says what to lower, and what is finished is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import Ptq, one_line
from safetensors.torch import load_file
from tiny import make_model, write_text
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import ptqcli
from ptqcli.calibration import record
from ptqcli.errors import MachineError, PTQError
from ptqcli.pipeline.progress import NoProgress
from ptqcli.pipeline.report import LOG_JSON, LOGS, REPORT_NAME, read_report

BLOCKS = 3
SEQLEN, LARGEST = 16, 4
FORWARD = LlamaDecoderLayer.forward
REQUESTS = {
    "gptq": {"algo": "gptq"},
    "awq+gptq": {"algo": "awq+gptq"},
    "target": {"algo": "gptq", "gptq": {"target": "original"}},
}
NO_ROOM = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
NO_ROOM_HERE = RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes.")


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    make_model(folder / "model", "llama", num_hidden_layers=BLOCKS)
    write_text(folder / "text.txt")
    return folder


class Said(NoProgress):
    def __init__(self) -> None:
        self.remarks: list[str] = []
        self.begun: list[int] = []

    def remark(self, text: str) -> None:
        self.remarks.append(text)

    def block_started(self, index: int, count: int) -> None:
        self.begun.append(index)


def run(room: Path, output: Path, name: str = "gptq", batch: int = LARGEST, **more: Any) -> Said:
    said = Said()
    request = {"group_size": 32, "calib": str(room / "text.txt"), "nsamples": 8, "seqlen": SEQLEN, **REQUESTS[name], **more}
    ptqcli.quantize(room / "model", output=output, batch_size=batch, progress=said, **request)
    return said


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Lets blocks from a number on, or what runs before them, take so many windows at once and no more."""

    def limit(windows: int, block: int = 0, error: Exception = NO_ROOM, times: int = 1_000) -> None:
        inner = FORWARD
        left = [times]

        def running(self: Any, hidden: Tensor, *given: Any, **named: Any) -> Any:
            calibrates = (
                hidden.shape[1] == SEQLEN and len(hidden) <= LARGEST
            )  # and neither finds out how the model is made, nor tries scales
            if calibrates and len(hidden) > windows and self.self_attn.layer_idx >= block and left[0]:
                left[0] -= 1
                raise error
            return inner(self, hidden, *given, **named)

        monkeypatch.setattr(LlamaDecoderLayer, "forward", running)

    yield limit
    monkeypatch.undo()


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def equal_blocks(one: Path, other: Path) -> list[bool]:
    first, second = weights(one), weights(other)
    return [
        all(torch.equal(value, second[name]) for name, value in first.items() if name.startswith(f"model.layers.{index}."))
        for index in range(BLOCKS)
    ]


@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize("error", [NO_ROOM, NO_ROOM_HERE], ids=["cuda", "cpu"])
def test_the_batch_is_halved_until_it_fits(room: Path, tmp_path: Path, short: Callable[..., None], name: str, error: Exception) -> None:
    """From the first block on the result is that of the smaller batch, but for the note in the report."""
    run(room, tmp_path / "small", name, batch=1)
    short(1, error=error)
    said = run(room, tmp_path / "out", name, batch=4)
    assert len(said.remarks) == 2
    assert all(f"out of memory on cpu behind 0 of {BLOCKS} blocks (" in remark for remark in said.remarks)
    assert ["going on with batches of 2" in said.remarks[0], "going on with batches of 1" in said.remarks[1]] == [True] * 2
    for file in (tmp_path / "small").iterdir():
        if file.name not in (*LOGS, REPORT_NAME):
            assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name
    reports = [read_report(tmp_path / each) or {} for each in ("small", "out")]
    calibrations = [report.pop("calibration") for report in reports]
    for calibration in calibrations:
        calibration.pop("texts")  # whether the model knows them is not found out where there is no memory for it
    assert calibrations[1] == {**calibrations[0], "batch_size": 1, "halved_at": [0, 0]}
    assert reports[0] == reports[1]
    assert (tmp_path / "out" / LOG_JSON).read_text().count("going on with") == 2


def test_finished_blocks_stay(room: Path, tmp_path: Path, short: Callable[..., None]) -> None:
    """Those before have the codes of the larger batch, and are not done again; no layer is told twice."""
    run(room, tmp_path / "large")
    short(2, block=2)
    said = run(room, tmp_path / "out")
    assert said.begun == [0, 1, 2, 2]
    assert equal_blocks(tmp_path / "large", tmp_path / "out")[:2] == [True, True]
    report = read_report(tmp_path / "out") or {}
    assert report["calibration"]["halved_at"] == [2]
    names = [layer["name"] for layer in report["layers"]]
    assert (len(names), len(set(names))) == (7 * BLOCKS, 7 * BLOCKS)


def test_memory_that_was_short_once(room: Path, tmp_path: Path, short: Callable[..., None]) -> None:
    """In the middle of a block whose folds are noted already."""
    short(0, block=1, times=1)
    run(room, tmp_path / "out", "awq+gptq")
    report = read_report(tmp_path / "out") or {}
    run(room, tmp_path / "whole", "awq+gptq", batch=2)
    assert len(report["folds"]) == len((read_report(tmp_path / "whole") or {})["folds"])


def test_before_the_blocks(room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner, seen = record._record_batch, []

    def recording(skeleton: Any, model: nn.Module, ids: Tensor) -> Any:
        seen.append(len(ids))
        if len(ids) > 2:
            raise NO_ROOM
        return inner(skeleton, model, ids)

    monkeypatch.setattr(record, "_record_batch", recording)
    said = run(room, tmp_path / "out", batch=8)
    assert seen[:4] == [8, 4, 2, 2]
    assert len(said.remarks) == 2


def test_with_one_window_it_is_an_error_and_what_is_finished_is_kept(room: Path, tmp_path: Path, short: Callable[..., None]) -> None:
    whole = tmp_path / "whole"
    run(room, whole, batch=1)
    short(0, block=2)
    with pytest.raises(
        PTQError,
        match=rf"out of memory on cpu behind 2 of {BLOCKS} blocks \(CUDA out of memory.*\); lower --seqlen or --nsamples, .*; "
        rf"2 of {BLOCKS} blocks are kept in {tmp_path}/out.partial: the same command goes on from there",
    ):
        run(room, tmp_path / "out", batch=1)
    short(1_000)
    said = run(room, tmp_path / "out", batch=1)
    assert said.begun[0] == 2


class EndedAt(Said):
    """Ended when so much is finished: before a block, or when all of them are and the end is told."""

    def __init__(self, block: int | None) -> None:
        super().__init__()
        self.block = block

    def block_started(self, index: int, count: int) -> None:
        if index == self.block:
            raise KeyboardInterrupt

    def phase(self, text: str) -> None:
        if self.block is None and text.startswith("comparing"):
            raise KeyboardInterrupt


@pytest.mark.parametrize("block", [2, None])
def test_a_run_that_goes_on_has_the_batch_that_was_left(room: Path, tmp_path: Path, short: Callable[..., None], block: int | None) -> None:
    """And so the same bytes, though memory is no longer short."""
    short(2, block=1, times=1)
    run(room, tmp_path / "whole")
    short(2, block=1, times=1)
    request = {"group_size": 32, "calib": str(room / "text.txt"), "nsamples": 8, "seqlen": SEQLEN, **REQUESTS["gptq"]}
    with pytest.raises(KeyboardInterrupt, match=f"{BLOCKS if block is None else block} of {BLOCKS} blocks are kept"):
        ptqcli.quantize(room / "model", output=tmp_path / "out", batch_size=LARGEST, progress=EndedAt(block), **request)
    run(room, tmp_path / "out")
    for file in (tmp_path / "whole").iterdir():
        if file.name not in LOGS:
            assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name


def test_nothing_to_halve(ptq: Ptq, room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding runs nothing through the model."""

    def full(*_: Any, **__: Any) -> None:
        raise NO_ROOM

    monkeypatch.setattr("ptqcli.solvers.rtn.round_to_nearest", full)
    answer = ptq("quantize", room / "model", "--algo", "rtn", "--group-size", "32", "--output", tmp_path / "out")
    assert "out of memory on cpu behind 0 of 3 blocks (CUDA out of memory. Tried to allocate 2.00 GiB)" in one_line(answer)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("error", [MemoryError(), MemoryError("x"), NO_ROOM, NO_ROOM_HERE])
def test_any_other_command_says_what_to_lower(ptq: Ptq, room: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("ptqcli.formats.packed_checkpoint.open_checkpoint", full)
    monkeypatch.setattr("ptqcli.model.config.load_config", full)
    answer = ptq("inspect", room / "model")
    assert answer.code == 1
    assert one_line(answer).startswith("error: out of memory")
    assert "give less at once (--batch-size, --seqlen, --nsamples) or another --device" in one_line(answer)


def test_other_errors_are_not_taken_for_it(room: Path, tmp_path: Path, short: Callable[..., None]) -> None:
    short(2, error=RuntimeError("a defect"))
    with pytest.raises((RuntimeError, PTQError), match="a defect"):
        run(room, tmp_path / "out")
    assert issubclass(MachineError, PTQError)
