"""``ptq quantize``: a model in, a packed checkpoint folder out."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ptqcli.cli.console import Output, path_text, size_text, time_text
from ptqcli.cli.locate import find_model
from ptqcli.cli.options import data_dir_option, device_option, json_option, quiet_option
from ptqcli.cli.progress import Tracker, track

if TYPE_CHECKING:
    from ptqcli.pipeline import LayerReport, Report, Setting
    from ptqcli.recipe import Override, Plan, Recipe

WORST_LAYERS = 5
OVERRIDE_EXAMPLES = "REGEX:skip or REGEX:bits=8,group=64,asym"


# Every recipe flag is None unless it was given, so that a value in a recipe file is not overridden by a default of ours.
# The defaults shown are those of `ptqcli.recipe.Recipe`; a test compares them.
@click.command()
@click.argument("model", required=False)
@click.option("--algo", metavar="rtn|gptq", show_default="gptq", help="How codes are chosen: round to nearest, or GPTQ.")
@click.option("--wbits", type=int, metavar="2|3|4|8", show_default="4", help="Bits per weight.")
@click.option("--group-size", type=int, metavar="N", show_default="128", help="Neighbouring columns that share a scale; -1: whole rows.")
@click.option("--sym/--asym", "symmetric", default=None, show_default="sym", help="Fixed zero point, or one per group.")
@click.option("--act-order/--no-act-order", default=None, show_default="act-order", help="GPTQ: most active columns first.")
@click.option(
    "--static-groups/--no-static-groups",
    default=None,
    show_default="static-groups",
    help="GPTQ: with act-order, groups stay neighbours, so the file needs no index.",
)
@click.option("--damp", type=float, metavar="X", show_default="0.01", help="GPTQ: damping, as a share of the Hessian's mean diagonal.")
@click.option("--scale-search", metavar="minmax|mse", show_default="minmax", help="How a group's scale is fitted.")
@click.option(
    "--sequential/--no-sequential",
    default=None,
    show_default="sequential",
    help="Later linears of a block see the earlier ones quantized, or the whole block as it was (quicker).",
)
@click.option("--calib", metavar="builtin|wikitext2|c4|pile|PATH", show_default="builtin", help="Calibration text.")
@click.option("--nsamples", type=int, metavar="N", show_default="128", help="Calibration windows.")
@click.option("--seqlen", type=int, metavar="N", show_default="what the model allows, at most 2048", help="Tokens in a window.")
@click.option("--seed", type=int, metavar="N", show_default="0", help="Of the choice of windows.")
@click.option("--override", "overrides", multiple=True, metavar="REGEX:WHAT", help=f"Treat some linears otherwise: {OVERRIDE_EXAMPLES}.")
@click.option("--ignore", multiple=True, metavar="REGEX", help="Leave these linears as they are.")
@click.option("--blocks", metavar="NAME", help="Which list of blocks to quantize, where it is not evident.")
@click.option("--recipe", "recipe_file", type=click.Path(path_type=Path), metavar="FILE", help="YAML file of the above; flags win over it.")
@click.option("--output", type=click.Path(path_type=Path), metavar="FOLDER", show_default="./MODEL-ALGO-w4g128", help="Where to write.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier checkpoint in the output folder.")
@data_dir_option
@device_option
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
@click.pass_context
def command(ctx: click.Context, model: str | None, **flags: Any) -> None:
    """Turn MODEL into a packed checkpoint folder.

    MODEL is a local folder or a hub id; left out, it is the small demo model that the package carries. The output head and the
    embeddings stay as they are.
    """
