"""The folder that ``ptq quantize`` writes when none is named: MODEL-ALGO-SCHEME, the algorithm's options that are not the usual ones, the
finish.

A scheme is the budget, such as 3.5bit, the mix, or the one of all linears, group size included; where they differ, it is the one that was
asked for, with ``mixed`` behind it if overrides are the reason. What stands in no name (the calibration text, say) is told when such a
folder is there already.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptqcli.cli.console import path_text
from ptqcli.errors import UsageError
from ptqcli.pipeline.report import read_report

if TYPE_CHECKING:
    from ptqcli.plan import Plan
    from ptqcli.recipe import Recipe

MOST_DIFFERENCES = 3


def default_output(model: str | None, folder: Path, plan: Plan, *, overwrite: bool) -> Path:
    """Where the checkpoint goes: into the working directory, or beside the model where that would be inside the model's own folder.

    model: as it was asked for, None for the demo model. folder: where it lies.
    Raises UsageError for a folder that another request has filled, saying what differs, unless it is to be overwritten.
    """
    words = [
        "demo" if model is None else _model_name(model),
        plan.recipe.algo,
        _numbers(plan),
        *(["mixed"] if plan.recipe.overrides or plan.recipe.ignore else []),
        *_unusual_options(plan.recipe),
        *([] if plan.recipe.finish == "none" else [f"finish-{plan.recipe.finish}"]),
    ]
    here, home = Path.cwd().resolve(), folder.resolve()
    target = (home.parent if here.is_relative_to(home) else Path()) / re.sub(r"[^\w.+-]", "_", "-".join(words))
    if not overwrite:
        _refuse_other_request(target, plan.recipe)
    return target


def _numbers(plan: Plan) -> str:
    """What the numbers are: the budget that they keep, the mix, or a scheme."""
    schemes, budget = list(plan.schemes()), plan.recipe.budget
    if budget is not None:
        return f"{budget.bits:g}bit" if budget.bits is not None else str(plan.recipe.target_size)
    return plan.recipe.mix or str(schemes[0] if len(schemes) == 1 else plan.recipe.default_scheme)


def _model_name(model: str) -> str:
    local = Path(model).expanduser()
    if local.is_file():
        return local.stem
    return local.resolve().name or "model" if local.is_dir() else model.rpartition("/")[2]


def _unusual_options(recipe: Recipe) -> Iterator[str]:
    """Options of the parts that are not at their defaults, but for those that the name of the scheme tells."""
    stored, told = recipe.stored()["options"], recipe.scheme_options()
    for part in recipe.algorithm.parts:
        for option in part.options:
            value = stored[part.name][option.name]
            if value == option.default or option.words in told:
                continue
            if isinstance(value, bool):
                yield option.flag if value else f"no-{option.flag}"
            else:
                yield f"{option.flag}-{value}"


def _refuse_other_request(target: Path, recipe: Recipe) -> None:
    report = read_report(target) if target.is_dir() else None
    if report is None:
        return
    asked = _flat(json.loads(json.dumps(recipe.stored())))
    made = _flat(report["recipe"])
    different = [f"{key} {_shown(made.get(key))}, not {_shown(asked.get(key))}" for key in asked if made.get(key) != asked[key]]
    if different:
        more = f" and {len(different) - MOST_DIFFERENCES} more" if len(different) > MOST_DIFFERENCES else ""
        raise UsageError(
            f"{path_text(target)}: already exists, from another request ({'; '.join(different[:MOST_DIFFERENCES])}{more}); "
            "choose another --output, or replace it with --overwrite"
        )


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """What is inside of sections as ``section.key``, options of parts as ``part.option``."""
    if not isinstance(value, dict):
        return {name.removeprefix("options."): value}
    return {path: found for key, entry in value.items() for path, found in _flat(entry, f"{name}.{key}" if name else key).items()}


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
