"""Checkpoints measured one after the other, each beside the baseline, all on the same tokens.

The baseline stays in memory, and of the checkpoints one at a time; what is kept of each is a few numbers a token. The baseline runs once
with each checkpoint, since its distributions over the vocabulary are too large to be kept.

One that fails is noted with the reason, and the others go on.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ptqcli.bench import machine
from ptqcli.bench.machine import Machine
from ptqcli.calibration.bos import window_bos
from ptqcli.comparing.flips import count_flips
from ptqcli.comparing.identity import checkpoint_digest, versions
from ptqcli.comparing.results import Compared, Identity, Measured
from ptqcli.comparing.speed import measure_speed
from ptqcli.comparing.stored import stored_size
from ptqcli.comparing.texts import USUAL_TOKENS, Text, overlaps, read_texts, reads_otherwise, texts_here
from ptqcli.errors import PTQError, UsageError
from ptqcli.evaluation.answers import TaskResult
from ptqcli.evaluation.measure import default_seqlen, score
from ptqcli.model.config import load_config
from ptqcli.model.kinds import is_encoder
from ptqcli.model.locate import model_name
from ptqcli.pipeline.report import read_report, read_source
from ptqcli.runtime import kernels_in
from ptqcli.runtime.models import load_model, load_tokenizer
from ptqcli.untrusted import one_line

Step = Callable[[int, int, str], None]
# Puts questions to a model with its tokenizer: task -> its answers. It tells how many of how many requests of which task are behind it.
Ask = Callable[[Any, Any, Step], Mapping[str, TaskResult]]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How models are measured.

    texts: names; None for those that this machine has. tokens: of each text, from its front; None for all, or USUAL_TOKENS where no text is
    named. seqlen: tokens in a window, None for the usual one. stride, bos: see ``evaluation.windows`` and ``calibration.bos``. data_dir:
    where known corpora are looked for first. kernel: of packed weights. adapter: a folder, or True for the one in the checkpoint.
    speed: whether tokens a second are measured, too. ask: questions that are put to each model, None for none.
    """

    texts: Sequence[str] | None = None
    tokens: int | None = None
    seqlen: int | None = None
    stride: int | None = None
    bos: str = "auto"
    data_dir: Path | None = None
    device: torch.device
    kernel: str = "auto"
    adapter: Path | bool = False
    speed: bool = False
    ask: Ask | None = None


class Listener(Protocol):
    """Who is told how the work goes."""

    def say(self, text: str) -> None:
        """A remark."""

    def stage(self, text: str) -> None:
        """Something that takes a while begins."""

    def step(self, done: int, total: int, text: str) -> None:
        """``done`` of ``total`` windows of ``text`` are behind us."""

    def found(self, measured: Measured) -> None:
        """A checkpoint is done."""


class Silent:
    """A listener that does nothing."""

    def say(self, text: str) -> None:
        pass

    def stage(self, text: str) -> None:
        pass

    def step(self, done: int, total: int, text: str) -> None:
        pass

    def found(self, measured: Measured) -> None:
        pass


def common_source(checkpoints: Mapping[str, Path]) -> Path | None:
    """The model that checkpoints were made from, as their reports tell; None where none tells. Raises UsageError where they differ."""
    named = {name: source for name, folder in checkpoints.items() if (source := read_source(folder)) is not None}
    first = next(iter(named), None)
    other = next((name for name in named if first is not None and named[name] != named[first]), None)
    if first is not None and other is not None:
        raise UsageError(
            f"{first} was made from {named[first]} and {other} from {named[other]}; name the model to compare with by --baseline"
        )
    return None if first is None else named[first]


def compare_checkpoints(
    checkpoints: Mapping[str, Path], baseline: Path | None, settings: Settings, listener: Listener | None = None
) -> Compared:
    """Measure ``checkpoints`` (what they are called -> where they are), in order, beside ``baseline``; None measures them alone.

    Of several that are asked for, one that fails is among the failures of the result; a single one raises.
    Raises UsageError for a request that cannot work and PTQError for a baseline or a text that cannot be read, before anything is measured.
    """
    listener = listener or Silent()
    for name, folder in checkpoints.items():
        _check(name, folder, baseline)
    tokenizer = load_tokenizer(next(iter(checkpoints.values())))
    names = settings.texts if settings.texts is not None else texts_here(settings.data_dir)
    tokens = USUAL_TOKENS if settings.texts is None and settings.tokens is None else settings.tokens
    texts = read_texts(names, tokenizer, settings.data_dir, tokens, listener.say)  # one that is not there is told before models are loaded
    work = _Work(settings, listener, texts, tokenizer, baseline, list(checkpoints.values()))
    for name, folder in checkpoints.items():
        work.measure(name, folder)
        gc.collect()  # a model holds references to itself
    return work.compared


