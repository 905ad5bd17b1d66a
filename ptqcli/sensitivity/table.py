"""Measured losses, as they are handed on, shown and kept in a file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ptqcli.budget import METHODS
from ptqcli.errors import PTQError
from ptqcli.untrusted import read_json, shown

ABOUT = "sensitivities of `ptq sensitivity`"
VERSION = 1
MOST_BYTES = 64 << 20  # of a file: 16 numbers for each of 100,000 groups
PREFERRED = ("kl", "gradient", "output", "hawq")  # of several methods in one table


@dataclass(frozen=True, kw_only=True)
class GroupLosses:
    """One group. linears: their paths in the model. weights: how many there are. nbytes: that each candidate takes, as the table's format
    stores it. losses: of each candidate, by method. None stands for a candidate that the group cannot have."""

    name: str
    linears: list[str]
    weights: int
    nbytes: list[int | None]
    losses: dict[str, list[float | None]]


@dataclass(frozen=True, kw_only=True)
class SensitivityTable:
    """What was measured. model: where it lies, for people. candidates: schemes, as they are written. format: whose bytes are told.

    texts: what the windows are from. windows, tokens: how many were looked at, and of how many tokens each, by method. seconds: that each
    method took. units: of its losses.
    """

    model: str
    candidates: list[str]
    format: str
    texts: str
    windows: dict[str, int]
    tokens: dict[str, int]
    seconds: dict[str, float]
    units: dict[str, str]
    groups: list[GroupLosses]

    @property
    def methods(self) -> list[str]:
        """Those that were used, in their order."""
        return list(self.units)

    @property
    def best_method(self) -> str:
        """Of several that were used the one that is to be believed."""
        return min(self.methods, key=PREFERRED.index)

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return {"about": ABOUT, "version": VERSION, **asdict(self)}

    def write(self, path: Path) -> None:
        """Put it into a file. Raises PTQError where that cannot be written."""
        try:
            path.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise PTQError(f"{path}: cannot be written: {error.strerror}") from error


def read_table(path: Path) -> SensitivityTable:
    """What ``write`` has put into a file. Raises PTQError, naming the file, for anything else."""
    values = read_json(path, MOST_BYTES)
    if values.get("about") != ABOUT or values.get("version") != VERSION:
        raise PTQError(f"{path}: holds no sensitivities; `ptq sensitivity --output {path.name}` writes such a file")
    try:
        table = SensitivityTable(
            model=_text(values["model"]),
            candidates=[_text(name) for name in _list(values["candidates"])],
            format=_text(values["format"]),
            texts=_text(values["texts"]),
            windows={name: _count(value) for name, value in values["windows"].items()},
            tokens={name: _count(value) for name, value in values["tokens"].items()},
            seconds={name: _number(value) for name, value in values["seconds"].items()},
            units={name: _text(value) for name, value in values["units"].items()},
            groups=[_group(entry, len(values["candidates"])) for entry in _list(values["groups"])],
        )
        if not table.units or not all(name in METHODS for name in table.units):
            raise ValueError(f"methods {shown(list(table.units))}")
        if any(group.losses.keys() != table.units.keys() for group in table.groups):
            raise ValueError("a group without losses")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PTQError(f"{path}: is damaged ({error}); measure again with `ptq sensitivity --output {path.name}`") from error
    return table


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's, with equal values at their mean rank; NaN for fewer than two values, and where all are equal."""
    first, second = _ranks(one), _ranks(other)
    if len(first) < 2:
        return math.nan
    middle = (len(first) - 1) / 2
    product = sum((a - middle) * (b - middle) for a, b in zip(first, second, strict=True))
    size = math.sqrt(sum((a - middle) ** 2 for a in first) * sum((b - middle) ** 2 for b in second))
    return product / size if size else math.nan


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks, start = [0.0] * len(values), 0
    while start < len(order):
        stop = start
        while stop < len(order) and values[order[stop]] == values[order[start]]:
            stop += 1
        for place in order[start:stop]:
            ranks[place] = (start + stop - 1) / 2
        start = stop
    return ranks


def _group(entry: Mapping[str, Any], count: int) -> GroupLosses:
    losses = {str(name): [_loss(value) for value in _list(row)] for name, row in entry["losses"].items()}
    nbytes = [None if value is None else _count(value) for value in _list(entry["nbytes"])]
    if len(nbytes) != count or any(len(row) != count for row in losses.values()):
        raise ValueError(f"a group with other than {count} candidates")
    return GroupLosses(
        name=_text(entry["name"]),
        linears=[_text(name) for name in _list(entry["linears"])],
        weights=_count(entry["weights"]),
        nbytes=nbytes,
        losses=losses,
    )


def _loss(value: Any) -> float | None:
    """A loss of a file. Raises ValueError for one that is negative or no finite number."""
    found = None if value is None else _number(value)
    if found is not None and found < 0:
        raise ValueError(f"a loss of {shown(value)}")
    return found


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{shown(value)} in the place of a number")
    return float(value)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{shown(value)} in the place of a whole number")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{shown(value)} in the place of a text")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{shown(value)} in the place of a list")
    return value
