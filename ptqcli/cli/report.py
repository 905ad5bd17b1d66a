"""What the commands show of ``ptq_report.json``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ptqcli.cli.console import Output
from ptqcli.model.locate import find_model
from ptqcli.pipeline.report import read_source

LAYER_COLUMNS = ("layer", "scheme", "bits/weight", "error", "remarks")


def baseline_of(folder: Path, wanted: str | None, output: Output) -> Path | None:
    """The model to compare a checkpoint with: ``wanted``, a folder or hub id, or else where it came from; None, told, if that is gone."""
    if wanted is not None:
        return find_model(wanted)
    original = read_source(folder)
    if original is not None and not original.exists():
        output.say(f"{original}, which the checkpoint came from, is gone; name it with --baseline to compare")
        return None
    return original


def layer_row(layer: Mapping[str, Any]) -> tuple[str, ...]:
    """One layer of a report under LAYER_COLUMNS."""
    error = layer.get("relative_error")
    return (
        layer["name"],
        layer["scheme"],
        f"{layer['bits_per_weight']:.3f}",
        "" if error is None else f"{error:.4f}",
        ", ".join(_remarks(layer)),
    )


def fold_row(fold: Mapping[str, Any]) -> tuple[str, str, str]:
    """One fold of a report: producer, readers (the part of their names that differs from it), and what was chosen or why not."""
    prefix = fold["producer"] or next(iter(fold["readers"]), "")
    common = prefix.rpartition(".")[0].rpartition(".")[0] + "."
    readers = ", ".join(reader.removeprefix(common) for reader in fold["readers"])
    choices = ", ".join(
        f"{name}: {choice}" + ("" if error is None else f" (error {error:.0%} of unscaled)")
        for name, choice, error in fold.get("choices", ())
    )
    return fold["producer"] or "none", readers, fold.get("left_alone") or choices


def _remarks(layer: Mapping[str, Any]) -> Iterator[str]:
    if layer.get("rounded_anew") is not None:
        yield f"then rounded anew, at an error of {layer['rounded_anew']:.4f} of its weights"
    if layer.get("tokens") is not None:
        yield f"{layer['tokens']:,} tokens" + (", so the statistics of all experts" if layer.get("pooled") else "")
    if layer.get("outlier_share") is not None:
        yield f"{layer['outlier_share']:.2%} outlier columns"
    if layer.get("inputs_all_zero"):
        yield "inputs all zero: rounded to nearest"
    elif layer.get("never_activated"):
        yield f"{layer['never_activated']} inputs never active"
    if layer.get("zero_groups"):
        yield f"{layer['zero_groups']} groups of zeros"
    if layer.get("damp_raised") and layer.get("damp") is not None:
        yield f"damping raised to {layer['damp']:g}"
