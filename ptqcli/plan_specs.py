"""What a linear will be in a scheme, and why it cannot be: asked for the scheme that it gets, and for those that are tried."""

from __future__ import annotations

from ptqcli.errors import UsageError
from ptqcli.formats import Format, LinearSpec, other_codes
from ptqcli.model.linears import LinearSite
from ptqcli.model.skeleton import Skeleton
from ptqcli.numerics.ranges import takes_sign
from ptqcli.numerics.scheme import Scheme
from ptqcli.recipe import Recipe
from ptqcli.solvers.per_matrix import as_block_solver


def spec_in(scheme: Scheme, site: LinearSite, recipe: Recipe, chosen: Format, skeleton: Skeleton) -> LinearSpec:
    """The linear at ``site`` in ``scheme``, whose groups divide it. Raises UsageError if transform or solver do not take that."""
    solver = as_block_solver(recipe.solver())
    refused = _refused(recipe, scheme) or solver.refusal(scheme)
    if refused is not None:
        raise UsageError(f"{site.name}: {refused}")
    dtype = skeleton.dtype(f"{site.name}.weight")
    return LinearSpec(
        name=site.name,
        scheme=scheme,
        out_features=site.out_features,
        in_features=site.in_features,
        scale_dtype=chosen.scale_dtype(dtype, scheme),
        kind=site.kind,
        moving_groups=solver.moves_groups(scheme),
        signed_scales=takes_sign(scheme, solver.ranges.signed),
        aliases=skeleton.aliases(site.name),
        weight_dtype=dtype,
    )


def unstorable(spec: LinearSpec, chosen: Format) -> str | None:
    """Why ``chosen`` cannot hold the linear, or None if it can."""
    return other_codes(chosen, spec.scheme) or chosen.refusal(spec)


def _refused(recipe: Recipe, scheme: Scheme) -> str | None:
    """Why a transform does not suit linears in ``scheme``, or None."""
    return next((reason for transform in recipe.transforms() if (reason := transform.refusal(scheme)) is not None), None)
