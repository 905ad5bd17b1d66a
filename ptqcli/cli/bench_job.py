"""What ``ptq bench`` is asked to measure: matrices with their schemes, whole models, and how often."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptqcli.cli.console import path_text, size_text
from ptqcli.errors import UsageError

if TYPE_CHECKING:
    import torch

    from ptqcli.bench.machine import Machine
    from ptqcli.bench.shapes import Shape
    from ptqcli.numerics.scheme import Scheme

USUAL_PROMPT = 128
NO_TOKENS = "which makes no tokens that could be timed"

Setting = tuple[int, int]  # batch, prompt


@dataclass(kw_only=True)
class Job:
    """What is to be measured. prompts: None for what the models allow, USUAL_PROMPT at most. work: matrices with their schemes. dtype: of
    the checkpoint, None without one. models: name -> folder, the checkpoint last. subject: as a person named it. unmeasured: why the whole
    model is left out although nobody asked for that."""

    device: torch.device
    kernel: str
    tokens: tuple[int, ...]
    peers: bool
    batches: tuple[int, ...]
    prompts: tuple[int, ...] | None
    new_tokens: int
    seconds: float
    work: list[tuple[Shape, Scheme]] = field(default_factory=list)
    dtype: torch.dtype | None = None
    models: dict[str, Path] = field(default_factory=dict)
    subject: str = ""
    unmeasured: str = ""

    def add_shapes(self, shapes: str, schemes: Sequence[str]) -> None:
        """The matrices that ``shapes`` names in each of ``schemes``."""
        from ptqcli.bench.shapes import named_shapes
        from ptqcli.numerics.scheme import Scheme

        formats = list(dict.fromkeys(Scheme.parse(text) for text in schemes))
        self.work = [(shape, scheme.resolved(shape.in_features)) for scheme in formats for shape in named_shapes(shapes)]
        self.subject = shapes

    def add_checkpoint(self, folder: Path, original: Path | None, only: str | None) -> None:
        """What a checkpoint is made of, the whole checkpoint, and the model that it came from."""
        from ptqcli.model.config import load_config
        from ptqcli.model.kinds import is_encoder

        config = load_config(folder)
        self.subject = path_text(folder)
        quantized = getattr(config, "quantization_config", None) is not None
        if is_encoder(config):
            if only == "model" or not quantized:
                raise UsageError(f"{folder}: is an encoder, {NO_TOKENS}; only the kernels of a quantized one are, with --only kernels")
            only, self.unmeasured = "kernels", f"not measured: an encoder, {NO_TOKENS}"
        if only != "model":
            self._add_layers(folder, quantized, config)
        if only == "kernels":
            return
        if original is not None:
            self.models["original"] = original
        self.models["checkpoint" if quantized else "model"] = folder
        self._check_settings()

    def _add_layers(self, folder: Path, quantized: bool, config: Any) -> None:
        from ptqcli.bench.shapes import shapes_of

        if not quantized:
            raise UsageError(f"{folder}: is not quantized, so it has no kernels of its own; give --only model, or --shapes for kernels")
        self.work = shapes_of(folder)
        self.dtype = config.dtype

    def _check_settings(self) -> None:
        from ptqcli.bench.generation import check_setting, positions_of
        from ptqcli.model.config import load_config
        from ptqcli.model.kinds import kind_of

        configs = {name: load_config(folder) for name, folder in self.models.items()}
        if self.prompts is None:
            room = min(positions_of(config) for config in configs.values()) - self.new_tokens
            self.prompts = (max(1, min(USUAL_PROMPT, room)),)
        for name, config in configs.items():
            kind_of(config)
            for batch, prompt in self.settings():
                check_setting(config, name, batch, prompt, self.new_tokens)

    def settings(self) -> list[Setting]:
        """All pairs of a batch and a prompt, in the order in which they are measured."""
        return [(batch, prompt) for prompt in self.prompts or () for batch in self.batches]

    def facts(self, machine: Machine) -> Iterator[tuple[str, str]]:
        """What will be measured, and on what, as names and texts."""
        from ptqcli.bench.roofline import rate_text

        threads = f", {machine.threads} threads" if machine.threads else ""
        yield "machine", f"{machine.name} ({machine.device}{threads}), cache {size_text(machine.cache_bytes)}"
        arithmetic = [f"{name} {rate_text(limit)}" for name, limit in machine.arithmetic.items()]
        yield "reaches", ", ".join([f"memory {rate_text(machine.bandwidth, 'B/s')}", *arithmetic]) + " (measured just now)"
        yield "subject", self.subject
        if self.models:
            yield "original", path_text(self.models["original"]) if "original" in self.models else "none"
        if self.work:
            schemes = dict.fromkeys(str(scheme) for _, scheme in self.work)
            yield "kernels", f"{len(self.work)} matrices ({'; '.join(schemes)}) with {_listed(self.tokens)} tokens"
        if self.models:
            settings = f"batch {_listed(self.batches)}, prompt {_listed(self.prompts or ())}, {self.new_tokens} new tokens"
            yield "whole model", f"{' and '.join(self.models)}: {settings}"
        elif self.unmeasured:
            yield "whole model", self.unmeasured


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(str(number) for number in numbers)
