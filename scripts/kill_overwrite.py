"""Kill `ptq quantize`, and let every system call fail, at each step of what it does to folders; look what is left each time.

    python scripts/kill_overwrite.py [--all]

The real command runs on a tiny model up to where its output folder is claimed. From there a process is forked for each step and fault, so
that hundreds of faults take minutes. A step is one call that opens, creates, writes, forces to disk, renames or removes something; a
fault is an error in its place (EIO, ENOSPC, EPERM) or a signal before or behind it (SIGKILL, SIGTERM). Steps that are alike, such as the
writes of a file, are tried once, unless --all is given. Afterwards

- what else lies in the folder, a file and a folder of the user, is as it was;
- the output is the old checkpoint or the new one, each whole to the byte, or nothing if there was none;
- exit code 0 means the new one and nothing beside it; any other, that a folder that is left is named in the message;
- behind a SIGKILL, the next run without faults finds the old checkpoint or the new one, finishes, and leaves nothing beside it.

Prints a table of steps and faults with what the output was, and a count. Exit code 1 if anything was lost, or told wrongly.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

import ptqcli.pipeline.folder as folder_module
import ptqcli.pipeline.pipeline as pipeline_module
import ptqcli.pipeline.written as written_module
from ptqcli.checkpoint.directory import Directory
from ptqcli.checkpoint.unfinished import JOURNAL, MARKER
from ptqcli.cli import run, signals
from ptqcli.errors import PTQError
from ptqcli.pipeline.output import Marker
from ptqcli.pipeline.report import LOGS, PARTIAL

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from tiny import make_model

CALLS = ("open", "mkdir", "write", "fsync", "rename", "unlink", "rmdir")
ERRORS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "EPERM": errno.EPERM}
SIGNALS = {f"{name} {when}": getattr(signal, f"SIG{name}") for name in ("KILL", "TERM") for when in ("before", "behind")}
FAULTS = (*ERRORS, *SIGNALS)

Tree = dict[str, bytes]  # relative path -> content
Wanted = Callable[[list[str], int, str], bool]  # of all steps, the number of one, and a fault


@dataclass(frozen=True)
class Scenario:
    """What the folder holds to begin with, and how the run goes. output: what the output is then: old, nothing, empty."""

    name: str
    output: str = "old"
    exchange: bool = True  # whether two folders can change places in one step
    fails: bool = False  # whether the run fails when all is written, so that it has to clean up
    leftover: bool = False  # whether a killed run has left something


SCENARIOS = (
    Scenario("--overwrite"),
    Scenario("--overwrite, where two folders cannot change places", exchange=False),
    Scenario("--overwrite, by a run that fails at its end", fails=True),
    Scenario("--overwrite, behind a run that was killed", leftover=True),
    Scenario("a new output", "nothing"),
    Scenario("an output that is an empty folder", "empty"),
)


@dataclass
class Trial:
    """What came of one fault at one step. state: what the output was, with a star if not before the next run. wrong: what is lost."""

    step: str
    fault: str
    state: str
    wrong: str = ""


@dataclass
class Answer:
    """How a process ended: its exit code, negative for a signal, what it said, and the steps that it made."""

    code: int
    told: str
    steps: list[str]


@dataclass
class Steps:
    """Watches the calls of this process on what lies in ``place``, and lets the one numbered ``strike`` fail as ``fault`` says."""

    place: Path
    strike: int = -1
    fault: str = ""
    names: list[str] = field(default_factory=list)

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name in CALLS:
                stack.enter_context(mock.patch.object(os, name, self._watched(name, getattr(os, name))))
            stack.enter_context(mock.patch.object(folder_module, "exchange", self._watched("exchange", folder_module.exchange)))
            yield

    def _watched(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*given: Any, **named: Any) -> Any:
            descriptor = given[0] if name in ("write", "fsync") else next((named[key] for key in named if key.endswith("dir_fd")), None)
            where = os.readlink(f"/proc/self/fd/{descriptor}") if isinstance(descriptor, int) else ""
            if name != "exchange" and not where.startswith(str(self.place)):
                return call(*given, **named)  # some library's own
            what = os.path.basename(where) if name in ("write", "fsync") else " ".join(part for part in given if isinstance(part, str))
            self.names.append(f"{name} {what}".strip())
            if len(self.names) - 1 != self.strike:
                return call(*given, **named)
            if self.fault in ERRORS:
                if name == "exchange":
                    return False
                raise OSError(ERRORS[self.fault], os.strerror(ERRORS[self.fault]))
            if self.fault.endswith("before"):
                os.kill(os.getpid(), SIGNALS[self.fault])
            result = call(*given, **named)
            if self.fault.endswith("behind"):
                os.kill(os.getpid(), SIGNALS[self.fault])
            return result

        return watched


class Enough(BaseException):
    """Ends the command in the process that forked all the others."""


class Workshop:
    """A model, the old and the new checkpoint of it, and the folder in which the runs are tried."""

    def __init__(self, place: Path) -> None:
        self.place, self.room = place, place / "room"
        make_model(place / "model", num_hidden_layers=1)
        for name, bits in (("old", "8"), ("new", "4")):
            if run(self._line(place / name, bits)):
                raise SystemExit("the command fails without any fault")
        self.old, self.new = tree(place / "old"), tree(place / "new")

    def _line(self, output: Path, bits: str, *more: str) -> list[str]:
        flags = ["--algo", "rtn", "--set", "rtn.scale_search=minmax", "--group-size", "32", "--wbits", bits, "--quiet", *more]
        return ["quantize", str(self.place / "model"), "--output", str(output), *flags]

    def set_up(self, scenario: Scenario) -> None:
        """The folder as it is before the run: the output, and what is the user's beside it."""
        shutil.rmtree(self.room, ignore_errors=True)
        self.room.mkdir()
        (self.room / "thesis.txt").write_text("years of work")
        (self.room / "out-notes").mkdir()
        (self.room / "out-notes" / "model.safetensors").write_text("years of work")
        if scenario.output == "old":
            shutil.copytree(self.place / "old", self.room / "out")
        if scenario.output == "empty":
            (self.room / "out").mkdir()
        if scenario.leftover:
            left = self.room / f"out{PARTIAL}"
            left.mkdir()
            (left / "shard-00001.safetensors").write_text("half")
            Marker(output="out", into=False, replaces=None).write(Directory(left))

    def try_out(self, scenario: Scenario, wanted: Wanted) -> list[Trial]:
        """The steps and faults for which ``wanted`` says yes."""
        self.set_up(scenario)
        found: list[Trial] = []
        more = ["--overwrite"] if scenario.output == "old" else []
        mine = os.getpid()
        with ExitStack() as stack:
            stack.enter_context(kept_signals())
            stack.enter_context(mock.patch.object(tempfile, "tempdir", str(self.place)))  # what a killed run leaves there goes with it
            if not scenario.exchange:
                stack.enter_context(mock.patch.object(folder_module, "exchange", return_value=False))
            if scenario.fails:
                stack.enter_context(mock.patch.object(written_module, "open_checkpoint", refuse))
            growing = forking(pipeline_module.growing, self._trials(scenario, wanted, found), self.place / "told")
            stack.enter_context(mock.patch.object(pipeline_module, "growing", growing))
            try:
                code = run(self._line(self.room / "out", "4", *more))
            except Enough:
                return found
            if os.getpid() != mine:
                sys.stderr.flush()
                os._exit(code)
        raise SystemExit("the command does not come to its output folder")

    def _trials(self, scenario: Scenario, wanted: Wanted, found: list[Trial]) -> Generator[Steps, Answer, None]:
        steps = (yield Steps(self.room)).steps
        for number, name in enumerate(steps):
            for fault in FAULTS:
                if not wanted(steps, number, fault):
                    continue
                self.set_up(scenario)
                answer = yield Steps(self.room, number, fault)
                trial = Trial(f"{number + 1:3} {name}", fault, self._state())
                trial.wrong = self._wrong(scenario, trial.state, answer)
                if answer.code < 0:
                    after = yield Steps(self.room)
                    if trial.wrong or trial.state == "unfinished":
                        trial.state, trial.wrong = f"{self._state()}*", ""
                    trial.wrong = trial.wrong or self._wrong(scenario, self._state(), after, tidy=True)
                found.append(trial)

    def _state(self) -> str:
        """What the output is: old, new, nothing, unfinished (an empty folder that is written into), or broken."""
        out = tree(self.room / "out")
        marked = out.pop(MARKER, None) is not None
        out.pop(JOURNAL, None)
        if out in (self.old, self.new):
            return "old" if out == self.old else "new"
        if not out and not marked:
            return "nothing"
        return "unfinished" if marked else "broken"

    def _is_leftover(self) -> bool:
        """Whether nothing of the last run is in its folder."""
        return set(tree(self.room / f"out{PARTIAL}")) <= {"shard-00001.safetensors", MARKER}

    def _wrong(self, scenario: Scenario, state: str, answer: Answer, tidy: bool = False) -> str:
        """What the fault has harmed, "" for nothing. tidy: whether nothing may be left of any run."""
        before = "old" if scenario.output == "old" else "nothing"
        left = sorted(path.name for path in self.room.iterdir() if path.name.startswith(f"out{PARTIAL}"))
        marked = (self.room / "out" / MARKER).exists()
        theirs = (self.room / "thesis.txt", self.room / "out-notes" / "model.safetensors")
        if not all(path.is_file() and path.read_text() == "years of work" for path in theirs):
            return "a file of the user"
        if state not in (before, "new") and not (state == "unfinished" and scenario.output == "empty" and answer.code < 0):
            return f"the output is {state}"
        if answer.code == 0 and (state != "new" or left or marked):
            return "exit code 0 for work that is not done"
        if answer.code >= 0 and ("internal error" in answer.told or "Traceback" in answer.told):
            return answer.told
        if answer.code > 0 and left and left[0] not in answer.told and not (scenario.leftover and self._is_leftover()):
            return f"{left[0]} is left and not told of: {answer.told}"
        if tidy and (left or marked or (answer.code not in (0, 2) and not scenario.fails)):
            return f"the next run: {answer.told or left}"
        return ""


