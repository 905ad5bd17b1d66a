"""The tables of the papers rerun on a model folder of yours, beside the published numbers where the model is one of theirs.

    python scripts/paper_tables.py MODEL_FOLDER [--only weights smoothquant llm-int8] [--rows gptq-w4 ...] [--limit WINDOWS]
        [--calib SOURCE] [--text SOURCE] [--data-dir FOLDER] [--nsamples N] [--seqlen N] [--group-size N] [--as NAME]
        [--results FILE] [--json]

Perplexity by the protocol of the papers: the test split of WikiText-2, its rows joined with blank lines, tokenized at once as the tokenizer
writes a text, cut into windows of 2048 tokens that follow each other. Calibrated on 128 windows of 2048 tokens of C4.

    weights        RTN and GPTQ at 4, 3 and 2 bits, a scale and a zero point a row, fitted to least and greatest, columns in their order
                   (Frantar et al. 2023); the same with groups, and GPTQ with act-order and AWQ beside them (Lin et al. 2024, table 4)
    smoothquant    8-bit weights and activations with one scale each (naive), and SmoothQuant O1, O2, O3 (Xiao et al. 2023, table 2)
    llm-int8       8 bits with one scale each, with one a row and a token, and LLM.int8's split of outliers (Dettmers et al. 2022)

OBQ takes hours on all but the smallest models: it runs only if --rows names it. Each row is quantized into a temporary folder, loaded and
measured; its number is a line in --results, and what stands there for the same model and settings is not measured again. So a run that was
ended goes on. A row that the model does not allow has its reason in place of a number.

Published numbers stand in published.yaml, with their sources. A model is one of those if config.json has its shape and its folder, or the
name in config.json, is called so; --as NAME says that it is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from accuracy_table import Cell, Results
from rich.console import Console
from rich.table import Table

import ptqcli
from ptqcli.calibration.padded import marks
from ptqcli.calibration.text import evaluation_ids
from ptqcli.errors import PTQError
from ptqcli.evaluation.perplexity import perplexity
from ptqcli.model.config import load_config
from ptqcli.runtime.models import load_model, load_tokenizer

PUBLISHED = Path(__file__).with_name("published.yaml")
WINDOW = 2048
ORIGINAL = "original"
TEXT = "text"  # what the measured text is called in the results

# As the papers have them, where ptqcli's defaults go further.
PLAIN = {"scale_search": "minmax", "polish": 0}
GPTQ = {"algo": "gptq", **PLAIN, "act_order": False, "correct_bias": False, "sequential": False}


@dataclass(frozen=True)
class Row:
    """A line of a table. recipe: keys of a recipe, {group} in the scheme for the group size; None for the original. asked: only by name."""

    table: str
    title: str
    recipe: Mapping[str, Any] | None
    asked: bool = False


def _weight_rows() -> Iterator[tuple[str, Row]]:
    for bits in (4, 3, 2):
        row, groups = f"w{bits}a16-row-asym", f"w{bits}a16-g{{group}}-asym"
        yield f"rtn-w{bits}", Row("weights", f"RTN, {bits} bit", {"algo": "rtn", **PLAIN, "scheme": row})
        yield f"gptq-w{bits}", Row("weights", f"GPTQ, {bits} bit", {**GPTQ, "scheme": row})
        obq = {**GPTQ, "algo": "obq", "scheme": row}
        yield f"obq-w{bits}", Row("weights", f"OBQ, {bits} bit", {key: obq[key] for key in obq if key != "act_order"}, asked=True)
        yield f"rtn-w{bits}-g", Row("weights", f"RTN, {bits} bit, groups", {"algo": "rtn", **PLAIN, "scheme": groups})
        yield f"gptq-w{bits}-g", Row("weights", f"GPTQ, {bits} bit, groups", {**GPTQ, "scheme": groups})
        order = {**GPTQ, "act_order": True, "static_groups": False, "scheme": groups, "format": "gptq_v2"}  # which holds groups that move
        yield f"gptq-order-w{bits}-g", Row("weights", f"GPTQ with act-order, {bits} bit, groups", order)
        yield f"awq-w{bits}-g", Row("weights", f"AWQ, {bits} bit, groups", {"algo": "awq", **PLAIN, "scheme": groups})


def _activation_rows() -> Iterator[tuple[str, Row]]:
    rounded = {"algo": "rtn", **PLAIN}
    naive = {**rounded, "scheme": "w8a8-tensor-act-tensor"}
    yield "naive-w8a8", Row("smoothquant", "W8A8, a scale for each tensor", naive)
    for level in ("O1", "O2", "O3"):
        smooth = {"algo": "smoothquant+rtn", **PLAIN, "smooth_level": level}
        yield f"smoothquant-{level.lower()}", Row("smoothquant", f"SmoothQuant {level}", smooth)
    other = {"algo": "smoothquant+rtn", **PLAIN, "scheme": "w8a8", "smooth_alpha": 0.85}
    yield "smoothquant-0.85", Row("smoothquant", "SmoothQuant, alpha 0.85, a scale a row and a token", other)
    yield "absmax-w8a8", Row("llm-int8", "W8A8, a scale for each tensor", naive)
    yield "vector-w8a8", Row("llm-int8", "W8A8, a scale a row and a token", {**rounded, "scheme": "w8a8"})
    yield "llm-int8", Row("llm-int8", "LLM.int8, outliers beyond 6 in 16 bit", {**rounded, "scheme": "w8a8-outliers6"})


ROWS = {ORIGINAL: Row("", "the model as it is", None), **dict(_weight_rows()), **dict(_activation_rows())}
TABLES = {
    "weights": "Weights alone: RTN, GPTQ, AWQ",
    "smoothquant": "Weights and activations in 8 bits: SmoothQuant",
    "llm-int8": "Weights and activations in 8 bits: LLM.int8",
}


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What numbers depend on beside model and row. limit: windows of the text that are measured, None for all."""

    calib: str
    text: str
    nsamples: int
    seqlen: int
    group: int
    limit: int | None

    def __str__(self) -> str:
        some = "" if self.limit is None else f", first {self.limit} windows"
        return f"{Path(self.calib).name} {self.nsamples}x{self.seqlen}, {Path(self.text).name}{some}, groups of {self.group}"


