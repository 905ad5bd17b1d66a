"""Recipes between two: some groups of linears as in the larger one, the others as in the smaller one.

A group is what servers run as one matrix (q, k and v; gate and up), all experts of a block, or a linear by itself: it has one scheme.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ptqcli.errors import UsageError
from ptqcli.estimate import expert_linears
from ptqcli.model.skeleton import Skeleton
from ptqcli.numerics.scheme import Scheme
from ptqcli.plan import Plan
from ptqcli.recipe import Override


@dataclass(frozen=True)
class Group:
    """Linears that have one scheme, by their paths in the model."""

    linears: tuple[str, ...]
    kind: str  # the last parts of the names of its linears, the same in every block


def groups_of(plan: Plan, skeleton: Skeleton) -> list[Group]:
    """The groups of all quantized linears in the blocks, in running order."""
    names = [linear.name for linear in plan.linears if not linear.spec.outside]
    together = {name: group for group in plan.fused_groups for name in group}
    experts: dict[int, list[str]] = {}
    for linear in expert_linears(plan.linears, skeleton):
        experts.setdefault(linear.site.block, []).append(linear.name)
    together |= {name: tuple(group) for group in experts.values() for name in group}
    found: dict[tuple[str, ...], None] = {}
    for name in names:
        found[tuple(each for each in together.get(name, (name,)) if each in set(names))] = None
    prefixes = [f"{skeleton.block_prefix(index)}." for index in range(len(skeleton.blocks))]
    return [Group(group, _kind(group, prefixes)) for group in found]


def _kind(group: Sequence[str], prefixes: Sequence[str]) -> str:
    local = [name.removeprefix(next((each for each in prefixes if name.startswith(each)), "")) for name in group]
    return "|".join(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in local))


def overrides(groups: Iterable[Group], schemes: Mapping[str, Scheme]) -> tuple[Override, ...]:
    """What gives the linears of ``groups`` their ``schemes``; one that has none stays in 16 bit.

    Raises UsageError for a scheme that cannot be given to some linears alone.
    """
    return tuple(_override(name, schemes.get(name)) for group in groups for name in group.linears)


def _override(name: str, scheme: Scheme | None) -> Override:
    pattern = f"^{re.escape(name)}$"
    if scheme is None:
        return Override(pattern, skip=True)
    if scheme.codebook is not None or scheme.blocks is not None or scheme.outliers is not None:
        raise UsageError(f"{name}: {scheme} cannot be given to some linears alone")
    activations = 16 if scheme.activations is None else scheme.activations.bits
    return Override(pattern, bits=scheme.bits, group_size=scheme.group_size, symmetric=scheme.symmetric, abits=activations)
