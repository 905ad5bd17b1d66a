"""Activations in 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from ptqcli.numerics.ranges import SMALLEST_SCALE
from ptqcli.numerics.scheme import ActivationScheme


def activation_scale(inputs: Tensor, scheme: ActivationScheme) -> Tensor:
    """Dynamic scale of ``inputs``, float [..., in]: [..., 1] per token, [1] per tensor. What is zero throughout gets scale 1."""
    largest = inputs.abs().amax(dim=-1, keepdim=True) if scheme.per_token else inputs.abs().amax().reshape(1)
    return torch.where(largest > 0, largest / ((2**scheme.bits - 1) / 2), torch.ones_like(largest))


def static_scale(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale that is fixed for inputs whose columns reach up to ``largest``, float [in]: [1] in ``dtype``, in which it is stored."""
    scale = activation_scale(largest, ActivationScheme(per_token=False))
    return scale.clamp(min=SMALLEST_SCALE.get(dtype, torch.finfo(dtype).tiny)).to(dtype)


def round_activations(inputs: Tensor, scheme: ActivationScheme, input_scale: Tensor | None = None) -> Tensor:
    """``inputs``, float [..., in], as a layer with 8-bit activations sees them: quantized and read back.

    input_scale: [1], for static activations, which have no scale of their own. What is not finite becomes NaN, which has no code.
    """
    scale = activation_scale(inputs, scheme) if scheme.dynamic else input_scale
    assert scale is not None
    middle = 1 << (scheme.bits - 1)
    rounded = torch.round(inputs / scale).clamp_(-middle, middle - 1) * scale
    return rounded + inputs * 0 if input_scale is not None else rounded
