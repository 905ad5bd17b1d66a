"""Tasks of lm-evaluation-harness, run by that library on a model that is loaded here, packed weights and all.

The library (lm-eval, the extra [eval]) brings the tasks: how a question is written, its examples, its metrics, what is right. It is handed
the model as it is; its own class for models of transformers cuts the texts into tokens and runs it. Log probabilities are float32.

Neither remote code nor code that the model writes is run. Tasks whose metric is a program from the hub are refused. What a user's own
files may do is in ``harness_files.py``.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import logging
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ptqcli.errors import PTQError, UsageError
from ptqcli.evaluation.answers import Score, TaskResult
from ptqcli.evaluation.harness_files import task_configs
from ptqcli.evaluation.perplexity import evaluating
from ptqcli.model.positions import most_tokens
from ptqcli.runtime.layers import mixes_tokens
from ptqcli.suggest import did_you_mean
from ptqcli.untrusted import foreign, shown

BATCH_SIZE = 8
SEED = 1234  # of the library's command line
BOOTSTRAP_SAMPLES = 1_000  # for errors of metrics that are no means

Progress = Callable[[int, int], None]


def read_harness(name: str, chat: bool = False, limit: int | None = None, trust_code: bool = False) -> HarnessTask:
    """A task that the harness knows, or those of a user's file or folder. Raises UsageError for a name that it does not know, and where it
    is not installed; PTQError for what it cannot read and for what would run code."""
    path = Path(name)
    there = os.path.exists(path)  # where Path would raise if no file can have that name
    own = there or path.suffix in (".yaml", ".yml")
    if own and not there:
        raise UsageError(f"--tasks {name}: no such file; give a task in YAML, JSON lines, or the name of a task")
    configs = task_configs(path) if own and not trust_code else []
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError(
            f"--tasks {name}: is a task for lm-evaluation-harness, which is not installed; pip install 'ptqcli[eval]', or give a FILE.jsonl"
        )
    from lm_eval.tasks import TaskManager

    with _library(f"task {name}: lm-evaluation-harness cannot read it"):
        of_folder = str(path) if path.is_dir() and trust_code else None
        manager = TaskManager(include_path=of_folder, include_defaults=not configs)  # to look through its own thousands takes seconds
    _check_metrics(name, configs)
    if own:
        chosen = [entry for entry, known in manager.task_index.items() if known.yaml_path and path.resolve() in known.yaml_path.parents]
        trusted = [str(path)] if path.is_file() else chosen
        specs: list[Any] = list(configs) or trusted
    else:
        _check_name(name, manager)
        specs = [name]
    return HarnessTask(name, manager, specs, chat, limit)


@dataclass(frozen=True)
class HarnessTask:
    """What is asked for by one name. manager: the library's. specs: of its tasks, as the manager takes them."""

    name: str
    manager: Any
    specs: list[Any]
    chat: bool
    limit: int | None

    def ask(self, model: Any, tokenizer: Any, on_progress: Progress | None = None) -> list[TaskResult]:
        """A result for each task, then one for each group."""
        from lm_eval.evaluator import evaluate

        if self.chat and not tokenizer.chat_template:
            raise UsageError(f"--tasks {self.name}: the tokenizer has no chat template; leave --chat out")
        with _library(f"task {self.name}: lm-evaluation-harness fails"), evaluating([model]):
            loaded = self._loaded()
            found = evaluate(
                _as_harness_model(model, tokenizer, on_progress),
                loaded,
                limit=self.limit,
                apply_chat_template=self.chat,
                fewshot_as_multiturn=self.chat,
                bootstrap_iters=BOOTSTRAP_SAMPLES,
            )
        kinds = {name: str(task.OUTPUT_TYPE).replace("_", " ") for name, task in loaded["tasks"].items()}
        of_tasks = [_result(name, kinds[name], found["results"][name], found["samples"][name]) for name in kinds]
        groups = found.get("groups") or {}
        return of_tasks + [_result(name, "group", groups[name], []) for name in groups]

    def _loaded(self) -> Any:
        """The tasks, made anew: both models shall see the same examples, which the tasks draw."""
        import numpy

        random.seed(0)
        numpy.random.seed(SEED)
        torch.manual_seed(SEED)
        loaded = self.manager.load(copy.deepcopy(self.specs))
        for task in loaded["tasks"].values():
            task.set_fewshot_seed(SEED)
        return loaded


@contextmanager
def _library(what: str) -> Iterator[None]:
    """For calls of the library: what it shows by itself is left out, what it raises is told in one line."""
    log, sink = logging.getLogger("lm_eval"), io.StringIO()
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with foreign(what), redirect_stdout(sink), redirect_stderr(sink):
            yield
    finally:
        log.setLevel(level)


