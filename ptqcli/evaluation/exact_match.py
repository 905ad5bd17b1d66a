"""Exact match: the model goes on behind a prompt, always with the likeliest token, and its first line is its answer.

It writes until a line break behind a word, until it ends the text by itself, or as many tokens as the question allows. The answer is right
if it is one of the expected ones, where case, white space around it and between its words, and a full stop at its end do not count.

Prompts of equally many tokens run together, so that none has filler in front. The layers run on the kernels that ``ptq generate`` has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from ptqcli.calibration.padded import marks
from ptqcli.calibration.tokens import read_tokens
from ptqcli.errors import PTQError
from ptqcli.evaluation.answers import TaskResult, share
from ptqcli.evaluation.perplexity import TOKENS_PER_BATCH, check_fits, placed
from ptqcli.model.positions import most_tokens
from ptqcli.runtime.layers import mixes_tokens

KIND = "exact match"
# The likeliest token, whatever the model's generation_config.json says.
GREEDY = {
    "do_sample": False,
    "temperature": None,
    "top_p": None,
    "top_k": None,
    "repetition_penalty": 1.0,
    "num_beams": 1,
    "num_return_sequences": 1,
}

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class OpenQuestion:
    """prompt: what the model reads. expected: the right answers, any of which will do. most_tokens: of an answer. where: for errors."""

    prompt: str
    expected: Sequence[str]
    most_tokens: int
    where: str


def answer_openly(
    name: str, questions: Sequence[OpenQuestion], model: Any, tokenizer: Any, marked: bool = True, on_progress: Progress | None = None
) -> TaskResult:
    """What ``model`` answers. marked: what the tokenizer writes in front of a text is written; a chat template has it already.

    Raises PTQError for an answer that may be longer than the model has positions.
    """
    answers = greedy_answers(model, tokenizer, questions, marked, on_progress)
    right = [
        comparable(answer) in {comparable(each) for each in question.expected} for answer, question in zip(answers, questions, strict=True)
    ]
    expected = [question.expected[0] for question in questions]
    return TaskResult(task=name, kind=KIND, answers=answers, expected=expected, right=right, scores={"exact_match": share(right)})


def comparable(answer: str) -> str:
    """``answer`` without what does not count."""
    return " ".join(answer.split()).removesuffix(".").rstrip().casefold()


class _FirstLine(StoppingCriteria):
    """A row has ended when a line break stands behind a word of its answer. start: tokens of the prompt."""

    def __init__(self, tokenizer: Any, start: int) -> None:
        self.tokenizer, self.start = tokenizer, start

    def __call__(self, input_ids: Tensor, scores: Any, **_others: Any) -> Any:
        ended = ["\n" in self.tokenizer.decode(row[-1:]) and "\n" in self._answer(row) for row in input_ids.tolist()]
        return torch.tensor(ended, device=input_ids.device)

    def _answer(self, row: list[int]) -> str:
        return str(self.tokenizer.decode(row[self.start :], skip_special_tokens=True)).lstrip()


def greedy_answers(
    model: Any, tokenizer: Any, questions: Sequence[OpenQuestion], marked: bool = True, on_progress: Progress | None = None
) -> list[str]:
    """The first line that ``model`` writes behind each prompt, without white space around it."""
    before = marks(tokenizer)[0] if marked else []
    prompts = read_tokens(tokenizer, [question.prompt for question in questions], add_special_tokens=False, verbose=False)["input_ids"]
    rows = [_cut(model, question, before + ids) for question, ids in zip(questions, prompts, strict=True)]
    check_fits(model, torch.tensor([token for row in rows for token in row]), max(map(len, rows)))

    def shape(index: int) -> tuple[int, int]:
        return len(rows[index]), questions[index].most_tokens

    answers, done = [""] * len(rows), 0
    was_training = model.training
    model.eval()
    for (length, most), group in groupby(sorted(range(len(rows)), key=shape, reverse=True), shape):
        alike = list(group)
        size = 1 if mixes_tokens(model) else max(1, TOKENS_PER_BATCH // (length + most))
        for start in range(0, len(alike), size):
            batch = alike[start : start + size]
            for index, answer in zip(batch, _write(model, tokenizer, [rows[index] for index in batch], most), strict=True):
                answers[index] = answer
            done += len(batch)
            if on_progress:
                on_progress(done, len(rows))
    model.train(was_training)
    return answers


def _cut(model: Any, question: OpenQuestion, row: list[int]) -> list[int]:
    """The end of a prompt that leaves room for the answer. Raises PTQError where there is none, and for a prompt without tokens."""
    positions = most_tokens(model)
    if not row:
        raise PTQError(f"{question.where}: the prompt has no tokens; give a word")
    if positions is None:
        return row
    if question.most_tokens >= positions:
        raise PTQError(
            f"{question.where}: an answer may have {question.most_tokens} tokens and the model {positions} positions; allow fewer"
        )
    return row[question.most_tokens - positions :]


def _write(model: Any, tokenizer: Any, rows: Sequence[Sequence[int]], most: int) -> list[str]:
    """rows: prompts of equally many tokens."""
    ids = placed(model, torch.tensor(rows))
    start = ids.shape[1]
    with torch.no_grad():
        written = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=most,
            stopping_criteria=StoppingCriteriaList([_FirstLine(tokenizer, start)]),
            pad_token_id=tokenizer.eos_token_id,
            **GREEDY,
        )
    texts = [str(tokenizer.decode(row[start:], skip_special_tokens=True)).strip() for row in written]
    return [(text.splitlines() or [""])[0].rstrip() for text in texts]
