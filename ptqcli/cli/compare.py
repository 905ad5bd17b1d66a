"""``ptq compare``: checkpoints side by side, beside the model that they came from."""

from __future__ import annotations

from typing import Any

import click

from ptqcli.cli import completion, examples
from ptqcli.cli.compare_flags import check_files, measuring_flags, settings_of
from ptqcli.cli.compare_job import common_baseline, find_checkpoints, measured_together, raise_failures, write_files
from ptqcli.cli.compare_tables import show_compared, show_conditions
from ptqcli.cli.console import Output
from ptqcli.cli.evaluate_tasks import TaskFlags, task_options, write_answers
from ptqcli.cli.load import silence_transformers
from ptqcli.errors import UsageError


@click.command(
    epilog=examples(
        "ptq compare w4 w3 w2            # beside the model that they were made from",
        "ptq compare w4 w3 --baseline ~/models/Llama-3.2-1B --ppl wikitext2 --ppl c4 --tokens 50000",
        "ptq compare w4 w3 --html comparison.html --csv comparison.csv --plot comparison.png",
    )
)
@click.argument("checkpoints", nargs=-1, required=True, metavar="CHECKPOINT...", shell_complete=completion.checkpoint)
@click.option(
    "--baseline",
    metavar="MODEL",
    show_default="where the checkpoints came from",
    shell_complete=completion.model,
    help="Compare with this model.",
)
@task_options
@measuring_flags
def command(checkpoints: tuple[str, ...], baseline: str | None, asked: TaskFlags, **flags: Any) -> None:
    """Measure checkpoints on the same tokens, beside their model.

    CHECKPOINT is a folder that `ptq quantize` wrote, or any model folder, GGUF file or hub id. One at a time is in memory beside the
    baseline. One that fails does not keep the others from being measured; the exit code is 1 then.
    """
    output = Output(as_json=flags["as_json"], quiet=flags["quiet"])
    check_files(flags)
    silence_transformers()
    folders = find_checkpoints(checkpoints)
    reference = common_baseline(folders, baseline, output)
    if reference is None:
        raise UsageError(f"{next(iter(folders))}: which model it came from is not known, or it is gone; name it with --baseline")
    compared = measured_together(folders, reference, settings_of(flags, asked), output)
    found = compared.to_json()
    if found["checkpoints"]:
        show_compared(found, output)
        show_conditions(found, output)
        write_files(found, flags, output)
        if asked.answers is not None:
            write_answers(found["checkpoints"], asked.answers, output)
    output.result(found)
    raise_failures(compared, len(folders))
