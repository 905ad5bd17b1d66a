"""Every decision made and every input opened, before anything is written: what a dry run does, and a run first."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ptqcli.calibration.sources import read_calib
from ptqcli.calibration.text import source_path
from ptqcli.errors import UsageError
from ptqcli.estimate import LIBRARY_BYTES, memory_bytes
from ptqcli.formats import find_format
from ptqcli.formats.sources import open_source
from ptqcli.model.declared import DeclaredModel, is_declared
from ptqcli.model.rewritten import Rewrite
from ptqcli.model.skeleton import Skeleton
from ptqcli.model.source import ModelSource
from ptqcli.pipeline.budget import Allocated, allocate_bits, check_kept, journal_beside
from ptqcli.pipeline.clock import Clock
from ptqcli.pipeline.folder import check_room
from ptqcli.pipeline.memory import return_freed_memory
from ptqcli.pipeline.output import check_output
from ptqcli.pipeline.outside import untied, untied_note
from ptqcli.pipeline.progress import Progress
from ptqcli.pipeline.ranks import Ranks
from ptqcli.pipeline.rewriting import Rewritten, proof_bytes, rewritten
from ptqcli.pipeline.texts import CalibrationSet, TextMaker
from ptqcli.plan import Plan, make_plan
from ptqcli.plan_memory import check_memory
from ptqcli.plan_texts import ChooseTexts
from ptqcli.recipe import Recipe
from ptqcli.resources import Resources, process_bytes
from ptqcli.solvers.per_matrix import as_block_solver

# Where the checkpoint goes, or what says so once it is known what will be in it.
Output = Path | Callable[[Plan], Path]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run that can begin. inputs: files and folders that it reads beside the model. calibration: None when nothing looks at it.

    resources: with the activation budget that the plan has found. declared: only config.json is there, so it cannot begin here.
    """

    skeleton: Skeleton
    plan: Plan
    output: Path
    inputs: list[Path]
    calibration: CalibrationSet | None
    resources: Resources
    declared: bool = False


def plan_run(model: Path | ModelSource, recipe: Recipe, resources: Resources) -> tuple[Skeleton, Plan]:
    """Open the model and decide everything that can be decided without its weights."""
    opened, plan = plan_opened(model, recipe, resources)
    return opened.skeleton, plan


