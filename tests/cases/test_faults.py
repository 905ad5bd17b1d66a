"""Every fault of docs/faults-tested.md that a whole command meets, with its exact words; and what is on the disk afterwards: either all is
as it was before, or the same command goes on and comes to the bytes of a run that nothing happened to."""

from __future__ import annotations

import errno
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import Answer, Ptq, one_line
from safetensors.torch import load_file, save_file
from tiny import make_model, write_text

from ptqcli.checkpoint.tensors import INDEX_FILE
from ptqcli.pipeline.report import LOGS

BLOCKS = 3
FLAGS = ("--algo", "gptq", "--group-size", "32", "--nsamples", "4", "--seqlen", "16", "--batch-size", "2")
DOWN = "model.layers.1.mlp.down_proj"
DOCS = Path(__file__).parent.parent.parent / "docs"


def tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in LOGS)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from ptqcli.cli import run

    folder = tmp_path_factory.mktemp("faults")
    make_model(folder / "model", num_hidden_layers=BLOCKS)
    write_text(folder / "text.txt")
    assert run([str(word) for word in line(folder, folder / "whole")]) == 0
    return folder


def line(room: Path, output: Path, *more: object, model: Path | None = None, calib: object = None) -> tuple[object, ...]:
    calib = room / "text.txt" if calib is None else calib
    return ("quantize", model or room / "model", *FLAGS, "--calib", calib, "--output", output, "--quiet", *more)


@pytest.fixture
def model(room: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(room / "model", tmp_path / "model"))


def goes_on(ptq: Ptq, room: Path, output: Path) -> None:
    """The same command comes to the same bytes, and nothing lies beside them."""
    assert ptq(*line(room, output)).code == 0
    assert tree(output) == tree(room / "whole")
    assert not output.with_name(f"{output.name}.partial").exists()


def nothing_is_left(answer: Answer, output: Path) -> None:
    assert answer.code in (1, 2)
    assert not output.exists()
    assert not output.with_name(f"{output.name}.partial").exists()


# The disk


def failing(monkeypatch: pytest.MonkeyPatch, name: str, code: int, file: str) -> None:
    """Every call of that name for a file of that name, or whose descriptor is of one, fails."""
    inner = getattr(os, name)

    def call(*given: Any, **named: Any) -> Any:
        what = os.readlink(f"/proc/self/fd/{given[0]}") if isinstance(given[0], int) else str(given[0])
        if file in what:
            raise OSError(code, os.strerror(code))
        return inner(*given, **named)

    monkeypatch.setattr(os, name, call)


