"""Everything that a GPU has to show about the kernels, in one run of under ten minutes. What whoever has a GPU runs first:

    python scripts/gpu_check.py [--output FILE [--overwrite]] [--minutes 9] [--workers N]
    python scripts/gpu_check.py --tune > tuned.json      # tables for this GPU, to go into kernels/ptq_kernels/tuned/
    python scripts/gpu_check.py --rehearse               # the script itself, on the CPU: says nothing about any GPU

It needs torch, triton, a C compiler and Python's headers, no installation of this package. FILE is written after each part. What is run
is in ``gpu_cases.py``, in these parts, one after another:

    correctness     every kernel, format, odd shape and number of tokens against float64, in memory full of NaN; one flipped code must be
                    seen; int8 results are the CPU reference's bits; every configuration of the tuned tables is launched; torch.compile
                    and CUDA graphs hold each kernel
    repeatability   the same bits in 20 runs on two streams at once
    size            more than 2^31 outputs and inputs
    preparation     each kernel that is to be timed, the peers' too, compiled and compared with float64
    timing          shapes of Llama-3-8B beside a bfloat16 product and the peers, from CUDA graphs, over buffers that no cache holds

and last the targets: what the timings were meant to reach, as PASS, FAIL, or NOT MEASURED.

Cases run in child processes, several at a time but for timings: a kernel that crashes, which makes a CUDA process unusable, or hangs costs
that case alone. Each part has a share of the time; what does not fit any more is left out, the least important first, and counted. Exit
code 0: nothing of ours failed; 1: something did; 2: no GPU, something that it needs is missing, or wrong usage.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import gpu_cases
import torch
from gpu_cases import (
    BASELINE,
    OURS,
    SCHEMES,
    SHAPES,
    TIMED_TOKENS,
    WHAT_CASES_RAISE,
    Case,
    Setting,
    Values,
    point_name,
    tokens_of,
)
from gpu_tune import tuned_tables, tuning_cases

from ptqcli.bench.peers import first_line, installed_peers, missing_peers  # gpu_cases has seen to it that this is found

PARTS: dict[str, Callable[[Setting], Iterator[tuple[str, Case]]]] = {**gpu_cases.PARTS, "tuning": tuning_cases}
SHARES = {"correctness": 0.36, "repeatability": 0.06, "size": 0.12, "preparation": 0.42, "timing": 1.0}  # of the time that is left
ALONE = ("size", "timing")  # parts that need the GPU for themselves
# Many children on one machine: without these each would start a thread and a compiler for every processor.
FOR_CHILDREN = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}


def child(part: str, setting: Setting) -> int:
    """Runs the cases that standard input names until the given time, and says one JSON line before and after each."""
    order = json.loads(sys.stdin.read())
    # Whatever a library prints must not end up among the lines.
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_grad_enabled(False)
    cases = dict(PARTS[part](replace(setting, ready=frozenset(order["ready"]), eager=frozenset(order["eager"]))))
    for name in order["names"]:
        if time.time() > order["until"]:
            break
        lines.write(json.dumps({"started": name}) + "\n")
        began = time.perf_counter()
        values: Values = {"name": name, "ok": True}
        try:
            values |= cases[name]()
            if setting.device.type == "cuda":
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


# ------------------------------------------------------------------------------------------------------------------------ targets


@dataclass(frozen=True)
class Target:
    """A number that was set beforehand. verdict: PASS, FAIL, or NOT MEASURED, which it is unless every point was."""

    name: str
    verdict: str
    detail: str


def targets(points: Mapping[str, Values], parts: Mapping[str, Values], device: str = "cuda") -> list[Target]:
    """points: what was timed, by its name. parts: what ``run_part`` returned, by its name."""
    found = []
    for peer in ("torch int4", "gemlite", "humming"):
        ratios = [ratio(points, "W4A16", shape, tokens, peer) for shape, tokens in product(SHAPES, (1, 4, 16, 64))]
        note = missing_peers(device).get(peer, "")
        found.append(judged(f"W4A16 g128 ahead of {peer}, M = 1 to 64", ratios, 1.0, note))
    bf16 = functools.partial(ratio, points, peer=BASELINE)
    found.append(judged("W4A16 at least 2.8x bf16, 4096x14336, M <= 16", [bf16("W4A16", "up", tokens) for tokens in (1, 4, 16)], 2.8))
    large = [tokens for tokens in TIMED_TOKENS if tokens >= 256]
    found.append(judged("W4A16 at least 0.95x bf16, M >= 256", [bf16("W4A16", *at) for at in product(SHAPES, large)], 0.95))
    found.append(judged("W8A8 at least 1.6x bf16, M >= 2048", [bf16("W8A8", *at) for at in product(SHAPES, (2048, 4096))], 1.6))
    found.append(judged("LLM.int8 at least 0.9x bf16 at every M", [bf16("LLM.int8", *at) for at in product(SHAPES, TIMED_TOKENS)], 0.9))
    told = {
        "repeatability": "the same bits in 20 runs on two streams",
        "correctness": "errors below 4e-3 of float64",
        "size": "likewise with more than 2^31 values",
    }
    for part, name in told.items():
        found.append(all_of(name, parts.get(part)))
    return found


def ratio(points: Mapping[str, Values], scheme: str, shape: str, tokens: int, peer: str) -> float | None:
    """How many times as long ``peer`` takes as our kernel, both from CUDA graphs in the same run; None if that was not measured."""
    microseconds = points.get(point_name(scheme, shape, tokens), {}).get("microseconds", {})
    return microseconds[peer] / microseconds[OURS] if peer in microseconds and OURS in microseconds else None


def judged(name: str, ratios: Sequence[float | None], least: float, note: str = "") -> Target:
    known = [found for found in ratios if found is not None]
    if not known:
        return Target(name, "NOT MEASURED", note)
    detail = f"worst {min(known):.2f}x, {len(known)} of {len(ratios)} points"
    if min(known) < least:
        return Target(name, "FAIL", detail)
    return Target(name, "PASS" if len(known) == len(ratios) else "NOT MEASURED", detail)


def all_of(name: str, part: Values | None) -> Target:
    """A case that was skipped counts as one that was left out."""
    lines = part["cases"] if part else []
    failed = [line for line in lines if not line["ok"]]
    if failed:
        return Target(name, "FAIL", f"{len(failed)} of {len(lines)} cases, first: {failed[0]['name']}")
    done = [line for line in lines if "skipped" not in line]
    left_out = (part["left_out"] if part else 0) + len(lines) - len(done)
    return Target(name, "NOT MEASURED" if left_out or not done else "PASS", f"{len(done)} cases, {left_out} left out")


# ------------------------------------------------------------------------------------------------------------------------- report


def describe_machine(setting: Setting) -> Values:
    """Names and versions."""
    found: Values = {"python": sys.version.split()[0], "torch": torch.__version__, "date": time.strftime("%Y-%m-%d %H:%M")}
    try:
        found["triton"] = import_module("triton").__version__
    except ImportError:
        found["triton"] = "none"
    found["peers"] = {peer.name: peer.version for peer in installed_peers(setting.device)}
    if setting.device.type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "capability": f"{properties.major}.{properties.minor}", "cuda": torch.version.cuda}
    return found


def show(report: Values, setting: Setting) -> None:
    """What failed, the ratios, and last the short table."""
    for part in report["parts"]:
        for line in [line for line in part["cases"] if not line["ok"]][:12]:
            print(f"{'FAILED' if is_ours(part['name'], line) else 'peer'} {part['name']}: {line['name']}: {line['why']}")
    points = report_points(report)
    for scheme in SCHEMES:
        show_ratios(scheme, points, setting)
    for peer, why in missing_peers(setting.device).items():
        print(f"not installed: {peer} ({why})")
    print()
    for part in report["parts"]:
        failed = sum(not line["ok"] for line in part["cases"])
        passed = len(part["cases"]) - failed
        print(f"{part['name']:14} {passed:4} passed {failed:4} failed {part['left_out']:4} left out {part['seconds']:6.0f} s")
    print()
    for target in report["targets"]:
        print(f"{target['verdict']:13} {target['name']}{'  (' + target['detail'] + ')' if target['detail'] else ''}")
    if setting.rehearse:
        print("\nThis was a rehearsal of the script on the CPU. It proves nothing about any GPU.")


def report_points(report: Values) -> dict[str, Values]:
    """The timings, by name."""
    return {line["name"]: line for part in report["parts"] for line in part["cases"] if "microseconds" in line and "scheme" in line}


def show_ratios(scheme: str, points: Mapping[str, Values], setting: Setting) -> None:
    """One row a shape, one column a number of tokens: our microseconds, and how many times as long bfloat16 takes."""
    tokens = tokens_of(scheme, setting)
    print(f"\n{scheme + ': us, x bf16':24}" + "".join(f"{'M=' + str(count):>15}" for count in tokens))
    for shape, (columns, rows) in setting.shapes.items():
        cells = []
        for count in tokens:
            times = ratio(points, scheme, shape, count, BASELINE)
            own = points.get(point_name(scheme, shape, count), {}).get("microseconds", {}).get(OURS)
            cells.append("-" if times is None else f"{own:.1f} {times:.2f}x")
        print(f"{shape + f' {columns}x{rows}':24}" + "".join(f"{cell:>15}" for cell in cells))


def run_part(part: str, setting: Setting, seconds: float, workers: int, ready: Sequence[str] = (), case_seconds: float = 90.0) -> Values:
    """One part within its time."""
    began = time.time()
    command = [sys.executable, __file__, "--child", part, *(["--rehearse"] if setting.rehearse else [])]
    pool = Pool(command, list(ready), case_seconds=case_seconds)
    names = [name for name, _ in PARTS[part](setting)]
    print(f"{part}: {len(names)} cases, at most {seconds:.0f} s", file=sys.stderr, flush=True)
    pool.run(names, began + seconds, workers)
    order = {name: place for place, name in enumerate(names)}
    cases = sorted(pool.results, key=lambda line: order[line["name"]])
    return {"name": part, "cases": cases, "left_out": len(names) - len(cases), "seconds": time.time() - began}


def is_ours(part: str, line: Values) -> bool:
    """Whether what a case says is about our kernels, not about a peer that could not be prepared."""
    return part != "preparation" or line["name"].startswith(f"{OURS}: ")


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, metavar="FILE", help="everything that was found, as JSON (default: named for GPU and time)")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it is there")
    parser.add_argument("--minutes", type=float, help="for everything together (default: 9; 40 for --tune)")
    parser.add_argument("--workers", type=int, default=min(12, max(1, (os.cpu_count() or 2) - 2)), help="processes that share the GPU")
    parser.add_argument("--tune", action="store_true", help="time configurations instead, and print tables for this GPU")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, at tiny sizes: tests this script, not a GPU")
    parser.add_argument("--child", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    if options.minutes is None:
        options.minutes = 40.0 if options.tune else 9.0
    if options.minutes <= 0 or options.workers < 1:
        parser.error("--minutes and --workers must be positive")
    return options


def tune(setting: Setting, minutes: float) -> int:
    """Tables for this GPU, printed as JSON."""
    found = run_part("tuning", setting, 60 * minutes, 1, case_seconds=900.0)
    for line in found["cases"]:
        if not line["ok"]:
            print(f"FAILED {line['name']}: {line['why']}", file=sys.stderr)
    name = "rehearsal" if setting.rehearse else torch.cuda.get_device_properties(0).name
    print(json.dumps({kernel: {name: entries} for kernel, entries in tuned_tables(found["cases"]).items()}, indent=1))
    print(f"{found['left_out']} cases left out", file=sys.stderr)
    return int(any(not line["ok"] for line in found["cases"]))


def check_everything(setting: Setting, output: Path, minutes: float, workers: int) -> int:
    """All parts, the report, the file."""
    until = time.time() + 60 * minutes
    report: Values = {"rehearsal": setting.rehearse, "about": describe_machine(setting), "parts": []}
    for part, share in SHARES.items():
        ready = [line["name"] for earlier in report["parts"] for line in earlier["cases"] if line.get("ready")]
        report["parts"].append(run_part(part, setting, share * max(until - time.time(), 0), 1 if part in ALONE else workers, ready))
        parts = {} if setting.rehearse else {part["name"]: part for part in report["parts"]}
        report["targets"] = [asdict(target) for target in targets(report_points(report) if parts else {}, parts)]
        write(output, report)
    print(", ".join(f"{name} {value}" for name, value in report["about"].items() if isinstance(value, str)))
    show(report, setting)
    print(f"everything is in {output}")
    failed = any(not line["ok"] and is_ours(part["name"], line) for part in report["parts"] for line in part["cases"])
    return int(failed or any(target["verdict"] == "FAIL" for target in report["targets"]))


def write(path: Path, report: Values) -> None:
    """The whole file at once: whoever reads it, or stops this program, never has half of it."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def default_output(setting: Setting) -> Path:
    """Such as ``gpu_check-NVIDIA_H200-2026-11-22-1310.json``."""
    name = "rehearsal" if setting.rehearse else re.sub(r"[^\w.-]+", "_", torch.cuda.get_device_name(0))
    return Path(f"gpu_check-{name}-{time.strftime('%Y-%m-%d-%H%M')}.json")


