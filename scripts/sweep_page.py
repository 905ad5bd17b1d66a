"""What the sweep over all architectures found: one line a type in a file, and the page docs/architectures.md."""

from __future__ import annotations

import collections
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# Reasons that are true of the model, by what the message says; the first that matches names it.
REASONS = {
    "experts that are stored or used in another way": r"^(tensor )?[^ :]*(expert|moe)",
    "matrices in stacks, as experts or heads": r"in stacks like this one",
    "an encoder with a decoder": r"is an encoder with a decoder",
    "neither a language model nor an encoder": r"is neither a causal",
    "weights assembled from several tensors": r"assembles this parameter",
    "no one list of blocks": r"of the linear weights|no list of repeated blocks|lists of blocks of similar size",
    "blocks that do not hand one state on": r"hand each block's output|hidden states|does not run up to its blocks",
    "experts: transformers puts them together only where all is in one scheme": r"does not put experts together",
    "experts: the file holds them in one tensor, of which transformers would have to find the parts": r"does not find single experts",
    "its own code looks at the weights while it loads": r"does not take packed weights",
}


@dataclass
class Outcome:
    """What became of one type under one request. result: right, dequantize only, refused, wrong, crash, not tried."""

    result: str
    reason: str = ""


@dataclass
class Row:
    """One model type. file: the class that its file names. built: the one that the auto class for causal models builds."""

    kind: str
    file: str
    built: str
    outcomes: dict[str, Outcome]


def read(results: Path) -> dict[str, Row]:
    """What is known already."""
    rows = {}
    if results.is_file():
        for line in results.read_text().splitlines():
            entry = json.loads(line)
            outcomes = {name: Outcome(**outcome) for name, outcome in entry.pop("outcomes").items()}
            rows[entry["kind"]] = Row(**entry, outcomes=outcomes)
    return rows


def summary(row: Row) -> tuple[str, str]:
    """One result for a type, and its reason: the worst of its outcomes, behind the first where that says what still works."""
    order = ["crash", "wrong", "refused by transformers", "refused", "not tried", "dequantize only", "right"]
    worst = min(row.outcomes.values(), key=lambda outcome: order.index(outcome.result))
    first = next(iter(row.outcomes.values()))
    if worst.result in ("crash", "wrong", "not tried"):
        return worst.result, worst.reason
    if worst.result.startswith("refused") and first.result in ("right", "dequantize only"):
        requests = ", ".join(request for request, outcome in row.outcomes.items() if outcome.result == worst.result)
        result = f"{first.result}; {requests} {worst.result}"
        return result, "; ".join(filter(None, dict.fromkeys((named(first.reason), named(worst.reason)))))
    return worst.result, named(next((outcome.reason for outcome in (worst, *row.outcomes.values()) if outcome.reason), ""))


def named(reason: str) -> str:
    """A reason in few words, where it is one of REASONS."""
    return next((name for name, pattern in REASONS.items() if re.search(pattern, reason)), reason)


def table(rows: Mapping[str, Row], versions: Mapping[str, str]) -> str:
    """The page: counts, then a line for each type. versions: of the libraries."""
    kinds = {kind: summary(row) for kind, row in sorted(rows.items())}
    counts = collections.Counter(result if result != "refused" else f"refused: {reason}" for result, reason in kinds.values())
    lines = [
        "# Architectures",
        "",
        "Model types that transformers builds as language models, with images or sound too, as encoders, or as encoders with",
        "decoders, as `scripts/sweep_architectures.py` found them: a tiny random model of each, in the class that its files name,",
        "quantized by `rtn`, by `gptq`, by `awq+gptq` and in two schemes at once, then loaded by transformers (in the file's class",
        "and in the one that the auto class builds) and by ptqcli, and compared with the dequantized model.",
        "",
        "*Right*: both give the logits of the dequantized model. *Refused by transformers*: ptqcli gives them, transformers does not",
        "load the file, and the plan says so before the work. *Dequantize only*: transformers loads it, but only to expand it.",
        "*Refused*: by ptqcli, in one line. *Not tried*: no tiny model of it could be made. *Wrong* and *crash* would be defects.",
        "A line says which of the four requests was not run; a type without a line was not run.",
        "",
        ", ".join(f"{name} {version.split('+')[0]}" for name, version in versions.items()) + ".",
        "",
        "| result | types |",
        "|---|---|",
        *(f"| {name} | {count} |" for name, count in counts.most_common()),
        f"| all | {len(rows)} |",
        "",
        "| type | class of its files | result | why |",
        "|---|---|---|---|",
    ]
    requests = dict.fromkeys(request for row in rows.values() for request in row.outcomes)
    for kind, (result, reason) in kinds.items():
        missing = ", ".join(request for request in requests if request not in rows[kind].outcomes)
        why = "; ".join(filter(None, (reason, missing and f"not run: {missing}")))
        lines.append(f"| {kind} | {rows[kind].file} | {result} | {why.replace('|', ' ')} |")
    return "\n".join(lines) + "\n"
