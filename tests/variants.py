"""Which of many variants of a test `make test` runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest


def some_slow(cases: Sequence[Any], every: int) -> list[Any]:
    """Parameters that differ in little: all but each ``every``-th are run by make test-slow alone."""
    return [case if number % every == 0 else pytest.param(case, marks=pytest.mark.slow) for number, case in enumerate(cases)]
