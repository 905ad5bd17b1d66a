"""Grids of blocks of GGUF files for given weights: the search for scale and offset that leave the least weighted squared error.

For a group x with importances h, find s and b with small

    E = sum h (x - s q - b)^2        q = clamp(round((x - b) / s))

Each candidate range gives codes q; for given codes E is quadratic, and its least is at the solution of

    | sum h q^2   sum h q |  | s |     | sum h x q |
    | sum h q     sum h   |  | b |  =  | sum h x   |        (least squares; b = 0 in symmetric types)

The best of the candidates after that step wins, as in the searches of ggml (``make_qx_quants``, ``make_qkx2_quants``), whose importances
are made of the weights themselves where none are given, while here every weight then counts the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from ptqcli.numerics.elements import Int

QUARTERS = range(-1, 6)  # by how many quarters of a step an end of the range is drawn in
# Of both ends; the last finds weights again that lie on a grid of one bit less, whose 2^(b-1) values are two steps apart.
PAIRS = (*product(QUARTERS, QUARTERS), (0, -4))
MOST_NUMBERS = 1 << 21  # that are worked on at once
SMALLEST = 2.0**-24  # positive number of fp16
LARGEST = 65504.0


@dataclass(frozen=True)
class Sums:
    """Of a group with codes q, by which E is known for every s and b; each [...]: of h, h q, h q^2, h x, h x q, h x^2."""

    h: Tensor
    hq: Tensor
    hqq: Tensor
    hx: Tensor
    hxq: Tensor
    hxx: Tensor

    @classmethod
    def of(cls, weights: Tensor, importance: Tensor, codes: Tensor) -> Sums:
        """Of ``weights`` [..., columns]; the other two broadcast to them."""
        weighted, hq = importance * weights, importance * codes
        h = importance.expand_as(weights).sum(-1)
        return cls(h, hq.sum(-1), (hq * codes).sum(-1), weighted.sum(-1), (weighted * codes).sum(-1), (weighted * weights).sum(-1))

    def error(self, scale: Tensor, offset: Tensor) -> Tensor:
        """E of ``scale`` and ``offset``."""
        quadratic = scale * (scale * self.hqq + 2 * offset * self.hq) + offset.square() * self.h
        return quadratic - 2 * (scale * self.hxq + offset * self.hx) + self.hxx

    def best_scale(self) -> Tensor:
        """The scale of least E without offset, 0 where all codes are."""
        return torch.where(self.hqq > 0, self.hxq / self.hqq, 0)

    def best_offset(self, scale: Tensor) -> Tensor:
        """The offset of least E for ``scale``."""
        return (self.hx - scale * self.hq) / self.h

    def best_pair(self, highest: float) -> tuple[Tensor, Tensor]:
        """Scale and offset, at most ``highest``, of least E. The scale is 0 where codes tell nothing of it."""
        determinant = self.hqq * self.h - self.hq.square()
        known = determinant > 1e-6 * self.hqq * self.h
        scale = torch.where(known, (self.hxq * self.h - self.hx * self.hq) / determinant, 0)
        offset = self.best_offset(scale)
        bound = offset > highest
        scale = torch.where(bound, (self.hxq - highest * self.hq) / self.hqq, scale)
        return torch.where(torch.isfinite(scale), scale, 0), offset.clamp(max=highest)


def fit_scale(weights: Tensor, importance: Tensor, bits: int) -> Tensor:
    """The signed scale of each group for codes -2^(bits-1) to 2^(bits-1) - 1: float32 [..., columns] -> [...]. 0 for a group of zeros."""
    lowest, highest = Int(bits).ends
    extreme = weights.gather(-1, weights.abs().argmax(-1, keepdim=True))  # [..., 1]
    best = best_error = torch.full_like(extreme[..., 0], torch.inf)
    for end in (lowest, highest):  # the code that the extreme weight gets
        for quarters in QUARTERS:
            scale = extreme / (end + (quarters / 4 if end > 0 else -quarters / 4))
            scale = torch.where(scale == 0, 1, scale)
            codes = (weights / scale).round_().clamp_(lowest, highest)
            sums = Sums.of(weights, importance, codes)
            fitted = sums.best_scale()
            error = sums.hxx - fitted * sums.hxq
            better = error < best_error
            best, best_error = torch.where(better, fitted, best), torch.where(better, error, best_error)
    return best


def fit_range(weights: Tensor, importance: Tensor, bits: int, highest: float) -> tuple[Tensor, Tensor]:
    """Scale and offset of each group for codes 0 to 2^bits - 1: float32 [..., columns] -> [...] each.

    highest: of an offset; 0 where code 0 cannot stand above zero, otherwise infinity. The scale is positive; 0 where all weights are one.
    """
    low = weights.amin(-1, keepdim=True).clamp(max=highest)
    width = weights.amax(-1, keepdim=True) - low
    steps = (1 << bits) - 1
    best, best_offset = width[..., 0] / steps, low[..., 0]
    best_error = torch.full_like(best, torch.inf)
    for below, above in PAIRS:
        scale = width / (steps + (below + above) / 4)
        start = low + scale * (below / 4)
        codes = ((weights - start) / torch.where(scale == 0, 1, scale)).round_().clamp_(0, steps)
        sums = Sums.of(weights, importance, codes)
        fitted, offset = sums.best_pair(highest)
        error = sums.error(fitted, offset)
        better = (error < best_error) & (fitted > 0)
        best, best_offset = torch.where(better, fitted, best), torch.where(better, offset, best_offset)
        best_error = torch.where(better, error, best_error)
    return best, best_offset


def to_fp16(numbers: Tensor) -> Tensor:
    """``numbers``, float32, rounded to what fp16 holds; those that are not 0 stay so."""
    magnitude = numbers.abs().clamp(SMALLEST, LARGEST)
    return torch.where(numbers == 0, numbers, magnitude.copysign(numbers)).half().float()


def fit_legacy(weight: Tensor, bits: int, columns: int, with_minimum: bool, importance: Tensor | None = None) -> tuple[Tensor, ...]:
    """Codes and grids of blocks with one scale, d, and where there is one a minimum, m.

    weight: float32 [out, in]. importance: of each column, positive, float32 [in]; None: all are alike.
    Returns codes uint8 [out, in / columns, columns], d and, with a minimum, m float16 [out, in / columns]: a weight is d q + m, or
    d (q - 2^(bits-1)).
    """
    parts = [_legacy_rows(rows, bits, columns, with_minimum, importance) for rows in row_chunks(weight)]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def row_chunks(weight: Tensor) -> tuple[Tensor, ...]:
    """Rows of ``weight`` in pieces of at most MOST_NUMBERS, as float32."""
    return weight.float().split(max(1, MOST_NUMBERS // weight.shape[1]))


def in_groups(rows: Tensor, importance: Tensor | None, *groups: int) -> tuple[Tensor, Tensor]:
    """``rows`` [out, in] as [out, -1, *groups], and the importance of its columns as what broadcasts to that."""
    shape = (-1, *groups)
    if importance is None:
        return rows.unflatten(1, shape), rows.new_ones((1,) * (2 + len(groups)))
    return rows.unflatten(1, shape), importance.float().to(rows.device).reshape(1, *shape)


def _legacy_rows(rows: Tensor, bits: int, columns: int, with_minimum: bool, importance: Tensor | None) -> tuple[Tensor, ...]:
    weights, important = in_groups(rows, importance, columns)
    if not with_minimum:
        d = to_fp16(fit_scale(weights, important, bits))
        units = weights / torch.where(d == 0, 1, d)[..., None]
        lowest, highest = Int(bits).ends
        return (units.round().clamp(lowest, highest) - lowest).to(torch.uint8), d.half()
    d, m = (to_fp16(part) for part in fit_range(weights, important, bits, torch.inf))
    units = (weights - m[..., None]) / torch.where(d == 0, 1, d)[..., None]
    return units.round().clamp(0, (1 << bits) - 1).to(torch.uint8), d.half(), m.half()
