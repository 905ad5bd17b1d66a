"""The table of algorithms, and how ``--algo`` is read.

An algorithm is a list of parts joined by ``+``: any number of transforms, which rewrite a block without changing what it computes, then one
solver, which chooses the codes (``rtn`` if none is named). ``llm-int8`` is a part that only says what the numbers are. A new part is one
file in ``transforms/`` or ``solvers/`` and one line here; every combination follows from that.

Other packages add parts by entry points in the groups ``ptqcli.solvers`` and ``ptqcli.transforms``, written as the lines here are. A part
is imported when it is used, so that one that is broken hurts nobody else; its class has ``name``, ``summary``, options made with
``ptqcli.options.option``, and may have a property ``scheme_defaults``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar

from ptqcli.errors import PTQError, UsageError
from ptqcli.options import Option, SchemeDefaults, options_of
from ptqcli.suggest import did_you_mean

SOLVERS, TRANSFORMS, SCHEMES = "ptqcli.solvers", "ptqcli.transforms", "ptqcli.schemes"  # groups of entry points; the last is not open

BUILT_IN = {
    TRANSFORMS: {
        "awq": "ptqcli.transforms.awq:AWQ",
        "smoothquant": "ptqcli.transforms.smoothquant:SmoothQuant",
        "let": "ptqcli.transforms.let:LET",
        "equalize": "ptqcli.transforms.equalize:Equalize",
        "rotate": "ptqcli.transforms.rotation:Rotate",
    },
    SCHEMES: {"llm-int8": "ptqcli.algorithms:LLMInt8"},
    SOLVERS: {
        "rtn": "ptqcli.solvers.rtn:RTN",
        "gptq": "ptqcli.solvers.gptq:GPTQ",
        "obq": "ptqcli.solvers.obq:OBQ",
        "autoround": "ptqcli.solvers.autoround:AutoRound",
        "flexround": "ptqcli.solvers.flexround:FlexRound",
        "omniquant": "ptqcli.solvers.omniquant:OmniQuant",
    },
}
DEFAULT_SOLVER = "rtn"


@dataclass(frozen=True)
class LLMInt8:
    """8 bits for both sides, and columns with outliers in 16 bit."""

    name: ClassVar[str] = "llm-int8"
    summary: ClassVar[str] = "LLM.int8: outlier columns in 16 bit"
    scheme_defaults: ClassVar[SchemeDefaults] = SchemeDefaults(bits=8, abits=8, outliers="dynamic")


@dataclass(frozen=True)
class Part:
    """One word of ``--algo``. package: where it comes from, None for one of ours. taken_by: whose part has the same name and keeps it."""

    entry: EntryPoint
    package: str | None = None
    taken_by: str | None = None

    @property
    def name(self) -> str:
        """The word."""
        return self.entry.name

    @property
    def is_solver(self) -> bool:
        """Whether it chooses codes."""
        return self.entry.group == SOLVERS

    @property
    def is_transform(self) -> bool:
        """Whether it rewrites blocks."""
        return self.entry.group == TRANSFORMS

    def load(self) -> type[Any]:
        """Its class. Raises PTQError, naming the package, for one that cannot be imported, made with its
        defaults, or told by its name.
        """
        where = f"{self.name} of the package {self.package}"
        if self.taken_by is not None:
            raise PTQError(f"{where} is refused: {self.taken_by} has a part of that name; the package must choose another")
        try:
            found = self.entry.load()
            options_of(found)
            found()
        except Exception as error:
            raise PTQError(f"{where} cannot be used: {type(error).__name__}: {error}; mend or remove that package") from error
        if getattr(found, "name", None) != self.name or not isinstance(getattr(found, "summary", None), str):
            raise PTQError(f"{where} is no part: its class must say name = {self.name!r} and a summary")
        assert isinstance(found, type)
        return found

    @property
    def options(self) -> list[Option]:
        """What it declares. Raises PTQError as ``load`` does."""
        return options_of(self.load())


@cache
def all_parts() -> tuple[Part, ...]:
    """Every part of this installation, ours first, refused ones included."""
    ours = [Part(EntryPoint(name, value, group)) for group, table in BUILT_IN.items() for name, value in table.items()]
    found = [entry for group in (TRANSFORMS, SOLVERS) for entry in entry_points(group=group)]
    owners: dict[str, str] = {part.name: "ptqcli" for part in ours}
    others = []
    for package, entry in sorted(((entry.dist.name if entry.dist else "?", entry) for entry in found), key=lambda pair: pair[0]):
        others.append(Part(entry, package, owners.get(entry.name)))
        owners.setdefault(entry.name, f"the package {package}")
    return (*ours, *others)


def parts() -> dict[str, Part]:
    """The parts that ``--algo`` can name."""
    return {part.name: part for part in all_parts() if part.taken_by is None}


@dataclass(frozen=True)
class Declaration:
    """An option and the parts that declare it alike. shared: it is offered by its flag and key, otherwise only as ``part.option``."""

    option: Option
    parts: tuple[str, ...]
    shared: bool


def declarations() -> list[Declaration]:
    """The options of all parts that can be imported.

    Where two parts declare one flag differently, the first has the flag; an option of ours comes first.
    """
    found: dict[Option, list[str]] = {}
    for name, option in _declared():
        found.setdefault(option, []).append(name)
    flags: dict[str, Option] = {}
    for option in found:
        flags.setdefault(option.flag, option)
    return [Declaration(option, tuple(names), flags[option.flag] is option) for option, names in found.items()]


def _declared() -> Iterator[tuple[str, Option]]:
    for name, part in parts().items():
        try:
            options = part.options
        except PTQError:
            continue  # `ptq algorithms` shows it
        for option in options:
            yield name, option


@dataclass(frozen=True)
class Algorithm:
    """What ``--algo NAME`` stands for: parts in the order in which they work, the solver last."""

    name: str
    parts: tuple[Part, ...]

    @property
    def transforms(self) -> tuple[Part, ...]:
        """The parts that rewrite blocks."""
        return tuple(part for part in self.parts if part.is_transform)

    @property
    def solver(self) -> Part:
        """The part that chooses the codes."""
        return self.parts[-1]


def find_algorithm(name: str) -> Algorithm:
    """The algorithm called ``name``, such as ``gptq`` or ``awq+gptq``.

    Raises UsageError, naming the word, for an unknown part, one that stands twice, a second solver, or a transform after the solver.
    """
    table, words = parts(), name.split("+")
    for word in words:
        if word not in table:
            raise UsageError(
                f"algorithm '{word}' is unknown; choose one of {', '.join(table)}, or join several such as awq+gptq"
                f"{did_you_mean(word, table)}"
            )
        if words.count(word) > 1:
            raise UsageError(f"algorithm '{name}': {word} stands twice; name each part once")
    named = [table[word] for word in words]
    solvers = [part for part in named if part.is_solver]
    if len(solvers) > 1:
        raise UsageError(f"algorithm '{name}': {' and '.join(part.name for part in solvers)} are both solvers; choose one of them")
    if solvers and named[-1] is not solvers[0]:
        order = "+".join(part.name for part in sorted(named, key=lambda part: part.is_solver))
        raise UsageError(f"algorithm '{name}': the solver comes last; write {order}")
    return Algorithm(name, tuple(named if solvers else [*named, table[DEFAULT_SOLVER]]))


def joined_defaults(built: Iterable[Any]) -> SchemeDefaults:
    """What the parts say the numbers are; of two that say something of one thing, the first is heard."""
    said = [defaults for part in built if (defaults := getattr(part, "scheme_defaults", None)) is not None]

    def first(name: str) -> Any:
        return next((value for defaults in said if (value := getattr(defaults, name)) is not None), None)

    return SchemeDefaults(**{name: first(name) for name in SchemeDefaults.__dataclass_fields__})
