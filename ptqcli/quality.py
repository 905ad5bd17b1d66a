"""Named compositions: what ``--quality`` stands for.

Each is an algorithm with options, and what is done when the codes stand, in the order of the tables that ``scripts/accuracy_table.py``
prints: on every model and at every width there ``balanced`` leaves the result closer to the original than ``fast``, and ``best`` closer
still or, beyond what the choice of the calibration windows does, no farther. A request that names a quality may change any option of its
parts, but not the parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ptqcli.errors import UsageError
from ptqcli.suggest import did_you_mean


@dataclass(frozen=True, kw_only=True)
class Quality:
    """A composition. algo, finish: as in ``Recipe``. options: part -> option -> value. cost: CPU time in units of the fast one's, about.

    summary: for people.
    """

    algo: str
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    finish: str = "none"
    cost: float
    summary: str

    def request(self) -> dict[str, object]:
        """The fields and sections of a recipe that asks for it."""
        return {"algo": self.algo, "finish": self.finish, **{part: dict(values) for part, values in self.options.items()}}


QUALITIES = {
    "fast": Quality(algo="gptq", cost=1, summary="GPTQ with polished scales and codes"),
    "balanced": Quality(
        algo="gptq", options={"gptq": {"target": "original"}}, cost=2, summary="the same towards the original model's outputs"
    ),
    "best": Quality(
        algo="rotate+gptq",
        options={"rotate": {"unsuited": "skip"}, "gptq": {"target": "original"}},
        finish="kl",
        cost=10,
        summary="the same on a rotated model, where that can be, then scales and norms tuned to the original's logits",
    ),
}


def find_quality(name: object) -> Quality:
    """The quality called ``name``. Raises UsageError for an unknown one."""
    if not isinstance(name, str) or name not in QUALITIES:
        *most, last = QUALITIES
        raise UsageError(f"quality {name!r} is unknown; use {', '.join(most)} or {last}{did_you_mean(str(name), QUALITIES)}")
    return QUALITIES[name]


def described() -> str:
    """All of them in a sentence."""
    return "; ".join(f"{name}: {each.summary}, {each.cost:g} times the work" for name, each in QUALITIES.items())
