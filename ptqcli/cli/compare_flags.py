"""Flags of the commands that measure how good checkpoints are, and what is refused before anything is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ptqcli.cli import completion
from ptqcli.cli.evaluate_tasks import TaskFlags, asker
from ptqcli.cli.options import NamedPath, data_dir_option, device_option, json_option, kernel_option, open_device, quiet_option
from ptqcli.cli.output_file import check_file
from ptqcli.errors import UsageError

if TYPE_CHECKING:
    from ptqcli.comparing.run import Settings

PUBLISHED_SEQLEN = 2048  # of ptqcli.evaluation.measure, whose import takes torch along; a test compares the two
USUAL_TOKENS = 131_072  # of ptqcli.comparing.texts, likewise

_MEASURING = (
    click.option(
        "--ppl",
        "texts",
        multiple=True,
        show_default="builtin, and wikitext2 and c4 where they are on this machine",
        metavar="wikitext2|c4|builtin|PATH",
        shell_complete=completion.texts("evaluation"),
        help="Text to measure perplexity on, of a table FILE:COLUMN too; may be given several times.",
    ),
    click.option(
        "--tokens",
        type=click.IntRange(min=2),
        metavar="N",
        show_default=f"all; without --ppl {USUAL_TOKENS:,}",
        help="Measure on the first N tokens of each text.",
    ),
    click.option(
        "--seqlen",
        type=int,
        metavar="N",
        show_default=f"{PUBLISHED_SEQLEN}, or the model's positions if fewer",
        help="Tokens in a window.",
    ),
    click.option("--stride", type=int, metavar="N", show_default="seqlen: no overlap", help="Tokens from one window to the next."),
    click.option(
        "--bos",
        metavar="auto|yes|no",
        default="auto",
        show_default=True,
        help="Whether windows begin with the beginning-of-sequence token; auto: if the tokenizer puts it in front of a text by itself.",
    ),
    data_dir_option,
    kernel_option,
    device_option,
)
_WRITING = (
    click.option("--speed", is_flag=True, help="Measure tokens a second, too, in turn with the baseline."),
    click.option("--csv", type=NamedPath(), metavar="FILE.csv", help="Write the numbers into this file, a line a checkpoint and text."),
    click.option("--html", type=NamedPath(), metavar="FILE.html", help="Write a page with all numbers and plots, one file without links."),
    click.option("--plot", type=NamedPath(), metavar="FILE.png", help="Draw size against quality into this file."),
    click.option("--overwrite", is_flag=True, help="Replace earlier files of --csv, --html and --plot."),
    json_option,
    quiet_option,
)


def measuring_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """How models are measured, and where the numbers go."""
    for option in reversed((*_MEASURING, *_WRITING)):
        command = option(command)
    return command


def settings_of(flags: dict[str, Any], asked: TaskFlags, adapter: Path | bool = False) -> Settings:
    """What the flags ask for: where questions are asked and no text is named, nothing else.

    Raises UsageError for a device that is not there, and what ``TaskFlags.read`` does.
    """
    from ptqcli.comparing.run import Settings

    return Settings(
        texts=flags["texts"] or (() if asked.names else None),
        tokens=flags["tokens"],
        seqlen=flags["seqlen"],
        stride=flags["stride"],
        bos=flags["bos"],
        data_dir=flags["data_dir"],
        device=open_device(flags["device"]),
        kernel=flags["kernel"],
        adapter=adapter,
        speed=flags["speed"],
        ask=asker(asked.read()),
    )


def check_files(flags: dict[str, Any]) -> None:
    """Raise UsageError, or PTQError where matplotlib is missing or a folder is not ours, unless the files can be written."""
    named = {f"--{kind}": (flags[kind], ending) for kind, ending in (("csv", ".csv"), ("html", ".html"), ("plot", ".png"))}
    for flag, (file, ending) in named.items():
        if file is not None:
            check_file(flag, file, flags["overwrite"], ending)
    if flags["overwrite"] and not any(file for file, _ in named.values()):
        raise click.UsageError("--overwrite has no effect without --csv, --html or --plot")
    if flags["plot"] is not None:
        from ptqcli.bench.roofline import check_installed

        check_installed()


def refuse_for_encoders(flags: dict[str, Any]) -> None:
    """Raise UsageError for flags that have no effect on an encoder."""
    given = [f"--{name}" for name in ("tokens", "speed", "csv", "html", "plot") if flags[name]]
    if given:
        raise UsageError(f"{', '.join(given)}: an encoder is measured without; leave them out")
