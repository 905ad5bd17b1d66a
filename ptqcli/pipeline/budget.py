"""From a budget to a scheme for each linear: what each candidate costs is measured, the knapsack solved, and its solution compared with the
uniform candidates that keep the budget, on windows that nothing was measured on. What is better is taken, and what that was is reported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ptqcli.allocate import Choice, allocate
from ptqcli.budget import Budget, parse_candidates
from ptqcli.calibration.sources import read_calib
from ptqcli.errors import PTQError, UsageError
from ptqcli.estimate import LIBRARY_BYTES
from ptqcli.formats import Format, LinearSpec, find_format
from ptqcli.model.skeleton import Skeleton
from ptqcli.numerics.scheme import Scheme
from ptqcli.pipeline.memory import return_freed_memory
from ptqcli.pipeline.progress import Progress
from ptqcli.pipeline.texts import CalibrationSet, TextMaker
from ptqcli.plan import Plan
from ptqcli.plan_candidates import bytes_of, candidate_groups, fitting_notes, free_linears, usable_candidates
from ptqcli.plan_memory import allowed_bytes
from ptqcli.resources import Resources, process_bytes
from ptqcli.sensitivity.allocation import AllocatedGroup, Allocation, ComparedUniform
from ptqcli.sensitivity.compare import divergences
from ptqcli.sensitivity.groups import Group, Losses, Work
from ptqcli.sensitivity.journal import Journal, fingerprint
from ptqcli.sensitivity.measure import METHODS, check_method, fits, measured
from ptqcli.sensitivity.table import GroupLosses, SensitivityTable, read_table
from ptqcli.solvers.per_matrix import as_block_solver

JOURNAL_SUFFIX = ".sensitivities.json"
LONGEST_WINDOW = 512  # tokens of a window that are looked at
MOST_HELD_OUT = 16  # windows of the comparison
# Tokens that are looked at, at most: KL takes a pass for each group and candidate, the trace two backward passes.
TOKENS = {"gradient": 16384, "kl": 2048, "hawq": 8192, "output": 4096}
USUAL_METHOD, ALWAYS_FITS = "gradient", "output"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What measuring needs. chosen: the format. measured_on, held_out: int64 [windows, tokens]. texts: what they are from, for people.

    journal: the file that keeps what is found until all is.
    """

    plan: Plan
    skeleton: Skeleton
    groups: Sequence[Group]
    candidates: Sequence[Scheme]
    measured_on: Tensor
    held_out: Tensor
    texts: str
    resources: Resources
    progress: Progress
    journal: Path | None = None

    @property
    def chosen(self) -> Format:
        """The format of the checkpoint."""
        return find_format(self.plan.recipe.format)

    def work(self, windows: Tensor, what: str) -> Work:
        """The work of measuring on ``windows``, told of as ``what``."""
        first = self.plan.linears[0]
        return Work(
            skeleton=self.skeleton,
            groups=self.groups,
            windows=windows,
            resources=self.resources,
            dtype=self.resources.calibration_dtype(first.dtype),
            ranges=as_block_solver(self.plan.recipe.solver()).ranges,
            seed=self.plan.recipe.seed,
            tell=partial(self.progress.layer_progress, what),
        )


@dataclass(frozen=True, kw_only=True)
class Allocated:
    """What became of a budget. schemes: of each linear that was free to choose, by its path. told: for the report. notes: for the plan."""

    schemes: dict[str, Scheme]
    told: Allocation
    notes: tuple[str, ...]


def allocate_bits(
    plan: Plan, skeleton: Skeleton, maker: TextMaker, resources: Resources, progress: Progress, journal: Path | None
) -> Allocated:
    """Share out the budget of the plan's recipe. maker: of the calibration text. journal: where what is measured is kept meanwhile.

    Raises UsageError for a budget that cannot be kept, before anything is measured.
    """
    assert plan.recipe.budget is not None
    setting = make_setting(plan, skeleton, windows_of(plan, maker), resources, progress, journal)
    return allocated(setting, plan.recipe.budget)


