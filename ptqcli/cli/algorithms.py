"""``ptq algorithms``: the parts of ``--algo``, made from what they declare, and the formats of ``--format``."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from ptqcli.cli import examples
from ptqcli.cli.console import Output
from ptqcli.cli.options import json_option
from ptqcli.errors import PTQError

if TYPE_CHECKING:
    from ptqcli.algorithms import Part
    from ptqcli.options import Option

PART_COLUMNS = ("part", "kind", "what it does", "scheme", "from")
OPTION_COLUMNS = ("option", "flag", "values", "default", "what it does")


@click.command(epilog=examples("ptq algorithms", "ptq algorithms --json"))
@json_option
def command(as_json: bool) -> None:
    """List the parts of --algo with options, and the formats.

    An algorithm is any number of transforms, then one solver, joined by +, such as awq+gptq. A part's option is given by its flag, by
    --set part.option=value, or in a recipe.
    """
    from ptqcli.algorithms import all_parts

    words = Output(as_json=as_json)
    found = [_described(part) for part in all_parts()]
    working = [part for part in found if part["error"] is None]
    table = [[part["name"], part["kind"], part["summary"], _scheme_text(part), part["from"]] for part in working]
    words.table("Parts", PART_COLUMNS, table, words=True)
    rows = [
        [f"{part['name']}.{option['name']}", option["flag"] or "", option["values"], _text(option["default"]), option["help"]]
        for part in working
        for option in part["options"]
    ]
    words.table("Options", OPTION_COLUMNS, rows, words=True)
    formats = _formats()
    words.table("Formats", ("format", "from"), ([each["name"], each["from"]] for each in formats if each["error"] is None), words=True)
    broken = [(each["name"], each["from"], each["error"]) for each in (*found, *formats) if each["error"] is not None]
    if broken:
        words.table("Broken", ("part", "from", "why"), broken, words=True)
    words.result({"parts": found, "formats": formats})


def _formats() -> list[dict[str, Any]]:
    """The formats, as ``_described`` has the parts."""
    from ptqcli.formats import find_format, format_names

    found = []
    for name in format_names():
        try:
            package, error = type(find_format(name)).__module__.partition(".")[0], None
        except PTQError as reason:
            package, error = "", str(reason)
        found.append({"name": name, "from": package, "error": error})
    return found


def _described(part: Part) -> dict[str, Any]:
    """A part for the table and the JSON object; error says why it cannot be used."""
    from ptqcli.options import SchemeDefaults

    facts: dict[str, Any] = {
        "name": part.name,
        "kind": part.entry.group.rpartition(".")[2].removesuffix("s"),
        "from": part.package or "ptqcli",
        "summary": None,
        "scheme": {},
        "options": [],
        "error": None,
    }
    try:
        made = part.load()()
    except PTQError as error:
        return {**facts, "error": str(error)}
    defaults = getattr(made, "scheme_defaults", SchemeDefaults())
    scheme = {name: value for name, value in asdict(defaults).items() if value is not None}
    return {**facts, "summary": made.summary, "scheme": scheme, "options": [_option(option) for option in part.options]}


def _option(option: Option) -> dict[str, Any]:
    from ptqcli.cli.quantize import command as quantize
    from ptqcli.cli.quantize_flags import QuantizeCommand
    from ptqcli.options import kind_text, kinds

    assert isinstance(quantize, QuantizeCommand)
    flag = f"--{option.flag}/--no-{option.flag}" if kinds(option.hint) == (bool,) else f"--{option.flag}"
    return {
        "name": option.name,
        "flag": flag if option in quantize.part_options else None,
        "type": kind_text(option.hint),
        "values": option.metavar,
        "default": option.default,
        "help": option.help,
    }


def _scheme_text(part: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in part["scheme"].items())


def _text(value: object) -> str:
    """A default as it would be written in a recipe; nothing for None."""
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)
