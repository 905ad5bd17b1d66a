"""What is to be done, before anything is done.

A ``Recipe`` is the request: it comes from a YAML file, from flags, or from both (flags win), and both meet in ``load_recipe``.
``make_plan`` confronts it with a model's skeleton and decides for every linear whether it is quantized and in which scheme. Whatever
cannot work is refused there, by name, before a weight is read: a group that does not divide, a pattern that matches nothing, parts of
one fused matrix in different schemes, something that the format cannot hold.
"""

from __future__ import annotations

import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
import yaml

from ptqcli.algorithms import Algorithm, find_algorithm
from ptqcli.calibration.statistics import SAMPLED_TOKENS
from ptqcli.errors import PTQError, UsageError
from ptqcli.formats import compressed_tensors
from ptqcli.model import LinearSite, Skeleton
from ptqcli.scheme import WHOLE_MATRIX, WHOLE_ROW, ActivationScheme, OutlierSplit, Scheme
from ptqcli.solvers import MatrixSolver, SolverOptions, needs_of
from ptqcli.transforms import BlockTransform, TransformOptions

DEFAULT_SEQLEN = 2048
PICKABLE_GROUPS = (128, 64, 32)
DEFAULT_ACTIVATION_BUDGET = 4 << 30
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
# Tokens per forward pass: enough for products at full speed, few enough that a batch's intermediate tensors stay small.
TOKENS_PER_BATCH = 4096
# Tokens on which transforms try their choices out, in whole windows.
TRIED_TOKENS = 1024


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
    format: str = compressed_tensors.NAME
    blocks: str | None = None

    def __post_init__(self) -> None:
        self.solver()
        self.transforms()
        self._check_level()
        self._check_unused()
        if self.scale_search not in ("minmax", "mse"):
            raise UsageError(f"scale search '{self.scale_search}' is unknown; use minmax or mse")
        if self.format != compressed_tensors.NAME:
            raise UsageError(f"format '{self.format}' is unknown; the format is {compressed_tensors.NAME}")
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


