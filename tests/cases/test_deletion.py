"""Deleting by name instead of by proof: a run removes what it has made, and what a killed run of ours has left; nothing else, ever."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from commandline import Ptq, one_line
from tiny import make_model

import ptqcli.pipeline.folder
from ptqcli.checkpoint.directory import Directory
from ptqcli.checkpoint.unfinished import MARKER
from ptqcli.errors import PTQError, UsageError
from ptqcli.pipeline.output import Marker
from ptqcli.pipeline.pipeline import quantize
from ptqcli.pipeline.progress import NoProgress
from ptqcli.pipeline.report import REPORT_NAME
from ptqcli.recipe import Recipe
from ptqcli.recipe_loading import load_recipe

PLAIN = Recipe(algo="rtn", group_size=32)
WORK = "years of work"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and a checkpoint of it."""
    folder = tmp_path_factory.mktemp("made")
    make_model(folder / "model", num_hidden_layers=1)
    quantize(folder / "model", PLAIN, folder / "out")
    return folder


@pytest.fixture
def room(made: Path, tmp_path: Path) -> Path:
    """A folder with copies of both."""
    shutil.copytree(made, tmp_path / "room")
    return tmp_path / "room"


def everything(folder: Path) -> dict[str, str]:
    """Every path below ``folder``, with what it is: a link's target, a file's first bytes."""
    return {str(path.relative_to(folder)): content(path) for path in sorted(folder.rglob("*"))}


def content(path: Path) -> str:
    if path.is_symlink():
        return f"-> {os.readlink(path)}"
    return path.read_bytes().hex() if path.is_file() else ""


def thesis(folder: Path, name: str = "thesis.txt") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(WORK)
    return folder


def mark(folder: Path, output: str = "new", replaces: tuple[int, int] | None = None) -> None:
    Marker(output=output, into=False, replaces=replaces).write(Directory(folder))


def linked(room: Path) -> None:
    thesis(room / "mine", "shard-00001.safetensors")
    mark(room / "mine")
    (room / "new.partial").symlink_to("mine")


def unmarked(room: Path) -> None:
    thesis(room / "new.partial", "shard-00001.safetensors")


def marked_for_another(room: Path) -> None:
    mark(thesis(room / "new.partial", "shard-00001.safetensors"), "other")


def marked_by_a_link(room: Path) -> None:
    thesis(room / "new.partial", "shard-00001.safetensors")
    mark(thesis(room / "mine"))
    (room / "new.partial" / MARKER).symlink_to(f"../mine/{MARKER}")


def marked_by_a_hard_link(room: Path) -> None:
    thesis(room / "new.partial", "shard-00001.safetensors")
    mark(thesis(room / "mine"))
    os.link(room / "mine" / MARKER, room / "new.partial" / MARKER)


def marked_by_nonsense(room: Path) -> None:
    thesis(thesis(room / "new.partial", "shard-00001.safetensors"), MARKER)


def marked_by_another_user(room: Path) -> None:
    mark(thesis(room / "new.partial", "shard-00001.safetensors"))
    if os.geteuid() != 0:
        pytest.skip("only root gives files away")
    os.chown(room / "new.partial" / MARKER, 12345, -1)


def marked_with_a_file_of_the_user(room: Path) -> None:
    mark(thesis(room / "new.partial"))
    thesis(room / "new.partial", "shard-00001.safetensors")


def marked_with_a_folder_of_the_user(room: Path) -> None:
    mark(thesis(room / "new.partial", "shard-00001.safetensors"))
    thesis(room / "new.partial" / "model.safetensors")


def marked_with_templates_of_the_user(room: Path) -> None:
    mark(thesis(room / "new.partial", "shard-00001.safetensors"))
    thesis(room / "new.partial" / "additional_chat_templates")


def marked_in_the_place_of_another(room: Path) -> None:
    """The marker of a finished checkpoint names the folder that it replaced; this is not that folder."""
    thesis(room / "new.partial", "model.safetensors")
    mark(room / "out", replaces=(1, 2))
    (room / "out").rename(room / "new")