class Bench:
    """A model folder, measured by one protocol."""

    def __init__(self, folder: Path, protocol: Protocol, data_dir: Path | None, device: str) -> None:
        self.folder, self.protocol, self.data_dir, self.device = folder, protocol, data_dir, device
        self._ids: torch.Tensor | None = None

    @property
    def model(self) -> str:
        """The folder's name with what its weights are recognised by."""
        files = sorted(self.folder.glob("*.safetensors"))
        about = " ".join(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)
        return f"{self.folder.name} {hashlib.sha256(about.encode()).hexdigest()[:12]}"

    def cell(self, name: str) -> Cell:
        return Cell(model=self.model, scheme=ROWS[name].table, row=name, seed=0, settings=str(self.protocol))

    def ids(self) -> torch.Tensor:
        """The text's tokens, with what the tokenizer writes in front of a text, int64 [tokens]."""
        if self._ids is None:
            tokenizer = load_tokenizer(self.folder)
            front = torch.tensor(marks(tokenizer)[0], dtype=torch.long)
            ids = torch.cat([front, evaluation_ids(self.protocol.text, tokenizer, self.data_dir)])
            self._ids = ids if self.protocol.limit is None else ids[: self.protocol.limit * self.protocol.seqlen]
        return self._ids

    def measure(self, name: str) -> dict[str, Any]:
        """Perplexity of a row. Raises PTQError, with the reason, where the model does not allow it."""
        begun, recipe = time.perf_counter(), ROWS[name].recipe
        if recipe is None:
            return {"texts": {TEXT: self._perplexity(self.folder)}, "bits_per_weight": None, "seconds": time.perf_counter() - begun}
        given = {key: value.format(group=self.protocol.group) if key == "scheme" else value for key, value in recipe.items()}
        windows = {"calib": self.protocol.calib, "nsamples": self.protocol.nsamples, "seqlen": self.protocol.seqlen, "bos": "no"}
        with tempfile.TemporaryDirectory() as place:
            output = Path(place) / "checkpoint"
            report = ptqcli.quantize(self.folder, output=output, device=self.device, data_dir=self.data_dir, **windows, **given)
            found = self._perplexity(output)
        return {"texts": {TEXT: found}, "bits_per_weight": report.bits_per_weight, "seconds": time.perf_counter() - begun}

    def _perplexity(self, folder: Path) -> dict[str, Any]:
        found = perplexity(load_model(folder, self.device), self.ids(), self.protocol.seqlen)
        return {"perplexity": found.perplexity, "windows": found.windows}


