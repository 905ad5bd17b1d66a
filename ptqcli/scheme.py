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

from dataclasses import dataclass

import torch
from torch import Tensor

from ptqcli.errors import UsageError

SUPPORTED_BITS = (2, 3, 4, 8)
WHOLE_ROW = -1  # group sizes that are no number of columns
WHOLE_MATRIX = 0

# Candidate shrink factors of the squared-error search. Below 0.35 no group of a trained model won at 2 bits, the width
# that clips hardest, so the grid stops there.
SHRINK_FACTORS = tuple(1.0 - 0.05 * step for step in range(14))

# float16 ends its normal numbers at 6e-5, above the scales of real 8-bit groups. 2^-20 still has 4 bits of mantissa there, and codes are
# chosen for the rounded scale anyway. The other dtypes have no scale to lose: their normal numbers end at 1e-38.
SMALLEST_SCALE = {torch.float16: 2.0**-20}


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


@dataclass(frozen=True)
class OutlierColumns:
    """Columns of a matrix in 16 bit. index: int32 [k], rising, without repetition. weight: floating [out, k], the original values."""

    index: Tensor
    weight: Tensor

    def to(self, device: torch.device) -> OutlierColumns:
        """The same columns on ``device``."""
        return OutlierColumns(self.index.to(device), self.weight.to(device))


