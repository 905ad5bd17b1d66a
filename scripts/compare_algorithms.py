"""Every algorithm at several widths on one model, in one table: perplexity, divergence, size, time.

    python scripts/compare_algorithms.py [--model FOLDER] [--schemes 4:128 3:128 2:64] [--tokens 65536] [--json FILE]

Each row quantizes the model with the same calibration windows, writes a checkpoint, loads it through the runtime and measures it on
the held-out part of the built-in text beside the original. "rise" is what perplexity has risen over the original, "of rtn" that
rise as a share of what rounding to nearest costs in the same scheme with the same scale search.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

import ptqcli
from ptqcli.calibration.text import evaluation_ids
from ptqcli.evaluate.divergence import compare
from ptqcli.pipeline import load_tokenizer, quantize
from ptqcli.recipe import Recipe
from ptqcli.runtime import load_quantized

DEMO = Path(ptqcli.__file__).parent / "demo"
VARIANTS: dict[str, dict[str, Any]] = {
    "rtn": {"algo": "rtn"},
    "gptq, plain order": {"algo": "gptq", "act_order": False},
    "gptq": {"algo": "gptq"},
}
COLUMNS = ("scheme", "scales", "algorithm", "bits/weight", "perplexity", "rise", "of rtn", "KL, nats", "top-1", "seconds", "peak MiB")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--schemes", nargs="+", default=["4:128", "3:128", "2:64"], metavar="BITS:GROUP")
    parser.add_argument("--searches", nargs="+", default=["minmax", "mse"])
    parser.add_argument("--tokens", type=int, default=65536, help="held-out tokens")
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    """Print the table."""
    options = arguments()
    ids = evaluation_ids("builtin", load_tokenizer(options.model))[: options.tokens]
    original = AutoModelForCausalLM.from_pretrained(options.model).eval()
    rows: list[dict[str, Any]] = []
    for scheme in options.schemes:
        bits, group = map(int, scheme.split(":"))
        for search in options.searches:
            for name, changes in VARIANTS.items():
                text = {"nsamples": options.nsamples, "seqlen": options.seqlen}
                recipe = Recipe(wbits=bits, group_size=group, scale_search=search, **text, **changes)
                rows.append({"algorithm": name, "search": search, **measure(recipe, options, original, ids)})
    for row in rows:
        rounding = next(r for r in rows if (r["scheme"], r["search"], r["algorithm"]) == (row["scheme"], row["search"], "rtn"))
        row["of_rtn"] = row["rise"] / rounding["rise"]
    show(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


def measure(recipe: Recipe, options: argparse.Namespace, original: Any, ids: Any) -> dict[str, Any]:
    """Quantize, load, evaluate."""
    peak = Path("/proc/self/clear_refs")
    if peak.exists():
        peak.write_text("5")  # Linux: the peak of this row, not of all rows so far
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "checkpoint"
        report = quantize(options.model, recipe, output)
        result = compare(load_quantized(output), original, ids, options.seqlen)
    return {
        "scheme": recipe.scheme.describe(),
        "bits_per_weight": report.bits_per_weight,
        "original": result.baseline.perplexity,
        "perplexity": result.model.perplexity,
        "rise": result.model.perplexity - result.baseline.perplexity,
        "kl": result.mean_kl,
        "top1": result.top1_agreement,
        "seconds": report.seconds,
        "peak_bytes": report.peak_memory_bytes,
    }


def show(rows: list[dict[str, Any]]) -> None:
    """One line a row."""
    table = Table(*COLUMNS, title=f"Original perplexity {rows[0]['original']:.3f}", box=None, header_style="")
    for row in rows:
        table.add_row(
            row["scheme"],
            row["search"],
            row["algorithm"],
            f"{row['bits_per_weight']:.3f}",
            f"{row['perplexity']:.3f}",
            f"{row['rise']:.3f}",
            f"{row['of_rtn']:.0%}",
            f"{row['kl']:.4f}",
            f"{row['top1']:.1%}",
            f"{row['seconds']:.1f}",
            f"{row['peak_bytes'] / 2**20:.0f}",
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
