"""Answers that changed: the same questions put to the original and to a checkpoint.

Accuracy hides what happens: a checkpoint that loses ten answers and gains ten others scores as the original does, and yet answers twenty
questions otherwise. Dutta et al. 2024 ("Accuracy is not all you need", arXiv:2407.09141) count these flips. What stands here is in the
form of tables; ``evaluation.answers`` has the formulas.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ptqcli.errors import PTQError
from ptqcli.evaluation.answers import TaskResult, flips


@dataclass(frozen=True, kw_only=True)
class Flips:
    """One task. changed: answers that are not the baseline's. lost: right before, wrong now; gained: the other way round."""

    task: str
    questions: int
    changed: int
    lost: int
    gained: int
    accuracy: float
    baseline_accuracy: float
    accuracy_rise: float
    accuracy_rise_error: float | None
    p_value: float


def count_flips(answers: Mapping[str, TaskResult], baseline: Mapping[str, TaskResult]) -> list[Flips]:
    """Of each task that both have answered and that has right answers. Raises PTQError where they were not asked the same."""
    found = []
    for task, result in answers.items():
        if task not in baseline:
            continue
        try:
            counted = flips(result, baseline[task])
        except ValueError as error:
            raise PTQError(f"task {task}: the checkpoint and the baseline were not asked the same questions") from error
        own, its = result.accuracy, baseline[task].accuracy
        if counted is None or own is None or its is None:
            continue
        found.append(
            Flips(
                task=task,
                questions=len(result.right),
                changed=counted.changed,
                lost=counted.lost,
                gained=counted.won,
                accuracy=own,
                baseline_accuracy=its,
                accuracy_rise=counted.difference,
                accuracy_rise_error=counted.standard_error,
                p_value=counted.p_value,
            )
        )
    return found
