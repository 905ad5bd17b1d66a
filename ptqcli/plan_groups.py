"""Group sizes in a plan: which linears have none, sizes that do not divide, and what is said of sizes that were chosen by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ptqcli.budget import fitted
from ptqcli.errors import UsageError
from ptqcli.estimate import PlannedLinear
from ptqcli.model.discovery import listed
from ptqcli.model.linears import LinearSite
from ptqcli.numerics.blocks import LEGACY_BLOCK
from ptqcli.numerics.scheme import AUTO_GROUP, AUTO_GROUPS, Scheme
from ptqcli.patterns import Hits
from ptqcli.recipe import AUTO, Override, Recipe


def too_narrow(scheme: Scheme, site: LinearSite) -> str | None:
    """Why a linear stays as it is although nobody asked for it: scales would take more than its codes save, or no group divides it."""
    columns = site.in_features
    if scheme.blocks is not None and columns % LEGACY_BLOCK:
        return f"no blocks divide its {columns} input features"
    try:
        scheme.resolved(columns)
    except UsageError as error:
        return str(error)
    fits = scheme.group_size > 0 and columns % scheme.group_size == 0
    return f"has {columns} input features only" if columns < AUTO_GROUPS[-1] and not fits else None


def standing_in(scheme: Scheme, columns: int) -> Scheme:
    """What stands for a candidate while a budget is not shared out: with groups that divide the columns; where none do, ``too_narrow`` says
    so."""
    try:
        return fitted(scheme, columns)
    except UsageError:
        return scheme if scheme.blocks is not None else replace(scheme, group_size=AUTO_GROUP)


def check_groups(linears: Sequence[PlannedLinear], recipe: Recipe, hits: Hits) -> None:
    """Raise UsageError for groups that do not divide a linear's input features, with what to give so that all linears have groups."""
    wrong: dict[tuple[int, int], list[str]] = {}
    for linear in linears:
        columns = linear.site.in_features
        if columns % linear.scheme.columns_per_group(columns):
            wrong.setdefault((linear.scheme.group_size, columns), []).append(linear.name)
    if not wrong:
        return
    reasons = ", and ".join(
        f"group size {size} does not divide the {columns} input features of {listed(names, 1)}" for (size, columns), names in wrong.items()
    )
    sources = dict.fromkeys(_group_source(recipe, name, hits) for names in wrong.values() for name in names)
    advice = [
        _group_advice(linears, recipe, hits) if source is None else f"group=auto in the override '{source.pattern}'" for source in sources
    ]
    raise UsageError(f"{reasons}; use {' and '.join(advice)}")


def _group_source(recipe: Recipe, name: str, hits: Hits) -> Override | None:
    """The override that says the group size of the linear ``name``, None where the recipe does."""
    saying = [override for override in recipe.overrides if override.group_size is not None and name in hits[override.pattern]]
    return saying[-1] if saying else None


def _group_advice(linears: Sequence[PlannedLinear], recipe: Recipe, hits: Hits) -> str:
    """What to give in place of the recipe's group size so that every linear has groups."""
    chosen = recipe.default_scheme
    advice = f"--group-size {AUTO}" if recipe.scheme is None else f"--scheme {replace(chosen, group_size=AUTO_GROUP)}"
    widths = {linear.site.in_features for linear in linears if _group_source(recipe, linear.name, hits) is None}
    common = next((size for size in chosen.auto_groups if not any(width % size for width in widths)), None)
    if common is None:
        return advice
    return f"{advice} or " + (f"--group-size {common}" if recipe.scheme is None else f"--scheme {replace(chosen, group_size=common)}")


def group_notes(linears: Sequence[PlannedLinear], recipe: Recipe, hits: Hits) -> list[str]:
    """Where the group size that is chosen by itself is not the usual one."""
    widths: dict[int, set[int]] = {}
    for linear in linears if recipe.budget is None else ():  # which says what its candidates become
        if recipe.default_scheme.group_size == AUTO_GROUP and _group_source(recipe, linear.name, hits) is None:
            widths.setdefault(linear.scheme.group_size, set()).add(linear.site.in_features)
    usual = recipe.default_scheme.auto_groups[0]
    widths.pop(usual, None)
    return [
        f"groups of {size} columns in the linears of {' and '.join(map(str, sorted(widths[size])))} input features, "
        f"which {usual} does not divide"
        for size in sorted(widths, reverse=True)
        if size > 0
    ]
