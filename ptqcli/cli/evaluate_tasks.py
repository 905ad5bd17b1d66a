"""``ptq eval --tasks``: questions with right answers, asked of a checkpoint and of the model that it came from."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ptqcli.cli import completion
from ptqcli.cli.console import Output, path_text
from ptqcli.cli.options import NamedPath
from ptqcli.errors import PTQError, UsageError

if TYPE_CHECKING:
    from ptqcli.comparing.run import Ask, Step
    from ptqcli.evaluation.answers import TaskResult
    from ptqcli.evaluation.tasks import Task

USUAL_NEW_TOKENS = 32  # of ptqcli.evaluation.task_files, whose import takes torch along; a test compares the two

OPTIONS = (
    click.option(
        "--tasks",
        "--task",
        "names",
        multiple=True,
        metavar="FILE.jsonl|NAME|FOLDER",
        shell_complete=completion.task,
        help="Questions to ask: of JSON lines, of lm-evaluation-harness by name (with the extra eval), of your own task files for it; of "
        'an encoder with a head for labels, rows {"text": ..., "label": ...}. May be given several times, and needs no --ppl.',
    ),
    click.option("--chat", is_flag=True, help="Ask through the model's chat template."),
    click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Ask only the first N questions of each task."),
    click.option(
        "--max-new-tokens",
        "most_tokens",
        type=click.IntRange(1, 4096),
        default=USUAL_NEW_TOKENS,
        show_default=True,
        metavar="N",
        help="Of an answer that is written, unless its row in the JSON lines says.",
    ),
    click.option("--answers", type=NamedPath(), metavar="FILE.jsonl", help="Write every answer there, of both models."),
    click.option("--trust-task-code", "trust_code", is_flag=True, help="Let task folders run the Python that they bring along."),
)


@dataclass(frozen=True, kw_only=True)
class TaskFlags:
    """What was asked for; see OPTIONS."""

    names: tuple[str, ...]
    chat: bool
    limit: int | None
    most_tokens: int
    answers: Path | None
    trust_code: bool

    @property
    def for_writers(self) -> str:
        """The flags among them that are for models that write."""
        given = {"--chat": self.chat, "--limit": self.limit, "--answers": self.answers, "--trust-task-code": self.trust_code}
        return ", ".join(flag for flag, value in given.items() if value)

    def read(self) -> list[Task]:
        """The tasks. Raises what ``read_tasks`` does, UsageError for flags without tasks, PTQError for answers that have no place."""
        from ptqcli.evaluation.tasks import TaskOptions, read_tasks

        if not self.names and self.for_writers:
            raise UsageError(f"{self.for_writers}: is for the questions of --tasks; give them, too")
        if self.answers is not None and not self.answers.absolute().parent.is_dir():
            raise PTQError(f"--answers {self.answers}: there is no folder {self.answers.parent}; make it first")
        return read_tasks(
            self.names, TaskOptions(chat=self.chat, limit=self.limit, most_tokens=self.most_tokens, trust_code=self.trust_code)
        )


def task_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The flags of tasks, which ``command`` gets together as ``asked``."""

    @functools.wraps(command)
    def collected(**given: Any) -> Any:
        asked = TaskFlags(**{name: given.pop(name) for name in TaskFlags.__dataclass_fields__})
        return command(**given, asked=asked)

    for option in reversed(OPTIONS):
        collected = option(collected)
    return collected


def asker(tasks: Sequence[Task]) -> Ask | None:
    """What puts ``tasks`` to a model, None for none."""

    def ask(model: Any, tokenizer: Any, step: Step) -> dict[str, TaskResult]:
        asked = (task.ask(model, tokenizer, lambda done, total, name=task.name: step(done, total, name)) for task in tasks)  # type: ignore[misc]
        return {result.task: result for results in asked for result in results}

    return ask if tasks else None


def write_answers(checkpoints: Sequence[Mapping[str, Any]], file: Path, output: Output) -> None:
    """Every answer to every question as JSON lines. checkpoints: as ``comparing.results`` has them."""
    names = [{"checkpoint": each["name"]} if len(checkpoints) > 1 else {} for each in checkpoints]
    pairs = ((named, task) for named, each in zip(names, checkpoints, strict=True) for task in each["tasks"])
    _write(({**named, "task": task["task"], **row} for named, task in pairs for row in task["answers"]), file)
    output.say(f"answers     {path_text(file)}")


def _write(rows: Iterable[Mapping[str, Any]], file: Path) -> None:
    try:
        with file.open("w", encoding="utf-8") as lines:
            lines.writelines(f"{json.dumps(row)}\n" for row in rows)
    except OSError as error:
        raise PTQError(f"--answers {file}: cannot be written: {error.strerror}") from error


def show_tasks(tasks: Sequence[Mapping[str, Any]], output: Output) -> None:
    """The scores of one checkpoint, and what flipped. tasks: as ``evaluation.answers.answered`` has them."""
    beside = any("baseline_scores" in task for task in tasks)
    columns = ("task", "questions", "score", *(("original",) if beside else ()), "checkpoint")
    output.table("Answers, with standard errors", columns, (row for task in tasks for row in _score_rows(task)))
    flipped = [(task["task"], task["flips"]) for task in tasks if "flips" in task]
    if flipped:
        output.table(
            "Beside the original, on the same questions",
            ("task", "right to wrong", "wrong to right", "other answers", "difference", "p (McNemar)"),
            (_flip_row(name, flips) for name, flips in flipped),
        )


def _score_rows(task: Mapping[str, Any]) -> Iterable[list[str]]:
    baseline = task.get("baseline_scores")
    for name, score in task["scores"].items():
        count = f"{task['questions']:,}" if task["questions"] else ""
        before = [] if baseline is None else [_score_text(baseline[name])] if name in baseline else [""]
        yield [task["task"], count, name, *before, _score_text(score)]


def _score_text(score: Mapping[str, Any]) -> str:
    error = score["standard_error"]
    return f"{score['value']:.4f}" + (f" ± {error:.4f}" if error is not None else "")


def _flip_row(name: str, flips: Mapping[str, Any]) -> list[str]:
    error = f" ± {flips['standard_error']:.4f}" if flips["standard_error"] is not None else ""
    counts = [str(flips[key]) for key in ("lost", "won", "changed")]
    return [name, *counts, f"{flips['difference']:+.4f}{error}", f"{flips['p_value']:.3g}"]
