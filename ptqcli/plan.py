"""What is to be done, before anything is done.

``make_plan`` confronts the request, a ``Recipe``, with a model's skeleton and decides for every linear whether it is quantized and in
which scheme. Whatever cannot work is refused there, by name, before a weight is read: a group that does not divide, a pattern that
matches nothing, parts of one fused matrix in different schemes, something that the format cannot hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial

from ptqcli.calibration.record import WAY_OUT
from ptqcli.errors import PTQError, UsageError
from ptqcli.estimate import (
    PlannedLinear,
    adapter_bytes,
    bytes_after,
    disk_bytes,
    finish_work,
    mapped_bytes,
    memory_bytes,
    needs_calibration,
)
from ptqcli.formats import Format, Reader, find_format
from ptqcli.model.discovery import PROBE_TOKENS, PROBE_WINDOWS, listed
from ptqcli.model.linears import LinearSite
from ptqcli.model.positions import most_tokens
from ptqcli.model.skeleton import Skeleton
from ptqcli.numerics.scheme import Scheme
from ptqcli.patterns import Hits, found
from ptqcli.plan_experts import check_experts, expert_notes, routing_reason, unread_experts, with_refusal
from ptqcli.plan_groups import check_groups, group_notes, standing_in, too_narrow
from ptqcli.plan_memory import with_budget
from ptqcli.plan_notes import check_kind, kept_notes, known_readers
from ptqcli.plan_outside import check_patterns_match, linears_outside, outside_notes, planned_outside
from ptqcli.plan_parallel import check_parallel, resolved_for_parts
from ptqcli.plan_specs import spec_in, unstorable
from ptqcli.plan_texts import ChooseTexts, PlannedTexts, texts_as_asked
from ptqcli.recipe import Recipe
from ptqcli.resources import Resources
from ptqcli.sensitivity.allocation import Allocation
from ptqcli.solvers.per_matrix import PerMatrix, as_block_solver

DEFAULT_SEQLEN = 2048

# of a recipe
CALIBRATION_FIELDS = ("sequential", "calib", "nsamples", "seqlen", "seed", "bos", "expert_calibration", "min_expert_tokens")
TOLD_BELOW = 0.9  # a smaller share of the weights that is quantized is said


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every decision that can be made before a weight is read.

    skipped: (name, reason) of linears inside the blocks that stay as they are. outside: linears outside the blocks. plain: every matrix
    that is not quantized, by all names that readers may know it under.
    stages: for each block, the local names of its planned linears, grouped by input tensor in running order.
    texts: what is calibrated on, where anything is. fused_groups: linears that servers run as one matrix, by their paths.
    bytes_before, bytes_after: of the weights now and, estimated, afterwards. adapter_bytes: of the adapter beside them.
    rewrites: what transforms of the whole model do, a line each.
    readers: how other programs load the result, or why they do not; of an encoder what transformers does. writes: whether the model does.
    disk_bytes, memory_bytes: estimates of the room that the run needs, and of the peak of the whole process, on a GPU of what is there.
    activation_budget: bytes of activations that are held in memory. activations_on_disk: bytes of those that are not.
    allocation: what became of a budget, None without one.
    """

    recipe: Recipe
    linears: tuple[PlannedLinear, ...]
    skipped: tuple[tuple[str, str], ...]
    outside: tuple[str, ...]
    plain: tuple[str, ...]
    stages: tuple[tuple[tuple[str, ...], ...], ...]
    fused_groups: tuple[tuple[str, ...], ...]
    seqlen: int
    texts: PlannedTexts
    bytes_before: int
    bytes_after: int
    disk_bytes: int
    memory_bytes: int
    activation_budget: int
    activations_on_disk: int
    notes: tuple[str, ...] = field(default=())
    rewrites: tuple[str, ...] = ()
    readers: tuple[Reader, ...] = ()
    adapter_bytes: int = 0
    writes: bool = True
    allocation: Allocation | None = None

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
        rows = [("algorithm", recipe.algo), *(("rewritten", done) for done in self.rewrites)]
        rows += [("linears", schemes), ("blocks", str(len(self.stages)))]
        rows += [] if self.allocation is None else self.allocation.rows()
        if self.skipped:
            rows.append(("left as they are", _by_reason(self.skipped)))
        if self.needs_calibration:
            rows.append(("calibration", self.texts.row(self.seqlen)))
        if recipe.finish != "none":
            rows.append(("finish", f"{recipe.finish}: scales are tuned to the original's logits, half of the windows held out"))
        if recipe.adapter_rank:
            rows.append(
                ("adapter", f"of rank {recipe.adapter_rank} for each linear, {self.adapter_bytes / 1e6:,.1f} MB beside the checkpoint")
            )
        rows.append(("format", recipe.format if recipe.mix is None else f"{recipe.format}, {recipe.mix}"))
        if recipe.for_tensor_parallel > 1:
            rows.append(("tensor parallel", f"every matrix can be cut into {recipe.for_tensor_parallel} parts of whole groups"))
        rows += [("note", note) for note in self.notes]
        return rows