IN_THE_WAY = [
    linked,
    unmarked,
    marked_for_another,
    marked_by_a_link,
    marked_by_a_hard_link,
    marked_by_nonsense,
    marked_by_another_user,
    marked_with_a_file_of_the_user,
    marked_with_a_folder_of_the_user,
    marked_with_templates_of_the_user,
    marked_in_the_place_of_another,
]


@pytest.mark.parametrize("put", IN_THE_WAY, ids=lambda put: put.__name__)
def test_what_is_in_the_way_stays_and_is_named(room: Path, put: Callable[[Path], None]) -> None:
    put(room)
    before = everything(room)
    with pytest.raises(PTQError, match=r"new\.partial.*(move it away|choose another)"):
        quantize(room / "model", PLAIN, room / "new", overwrite=True)
    after = everything(room)
    settled = {f"new/{MARKER}"}  # the one thing that goes: the marker of a checkpoint that is finished
    assert {name: value for name, value in before.items() if name not in settled} == {n: v for n, v in after.items() if n not in settled}


def test_what_a_killed_run_has_left_goes_with_its_marker(room: Path) -> None:
    (room / "new.partial").mkdir()
    mark(room / "new.partial")
    for name in ("shard-00001.safetensors", "shard-00002.safetensors.tmp", "activations-x", "tokenizer.json", "LICENSE.txt"):
        (room / "new.partial" / name).write_text("half")
    thesis(room / "mine", "model.safetensors")
    (room / "new.partial" / "model.safetensors").symlink_to("../mine/model.safetensors")  # a link goes, not what it leads to
    quantize(room / "model", PLAIN, room / "new")
    assert everything(room / "new").keys() == everything(room / "out").keys()
    assert not (room / "new.partial").exists()
    assert (room / "mine" / "model.safetensors").read_text() == WORK


def holding_the_model(room: Path) -> Path:
    shutil.move(room / "model", room / "out" / "model")
    return room / "out" / "model"


def holding_the_model_behind_a_link(room: Path) -> Path:
    shutil.move(room / "model", room / "out" / "model")
    (room / "model").symlink_to("out/model")
    return room / "model"


def holding_a_shard_of_the_model(room: Path) -> Path:
    shutil.copy(room / "model" / "model.safetensors", room / "out")
    (room / "model" / "model.safetensors").unlink()
    (room / "model" / "model.safetensors").symlink_to("../out/model.safetensors")
    return room / "model"


HOLDING = [holding_the_model, holding_the_model_behind_a_link, holding_a_shard_of_the_model]


@pytest.mark.parametrize("put", HOLDING, ids=lambda put: put.__name__)
def test_an_output_that_holds_what_the_run_reads_is_not_replaced(ptq: Ptq, room: Path, put: Callable[[Path], Path]) -> None:
    model = put(room)
    before = everything(room)
    answer = ptq("quantize", model, "--algo", "rtn", "--group-size", "32", "--output", room / "out", "--overwrite")
    assert "which this run reads; choose another --output" in one_line(answer)
    assert answer.code == 2
    assert everything(room) == before


def test_nor_is_one_that_holds_the_calibration_text(ptq: Ptq, room: Path) -> None:
    (room / "out" / "merges.txt").write_text("a text with the name of a tokenizer's file")
    line = (
        "quantize",
        room / "model",
        "--calib",
        room / "out" / "merges.txt",
        "--group-size",
        "32",
        "--output",
        room / "out",
        "--overwrite",
    )
    assert "merges.txt, which this run reads" in one_line(ptq(*line))
    assert (room / "out" / "merges.txt").exists()


