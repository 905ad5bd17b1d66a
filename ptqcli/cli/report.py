"""``ptq_report.json``, which `ptq quantize` leaves in a checkpoint: where it came from and how each linear fared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ptqcli.cli.locate import REPORT_NAME
from ptqcli.errors import PTQError


def read_report(folder: Path) -> dict[str, Any] | None:
    """The report in ``folder``, or None for a folder that `ptq quantize` did not write. Raises PTQError for a damaged one."""
    path = folder / REPORT_NAME
    if not path.is_file():
        return None
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PTQError(f"{path}: not valid JSON; delete it, or quantize again") from error
    if not isinstance(report, dict):
        raise PTQError(f"{path}: not a report of ptq quantize; delete it, or quantize again")
    return report


def original_of(folder: Path) -> Path | None:
    """The model folder that a checkpoint was made from, as its report says; it may be gone by now."""
    source = (read_report(folder) or {}).get("source")
    return Path(source) if isinstance(source, str) else None
