"""2,000 mutated inputs over everything that reads a file of somebody else; `make fuzz` tries 20,000. What is allowed: see ``run``."""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from run import Tally, _one_child, fuzz, table


@pytest.fixture(scope="module")
def tallies() -> dict[str, Tally]:
    return fuzz(2_000)


def test_every_input_gives_the_right_result_or_one_line_that_names_it(tallies: dict[str, Tally]) -> None:
    unexpected = [f"{name} {number}: {text}" for name, tally in tallies.items() for number, text in tally.unexpected.items()]
    assert unexpected == [], table(tallies)


def test_every_reader_reads_what_is_right_and_refuses_something(tallies: dict[str, Tally]) -> None:
    assert [name for name, tally in tallies.items() if not (tally.counts["right"] and tally.counts["refused"])] == []


def test_what_is_not_allowed_is_found() -> None:
    tally = Tally()
    tally.add(1, "right", 0.1, 0, "")
    tally.add(2, "unexpected", 0.1, 0, "Traceback")
    tally.add(3, "right", 0.1, 600 << 20, "")
    tally.add(4, "hang", 0.0, 0, "hang")
    tally.add(5, "right", 11.0, 0, "")
    assert sorted(tally.unexpected) == [2, 3, 4, 5]


def test_a_process_that_dies_is_told_with_its_input() -> None:
    tallies: dict[str, Tally] = defaultdict(Tally)
    assert _one_child([("no such reader", 7), ("recipe", 0)], tallies) == 1
    assert tallies["no such reader"].unexpected == {7: "died"}
