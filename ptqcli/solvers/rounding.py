"""A matrix as a function of what is learned.

All methods here share one form. A group of columns has a scale s and a zero point z, and with units u, which is what is to be rounded,

    codes = clip(round(u) + z, 0, 2^b - 1)        W' = s (codes - z)

where s and u depend on what is learned (u = w / s is rounding to nearest). round() has the gradient of the identity; the clip cuts it off
for weights beyond the range, whose gradient then goes to s alone. Scales take the dtype in which they are stored as they are computed,
as if that rounding had the gradient of the identity, too, so that what is learned is what is stored.

Anchor. Codes q of a solver, centred (q less its zero point), are a start with w replaced by s times

    q + clip(T - q, -.49, .49)        T_j = q_j + (e H)_j / (H_jj s)        e = w - s q

T is where each code would best be, the others as they are: it rounds to q, nowhere else, and those codes whose neighbours are nearly as
good are nearest to flipping. Started at q itself nothing would move before it has gone half a step.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ptqcli.numerics.ranges import SMALLEST_SCALE, RangeSearch
from ptqcli.numerics.scheme import WHOLE_MATRIX, Scheme
from ptqcli.numerics.weight import QuantizedWeight
from ptqcli.solvers import LinearTask, SolveNotes

# How far an anchor may be from its code: less than half a step, so that it rounds to it.
FARTHEST = 0.49


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where the learning of a matrix starts.

    task: the linear. weight: float32 [out, in], what is rounded: its weight, or a solver's anchor. codes: the solver's solution, None for
    rounding. signed: whether symmetric scales may have a sign. importance: [in], the mean square of each input. input_scale: of static
    activations.
    """

    task: LinearTask
    weight: Tensor
    importance: Tensor
    notes: SolveNotes
    codes: QuantizedWeight | None = None
    signed: bool = True
    input_scale: Tensor | None = None

    def grouped(self) -> Tensor:
        """The weight with its groups apart, [out, groups, columns]."""
        return self.weight.reshape(len(self.weight), self.task.scheme.group_count(self.weight.shape[1]), -1)

    def per_group(self, value: float) -> Tensor:
        """A parameter for each scale, [out, groups, 1], or [1, 1, 1] with one scale for the whole matrix."""
        out, groups = (1, 1) if self.task.scheme.group_size == WHOLE_MATRIX else self.grouped().shape[:2]
        return torch.full((out, groups, 1), value, dtype=self.weight.dtype, device=self.weight.device)

    def grid(self) -> tuple[Tensor, Tensor] | None:
        """Scale and zero point, as ``per_group`` has them, of the solver's codes or of ranges that a transform has found; or None."""
        if self.codes is not None:
            scale, zero = self.codes.scale.to(self.weight.dtype), self.codes.zero.to(self.weight.dtype)
            shape = self.per_group(0.0).shape
            return scale[: shape[0]].reshape(shape), zero[: shape[0]].reshape(shape)
        return None if self.task.ranges is None else self.fitted(self.task.ranges)

    def fitted(self, ranges: RangeSearch) -> tuple[Tensor, Tensor]:
        """The same of the grids that ``ranges`` fits."""
        grid = ranges.fit(self.grouped().flatten(0, 1), self.task.scheme, self.task.scale_dtype)
        shape = self.per_group(0.0).shape
        return grid.scale[: shape[:2].numel()].reshape(shape), grid.zero[: shape[:2].numel()].reshape(shape)


