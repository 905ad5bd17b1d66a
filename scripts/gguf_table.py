"""GGUF files side by side: llama.cpp's own quantizer, with and without an importance matrix, and ptq's, of one model, by one reader.

    python scripts/gguf_table.py MODEL --llama-bin FOLDER --calib FILE --texts SOURCE ... [--types q4_k_m ...] [--rows ROW ...]
        [--nsamples N] [--seqlen N] [--tokens N] [--seed N] [--results FILE] [--work FOLDER] [--print]

The model becomes an F16 file by `ptq convert`, which llama.cpp's quantizer reads and which is the original of the table. The importance
matrix is of `llama-imatrix`, on the very windows that `ptq quantize` draws of the calibration text, cut into tokens anew. Every file is
read by ptq, as `ptq eval` does, and measured beside the original on the first tokens of the held-out texts. Finished cells are lines in
--results, and a run that was ended goes on behind them. --llama-bin holds llama-quantize and llama-imatrix.

    MB           size of the file, a million bytes each
    types        how many matrices have each; with * where they are not those of the row "llama.cpp"
    of ...       KL as a share of the row "llama.cpp", +- its standard error, window by window
    seconds      of processor time for the command that quantizes, and for the matrix
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before a Hugging Face library is imported

from accuracy_measure import divergence, ratio_error, remember, windows_of
from accuracy_peers import run_process
from accuracy_table import Cell, Results, here
from lab_models import FOLDER
from rich.console import Console
from rich.table import Table

from ptqcli.calibration.bos import window_bos
from ptqcli.calibration.text import calibration_windows, documents, evaluation_ids
from ptqcli.checkpoint.gguf_file import GGUFFile
from ptqcli.runtime.models import load_model, load_tokenizer

LLAMA, IMATRIX, ROUNDED = "llama.cpp", "llama.cpp, imatrix", "ptq convert"
# What is asked of `ptq quantize --format gguf`, by row.
QUANTIZED = {
    "ptq rtn": ("--algo", "rtn"),
    "ptq gptq": ("--algo", "gptq"),
    "ptq balanced": ("--quality", "balanced"),
    "ptq best": ("--quality", "best"),
}
ROWS = (LLAMA, IMATRIX, ROUNDED, *QUANTIZED)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The model, where its files go, and what is asked for."""

    folder: Path
    work: Path
    options: argparse.Namespace

    @property
    def settings(self) -> str:
        """What the numbers depend on beside type and row."""
        options = self.options
        texts = ", ".join(Path(source).stem for source in options.texts)
        return f"{Path(options.calib).name} {options.nsamples}x{options.seqlen}; {texts}: {options.tokens} tokens"

    @property
    def original(self) -> Path:
        """The F16 file, made if it is not there."""
        file = self.work / "original-f16.gguf"
        if not file.exists():
            self.ptq("convert", str(self.folder), "--to", "gguf", "--gguf-type", "f16", "--output", str(file))
        return file

    def ptq(self, *words: str) -> None:
        """Run a command of ptq. Raises RuntimeError if it fails."""
        run_process([sys.executable, "-c", "from ptqcli.cli import main; main()", *words, "--quiet"], dict(os.environ), self.work)

    def llama(self, tool: str, *words: str) -> None:
        """Run a program of llama.cpp. Raises RuntimeError if it fails."""
        run_process([str(self.options.llama_bin.resolve() / f"llama-{tool}"), *words], dict(os.environ), self.work)

    def importance(self) -> tuple[Path, float]:
        """The importance matrix, made if it is not there, and the seconds of processor time that it took."""
        options = self.options
        name = f"{Path(options.calib).stem}-{options.nsamples}x{options.seqlen}-{options.seed}"
        file, text, cost = (self.work / f"{name}.{suffix}" for suffix in ("imatrix", "txt", "seconds"))
        if not cost.exists():
            text.write_text(self.calibration(), encoding="utf-8")
            asked = ("-f", str(text), "-o", str(file), "-c", str(options.seqlen), "--chunks", str(options.nsamples))
            begun = children_time()
            self.llama("imatrix", "-m", str(self.original), *asked, "-t", str(options.threads), "--no-ppl")
            cost.write_text(str(children_time() - begun))
        return file, float(cost.read_text())

    def calibration(self) -> str:
        """The text of the windows that `ptq quantize` draws."""
        tokenizer, options = load_tokenizer(self.folder), self.options
        texts = documents(options.calib, "calibration")
        drawn = calibration_windows(texts, tokenizer, options.nsamples, options.seqlen, options.seed)
        return "".join(tokenizer.batch_decode(drawn, skip_special_tokens=True))

    def make(self, row: str, kind: str) -> tuple[Path, float]:
        """The file of a row, and the seconds of processor time that it took. Raises RuntimeError if it fails."""
        file = self.work / f"{re.sub('[^a-z0-9]+', '-', row)}-{kind}.gguf"
        begun, before = children_time(), 0.0
        if row == IMATRIX:
            matrix, before = self.importance()
            begun = children_time()
            self.llama("quantize", "--imatrix", str(matrix), str(self.original), str(file), kind, str(self.options.threads))
        elif row == LLAMA:
            self.llama("quantize", str(self.original), str(file), kind, str(self.options.threads))
        elif row == ROUNDED:
            self.ptq("convert", str(self.folder), "--to", "gguf", "--gguf-type", kind, "--output", str(file), "--overwrite")
        else:
            file = self.quantized(row, kind)
        return file, children_time() - begun + before

    def quantized(self, row: str, kind: str) -> Path:
        """The file in the folder that `ptq quantize` writes."""
        folder, options = self.work / "output", self.options
        calibrated = ("--calib", options.calib, "--nsamples", str(options.nsamples), "--seqlen", str(options.seqlen))
        asked = (*QUANTIZED[row], "--format", "gguf", "--gguf-type", kind, "--seed", str(options.seed))
        calibrated = () if QUANTIZED[row] == ("--algo", "rtn") else calibrated
        self.ptq("quantize", str(self.folder), *asked, *calibrated, "--output", str(folder), "--overwrite")
        [file] = folder.glob("*.gguf")
        return file

    def texts(self) -> dict[str, Any]:
        """Name -> held-out text with what the original says to it."""
        tokenizer, model = load_tokenizer(self.folder), load_model(self.original)
        found = {}
        for source in self.options.texts:
            ids = evaluation_ids(source, tokenizer)
            windows = windows_of(ids, self.options.tokens, self.options.seqlen, window_bos(tokenizer, "auto"))
            key = f"{self.original} {self.original.stat().st_mtime_ns}"
            found[Path(source).stem] = remember(model, windows, self.work / "originals", key)
        return found