def _check(name: str, folder: Path, baseline: Path | None) -> None:
    """Raise UsageError for a checkpoint that cannot be measured beside the baseline, as the configurations tell."""
    config = load_config(folder)
    if is_encoder(config):
        raise UsageError(f"{name}: is an encoder, which has no perplexity; measure it by itself with ptq eval")
    if baseline is None:
        return
    ours, theirs = (each.get_text_config().vocab_size for each in (config, load_config(baseline)))
    if ours != theirs:
        raise UsageError(
            f"{name}: has a vocabulary of {ours} tokens and the baseline {baseline} one of {theirs}, so they cannot be compared; "
            "give --baseline with the model that it was made from"
        )


class _Work:
    """What stays from checkpoint to checkpoint."""

    def __init__(
        self, settings: Settings, listener: Listener, texts: Sequence[Text], tokenizer: Any, baseline: Path | None, folders: list[Path]
    ) -> None:
        self.settings, self.listener, self.texts, self.tokenizer, self.folders = settings, listener, texts, tokenizer, folders
        self.bos = window_bos(tokenizer, settings.bos)
        self.seqlen = settings.seqlen
        self.machine: Machine | None = None
        if baseline is not None:
            if reads_otherwise(baseline, tokenizer, texts):
                listener.say(f"{baseline}: its tokenizer is another one; both models are measured on the tokens of the checkpoint's")
            listener.stage("loading the baseline")
        self.original = None if baseline is None else load_model(baseline, settings.device)
        self.original_answers = self._answers("the baseline", self.original)
        self.compared = Compared(
            baseline=None if baseline is None else self._identity(model_name(baseline), baseline, self.original),
            texts=texts,
            device=settings.device,
            kernel=settings.kernel,
            versions=versions(),
        )

    def measure(self, name: str, folder: Path) -> None:
        """Measure one checkpoint, or note why that does not work."""
        try:
            found = self._measured(name, folder)
        except (PTQError, OSError, MemoryError, RuntimeError) as error:
            if len(self.folders) == 1:
                raise
            self.compared.failures[name] = one_line(error)
            self.listener.say(f"{name}: failed: {one_line(error)}")
            return
        self.compared.measured.append(found)
        self.listener.found(found)

    def _measured(self, name: str, folder: Path) -> Measured:
        settings, listener = self.settings, self.listener
        foreign = folder != self.folders[0] and reads_otherwise(folder, self.tokenizer, self.texts)
        if foreign:
            listener.say(f"{name}: its tokenizer is another one; it is measured on the tokens of the first checkpoint's")
        report = read_report(folder)  # a damaged one is told before the work
        shares = {} if foreign else overlaps(folder, report, self.texts)
        listener.stage(f"loading {name}")
        model = load_model(folder, settings.device, settings.kernel, settings.adapter)
        if self.seqlen is None:
            self.seqlen = default_seqlen(model)
        rows = {text.name: text.ids for text in self.texts}
        listener.stage(f"measuring {name}")

        def step(text: str, done: int, total: int) -> None:
            listener.step(done, total, text)

        scored = list(score(model, rows, self.original, self.seqlen, settings.stride, step, self.bos))
        answers = self._answers(name, model)
        layers = (report or {}).get("layers", ())
        return Measured(
            identity=self._identity(name, folder, model),
            adapter=settings.adapter is not False,
            kernels=kernels_in(model),
            evaluations=[evaluation for evaluation, _ in scored],
            scores={evaluation.text: scores for evaluation, scores in scored},
            overlaps=shares,
            tasks=answers,
            baseline_tasks=self.original_answers,
            layers=[(layer["name"], layer["relative_error"]) for layer in layers if layer.get("relative_error") is not None],
            error_kind=(report or {}).get("error_kind", "unknown"),
            flips=count_flips(answers, self.original_answers),
            speed=self._speed(model) if settings.speed else None,
        )

    def _identity(self, name: str, folder: Path, model: Any) -> Identity:
        dtype = str(model.dtype).removeprefix("torch.")
        return Identity(name=name, folder=folder, size=stored_size(folder), digest=checkpoint_digest(folder), dtype=dtype)

    def _answers(self, name: str, model: Any) -> Mapping[str, TaskResult]:
        if model is None or self.settings.ask is None:
            return {}
        self.listener.stage(f"asking {name}")
        return self.settings.ask(model, self.tokenizer, self.listener.step)

    def _speed(self, model: Any) -> dict[str, Any]:
        self.listener.stage("measuring tokens a second")
        if self.machine is None:
            self.machine = machine.measure(self.settings.device)
        return measure_speed(model, self.original, self.settings.device, self.machine)