# Published numbers


def published() -> list[dict[str, Any]]:
    """The models of published.yaml."""
    models: list[dict[str, Any]] = yaml.safe_load(PUBLISHED.read_text(encoding="utf-8"))
    return models


def recognised(folder: Path, named: str | None = None) -> tuple[dict[str, Any] | None, str]:
    """The published model that a folder is, and why, or why it is none. named: what the user says that it is.

    Raises SystemExit for a name that is not published.
    """
    models = published()
    if named is not None:
        found = next((model for model in models if model["name"] == named), None)
        if found is None:
            raise SystemExit(f"--as {named}: no numbers of it; there are {', '.join(model['name'] for model in models)}")
        return found, f"taken for {named}, as --as says"
    config = load_config(folder)
    shaped = [model for model in models if all(getattr(config, key, None) == value for key, value in model["shape"].items())]
    if not shaped:
        return None, "has the shape of no model with published numbers; only what is measured is shown"
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_name_or_path", "")
    for model in shaped:
        pattern = re.compile(rf"(^|[^a-z0-9]){model['called']}($|[-_.](hf|fp16|f16|bf16)$|[-_.](hf)?$)")
        if any(pattern.search(name.lower()) for name in (folder.resolve().name, str(stored))):
            return model, f"is {model['name']}, by its shape and its name"
    names = " or ".join(model["name"] for model in shaped)
    return None, f"has the shape of {names} and another name, so its weights may be others; if they are not, give --as {shaped[0]['name']}"


def numbers_of(model: Mapping[str, Any] | None, row: str, group: int) -> list[str]:
    """What is published of a row, each with the number of its source; with groups only where they are as large."""
    shown = []
    for number, table in enumerate((model or {}).get("tables", ()), start=1):
        if row in table["rows"] and not (row.endswith("-g") and table.get("group") != group):
            shown.append(f"{_number(float(table['rows'][row]))} [{number}]")
    return shown


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 1e3 else f"{value:,.0f}"


# The command


def chosen_rows(tables: Sequence[str], rows: Sequence[str] | None) -> list[str]:
    """The names of the rows that are asked for, in the order of the tables. Raises SystemExit for one that there is not."""
    if unknown := sorted(set(rows or ()) - set(ROWS)):
        raise SystemExit(f"--rows {unknown[0]}: no such row; there are {', '.join(ROWS)}")
    return [name for name, row in ROWS.items() if name == ORIGINAL or (name in rows if rows else row.table in tables and not row.asked)]


def measure_missing(bench: Bench, names: Sequence[str], results: Results, console: Console) -> None:
    """Measure what has no number yet; of the same recipe in two tables once."""
    for number, name in enumerate(names, start=1):
        cell, twin = bench.cell(name), bench.cell("naive-w8a8")
        if results.finished(cell):
            continue
        console.print(f"row {number}/{len(names)}: {ROWS[name].title}", highlight=False)
        if name == "absmax-w8a8" and results.finished(twin):
            results.add(cell, {key: results.records[twin][key] for key in ("texts", "bits_per_weight", "seconds")})
            continue
        try:
            results.add(cell, bench.measure(name))
        except PTQError as error:
            results.add(cell, {"failed": str(error)})


