"""The cases of ``gpu_check.py`` in child processes, and what such a child does: a kernel that crashes or hangs costs its case alone."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from gpu_layers import WHAT_CASES_RAISE, Case, GpuRun, Values

from ptqcli.bench.peers import first_line

Cases = Callable[[GpuRun], Iterator[tuple[str, Case]]]

# Many children on one machine: without these each would start a thread and a compiler for every processor.
FOR_CHILDREN = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}


def child(cases_of: Cases, run: GpuRun) -> int:
    """Runs the cases that standard input names until the given time, and says one JSON line before and after each."""
    order = json.loads(sys.stdin.read())
    # Whatever a library prints must not end up among the lines.
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_grad_enabled(False)
    cases = dict(cases_of(replace(run, ready=frozenset(order["ready"]), eager=frozenset(order["eager"]))))
    for name in order["names"]:
        if time.time() > order["until"]:
            break
        lines.write(json.dumps({"started": name}) + "\n")
        began = time.perf_counter()
        values: Values = {"name": name, "ok": True}
        try:
            values |= cases[name]()
            if run.device.type == "cuda":
                torch.cuda.synchronize()
        except WHAT_CASES_RAISE as problem:
            values |= {"ok": False, "why": first_line(problem)}
        lines.write(json.dumps(values | {"seconds": round(time.perf_counter() - began, 3)}) + "\n")
        if "CUDA" in values.get("why", "") or "no_graph" in values:
            return 4  # after an illegal access every further call of this process would fail, after a failed capture some
    return 0


@dataclass
class Pool:
    """Runs cases in child processes.

    command: starts a child, which is given its orders on standard input, among them what is ``ready``, and in ``eager`` whatever earlier
    children failed to capture in a CUDA graph. case_seconds: how long it may be silent; grace_seconds: likewise beyond the end of its time.
    """

    command: list[str]
    ready: list[str] = field(default_factory=list)
    eager: list[str] = field(default_factory=list)
    case_seconds: float = 90.0
    grace_seconds: float = 20.0
    results: list[Values] = field(default_factory=list)

    def run(self, names: Sequence[str], until: float, workers: int) -> None:
        """Adds to ``results`` a line for each case that was begun before ``until`` (of ``time.time``)."""
        with ThreadPoolExecutor(workers) as threads:
            list(threads.map(lambda first: self._some(names[first::workers], until), range(workers)))

    def _some(self, names: Sequence[str], until: float) -> None:
        waiting = list(names)
        while waiting and time.time() < until:
            waiting = self._one_child(waiting, until)

    def _one_child(self, names: list[str], until: float) -> list[str]:
        """Runs a child to its end and returns the cases that are still to be done."""
        process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env=os.environ | FOR_CHILDREN,
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps({"names": names, "until": until, "ready": self.ready, "eager": self.eager}))
        process.stdin.close()
        lines: queue.Queue[str | None] = queue.Queue()
        errors: list[str | None] = []
        readers = [
            threading.Thread(target=forward, args=(process.stdout, lines.put), daemon=True),
            threading.Thread(target=forward, args=(process.stderr, errors.append), daemon=True),
        ]
        for reader in readers:
            reader.start()
        started, done, hung = self._listen(lines, until)
        process.kill()
        process.wait()
        for reader, stream in zip(readers, (process.stdout, process.stderr), strict=True):
            reader.join(timeout=5)
            if stream is not None and not reader.is_alive():  # a compiler that outlived the child holds it open
                stream.close()
        if started is not None:
            why = "hung, or took too long" if hung else f"the process died: {last_line(errors)}"
            self.results.append({"name": started, "ok": False, "why": why})
            done.add(started)
        elif not done and time.time() < until:
            self.results.append({"name": names[0], "ok": False, "why": f"no process could be started: {last_line(errors)}"})
            done.add(names[0])
        return [name for name in names if name not in done]

    def _listen(self, lines: queue.Queue[str | None], until: float) -> tuple[str | None, set[str], bool]:
        """Until the child ends, or is silent for too long: the case that it was at, those that it has done, whether it was silent."""
        started: str | None = None
        done: set[str] = set()
        while True:
            patience = min(self.case_seconds, max(until - time.time(), 0) + self.grace_seconds)
            try:
                line = lines.get(timeout=patience)
            except queue.Empty:
                return started, done, True
            if line is None:
                return started, done, False
            said = json.loads(line)
            if "started" in said:
                started = said["started"]
                continue
            self.results.append(said)
            self.eager += [said["no_graph"]] if "no_graph" in said else []
            done.add(said["name"])
            started = None


def forward(stream: Any, take: Callable[[str | None], object]) -> None:
    """Each line of a stream, and None at its end."""
    for line in stream:
        take(line)
    take(None)


def last_line(lines: Sequence[str | None]) -> str:
    said = [line.strip() for line in lines if line and line.strip()]
    return said[-1][:300] if said else "without a word"
