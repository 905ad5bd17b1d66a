"""AutoRound, by its algorithm SignRound (Cheng et al. 2023, "Optimize Weight Rounding via Signed Gradient Descent", arXiv 2309.05516;
version 2: arXiv 2512.04746).

An offset V for each weight, in steps of its grid, is learned together with the range of each group:

    W' = s (clip(round(w / s + V) + z, 0, 2^b - 1) - z)        |V| <= 1/2

Version 1 shrinks the range, with alpha and beta in [0, 1] for each group:

    low = beta min(w, 0),  high = alpha max(w, 0)
    symmetric:   s = -m / 2^(b-1),  m the one of low and high with the larger magnitude,  z = 2^(b-1)
    asymmetric:  s = (high - low) / (2^b - 1),  z = round(-low / s)

Version 2 begins with a search for the scale s0 with the least error sum_j c_j (w_j - w'_j)^2, c_j the mean square of input j, among

    s = -m / (2^(b-1) - i d),  |i| <= N        d = .01, N = 90 at 2 bits, else d = .0075 * 2^(b-1), N = 100

and learns s = alpha s0 with alpha in [0, 2], one for each group; asymmetric schemes begin with the least weighted error among shrunk
ranges. Below 4 bits its loss leaves out the largest .1 % of each batch's differences, so that a few huge activations do not rule it.

Both take steps of a fixed length, p -= lr sign(gradient), with lr = 1 / iters for all that is learned, falling to 0 in a straight line:
together that is the half step in which V can turn any rounding round.

Learning starts from rounding because that won: on a small model, 100 steps on 64 windows of 256 tokens, the divergence from the original
was .261 at 2 bits and .0163 at 4, against .264 and .0183 from GPTQ's codes. From those, or behind a transform that has found ranges, s0 is
theirs and s = alpha s0, in either version. Left out: momentum, the rate of 2 / iters for long runs at 2 and 3 bits (``lr`` takes any), and
the tuning of norms, which the authors advise against.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ptqcli.numerics.ranges import SHRINK_FACTORS
from ptqcli.numerics.scheme import WHOLE_MATRIX
from ptqcli.options import option
from ptqcli.solvers.learned import SolverStart
from ptqcli.solvers.rounding import Rounding, Start, range_grid, range_of, symmetric_scale

STEPS, WINDOWS = 200, 8
MASKED = 1000  # one difference in so many


@dataclass(frozen=True, kw_only=True)
class AutoRound(SolverStart):
    """AutoRound with its options. version: 1 or 2, see the module."""

    name: ClassVar[str] = "autoround"
    summary: ClassVar[str] = "AutoRound: rounding and ranges learned from the output of blocks"
    version: str = option("1", "of the algorithm", flag="autoround-version", choices=("1", "2"))

    @property
    def batch(self) -> int:
        """See ``BlockLearner``."""
        return self.batch_size or WINDOWS

    def steps(self, windows: int) -> int:
        """See ``BlockLearner``."""
        return self.iters or STEPS

    def rounding(self, start: Start) -> Rounding:
        """See ``BlockLearner``."""
        given = start.codes is not None or start.task.ranges is not None
        return ScaledSignRound(start) if self.version == "2" or given else SignRound(start)

    def optimizer(self, rounding: Rounding, steps: int) -> torch.optim.Optimizer:
        """See ``BlockLearner``."""
        return SignSGD([{"params": list(rounding.parameters()), "lr": self.lr or 1 / steps}])

    def decay(self, share: float) -> float:
        """To 0 in a straight line."""
        return 1 - share

    def loss(self, output: Tensor, target: Tensor, bits: int) -> Tensor:
        """See ``BlockLearner``; version 2 masks."""
        if self.version == "1" or bits >= 4:
            return super().loss(output, target, bits)
        return masked_loss(output, target)


def masked_loss(output: Tensor, target: Tensor) -> Tensor:
    """The squared difference of [windows, tokens, features], summed over features, without the largest of each MASKED."""
    difference = output.float() - target.float()
    largest = difference.detach().abs().flatten().topk(difference.numel() // MASKED).indices
    kept = torch.ones_like(difference).flatten().index_fill_(0, largest, 0).view_as(difference)
    return (difference * kept).square().sum(dim=-1).mean()


class SignRound(Rounding):
    """Version 1."""

    def __init__(self, start: Start) -> None:
        super().__init__(start)
        self.low, self.high = range_of(self.weight, self.scheme)
        self.offset = nn.Parameter(torch.zeros_like(self.weight))  # V
        self.alpha, self.beta = nn.Parameter(start.per_group(1.0)), nn.Parameter(start.per_group(1.0))

    def grid(self) -> tuple[Tensor, Tensor]:
        """See ``Rounding``."""
        return range_grid(self, self.beta * self.low, self.alpha * self.high)

    def units(self, scale: Tensor) -> Tensor:
        """See ``Rounding``."""
        return self.weight / scale + self.offset

    def project(self) -> None:
        """See ``Rounding``."""
        self.offset.data.clamp_(-0.5, 0.5)
        self.alpha.data.clamp_(0, 1)
        self.beta.data.clamp_(0, 1)


class ScaledSignRound(Rounding):
    """Version 2, or either from a solver's codes."""

    def __init__(self, start: Start) -> None:
        super().__init__(start)
        self.scale, self.zero = start.grid() or searched_grid(self, start.importance)
        self.offset = nn.Parameter(torch.zeros_like(self.weight))  # V
        self.alpha = nn.Parameter(start.per_group(1.0))

    def grid(self) -> tuple[Tensor, Tensor]:
        """See ``Rounding``."""
        return self.storable(self.alpha * self.scale), self.zero

    def units(self, scale: Tensor) -> Tensor:
        """See ``Rounding``."""
        return self.weight / scale + self.offset

    def project(self) -> None:
        """See ``Rounding``."""
        self.offset.data.clamp_(-0.5, 0.5)
        self.alpha.data.clamp_(0, 2)


