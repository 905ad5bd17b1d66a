"""What a budget became, for reports: imports nothing heavy."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class AllocatedGroup:
    """A group of linears. scheme: the candidate that it got, as it was asked for. nbytes, losses: of each candidate, None for one that the
    group cannot have."""

    name: str
    linears: int
    weights: int
    scheme: str
    nbytes: list[int | None]
    losses: list[float | None]


@dataclass(frozen=True, kw_only=True)
class ComparedUniform:
    """All groups in one candidate, with the rest of the checkpoint as it is. bits: average of a quantized weight. divergence: see
    ``Allocation``."""

    scheme: str
    nbytes: int
    bits: float
    divergence: float


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """Bits under a budget.

    target: ``3.5 bits`` or ``4,294,967,296 bytes``. method, unit: how losses were measured, in so many seconds. candidates: as asked for.
    texts: what the windows are from. windows, tokens: of measuring. held_out: windows of the comparison. bits: average of a quantized
    weight. expected_loss: sum over the groups. divergence: of the mixed schemes, rounded to nearest, from the model as it is, on the
    windows that were held out. measure: what that is, KL at the logits in nats a token or, of an encoder, relative squared error behind the
    last block. uniform: the candidates that keep the budget by themselves. kept: None for the mixed schemes, or the uniform one that was
    better and is written.
    """

    target: str
    method: str
    unit: str
    candidates: list[str]
    texts: str
    windows: int
    tokens: int
    held_out: int
    bits: float
    expected_loss: float
    divergence: float
    measure: str
    uniform: list[ComparedUniform]
    kept: str | None
    groups: list[AllocatedGroup]
    seconds: float = 0.0

    def stored(self) -> dict[str, Any]:
        """What is written beside the checkpoint: all but the seconds, which no two runs take alike."""
        return {key: value for key, value in asdict(self).items() if key != "seconds"}

    @property
    def best_uniform(self) -> ComparedUniform | None:
        """Of those that keep the budget the one nearest to the model as it is."""
        return min(self.uniform, key=lambda each: each.divergence, default=None)

    def rows(self) -> list[tuple[str, str]]:
        """(what, value) pairs for people: what was asked for, how it was measured, what came out."""
        looked_at = f"{self.windows} windows of {self.tokens} tokens from {self.texts}"
        expected = f"{self.bits:.3f} bits a weight, expected {self.expected_loss:.4g} {self.unit}"
        return [("budget", f"{self.target}, shared out by {self.method} on {looked_at}; {expected}"), ("beside uniform", self.verdict())]

    def verdict(self) -> str:
        """What came out, in a line for people."""
        best, mixed = self.best_uniform, f"{self.measure} {self.divergence:.4g} with mixed schemes"
        how = f"rounded to nearest, on {self.held_out} windows held out"
        if best is None:
            return f"{mixed}, {how}; no candidate keeps {self.target} alone"
        beside = f"{best.divergence:.4g} with {best.scheme} alone ({best.bits:.3f} bits)"
        if self.kept is None:
            return f"{mixed}, {beside}, {how}"
        return f"{mixed}, only {beside}, {how}: {best.scheme} is written for all linears, NOT the mixed schemes"
