"""Questions with right answers, made of a text: which line comes next? The same in every run of one Python."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

from ptqcli.calibration.text import documents

CHOICES = 4


def next_lines(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows with a line of the built-in evaluation text as context, and as choices the next line and others from elsewhere."""
    source = random.Random(seed)
    pairs = []
    for text in documents("builtin", "evaluation"):
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        pairs += [pair for pair in pairwise(lines) if all(20 <= len(line) <= 100 and line.isascii() for line in pair)]
    rows = []
    for context, following in source.sample(pairs, count):
        others = source.sample(sorted({second for _, second in pairs} - {following}), CHOICES - 1)
        choices = source.sample([following, *others], CHOICES)
        rows.append({"context": context, "choices": choices, "answer": choices.index(following)})
    return rows


def write_rows(rows: list[dict[str, Any]], path: Path) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path
