"""A run that was ended goes on: with the same bytes, from what is proved, and never from something else."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from commandline import Ptq, one_line
from tiny import make_model, write_text
from variants import some_slow

import ptqcli
from ptqcli.checkpoint.directory import Directory
from ptqcli.checkpoint.unfinished import JOURNAL, MARKER
from ptqcli.errors import PTQError, UsageError
from ptqcli.pipeline import folder as folder_module
from ptqcli.pipeline.progress import NoProgress
from ptqcli.pipeline.report import LOGS

BLOCKS = 4
REQUESTS = {
    "rtn": {},
    "gptq": {},
    "awq+gptq": {},
    "rotate+gptq": {"options": "target=original"},
    "autoround": {"autoround": {"iters": 3}},
    "gptq with an adapter": {"adapter_rank": 4},
    "gptq with head and embedding": {"lm_head": "W8", "embeddings": "W8"},
    "gptq at once": {"sequential": False},
}


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    make_model(folder / "model", "llama", num_hidden_layers=BLOCKS)
    write_text(folder / "text.txt")
    return folder


def run(room: Path, output: Path, name: str = "gptq", **more: Any) -> ptqcli.Report:
    changes = {"algo": name.split(" ")[0], "group_size": 32, "calib": str(room / "text.txt"), "nsamples": 4, "seqlen": 32, **REQUESTS[name]}
    if changes.pop("options", None):
        changes["gptq"] = {"target": "original"}
    return ptqcli.quantize(room / "model", output=output, batch_size=2, **{**changes, **more})


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in LOGS
    }


class Ended(NoProgress):
    """Ends the run behind so many blocks, and counts those that are begun."""

    def __init__(self, behind: int | None = None, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.behind, self.error = behind, error
        self.begun: list[int] = []

    def block_started(self, index: int, count: int) -> None:
        if index == self.behind:
            raise self.error
        self.begun.append(index)


@pytest.mark.parametrize("name", some_slow([*REQUESTS], every=2))
def test_the_bytes_are_those_of_a_run_that_was_not_ended(room: Path, tmp_path: Path, name: str) -> None:
    """No block is done twice and none is left out, also where every one is ended behind in turn."""
    run(room, tmp_path / "whole", name)
    begun = []
    for behind in range(1, BLOCKS) if name == "gptq" else [2]:
        progress = Ended(behind)
        with pytest.raises(KeyboardInterrupt, match=f"^{behind} of {BLOCKS} blocks are kept in {tmp_path}/out.partial: the same command"):
            run(room, tmp_path / "out", name, progress=progress)
        begun += progress.begun
        assert not (tmp_path / "out.partial" / "config.json").exists(), "it would pass for a checkpoint"
    last = Ended()
    run(room, tmp_path / "out", name, progress=last)
    assert begun + last.begun == list(range(BLOCKS))
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


class Killed(BaseException):
    """In the place of SIGKILL: nothing is cleaned up behind it."""


def killed_at(step: int, before: bool, steps: list[str]) -> Iterator[Any]:
    """Patches of what changes the working folder, of which call number ``step`` is the last."""

    def counted(call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def counting(self: Directory, *given: Any, **named: Any) -> Any:
            steps.append(name)
            if len(steps) - 1 == step and before:
                raise Killed
            answer = call(self, *given, **named)
            if len(steps) - 1 == step:
                raise Killed
            return answer

        return counting

    for name in ("write", "rename", "remove", "sync"):
        yield mock.patch.object(Directory, name, counted(getattr(Directory, name), name))
    yield mock.patch.object(folder_module._Growing, "end", return_value="")


def attempt(room: Path, output: Path, step: int, before: bool, **more: Any) -> tuple[int, list[int]]:
    """Kill a run at a step. The number of steps that it took, -1 where it ended before; the blocks that were begun."""
    from contextlib import ExitStack

    steps: list[str] = []
    progress = Ended()
    with ExitStack() as stack:
        for patch in killed_at(step, before, steps):
            stack.enter_context(patch)
        try:
            run(room, output, "gptq", progress=progress, **more)
        except Killed:
            return len(steps), progress.begun
    return -1, progress.begun


@pytest.mark.slow
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("part", range(6))
def test_a_kill_at_any_step_costs_a_block_at_most(room: Path, tmp_path: Path, part: int, before: bool) -> None:
    run(room, tmp_path / "whole", "gptq")
    whole = tree(tmp_path / "whole")
    step, tried = part, 0
    while True:
        place = tmp_path / str(step)
        taken, begun = attempt(room, place / "out", step, before)
        if taken < 0:
            break
        again = Ended()
        run(room, place / "out", "gptq", progress=again, overwrite=True)
        assert tree(place / "out") == whole, step
        assert [path.name for path in place.iterdir()] == ["out"], step
        assert (place / "out" / "config.json").exists()
        if begun and begun != list(range(BLOCKS)):  # one that was placed already is made again
            assert len({*begun} & {*again.begun}) <= 1, step
        step, tried = step + 6 * 5, tried + 1
    assert tried > 1, "few steps were seen"


def partial(room: Path, folder: Path, **more: Any) -> Path:
    with pytest.raises(KeyboardInterrupt):
        run(room, folder / "out", "gptq", progress=Ended(2), **more)
    return folder / "out.partial"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"nsamples": 3}, r"nsamples 4, now 3; other tokens of the calibration text\)"),
        ({"damp": 0.1}, r"options\.gptq\.damp 0\.01, now 0\.1"),
        ({"seed": 5}, "seed 0, now 5"),
        ({"batch_size": 1}, r"batch size 2, now 1\)"),
        ({"overrides": [{"pattern": "down_proj", "bits": 8}]}, "other schemes of the linears"),
    ],
)
def test_another_request_does_not_go_on(room: Path, tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    work = partial(room, tmp_path)
    before = tree(work)
    given = {"algo": "gptq", "group_size": 32, "calib": str(room / "text.txt"), "nsamples": 4, "seqlen": 32, "batch_size": 2, **changes}
    with pytest.raises(
        UsageError, match=f"holds 2 of {BLOCKS} blocks of a run that was asked for something else .*{told}.*--restart begins anew"
    ):
        ptqcli.quantize(room / "model", output=tmp_path / "out", **given)
    assert tree(work) == before
    ptqcli.quantize(room / "model", output=tmp_path / "out", restart=True, **given)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_another_model_does_not_go_on(room: Path, tmp_path: Path) -> None:
    work = partial(room, tmp_path)
    (room / "model" / "train.log").write_text("not read")
    os.utime(room / "model" / "model.safetensors", (1, 1))
    with pytest.raises(UsageError, match=r"\(other model file model.safetensors\)"):
        run(room, tmp_path / "out")
    assert (work / JOURNAL).exists()


@pytest.mark.parametrize(
    ("name", "harm"),
    [("shard-00001.safetensors", "a bit"), ("shard-00003.safetensors", "gone"), ("activations-behind-00002.safetensors", "a bit")],
)
def test_nothing_is_believed_that_is_not_what_was_written(room: Path, tmp_path: Path, name: str, harm: str) -> None:
    work = partial(room, tmp_path)
    content = bytearray((work / name).read_bytes())
    if harm == "gone":
        (work / name).unlink()
    else:
        content[len(content) // 2] ^= 1
        (work / name).write_bytes(content[:-1] if harm == "cut" else content)
    with pytest.raises(PTQError, match=rf"{name}: (does not hold what was written|has gone).*; --restart begins anew$"):
        run(room, tmp_path / "out")
    run(room, tmp_path / "out", restart=True)
    run(room, tmp_path / "whole")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"asked": 3}', "null", '{"blocks": 1e999}'])
def test_a_damaged_journal_is_named(room: Path, tmp_path: Path, text: str) -> None:
    work = partial(room, tmp_path)
    (work / JOURNAL).write_text(text)
    with pytest.raises(PTQError, match=rf"{JOURNAL}: is damaged.*--restart begins anew$"):
        run(room, tmp_path / "out")


def test_a_journal_that_changed_and_kept_its_form_is_named(room: Path, tmp_path: Path) -> None:
    """A bit is enough: it would be the error of a layer, or a block that is not there."""
    work = partial(room, tmp_path)
    text = (work / JOURNAL).read_text()
    for old, new in (('"blocks": 2', '"blocks": 3'), ('"relative_error": 0.', '"relative_error": 8.'), ('"count": 4', '"count": 5')):
        assert old in text
        (work / JOURNAL).write_text(text.replace(old, new, 1))
        with pytest.raises(PTQError, match=rf"{JOURNAL}: is damaged.*--restart begins anew$"):
            run(room, tmp_path / "out")


def test_a_journal_names_no_file_elsewhere(room: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("years of work")
    work = partial(room, tmp_path)
    values = json.loads((work / JOURNAL).read_text())
    values["files"]["../precious"] = "0" * 64
    (work / JOURNAL).write_text(json.dumps(values))
    with pytest.raises(PTQError, match=r"is damaged"):
        run(room, tmp_path / "out")
    assert precious.read_text() == "years of work"


def test_what_is_not_ours_ends_the_run_before_anything_goes(room: Path, tmp_path: Path) -> None:
    work = partial(room, tmp_path)
    (work / "notes.txt").write_text("mine")
    with pytest.raises(PTQError, match=r"holds notes\.txt, which ptq quantize did not write"):
        run(room, tmp_path / "out")
    assert (work / "notes.txt").read_text() == "mine"
    assert (work / JOURNAL).exists()


def test_an_error_of_the_machine_keeps_what_is_finished_and_one_of_the_request_does_not(room: Path, tmp_path: Path) -> None:
    class Full(OSError):
        def __init__(self) -> None:
            super().__init__(28, "No space left on device", str(tmp_path / "out.partial"))

    with pytest.raises(PTQError, match=f"No space left on device; 2 of {BLOCKS} blocks are kept in"):
        run(room, tmp_path / "out", progress=Ended(2, Full))
    last = Ended()
    run(room, tmp_path / "out", progress=last)
    assert last.begun == [2, 3]

    class Wrong(PTQError):
        def __init__(self) -> None:
            super().__init__("the third block holds NaN")

    with pytest.raises(PTQError, match=r"the third block holds NaN$"):
        run(room, tmp_path / "other", progress=Ended(2, Wrong))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("after", [True, False])
def test_an_interruption_while_the_journal_takes_its_name(room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool) -> None:
    """What is kept is what the journal on the disk lists, whichever that is."""
    inner, seen = Directory.rename, []

    def rename(self: Directory, old: str, new: str, replaced: tuple[int, int] | None = None) -> None:
        seen.extend([new] * (new == JOURNAL))
        if new == JOURNAL and len(seen) == 2 and not after:
            raise KeyboardInterrupt
        inner(self, old, new, replaced)
        if new == JOURNAL and len(seen) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Directory, "rename", rename)
    with pytest.raises(KeyboardInterrupt, match=f"^{2 if after else 1} of {BLOCKS} blocks are kept"):
        run(room, tmp_path / "out")
    monkeypatch.undo()
    last = Ended()
    run(room, tmp_path / "out", progress=last)
    assert last.begun[0] == (2 if after else 1)
    run(room, tmp_path / "whole")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_an_empty_folder_that_stays_is_gone_on_in(room: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(KeyboardInterrupt, match=f"kept in {tmp_path}/out:"):
        run(room, tmp_path / "out", progress=Ended(3))
    last = Ended()
    run(room, tmp_path / "out", progress=last)
    assert last.begun == [3]
    run(room, tmp_path / "whole")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_other_commands_leave_it_alone(room: Path, tmp_path: Path) -> None:
    run(room, tmp_path / "whole")
    work = partial(room, tmp_path)
    before = tree(work)
    with pytest.raises(PTQError, match=r"holds what a run of ptq quantize has finished"):
        ptqcli.convert(tmp_path / "whole", "gptq", output=tmp_path / "out", requantize="w8a16-g32")
    assert tree(work) == before


COMMANDS = (
    "eval",
    "inspect",
    "inspect --verify",
    "convert --to gptq",
    "generate hello",
    "bench",
    "quantize",
    "tune-scales",
    "push owner/name",
)


@pytest.fixture(scope="module")
def ended(room: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, Path]]:
    """Outputs, and where their runs were ended: beside them, and in the output itself, which was there."""
    folder = tmp_path_factory.mktemp("ended")
    (folder / "empty").mkdir()
    places = [(folder / "out", folder / "out.partial"), (folder / "empty", folder / "empty")]
    for output, _ in places:
        with pytest.raises(KeyboardInterrupt):
            run(room, output, "gptq", progress=Ended(2))
    return places


@pytest.mark.parametrize("line", COMMANDS)
def test_an_unfinished_run_is_called_one(ptq: Ptq, ended: list[tuple[Path, Path]], line: str) -> None:
    """By every command that takes a checkpoint or a model."""
    for output, place in ended:
        before = tree(place)
        command, *flags = line.split()
        answer = ptq(command, place, *flags)
        told = f"{place}: holds an unfinished run, with 2 of {BLOCKS} blocks finished, and no checkpoint yet"
        assert one_line(answer) == f"error: {told}; the same `ptq quantize` command as before (--output {output}) goes on with it"
        assert (answer.code, tree(place)) == (1, before)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"blocks": "x"}', '{"blocks": 1e999, "count": 3}', "NaN"])
@pytest.mark.parametrize("name", [MARKER, JOURNAL])
def test_what_an_unfinished_run_says_of_itself_is_not_believed(ptq: Ptq, tmp_path: Path, name: str, text: str) -> None:
    for file in (MARKER, JOURNAL):
        (tmp_path / file).write_text("{}")
    (tmp_path / name).write_text(text)
    assert "holds an unfinished run, which is damaged, and no checkpoint yet" in one_line(ptq("inspect", tmp_path))
    (tmp_path / JOURNAL).unlink()
    assert "holds an unfinished run, with nothing finished yet" in one_line(ptq("inspect", tmp_path))
