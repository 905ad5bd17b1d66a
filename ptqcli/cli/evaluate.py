"""``ptq eval``: perplexity of a checkpoint, and its divergence from the model that it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ptqcli.cli import completion, examples
from ptqcli.cli.console import Output
from ptqcli.cli.evaluate_encoder import measure_folder
from ptqcli.cli.evaluate_tasks import TaskFlags, task_options
from ptqcli.cli.evaluate_text import measure_texts
from ptqcli.cli.load import silence_transformers
from ptqcli.cli.locate import find_checkpoint
from ptqcli.cli.options import NamedPath, data_dir_option, device_option, json_option, kernel_option, open_device, quiet_option
from ptqcli.cli.report import baseline_of
from ptqcli.errors import UsageError

PUBLISHED_SEQLEN = 2048  # of ptqcli.evaluation.measure, whose import takes torch along; a test compares the two


class AdapterPath(NamedPath):
    """The folder of an adapter; the flag alone is True, which means the one in the checkpoint."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return True if value is True else super().convert(value, param, ctx)


@click.command(
    epilog=examples(
        "ptq eval                        # the newest checkpoint here, on builtin text",
        "ptq eval small --ppl wikitext2 --ppl notes.txt",
        "ptq eval small --ppl c4 --baseline ~/models/Llama-3.2-1B --json",
        "ptq eval small --tasks questions.jsonl --tasks arc_easy",
        "ptq eval small --adapter        # with the adapter that --adapter-rank wrote",
    )
)
@click.argument("checkpoint", required=False, shell_complete=completion.checkpoint)
@click.option(
    "--ppl",
    "texts",
    multiple=True,
    default=["builtin"],
    show_default=True,
    metavar="wikitext2|c4|builtin|PATH",
    shell_complete=completion.texts("evaluation"),
    help="Text to measure perplexity on, of a table FILE:COLUMN too; may be given several times.",
)
@click.option(
    "--seqlen",
    type=int,
    metavar="N",
    show_default=f"{PUBLISHED_SEQLEN}, or the model's positions if fewer",
    help="Tokens in a window.",
)
@click.option("--stride", type=int, metavar="N", show_default="seqlen: no overlap", help="Tokens from one window to the next.")
@click.option(
    "--bos",
    metavar="auto|yes|no",
    default="auto",
    show_default=True,
    help="Whether windows begin with the beginning-of-sequence token; auto: if the tokenizer puts it in front of a text by itself.",
)
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
@data_dir_option
@kernel_option
@device_option
@json_option
@quiet_option
def command(
    checkpoint: str | None,
    texts: tuple[str, ...],
    seqlen: int | None,
    stride: int | None,
    bos: str,
    adapter: Path | bool | None,
    baseline: str | None,
    asked: TaskFlags,
    write_card: bool,
    no_baseline: bool,
    data_dir: Path | None,
    kernel: str,
    device: str,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure how good CHECKPOINT is, beside the original.

    CHECKPOINT is a folder that `ptq quantize` wrote, or any model folder, GGUF file or hub id; left out, it is the newest one here.
    Its packed weights are used as they are. An encoder is measured on masked words, by the cosine of its embeddings with the original's,
    and on labelled texts (--tasks).
    """
    output = Output(as_json=as_json, quiet=quiet)
    if baseline and no_baseline:
        raise click.UsageError("--baseline and --no-baseline exclude each other")
    silence_transformers()
    place = open_device(device)
    folder = find_checkpoint(checkpoint)
    causal = _is_causal(folder, write_card, stride is not None or bos != "auto", asked)
    reference = None if no_baseline else baseline_of(folder, baseline, output)
    if not causal:
        measure_folder(folder, reference, texts, [Path(name) for name in asked.names], seqlen, data_dir, place, kernel, adapter, output)
        return
    if asked.names and click.get_current_context().get_parameter_source("texts") is ParameterSource.DEFAULT:
        texts = ()
    measure_texts(folder, reference, texts, asked, seqlen, stride, bos, data_dir, place, kernel, adapter, write_card, output)


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
