"""The table of algorithms: a name, the transforms that come first, and the solver that ends it.

A new solver is one file in ``solvers/`` and one entry here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ptqcli.errors import UsageError
from ptqcli.solvers import MatrixSolver
from ptqcli.solvers.gptq import GPTQ
from ptqcli.solvers.rtn import RTN

if TYPE_CHECKING:
    from ptqcli.recipe import Recipe


@dataclass(frozen=True)
class Algorithm:
    """What ``--algo NAME`` stands for. solver: makes the solver from the options of a recipe."""

    name: str
    summary: str
    solver: Callable[[Recipe], MatrixSolver]


ALGORITHMS = {
    entry.name: entry
    for entry in (
        Algorithm("rtn", "round to nearest, no calibration", lambda recipe: RTN(recipe.scale_search)),
        Algorithm(
            "gptq",
            "GPTQ: error feedback through the Hessian of the calibration inputs",
            lambda recipe: GPTQ(recipe.damp, recipe.act_order, recipe.static_groups, recipe.scale_search),
        ),
    )
}


def find_algorithm(name: str) -> Algorithm:
    """The algorithm called ``name``. Raises UsageError with the names that exist."""
    if name not in ALGORITHMS:
        raise UsageError(f"algorithm '{name}' is unknown; choose one of {', '.join(ALGORITHMS)}")
    return ALGORITHMS[name]
