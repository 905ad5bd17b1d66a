"""The output head and the embedding in a plan: they stand outside the blocks, and are quantized only when somebody asks for it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ptqcli.errors import UsageError
from ptqcli.estimate import PlannedLinear
from ptqcli.formats import Format, LinearSpec, no_place
from ptqcli.model.linears import EMBEDDING, LinearSite, linear_weight
from ptqcli.model.skeleton import Skeleton
from ptqcli.numerics.ranges import takes_sign
from ptqcli.numerics.scheme import Scheme
from ptqcli.recipe import Recipe
from ptqcli.solvers.per_matrix import PerMatrix, as_block_solver


def planned_outside(recipe: Recipe, skeleton: Skeleton, chosen: Format) -> list[PlannedLinear]:
    """The embedding and the head, as far as the recipe gives them schemes.

    Raises UsageError for one that the model does not have, or the format does not hold.
    """
    planned = []
    for option, scheme, module in _asked(recipe, skeleton):
        name = next((name for name, found in skeleton.model.named_modules() if found is module), None)
        if module is None or name is None or not isinstance(module, nn.Linear | nn.Embedding):
            raise UsageError(f"{skeleton.where}: has none that could be quantized; leave --{option} out")
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


def outside_notes(recipe: Recipe, outside: list[PlannedLinear]) -> list[str]:
    """What a person should know of them."""
    solver = as_block_solver(recipe.solver())
    heads = [linear.name for linear in outside if linear.spec.kind != EMBEDDING]
    if not heads or isinstance(solver, PerMatrix):
        return []
    return [f"{heads[0]} is rounded to nearest: {recipe.algo} works on blocks, and it stands behind them"]
