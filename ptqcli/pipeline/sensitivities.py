"""Sensitivities alone, without a budget and without a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ptqcli.model.source import ModelSource
from ptqcli.pipeline.budget import make_setting, measure_all, usual_method, windows_of
from ptqcli.pipeline.prepare import plan_opened
from ptqcli.pipeline.progress import Progress
from ptqcli.pipeline.texts import TextMaker
from ptqcli.recipe import Recipe
from ptqcli.resources import Resources
from ptqcli.sensitivity.table import SensitivityTable


def measure_sensitivities(
    model: Path | ModelSource,
    recipe: Recipe,
    methods: Sequence[str],
    *,
    resources: Resources,
    data_dir: Path | None,
    progress: Progress,
    journal: Path | None = None,
) -> SensitivityTable:
    """What each candidate costs each group of linears of ``model``, by each of ``methods``, by the usual one where there is none.

    recipe: with a budget, whose candidates count, but not its size. journal: where what is found is kept until all is.
    Raises UsageError and PTQError for what cannot be measured.
    """
    opened, plan = plan_opened(model, recipe, resources)
    maker = TextMaker(recipe=recipe, skeleton=opened.opened, resources=resources, data_dir=data_dir, progress=progress)
    setting = make_setting(plan, opened.skeleton, windows_of(plan, maker), resources, progress, journal)
    return measure_all(setting, methods or [usual_method(setting)])
