"""Bits under a budget beside one scheme for all: prints a table of checkpoints of one model, by their bits a weight.

    python scripts/bits_table.py smollm2 --calib c4.txt --texts wiki.test.raw code.txt --tokens 6144 --dtype float32

Each budget is quantized with the bits that each sensitivity shares out, and each uniform scheme that is not larger than the largest
budget. All by one algorithm from one calibration text, and measured on the same windows of texts that are no part of it. What is
measured is kept in a file of JSON lines, so the command goes on where it was ended. --plot draws size against divergence.

KL: of the next word's probabilities from the original's, mean in nats, with its standard error. CPU: of quantizing, sensitivities
included.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from accuracy_measure import divergence
from accuracy_rows import SUBJECTS
from accuracy_table import Bench, subject_of
from lab_models import FOLDER
from rich.console import Console
from rich.table import Table

from ptqcli.runtime import load_quantized

METHODS = ("gradient", "kl", "hawq", "output")
UNIFORM = ("w2a16-g128", "w2a16-g64", "w2a16-g32", "w2a16-g16", "w3a16-g128", "w3a16-g64", "w3a16-g32", "w3a16-g16")
SLACK = 1e-6  # of bits a weight, which are a quotient


def rows_of(options: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    """(name, flags) of every checkpoint."""
    for scheme in options.uniform:
        yield scheme, ["--scheme", scheme]
    mixed = [] if options.candidates is None else ["--candidates", options.candidates]
    for bits in options.bits:
        for method in options.methods:
            yield f"{bits:g} bits, {method}", ["--target-bits", f"{bits:g}", "--sensitivity", method, *mixed]


def measure(bench: Bench, flags: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """Quantize and measure one. Raises RuntimeError with what the command said where it fails."""
    subject = bench.subject
    with tempfile.TemporaryDirectory() as place:
        output = Path(place) / "output"
        words = ["--algo", options.algo, "--calib", subject.calib, "--nsamples", str(subject.nsamples), "--seqlen", str(subject.seqlen)]
        command = [sys.executable, "-m", "ptqcli", "quantize", str(subject.folder), *words, *flags, "--output", str(output), "--quiet"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([*command, "--dtype", options.dtype], capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        report = json.loads((output / "ptq_report.json").read_text())
        model = load_quantized(output)
        texts = {name: divergence(model, text) for name, text in bench.texts().items()}
    shared = report.get("allocation") or {}
    return {
        "bits": report["bits_per_weight"],
        "bytes": report["bytes_after"],
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "sensitivity_seconds": shared.get("seconds"),
        "kept_uniform": shared.get("kept"),
        "texts": texts,
    }


def table(name: str, records: dict[str, dict[str, Any]], budgets: Sequence[float]) -> Table:
    """The checkpoints by size, and for each budget whether the mixed ones are closer than every uniform one of at most that size."""
    texts = list(next(iter(records.values()))["texts"])
    shown = Table(title=f"{name}: bits under a budget", box=None)
    for column in ("checkpoint", "bits/weight", *(f"KL {text}" for text in texts), "less than the best in one scheme", "CPU s"):
        shown.add_column(column)
    for key, record in sorted(records.items(), key=lambda pair: (pair[1]["bits"], pair[0])):
        kls = [f"{record['texts'][text]['kl']:.4f} ± {record['texts'][text]['kl_error'] or 0:.4f}" for text in texts]
        shown.add_row(key, f"{record['bits']:.3f}", *kls, _beside(key, record, records, budgets, texts), f"{record['cpu_seconds']:.0f}")
    return shown


def _beside(key: str, record: dict[str, Any], records: dict[str, dict[str, Any]], budgets: Sequence[float], texts: Sequence[str]) -> str:
    """What a mixed checkpoint loses, as a share of what the best uniform one of at most its budget loses, on each text."""
    budget = next((bits for bits in budgets if key.startswith(f"{bits:g} bits, ")), None)
    if budget is None:
        return ""
    fitting = [each for name, each in records.items() if " bits, " not in name and each["bits"] <= budget + SLACK]
    shares = [record["texts"][text]["kl"] / min(each["texts"][text]["kl"] for each in fitting) for text in texts if fitting]
    return ", ".join(f"{share:.2f}" for share in shares)


def draw(name: str, records: dict[str, dict[str, Any]], methods: Sequence[str], file: Path) -> None:
    """Bits a weight against KL on the first text."""
    import matplotlib

    matplotlib.use("svg" if file.suffix == ".svg" else "agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    matplotlib.rcParams["svg.hashsalt"] = "bits"  # the same bytes for the same numbers
    text = next(iter(next(iter(records.values()))["texts"]))
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for key, record in records.items():
        if " bits, " not in key:
            place = record["bits"], record["texts"][text]["kl"]
            axes.plot(*place, marker="o", color="gray")
            axes.annotate(key, place, xytext=(6, 4), textcoords="offset points", color="gray")
    for method in methods:
        points = sorted((each["bits"], each["texts"][text]["kl"]) for key, each in records.items() if key.endswith(f", {method}"))
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=f"bits shared out by {method}")
    axes.set(xlabel="bits a weight, scales included", ylabel=f"mean KL on {text}, nats", title=f"{name}; gray: one scheme for all")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    axes.margins(x=0.2, y=0.12)
    axes.legend()
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo", metavar="MODEL", help=f"{', '.join(SUBJECTS)} or a folder")
    parser.add_argument("--bits", nargs="+", type=float, default=[3.0, 3.5, 4.0], metavar="X", help="budgets, default: 3 3.5 4")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--uniform", nargs="+", default=UNIFORM, metavar="SCHEME", help=f"default: {' '.join(UNIFORM)}")
    parser.add_argument("--candidates", metavar="SCHEME,...", help="default: those of ptq quantize")
    parser.add_argument("--algo", default="gptq", help="default: %(default)s")
    parser.add_argument("--dtype", default="auto", help="of the calibration passes, default: %(default)s")
    for name, kind in (("calib", str), ("nsamples", int), ("seqlen", int), ("tokens", int)):
        parser.add_argument(f"--{name}", type=kind)
    parser.add_argument("--texts", nargs="+", metavar="SOURCE", help="held-out texts")
    parser.add_argument("--results", type=Path, default=FOLDER / "bits.jsonl", metavar="FILE", help="default: %(default)s")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    return parser.parse_args()


def main() -> None:
    """Measure what is not there yet, and print all."""
    options = arguments()
    options.schemes = None
    bench, console = Bench(options.model, subject_of(options.model, options), FOLDER), Console()
    about = json.dumps([options.model, bench.settings, options.algo, options.candidates, options.dtype])
    found = [json.loads(line) for line in options.results.read_text().splitlines()] if options.results.exists() else []
    records = {each["row"]: each for each in found if each["about"] == about}
    wanted = list(rows_of(options))
    for number, (name, flags) in enumerate(wanted, start=1):
        if name not in records:
            console.print(f"{number} of {len(wanted)}: {name}")
            try:
                record = {"about": about, "row": name, **measure(bench, flags, options)}
            except RuntimeError as error:
                console.print(f"{name}: {error}")
                continue
            records[name] = record
            options.results.parent.mkdir(parents=True, exist_ok=True)
            with options.results.open("a") as file:
                file.write(json.dumps(record) + os.linesep)
    shown = {name: records[name] for name, _ in wanted if name in records}
    if not shown:
        raise SystemExit("nothing could be measured")
    console.print(table(options.model, shown, options.bits))
    if options.plot is not None:
        draw(options.model, shown, options.methods, options.plot)


if __name__ == "__main__":
    main()
