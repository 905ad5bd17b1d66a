"""The table of algorithms, and how ``--algo`` is read.

An algorithm is a list of parts joined by ``+``: any number of transforms, which rewrite a block without changing what it computes, then one
solver, which chooses the codes (``rtn`` if none is named). ``llm-int8`` is a part that only says what the numbers are. A new part is one
file in ``transforms/`` or ``solvers/`` and one entry here; every combination follows from that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ptqcli.errors import UsageError
from ptqcli.solvers import MatrixSolver, SolverOptions
from ptqcli.solvers.gptq import GPTQ
from ptqcli.solvers.obq import OBQ
from ptqcli.solvers.rtn import RTN
from ptqcli.transforms import BlockTransform, TransformOptions
from ptqcli.transforms.awq import AWQ
from ptqcli.transforms.smoothquant import SmoothQuant


@dataclass(frozen=True)
class SchemeDefaults:
    """What the numbers are where the request does not say. wbits, abits: bits of weights and activations. outliers: none or dynamic."""

    wbits: int = 4
    abits: int = 16
    outliers: str = "none"


W8A8 = SchemeDefaults(wbits=8, abits=8)


@dataclass(frozen=True)
class Part:
    """One word of ``--algo``. transform, solver: makes it from its options; a part has one of them, or only its defaults."""

    name: str
    summary: str
    transform: Callable[[TransformOptions], BlockTransform] | None = None
    solver: Callable[[SolverOptions], MatrixSolver] | None = None
    defaults: SchemeDefaults | None = None


PARTS = {
    part.name: part
    for part in (
        Part("awq", "AWQ: channels scaled by what the inputs weigh, then ranges clipped", lambda options: AWQ(options.awq_clip)),
        Part(
            "smoothquant",
            "SmoothQuant: outliers moved from the activations into the weights",
            lambda options: SmoothQuant(options.smooth_alpha),
            defaults=W8A8,
        ),
        Part("llm-int8", "LLM.int8: outlier columns in 16 bit", defaults=SchemeDefaults(wbits=8, abits=8, outliers="dynamic")),
        Part("rtn", "round to nearest", solver=lambda options: RTN(options.scale_search)),
        Part(
            "gptq",
            "GPTQ: error feedback through the Hessian of the calibration inputs",
            solver=lambda options: GPTQ(options.damp, options.act_order, options.static_groups, options.scale_search),
        ),
        Part("obq", "OBQ: the least harmful weight first, row by row", solver=lambda options: OBQ(options.damp, options.scale_search)),
    )
}


@dataclass(frozen=True)
class Algorithm:
    """What ``--algo NAME`` stands for: parts in the order in which they work."""

    name: str
    transforms: tuple[Part, ...]
    solver: Part
    defaults: SchemeDefaults


def find_algorithm(name: str) -> Algorithm:
    """The algorithm called ``name``, such as ``gptq`` or ``awq+gptq``.

    Raises UsageError, naming the word, for an unknown part, one that stands twice, a second solver, or a transform after the solver.
    """
    words = name.split("+")
    for word in words:
        if word not in PARTS:
            raise UsageError(f"algorithm '{word}' is unknown; choose one of {', '.join(PARTS)}, or join several such as awq+gptq")
        if words.count(word) > 1:
            raise UsageError(f"algorithm '{name}': {word} stands twice; name each part once")
    parts = [PARTS[word] for word in words]
    solvers = [part for part in parts if part.solver is not None]
    if len(solvers) > 1:
        raise UsageError(f"algorithm '{name}': {' and '.join(part.name for part in solvers)} are both solvers; choose one of them")
    if solvers and parts[-1] is not solvers[0]:
        order = "+".join(part.name for part in sorted(parts, key=lambda part: part.solver is not None))
        raise UsageError(f"algorithm '{name}': the solver comes last; write {order}")
    return Algorithm(
        name=name,
        transforms=tuple(part for part in parts if part.transform is not None),
        solver=solvers[0] if solvers else PARTS["rtn"],
        defaults=_joined_defaults([part.defaults for part in parts if part.defaults is not None]),
    )


def _joined_defaults(found: list[SchemeDefaults]) -> SchemeDefaults:
    if not found:
        return SchemeDefaults()
    outliers = [defaults.outliers for defaults in found if defaults.outliers != "none"]
    return SchemeDefaults(found[0].wbits, found[0].abits, outliers[0] if outliers else "none")
