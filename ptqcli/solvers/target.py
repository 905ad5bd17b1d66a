"""The original's output as the target: codes that answer to what a linear gave in the original model, on what it gets in this one.

When a linear's turn comes, the linears before it have codes already, so its inputs x are not the inputs f that it has in the original
model. ``|(W - Q) x|`` asks the codes to repeat what W makes of the wrong input; what is wanted is W f. For a linear that writes into the
residual stream r the stream itself has drifted by then, and what is wanted of r + Q x is r_f + W f, with d = r_f - r:

    min_Q  sum_t |W f + d - Q x|^2  =  tr((W* - Q) H (W* - Q)^T) + const,       H = sum x x^T,   C = sum f x^T,   D = sum d x^T
    W* = (W C + D) H^-1

so every solver, OBQ as well as GPTQ, meets the target by solving for W* in place of W. As both corrections are fitted to the calibration
tokens, H is damped, which draws W* back to W, and shares of them can be taken:

    W* = W + alpha W (C - H) (H + lambda I)^-1 + beta D (H + lambda I)^-1,      lambda = damp * mean diag H

Where alpha or beta is "auto" they are those of 0 .. 1 with the least error ``sum |W f + d - W* x|^2`` on held-out windows, W* being made
from the others; the error is a quadratic function of the two, so they are found in closed form, for each linear. W* is then made anew
from all windows. A linear that does not write into the stream has no beta (and d = 0).

Relatives. Qronos (Zhang et al. 2025, arXiv 2505.11695) quantizes the first column against this target with the other columns held at W,
and then solves for the rest as above: only its first column differs. GPTAQ (Li et al. 2025, arXiv 2504.02692) adds a term
``alpha w_j P`` with the already compensated weight w_j in place of the original's, column by column within GPTQ. ResComp (2026, arXiv
2604.07955) adds the part that is missing there, which gives the exact objective back. None of them has the residual stream's drift.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ptqcli.calibration.statistics import Hessian, Pairs
from ptqcli.errors import PTQError, UsageError
from ptqcli.options import option
from ptqcli.solvers.damping import DAMP, factorise

TARGETS = ("quantized", "original")
AUTO = "auto"


def target_option() -> Any:
    """The field ``target`` of a solver."""
    return option(
        "quantized", "what a linear's output is to be: its own on the quantized model's inputs, or the original model's", choices=TARGETS
    )


# Of a share that is chosen. The last digits of its sums differ from run to run with where the system puts a tensor in memory.
SHARE_DIGITS = 6


def alpha_option() -> Any:
    """The field ``alpha`` of a solver."""
    return option(AUTO, "target original: share of the inputs' difference that is made up for, 0 to 1; auto: by held-out windows")


def beta_option() -> Any:
    """The field ``beta`` of a solver."""
    return option(AUTO, "target original: share of the residual stream's drift that is made up for, 0 to 1; auto: by held-out windows")


@dataclass(frozen=True)
class Aim:
    """How much of the original's output to aim at. alpha, beta: None to choose them. damp: a share of the mean diagonal of H."""

    alpha: float | None
    beta: float | None
    damp: float


class AimsAtTarget:
    """A solver with these options."""

    target: str
    alpha: float | str
    beta: float | str

    @property
    def aim(self) -> Aim | None:
        """None where the target is the linear's own output."""
        if self.target != "original":
            return None
        return Aim(_share("alpha", self.alpha), _share("beta", self.beta), getattr(self, "damp", DAMP))

    def check_target(self) -> None:
        """Raise UsageError for shares that are none, and for shares without the target that they belong to."""
        for name, value in (("alpha", self.alpha), ("beta", self.beta)):
            _share(name, value)
            if value != AUTO and self.target != "original":
                raise UsageError(f"{name} has no effect without --target original; give that, or leave it out")


def pairs_bytes(in_features: int, hidden: int) -> int:
    """Peak memory that aiming at the original takes for one input: its ``Pairs``, the moments of the windows that are not held out, and
    ``Factors`` with what one is made of.
    """
    return (3 * 4 + 2 * 4 + 3 * 8) * in_features**2 + 2 * 4 * hidden * in_features


def _share(name: str, value: float | str) -> float | None:
    if value == AUTO:
        return None
    if isinstance(value, str) or not 0 <= value <= 1:
        raise UsageError(f"{name} {value} is not valid; give a number from 0 to 1, or auto")
    return float(value)


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Sums over n tokens, float32: H and C [in, in], D [hidden, in]; x, f [in] and d [hidden] of the vectors themselves.

    D and d are None for a linear that does not write into the residual stream. Without a bias to correct x and f may be None.
    """

    H: Tensor
    C: Tensor
    D: Tensor | None
    x: Tensor | None
    f: Tensor | None
    d: Tensor | None
    n: int

    @classmethod
    def of(cls, hessian: Hessian, sums: Tensor | None, pairs: Pairs, factor: float | None) -> Moments:
        """sums: of x. factor: by which the linear's output is multiplied before it is added to the stream, None if it is not."""
        drift, drift_sums = pairs.drift, pairs.drift_sums
        return cls(
            H=hessian.matrix,
            C=pairs.cross,
            D=None if drift is None or factor is None else drift / factor,
            x=sums,
            f=pairs.sums,
            d=None if drift_sums is None or factor is None else drift_sums / factor,
            n=hessian.tokens,
        )

    def without(self, held: Moments) -> Moments:
        """The moments of the other tokens."""

        def rest(mine: Tensor | None, other: Tensor | None) -> Tensor | None:
            return None if mine is None or other is None else mine - other

        return Moments(
            H=self.H - held.H,
            C=self.C - held.C,
            D=rest(self.D, held.D),
            x=rest(self.x, held.x),
            f=rest(self.f, held.f),
            d=rest(self.d, held.d),
            n=self.n - held.n,
        )

    def centred(self) -> Moments:
        """The moments about the means, which a bias takes care of."""
        assert self.x is not None
        assert self.f is not None
        mean = self.x / max(self.n, 1)
        D = None if self.D is None or self.d is None else self.D - torch.outer(self.d, mean)
        return replace(self, H=self.H - torch.outer(self.x, mean), C=self.C - torch.outer(self.f, mean), D=D)


