"""Grids of K-quants for given weights: d, dmin and the whole numbers that multiply them, with small weighted squared error.

    1. each sub-block by itself: step and offset that need not be on any grid (``block_fit``)
    2. d: of some candidates near max step / largest s the one with which rounded steps leave the least error; dmin likewise, given those
    3. some rounds of: nearest codes; s and m among their neighbours; d and dmin by least squares. What does not lower the error of a
       super-block is dropped.

Steps 2 and 3 compare errors by the sums over a sub-block, in which E is quadratic, so that they cost little beside the codes. ggml's own
quantizers stop after one rounding (``quantize_row_q4_K_impl``).

No step is 0: a solver divides by it, and the smallest one beside it loses nothing, since the code that stands for 0, or for the minimum, is
the same. A super-block of zeros gets d = 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptqcli.numerics.block_fit import Sums, fit_range, fit_scale, in_groups, row_chunks, to_fp16
from ptqcli.numerics.k_quants import KType, SuperBlocks
from ptqcli.numerics.scheme import SUPER_BLOCK

ROUNDS = 3
CANDIDATES = 16
SPREAD = 0.25  # of the largest whole number: how far candidates for d reach


def fit_k(weight: Tensor, kind: KType, importance: Tensor | None = None) -> SuperBlocks:
    """Super-blocks for ``weight``, float32 [out, in], with the nearest codes. The same on every machine that rounds alike.

    importance: of each column, positive, float32 [in], such as the diagonal of a Hessian; None: all are alike. Raises ValueError if
    super-blocks do not divide ``in``.
    """
    if weight.shape[1] % SUPER_BLOCK:
        raise ValueError(f"super-blocks of {SUPER_BLOCK} do not divide rows of {weight.shape[1]}")
    parts = [_Fit(rows, kind, importance).run() for rows in row_chunks(weight)]
    return SuperBlocks(
        kind=kind,
        codes=torch.cat([part.codes for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        d=torch.cat([part.d for part in parts]),
        mins=None if kind.middle is not None else torch.cat([part.mins for part in parts if part.mins is not None]),
        dmin=None if kind.middle is not None else torch.cat([part.dmin for part in parts if part.dmin is not None]),
    )


class _Fit:
    """The fit of some rows. weights: [out, blocks, sub-blocks, columns]. s, m: [out, blocks, sub-blocks]; d, e (dmin): [out, blocks, 1].
    All float32; with a middle, m and e stay 0 and codes count from it."""

    def __init__(self, rows: Tensor, kind: KType, importance: Tensor | None) -> None:
        self.kind, self.shape = kind, rows.shape
        self.weights, self.importance = in_groups(rows, importance, kind.sub_blocks, kind.columns)
        middle = kind.middle or 0
        self.lowest, self.highest = -middle, kind.levels - 1 - middle
        self.fewest, self.most = kind.scales

    def run(self) -> SuperBlocks:
        """All three steps."""
        sums, step = self._free()
        d, s = self._round_steps(sums, step)
        e, m = self._round_offsets(sums, d * s)
        best = self._settled(d, s, e, m)
        for _ in range(ROUNDS):
            d, s, e, m, codes, error = best
            sums = Sums.of(self.weights, self.importance, codes)
            s, m = self._neighbours(sums, d, s, e, m)
            d, e = self._least_squares(sums, s, m, d, e)
            tried = self._settled(d, s, e, m)
            better = tried[-1] < error
            best = tuple(torch.where(_wide(better, old), new, old) for new, old in zip(tried, best, strict=True))
        return self._blocks(*best[:5])

    # Step 1

    def _free(self) -> tuple[Sums, Tensor]:
        """The step of each sub-block by itself, and the sums with the codes that belong to it."""
        if self.kind.middle is not None:
            step = fit_scale(self.weights, self.importance, self.kind.bits)
            offset = torch.zeros_like(step)
        else:
            step, offset = fit_range(self.weights, self.importance, self.kind.bits, highest=0.0)
        return Sums.of(self.weights, self.importance, self._codes(step, offset)), step

    def _codes(self, step: Tensor, offset: Tensor) -> Tensor:
        units = (self.weights - offset[..., None]) / torch.where(step == 0, 1, step)[..., None]
        return units.round_().clamp_(self.lowest, self.highest)

    # Step 2

    def _whole(self, step: Tensor, d: Tensor) -> Tensor:
        """``step / d`` as a scale that is not 0."""
        s = (step / d).round().clamp(self.fewest, self.most)
        return torch.where(s == 0, torch.where(step * d < 0, -1.0, 1.0) if self.fewest < 0 else 1.0, s)

    def _round_steps(self, sums: Sums, step: Tensor) -> tuple[Tensor, Tensor]:
        """d and s for ``step``."""
        extreme = step.gather(-1, step.abs().argmax(-1, keepdim=True))
        ends = (self.fewest, self.most) if self.fewest < 0 else (self.most,)
        best, best_s = torch.ones_like(extreme), torch.ones_like(step)
        best_error = torch.full_like(extreme, torch.inf)
        for end in ends:
            for candidate in range(CANDIDATES):
                d = to_fp16(extreme / (end * (1 - SPREAD * candidate / CANDIDATES)))
                s = self._whole(step, torch.where(d == 0, 1, d))
                offset = self._best_offset(sums, d * s)
                error = sums.error(d * s, offset).sum(-1, keepdim=True)
                better = (error < best_error) & (d != 0)
                best, best_s = torch.where(better, d, best), torch.where(better, s, best_s)
                best_error = torch.where(better, error, best_error)
        return best, best_s

    def _best_offset(self, sums: Sums, step: Tensor) -> Tensor:
        return torch.zeros_like(step) if self.kind.middle is not None else sums.best_offset(step).clamp(max=0)

    def _round_offsets(self, sums: Sums, step: Tensor) -> tuple[Tensor, Tensor]:
        """dmin and m for steps that stand."""
        offset = -self._best_offset(sums, step)
        largest = offset.amax(-1, keepdim=True)
        best, best_m = torch.zeros_like(largest), torch.zeros_like(offset)
        if self.kind.middle is not None:
            return best, best_m
        best_error = sums.error(step, best_m).sum(-1, keepdim=True)
        for candidate in range(CANDIDATES):
            e = to_fp16(largest / (self.most * (1 - SPREAD * candidate / CANDIDATES)))
            m = (offset / torch.where(e == 0, 1, e)).round().clamp(0, self.most)
            error = sums.error(step, -e * m).sum(-1, keepdim=True)
            better = error < best_error
            best, best_m, best_error = torch.where(better, e, best), torch.where(better, m, best_m), torch.where(better, error, best_error)
        return best, best_m

    # Step 3

    def _settled(self, d: Tensor, s: Tensor, e: Tensor, m: Tensor) -> tuple[Tensor, ...]:
        """The grid with its nearest codes and their error, [out, blocks, 1]."""
        step, offset = d * s, -e * m
        codes = self._codes(step, offset)
        miss = codes * step[..., None] + offset[..., None] - self.weights
        return d, s, e, m, codes, (self.importance * miss.square()).sum((-2, -1))[..., None]

    def _neighbours(self, sums: Sums, d: Tensor, s: Tensor, e: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        """Of s - 1, s and s + 1, each with the m that goes with it, what leaves the least error for these codes."""
        best_s, best_m, best_error = s, m, sums.error(d * s, -e * m)
        for change in (-1, 0, 1):
            near = (s + change).clamp(self.fewest, self.most)
            near = torch.where(near == 0, s, near)
            low = (-self._best_offset(sums, d * near) / torch.where(e == 0, 1, e)).round().clamp(0, self.most)
            low = torch.where(e == 0, 0, low)
            error = sums.error(d * near, -e * low)
            better = error < best_error
            best_s, best_m = torch.where(better, near, best_s), torch.where(better, low, best_m)
            best_error = torch.where(better, error, best_error)
        return best_s, best_m

    def _least_squares(self, sums: Sums, s: Tensor, m: Tensor, d: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """d and dmin of least error for these s, m and codes, rounded; as they were where there is no such pair.

        | sum s^2 hq^2   -sum s m hq |  | d |     |  sum s hxq |
        | -sum s m hq     sum m^2 h  |  | e |  =  | -sum m hx  |
        """
        p, q, r = ((part).sum(-1, keepdim=True) for part in (s * s * sums.hqq, s * m * sums.hq, m * m * sums.h))
        u, v = (s * sums.hxq).sum(-1, keepdim=True), (m * sums.hx).sum(-1, keepdim=True)
        if self.kind.middle is not None:
            return self._if_usable(u / p, d), e
        determinant = p * r - q * q
        solved = determinant > 1e-6 * p * r
        new_d = torch.where(solved, (u * r - q * v) / determinant, u / p)
        new_e = torch.where(solved, (q * u - p * v) / determinant, e)
        usable = (new_d > 0) & (new_e >= 0)
        return torch.where(usable, self._if_usable(new_d, d), d), torch.where(usable, self._if_usable(new_e, e), e)

    @staticmethod
    def _if_usable(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(torch.isfinite(new) & (new != 0), to_fp16(torch.nan_to_num(new)), old)

    def _blocks(self, d: Tensor, s: Tensor, e: Tensor, m: Tensor, codes: Tensor) -> SuperBlocks:
        plain = self.kind.middle is None
        return SuperBlocks(
            kind=self.kind,
            codes=(codes - self.lowest).to(torch.uint8).flatten(2),
            scales=s.short(),
            d=d[..., 0].half(),
            mins=m.short() if plain else None,
            dmin=e[..., 0].half() if plain else None,
        )


def _wide(condition: Tensor, like: Tensor) -> Tensor:
    """``condition`` [out, blocks, 1] with as many dimensions as ``like``."""
    return condition.reshape(*condition.shape, *[1] * (like.dim() - condition.dim()))
