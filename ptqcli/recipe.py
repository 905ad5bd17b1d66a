"""The request: from a YAML file, from flags, or from both (flags win); they meet in ``load_recipe``.

Importing this imports no torch; parts are imported when a request is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from ptqcli.algorithms import Algorithm, Declaration, declarations, find_algorithm, joined_defaults, parts
from ptqcli.calibration.bos import check_bos
from ptqcli.calibration.sources import check_calib
from ptqcli.errors import UsageError
from ptqcli.formats import DEFAULT_FORMAT, find_format
from ptqcli.numerics.scheme import AUTO_GROUP, WHOLE_ROW, ActivationScheme, OutlierSplit, Scheme
from ptqcli.options import SchemeDefaults, fits, kind_text
from ptqcli.patterns import check_pattern
from ptqcli.recipe_file import read_recipe_file
from ptqcli.suggest import did_you_mean
from ptqcli.untrusted import shown

if TYPE_CHECKING:
    from ptqcli.solvers import MatrixSolver
    from ptqcli.transforms import BlockTransform, ModelTransform

DEFAULT_BITS = 4

DEFAULT_THRESHOLD = 6.0

AUTO = "auto"  # a group size that goes with each linear's width

ACTIVATION_SCALES = {
    "token": ActivationScheme(),
    "tensor": ActivationScheme(per_token=False),
    "static": ActivationScheme(per_token=False, dynamic=False),
}

OUTLIER_KINDS = ("none", "dynamic", "static")

# What a scheme written as one word says, so that it cannot be said beside it.
SCHEME_FIELDS = ("wbits", "group_size", "symmetric", "abits", "act_scales", "outliers", "outlier_threshold")

PartOptions = Mapping[str, Mapping[str, object]]  # part -> option -> value


@dataclass(frozen=True)
class Override:
    """Another treatment for the linears whose name ``pattern`` (a regular expression, searched anywhere in the name) finds.

    What is None stays as the recipe has it. Of several overrides that find a linear, later ones win. Raises UsageError for an override
    that both skips and changes, or does neither.
    """

    pattern: str
    skip: bool = False
    bits: int | None = None
    group_size: int | str | None = None
    symmetric: bool | None = None
    abits: int | None = None

    def __post_init__(self) -> None:
        _check_types(Override, vars(self), "override")
        changes = any(value is not None for value in (self.bits, self.group_size, self.symmetric, self.abits))
        if self.skip == changes:
            raise UsageError(f"override '{self.pattern}' must either skip or change bits, abits, group_size or symmetric")

    def apply(self, scheme: Scheme) -> Scheme:
        """``scheme`` with this override's changes. Where the activations change, so does a group size that goes with the old ones only."""
        activations, group_size = scheme.activations, scheme.group_size
        try:
            if self.abits is not None:
                changed = None if self.abits == 16 else replace(activations or ActivationScheme(), bits=self.abits)
                if (changed is None) != (activations is None):
                    group_size = WHOLE_ROW
                activations = changed
            return Scheme(
                bits=scheme.bits if self.bits is None else self.bits,
                group_size=group_size if self.group_size is None else _group_number(self.group_size, activations),
                symmetric=scheme.symmetric if self.symmetric is None else self.symmetric,
                activations=activations,
                outliers=scheme.outliers if activations is not None else None,
            )
        except UsageError as error:
            raise UsageError(f"override '{self.pattern}': {error}") from error


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A request; the fields are the keys of a recipe file.

    algo: parts named in ``ptqcli.algorithms``, joined by ``+``. options: of the parts, part -> option -> value; a recipe file may also have
    a section for a part, or an option's own key. scheme: what the numbers are as one word, such as w4a16-g64-asym, in place of the next
    seven. wbits, group_size (auto, a number, -1 or 0), symmetric: the weights, see ``numerics.scheme.Scheme``. abits: 8, or 16 to leave
    activations alone. act_scales: token or tensor (both dynamic), or static (per tensor, from calibration). outliers: none, dynamic or
    static, columns with inputs above outlier_threshold in 16 bit. What is None follows from algo and from the others.
    sequential: later linears of a block are calibrated behind the quantized earlier ones.
    calib: auto, self, builtin, wikitext2, c4, pile, a path, or a list with the windows of each such as c4:64,self:8, see
    ``calibration.sources``. nsamples windows (None: 128, or fewer where the model writes them) of seqlen tokens (None: what the model
    allows, 2048 at most), drawn with seed. bos: whether every window begins with the beginning-of-sequence token: yes, no, or auto, which
    is what the tokenizer does.
    ignore: patterns of linears to leave alone. overrides: other schemes for some linears, see ``Override``. format: how the
    checkpoint is stored, one of ``ptqcli.formats.format_names``. blocks: name of the list of blocks, where it is not evident.
    Raises UsageError for what cannot work, and PTQError for a part of another package that cannot be imported.
    """

    algo: str = "gptq"
    options: PartOptions = field(default_factory=dict)
    scheme: str | None = None
    wbits: int | None = None
    group_size: int | str | None = None
    symmetric: bool | None = None
    abits: int | None = None
    act_scales: str | None = None
    outliers: str | None = None
    outlier_threshold: float | None = None
    sequential: bool = True
    calib: str = "auto"
    nsamples: int | None = None
    seqlen: int | None = None
    seed: int = 0
    bos: str = "auto"
    ignore: tuple[str, ...] = ()
    overrides: tuple[Override, ...] = ()
    format: str = DEFAULT_FORMAT
    blocks: str | None = None

    def __post_init__(self) -> None:
        _check_types(Recipe, vars(self), "recipe")
        _check_options(self.options, self.algorithm)
        self._check_order()
        scheme = self.default_scheme
        if scheme.outliers is None and self.outlier_threshold is not None:
            raise UsageError(
                "an outlier threshold has no effect without an outlier split; give --outliers dynamic or static, or leave it out"
            )
        find_format(self.format)
        check_calib(self.calib, self.nsamples)
        if self.nsamples is not None and self.nsamples < 1:
            raise UsageError(f"nsamples {self.nsamples} is not valid; give at least 1")
        if self.seqlen is not None and self.seqlen < 2:
            raise UsageError(f"seqlen {self.seqlen} is not valid; give at least 2 tokens")
        check_bos(self.bos)
        if abs(self.seed) >= 2**63:
            raise UsageError(f"seed {self.seed} is too large; give one of at most 18 digits")
        for pattern in self.patterns:
            check_pattern(pattern)

    @property
    def patterns(self) -> list[str]:
        """All regular expressions of ``ignore`` and ``overrides``."""
        return [*self.ignore, *(override.pattern for override in self.overrides)]

    @property
    def algorithm(self) -> Algorithm:
        """The parts that ``algo`` names."""
        return find_algorithm(self.algo)

    @cached_property
    def _built(self) -> dict[str, Any]:
        """The parts with their options, by name, in the order in which they work."""
        return {part.name: part.load()(**self.options.get(part.name, {})) for part in self.algorithm.parts}

    def solver(self) -> MatrixSolver:
        """The solver that the algorithm ends with, with its options."""
        solver: MatrixSolver = self._built[self.algorithm.solver.name]
        return solver

    def transforms(self) -> list[BlockTransform]:
        """The transforms of blocks that come before the solver, in order, with their options."""
        return [transform for transform in self._transforms if not _is_of_the_model(transform)]

    def model_transforms(self) -> list[ModelTransform]:
        """The transforms of the whole model, which come before those of blocks, in order, with their options."""
        return [transform for transform in self._transforms if _is_of_the_model(transform)]

    @property
    def _transforms(self) -> list[Any]:
        return [self._built[part.name] for part in self.algorithm.transforms]

    def _check_order(self) -> None:
        names = [transform.name for transform in self._transforms]
        ordered = [*(transform.name for transform in self.model_transforms()), *(transform.name for transform in self.transforms())]
        if names != ordered:
            rest = [part.name for part in self.algorithm.parts if not part.is_transform]
            written = "+".join([*ordered, *rest])
            raise UsageError(f"algorithm '{self.algo}': {ordered[0]} rewrites the whole model and comes first; write {written}")

    def stored(self) -> dict[str, Any]:
        """The fields as a report keeps them: with every option of every part, those that were not given, too."""
        given = asdict(self)
        return {**given, "options": {name: asdict(part) for name, part in self._built.items()}}

    def scheme_options(self) -> str:
        """The words of the option, if there is one, that says what the numbers are and is told by the name of their scheme."""
        return joined_defaults(self._built.values()).fixed_by or ""

    @cached_property
    def default_scheme(self) -> Scheme:
        """The scheme of every linear that no override changes. Raises UsageError for one that does not exist."""
        defaults = joined_defaults(self._built.values())
        if self.scheme is not None:
            return self._written_scheme(self.scheme, defaults)
        if defaults.fixed_by is not None and (self.group_size is not None or self.act_scales is not None):
            raise UsageError(f"{defaults.fixed_by} sets the group size and act_scales; leave those out")
        activations = self._activations(defaults)
        group_size = defaults.group_size if self.group_size is None else self.group_size
        return Scheme(
            bits=self.wbits if self.wbits is not None else defaults.bits or DEFAULT_BITS,
            group_size=_group_number(AUTO if group_size is None else group_size, activations),
            symmetric=self.symmetric is not False,
            activations=activations,
            outliers=self._outlier_split(activations, defaults),
        )

    def _written_scheme(self, text: str, defaults: SchemeDefaults) -> Scheme:
        for name in SCHEME_FIELDS:
            if getattr(self, name) is not None:
                raise UsageError(f"scheme {text} says what the numbers are, so leave {name} out")
        if defaults.fixed_by is not None:
            raise UsageError(f"{defaults.fixed_by} sets the group size and act_scales, and so does scheme {text}; leave one of them out")
        scheme = Scheme.parse(text)
        if scheme.outliers is None and (defaults.outliers or "none") != "none":
            raise UsageError(f"{self.algo} splits off outliers, and scheme {text} has none; leave one of them out")
        return scheme

    def _activations(self, defaults: SchemeDefaults) -> ActivationScheme | None:
        abits = self.abits if self.abits is not None else defaults.abits or 16
        if abits == 16:
            if self.act_scales is not None or defaults.fixed_by is not None:
                raise UsageError("activations stay in 16 bit, so they have no scales; give --abits 8, or leave the scales out")
            return None
        scales = self.act_scales or defaults.act_scales or "token"
        if scales not in ACTIVATION_SCALES:
            raise UsageError(f"activation scales '{scales}' are unknown; use {', '.join(ACTIVATION_SCALES)}")
        return replace(ACTIVATION_SCALES[scales], bits=abits)

    def _outlier_split(self, activations: ActivationScheme | None, defaults: SchemeDefaults) -> OutlierSplit | None:
        kind = self.outliers or defaults.outliers or "none"
        if kind not in OUTLIER_KINDS:
            raise UsageError(f"outliers '{kind}' is unknown; use {', '.join(OUTLIER_KINDS)}")
        if kind != "none" and activations is None and self.outliers is None:
            raise UsageError(f"{self.algo} splits 8-bit activations; leave --abits out, or give --outliers none")
        threshold = DEFAULT_THRESHOLD if self.outlier_threshold is None else self.outlier_threshold
        return None if kind == "none" else OutlierSplit(threshold, dynamic=kind == "dynamic")


def _is_of_the_model(transform: Any) -> bool:
    return hasattr(transform, "prepare")


def _group_number(given: int | str, activations: ActivationScheme | None) -> int:
    """The group size of a scheme that a request calls ``given``. Raises UsageError for what is no group size."""
    if given == AUTO:
        return AUTO_GROUP if activations is None else WHOLE_ROW
    if isinstance(given, str) or given < WHOLE_ROW:
        raise UsageError(f"group size {given} is not valid; give auto, a positive number, or -1 for whole rows")
    return given


def _check_options(options: PartOptions, algorithm: Algorithm, where: str = "") -> None:
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


def load_recipe(start: Path | Recipe | None = None, flags: Mapping[str, object] | None = None) -> Recipe:
    """A recipe from a YAML file or another recipe, from flags that were given explicitly, or from both: a flag wins over the file.

    Either may have, beside the fields of ``Recipe``, a section for a part (``gptq: {damp: 0.1}``) and the key of an option (``damp: 0.1``),
    which goes to every part of ``algo`` that has it.
    Raises UsageError for a file that cannot be read, an unknown key, or a value of the wrong type.
    """
    written, given = _written(start), dict(flags or {})
    if "scheme" in given:
        written = {key: value for key, value in written.items() if key not in SCHEME_FIELDS}
    where = str(start) if isinstance(start, Path) else "recipe"
    values = {key: value for key, value in {**written, **given}.items() if key in _fields()}
    values["overrides"] = tuple(_override(entry, where) for entry in _as_list(values.get("overrides", ()), "overrides", where))
    values["ignore"] = tuple(_as_list(values.get("ignore", ()), "ignore", where))
    values.pop("options", None)
    if isinstance(values.get("bos"), bool):
        values["bos"] = "yes" if values["bos"] else "no"  # as YAML reads these words
    _check_types(Recipe, values, where)
    algorithm = find_algorithm(str(values.get("algo", Recipe.algo)))
    options = _options(written, algorithm, f"{where}: ")
    for part, changes in _options(given, algorithm, "").items():
        options[part] = {**options.get(part, {}), **changes}
    return Recipe(options=options, **values)  # type: ignore[arg-type]


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
            known = sorted([*_fields(), *keys, *parts()])
            raise UsageError(f"{where}unknown key '{key}'; the keys are {', '.join(known)}{did_you_mean(key, known)}")
    for part, section in sections:
        for name, value in _section(section, part, where).items():
            if name in found.get(part, {}):
                raise UsageError(f"{where}{part}.{name} is given twice; give it once")
            found.setdefault(part, {})[name] = value
    _check_options(found, algorithm, where)
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
    _check_types(Override, entry, where)
    return Override(**entry)


_hints = cache(get_type_hints)  # of a recipe with thousands of overrides


def _check_types(kind: type, values: Mapping[str, object], where: str) -> None:
    for key, hint in _hints(kind).items():
        if key in values and not fits(values[key], hint):
            raise UsageError(f"{where}: '{key}' must be {kind_text(hint)}, not {shown(values[key])}")
