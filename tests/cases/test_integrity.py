"""No end-to-end integrity: what is written is read back before it is called finished, and what was read must not have changed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import Ptq, one_line
from safetensors.torch import load_file
from tiny import make_model

from ptqcli.checkpoint.directory import Directory
from ptqcli.checkpoint.tensors import Stamp
from ptqcli.checkpoint.writer import CheckpointWriter
from ptqcli.errors import PTQError
from ptqcli.pipeline.pipeline import quantize
from ptqcli.pipeline.progress import NoProgress
from ptqcli.pipeline.report import LOGS
from ptqcli.recipe import Recipe
from ptqcli.resources import Resources

PLAIN = Recipe(algo="rtn", group_size=32)
SHARDS = Resources(max_shard_bytes=40_000)  # several files and an index


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    make_model(folder / "model", num_hidden_layers=1)
    (folder / "model" / "additional_chat_templates").mkdir()
    (folder / "model" / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    quantize(folder / "model", PLAIN, folder / "out", resources=SHARDS)
    return folder


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original / "model", tmp_path / "model"))


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name not in LOGS)


def nothing_but_the_model(model: Path) -> bool:
    return [path.name for path in model.parent.iterdir()] == ["model"]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def before_the_last_look(monkeypatch: pytest.MonkeyPatch, act: Callable[[Path, Callable[[], None]], object]) -> None:
    """Everything is written, and something happens to the folder; ``act`` is given the look, too."""
    check = Directory.check

    def acted(self: Directory) -> None:
        if self.path.name == "out.partial":  # not a folder in it
            act(self.path, lambda: check(self))
        check(self)

    monkeypatch.setattr(Directory, "check", acted)


def test_every_file_of_a_checkpoint_is_compared_with_what_was_written(original: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bit, one byte less, or no file at all: each is an error that names the file, and there is no result."""
    written = names(original / "out")
    assert len([name for name in written if name.endswith(".safetensors")]) > 2
    assert {"model.safetensors.index.json", "config.json", "ptq_report.json", "additional_chat_templates/tool_use.jinja"} < set(written)
    seen = []

    def harm_each(folder: Path, check: Callable[[], None]) -> None:
        for name in written:
            content = (folder / name).read_bytes()
            for harm in (flip, cut, Path.unlink):
                harm(folder / name)
                with pytest.raises(PTQError, match=rf"out\.partial/{name}: (does not hold what was written|has gone)"):
                    check()
                (folder / name).write_bytes(content)
            seen.append(name)
        check()
        flip(folder / name)

    before_the_last_look(monkeypatch, harm_each)
    with pytest.raises(PTQError, match=f"out.partial/{written[-1]}: does not hold what was written"):
        quantize(model, PLAIN, model.parent / "out", resources=SHARDS)
    assert seen == written
    assert nothing_but_the_model(model)


def test_a_bit_that_flips_in_a_shard_before_the_shards_are_joined(tmp_path: Path) -> None:
    """Joined, the flipped bit would be part of a file whose own checksum is right."""
    writer = CheckpointWriter(Directory(tmp_path))
    first, _ = (writer.write({name: torch.ones(100)})[0] for name in "ab")
    flip(first)
    with pytest.raises(PTQError, match=r"shard-00001\.safetensors: does not hold what was written"):
        writer.finish()


@pytest.mark.parametrize("most", [1, 1000])
def test_reads_that_give_less_than_was_asked_for_are_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """As the system may do at any time; and writes that take less."""
    read, write = os.read, os.write
    monkeypatch.setattr(os, "read", lambda descriptor, count: read(descriptor, min(count, most)))
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, memoryview(data)[:most]))
    writer = CheckpointWriter(Directory(tmp_path))
    for name in "ab":
        writer.write({name: torch.arange(300.0)})
    (path,) = writer.finish()
    monkeypatch.undo()
    assert all(torch.equal(tensor, torch.arange(300.0)) for tensor in load_file(path).values())


def test_a_read_that_ends_early_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = CheckpointWriter(Directory(tmp_path))
    for name in "ab":
        writer.write({name: torch.arange(300.0)})
    read, answers = os.read, []

    def early(descriptor: int, count: int) -> bytes:
        answers.append(read(descriptor, count)[:-8] if not answers else b"")
        return answers[-1]

    monkeypatch.setattr(os, "read", early)
    with pytest.raises(PTQError, match=r"shard-00001\.safetensors: does not hold what was written"):
        writer.finish()


