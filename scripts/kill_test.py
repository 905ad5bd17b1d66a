"""Kill `ptq quantize` at random moments, again and again, and let the same command go on; the result must not differ by a byte.

    python scripts/kill_test.py [--kills 200] [--jobs 2] [--algo gptq] [--seed 0]

The real command quantizes a small random model of many blocks in a process of its own. Each gets SIGKILL, SIGTERM or SIGINT after a time
drawn between none and that of a whole run; the next one has the same arguments, until one comes to its end. Then

- every file of the output but the logs has the bytes that a run which nobody ended has written, and nothing lies beside it;
- behind each kill at most one block is done a second time, as the lines of the progress tell;
- the folder for temporary files is empty.

Prints a table of signals with what the next run found, and a count. Exit code 1 if anything was lost, or done again.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ptqcli.checkpoint.unfinished import JOURNAL, MARKER
from ptqcli.pipeline.report import LOGS

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from tiny import make_model, write_text

BLOCKS = 12
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
DONE, BEHIND = re.compile(r"^block (\d+)/", re.M), re.compile(r"^going on behind (\d+) of", re.M)


@dataclass
class Tally:
    """What was seen. found: (signal, what the next run found). wrong: what must not be."""

    kills: int = 0
    found: Counter[tuple[str, str]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def tree(folder: Path) -> dict[str, bytes]:
    """All files below ``folder``."""
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in LOGS
    }


def command(room: Path, output: Path, algo: str) -> list[str]:
    """The run that is killed."""
    flags = ["--algo", algo, "--group-size", "32", "--calib", room / "text.txt", "--nsamples", 16, "--seqlen", 64, "--batch-size", 4]
    return [str(Path(sys.executable).parent / "ptq"), "quantize", *map(str, (room / "model", "--output", output, *flags))]


def start(room: Path, output: Path, algo: str) -> subprocess.Popen[str]:
    """The command, with a folder for temporary files of its own beside the output."""
    temporary = output.parent / "tmp"
    temporary.mkdir(exist_ok=True)
    environment = {**os.environ, "TMPDIR": str(temporary), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command(room, output, algo), env=environment, **streams)  # type: ignore[call-overload]


def chain(room: Path, place: Path, algo: str, whole: dict[str, bytes], seconds: float, seed: int, kills: int) -> Tally:
    """Runs with one output until one comes to its end, of which the first ``kills`` may be killed."""
    chance, tally, output = random.Random(seed), Tally(), place / "out"
    place.mkdir()
    done, name = 0, ""
    while True:
        process = start(room, output, algo)
        sent = None
        if tally.kills < kills:
            try:
                process.wait(seconds * chance.betavariate(3, 2))  # seldom while Python imports
            except subprocess.TimeoutExpired:
                sent = chance.choice(SIGNALS)
                process.send_signal(sent)
                tally.kills += 1
        told = process.communicate()[0]
        behind = max(map(int, BEHIND.findall(told)), default=0)
        began = "quantizing" in told or behind or DONE.search(told)
        if name and began:
            tally.found[name, "what was finished" if behind else "nothing yet"] += 1
        if began and done - behind > 1:
            tally.wrong.append(f"seed {seed}: {done} blocks were done, and the next run went on behind {behind}")
        done = max([behind if began else done, *map(int, DONE.findall(told))])
        name = sent.name if sent else ""
        if sent is None or output.exists():  # it had its name, and the kill came behind
            break
    notes = (MARKER, JOURNAL)
    if not output.exists() or {name: content for name, content in tree(output).items() if name not in notes} != whole:
        tally.wrong.append(f"seed {seed}: the output is not the same: {told[-300:]}")
    left = [*(path.name for path in place.iterdir() if path.name not in ("out", "tmp")), *tree(place / "tmp")]
    if left:
        tally.wrong.append(f"seed {seed}: {', '.join(left[:5])} is left")
    return tally


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--algo", default="gptq")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        room = Path(folder)
        make_model(room / "model", "llama", num_hidden_layers=BLOCKS)
        write_text(room / "text.txt", 4000)
        (room / "whole").mkdir()
        began = time.perf_counter()
        process = start(room, room / "whole" / "out", options.algo)
        told = process.communicate()[0]
        if process.returncode:
            raise SystemExit(told)
        seconds, whole = time.perf_counter() - began, tree(room / "whole" / "out")
        total, number = Tally(), options.seed
        while total.kills < options.kills:
            left = options.kills - total.kills
            each = max(1, min(10, left // options.jobs))
            rounds = range(number, number + min(options.jobs, left))
            chains = [pool.submit(chain, room, room / str(seed), options.algo, whole, seconds, seed, each) for seed in rounds]
            for tally in (each.result() for each in chains):
                total.kills += tally.kills
                total.found += tally.found
                total.wrong += tally.wrong
            number = rounds.stop
            print(f"{total.kills} kills", flush=True)
    table = Table("signal", "the next run found", "times")
    for (name, what), count in sorted(total.found.items()):
        table.add_row(name, what, str(count))
    Console(soft_wrap=True).print(table)
    print(f"{total.kills} kills, {len(total.wrong)} wrong")
    print(*total.wrong, sep="\n")
    raise SystemExit(bool(total.wrong))


if __name__ == "__main__":
    main()
