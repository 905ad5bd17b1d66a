"""A condition of the last step that is not checked before the work: empty folders and mount points, and the lengths of names."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from commandline import Ptq, one_line
from tiny import make_model

from ptqcli.checkpoint.unfinished import MARKER
from ptqcli.cli.locate import newest_checkpoint
from ptqcli.errors import PTQError, UsageError
from ptqcli.formats.packed_checkpoint import open_checkpoint
from ptqcli.pipeline import output as output_module
from ptqcli.pipeline.output import Marker
from ptqcli.pipeline.pipeline import quantize
from ptqcli.pipeline.progress import NoProgress
from ptqcli.recipe import Recipe

PLAIN = Recipe(algo="rtn", group_size=32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "model"
    make_model(folder, num_hidden_layers=1)
    return folder


class Watching(NoProgress):
    """Notes whether the work began, and what lay in ``folder`` then; stops there if it is to."""

    def __init__(self, folder: Path, stop: bool = False) -> None:
        self.folder, self.stop, self.seen = folder, stop, []

    def block_done(self, index: int, count: int) -> None:
        self.seen = sorted(path.name for path in self.folder.iterdir())
        if self.stop:
            raise KeyboardInterrupt


# Folders that are there


def test_an_empty_folder_is_written_into(model: Path, tmp_path: Path) -> None:
    """It stays the folder that it was: a mount point could not be renamed over, nor be replaced under whoever works in it."""
    out = tmp_path / "out"
    out.mkdir(mode=0o2750)
    before, watching = out.stat(), Watching(tmp_path)
    quantize(model, PLAIN, out, progress=watching)
    assert watching.seen == ["out"], "nothing is made beside it, where a container may not write"
    assert (out.stat().st_ino, out.stat().st_mode) == (before.st_ino, before.st_mode)
    assert MARKER not in os.listdir(out)
    open_checkpoint(out)


def test_what_an_empty_volume_holds_does_not_count(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "lost+found").mkdir(parents=True)
    quantize(model, PLAIN, tmp_path / "out")
    open_checkpoint(tmp_path / "out")
    assert (tmp_path / "out" / "lost+found").is_dir()


@pytest.mark.parametrize("command", ["quantize", "convert", "tune-scales"])
@pytest.mark.parametrize("place", ["{model}/out", "{model}/new/out", "{model}/empty", "{link}/out", "{inside}/out", "."])
def test_a_place_in_the_folder_that_is_read_is_refused(
    ptq: Ptq, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, place: str
) -> None:
    read = tmp_path / "read"
    if command == "quantize":
        shutil.copytree(model, read)
    else:
        quantize(model, PLAIN, read)
    (read / "empty").mkdir()
    (tmp_path / "link").symlink_to(read)
    (tmp_path / "inside").symlink_to(read / "empty")
    monkeypatch.chdir(read / "empty")
    output = place.format(model=read, link=tmp_path / "link", inside=tmp_path / "inside")
    flags = {"quantize": ["--algo", "rtn"], "convert": ["--to", "gptq"]}.get(command, [])
    before = sorted(read.rglob("*"))
    answer = ptq(command, read, *flags, "--output", output)
    assert answer.code == 2
    assert f"lies in {read}, the folder of a model that this run reads; choose an --output outside of it" in one_line(answer)
    assert sorted(read.rglob("*")) == before


def test_a_tuned_checkpoint_in_the_folder_of_the_original_is_refused(ptq: Ptq, model: Path, tmp_path: Path) -> None:
    quantize(model, PLAIN, tmp_path / "out")
    answer = ptq("tune-scales", tmp_path / "out", "--output", model / "tuned")
    assert f"lies in {model}, the folder of a model" in one_line(answer)


def test_a_folder_of_texts_or_of_models_may_hold_the_output(ptq: Ptq, model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "text.txt").write_text("One line of a text. " * 99)
    flags = ("--nsamples", "2", "--seqlen", "16", "--group-size", "32")
    assert ptq("quantize", tmp_path / "model", "--calib", tmp_path, "--output", tmp_path / "out", *flags).code == 0


def test_the_working_directory_may_be_the_output(ptq: Ptq, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert ptq("quantize", model, "--algo", "rtn", "--group-size", "32", "--output", ".").code == 0
    assert os.path.exists("config.json"), "the folder in which the user is"


def test_an_interrupted_run_leaves_the_folder_empty(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(KeyboardInterrupt, match="nothing of it is left on disk"):
        quantize(model, PLAIN, tmp_path / "out", progress=Watching(tmp_path, stop=True))
    assert list((tmp_path / "out").iterdir()) == []


def test_what_a_killed_run_has_left_in_it_goes(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    Marker(output="out", into=True, replaces=None).write(output_module.Directory(tmp_path / "out"))
    (tmp_path / "out" / "shard-00007.safetensors").write_text("half")
    quantize(model, PLAIN, tmp_path / "out")
    assert not (tmp_path / "out" / "shard-00007.safetensors").exists()
    open_checkpoint(tmp_path / "out")


def test_two_runs_into_one_empty_folder(model: Path, tmp_path: Path) -> None:
    class Second(NoProgress):
        def block_done(self, index: int, count: int) -> None:
            with pytest.raises(PTQError, match="out: another run is writing there"):
                quantize(model, PLAIN, tmp_path / "out")

    (tmp_path / "out").mkdir()
    quantize(model, PLAIN, tmp_path / "out", progress=Second())
    open_checkpoint(tmp_path / "out")


def test_a_checkpoint_on_a_mount_point_is_refused_before_the_work(
    ptq: Ptq, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ("quantize", model, "--algo", "rtn", "--group-size", "32", "--output", tmp_path / "out", "--overwrite")
    assert ptq(*line).code == 0
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "out")
    answer = ptq(*line, "--dry-run")
    assert "out: is a mount point and cannot be replaced; empty it, or choose a folder in it" in one_line(answer)
    assert answer.code == 2


@pytest.mark.skipif(not os.path.exists("/proc/self/mountinfo"), reason="Linux tells its mount points there")
def test_mount_points_are_known_by_the_systems_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder mounted on another of the same device is a mount point, too, and looks like any other folder."""
    with open("/proc/self/mountinfo", encoding="utf-8") as lines:
        points = [Path(line.split()[4]) for line in lines if "\\" not in line.split()[4]]
    monkeypatch.setattr(os.path, "ismount", lambda path: False)
    assert all(output_module._is_mount_point(point) for point in points)
    assert not output_module._is_mount_point(tmp_path)


