"""Every decision made and every input opened, before anything is written: what a dry run does, and a run first."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ptqcli.calibration.text import calibration_windows, documents
from ptqcli.model.skeleton import Skeleton
from ptqcli.model.source import ModelFolder, ModelSource
from ptqcli.pipeline.clock import Clock
from ptqcli.pipeline.folder import check_room
from ptqcli.pipeline.output import check_output
from ptqcli.pipeline.progress import Progress
from ptqcli.plan import Plan, make_plan
from ptqcli.recipe import Recipe
from ptqcli.resources import Resources

# Where the checkpoint goes, or what says so once it is known what will be in it.
Output = Path | Callable[[Plan], Path]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run that can begin. inputs: files and folders that it reads beside the model. windows: of the calibration text, int64
    [windows, tokens], None when nothing looks at it.
    """

    skeleton: Skeleton
    plan: Plan
    output: Path
    inputs: list[Path]
    windows: Tensor | None


def plan_run(model: Path | ModelSource, recipe: Recipe, resources: Resources) -> tuple[Skeleton, Plan]:
    """Open the model and decide everything that can be decided without its weights."""
    skeleton = Skeleton(ModelFolder(model) if isinstance(model, Path) else model, recipe.blocks)
    return skeleton, make_plan(recipe, skeleton, resources)


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
    inputs = [path for path in (Path(recipe.calib), data_dir) if path is not None and os.path.exists(path)]
    if isinstance(output, Path):  # told before a model is opened
        check_output(output, folder, overwrite, inputs)
    with clock.measure("plan"):
        skeleton, plan = plan_run(model, recipe, resources)
    if not isinstance(output, Path):
        output = output(plan)
        check_output(output, folder, overwrite, inputs)
    progress.planned(plan, output)
    check_room(output, plan.disk_bytes)
    windows = None
    if plan.needs_calibration:
        progress.phase(f"reading calibration text from {recipe.calib}")
        with clock.measure("text"):
            texts = documents(recipe.calib, "calibration", data_dir)
            windows = calibration_windows(texts, skeleton.source.tokenizer(), recipe.nsamples, plan.seqlen, recipe.seed)
    return Prepared(skeleton=skeleton, plan=plan, output=output, inputs=inputs, windows=windows)