def lines_of(bench: Bench, names: Sequence[str], results: Results, model: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """What is known of each row, as values."""
    found = []
    for name in names:
        record = results.records.get(bench.cell(name), {})
        line = {"row": name, "table": ROWS[name].table, "title": ROWS[name].title, "bits_per_weight": record.get("bits_per_weight")}
        line["perplexity"] = record["texts"][TEXT]["perplexity"] if "texts" in record else None
        line["published"] = numbers_of(model, name, bench.protocol.group)
        found.append({**line, **({"failed": record["failed"]} if "failed" in record else {})})
    return found


def show(lines: Sequence[Mapping[str, Any]], console: Console) -> None:
    """A table each, then the reasons of what has no number."""
    original = next((line for line in lines if line["row"] == ORIGINAL), None)
    for name, title in TABLES.items():
        mine = [line for line in lines if line["table"] == name]
        if not mine:
            continue
        table = Table(title=title, title_justify="left", box=None)
        for number, column in enumerate(("", "bits/weight", "perplexity", "published")):
            table.add_column(column, justify="right" if number else "left")
        for line in [*([original] if original else []), *mine]:
            bits = "" if line["bits_per_weight"] is None else f"{line['bits_per_weight']:.2f}"
            measured = "-" if line["perplexity"] is None else _number(line["perplexity"])
            table.add_row(line["title"], bits, measured, ", ".join(line["published"]))
        console.print("", table)
    for line in lines:
        if "failed" in line:
            console.print(f"{line['title']}: {line['failed']}", highlight=False, markup=False)


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL_FOLDER")
    parser.add_argument("--only", nargs="+", choices=list(TABLES), default=list(TABLES), metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="those that are wanted, and the original")
    parser.add_argument("--limit", type=int, metavar="WINDOWS", help="measure the first windows of the text, for a quick try")
    parser.add_argument("--calib", default="c4", metavar="SOURCE", help="calibration text (default: %(default)s)")
    parser.add_argument("--text", default="wikitext2", metavar="SOURCE", help="text that is measured (default: %(default)s)")
    parser.add_argument("--data-dir", type=Path, metavar="FOLDER", help="where the texts are looked for before the hub")
    parser.add_argument("--nsamples", type=int, default=128, metavar="N", help="calibration windows (default: %(default)s)")
    parser.add_argument("--seqlen", type=int, default=WINDOW, metavar="N", help="tokens in a window (default: %(default)s, or positions)")
    parser.add_argument("--group-size", type=int, default=128, metavar="N", help="of the rows with groups (default: %(default)s)")
    parser.add_argument("--as", dest="named", metavar="NAME", help="the published model that the folder is")
    parser.add_argument("--device", default="cpu", metavar="cpu|cuda[:N]")
    parser.add_argument("--results", type=Path, default=Path("paper_tables.jsonl"), metavar="FILE", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Measure what is missing, and print the tables."""
    options = arguments(words)
    try:
        model, why = recognised(options.model, options.named)
        positions = getattr(load_config(options.model).get_text_config(), "max_position_embeddings", None)
    except PTQError as error:
        raise SystemExit(f"error: {error}") from error
    protocol = Protocol(
        calib=options.calib,
        text=options.text,
        nsamples=options.nsamples,
        seqlen=min(options.seqlen, positions or options.seqlen),
        group=options.group_size,
        limit=options.limit,
    )
    bench = Bench(options.model, protocol, options.data_dir, options.device)
    names, results = chosen_rows(options.only, options.rows), Results(options.results)
    console = Console(stderr=options.json, width=None if sys.stdout.isatty() else 140)
    console.print(f"{options.model.name} {why}", highlight=False, markup=False)
    measure_missing(bench, names, results, console)
    lines = lines_of(bench, names, results, model)
    console.print(f"\nPerplexity on {protocol}, windows of {protocol.seqlen}", highlight=False, markup=False)
    show(lines, console)
    for number, table in enumerate((model or {}).get("tables", ()), start=1):
        other = f", calibrated on {table['calibration']}" if "calibration" in table else ""
        console.print(f"[{number}] {table['source']}: {table['text']}{other}", highlight=False, markup=False)
    if options.json:
        found = {"model": str(options.model), "recognised": model and model["name"], "protocol": vars(protocol), "rows": lines}
        print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
