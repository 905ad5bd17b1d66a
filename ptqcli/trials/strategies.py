"""In which order recipes are tried.

    basic        recipes of the space, bisected by size; then kinds of linears (all down_proj) fall back to the next larger scheme, those
                 with the largest errors first, until the goal is kept; then the ones that are not needed are taken back
    mse          the same with the groups of linears of each block in place of kinds: the worst fall back, the least needed are taken back
    hawq         as mse, in the order of HAWQ-V2: mean Hessian trace times squared error of the weights
    exhaustive   all recipes of the space from the smallest on; the first that keeps the goal is the cheapest
    random       recipes of the space in a random order, but for those that are larger than one that keeps the goal

The first two follow what Neural Compressor calls by these names (its basic, mse_v2 and hawq_v2 strategies), but ask for the smallest
checkpoint that keeps the goal, not for the first that does. Bisection takes for granted that more bits lose less.
"""

from __future__ import annotations

import random as generators
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Protocol

from ptqcli.trials.mixtures import Group
from ptqcli.trials.space import Candidate
from ptqcli.trials.trial import Trial

BISECTIONS = 4  # of how many groups fall back, before what is not needed is taken back
# Where one recipe loses more than so many times what is allowed, others of its size are not tried: they halve the loss at best.
HOPELESS = 2.5


class BudgetSpent(Exception):
    """No further trial is allowed."""


class Search(Protocol):
    """What a strategy asks for. candidates: the space, from the smallest on. seed: of whatever is random."""

    candidates: Sequence[Candidate]
    seed: int

    def run(self, candidate: Candidate) -> Trial:
        """Quantize and measure it, unless that was done. Raises BudgetSpent."""

    def smaller(self, candidate: Candidate) -> bool:
        """Whether it is smaller than all that keep the goal so far."""

    def groups(self, low: Candidate) -> list[Group]:
        """The groups of linears that have one scheme each."""

    def mixture(self, low: Candidate, high: Candidate | None, raised: Sequence[Group]) -> Candidate | None:
        """``low`` with some groups as in ``high``, None for 16 bit; None where that cannot be, which is told."""

    def traces(self, low: Candidate) -> Mapping[str, float]:
        """HAWQ-V2's sensitivity of each linear in the scheme of ``low``, by its path."""


def basic(search: Search) -> None:
    """Kinds of linears fall back."""
    _between(search, _by_kind)


def mse(search: Search) -> None:
    """Groups of linears fall back, in the order of their errors."""
    _between(search, lambda search, low: _sorted(search.groups(low), search.run(low).errors))


def hawq(search: Search) -> None:
    """Groups of linears fall back, in the order of their traces."""
    _between(search, lambda search, low: _sorted(search.groups(low), search.traces(low)))


def exhaustive(search: Search) -> None:
    """All of them, from the smallest on."""
    for candidate in search.candidates:
        if search.run(candidate).holds:
            return


def random(search: Search) -> None:
    """Any of them that may be better than the best so far."""
    order = list(search.candidates)
    generators.Random(search.seed).shuffle(order)
    for candidate in order:
        if search.smaller(candidate):
            search.run(candidate)


STRATEGIES: Mapping[str, Callable[[Search], None]] = {
    "basic": basic,
    "mse": mse,
    "hawq": hawq,
    "exhaustive": exhaustive,
    "random": random,
}

# What falls back together, what needs it most first.
Order = Callable[[Search, Candidate], "list[list[Group]]"]


def _sorted(groups: Sequence[Group], scores: Mapping[str, float]) -> list[list[Group]]:
    def score(group: Group) -> float:
        return sum(scores.get(name, 0.0) for name in group.linears) / len(group.linears)

    return [[group] for group in sorted(groups, key=score, reverse=True)]


def _by_kind(search: Search, low: Candidate) -> list[list[Group]]:
    errors, kinds = search.run(low).errors, dict[str, list[Group]]()
    for group in search.groups(low):
        kinds.setdefault(group.kind, []).append(group)

    def score(groups: Sequence[Group]) -> float:
        names = [name for group in groups for name in group.linears]
        return sum(errors.get(name, 0.0) for name in names) / len(names)

    return sorted(kinds.values(), key=score, reverse=True)


def _between(search: Search, order: Order) -> None:
    """The smallest recipe that keeps the goal, and what lies between it and the one below."""
    low, high = _bracket(search)
    if low is None:
        return
    parts = order(search, low)
    raised = _fall_back(search, low, high, parts)
    if raised is not None:
        _take_back(search, low, high, raised)


def _bracket(search: Search) -> tuple[Candidate | None, Candidate | None]:
    """By bisection the smallest size at which a recipe keeps the goal, and the one below, at which none does; None for neither."""
    levels = [list(same) for _, same in groupby(search.candidates, key=lambda candidate: candidate.bytes)]
    failing: tuple[int, Candidate | None] = (-1, None)
    holding: tuple[int, Candidate | None] = (len(levels), None)
    while holding[0] - failing[0] > 1:
        middle = (holding[0] + failing[0]) // 2
        candidate, holds = _tried(search, levels[middle])
        if holds:
            holding = (middle, candidate)
        else:
            failing = (middle, candidate)
    return failing[1], holding[1]


def _tried(search: Search, level: Sequence[Candidate]) -> tuple[Candidate, bool]:
    """The first recipe of a size that keeps the goal, or the one that is nearest to it."""
    nearest = level[0]
    for candidate in level:
        trial = search.run(candidate)
        if trial.holds:
            return candidate, True
        if trial.distance < search.run(nearest).distance:
            nearest = candidate
        if search.run(nearest).distance > HOPELESS:
            break
    return nearest, False


def _fall_back(search: Search, low: Candidate, high: Candidate | None, parts: list[list[Group]]) -> list[list[Group]] | None:
    """By bisection the fewest of ``parts``, from the first on, that have to be as in ``high``; None where a mixture cannot be, or holds
    nowhere."""
    fails, holds, found = 0, len(parts), False
    for _ in range(BISECTIONS):
        if holds - fails <= 1:
            break
        middle = (fails + holds) // 2
        mixture = search.mixture(low, high, [group for part in parts[:middle] for group in part])
        if mixture is None:
            return None
        if not search.smaller(mixture):
            holds = middle  # no gain from here on
        elif search.run(mixture).holds:
            holds, found = middle, True
        else:
            fails = middle
    return parts[:holds] if found else None


def _take_back(search: Search, low: Candidate, high: Candidate | None, raised: list[list[Group]]) -> None:
    """Leave out of ``raised`` what the goal is kept without: the least needed quarter, then an eighth, down to one by one."""
    kept, open_until, batch = list(raised), len(raised), max(1, len(raised) // 4)
    while open_until > 0:
        batch = min(batch, open_until)
        tried = kept[: open_until - batch] + kept[open_until:]
        mixture = search.mixture(low, high, [group for part in tried for group in part])
        if mixture is None:
            return
        if search.run(mixture).holds:
            kept, open_until = tried, open_until - batch
        elif batch > 1:
            batch //= 2
        else:
            open_until -= 1
