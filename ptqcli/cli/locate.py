"""Which folder a CHECKPOINT argument means."""

from __future__ import annotations

from pathlib import Path

from ptqcli.errors import UsageError
from ptqcli.model.locate import find_model
from ptqcli.pipeline.report import PARTIAL, REPORT_NAME


def find_checkpoint(name: str | None) -> Path:
    """The folder of CHECKPOINT; None means the newest one that ``ptq quantize`` wrote below the working directory."""
    return find_model(str(newest_checkpoint(Path.cwd())) if name is None else name)


def newest_checkpoint(folder: Path) -> Path:
    """The direct subfolder of ``folder`` whose report is the newest and that is finished. Raises UsageError when there is none."""
    finished = (report for report in folder.glob(f"*/{REPORT_NAME}") if not report.parent.name.endswith(PARTIAL))
    reports = sorted(finished, key=lambda report: (report.stat().st_mtime_ns, report))
    if not reports:
        raise UsageError("no checkpoint in this folder yet; name one, or write one with `ptq quantize`")
    return reports[-1].parent
