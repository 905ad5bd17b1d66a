"""``ptq eval`` of an encoder: masked words, the cosine of its embeddings with the original's, accuracy on labelled texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptqcli.cli.console import Output, path_text
from ptqcli.cli.progress import track

if TYPE_CHECKING:
    import torch

SECONDS_BETWEEN_LINES = 15.0


def measure_folder(
    folder: Path,
    reference: Path | None,
    texts: Sequence[str],
    tasks: Sequence[Path],
    seqlen: int | None,
    data_dir: Path | None,
    place: torch.device,
    kernel: str,
    adapter: Path | bool | None,
    output: Output,
) -> None:
    """Measure the encoder in ``folder``, beside that in ``reference`` if there is one, and tell the results."""
    from ptqcli.comparing.identity import checkpoint_digest, versions
    from ptqcli.evaluation.encoders import default_windows, encoder_windows, measure_encoder, read_task
    from ptqcli.runtime.models import load_model, load_tokenizer

    tokenizer = load_tokenizer(folder)
    model = load_model(folder, place, kernel, adapter or False)
    window = seqlen or default_windows(model)
    rows = {text: encoder_windows(text, tokenizer, window, data_dir) for text in texts}
    labelled = {str(task): read_task(task, tokenizer, model.config, window) for task in tasks}
    original = load_model(reference, place) if reference else None
    with track("window", output.quiet, pause=SECONDS_BETWEEN_LINES) as tracker:
        measured = measure_encoder(
            model, rows, tokenizer, window, original, labelled, lambda text, done, total: tracker.step(done, total, text)
        )
        results = [{key: value for key, value in asdict(each).items() if value is not None} for each in measured]
    output.say(f"checkpoint  {path_text(folder)}{'' if adapter is None else ' with an adapter'}")
    output.say(f"baseline    {path_text(reference) if reference else 'none'}")
    _show(results, output)
    facts = {"checkpoint": str(folder), "adapter": adapter is not None, "baseline": str(reference) if reference else None}
    digest = checkpoint_digest(folder)
    conditions = {"device": str(place), "kernel": kernel, "versions": versions(), "sha256": digest.sha256, "sha256_of": digest.of}
    output.result({**facts, "results": results, "conditions": conditions})


def _show(results: Sequence[Mapping[str, Any]], output: Output) -> None:
    columns = {
        "masked perplexity": ("masked_perplexity", ".4f"),
        "of the original": ("baseline_masked_perplexity", ".4f"),
        "embedding cosine": ("embedding_cosine", ".5f"),
        "lowest": ("lowest_cosine", ".5f"),
        "accuracy": ("accuracy", ".2%"),
        "the original's": ("baseline_accuracy", ".2%"),
    }
    present = {title: key for title, key in columns.items() if any(key[0] in result for result in results)}
    rows = [
        [result["text"], f"{result['windows']:,}", *(format(result[key], form) if key in result else "" for key, form in present.values())]
        for result in results
    ]
    output.table(f"An encoder on texts of at most {results[0]['seqlen']} tokens", ("text", "windows", *present), rows)