def make_plan(
    recipe: Recipe,
    skeleton: Skeleton,
    resources: Resources,
    assigned: Mapping[str, Scheme] | None = None,
    choose_texts: ChooseTexts | None = None,
) -> Plan:
    """Decide about every linear of the model. Raises UsageError, by name, for everything that cannot work.

    assigned: schemes by path in the model, which take the place of the recipe's; what the recipe skips or ignores stays as it is.
    choose_texts: is asked for the texts where anything looks at them; None leaves them as they are asked for.
    """
    _check_solver(recipe)
    check_kind(recipe, skeleton)
    outside = linears_outside(skeleton)
    hits = found(recipe.patterns, [*(site.name for site in skeleton.linears), *outside])
    chosen = find_format(recipe.format)
    inside, skipped = _choose(recipe, skeleton, chosen, assigned or {}, hits)
    check_patterns_match(recipe, skeleton, outside, hits)
    linears = [*inside, *planned_outside(recipe, skeleton, chosen)]
    plain = skeleton.plain_names(linear.name for linear in linears)
    _check_inside(recipe, inside, linears, skeleton, hits)
    _check_format(chosen, linears, plain, skeleton)
    fused = _checked_fused(chosen, inside, skeleton)
    seqlen = _window_length(recipe, skeleton)
    texts = _texts(recipe, linears, skeleton, choose_texts, seqlen)
    specs = [linear.spec for linear in linears]
    resources = with_budget(resources, partial(memory_bytes, recipe, linears, skeleton, seqlen, texts))
    tried, unread = chosen.trial([model for model, _ in skeleton.classes], specs), unread_experts(chosen, linears, skeleton)
    return Plan(
        recipe=recipe,
        linears=tuple(linears),
        skipped=tuple(skipped),
        outside=tuple(sorted({*outside} - {linear.name for linear in linears})),
        plain=plain,
        stages=_planned_stages(inside, skeleton),
        fused_groups=skeleton.fused_groups,
        seqlen=seqlen,
        texts=texts,
        bytes_before=skeleton.total_bytes,
        bytes_after=bytes_after(chosen, linears, skeleton, recipe.mix),
        disk_bytes=disk_bytes(chosen, linears, skeleton, recipe, seqlen, texts.windows, resources),
        memory_bytes=memory_bytes(recipe, linears, skeleton, seqlen, texts, resources),
        activation_budget=resources.budget,
        activations_on_disk=mapped_bytes(recipe, linears, seqlen, texts.windows, resources),
        notes=(
            *group_notes(inside, recipe, hits),
            *_calibration_notes(recipe, linears, texts.windows),
            *expert_notes(recipe, inside, skeleton),
            *texts.notes,
            *_finish_notes(recipe, skeleton, texts.windows, seqlen),
            *_model_notes(recipe, skeleton, linears),
            *[*chosen.notes(specs), *tried, *unread],
            *([] if chosen.one_file else _fused_notes(fused)),
        ),
        readers=with_refusal(known_readers(chosen, specs, skeleton, tried), unread),
        writes=skeleton.kind.causal,
        adapter_bytes=adapter_bytes(recipe, linears),
    )


def _check_inside(
    recipe: Recipe, inside: Sequence[PlannedLinear], linears: Sequence[PlannedLinear], skeleton: Skeleton, hits: Hits
) -> None:
    if not linears:
        raise UsageError("nothing is left to quantize: every linear is ignored or skipped")
    if recipe.adapter_rank and not inside:
        raise UsageError("an adapter corrects linears in the blocks, of which none is quantized; leave --adapter-rank out")
    check_groups(inside, recipe, hits)
    check_parallel(inside, skeleton, recipe.for_tensor_parallel)
    check_experts(recipe, inside, skeleton)


def _choose(
    recipe: Recipe, skeleton: Skeleton, chosen: Format, assigned: Mapping[str, Scheme], hits: Hits
) -> tuple[list[PlannedLinear], list[tuple[str, str]]]:
    unknown = sorted(assigned.keys() - {site.name for site in skeleton.linears})
    if unknown:
        raise UsageError(f"a scheme is assigned to {unknown[0]}, which is no linear of the model's blocks")
    linears, skipped = [], []
    for site in skeleton.linears:
        scheme, reason = _scheme_for(recipe, site.name, hits)
        scheme = assigned.get(site.name) or (scheme if recipe.budget is None else standing_in(scheme, site.in_features))
        reason = reason or _obstacle(site, skeleton) or routing_reason(site, skeleton, recipe, hits) or too_narrow(scheme, site)
        if reason is not None:
            skipped.append((site.name, reason))
            continue
        scheme = resolved_for_parts(scheme, site, skeleton, recipe.for_tensor_parallel)
        spec = spec_in(scheme, site, recipe, chosen, skeleton)
        linears.append(PlannedLinear(site, spec, skeleton.dtype(f"{site.name}.weight")))
    return linears, skipped


