"""What a run writes of itself as it goes: ``ptq_log.txt`` for people and ``ptq_log.jsonl`` for programs, a line for each event.

Both lie in the folder in which the checkpoint grows and stay in it. Each line is written at once, by one call, so that a run which is
killed leaves all that it had told; the run that goes on appends. They tell of times and memory, which differ from run to run, so they are
the one exception from "the same inputs, the same bytes", and no checksum covers them. A line that cannot be written ends nothing.

The keys of an event are kept stable: ``time`` (UTC), ``event``, and what EVENTS lists.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from io import FileIO
from pathlib import Path
from typing import Any

import torch
import transformers

import ptqcli
from ptqcli.checkpoint.directory import Directory
from ptqcli.errors import printable
from ptqcli.pipeline.memory import peak_memory
from ptqcli.pipeline.progress import Progress
from ptqcli.pipeline.report import LOG_JSON, LOG_TEXT, FoldReport, LayerReport, Report
from ptqcli.plan import Plan
from ptqcli.untrusted import one_line, read_lines

# Event -> its keys. ``layer`` and ``fold`` have those of ``LayerReport`` and ``FoldReport`` besides.
EVENTS = {
    "begin": ("model", "ptqcli", "torch", "transformers", "python", "machine", "threads"),
    "plan": ("output", "rows"),
    "phase": ("text",),
    "remark": ("text",),
    "goes_on": ("blocks", "count"),
    "block_started": ("block", "count"),
    "layer": ("seconds", "peak_memory_bytes"),
    "fold": (),
    "block_done": ("block", "count", "linears", "largest_error", "seconds"),
    "step": ("done", "total", "text"),
    "ended": ("why",),
    "finished": ("output", "bytes_after", "seconds", "peak_memory_bytes", "seconds_by_step"),
}
STEP_PAUSE = 10.0  # least seconds between events of steps
Event = Mapping[str, Any]


class RunLog(Progress):
    """A progress that hands everything on to another one, and writes it down.

    model: what it is called. device: whose peak of memory is noted. on_event: is given each event, too.
    """

    def __init__(self, told: Progress, model: str, device: torch.device, on_event: Callable[[Event], None] | None = None) -> None:
        self._told, self._device, self._on_event = told, device, on_event
        self._waiting: list[Event] = []  # until there is a folder
        self._files: dict[str, FileIO] = {}
        self._began = self._block_began = self._last = time.perf_counter()
        self._last_step = 0.0
        self._errors: list[float] = []
        machine = f"{platform.system()} {platform.machine()}"
        versions = {"ptqcli": ptqcli.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
        self.event("begin", model=model, **versions, python=platform.python_version(), machine=machine, threads=torch.get_num_threads())

    # Where it goes

    def event(self, kind: str, **values: Any) -> None:
        """Write down that something has happened, one of EVENTS."""
        found = {"time": datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z"), "event": kind, **values}
        if self._on_event is not None:
            self._on_event(found)
        if self._files:
            self._write(found)
        else:
            self._waiting.append(found)

    @contextmanager
    def kept_in(self, folder: Directory) -> Iterator[None]:
        """While inside, everything is written into files of ``folder``, what was told before, too; what ends it is noted."""
        self._open(folder)
        try:
            yield
        except BaseException as error:
            self.event("ended", why="interrupted" if isinstance(error, KeyboardInterrupt) else one_line(error))
            raise
        finally:
            for file in self._files.values():
                file.close()
            self._files = {}

    def _open(self, folder: Directory) -> None:
        try:
            for name in (LOG_TEXT, LOG_JSON):
                self._files[name] = FileIO(folder.append(name), "a")
        except OSError as error:
            self._told.remark(f"the log cannot be written: {error.filename}: {error.strerror}")
            return
        for waiting in self._waiting:
            self._write(waiting)
        self._waiting = []

    def _write(self, event: Event) -> None:
        lines = {LOG_TEXT: line_of(event), LOG_JSON: json.dumps(event)}
        for name, line in lines.items():
            if line is not None and name in self._files:
                with suppress(OSError):  # a full disk ends the run where it matters
                    self._files[name].write(line.encode() + b"\n")

    # What is told

    def planned(self, plan: Plan, output: Path) -> None:
        rows = [list(row) for row in plan.summary_rows()]
        self.event("plan", output=str(output), rows=rows)
        self._told.planned(plan, output)

    def phase(self, text: str) -> None:
        self.event("phase", text=text)
        self._told.phase(text)

    def remark(self, text: str) -> None:
        self.event("remark", text=text)
        self._told.remark(text)

    def goes_on(self, blocks: int, count: int) -> None:
        """An earlier run has finished ``blocks`` of ``count``."""
        self.event("goes_on", blocks=blocks, count=count)

    def block_started(self, index: int, count: int) -> None:
        self._block_began = self._last = time.perf_counter()
        self._errors.clear()
        self.event("block_started", block=index + 1, count=count)
        self._told.block_started(index, count)

    def detail(self, text: str) -> None:
        self._told.detail(text)

    def layer_progress(self, name: str, done: int, total: int, note: str = "") -> None:
        self._told.layer_progress(name, done, total, note)

    def note(self, report: LayerReport | FoldReport) -> None:
        """What is to be said of a linear, which has its codes, or of a fold. seconds: since the one before, or since the block began."""
        if isinstance(report, FoldReport):
            self.event("fold", **asdict(report))
            return
        now, before = time.perf_counter(), self._last
        self._last = now
        self.event("layer", **asdict(report), seconds=round(now - before, 3), peak_memory_bytes=peak_memory(self._device))

    def layer_done(self, name: str, error: float) -> None:
        self._errors.append(error)
        self._told.layer_done(name, error)

    def block_done(self, index: int, count: int) -> None:
        spent = round(time.perf_counter() - self._block_began, 3)
        worst = max(self._errors, default=None)
        self.event("block_done", block=index + 1, count=count, linears=len(self._errors), largest_error=worst, seconds=spent)
        self._told.block_done(index, count)

    def step(self, done: int, total: int, text: str) -> None:
        now = time.perf_counter()
        if now - self._last_step >= STEP_PAUSE or done == total:
            self._last_step = now
            self.event("step", done=done, total=total, text=text)
        self._told.step(done, total, text)

    def finished(self, report: Report, output: Path, spent: Mapping[str, float]) -> None:
        """Everything is written, and ``output`` is about to have its name."""
        seconds = {kind: round(value, 3) for kind, value in spent.items()}
        self.event(
            "finished",
            output=str(output),
            bytes_after=report.bytes_after,
            seconds=round(time.perf_counter() - self._began, 3),
            peak_memory_bytes=peak_memory(self._device),
            seconds_by_step=seconds,
        )


def line_of(event: Event) -> str | None:
    """An event as people read it, in one line; None for what only programs want."""
    text = _TEXTS[event["event"]](event)
    return None if text is None else f"{event['time'][:10]} {event['time'][11:19]}  {printable(' '.join(text.split()))}"


def _layer_text(event: Event) -> str:
    damp = f", damping raised to {event['damp']:g}" if event["damp_raised"] and event["damp"] is not None else ""
    dead = f", {event['never_activated']} inputs never active" if event["never_activated"] else ""
    tokens = f", {event['tokens']} tokens" if event["tokens"] is not None else ""
    took = f"{event['seconds']:.1f} s, {event['peak_memory_bytes'] / 2**30:.2f} GiB at most so far"
    return f"{event['name']}: {event['scheme']}, error {event['relative_error']:.4f}{damp}{dead}{tokens}, {took}"


def _fold_text(event: Event) -> str | None:
    return None if event["left_alone"] is None else f"fold {event['producer'] or event['readers']} is left alone: {event['left_alone']}"


def _block_text(event: Event) -> str:
    worst = "" if event["largest_error"] is None else f", largest error {event['largest_error']:.4f}"
    return f"block {event['block']} of {event['count']} is finished: {event['linears']} linears{worst}, {event['seconds']:.1f} s"


_TEXTS: dict[str, Callable[[Event], str | None]] = {
    "begin": lambda event: "begins: " + ", ".join(f"{key} {event[key]}" for key in EVENTS["begin"]),
    "plan": lambda event: "; ".join([f"output: {event['output']}", *(": ".join(row) for row in event["rows"])]),
    "phase": lambda event: str(event["text"]),
    "remark": lambda event: str(event["text"]),
    "goes_on": lambda event: f"goes on behind {event['blocks']} of {event['count']} blocks, which an earlier run has finished",
    "block_started": lambda event: f"block {event['block']} of {event['count']} begins",
    "layer": _layer_text,
    "fold": _fold_text,
    "block_done": _block_text,
    "step": lambda event: f"{event['done']} of {event['total']}: {event['text']}",
    "ended": lambda event: f"ended: {event['why']}",
    "finished": lambda event: f"finished: {event['bytes_after'] / 2**20:.1f} MiB in {event['seconds']:.1f} s",
}


# Reading it

LONGEST_LINE, MOST_LINES = 1 << 16, 4_000_000


@dataclass(frozen=True, kw_only=True)
class PastRuns:
    """What a log tells of the runs that made a checkpoint. runs: how many began. ended: why those did that came to no end, "" for one that
    could not say. seconds: of the last line of each from its first, together. layers: name -> seconds and peak_memory_bytes."""

    runs: int
    ended: list[str]
    seconds: float
    layers: dict[str, dict[str, float]]


def read_log(folder: Path) -> PastRuns | None:
    """The log in ``folder``; None where there is none. Lines that are none of ours are passed over: nothing depends on them."""
    path = folder / LOG_JSON
    if not path.is_file():
        return None
    spans: list[list[float]] = []
    ended: list[str] = []
    layers: dict[str, dict[str, float]] = {}
    state = "finished"
    for event in _events(path):
        kind = event.get("event")
        if kind == "begin":
            ended += [""] if state == "open" else []
            spans.append([event["at"], event["at"]])
            state = "open"
        elif kind in ("ended", "finished"):
            ended += [str(event.get("why"))[:300]] if kind == "ended" else []
            state = kind
        elif kind == "layer" and isinstance(event.get("name"), str):
            layers[event["name"]] = {key: event[key] for key in EVENTS["layer"] if _is_number(event.get(key))}
        if spans:
            spans[-1][1] = max(spans[-1][1], event["at"])
    return PastRuns(runs=len(spans), ended=ended, seconds=sum(end - begin for begin, end in spans), layers=layers)


def _events(path: Path) -> Iterator[dict[str, Any]]:
    """Each line that is an event, with its time in seconds as ``at``."""
    for line in read_lines(path, LONGEST_LINE, MOST_LINES):
        try:
            event = json.loads(line)
            at = datetime.strptime(event["time"], "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=timezone.utc).timestamp()
        except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
            continue
        yield {**event, "at": at}


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1e15
