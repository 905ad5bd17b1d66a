"""What one command line answers; conftest.py has the fixture that runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str


Ptq = Callable[..., Answer]


def one_line(answer: Answer) -> str:
    """The error, which must be the last line, without a traceback."""
    assert "Traceback" not in answer.err
    last = answer.err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert answer.err.count("error: ") == 1
    return last