def _obstacle(site: LinearSite, skeleton: Skeleton) -> str | None:
    """Why a linear stays as it is, whatever is asked for, or None."""
    shape = skeleton.shapes[site.block]
    if site.local in shape.unused:
        return "never runs"
    if site.local in shape.repeated:
        return "runs more than once within its block"
    if site.local in shape.read:
        return "code outside of it reads its weight"
    if site.name in skeleton.shared:
        return f"its weight also runs in {skeleton.shared[site.name].removesuffix('.' + site.local)}"
    return None


def _scheme_for(recipe: Recipe, name: str, hits: Hits) -> tuple[Scheme, str | None]:
    scheme = recipe.default_scheme
    reason = "ignored" if any(name in hits[pattern] for pattern in recipe.ignore) else None
    for override in recipe.overrides:
        if name in hits[override.pattern]:
            scheme = override.apply(scheme)
            reason = "skipped" if override.skip else (None if reason == "skipped" else reason)
    return scheme, reason


def _check_solver(recipe: Recipe) -> None:
    solver = as_block_solver(recipe.solver())
    window = solver.window
    if not isinstance(window, int) or window < 1:
        raise PTQError(f"the solver of {recipe.algo} works on {window!r} blocks at once; its window must be a whole number from 1 on")
    if solver.needs.pairs and not recipe.sequential:
        raise UsageError("target original pairs the inputs of both models stage by stage; leave --no-sequential out, or --target original")


def _check_format(chosen: Format, linears: Sequence[PlannedLinear], plain: Sequence[str], skeleton: Skeleton) -> None:
    stored = set(skeleton.source.tensors.names)
    for linear in linears:
        reason = unstorable(linear.spec, chosen)
        if reason is not None:
            raise UsageError(f"{linear.name}: {reason}")
        weight = skeleton.stored_name(f"{linear.name}.weight")
        written = set(chosen.tensor_names(weight.removesuffix(".weight"), linear.spec.scheme)) - {weight}
        for taken in sorted(written & stored):
            raise PTQError(f"{skeleton.where}: holds a tensor {taken}, the name of a part of {linear.name} when it is quantized; remove it")
    reason = chosen.joint_refusal([linear.spec for linear in linears], plain)
    if reason is not None:
        raise UsageError(reason)


def _planned_stages(linears: Sequence[PlannedLinear], skeleton: Skeleton) -> tuple[tuple[tuple[str, ...], ...], ...]:
    planned = {(linear.site.block, linear.site.local) for linear in linears}
    blocks = []
    for index, shape in enumerate(skeleton.shapes):
        kept = (tuple(local for local in stage if (index, local) in planned) for stage in shape.stages)
        blocks.append(tuple(stage for stage in kept if stage))
    return tuple(blocks)


def _checked_fused(chosen: Format, linears: Sequence[PlannedLinear], skeleton: Skeleton) -> list[dict[str, Scheme | None]]:
    """The schemes of linears that read one tensor inside one module, None for one that stays as it is."""
    schemes = {linear.name: linear.scheme for linear in linears}
    fused = [{name: schemes.get(name) for name in group} for group in skeleton.fused_groups]
    for group in fused:
        reason = chosen.fused_refusal(group)
        if reason is not None:
            raise UsageError(reason)
    return fused


def _texts(recipe: Recipe, linears: Sequence[PlannedLinear], skeleton: Skeleton, choose: ChooseTexts | None, seqlen: int) -> PlannedTexts:
    if not needs_calibration(recipe, linears):
        return PlannedTexts(shares=())
    _check_hidden_states(skeleton)
    _check_exchange(skeleton, recipe)
    return (choose or partial(texts_as_asked, recipe))(seqlen)


def _check_hidden_states(skeleton: Skeleton) -> None:
    """Calibration keeps what is between the blocks as [windows, tokens, features], stacks of such beside each other."""
    for index, shape in enumerate(skeleton.shapes):
        if shape.hidden is None or shape.hidden[-3:-2] != (PROBE_WINDOWS,) or shape.stack != skeleton.shapes[0].stack:
            found = "nothing" if shape.hidden is None else f"{list(shape.hidden)} for {PROBE_WINDOWS} windows of {PROBE_TOKENS} tokens"
            raise UsageError(f"{skeleton.block_prefix(index)}: gives {found}, not hidden states [windows, tokens, features]; {WAY_OUT}")


