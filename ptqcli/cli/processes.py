"""The processes of ``ptq quantize``: those that torchrun or accelerate started, or that are started here, and how they end together.

Where several GPUs are there, and in ``--processes``, this process starts the others, with the same command line. Whatever ends one of them
ends all, and is told once: by the first, which knows what is kept; by the second, if it is the first that has died.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from _thread import interrupt_main
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from ptqcli.cli.signals import clean_up_first
from ptqcli.errors import PTQError, UsageError, printable

if TYPE_CHECKING:
    import torch

    from ptqcli.pipeline.alive import Alive, Trouble
    from ptqcli.pipeline.ranks import Group, Ranks

JOIN_SECONDS = 600.0  # within which all processes have to come
TOLD_SECONDS = 3.0  # for the first process to hear of what has happened in another, and for the others to hear of it
LEAVE_SECONDS = 10.0  # for the others to end, when the first has
STUCK_SECONDS = 10.0  # for a process to come out of whatever waits for one that has died
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
INTERRUPTED = 130


@dataclass(frozen=True)
class Place:
    """Which process this is. local: its number on this machine."""

    rank: int
    size: int
    local: int


def place_in_environment() -> Place | None:
    """What torchrun, or whoever works like it, says; None where this process is alone. Raises UsageError for what makes no sense.

    To be asked before torch is imported.
    """
    texts = [os.environ.get(name) for name in VARIABLES]
    if texts[0] is None or texts[1] is None:
        return None
    try:
        rank, size, local = (int(text or "0") for text in texts)
    except ValueError as error:
        raise UsageError(f"{' and '.join(VARIABLES)} of the environment are no whole numbers: {texts}") from error
    if not 0 <= rank < size or local < 0:
        raise UsageError(f"RANK {rank} of WORLD_SIZE {size}, LOCAL_RANK {local} in the environment make no sense")
    if size == 1:
        return None
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # what torch sees of connections that break is told in our words
    return Place(rank, size, local)


class OneVoice(click.Command):
    """A command that processes share: one of them says what is wrong with its line."""

    def make_context(self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any) -> click.Context:
        """As that of every command."""
        place = place_in_environment()
        try:
            return super().make_context(info_name, args, parent, **extra)
        except click.UsageError as error:
            if place is not None and place.rank > 0:
                raise click.exceptions.Exit(error.exit_code) from error
            raise


@contextmanager
def alone(device: str) -> Iterator[tuple[Ranks, torch.device]]:
    """No other processes, however many have been started: the first does what there is to do."""
    from ptqcli.pipeline.ranks import Ranks

    place = place_in_environment()
    if place is not None and place.rank > 0:
        raise click.exceptions.Exit(0)
    yield Ranks(), device_of(device, None)


@contextmanager
def shared(device: str, processes: int | None, most: Callable[[], int], arguments: Sequence[str]) -> Iterator[tuple[Ranks, torch.device]]:
    """The processes that share the run, and this one's device.

    device, processes: as they were asked for; processes None: one for each GPU, but not more than ``most`` says. arguments: of this command
    line, with which other processes are started.
    """
    place = place_in_environment()
    from ptqcli.pipeline.ranks import Ranks

    if place is not None:
        if processes not in (None, place.size):
            raise UsageError(f"processes {processes}: there are {place.size} already, of torchrun or the like; leave --processes out")
        with _joined(place, device) as shared_run:
            yield shared_run
        return
    count = processes if processes is not None else processes_for(device, most)
    if count == 1:
        yield Ranks(), device_of(device, None)
        return
    device_of(device, Place(0, count, count - 1))  # told before anything is started
    with _started(count, arguments) as (store, children), _joined(Place(0, count, 0), device, store, children) as shared_run:
        yield shared_run


def processes_for(device: str, most: Callable[[], int]) -> int:
    """How many processes a device that is not numbered stands for."""
    if device != "cuda":
        return 1
    import torch

    count = torch.cuda.device_count()
    return min(count, most()) if count > 1 else 1


def device_of(device: str, place: Place | None) -> torch.device:
    """The torch device of the process at ``place``. Raises UsageError if there is none."""
    import torch

    from ptqcli.resources import open_device

    found = open_device(device)
    if place is None or found.type == "cpu":
        return found
    if found.index is not None:
        raise UsageError(f"device {device}: is one device, and {place.size} processes share the run; give --device cuda")
    count = torch.cuda.device_count()
    if place.local >= count > 1:
        raise UsageError(f"device cuda: process {place.local} of this machine finds {count} CUDA devices; start one process for each")
    return torch.device("cuda", place.local if count > 1 else 0)


@contextmanager
def _started(count: int, arguments: Sequence[str]) -> Iterator[tuple[Any, list[subprocess.Popen[bytes]]]]:
    """The store that all meet at, and processes 1 to ``count`` - 1. What runs when the context ends is ended."""
    import torch
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    clean_up_first()
    threads = max(1, torch.get_num_threads() // count)
    torch.set_num_threads(threads)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": str(threads)}
    children: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(1, count):
            environment = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, "-m", "ptqcli", *arguments]
            children.append(subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL))
        yield store, children
    finally:
        _end(children)


def _end(children: Sequence[subprocess.Popen[bytes]]) -> None:
    until = time.monotonic() + LEAVE_SECONDS
    for ask in (None, subprocess.Popen.terminate, subprocess.Popen.kill):
        for child in children:
            if ask is not None and child.poll() is None:
                ask(child)
        for child in children:
            try:
                child.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                continue
        until = time.monotonic() + LEAVE_SECONDS


@contextmanager
def _joined(
    place: Place, device: str, store: Any = None, children: Sequence[subprocess.Popen[bytes]] = ()
) -> Iterator[tuple[Ranks, torch.device]]:
    """The group of all processes; what ends it is told once."""
    from datetime import timedelta

    from torch.distributed import rendezvous  # type: ignore[attr-defined]

    from ptqcli.pipeline.alive import Alive
    from ptqcli.pipeline.ranks import Group

    own = device_of(device, place)
    end = _End(place.rank)
    try:
        if store is None:
            store = next(iter(rendezvous("env://", timeout=timedelta(seconds=JOIN_SECONDS))))[0]
    except (RuntimeError, ValueError) as error:
        raise PTQError(f"process {place.rank} of {place.size} does not find the others: {error}") from error
    clean_up_first()  # not before: a signal is to end what waits for processes that do not come
    alive = Alive(
        store.clone(),
        place.rank,
        place.size,
        end.in_other,
        lambda: [rank for rank, child in enumerate(children, 1) if child.poll() is not None],
    )
    end.alive = alive
    group = None
    try:
        alive.begin(JOIN_SECONDS)
        group = Group(place.rank, place.size, store, alive, own)
        yield group, own
    except BaseException as error:
        raise end.of(error, group) from error
    end.well(group)


class _End:
    """How process ``rank`` ends."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.alive: Alive
        self._reached = threading.Event()

    def well(self, group: Group) -> None:
        """All is done."""
        from ptqcli.pipeline.alive import DONE

        self._reached.set()
        self.alive.stop()
        self.alive.note(DONE)
        group.close()
        self.alive.leave(LEAVE_SECONDS)

    def of(self, error: BaseException, group: Group | None) -> BaseException:
        """``error`` has come up here; what is to be raised from it."""
        self._reached.set()
        try:
            return self._of(error, group)
        except KeyboardInterrupt:  # of the watcher, which has seen at the same time what this process ends for
            return self._of(error, group)

    def _of(self, error: BaseException, group: Group | None) -> BaseException:
        from ptqcli.pipeline.alive import FAILED, FOLLOWED
        from ptqcli.pipeline.alive import INTERRUPTED as STOPPED

        alive = self.alive
        alive.stop()
        trouble = alive.found if isinstance(error, (PTQError, click.ClickException)) else alive.trouble()
        if trouble is not None:
            raised, how = self._of_other(trouble, error), (FOLLOWED, "", 0, False)
        elif isinstance(error, KeyboardInterrupt):
            raised, how = error if self.rank == 0 else click.exceptions.Exit(INTERRUPTED), (STOPPED, "", 0, False)
        else:
            raised, how = error, (FAILED, _text(error, self.rank), getattr(error, "exit_code", 1), isinstance(error, PTQError))
        alive.note(*how)
        if group is not None:
            group.close()  # whoever waits for this process goes on, and finds the note
        if self.rank == 0:
            alive.tell()
        elif raised is error and (alive.told(TOLD_SECONDS) or alive.lives(0)):  # which finds the note when this process has gone
            raised = click.exceptions.Exit(how[2])
        alive.leave(TOLD_SECONDS)
        return raised

    def _of_other(self, trouble: Trouble, error: BaseException) -> BaseException:
        """What is raised here when another process is to blame; ``error`` may say what is kept."""
        if not self._tells(trouble):
            return click.exceptions.Exit(trouble.code)
        if isinstance(error, PTQError):
            return error
        return PTQError(_and_kept(trouble, str(error) if isinstance(error, KeyboardInterrupt) else ""))

    def _tells(self, trouble: Trouble) -> bool:
        return self.rank == (1 if trouble.rank == 0 else 0) and (trouble.dead or self.rank == 0)

    def in_other(self, trouble: Trouble) -> None:
        """Another process has ended or died, as its watcher tells in a thread of its own: interrupt what is being done here."""
        if not self._reached.is_set():
            interrupt_main(signal.SIGTERM)
        if not self._reached.wait(STUCK_SECONDS):  # in a call that waits for what will not come
            if self._tells(trouble) and trouble.text:
                print(printable(f"error: {_and_kept(trouble, '')}"), file=sys.stderr, flush=True)
            os._exit(trouble.code)


def _and_kept(trouble: Trouble, kept: str) -> str:
    ways = "what is finished is kept beside the output: the same command goes on from there, with as many processes as you like"
    return f"{trouble.text}; {kept or ways}"


def _text(error: BaseException, rank: int) -> str:
    if isinstance(error, PTQError):
        return str(error)
    if isinstance(error, click.ClickException):
        return error.format_message()
    what = "out of memory" if isinstance(error, MemoryError) else f"{type(error).__name__}: {error}"
    return f"process {rank}: {what}"
