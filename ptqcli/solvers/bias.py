"""Bias correction: where a linear has a bias, it takes up the shift of the mean output.

With the bias free the output error of codes Q is least for ``b' = b + W mu - Q mu``, mu the mean input, and what is left of it is

    sum_t |(W - Q)(x - mu)|^2  =  tr((W - Q) H_c (W - Q)^T),      H_c = H - n mu mu^T

so the codes are chosen under the centred Hessian, and the bias follows in closed form. (The correction of a bias after rounding is Nagel
et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.2; centring the Hessian for it is
derived here.) Towards the original's output (``target.py``) the mean of what is wanted takes the place of ``W mu``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ptqcli.calibration.statistics import Hessian
from ptqcli.numerics.weight import QuantizedWeight
from ptqcli.options import option
from ptqcli.solvers.target import Moments, Targeted


def bias_option() -> Any:
    """The field ``correct_bias`` of a solver."""
    return option(True, "biases take up the shift of the mean output, where a linear has one", flag="correct-bias")


class CorrectsBias:
    """A solver with the option."""

    correct_bias: bool

    @property
    def corrects_bias(self) -> bool:
        """See the module."""
        return self.correct_bias


def centred(hessian: Hessian, sums: Tensor) -> Hessian:
    """``hessian`` about the mean of the inputs, whose ``sums`` [in] are given."""
    mean = sums / max(hessian.tokens, 1)
    matrix = torch.addr(hessian.matrix, sums, mean, alpha=-1)
    matrix.diagonal().clamp_(min=0)  # of an input that never changes, rounding leaves a little on either side of 0
    return Hessian(matrix, hessian.tokens)


def corrected_bias(bias: Tensor, weight: Tensor, quantized: QuantizedWeight, mean: Tensor) -> Tensor:
    """``b + W mu - Q mu``. weight: float32 [out, in]; mean: mu, [in]."""
    return bias + (weight - quantized.dequantize(torch.float32)) @ mean


def corrected_towards(bias: Tensor, weight: Tensor, quantized: QuantizedWeight, moments: Moments, targeted: Targeted) -> Tensor:
    """The same where the mean output is to be ``W ((1 - alpha) mu + alpha mu_f) + beta mu_d``."""
    assert moments.x is not None
    assert moments.f is not None
    x, f = moments.x / moments.n, moments.f / moments.n
    wanted = weight @ (x + targeted.alpha * (f - x))
    if targeted.beta is not None and moments.d is not None:
        wanted = wanted + targeted.beta * moments.d / moments.n
    return bias + wanted - quantized.dequantize(torch.float32) @ x
