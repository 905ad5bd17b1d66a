"""Answers that changed: the same questions put to the original and to a checkpoint.

Accuracy hides what happens: a checkpoint that loses ten answers and gains ten others scores as the original does, and yet answers twenty
questions otherwise. Dutta et al. 2024 ("Accuracy is not all you need", arXiv:2407.09141) count these flips. With b answers that were right
and are wrong now and c the other way round, of n questions,

    difference of accuracy   (c - b) / n,   standard error  sqrt(b + c - (c - b)^2 / n) / n      (pairs; the agreeing ones tell nothing)
    McNemar's exact test     p = min(1, 2 P(X <= min(b, c))),   X binomial of b + c tosses of a fair coin

Answers are given as True or False, whether they were right; or as numbers, the choice that was made, of which only changes are counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ptqcli.errors import PTQError

Answers = Sequence[bool | int]


@dataclass(frozen=True, kw_only=True)
class Flips:
    """One task. changed: answers that are not the baseline's. lost: right before, wrong now; gained: the other way round; these, the
    accuracies, accuracy_rise with its standard error and p_value are None where answers are choices."""

    task: str
    questions: int
    changed: int
    lost: int | None = None
    gained: int | None = None
    accuracy: float | None = None
    baseline_accuracy: float | None = None
    accuracy_rise: float | None = None
    accuracy_rise_error: float | None = None
    p_value: float | None = None


def count_flips(answers: Mapping[str, Answers], baseline: Mapping[str, Answers]) -> list[Flips]:
    """Of each task that both have answered. Raises PTQError where they were not asked the same number of questions, or none."""
    return [_flips(task, answers[task], baseline[task]) for task in answers if task in baseline]


def _flips(task: str, answers: Answers, baseline: Answers) -> Flips:
    questions = len(answers)
    if questions != len(baseline) or not questions:
        raise PTQError(f"task {task}: {questions} answers of the checkpoint and {len(baseline)} of the baseline cannot be compared")
    pairs = list(zip(baseline, answers, strict=True))
    changed = sum(before != now for before, now in pairs)
    if not all(isinstance(answer, bool) for pair in pairs for answer in pair):
        return Flips(task=task, questions=questions, changed=changed)
    lost, gained = (sum(bool(before) is was and bool(now) is not was for before, now in pairs) for was in (True, False))
    return Flips(
        task=task,
        questions=questions,
        changed=changed,
        lost=lost,
        gained=gained,
        accuracy=sum(map(bool, answers)) / questions,
        baseline_accuracy=sum(map(bool, baseline)) / questions,
        accuracy_rise=(gained - lost) / questions,
        accuracy_rise_error=math.sqrt(max(0.0, lost + gained - (gained - lost) ** 2 / questions)) / questions,
        p_value=mcnemar(lost, gained),
    )


def mcnemar(lost: int, gained: int) -> float:
    """The two-sided probability of a split at least as uneven, if both ways were equally likely."""
    tosses = lost + gained
    tail = sum(math.comb(tosses, count) for count in range(min(lost, gained) + 1))
    return min(1.0, 2 * tail / 2**tosses)