def test_a_finished_checkpoint_that_cannot_have_its_name_is_kept(
    ptq: Ptq, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rename that fails all the same: the work is done, so it is not thrown away, and the message says where it lies."""
    rename = os.rename

    def busy(old: str, new: str, **folders: int) -> None:
        if new == "out":
            raise OSError(16, "Device or resource busy", old, None, new)
        rename(old, new, **folders)

    monkeypatch.setattr(os, "rename", busy)
    answer = ptq("quantize", model, "--algo", "rtn", "--group-size", "32", "--output", tmp_path / "out")
    assert answer.code == 1
    assert f"{tmp_path}/out: Device or resource busy; the finished checkpoint lies in {tmp_path}/out.partial" in one_line(answer)
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    open_checkpoint(tmp_path / "out.partial")
    assert MARKER not in os.listdir(tmp_path / "out.partial"), "or the next run would take it for something half-written"


def test_so_is_one_whose_name_somebody_else_took_meanwhile(model: Path, tmp_path: Path) -> None:
    class Late(NoProgress):
        def block_done(self, index: int, count: int) -> None:
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "thesis.txt").write_text("years of work")

    with pytest.raises(PTQError, match=r"out: has changed while the run was at work.*the finished checkpoint lies in .*out\.partial"):
        quantize(model, PLAIN, tmp_path / "out", progress=Late())
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"
    open_checkpoint(tmp_path / "out.partial")


# Names


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["x" * 246, "x" * 247, "x" * 248, "x" * 255, "x" * 256, "ü" * 123, "ü" * 124, "ü" * 128])
def test_a_name_is_refused_before_the_work_or_does_to_the_end(model: Path, tmp_path: Path, name: str, overwrite: bool) -> None:
    """Bytes count, and the longest name that is made; alone and in the place of a checkpoint."""
    out, watching, size = tmp_path / name, Watching(tmp_path), len(name.encode())
    if overwrite and size <= 255:
        shutil.copytree(_finished(model), out)
    if size <= 255 - len(".partial"):
        quantize(model, PLAIN, out, overwrite=overwrite, progress=watching)
        assert watching.seen
        return
    said = f"takes {size + 8} bytes with .partial, under which it is written, and names there 255"
    with pytest.raises(UsageError, match=said):
        quantize(model, PLAIN, out, overwrite=overwrite, progress=watching)
    assert not watching.seen, "refused behind the work"


def _finished(model: Path) -> Path:
    finished = model.parent / "finished"
    if not finished.exists():
        quantize(model, PLAIN, finished)
    return finished


def test_a_folder_above_the_output_may_have_too_long_a_name(ptq: Ptq, model: Path, tmp_path: Path) -> None:
    answer = ptq("quantize", model, "--algo", "rtn", "--group-size", "32", "--output", tmp_path / ("x" * 256) / "out")
    assert "takes 256 bytes, and names there 255; choose a shorter --output" in one_line(answer)
    assert answer.code == 2


def test_a_path_that_is_too_long_for_the_files_in_it(ptq: Ptq, model: Path, tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["y" * 200] * 20, "z" * (4090 - len(str(tmp_path)) - 20 * 201))
    answer = ptq("quantize", model, "--algo", "rtn", "--group-size", "32", "--output", deep)
    assert "the path is too long for the files in it" in one_line(answer)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["\udcff\udcfe", "a\nb", "ü", " ", "-", "$HOME", "'\""])
def test_names_that_few_would_choose(tmp_path: Path, model: Path, name: str) -> None:
    """Of the output and of the model, which the report repeats: bytes that are no UTF-8 are a name, too."""
    shutil.copytree(model, tmp_path / name)
    quantize(tmp_path / name, PLAIN, tmp_path / f"{name}-out")
    open_checkpoint(tmp_path / f"{name}-out")


def test_a_path_with_a_null_byte(model: Path) -> None:
    with pytest.raises(UsageError, match="is no path"):
        quantize(model, PLAIN, Path("a\0b"))


def test_the_folder_of_a_run_at_work_is_not_the_newest_checkpoint(model: Path, tmp_path: Path) -> None:
    shutil.copytree(_finished(model), tmp_path / "out")
    shutil.copytree(_finished(model), tmp_path / "new.partial")
    os.utime(tmp_path / "new.partial" / "ptq_report.json", (2e9, 2e9))
    assert newest_checkpoint(tmp_path) == tmp_path / "out"


def test_the_root_of_the_file_system(model: Path) -> None:
    with pytest.raises(UsageError, match="/: is the root of the file system"):
        quantize(model, PLAIN, Path("/"), overwrite=True)
