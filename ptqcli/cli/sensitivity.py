"""``ptq sensitivity``: what rounding costs, group by group, without quantizing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ptqcli.budget import METHODS, MOST_BITS
from ptqcli.cli import completion, examples
from ptqcli.cli.bench_flags import check_plot
from ptqcli.cli.budget_flags import CANDIDATES_FLAG
from ptqcli.cli.budget_report import loss_text
from ptqcli.cli.console import Output, path_text, time_text
from ptqcli.cli.load import silence_transformers
from ptqcli.cli.options import NamedPath, json_option, quiet_option
from ptqcli.cli.progress import track
from ptqcli.cli.quantize import given_flags, resources_of
from ptqcli.cli.quantize_flags import CALIBRATION, FLAGS, MACHINE, with_flags
from ptqcli.cli.quantize_report import QuantizeProgress
from ptqcli.errors import PTQError, UsageError
from ptqcli.formats import DEFAULT_FORMAT, format_names
from ptqcli.model.locate import find_model

if TYPE_CHECKING:
    from ptqcli.sensitivity.table import SensitivityTable

ALL = "all"
PICTURES = (".png", ".svg")  # of ptqcli.sensitivity.picture, whose import takes torch along; a test compares the two
SECONDS_BETWEEN_LINES = 15.0


@click.command(
    epilog=examples(
        "ptq sensitivity                 # the demo model",
        "ptq sensitivity ~/models/Llama-3.2-1B --candidates w2g64,w3g128,w4g128,w8 --output losses.json --plot losses.png",
        "ptq sensitivity ~/models/Llama-3.2-1B --sensitivity all",
        "ptq quantize ~/models/Llama-3.2-1B --target-bits 3.5 --sensitivity losses.json",
    )
)
@click.argument("model", required=False, shell_complete=completion.model)
@CANDIDATES_FLAG
@click.option(
    "--sensitivity",
    metavar=f"{'|'.join(METHODS)}|{ALL}",
    show_default="gradient, or output where that does not fit",
    shell_complete=completion.names(lambda: (*METHODS, ALL)),
    help="How it is measured; several, separated by commas, are compared.",
)
@click.option(
    "--format",
    metavar="|".join(format_names()),
    show_default=DEFAULT_FORMAT,
    shell_complete=completion.names(format_names),
    help="How the checkpoint would be stored, whose bytes are told.",
)
@click.option("--ignore", multiple=True, metavar="REGEX", help="Leave these linears as they are.")
@click.option("--blocks", metavar="NAME", help="Which list of blocks, where it is not evident.")
@with_flags(FLAGS[CALIBRATION])
@with_flags(FLAGS[MACHINE])
@click.option("--output", type=NamedPath(), metavar="FILE.json", help="Write the losses, too, for `ptq quantize --sensitivity FILE.json`.")
@click.option("--plot", type=NamedPath(), metavar="FILE.png|FILE.svg", help="Draw them.")
@click.option("--overwrite", is_flag=True, help="Replace earlier files of --output and --plot.")
@json_option
@quiet_option
def command(
    model: str | None,
    sensitivity: str | None,
    data_dir: Path | None,
    device: str,
    dtype: str,
    batch_size: int | None,
    memory: int | None,
    activation_budget: float | None,
    processes: int | None,
    output: Path | None,
    plot: Path | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    **request: Any,
) -> None:
    """Show what each scheme costs each group of MODEL's linears.

    MODEL is a local folder, a GGUF file or a hub id; left out, it is the small demo model that the package carries. Nothing is quantized. A
    group is what servers run as one matrix: q, k and v, gate and up, all experts of a block.
    """
    from ptqcli.pipeline.sensitivities import measure_sensitivities
    from ptqcli.recipe_loading import load_recipe

    methods = _methods(sensitivity)
    if processes not in (None, 1):
        raise UsageError("sensitivities are measured by one process; leave --processes out")
    target = None if output is None else _checked(output.expanduser(), overwrite)
    if plot is not None:
        check_plot(plot, overwrite, PICTURES)
    words = Output(as_json=as_json, quiet=quiet)
    recipe = load_recipe(None, {"algo": "rtn", "target_bits": MOST_BITS, **given_flags(request)})
    folder = find_model(model)
    silence_transformers()
    with track("step", quiet, pause=SECONDS_BETWEEN_LINES) as tracker:
        table = measure_sensitivities(
            folder,
            recipe,
            methods,
            resources=resources_of(device, dtype, batch_size, activation_budget, memory),
            data_dir=data_dir,
            progress=QuantizeProgress(folder, words, tracker),
            journal=None if target is None else target.with_name(f"{target.name}.unfinished"),
        )
    if target is not None:
        table.write(target)
        click.get_current_context().obj.result_kept = not as_json
    if plot is not None:
        from ptqcli.sensitivity.picture import draw

        draw(table, plot.expanduser())
    _show(table, words, target, plot)
    words.result(table.to_json())


def _methods(text: str | None) -> list[str]:
    """Those that the flag names, none for the usual one. Raises UsageError for others, and for one that is named twice."""
    from ptqcli.budget import read_sensitivity

    if text is None:
        return []
    names = list(METHODS) if text == ALL else [name.strip() for name in text.split(",")]
    for name in names:
        if read_sensitivity(name)[0] is None:
            raise UsageError(f"sensitivity '{name}': is a file, and here they are measured; name methods, or {ALL}")
        if names.count(name) > 1:
            raise UsageError(f"sensitivity '{name}' is named twice; name it once")
    return names


def _checked(target: Path, overwrite: bool) -> Path:
    """The file that losses go to. Raises UsageError for another ending and for what may not be replaced, PTQError for a missing folder."""
    from ptqcli.budget import TABLE_SUFFIX
    from ptqcli.sensitivity.table import read_table

    if target.suffix != TABLE_SUFFIX:
        raise UsageError(f"--output {target}: losses are written as {TABLE_SUFFIX}; choose such a name")
    if not target.parent.is_dir():
        raise PTQError(f"--output {target}: there is no folder {target.parent}; make it first")
    if target.exists():
        if not overwrite:
            raise UsageError(f"--output {target}: already exists; give --overwrite to replace it")
        read_table(target)  # nothing else is replaced
    return target


def _show(table: SensitivityTable, words: Output, target: Path | None, plot: Path | None) -> None:
    for method in table.methods:
        columns = ("group", "weights", *table.candidates)
        rows = ([group.name, f"{group.weights:,}", *map(loss_text, group.losses[method])] for group in table.groups)
        words.table(f"Losses by {method}, {table.units[method]}", columns, rows)
    if len(table.methods) > 1:
        words.table("Rank correlation", ("methods", "all", *table.candidates), _correlations(table))
    words.say()
    words.facts(
        [
            ("model", table.model),
            *((f"time of {name}", _time(table, name)) for name in table.methods),
            *([] if target is None else [("written", path_text(target))]),
            *([] if plot is None else [("drawn", path_text(plot))]),
        ]
    )


def _time(table: SensitivityTable, method: str) -> str:
    looked_at = f"{table.windows[method]} windows of {table.tokens[method]} tokens from {table.texts}"
    return f"{time_text(table.seconds[method])} on {looked_at}"


def _correlations(table: SensitivityTable) -> Iterator[Sequence[str]]:
    """Of each pair of methods, over all groups and candidates and for each candidate by itself."""
    from ptqcli.sensitivity.table import rank_correlation

    numbers = range(len(table.candidates))
    for one, other in combinations(table.methods, 2):
        row = [f"{one}, {other}"]
        for chosen in (numbers, *([number] for number in numbers)):
            pairs = [
                (group.losses[one][number], group.losses[other][number])
                for group in table.groups
                for number in chosen
                if group.losses[one][number] is not None and group.losses[other][number] is not None
            ]
            found = rank_correlation([first or 0.0 for first, _ in pairs], [second or 0.0 for _, second in pairs])
            row.append(f"{found:.3f}")
        yield row
