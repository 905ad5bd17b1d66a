"""What a model answered to the questions of a task, and where two models part.

    standard error of a share     sqrt(p (1 - p) / (n - 1)), as lm-evaluation-harness has it
    of a difference of two models on the same questions     s / sqrt(n), s the standard deviation of the differences, each -1, 0 or 1

Two models can be right equally often and yet on other questions. So the flips are counted, and McNemar's test (1947) asks whether as
many as these, to one side, would come of chance: with b questions that only the one has right and c that only the other has, if both are
equally good each of the b + c falls to either side with probability 1/2. The test here is the exact one, two-sided: twice the binomial
tail of min(b, c) among b + c, at most 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Score:
    """One number of a task. standard_error: None where the task has none for it."""

    value: float
    standard_error: float | None = None


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One model on one task; all lists have an entry a question.

    task: its name. kind: what is asked for, such as "multiple choice". answers: what the model gave. expected: what is right. right:
    whether it was; empty for a task that is no matter of right and wrong, and then so are answers and expected. scores: by name; if there
    are answers, the first is the share of the right ones.
    """

    task: str
    kind: str
    answers: Sequence[str]
    expected: Sequence[str]
    right: Sequence[bool]
    scores: Mapping[str, Score]

    @property
    def accuracy(self) -> float | None:
        """The share of right answers, 0 to 1; None without answers."""
        return sum(self.right) / len(self.right) if self.right else None

    @property
    def standard_error(self) -> float | None:
        """Of the accuracy."""
        return share(self.right).standard_error if self.right else None


@dataclass(frozen=True, kw_only=True)
class Flips:
    """A model beside its baseline on the same questions.

    lost: right answers of the baseline that became wrong. won: wrong ones that became right. changed: answers that became another one,
    right or wrong. p_value: McNemar's, exact and two-sided. difference: of the accuracies, model less baseline. standard_error: of
    the difference, paired; None for a single question.
    """

    lost: int
    won: int
    changed: int
    p_value: float
    difference: float
    standard_error: float | None


def share(right: Sequence[bool]) -> Score:
    """The share of true ones among ``right``, which is not empty."""
    count, value = len(right), sum(right) / len(right)
    return Score(value, math.sqrt(value * (1 - value) / (count - 1)) if count > 1 else None)


def flips(result: TaskResult, baseline: TaskResult) -> Flips | None:
    """``result`` beside ``baseline``, which was asked the same; None where there are no answers. Raises ValueError for another task."""
    if (result.task, list(result.expected)) != (baseline.task, list(baseline.expected)):
        raise ValueError(f"{result.task} and {baseline.task} are not the same questions")
    if not result.right:
        return None
    differences = [now - before for now, before in zip(result.right, baseline.right, strict=True)]
    count, mean = len(differences), sum(differences) / len(differences)
    variance = sum((each - mean) ** 2 for each in differences) / (count - 1) if count > 1 else None
    lost, won = differences.count(-1), differences.count(1)
    return Flips(
        lost=lost,
        won=won,
        changed=sum(now != before for now, before in zip(result.answers, baseline.answers, strict=True)),
        p_value=mcnemar(lost, won),
        difference=mean,
        standard_error=None if variance is None else math.sqrt(variance / count),
    )


def mcnemar(lost: int, won: int) -> float:
    """The exact two-sided p-value for so many questions that only the one model has right, and only the other."""
    both = lost + won
    term = tail = 1  # binomial coefficients of ``both``, and their sum
    for successes in range(min(lost, won)):
        term = term * (both - successes) // (successes + 1)
        tail += term
    return min(1.0, (2 * tail) / (1 << both))


def answered(result: TaskResult, baseline: TaskResult | None = None) -> dict[str, Any]:
    """One model on one task, beside its baseline if there is one, as plain values: scores, flips, and every answer."""
    found: dict[str, Any] = {"task": result.task, "kind": result.kind, "questions": len(result.right)}
    found["scores"] = {name: asdict(score) for name, score in result.scores.items()}
    if baseline is not None:
        found["baseline_scores"] = {name: asdict(score) for name, score in baseline.scores.items()}
        counted = flips(result, baseline)
        if counted is not None:
            found["flips"] = asdict(counted)
    found["answers"] = list(_answers(result, baseline))
    return found


def _answers(result: TaskResult, baseline: TaskResult | None) -> Iterator[dict[str, Any]]:
    for number, (answer, expected, right) in enumerate(zip(result.answers, result.expected, result.right, strict=True)):
        row: dict[str, Any] = {"question": number, "expected": expected, "answer": answer, "right": right}
        if baseline is not None:
            row |= {"baseline_answer": baseline.answers[number], "baseline_right": baseline.right[number]}
        yield row
