"""Replacement in two steps without a way back: at every moment the old checkpoint is there or the new one, whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kill_overwrite import SCENARIOS, Scenario, Workshop
from tiny import make_model

import ptqcli.pipeline.folder as folder_module
from ptqcli.checkpoint.directory import Directory
from ptqcli.checkpoint.unfinished import JOURNAL, MARKER
from ptqcli.errors import PTQError, UsageError
from ptqcli.pipeline.output import REPLACED, Marker
from ptqcli.pipeline.pipeline import quantize
from ptqcli.pipeline.progress import NoProgress
from ptqcli.pipeline.report import LOGS
from ptqcli.recipe import Recipe

OLD = Recipe(algo="rtn", group_size=32, wbits=8)
NEW = Recipe(algo="rtn", group_size=32)

Tree = dict[str, bytes]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    make_model(folder / "model", num_hidden_layers=1)
    quantize(folder / "model", OLD, folder / "old")
    quantize(folder / "model", NEW, folder / "new")
    return folder


@pytest.fixture
def out(original: Path, tmp_path: Path) -> Path:
    """An output with the old checkpoint."""
    return Path(shutil.copytree(original / "old", tmp_path / "out"))


def tree(folder: Path) -> Tree:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in (MARKER, JOURNAL, *LOGS)}


@pytest.fixture
def _in_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "exchange", lambda *_: False)


# All steps and faults: scripts/kill_overwrite.py


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the threads of a pool do not live on in a process that is forked
    yield Workshop(tmp_path_factory.mktemp("workshop"))
    torch.set_num_threads(threads)


def at_the_end(steps: list[str], number: int, fault: str) -> bool:
    """From the last look at what was written: the rename, and the removal of what it replaced."""
    begin = max(index for index, step in enumerate(steps) if step == "open ptq_report.json") + 1
    last_files = [index for index, step in enumerate(steps) if step.startswith("unlink ")][1:-2]  # of one kind
    return number >= begin and number not in last_files and fault in ("EIO", "KILL before", "TERM behind")


@pytest.mark.parametrize(
    "scenario",
    [pytest.param(SCENARIOS[0], id="in one step"), pytest.param(SCENARIOS[1], id="in two steps", marks=pytest.mark.slow)],
)
def test_the_end_of_a_run_with_faults(workshop: Workshop, scenario: Scenario) -> None:
    trials = workshop.try_out(scenario, at_the_end)
    assert [trial for trial in trials if trial.wrong] == []
    assert len(trials) > 15
    assert {"old", "new"} <= {trial.state for trial in trials}


# What happens where


def test_the_output_never_goes(original: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked at around every call: with an exchange there is no moment without a whole checkpoint."""
    seen = []

    def looked(call: Callable[..., Any]) -> Callable[..., Any]:
        def look(*given: Any, **named: Any) -> Any:
            seen.append(tree(out))
            answer = call(*given, **named)
            seen.append(tree(out))
            return answer

        return look

    for name in ("rename", "unlink", "rmdir", "fsync"):
        monkeypatch.setattr(os, name, looked(getattr(os, name)))
    monkeypatch.setattr(folder_module, "exchange", looked(folder_module.exchange))
    quantize(original / "model", NEW, out, overwrite=True)
    monkeypatch.undo()
    old, new = tree(original / "old"), tree(original / "new")
    assert [look for look in seen if look not in (old, new)] == []
    assert (seen[0], seen[-1]) == (old, new)
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.usefixtures("_in_two_steps")
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_a_second_step_that_fails_is_undone(original: Path, out: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    rename = os.rename

    def failing(old: str, new: str, **named: int) -> None:
        if old == "out.partial":
            raise error
        rename(old, new, **named)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises((PTQError, KeyboardInterrupt)) as raised:
        quantize(original / "model", NEW, out, overwrite=True)
    monkeypatch.undo()
    assert tree(out) == tree(original / "old")
    if isinstance(error, KeyboardInterrupt):
        assert f"1 of 1 blocks are kept in {out}.partial" in str(raised.value)
        quantize(original / "model", NEW, out, overwrite=True)
        assert tree(out) == tree(original / "new")
        assert [path.name for path in out.parent.iterdir()] == ["out"]
    else:
        assert f"the finished checkpoint lies in {out}.partial" in str(raised.value)
        assert tree(out.with_name("out.partial")) == tree(original / "new")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_that_was_killed_between_the_two_steps_is_undone_by_the_next(original: Path, out: Path, overwrite: bool) -> None:
    work = out.with_name("out.partial")
    shutil.copytree(original / "new", work)
    identity = Directory(out).identity
    Marker(output="out", into=False, replaces=identity).write(Directory(work))
    out.rename(work / REPLACED)
    if overwrite:
        quantize(original / "model", NEW, out, overwrite=True)
    else:
        with pytest.raises(UsageError, match="out: already exists"):
            quantize(original / "model", NEW, out)
    assert tree(out) == tree(original / ("new" if overwrite else "old"))
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_but_not_over_what_lies_there_now(original: Path, out: Path) -> None:
    work = out.with_name("out.partial")
    shutil.copytree(original / "new", work)
    Marker(output="out", into=False, replaces=Directory(out).identity).write(Directory(work))
    out.rename(work / REPLACED)
    shutil.copytree(original / "new", out)
    with pytest.raises(PTQError, match=r"out\.partial/replaced: is what .*out was; move it away"):
        quantize(original / "model", NEW, out, overwrite=True)
    assert tree(work / REPLACED) == tree(original / "old")


@pytest.mark.parametrize("place", ["out.partial", f"out/{REPLACED}"])
def test_a_run_that_was_killed_before_the_old_one_was_gone_is_finished_by_the_next(original: Path, out: Path, place: str) -> None:
    old = out.rename(out.with_name("aside"))
    shutil.copytree(original / "new", out)
    Marker(output="out", into=False, replaces=Directory(old).identity).write(Directory(out))
    (old / "model.safetensors").unlink()  # the removal had begun
    old.rename(out.parent / place)
    quantize(original / "model", OLD, out, overwrite=True)
    assert tree(out) == tree(original / "old")
    assert MARKER not in os.listdir(out)
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_checkpoint_that_another_took_the_place_of_meanwhile_is_not_replaced(original: Path, out: Path) -> None:
    class Swapping(NoProgress):
        def block_done(self, index: int, count: int) -> None:
            out.rename(out.with_name("first"))
            shutil.copytree(original / "old", out)

    with pytest.raises(
        PTQError, match=r"out: has changed while the run was at work, and is left as it is; the finished checkpoint lies in"
    ):
        quantize(original / "model", NEW, out, overwrite=True, progress=Swapping())
    assert tree(out) == tree(out.with_name("first")) == tree(original / "old")
    assert tree(out.with_name("out.partial")) == tree(original / "new")


def test_nor_is_one_that_comes_between_the_last_look_and_the_exchange(original: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exchange, calls = folder_module.exchange, []

    def late(*given: Any) -> bool:
        if not calls:
            out.rename(out.with_name("first"))
            shutil.copytree(original / "new", out)
        calls.append(given)
        return exchange(*given)

    monkeypatch.setattr(folder_module, "exchange", late)
    with pytest.raises(PTQError, match="out: has changed while the run was at work"):
        quantize(original / "model", NEW, out, overwrite=True)
    assert len(calls) == 2
    assert tree(out.with_name("first")) == tree(original / "old")


def test_the_systems_exchange(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
    folder = Directory(tmp_path)
    if not folder_module.exchange(folder, "a", folder, "b"):
        pytest.skip("this system has none")
    assert [os.listdir(tmp_path / name) for name in "ab"] == [["b"], ["a"]]
    assert not folder_module.exchange(folder, "a", folder, "c")
