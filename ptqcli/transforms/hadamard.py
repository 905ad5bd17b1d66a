"""Rotations that spread every channel evenly over all of them: Hadamard matrices with random signs.

A Hadamard matrix has entries of 1 and -1 and orthogonal rows; divided by √n it is a rotation all of whose entries have one magnitude, so
a channel of any size ends up as 1/√n of itself in each of n channels. Two constructions give one for almost every width of a model:

- Sylvester: ``H_2n = [[H_n, H_n], [H_n, -H_n]]``, for powers of two; multiplied with in n log n steps.
- Paley (1933, the first of his two): with a prime q = 3 mod 4 and the Legendre symbol χ, the matrix ``I + S`` of order q + 1, where S has
  a first row of ones, a first column of minus ones, and χ(i - j) for the rest. So 12, 20, 72, 224 ...

and the Kronecker product of two is one. Where no order q + 1 divides the width suitably, a random orthogonal matrix of its odd part takes
Paley's place. Random signs in front (``x -> (x * signs) H``; QuaRot, Ashkboos et al. 2024, section 3) keep one channel, or the mean of
all, from being an eigenvector, and make as many rotations as one likes from one matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rotation:
    """The rotation ``Q = diag(signs) (H ⊗ base)`` of rows with n entries, H Sylvester's matrix of order n / b over the root of that.

    signs: 1 or -1, float64 [n]. base: orthogonal, float64 [b, b].
    """

    signs: Tensor
    base: Tensor

    @property
    def size(self) -> int:
        """n."""
        return len(self.signs)

    def apply(self, rows: Tensor) -> Tensor:
        """``rows Q``, in float64 and of the shape of ``rows`` [..., n]."""
        signed = rows.double() * self.signs.to(rows.device)
        pieces = signed.unflatten(-1, (-1, len(self.base))) @ self.base.to(rows.device)  # [..., n / b, b]
        return _sylvester(pieces.transpose(-1, -2)).transpose(-1, -2).flatten(-2)


def random_rotation(size: int, generator: torch.Generator) -> Rotation:
    """One of the rotations of rows with ``size`` entries."""
    signs = 2.0 * torch.randint(0, 2, (size,), generator=generator).double() - 1
    return Rotation(signs, _base(size, generator))


def _base(size: int, generator: torch.Generator) -> Tensor:
    """The smallest factor of the rotation that is left when powers of two are taken out."""
    odd = size // (size & -size)
    order = odd
    while order > 1 and size % order == 0:
        if order % 4 == 0 and _is_prime(order - 1):
            return paley(order - 1) / order**0.5
        order *= 2
    return _random_orthogonal(odd, generator)


def paley(q: int) -> Tensor:
    """Paley's Hadamard matrix for a prime q = 3 mod 4, float64 [q + 1, q + 1]."""
    legendre = torch.full((q,), -1.0, dtype=torch.float64)
    legendre[torch.arange(1, q) ** 2 % q] = 1
    legendre[0] = 0
    places = torch.arange(q)
    skew = torch.zeros(q + 1, q + 1, dtype=torch.float64)  # S
    skew[0, 1:], skew[1:, 0] = 1, -1
    skew[1:, 1:] = legendre[(places[:, None] - places) % q]
    return skew + torch.eye(q + 1, dtype=torch.float64)


def _random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    factor, triangle = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return factor * triangle.diagonal().sign()  # all orthogonal matrices are then equally likely (Mezzadri 2007)


def _sylvester(rows: Tensor) -> Tensor:
    """``rows`` [..., n] times Sylvester's matrix of order n, a power of two, over √n."""
    size, half = rows.shape[-1], 1
    while half < size:
        pairs = rows.unflatten(-1, (-1, 2, half))
        rows = torch.stack((pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]), dim=-2).flatten(-3)
        half *= 2
    return rows / size**0.5


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))
