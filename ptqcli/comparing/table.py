"""A comparison as CSV: a line for each checkpoint and text, the baseline first."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from typing import Any

NUMBERS = (
    "tokens", "windows", "seqlen", "stride", "bos", "perplexity", "perplexity_error", "mean_nll", "mean_nll_error", "loss_rise",
    "loss_rise_error", "perplexity_ratio", "perplexity_ratio_error", "mean_kl", "mean_kl_error", "kl_median", "kl_median_error", "kl_99",
    "kl_99_error", "kl_max", "top1_agreement", "top1_agreement_error", "top5_agreement", "top5_agreement_error",
)  # fmt: skip
OF_BASELINE = {"perplexity": "baseline_perplexity", "perplexity_error": "baseline_perplexity_error"}
SHARED = NUMBERS[:5]
COLUMNS = (
    "name", "folder", "text", "bytes", "bits_per_weight", *NUMBERS, "calibration_overlap", "prefill_tokens_per_second",
    "decode_tokens_per_second", "sha256", "sha256_of",
)  # fmt: skip
# A program that opens the file as a table would run what begins so as a formula.
FORMULAS = ("=", "+", "-", "@", "\t", "\r")


def as_csv(found: Mapping[str, Any]) -> str:
    """found: as ``Compared.to_json`` has it. Numbers with all their digits; what is not known is empty."""
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in _rows(found):
        writer.writerow({key: _cell(value) for key, value in row.items()})
    return file.getvalue()


def _rows(found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    checkpoints, baseline = found["checkpoints"], found["baseline"]
    for index, text in enumerate(found["conditions"]["texts"]):
        first = checkpoints[0]["results"][index]
        if baseline is not None:
            numbers = {name: first.get(key) for name, key in OF_BASELINE.items()}
            yield {**baseline, "text": text["text"], **{name: first[name] for name in SHARED}, **numbers}
        for each in checkpoints:
            overlap = each["calibration_overlap"][text["text"]]
            speed = each["speed"] or {}
            yield {**each, **speed, **each["results"][index], "calibration_overlap": None if overlap is None else overlap["share"]}


def _cell(value: Any) -> Any:
    """Text that a table program would take for a formula gets a quote in front."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULAS) else value
