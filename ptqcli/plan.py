"""What is to be done, before anything is done.

``make_plan`` confronts the request, a ``Recipe``, with a model's skeleton and decides for every linear whether it is quantized and in
which scheme. Whatever cannot work is refused there, by name, before a weight is read: a group that does not divide, a pattern that
matches nothing, parts of one fused matrix in different schemes, something that the format cannot hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ptqcli.errors import UsageError
from ptqcli.estimate import PlannedLinear, bytes_after, checkpoint_room, mapped_bytes, memory_bytes, needs_calibration
from ptqcli.formats import Format, LinearSpec, find_format
from ptqcli.model.skeleton import Skeleton
from ptqcli.numerics.scheme import Scheme
from ptqcli.patterns import found
from ptqcli.recipe import Recipe
from ptqcli.resources import Resources
from ptqcli.solvers.per_matrix import as_block_solver

DEFAULT_SEQLEN = 2048

PICKABLE_GROUPS = (128, 64, 32)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every decision that can be made before a weight is read.

    skipped: (name, reason) of linears inside the blocks that stay as they are.
    outside: linears outside the blocks.
    stages: for each block, the local names of its planned linears, grouped by input tensor in running order.
    fused_groups: linears that servers run as one matrix, by their paths.
    bytes_before, bytes_after: of the weights now and, estimated, afterwards.
    disk_bytes, memory_bytes: estimates of the room that the run needs, and of its peak beyond what Python and torch need themselves.
    """

    recipe: Recipe
    linears: tuple[PlannedLinear, ...]
    skipped: tuple[tuple[str, str], ...]
    outside: tuple[str, ...]
    stages: tuple[tuple[tuple[str, ...], ...], ...]
    fused_groups: tuple[tuple[str, ...], ...]
    seqlen: int
    bytes_before: int
    bytes_after: int
    disk_bytes: int
    memory_bytes: int
    notes: tuple[str, ...] = field(default=())

    @property
    def needs_calibration(self) -> bool:
        """Whether anything looks at calibration text at all."""
        return needs_calibration(self.recipe, self.linears)

    def schemes(self) -> dict[Scheme, int]:
        """How many linears each scheme has."""
        counts: dict[Scheme, int] = {}
        for linear in self.linears:
            counts[linear.scheme] = counts.get(linear.scheme, 0) + 1
        return counts

    def summary_rows(self) -> list[tuple[str, str]]:
        """(what, value) pairs that tell a person what is about to happen."""
        recipe = self.recipe
        schemes = ", ".join(f"{scheme} x {count}" for scheme, count in self.schemes().items())
        rows = [("algorithm", recipe.algo), ("linears", schemes), ("blocks", str(len(self.stages)))]
        if self.skipped:
            rows.append(("left as they are", _list_names([f"{name} ({reason})" for name, reason in self.skipped])))
        if self.needs_calibration:
            rows.append(("calibration", f"{recipe.nsamples} windows of {self.seqlen} tokens from {recipe.calib}"))
        rows.append(("format", recipe.format))
        rows += [("note", note) for note in self.notes]
        return rows


def make_plan(recipe: Recipe, skeleton: Skeleton, resources: Resources, assigned: Mapping[str, Scheme] | None = None) -> Plan:
    """Decide about every linear of the model. Raises UsageError, by name, for everything that cannot work.

    assigned: schemes by path in the model, which take the place of the recipe's; what the recipe skips or ignores stays as it is.
    """
    outside = _outside(skeleton)
    hits = found(recipe.patterns, [*(site.name for site in skeleton.linears), *outside])
    linears, skipped = _choose(recipe, skeleton, assigned or {}, hits)
    _check_patterns_match(recipe, skeleton, hits)
    if not linears:
        raise UsageError("nothing is left to quantize: every linear is ignored or skipped")
    _check_groups(linears)
    _check_runs_once(linears, skeleton)
    chosen = find_format(recipe.format)
    _check_format(chosen, linears)
    stages = _planned_stages(linears, skeleton)
    _check_fused(chosen, linears, skeleton.fused_groups)
    seqlen = recipe.seqlen or min(DEFAULT_SEQLEN, model_length(skeleton.config) or DEFAULT_SEQLEN)
    _check_length(seqlen, skeleton)
    memory = memory_bytes(recipe, linears, skeleton, seqlen, resources)
    return Plan(
        recipe=recipe,
        linears=tuple(linears),
        skipped=tuple(skipped),
        outside=tuple(outside),
        stages=stages,
        fused_groups=skeleton.fused_groups,
        seqlen=seqlen,
        bytes_before=skeleton.total_bytes,
        bytes_after=bytes_after(chosen, linears, skeleton),
        disk_bytes=checkpoint_room(chosen, linears, skeleton) + mapped_bytes(recipe, linears, seqlen, resources),
        memory_bytes=memory,
        notes=(*_unmatched_note(skeleton), *chosen.notes([linear.spec for linear in linears])),
    )


