"""Numbers of a comparison as people read them, in a terminal and on a page. All of it takes what ``Compared.to_json`` gives."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

SMALLEST_POWER = -3  # of ten; what is smaller is written with its power
MOST_PLACES = 8


def conditions_text(found: Mapping[str, Any]) -> str:
    """One sentence for people."""
    conditions = found["conditions"]
    begun = "BOS in front of each" if conditions["bos"] else "no BOS"
    dtypes = ", ".join(dict.fromkeys(each["dtype"] for each in [found["baseline"], *found["checkpoints"]] if each))
    kernels = ", ".join(dict.fromkeys(f"{name} x {count}" for each in found["checkpoints"] for name, count in each["kernels"].items()))
    versions = ", ".join(f"{name} {version}" for name, version in conditions["versions"].items())
    windows = f"windows of {conditions['seqlen']} tokens, {conditions['stride']} from one to the next, {begun}; "
    kernel = f"kernel {conditions['kernel']}{f' ({kernels})' if kernels else ''}"
    return f"{windows if conditions['seqlen'] else ''}{dtypes} on {conditions['device']}, {kernel}; {versions}"


def overlap_lines(found: Mapping[str, Any], least: float = 0.01) -> Iterator[str]:
    """What is known of texts that checkpoints were calibrated on, and of which checkpoints nothing is known."""
    for checkpoint in found["checkpoints"]:
        shares = checkpoint["calibration_overlap"]
        if shares and all(each is None for each in shares.values()):
            yield f"{checkpoint['name']}: nothing tells which text it was calibrated on"
        for text, overlap in shares.items():
            if overlap is not None and overlap["share"] >= least:
                words = f"{overlap['share']:.0%} of {text} stood in the calibration text of {checkpoint['name']}"
                yield f"{words}: its numbers there flatter it"


def rise_text(result: Mapping[str, Any]) -> str:
    """By how much the perplexity rose: ``+1.23% ±0.04%``."""
    error = result.get("perplexity_ratio_error")
    return f"{result['perplexity_ratio'] - 1:+.2%}" + ("" if error is None else f" ±{error:.2%}")


def share_with_error(value: float, error: float | None) -> str:
    """``97.31% ±0.12%``."""
    return f"{value:.2%}" + ("" if error is None else f" ±{error:.2%}")


def with_error(value: float, error: float | None, sign: bool = False) -> str:
    """A number to as many places as its error has two digits: ``12.346 ±0.012``, ``(2.93 ±0.04)e-4``; without one to four digits."""
    plus = "+" if sign else ""
    if error is None or not error > 0:
        return f"{value:{plus}.4g}"
    power = math.floor(math.log10(max(abs(value), error)))
    if power < SMALLEST_POWER:
        return f"({with_error(value / 10.0**power, error / 10.0**power, sign)})e{power}"
    places = min(MOST_PLACES, max(0, 1 - math.floor(math.log10(error))))
    return f"{value:{plus}.{places}f} ±{error:.{places}f}"


def size_text(count: float) -> str:
    """A number of bytes: ``11.3 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
