"""The Hessian made positive definite, as every solver that factors it needs it.

``damp`` times the mean of the diagonal is added to the diagonal (Frantar et al. 2022, section 3.3). An input column that calibration
never activated has a zero row and column; damping gives it a diagonal of its own, and with no damping at all it gets the mean, so that
it is tied to no other column. If calibration activated none at all, each is a column by itself: the Hessian becomes the identity, and
every solver rounds to nearest. Where the factorisation fails, the damping is multiplied by 10 (and is at least SMALLEST_DAMP).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ptqcli.errors import PTQError, UsageError
from ptqcli.options import option

DAMP = 0.01  # where nothing else is asked for
SMALLEST_DAMP = 1e-4
LARGEST_DAMP = 10.0


@dataclass(frozen=True)
class Damped:
    """The lower Cholesky factor [in, in] of the damped Hessian, the damping that it took, and the columns never activated."""

    lower: Tensor
    damp: float
    never_activated: int


def damp_option() -> Any:
    """The field of a solver that damps."""
    return option(DAMP, "damping, as a share of the Hessian's mean diagonal")


def check_damp(damp: float) -> None:
    """Raise UsageError for a damping that makes no sense."""
    if not 0 <= damp <= LARGEST_DAMP:
        raise UsageError(f"damp {damp} is out of range; give a share of the mean diagonal between 0 and {LARGEST_DAMP:g}")


def factorise(hessian: Tensor, damp: float, where: str) -> Damped:
    """Damp ``hessian`` [in, in] in place and factor it. Raises PTQError, naming ``where``, if no damping makes it positive definite."""
    diagonal = hessian.diagonal().clone()
    dead = diagonal < torch.finfo(diagonal.dtype).tiny  # smaller ones have lost their digits, and their inverse overflows
    if dead.all():
        diagonal.fill_(1)
    mean = diagonal.mean()
    diagonal += dead * (mean if damp == 0 else 0)
    while damp <= LARGEST_DAMP:
        hessian.diagonal().copy_(diagonal + damp * mean)
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not failed:
            return Damped(lower, damp, int(dead.sum()))
        damp = max(damp * 10, SMALLEST_DAMP)
    raise PTQError(f"{where}: the Hessian is not positive definite even with damping {damp / 10:g}; give more calibration text")
