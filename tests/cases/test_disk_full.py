"""A disk that is full, or fails: one line with a path and what is left where, and no process that dies of a mapped page."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import Ptq, one_line
from tiny import make_model, write_text

from ptqcli.calibration import hidden
from ptqcli.calibration.hidden import new_buffer
from ptqcli.checkpoint.directory import Directory
from ptqcli.errors import PTQError
from ptqcli.pipeline.pipeline import quantize
from ptqcli.recipe import Recipe
from ptqcli.resources import Resources


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    make_model(folder / "model", num_hidden_layers=1)
    write_text(folder / "text.txt")
    return folder / "model"


# Activations that are mapped from a file


def test_the_room_is_taken_before_the_file_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a sparse file only the size is there, and the page for which there is no room ends the process with SIGBUS."""
    mapped, found = torch.from_file, []

    def looked_at(name: str, **given: Any) -> torch.Tensor:
        found.append(os.stat(name).st_blocks * 512)
        return mapped(name, **given)

    monkeypatch.setattr(torch, "from_file", looked_at)
    for _ in range(2):  # with the system's call, and without it
        buffer = new_buffer((64, 128, 64), torch.float32, 0, tmp_path)
        assert found.pop() >= buffer.nbytes == 64 * 128 * 64 * 4
        assert list(tmp_path.iterdir()) == []
        monkeypatch.delattr(os, "posix_fallocate", raising=False)


FULL = """
import resource, signal, sys
from pathlib import Path
import torch
from ptqcli.calibration.hidden import new_buffer
from ptqcli.checkpoint.directory import Directory
from ptqcli.errors import PTQError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    new_buffer((1 << 20,), torch.float32, 0, Path(sys.argv[1])).fill_(1)
except PTQError as error:
    print(error)
"""


def test_no_room_for_them_is_one_line(tmp_path: Path) -> None:
    """In a process that may write 1 MiB into a file, so that the system itself says no."""
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, timeout=300, check=False)
    said = f"{tmp_path}: cannot hold 0.00 GB of activations, which --activation-budget keeps out of memory: File too large; make room"
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(said)
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_room_for_them_leaves_nothing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(hidden, "_allocate", full)
    recipe = Recipe(group_size=32, calib=str(model.parent / "text.txt"), nsamples=4, seqlen=32)
    with pytest.raises(PTQError, match=r"out\.partial: cannot hold .* No space left on device; make room there or raise the budget"):
        quantize(model, recipe, tmp_path / "out", resources=Resources(activation_budget=0))
    assert list(tmp_path.iterdir()) == []


# Calls that fail

os_write, os_fsync = os.write, os.fsync
CODES = {"no room": errno.ENOSPC, "quota": errno.EDQUOT, "broken": errno.EIO, "read only": errno.EROFS, "forbidden": errno.EPERM}


def failing_after(call: Callable[..., Any], code: int, passed: int) -> Callable[..., Any]:
    calls = iter(range(10**9))

    def answer(*given: Any, **named: Any) -> Any:
        ours = call in (os_write, os_fsync) or any("dir_fd" in key for key in named)
        if ours and next(calls) == passed:
            raise OSError(code, os.strerror(code))  # without a path, as of a call by descriptor
        return call(*given, **named)

    return answer


FAILING = [
    ("mkdir", 0, "forbidden"), ("write", 0, "no room"), ("write", 9, "quota"), ("fsync", 2, "broken"), ("fsync", 9, "no room"),
    ("rename", 0, "read only"), ("rename", 4, "broken"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "passed", "kind"), FAILING)
def test_whatever_fails_is_one_line_with_a_path(
    ptq: Ptq, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, passed: int, kind: str
) -> None:
    monkeypatch.setattr(os, name, failing_after(getattr(os, name), CODES[kind], passed))
    answer = ptq("quantize", model, "--algo", "rtn", "--group-size", "32", "--output", tmp_path / "out", "--quiet")
    assert answer.code == 1
    assert f"error: {tmp_path}/out" in one_line(answer)
    assert os.strerror(CODES[kind]) in one_line(answer)
    assert "is left" not in one_line(answer)
    left = [tmp_path / "out.partial"] if "blocks are kept in" in one_line(answer) else []
    assert list(tmp_path.iterdir()) == left
    assert bool(left) == (passed in (9, 4) and name != "write"), "where a block was finished"
    monkeypatch.undo()
    again = ptq("quantize", model, "--algo", "rtn", "--group-size", "32", "--output", tmp_path / "out", "--quiet")
    assert again.code == 0
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_program_is_told_by_an_error_of_ours(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", failing_after(os.fsync, errno.EIO, 2))
    with pytest.raises(PTQError, match=r"/out\.partial: Input/output error$"):
        quantize(model, Recipe(algo="rtn", group_size=32), tmp_path / "out")


def test_what_cannot_be_removed_is_named(ptq: Ptq, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be written any more, and nothing removed: the message must not claim that it was."""

    def fails(*given: Any, **named: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), f"{tmp_path}/out.partial/a file")

    monkeypatch.setattr(Directory, "remove", fails)
    monkeypatch.setattr(os, "fsync", failing_after(os.fsync, errno.EIO, 3))
    answer = ptq("quantize", model, "--algo", "rtn", "--group-size", "32", "--output", tmp_path / "out", "--quiet")
    assert f"Input/output error; {tmp_path}/out.partial is left ({tmp_path}/out.partial/" in one_line(answer)
    assert "Read-only file system)" in one_line(answer)
    assert answer.code == 1


def test_an_interruption_says_what_it_left(ptq: Ptq, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*given: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    line = ("quantize", model, "--algo", "rtn", "--group-size", "32", "--output", tmp_path / "out", "--quiet")
    monkeypatch.setattr("ptqcli.cli.quantize_report.QuantizeProgress.block_done", interrupt)
    assert ptq(*line).err.strip() == "interrupted; nothing of it is left on disk"
    monkeypatch.setattr(Directory, "remove", interrupt)  # a second one, while the first is being cleaned up after
    assert ptq(*line).err.strip() == f"interrupted; {tmp_path}/out.partial is left (KeyboardInterrupt)"
    assert (tmp_path / "out.partial").exists()
    monkeypatch.undo()
    assert ptq(*line).code == 0, "and the next run removes it"


def test_a_reader_that_fails_is_named_too(ptq: Ptq, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read error of one of the model's own files names that file and not the one that was being written."""
    import builtins

    opened = builtins.open

    class Broken:
        def __enter__(self) -> Broken:
            return self

        def __exit__(self, *given: object) -> None:
            pass

        def read(self, size: int) -> bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(
        "ptqcli.checkpoint.auxiliary.open",
        lambda path, mode: Broken() if Path(path).name == "tokenizer.json" else opened(path, mode),
        raising=False,
    )
    answer = ptq("quantize", model, "--algo", "rtn", "--group-size", "32", "--output", tmp_path / "out", "--quiet")
    assert one_line(answer).startswith(
        f"error: {model}/tokenizer.json: Input/output error; 1 of 1 blocks are kept in {tmp_path}/out.partial"
    )
