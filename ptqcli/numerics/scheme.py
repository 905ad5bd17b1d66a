"""What the numbers are: bits, groups and zero points, and the arithmetic between weights and codes.

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
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ptqcli.errors import UsageError

SUPPORTED_BITS = (2, 3, 4, 8)

WHOLE_ROW = -1  # group sizes that are no number of columns

WHOLE_MATRIX = 0


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

    def describe(self) -> str:
        """Short name: ``token``, ``tensor`` (dynamic both), or ``static``."""
        if not self.dynamic:
            return "static"
        return "token" if self.per_token else "tensor"


@dataclass(frozen=True)
class OutlierSplit:
    """Input columns that are multiplied in 16 bit: those with a magnitude above ``threshold``.

    dynamic: found anew whenever the layer runs, as in the paper, otherwise fixed by calibration. Raises UsageError for a threshold that
    is not a positive number.
    """

    threshold: float = 6.0
    dynamic: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.threshold < float("inf"):
            raise UsageError(f"outlier threshold {self.threshold} is not valid; give a positive number (the paper's is 6.0)")

    def describe(self) -> str:
        """Short name, such as ``outliers>6 static``."""
        return f"outliers>{self.threshold:g}{'' if self.dynamic else ' static'}"


@dataclass(frozen=True)
class Scheme:
    """Number format of one linear.

    bits: code width, one of 2, 3, 4, 8. group_size: columns per scale, -1 for the whole row, 0 for the whole matrix. symmetric: zero point
    fixed in the middle. activations: None leaves them in floating point. outliers: columns in 16 bit, None for none.
    Raises UsageError for a width, group size or combination that does not exist: integer activations are multiplied with symmetric
    weights that have one scale a row or one in all, and only they have outliers to split off.
    """

    bits: int
    group_size: int
    symmetric: bool = True
    activations: ActivationScheme | None = None
    outliers: OutlierSplit | None = None

    def __post_init__(self) -> None:
        if self.bits not in SUPPORTED_BITS:
            raise UsageError(f"{self.bits} bits per weight is not supported; choose one of {SUPPORTED_BITS}")
        if self.group_size < WHOLE_ROW:
            raise UsageError(f"group size {self.group_size} is not valid; give a positive number, or -1 for whole rows")
        if self.activations is None:
            if self.group_size == WHOLE_MATRIX:
                raise UsageError("one scale for the whole matrix (group size 0) needs 8-bit activations; use -1 for whole rows")
            if self.outliers is not None:
                raise UsageError("outlier columns are split off from 8-bit activations; give --abits 8, or leave --outliers out")
            return
        if not self.symmetric:
            raise UsageError("8-bit activations need symmetric weights; give --sym, or --abits 16")
        if self.group_size > 0:
            raise UsageError(f"8-bit activations need one scale for a whole row, not group size {self.group_size}; give --group-size -1")
        if self.outliers is not None and not self.activations.dynamic:
            raise UsageError("an outlier split needs activation scales computed at run time, not static ones")

    @property
    def levels(self) -> int:
        """Number of codes, 2^bits."""
        return 1 << self.bits

    @property
    def middle(self) -> int:
        """The zero point of a symmetric scheme, 2^(bits-1)."""
        return 1 << (self.bits - 1)

    def columns_per_group(self, in_features: int) -> int:
        """Group size with -1 and 0 resolved to the row length."""
        return self.group_size if self.group_size > 0 else in_features

    def group_count(self, in_features: int) -> int:
        """Groups in a row of ``in_features`` columns. Raises UsageError if the group size does not divide it."""
        columns = self.columns_per_group(in_features)
        if in_features % columns:
            raise UsageError(f"group size {columns} does not divide {in_features} input features")
        return in_features // columns

    def describe(self) -> str:
        """Short name for tables, such as ``W4 g128 sym`` or ``W8A8 per row, token``."""
        group = {WHOLE_ROW: "per row", WHOLE_MATRIX: "per tensor"}.get(self.group_size, f"g{self.group_size}")
        if self.activations is None:
            return f"W{self.bits} {group} {'sym' if self.symmetric else 'asym'}"
        split = f", {self.outliers.describe()}" if self.outliers else ""
        return f"W{self.bits}A{self.activations.bits} {group}, {self.activations.describe()}{split}"


def parse_scheme(text: str) -> Scheme:
    """The number format that ``text`` names: ``llm-int8[-static]``, or

        w<bits>a16[-g<columns>|-row][-asym]         weights only; groups of 128 columns where it does not say
        w<bits>a8[-row|-tensor][-static]            8-bit activations, one scale a token, or one for all fixed beforehand

    Raises UsageError for anything else.
    """
    name = text.strip().lower()
    if split := re.fullmatch(r"llm-int8(-static)?", name):
        return Scheme(8, WHOLE_ROW, True, ActivationScheme(), OutlierSplit(dynamic=split[1] is None))
    if weights := re.fullmatch(r"w(\d+)a16(?:-g([1-9]\d*)|(-row))?(-asym)?", name):
        group = WHOLE_ROW if weights[3] else int(weights[2] or 128)
        return Scheme(int(weights[1]), group, symmetric=weights[4] is None)
    if integers := re.fullmatch(r"w(\d+)a8(?:-row|(-tensor))?(-static)?", name):
        activations = ActivationScheme(per_token=False, dynamic=False) if integers[3] else ActivationScheme()
        return Scheme(int(integers[1]), WHOLE_MATRIX if integers[2] else WHOLE_ROW, True, activations)
    raise UsageError(f"scheme '{text}' is unknown; write one such as w4a16, w4a16-g64-asym, w8a8 or llm-int8")
