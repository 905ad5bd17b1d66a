"""What the values of flags of ``ptq quantize`` stand for."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ptqcli.recipe import Override

OVERRIDE_EXAMPLES = "REGEX:skip or REGEX:bits=8,group=64,asym or REGEX:abits=16"
SET_EXAMPLE = "gptq.damp=0.1"


def parse_override(text: str) -> Override:
    """``REGEX:skip`` or ``REGEX:bits=8,group=64,sym|asym,abits=8|16``; what stands after the last colon is not part of the pattern."""
    from ptqcli.recipe import Override

    pattern, colon, changes = text.rpartition(":")
    if not (pattern and colon and changes):
        raise click.BadParameter(f"{text!r} has {_missing_part(pattern, colon)}; write {OVERRIDE_EXAMPLES}")
    values: dict[str, Any] = {}
    for change in changes.split(","):
        key, _, value = change.strip().partition("=")
        values |= _override_value(key, value, text)
    return Override(pattern, **values)


def parse_overrides(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[Override, ...]:
    return tuple(parse_override(value) for value in values)


def _missing_part(pattern: str, colon: str) -> str:
    if not colon:
        return "no colon"
    return "nothing after the colon" if pattern else "no pattern"


def _override_value(key: str, value: str, text: str) -> dict[str, Any]:
    words = {"skip": {"skip": True}, "sym": {"symmetric": True}, "asym": {"symmetric": False}}
    numbers = {"bits": "bits", "group": "group_size", "abits": "abits"}
    if key in words and not value:
        return words[key]
    if (key, value) == ("group", "auto"):
        return {"group_size": value}
    if key in numbers and re.fullmatch(r"-?[0-9]+", value):
        return {numbers[key]: int(value)}
    raise click.BadParameter(f"{key}{'=' if value else ''}{value} in {text!r} is not understood; write {OVERRIDE_EXAMPLES}")


def parse_group(ctx: click.Context, param: click.Parameter, value: str | None) -> int | str | None:
    if value is None or value == "auto":
        return value
    if re.fullmatch(r"-?[0-9]{1,18}", value) is None:
        raise click.BadParameter(f"{value!r} is no group size; give auto, a number of columns, -1 or 0")
    return int(value)


def parse_settings(texts: tuple[str, ...]) -> dict[str, dict[str, object]]:
    """``PART.OPTION=VALUE`` texts as part -> option -> value. What is not known of a part is left to the recipe to refuse."""
    from ptqcli.algorithms import parts
    from ptqcli.options import from_text

    found: dict[str, dict[str, object]] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        part, dot, option = name.rpartition(".")
        if not (equals and dot and part and option):
            raise click.BadParameter(f"{text!r} is not understood; write PART.OPTION=VALUE such as {SET_EXAMPLE}")
        if option in found.get(part, {}):
            raise click.BadParameter(f"{name} is given twice; give it once")
        declared = {entry.name: entry for entry in parts()[part].options} if part in parts() else {}
        found.setdefault(part, {})[option] = from_text(declared[option], value) if option in declared else value
    return found


def parse_settings_flag(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, dict[str, object]]:
    return parse_settings(values)
