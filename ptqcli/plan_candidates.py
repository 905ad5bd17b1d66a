"""The groups of linears that get one scheme together under a budget, and what each candidate would make of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from ptqcli.budget import fitted
from ptqcli.errors import UsageError
from ptqcli.estimate import PlannedLinear
from ptqcli.formats import Format, LinearSpec, find_format
from ptqcli.model.linears import LinearSite
from ptqcli.model.skeleton import Skeleton
from ptqcli.numerics.scheme import Scheme
from ptqcli.patterns import found
from ptqcli.plan import Plan
from ptqcli.plan_parallel import columns_of_a_part
from ptqcli.plan_specs import spec_in, unstorable
from ptqcli.recipe import Recipe
from ptqcli.sensitivity.groups import Group

MOST_NAMED = 4  # linears in the name of a group


def free_linears(plan: Plan, skeleton: Skeleton) -> list[PlannedLinear]:
    """The linears that get a candidate: all in the blocks but those whose scheme an override says. Raises UsageError if there is none."""
    names = [site.name for site in skeleton.linears]
    overrides = [override for override in plan.recipe.overrides if not override.skip]
    hits = found([override.pattern for override in overrides], names)
    pinned = set().union(*(hits[override.pattern] for override in overrides))
    free = [linear for linear in plan.linears if not linear.spec.outside and linear.name not in pinned]
    if not free:
        raise UsageError("no linear is left to choose a scheme for: overrides say those of all; leave them or the budget out")
    return free


def candidate_groups(linears: Sequence[PlannedLinear], skeleton: Skeleton, recipe: Recipe, candidates: Sequence[Scheme]) -> list[Group]:
    """``linears`` in groups that get one scheme, in running order.

    Raises UsageError, with the reason, for a candidate that no group can have, and for a group that can have none.
    """
    chosen = find_format(recipe.format)
    reasons: dict[Scheme, str] = {}
    groups: list[Group] = []
    for members in _grouped([linear.site for linear in linears], skeleton):
        options: list[tuple[LinearSpec, ...] | None] = []
        for scheme in candidates:
            try:
                options.append(tuple(_spec(scheme, site, recipe, chosen, skeleton) for site in members))
            except UsageError as error:
                reasons.setdefault(scheme, str(error))
                options.append(None)
        groups.append(Group(name=_name(members), block=members[0].block, sites=tuple(members), options=tuple(options)))
    for number, scheme in enumerate(candidates):
        if all(group.options[number] is None for group in groups):
            raise UsageError(f"candidate {scheme}: {reasons[scheme]}; leave it out of --candidates")
    for group in groups:
        if not any(group.options):
            raise UsageError(
                f"{group.name}: none of the candidates {', '.join(map(str, candidates))} suits it: {next(iter(reasons.values()))}"
            )
    return groups


def usable_candidates(linears: Sequence[PlannedLinear], skeleton: Skeleton, recipe: Recipe, candidates: Sequence[Scheme]) -> list[Scheme]:
    """Those of ``candidates``, which nobody asked for, that some linear can have. Raises UsageError where nothing is left to choose."""
    chosen, sites = find_format(recipe.format), [linear.site for linear in linears]
    found = [scheme for scheme in candidates if any(_can_be(scheme, site, recipe, chosen, skeleton) for site in sites)]
    if len(found) < 2:
        held = f"{found[0]} alone" if found else "none"
        raise UsageError(f"format {recipe.format} holds {held} of {', '.join(map(str, candidates))}; give --candidates that it holds")
    return found


def _can_be(scheme: Scheme, site: LinearSite, recipe: Recipe, chosen: Format, skeleton: Skeleton) -> bool:
    try:
        _spec(scheme, site, recipe, chosen, skeleton)
    except UsageError:
        return False
    return True


def fitting_notes(groups: Sequence[Group], candidates: Sequence[Scheme]) -> list[str]:
    """What a candidate becomes where its groups do not divide a linear, and where it cannot be had."""
    notes = []
    for number, scheme in enumerate(candidates):
        others: dict[Scheme, set[int]] = {}
        for spec in (spec for group in groups for spec in group.options[number] or ()):
            if scheme.group_size > 0 and spec.scheme != scheme:
                others.setdefault(spec.scheme, set()).add(spec.in_features)
        notes += [
            f"candidate {scheme} is {other} in linears of {' and '.join(map(str, sorted(widths)))} input features"
            for other, widths in others.items()
        ]
        lacking = [group.name for group in groups if group.options[number] is None]
        if lacking:
            notes.append(f"candidate {scheme} does not suit {lacking[0]}{f' and {len(lacking) - 1} more groups' if lacking[1:] else ''}")
    return notes


def _spec(scheme: Scheme, site: LinearSite, recipe: Recipe, chosen: Format, skeleton: Skeleton) -> LinearSpec:
    """The linear in a candidate. Raises UsageError where it cannot be."""
    columns = columns_of_a_part(site, skeleton, recipe.for_tensor_parallel)
    spec = spec_in(fitted(scheme, columns), site, recipe, chosen, skeleton)
    spec.scheme.group_count(site.in_features)
    reason = unstorable(spec, chosen)
    if reason is not None:
        raise UsageError(f"{site.name}: {reason}")
    return spec


def _grouped(sites: Sequence[LinearSite], skeleton: Skeleton) -> list[list[LinearSite]]:
    """Those that servers run as one matrix, and all experts of a block, together."""
    owner = {site.name: site.name for site in sites}

    def root(name: str) -> str:
        while owner[name] != name:
            name = owner[name]
        return name

    for group in (*skeleton.fused_groups, *_experts(skeleton)):
        _join([name for name in group if name in owner], owner, root)
    members: dict[str, list[LinearSite]] = {}
    for site in sites:
        members.setdefault(root(site.name), []).append(site)
    return list(members.values())


def _join(names: Sequence[str], owner: dict[str, str], root: Callable[[str], str]) -> None:
    for name in names[1:]:
        owner[root(name)] = root(names[0])


def _experts(skeleton: Skeleton) -> list[list[str]]:
    """The linears of all experts of each block, which servers store as one."""
    found = []
    for index, shape in enumerate(skeleton.shapes):
        locals_ = [local for mixture in shape.mixtures for alike in mixture.alike for local in alike]
        found.append([f"{skeleton.block_prefix(index)}.{local}" for local in locals_])
    return found


def _name(members: Sequence[LinearSite]) -> str:
    """For people: the first path, and the last parts of the others."""
    first, *others = (site.name for site in members)
    if len(members) > MOST_NAMED:
        return f"{first} and {len(others)} more"
    return "|".join([first, *(name.rpartition(".")[2] for name in others)])


def bytes_of(linears: Sequence[PlannedLinear], chosen: Format, but: Collection[str] = ()) -> int:
    """What quantized linears take as they are planned, those named ``but`` left out."""
    return sum(chosen.stored_bytes(linear.spec) for linear in linears if linear.name not in but)
