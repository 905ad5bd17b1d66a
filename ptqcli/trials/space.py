"""Which recipes are tried.

A space is a table of choices: keys of a recipe, each with the values that it may have. Its recipes are all combinations. Of those that give
checkpoints of one size the first ones are tried first, so the value that costs least stands first. In a YAML file,

    quality: [fast, balanced]
    wbits: [3, 4, 8]
    group_size: [64, 128]
    gptq: {damp: [0.01, 0.05]}
    calib: c4                     # one value: in every recipe

a list is a list of values, also for a key whose value is a list by itself (``ignore: [[], [down_proj]]``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any

from ptqcli.errors import UsageError
from ptqcli.recipe import Recipe
from ptqcli.recipe_file import read_recipe_file

MOST_POINTS = 1000
SCHEME_KEYS = ("scheme", "wbits", "group_size", "symmetric", "abits", "act_scales", "outliers", "gguf_type", "target_bits", "target_size")
ALGORITHM_KEYS = ("algo", "quality", "options")

# What is tried where nobody says what: the compositions of ``quality`` without training, in the widths that packed formats hold.
USUAL: Mapping[str, tuple[Any, ...]] = {"quality": ("fast", "balanced"), "wbits": (2, 3, 4, 8)}
USUAL_MIXES: Mapping[str, tuple[Any, ...]] = {"gguf_type": ("q2_k", "q3_k_m", "q4_k_m", "q5_k_m", "q6_k", "q8_0")}


@dataclass(frozen=True)
class Point:
    """One recipe of a space. changes: keys of a recipe and their values, over those that all have."""

    changes: Mapping[str, Any]

    @property
    def words(self) -> str:
        """What tells it from the others, for people."""
        return " ".join(_text(key, value) for key, value in self.changes.items()) or "as asked"


@dataclass(frozen=True)
class Candidate:
    """A recipe that can be tried. words: for people. bytes: that its checkpoint will have, as planned."""

    recipe: Recipe
    words: str
    bytes: int

    @property
    def key(self) -> str:
        """By which it is known: all that it says."""
        return sha256(json.dumps(self.recipe.stored(), sort_keys=True, default=str).encode()).hexdigest()


def _text(key: str, value: Any) -> str:
    if key in ("scheme", "algo", "quality", "gguf_type"):
        return str(value)
    if key == "wbits":
        return f"w{value}"
    if key == "target_bits":
        return f"{value} bits"
    if isinstance(value, Mapping):
        return " ".join(_text(f"{key}.{name}", each) for name, each in value.items())
    return f"{key}={value if isinstance(value, (str, int, float)) else json.dumps(value, default=str)}"


def read_space(file: Path | None, given: Mapping[str, object]) -> list[Point]:
    """The points of the space in ``file``, or of the usual one, whose keys that are ``given`` already are left out.

    Raises UsageError for a file that is none, for choices without a value, and for more than MOST_POINTS points.
    """
    table = _usual(given) if file is None else _table(read_recipe_file(file), str(file))
    if file is not None:
        twice = sorted(set(table) & set(given))
        if twice:
            raise UsageError(f"{file}: {twice[0]} is also given as a flag; leave one of the two out")
    count = 1
    for values in table.values():
        count *= len(values)
    if count > MOST_POINTS:
        raise UsageError(f"{file or 'the space'}: has {count:,} recipes, and at most {MOST_POINTS:,} are looked at; leave some values out")
    return [Point(_nested(dict(zip(table, values, strict=True)))) for values in product(*table.values())]


def _usual(given: Mapping[str, object]) -> dict[str, tuple[Any, ...]]:
    table = dict(USUAL)
    if given.get("format") == "gguf" and not set(given) & set(SCHEME_KEYS):
        table = {"quality": USUAL["quality"], **USUAL_MIXES}
    if set(given) & set(ALGORITHM_KEYS):
        del table["quality"]
    if set(given) & ({*SCHEME_KEYS} - {"group_size", "symmetric"}):
        table.pop("wbits", None)
    if not table:
        return {"quality": ("fast",)} if not set(given) & set(ALGORITHM_KEYS) else {}
    return table


def _table(values: Mapping[str, Any], where: str) -> dict[str, tuple[Any, ...]]:
    """The values of each key; one of a section is called ``section.key``."""
    table: dict[str, tuple[Any, ...]] = {}
    for name, value in _leaves(values, where):
        choices = tuple(value) if isinstance(value, list) else (value,)
        if not choices:
            raise UsageError(f"{where}: '{name}' has no value; give at least one")
        kinds = [json.dumps(each, sort_keys=True, default=str) for each in choices]
        if len(set(kinds)) < len(kinds):
            raise UsageError(f"{where}: '{name}' has a value twice; give each once")
        table[name] = choices
    return table


def _leaves(values: Mapping[str, Any], where: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if not isinstance(value, Mapping):
            yield key, value
            continue
        for name, inner in value.items():
            if not isinstance(name, str) or isinstance(inner, Mapping):
                raise UsageError(f"{where}: '{key}' must be a section of options with their values, such as {key}: {{option: [1, 2]}}")
            yield f"{key}.{name}", inner


def _nested(changes: Mapping[str, Any]) -> dict[str, Any]:
    """``changes`` with sections again."""
    found: dict[str, Any] = {}
    for name, value in changes.items():
        section, dot, key = name.partition(".")
        if dot:
            found.setdefault(section, {})[key] = value
        else:
            found[name] = value
    return found
