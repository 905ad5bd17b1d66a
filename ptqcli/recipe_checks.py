"""Whether what a request holds is of the types that its fields and options declare."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import get_type_hints

from ptqcli.algorithms import Algorithm, parts
from ptqcli.errors import UsageError
from ptqcli.options import fits, kind_text
from ptqcli.suggest import did_you_mean
from ptqcli.untrusted import shown

PartOptions = Mapping[str, Mapping[str, object]]  # part -> option -> value


def check_options(options: PartOptions, algorithm: Algorithm, where: str = "") -> None:
    """Refuse what names no part of the algorithm, no option of its part, or has another type than the option."""
    mine = {part.name: part for part in algorithm.parts}
    for name, values in options.items():
        if name not in parts():
            raise UsageError(f"{where}there is no part '{name}'; the parts are {', '.join(parts())}{did_you_mean(name, parts())}")
        for key, value in values.items():
            if name not in mine:
                raise UsageError(f"{where}{name}.{key} belongs to {name}, not to {algorithm.name}; leave it out")
            known = {option.name: option for option in mine[name].options}
            if key not in known:
                listed = f"its options are {', '.join(known)}" if known else "it has none"
                raise UsageError(f"{where}{name} has no option '{key}'; {listed}{did_you_mean(key, known)}")
            if not fits(value, known[key].hint):
                raise UsageError(f"{where}'{name}.{key}' must be {kind_text(known[key].hint)}, not {shown(value)}")


_hints = cache(get_type_hints)  # of a recipe with thousands of overrides


def check_types(kind: type, values: Mapping[str, object], where: str) -> None:
    for key, hint in _hints(kind).items():
        if key in values and not fits(values[key], hint):
            raise UsageError(f"{where}: '{key}' must be {kind_text(hint)}, not {shown(values[key])}")
