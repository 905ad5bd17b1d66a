"""The request: from a YAML file, from flags, or from both (flags win); they meet in ``recipe_loading``.

Importing this imports no torch; parts are imported when a request is made.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ptqcli.algorithms import Algorithm, find_algorithm, joined_defaults
from ptqcli.budget import BLOCK_CANDIDATES, DEFAULT_CANDIDATES, TARGETS, Budget, parse_candidates, read_budget, widest
from ptqcli.calibration.bos import check_bos
from ptqcli.calibration.sources import check_calib
from ptqcli.errors import UsageError
from ptqcli.formats import DEFAULT_FORMAT, find_format
from ptqcli.numerics.scheme import AUTO_GROUP, WHOLE_ROW, ActivationScheme, OutlierSplit, Scheme
from ptqcli.options import SchemeDefaults
from ptqcli.patterns import check_pattern
from ptqcli.recipe_checks import PartOptions, check_options, check_types
from ptqcli.suggest import did_you_mean

if TYPE_CHECKING:
    from ptqcli.solvers import MatrixSolver
    from ptqcli.transforms import BlockTransform, ModelTransform

DEFAULT_BITS = 4

DEFAULT_THRESHOLD = 6.0

LARGEST_ADAPTER_RANK = 512  # that vLLM takes

AUTO = "auto"  # a group size that goes with each linear's width

ACTIVATION_SCALES = {
    "token": ActivationScheme(),
    "tensor": ActivationScheme(per_token=False),
    "static": ActivationScheme(per_token=False, dynamic=False),
}

FINISHES = ("none", "kl")
EXPERT_CALIBRATIONS = ("routed", "all")

OUTLIER_KINDS = ("none", "dynamic", "static")

# What a scheme written as one word says, so that it cannot be said beside it.
SCHEME_FIELDS = ("wbits", "group_size", "symmetric", "abits", "act_scales", "outliers", "outlier_threshold")

SHORT_SCHEME = re.compile(r"[wW]\d+")  # W8 for w8a16
OUTSIDE_EXAMPLES = "give one such as W8, W4 or w4a16-g64-asym"


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
        check_types(Override, vars(self), "override")
        changes = any(value is not None for value in (self.bits, self.group_size, self.symmetric, self.abits))
        if self.skip == changes:
            raise UsageError(f"override '{self.pattern}' must either skip or change bits, abits, group_size or symmetric")

    def apply(self, scheme: Scheme) -> Scheme:
        """``scheme`` with this override's changes. Where the activations change, so does a group size that goes with the old ones only."""
        activations, group_size = scheme.activations, scheme.group_size
        if scheme.blocks is not None:
            raise UsageError(f"override '{self.pattern}': {scheme} has bits and groups of its own; skip the linear instead")
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
                codebook=scheme.codebook if self.bits is None else None,
                double=scheme.double and self.bits is None,
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
    lm_head, embeddings: a scheme for the output head and the embedding, w8a16-g64 or short as W8 and W4; None leaves them in 16 bit.
    expert_calibration: routed takes the statistics of an expert from the tokens that are routed to it, all from every token.
    min_expert_tokens: one that saw fewer gets the statistics of its block's experts together, see ``calibration.routed``; 0 for never.
    target_bits, target_size, candidates, sensitivity: how large the result may be, in place of what the numbers are, see ``budget``.
    ignore: patterns of linears to leave alone. overrides: other schemes for some linears, see ``Override``. format: how the
    checkpoint is stored, one of ``ptqcli.formats.format_names``. gguf_type: a mix of block types, such as q4_k_m, in place of bits and
    groups, of the format gguf (None: q4_k_m, unless bits or a scheme are given). for_tensor_parallel: GPUs that a server will cut
    every matrix over. blocks: name of the list of blocks, where it is not evident.
    finish: kl tunes the scales end to end (``finishing.tune_scales``) when all codes stand, none leaves them.
    adapter_rank: of the low-rank correction (``adapters.eora``) that is written beside the checkpoint, 0 for none.
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
    lm_head: str | None = None
    embeddings: str | None = None
    expert_calibration: str = "routed"
    min_expert_tokens: int = 32
    ignore: tuple[str, ...] = ()
    overrides: tuple[Override, ...] = ()
    format: str = DEFAULT_FORMAT
    gguf_type: str | None = None
    for_tensor_parallel: int = 1
    blocks: str | None = None
    adapter_rank: int = 0
    finish: str = "none"
    target_bits: float | None = None
    target_size: str | int | None = None
    candidates: str | None = None
    sensitivity: str | None = None

    def __post_init__(self) -> None:
        check_types(Recipe, vars(self), "recipe")
        check_options(self.options, self.algorithm)
        self._check_order()
        self._check_budget()
        scheme = self.default_scheme
        if scheme.outliers is None and self.outlier_threshold is not None:
            raise UsageError(
                "an outlier threshold has no effect without an outlier split; give --outliers dynamic or static, or leave it out"
            )
        check_calib(self.calib, self.nsamples)
        if self.nsamples is not None and self.nsamples < 1:
            raise UsageError(f"nsamples {self.nsamples} is not valid; give at least 1")
        if self.seqlen is not None and self.seqlen < 2:
            raise UsageError(f"seqlen {self.seqlen} is not valid; give at least 2 tokens")
        check_bos(self.bos)
        if self.expert_calibration not in EXPERT_CALIBRATIONS:
            raise UsageError(f"expert calibration '{self.expert_calibration}' is unknown; use {' or '.join(EXPERT_CALIBRATIONS)}")
        if self.min_expert_tokens < 0:
            raise UsageError(f"min expert tokens {self.min_expert_tokens} is not valid; give 0 or more")
        if self.for_tensor_parallel < 1:
            raise UsageError(f"for tensor parallel {self.for_tensor_parallel} is not valid; give the number of GPUs, 1 or more")
        self._check_afterwards()
        self._check_outside()
        if abs(self.seed) >= 2**63:
            raise UsageError(f"seed {self.seed} is too large; give one of at most 18 digits")
        for pattern in self.patterns:
            check_pattern(pattern)

    def _check_budget(self) -> None:
        """A budget chooses what the numbers are."""
        if self.budget is None:
            return
        target = next(name for name in TARGETS if getattr(self, name) is not None)
        for name in ("scheme", *SCHEME_FIELDS, "gguf_type"):
            if getattr(self, name) is not None:
                raise UsageError(f"{target} chooses the scheme of each linear among candidates, so leave {name} out")
        if joined_defaults(self._built.values()) != SchemeDefaults():
            raise UsageError(f"{target} chooses among schemes of weights alone, and {self.algo} has one of its own; use --algo gptq")

    @cached_property
    def budget(self) -> Budget | None:
        """How large the result may be, None where the request says what the numbers are."""
        return read_budget(self.target_bits, self.target_size, self.candidates, self.sensitivity)

    @property
    def usual_candidates(self) -> str:
        """The candidates where a budget names none, as they are written."""
        return BLOCK_CANDIDATES if find_format(self.format).blocks else DEFAULT_CANDIDATES

    def _check_afterwards(self) -> None:
        """What is done when the codes stand."""
        if find_format(self.format).one_file and (self.adapter_rank or self.finish != "none"):
            flag = "--adapter-rank" if self.adapter_rank else "--finish"
            raise UsageError(f"format {self.format} is one file, whose scales stand and which has no adapter; leave {flag} out")
        if not 0 <= self.adapter_rank <= LARGEST_ADAPTER_RANK:
            raise UsageError(f"adapter rank {self.adapter_rank} is out of range; give 1 to {LARGEST_ADAPTER_RANK}, or 0 for no adapter")
        if self.finish not in FINISHES:
            raise UsageError(f"finish '{self.finish}' is unknown; use {' or '.join(FINISHES)}{did_you_mean(self.finish, FINISHES)}")
        if self.finish != "none" and self.nsamples is not None and self.nsamples < 2:
            raise UsageError(f"finish {self.finish} holds half of the windows out; give --nsamples 2 or more")
        if self.finish != "none" and self.adapter_rank:
            raise UsageError("an adapter corrects the scales as they are before finish kl moves them; leave one of the two out")

    def _check_outside(self) -> None:
        """Head and embedding, as far as they have schemes."""
        if self.head_scheme is not None or self.embedding_scheme is not None:
            flag = "--lm-head" if self.embedding_scheme is None else "--embeddings"
            if self.finish != "none":
                raise UsageError(f"finish {self.finish} tunes scales of linears in the blocks only; leave {flag} or --finish out")

    @property
    def head_scheme(self) -> Scheme | None:
        """The scheme of the output head, None where it stays as it is."""
        return None if self.lm_head is None else _outside_scheme("lm-head", self.lm_head)

    @property
    def embedding_scheme(self) -> Scheme | None:
        """The scheme of the embedding, None where it stays as it is."""
        return None if self.embeddings is None else _outside_scheme("embeddings", self.embeddings)

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
        mix = self.mix
        if self.budget is not None:
            return widest(self.budget.candidates or parse_candidates(self.usual_candidates))
        if mix is not None:
            return find_format(self.format).usual_scheme(mix)
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

    @property
    def mix(self) -> str | None:
        """What says the scheme of each linear, where the format chooses it. Raises UsageError for a mix beside a scheme."""
        said = [name for name in ("scheme", *SCHEME_FIELDS) if getattr(self, name) is not None]
        if said and self.gguf_type is not None:
            raise UsageError(f"gguf type {self.gguf_type} says what the numbers are, so leave {said[0]} out")
        if said or self.budget is not None or joined_defaults(self._built.values()) != SchemeDefaults():
            return None
        return self.gguf_type or find_format(self.format).usual_mix

    def schemes_of_mix(self, config: Any, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, Scheme]:
        """The scheme of each linear, by its path, where the format chooses it, see ``Format.assigned``."""
        return {} if self.mix is None else find_format(self.format).assigned(self.mix, config, shapes)

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


def _outside_scheme(option: str, text: str) -> Scheme:
    """What ``text``, a scheme or short W8, says. Raises UsageError for what leaves more than weights as they are, or none of them."""
    try:
        scheme = Scheme.parse(f"{text}a16" if SHORT_SCHEME.fullmatch(text) else text)
    except UsageError as error:
        meant = text[:1] in ("w", "W")
        raise UsageError(f"--{option} {text}: {error if meant else f'is no scheme; {OUTSIDE_EXAMPLES}'}") from error
    if scheme.activations is not None or scheme.blocks is not None or scheme.codebook is not None:
        raise UsageError(f"--{option} {text}: takes integer weights beside 16-bit activations; {OUTSIDE_EXAMPLES}")
    return scheme


def _is_of_the_model(transform: Any) -> bool:
    return hasattr(transform, "prepare")


def _group_number(given: int | str, activations: ActivationScheme | None) -> int:
    """The group size of a scheme that a request calls ``given``. Raises UsageError for what is no group size."""
    if given == AUTO:
        return AUTO_GROUP if activations is None else WHOLE_ROW
    if isinstance(given, str) or given < WHOLE_ROW:
        raise UsageError(f"group size {given} is not valid; give auto, a positive number, or -1 for whole rows")
    return given
