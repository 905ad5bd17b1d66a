"""``ptq eval`` of a model that writes: perplexity on texts, and divergence from the original."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptqcli.cli.console import Output, path_text
from ptqcli.cli.evaluate_tasks import TaskFlags, ask_tasks
from ptqcli.cli.load import tell_decoded
from ptqcli.cli.progress import Tracker, track
from ptqcli.errors import PTQError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SECONDS_BETWEEN_LINES = 15.0
CARD_NAME = "README.md"  # of ptqcli.pipeline.card, whose import takes torch along
COMPARED_TOKENS = 1_000  # of each text, to learn whether two tokenizers are one


def measure_texts(
    folder: Path,
    reference: Path | None,
    texts: Iterable[str],
    asked: TaskFlags,
    seqlen: int | None,
    stride: int | None,
    bos: str,
    data_dir: Path | None,
    place: torch.device,
    kernel: str,
    adapter: Path | bool | None,
    write_card: bool,
    output: Output,
) -> None:
    """Measure the model in ``folder`` on ``texts``, beside that in ``reference`` if there is one, ask tasks, and tell the results."""
    from ptqcli.calibration.bos import window_bos
    from ptqcli.evaluation.measure import measure
    from ptqcli.pipeline.card import write_measured
    from ptqcli.pipeline.report import folder_of
    from ptqcli.runtime.models import load_model, load_tokenizer

    tasks = asked.read()
    tokenizer = load_tokenizer(folder)
    begin = window_bos(tokenizer, bos)
    rows = _read(texts, tokenizer, data_dir, output)  # a text that is not there is told before models are loaded
    if reference and rows and _reads_otherwise(reference, tokenizer, rows.values()):
        output.say(f"{reference}: its tokenizer is another one; both models are measured on the tokens of the checkpoint's")
    tell_decoded(folder, output)
    model = load_model(folder, place, kernel, adapter or False)
    original = load_model(reference, place) if reference else None
    with track("window", output.quiet, pause=SECONDS_BETWEEN_LINES) as tracker:
        measured = measure(model, rows, original, seqlen, stride, _telling(tracker), begin)
        results = [{key: value for key, value in asdict(each).items() if value is not None} for each in measured]
    output.say(f"checkpoint  {path_text(folder)}{'' if adapter is None else ' with an adapter'}")
    output.say(f"baseline    {path_text(reference) if reference else 'none'}")
    if results:
        _show(results, output)
    answers = ask_tasks(tasks, asked, model, original, tokenizer, output) if tasks else None
    if write_card:
        write_measured(folder_of(folder), results, adapter is not None)
        output.say(f"written     {path_text(folder / CARD_NAME)}")
    found = {"checkpoint": str(folder), "adapter": adapter is not None, "baseline": str(reference) if reference else None}
    output.result({**found, "results": results, **({"tasks": answers} if tasks else {})})


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