@dataclass(frozen=True)
class Setting:
    """How a run uses the machine; none of it changes what is asked for.

    batch_size: windows per forward pass, None for what makes about TOKENS_PER_BATCH tokens. activation_budget: bytes of activations to hold
    in memory; more go to a file. dtype: of the calibration passes, None for the model's own (float16 becomes float32 on a CPU, where its
    products are slow and overflow). max_shard_bytes: largest safetensors file, None for the default.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    batch_size: int | None = None
    activation_budget: int = DEFAULT_ACTIVATION_BUDGET
    dtype: torch.dtype | None = None
    max_shard_bytes: int | None = None

    def windows_per_batch(self, seqlen: int) -> int:
        """Windows of ``seqlen`` tokens in one forward pass."""
        return self.batch_size or max(1, TOKENS_PER_BATCH // seqlen)

    def calibration_dtype(self, stored: torch.dtype) -> torch.dtype:
        """The dtype of the calibration passes for a model stored in ``stored``."""
        if self.dtype is not None:
            return self.dtype
        return torch.float32 if stored == torch.float16 and self.device.type == "cpu" else stored


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


@dataclass(frozen=True)
class PlannedLinear:
    """A linear that will be quantized. scale_dtype: the dtype in which its weight is stored now, and its scales will be."""

    site: LinearSite
    scheme: Scheme
    scale_dtype: torch.dtype

    @property
    def name(self) -> str:
        """Its path in the model."""
        return self.site.name


@dataclass(frozen=True)
class Plan:
    """Every decision that can be made before a weight is read.

    skipped: (name, reason) of linears inside the blocks that stay as they are. outside: linears outside the blocks. stages: for each
    block, the local names of its planned linears, grouped by input tensor in running order. The bytes are estimates: bytes_before and
    bytes_after of the weights now and afterwards, disk_bytes of the room that the run needs (the parts and the joined file stand side by
    side at the end), memory_bytes of the peak beyond what Python and torch need themselves.
    """

    recipe: Recipe
    linears: tuple[PlannedLinear, ...]
    skipped: tuple[tuple[str, str], ...]
    outside: tuple[str, ...]
    stages: tuple[tuple[tuple[str, ...], ...], ...]
    seqlen: int
    bytes_before: int
    bytes_after: int
    disk_bytes: int
    memory_bytes: int
    notes: tuple[str, ...] = field(default=())

    @property
    def needs_calibration(self) -> bool:
        """Whether anything looks at calibration text at all."""
        return _needs_calibration(self.recipe, self.linears)

    def schemes(self) -> dict[Scheme, int]:
        """How many linears each scheme has."""
        counts: dict[Scheme, int] = {}
        for linear in self.linears:
            counts[linear.scheme] = counts.get(linear.scheme, 0) + 1
        return counts

    def summary_rows(self) -> list[tuple[str, str]]:
        """(what, value) pairs that tell a person what is about to happen."""
        recipe = self.recipe
        schemes = ", ".join(f"{scheme.describe()} x {count}" for scheme, count in self.schemes().items())
        rows = [("algorithm", recipe.algo), ("linears", schemes), ("blocks", str(len(self.stages)))]
        if self.skipped:
            rows.append(("left as they are", _list_names([f"{name} ({reason})" for name, reason in self.skipped])))
        if self.needs_calibration:
            rows.append(("calibration", f"{recipe.nsamples} windows of {self.seqlen} tokens from {recipe.calib}"))
        rows.append(("format", recipe.format))
        rows += [("note", note) for note in self.notes]
        return rows


def make_plan(recipe: Recipe, skeleton: Skeleton, setting: Setting) -> Plan:
    """Decide about every linear of the model. Raises UsageError, by name, for everything that cannot work."""
    linears, skipped = _choose(recipe, skeleton)
    outside = _outside(skeleton)
    _check_patterns_match(recipe, skeleton, outside)
    if not linears:
        raise UsageError("nothing is left to quantize: every linear is ignored or skipped")
    _check_groups(linears)
    _check_runs_once(linears, skeleton)
    _check_format(recipe, linears)
    stages = _planned_stages(linears, skeleton)
    _check_fused(linears, skeleton)
    seqlen = recipe.seqlen or min(DEFAULT_SEQLEN, model_length(skeleton.config) or DEFAULT_SEQLEN)
    _check_length(seqlen, skeleton)
    after = _bytes_after(linears, skeleton)
    memory = _memory_bytes(recipe, linears, skeleton, seqlen, setting)
    return Plan(
        recipe=recipe,
        linears=tuple(linears),
        skipped=tuple(skipped),
        outside=tuple(outside),
        stages=stages,
        seqlen=seqlen,
        bytes_before=skeleton.reader.total_bytes,
        bytes_after=after,
        disk_bytes=2 * after + _mapped_bytes(recipe, linears, seqlen, setting),
        memory_bytes=memory,
        notes=tuple(_notes(linears, skeleton)),
    )


def _needs_calibration(recipe: Recipe, linears: Sequence[PlannedLinear]) -> bool:
    looked_at = any(needs_of(linear.scheme) for linear in linears)
    return recipe.solver().needs_hessian or bool(recipe.transforms()) or looked_at


def model_length(config: Any) -> int | None:
    """The longest input that the model's config names, or None."""
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(length) if length else None


def _choose(recipe: Recipe, skeleton: Skeleton) -> tuple[list[PlannedLinear], list[tuple[str, str]]]:
    linears, skipped = [], []
    for site in skeleton.linears:
        scheme, reason = _scheme_for(recipe, site.name)
        if site.local in skeleton.shapes[site.block].unused:
            reason = reason or "never runs"
        if reason is not None:
            skipped.append((site.name, reason))
            continue
        dtype = skeleton.reader.dtype(skeleton.disk_name(f"{site.name}.weight"))
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise PTQError(f"{site.name}: is stored as {dtype}, which is already quantized or not a weight; start from the original model")
        linears.append(PlannedLinear(site, scheme, dtype))
    return linears, skipped


def _scheme_for(recipe: Recipe, name: str) -> tuple[Scheme, str | None]:
    scheme = recipe.scheme
    reason = "ignored" if any(re.search(pattern, name) for pattern in recipe.ignore) else None
    for override in recipe.overrides:
        if re.search(override.pattern, name):
            scheme = override.apply(scheme)
            reason = "skipped" if override.skip else (None if reason == "skipped" else reason)
    return scheme, reason


def _outside(skeleton: Skeleton) -> list[str]:
    inside = {site.name for site in skeleton.linears}
    return [name for name, module in skeleton.model.named_modules() if isinstance(module, torch.nn.Linear) and name not in inside]


def _check_patterns_match(recipe: Recipe, skeleton: Skeleton, outside: Sequence[str]) -> None:
    names = [site.name for site in skeleton.linears]
    for override in recipe.overrides:
        if not any(re.search(override.pattern, name) for name in names):
            raise UsageError(f"override '{override.pattern}' matches no linear; the linears are named like {names[0]}")
    for pattern in recipe.ignore:
        if not any(re.search(pattern, name) for name in (*names, *outside)):
            raise UsageError(f"ignore '{pattern}' matches no linear; the linears are named like {names[0]}")


