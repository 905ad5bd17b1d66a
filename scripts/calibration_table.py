"""Calibration texts side by side: gptq at 4 bits with each of them, and rounding, measured on several kinds of text.

    python scripts/calibration_table.py --data FOLDER [--model FOLDER ...] [--rows ROW ...] [--json FILE]

--data holds calibration/c4.txt, calibration/code.txt and wikitext-2-raw/wiki.test.raw. What is measured is never calibrated on: the first
tokens of WikiText-2 and of the code, the last fifth of C4, and for the demo model the held-out part of the built-in text; calibrated is on
the front of C4, on the second half of the code, and on WikiText behind the first third. A row is a value of --calib, in which c4, code and
wiki stand for those parts, or rtn. Numbers are KL from the original in nats, lower is better; "of rtn" is the mean over the texts as a
share of what rounding loses. Finished rows are kept in --json, and a run that was interrupted goes on behind them. Nothing is fetched: auto
is what it is on a machine without a corpus.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before a Hugging Face library is imported

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import ptqcli
from ptqcli.calibration.text import evaluation_ids
from ptqcli.checkpoint.auxiliary import load_tokenizer
from ptqcli.evaluation.divergence import compare
from ptqcli.runtime import load_quantized
from ptqcli.runtime.models import load_model

DEMO = Path(ptqcli.__file__).parent / "demo"
ROWS = ("rtn", "auto", "self", "builtin", "c4", "wiki", "code")
MEASURED_CHARACTERS = 100_000  # of each text, at its front (of C4: behind four fifths)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, nargs="*", default=[DEMO])
    parser.add_argument("--rows", nargs="*", default=ROWS, metavar="ROW")
    parser.add_argument("--nsamples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=4096, help="measured, of each text")
    parser.add_argument("--json", type=Path, default=Path("calibration_table.json"))
    return parser.parse_args()


def texts(data: Path, folder: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """What is calibrated on and what is measured, each written to a file of its own below ``folder``."""
    c4, code = ((data / "calibration" / name).read_text(encoding="utf-8") for name in ("c4.txt", "code.txt"))
    wiki = (data / "wikitext-2-raw" / "wiki.test.raw").read_text(encoding="utf-8")
    behind = len(c4) * 4 // 5
    measured = {"wiki": wiki[:MEASURED_CHARACTERS], "code": code[:MEASURED_CHARACTERS], "c4": c4[behind:][:MEASURED_CHARACTERS]}
    calibrated = {"wiki": wiki[len(wiki) // 3 :], "code": code[len(code) // 2 :], "c4": c4[:behind]}
    return _written(calibrated, folder / "calibrated"), _written(measured, folder / "measured")


def _written(found: dict[str, str], folder: Path) -> dict[str, Path]:
    """Calibration files have a document a line, as the corpora have."""
    folder.mkdir(parents=True)
    paths = {name: folder / f"{name}.jsonl" for name in found}
    for name, path in paths.items():
        documents = [part for part in re.split(r"\n\n+", found[name]) if part.strip()] if folder.name == "calibrated" else [found[name]]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return paths


def main() -> None:
    """Print a table a model."""
    options = arguments()
    finished: dict[str, dict[str, Any]] = json.loads(options.json.read_text()) if options.json.exists() else {}
    with tempfile.TemporaryDirectory() as place:
        calibrated, measured = texts(options.data, Path(place))
        for folder in options.model:
            tokenizer, original = load_tokenizer(folder), load_model(folder)
            kinds = {name: str(path) for name, path in measured.items()} | ({"builtin": "builtin"} if folder == DEMO else {})
            ids = {name: evaluation_ids(source, tokenizer)[: options.tokens] for name, source in kinds.items()}
            for row in options.rows:
                key = f"{folder.name} {row} {options.nsamples}x{options.seqlen} g{options.group_size}"
                if key not in finished:
                    finished[key] = measure(row, calibrated, folder, original, ids, options)
                    options.json.write_text(json.dumps(finished, indent=2))
                    print(key, finished[key], flush=True)
            show(
                folder.name,
                {row: finished[f"{folder.name} {row} {options.nsamples}x{options.seqlen} g{options.group_size}"] for row in options.rows},
            )


def measure(
    row: str, calibrated: dict[str, Path], folder: Path, original: Any, ids: dict[str, Tensor], options: argparse.Namespace
) -> dict[str, Any]:
    """Quantize with the calibration text ``row``, load, and compare on each of the texts ``ids``."""
    source = re.sub(r"\b(c4|code|wiki)\b", lambda found: str(calibrated[found[0]]), row)
    request: dict[str, Any] = {"algo": "rtn"} if row == "rtn" else {"algo": "gptq", "calib": source, "seqlen": options.seqlen}
    if row != "rtn" and "," not in row:
        request["nsamples"] = options.nsamples
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        report = ptqcli.quantize(folder, output=Path(place) / "out", wbits=4, group_size=options.group_size, **request)
        seconds, model = time.perf_counter() - start, load_quantized(Path(place) / "out")
        found = {name: compare(model, original, text, options.seqlen).mean_kl for name, text in ids.items()}
    used = [] if report.calibration is None else [f"{text.windows} {Path(text.source).stem}" for text in report.calibration.texts]
    return {"kl": found, "seconds": seconds, "texts": ", ".join(used)}


def show(model: str, rows: dict[str, dict[str, Any]]) -> None:
    """One line a row."""
    kinds = [*next(iter(rows.values()))["kl"]]
    table = Table("calibration", "windows", *kinds, "of rtn", "seconds", title=f"{model}: KL, nats", box=None, header_style="")
    for name, row in rows.items():
        shares = [row["kl"][kind] / rows["rtn"]["kl"][kind] for kind in kinds] if "rtn" in rows else []
        share = f"{sum(shares) / len(shares):.0%}" if shares else ""
        table.add_row(name, row["texts"], *(f"{row['kl'][kind]:.4f}" for kind in kinds), share, f"{row['seconds']:.0f}")
    Console(width=150).print(table)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
