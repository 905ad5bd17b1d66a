"""What a checkpoint may lose, and how much of that it has lost."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ptqcli.errors import UsageError
from ptqcli.untrusted import shown

TASK_GOAL = re.compile(r"(?P<task>.+):(?P<metric>[a-z_]+)>=(?P<least>[0-9.eE+-]+)")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a checkpoint is measured to be.

    rise: of the perplexity over the original's, 0.01 for one percent, by text; of masked words for an encoder. kl: mean KL divergence from
    the original in nats, by text; empty for an encoder. scores: (task, metric) -> score. perplexity: by text.
    rise_error, kl_error: their standard errors, as far as there are any, see ``evaluation.uncertainty``.
    """

    rise: Mapping[str, float]
    kl: Mapping[str, float]
    perplexity: Mapping[str, float]
    scores: Mapping[str, float]
    rise_error: Mapping[str, float] = field(default_factory=dict)
    kl_error: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TaskGoal:
    """A task whose ``metric`` may not fall below ``least``."""

    task: str
    metric: str
    least: float

    @property
    def name(self) -> str:
        """Under which the score is kept."""
        return f"{self.task}:{self.metric}"


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What has to hold, all of it. Raises UsageError for one that nothing can miss or keep.

    max_rise: of the perplexity, relative to the original's. max_kl: of the mean KL divergence in nats. Both on the worst of the texts.
    """

    max_rise: float | None = None
    max_kl: float | None = None
    tasks: tuple[TaskGoal, ...] = ()

    def __post_init__(self) -> None:
        if self.max_rise is None and self.max_kl is None and not self.tasks:
            raise UsageError("there is no goal; give --max-rise 1%, --max-kl 0.02 or --task FILE:accuracy>=0.7")
        for flag, value in (("--max-rise", self.max_rise), ("--max-kl", self.max_kl)):
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"{flag} {value:g} is no goal; give a number above 0")

    @property
    def of_texts(self) -> bool:
        """Whether texts have to be measured."""
        return self.max_rise is not None or self.max_kl is not None

    def excess(self, measured: Mapping[str, object] | Measured) -> float:
        """The largest of the losses, each as a share of what is allowed: at most 1 where the goal is kept; infinite for NaN."""
        found = measured if isinstance(measured, Measured) else Measured(**measured)  # type: ignore[arg-type]
        shares = []
        if self.max_rise is not None:
            shares += [rise / self.max_rise for rise in found.rise.values()]
        if self.max_kl is not None:
            shares += [kl / self.max_kl for kl in found.kl.values()]
        for task in self.tasks:
            # errors beside those that are allowed: half the allowed right answers missing is as far as twice the allowed loss
            allowed, made = 1 - task.least, 1 - found.scores[task.name]
            shares.append(made / allowed if allowed > 0 else (1.0 if made <= 0 else math.inf))
        return max((math.inf if math.isnan(share) else share for share in shares), default=math.inf)

    def words(self) -> str:
        """The goal as a person reads it."""
        parts = []
        if self.max_rise is not None:
            parts.append(f"perplexity rises by at most {self.max_rise:.3g}" if self.max_rise >= 1 else f"rise at most {self.max_rise:.3%}")
        if self.max_kl is not None:
            parts.append(f"mean KL at most {self.max_kl:g}")
        parts += [f"{task.task}: {task.metric} at least {task.least:g}" for task in self.tasks]
        return ", ".join(parts)


def read_share(text: str, flag: str) -> float:
    """A share: ``1%`` or ``0.01``. Raises UsageError for anything else."""
    number = text.strip().removesuffix("%")
    try:
        value = float(number) / (100 if text.strip().endswith("%") else 1)
    except ValueError as error:
        raise UsageError(f"{flag} {shown(text)} is no share; give one such as 1% or 0.01") from error
    if not 0 < value < math.inf:
        raise UsageError(f"{flag} {text} is no goal; give a share above 0, such as 1%")
    return value


def read_tasks(texts: Sequence[str]) -> tuple[TaskGoal, ...]:
    """``TASK:METRIC>=NUMBER`` texts. Raises UsageError for what is none, and for a task and metric that are given twice."""
    goals: dict[str, TaskGoal] = {}
    for text in texts:
        found = TASK_GOAL.fullmatch(text)
        try:
            least = float(found["least"]) if found else math.nan
        except ValueError:
            least = math.nan
        if found is None or not 0 <= least <= 1:
            raise UsageError(f"--task {shown(text)} is no goal; write TASK:METRIC>=SHARE such as questions.jsonl:accuracy>=0.7")
        goal = TaskGoal(task=found["task"], metric=found["metric"], least=least)
        if goal.name in goals:
            raise UsageError(f"--task {goal.name} is given twice; give it once")
        goals[goal.name] = goal
    return tuple(goals.values())