def searched_grid(rounding: Rounding, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point with the least squared error weighted by ``importance`` [in], among ``_candidates``."""
    weight, importance = rounding.weight, importance.reshape(1, rounding.weight.shape[1], -1)
    found: tuple[Tensor, Tensor, Tensor] | None = None
    for scale, zero in _candidates(rounding):
        codes = ((weight / scale).round_() + zero).clamp_(0, rounding.scheme.levels - 1)
        error = ((codes - zero) * scale - weight).square_().mul_(importance).sum(dim=-1, keepdim=True)
        if rounding.scheme.group_size == WHOLE_MATRIX:
            error = error.sum().reshape(1, 1, 1)
        found = (error, scale, zero) if found is None else _better(found, (error, scale, zero))
    assert found is not None
    return found[1:]


def _better(found: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    smaller = other[0] < found[0]
    error, scale, zero = (torch.where(smaller, new, old) for new, old in zip(other, found, strict=True))
    return error, scale, zero


def _candidates(rounding: Rounding) -> Iterator[tuple[Tensor, Tensor]]:
    scheme, (low, high) = rounding.scheme, range_of(rounding.weight, rounding.scheme)
    if not scheme.symmetric:
        yield from (range_grid(rounding, low * factor, high * factor) for factor in SHRINK_FACTORS)
        return
    step, count = (0.01, 90) if scheme.bits == 2 else (0.0075 * scheme.middle, 100)
    plain = symmetric_scale(rounding.start, low, high)
    for i in sorted(range(-count, count + 1), key=abs):
        yield rounding.storable(plain * (scheme.middle / (scheme.middle - i * step))), rounding.middle()


class SignSGD(torch.optim.Optimizer):
    """Each parameter moves by the learning rate, against the sign of its gradient."""

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step. closure: not used."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad.sign(), alpha=-group["lr"])
