"""``ptq doctor``: what this machine can run, and what to install.

The versions that are needed are not written here; they are read from the package's own metadata, so they cannot go stale.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import click
from packaging.requirements import Requirement

from ptqcli.cli import examples
from ptqcli.cli.console import Output, size_text
from ptqcli.cli.options import data_dir_option, json_option

Status = Literal["ok", "missing", "optional", "info"]

# Packages outside the core, with what they are for; the formats tell of theirs. Version ranges come from the extras that name them.
OPTIONAL = {
    "triton": "runs the kernels on a GPU; a CUDA build of torch brings it along",
    "matplotlib": "draws what `ptq bench --plot` is asked for",
}
STATUS_WORDS: dict[Status, str] = {"ok": "ok", "missing": "MISSING", "optional": "not there", "info": ""}


@dataclass(frozen=True)
class Check:
    """One line of the answer. status: ``missing`` must be mended, ``optional`` is missing but not needed. advice: what to do."""

    name: str
    status: Status
    found: str
    advice: str = ""


@click.command(epilog=examples("ptq doctor", "ptq doctor --data-dir ~/data/wikitext-2-raw --json"))
@data_dir_option
@json_option
@click.pass_context
def command(ctx: click.Context, data_dir: Path | None, as_json: bool) -> None:
    """Tell what this machine can run, and what to install.

    Exit code 1 if something that every command needs is missing.
    """
    checks = [_python(), *_packages(), _processor(), _memory(), _disk(), *_gpus(), _wikitext(data_dir)]
    output = Output(as_json=as_json)
    output.facts((check.name, STATUS_WORDS[check.status], check.found, check.advice) for check in checks)
    output.result({"checks": [asdict(check) for check in checks]})
    ctx.exit(int(any(check.status == "missing" for check in checks)))


def _python() -> Check:
    return Check("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _packages() -> Iterator[Check]:
    purposes = {**_format_packages(), **OPTIONAL}
    shown = set()
    for line in importlib.metadata.requires("ptqcli") or ():
        requirement = Requirement(line)
        needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if requirement.name not in shown and (needed or requirement.name in purposes):  # several extras may name it
            shown.add(requirement.name)
            yield _package(requirement, needed, purposes.get(requirement.name, ""))


def _format_packages() -> dict[str, str]:
    """What the readers of the built-in formats need: the extras of other packages are not ours to advise on."""
    from ptqcli.formats import FORMATS, find_format

    return {package: purpose for name in FORMATS for package, purpose in find_format(name).packages.items()}


def lacking(needs: Iterable[str]) -> list[str]:
    """Those of ``needs``, pip requirements, that are not installed, or in another version."""
    return [need for need in needs if _package(Requirement(need), True, "").status != "ok"]


def _package(requirement: Requirement, needed: bool, purpose: str) -> Check:
    wanted = f"{requirement.name}{requirement.specifier}"
    advice = f"pip install '{wanted}'" + (f"  ({purpose})" if purpose else "")
    lacking: Status = "missing" if needed else "optional"
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return Check(requirement.name, lacking, "not installed", advice)
    if not requirement.specifier.contains(version, prereleases=True):
        return Check(requirement.name, lacking, f"{version} is out of range", advice)
    return Check(requirement.name, "ok", version)


def _processor() -> Check:
    import torch

    kind = torch.backends.cpu.get_cpu_capability()
    return Check("processor", "info", f"{os.cpu_count()} cores, {kind}, {torch.get_num_threads()} threads used by torch")


def _memory() -> Check:
    import psutil

    memory = psutil.virtual_memory()
    return Check("memory", "info", f"{size_text(memory.available)} free of {size_text(memory.total)}")


def _disk() -> Check:
    disk = shutil.disk_usage(Path.cwd())
    return Check("disk here", "info", f"{size_text(disk.free)} free of {size_text(disk.total)}")


def _gpus() -> Iterator[Check]:
    import torch

    if not torch.cuda.is_available():
        reason = "no device found" if torch.version.cuda else "this torch was built without CUDA"
        yield Check("cuda", "optional", reason, "everything runs on the CPU; a GPU makes large models quicker")
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        found = f"{device.name}, {size_text(device.total_memory)}, compute capability {device.major}.{device.minor}"
        yield Check(f"cuda:{index}", "ok", found)


def _wikitext(data_dir: Path | None) -> Check:
    from ptqcli.calibration.corpora import CORPORA

    advice = "--ppl builtin needs no download; for wikitext2 name its folder with --data-dir or PTQ_DATA_DIR"
    if data_dir is None:
        return Check("wikitext2", "optional", "no data folder named", advice)
    patterns = CORPORA["wikitext2"]["evaluation"].local
    found = [path for pattern in patterns for path in sorted(data_dir.glob(pattern))]
    if not found:
        return Check("wikitext2", "optional", f"not in {data_dir}", advice)
    return Check("wikitext2", "ok", str(found[0]))