@pytest.mark.parametrize(
    ("file", "passed"), [("shard-00003", 0), ("activations-behind-00002", 0), (".ptq-progress.json.tmp", 1), ("SHA256SUMS", 0)]
)
def test_disk_full(ptq: Ptq, room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, passed: int) -> None:
    """In a shard, in the hidden states, in the journal, when all blocks are finished."""
    inner, left = os.write, [passed]

    def write(descriptor: int, data: Any) -> int:
        if file in os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return inner(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    answer = ptq(*line(room, tmp_path / "out"))
    kept = BLOCKS if file == "SHA256SUMS" else 1
    assert answer.code == 1
    assert re.fullmatch(
        rf"error: {tmp_path}/out\.partial/\S*{re.escape(file)}\S*: No space left on device; {kept} of {BLOCKS} blocks are kept in "
        rf"{tmp_path}/out\.partial: the same command goes on from there, with --restart it begins anew",
        one_line(answer),
    )
    monkeypatch.undo()
    goes_on(ptq, room, tmp_path / "out")


def test_read_only_output(ptq: Ptq, room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, "mkdir", errno.EROFS, "out.partial")
    answer = ptq(*line(room, tmp_path / "out"))
    assert one_line(answer) == f"error: {tmp_path}/out.partial: cannot write there: Read-only file system; choose another --output"
    nothing_is_left(answer, tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr(os, "access", lambda *given: False)
    assert one_line(ptq(*line(room, tmp_path / "out"))) == f"error: {tmp_path}: cannot write there; choose another --output"


@pytest.mark.parametrize("overwrite", [False, True])
def test_output_removed_while_running(ptq: Ptq, room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool) -> None:
    out = tmp_path / "out"
    if overwrite:
        shutil.copytree(room / "whole", out)
    before = tree(out)
    removed = lambda *_: shutil.rmtree(tmp_path / "out.partial", ignore_errors=True)  # noqa: E731
    monkeypatch.setattr("ptqcli.cli.quantize_report.QuantizeProgress.block_done", removed)
    answer = ptq(*line(room, out, *(["--overwrite"] if overwrite else [])))
    assert answer.code == 1
    assert re.match(rf"error: {tmp_path}/out\.partial\S*: (No such file or directory|has gone while the run was at work)", one_line(answer))
    assert tree(out) == before
    monkeypatch.undo()
    assert ptq(*line(room, out, "--overwrite")).code == 0
    assert tree(out) == tree(room / "whole")


# The model


def test_truncated_shard(ptq: Ptq, room: Path, model: Path, tmp_path: Path) -> None:
    file = model / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    answer = ptq(*line(room, tmp_path / "out", model=model))
    said = f"error: {file} is truncated or no safetensors file; download or write it again ("
    assert one_line(answer).startswith(said)
    nothing_is_left(answer, tmp_path / "out")


def test_flipped_bit_in_a_header(ptq: Ptq, room: Path, model: Path, tmp_path: Path) -> None:
    file = model / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[9] ^= 1 << 2
    file.write_bytes(content)
    answer = ptq(*line(room, tmp_path / "out", model=model))
    assert str(file) in one_line(answer)
    nothing_is_left(answer, tmp_path / "out")


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("gone.safetensors", "names 'gone.safetensors', which is missing; download it again"),
        ("../whole/model.safetensors", "names '../whole/model.safetensors', which is not a file name in the same folder"),
        ("/etc/passwd", "names '/etc/passwd', which is not a file name in the same folder"),
    ],
)
def test_index_that_names_another_file(ptq: Ptq, room: Path, model: Path, tmp_path: Path, named: str, said: str) -> None:
    names = list(load_file(model / "model.safetensors"))
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    (model / INDEX_FILE).write_text(json.dumps({"weight_map": dict.fromkeys(names, named)}))
    answer = ptq(*line(room, tmp_path / "out", model=model))
    assert one_line(answer) == f"error: {model / INDEX_FILE} {said}"
    nothing_is_left(answer, tmp_path / "out")


def changed(model: Path, name: str, act: Callable[[torch.Tensor], object]) -> None:
    tensors = load_file(model / "model.safetensors")
    act(tensors[name])
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_or_infinity_in_weights(ptq: Ptq, room: Path, model: Path, tmp_path: Path, value: float) -> None:
    """Which tensor, in which file."""
    changed(model, f"{DOWN}.weight", lambda tensor: tensor.view(-1)[7:8].fill_(value))
    answer = ptq(*line(room, tmp_path / "out", model=model))
    said = f"{model}/model.safetensors: tensor {DOWN}.weight holds NaN or infinity"
    assert said in one_line(answer)
    nothing_is_left(answer, tmp_path / "out")


def test_infinity_in_activations(ptq: Ptq, room: Path, model: Path, tmp_path: Path) -> None:
    """Finite weights whose products are not: which linear of which block sees them first."""
    for name in ("gate_proj", "up_proj"):
        changed(model, f"model.layers.1.mlp.{name}.weight", lambda tensor: tensor.mul_(1e25))
    answer = ptq(*line(room, tmp_path / "out", model=model))
    assert f"{DOWN}: " in one_line(answer)
    assert "NaN or infinity" in one_line(answer)
    nothing_is_left(answer, tmp_path / "out")


# The text and the tokenizer


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "text.txt: the text is empty"),
        (" \n", "text.txt: the text is empty"),
        (
            "too short",
            "text.txt: the calibration text has 10 tokens, enough for 0 windows of 16, and 4 are asked for; lower that",
        ),
    ],
)
def test_empty_or_too_short_text(ptq: Ptq, room: Path, tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "text.txt").write_text(text)
    answer = ptq(*line(room, tmp_path / "out", calib=tmp_path / "text.txt"))
    assert said in one_line(answer)
    nothing_is_left(answer, tmp_path / "out")