@dataclass(frozen=True)
class Targeted:
    """W*, and the shares that it took; beta is None for a linear that does not write into the residual stream."""

    weight: Tensor
    alpha: float
    beta: float | None


class Factors:
    """The factors of one stage's damped Hessians, float64 [in, in]. keep: whether several linears will ask for them."""

    def __init__(self, keep: bool) -> None:
        self.keep = keep
        self._kept: dict[tuple[bool, bool], Tensor] = {}

    def lower(self, moments: Moments, held_out: bool, centred: bool, damp: float, where: str) -> Tensor:
        """The lower factor of H of ``moments``: of all windows, or of those that are not ``held_out``; about the mean if ``centred``."""
        key = held_out, centred
        if key in self._kept:
            return self._kept[key]
        lower = factorise(moments.H.double(), damp, where).lower
        if self.keep:
            self._kept[key] = lower
        return lower


def aim_at(
    weight: Tensor, moments: Moments, held: Moments | None, aim: Aim, where: str, centred: bool, factors: Factors | None = None
) -> Targeted:
    """W* of ``weight``, float32 [out, in], in float32.

    held: the moments of held-out windows, None if there are none. centred: about the means, because a bias will be corrected. factors:
    those of the stage, which the weights before this one may have made.
    Raises UsageError if shares are to be chosen without held-out windows.
    """
    factors = factors or Factors(keep=False)
    others = None if held is None else moments.without(held)
    if centred:
        moments, held, others = moments.centred(), held and held.centred(), others and others.centred()
    alpha, beta = aim.alpha, aim.beta if moments.D is not None else 0.0
    if alpha is None or beta is None:
        if held is None or others is None:
            raise UsageError(f"{where}: alpha and beta are chosen on held-out windows, and there is one window; give more, or both by hand")
        lower = factors.lower(others, True, centred, aim.damp, where)
        alpha, beta = _best_shares(_Quadratic.of(weight, _corrections(weight, others, lower), held), alpha, beta)
    A, B = _corrections(weight, moments, factors.lower(moments, False, centred, aim.damp, where))
    target = weight + alpha * A if B is None else weight + alpha * A + beta * B
    if not torch.isfinite(target).all():
        raise PTQError(f"{where}: the target is not finite; raise --damp or give more calibration text")
    return Targeted(target, alpha, beta if moments.D is not None else None)


def _corrections(W: Tensor, moments: Moments, lower: Tensor) -> tuple[Tensor, Tensor | None]:
    """``W (C - H) (H + lambda I)^-1`` and ``D (H + lambda I)^-1``, solved in float64. lower: the factor of what is inverted."""
    right = [W @ (moments.C - moments.H), *([] if moments.D is None else [moments.D])]
    solved = [torch.cholesky_solve(side.t().double(), lower).t().to(W.dtype) for side in right]
    return solved[0], solved[1] if moments.D is not None else None


@dataclass(frozen=True)
class _Quadratic:
    """The error on held-out tokens less that of W: ``p^T G p - 2 g^T p`` for shares p = (alpha, beta)."""

    G: Tensor
    g: Tensor

    @classmethod
    def of(cls, W: Tensor, corrections: tuple[Tensor, Tensor | None], held: Moments) -> _Quadratic:
        made_up = [part for part in corrections if part is not None]
        missing = W @ (held.C - held.H)  # sum of (W f - W x) x^T
        if held.D is not None:
            missing = missing + held.D
        G = torch.stack([torch.stack([((one @ held.H) * other).sum() for other in made_up]) for one in made_up])
        return cls(G.double(), torch.stack([(missing * part).sum() for part in made_up]).double())

    def at(self, p: Tensor) -> float:
        return float(p @ self.G @ p - 2 * self.g @ p)


def _best_shares(error: _Quadratic, alpha: float | None, beta: float | None) -> tuple[float, float]:
    """The shares in [0, 1] of least error; a given one is kept."""
    given = [alpha, beta][: len(error.g)]
    free = [index for index, value in enumerate(given) if value is None]
    start = torch.tensor([0.0 if value is None else value for value in given], dtype=torch.float64)
    candidates = []
    for inner in _subsets(free):  # the free shares that are not at an end of their range
        for ends in _ends([index for index in free if index not in inner]):
            p = start.clone()
            for index, end in ends.items():
                p[index] = end
            if inner:
                rest = error.g - error.G @ p  # p is 0 at the inner ones
                p[inner] = torch.linalg.lstsq(error.G[inner][:, inner], rest[inner].unsqueeze(1)).solution.squeeze(1)
            if bool(((p >= 0) & (p <= 1)).all()):
                candidates.append(p)
    best = [round(share, SHARE_DIGITS) for share in min(candidates, key=error.at).tolist()]
    return best[0], best[1] if len(best) > 1 else 0.0


def _subsets(items: list[int]) -> list[list[int]]:
    return [[item for bit, item in enumerate(items) if mask >> bit & 1] for mask in range(1 << len(items))]


def _ends(items: list[int]) -> list[dict[int, float]]:
    return [{item: float(mask >> bit & 1) for bit, item in enumerate(items)} for mask in range(1 << len(items))]
