"""The option that all solvers here share: how the range of a group is found, see ``ptqcli.numerics.grids``."""

from __future__ import annotations

from typing import Any

from ptqcli.numerics.grids import SEARCHES
from ptqcli.options import option


def scale_search_option() -> Any:
    """The field of a solver that fits grids."""
    return option("mse", "how a group's scale is fitted", choices=tuple(SEARCHES))