def _check_groups(linears: Sequence[PlannedLinear]) -> None:
    for linear in linears:
        columns = linear.site.in_features
        if columns % linear.scheme.columns_per_group(columns):
            fitting = [str(group) for group in PICKABLE_GROUPS if columns % group == 0]
            raise UsageError(
                f"group size {linear.scheme.group_size} does not divide the {columns} input features of {linear.name}; "
                f"use --group-size {' or '.join([*fitting, '-1'])}, or override or ignore that layer"
            )


def _check_runs_once(linears: Sequence[PlannedLinear], skeleton: Skeleton) -> None:
    for linear in linears:
        if linear.site.local in skeleton.shapes[linear.site.block].repeated:
            raise UsageError(f"{linear.name} runs more than once within its block, which is not supported; add it to --ignore")


def _check_format(recipe: Recipe, linears: Sequence[PlannedLinear]) -> None:
    moving = recipe.solver().needs_hessian and recipe.act_order and not recipe.static_groups
    for linear in linears:
        reason = compressed_tensors.refusal(linear.scheme, linear.site.in_features, linear.site.out_features, moving)
        if reason is not None:
            raise UsageError(f"{linear.name}: {reason}")


def _planned_stages(linears: Sequence[PlannedLinear], skeleton: Skeleton) -> tuple[tuple[tuple[str, ...], ...], ...]:
    planned = {(linear.site.block, linear.site.local) for linear in linears}
    blocks = []
    for index, shape in enumerate(skeleton.shapes):
        kept = (tuple(local for local in stage if (index, local) in planned) for stage in shape.stages)
        blocks.append(tuple(stage for stage in kept if stage))
    return tuple(blocks)


def _check_fused(linears: Sequence[PlannedLinear], skeleton: Skeleton) -> None:
    """Servers run the linears of one module that read one tensor (q, k, v; gate, up) as a single matrix in a single scheme."""
    described = {(linear.site.block, linear.site.local): linear.scheme.describe() for linear in linears}
    for index, shape in enumerate(skeleton.shapes):
        for stage in shape.stages:
            together: dict[str, str] = {}  # module -> its first linear in this stage
            for local in stage:
                first = together.setdefault(local.rpartition(".")[0], local)
                one, other = (described.get((index, name), "left as it is") for name in (first, local))
                if one != other:
                    prefix = skeleton.block_prefix(index)
                    raise UsageError(
                        f"{prefix}.{first} ({one}) and {prefix}.{local} ({other}) read the same input and are run as one matrix by vLLM; "
                        "give them the same scheme, or leave all of them as they are"
                    )


def _check_length(seqlen: int, skeleton: Skeleton) -> None:
    longest = model_length(skeleton.config)
    if longest is not None and seqlen > longest:
        raise UsageError(f"seqlen {seqlen} is longer than the model's {longest} positions; use --seqlen {longest} or less")


def _notes(linears: Sequence[PlannedLinear], skeleton: Skeleton) -> list[str]:
    notes = []
    unused = skeleton.names.unmatched
    if unused:
        notes.append(f"copied as they are, since transformers' model has no use for them: {_list_names(unused)}")
    if any(not linear.scheme.symmetric for linear in linears):
        notes.append("asymmetric: vLLM reads it; transformers needs CompressedTensorsConfig(dequantize=True)")
    if any(linear.scheme.outliers is not None for linear in linears):
        notes.append("outlier columns: only ptqcli reads them, transformers refuses the file; their size is known only after calibration")
    notes += _activation_notes(linears)
    if any(linear.site.transposed for linear in linears):
        notes.append("Conv1D layers: ptqcli and vLLM read them from this format, transformers does not")
    others = ", ".join(sorted({linear.site.kind for linear in linears} - {"Linear", "Conv1D"}))
    if others and all(linear.scheme.activations is None for linear in linears):
        notes.append(f"{others} layers: transformers may need CompressedTensorsConfig(dequantize=True) to run them")
    elif others:
        notes.append(
            f"{others} layers: transformers cannot run them with 8-bit activations, and with dequantize=True it drops the rounding"
        )
    return notes


