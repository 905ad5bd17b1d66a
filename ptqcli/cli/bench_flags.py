"""What the flags of ``ptq bench`` take, and what is refused before anything is measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import click
from click.core import ParameterSource

from ptqcli.cli.output_file import check_file
from ptqcli.errors import UsageError

MODEL_FLAGS = {"batch": "--batch", "prompt": "--prompt", "new_tokens": "--new-tokens", "baseline": "--baseline or --no-baseline"}
KERNEL_FLAGS = {"tokens": "--tokens", "peers": "--peers", "plot": "--plot", "shapes": "--shapes"}


def parse_counts(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """``1,4,16`` as numbers in the order given, each once."""
    if value is None:
        return None
    parts = [part.strip() for part in value.split(",")]
    if not all(part.isdecimal() and part.isascii() and 0 < int(part) < 2**31 for part in parts):
        raise click.BadParameter(f"{value!r} is not a list of whole numbers from 1 on, such as 1,4,16")
    return tuple(dict.fromkeys(int(part) for part in parts))


def check_flags(ctx: click.Context) -> None:
    """Raise click.UsageError for flags that have no effect or exclude each other, and UsageError for a time that is none."""
    _refuse_without_effect(ctx)
    seconds = ctx.params["seconds"]
    if not math.isfinite(seconds):
        raise UsageError(f"--seconds {seconds} is not a time; give a number of seconds")
    if ctx.params["checkpoint"] is not None and ctx.params["shapes"] is not None:
        raise click.UsageError("CHECKPOINT and --shapes exclude each other: a checkpoint has its own shapes")
    if ctx.params["baseline"] and ctx.params["no_baseline"]:
        raise click.UsageError("--baseline and --no-baseline exclude each other")


def _refuse_without_effect(ctx: click.Context) -> None:
    only, shapes = ctx.params["only"], ctx.params["shapes"]
    if only == "kernels" or shapes is not None:
        reason, flags = "--shapes" if shapes is not None else "--only kernels", {**MODEL_FLAGS, "no_baseline": MODEL_FLAGS["baseline"]}
        _refuse_given(ctx, flags, f"has no effect with {reason}: the whole model is not measured")
    if only == "model":
        _refuse_given(ctx, KERNEL_FLAGS, "has no effect with --only model: no kernel is measured by itself")
    if ctx.params["schemes"] and shapes is None:
        raise click.UsageError("--scheme has no effect without --shapes: a checkpoint has its own")
    if ctx.params["overwrite"] and ctx.params["plot"] is None:
        raise click.UsageError("--overwrite has no effect without --plot")


def _refuse_given(ctx: click.Context, flags: Mapping[str, str], why: str) -> None:
    for name, flag in flags.items():
        if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{flag} {why}")


def check_plot(file: Path, overwrite: bool, endings: Sequence[str] = (".png",)) -> None:
    """Raise UsageError, or PTQError where matplotlib is missing, unless a picture of such an ending can be written to ``file``."""
    from ptqcli.bench.roofline import check_installed

    check_file("--plot", file, overwrite, *endings)
    check_installed()
