"""``ptq inspect``: what is in a checkpoint, without reading a weight unless it is to be verified."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ptqcli.cli import completion, examples
from ptqcli.cli.console import Output, path_text, size_text, time_text
from ptqcli.cli.locate import find_checkpoint
from ptqcli.cli.options import NamedPath, json_option
from ptqcli.cli.plot import show_plot, write_plot
from ptqcli.cli.report import LAYER_COLUMNS, fold_row, layer_row
from ptqcli.cli.verify import show_verified
from ptqcli.pipeline.report import LOG_TEXT, folder_of, read_report

if TYPE_CHECKING:
    from ptqcli.formats.packed_checkpoint import PackedCheckpoint
    from ptqcli.model.gguf import GGUFTensors
    from ptqcli.pipeline.log import PastRuns

MOST_REASONS = 3


@click.command(epilog=examples("ptq inspect", "ptq inspect small --verify", "ptq inspect small --plot", "ptq inspect small --json"))
@click.argument("checkpoint", required=False, shell_complete=completion.checkpoint)
@click.option("--verify", is_flag=True, help="Read all of it: every file against its checksum, every tensor as a reader takes it.")
@click.option("--plot", is_flag=True, help="Draw the error of each layer, too.")
@click.option("--svg", type=NamedPath(), metavar="FILE", help="Draw it into this file, a picture in SVG.")
@json_option
def command(checkpoint: str | None, verify: bool, plot: bool, svg: Path | None, as_json: bool) -> None:
    """Show what is in CHECKPOINT: schemes, sizes, per-layer error.

    CHECKPOINT is a folder that `ptq quantize` wrote, any other that transformers reads, or a GGUF file; left out, it is the newest
    one here.
    """
    from ptqcli.checkpoint.tensors import SafetensorsFolder
    from ptqcli.formats.gguf import open_tensors
    from ptqcli.formats.packed_checkpoint import open_checkpoint
    from ptqcli.model.config import load_config
    from ptqcli.model.gguf import is_gguf
    from ptqcli.pipeline.log import read_log

    folder = find_checkpoint(checkpoint)
    if verify:
        show_verified(folder, Output(as_json=as_json))
        return
    config = load_config(folder)
    quantized = getattr(config, "quantization_config", None) is not None
    report: Mapping[str, Any] = {}
    if is_gguf(folder):
        tensors = open_tensors(folder)[1]
        report = read_report(folder) or {}
        size, layers = tensors.stored_bytes(), _block_layers(tensors, report)
    else:
        packed = open_checkpoint(folder) if quantized else None
        size = (packed.tensors if packed else SafetensorsFolder(folder)).total_bytes
        report = read_report(folder) or {}
        layers = _layers(packed, report) if packed else []
    output, error_kind, log = Output(as_json=as_json), report.get("error_kind", "unknown"), read_log(folder_of(folder))
    timed = {} if log is None else log.layers
    layers = [{**layer, **timed.get(layer["name"], {})} for layer in layers]
    output.facts([*_facts(folder, config, size, layers, report), *_log_facts(log)])
    if layers:
        output.table("Schemes", ("scheme", "linears", "weights", "size", "bits/weight"), _scheme_rows(layers))
        output.table(f"Layers (error: relative, {error_kind})", LAYER_COLUMNS, map(_timed_row, layers))
    if report.get("folds"):
        output.table("Folds", ("producer", "linears that read it", "choice"), (fold_row(fold) for fold in report["folds"]))
    if plot:
        show_plot(layers, error_kind, output)
    if svg is not None:
        write_plot(layers, error_kind, svg.expanduser())
    output.result(
        {
            "checkpoint": str(folder),
            "source": report.get("source"),
            "recipe": report.get("recipe"),
            "bytes": size,
            "bytes_before": report.get("bytes_before"),
            "layers": layers,
            "folds": report.get("folds", []),
            "log": None if log is None else {"runs": log.runs, "ended": log.ended, "seconds": log.seconds},
        }
    )


def _log_facts(log: PastRuns | None) -> list[tuple[str, str]]:
    """How long it took, and how often it was ended."""
    if log is None:
        return []
    why = "; ".join(reason or "killed" for reason in log.ended[:MOST_REASONS])
    more = f", and {len(log.ended) - MOST_REASONS} more times" if len(log.ended) > MOST_REASONS else ""
    ended = f" in {log.runs} runs; ended and gone on from: {why}{more}" if log.ended else ""
    return [("took", f"{time_text(log.seconds)}{ended} ({LOG_TEXT})")]


def _timed_row(layer: Mapping[str, Any]) -> tuple[str, ...]:
    """As ``layer_row``, with the time that it took among the remarks."""
    *row, remarks = layer_row(layer)
    took = f"{layer['seconds']:.1f} s" if "seconds" in layer else ""
    return (*row, ", ".join(filter(None, (took, remarks))))


def _layers(packed: PackedCheckpoint, report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each quantized linear with its scheme, its stored size, and what the report says of it."""
    anew = report.get("converted", {}).get("relative_errors", {})  # also where the report has no layers: another program made them
    reported: dict[str, Any] = {name: {"rounded_anew": error} for name, error in anew.items()}
    reported |= {layer["name"]: layer for layer in report.get("layers", ())}
    layers = []
    for name, scheme in packed.schemes.items():
        spec, size = packed.spec(name), packed.nbytes(name)
        weights = spec.out_features * spec.in_features
        facts = {
            "name": name,
            "scheme": str(scheme),
            "shape": [spec.out_features, spec.in_features],
            "bytes": size,
            "bits_per_weight": size * 8 / weights,
        }
        layers.append({**reported.get(name, {}), **facts})
    return layers