def what_is_in_the_way(setting: Setting, output: Path | None, overwrite: bool) -> str | None:
    """One line, if this cannot begin; ``output`` is None for tuning."""
    if not setting.rehearse and not torch.cuda.is_available():
        return "no CUDA GPU is visible to torch; run this where one is, or --rehearse to try the script"
    if not setting.rehearse and (missing := what_triton_misses()):
        return missing
    if output is not None and not output.absolute().parent.is_dir():
        return f"{output}: there is no such folder; make it, or give another --output"
    if output is not None and output.exists() and not overwrite:
        return f"{output} is there already; give another --output, or --overwrite"
    return None


def what_triton_misses() -> str | None:
    """One line on what stands in the way of its compiling anything; it looks for these in the same places."""
    if find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return "triton needs a C compiler and finds neither gcc nor clang; install one (apt-get install gcc), or name it in CC"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    headers = sysconfig.get_paths(scheme)["include"]
    command = [compiler, "-fsyntax-only", "-x", "c", f"-I{headers}", "-"]
    try:
        done = subprocess.run(command, input="#include <Python.h>\n", capture_output=True, text=True, check=False)
    except OSError as problem:
        return f"triton needs a C compiler, and {compiler} does not run: {first_line(problem)}"
    if done.returncode:
        return f"triton needs Python.h, which {compiler} does not find in {headers}; install Python's headers (apt-get install python3-dev)"
    return None


def main(given: Sequence[str] | None = None) -> int:
    """The exit code."""
    options = arguments(given)
    setting = Setting(options.rehearse)
    if options.child:
        return child(options.child, setting)
    output = None
    if not options.tune and (setting.rehearse or torch.cuda.is_available()):
        output = options.output or default_output(setting)
    if problem := what_is_in_the_way(setting, output, options.overwrite):
        print(f"gpu_check: {problem}", file=sys.stderr)
        return 2
    if output is None:
        return tune(setting, options.minutes)
    return check_everything(setting, output, options.minutes, 1 if setting.rehearse else options.workers)


if __name__ == "__main__":
    sys.exit(main())
