"""The table of algorithms: a name and the solver behind it.

A new solver is one file in ``solvers/`` and one entry here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ptqcli.errors import UsageError
from ptqcli.solvers import MatrixSolver, SolverOptions
from ptqcli.solvers.gptq import GPTQ
from ptqcli.solvers.rtn import RTN


@dataclass(frozen=True)
class Algorithm:
    """What ``--algo NAME`` stands for. solver: makes the solver from its options."""

    name: str
    summary: str
    solver: Callable[[SolverOptions], MatrixSolver]


ALGORITHMS = {
    entry.name: entry
    for entry in (
        Algorithm("rtn", "round to nearest, no calibration", lambda options: RTN(options.scale_search)),
        Algorithm(
            "gptq",
            "GPTQ: error feedback through the Hessian of the calibration inputs",
            lambda options: GPTQ(options.damp, options.act_order, options.static_groups, options.scale_search),
        ),
    )
}


def find_algorithm(name: str) -> Algorithm:
    """The algorithm called ``name``. Raises UsageError with the names that exist."""
    if name not in ALGORITHMS:
        raise UsageError(f"algorithm '{name}' is unknown; choose one of {', '.join(ALGORITHMS)}")
    return ALGORITHMS[name]
