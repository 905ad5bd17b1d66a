"""Links that are followed: those that lie beforehand where a run makes its files, and those in a model folder that lead out of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commandline import Ptq, one_line
from tiny import make_model

from ptqcli.checkpoint.directory import Directory
from ptqcli.checkpoint.writer import CheckpointWriter, write_json
from ptqcli.errors import PTQError
from ptqcli.pipeline.pipeline import quantize
from ptqcli.pipeline.progress import NoProgress
from ptqcli.recipe import Recipe

PLAIN = Recipe(algo="rtn", group_size=32)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "model"
    make_model(folder, num_hidden_layers=1)
    return folder


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    path = tmp_path / "precious"
    path.write_text("years of work")
    return path


# Where files are made


@pytest.mark.parametrize("target", ["precious", "not there yet"])
@pytest.mark.parametrize("name", ["shard-00001.safetensors.tmp", "config.json.tmp"])
def test_a_link_at_a_temporary_name_is_not_written_through(tmp_path: Path, precious: Path, name: str, target: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / name).symlink_to(tmp_path / target)
    folder = Directory(tmp_path / "folder")
    with pytest.raises(FileExistsError) as raised:
        write_json(folder, "config.json", {}) if "config" in name else CheckpointWriter(folder).write({"a": torch.ones(1)})
    assert raised.value.filename == str(tmp_path / "folder" / name)
    assert precious.read_text() == "years of work"
    assert not (tmp_path / "not there yet").exists()


def test_a_link_at_a_final_name_is_neither_followed_nor_replaced(tmp_path: Path, precious: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").symlink_to(precious)
    with pytest.raises(FileExistsError, match=r"folder/config\.json"):
        write_json(Directory(tmp_path / "folder"), "config.json", {})
    assert precious.read_text() == "years of work"
    assert (tmp_path / "folder" / "config.json").is_symlink()


class Planting(NoProgress):
    """Puts links into the working folder when a block is done."""

    def __init__(self, folder: Path, name: str, target: Path) -> None:
        self.folder, self.name, self.target = folder, name, target

    def block_done(self, index: int, count: int) -> None:
        (self.folder / self.name).symlink_to(self.target)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "model.safetensors", "joined.safetensors.tmp", "ptq_report.json.tmp", "shard-00003.safetensors.tmp"]
)
def test_a_link_in_the_working_folder_ends_the_run(model: Path, precious: Path, name: str) -> None:
    work = model.parent / "out.partial"
    with pytest.raises(PTQError, match=f"out.partial/{name}: File exists; .*out.partial") as raised:
        quantize(model, PLAIN, model.parent / "out", progress=Planting(work, name, precious))
    assert isinstance(raised.value.__cause__, FileExistsError)
    assert precious.read_text() == "years of work"
    assert not {path.name for path in work.iterdir()} & {"config.json", "generation_config.json"}, "what it had not noted"
    quantize(model, PLAIN, model.parent / "out")
    assert precious.read_text() == "years of work"
    assert not any(path.is_symlink() for path in (model.parent / "out").iterdir())


def test_a_link_to_a_folder_is_no_working_folder(model: Path, precious: Path) -> None:
    (model.parent / "elsewhere").mkdir()
    (model.parent / "out.partial").symlink_to("elsewhere")
    with pytest.raises(PTQError, match=r"out\.partial: is in the way and no folder"):
        quantize(model, PLAIN, model.parent / "out")
    assert list((model.parent / "elsewhere").iterdir()) == []


# In a model folder


def by_an_absolute_link(model: Path, name: str, target: Path) -> None:
    (model / name).symlink_to(target)


def by_a_relative_link(model: Path, name: str, target: Path) -> None:
    (model / name).symlink_to(os.path.relpath(target, model))


def by_two_links(model: Path, name: str, target: Path) -> None:
    (model / "hop").symlink_to(target)
    (model / name).symlink_to("hop")


def by_a_linked_folder(model: Path, name: str, target: Path) -> None:
    elsewhere = target.parent / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(target, elsewhere / "tool.jinja")
    (model / "additional_chat_templates").symlink_to(elsewhere)


@pytest.mark.parametrize("name", ["LICENSE", "chat_template.jinja"])
@pytest.mark.parametrize(
    "link", [by_an_absolute_link, by_a_relative_link, by_two_links, by_a_linked_folder], ids=lambda link: link.__name__
)
def test_a_link_that_leads_out_of_the_model_is_refused_before_the_work(
    ptq: Ptq, model: Path, precious: Path, name: str, link: Callable[[Path, str, Path], None]
) -> None:
    link(model, name, precious)
    before = sorted(model.parent.iterdir())
    answer = ptq("quantize", model, "--algo", "rtn", "--group-size", "32", "--output", model.parent / "out", "--dry-run")
    assert "is a link that leads out of the model folder, to " in one_line(answer)
    assert answer.code == 1
    assert sorted(model.parent.iterdir()) == before


def test_a_config_that_is_a_link_out_of_the_model_is_refused(model: Path) -> None:
    (model / "config.json").rename(model.parent / "config.json")
    (model / "config.json").symlink_to("../config.json")
    with pytest.raises(PTQError, match=r"model/config\.json: is a link that leads out"):
        quantize(model, PLAIN, model.parent / "out")


def test_links_within_the_model_are_fine(model: Path) -> None:
    (model / "terms.md").write_text("do as you like")
    (model / "LICENSE").symlink_to("terms.md")
    quantize(model, PLAIN, model.parent / "out")
    assert (model.parent / "out" / "LICENSE").read_text() == "do as you like"
    assert not (model.parent / "out" / "LICENSE").is_symlink()


def cached(model: Path, cache: Path) -> Path:
    """The model as the cache of the hub holds it: a snapshot of links into the folder of blobs."""
    snapshot, blobs = cache / "models--owner--name" / "snapshots" / "0123abcd", cache / "models--owner--name" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(model.iterdir())):
        path.rename(blobs / f"{number:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:040x}")
    return snapshot


def test_a_snapshot_of_the_hub_is_a_model(model: Path, tmp_path: Path) -> None:
    snapshot = cached(model, tmp_path / "cache")
    quantize(snapshot, PLAIN, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (snapshot / "tokenizer.json").read_bytes()
    (tmp_path / "linked").symlink_to(snapshot)  # and a model folder may be reached by one
    quantize(tmp_path / "linked", PLAIN, tmp_path / "again")


@pytest.mark.parametrize("target", ["precious", "cache/models--owner--private/blobs/0", "cache/models--owner--name/secret"])
def test_but_not_one_with_a_link_to_anywhere_else(model: Path, tmp_path: Path, precious: Path, target: str) -> None:
    snapshot = cached(model, tmp_path / "cache")
    (tmp_path / target).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / target).write_text("years of work")
    (snapshot / "LICENSE").symlink_to(tmp_path / target)
    with pytest.raises(PTQError, match="0123abcd/LICENSE: is a link that leads out of the model folder"):
        quantize(snapshot, PLAIN, tmp_path / "out")


def test_weights_may_be_links(model: Path, tmp_path: Path) -> None:
    """They are read as numbers, not copied, and whoever has little room links to them."""
    (model / "model.safetensors").rename(tmp_path / "weights")
    (model / "model.safetensors").symlink_to(tmp_path / "weights")
    quantize(model, PLAIN, tmp_path / "out")
