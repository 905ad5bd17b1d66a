"""What is decided about experts and what routes tokens to them, and who reads the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ptqcli.errors import UsageError
from ptqcli.estimate import PlannedLinear, expert_linears, needs_calibration
from ptqcli.formats import DEFAULT_FORMAT, Format, Reader
from ptqcli.model.linears import LinearSite
from ptqcli.model.skeleton import Skeleton
from ptqcli.model.stacks import experts_of, separated
from ptqcli.patterns import Hits
from ptqcli.recipe import Recipe
from ptqcli.solvers.per_matrix import as_block_solver

ASSEMBLED = f"symmetric scheme of weights alone, as is all else, in {DEFAULT_FORMAT}"


def routing_reason(site: LinearSite, skeleton: Skeleton, recipe: Recipe, hits: Hits) -> str | None:
    """Why a router stays as it is where no override asks for it by name, or None.

    It is small, and what it rounds sends whole tokens another way.
    """
    asked = any(site.name in hits[override.pattern] for override in recipe.overrides)
    routers = {local for mixture in skeleton.shapes[site.block].mixtures for local in mixture.routers}
    return "routes tokens to experts" if site.local in routers and not asked else None


def check_experts(recipe: Recipe, linears: Sequence[PlannedLinear], skeleton: Skeleton) -> None:
    """Raises UsageError for a solver that pairs the inputs of both models, where these route a token to different experts."""
    experts = expert_linears(linears, skeleton)
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
    experts = expert_linears(linears, skeleton)
    if not experts or not needs_calibration(recipe, linears):
        return []
    seen = "the tokens that are routed to it" if recipe.expert_calibration == "routed" else "every token"
    least = recipe.min_expert_tokens
    few = f"; one that sees fewer than {least} gets the statistics of all experts of its block" if least else ""
    return [f"each expert is calibrated on {seen}{few}"]


def with_refusal(readers: Sequence[Reader], refusals: Sequence[str]) -> tuple[Reader, ...]:
    """``readers``, of which transformers does not read the result for the first of ``refusals``, if there are any."""
    return tuple(Reader(name=each.name, refusal=refusals[0]) if refusals and each.name == "transformers" else each for each in readers)


def unread_experts(chosen: Format, linears: Sequence[PlannedLinear], skeleton: Skeleton) -> list[str]:
    """Why transformers, which holds the experts of a layer in one parameter, does not read single ones; nothing where it does."""
    stacks = separated(skeleton.model)
    names = {linear.name for linear in linears}
    if chosen.one_file or not stacks:
        return []
    alone = next((stack for stack in stacks if not stack.declared), None)
    if alone is not None:
        return [f"transformers does not find single experts, since it holds them in one parameter ({alone.name}); ptqcli reads them"]
    whole = names.issuperset(linear for stack in stacks for linear in stack.linears)
    if whole and chosen.assembled_by_transformers([linear.spec for linear in linears]):
        return []
    advice = _one_size(chosen, linears) if whole else ""
    return [f"transformers does not put experts together ({stacks[0].name}) unless all are in one {ASSEMBLED}; {advice}ptqcli reads them"]


def _one_size(chosen: Format, linears: Sequence[PlannedLinear]) -> str:
    """What to give where nothing but the group sizes, chosen for each width, keeps transformers from reading the experts."""
    smallest = min(linear.scheme.group_size for linear in linears)
    alike = [replace(linear.spec, scheme=replace(linear.scheme, group_size=smallest)) for linear in linears]
    readable = smallest > 0 and chosen.assembled_by_transformers(alike)
    return f"it does with --group-size {smallest}; " if readable else ""
