"""The request."""

from __future__ import annotations

import re
import types
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from ptqcli.algorithms import Algorithm, find_algorithm
from ptqcli.errors import UsageError
from ptqcli.formats import DEFAULT_FORMAT, find_format
from ptqcli.numerics.scheme import WHOLE_MATRIX, WHOLE_ROW, ActivationScheme, OutlierSplit, Scheme
from ptqcli.solvers import MatrixSolver, SolverOptions
from ptqcli.transforms import BlockTransform, TransformOptions

DEFAULT_GROUP = 128

DEFAULT_THRESHOLD = 6.0

DEFAULT_ALPHA = 0.5

# Settings of the SmoothQuant paper (table 2): weights have one scale in all, activations these.
SMOOTH_LEVELS = {"O1": "token", "O2": "tensor", "O3": "static"}

ACTIVATION_SCALES = {
    "token": ActivationScheme(),
    "tensor": ActivationScheme(per_token=False),
    "static": ActivationScheme(per_token=False, dynamic=False),
}

OUTLIER_KINDS = ("none", "dynamic", "static")


@dataclass(frozen=True)
class Override:
    """Another treatment for the linears whose name ``pattern`` (a regular expression, searched anywhere in the name) finds.

    What is None stays as the recipe has it. Of several overrides that find a linear, later ones win. Raises UsageError for an override
    that both skips and changes, or does neither.
    """

    pattern: str
    skip: bool = False
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    abits: int | None = None

    def __post_init__(self) -> None:
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
                group_size=group_size if self.group_size is None else self.group_size,
                symmetric=scheme.symmetric if self.symmetric is None else self.symmetric,
                activations=activations,
                outliers=scheme.outliers if activations is not None else None,
            )
        except UsageError as error:
            raise UsageError(f"override '{self.pattern}': {error}") from error


@dataclass(frozen=True)
class Recipe:
    """A request, complete with its options; the fields are the keys of a recipe file.

    algo: parts named in ``ptqcli.algorithms``, joined by ``+``. wbits, group_size, symmetric: the weights, see ``scheme.Scheme``. abits: 8,
    or 16 to leave activations alone. act_scales: token or tensor (both dynamic), or static (per tensor, from calibration). outliers: none,
    dynamic or static, columns with inputs above outlier_threshold in 16 bit. What is None follows from algo and from the others.
    act_order, static_groups, damp: see ``solvers.gptq``. scale_search: minmax or mse, see ``scheme.fit``. awq_clip: see ``transforms.awq``.
    smooth_alpha: a number from 0 to 1 or "auto", see ``transforms.smoothquant``. smooth_level: O1, O2 or O3 of that paper, which stand for
    one weight scale in all and an act_scales. sequential: later linears of a block are calibrated behind the quantized earlier ones.
    calib: builtin, wikitext2, c4, pile or a path. nsamples windows of seqlen tokens (None: what the model allows, 2048 at most), drawn
    with seed. ignore: patterns of linears to leave alone. blocks: name of the list of blocks, where it is not evident.
    """

    algo: str = "gptq"
    wbits: int | None = None
    group_size: int | None = None
    symmetric: bool = True
    abits: int | None = None
    act_scales: str | None = None
    outliers: str | None = None
    outlier_threshold: float = DEFAULT_THRESHOLD
    act_order: bool = True
    static_groups: bool = True
    damp: float = 0.01
    scale_search: str = "mse"
    awq_clip: bool = True
    smooth_alpha: float | str = DEFAULT_ALPHA
    smooth_level: str | None = None
    sequential: bool = True
    calib: str = "builtin"
    nsamples: int = 128
    seqlen: int | None = None
    seed: int = 0
    ignore: tuple[str, ...] = ()
    overrides: tuple[Override, ...] = ()
    format: str = DEFAULT_FORMAT
    blocks: str | None = None

    def __post_init__(self) -> None:
        self.solver()
        self.transforms()
        self._check_level()
        self._check_unused()
        if self.scale_search not in ("minmax", "mse"):
            raise UsageError(f"scale search '{self.scale_search}' is unknown; use minmax or mse")
        find_format(self.format)
        if self.nsamples < 1:
            raise UsageError(f"nsamples {self.nsamples} is not valid; give at least 1")
        if self.seqlen is not None and self.seqlen < 2:
            raise UsageError(f"seqlen {self.seqlen} is not valid; give at least 2 tokens")
        if abs(self.seed) >= 2**63:
            raise UsageError(f"seed {self.seed} is too large; give one of at most 18 digits")
        for pattern in (*self.ignore, *(override.pattern for override in self.overrides)):
            _check_pattern(pattern)

    def _check_level(self) -> None:
        if self.smooth_level is None:
            return
        if self.smooth_level not in SMOOTH_LEVELS:
            raise UsageError(f"smooth level '{self.smooth_level}' is unknown; use {', '.join(SMOOTH_LEVELS)}")
        if all(part.name != "smoothquant" for part in self.algorithm.transforms):
            raise UsageError(
                f"smooth level {self.smooth_level} belongs to smoothquant, not to {self.algo}; use group size 0 and act_scales"
            )
        if self.group_size is not None or self.act_scales is not None:
            raise UsageError(f"smooth level {self.smooth_level} sets the group size and act_scales; leave those out")

    def _check_unused(self) -> None:
        parts = {part.name for part in self.algorithm.transforms}
        if self.scheme.outliers is None and self.outlier_threshold != DEFAULT_THRESHOLD:
            raise UsageError(
                "an outlier threshold has no effect without an outlier split; give --outliers dynamic or static, or leave it out"
            )
        if not self.awq_clip and "awq" not in parts:
            raise UsageError(f"awq clip belongs to awq, not to {self.algo}; leave it out")
        if self.smooth_alpha != DEFAULT_ALPHA and "smoothquant" not in parts:
            raise UsageError(f"smooth alpha belongs to smoothquant, not to {self.algo}; leave it out")

    @property
    def algorithm(self) -> Algorithm:
        """The parts that ``algo`` names."""
        return find_algorithm(self.algo)

    @property
    def scheme(self) -> Scheme:
        """The scheme of every linear that no override changes. Raises UsageError for one that does not exist."""
        defaults = self.algorithm.defaults
        activations = self._activations(defaults.abits if self.abits is None else self.abits)
        group_size = self.group_size
        if group_size is None:
            group_size = DEFAULT_GROUP if activations is None else (WHOLE_ROW if self.smooth_level is None else WHOLE_MATRIX)
        return Scheme(
            bits=defaults.wbits if self.wbits is None else self.wbits,
            group_size=group_size,
            symmetric=self.symmetric,
            activations=activations,
            outliers=self._outlier_split(activations),
        )

    def _activations(self, abits: int) -> ActivationScheme | None:
        if abits == 16:
            if self.act_scales is not None or self.smooth_level is not None:
                raise UsageError("activations stay in 16 bit, so they have no scales; give --abits 8, or leave the scales out")
            return None
        scales = SMOOTH_LEVELS[self.smooth_level] if self.smooth_level else self.act_scales or "token"
        if scales not in ACTIVATION_SCALES:
            raise UsageError(f"activation scales '{scales}' are unknown; use {', '.join(ACTIVATION_SCALES)}")
        return replace(ACTIVATION_SCALES[scales], bits=abits)

    def _outlier_split(self, activations: ActivationScheme | None) -> OutlierSplit | None:
        kind = self.algorithm.defaults.outliers if self.outliers is None else self.outliers
        if kind not in OUTLIER_KINDS:
            raise UsageError(f"outliers '{kind}' is unknown; use {', '.join(OUTLIER_KINDS)}")
        if kind != "none" and activations is None and self.outliers is None:
            raise UsageError(f"{self.algo} splits 8-bit activations; leave --abits out, or give --outliers none")
        return None if kind == "none" else OutlierSplit(self.outlier_threshold, dynamic=kind == "dynamic")

    def solver(self) -> MatrixSolver:
        """The solver that the algorithm ends with. Raises UsageError for an unknown algorithm or option."""
        make = self.algorithm.solver.solver
        assert make is not None
        return make(SolverOptions(self.damp, self.act_order, self.static_groups, self.scale_search))

    def transforms(self) -> list[BlockTransform]:
        """The transforms that come before the solver, in order."""
        options = TransformOptions(self.awq_clip, self.smooth_alpha)
        return [part.transform(options) for part in self.algorithm.transforms if part.transform is not None]


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise UsageError(f"'{pattern}' is not a regular expression: {error}") from error