def _activation_notes(linears: Sequence[PlannedLinear]) -> list[str]:
    schemes = {linear.scheme: linear.scheme.activations for linear in linears if linear.scheme.activations is not None}
    notes = []
    if any(activations == ACTIVATION_SCALES["tensor"] for activations in schemes.values()):
        notes.append("activations scaled per tensor at run time: transformers and ptqcli compute them, vLLM does not")
    narrow = [scheme for scheme in schemes if scheme.bits < 8]
    if narrow:
        notes.append(f"{narrow[0].bits}-bit codes beside 8-bit activations take a byte each, so the file is no smaller than with --wbits 8")
    if any(scheme.bits != 4 or schemes[scheme] != ACTIVATION_SCALES["token"] for scheme in narrow):
        notes.append("of weights below 8 bits beside 8-bit activations, vLLM reads only 4 bits with --act-scales token")
    return notes


def weight_bits(linear: PlannedLinear) -> int:
    """Stored bits of a quantized linear: codes, scales and zero points. The columns that outliers will take are not known yet."""
    site, scheme = linear.site, linear.scheme
    scale_bits = linear.scale_dtype.itemsize * 8
    if scheme.activations is not None:  # signed codes of a byte each, whatever their width
        scales = (1 if scheme.group_size == WHOLE_MATRIX else site.out_features) + (0 if scheme.activations.dynamic else 1)
        return site.out_features * site.in_features * 8 + scales * scale_bits
    groups = scheme.group_count(site.in_features)
    zero_bits = 0 if scheme.symmetric else scheme.bits
    return site.out_features * (site.in_features * scheme.bits + groups * (scale_bits + zero_bits))


def _bytes_after(linears: Sequence[PlannedLinear], skeleton: Skeleton) -> int:
    replaced = sum(skeleton.reader.nbytes(skeleton.disk_name(f"{linear.name}.weight")) for linear in linears)
    return skeleton.reader.total_bytes - replaced + sum(weight_bits(linear) for linear in linears) // 8


def _mapped_bytes(recipe: Recipe, linears: Sequence[PlannedLinear], seqlen: int, setting: Setting) -> int:
    """Size of the file that holds the activations, 0 when they fit into memory."""
    if not _needs_calibration(recipe, linears):
        return 0
    features = min(linear.site.in_features for linear in linears)
    size = recipe.nsamples * seqlen * features * setting.calibration_dtype(linears[0].scale_dtype).itemsize
    return size if size > setting.activation_budget else 0


def _memory_bytes(recipe: Recipe, linears: Sequence[PlannedLinear], skeleton: Skeleton, seqlen: int, setting: Setting) -> int:
    """Peak of a run beyond Python and torch themselves: activations, one block, and the solver's copies of the largest matrix."""
    itemsize = setting.calibration_dtype(linears[0].scale_dtype).itemsize
    in_blocks = [sum(p.numel() for p in block.parameters()) for block in skeleton.blocks]
    largest = max((linear.site for linear in linears), key=lambda site: site.in_features * site.out_features)
    workspace = max(recipe.solver().workspace_bytes(linear.site.out_features, linear.site.in_features) for linear in linears)
    solving = max(in_blocks) * itemsize + 2 * largest.in_features * largest.out_features * 4 + workspace
    if not _needs_calibration(recipe, linears):
        return solving
    features = min(linear.site.in_features for linear in linears)
    widest = max(max(linear.site.in_features, linear.site.out_features) for linear in linears)
    inputs = max(sum(linear.site.in_features for linear in linears if linear.site.block == index) for index in range(len(in_blocks)))
    solving += SAMPLED_TOKENS * inputs * 4
    if recipe.solver().needs_hessian:
        solving += max(linear.site.in_features for linear in linears) ** 2 * 4
    if recipe.transforms():
        # the block in float32, its readers on trial, and what each of its modules returned on the excerpt
        outputs = max(sum(site.out_features for site in skeleton.linears if site.block == index) for index in range(len(in_blocks)))
        solving += 3 * max(in_blocks) * 4 + max(TRIED_TOKENS, seqlen) * 2 * (outputs + 3 * features + 2 * widest) * 4
    tokens = recipe.nsamples * seqlen
    hidden, inside = features * itemsize, (3 * features + 2 * widest) * itemsize  # bytes per token
    held = min(tokens * hidden, setting.activation_budget) + min(tokens * inside, setting.activation_budget)
    one_batch = setting.windows_per_batch(seqlen) * seqlen * inside
    embeddings = (sum(p.numel() for p in skeleton.model.parameters()) - sum(in_blocks)) * itemsize
    return held + one_batch + max(embeddings, solving)


def _list_names(names: Sequence[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
