"""``ptq eval --tasks``: questions with right answers, asked of a checkpoint and of the model that it came from."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ptqcli.cli import completion
from ptqcli.cli.console import Output, path_text
from ptqcli.cli.options import NamedPath
from ptqcli.cli.progress import Tracker, track
from ptqcli.errors import PTQError, UsageError

if TYPE_CHECKING:
    from ptqcli.evaluation.answers import Flips, TaskResult
    from ptqcli.evaluation.tasks import Task

SECONDS_BETWEEN_LINES = 15.0
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


def ask_tasks(tasks: Iterable[Task], flags: TaskFlags, model: Any, baseline: Any, tokenizer: Any, output: Output) -> list[dict[str, Any]]:
    """Ask, show a table, write the answers, and give them back as values for JSON. baseline: None for none."""
    with track("request", output.quiet, pause=SECONDS_BETWEEN_LINES) as tracker:
        asked = [pair for task in tasks for pair in _ask(task, model, baseline, tokenizer, tracker)]
    if flags.answers is not None:
        _write(asked, flags.answers)
    _show(asked, output)
    if flags.answers is not None:
        output.say(f"answers     {path_text(flags.answers)}")
    return [_as_json(*pair) for pair in asked]


def _ask(task: Task, model: Any, baseline: Any, tokenizer: Any, tracker: Tracker) -> Iterable[tuple[TaskResult, TaskResult | None]]:
    def step(done: int, total: int) -> None:
        tracker.step(done, total, task.name)

    tracker.say(f"asking {task.name}")
    results = task.ask(model, tokenizer, step)
    if baseline is None:
        return [(result, None) for result in results]
    tracker.say(f"asking the original {task.name}")
    return zip(results, task.ask(baseline, tokenizer, step), strict=True)


def _flips(result: TaskResult, original: TaskResult | None) -> Flips | None:
    from ptqcli.evaluation.answers import flips

    return None if original is None else flips(result, original)


def _as_json(result: TaskResult, original: TaskResult | None) -> dict[str, Any]:
    found: dict[str, Any] = {"task": result.task, "kind": result.kind, "questions": len(result.right)}
    found["scores"] = {name: asdict(score) for name, score in result.scores.items()}
    if original is not None:
        found["baseline_scores"] = {name: asdict(score) for name, score in original.scores.items()}
    if (flips := _flips(result, original)) is not None:
        found["flips"] = asdict(flips)
    found["answers"] = list(_answers(result, original))
    return found


def _answers(result: TaskResult, original: TaskResult | None) -> Iterable[dict[str, Any]]:
    for number, (answer, expected, right) in enumerate(zip(result.answers, result.expected, result.right, strict=True)):
        row: dict[str, Any] = {"question": number, "expected": expected, "answer": answer, "right": right}
        if original is not None:
            row |= {"baseline_answer": original.answers[number], "baseline_right": original.right[number]}
        yield row


def _write(asked: Sequence[tuple[TaskResult, TaskResult | None]], file: Path) -> None:
    rows = ({"task": result.task, **row} for result, original in asked for row in _answers(result, original))
    try:
        with file.open("w", encoding="utf-8") as lines:
            lines.writelines(f"{json.dumps(row)}\n" for row in rows)
    except OSError as error:
        raise PTQError(f"--answers {file}: cannot be written: {error.strerror}") from error


def _show(asked: Sequence[tuple[TaskResult, TaskResult | None]], output: Output) -> None:
    beside = any(original is not None for _, original in asked)
    columns = ("task", "questions", "score", *(("original",) if beside else ()), "checkpoint")
    output.table("Answers, with standard errors", columns, (row for pair in asked for row in _score_rows(*pair)))
    flipped = [(result.task, flips) for result, original in asked if (flips := _flips(result, original)) is not None]
    if flipped:
        output.table(
            "Beside the original, on the same questions",
            ("task", "right to wrong", "wrong to right", "other answers", "difference", "p (McNemar)"),
            (_flip_row(name, flips) for name, flips in flipped),
        )


def _score_rows(result: TaskResult, original: TaskResult | None) -> Iterable[list[str]]:
    for name, score in result.scores.items():
        count = f"{len(result.right):,}" if result.right else ""
        before = [] if original is None else [_score_text(asdict(original.scores[name]))] if name in original.scores else [""]
        yield [result.task, count, name, *before, _score_text(asdict(score))]


def _score_text(score: Mapping[str, Any]) -> str:
    error = score["standard_error"]
    return f"{score['value']:.4f}" + (f" ± {error:.4f}" if error is not None else "")


def _flip_row(name: str, flips: Flips) -> list[str]:
    error = f" ± {flips.standard_error:.4f}" if flips.standard_error is not None else ""
    return [name, str(flips.lost), str(flips.won), str(flips.changed), f"{flips.difference:+.4f}{error}", f"{flips.p_value:.3g}"]
