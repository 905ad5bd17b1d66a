"""What tells a folder in which `ptq quantize` was at work from a checkpoint, to whoever is given it in the place of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ptqcli.errors import PTQError
from ptqcli.untrusted import read_json

MARKER = ".ptq-quantize.json"  # by which it is known, see ``pipeline.output``
JOURNAL = ".ptq-progress.json"  # how far the run has come, see ``pipeline.journal``


def unfinished_run(folder: Path) -> str | None:
    """In words what an unfinished run in ``folder`` has finished and how it goes on; None for any other folder.

    What stands in its files is told and nothing more, so it need not be true.
    """
    marker = _read(folder / MARKER)
    if marker is None:
        return None
    journal = _read(folder / JOURNAL)
    blocks, count = (journal or {}).get("blocks"), (journal or {}).get("count")
    counted = type(blocks) is int and type(count) is int and 0 <= blocks <= count < 1_000_000
    done = (
        "with nothing finished yet" if journal is None else f"with {blocks} of {count} blocks finished" if counted else "which is damaged"
    )
    output = marker.get("output")
    named = f" (--output {folder.with_name(output)})" if isinstance(output, str) and Path(output).name == output else ""
    return f"holds an unfinished run, {done}, and no checkpoint yet; the same `ptq quantize` command as before{named} goes on with it"


def _read(path: Path) -> dict[str, Any] | None:
    """None where nothing can be read: the folder is then no less unfinished, and nothing of it is believed."""
    try:
        return read_json(path) if path.is_file() else None
    except PTQError:
        return {}
