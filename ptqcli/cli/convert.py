"""``ptq convert``: a checkpoint in, the same numbers in another program's format out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ptqcli.cli import completion, examples
from ptqcli.cli.console import Output, path_text, size_text, time_text
from ptqcli.cli.load import silence_transformers
from ptqcli.cli.locate import find_checkpoint
from ptqcli.cli.options import NamedPath, json_option, quiet_option
from ptqcli.cli.progress import track
from ptqcli.cli.quantize_flags import OVERWRITE_FLAG
from ptqcli.cli.quantize_report import QuantizeProgress, next_steps
from ptqcli.cli.signals import stop_if_interrupted
from ptqcli.formats import format_names

if TYPE_CHECKING:
    from ptqcli.pipeline.converting import ConversionPlan, Converted

MOST_REASONS = 4
SECONDS_BETWEEN_LINES = 10.0


class ConversionProgress(QuantizeProgress):
    """That of a command whose steps are linears."""

    def step(self, done: int, total: int, text: str) -> None:
        stop_if_interrupted()
        self._tracker.step(done, total, text)


@click.command(
    epilog=examples(
        "ptq convert small --to gptq --output small-gptq",
        "ptq convert small --to awq --requantize w4a16-g128 --output small-awq",
    )
)
@click.argument("checkpoint", required=False, shell_complete=completion.checkpoint)
@click.option("--to", metavar="|".join(format_names()), required=True, help="The format, see `ptq algorithms`.")
@click.option(
    "--requantize",
    metavar="SCHEME",
    help="Round linears that the format cannot hold as they are anew, in this scheme; what it costs is told.",
)
@click.option(
    "--output",
    type=NamedPath(),
    metavar="FOLDER",
    shell_complete=completion.folder,
    show_default="./CHECKPOINT-FORMAT",
    help="Where to write.",
)
@OVERWRITE_FLAG
@json_option
@quiet_option
def command(
    checkpoint: str | None, to: str, requantize: str | None, output: Path | None, overwrite: bool, as_json: bool, quiet: bool
) -> None:
    """Write CHECKPOINT in the format of another program.

    CHECKPOINT is a folder that `ptq quantize` wrote, or any other that it reads; left out, it is the newest one here. Codes, scales and
    zero points stay what they are; what the format cannot hold is refused by name.
    """
    from ptqcli.pipeline.converting import convert

    words = Output(as_json=as_json, quiet=quiet)
    folder = find_checkpoint(checkpoint)
    silence_transformers()
    with track("linear", quiet, pause=SECONDS_BETWEEN_LINES) as tracker:
        result = convert(
            folder,
            to,
            output.expanduser() if output else Path(f"{folder.resolve().name}-{to}"),
            requantize=requantize,
            overwrite=overwrite,
            progress=ConversionProgress(folder, words, tracker),
            on_plan=lambda plan: words.facts(_plan_rows(plan)),
        )
    click.get_current_context().obj.result_kept = not as_json
    words.say()
    words.facts(_result_rows(result))
    words.result(result.to_json())


def _plan_rows(plan: ConversionPlan) -> Iterator[tuple[str, str]]:
    yield "checkpoint", path_text(plan.checkpoint)
    yield "output", path_text(plan.output)
    yield "format", f"{plan.source_format} to {plan.target.name}"
    yield "as they are", f"{len(plan.specs) - len(plan.anew)} linears"
    for name, reason in list(plan.anew.items())[:MOST_REASONS]:
        yield "rounded anew", f"{name}, {plan.specs[name].scheme}: {reason}"
    if len(plan.anew) > MOST_REASONS:
        yield "rounded anew", f"{len(plan.anew) - MOST_REASONS} more"
    yield from (("note", note) for note in plan.notes)
    yield "size", f"{size_text(plan.bytes_before)} now, {size_text(plan.bytes_after)} afterwards"


def _result_rows(result: Converted) -> Iterator[tuple[str, str]]:
    yield "written", path_text(Path(result.output))
    if result.error is not None:
        yield "relative error", f"{result.error:.4f} of the weights, mean over {len(result.errors)} linears rounded anew"
    yield "size", f"{size_text(result.bytes_before)} before, {size_text(result.bytes_after)} after"
    yield "time", time_text(result.seconds)
    yield from next_steps(path_text(Path(result.output)), result.readers, adapter=False)
