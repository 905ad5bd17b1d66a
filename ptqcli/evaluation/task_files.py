"""Tasks in JSON lines files, a question a line (or a row of the array that the file is).

Multiple choice, told by its "choices":

    {"question": "What do bees make?", "choices": ["milk", "honey"], "answer": 1}

    "question"             what is asked; the model reads "Question: ...\\nAnswer:"
    "context", "prompt"    instead of it: what the model reads, as it stands
    "choices"              texts; or, as in ARC, {"text": [...], "label": [...]}
    "answer"               the number of the right choice, counted from 0; or its text; or its letter, or its label. Also "label" and
                           "answerKey"

A blank stands between the context and a choice, unless the context is empty or one of them brings white space of its own.

Exact match, where there are no choices:

    {"prompt": "The capital of France is", "answer": "Paris"}

    "prompt", "context", "question"    as above
    "answer"                           a text, or a list of texts, each of which will do. Also "answers"
    "max_new_tokens"                   of the answer, if not as many as in all others

All rows of a file are of one kind. Other keys are left alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ptqcli.calibration.files import json_rows
from ptqcli.errors import PTQError, UsageError
from ptqcli.evaluation.choices import ChoiceQuestion
from ptqcli.evaluation.exact_match import OpenQuestion
from ptqcli.untrusted import encodes, foreign, shown

MOST_QUESTIONS = 100_000
MOST_CHOICES = 1_000
MOST_CHARACTERS = 1 << 28  # of all texts of a file
MOST_NEW_TOKENS = 4_096
USUAL_NEW_TOKENS = 32

PROMPTS = ("question", "context", "prompt")
ANSWERS = ("answer", "label", "answerKey", "answers")

Questions = list[ChoiceQuestion] | list[OpenQuestion]


def read_questions(path: Path, limit: int | None = None, most_tokens: int = USUAL_NEW_TOKENS) -> Questions:
    """The first ``limit`` questions of a file, by default all. most_tokens: of an answer where the row names no other number.

    Raises UsageError for a file that does not exist; PTQError, naming the line, for a row that is no question, and for too many.
    """
    if not os.path.isfile(path):  # where Path would raise if no file can have that name
        raise UsageError(f"--tasks {path}: no such file; give one of JSON lines, with a question a line")
    found: list[Any] = []
    characters = 0
    with foreign(f"{path} cannot be read", "; correct it, or copy or download it again"):
        for where, row in json_rows(path):
            if limit is not None and len(found) == limit:
                break
            question = _question(row, where, most_tokens)
            if found and type(question) is not type(found[0]):
                raise PTQError(f"{where}: some rows have choices and some have none; put them into two files")
            found.append(question)
            characters += _size(question)
            if len(found) > MOST_QUESTIONS or characters > MOST_CHARACTERS:
                raise PTQError(
                    f"{where}: a task has at most {MOST_QUESTIONS:,} questions and {MOST_CHARACTERS:,} characters; give --limit or less"
                )
    if not found:
        raise PTQError(f"{path}: holds no questions; give JSON lines such as {{'prompt': ..., 'answer': ...}}")
    return found


def _size(question: ChoiceQuestion | OpenQuestion) -> int:
    if isinstance(question, ChoiceQuestion):  # the model reads the context once for each
        return len(question.context) * len(question.choices) + sum(map(len, question.choices))
    return len(question.prompt) + sum(map(len, question.expected))


def _question(row: Any, where: str, most_tokens: int) -> ChoiceQuestion | OpenQuestion:
    if not isinstance(row, Mapping):
        raise PTQError(f"{where}: is no JSON object but {shown(row)}")
    prompt = _prompt(row, where)
    answer = next((row[key] for key in ANSWERS if row.get(key) is not None), None)
    if answer is None:
        raise PTQError(f"{where}: has no answer; give the right one as 'answer'")
    if row.get("choices") is None:
        return _open(row, prompt, answer, where, most_tokens)
    choices, names = _choices(row["choices"], where)
    right = _number(answer, names, where)
    return ChoiceQuestion(context=prompt, continuations=_continuations(prompt, choices), choices=choices, right=right, where=where)


def _continuations(prompt: str, choices: Sequence[str]) -> list[str]:
    apart = prompt and not prompt[-1].isspace()
    return [f" {choice}" if apart and not choice[0].isspace() else choice for choice in choices]


def _prompt(row: Mapping[str, Any], where: str) -> str:
    key = next((key for key in PROMPTS if row.get(key) is not None), None)
    if key is None:
        raise PTQError(f"{where}: has no 'question', 'context' or 'prompt' but {shown(sorted(map(str, row)))}")
    text = _text(row[key], f"{where}: '{key}'")
    return f"Question: {text}\nAnswer:" if key == "question" else text


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not encodes(value):
        raise PTQError(f"{what} is no text but {shown(value)}; correct it")
    return value


def _choices(stored: Any, where: str) -> tuple[list[str], list[list[str]]]:
    """The texts; and the lists of what an answer may call them, which hold in this order: labels, texts, letters."""
    texts = stored.get("text") if isinstance(stored, Mapping) else stored
    if not isinstance(texts, list) or not 2 <= len(texts) <= MOST_CHOICES:
        raise PTQError(f"{where}: 'choices' is no list of 2 to {MOST_CHOICES:,} texts but {shown(stored)}")
    choices = [_text(each, f"{where}: a choice") for each in texts]
    if not all(each.strip() for each in choices):
        raise PTQError(f"{where}: a choice is empty; give each a word")
    labels = stored.get("label") if isinstance(stored, Mapping) else None
    if labels is None:
        return choices, [choices, [chr(ord("A") + number) for number in range(min(26, len(choices)))]]
    if not isinstance(labels, list) or len(labels) != len(choices):
        raise PTQError(f"{where}: 'choices' has {len(choices)} texts and as labels {shown(labels)}")
    return choices, [[str(label) for label in labels], choices]


def _number(answer: Any, names: Sequence[Sequence[str]], where: str) -> int:
    """The number of the right choice, which ``answer`` is, or by which of the lists of names it is called."""
    choices = max(map(len, names))
    if type(answer) is int and 0 <= answer < choices:
        return answer
    for known in names:
        if isinstance(answer, str) and list(known).count(answer) == 1:
            return list(known).index(answer)
    raise PTQError(f"{where}: the answer {shown(answer)} is none of the {choices} choices, nor the number of one from 0, nor its letter")


def _open(row: Mapping[str, Any], prompt: str, answer: Any, where: str, most_tokens: int) -> OpenQuestion:
    stored = answer if isinstance(answer, list) else [answer]
    expected = [_text(str(each) if type(each) in (int, float) else each, f"{where}: 'answer'") for each in stored]
    if not expected or not all(each.strip() for each in expected):
        raise PTQError(f"{where}: the answer is empty; give a word")
    most = row.get("max_new_tokens", most_tokens)
    if type(most) is not int or not 1 <= most <= MOST_NEW_TOKENS:
        raise PTQError(f"{where}: 'max_new_tokens' is {shown(most)}; give 1 to {MOST_NEW_TOKENS:,}")
    if not prompt:
        raise PTQError(f"{where}: the prompt is empty; give a word")
    return OpenQuestion(prompt=prompt, expected=expected, most_tokens=most, where=where)