def children_time() -> float:
    """Seconds of processor time of the processes that were started and waited for."""
    return os.times().children_user + os.times().children_system


def cells(bench: Bench) -> Iterator[tuple[Cell, str, str]]:
    """What is asked for, with its row and type."""
    for kind in bench.options.types:
        for row in bench.options.rows:
            yield cell_of(bench, row, kind), row, kind


def cell_of(bench: Bench, row: str, kind: str) -> Cell:
    """The cell of a row in the table of ``kind``."""
    return Cell(model=bench.folder.name, scheme=kind, row=row, seed=bench.options.seed, settings=bench.settings)


def measure_missing(bench: Bench, results: Results) -> None:
    """Make and measure the cells that have no numbers, and write them down; of one that fails the reason."""
    texts: dict[str, Any] = {}
    for cell, row, kind in cells(bench):
        if results.finished(cell):
            continue
        print(f"{cell.model}, {kind}, {row}", file=sys.stderr, flush=True)
        try:
            file, seconds = bench.make(row, kind)
            texts = texts or bench.texts()
            results.add(cell, {**described(file, seconds), "texts": measured(file, texts)})
        except RuntimeError as error:
            results.add(cell, {"failed": str(error)})
            print(f"  failed: {error}", file=sys.stderr, flush=True)


def described(file: Path, seconds: float) -> dict[str, Any]:
    """Size and types of a file, what it cost, and the code that wrote it."""
    types = {name: tensor.kind.name for name, tensor in GGUFFile(file).stored.items() if len(tensor.shape) > 1}
    return {"bytes": file.stat().st_size, "types": types, "cpu_seconds": round(seconds, 1), "code": here()}


