"""The output head and the embedding in a plan: they stand outside the blocks, and are quantized only when somebody asks for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from ptqcli.errors import UsageError
from ptqcli.estimate import PlannedLinear
from ptqcli.formats import Format, LinearSpec, no_place
from ptqcli.model.linears import EMBEDDING, LinearSite, linear_weight
from ptqcli.model.skeleton import Skeleton
from ptqcli.numerics.ranges import takes_sign
from ptqcli.numerics.scheme import Scheme
from ptqcli.patterns import Hits, found
from ptqcli.recipe import Recipe
from ptqcli.solvers.per_matrix import PerMatrix, as_block_solver

NAMED = {"lm-head": "output head", "embeddings": "embedding"}


def planned_outside(recipe: Recipe, skeleton: Skeleton, chosen: Format) -> list[PlannedLinear]:
    """The embedding and the head, as far as the recipe gives them schemes.

    Raises UsageError for one that the model does not have, or the format does not hold.
    """
    planned = []
    for option, scheme, module in _asked(recipe, skeleton):
        name = next((name for name, found in skeleton.model.named_modules() if found is module), None)
        if module is None or name is None or not isinstance(module, nn.Linear | nn.Embedding):
            raise UsageError(f"{skeleton.where}: has no {NAMED[option]} that could be quantized; leave --{option} out")
        reason = no_place(chosen)
        if reason is not None:
            raise UsageError(f"{name}: {reason}; leave --{option} out")
        planned.append(_planned(name, module, scheme, recipe, skeleton, chosen))
    return planned


def _asked(recipe: Recipe, skeleton: Skeleton) -> Iterator[tuple[str, Scheme, nn.Module | None]]:
    model = skeleton.model
    if recipe.embedding_scheme is not None:
        yield "embeddings", recipe.embedding_scheme, model.get_input_embeddings()  # type: ignore[operator]
    if recipe.head_scheme is not None:
        yield "lm-head", recipe.head_scheme, model.get_output_embeddings()  # type: ignore[operator]


def _planned(name: str, module: nn.Module, scheme: Scheme, recipe: Recipe, skeleton: Skeleton, chosen: Format) -> PlannedLinear:
    out_features, in_features = linear_weight(module).shape
    kind = EMBEDDING if isinstance(module, nn.Embedding) else type(module).__name__
    site = LinearSite(
        name=name, local=name, block=len(skeleton.blocks), in_features=in_features, out_features=out_features, kind=kind
    )  # behind the last block
    scheme = scheme.resolved(in_features)
    if in_features % scheme.columns_per_group(in_features):
        raise UsageError(f"{name}: group size {scheme.group_size} does not divide its {in_features} columns; leave the size out")
    dtype, solver = skeleton.dtype(f"{name}.weight"), as_block_solver(recipe.solver())
    spec = LinearSpec(
        name=name,
        scheme=scheme,
        out_features=out_features,
        in_features=in_features,
        scale_dtype=chosen.scale_dtype(dtype, scheme),
        kind=kind,
        moving_groups=kind != EMBEDDING and solver.moves_groups(scheme),
        signed_scales=takes_sign(scheme, solver.ranges.signed),
        aliases=skeleton.aliases(name),
        weight_dtype=dtype,
        outside=True,
    )
    refused = chosen.refusal(spec) or solver.refusal(scheme)
    if refused is not None:
        raise UsageError(f"{name}: {refused}")
    return PlannedLinear(site, spec, dtype)


def outside_notes(recipe: Recipe, linears: Sequence[PlannedLinear]) -> list[str]:
    """What a person should know of them."""
    solver = as_block_solver(recipe.solver())
    heads = [linear.name for linear in linears if linear.spec.outside and linear.spec.kind != EMBEDDING]
    if not heads or isinstance(solver, PerMatrix):
        return []
    return [f"{heads[0]} is rounded to nearest: {recipe.algo} works on blocks, and it stands behind them"]


def linears_outside(skeleton: Skeleton) -> list[str]:
    """Paths of the linears in no block."""
    inside = {site.name for site in skeleton.linears}
    return [name for name, module in skeleton.model.named_modules() if isinstance(module, nn.Linear) and name not in inside]


def check_patterns_match(recipe: Recipe, skeleton: Skeleton, outside: Sequence[str], hits: Hits) -> None:
    """Raise UsageError for a pattern that finds no linear of the blocks, with what it finds instead."""
    names = [site.name for site in skeleton.linears]
    for override in recipe.overrides:
        if hits[override.pattern].isdisjoint(names):
            other = _other_match(override.pattern, skeleton, outside)
            if other is None or not override.skip:  # what stays as it is may be skipped
                raise UsageError(f"override '{override.pattern}' {other or f'matches no linear; the linears are named like {names[0]}'}")
    for pattern in recipe.ignore:
        if hits[pattern].isdisjoint(names) and _other_match(pattern, skeleton, outside) is None:
            raise UsageError(f"ignore '{pattern}' matches no linear; the linears are named like {names[0]}")


def _other_match(pattern: str, skeleton: Skeleton, outside: Sequence[str]) -> str | None:
    """What ``pattern``, which finds no linear of the blocks, finds in the model instead, and why that has no scheme."""
    modules = dict(skeleton.model.named_modules())
    hits = found([pattern], [name for name in modules if name])[pattern]
    for name in outside:
        if name in hits:
            is_head = modules[name] is skeleton.model.get_output_embeddings()  # type: ignore[operator]
            what = "which --lm-head W8 and the like quantize" if is_head else "which stays in 16 bit"
            return f"matches {name}, a linear outside the blocks, {what}; leave the override out"
    for name, module in modules.items():
        if name in hits and next(module.parameters(recurse=False), None) is not None:
            return f"matches {name} of class {type(module).__name__}; only linears in the blocks are quantized, so leave the override out"
    return None
