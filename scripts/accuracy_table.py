"""How far models move from their originals, by solver, option and tool, at every width; a run that was ended goes on where it was.

    python scripts/accuracy_table.py [smollm2] [mgm] [demo] [FOLDER] [--schemes w4a16-g64 ... w8a8] [--rows gptq rtn ...] [--seeds 0 1 2]
        [--calib SOURCE] [--texts SOURCE ...] [--nsamples N] [--seqlen N] [--tokens N] [--results FILE] [--print]

For each model, scheme, row and seed the model is quantized in a process of its own, the checkpoint is loaded and measured beside the
original on held-out texts, and a line is added to FILE; what stands there is not measured again, unless --again names its row. Rows are
data, in accuracy_rows.py. Models are fetched by lab_models.py. SOURCE is what `ptq quantize --calib` and `ptq eval --ppl` take.

    perplexity, rise   over the original's
    KL, nats           KL(original || quantized), a mean over the tokens, +- its standard error over windows
    of ...             that KL as a share of the row that --beside names, +- its standard error, window by window
    top-1              tokens for which both find the same one most likely
    cost               processor time of the process that quantizes, without imports, in units of the row gptq

With several seeds (of the choice of calibration windows, and of the rotation) numbers are means, and "spread" is how far the KL goes,
largest less smallest.

Rows of another commit run its own code in this environment. Peers run in environments of their own, made in --work when they are first
needed, get the same calibration windows as token ids, and hand back dequantized weights.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accuracy_measure import divergence, ratio_error, remember, windows_of
from accuracy_peers import quantize_with_peer, run_process, with_weights
from accuracy_rows import ACTIVATIONS, GPTQ, GPTQ_BEFORE, SUBJECTS, WEIGHTS, Row, Subject, recipe_of, rows_of
from compare_commits import ROOT, check_out, linked
from lab_models import FOLDER, MODELS, lab_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from ptqcli.adapters.files import read_adapter
from ptqcli.calibration.bos import window_bos
from ptqcli.calibration.text import evaluation_ids
from ptqcli.checkpoint.auxiliary import ADAPTER
from ptqcli.errors import PTQError
from ptqcli.runtime import load_quantized
from ptqcli.runtime.models import load_tokenizer

# Runs the command lines on its input, a JSON list of lists, and writes the processor time that they took to the file it is told.
RUN = """
import json, os, sys
from importlib.machinery import PathFinder
sys.meta_path.insert(0, PathFinder)  # before the finder of an editable installation
import datasets, ptqcli, torch, transformers
from ptqcli.cli import run
assert ptqcli.__file__.startswith(os.environ["PYTHONPATH"]), ptqcli.__file__
begun = sum(os.times()[:4])
for arguments in json.load(sys.stdin):
    if code := run(arguments):
        sys.exit(code)
open(sys.argv[1], "w").write(str(sum(os.times()[:4]) - begun))
"""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What one line of the results is of. settings: what else the numbers depend on, in words."""

    model: str
    scheme: str
    row: str
    seed: int
    settings: str

    @classmethod
    def of(cls, record: dict[str, Any]) -> Cell:
        """The cell that ``record`` is of."""
        return cls(**{name: record[name] for name in cls.__dataclass_fields__})


