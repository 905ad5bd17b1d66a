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
    """Running ``sum x x^T``, float32 or float64 [in, in], and the tokens seen so far.

    ``add`` fills ``sums`` in the strips on and below the diagonal only; ``matrix`` is the whole.
    """

    sums: Tensor
    tokens: int = 0

    @classmethod
    def zeros(cls, features: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Hessian:
        return cls(torch.zeros(features, features, device=device, dtype=dtype))

    def add(self, inputs: Tensor) -> None:
        """Add a batch of inputs, floating [..., in]."""
        rows = inputs.reshape(-1, inputs.shape[-1]).to(self.sums.dtype)  # [tokens, in]
        for start, stop in self._strips():
            self.sums[start:stop, :stop].addmm_(rows[:, start:stop].t(), rows[:, :stop])
        self.tokens += rows.shape[0]

    @property
    def matrix(self) -> Tensor:
        """The symmetric matrix [in, in]; the storage of ``sums``, whose part above the strips is filled in."""
        for start, stop in self._strips():
            self.sums[:start, start:stop] = self.sums[start:stop, :start].t()
        return self.sums

    def _strips(self) -> list[tuple[int, int]]:
        features = self.sums.shape[0]
        return [(start, min(start + STRIP, features)) for start in range(0, features, STRIP)]

    def check_finite(self, where: str) -> None:
        """Raise PTQError if the statistics hold NaN or infinity. The diagonal tells: an infinite entry always reaches it."""
        if not torch.isfinite(self.sums.diagonal()).all():
            raise PTQError(
                f"{where}: calibration inputs are not finite (NaN or infinity); the model overflows in this dtype or its weights are broken"
            )

    def output_energy(self, weight: Tensor) -> float:
        """``sum_t |W x_t|^2`` for a matrix [out, in]."""
        weight = weight.to(self.sums.dtype)
        return float(((weight @ self.matrix) * weight).sum().clamp(min=0))
