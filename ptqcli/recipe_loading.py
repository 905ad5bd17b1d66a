"""A recipe from a YAML file, from flags, or from both: how what a person gives in several places becomes one ``Recipe``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ptqcli.algorithms import Algorithm, Declaration, declarations, find_algorithm, parts
from ptqcli.budget import TARGETS
from ptqcli.errors import UsageError
from ptqcli.quality import find_quality
from ptqcli.recipe import SCHEME_FIELDS, Override, Recipe
from ptqcli.recipe_checks import check_options, check_types
from ptqcli.recipe_file import read_recipe_file
from ptqcli.suggest import did_you_mean
from ptqcli.untrusted import shown


def load_recipe(start: Path | Recipe | None = None, flags: Mapping[str, object] | None = None) -> Recipe:
    """A recipe from a YAML file or another recipe, from flags that were given explicitly, or from both: a flag wins over the file.

    Either may have, beside the fields of ``Recipe``, a section for a part (``gptq: {damp: 0.1}``) and the key of an option (``damp: 0.1``),
    which goes to every part of ``algo`` that has it, and a ``quality``, which says what ``algo``, ``finish`` and some options are.
    Raises UsageError for a file that cannot be read, an unknown key, or a value of the wrong type.
    """
    written, given = _written(start), dict(flags or {})
    written = _with_quality(written, given)
    if "scheme" in given:
        written = {key: value for key, value in written.items() if key not in SCHEME_FIELDS}
    if not given.keys().isdisjoint(TARGETS):  # say in another way what the numbers are
        written = {key: value for key, value in written.items() if key not in ("scheme", *SCHEME_FIELDS, "gguf_type", *TARGETS)}
    where = str(start) if isinstance(start, Path) else "recipe"
    values = {key: value for key, value in {**written, **given}.items() if key in _fields()}
    values["overrides"] = tuple(_override(entry, where) for entry in _as_list(values.get("overrides", ()), "overrides", where))
    values["ignore"] = tuple(_as_list(values.get("ignore", ()), "ignore", where))
    values.pop("options", None)
    if isinstance(values.get("bos"), bool):
        values["bos"] = "yes" if values["bos"] else "no"  # as YAML reads these words
    check_types(Recipe, values, where)
    algorithm = find_algorithm(str(values.get("algo", Recipe.algo)))
    options = _options(written, algorithm, f"{where}: ")
    for part, changes in _options(given, algorithm, "").items():
        options[part] = {**options.get(part, {}), **changes}
    return Recipe(options=options, **values)  # type: ignore[arg-type]


def _with_quality(written: Mapping[str, object], given: dict[str, object]) -> dict[str, object]:
    """``written`` with what the quality of either stands for; that of ``given`` takes the place of the algorithm that is written."""
    for values in (given, written):
        for key in ("algo", "finish"):
            if "quality" in values and key in values:
                raise UsageError(f"quality {values['quality']} says what {key} is; leave one of the two out")
    named = given.pop("quality", None)
    if named is None:
        rest = {key: value for key, value in written.items() if key != "quality"}
        if "quality" not in written or "algo" in given:
            return rest
        return _merged(find_quality(written["quality"]).request(), rest)
    kept = {key: value for key, value in written.items() if key in _fields() and key not in ("algo", "options", "finish")}
    return {**kept, **find_quality(named).request()}


def _merged(request: Mapping[str, object], over: Mapping[str, object]) -> dict[str, object]:
    """``over`` wins, option by option."""
    merged = {**request, **over}
    for key, value in request.items():
        other = over.get(key)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            merged[key] = {**value, **other}
    return merged


def _written(start: Path | Recipe | None) -> dict[str, object]:
    if isinstance(start, Recipe):
        return {name: getattr(start, name) for name in _fields()}
    return {} if start is None else read_recipe_file(start)


def _fields() -> list[str]:
    return [entry.name for entry in fields(Recipe)]


def _options(values: Mapping[str, object], algorithm: Algorithm, where: str) -> dict[str, dict[str, object]]:
    """The options among ``values``, by part: sections, and keys that go to all parts of the algorithm that have the option."""
    found: dict[str, dict[str, object]] = {}
    keys = {declared.option.key: declared for declared in declarations() if declared.shared}
    sections = list(_section(values.get("options", {}), "options", where).items())
    for key, value in values.items():
        if key in _fields():
            continue
        if key in parts():
            sections.append((key, value))
        elif key in keys:
            _spread(keys[key], value, algorithm, found, where)
        else:
            known = sorted([*_fields(), "quality", *keys, *parts()])
            raise UsageError(f"{where}unknown key '{key}'; the keys are {', '.join(known)}{did_you_mean(key, known)}")
    for part, section in sections:
        for name, value in _section(section, part, where).items():
            if name in found.get(part, {}):
                raise UsageError(f"{where}{part}.{name} is given twice; give it once")
            found.setdefault(part, {})[name] = value
    check_options(found, algorithm, where)
    return found


def _spread(declared: Declaration, value: object, algorithm: Algorithm, found: dict[str, dict[str, object]], where: str) -> None:
    readers = [part.name for part in algorithm.parts if part.name in declared.parts]
    if not readers:
        owners = " and ".join(filter(None, [", ".join(declared.parts[:-1]), declared.parts[-1]]))
        own = [part.name for part in algorithm.parts if any(option.key == declared.option.key for option in part.options)]
        advice = f"{own[0]} has another of that name, {own[0]}.{declared.option.name}" if own else "leave it out"
        raise UsageError(f"{where}{declared.option.words} belongs to {owners}, not to {algorithm.name}; {advice}")
    for part in readers:
        found.setdefault(part, {})[declared.option.name] = value


def _section(value: object, key: str, where: str) -> dict[str, object]:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise UsageError(f"{where}'{key}' must be a section of options such as {key}: {{option: value}}, not {shown(value)}")
    return dict(value)


def _as_list(value: object, key: str, where: str) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise UsageError(f"{where}: '{key}' must be a list")
    return list(value)


def _override(entry: object, where: str) -> Override:
    if isinstance(entry, Override):
        return entry
    known = {item.name for item in fields(Override)}
    if not isinstance(entry, dict) or "pattern" not in entry or not set(entry) <= known:
        keys = ", ".join(sorted(known))
        raise UsageError(f"{where}: an override has the keys {keys}, of which pattern is required; found {shown(entry)}")
    check_types(Override, entry, where)
    return Override(**entry)
