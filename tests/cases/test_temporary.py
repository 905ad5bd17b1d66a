"""Kind: what a process that was killed leaves in the folder for temporary files. A config is read from memory, and a folder that is needed
is known by its name, its owner and its lock: the next process removes it, and nothing that is not ours."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import transformers
from tiny import make_model

from ptqcli.model.config import load_config
from ptqcli.temporary import growing_file, temporary_folder, written_file

HOLDS = """
import os
from ptqcli.temporary import held_folder
folder, lock = held_folder()
(folder / "large").write_text("x")
print(folder, flush=True)
"""
RENAMES = """
os.rename(folder, folder.with_name("ptqcli-temporary-4194305-abcdefgh"))
print("renamed", flush=True)
input()
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp"


def holding(place: Path, end: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "TMPDIR": str(place)}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS + end], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    )
    assert process.stdout
    assert Path(process.stdout.readline().strip()).parent == place
    return process


def test_a_config_needs_no_folder(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(tmp_path / "model", "mistral", layer_types=["full_attention"] * 2)  # which transformers reads as another type
    seen, read = [], transformers.AutoConfig.from_pretrained

    def look(*given: Any, **more: Any) -> Any:
        seen.append([*place.iterdir()])
        return read(*given, **more)

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", look)
    config = load_config(tmp_path / "model")
    assert seen == [[]]
    assert config.to_dict() == read(tmp_path / "model").to_dict()


@pytest.mark.parametrize("memory", [True, False])
def test_a_file_is_there_for_the_duration(place: Path, monkeypatch: pytest.MonkeyPatch, memory: bool) -> None:
    if not memory:
        monkeypatch.delattr(os, "memfd_create")
    with written_file(b"abc") as path:
        assert (path.read_bytes(), path.is_file()) == (b"abc", True)
        path.write_bytes(b"other")
        assert path.read_bytes() == b"other"
        assert bool([*place.iterdir()]) is not memory
    assert [*place.iterdir()] == []


def test_the_next_process_removes_what_a_killed_one_has_left(place: Path) -> None:
    process = holding(place, "input()")
    process.kill()
    process.communicate()
    assert len([*place.iterdir()]) == 1
    with temporary_folder() as folder:
        assert [*place.iterdir()] == [folder]
    assert [*place.iterdir()] == []


def test_one_that_is_at_work_keeps_its_own(place: Path) -> None:
    process = holding(place, "input()")
    kept = [*place.iterdir()]
    with temporary_folder() as folder:
        assert sorted(place.iterdir()) == sorted([*kept, folder])
    process.communicate("\n")


def test_one_whose_number_is_not_seen_is_kept_by_its_lock(place: Path) -> None:
    """As from a container that shares the folder: its process has a number of its own there."""
    process = holding(place, RENAMES)
    assert process.stdout
    assert process.stdout.readline() == "renamed\n"
    with temporary_folder():
        assert (place / "ptqcli-temporary-4194305-abcdefgh" / "large").exists()
    process.communicate("\n")


def test_what_is_not_ours_stays(place: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "work").write_text("years")
    (place / "ptqcli-temporary-4194305-linklink").symlink_to(tmp_path / "precious")
    (place / "ptqcli-temporary-4194305-filefile").write_text("")
    (place / "ptqcli-temporary-4194305-opentoal").mkdir(mode=0o755)
    (place / "ptqcli-temporary-notes").mkdir(mode=0o700)
    before = sorted(place.iterdir())
    with temporary_folder():
        pass
    assert sorted(place.iterdir()) == before
    assert (tmp_path / "precious" / "work").read_text() == "years"


GROWS = """
import sys
from pathlib import Path
from ptqcli.temporary import growing_file
name, lock = growing_file(Path(sys.argv[1]))
name.write_text("half")
print(name, flush=True)
input()
"""


def growing(path: Path) -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen([sys.executable, "-c", GROWS, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    return process, Path(process.stdout.readline().strip())


def test_a_file_that_a_killed_process_has_left_half_written_goes_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    at_work, kept = growing(path)
    killed, left = growing(path)
    other, elsewhere = growing(tmp_path / "other.gguf")
    for process in (killed, other):
        process.kill()
        process.communicate()
    mine = [tmp_path / f".model.gguf.{name}.partial" for name in ("4194305-linklink", "4194305-hardhard", "x")]
    (tmp_path / "precious").write_text("years of work")
    mine[0].symlink_to(tmp_path / "precious")
    os.link(tmp_path / "precious", mine[1])
    mine[2].write_text("")
    new, lock = growing_file(path)
    os.close(lock)
    assert not left.exists()
    assert all(each.exists() for each in (kept, elsewhere, new, *mine))
    assert (tmp_path / "precious").read_text() == "years of work"
    at_work.communicate("\n")