def _as_harness_model(model: Any, tokenizer: Any, on_progress: Progress | None) -> Any:
    from lm_eval.models.huggingface import HFLM

    class Loaded(HFLM):
        """The library's model, which tells how far it is."""

        asked = done = 0

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            self.asked, self.done = len(requests), 0
            return super().loglikelihood(requests, disable_tqdm=True)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            self.asked, self.done = len(requests), 0
            return super().generate_until(requests, disable_tqdm=True)

        def _told(self, rows: int) -> None:
            self.done = min(self.done + rows, self.asked)  # of several continuations of a context it may run one row
            if on_progress and self.asked:
                on_progress(self.done, self.asked)

        def _model_call(self, inps: Any, **more: Any) -> Any:
            found = super()._model_call(inps, **more)
            self._told(len(inps))
            return found

        def _model_generate(self, context: Any, *more: Any, **options: Any) -> Any:
            found = super()._model_generate(context, *more, **options)
            self._told(len(context))
            return found

    return Loaded(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=1 if mixes_tokens(model) else BATCH_SIZE,
        max_length=most_tokens(model),
        softmax_dtype="float32",
        trust_remote_code=False,
    )


def _check_name(name: str, manager: Any) -> None:
    """Raise UsageError for a name that the library does not know, PTQError for tasks that would run code of the hub or of the model."""
    if name not in manager.task_index:
        close = did_you_mean(name, manager.all_tasks)
        raise UsageError(f"--tasks {name}: is no file and no task that lm-evaluation-harness knows{close}")
    index, seen, waiting = manager.task_index, set(), [name]
    while waiting:
        member: Any = waiting.pop()
        if isinstance(member, str):
            if member in seen or member not in index:
                continue
            seen.add(member)
            waiting += [] if index[member].cfg else sorted(index[member].tags)
        config = index[member].cfg or {} if isinstance(member, str) else member
        _check_metrics(name, [config], functions=True)
        waiting += config["task"] if isinstance(config.get("task"), list) else []


def _check_metrics(name: str, configs: Sequence[Mapping[str, Any]], functions: bool = False) -> None:
    """Raise PTQError for a metric that is not the library's own: it would be a program from the hub. functions: a path is that of a
    function of the library."""
    from lm_eval.api import metrics  # noqa: F401  (fills the registry)
    from lm_eval.api.registry import METRIC_REGISTRY

    for config in configs:
        own = bool(config.get("process_results"))  # then the names of metrics are only names
        entries = [] if own else config.get("metric_list") or []
        for entry in entries if isinstance(entries, list) else [entries]:
            known = isinstance(entry, Mapping) and not entry.get("hf_evaluate")
            metric = str(entry.get("metric")) if known else ""
            if metric not in METRIC_REGISTRY and not (functions and "/" in metric):
                raise PTQError(f"--tasks {name}: has the metric {shown(entry)}, a program from the hub, which is never run")
        if config.get("unsafe_code"):
            raise PTQError(f"--tasks {name}: would run what the model writes as a program, which is never done")


def _result(name: str, kind: str, numbers: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> TaskResult:
    """numbers: of the library, as ``"acc,none": 0.5``. samples: what it logged of each question, for each of its filters."""
    first = samples[0]["filter"] if samples else None
    mine = sorted((sample for sample in samples if sample["filter"] == first), key=lambda sample: sample["doc_id"])
    judged = next((metric for metric in (mine[0]["metrics"] if mine else ()) if all(sample[metric] in (0, 1) for sample in mine)), None)
    scores = _scores(numbers)
    if judged is None:
        return TaskResult(task=name, kind=kind, answers=[], expected=[], right=[], scores=scores)
    leading = [label for label in scores if label.split(" ")[0] == judged]
    return TaskResult(
        task=name,
        kind=kind,
        answers=[_answer(sample, kind, judged) for sample in mine],
        expected=[_expected(sample, kind) for sample in mine],
        right=[bool(sample[judged]) for sample in mine],
        scores={label: scores[label] for label in [*leading, *(each for each in scores if each not in leading)]},
    )


def _scores(numbers: Mapping[str, Any]) -> dict[str, Score]:
    found = {}
    for key, value in numbers.items():
        metric, _, filtered = key.partition(",")
        if not filtered or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = numbers.get(f"{metric}_stderr,{filtered}")
        label = metric if filtered == "none" else f"{metric} ({filtered})"
        found[label] = Score(float(value), float(error) if isinstance(error, (int, float)) else None)
    return found


def _continuations(sample: Mapping[str, Any]) -> list[str]:
    """What the choices of a question are called: their texts, or their numbers where they stand in the context."""
    texts = [str(continuation).strip() for context, continuation in sample["arguments"]]
    return texts if len(set(texts)) == len(texts) else [str(number) for number in range(len(texts))]


def _answer(sample: Mapping[str, Any], kind: str, judged: str) -> str:
    given = sample["filtered_resps"]
    if kind == "multiple choice":
        sums = [each[0] for each in given]
        return _continuations(sample)[sums.index(max(sums))]
    if kind == "loglikelihood":
        return "the likeliest" if sample[judged] else "not the likeliest"
    return str(given[0])


def _expected(sample: Mapping[str, Any], kind: str) -> str:
    target = sample["target"]
    if kind == "multiple choice" and isinstance(target, int):
        texts = _continuations(sample)
        return texts[target] if 0 <= target < len(texts) else str(target)
    return str(target)