def windows_of(plan: Plan, maker: TextMaker) -> CalibrationSet:
    """The windows of the run or, where it does not calibrate, as many as are looked at."""
    if plan.needs_calibration:
        return maker.make(plan.texts, plan.seqlen, rehearsal=False)
    recipe, seqlen = plan.recipe, plan.recipe.seqlen or min(plan.seqlen, LONGEST_WINDOW)
    if recipe.nsamples is None and not any(share.windows for share in read_calib(recipe.calib)):
        maker = replace(maker, recipe=replace(recipe, nsamples=MOST_HELD_OUT + max(TOKENS.values()) // seqlen))
    return maker.make(maker.choose(seqlen), seqlen, rehearsal=False)


def journal_beside(output: Path) -> Path:
    """The file that keeps what is measured for a run with this output."""
    return output.parent / f"{output.name}{JOURNAL_SUFFIX}"


def check_kept(plan: Plan, budget: Budget) -> None:
    """Raise PTQError for a plan that takes more than its budget."""
    if budget.nbytes is not None and plan.bytes_after > budget.nbytes:
        raise PTQError(f"the checkpoint would take {plan.bytes_after:,} bytes, more than the target of {budget}; give a smaller one")


def make_setting(
    plan: Plan,
    skeleton: Skeleton,
    calibration: CalibrationSet,
    resources: Resources,
    progress: Progress,
    journal: Path | None = None,
    candidates: Sequence[Scheme] | None = None,
) -> Setting:
    """What measuring the model of ``plan`` needs. candidates: None for those of its recipe, or the usual ones.

    Raises UsageError for candidates that do not suit it, and for fewer than two windows.
    """
    recipe = plan.recipe
    asked = None if recipe.budget is None else recipe.budget.candidates
    linears = free_linears(plan, skeleton)
    candidates = candidates or asked or usable_candidates(linears, skeleton, recipe, parse_candidates(recipe.usual_candidates))
    groups = candidate_groups(linears, skeleton, recipe, candidates)
    measured_on, held_out = _split(calibration.windows, recipe.seed)
    return Setting(
        plan=plan,
        skeleton=skeleton,
        groups=groups,
        candidates=candidates,
        measured_on=measured_on,
        held_out=held_out,
        texts=", ".join(share.source for share in calibration.shares),
        resources=resources,
        progress=progress,
        journal=journal,
    )


def _split(windows: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Beginnings of windows to measure on, and others to compare on."""
    if len(windows) < 2:
        raise UsageError(
            f"nsamples {len(windows)} is too few for a budget, which compares on windows that it did not measure on; give 2 or more"
        )
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    shuffled = windows[order, :LONGEST_WINDOW]
    held_out = min(MOST_HELD_OUT, len(windows) // 2)
    return shuffled[held_out:], shuffled[:held_out]


def measure_all(setting: Setting, methods: Sequence[str]) -> SensitivityTable:
    """The table of the losses of ``methods``, each on as many windows as it takes.

    What was found is kept, and gone on from. Raises UsageError and PTQError for what cannot be measured.
    """
    losses: dict[str, list[Losses]] = {}
    windows, seconds = {}, {}
    rewrites = [repr(transform) for transform in setting.plan.recipe.model_transforms()]
    settled = [*map(str, setting.candidates), *(f"{name} {count}" for name, count in TOKENS.items()), *setting.plan.rewrites, *rewrites]
    journal = Journal(setting.journal, setting.resources.cache, fingerprint(setting.work(setting.measured_on, ""), settled))
    for name in methods:
        work = setting.work(_enough(setting.measured_on, TOKENS[name]), f"sensitivities by {name}")
        check_method(METHODS[name], work, allowed_bytes(setting.resources), _held(setting.resources))
        setting.progress.phase(
            f"measuring by {name} what each of {len(setting.candidates)} schemes costs each of {len(setting.groups)} groups of linears"
        )
        losses[name], seconds[name] = measured(METHODS[name], work, journal)
        windows[name] = len(work.windows)
        return_freed_memory()
    journal.finish()
    rows = [
        GroupLosses(
            name=group.name,
            linears=group.linears,
            weights=group.weights,
            nbytes=group.nbytes(setting.chosen),
            losses={name: losses[name][number] for name in methods},
        )
        for number, group in enumerate(setting.groups)
    ]
    return SensitivityTable(
        model=setting.skeleton.where,
        candidates=[str(scheme) for scheme in setting.candidates],
        format=setting.chosen.name,
        texts=setting.texts,
        windows=windows,
        tokens=dict.fromkeys(methods, setting.measured_on.shape[1]),
        seconds=seconds,
        units={name: METHODS[name].unit for name in methods},
        groups=rows,
    )


def usual_method(setting: Setting) -> str:
    """The one where none is asked for: what ranks best, or what fits into memory and suits the kind of model."""
    method = METHODS[USUAL_METHOD]
    work = setting.work(setting.measured_on, "")
    suited = setting.skeleton.kind.causal and fits(method, work, allowed_bytes(setting.resources), _held(setting.resources))
    return USUAL_METHOD if suited else ALWAYS_FITS


def _enough(windows: Tensor, tokens: int) -> Tensor:
    return windows[: max(1, tokens // windows.shape[1])]


def _held(resources: Resources) -> int:
    """What the process has taken of its device's memory already, and takes beside tensors."""
    return process_bytes() + LIBRARY_BYTES if resources.device.type == "cpu" else 0


def check_budget(setting: Setting, budget: Budget) -> int:
    """The bytes that the groups may take. Raises UsageError, with the smallest that can be, for a budget that cannot be kept."""
    plan, chosen = setting.plan, setting.chosen
    free = {site.name for group in setting.groups for site in group.sites}
    fixed, planned = bytes_of(plan.linears, chosen, free), bytes_of(plan.linears, chosen)
    least = sum(min(size for size in group.nbytes(chosen) if size is not None) for group in setting.groups)
    if budget.bits is not None:
        weights = sum(linear.site.in_features * linear.site.out_features for linear in plan.linears)
        room = int(budget.bits * weights / 8) - fixed
        smallest = f"{8 * (least + fixed) / weights:.4f} bits a weight, everything stored for it counted"
    else:
        assert budget.nbytes is not None
        rest = plan.bytes_after - planned + fixed
        room = budget.nbytes - rest
        smallest = f"{least + rest:,} bytes, of which {rest - fixed:,} are not quantized"
    if room < least:
        raise UsageError(f"a target of {budget} cannot be kept: the smallest with these candidates is {smallest}")
    return room


def allocated(setting: Setting, budget: Budget) -> Allocated:
    """What becomes of ``budget``: the schemes with the least loss, or a uniform one that is better."""
    room = check_budget(setting, budget)
    _check_mixed(setting)
    table = _table(setting, budget)
    method = budget.method or table.best_method
    rows = [group.losses[method] for group in table.groups]
    choices, numbers = _choices(setting, rows)
    taken = [numbers[place][number] for place, number in enumerate(allocate(choices, room))]
    uniform = _uniform(setting, room)
    setting.progress.phase("comparing mixed with uniform schemes on windows held out")
    versions = [_version(setting, taken), *(_version(setting, each) for each in uniform.values())]
    mixed, *others = divergences(setting.work(setting.held_out, "comparing"), versions)
    compared = [
        ComparedUniform(scheme=str(scheme), nbytes=size, bits=_bits(setting, size), divergence=found)
        for (scheme, each), found in zip(uniform.items(), others, strict=True)
        for size in (_bytes_taken(setting, each),)
    ]
    best = min(compared, key=lambda each: each.divergence, default=None)
    kept = best.scheme if best is not None and best.divergence < mixed else None
    if kept is not None:
        taken = next(each for scheme, each in uniform.items() if str(scheme) == kept)
    allocation = Allocation(
        target=str(budget),
        method=method,
        unit=table.units[method],
        seconds=table.seconds[method],
        candidates=table.candidates,
        texts=table.texts,
        windows=table.windows[method],
        tokens=table.tokens[method],
        held_out=len(setting.held_out),
        bits=_bits(setting, _bytes_taken(setting, taken)),
        expected_loss=sum(row[number] or 0.0 for row, number in zip(rows, taken, strict=True)),
        divergence=mixed,
        measure="KL" if setting.skeleton.kind.causal else "relative squared error",
        uniform=compared,
        kept=kept,
        groups=_allocated_groups(setting, taken, rows),
    )
    if kept is not None:
        setting.progress.remark(f"mixed schemes are worse than uniform ones here: {allocation.verdict()}")
    schemes = {name: spec.scheme for name, spec in _version(setting, taken).items()}
    return Allocated(schemes=schemes, told=allocation, notes=tuple(fitting_notes(setting.groups, setting.candidates)))


def _check_mixed(setting: Setting) -> None:
    """Raise UsageError, with the reason, where the format cannot hold several candidates side by side."""
    widest = {linear.name: linear.spec for linear in setting.plan.linears}
    for number in range(len(setting.candidates)):
        specs = next((group.options[number] for group in setting.groups if group.options[number] is not None), None)
        mixed = {**widest, **{spec.name: spec for spec in specs or ()}}
        reason = setting.chosen.joint_refusal(list(mixed.values()), setting.plan.plain)
        if reason is not None:
            raise UsageError(f"a budget mixes schemes: {reason}")


def _table(setting: Setting, budget: Budget) -> SensitivityTable:
    """Measured now, or read from a file, which must be of these very groups and candidates."""
    if budget.table is None:
        return measure_all(setting, [budget.method or usual_method(setting)])
    table = read_table(budget.table)
    wanted = [group.linears for group in setting.groups]
    if [group.linears for group in table.groups] != wanted:
        ours, theirs = {name for group in wanted for name in group}, {name for group in table.groups for name in group.linears}
        strange = next(iter(sorted(ours ^ theirs)), "other groups")
        raise PTQError(
            f"{budget.table}: is not of the linears that are to be quantized here ({strange}); measure this model with the same request"
        )
    candidates = [str(scheme) for scheme in setting.candidates]
    if table.candidates != candidates:
        raise PTQError(
            f"{budget.table}: has the candidates {','.join(table.candidates)}, not {','.join(candidates)}; give --candidates as it has them"
        )
    for group, row in zip(setting.groups, table.groups, strict=True):
        for name, losses in row.losses.items():
            if [loss is None for loss in losses] != [specs is None for specs in group.options]:
                raise PTQError(
                    f"{budget.table}: {group.name}: {name} tells of other candidates than it can have in this format; measure again"
                )
    return table


def _choices(setting: Setting, rows: Sequence[Losses]) -> tuple[list[list[Choice]], list[list[int]]]:
    """What there is to choose for each group, and the numbers of those candidates."""
    choices, numbers = [], []
    for group, losses in zip(setting.groups, rows, strict=True):
        possible = [
            (number, Choice(size, loss))
            for number, (size, loss) in enumerate(zip(group.nbytes(setting.chosen), losses, strict=True))
            if size is not None and loss is not None
        ]
        numbers.append([number for number, _ in possible])
        choices.append([choice for _, choice in possible])
    return choices, numbers


def _uniform(setting: Setting, room: int) -> dict[Scheme, list[int]]:
    """The candidates that all groups can have within ``room``, each as the number of its candidate for every group."""
    found = {}
    for number, scheme in enumerate(setting.candidates):
        taken = [number] * len(setting.groups)
        if all(group.options[number] is not None for group in setting.groups) and _bytes_taken(setting, taken, own=True) <= room:
            found[scheme] = taken
    return found


def _bytes_taken(setting: Setting, taken: Sequence[int], own: bool = False) -> int:
    """Of all quantized linears, or of the groups' ``own`` alone."""
    chosen = setting.chosen
    groups = sum(size or 0 for size in (group.nbytes(chosen)[number] for group, number in zip(setting.groups, taken, strict=True)))
    if own:
        return groups
    return groups + bytes_of(setting.plan.linears, chosen, {site.name for group in setting.groups for site in group.sites})


def _bits(setting: Setting, nbytes: int) -> float:
    return 8 * nbytes / sum(linear.site.in_features * linear.site.out_features for linear in setting.plan.linears)


def _version(setting: Setting, taken: Sequence[int]) -> dict[str, LinearSpec]:
    """The spec of each linear, by its path."""
    return {spec.name: spec for group, number in zip(setting.groups, taken, strict=True) for spec in group.options[number] or ()}


def _allocated_groups(setting: Setting, taken: Sequence[int], rows: Sequence[Losses]) -> list[AllocatedGroup]:
    return [
        AllocatedGroup(
            name=group.name,
            linears=len(group.sites),
            weights=group.weights,
            scheme=str(setting.candidates[number]),
            nbytes=group.nbytes(setting.chosen),
            losses=losses,
        )
        for group, number, losses in zip(setting.groups, taken, rows, strict=True)
    ]
