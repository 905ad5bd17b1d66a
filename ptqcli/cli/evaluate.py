"""``ptq eval``: perplexity of a checkpoint, and its divergence from the model that it came from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ptqcli.cli import completion, examples
from ptqcli.cli.console import Output, path_text
from ptqcli.cli.evaluate_encoder import measure_folder
from ptqcli.cli.load import silence_transformers, tell_decoded
from ptqcli.cli.locate import find_checkpoint
from ptqcli.cli.options import NamedPath, data_dir_option, device_option, json_option, kernel_option, open_device, quiet_option
from ptqcli.cli.progress import Tracker, track
from ptqcli.cli.report import baseline_of
from ptqcli.errors import PTQError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

PUBLISHED_SEQLEN = 2048  # of ptqcli.evaluation.measure, whose import takes torch along; a test compares the two
SECONDS_BETWEEN_LINES = 15.0
CARD_NAME = "README.md"  # of ptqcli.pipeline.card, likewise
COMPARED_TOKENS = 1_000  # of each text, to learn whether two tokenizers are one


class AdapterPath(NamedPath):
    """The folder of an adapter; the flag alone is True, which means the one in the checkpoint."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return True if value is True else super().convert(value, param, ctx)


@click.command(
    epilog=examples(
        "ptq eval                        # the newest checkpoint here, on builtin text",
        "ptq eval small --ppl wikitext2 --ppl notes.txt",
        "ptq eval small --ppl c4 --baseline ~/models/Llama-3.2-1B --json",
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
@click.option(
    "--task",
    "tasks",
    multiple=True,
    type=NamedPath(),
    metavar="FILE.jsonl",
    help='Of an encoder with a head for labels: accuracy on rows {"text": ..., "label": ...}; may be given several times.',
)
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
    tasks: tuple[Path, ...],
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
    and on labelled texts (--task).
    """
    from ptqcli.calibration.bos import window_bos
    from ptqcli.evaluation.measure import measure
    from ptqcli.pipeline.card import write_measured
    from ptqcli.pipeline.report import folder_of
    from ptqcli.runtime.models import load_model, load_tokenizer

    output = Output(as_json=as_json, quiet=quiet)
    if baseline and no_baseline:
        raise click.UsageError("--baseline and --no-baseline exclude each other")
    silence_transformers()
    place = open_device(device)
    folder = find_checkpoint(checkpoint)
    causal = _is_causal(folder, bool(tasks), write_card, stride is not None or bos != "auto")
    reference = None if no_baseline else baseline_of(folder, baseline, output)
    if not causal:
        measure_folder(folder, reference, texts, tasks, seqlen, data_dir, place, kernel, adapter, output)
        return
    tokenizer = load_tokenizer(folder)
    begin = window_bos(tokenizer, bos)
    rows = _read(texts, tokenizer, data_dir, output)  # a text that is not there is told before models are loaded
    if reference and _reads_otherwise(reference, tokenizer, rows.values()):
        output.say(f"{reference}: its tokenizer is another one; both models are measured on the tokens of the checkpoint's")
    tell_decoded(folder, output)
    model = load_model(folder, place, kernel, adapter or False)
    original = load_model(reference, place) if reference else None
    with track("window", quiet, pause=SECONDS_BETWEEN_LINES) as tracker:
        measured = measure(model, rows, original, seqlen, stride, _telling(tracker), begin)
        results = [{key: value for key, value in asdict(each).items() if value is not None} for each in measured]
    output.say(f"checkpoint  {path_text(folder)}{'' if adapter is None else ' with an adapter'}")
    output.say(f"baseline    {path_text(reference) if reference else 'none'}")
    _show(results, output)
    if write_card:
        write_measured(folder_of(folder), results, adapter is not None)
        output.say(f"written     {path_text(folder / CARD_NAME)}")
    output.result(
        {"checkpoint": str(folder), "adapter": adapter is not None, "baseline": str(reference) if reference else None, "results": results}
    )


def _is_causal(folder: Path, task: bool, write_card: bool, windows_chosen: bool) -> bool:
    """Whether a model writes text. Raises UsageError for what is asked for and its kind has not."""
    from ptqcli.model.config import load_config
    from ptqcli.model.kinds import is_encoder
    from ptqcli.pipeline.card import check_card
    from ptqcli.pipeline.report import folder_of

    causal = not is_encoder(load_config(folder))
    if task and causal:
        raise UsageError(f"--task takes an encoder with a head for labels, and {folder} is a model that writes; leave it out")
    if not causal and (write_card or windows_chosen):
        raise UsageError(f"{folder}: is an encoder, which is measured without --write-card, --stride and --bos; leave them out")
    if write_card:
        check_card(folder_of(folder))
    return causal


def _read(texts: Iterable[str], tokenizer: Any, data_dir: Path | None, output: Output) -> dict[str, Tensor]:
    """The token ids of each text, int64 [tokens]."""
    from ptqcli.calibration.chat import chat_writer
    from ptqcli.calibration.rows import Rows
    from ptqcli.calibration.text import evaluation_ids

    tables = {text: Rows(write_chat=chat_writer(tokenizer)) for text in texts}
    rows = {text: evaluation_ids(text, tokenizer, data_dir, table) for text, table in tables.items()}
    for text, table in tables.items():
        if table.skipped:
            output.say(f"{text}: {table.skipped:,} rows without text are left out")
    return rows


def _reads_otherwise(folder: Path, tokenizer: Any, texts: Iterable[Tensor]) -> bool:
    """Whether the tokenizer in ``folder`` makes other tokens than ``tokenizer`` of the beginnings of ``texts``, which are token ids."""
    from ptqcli.calibration.tokens import read_tokens
    from ptqcli.runtime.models import load_tokenizer

    try:
        other = load_tokenizer(folder)
    except PTQError:  # it needs none
        return False
    beginnings = [str(tokenizer.decode(ids[:COMPARED_TOKENS])) for ids in texts]
    own, its = (read_tokens(each, beginnings, add_special_tokens=False, verbose=False)["input_ids"] for each in (tokenizer, other))
    return bool(own != its)


def _telling(tracker: Tracker) -> Callable[[str, int, int], None]:
    """Tells a tracker of each text once, then of its windows."""
    told = set()

    def step(text: str, done: int, total: int) -> None:
        if text not in told:
            told.add(text)
            tracker.say(f"measuring perplexity on {text}")
        tracker.step(done, total, text)

    return step


def _show(results: list[dict[str, Any]], output: Output) -> None:
    begun = ", each with the beginning-of-sequence token in front" if results[0]["bos"] else ""
    title = f"Perplexity over windows of {results[0]['seqlen']} tokens{begun}"
    if "mean_kl" in results[0]:
        columns = ("text", "tokens", "original", "checkpoint", "rise", "mean KL (nats)", "same top-1")
        output.table(title, columns, (_comparison_row(result) for result in results))
    else:
        output.table(title, ("text", "tokens", "perplexity"), (_row(result) for result in results))


def _row(result: Mapping[str, Any]) -> list[str]:
    return [result["text"], f"{result['tokens']:,}", f"{result['perplexity']:.4f}"]


def _comparison_row(result: Mapping[str, Any]) -> list[str]:
    return [
        result["text"],
        f"{result['tokens']:,}",
        f"{result['baseline_perplexity']:.4f}",
        f"{result['perplexity']:.4f}",
        f"{result['perplexity'] / result['baseline_perplexity'] - 1:+.2%}",
        f"{result['mean_kl']:.5f}",
        f"{result['top1_agreement']:.2%}",
    ]
