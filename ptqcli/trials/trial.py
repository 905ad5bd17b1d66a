"""One trial: a recipe, quantized and measured beside the original."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ptqcli.calibration.bos import window_bos
from ptqcli.calibration.chat import chat_writer
from ptqcli.calibration.rows import Rows
from ptqcli.calibration.text import evaluation_ids
from ptqcli.errors import PTQError, UsageError
from ptqcli.evaluation.encoders import default_windows, encoder_windows, measure_encoder, read_task
from ptqcli.evaluation.measure import default_seqlen, measure
from ptqcli.evaluation.tasks import TaskOptions, read_tasks
from ptqcli.model.config import load_config
from ptqcli.model.kinds import is_encoder
from ptqcli.model.locate import only_file
from ptqcli.resources import Resources
from ptqcli.runtime.models import load_model, load_tokenizer
from ptqcli.trials.goal import Goal, Measured, TaskGoal

USUAL_TOKENS = 32_768  # of each text


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What became of a recipe.

    key: of the request, by which it is known. words: what it is, for people. bytes: of the checkpoint's tensors; planned ones where there
    is none. measured: a ``Measured`` as plain values; empty where the trial failed, of which ``error`` tells. excess: see ``Goal.excess``,
    None for one that is not finite. bits_per_weight: None where nothing was quantized.
    errors: relative error of each linear, by its path. seconds: of quantizing and measuring.
    """

    key: str
    words: str
    bytes: int
    bits_per_weight: float | None
    measured: dict[str, Any] = field(default_factory=dict)
    excess: float | None
    seconds: float
    errors: dict[str, float] = field(default_factory=dict)
    error: str | None = None

    @property
    def holds(self) -> bool:
        """Whether the goal is kept."""
        return self.distance <= 1

    @property
    def distance(self) -> float:
        """Its excess, infinite where there is none."""
        return math.inf if self.excess is None else self.excess

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Examination:
    """How checkpoints are measured.

    texts: names of ``calibration.text``, of each of which at most so many ``tokens`` are taken. seqlen: of a window, None for the usual.
    """

    texts: tuple[str, ...] = ("builtin",)
    seqlen: int | None = None
    tokens: int = USUAL_TOKENS
    bos: str = "auto"
    data_dir: Path | None = None
    kernel: str = "auto"

    def __post_init__(self) -> None:
        if self.tokens < 2:
            raise UsageError(f"--tokens {self.tokens}: nothing can be measured on that; give thousands")


class Examiner:
    """Measures checkpoints of one model. Raises UsageError where its kind cannot be measured by the goal, and PTQError for texts that
    cannot be read."""

    def __init__(self, original: Path, goal: Goal, examination: Examination, resources: Resources) -> None:
        self.original, self.goal, self.how, self.resources = original, goal, examination, resources
        self.encoder = is_encoder(load_config(original))
        if self.encoder and goal.max_kl is not None:
            raise UsageError(f"{original}: is an encoder, which has no next word for a KL divergence; give --max-rise, of masked words")
        self.tokenizer = load_tokenizer(original)
        names = list(dict.fromkeys(task.task for task in goal.tasks))
        self.tasks = [] if self.encoder else read_tasks(names, TaskOptions())
        missing = next((name for name in names if self.encoder and not Path(name).is_file()), None)
        if missing is not None:
            raise UsageError(f"--task {missing}: no such file; give one of JSON lines with text and label")
        self.texts = examination.texts if goal.of_texts else ()
        self.rows = {} if self.encoder else {text: self._ids(text) for text in self.texts}

    def _ids(self, text: str) -> Tensor:
        rows = Rows(write_chat=chat_writer(self.tokenizer))
        return evaluation_ids(text, self.tokenizer, self.how.data_dir, rows)[: self.how.tokens]

    def measure(self, checkpoint: Path, step: Callable[[str, int, int], None]) -> Measured:
        """``checkpoint`` beside the original. Raises PTQError for one that does not give finite numbers."""
        device = self.resources.device
        model, original = load_model(only_file(checkpoint) or checkpoint, device, self.how.kernel), load_model(self.original, device)
        if self.encoder:
            return self._of_encoder(model, original, step)
        bos = window_bos(self.tokenizer, self.how.bos)
        found = list(measure(model, self.rows, original, self._seqlen(model), None, step, bos))
        return Measured(
            rise={each.text: each.perplexity / _known(each.baseline_perplexity) - 1 for each in found},
            kl={each.text: _known(each.mean_kl) for each in found},
            perplexity={each.text: each.perplexity for each in found},
            scores=self._scores(model),
            rise_error={each.text: each.perplexity_ratio_error for each in found if each.perplexity_ratio_error is not None},
            kl_error={each.text: each.mean_kl_error for each in found if each.mean_kl_error is not None},
        )

    def _seqlen(self, model: Any) -> int:
        """Of the windows: as asked for, or the usual one, or a text that is shorter."""
        return min([self.how.seqlen or default_seqlen(model), *(len(ids) for ids in self.rows.values())])

    def _of_encoder(self, model: Any, original: Any, step: Callable[[str, int, int], None]) -> Measured:
        seqlen = self.how.seqlen or default_windows(model)
        texts = {text: self._rows(encoder_windows(text, self.tokenizer, seqlen, self.how.data_dir)) for text in self.texts}
        names = dict.fromkeys(task.task for task in self.goal.tasks)
        labelled = {name: read_task(Path(name), self.tokenizer, model.config, seqlen) for name in names}
        found = list(measure_encoder(model, texts, self.tokenizer, seqlen, original, labelled, step))
        shares = {each.text: each.accuracy for each in found if each.accuracy is not None}
        if self.goal.max_rise is not None and any(each.masked_perplexity is None for each in found if each.accuracy is None):
            raise UsageError(f"{self.original}: has no head for words, so no perplexity rises; give --task")
        known = [each for each in found if each.masked_perplexity is not None]
        return Measured(
            rise={each.text: _known(each.masked_perplexity) / _known(each.baseline_masked_perplexity) - 1 for each in known},
            kl={},
            perplexity={each.text: _known(each.masked_perplexity) for each in known},
            scores={goal.name: _score(goal, {"accuracy": shares[goal.task]}) for goal in self.goal.tasks},
        )

    def _scores(self, model: Any) -> dict[str, float]:
        """What the goal asks for, of a model that writes."""
        found: dict[str, dict[str, float]] = {}
        for task in self.tasks:
            results = task.ask(model, self.tokenizer)
            if len(results) > 1:
                raise UsageError(f"--task {task.name}: is a group of {len(results)} tasks; give one of them, such as {results[0].task}")
            [result] = results
            whole = {} if result.accuracy is None else {"accuracy": result.accuracy}
            found[task.name] = {name: score.value for name, score in result.scores.items()} | whole
        return {goal.name: _score(goal, found[goal.task]) for goal in self.goal.tasks}

    def _rows(self, windows: Sequence[Sequence[int]]) -> list[Sequence[int]]:
        """As many windows as the tokens allow."""
        kept, tokens = list[Sequence[int]](), 0
        for window in windows:
            tokens += len(window)
            if kept and tokens > self.how.tokens:
                break
            kept.append(window)
        return kept


def _score(goal: TaskGoal, scores: Mapping[str, float]) -> float:
    if goal.metric not in scores:
        raise UsageError(f"--task {goal.task}: has no {goal.metric}; it has {', '.join(scores)}")
    return scores[goal.metric]


def _known(value: float | None) -> float:
    if value is None:
        raise PTQError("the original was not measured")
    return value