class Results:
    """Finished cells, a JSON line each; of several lines of a cell the last one counts, and a line that was cut off none."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.records = {Cell.of(record): record for record in _lines(file)}

    def add(self, cell: Cell, record: dict[str, Any]) -> None:
        """Write a cell down, whole or not at all."""
        self.records[cell] = {**vars(cell), **record}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        torn = self.file.exists() and not self.file.read_bytes().endswith(b"\n")
        with self.file.open("a") as out:
            out.write(("\n" if torn else "") + json.dumps(self.records[cell]) + "\n")

    def finished(self, cell: Cell) -> bool:
        """Whether the cell has numbers; one that failed has a reason in their place, and is tried again."""
        return "texts" in self.records.get(cell, {})


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


class Bench:
    """One model, loaded when a cell first needs it."""

    def __init__(self, name: str, subject: Subject, work: Path) -> None:
        self.name, self.subject, self.work = name, subject, work
        self._texts: dict[str, Any] = {}

    @property
    def settings(self) -> str:
        """What the numbers depend on beside scheme, row and seed."""
        subject = self.subject
        calib = re.sub(r"[^,]*/", "", subject.calib)  # without folders
        return f"{calib} {subject.nsamples}x{subject.seqlen}, {subject.tokens} tokens"

    def texts(self) -> dict[str, Any]:
        """Name -> held-out text with what the original says to it."""
        if not self._texts:
            original = AutoModelForCausalLM.from_pretrained(self.subject.folder, dtype="auto")
            tokenizer = load_tokenizer(self.subject.folder)
            bos = window_bos(tokenizer, "auto")
            for name, source in self.subject.texts.items():
                windows = windows_of(evaluation_ids(source, tokenizer), self.subject.tokens, self.subject.seqlen, bos)
                self._texts[name] = remember(original, windows, self.work / "originals", self._fingerprint())
        return self._texts

    def _fingerprint(self) -> str:
        files = sorted(self.subject.folder.glob("*.safetensors"))
        return " ".join([str(self.subject.folder), *(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)])

    def run(self, scheme: str, row: Row, seed: int, trees: dict[str | None, Path]) -> dict[str, Any]:
        """Quantize and measure. Raises RuntimeError, with the reason, if quantizing fails."""
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            begun = time.perf_counter()
            if row.peer is not None:
                done = quantize_with_peer(row, scheme, seed, self.subject, self.work, folder)
            else:
                done = quantize(row, scheme, seed, self.subject, trees[row.commit], folder)
            seconds = time.perf_counter() - begun
            texts = self.texts()
            model = loaded(folder / "output", self.subject.folder, scheme)
            measured = {name: divergence(model, text) for name, text in texts.items()}
        return {**done, "seconds": round(seconds, 1), "code": row.commit or here(), "texts": measured}


def here() -> str:
    """The commit of this tree, with "+" if files were changed since."""
    asked = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+"]
    return subprocess.run(asked, capture_output=True, text=True).stdout.strip()


def quantize(row: Row, scheme: str, seed: int, subject: Subject, tree: Path, folder: Path) -> dict[str, Any]:
    """Quantize into ``folder / "output"`` with the code in ``tree``: cpu_seconds, bits_per_weight."""
    recipe, cost, output = folder / "recipe.yaml", folder / "cost", folder / "output"
    asked = {"calib": subject.calib, "nsamples": subject.nsamples, "seqlen": subject.seqlen, "seed": seed, **recipe_of(row, scheme, seed)}
    recipe.write_text(json.dumps(asked))  # which is YAML
    last = folder / "quantized" if row.then else output
    lines = [["quantize", str(subject.folder), "--recipe", str(recipe), "--output", str(last)]]
    for number, words in enumerate(row.then, start=1):
        step = output if number == len(row.then) else folder / f"step-{number}"
        lines.append([word.format(input=last, output=step) for word in words])
        last = step
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    run_process([sys.executable, "-c", RUN, str(cost)], environment, folder, json.dumps(lines))
    report = json.loads((output / "ptq_report.json").read_text())
    bits = report["bits_per_weight"] + adapter_bits(output / ADAPTER)
    return {"cpu_seconds": round(float(cost.read_text()), 2), "bits_per_weight": bits}


def adapter_bits(folder: Path) -> float:
    """Bits that the adapter in ``folder`` adds to each weight, 0 where there is none."""
    if not folder.is_dir():
        return 0.0
    factors = read_adapter(folder).values()
    weights = sum(factor.A.shape[1] * factor.B.shape[0] for factor in factors)
    return 8 * sum(each.numel() * each.element_size() for factor in factors for each in (factor.A, factor.B)) / weights


def loaded(output: Path, original: Path, scheme: str) -> Any:
    """The quantized model: a checkpoint, or the original with the weights that a peer handed back."""
    if (output / "config.json").exists():
        return load_quantized(output, adapter=(output / ADAPTER).is_dir())
    return with_weights(original, output, scheme)


@contextmanager
def code_of(commits: Iterable[str | None]) -> Iterator[dict[str | None, Path]]:
    """Commit -> a folder from which its code can be imported; None is this tree's."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        trees: dict[str | None, Path] = {None: linked(ROOT, folder / "here")}
        for commit in {*commits} - {None}:
            trees[commit] = check_out(str(commit), folder / str(commit))
        yield trees