def measured(file: Path, texts: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a file on each text."""
    model = load_model(file)
    return {name: divergence(model, text) for name, text in texts.items()}


def table_of(kind: str, bench: Bench, found: dict[str, dict[str, Any]]) -> Table:
    """One line a row; the columns from perplexity on for each text. found: row -> its record, for rows that have numbers."""
    names, beside = [Path(source).stem for source in bench.options.texts], found.get(LLAMA)
    originals = ", ".join(f"{name} {record['texts'][name]['original']:.3f}" for record in [*found.values()][:1] for name in names)
    title = f"{bench.folder.name}, {kind} ({bench.settings}); original's perplexity: {originals}"
    table = Table("", "MB", "types", box=None, header_style="", title=title, title_justify="left")
    for name in names:
        for column in ("perplexity", "KL, nats", f"of {LLAMA}", "top-1"):
            table.add_column(f"{name}: {column}", justify="right")
    table.add_column("seconds", justify="right")
    for row, record in found.items():
        shown = (word for name in names for word in words_of(record["texts"][name], beside and beside["texts"][name]))
        table.add_row(row, f"{record['bytes'] / 1e6:.1f}", types_of(record, beside), *shown, f"{record['cpu_seconds']:.0f}")
    return table


def words_of(text: dict[str, Any], beside: dict[str, Any] | None) -> list[str]:
    """The cells of a row for one text."""
    error = "" if text["kl_error"] is None else f" ±{text['kl_error']:.4f}"
    share = "" if beside is None else f"{text['kl'] / beside['kl']:.2f}"
    off = ratio_error(text["kl_windows"], beside["kl_windows"]) if beside is not None else None
    return [f"{text['perplexity']:.3f}", f"{text['kl']:.4f}{error}", share + (f" ±{off:.2f}" if off else ""), f"{text['top1']:.1%}"]


def types_of(record: dict[str, Any], beside: dict[str, Any] | None) -> str:
    """How many matrices have each type, most frequent first."""
    counted = Counter(record["types"].values()).most_common()
    return " ".join(f"{kind} {count}" for kind, count in counted) + "*" * (beside is not None and record["types"] != beside["types"])


def arguments(given: Iterable[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL", help="a folder")
    parser.add_argument("--llama-bin", type=Path, metavar="FOLDER", help="llama.cpp's programs, for the rows that need them")
    parser.add_argument("--calib", required=True, metavar="SOURCE", help="calibration text; a path is best given whole")
    parser.add_argument("--texts", nargs="+", required=True, metavar="SOURCE", help="held-out texts")
    parser.add_argument("--types", nargs="+", default=["q4_k_m"], metavar="TYPE", help="llama.cpp's mixes (default: q4_k_m)")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS, metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--nsamples", type=int, default=128, metavar="N", help="calibration windows (default: %(default)s)")
    parser.add_argument("--seqlen", type=int, default=512, metavar="N", help="tokens in a window, of all texts (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=16_384, metavar="N", help="held-out tokens of each text (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the choice of calibration windows")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of llama.cpp's programs (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=FOLDER / "gguf.jsonl", metavar="FILE", help="default: %(default)s")
    parser.add_argument("--work", type=Path, default=FOLDER / "gguf", metavar="FOLDER", help="for files (default: %(default)s)")
    parser.add_argument("--print", action="store_true", dest="only_print", help="measure nothing, print what FILE has")
    return parser.parse_args(None if given is None else list(given))


def main() -> None:
    """Measure what is missing, and print the tables."""
    options = arguments()
    folder = options.model.resolve()
    bench = Bench(folder=folder, work=(options.work / folder.name).resolve(), options=options)
    results = Results(options.results)
    if not options.only_print:
        bench.work.mkdir(parents=True, exist_ok=True)
        measure_missing(bench, results)
    console = Console(width=200)
    for kind in options.types:
        records = {row: results.records.get(cell_of(bench, row, kind), {}) for row in options.rows}
        console.print(table_of(kind, bench, {row: record for row, record in records.items() if "texts" in record}))
        console.print(*(f"{row}: {record['failed']}" for row, record in records.items() if "failed" in record), "", sep="\n")


if __name__ == "__main__":
    main()
