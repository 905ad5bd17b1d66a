"""Every algorithm and the useful combinations on one model, in two tables: perplexity, divergence, size, time, memory.

    python scripts/compare_algorithms.py [--model FOLDER] [--schemes 4:128 3:128 2:64] [--rows gptq awq ...] [--tokens 65536]
        [--calib SOURCE] [--text SOURCE] [--json FILE]

Each row quantizes the model with the same calibration windows, writes a checkpoint, loads it through the runtime and measures it on
held-out text beside the original: what `ptq eval --ppl` takes, the held-out part of the built-in text unless --text names another.
"rise" is what perplexity has risen over the original, "of rtn" that rise as a share of what the first row, rounding to nearest, costs
in the same scheme. The first table is of weights alone, bits by bits and group by group, the second of weights and activations in 8 bits.
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
from ptqcli.checkpoint.auxiliary import load_tokenizer
from ptqcli.evaluation.divergence import compare
from ptqcli.pipeline.pipeline import quantize
from ptqcli.recipe import load_recipe
from ptqcli.runtime import load_quantized

DEMO = Path(ptqcli.__file__).parent / "demo"
# The first of each table is what "of rtn" refers to.
WEIGHTS: dict[str, dict[str, Any]] = {
    "rtn": {"algo": "rtn"},
    "rtn, min-max scales": {"algo": "rtn", "scale_search": "minmax"},
    "awq, scales only": {"algo": "awq", "awq_clip": False},
    "awq": {"algo": "awq"},
    "obq": {"algo": "obq"},
    "gptq, plain order": {"algo": "gptq", "act_order": False},
    "gptq": {"algo": "gptq"},
    "awq+obq": {"algo": "awq+obq"},
    "awq+gptq": {"algo": "awq+gptq"},
}
ACTIVATIONS: dict[str, dict[str, Any]] = {
    "rtn": {"algo": "rtn", "wbits": 8, "abits": 8},
    "rtn, per tensor": {"algo": "rtn", "wbits": 8, "abits": 8, "act_scales": "tensor"},
    "rtn, static": {"algo": "rtn", "wbits": 8, "abits": 8, "act_scales": "static"},
    "smoothquant": {"algo": "smoothquant"},
    "smoothquant, alpha auto": {"algo": "smoothquant", "smooth_alpha": "auto"},
    "smoothquant O1": {"algo": "smoothquant", "smooth_level": "O1"},
    "smoothquant O2": {"algo": "smoothquant", "smooth_level": "O2"},
    "smoothquant O3": {"algo": "smoothquant", "smooth_level": "O3"},
    "smoothquant+gptq": {"algo": "smoothquant+gptq"},
    "llm-int8": {"algo": "llm-int8"},
    "llm-int8, static": {"algo": "llm-int8", "outliers": "static"},
    "llm-int8+gptq, static": {"algo": "llm-int8+gptq", "outliers": "static"},
}
COLUMNS = ("scheme", "algorithm", "bits/weight", "perplexity", "rise", "of rtn", "KL, nats", "top-1", "seconds", "peak MiB")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--schemes", nargs="*", default=["4:128", "3:128", "2:64"], metavar="BITS:GROUP", help="of the first table")
    parser.add_argument("--only", choices=["weights", "activations"], help="one of the two tables")
    parser.add_argument("--rows", nargs="*", default=[*WEIGHTS, *ACTIVATIONS], metavar="ROW", help="those of the tables that are wanted")
    parser.add_argument("--calib", default="builtin", help="calibration text, as for ptq quantize")
    parser.add_argument("--text", default="builtin", help="held-out text, as for ptq eval --ppl")
    parser.add_argument("--tokens", type=int, default=65536, help="held-out tokens")
    parser.add_argument("--nsamples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    """Print the tables."""
    options = arguments()
    ids = evaluation_ids(options.text, load_tokenizer(options.model))[: options.tokens]
    original = AutoModelForCausalLM.from_pretrained(options.model).eval()
    tables = []
    if options.only != "activations":
        for scheme in options.schemes:
            bits, group = map(int, scheme.split(":"))
            tables.append({name: {**changes, "wbits": bits, "group_size": group} for name, changes in WEIGHTS.items()})
    if options.only != "weights":
        tables.append(ACTIVATIONS)
    rows = []
    for variants in tables:
        wanted = {name: changes for name, changes in variants.items() if name in options.rows}
        measured = [{"algorithm": name, **measure(changes, options, original, ids)} for name, changes in wanted.items()]
        for row in measured:
            row["of_rtn"] = row["rise"] / measured[0]["rise"]
        show(measured)
        rows += measured
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


def measure(changes: dict[str, Any], options: argparse.Namespace, original: Any, ids: Any) -> dict[str, Any]:
    """Quantize, load, evaluate."""
    recipe = load_recipe(flags={"calib": options.calib, "nsamples": options.nsamples, "seqlen": options.seqlen, **changes})
    peak = Path("/proc/self/clear_refs")
    if peak.exists():
        peak.write_text("5")  # Linux: the peak of this row, not of all rows so far
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "checkpoint"
        report = quantize(options.model, recipe, output)
        result = compare(load_quantized(output), original, ids, options.seqlen)
    return {
        "scheme": str(recipe.default_scheme),
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
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
