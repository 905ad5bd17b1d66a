"""EoRA: the matrix of low rank that, beside a quantized linear, brings its outputs closest to the original's.

Liu et al. 2024, "EoRA: Fine-tuning-free Compensation for Compressed LLM with Eigenspace Low-Rank Approximation" (arXiv 2410.21271),
section 3. With ``D = W - W'`` and the second moment ``H = X X^T`` of the linear's inputs:

    minimise |(D - B A) X|^2 = tr((D - B A) H (D - B A)^T)   over B [out, r] and A [r, in]

The paper takes ``H = Q L Q^T``, the singular values ``U S V^T`` of ``D Q L^(1/2)``, and undoes the factor again, ``B = U_r S_r^(1/2)`` and
``A = S_r^(1/2) V_r^T L^(-1/2) Q^T``. Any factor ``H = R R^T`` does as well, and none has to be inverted: the best approximation of ``D R``
is ``U_r U_r^T D R`` (Eckart and Young 1936), so ``B A = U_r U_r^T D``, whatever R is, and H may be singular. ``U_r`` are the first
eigenvectors of ``D H D^T``. With ``D = P T`` (P [out, k] orthonormal, T [k, in], k the smaller side of D) they are P times those of the
small ``T H T^T``.

``B A`` is a projection of D: it never adds anything that quantization has not taken away, also where calibration saw little. How the
product is cut in two is free; here row i of A and column i of B have the same norm, so that neither leaves the range of a 16-bit dtype,
however many tokens there were.

Left out: the paper's training that starts at the closed form, and its ranks that differ by layer, which vLLM does not load.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ptqcli.adapters.low_rank import LowRank
from ptqcli.solvers.damping import factorise


def low_rank_correction(difference: Tensor, hessian: Tensor, rank: int) -> LowRank:
    """The best ``B A`` of ``rank`` for ``difference`` D, floating [out, in], under ``hessian`` H, floating [in, in]; both in float64.

    Where the rank is above the smaller side of D, ``B A`` is D, and what is left of A and B is zero.
    """
    out_features, in_features = difference.shape
    P, T = torch.linalg.qr(difference.double())  # [out, k], [k, in]
    _, vectors = torch.linalg.eigh(T @ hessian.double() @ T.t())  # [k, k], the last belong to the largest
    U = vectors.flip(1)[:, :rank]  # [k, r]
    rows = U.t() @ T  # U_r^T D, [r, in]
    norms = rows.norm(dim=1).sqrt()
    A, B = rows.new_zeros(rank, in_features), rows.new_zeros(out_features, rank)
    A[: len(rows)] = rows / norms.where(norms > 0, torch.ones_like(norms)).unsqueeze(1)
    B[:, : len(rows)] = (P @ U) * norms
    return LowRank(A, B)


def beside_bias(difference: Tensor, hessian: Tensor, sums: Tensor, tokens: int, where: str) -> Tensor:
    """What takes the place of D where a bias makes up for its mean output: ``D - (D mu) s^T H^-1``, s the sum of the inputs, mu their mean.

    What is left to correct is ``D (x - mu)``, of which this is the least-squares answer to x, so the best ``B A`` for it is the best there.
    """
    lower = factorise(hessian.double(), 0.0, where).lower
    along = torch.cholesky_solve(sums.double().unsqueeze(1), lower)  # [in, 1]
    return difference.double() - (difference.double() @ (sums.double() / tokens)).unsqueeze(1) @ along.t()


def workspace_bytes(out_features: int, in_features: int) -> int:
    """Peak memory of a correction, float64: D, its two factors and T H, H, and the eigenvectors with what finding them takes."""
    smaller = min(out_features, in_features)
    return 8 * (3 * out_features * in_features + in_features**2 + 4 * smaller**2)
