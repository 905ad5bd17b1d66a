"""Command lines in processes of their own, at the price of a fork: a server imports everything once and forks for each of them.

A child has what a real process has and a call in the test's process has not: a terminal of some width, or closed, full and
broken pipes in the place of stdout and stderr, and the exit code that a shell would see.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import select
import struct
import subprocess
import sys
import termios
import traceback
from pathlib import Path
from typing import Any

import click
import torch
import transformers
from commandline import Answer

from ptqcli.algorithms import declarations
from ptqcli.bench import generation, machine
from ptqcli.cli import COMMANDS, app, main

# What a stream of the child may be. head: a reader that leaves after one line.
KINDS = ("pipe", "closed", "full", "head")


class ForkedPtq:
    """Runs command lines in children of one server process."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "PYTHONWARNINGS": "ignore"}
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __call__(
        self,
        *arguments: str | Path,
        folder: Path,
        columns: int | None = None,
        out: str = "pipe",
        err: str = "pipe",
        stdin: str | None = "",
        **environment: str,
    ) -> Answer:
        """Run ``ptq ARGUMENTS`` in ``folder``.

        columns: of a terminal that shows stdout and stderr together; None for none, where ``out`` and ``err`` are of KINDS.
        stdin: text, None for the terminal. environment: what differs from that of an ordinary terminal.
        """
        request = {
            "arguments": [str(argument) for argument in arguments],
            "folder": str(folder),
            "columns": columns,
            "out": out,
            "err": err,
            "stdin": stdin,
            "environment": environment,
        }
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return Answer(**json.loads(self._server.stdout.readline()))

    def close(self) -> None:
        self._server.kill()
        self._server.communicate()


def serve() -> None:
    """Answer requests, one JSON object a line, until stdin ends."""
    import_all()
    answers, requests = os.fdopen(os.dup(1), "w"), os.fdopen(os.dup(0))
    os.dup2(2, 1)  # nothing but answers goes there
    for line in requests:
        answers.write(json.dumps(answer(json.loads(line))) + "\n")
        answers.flush()


def import_all() -> None:
    """Whatever a command would import; what takes seconds and is tested elsewhere is replaced."""
    for name in COMMANDS:
        app.get_command(click.Context(app), name)
    for name in ("bench.linears", "calibration.files", "evaluation.measure", "pipeline.pipeline", "runtime.models"):
        importlib.import_module(f"ptqcli.{name}")
    for name in ("AutoModelForCausalLM", "AutoTokenizer", "LlamaForCausalLM", "TextStreamer"):
        getattr(transformers, name)
    declarations()
    arithmetic = {"float32": 1e11, "bfloat16": 1e11, "int8": 1e11}
    limits = machine.Machine(name="a processor", device="cpu", threads=1, cache_bytes=1 << 20, bandwidth=1e10, arithmetic=arithmetic)
    machine.measure = lambda device: limits  # type: ignore[assignment,misc]
    generation.peak_memory = lambda *arguments: 1000  # type: ignore[assignment]
    torch.set_num_threads(1)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Fork a child, feed it, and read what it writes until it has ended."""
    feed, fed = os.pipe()
    (out, out_end), (err, err_end) = stream(request["out"]), stream(request["err"])
    if request["columns"] is None:
        child, terminal = os.fork(), None
    else:
        child, terminal = os.forkpty()
    if child == 0:
        os.close(fed)
        if request["columns"] is not None:
            fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 24, request["columns"], 0, 0))
        else:
            connect(1, out_end)
            connect(2, err_end)
        if request["stdin"] is not None:
            os.dup2(feed, 0)
        work(request)
    os.close(feed)
    with os.fdopen(fed, "w") as given:
        given.write(request["stdin"] or "")
    for end in (out_end, err_end):
        if end is not None:
            os.close(end)
    read = collect({out: request["out"], err: request["err"]} if terminal is None else {terminal: "pipe"})
    _, status = os.waitpid(child, 0)
    texts = [read.get(each, b"").decode(errors="replace") for each in ((out, err) if terminal is None else (terminal, None))]
    return {"code": os.waitstatus_to_exitcode(status), "out": texts[0].replace("\r\n", "\n"), "err": texts[1]}


def stream(kind: str) -> tuple[int | None, int | None]:
    """(what the server reads, what the child writes), None for a stream that is not there."""
    if kind == "closed":
        return None, None
    if kind == "full":
        return None, os.open("/dev/full", os.O_WRONLY)
    return os.pipe()


def connect(number: int, end: int | None) -> None:
    if end is None:
        os.close(number)
    else:
        os.dup2(end, number)


def collect(streams: dict[int | None, str]) -> dict[int | None, bytes]:
    """What comes out of ``streams`` until all are at their end."""
    read: dict[int | None, bytes] = {each: b"" for each in streams if each is not None}
    waiting = list(read)
    while waiting:
        for each in select.select(waiting, [], [])[0]:
            try:
                piece = os.read(each, 1 if streams[each] == "head" else 1 << 16)
            except OSError:  # a terminal whose last writer has gone
                piece = b""
            read[each] += piece
            if not piece or (streams[each] == "head" and piece == b"\n"):
                waiting.remove(each)
                os.close(each)
    return read


def work(request: dict[str, Any]) -> None:
    """What the child does instead of coming back: become ``ptq``."""
    code: Any = 1
    try:
        os.chdir(request["folder"])
        for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
            os.environ.pop(name, None)
        os.environ.update({"TERM": "xterm-256color", **request["environment"]})
        sys.stdin = os.fdopen(0, closefd=False)
        sys.stdout, sys.stderr = text_stream(1, os.isatty(1)), text_stream(2, True)
        sys.argv = ["ptq", *request["arguments"]]
        main()
    except SystemExit as end:
        code = end.code
    except BaseException:  # noqa: BLE001  what the interpreter would show
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
        except OSError:
            code = 120  # as the interpreter does when it ends
        os._exit(code or 0)


def text_stream(number: int, by_line: bool) -> Any:
    """What the interpreter makes of a descriptor: None of one that is closed."""
    try:
        os.fstat(number)
    except OSError:
        return None
    return os.fdopen(number, "w", buffering=1 if by_line else -1, closefd=False)


if __name__ == "__main__":
    serve()
