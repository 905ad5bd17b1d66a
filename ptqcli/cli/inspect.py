"""``ptq inspect``: what is in a checkpoint, without reading a weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ptqcli.cli.console import Output, path_text, size_text
from ptqcli.cli.locate import find_checkpoint
from ptqcli.cli.options import json_option
from ptqcli.cli.report import LAYER_COLUMNS, fold_row, layer_row, read_report

if TYPE_CHECKING:
    from ptqcli.checkpoint.tensors import CheckpointReader


@click.command()
@click.argument("checkpoint", required=False)
@json_option
def command(checkpoint: str | None, as_json: bool) -> None:
    """Show what is in CHECKPOINT: schemes, sizes, per-layer error.

    CHECKPOINT is a folder that `ptq quantize` wrote, or any other that transformers reads; left out, it is the newest one here.
    """
    from ptqcli.checkpoint.tensors import CheckpointReader
    from ptqcli.model.config import load_config

    folder = find_checkpoint(checkpoint)
    config = load_config(folder)
    reader = CheckpointReader(folder)
    report = read_report(folder) or {}
    layers = _layers(config, reader, report)
    output = Output(as_json=as_json)
    output.facts(_facts(folder, config, reader, layers, report))
    if layers:
        output.table("Schemes", ("scheme", "linears", "weights", "size", "bits/weight"), _scheme_rows(layers))
        error_kind = report.get("error_kind", "unknown")
        output.table(f"Layers (error: relative, {error_kind})", LAYER_COLUMNS, (layer_row(layer) for layer in layers))
    if report.get("folds"):
        output.table("Folds", ("producer", "linears that read it", "choice"), (fold_row(fold) for fold in report["folds"]))
    output.result(
        {
            "checkpoint": str(folder),
            "source": report.get("source"),
            "recipe": report.get("recipe"),
            "bytes": reader.total_bytes,
            "bytes_before": report.get("bytes_before"),
            "layers": layers,
            "folds": report.get("folds", []),
        }
    )


def _layers(config: Any, reader: CheckpointReader, report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each quantized linear with its scheme, its stored size, and what the report says of it."""
    from ptqcli.formats.compressed_tensors import schemes_of, stored_linears, tensor_names
    from ptqcli.model.config import build_on_meta
    from ptqcli.model.linears import is_linear, linear_weight
    from ptqcli.model.names import DiskNames

    entry = getattr(config, "quantization_config", None)
    if not isinstance(entry, Mapping):
        return []
    model = build_on_meta(config)
    linears = {name: module for name, module in model.named_modules() if is_linear(module)}
    names = DiskNames(model, [f"{stored}.weight" for stored in stored_linears(reader.names)])
    reported = {layer["name"]: layer for layer in report.get("layers", ())}
    layers = []
    for name, scheme in schemes_of(entry, linears).items():
        stored = (names.disk(f"{name}.weight") or name).removesuffix(".weight")
        size = sum(reader.nbytes(tensor) for tensor in tensor_names(stored, scheme))
        shape = list(linear_weight(linears[name]).shape)  # [out, in]
        facts = {"name": name, "scheme": str(scheme), "shape": shape, "bytes": size, "bits_per_weight": size * 8 / prod(shape)}
        layers.append({**reported.get(name, {}), **facts})
    return layers


def _facts(
    folder: Path, config: Any, reader: CheckpointReader, layers: Sequence[Mapping[str, Any]], report: Mapping[str, Any]
) -> list[tuple[str, str]]:
    packed = sum(layer["bytes"] for layer in layers)
    before = f", {size_text(report['bytes_before'])} before" if "bytes_before" in report else ""
    facts = [
        ("checkpoint", path_text(folder)),
        ("architecture", ", ".join(config.architectures or ["unknown"])),
        ("size", f"{size_text(reader.total_bytes)}{before}"),
        ("quantized", f"{len(layers)} linears, {size_text(packed)}" if layers else "nothing"),
    ]
    if layers:
        facts.append(("unquantized", f"{size_text(reader.total_bytes - packed)} (embeddings, output head, norms and what was left alone)"))
    if report:
        facts += [
            ("made from", str(report["source"])),
            ("made by", f"ptqcli {report['ptqcli']}, {_recipe_text(report['recipe'], report.get('error_kind'))}"),
        ]
    return facts


def _recipe_text(recipe: Mapping[str, Any], error_kind: object) -> str:
    calibration = f", calibrated on {recipe['nsamples']} windows of {recipe['calib']}" if error_kind == "output" else ""
    return f"{recipe['algo']}{calibration}"


def _scheme_rows(layers: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    rows = []
    for scheme in dict.fromkeys(layer["scheme"] for layer in layers):
        members = [layer for layer in layers if layer["scheme"] == scheme]
        weights = sum(prod(layer["shape"]) for layer in members)
        size = sum(layer["bytes"] for layer in members)
        rows.append([scheme, str(len(members)), f"{weights:,}", size_text(size), f"{size * 8 / weights:.3f}"])
    return rows