def tree(folder: Path) -> Tree:
    """All files below ``folder``."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in LOGS)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def refuse(*_: Any) -> None:
    raise PTQError("the reader refuses it")


@contextmanager
def kept_signals() -> Iterator[None]:
    """This process behaves as the command does, for a while."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signals.end_at_once()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def forking(growing: Callable[..., Any], trials: Generator[Steps, Answer, None], told: Path) -> Callable[..., Any]:
    """``growing`` of the pipeline, in a process of its own for each that ``trials`` asks for. told: a file for what a process says."""

    @contextmanager
    def forked(*given: Any, **named: Any) -> Iterator[Any]:
        steps = next(trials)
        made = told.with_suffix(".steps")
        while True:
            made.unlink(missing_ok=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of the threads of libraries, which stay behind
                child = os.fork()
            if child == 0:
                sys.stderr = open(told, "w")  # noqa: SIM115  for as long as the process lives
                try:
                    with steps.watching(), growing(*given, **named) as folder:
                        yield folder
                finally:
                    made.write_text("\n".join(steps.names))
                return
            _, status = os.waitpid(child, 0)
            names = made.read_text().splitlines() if made.exists() else []
            answer = Answer(os.waitstatus_to_exitcode(status), told.read_text(), names)
            try:
                steps = trials.send(answer)
            except StopIteration:
                raise Enough from None

    return forked


def show(scenario: Scenario, trials: list[Trial], console: Console) -> None:
    """A row for each step, a column for each fault."""
    table = Table(title=f"{scenario.name}: what the output is", box=None, title_justify="left")
    for name in ("step", *FAULTS):
        table.add_column(name, no_wrap=True)
    rows: dict[str, dict[str, str]] = {}
    for trial in trials:
        rows.setdefault(trial.step, {})[trial.fault] = "LOST" if trial.wrong else trial.state
    for step, states in rows.items():
        table.add_row(step, *(states.get(fault, "") for fault in FAULTS))
    console.print(table)


def first_of_its_kind(steps: list[str], number: int, fault: str) -> bool:
    """Whether no earlier step is the same but for the number of a shard."""
    kinds = [re.sub(r"[0-9]{5}", "N", step) for step in steps[: number + 1]]
    return kinds[-1] not in kinds[:-1]


def main() -> int:
    """Everything in turn. Returns the exit code."""
    wanted = (lambda *_: True) if "--all" in sys.argv[1:] else first_of_its_kind
    torch.set_num_threads(1)  # the threads of a pool do not live on in a process that is forked
    start, console, lost, all_trials = time.perf_counter(), Console(width=160, highlight=False), 0, 0
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # where forcing a file to the disk takes no time
    with tempfile.TemporaryDirectory(dir=memory) as name:
        workshop = Workshop(Path(name))
        for scenario in SCENARIOS:
            trials = workshop.try_out(scenario, wanted)
            show(scenario, trials, console)
            states = Counter(trial.state for trial in trials if not trial.wrong)
            bad = [trial for trial in trials if trial.wrong]
            lost, all_trials = lost + len(bad), all_trials + len(trials)
            console.print(f"{len(trials)} faults: {', '.join(f'{state} {count}' for state, count in states.items())}; lost {len(bad)}\n")
            for trial in bad:
                console.print(f"LOST {trial.step}, {trial.fault}: {trial.wrong}")
    console.print(f"{all_trials} faults in {time.perf_counter() - start:.0f} s; lost or told wrongly: {lost}")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
