"""The numbers of all checkpoints that were measured together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from ptqcli.calibration.shingles import Overlap
from ptqcli.comparing.flips import Flips
from ptqcli.comparing.identity import Digest
from ptqcli.comparing.stored import StoredSize
from ptqcli.comparing.texts import Text
from ptqcli.evaluation.answers import TaskResult, answered
from ptqcli.evaluation.divergence import TokenScores
from ptqcli.evaluation.measure import Evaluation
from ptqcli.evaluation.uncertainty import quantile

# Places of the curve of KL over the tokens: even in the middle, and closer to each other towards the end that matters.
CURVE = (*(count / 50 for count in range(45)), *(0.9 + count / 200 for count in range(18)), 0.99, 0.995, 0.998, 0.999, 0.9995, 1.0)


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A model that was measured: what it is called here, where it is, its size and its hash."""

    name: str
    folder: Path
    size: StoredSize
    digest: Digest
    dtype: str

    def facts(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "name": self.name,
            "folder": str(self.folder),
            "bytes": self.size.bytes,
            "bits_per_weight": self.size.bits_per_weight,
            "schemes": dict(self.size.schemes),
            "dtype": self.dtype,
            "sha256": self.digest.sha256,
            "sha256_of": self.digest.of,
        }


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One checkpoint.

    evaluations, scores: by text, in order. kernels: what its linears run on, counted. overlaps: by text, of those of which something is
    known. layers: name and error of each linear as its report tells, error_kind what is meant by it; of another program's checkpoint there
    are none. tasks, baseline_tasks: the answers to questions, by task. speed: of ``speed.measure_speed``, None where nobody asked.
    """

    identity: Identity
    adapter: bool
    kernels: Mapping[str, int]
    evaluations: Sequence[Evaluation]
    scores: Mapping[str, TokenScores]
    overlaps: Mapping[str, Overlap]
    layers: Sequence[tuple[str, float]] = ()
    error_kind: str = "unknown"
    tasks: Mapping[str, TaskResult] = field(default_factory=dict)
    baseline_tasks: Mapping[str, TaskResult] = field(default_factory=dict)
    flips: Sequence[Flips] = ()
    speed: Mapping[str, Any] | None = None

    def results(self) -> list[dict[str, Any]]:
        """The evaluations as plain values, without what is not known."""
        return [{key: value for key, value in asdict(each).items() if value is not None} for each in self.evaluations]

    def facts(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return {
            **self.identity.facts(),
            "adapter": self.adapter,
            "kernels": dict(self.kernels),
            "results": self.results(),
            "calibration_overlap": {
                each.text: asdict(self.overlaps[each.text]) if each.text in self.overlaps else None for each in self.evaluations
            },
            "kl_curve": {text: _curve(scores) for text, scores in self.scores.items() if scores.kl is not None},
            "layers": [{"name": name, "error": error} for name, error in self.layers],
            "error_kind": self.error_kind,
            "tasks": [answered(each, self.baseline_tasks.get(name)) for name, each in self.tasks.items()],
            "flips": [asdict(each) for each in self.flips],
            "speed": None if self.speed is None else dict(self.speed),
        }


def _curve(scores: TokenScores) -> list[tuple[float, float]]:
    """KL at each of CURVE."""
    assert scores.kl is not None
    ordered = scores.kl.double().sort().values
    return [(p, quantile(ordered, p)) for p in CURVE]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two checkpoints on one text, token by token. loss_difference, kl_difference: of ``other`` minus ``one``, means with their paired
    standard errors; KL is None without a baseline."""

    text: str
    one: str
    other: str
    loss_difference: float
    loss_difference_error: float | None
    kl_difference: float | None = None
    kl_difference_error: float | None = None


def pairs(measured: Sequence[Measured]) -> list[Pair]:
    """Every two of them, on every text."""
    return [_pair(text, one, other) for text in measured[0].scores for one, other in combinations(measured, 2)] if measured else []


def _pair(text: str, one: Measured, other: Measured) -> Pair:
    first, second = one.scores[text], other.scores[text]
    loss = first.clusters.mean(second.losses.double() - first.losses.double())
    kl = None if first.kl is None or second.kl is None else first.clusters.mean(second.kl.double() - first.kl.double())
    return Pair(
        text=text,
        one=one.identity.name,
        other=other.identity.name,
        loss_difference=loss.value,
        loss_difference_error=loss.error,
        kl_difference=None if kl is None else kl.value,
        kl_difference_error=None if kl is None else kl.error,
    )


def front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names that no other point beats: none is at most as large and at most as far off, and less in one of the two (Pareto)."""
    return [
        name
        for name, (size, loss) in points.items()
        if not any(s <= size and q <= loss and (s, q) != (size, loss) for s, q in points.values())
    ]


@dataclass(kw_only=True)
class Compared:
    """All that was found out. failures: why a checkpoint has no numbers, by its name."""

    baseline: Identity | None
    texts: Sequence[Text]
    device: torch.device
    kernel: str
    versions: Mapping[str, str]
    measured: list[Measured] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)

    def conditions(self) -> dict[str, Any]:
        """Under which the numbers were found."""
        first = next((each for one in self.measured for each in one.evaluations), None)
        return {
            "seqlen": None if first is None else first.seqlen,
            "stride": None if first is None else first.stride,
            "bos": None if first is None else first.bos,
            "device": str(self.device),
            "kernel": self.kernel,
            "versions": dict(self.versions),
            "texts": [text.facts() for text in self.texts],
        }

    def fronts(self) -> dict[str, list[str]]:
        """Of each text, the checkpoints on the front of size against mean KL, or perplexity where there is no baseline."""
        return {
            text.name: front({each.identity.name: _point(each, index) for each in self.measured}) for index, text in enumerate(self.texts)
        }

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return {
            "baseline": None if self.baseline is None else self.baseline.facts(),
            "conditions": self.conditions(),
            "checkpoints": [each.facts() for each in self.measured],
            "pairs": [asdict(each) for each in pairs(self.measured)],
            "fronts": self.fronts(),
            "failures": [{"checkpoint": name, "error": error} for name, error in self.failures.items()],
        }


def _point(measured: Measured, text: int) -> tuple[float, float]:
    found = measured.evaluations[text]
    return measured.identity.size.bytes, found.perplexity if found.mean_kl is None else found.mean_kl