@pytest.mark.parametrize("name", ["thesis.txt", "eval/results.json", ".git/HEAD", "model.gguf", "adapter_model.safetensors"])
def test_nor_is_one_with_a_file_of_the_user(ptq: Ptq, room: Path, name: str) -> None:
    thesis((room / "out" / name).parent, Path(name).name)
    before = everything(room)
    answer = ptq("quantize", room / "model", "--algo", "rtn", "--group-size", "32", "--output", room / "out", "--overwrite")
    assert f"out: holds {name.partition('/')[0]}" in one_line(answer)
    assert everything(room) == before


def test_nor_is_one_whose_model_card_somebody_else_wrote(ptq: Ptq, room: Path) -> None:
    line = ("quantize", room / "model", "--algo", "rtn", "--group-size", "32", "--output", room / "out", "--overwrite")
    with open(room / "out" / "README.md", "a", encoding="utf-8") as card:
        card.write("And see the evaluation.")
    assert ptq(*line).code == 0, "ours, with more in it"
    (room / "out" / "README.md").write_text("# My model")
    assert "out: holds README.md, which ptq quantize did not write" in one_line(ptq(*line))
    (room / "out" / "README.md").unlink()
    (room / "out" / "README.md").symlink_to("../notes.md")
    assert "out: holds README.md, which ptq quantize did not write" in one_line(ptq(*line))


def test_a_folder_with_a_report_of_another_program_is_not_replaced(ptq: Ptq, room: Path) -> None:
    (room / "out" / "ptq_report.json").write_text("{}")
    before = everything(room)
    answer = ptq("quantize", room / "model", "--algo", "rtn", "--group-size", "32", "--output", room / "out", "--overwrite")
    assert "its report is damaged" in one_line(answer)
    assert everything(room) == before


class Doing(NoProgress):
    """Does something when a block is done, and fails if it is to."""

    def __init__(self, act: Callable[[], object], fails: bool = False) -> None:
        self.act, self.fails = act, fails

    def block_done(self, index: int, count: int) -> None:
        self.act()
        if self.fails:
            raise PTQError("the work failed")


def test_a_file_that_appears_in_the_replaced_checkpoint_meanwhile_stays(room: Path) -> None:
    put = Doing(lambda: thesis(room / "out"))
    with pytest.raises(PTQError, match=r"holds thesis\.txt, which ptq quantize did not write.*out is complete"):
        quantize(room / "model", PLAIN, room / "out", overwrite=True, progress=put)
    assert (room / "out.partial" / "thesis.txt").read_text() == WORK
    assert (room / "out" / "config.json").exists()


def test_a_file_that_appears_in_the_working_folder_stays_and_is_told(room: Path) -> None:
    put = Doing(lambda: thesis(room / "new.partial", "model.gguf"), fails=True)
    with pytest.raises(PTQError, match=r"the work failed; .*new\.partial is left \(.*: Directory not empty\)"):
        quantize(room / "model", PLAIN, room / "new", progress=put)
    assert everything(room / "new.partial") == {"model.gguf": WORK.encode().hex()}


@pytest.mark.parametrize("fails", [False, True])
def test_another_folder_in_the_place_of_the_working_folder_stays(room: Path, fails: bool) -> None:
    """Moved away by somebody, who puts a folder of the same name there: the run goes on in its own and removes that one's files."""

    def swap() -> None:
        (room / "new.partial").rename(room / "moved")
        thesis(room / "new.partial", "shard-00001.safetensors")

    with pytest.raises(PTQError, match="the work failed" if fails else "cannot|was moved|no config"):
        quantize(room / "model", PLAIN, room / "new", progress=Doing(swap, fails))
    assert everything(room / "new.partial") == {"shard-00001.safetensors": WORK.encode().hex()}
    assert everything(room / "moved") == {}
    assert not (room / "new").exists()


