"""A request that says how large the result may be instead of what the numbers are: what it may say, and how that is written.

target_bits  3.5                        average bits of a quantized weight, everything stored for it counted
target_size  4GiB                       bytes of all tensors of the checkpoint
candidates   w2g64,w3g128,w4g128,w8     what a linear can become; schemes, or short: bits, and columns of a group
sensitivity  gradient                   how what each of them costs is measured, or a file that `ptq sensitivity` has written
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ptqcli.errors import UsageError
from ptqcli.numerics.scheme import AUTO_GROUP, Scheme
from ptqcli.suggest import did_you_mean

METHODS = ("gradient", "kl", "hawq", "output")
TARGETS = ("target_bits", "target_size")

# Measured on the demo model (KL, rounded to nearest): 5 and 6 bits beside 2, 3, 4 and 8 lower it from .0375 to .0292 at 4.0 bits and from
# .0145 to .0072 at 5.0; groups of 32 beside those of 64 and 128 change little.
DEFAULT_CANDIDATES = "w2g64,w3g128,w4g128,w5g128,w6g128,w8"
BLOCK_CANDIDATES = "q2_k,q3_k,q4_k,q5_k,q6_k,q4_0,q5_0,q8_0"  # of a file of blocks; a width that no super-block divides has the last three
MOST_CANDIDATES = 16
MOST_BITS = 16.0

TABLE_SUFFIX = ".json"  # of a file with sensitivities

_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,15})?) ?([KMGT]?)(i?)B?", re.IGNORECASE)
_SHORT = re.compile(r"w(?P<bits>[0-9]{1,3})(?:-?(?:g(?P<columns>[0-9]{1,18})|(?P<row>row)))?(?P<zero>-a?sym)?", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a request says. bits: of ``target_bits``, or None. nbytes: of ``target_size``, or None; one of the two is given.

    candidates: None for those that go with the format. method: one of METHODS, None for the one that goes with the model. table: the file
    that takes the place of measuring.
    """

    bits: float | None
    nbytes: int | None
    candidates: tuple[Scheme, ...] | None = None
    method: str | None = None
    table: Path | None = None

    def __str__(self) -> str:
        """As it stands in names and messages: ``3.5 bits``, ``4,294,967,296 bytes``."""
        return f"{self.bits:g} bits" if self.bits is not None else f"{self.nbytes:,} bytes"


def read_budget(bits: float | None, size: str | int | None, candidates: str | None, sensitivity: str | None) -> Budget | None:
    """What the keys of a recipe ask for, None where they ask for no budget. Raises UsageError for what cannot be."""
    if bits is None and size is None:
        given = next((name for name, value in (("candidates", candidates), ("sensitivity", sensitivity)) if value is not None), None)
        if given is not None:
            raise UsageError(f"{given} belongs to a budget; give target_bits or target_size, too, or leave it out")
        return None
    if bits is not None and size is not None:
        raise UsageError("target_bits and target_size both say how large the result may be; give one of them")
    if bits is not None and not 0 < bits <= MOST_BITS:
        raise UsageError(f"target bits {bits} is not valid; give average bits per weight such as 3.5, at most {MOST_BITS:g}")
    method, table = read_sensitivity(sensitivity)
    return Budget(
        bits=bits,
        nbytes=None if size is None else _target_size(size),
        candidates=None if candidates is None else parse_candidates(candidates),
        method=method,
        table=table,
    )


def read_sensitivity(text: str | None) -> tuple[str | None, Path | None]:
    """A method or a file. Raises UsageError for what is neither."""
    if text is None or text in METHODS:
        return text, None
    if text.endswith(TABLE_SUFFIX):
        return None, Path(text).expanduser()
    *most, last = METHODS
    advice = f"use {', '.join(most)} or {last}, or a file of `ptq sensitivity` that ends in {TABLE_SUFFIX}"
    raise UsageError(f"sensitivity '{text}' is unknown; {advice}{did_you_mean(text, METHODS)}")


def _target_size(size: str | int) -> int:
    try:
        return parse_size(size)
    except UsageError as error:
        raise UsageError(f"target size {error}") from error


def parse_size(size: str | int) -> int:
    """Bytes that a text such as ``4GiB``, ``300MB``, ``8G`` or ``1000000`` stands for. Raises UsageError for anything else, and for 0."""
    found = _SIZE.fullmatch(str(size).strip())
    if found is None or isinstance(size, bool):
        raise UsageError(f"{size!r} is not a size; give one such as 8GiB, 300MB or 1000000")
    number, unit, binary = found.groups()
    count = int(float(number) * (1024 if binary else 1000) ** (" KMGT".index(unit.upper()) if unit else 0))
    if not count:
        raise UsageError(f"{size!r} is no size that anything has; give one such as 8GiB")
    return count


def parse_candidates(text: str) -> tuple[Scheme, ...]:
    """The schemes that ``text`` names, separated by commas. Raises UsageError for what is no list of different schemes of weights."""
    names = [name.strip() for name in text.split(",")]
    if not 1 < len(names) <= MOST_CANDIDATES:
        raise UsageError(f"candidates '{text}': give 2 to {MOST_CANDIDATES} schemes, separated by commas, such as {DEFAULT_CANDIDATES}")
    found = [_candidate(name) for name in names]
    for scheme, name in zip(found, names, strict=True):
        if scheme.activations is not None:
            raise UsageError(f"candidate {name}: rounds activations, and a budget is for weights alone; write it without a8")
        if found.count(scheme) > 1:
            raise UsageError(f"candidate {name}: is given twice; give it once")
    return tuple(found)


def _candidate(name: str) -> Scheme:
    short = _SHORT.fullmatch(name)
    if short is not None:
        group = "-row" if short["row"] else f"-g{short['columns']}" if short["columns"] else ""
        name = f"w{short['bits']}a16{group}{short['zero'] or ''}"
    try:
        return Scheme.parse(name)
    except UsageError as error:
        raise UsageError(f"candidates: {error}, or short as in {DEFAULT_CANDIDATES}") from error


def widest(candidates: Sequence[Scheme]) -> Scheme:
    """The candidate of most bits, of several the first: what stands for linears of which nothing is decided yet."""
    return max(candidates, key=lambda scheme: scheme.bits)


def fitted(scheme: Scheme, columns: int) -> Scheme:
    """``scheme`` for a linear, or a part of it, of so many input features: a group size that does not divide them becomes the first that
    does, and is not larger. Raises UsageError if none does."""
    if scheme.group_size < 1 or columns % scheme.group_size == 0 or scheme.blocks is not None:
        return scheme.resolved(columns)
    smaller = [size for size in scheme.auto_groups if size < scheme.group_size and columns % size == 0]
    return replace(scheme, group_size=smaller[0]) if smaller else replace(scheme, group_size=AUTO_GROUP).resolved(columns)