def model_length(config: Any) -> int | None:
    """The longest input that the model's config names, or None."""
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(length) if length else None


Hits = Mapping[str, frozenset[str]]  # pattern -> names that it finds


def _choose(
    recipe: Recipe, skeleton: Skeleton, assigned: Mapping[str, Scheme], hits: Hits
) -> tuple[list[PlannedLinear], list[tuple[str, str]]]:
    unknown = sorted(assigned.keys() - {site.name for site in skeleton.linears})
    if unknown:
        raise UsageError(f"a scheme is assigned to {unknown[0]}, which is no linear of the model's blocks")
    linears, skipped = [], []
    solver = as_block_solver(recipe.solver())
    for site in skeleton.linears:
        scheme, reason = _scheme_for(recipe, site.name, hits)
        scheme = assigned.get(site.name, scheme)
        if site.local in skeleton.shapes[site.block].unused:
            reason = reason or "never runs"
        if reason is not None:
            skipped.append((site.name, reason))
            continue
        dtype = skeleton.dtype(f"{site.name}.weight")
        spec = LinearSpec(
            name=site.name,
            scheme=scheme,
            out_features=site.out_features,
            in_features=site.in_features,
            scale_dtype=dtype,
            kind=site.kind,
            moving_groups=solver.moves_groups(scheme),
        )
        linears.append(PlannedLinear(site, spec))
    return linears, skipped


def _scheme_for(recipe: Recipe, name: str, hits: Hits) -> tuple[Scheme, str | None]:
    scheme = recipe.default_scheme
    reason = "ignored" if any(name in hits[pattern] for pattern in recipe.ignore) else None
    for override in recipe.overrides:
        if name in hits[override.pattern]:
            scheme = override.apply(scheme)
            reason = "skipped" if override.skip else (None if reason == "skipped" else reason)
    return scheme, reason


def _outside(skeleton: Skeleton) -> list[str]:
    inside = {site.name for site in skeleton.linears}
    return [name for name, module in skeleton.model.named_modules() if isinstance(module, torch.nn.Linear) and name not in inside]


def _check_patterns_match(recipe: Recipe, skeleton: Skeleton, hits: Hits) -> None:
    names = [site.name for site in skeleton.linears]
    for override in recipe.overrides:
        if hits[override.pattern].isdisjoint(names):
            raise UsageError(f"override '{override.pattern}' matches no linear; the linears are named like {names[0]}")
    for pattern in recipe.ignore:
        if not hits[pattern]:
            raise UsageError(f"ignore '{pattern}' matches no linear; the linears are named like {names[0]}")


def _check_groups(linears: Sequence[PlannedLinear]) -> None:
    for linear in linears:
        columns = linear.site.in_features
        if columns % linear.scheme.columns_per_group(columns):
            fitting = [str(group) for group in PICKABLE_GROUPS if columns % group == 0]
            raise UsageError(
                f"group size {linear.scheme.group_size} does not divide the {columns} input features of {linear.name}; "
                f"use --group-size {' or '.join([*fitting, '-1'])}, or override or ignore that layer"
            )


def _check_runs_once(linears: Sequence[PlannedLinear], skeleton: Skeleton) -> None:
    for linear in linears:
        if linear.site.local in skeleton.shapes[linear.site.block].repeated:
            raise UsageError(f"{linear.name} runs more than once within its block, which is not supported; add it to --ignore")


def _check_format(chosen: Format, linears: Sequence[PlannedLinear]) -> None:
    for linear in linears:
        reason = chosen.refusal(linear.spec)
        if reason is not None:
            raise UsageError(f"{linear.name}: {reason}")


def _planned_stages(linears: Sequence[PlannedLinear], skeleton: Skeleton) -> tuple[tuple[tuple[str, ...], ...], ...]:
    planned = {(linear.site.block, linear.site.local) for linear in linears}
    blocks = []
    for index, shape in enumerate(skeleton.shapes):
        kept = (tuple(local for local in stage if (index, local) in planned) for stage in shape.stages)
        blocks.append(tuple(stage for stage in kept if stage))
    return tuple(blocks)


def _check_fused(chosen: Format, linears: Sequence[PlannedLinear], groups: Sequence[Sequence[str]]) -> None:
    schemes = {linear.name: linear.scheme for linear in linears}
    for group in groups:
        reason = chosen.fused_refusal({name: schemes.get(name) for name in group})
        if reason is not None:
            raise UsageError(reason)


def _check_length(seqlen: int, skeleton: Skeleton) -> None:
    longest = model_length(skeleton.config)
    if longest is not None and seqlen > longest:
        raise UsageError(f"seqlen {seqlen} is longer than the model's {longest} positions; use --seqlen {longest} or less")


def _unmatched_note(skeleton: Skeleton) -> list[str]:
    unused = skeleton.names.unmatched
    return [f"copied as they are, since transformers' model has no use for them: {_list_names(unused)}"] if unused else []


def _list_names(names: Sequence[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