def test_a_run_that_begins_while_another_removes_the_old_folder_is_not_touched(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remove, told = ptqcli.pipeline.folder._Growing._remove_replaced, []

    def second_run_first(self: object, *given: object) -> None:
        if not told:
            told.append("")
            with pytest.raises(PTQError, match="another run is writing there") as refused:
                quantize(room / "model", PLAIN, room / "out", overwrite=True)
            told.append(str(refused.value))
        remove(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(ptqcli.pipeline.folder._Growing, "_remove_replaced", second_run_first)
    quantize(room / "model", PLAIN, room / "out", overwrite=True)
    assert len(told) == 2
    assert sorted(path.name for path in room.iterdir()) == ["model", "out"]


def test_a_run_that_is_refused_leaves_the_marker_of_the_one_at_work(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has opened the working folder, which becomes the output before it finds that it is locked."""
    lock, seen = ptqcli.pipeline.folder.lock, []

    class Second(NoProgress):
        def block_done(self, index: int, count: int) -> None:
            def late(folder: Directory) -> None:
                (room / "new.partial").rename(room / "new")
                lock(folder)

            with monkeypatch.context() as context:
                context.setattr(ptqcli.pipeline.folder, "lock", late)
                with pytest.raises(PTQError, match="another run is writing there"):
                    quantize(room / "model", PLAIN, room / "new")
            seen.append(sorted(os.listdir(room / "new")))
            (room / "new").rename(room / "new.partial")

    quantize(room / "model", PLAIN, room / "new", progress=Second())
    assert MARKER in seen[0]


def test_a_folder_that_another_run_makes_behind_the_last_rename_stays(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remove = ptqcli.pipeline.folder._Growing._remove_replaced

    def other_folder(self: object, *given: object) -> None:
        thesis(room / "new.partial", "shard-00001.safetensors")
        remove(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(ptqcli.pipeline.folder._Growing, "_remove_replaced", other_folder)
    quantize(room / "model", PLAIN, room / "new")
    assert (room / "new.partial" / "shard-00001.safetensors").read_text() == WORK
    assert everything(room / "new").keys() == everything(room / "out").keys()


def test_folders_above_the_output_go_if_the_run_made_them(room: Path) -> None:
    (room / "there").mkdir()
    with pytest.raises(PTQError, match="the work failed"):
        quantize(room / "model", PLAIN, room / "there" / "a" / "b" / "new", progress=Doing(lambda: None, fails=True))
    assert list((room / "there").iterdir()) == []


@pytest.mark.parametrize("name", ["LICENSE.mine", "model-00001-of-00002.safetensors", "vocab.txt"])
def test_a_file_that_only_has_the_name_of_one_of_ours_stays(room: Path, name: str) -> None:
    """The report lists what was written; a name that a checkpoint may hold is no proof."""
    (room / "out" / name).write_text("mine")
    with pytest.raises(UsageError, match=f"holds {re.escape(name)}, which ptq quantize did not write"):
        quantize(room / "model", PLAIN, room / "out", overwrite=True)
    assert (room / "out" / name).read_text() == "mine"
    (room / "out" / name).unlink()
    quantize(room / "model", PLAIN, room / "out", overwrite=True)


def test_a_checkpoint_whose_report_says_less_is_read_and_replaced(ptq: Ptq, room: Path) -> None:
    """As earlier versions wrote it: without the texts, shares of the target, rewrites and tuning."""
    (room / "text.txt").write_text("one two three four five six seven eight nine ten " * 400)
    quantize(
        room / "model", load_recipe(flags={"calib": str(room / "text.txt"), "nsamples": 2, "seqlen": 16, "group_size": 32}), room / "old"
    )
    file = room / "old" / REPORT_NAME
    report = json.loads(file.read_text())
    for name in ("rewritten", "tuning"):
        report.pop(name)
    for name in ("texts", "sampling"):
        report["calibration"].pop(name)
    for layer in report["layers"]:
        for name in ("alpha", "beta", "bias_corrected", "adapter_error"):
            layer.pop(name)
    file.write_text(json.dumps(report))
    assert ptq("inspect", room / "old").code == 0
    quantize(room / "model", PLAIN, room / "old", overwrite=True)
    assert json.loads(file.read_text())["recipe"]["algo"] == "rtn"
