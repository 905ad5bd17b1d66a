"""Mutated inputs for every reader: `python tests/fuzz/run.py 20000` (make fuzz); prints a table, exit code 1 if anything is unexpected.

Allowed are the right result, or a PTQError of one line that names the file or field, within 10 seconds and 512 MiB of further memory.
A child process reads; it says before each input which one comes, so that a crash or a hang can be told and tried again:
`python tests/fuzz/run.py READER NUMBER`.
"""

from __future__ import annotations

import json
import os
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

SECONDS = 10.0  # of the processor, so that a busy machine makes nothing unexpected
SILENT_SECONDS = 60.0  # after which a child hangs, whatever it does
EXTRA_BYTES = 512 << 20
START_SECONDS = 120.0  # for imports and the originals


@dataclass
class Tally:
    """Of one reader. unexpected, hangs: what happened, by input."""

    counts: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    unexpected: dict[int, str] = field(default_factory=dict)

    def add(self, number: int, outcome: str, seconds: float, extra: int, text: str) -> None:
        if seconds > SECONDS:
            outcome, text = "hang", f"{seconds:.0f} s; {text}"
        self.counts[outcome] += 1
        self.slowest = max(self.slowest, seconds)
        if extra > EXTRA_BYTES:
            self.counts["memory"] += 1
            text = f"{extra >> 20} MiB more memory; {text}"
        if outcome not in ("right", "refused") or extra > EXTRA_BYTES:
            self.unexpected[number] = text


def fuzz(count: int) -> dict[str, Tally]:
    """What ``count`` inputs over all readers lead to."""
    tallies: dict[str, Tally] = defaultdict(Tally)
    todo = list(_inputs(count))
    while todo:
        done = _one_child(todo, tallies)
        todo = todo[done:]
    return dict(tallies)


def _inputs(count: int) -> Iterator[tuple[str, int]]:
    from readers import READERS

    whole = sum(reader.share for reader in READERS)
    for reader in READERS:
        yield from ((reader.name, number) for number in range(max(count * reader.share // whole, 1)))


def _one_child(todo: list[tuple[str, int]], tallies: dict[str, Tally]) -> int:
    """Let a child work on ``todo`` until it is done, dies or hangs; how many inputs are behind it then."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as errors, _child(folder, errors) as child:
        assert child.stdin
        assert child.stdout
        with selectors.DefaultSelector() as ready:
            ready.register(child.stdout, selectors.EVENT_READ)
            try:
                for done, (name, number) in enumerate(todo):
                    child.stdin.write(json.dumps([name, number]) + "\n")
                    line = child.stdout.readline() if ready.select(START_SECONDS if not done else SILENT_SECONDS) else None
                    if not line:
                        how = "hang" if line is None else "died"
                        tallies[name].add(number, how, 0.0, 0, how)
                        return done + 1
                    tallies[name].add(number, *json.loads(line))
                return len(todo)
            finally:
                child.kill()


def _child(folder: str, errors: IO[bytes]) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--child", folder]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, bufsize=1)


def work(folder: Path) -> None:
    """The child: for each line of standard input, an answer."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        answers.write(json.dumps(outcome(folder, *json.loads(line))) + "\n")


def outcome(folder: Path, name: str, number: int) -> tuple[str, float, int, str]:
    """right, refused or unexpected; seconds; bytes of further memory; what was said."""
    from mutate import Source
    from readers import READERS

    from ptqcli.errors import PTQError

    reader = next(reader for reader in READERS if reader.name == name)
    place = folder / "input"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    before, start = _reset_peak(), time.process_time()
    try:
        reader.call(place, Source(name, number))
        result, text = "right", ""
    except PTQError as error:
        text = str(error)
        named = any(part in text for part in reader.names)
        result = "refused" if number and named and "\n" not in text and text.isprintable() and len(text) < 3_000 else "unexpected"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        result, text = "unexpected", traceback.format_exc()
    return result, time.process_time() - start, _peak() - before, text


def _reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10


def table(tallies: dict[str, Tally]) -> str:
    kinds = ("right", "refused", "unexpected", "died", "hang", "memory")
    lines = [f"{'reader':24}{'inputs':>8}" + "".join(f"{kind:>12}" for kind in kinds) + f"{'slowest':>10}"]
    for name, tally in tallies.items():
        inputs = sum(tally.counts[kind] for kind in kinds[:-1])
        lines.append(f"{name:24}{inputs:8}" + "".join(f"{tally.counts[kind]:12}" for kind in kinds) + f"{tally.slowest:9.2f}s")
    return "\n".join(lines)


def main() -> int:
    tallies = fuzz(int(sys.argv[1]))
    print(table(tallies))
    for name, tally in tallies.items():
        for number, text in tally.unexpected.items():
            print(f"\n{name} {number}: {text}")
    return int(any(tally.unexpected for tally in tallies.values()))


if __name__ == "__main__":
    here = Path(__file__).parent
    sys.path[:0] = [str(here), str(here.parent)]
    import conftest  # noqa: F401 - no network, one thread

    if sys.argv[1] == "--child":
        work(Path(sys.argv[2]))
    elif len(sys.argv) == 3:
        with tempfile.TemporaryDirectory() as scratch:
            print(*outcome(Path(scratch), sys.argv[1], int(sys.argv[2])), sep="\n")
    else:
        sys.exit(main())