def _check_exchange(skeleton: Skeleton, recipe: Recipe) -> None:
    """What blocks leave for later ones is kept for the quantized model as it is behind each block, and for the original, not while both are
    trained."""
    index = next((index for index, shape in enumerate(skeleton.shapes) if shape.exchanged), None)
    if index is not None and not isinstance(as_block_solver(recipe.solver()), PerMatrix):
        name = skeleton.shapes[index].exchanged[0]
        raise UsageError(
            f"{skeleton.block_prefix(index)}: leaves tensors for later blocks ({name}), which --algo {recipe.algo} cannot train through; "
            "use --algo gptq"
        )


def _fused_notes(fused: Sequence[Mapping[str, Scheme | None]]) -> list[str]:
    """One note for all groups of linears that differ, as they may, although they read one tensor."""
    different = [group for group in fused if len(set(group.values())) > 1]
    if not different:
        return []
    firsts: dict[Scheme | None, str] = {}
    for name, scheme in different[0].items():
        firsts.setdefault(scheme, name)
    listed = " and ".join(f"{name} ({'left as it is' if scheme is None else scheme})" for scheme, name in firsts.items())
    count = f", and so do {len(different) - 1} more groups of linears" if len(different) > 1 else ""
    return [f"{listed} read the same input{count}; a server that runs them as one matrix needs one scheme for them"]


def _window_length(recipe: Recipe, skeleton: Skeleton) -> int:
    """Tokens in a calibration window."""
    longest = most_tokens(skeleton.model)
    seqlen = recipe.seqlen or min(DEFAULT_SEQLEN, longest or DEFAULT_SEQLEN)
    if longest is not None and seqlen > longest:
        raise UsageError(f"seqlen {seqlen} is longer than the model's {longest} positions; use --seqlen {longest} or less")
    return seqlen


def _calibration_notes(recipe: Recipe, linears: Sequence[PlannedLinear], windows: int) -> list[str]:
    """What is asked for of the calibration text although nothing looks at it."""
    usual = {entry.name: entry.default for entry in fields(Recipe)}
    asked = [name for name in CALIBRATION_FIELDS if getattr(recipe, name) != usual[name]]
    if needs_calibration(recipe, linears):
        return as_block_solver(recipe.solver()).notes(windows)
    if not asked or recipe.budget is not None:
        return []
    return [f"{recipe.algo} looks at no calibration text, so {', '.join(asked)} {'has' if len(asked) == 1 else 'have'} no effect"]


def _finish_notes(recipe: Recipe, skeleton: Skeleton, windows: int, seqlen: int) -> list[str]:
    """What tuning takes, beside one pass over the calibration text."""
    if recipe.finish == "none":
        return []
    work, once = finish_work(skeleton, windows, seqlen), skeleton.pass_work(windows * seqlen)
    return [f"finish {recipe.finish} takes about {work / 1e12:,.2g} TFLOP, {work / once:.0f} times one pass over the calibration text"]


def _model_notes(recipe: Recipe, skeleton: Skeleton, linears: Sequence[PlannedLinear]) -> list[str]:
    """What it is stored in now; and what is not quantized and might be thought to be."""
    notes = [*skeleton.source.notes, *outside_notes(recipe, linears)]
    unused, stacked = skeleton.names.unmatched, skeleton.stacks
    if unused:
        notes.append(f"copied as they are, since the {skeleton.kind.name} has no use for them: {listed(unused)}")
    if stacked:
        notes.append(f"stacks of matrices stay as they are: {listed(list(stacked))}")
    inside = (linear.site for linear in linears if not linear.spec.outside)
    share = sum(site.in_features * site.out_features for site in inside) / skeleton.matrix_size
    if share < TOLD_BELOW:
        only = "only " if share < 0.5 else ""
        notes.append(f"{only}{share:.0%} of the weights in the model's matrices, embeddings and output head apart, are quantized")
    if skeleton.loaded_as != skeleton.kind.auto_class:
        what = f"transformers' {skeleton.kind.auto_class} does not find the tensors of this model, quantized or not"
        notes.append(f"{what}; load it as {skeleton.loaded_as}")
    if skeleton.unbuilt:
        notes.append(f"{skeleton.unbuilt}; what is written about its parts goes by the names of the stored tensors")
    return notes + kept_notes(skeleton)


def _by_reason(skipped: Sequence[tuple[str, str]]) -> str:
    """Every reason, with some of the names that it holds for."""
    reasons: dict[str, list[str]] = {}
    for name, reason in skipped:
        reasons.setdefault(reason, []).append(name)
    return "; ".join(f"{listed(names, 2)} ({reason})" for reason, names in reasons.items())