def _block_layers(tensors: GGUFTensors, report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each quantized matrix of a GGUF file, embeddings too, with ggml's name of its type in the place of a scheme."""
    reported = {layer["name"]: layer for layer in report.get("layers", ())}
    return [
        {
            **reported.get(name.rpartition(".")[0], {}),
            "name": name.rpartition(".")[0],
            "scheme": tensors.block_type(name),
            "shape": list(tensors.weight_shape(name)),
            "bytes": tensors.block_bytes(name),
            "bits_per_weight": tensors.block_bytes(name) * 8 / prod(tensors.weight_shape(name)),
        }
        for name in tensors.names
        if tensors.is_quantized(name)
    ]


def _facts(folder: Path, config: Any, size: int, layers: Sequence[Mapping[str, Any]], report: Mapping[str, Any]) -> list[tuple[str, str]]:
    packed = sum(layer["bytes"] for layer in layers)
    before = f", {size_text(report['bytes_before'])} before" if "bytes_before" in report else ""
    facts = [
        ("checkpoint", path_text(folder)),
        ("architecture", ", ".join(config.architectures or ["unknown"])),
        ("size", f"{size_text(size)}{before}"),
        ("quantized", f"{len(layers)} linears, {size_text(packed)}" if layers else "nothing"),
    ]
    if layers:
        facts.append(("unquantized", f"{size_text(size - packed)} (norms, embedding and head as a rule, and what was left alone)"))
    if report:
        facts += [
            ("made from", report["source"] or "a model in memory"),
            ("made by", f"ptqcli {report['ptqcli']}, {_recipe_text(report)}"),
        ]
    return facts


def _recipe_text(report: Mapping[str, Any]) -> str:
    recipe: Mapping[str, Any] = report["recipe"]
    usual = {"source": recipe.get("calib", "unknown text"), "windows": recipe.get("nsamples", "unknown")}  # of reports of earlier versions
    texts = (report.get("calibration") or {}).get("texts") or [usual]
    named = " and ".join(f"{text['windows']} windows of {text['source']}" for text in texts)
    calibration = f", calibrated on {named}" if report.get("error_kind") == "output" else ""
    return f"{recipe.get('algo', 'an unknown algorithm')}{calibration}"


def _scheme_rows(layers: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    rows = []
    for scheme in dict.fromkeys(layer["scheme"] for layer in layers):
        members = [layer for layer in layers if layer["scheme"] == scheme]
        weights = sum(prod(layer["shape"]) for layer in members)
        size = sum(layer["bytes"] for layer in members)
        rows.append([scheme, str(len(members)), f"{weights:,}", size_text(size), f"{size * 8 / weights:.3f}"])
    return rows
