"""The order of HAWQ-V2 for recipes between two: how much the loss rises when a linear is rounded as the smaller one says."""

from __future__ import annotations

from pathlib import Path

from ptqcli.model.skeleton import Skeleton
from ptqcli.pipeline.budget import make_setting, measure_all
from ptqcli.pipeline.progress import Progress
from ptqcli.pipeline.texts import TextMaker
from ptqcli.plan import Plan
from ptqcli.resources import Resources

METHOD = "hawq"


def traces(plan: Plan, skeleton: Skeleton, resources: Resources, data_dir: Path | None, progress: Progress) -> dict[str, float]:
    """Mean Hessian trace times squared error of each linear in the blocks, by its path; of a group that has one scheme, together.

    Raises what ``pipeline.budget.measure_all`` does: for an encoder, and where the model does not fit into memory.
    """
    maker = TextMaker(recipe=plan.recipe, skeleton=skeleton, resources=resources, data_dir=data_dir, progress=progress)
    calibration = maker.make(maker.choose(plan.seqlen), plan.seqlen, rehearsal=False)
    setting = make_setting(plan, skeleton, calibration, resources, progress, candidates=[plan.recipe.default_scheme])
    table = measure_all(setting, [METHOD])
    return {name: group.losses[METHOD][0] or 0.0 for group in table.groups for name in group.linears}
