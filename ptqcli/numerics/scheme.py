"""What the numbers are: bits, groups and zero points of weights, and the format of activations.

A weight matrix ``W[out, in]`` is cut along ``in`` into groups of ``group_size`` neighbouring columns (``-1``: the whole row is one
group). Each group of each row has a scale ``s`` and an integer zero point ``z``; with ``b`` bits a weight is stored as an unsigned code

    u = clamp(round(w / s + z), 0, 2^b - 1)        and read back as        w' = (u - z) * s

A symmetric scheme fixes ``z = 2^(b-1)``, so the range is the full two's complement one, -2^(b-1) .. 2^(b-1) - 1.
Rounding is to the nearest, ties to even. Scales are rounded to the dtype in which they are stored *before* codes are chosen,
so that the codes are the best ones for the scale that a reader will see. A ``group_size`` of 0 gives the whole matrix one scale.

Activations in 8 bits are symmetric: with ``a`` the largest magnitude of a token, or of the whole tensor,

    s_x = a / 127.5        q_x = clamp(round(x / s_x), -128, 127)

either computed when the layer runs (dynamic) or fixed by calibration (static; per tensor only). A linear layer is then
``y = s_x s_w (q_x q_w^T) + b`` with a product of integers. Columns with outliers leave that product and are multiplied in 16 bit
(Dettmers et al. 2022, LLM.int8): those in which an input exceeds a threshold when the layer runs (dynamic), or those in which one did
during calibration (static).

Codes of a codebook count the levels of a list instead: NF4, whose 16 levels divide a normal distribution evenly, and FP4, a sign, two bits
of exponent and one of fraction (Dettmers et al. 2023, QLoRA; ``elements.py`` has the levels, from -1 to 1). A group's scale is float32. It
may be *doubly quantized*, which rounds it once more, together with those around it, to 8 bits (section 3; ``double_quant.py``).

The blocks of GGUF files are schemes, too, all but Q4_0 and Q8_0, which are w4a16-g32 and w8a16-g32: ``blocks.py`` has their numbers.

Notation: ``str(scheme)`` and ``Scheme.parse`` are an inverse pair over one name for each scheme,

    w4a16-g128, w4a16-g64-asym, w3a16-row-asym      weights only: groups of columns, or whole rows; with zero points
    w4a16, w4a16-asym                               for each linear groups of the first of AUTO_GROUPS that divides its width
    w8a8, w8a8-tensor                               8-bit activations, too: a weight scale a row, or one for the whole matrix
    w8a8-act-tensor, w8a8-static                    activation scales: one for the tensor instead of one a token; from calibration
    w8a8-outliers6, w8a8-outliers4.5-static         inputs beyond the number in 16 bit: found when the layer runs, or by calibration
    nf4-g64, fp4-row, nf4-g64-double                weights only, codes of a codebook; with doubly quantized scales
    nf4, nf4-double                                 groups of the first of CODEBOOK_GROUPS that divides a linear's width
    q4_k, q5_0                                      weights only, blocks of GGUF files

Parsing takes short forms as well: ``llm-int8`` and ``llm-int8-static`` for w8a8 with outliers6, and ``-sym`` or ``-row`` where that is
what it would be anyway; q4_0 and q8_0.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ptqcli.errors import UsageError
from ptqcli.suggest import did_you_mean

if TYPE_CHECKING:
    from ptqcli.numerics.elements import Element

SUPPORTED_BITS = (2, 3, 4, 8)
# Widths that weights may have, too, where nothing but weights is quantized; few formats hold them.
UNUSUAL_BITS = (5, 6, 7)

WHOLE_ROW = -1  # group sizes that are no number of columns

WHOLE_MATRIX = 0

AUTO_GROUP = -(1 << 31)  # not chosen yet, see ``Scheme.resolved``

AUTO_GROUPS = (128, 64, 32, 16)  # what it can become, best first

CODEBOOKS = ("nf4", "fp4")  # all of 4 bits

CODEBOOK_GROUPS = (64, 32, 16)  # what AUTO_GROUP can become there; 64 is QLoRA's

# Blocks of GGUF files: bits, columns of a group, and whether the zero point is fixed in the middle.
BLOCKS = {
    "q4_1": (4, 32, False),
    "q5_0": (5, 32, True),
    "q5_1": (5, 32, False),
    "q2_k": (2, 16, False),
    "q3_k": (3, 16, True),
    "q4_k": (4, 32, False),
    "q5_k": (5, 32, False),
    "q6_k": (6, 16, True),
}

SUPER_BLOCK = 256  # columns of a block whose name ends in _k; those of others are a group

SAME_AS_BLOCKS = {"q4_0": "w4a16-g32", "q8_0": "w8a16-g32"}

# One of each kind, to show how names are made.
EXAMPLES = (
    "w4a16-g128",
    "w4a16-g64-asym",
    "w4a16-row",
    "w8a16",
    "w8a8",
    "w8a8-tensor-static",
    "llm-int8",
    "llm-int8-static",
    "nf4-g64-double",
    "q4_k",
)

_NAME = re.compile(
    r"(?:w(?P<bits>[0-9]{1,3})a(?P<abits>[0-9]{1,3})|(?P<codebook>nf4|fp4))"
    r"(?:-(?:g(?P<columns>[1-9][0-9]{0,17})|(?P<whole>row|tensor)))?"
    r"(?:-(?P<zero>a?sym))?"
    r"(?P<double>-double)?"
    r"(?:-(?P<scales>act-tensor|static))?"
    r"(?P<split>-outliers(?P<threshold>[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?)?(?P<fixed>-static)?)?"
)


@dataclass(frozen=True)
class ActivationScheme:
    """Number format of a linear's inputs: 8 bits, symmetric.

    per_token: one scale for each token, otherwise one for the tensor. dynamic: scales are computed when the layer runs, otherwise fixed
    by calibration. Raises UsageError for a width that does not exist and for static scales per token, which no run could know beforehand.
    """

    bits: int = 8
    per_token: bool = True
    dynamic: bool = True

    def __post_init__(self) -> None:
        if self.bits != 8:
            raise UsageError(f"{self.bits} bits per activation is not supported; choose 8, or 16 to leave activations as they are")
        if self.per_token and not self.dynamic:
            raise UsageError("activation scales fixed by calibration are per tensor, not per token")


@dataclass(frozen=True)
class OutlierSplit:
    """Input columns that are multiplied in 16 bit: those with a magnitude above ``threshold``.

    dynamic: found anew whenever the layer runs, as in the paper, otherwise fixed by calibration. Raises UsageError for a threshold that
    is not a positive number, or larger than a float32 holds.
    """

    threshold: float = 6.0
    dynamic: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1e38:
            raise UsageError(f"outlier threshold {self.threshold} is not valid; give a positive number below 1e38 (the paper's is 6.0)")


@dataclass(frozen=True)
class Scheme:
    """Number format of one linear.

    bits: code width, 2 to 8, or that of the blocks. group_size: columns per scale, -1 for the whole row, 0 for the whole matrix,
    AUTO_GROUP for what goes with a linear's width, which is chosen by ``resolved`` before anything is computed. symmetric: zero point fixed
    in the middle.
    activations: None leaves them in floating point. outliers: columns in 16 bit, None for none. codebook: one of CODEBOOKS, whose levels
    the codes count, None for integers. double: scales of a codebook are doubly quantized. blocks: one of BLOCKS, whose bits, group size and
    zero points it has, see ``of_blocks``; None where scales are free.
    Raises UsageError for a width, group size or combination that does not exist: integer activations are multiplied with symmetric
    weights that have one scale a row or one in all, and only they have outliers to split off; codebooks have 4 bits and no zero points.
    """

    bits: int
    group_size: int
    symmetric: bool = True
    activations: ActivationScheme | None = None
    outliers: OutlierSplit | None = None
    codebook: str | None = None
    double: bool = False
    blocks: str | None = None

    def __post_init__(self) -> None:
        self._check_codebook()
        if self.blocks is not None:
            self._check_blocks()
            return
        if self.bits not in (SUPPORTED_BITS if self.activations is not None else (*SUPPORTED_BITS, *UNUSUAL_BITS)):
            beside = " beside 8-bit activations" if self.bits in UNUSUAL_BITS else ""
            widths = SUPPORTED_BITS if beside else tuple(sorted((*SUPPORTED_BITS, *UNUSUAL_BITS)))
            raise UsageError(f"{self.bits} bits per weight is not supported{beside}; choose one of {widths}")
        if self.group_size < WHOLE_ROW and self.group_size != AUTO_GROUP:
            raise UsageError(f"group size {self.group_size} is not valid; give a positive number, or -1 for whole rows")
        if self.activations is None:
            if self.group_size == WHOLE_MATRIX:
                raise UsageError("one scale for the whole matrix (group size 0) needs 8-bit activations; use -1 for whole rows")
            if self.outliers is not None:
                raise UsageError("outlier columns are split off from 8-bit activations; give --abits 8, or leave --outliers out")
            return
        if not self.symmetric:
            raise UsageError("8-bit activations need symmetric weights; give --sym, or --abits 16")
        if self.group_size not in (WHOLE_ROW, WHOLE_MATRIX):
            raise UsageError(f"8-bit activations need one scale for a whole row, not group size {self.group_size}; give --group-size -1")
        if self.outliers is not None and not self.activations.dynamic:
            raise UsageError("an outlier split needs activation scales computed at run time, not static ones")

    def _check_codebook(self) -> None:
        if self.codebook is None:
            if self.double:
                raise UsageError(f"scales of integers are not doubly quantized; choose one of {', '.join(CODEBOOKS)}")
            return
        if self.codebook not in CODEBOOKS:
            raise UsageError(f"codebook {self.codebook!r} is unknown; choose one of {', '.join(CODEBOOKS)}")
        if self.bits != 4 or not self.symmetric or self.activations is not None:
            raise UsageError(f"{self.codebook} has 4 bits, no zero points, and leaves activations as they are")

    def _check_blocks(self) -> None:
        if self.blocks not in BLOCKS:
            raise UsageError(f"blocks {self.blocks!r} are unknown; choose one of {', '.join(BLOCKS)}")
        if (self.bits, self.group_size, self.symmetric) != BLOCKS[self.blocks] or self.activations is not None or self.codebook is not None:
            bits, columns, _ = BLOCKS[self.blocks]
            raise UsageError(f"{self.blocks} has {bits} bits in groups of {columns} columns, and leaves activations as they are")

    @classmethod
    def of_blocks(cls, name: str) -> Scheme:
        """The scheme of the blocks ``name``, in capitals as well. Raises UsageError for others than BLOCKS and SAME_AS_BLOCKS."""
        known = name.lower()
        if known in SAME_AS_BLOCKS:
            return cls.parse(SAME_AS_BLOCKS[known])
        bits, columns, symmetric = BLOCKS.get(known, (4, 32, True))
        return cls(bits, columns, symmetric, blocks=known)

    @property
    def fitted_together(self) -> bool:
        """Whether the grids of a row, or of all, hang together, so that they are found before any code is, and none can be moved alone."""
        return self.double or self.blocks is not None

    @property
    def columns_per_block(self) -> int:
        """Columns whose grids hang together. Of a scheme of blocks only."""
        assert self.blocks is not None
        return SUPER_BLOCK if self.blocks.endswith("_k") else self.group_size

    @property
    def rows_stand_alone(self) -> bool:
        """Whether a row's grids are its own: not where rows share a scale, and not where scales are rounded together."""
        return self.group_size != WHOLE_MATRIX and not self.double

    @property
    def auto_groups(self) -> tuple[int, ...]:
        """What AUTO_GROUP can become, best first."""
        return AUTO_GROUPS if self.codebook is None else CODEBOOK_GROUPS

    @property
    def levels(self) -> int:
        """Number of codes, 2^bits."""
        return 1 << self.bits

    @property
    def middle(self) -> int:
        """The zero point of a symmetric scheme, 2^(bits-1)."""
        return 1 << (self.bits - 1)

    def resolved(self, in_features: int) -> Scheme:
        """This scheme for a linear of so many input features: AUTO_GROUP becomes the first of ``auto_groups`` that divides them.

        Raises UsageError if none does.
        """
        if self.group_size != AUTO_GROUP:
            return self
        size = next((size for size in self.auto_groups if in_features % size == 0), None)
        if size is None:
            *most, last = map(str, self.auto_groups)
            raise UsageError(f"no group of {', '.join(most)} or {last} columns divides {in_features} input features")
        return replace(self, group_size=size)

    def columns_per_group(self, in_features: int) -> int:
        """Group size with -1 and 0 resolved to the row length. Raises UsageError if it is still to be chosen."""
        if self.group_size == AUTO_GROUP:
            raise UsageError(
                f"the group size of scheme {self} depends on the linear; choose one such as {self.resolved(self.auto_groups[0])}"
            )
        return self.group_size if self.group_size > 0 else in_features

    def group_count(self, in_features: int) -> int:
        """Groups in a row of ``in_features`` columns. Raises UsageError if the group size does not divide it."""
        columns = self.columns_per_group(in_features)
        if in_features % columns:
            raise UsageError(f"group size {columns} does not divide {in_features} input features")
        if self.blocks is not None and in_features % self.columns_per_block:
            raise UsageError(f"{self} has super-blocks of {SUPER_BLOCK} columns, which do not divide {in_features} input features")
        return in_features // columns

    @property
    def element(self) -> Element:
        """What a code stands for."""
        from ptqcli.numerics.elements import CODEBOOKS, Int  # brings torch along, which a name or a request does without

        return Int(self.bits) if self.codebook is None else CODEBOOKS[self.codebook]

    def __str__(self) -> str:
        """The one name of the scheme, see the module."""
        if self.blocks is not None:
            return self.blocks
        if self.activations is None:
            group = {WHOLE_ROW: "-row", AUTO_GROUP: ""}.get(self.group_size, f"-g{self.group_size}")
            if self.codebook is not None:
                return f"{self.codebook}{group}{'-double' if self.double else ''}"
            return f"w{self.bits}a16{group}{'' if self.symmetric else '-asym'}"
        name = f"w{self.bits}a{self.activations.bits}{'-tensor' if self.group_size == WHOLE_MATRIX else ''}"
        if not self.activations.dynamic:
            name += "-static"
        elif not self.activations.per_token:
            name += "-act-tensor"
        if self.outliers is not None:
            threshold = repr(float(self.outliers.threshold)).removesuffix(".0")
            name += f"-outliers{threshold}{'' if self.outliers.dynamic else '-static'}"
        return name

    @staticmethod
    def parse(text: str) -> Scheme:
        """The scheme that ``text`` names, see the module; in capitals as well. Raises UsageError for anything else."""
        if text.strip().lower() in (*BLOCKS, *SAME_AS_BLOCKS):
            return Scheme.of_blocks(text.strip())
        found = _NAME.fullmatch(re.sub(r"^llm-int8(?=-|$)", "w8a8-outliers", text.strip().lower()))
        if found is None:
            raise UsageError(
                f"scheme {text!r} is no number format; write one such as {', '.join(EXAMPLES)}{did_you_mean(text, usual_schemes())}"
            )
        try:
            return _scheme_of(found)
        except UsageError as error:
            raise UsageError(f"scheme {text!r}: {error}") from error