def load_recipe(file: Path | None = None, flags: Mapping[str, object] | None = None) -> Recipe:
    """A recipe from a YAML file, from flags that were given explicitly, or from both: a flag wins over the file.

    Raises UsageError for a file that cannot be read, an unknown key, or a value of the wrong type.
    """
    values = _read_yaml(file) if file is not None else {}
    where = str(file) if file is not None else "recipe"
    values = {**values, **(flags or {})}
    known = {entry.name for entry in fields(Recipe)}
    for key in values:
        if key not in known:
            raise UsageError(f"{where}: unknown key '{key}'; the keys are {', '.join(sorted(known))}")
    values["overrides"] = tuple(_override(entry, where) for entry in _as_list(values.get("overrides", ()), "overrides", where))
    values["ignore"] = tuple(_as_list(values.get("ignore", ()), "ignore", where))
    _check_types(Recipe, values, where)
    return Recipe(**values)  # type: ignore[arg-type]


def _read_yaml(file: Path) -> dict[str, object]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"{file}: cannot read the recipe: {reason}") from error
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{file}: is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{file}: a recipe is a list of 'key: value' lines; see configs/ for examples")
    return {str(key): value for key, value in values.items()}


def _as_list(value: object, key: str, where: str) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise UsageError(f"{where}: '{key}' must be a list")
    return list(value)


def _override(entry: object, where: str) -> Override:
    if isinstance(entry, Override):
        return entry
    known = {item.name for item in fields(Override)}
    if not isinstance(entry, dict) or "pattern" not in entry or not set(entry) <= known:
        raise UsageError(f"{where}: an override has the keys {', '.join(sorted(known))}, of which pattern is required; found {entry!r}")
    _check_types(Override, entry, where)
    return Override(**entry)


def _check_types(kind: type, values: Mapping[str, object], where: str) -> None:
    for key, hint in get_type_hints(kind).items():
        if key in values and not _fits(values[key], hint):
            expected = hint.__name__ if isinstance(hint, type) else str(hint)
            raise UsageError(f"{where}: '{key}' must be {expected}, not {values[key]!r}")


def _fits(value: object, hint: Any) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if get_args(hint):
        return isinstance(value, tuple) and all(_fits(entry, get_args(hint)[0]) for entry in value)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)
