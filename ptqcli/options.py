"""What a part of ``--algo`` declares about itself: its options, and what the numbers are where a request does not say.

A part is a dataclass. Those of its fields that are made with ``option`` are its options, and nothing else knows them: the flags of
`ptq quantize`, the keys and sections of a recipe, `ptq algorithms`, and the refusal of an option whose part is not asked for are all made
from these declarations. A part checks the values itself, where it is made.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Union, get_args, get_origin, get_type_hints

from ptqcli.errors import UsageError
from ptqcli.suggest import did_you_mean

KEY = "ptqcli.option"  # of the metadata of a field
PLACEHOLDERS = {bool: "true|false", int: "N", float: "X", str: "TEXT"}
TRUTH = {"true": True, "false": False}


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option of one part.

    name: the field. hint: the type of its values. flag: its flag without the dashes in front; two parts with equal declarations share it.
    choices: all values, None if they are not listed. metavar: what help texts show in place of a value.
    """

    name: str
    hint: Any
    default: object
    help: str
    flag: str
    choices: tuple[str, ...] | None = None
    metavar: str

    @property
    def key(self) -> str:
        """Its key in a recipe, where it goes to every part that has it."""
        return self.flag.replace("-", "_")

    @property
    def words(self) -> str:
        """Its name in a sentence."""
        return self.flag.replace("-", " ")


@dataclass(frozen=True, kw_only=True)
class SchemeDefaults:
    """What a part says the numbers are, None where it says nothing.

    bits, abits: of weights and activations. outliers: none, dynamic or static. group_size, act_scales: as in ``Recipe``. fixed_by: the
    option that sets these two, so that a request may not state them.
    """

    bits: int | None = None
    abits: int | None = None
    outliers: str | None = None
    group_size: int | None = None
    act_scales: str | None = None
    fixed_by: str | None = None


def option(
    default: object, help: str, *, flag: str | None = None, choices: Sequence[str] | None = None, metavar: str | None = None
) -> Any:  # the type of a field is its annotation
    """A dataclass field that is an option of its part.

    help: what it does, for the command line. flag: without the dashes in front; the field's name where it is not given.
    """
    declared = {"help": help, "flag": flag, "choices": None if choices is None else tuple(choices), "metavar": metavar}
    return field(default=default, metadata={KEY: declared})


def options_of(part: type[Any]) -> list[Option]:
    """The options that the class ``part`` declares, in order."""
    hints = get_type_hints(part)
    found = []
    for entry in fields(part):
        if KEY not in entry.metadata:
            continue
        declared, hint = entry.metadata[KEY], hints[entry.name]
        choices = declared["choices"]
        placeholder = "|".join(choices) if choices else "|".join(PLACEHOLDERS[kind] for kind in kinds(hint))
        found.append(
            Option(
                name=entry.name,
                hint=hint,
                default=entry.default,
                help=declared["help"],
                flag=declared["flag"] or entry.name.replace("_", "-"),
                choices=choices,
                metavar=declared["metavar"] or placeholder,
            )
        )
    return found


def check_choices(part: Any) -> None:
    """Raise UsageError for an option of ``part`` whose value is none of its choices; None, where it is the default, is none given."""
    for declared in options_of(type(part)):
        value = getattr(part, declared.name)
        if declared.choices and value not in (*declared.choices, declared.default):
            known = f"use {', '.join(declared.choices[:-1])} or {declared.choices[-1]}"
            raise UsageError(f"{declared.words} {value!r} is unknown; {known}{did_you_mean(str(value), declared.choices)}")


def kinds(hint: Any) -> tuple[type, ...]:
    """The types that an annotation such as ``float | str`` or ``str | None`` allows, without None."""
    members = get_args(hint) if get_origin(hint) in (types.UnionType, Union) else (hint,)
    return tuple(member for member in members if member is not types.NoneType)


def kind_text(hint: Any) -> str:
    """``kinds`` as a person reads them: ``float or str``."""
    return " or ".join(f"a list of {get_args(kind)[0].__name__}" if get_origin(kind) is tuple else kind.__name__ for kind in kinds(hint))


def fits(value: object, hint: Any) -> bool:
    """Whether ``value`` is of the annotated type. A number that is whole is a float too, but nothing else than true and false is a bool."""
    if get_origin(hint) in (types.UnionType, Union):
        return any(fits(value, member) for member in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(fits(entry, get_args(hint)[0]) for entry in value)
    if get_origin(hint) is not None:
        return isinstance(value, get_origin(hint))
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def from_text(declared: Option, text: str) -> object:
    """The value that ``text`` on a command line stands for. Raises UsageError for one that is not of the option's type."""
    for kind in kinds(declared.hint):
        try:
            return TRUTH[text.lower()] if kind is bool else kind(text)
        except (KeyError, ValueError):
            continue
    raise UsageError(f"{declared.words} must be {kind_text(declared.hint)}, not {text!r}")
