"""What ``ptq bench`` found, as tables and as one object."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptqcli.cli.bench_tables import GENERATION_COLUMNS, generation_rows, show_kernels
from ptqcli.cli.console import Output
from ptqcli.errors import PTQError

if TYPE_CHECKING:
    from ptqcli.bench.generation import GenerationPoint
    from ptqcli.bench.linears import KernelPoint
    from ptqcli.bench.machine import Machine

VERSIONS = ("ptqcli", "torch", "transformers", "triton")


@dataclass(kw_only=True)
class Results:
    """All that was measured. layers: kernels of the checkpoint's layers, counted. in_turn: models were timed in alternation.

    error: why the model that was asked for has no result at all.
    """

    subject: str
    machine: Machine
    models: Mapping[str, Path]
    layers: dict[str, int] = field(default_factory=dict)
    kernels: list[KernelPoint] = field(default_factory=list)
    generation: list[GenerationPoint] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    missing_peers: dict[str, str] = field(default_factory=dict)
    in_turn: bool = True
    error: PTQError | None = None

    def show(self, output: Output) -> None:
        """Tables, then what failed."""
        for scheme in dict.fromkeys(point.scheme for point in self.kernels):
            show_kernels(scheme, [point for point in self.kernels if point.scheme == scheme], output)
        if self.generation:
            self._show_generation(output)
        for failure in self.failures:
            output.say(f"failed: {failure}")
        for name, advice in self.missing_peers.items():
            output.say(f"not installed: {name} ({advice})")

    def _show_generation(self, output: Output) -> None:
        new_tokens, dtype = self.generation[0].new_tokens, self.generation[0].dtype
        output.table(f"Whole model, {new_tokens} new tokens, medians", GENERATION_COLUMNS, generation_rows(self.generation))
        output.say(f"MFU, HFU: model's and hardware's operations as a share of the measured limit of {dtype}; attention counted in full")
        output.say("MFU by definition counts the head for every token of the prompt, HFU for the last alone, as it is computed")
        if self.machine.threads:
            output.say("peak memory: largest resident size of a process that loads the model and runs it once, Python and torch included")
        else:
            output.say("peak memory: most that torch allocated in a process that loads the model and runs it once")
        if not self.in_turn:
            output.say("the models did not fit into memory together, so they were timed one after the other")

    def to_json(self) -> dict[str, Any]:
        """Everything, as one object."""
        return {
            "subject": self.subject,
            "models": {name: str(folder) for name, folder in self.models.items()},
            "versions": {name: _version(name) for name in VERSIONS},
            "machine": asdict(self.machine),
            "layers": self.layers,
            "kernels": [asdict(point) for point in self.kernels],
            "generation": [asdict(point) for point in self.generation],
            "in_turn": self.in_turn,
            "failures": self.failures,
            "missing_peers": self.missing_peers,
        }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
