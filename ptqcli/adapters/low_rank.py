"""What an adapter adds to one linear: ``y + B (A x)``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """A matrix [out, in] of rank r as a product ``B A``. A: floating [r, in]. B: floating [out, r], of the same dtype."""

    A: Tensor
    B: Tensor

    def matrix(self) -> Tensor:
        """``B A``, float32 [out, in]."""
        return self.B.float() @ self.A.float()

    def to(self, device: torch.device, dtype: torch.dtype) -> LowRank:
        """The same on ``device``, rounded to ``dtype``."""
        return LowRank(self.A.to(device, dtype), self.B.to(device, dtype))
