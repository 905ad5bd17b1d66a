"""``ptq quantize``: a model in, a packed checkpoint folder out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ptqcli.cli.console import Output
from ptqcli.cli.load import silence_transformers
from ptqcli.cli.options import open_device
from ptqcli.cli.progress import track
from ptqcli.cli.quantize_flags import QuantizeCommand, all_flags
from ptqcli.cli.quantize_report import QuantizeProgress, plan_as_json, show_plan, show_report
from ptqcli.errors import UsageError
from ptqcli.model.locate import find_model

if TYPE_CHECKING:
    from ptqcli.recipe import Recipe
    from ptqcli.resources import Resources


@click.command(cls=QuantizeCommand)
@click.argument("model", required=False)
@all_flags
def command(
    model: str | None,
    recipe: str | None,
    output: Path | None,
    overwrite: bool,
    data_dir: Path | None,
    device: str,
    dtype: str,
    batch_size: int | None,
    activation_budget: float | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **request: Any,
) -> None:
    """Turn MODEL into a packed checkpoint folder.

    MODEL is a local folder or a hub id; left out, it is the small demo model that the package carries. The output head and the
    embeddings stay as they are.
    """
    from ptqcli.pipeline.output import check_output
    from ptqcli.pipeline.pipeline import plan_run, quantize
    from ptqcli.recipe import load_recipe
    from ptqcli.shipped import find_recipe

    words = Output(as_json=as_json, quiet=quiet)
    asked = load_recipe(None if recipe is None else find_recipe(recipe), _given(request))
    resources = _resources(device, dtype, batch_size, activation_budget)
    folder = find_model(model)
    silence_transformers()
    target = output.expanduser() if output else Path(_default_name(model, asked))
    if dry_run:
        check_output(target, folder, overwrite)
        _, plan = plan_run(folder, asked, resources)
        show_plan(plan, folder, target, words)
        words.result(plan_as_json(plan))
        return
    with track("block", quiet) as tracker:
        progress = QuantizeProgress(folder, target, words, tracker)
        report = quantize(folder, asked, target, overwrite=overwrite, resources=resources, data_dir=data_dir, progress=progress)
    click.get_current_context().obj.result_kept = not as_json
    show_report(report, words)
    words.result(report.to_json())


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in flags.items() if value is not None and value != ()}


def _resources(device: str, dtype: str, batch_size: int | None, activation_budget: float | None) -> Resources:
    import torch

    from ptqcli.resources import DEFAULT_ACTIVATION_BUDGET, Resources

    return Resources(
        device=open_device(device),
        dtype=None if dtype == "auto" else getattr(torch, dtype),
        batch_size=batch_size,
        activation_budget=DEFAULT_ACTIVATION_BUDGET if activation_budget is None else _bytes(activation_budget),
    )


def _bytes(gib: float) -> int:
    if not math.isfinite(gib * 1024**3):
        raise UsageError(f"--activation-budget {gib} is not a size; give a number of GiB")
    return int(gib * 1024**3)


def _default_name(model: str | None, recipe: Recipe) -> str:
    if model is None:
        name = "demo"
    elif Path(model).is_dir():
        name = Path(model).resolve().name
    else:
        name = model.rpartition("/")[2]
    return f"{name}-{recipe.algo}-{recipe.default_scheme}"