def test_missing_tokenizer(ptq: Ptq, room: Path, model: Path, tmp_path: Path) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()
    answer = ptq(*line(room, tmp_path / "out", model=model))
    assert re.match(rf"error: {model}: cannot load a tokenizer \(.*\); copy the model's tokenizer files into the folder$", one_line(answer))
    nothing_is_left(answer, tmp_path / "out")


def test_tokenizer_of_another_model(ptq: Ptq, room: Path, model: Path, tmp_path: Path) -> None:
    """It gives tokens that the embedding does not have."""
    values = json.loads((model / "tokenizer.json").read_text())
    values["model"]["vocab"]["e"] = 4_000
    (model / "tokenizer.json").write_text(json.dumps(values))
    answer = ptq(*line(room, tmp_path / "out", model=model))
    assert one_line(answer) == f"error: {model}: the tokenizer gives token 4000, which the model's embedding does not have"
    nothing_is_left(answer, tmp_path / "out")


# Signals, and a terminal that goes away

STOPS = """
import sys, time
here = sys.argv.pop()
from ptqcli.cli import main
from ptqcli.cli.quantize_report import QuantizeProgress
inner = QuantizeProgress.block_started
def block_started(self, index, count):
    inner(self, index, count)
    if index == 2:
        open(here, "w").close()
        time.sleep(300)
QuantizeProgress.block_started = block_started
main()
"""


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    import time

    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def test_signals_and_a_terminal_that_goes_away(ptq: Ptq, room: Path, tmp_path: Path) -> None:
    """Ctrl-C, SIGTERM and SIGHUP say how it goes on; so does the log where nobody is left to be told."""
    leader, follower = pty.openpty()
    running = {}
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "terminal"):
        command = [sys.executable, "-c", STOPS, *map(str, line(room, tmp_path / name / "out")), str(tmp_path / f"{name} here")]
        stream = follower if name == "terminal" else subprocess.PIPE
        (tmp_path / name).mkdir()
        running[name] = subprocess.Popen(
            command, stdin=follower if name == "terminal" else None, stdout=stream, stderr=stream, start_new_session=True,
            preexec_fn=controlling if name == "terminal" else listening,
        )  # fmt: skip
    os.close(follower)
    for name, process in running.items():
        wait_for(tmp_path / f"{name} here", process)
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        running[name].send_signal(getattr(signal, name))
    os.close(leader)
    for name, process in running.items():
        told = (process.communicate(timeout=300)[1] or b"").decode()
        partial = tmp_path / name / "out.partial"
        said = (
            f"interrupted; 2 of {BLOCKS} blocks are kept in {partial}: the same command goes on from there, with --restart it begins anew"
        )
        assert (process.returncode, told.strip()) == (130, "" if name == "terminal" else said)
        assert "ended: interrupted" in (partial / "ptq_log.txt").read_text()
        goes_on(ptq, room, tmp_path / name / "out")


def listening() -> None:
    """Signals come through, even if whoever started the tests lets them be ignored, as nohup and a shell's background do."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)


def controlling() -> None:
    """The terminal of standard input becomes that of the process, which gets SIGHUP when it goes away."""
    import fcntl
    import termios

    listening()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_stdout_that_is_closed_ends_nothing(room: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from ptqcli.cli import main; main()", *map(str, line(room, tmp_path / "out"))]
    command.remove("--quiet")
    closed = subprocess.run(["/bin/sh", "-c", '"$@" >&- 2>&-', "sh", *command], check=False, timeout=300)
    assert closed.returncode == 0
    assert tree(tmp_path / "out") == tree(room / "whole")


def test_the_page_names_tests_that_are_there() -> None:
    text = (DOCS / "faults-tested.md").read_text()
    named = re.findall(r"`(tests/\S+\.py)`", text)
    assert len(named) > 15
    assert [name for name in named if not (DOCS.parent / name).exists()] == []