def usual_schemes() -> list[str]:
    """Names that a person is likely to want, for advice and completion."""
    groups = ("g128", "g64", "g32", "row")
    weights_only = [f"w{bits}a16-{group}{zero}" for bits in SUPPORTED_BITS for group in groups for zero in ("", "-asym")]
    codebooks = [f"{name}-g64{double}" for name in CODEBOOKS for double in ("", "-double")]
    return [
        *weights_only,
        "w8a8",
        "w8a8-act-tensor",
        "w8a8-static",
        "w8a8-tensor",
        "w8a8-outliers6",
        "w8a8-outliers6-static",
        *codebooks,
        *BLOCKS,
    ]


def _scheme_of(name: re.Match[str]) -> Scheme:
    activations = None
    if name["codebook"] is not None:
        if name["scales"] or name["split"]:
            raise UsageError(f"{name['codebook']} leaves activations as they are, so nothing is said of their scales and outliers")
    elif name["abits"] != "16":
        activations = ActivationScheme(int(name["abits"]), per_token=name["scales"] is None, dynamic=name["scales"] != "static")
    elif name["scales"]:
        raise UsageError(f"activations in 16 bit have no scales; write a8, or leave -{name['scales']} out")
    whole = {"row": WHOLE_ROW, "tensor": WHOLE_MATRIX, None: AUTO_GROUP if activations is None else WHOLE_ROW}
    outliers = None
    if name["split"]:
        outliers = OutlierSplit(float(name["threshold"] or OutlierSplit.threshold), dynamic=name["fixed"] is None)
    return Scheme(
        bits=int(name["bits"] or 4),
        group_size=int(name["columns"]) if name["columns"] else whole[name["whole"]],
        symmetric=name["zero"] != "asym",
        activations=activations,
        outliers=outliers,
        codebook=name["codebook"],
        double=name["double"] is not None,
    )
