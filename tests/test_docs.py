"""README and docs: short, linked, and true as far as a program can tell."""

from __future__ import annotations

import re
import shlex
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import pytest
import torch

from ptqcli.calibration.statistics import InputStatistics
from ptqcli.cli import app
from ptqcli.numerics.scheme import Scheme
from ptqcli.solvers import LinearTask, Stage, ignore_progress
from ptqcli.solvers.per_matrix import PerMatrix, StageWork
from ptqcli.solvers.rtn import RTN

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# A summary of commands, not one that can be typed: [OPTIONAL], a | b, text behind the command, names of things in capitals.
INCOMPLETE = re.compile(r"\[[A-Z]|\s\|\s|\.\.\.|\S {3,}\w|\bCOMMAND\b")


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language, "" for those without."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Every line of a block, and every piece of code in a sentence, that is a whole command."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = [line for block in blocks(page, "") for line in block.splitlines()]
        found += [line for line in lines + re.findall(r"`(ptq [^`]+)`", text) if re.match(r"(\w+=\S+ )?ptq ", line)]
    return [line for line in found if not INCOMPLETE.search(line.split("#")[0])]


def test_the_readme_is_short_and_finished() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert not re.search("@@|TODO", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target
    for script in re.findall(r"\b(?:scripts|tests|configs|kernels)/[\w/]+\.\w+", text):
        assert (ROOT / script).exists(), script


def test_every_room_is_on_the_map() -> None:
    text = (ROOT / "docs" / "how-it-is-built.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^  ([a-z_]+)(?:/|\.py) ", text, flags=re.MULTILINE))
    assert {path.stem for path in (ROOT / "ptqcli").iterdir() if not path.name.startswith("_") and path.suffix in ("", ".py")} <= listed


def test_there_are_commands() -> None:
    assert len(commands()) > 15


@pytest.mark.parametrize("line", commands())
def test_every_command_is_understood(line: str) -> None:
    """Parsed by the command line itself, every flag and every choice, and not run."""
    words = shlex.split(line, comments=True)
    name, *arguments = words[words.index("ptq") + 1 :]
    command = app.get_command(click.Context(app), name)
    assert command is not None, name
    with suppress(click.MissingParameter):  # a sentence may name a command alone
        command.make_context(name, arguments)


def test_the_solver_of_the_docs_works() -> None:
    """It is told to lower the error of rounding; the error is measured here."""
    [source, *_] = blocks(ROOT / "docs" / "adding-an-algorithm.md", "python")
    names: dict[str, object] = {"__name__": "ptq_descent"}
    exec(compile(source, "adding-an-algorithm.md", "exec", dont_inherit=True), names)
    torch.manual_seed(0)
    weight, inputs = torch.randn(16, 64), torch.randn(300, 64) @ torch.randn(64, 64)
    task = LinearTask(name="weight", weight=weight, scheme=Scheme.parse("w3a16-g32"), scale_dtype=torch.bfloat16)

    def loss(solver: Any) -> float:
        statistics = InputStatistics.empty(64, PerMatrix(solver).needs, 300, torch.device("cpu"))
        statistics.add(inputs)
        solved = StageWork(solver, Stage((task,), statistics)).solve(task, ignore_progress).weight
        return float(((solved.dequantize(torch.float32) - weight) @ inputs.T).square().sum())

    assert loss(names["Descent"]()) < 0.7 * loss(RTN())  # type: ignore[operator]