def tables(records: Iterable[dict[str, Any]], beside: str) -> Iterator[Table | str]:
    """A table for each model, scheme and settings, rows in the order of accuracy_rows.py; a line for each row that failed."""
    grouped: dict[tuple[str, str, str], dict[str, list[dict[str, Any]]]] = {}
    for record in records:
        key = (record["model"], record["scheme"], record["settings"])
        grouped.setdefault(key, {}).setdefault(record["row"], []).append(record)
    for (model, scheme, settings), rows in grouped.items():
        order = {name: number for number, name in enumerate(rows_of(scheme))}
        finished = {name: [each for each in rows[name] if "texts" in each] for name in sorted(rows, key=lambda name: order.get(name, 99))}
        known = {name: summary(cells) for name, cells in finished.items() if cells}
        if known:
            yield table_of(f"{model}, {scheme} ({settings})", known, beside)
        yield from (f"{model}, {scheme}, {name}: {rows[name][-1]['failed']}" for name, cells in finished.items() if not cells)


def summary(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds of one row, and by text the spread of its KL."""
    texts = {}
    for name in cells[0]["texts"]:
        of_text = [cell["texts"][name] for cell in cells]
        kls = [each["kl"] for each in of_text]
        errors = [each["kl_error"] for each in of_text if each["kl_error"] is not None]
        means = {key: statistics.mean(each[key] for each in of_text) for key in ("original", "perplexity", "rise", "kl", "top1")}
        windows = [statistics.mean(values) for values in zip(*(each["kl_windows"] for each in of_text), strict=True)]
        error = statistics.mean(errors) if errors else None
        texts[name] = {**means, "kl_error": error, "kl_windows": windows, "spread": max(kls) - min(kls)}
    of_cells = {key: statistics.mean(cell[key] for cell in cells) for key in ("cpu_seconds", "bits_per_weight")}
    return {**of_cells, "texts": texts, "seeds": len(cells)}


def table_of(title: str, rows: dict[str, dict[str, Any]], beside: str) -> Table:
    """One line a row; the columns from perplexity on for each text."""
    first = next(iter(rows.values()))
    names = list(first["texts"])
    originals = ", ".join(f"{name} {first['texts'][name]['original']:.3f}" for name in names)
    several = any(row["seeds"] > 1 for row in rows.values())
    table = Table("", "bits", box=None, header_style="", title=f"{title}; original's perplexity: {originals}", title_justify="left")
    for number, name in enumerate(names):
        columns = ["perplexity", "rise", "KL, nats", *(["spread"] if several else []), f"of {beside}", "top-1"]
        for column in columns if number == 0 else [f"{name}: {column}" for column in columns]:
            table.add_column(column, justify="right")
    table.add_column("cost", justify="right")
    for name, row in rows.items():
        shown = [word for text in names for word in _of_text(text, row, rows.get(beside), several)]
        cost = f"{row['cpu_seconds'] / rows[GPTQ]['cpu_seconds']:.2f}" if GPTQ in rows else f"{row['cpu_seconds']:.1f} s"
        table.add_row(name, f"{row['bits_per_weight']:.3f}", *shown, cost)
    return table


def _of_text(name: str, row: dict[str, Any], beside: dict[str, Any] | None, several: bool) -> list[str]:
    text = row["texts"][name]
    error = "" if text["kl_error"] is None else f" ±{text['kl_error']:.4f}"
    share = "" if beside is None else _share(text, beside["texts"][name])
    spread = [f"{text['spread']:.4f}" if row["seeds"] > 1 else ""] if several else []
    return [f"{text['perplexity']:.3f}", f"{text['rise']:.3f}", f"{text['kl']:.4f}{error}", *spread, share, f"{text['top1']:.1%}"]


def _share(text: dict[str, Any], beside: dict[str, Any]) -> str:
    share = f"{text['kl'] / beside['kl']:.2f}"
    error = ratio_error(text["kl_windows"], beside["kl_windows"])
    return share if not error else f"{share} ±{error:.2f}"


def subject_of(name: str, options: argparse.Namespace) -> Subject:
    """The model ``name`` as the command line wants it measured; a folder is measured like the demo model."""
    subject = SUBJECTS[name] if name in SUBJECTS else replace(SUBJECTS["demo"], folder=Path(name))
    given = {key: getattr(options, key) for key in ("calib", "nsamples", "seqlen", "tokens", "schemes")}
    changes = {key: value for key, value in given.items() if value is not None}
    if options.texts:
        changes["texts"] = {Path(source).stem: source for source in options.texts}
    return replace(subject, **changes)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["demo"], metavar="MODEL", help=f"{', '.join(SUBJECTS)} or a folder")
    parser.add_argument("--schemes", nargs="+", metavar="SCHEME", help="such as w4a16-g128; w8a8 for the table of 8-bit activations")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="those that are wanted; without it all")
    parser.add_argument("--again", nargs="+", default=[], metavar="ROW", help="rows to measure although there are numbers")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="of the choice of calibration windows")
    parser.add_argument("--calib", metavar="SOURCE", help="calibration text; a path is best given whole")
    parser.add_argument("--texts", nargs="+", metavar="SOURCE", help="held-out texts")
    parser.add_argument("--nsamples", type=int, metavar="N", help="calibration windows")
    parser.add_argument("--seqlen", type=int, metavar="N", help="tokens in a window, of both kinds")
    parser.add_argument("--tokens", type=int, metavar="N", help="held-out tokens of each text")
    parser.add_argument("--beside", default=GPTQ_BEFORE, metavar="ROW", help="what KL is shown as a share of (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=FOLDER / "accuracy.jsonl", metavar="FILE", help="default: %(default)s")
    parser.add_argument(
        "--work", type=Path, default=FOLDER / "table", metavar="FOLDER", help="environments and texts (default: %(default)s)"
    )
    parser.add_argument("--print", action="store_true", dest="only_print", help="measure nothing, print what FILE has")
    return parser.parse_args()


def main() -> None:
    """Measure what is missing, and print the tables."""
    options = arguments()
    results = Results(options.results)
    benches = [Bench(Path(name).name, subject_of(name, options), options.work) for name in options.models]
    if not options.only_print:
        for bench in benches:
            if bench.name in MODELS:
                lab_model(bench.name)
        with code_of(row.commit for row in WEIGHTS.values()) as trees:
            for bench, scheme, name, seed in cells_of(benches, options):
                measure_cell(bench, scheme, name, seed, results, options.again, trees)
    shown = {(bench.name, bench.settings) for bench in benches}
    wanted = [record for record in results.records.values() if (record["model"], record["settings"]) in shown]
    console = Console(width=200 if options.texts else 150)
    for part in tables(wanted, options.beside):
        console.print(part, "")


def cells_of(benches: list[Bench], options: argparse.Namespace) -> Iterator[tuple[Bench, str, str, int]]:
    """What is asked for, one after the other. Raises SystemExit for a row that no table has."""
    if unknown := {*(options.rows or []), *options.again} - {*WEIGHTS, *ACTIVATIONS}:
        raise SystemExit(f"no row is called {sorted(unknown)[0]!r}; there are {', '.join([*WEIGHTS, *ACTIVATIONS])}")
    for bench in benches:
        for scheme in bench.subject.schemes:
            for name in rows_of(scheme):
                if options.rows is None or name in options.rows:
                    yield from ((bench, scheme, name, seed) for seed in options.seeds)


def measure_cell(
    bench: Bench, scheme: str, name: str, seed: int, results: Results, again: list[str], trees: dict[str | None, Path]
) -> None:
    """Measure a cell that has no numbers yet, and write them down."""
    cell = Cell(model=bench.name, scheme=scheme, row=name, seed=seed, settings=bench.settings)
    if results.finished(cell) and name not in again:
        return
    print(f"{bench.name}, {scheme}, {name}, seed {seed}", file=sys.stderr, flush=True)
    try:
        record = bench.run(scheme, rows_of(scheme)[name], seed, trees)
    except (RuntimeError, PTQError) as error:
        record = {"failed": str(error)}
        print(f"  failed: {error}", file=sys.stderr, flush=True)
    else:
        kls = ", ".join(f"{text} {measured['kl']:.4f}" for text, measured in record["texts"].items())
        print(f"  KL {kls}; {record['cpu_seconds']} s of processor time", file=sys.stderr, flush=True)
    results.add(cell, record)


if __name__ == "__main__":
    main()
