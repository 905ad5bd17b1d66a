"""``ptq eval`` of models that write: perplexity on texts, and divergence from the original."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptqcli.cli.compare_job import measured_together, raise_failures, write_files
from ptqcli.cli.compare_tables import KL_COLUMNS, kl_row, show_compared, show_conditions, show_speed
from ptqcli.cli.console import Output, path_text
from ptqcli.cli.evaluate_tasks import TaskFlags, show_tasks, write_answers
from ptqcli.comparing.words import rise_text, with_error

if TYPE_CHECKING:
    from ptqcli.comparing.run import Settings

CARD_NAME = "README.md"  # of ptqcli.pipeline.card, whose import takes torch along


def measure_texts(
    folders: Mapping[str, Path],
    reference: Path | None,
    settings: Settings,
    flags: Mapping[str, Any],
    asked: TaskFlags,
    write_card: bool,
    output: Output,
) -> None:
    """Measure the models in ``folders``, beside that in ``reference`` if there is one, and tell the results."""
    compared = measured_together(folders, reference, settings, output)
    found = compared.to_json()
    adapter = settings.adapter is not False
    if len(folders) == 1:
        output.say(f"checkpoint  {path_text(next(iter(folders.values())))}{' with an adapter' if adapter else ''}")
        output.say(f"baseline    {path_text(reference) if reference else 'none'}")
        [only] = found["checkpoints"]
        if only["results"]:
            _show(only["results"], output)
        show_speed(found, output)
        if only["tasks"]:
            show_tasks(only["tasks"], output)
    elif found["checkpoints"]:
        show_compared(found, output)
    if found["checkpoints"]:
        show_conditions(found, output)
    if write_card:
        _write_cards(found, output)
    write_files(found, flags, output)
    if asked.answers is not None:
        write_answers(found["checkpoints"], asked.answers, output)
    output.result(_as_one(found, reference) if len(folders) == 1 else found)
    raise_failures(compared, len(folders))


def _as_one(found: Mapping[str, Any], reference: Path | None) -> dict[str, Any]:
    """What is said of a single checkpoint, its numbers not in a list."""
    [checkpoint] = found["checkpoints"]
    named = {"checkpoint": checkpoint["folder"], "baseline": str(reference) if reference else None}
    return {**named, **checkpoint, "conditions": {**found["conditions"], "baseline": found["baseline"]}}


def _write_cards(found: Mapping[str, Any], output: Output) -> None:
    from ptqcli.pipeline.card import write_measured
    from ptqcli.pipeline.report import folder_of

    for each in found["checkpoints"]:
        folder = Path(each["folder"])
        write_measured(folder_of(folder), each["results"], each["adapter"])
        output.say(f"written     {path_text(folder / CARD_NAME)}")


def _show(results: Sequence[Mapping[str, Any]], output: Output) -> None:
    begun = ", each with the beginning-of-sequence token in front" if results[0]["bos"] else ""
    title = f"Perplexity over windows of {results[0]['seqlen']} tokens{begun}"
    if "mean_kl" not in results[0]:
        output.table(title, ("text", "tokens", "perplexity"), (_row(result) for result in results))
        return
    columns = ("text", "tokens", "original", "checkpoint", "rise", "mean KL (nats)", "same top-1")
    output.table(title, columns, (_comparison_row(result) for result in results))
    output.table("KL over the tokens, and agreement, with standard errors", ("text", *KL_COLUMNS[1:]), map(_kl_row, results))


def _kl_row(result: Mapping[str, Any]) -> list[str]:
    return kl_row(result["text"], result)


def _row(result: Mapping[str, Any]) -> list[str]:
    return [result["text"], f"{result['tokens']:,}", f"{result['perplexity']:.4f}"]


def _comparison_row(result: Mapping[str, Any]) -> list[str]:
    return [
        result["text"],
        f"{result['tokens']:,}",
        f"{result['baseline_perplexity']:.4f}",
        f"{result['perplexity']:.4f}",
        rise_text(result),
        with_error(result["mean_kl"], result.get("mean_kl_error")),
        f"{result['top1_agreement']:.2%}",
    ]
