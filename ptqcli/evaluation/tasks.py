"""Tasks by their names: what is asked of a model, one task at a time.

    FILE.jsonl             questions of a file (``task_files.py``), which need no other package
    FILE.yaml, FOLDER      tasks of a user for lm-evaluation-harness (``harness.py``)
    any other word         a task, or group of tasks, that lm-evaluation-harness knows

All of them are read before a model is asked anything, so that what is wrong with them shows at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from ptqcli.calibration.chat import written_out
from ptqcli.calibration.files import is_text_file
from ptqcli.errors import PTQError, UsageError
from ptqcli.evaluation.answers import TaskResult
from ptqcli.evaluation.choices import ChoiceQuestion, answer_choices
from ptqcli.evaluation.exact_match import OpenQuestion, answer_openly
from ptqcli.evaluation.harness import read_harness
from ptqcli.evaluation.task_files import USUAL_NEW_TOKENS, Questions, read_questions
from ptqcli.untrusted import foreign

# Called with the number of requests done and of all.
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """How tasks are asked.

    chat: through the chat template of the tokenizer. limit: only the first so many questions of each task. most_tokens: of an answer to a
    question of a file that does not say. trust_code: task folders may run Python of their own.
    """

    chat: bool = False
    limit: int | None = None
    most_tokens: int = USUAL_NEW_TOKENS
    trust_code: bool = False


class Task(Protocol):
    """What can be asked."""

    @property
    def name(self) -> str:
        """What the user calls it."""

    def ask(self, model: Any, tokenizer: Any, on_progress: Progress | None = None) -> list[TaskResult]:
        """What ``model`` answers: of a group, a result for each of its tasks. Raises PTQError and UsageError."""


def read_tasks(names: Sequence[str], options: TaskOptions) -> list[Task]:
    """The tasks of these names. Raises UsageError for one that is unknown or needs what is not there, PTQError for a file that is wrong."""
    return [_read(name, options) for name in names]


def _read(name: str, options: TaskOptions) -> Task:
    if re.search(r"\.jsonl?(\.\w+)?$", name):
        return FileTask(name, read_questions(Path(name), options.limit, options.most_tokens), options.chat)
    if is_text_file(name):
        raise UsageError(f"--tasks {name}: is of a kind that holds no questions; give JSON lines, a task in YAML, or the name of one")
    return read_harness(name, options.chat, options.limit, options.trust_code)


@dataclass(frozen=True)
class FileTask:
    """The questions of a file. chat: they are asked through the chat template."""

    name: str
    questions: Questions
    chat: bool

    def ask(self, model: Any, tokenizer: Any, on_progress: Progress | None = None) -> list[TaskResult]:
        """One result."""
        choices: list[ChoiceQuestion] = []
        others: list[OpenQuestion] = []
        for question in self.questions:
            if isinstance(question, ChoiceQuestion):
                context = _in_chat(question.context, tokenizer, question.where) if self.chat else None
                choices.append(question if context is None else replace(question, context=context, continuations=question.choices))
            else:
                prompt = _in_chat(question.prompt, tokenizer, question.where) if self.chat else question.prompt
                others.append(replace(question, prompt=prompt))
        if choices:
            return [answer_choices(self.name, choices, model, tokenizer, not self.chat, on_progress)]
        return [answer_openly(self.name, others, model, tokenizer, not self.chat, on_progress)]


def _in_chat(text: str, tokenizer: Any, where: str) -> str:
    """What the model reads of a conversation that ``text`` opens."""
    if not tokenizer.chat_template:
        raise UsageError(f"{where}: the tokenizer has no chat template; leave --chat out")
    with foreign(f"{where}: the tokenizer's chat template refuses the question"):
        found = written_out(tokenizer, [{"role": "user", "content": text}], add_generation_prompt=True)
    if not found:
        raise PTQError(f"{where}: the tokenizer's chat template makes an empty text of the question")
    return found