class Rounding(nn.Module):
    """One matrix. Its parameters are what is learned; ``grid`` and ``units`` say how."""

    def __init__(self, start: Start) -> None:
        super().__init__()
        self.start, self.scheme = start, start.task.scheme
        self.weight = start.grouped()

    @abstractmethod
    def grid(self) -> tuple[Tensor, Tensor]:
        """Scale, in values that are stored, and zero point of each group; they broadcast to [out, groups, 1]."""

    @abstractmethod
    def units(self, scale: Tensor) -> Tensor:
        """What is rounded, [out, groups, columns]."""

    def project(self) -> None:
        """Hold the parameters where they may be; as it stands, anywhere."""

    def forward(self) -> Tensor:
        """W', float32 [out, in]."""
        scale, zero = self.grid()
        return ((self._codes(scale, zero) - zero) * scale).reshape(self.start.weight.shape)

    def _codes(self, scale: Tensor, zero: Tensor) -> Tensor:
        return (through(self.units(scale), torch.round) + zero).clamp(0, self.scheme.levels - 1)

    def stored(self, weight: Tensor) -> Tensor:
        """W' as a reader sees it: a weight-only layer rounds it to the dtype of its scales, one with 8-bit activations multiplies codes."""
        return weight if self.scheme.activations is not None else weight.to(self.start.task.scale_dtype)

    @torch.no_grad()
    def quantized(self) -> QuantizedWeight:
        """The codes as they are now."""
        scale, zero = self.grid()
        shape = self.weight.shape[:2]
        return QuantizedWeight(
            codes=self._codes(scale, zero).to(torch.uint8).reshape(self.start.weight.shape),
            scale=scale.squeeze(-1).expand(shape).to(self.start.task.scale_dtype).contiguous(),
            zero=zero.squeeze(-1).expand(shape).to(torch.uint8).contiguous(),
            scheme=self.scheme,
            input_scale=self.start.input_scale,
        )

    def storable(self, scale: Tensor) -> Tensor:
        """``scale``, of either sign, as the dtype of the file holds it: neither 0 nor infinite."""
        dtype = self.start.task.scale_dtype
        limits = torch.finfo(dtype)

        def held(exact: Tensor) -> Tensor:
            magnitude = exact.abs().clamp(SMALLEST_SCALE.get(dtype, limits.tiny), limits.max).to(dtype).to(exact.dtype)
            return torch.where(exact < 0, -magnitude, magnitude)

        return through(scale, held)

    def middle(self) -> Tensor:
        """The zero point of a symmetric scheme."""
        return torch.full_like(self.start.per_group(0.0), float(self.scheme.middle))


def through(values: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """``function(values)``, whose gradient is taken to be that of the identity."""
    return values + (function(values.detach()) - values.detach())


def range_of(groups: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Lowest and highest of each group of ``groups`` [out, groups, columns], zero among them; [out, groups, 1], or [1, 1, 1] for all."""
    low, high = groups.amin(dim=-1, keepdim=True).clamp(max=0), groups.amax(dim=-1, keepdim=True).clamp(min=0)
    if scheme.group_size == WHOLE_MATRIX:
        return low.amin().reshape(1, 1, 1), high.amax().reshape(1, 1, 1)
    return low, high


def symmetric_scale(start: Start, low: Tensor, high: Tensor) -> Tensor:
    """The scale of a symmetric scheme whose range ends at ``low <= 0`` and ``high >= 0``, 1 for no range.

    Signed: the end of larger magnitude has the code -2^(b-1). Unsigned: both ends lie half a step beyond the outermost codes.
    """
    scheme = start.task.scheme
    if not start.signed:
        return _not_zero(torch.maximum(-low, high) * 2 / (scheme.levels - 1))
    return _not_zero(torch.where(-low > high, -low, -high) / scheme.middle)


def range_grid(rounding: Rounding, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point with which a matrix reaches from ``low <= 0`` to ``high >= 0``.

    Symmetric: ``symmetric_scale``. Asymmetric: ``s = (high - low) / (2^b - 1)``, ``z = round(-low / s)``.
    """
    if rounding.scheme.symmetric:
        return rounding.storable(symmetric_scale(rounding.start, low, high)), rounding.middle()
    most = rounding.scheme.levels - 1
    scale = rounding.storable(_not_zero((high - low) / most))
    return scale, through(-low / scale, torch.round).clamp(0, most)


def _not_zero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def centred(weight: Tensor, codes: QuantizedWeight, hessian: Tensor, damp: float) -> Tensor:
    """The anchor of a solver's ``codes`` of ``weight`` [out, in], see the module; hessian: of the inputs, [in, in], undamped."""
    groups = codes.scale.shape[1]
    scale = codes.scale.to(weight.dtype).repeat_interleave(weight.shape[1] // groups, dim=1)
    zero = codes.zero.to(weight.dtype).repeat_interleave(weight.shape[1] // groups, dim=1)
    q = codes.codes.to(weight.dtype) - zero
    error = weight - scale * q
    ridge = damp * hessian.diagonal().mean()
    diagonal = hessian.diagonal() + ridge
    gain = (error @ hessian + ridge * error) / torch.where(diagonal > 0, diagonal, torch.ones_like(diagonal))
    return scale * (q + (gain / scale).clamp(-FARTHEST, FARTHEST))


def zero_groups(weight: Tensor, scheme: Scheme) -> int:
    """Groups of a row whose weights are all zero."""
    rows = weight.reshape(len(weight), scheme.group_count(weight.shape[1]), -1)
    return int((rows == 0).all(dim=2).sum())