def plan_opened(model: Path | ModelSource, recipe: Recipe, resources: Resources) -> tuple[Opened, Plan]:
    """As ``plan_run``, with the model as it was before transforms of the whole model."""
    opened = _rewritten(open_skeleton(model, recipe), recipe)
    return opened, _planned(opened, recipe, resources)


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A model as the file has it, with a head and an embedding of its own where one of them is quantized, and as transforms of the whole
    model rewrite it."""

    opened: Skeleton
    untied: Skeleton
    found: Rewritten

    @property
    def skeleton(self) -> Skeleton:
        """What is quantized."""
        return self.found.skeleton


def _rewritten(opened: Skeleton, recipe: Recipe) -> Opened:
    original = untied(opened, recipe)
    return Opened(opened=opened, untied=original, found=rewritten(original, recipe))


def _planned(
    model: Opened,
    recipe: Recipe,
    resources: Resources,
    choose_texts: ChooseTexts | None = None,
    allocation: Allocated | None = None,
) -> Plan:
    """The plan of the model as it is rewritten. allocation: what became of a budget."""
    opened, skeleton = model.opened, model.skeleton
    linears, of_mix = {site.name for site in skeleton.linears}, recipe.schemes_of_mix(skeleton.config, skeleton.tensor_shapes)
    assigned = {name: scheme for name, scheme in of_mix.items() if name in linears}
    if allocation is not None:
        assigned |= allocation.schemes
    plan = make_plan(recipe, skeleton, resources, assigned, choose_texts)
    notes = () if model.untied is opened else (untied_note(find_format(recipe.format), plan, opened, skeleton),)
    plan = replace(plan, bytes_before=opened.total_bytes, notes=(*model.found.left_out, *notes, *plan.notes))
    if allocation is not None:
        plan = replace(plan, allocation=allocation.told, notes=(*allocation.notes, *plan.notes))
    return _with_rewrites(plan, opened, skeleton, model.found.rewrites, resources) if model.found.rewrites else plan


def _with_rewrites(plan: Plan, original: Skeleton, skeleton: Skeleton, rewrites: Sequence[Rewrite], resources: Resources) -> Plan:
    """What is added to the plan of a rewritten model: its cost, compared with the model as it was, and what is to be known."""
    solver = plan.recipe.algorithm.solver.name
    own = [note for transform in plan.recipe.model_transforms() for note in transform.notes(solver)]
    held = process_bytes() + LIBRARY_BYTES if resources.device.type == "cpu" else 0
    return replace(
        plan,
        bytes_before=original.total_bytes,
        memory_bytes=max(plan.memory_bytes, held + proof_bytes(skeleton)),
        rewrites=tuple(rewrite.done for rewrite in rewrites),
        notes=(*(note for rewrite in rewrites for note in rewrite.notes), *own, *plan.notes),
    )


def open_skeleton(model: Path | ModelSource, recipe: Recipe) -> Skeleton:
    """The model without its weights."""
    return Skeleton(open_source(model) if isinstance(model, Path) else model, recipe.blocks)


def prepare(
    model: Path | ModelSource,
    recipe: Recipe,
    output: Output,
    *,
    overwrite: bool,
    resources: Resources,
    data_dir: Path | None,
    progress: Progress,
    clock: Clock,
    rehearsal: bool = False,
    ranks: Ranks | None = None,
) -> Prepared:
    """Plan the run, see that ``output`` can be written, and read the calibration text.

    rehearsal: the run will not follow, so the model writes no text, unless a budget is to be shared out, and one of which only config.json
    is there is planned for a machine that is not this one. ranks: the processes that share the run, of which the first decides about the
    output, the text and the budget.
    Raises UsageError for a request that cannot work and PTQError for inputs that cannot be read.
    """
    ranks = ranks or Ranks()
    folder = model if isinstance(model, Path) else model.folder
    texts = [source_path(share.source) for share in read_calib(recipe.calib)]
    inputs = [path for path in (*texts, data_dir) if path is not None and os.path.exists(path)]
    if isinstance(output, Path) and ranks.first:  # told before a model is opened
        check_output(output, folder, overwrite, inputs)
    declared = rehearsal and isinstance(model, Path) and is_declared(model)
    with clock.measure("plan"):
        source = DeclaredModel(model) if declared and isinstance(model, Path) else model
        original = open_skeleton(source, recipe)
        maker = TextMaker(recipe=recipe, skeleton=original, resources=resources, data_dir=data_dir, progress=progress)
        opened = _rewritten(original, recipe)
        plan = _planned(opened, recipe, resources, None if declared else lambda seqlen: ranks.from_first(lambda: maker.choose(seqlen)))
        skeleton = opened.skeleton
        _check_shared(plan, skeleton, ranks.size)
    output = ranks.from_first(lambda: _checked(output, plan, folder, overwrite, inputs))
    if recipe.budget is not None:
        if declared:
            raise UsageError(f"{model}: a budget is shared out by what rounding the weights costs, and only config.json is there")
        with clock.measure("sensitivity"):
            kept = None if rehearsal else journal_beside(output)
            allocation = ranks.from_first(lambda: allocate_bits(plan, skeleton, maker, resources, progress, kept))
        plan = _planned(opened, recipe, resources, lambda _: plan.texts, allocation)
        check_kept(plan, recipe.budget)
    progress.planned(plan, output)
    if declared:
        return Prepared(skeleton=skeleton, plan=plan, output=output, inputs=inputs, calibration=None, resources=resources, declared=True)
    resources = replace(resources, activation_budget=plan.activation_budget)
    if ranks.first:
        check_room(output, plan.disk_bytes)
        _check_fits(plan, skeleton, resources)
    with clock.measure("text"):
        calibration = _read_texts(plan, maker, progress, rehearsal, ranks) if plan.needs_calibration else None
    return Prepared(skeleton=skeleton, plan=plan, output=output, inputs=inputs, calibration=calibration, resources=resources)


def _read_texts(plan: Plan, maker: TextMaker, progress: Progress, rehearsal: bool, ranks: Ranks) -> CalibrationSet:
    """The calibration windows of the first process, with what a person should know of them."""
    calibration = ranks.from_first(lambda: maker.make(plan.texts, plan.seqlen, rehearsal))
    return_freed_memory()  # a tokenizer's work on a long text takes many times the text
    if calibration.skipped_rows:
        progress.phase(f"{plan.recipe.calib}: {calibration.skipped_rows:,} rows without text are left out")
    for share, known in calibration.known.items():
        if known is not None and known.foreign:
            progress.remark(f"{share.source} is foreign to the model: {known}; give text of the kind that it will see")
    return calibration


def _checked(output: Output, plan: Plan, folder: Path | None, overwrite: bool, inputs: Sequence[Path]) -> Path:
    """``output``, or what names it by the plan, which is then looked at."""
    if isinstance(output, Path):
        return output
    named = output(plan)
    check_output(named, folder, overwrite, inputs)
    return named


def _check_fits(plan: Plan, skeleton: Skeleton, resources: Resources) -> None:
    """Raise PTQError where the run does not fit into the memory that it may take."""

    def need(recipe: Recipe, tried: Resources, seqlen: int) -> int:
        return memory_bytes(recipe, plan.linears, skeleton, seqlen, plan.texts, tried)

    check_memory(plan.memory_bytes, plan.recipe, resources, plan.seqlen, need)


def _check_shared(plan: Plan, skeleton: Skeleton, processes: int) -> None:
    """Raise UsageError for what so many processes cannot share."""
    solver = as_block_solver(plan.recipe.solver())
    if processes == 1:
        return
    if not solver.shares:
        raise UsageError(f"algo {plan.recipe.algo}: {solver.name} does not work in several processes; run it in one")
    if plan.needs_calibration and plan.texts.windows < processes:
        raise UsageError(
            f"nsamples {plan.texts.windows}: is fewer than the {processes} processes that share the calibration windows; "
            "give more, or start fewer processes"
        )
