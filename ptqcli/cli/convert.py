"""``ptq convert``: a checkpoint in, the same numbers in another program's format out."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

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
    from ptqcli.pipeline.exporting import Exported

GGUF = "gguf"
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
        "ptq convert small --to gguf                       # codes in groups of 32 stay what they are",
        "ptq convert ~/models/Llama-3.2-1B --to gguf --gguf-type q4_k_m",
    )
)
@click.argument("checkpoint", required=False, shell_complete=completion.checkpoint)
@click.option("--to", metavar="|".join([*format_names(), GGUF]), required=True, help="The format, see `ptq algorithms`.")
@click.option(
    "--requantize",
    metavar="SCHEME",
    help="Round linears that the format cannot hold as they are anew, in this scheme; what it costs is told.",
)
@click.option(
    "--gguf-type",
    metavar="TYPE",
    show_default="of a quantized checkpoint f16, of a plain model q4_k_m",
    help="Block types as llama.cpp calls its mixes; of a quantized checkpoint, whose codes stay, for embedding and head.",
)
@click.option(
    "--output",
    type=NamedPath(),
    metavar="FOLDER",
    shell_complete=completion.folder,
    show_default="./CHECKPOINT-FORMAT",
    help="Where to write: a folder, or a file that ends in .gguf.",
)
@OVERWRITE_FLAG
@json_option
@quiet_option
def command(
    checkpoint: str | None,
    to: str,
    requantize: str | None,
    gguf_type: str | None,
    output: Path | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write CHECKPOINT in the format of another program.

    CHECKPOINT is a folder that `ptq quantize` wrote, or any other that it reads; left out, it is the newest one here. Codes, scales and
    zero points stay what they are; what the format cannot hold is refused by name. To GGUF a model that is not quantized goes, too, its
    matrices rounded to the types of --gguf-type.
    """
    words = Output(as_json=as_json, quiet=quiet)
    folder = find_checkpoint(checkpoint)
    silence_transformers()
    if to == GGUF and requantize is not None:
        raise click.UsageError("--requantize does not go with --to gguf; codes that no block type holds become plain numbers")
    if to != GGUF and gguf_type is not None:
        raise click.UsageError("--gguf-type goes with --to gguf")
    with track("tensor" if to == GGUF else "linear", quiet, pause=SECONDS_BETWEEN_LINES) as tracker:
        progress = ConversionProgress(folder, words, tracker)
        if to == GGUF:
            rows, result = _exported(folder, output, gguf_type, overwrite, progress)
        else:
            rows, result = _converted(folder, to, output, requantize, overwrite, progress, words)
    click.get_current_context().obj.result_kept = not as_json
    words.say()
    words.facts(rows)
    words.result(result)


Rows: TypeAlias = Iterable[tuple[str, str]]


def _converted(
    folder: Path, to: str, output: Path | None, requantize: str | None, overwrite: bool, progress: ConversionProgress, words: Output
) -> tuple[Rows, dict[str, Any]]:
    from ptqcli.pipeline.converting import convert

    result = convert(
        folder,
        to,
        output.expanduser() if output else Path(f"{_name(folder)}-{to}"),
        requantize=requantize,
        overwrite=overwrite,
        progress=progress,
        on_plan=lambda plan: words.facts(_plan_rows(plan)),
    )
    return _result_rows(result), result.to_json()


def _exported(
    folder: Path, output: Path | None, mix: str | None, overwrite: bool, progress: ConversionProgress
) -> tuple[Rows, dict[str, Any]]:
    from ptqcli.pipeline.exporting import export

    target = output.expanduser() if output else Path(f"{_name(folder)}.{GGUF}")
    result = export(folder, target, mix=mix, overwrite=overwrite, progress=progress)
    return _export_rows(result), result.to_json()


def _name(folder: Path) -> str:
    return folder.resolve().name.removesuffix(f".{GGUF}")


def _export_rows(result: Exported) -> Iterator[tuple[str, str]]:
    quoted = shlex.quote(path_text(Path(result.output)))
    yield "written", path_text(Path(result.output))
    yield "types", ", ".join(f"{kind} x {count}" for kind, count in result.types.items())
    yield from (("note", note) for note in result.notes)
    yield "size", size_text(result.bytes_after)
    yield "time", time_text(result.seconds)
    yield "measure it", f"ptq eval {quoted}"
    yield "in llama.cpp", f"llama-cli -m {quoted}"


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
