"""``ptq eval``: perplexity of a checkpoint, and its divergence from the model that it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ptqcli.cli import completion, examples
from ptqcli.cli.compare_flags import check_files, measuring_flags, refuse_for_encoders, settings_of
from ptqcli.cli.compare_job import common_baseline, find_checkpoints
from ptqcli.cli.console import Output
from ptqcli.cli.evaluate_encoder import measure_folder
from ptqcli.cli.evaluate_tasks import TaskFlags, task_options
from ptqcli.cli.evaluate_text import measure_texts
from ptqcli.cli.load import silence_transformers
from ptqcli.cli.options import NamedPath, open_device
from ptqcli.cli.report import baseline_of
from ptqcli.errors import UsageError


class AdapterPath(NamedPath):
    """The folder of an adapter; the flag alone is True, which means the one in the checkpoint."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return True if value is True else super().convert(value, param, ctx)


@click.command(
    epilog=examples(
        "ptq eval                        # the newest checkpoint here, on the texts that are here",
        "ptq eval small --ppl wikitext2 --ppl notes.txt",
        "ptq eval small --ppl c4 --baseline ~/models/Llama-3.2-1B --json",
        "ptq eval small --tasks questions.jsonl --tasks arc_easy",
        "ptq eval small --adapter        # with the adapter that --adapter-rank wrote",
        "ptq eval small --ppl wikitext2 --tokens 20000 --html small.html",
    )
)
@click.argument("checkpoints", nargs=-1, metavar="[CHECKPOINT]...", shell_complete=completion.checkpoint)
@click.option(
    "--adapter",
    type=AdapterPath(),
    is_flag=False,
    flag_value=True,
    metavar="[FOLDER]",
    shell_complete=completion.folder,
    help="Add the adapter that lies in CHECKPOINT, or in FOLDER.",
)
@click.option(
    "--baseline",
    metavar="MODEL",
    show_default="where the checkpoint came from",
    shell_complete=completion.model,
    help="Compare with this model.",
)
@task_options
@click.option("--write-card", is_flag=True, help="Put the numbers into the model card of CHECKPOINT.")
@click.option("--no-baseline", is_flag=True, help="Measure the checkpoint alone.")
@measuring_flags
def command(
    checkpoints: tuple[str, ...],
    adapter: Path | bool | None,
    baseline: str | None,
    asked: TaskFlags,
    write_card: bool,
    no_baseline: bool,
    **flags: Any,
) -> None:
    """Measure how good CHECKPOINT is, beside the original.

    CHECKPOINT is a folder that `ptq quantize` wrote, or any model folder, GGUF file or hub id; left out, it is the newest one here.
    Its packed weights are used as they are. Several are measured on the same tokens, as by `ptq compare`. An encoder is measured on masked
    words, by the cosine of its embeddings with the original's, and on labelled texts (--tasks).
    """
    output = Output(as_json=flags["as_json"], quiet=flags["quiet"])
    if baseline and no_baseline:
        raise click.UsageError("--baseline and --no-baseline exclude each other")
    check_files(flags)
    silence_transformers()
    folders = find_checkpoints(checkpoints)
    windows_chosen = flags["stride"] is not None or flags["bos"] != "auto"
    causal = [_is_causal(folder, write_card, windows_chosen, asked) for folder in folders.values()]
    if isinstance(adapter, Path) and len(folders) > 1:
        raise UsageError(f"--adapter {adapter}: belongs to one checkpoint; name that alone, or give the flag without a folder")
    if all(causal):
        settings = settings_of(flags, asked, adapter or False)
        reference = None if no_baseline else common_baseline(folders, baseline, output)
        measure_texts(folders, reference, settings, flags, asked, write_card, output)
        return
    if len(folders) > 1:
        raise UsageError("an encoder is measured by itself; name one checkpoint")
    [folder] = folders.values()
    refuse_for_encoders(flags)
    reference = None if no_baseline else baseline_of(folder, baseline, output)
    texts, tasks, place = flags["texts"] or ("builtin",), [Path(name) for name in asked.names], open_device(flags["device"])
    measure_folder(folder, reference, texts, tasks, flags["seqlen"], flags["data_dir"], place, flags["kernel"], adapter, output)


def _is_causal(folder: Path, write_card: bool, windows_chosen: bool, asked: TaskFlags) -> bool:
    """Whether a model writes text. Raises UsageError for what is asked for and its kind has not."""
    from ptqcli.model.config import load_config
    from ptqcli.model.kinds import is_encoder
    from ptqcli.pipeline.card import check_card
    from ptqcli.pipeline.report import folder_of

    causal = not is_encoder(load_config(folder))
    if not causal and (write_card or windows_chosen):
        raise UsageError(f"{folder}: is an encoder, which is measured without --write-card, --stride and --bos; leave them out")
    if not causal and asked.for_writers:
        raise UsageError(f"{folder}: is an encoder, whose --tasks have labels and no other flags; leave {asked.for_writers} out")
    if write_card and asked.names:
        raise UsageError("--write-card is for perplexity; leave --tasks out")
    if write_card:
        check_card(folder_of(folder))
    return causal
