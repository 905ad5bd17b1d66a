"""Bits under a budget: for each group of linears one of its candidates, so that the losses add up to the least that fits.

The multiple-choice knapsack problem (Kellerer, Pferschy & Pisinger 2004, "Knapsack Problems", chapter 11): with bytes b and losses l of
group g's candidates

    minimise  sum_g l[g, x_g]    subject to  sum_g b[g, x_g] <= budget

solved exactly by dynamic programming over groups. After some groups the states are pairs (bytes, loss) of what can be chosen for them, of
which only the Pareto front is kept: a state that takes no fewer bytes and loses no less than another leads to nothing better. Bytes
are counted above each group's smallest candidate and in units of their greatest common divisor. A state is dropped, too, if the best that
can follow it loses more than a choice that is known already. Both sides of that come from the linear relaxation of the groups that are
left, in which a group may be part one candidate and part the next on the lower convex hull of its points: its steps are taken in the order
of what each saves for a byte (Sinha & Zoltners 1979). That bound is compared with room for the last digits of sums of floats, so no optimum
is lost.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from ptqcli.errors import UsageError

ROOM = 1e-9  # of all losses, that sums of floats may be wrong by


@dataclass(frozen=True)
class Choice:
    """A candidate of a group. nbytes: that it takes. loss: what it costs, in any unit."""

    nbytes: int
    loss: float


@dataclass(frozen=True)
class _State:
    """What can be chosen for the groups so far: units of bytes, loss, the last group's candidate, and the state before it."""

    units: int
    loss: float
    taken: int = -1
    before: _State | None = None


@dataclass(frozen=True)
class _Rest:
    """The linear relaxation of some groups, from their smallest candidates on.

    units, losses: after each of the steps, in their order, both from 0 units on.
    """

    units: list[int]
    losses: list[float]

    def bound(self, room: int) -> float:
        """The least that these groups can lose within ``room`` units, if they may take parts of candidates."""
        place = bisect_right(self.units, room) - 1
        if place + 1 == len(self.units):
            return self.losses[place]
        share = (room - self.units[place]) / (self.units[place + 1] - self.units[place])
        return self.losses[place] + share * (self.losses[place + 1] - self.losses[place])

    def reached(self, room: int) -> float:
        """What they lose after the whole steps that fit in their order: some choice does no worse."""
        return self.losses[bisect_right(self.units, room) - 1]


def allocate(groups: Sequence[Sequence[Choice]], budget: int) -> list[int]:
    """The number of the candidate of each group whose losses add up to the least within ``budget`` bytes.

    Of several such choices one with the fewest bytes is taken, always the same for the same numbers. Raises UsageError for a budget below
    the smallest choice, which it names, for a group without candidates, and for losses or sizes that are no numbers.
    """
    _check(groups)
    least = [min(choice.nbytes for choice in group) for group in groups]
    if budget < sum(least):
        raise UsageError(f"a budget of {budget:,} bytes cannot be kept: the smallest choice takes {sum(least):,} bytes")
    unit = math.gcd(*(choice.nbytes - low for group, low in zip(groups, least, strict=True) for choice in group)) or 1
    fronts = [_front(group, low, unit) for group, low in zip(groups, least, strict=True)]
    return _chosen(_best([[(units, loss) for units, loss, _ in front] for front in fronts], (budget - sum(least)) // unit), fronts)


def _check(groups: Sequence[Sequence[Choice]]) -> None:
    for number, group in enumerate(groups):
        if not group:
            raise UsageError(f"group {number} has no candidates")
        for choice in group:
            if not math.isfinite(choice.loss):
                raise UsageError(f"group {number}: a loss of {choice.loss} is no number to add up")
            if choice.nbytes < 0:
                raise UsageError(f"group {number}: a size of {choice.nbytes} bytes is not valid")


def _front(group: Sequence[Choice], least: int, unit: int) -> list[tuple[int, float, int]]:
    """(units, loss, number) of the candidates that no other beats, by rising size."""
    kept: list[tuple[int, float, int]] = []
    for nbytes, loss, number in sorted((choice.nbytes, choice.loss, number) for number, choice in enumerate(group)):
        if not kept or loss < kept[-1][1]:
            kept.append(((nbytes - least) // unit, loss, number))
    return kept


def _chosen(state: _State | None, fronts: Sequence[Sequence[tuple[int, float, int]]]) -> list[int]:
    taken: list[int] = []
    while state is not None and state.before is not None:
        taken.append(state.taken)
        state = state.before
    return [front[place][2] for front, place in zip(fronts, reversed(taken), strict=True)]


def _best(fronts: Sequence[Sequence[tuple[int, float]]], room: int) -> _State:
    """The state behind all groups with the least loss within ``room`` units."""
    rests = _rests(fronts)
    slack = ROOM * sum(abs(loss) for front in fronts for _, loss in front)
    known = rests[0].reached(room)
    states = [_State(0, 0.0)]
    for front, rest in zip(fronts, rests[1:], strict=True):
        found = sorted(
            (
                _State(state.units + units, state.loss + loss, place, state)
                for state in states
                for place, (units, loss) in enumerate(front)
                if state.units + units <= room
            ),
            key=lambda state: (state.units, state.loss),
        )
        states, least = [], math.inf
        for state in found:
            if state.loss < least:
                least = state.loss
                known = min(known, state.loss + rest.reached(room - state.units))
                states.append(state)
        states = [state for state in states if state.loss + rest.bound(room - state.units) <= known + slack]
    return min(states, key=lambda state: (state.loss, state.units))


def _rests(fronts: Sequence[Sequence[tuple[int, float]]]) -> list[_Rest]:
    """The relaxation of all groups from each number on; the last is that of none."""
    steps: list[tuple[float, int, float]] = []  # (saved for a unit, negative; units; change of the loss)
    start, rests = 0.0, [_Rest([0], [0.0])]
    for front in reversed(fronts):
        hull = _hull(front)
        start += hull[0][1]
        steps += [
            ((after[1] - before[1]) / (after[0] - before[0]), after[0] - before[0], after[1] - before[1])
            for before, after in pairwise(hull)
        ]
        steps.sort()
        units = list(accumulate((step[1] for step in steps), initial=0))
        losses = list(accumulate((step[2] for step in steps), initial=start))
        rests.append(_Rest(units, losses))
    return rests[::-1]


def _hull(front: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The points of a Pareto front on its lower convex hull."""
    hull: list[tuple[int, float]] = []
    for point in front:
        while len(hull) > 1 and _slope(hull[-2], point) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    return hull


def _slope(one: tuple[int, float], other: tuple[int, float]) -> float:
    return (other[1] - one[1]) / (other[0] - one[0])
