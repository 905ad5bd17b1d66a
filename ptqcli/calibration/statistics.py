"""What calibration keeps of a linear's inputs.

``Hessian`` is the second moment ``H = sum_t x_t x_t^T`` of an input tensor over all calibration tokens ``t``, streamed batch by batch.
The layer-wise objective ``sum_t |(W - W') x_t|^2 = tr((W - W') H (W - W')^T)`` needs nothing else (Frantar et al. 2022, section 3.1; the
paper's factor 2 drops out). One is kept for each distinct tensor, not for each linear.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ptqcli.errors import PTQError

# Width of the strips in which the lower triangle is summed: H is symmetric, and n strips need (n + 1) / 2n of the full product.
# Below 256 columns the products become too thin to run at full speed.
STRIP = 256


@dataclass
class Hessian:
    """Running ``sum x x^T``: lower float32 or float64 [in, in], of which ``add`` fills the lower triangle; tokens seen so far."""

    lower: Tensor
    tokens: int = 0

    @classmethod
    def zeros(cls, features: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Hessian:
        return cls(torch.zeros(features, features, device=device, dtype=dtype))

    def add(self, inputs: Tensor) -> None:
        """Add a batch of inputs, floating [..., in]."""
        rows = inputs.reshape(-1, inputs.shape[-1]).to(self.lower.dtype)  # [tokens, in]
        for start in range(0, rows.shape[1], STRIP):
            stop = start + STRIP
            self.lower[start:stop, :stop].addmm_(rows[:, start:stop].t(), rows[:, :stop])
        self.tokens += rows.shape[0]

    @property
    def matrix(self) -> Tensor:
        """The whole symmetric matrix [in, in], a new tensor."""
        return self.lower.tril() + self.lower.tril(-1).t()

    def check_finite(self, where: str) -> None:
        """Raise PTQError if the statistics hold NaN or infinity. The diagonal tells: an infinite entry always reaches it."""
        if not torch.isfinite(self.lower.diagonal()).all():
            raise PTQError(
                f"{where}: calibration inputs are not finite (NaN or infinity); the model overflows in this dtype or its weights are broken"
            )

    def output_energy(self, weight: Tensor) -> float:
        """``sum_t |W x_t|^2`` for a matrix [out, in]."""
        weight = weight.to(self.lower.dtype)
        return float(((weight @ self.matrix) * weight).sum().clamp(min=0))