@dataclass(frozen=True)
class QuantizedWeight:
    """Integer codes of one matrix with what is needed to read them.

    codes: uint8 [out, in], each below 2^bits. scale: floating [out, groups], in the stored dtype. zero: uint8 [out, groups]; with one scale
    for the whole matrix both are [out, 1] and all rows are equal.
    g_idx: int32 [in], the group of each column, or None when the groups are neighbouring columns.
    input_scale: floating [1], of static activations. outliers: columns kept in 16 bit, where the scheme splits; in a static split their
    codes are the zero point, in a dynamic one they are codes like all others, for inputs that stay below the threshold.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    scheme: Scheme
    g_idx: Tensor | None = None
    input_scale: Tensor | None = None
    outliers: OutlierColumns | None = None

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """``(codes - zero) * scale`` as [out, in], computed in float32 and rounded once to ``dtype`` (default: the scale's).

        Columns that are kept in 16 bit have their 16-bit values.
        """
        _out, columns = self.codes.shape
        index = self.g_idx.long() if self.g_idx is not None else _neighbour_groups(columns, self.scale.shape[1], self.codes.device)
        centred = self.codes.float() - self.zero.float()[:, index]
        values = (centred * self.scale.float()[:, index]).to(dtype or self.scale.dtype)
        if self.outliers is not None:
            values[:, self.outliers.index.long()] = self.outliers.weight.to(values.dtype)
        return values

    def to(self, device: torch.device) -> QuantizedWeight:
        """The same weight on ``device``."""
        return QuantizedWeight(
            codes=self.codes.to(device),
            scale=self.scale.to(device),
            zero=self.zero.to(device),
            scheme=self.scheme,
            g_idx=None if self.g_idx is None else self.g_idx.to(device),
            input_scale=None if self.input_scale is None else self.input_scale.to(device),
            outliers=None if self.outliers is None else self.outliers.to(device),
        )


def _neighbour_groups(columns: int, groups: int, device: torch.device) -> Tensor:
    return torch.arange(columns, device=device) // (columns // groups)


@dataclass(frozen=True)
class GroupGrid:
    """Scale and zero point of one group for each row.

    scale: [rows, 1] with values that the stored dtype holds exactly; zero: [rows, 1] with integer values; both in the dtype of the weights.
    """

    scale: Tensor
    zero: Tensor


def fit(weights: Tensor, scheme: Scheme, scale_dtype: torch.dtype, search: str = "minmax", limit: Tensor | None = None) -> GroupGrid:
    """Scale and zero point for each row of ``weights``, float32 or float64 [rows, columns of one group].

    ``minmax``: symmetric ``2 * absmax / (2^b - 1)``; asymmetric ``(max - min) / (2^b - 1)`` over a range that includes zero, so that
    zero stays exact. ``mse``: the range is shrunk by each of SHRINK_FACTORS and the one with the least summed squared error is kept.
    A row of zeros gets scale 1. The scale is rounded to ``scale_dtype``; one too small or too large for it is held at the smallest or
    largest that it can hold (see SMALLEST_SCALE). limit, [rows, 1]: the largest magnitude that the range may reach, found by a search of
    its own (AWQ's clipping); then nothing more is searched here. With one scale for the whole matrix all rows get the same.
    """
    if scheme.group_size == WHOLE_MATRIX and len(weights) > 1:
        whole = None if limit is None else limit.amax().reshape(1, 1)
        grid = fit(weights.reshape(1, -1), scheme, scale_dtype, search, whole)
        return GroupGrid(grid.scale.expand(len(weights), 1).clone(), grid.zero.expand(len(weights), 1).clone())
    if search not in ("minmax", "mse"):
        raise UsageError(f"scale search '{search}' is unknown; use minmax or mse")
    low = weights.amin(dim=1, keepdim=True).clamp(max=0)
    high = weights.amax(dim=1, keepdim=True).clamp(min=0)
    if limit is not None:
        low, high = torch.maximum(low, -limit), torch.minimum(high, limit)
    if scheme.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    best = _grid(low, high, scheme, scale_dtype)
    if search == "minmax" or limit is not None:
        return best
    best_error = _squared_error(weights, best, scheme)
    scale, zero = best.scale, best.zero
    for factor in SHRINK_FACTORS[1:]:
        candidate = _grid(low * factor, high * factor, scheme, scale_dtype)
        error = _squared_error(weights, candidate, scheme)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        scale = torch.where(better, candidate.scale, scale)
        zero = torch.where(better, candidate.zero, zero)
    return GroupGrid(scale, zero)


def _grid(low: Tensor, high: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> GroupGrid:
    steps = scheme.levels - 1
    scale = (high - low) / steps
    limits = torch.finfo(scale_dtype)
    smallest = SMALLEST_SCALE.get(scale_dtype, limits.tiny)
    scale = torch.where(scale > 0, scale.clamp(smallest, limits.max), torch.ones_like(scale))
    scale = scale.to(scale_dtype).to(low.dtype)
    if scheme.symmetric:
        return GroupGrid(scale, torch.full_like(scale, scheme.middle))
    return GroupGrid(scale, torch.round(-low / scale).clamp(0, steps))


def _squared_error(weights: Tensor, grid: GroupGrid, scheme: Scheme) -> Tensor:
    codes = encode(weights, grid, scheme)
    return ((codes - grid.zero) * grid.scale - weights).square().sum(dim=1, keepdim=True)


def encode(weights: Tensor, grid: GroupGrid, scheme: Scheme) -> Tensor:
    """Nearest codes of ``weights`` [rows, columns] on the grid, as integers in [0, 2^bits) in the dtype of the weights."""
    return torch.round(weights / grid.scale + grid.zero).clamp_(0, scheme.levels - 1)


def round_to_nearest(
    weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype, search: str = "minmax", limit: Tensor | None = None
) -> QuantizedWeight:
    """Every weight of a floating [out, in] as the nearest code of its group's grid. limit: [out, groups], as in ``fit``.

    Raises UsageError if the group size does not divide ``in``.
    """
    out_features, in_features = weight.shape
    groups = scheme.group_count(in_features)
    rows = weight.reshape(out_features * groups, -1)  # [out * groups, columns of a group]
    grid = fit(rows, scheme, scale_dtype, search, None if limit is None else limit.reshape(-1, 1))
    return QuantizedWeight(
        codes=encode(rows, grid, scheme).to(torch.uint8).reshape(out_features, in_features),
        scale=grid.scale.to(scale_dtype).reshape(out_features, groups),
        zero=grid.zero.to(torch.uint8).reshape(out_features, groups),
        scheme=scheme,
    )


def activation_scale(inputs: Tensor, scheme: ActivationScheme) -> Tensor:
    """Dynamic scale of ``inputs``, float [..., in]: [..., 1] per token, [1] per tensor. What is zero throughout gets scale 1."""
    largest = inputs.abs().amax(dim=-1, keepdim=True) if scheme.per_token else inputs.abs().amax().reshape(1)
    return torch.where(largest > 0, largest / ((2**scheme.bits - 1) / 2), torch.ones_like(largest))


def round_activations(inputs: Tensor, scheme: ActivationScheme, static_scale: Tensor | None = None) -> Tensor:
    """``inputs``, float [..., in], as a layer with 8-bit activations sees them: quantized and read back.

    static_scale: [1], for static activations, which have no scale of their own.
    """
    scale = activation_scale(inputs, scheme) if scheme.dynamic else static_scale
    assert scale is not None
    middle = 1 << (scheme.bits - 1)
    return torch.round(inputs / scale).clamp_(-middle, middle - 1) * scale
