"""Every decision made and every input opened, before anything is written: what a dry run does, and a run first."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ptqcli.calibration.bos import window_bos
from ptqcli.calibration.chat import chat_writer
from ptqcli.calibration.rows import Rows
from ptqcli.calibration.text import calibration_windows, documents, source_path
from ptqcli.estimate import LIBRARY_BYTES
from ptqcli.model.rewritten import Rewrite
from ptqcli.model.skeleton import Skeleton
from ptqcli.model.source import ModelFolder, ModelSource
from ptqcli.pipeline.clock import Clock
from ptqcli.pipeline.folder import check_room
from ptqcli.pipeline.memory import return_freed_memory
from ptqcli.pipeline.output import check_output
from ptqcli.pipeline.progress import Progress
from ptqcli.pipeline.rewriting import proof_bytes, rewritten
from ptqcli.plan import Plan, make_plan
from ptqcli.recipe import Recipe
from ptqcli.resources import Resources, process_bytes

# Where the checkpoint goes, or what says so once it is known what will be in it.
Output = Path | Callable[[Plan], Path]


@dataclass(frozen=True, kw_only=True)
class CalibrationSet:
    """What a run is calibrated on.

    windows: token ids, int64 [windows, tokens]. bos: whether each begins with the beginning-of-sequence token. skipped_rows: rows of the
    text's tables that hold none.
    """

    windows: Tensor
    bos: bool
    skipped_rows: int


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run that can begin. inputs: files and folders that it reads beside the model. calibration: None when nothing looks at it."""

    skeleton: Skeleton
    plan: Plan
    output: Path
    inputs: list[Path]
    calibration: CalibrationSet | None


def plan_run(model: Path | ModelSource, recipe: Recipe, resources: Resources) -> tuple[Skeleton, Plan]:
    """Open the model, rewritten as transforms of the whole model do it, and decide everything that can be decided without its weights."""
    original = Skeleton(ModelFolder(model) if isinstance(model, Path) else model, recipe.blocks)
    skeleton, rewrites = rewritten(original, recipe)
    plan = make_plan(recipe, skeleton, resources)
    return skeleton, plan if not rewrites else _with_rewrites(plan, original, skeleton, rewrites, resources)


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
) -> Prepared:
    """Plan the run, see that ``output`` can be written, and read the calibration text.

    Raises UsageError for a request that cannot work and PTQError for inputs that cannot be read.
    """
    folder = model if isinstance(model, Path) else model.folder
    inputs = [path for path in (source_path(recipe.calib), data_dir) if path is not None and os.path.exists(path)]
    if isinstance(output, Path):  # told before a model is opened
        check_output(output, folder, overwrite, inputs)
    with clock.measure("plan"):
        skeleton, plan = plan_run(model, recipe, resources)
    if not isinstance(output, Path):
        output = output(plan)
        check_output(output, folder, overwrite, inputs)
    progress.planned(plan, output)
    check_room(output, plan.disk_bytes)
    calibration = None
    if plan.needs_calibration:
        progress.phase(f"reading calibration text from {recipe.calib}")
        with clock.measure("text"):
            calibration = _calibration_set(plan, skeleton.source.tokenizer(), data_dir)
            return_freed_memory()  # a tokenizer's work on a long text takes many times the text
        if calibration.skipped_rows:
            progress.phase(f"{recipe.calib}: {calibration.skipped_rows:,} rows without text are left out")
    return Prepared(skeleton=skeleton, plan=plan, output=output, inputs=inputs, calibration=calibration)


def _calibration_set(plan: Plan, tokenizer: Any, data_dir: Path | None) -> CalibrationSet:
    recipe, rows = plan.recipe, Rows(write_chat=chat_writer(tokenizer))
    bos = window_bos(tokenizer, recipe.bos)
    texts = documents(recipe.calib, "calibration", data_dir, rows)
    windows = calibration_windows(texts, tokenizer, recipe.nsamples, plan.seqlen, recipe.seed, bos)
    return CalibrationSet(windows=windows, bos=bos is not None, skipped_rows=rows.skipped)
