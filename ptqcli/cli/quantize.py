"""``ptq quantize``: a model in, a packed checkpoint folder out."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ptqcli.cli.console import Output, path_text, size_text, time_text
from ptqcli.cli.load import hush_transformers
from ptqcli.cli.locate import REPORT_NAME
from ptqcli.cli.options import data_dir_option, device_option, json_option, open_device, quiet_option
from ptqcli.cli.progress import Tracker, track
from ptqcli.cli.report import LAYER_COLUMNS, layer_row
from ptqcli.errors import UsageError
from ptqcli.model.locate import find_model

if TYPE_CHECKING:
    from ptqcli.pipeline.report import Report
    from ptqcli.plan import Plan
    from ptqcli.recipe import Override, Recipe
    from ptqcli.resources import Resources

WORST_LAYERS = 5
MOST_CHOICES = 4
OVERRIDE_EXAMPLES = "REGEX:skip or REGEX:bits=8,group=64,asym or REGEX:abits=16"


def _parse_overrides(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[Override, ...]:
    return tuple(parse_override(value) for value in values)


def parse_override(text: str) -> Override:
    """``REGEX:skip`` or ``REGEX:bits=8,group=64,sym|asym,abits=8|16``; what stands after the last colon is not part of the pattern."""
    from ptqcli.recipe import Override

    pattern, colon, changes = text.rpartition(":")
    if not (pattern and colon and changes):
        raise click.BadParameter(f"{text!r} has {_missing_part(pattern, colon)}; write {OVERRIDE_EXAMPLES}")
    values: dict[str, Any] = {}
    for change in changes.split(","):
        key, _, value = change.strip().partition("=")
        values |= _override_value(key, value, text)
    return Override(pattern, **values)


def _missing_part(pattern: str, colon: str) -> str:
    if not colon:
        return "no colon"
    return "nothing after the colon" if pattern else "no pattern"


def _override_value(key: str, value: str, text: str) -> dict[str, Any]:
    words = {"skip": {"skip": True}, "sym": {"symmetric": True}, "asym": {"symmetric": False}}
    numbers = {"bits": "bits", "group": "group_size", "abits": "abits"}
    if key in words and not value:
        return words[key]
    if key in numbers and re.fullmatch(r"-?[0-9]+", value):
        return {numbers[key]: int(value)}
    raise click.BadParameter(f"{key}{'=' if value else ''}{value} in {text!r} is not understood; write {OVERRIDE_EXAMPLES}")


def _parse_alpha(ctx: click.Context, param: click.Parameter, value: str | None) -> float | str | None:
    if value in (None, "auto"):
        return value
    try:
        return float(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is neither a number nor auto") from error


# Every recipe flag is None unless it was given, so that a value in a recipe file is not overridden by a default of ours.
# The defaults shown are those of `ptqcli.recipe.Recipe`; a test compares them.
@click.command()
@click.argument("model", required=False)
@click.option(
    "--algo",
    metavar="NAME[+NAME]",
    show_default="gptq",
    help="rtn, gptq, obq, awq, smoothquant, llm-int8, or several joined: transforms, then a solver, such as awq+gptq.",
)
@click.option("--wbits", type=int, metavar="2|3|4|8", show_default="4; smoothquant, llm-int8: 8", help="Bits per weight.")
@click.option(
    "--group-size",
    type=int,
    metavar="N",
    show_default="128; with 8-bit activations: -1",
    help="Neighbouring columns that share a scale; -1: whole rows; 0: the whole matrix.",
)
@click.option("--sym/--asym", "symmetric", default=None, show_default="sym", help="Fixed zero point, or one per group.")
@click.option(
    "--abits",
    type=int,
    metavar="8|16",
    show_default="16; smoothquant, llm-int8: 8",
    help="Bits per activation; 16 leaves them as they are.",
)
@click.option(
    "--act-scales",
    metavar="token|tensor|static",
    show_default="token",
    help="Scales of 8-bit activations: for each token or for the whole tensor when the model runs, or for the tensor from calibration.",
)
@click.option(
    "--outliers",
    metavar="none|dynamic|static",
    show_default="none; llm-int8: dynamic",
    help="Columns with outliers in 16 bit: found when the model runs (the paper's), or fixed by calibration.",
)
@click.option("--outlier-threshold", type=float, metavar="X", show_default="6.0", help="Magnitude above which an input is an outlier.")
@click.option("--awq-clip/--no-awq-clip", default=None, show_default="awq-clip", help="AWQ: search the range of every group, too.")
@click.option(
    "--smooth-alpha", metavar="X|auto", callback=_parse_alpha, show_default="0.5", help="SmoothQuant: share moved to the weights."
)
@click.option(
    "--smooth-level",
    metavar="O1|O2|O3",
    help="SmoothQuant's settings: one scale for a weight matrix, and --act-scales token, tensor or static.",
)
@click.option("--act-order/--no-act-order", default=None, show_default="act-order", help="GPTQ: most active columns first.")
@click.option(
    "--static-groups/--no-static-groups",
    default=None,
    show_default="static-groups",
    help="GPTQ: with act-order, groups stay neighbours, so the file needs no index.",
)
@click.option("--damp", type=float, metavar="X", show_default="0.01", help="GPTQ, OBQ: damping, as a share of the Hessian's mean diagonal.")
@click.option("--scale-search", metavar="minmax|mse", show_default="mse", help="How a group's scale is fitted.")
@click.option(
    "--sequential/--no-sequential",
    default=None,
    show_default="sequential",
    help="Calibrate later linears of a block behind the quantized earlier ones, or all on the block as it was (less memory).",
)
@click.option("--calib", metavar="builtin|wikitext2|c4|pile|PATH", show_default="builtin", help="Calibration text.")
@click.option("--nsamples", type=int, metavar="N", show_default="128", help="Calibration windows.")
@click.option("--seqlen", type=int, metavar="N", show_default="what the model allows, at most 2048", help="Tokens in a window.")
@click.option("--seed", type=int, metavar="N", show_default="0", help="Of the choice of windows.")
@click.option(
    "--override",
    "overrides",
    multiple=True,
    callback=_parse_overrides,
    metavar="REGEX:WHAT",
    help=f"Treat some linears otherwise: {OVERRIDE_EXAMPLES}.",
)
@click.option("--ignore", multiple=True, metavar="REGEX", help="Leave these linears as they are.")
@click.option("--blocks", metavar="NAME", help="Which list of blocks to quantize, where it is not evident.")
@click.option("--recipe", "recipe_file", type=click.Path(path_type=Path), metavar="FILE", help="YAML file of the above; flags win over it.")
@click.option("--output", type=click.Path(path_type=Path), metavar="FOLDER", show_default="./MODEL-ALGO-w4a16-g128", help="Where to write.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier checkpoint in the output folder.")
@data_dir_option
@device_option
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="Of the calibration passes; the checkpoint keeps the model's own. float32 is quicker on a CPU without bfloat16 arithmetic.",
)
@click.option("--batch-size", type=click.IntRange(min=1), metavar="N", show_default="by window length", help="Windows in one forward pass.")
@click.option(
    "--activation-budget",
    type=click.FloatRange(min=0),
    metavar="GIB",
    show_default="4",
    help="Activations beyond this go to a file in the output folder.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be done and what it needs, and stop.")
@json_option
@quiet_option
def command(
    model: str | None,
    recipe_file: Path | None,
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
    **recipe_flags: Any,
) -> None:
    """Turn MODEL into a packed checkpoint folder.

    MODEL is a local folder or a hub id; left out, it is the small demo model that the package carries. The output head and the
    embeddings stay as they are.
    """
    from ptqcli.pipeline.folder import check_output
    from ptqcli.pipeline.pipeline import plan_run, quantize
    from ptqcli.recipe import load_recipe

    words = Output(as_json=as_json, quiet=quiet)
    recipe = load_recipe(recipe_file, _given(recipe_flags))
    resources = _resources(device, dtype, batch_size, activation_budget)
    folder = find_model(model)
    hush_transformers()
    target = output.expanduser() if output else Path(_default_name(model, recipe))
    if dry_run:
        check_output(target, folder, overwrite)
        _, plan = plan_run(folder, recipe, resources)
        _show_plan(plan, folder, target, words)
        words.result(_plan_as_json(plan))
        return
    with track("block", quiet) as tracker:
        listener = _Progress(folder, target, words, tracker)
        report = quantize(folder, recipe, target, overwrite=overwrite, resources=resources, data_dir=data_dir, listener=listener)
    _show_report(report, words)
    words.result(report.to_json())


# Flags


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
    if not math.isfinite(gib):
        raise UsageError(f"--activation-budget {gib} is not a size; give a number of GiB")
    return int(gib * 1024**3)


def _default_name(model: str | None, recipe: Recipe) -> str:
    if model is None:
        name = "demo"
    elif Path(model).is_dir():
        name = Path(model).resolve().name
    else:
        name = model.rpartition("/")[2]
    return f"{name}-{recipe.algo}-{recipe.scheme}"


# What is shown


class _Progress:
    """Listens to the pipeline and tells a tracker."""

    def __init__(self, model: Path, target: Path, words: Output, tracker: Tracker) -> None:
        self._model, self._target, self._words, self._tracker = model, target, words, tracker
        self._errors: list[float] = []

    def planned(self, plan: Plan) -> None:
        _show_plan(plan, self._model, self._target, self._words)

    def stage(self, text: str) -> None:
        self._tracker.say(text)

    def block_started(self, index: int, count: int) -> None:
        self._errors.clear()
        if index == 0:
            self._tracker.say(f"quantizing {count} blocks")

    def detail(self, text: str) -> None:
        self._tracker.note(text)

    def layer_progress(self, name: str, done: int, total: int) -> None:
        self._tracker.part(name, done, total)

    def layer_done(self, name: str, error: float) -> None:
        self._errors.append(error)
        self._tracker.note(f"{name}  error {error:.4f}")

    def block_done(self, index: int, count: int) -> None:
        worst = f", largest error {max(self._errors):.4f}" if self._errors else ""
        self._tracker.step(index + 1, count, f"{len(self._errors)} linears{worst}")


def _show_plan(plan: Plan, model: Path, target: Path, words: Output) -> None:
    words.facts(
        [
            ("model", path_text(model)),
            ("output", path_text(target)),
            *plan.summary_rows(),
            ("size", f"{size_text(plan.bytes_before)} now, {size_text(plan.bytes_after)} afterwards"),
            ("disk needed", f"{size_text(plan.disk_bytes)} while it is written"),
            ("memory needed", f"about {size_text(plan.memory_bytes)} on top of Python and torch"),
        ]
    )


def _plan_as_json(plan: Plan) -> dict[str, Any]:
    return {
        "recipe": asdict(plan.recipe),
        "linears": [{"name": linear.name, "scheme": str(linear.scheme)} for linear in plan.linears],
        "skipped": plan.skipped,
        "outside": plan.outside,
        "seqlen": plan.seqlen,
        "bytes_before": plan.bytes_before,
        "bytes_after": plan.bytes_after,
        "disk_bytes": plan.disk_bytes,
        "memory_bytes": plan.memory_bytes,
        "notes": plan.notes,
    }


def _transformed(report: Report) -> list[tuple[str, str]]:
    """What transforms did, one row each, and what they had to leave alone."""
    used = [fold for fold in report.folds if fold.left_alone is None]
    left = [fold for fold in report.folds if fold.left_alone is not None]
    if not report.folds:
        return []
    linears = {layer.name for layer in report.layers}
    reached = linears & {reader for fold in used for reader in fold.readers}
    rows = [("folds", f"{len(used)} found and proved; they reach {len(reached)} of {len(linears)} linears")]
    for name in dict.fromkeys(name for fold in used for name, *_ in fold.choices):
        choices = Counter(choice for fold in used for part, choice, _ in fold.choices if part == name)
        more = ", ..." if len(choices) > MOST_CHOICES else ""
        rows.append((name, ", ".join(f"{choice} x {count}" for choice, count in choices.most_common(MOST_CHOICES)) + more))
    if left:
        more = f", and {len(left) - 1} more in {REPORT_NAME}" if len(left) > 1 else ""
        rows.append(("left alone", f"{left[0].producer or ', '.join(left[0].readers)}: {left[0].left_alone}{more}"))
    return rows


def _handled(report: Report) -> list[tuple[str, str]]:
    """What the solver had to handle anywhere, one row for all layers; nothing if there was nothing."""
    raised = sum(layer.damp_raised for layer in report.layers)
    inputs = sum(layer.never_activated for layer in report.layers)
    groups = sum(layer.zero_groups for layer in report.layers)
    found = [
        f"damping raised in {raised} linears" if raised else "",
        f"{inputs} input columns never activated" if inputs else "",
        f"{groups} groups of zeros" if groups else "",
    ]
    told = ", ".join(text for text in found if text)
    return [("handled", told)] if told else []


def _outliers(report: Report) -> list[tuple[str, str]]:
    shares = {layer.name: layer.outlier_share for layer in report.layers if layer.outlier_share is not None}
    if not shares:
        return []
    most = max(shares, key=lambda name: shares[name])
    return [
        (
            "outlier columns",
            f"{sum(shares.values()) / len(shares):.2%} of a linear's columns on average, at most {shares[most]:.2%} ({most})",
        )
    ]


def _show_report(report: Report, words: Output) -> None:
    worst = sorted(report.layers, key=lambda layer: -layer.relative_error)[:WORST_LAYERS]
    words.table(
        f"Worst layers by relative {report.error_kind} error",
        LAYER_COLUMNS,
        (layer_row(asdict(layer)) for layer in worst),
    )
    share = report.bytes_after / report.bytes_before
    words.say()
    words.facts(
        [
            ("written", path_text(Path(report.output))),
            ("size", f"{size_text(report.bytes_before)} before, {size_text(report.bytes_after)} after ({share:.0%})"),
            ("bits per weight", f"{report.bits_per_weight:.3f} in the quantized linears, everything stored for them counted"),
            *_transformed(report),
            *_outliers(report),
            *_handled(report),
            ("time", time_text(report.seconds)),
            ("peak memory", size_text(report.peak_memory_bytes)),
        ]
    )
