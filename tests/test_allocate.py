"""Bits under a budget, against every possible choice."""

from __future__ import annotations

import math
import random
from itertools import product

import pytest

from ptqcli.allocate import Choice, allocate
from ptqcli.errors import UsageError

Groups = list[list[Choice]]


def random_groups(seed: int) -> tuple[Groups, int]:
    """Up to 6 groups of up to 5 candidates, and a budget that some choice keeps. Losses are whole numbers, whose sums are exact."""
    dice = random.Random(seed)
    unit = dice.choice([1, 2, 96])
    groups = [
        [Choice(unit * dice.randrange(1, 60), float(dice.randrange(0, 40))) for _ in range(dice.randrange(1, 6))]
        for _ in range(dice.randrange(1, 7))
    ]
    least, most = (sum(pick(choice.nbytes for choice in group) for group in groups) for pick in (min, max))
    return groups, dice.randint(least, most)


def totals(groups: Groups, taken: list[int]) -> tuple[int, float]:
    chosen = [group[number] for group, number in zip(groups, taken, strict=True)]
    return sum(choice.nbytes for choice in chosen), sum(choice.loss for choice in chosen)


def least_loss(groups: Groups, budget: int) -> tuple[float, int]:
    """Of all choices that keep the budget the least loss, and the fewest bytes that have it."""
    every = (totals(groups, list(taken)) for taken in product(*(range(len(group)) for group in groups)))
    return min((loss, nbytes) for nbytes, loss in every if nbytes <= budget)


@pytest.mark.parametrize("seed", range(300))
def test_equals_every_choice_tried(seed: int) -> None:
    groups, budget = random_groups(seed)
    nbytes, loss = totals(groups, allocate(groups, budget))
    assert nbytes <= budget
    assert (loss, nbytes) == least_loss(groups, budget)


def large(groups: int, seed: int) -> Groups:
    """As of a model: sizes of 2, 3, 4, 5 and 8 bits with scales, losses that fall with them, each group in its own measure."""
    dice = random.Random(seed)
    made = []
    for _ in range(groups):
        weights, sensitivity = dice.choice([576 * 960, 576 * 576, 576 * 3072, 1536 * 576]), math.exp(dice.gauss(0, 1.5))
        made.append(
            [
                Choice(weights * bits // 8 + weights // 64, sensitivity * 4.0**-bits * math.exp(dice.gauss(0, 0.3)))
                for bits in (2, 3, 4, 5, 8)
            ]
        )
    return made


@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 0.9])
def test_hundreds_of_groups_come_within_a_step_of_the_bound_of_the_relaxation(share: float) -> None:
    groups = large(400, seed=7)
    least, most = (sum(pick(choice.nbytes for choice in group) for group in groups) for pick in (min, max))
    budget = int(least + share * (most - least))
    taken = allocate(groups, budget)
    nbytes, loss = totals(groups, taken)
    assert nbytes <= budget
    assert taken == allocate(groups, budget)
    # Lagrange: for any price of a byte no choice within the budget loses less than this.
    prices = [10.0**exponent * step for exponent in range(-16, 0) for step in (1, 1.5, 2, 3, 4, 6, 8)]
    bound = max(sum(min(c.loss + price * c.nbytes for c in group) for group in groups) - price * budget for price in prices)
    assert bound <= loss <= 1.02 * bound


def test_odd_sizes_of_many_groups_are_no_trouble() -> None:
    """Sizes without a common divisor give as many sums as there are choices."""
    dice = random.Random(3)
    groups = [[Choice(dice.randrange(10**6, 10**8), dice.random()) for _ in range(5)] for _ in range(200)]
    budget = sum(sorted(choice.nbytes for choice in group)[2] for group in groups)
    assert totals(groups, allocate(groups, budget))[0] <= budget


def test_the_budget_is_kept_to_the_byte() -> None:
    groups = [[Choice(100, 5.0), Choice(201, 1.0)], [Choice(100, 5.0), Choice(203, 0.5)]]
    assert allocate(groups, 303) == [0, 1]
    assert allocate(groups, 302) == [1, 0]
    assert allocate(groups, 300) == [0, 0]
    assert allocate(groups, 404) == [1, 1]


def test_a_budget_that_nothing_keeps_names_the_smallest_that_can_be() -> None:
    with pytest.raises(UsageError, match=r"budget of 1,999 bytes cannot be kept: the smallest choice takes 2,000 bytes"):
        allocate([[Choice(1000, 1.0), Choice(2000, 0.0)], [Choice(1000, 1.0)]], 1999)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_losses_are_numbers(loss: float) -> None:
    with pytest.raises(UsageError, match="group 1: a loss of"):
        allocate([[Choice(1, 0.0)], [Choice(1, loss)]], 10)


def test_a_group_has_candidates() -> None:
    with pytest.raises(UsageError, match="group 0 has no candidates"):
        allocate([[]], 10)
