"""What is decided about experts and what routes tokens to them."""

from __future__ import annotations

from collections.abc import Sequence

from ptqcli.errors import UsageError
from ptqcli.estimate import PlannedLinear, needs_calibration
from ptqcli.model.linears import LinearSite
from ptqcli.model.skeleton import Skeleton
from ptqcli.model.stacks import experts_of
from ptqcli.patterns import Hits
from ptqcli.recipe import Recipe
from ptqcli.solvers.per_matrix import as_block_solver


def routing_reason(site: LinearSite, skeleton: Skeleton, recipe: Recipe, hits: Hits) -> str | None:
    """Why a router stays as it is where no override asks for it by name, or None.

    It is small, and what it rounds sends whole tokens another way.
    """
    asked = any(site.name in hits[override.pattern] for override in recipe.overrides)
    routers = {local for mixture in skeleton.shapes[site.block].mixtures for local in mixture.routers}
    return "routes tokens to experts" if site.local in routers and not asked else None


def check_experts(recipe: Recipe, linears: Sequence[PlannedLinear], skeleton: Skeleton) -> None:
    """Raises UsageError for a solver that pairs the inputs of both models, where these route a token to different experts."""
    experts = _experts(linears, skeleton)
    if experts and as_block_solver(recipe.solver()).needs.pairs:
        raise UsageError(
            f"{experts[0].name}: which tokens reach an expert is not the same in both models, so target original has nothing to pair; "
            "use --target quantized"
        )
    if experts and recipe.expert_calibration == "all":
        for block, shape in zip(skeleton.blocks, skeleton.shapes, strict=True):
            for mixture in shape.mixtures:
                if experts_of(block.get_submodule(mixture.path)) is None:
                    raise UsageError(f"{mixture.path}: is a list that the block calls as it likes; use --expert-calibration routed")


def expert_notes(recipe: Recipe, linears: Sequence[PlannedLinear], skeleton: Skeleton) -> list[str]:
    """How experts are calibrated."""
    experts = _experts(linears, skeleton)
    if not experts or not needs_calibration(recipe, linears):
        return []
    seen = "the tokens that are routed to it" if recipe.expert_calibration == "routed" else "every token"
    least = recipe.min_expert_tokens
    few = f"; one that sees fewer than {least} gets the statistics of all experts of its block" if least else ""
    return [f"each expert is calibrated on {seen}{few}"]


def _experts(linears: Sequence[PlannedLinear], skeleton: Skeleton) -> list[PlannedLinear]:
    inside = [{local for mixture in shape.mixtures for alike in mixture.alike for local in alike} for shape in skeleton.shapes]
    return [linear for linear in linears if linear.site.local in inside[linear.site.block]]