def replace_by_a_copy(path: Path) -> None:
    shutil.copy2(path, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def overwrite_in_place(path: Path) -> None:
    path.write_bytes(path.read_bytes())


class Doing(NoProgress):
    def __init__(self, act: Callable[[], Any]) -> None:
        self.act = act

    def block_done(self, index: int, count: int) -> None:
        self.act()


CHANGES = [("model.safetensors", harm) for harm in (replace_by_a_copy, overwrite_in_place, cut, Path.unlink)]
CHANGES += [(name, replace_by_a_copy) for name in ("config.json", "tokenizer.json", "additional_chat_templates/tool_use.jinja")]


@pytest.mark.parametrize(("name", "harm"), CHANGES)
def test_a_file_of_the_model_that_changes_during_the_run_is_named(model: Path, name: str, harm: Callable[[Path], object]) -> None:
    """With the same name, size and time, or the same inode: one of them tells."""
    with pytest.raises((PTQError, OSError), match=f"model/{name}") as raised:
        quantize(model, PLAIN, model.parent / "out", progress=Doing(lambda: harm(model / name)))
    assert nothing_but_the_model(model), raised.value


def test_a_model_in_shards_that_loses_one_during_the_run(model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(model).save_pretrained(model, max_shard_size="60KB")
    (model / "model.safetensors").unlink()
    (index,) = model.glob("*.index.json")
    first = sorted(model.glob("model-*.safetensors"))[0]
    for path in (first, index):
        with pytest.raises(PTQError, match=f"{path.name}: has changed since the run began"):
            quantize(model, PLAIN, tmp_path / "out", progress=Doing(lambda path=path: overwrite_in_place(path)))


def gone(folder: Path) -> None:
    shutil.rmtree(folder)


def emptied(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def without_the_first_shard(folder: Path) -> None:
    (folder / "shard-00001.safetensors").unlink()


@pytest.mark.parametrize("harm", [gone, emptied, without_the_first_shard], ids=lambda harm: harm.__name__)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_working_folder_that_is_harmed_during_the_run(
    ptq: Ptq, model: Path, monkeypatch: pytest.MonkeyPatch, harm: Callable[[Path], None], overwrite: bool
) -> None:
    out = model.parent / "out"
    line = ("quantize", model, "--algo", "rtn", "--group-size", "32", "--output", out)
    if overwrite:
        assert ptq(*line).code == 0
    before = names(out)
    monkeypatch.setattr("ptqcli.cli.quantize_report.QuantizeProgress.block_done", lambda *_: harm(model.parent / "out.partial"))
    answer = ptq(*line, *(["--overwrite"] if overwrite else []))
    assert answer.code == 1
    assert "out.partial/" in one_line(answer)
    assert names(out) == before
    assert not (model.parent / "out.partial").exists()


def test_a_working_folder_that_goes_at_the_very_end(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before_the_last_look(monkeypatch, lambda folder, check: gone(folder))
    with pytest.raises(PTQError, match=r"out\.partial/\S+: has gone while the run was at work"):
        quantize(model, PLAIN, model.parent / "out")
    assert nothing_but_the_model(model)


def test_a_new_inode_alone_is_no_change(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system over a network may give the same file another number; a copy of it has another time of change, too."""
    stamp = Stamp(model / "model.safetensors")
    look = Path.stat

    def renumbered(path: Path, **given: bool) -> os.stat_result:
        found = look(path, **given)
        fields = {name: getattr(found, name) for name in dir(found) if name.startswith("st_")}
        return os.stat_result([*found[:1], found.st_ino + 1, *found[2:]], fields)

    with monkeypatch.context() as context:
        context.setattr(Path, "stat", renumbered)
        stamp.check()
    replace_by_a_copy(model / "model.safetensors")
    with pytest.raises(PTQError, match="has changed since the run began"):
        stamp.check()


def test_a_change_is_told_at_the_next_block(tmp_path: Path) -> None:
    """And not when hours of work are done."""
    make_model(tmp_path / "model", num_hidden_layers=3)
    seen = []

    def first_only() -> None:
        seen.append("")
        overwrite_in_place(tmp_path / "model" / "model.safetensors")

    with pytest.raises(PTQError, match="has changed since the run began"):
        quantize(tmp_path / "model", PLAIN, tmp_path / "out", progress=Doing(first_only))
    assert len(seen) == 1
