"""Everything that a GPU has to show about the kernels, in one run of under ten minutes. What whoever has a GPU runs first:

    python scripts/gpu_check.py [--output FILE [--overwrite]] [--minutes 9] [--workers N]
    python scripts/gpu_check.py --tune > tuned.json      # tables for this GPU, to go into kernels/ptq_kernels/tuned/
    python scripts/gpu_check.py --rehearse               # the script itself, on the CPU: says nothing about any GPU

It needs torch, triton, a C compiler and Python's headers, no installation of this package. FILE is written after each part. What is run
is in ``gpu_correctness.py`` and ``gpu_timing.py``, in these parts, one after another:

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
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch
from gpu_correctness import correctness_cases, repeatability_cases, size_cases
from gpu_layers import GpuRun, Values
from gpu_pool import Cases, Pool, child
from gpu_report import describe_machine, is_ours, report_points, show, targets
from gpu_timing import preparation_cases, timing_cases
from gpu_tune import tuned_tables, tuning_cases

from ptqcli.bench.peers import first_line  # gpu_layers has seen to it that this is found

PARTS: dict[str, Cases] = {
    "correctness": correctness_cases,
    "repeatability": repeatability_cases,
    "size": size_cases,
    "preparation": preparation_cases,
    "timing": timing_cases,
    "tuning": tuning_cases,
}
SHARES = {"correctness": 0.36, "repeatability": 0.06, "size": 0.12, "preparation": 0.42, "timing": 1.0}  # of the time that is left
ALONE = ("size", "timing")  # parts that need the GPU for themselves


def run_part(part: str, run: GpuRun, seconds: float, workers: int, ready: Sequence[str] = (), case_seconds: float = 90.0) -> Values:
    """One part within its time."""
    began = time.time()
    command = [sys.executable, __file__, "--child", part, *(["--rehearse"] if run.rehearse else [])]
    pool = Pool(command, list(ready), case_seconds=case_seconds)
    names = [name for name, _ in PARTS[part](run)]
    print(f"{part}: {len(names)} cases, at most {seconds:.0f} s", file=sys.stderr, flush=True)
    pool.run(names, began + seconds, workers)
    order = {name: place for place, name in enumerate(names)}
    cases = sorted(pool.results, key=lambda line: order[line["name"]])
    return {"name": part, "cases": cases, "left_out": len(names) - len(cases), "seconds": time.time() - began}


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


def tune(run: GpuRun, minutes: float) -> int:
    """Tables for this GPU, printed as JSON."""
    found = run_part("tuning", run, 60 * minutes, 1, case_seconds=900.0)
    for line in found["cases"]:
        if not line["ok"]:
            print(f"FAILED {line['name']}: {line['why']}", file=sys.stderr)
    name = "rehearsal" if run.rehearse else torch.cuda.get_device_properties(0).name
    print(json.dumps({kernel: {name: entries} for kernel, entries in tuned_tables(found["cases"]).items()}, indent=1))
    print(f"{found['left_out']} cases left out", file=sys.stderr)
    return int(any(not line["ok"] for line in found["cases"]))


def check_everything(run: GpuRun, output: Path, minutes: float, workers: int) -> int:
    """All parts, the report, the file."""
    until = time.time() + 60 * minutes
    report: Values = {"rehearsal": run.rehearse, "about": describe_machine(run), "parts": []}
    for part, share in SHARES.items():
        ready = [line["name"] for earlier in report["parts"] for line in earlier["cases"] if line.get("ready")]
        report["parts"].append(run_part(part, run, share * max(until - time.time(), 0), 1 if part in ALONE else workers, ready))
        parts = {} if run.rehearse else {part["name"]: part for part in report["parts"]}
        report["targets"] = [asdict(target) for target in targets(report_points(report) if parts else {}, parts)]
        write(output, report)
    print(", ".join(f"{name} {value}" for name, value in report["about"].items() if isinstance(value, str)))
    show(report, run)
    print(f"everything is in {output}")
    failed = any(not line["ok"] and is_ours(part["name"], line) for part in report["parts"] for line in part["cases"])
    return int(failed or any(target["verdict"] == "FAIL" for target in report["targets"]))


def write(path: Path, report: Values) -> None:
    """The whole file at once: whoever reads it, or stops this program, never has half of it."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def default_output(run: GpuRun) -> Path:
    """Such as ``gpu_check-NVIDIA_H200-2026-11-22-1310.json``."""
    name = "rehearsal" if run.rehearse else re.sub(r"[^\w.-]+", "_", torch.cuda.get_device_name(0))
    return Path(f"gpu_check-{name}-{time.strftime('%Y-%m-%d-%H%M')}.json")


def what_is_in_the_way(run: GpuRun, output: Path | None, overwrite: bool) -> str | None:
    """One line, if this cannot begin; ``output`` is None for tuning."""
    if not run.rehearse and not torch.cuda.is_available():
        return "no CUDA GPU is visible to torch; run this where one is, or --rehearse to try the script"
    if not run.rehearse and (missing := what_triton_misses()):
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
    run = GpuRun(options.rehearse)
    if options.child:
        return child(PARTS[options.child], run)
    output = None
    if not options.tune and (run.rehearse or torch.cuda.is_available()):
        output = options.output or default_output(run)
    if problem := what_is_in_the_way(run, output, options.overwrite):
        print(f"gpu_check: {problem}", file=sys.stderr)
        return 2
    if output is None:
        return tune(run, options.minutes)
    return check_everything(run, output, options.minutes, 1 if run.rehearse else options.workers)


if __name__ == "__main__":
    sys.exit(main())
