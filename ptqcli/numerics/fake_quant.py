"""A linear as it will compute when it is quantized, in floating point: ``round(x / divisor) W'^T + b``.

What the runtime computes with integers, ``s_x s_w (q_x q_w^T) + b``, is the product of the values that the integers stand for. So one
floating product with the dequantized weight and the rounded inputs gives the same numbers up to the last bits, at any width, and
gradients flow through it: to a weight that asks for them, and to the inputs as if rounding were the identity (Bengio et al. 2013,
"Estimating or Propagating Gradients Through Stochastic Neurons", the straight-through estimator), but not to inputs beyond a fixed range.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from ptqcli.numerics.activations import round_activations
from ptqcli.numerics.scheme import ActivationScheme
from ptqcli.numerics.weight import OutlierColumns, QuantizedWeight


class FakeQuantLinear(nn.Module):
    """``nn.Linear`` with a weight that has been rounded, and inputs that are rounded when it runs.

    weight: W', floating [out, in], in whose dtype the layer computes; may ask for gradients.
    bias: floating [out], None for none.
    divisor: floating [in], by which the inputs are divided before they are rounded, None for 1.
    activations: how inputs are rounded, None for not at all.
    input_scale: floating [1], of static activations.
    outliers: bool [in], columns that are never rounded, and whose weights are those of ``weight``; None for none.
    threshold: columns of the given inputs that hold a larger magnitude are not rounded either, as LLM.int8 splits; None for no such split.
    kept: the weights that those columns meet, where it lists them; elsewhere, and for the others, those of ``weight``.
    """

    weight: Tensor
    bias: Tensor | None
    divisor: Tensor | None
    input_scale: Tensor | None
    outliers: Tensor | None
    kept_index: Tensor | None
    kept_weight: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        divisor: Tensor | None = None,
        activations: ActivationScheme | None = None,
        input_scale: Tensor | None = None,
        outliers: Tensor | None = None,
        threshold: float | None = None,
        kept: OutlierColumns | None = None,
    ) -> None:
        super().__init__()
        self.activations, self.threshold = activations, threshold
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.register_buffer("divisor", divisor)
        self.register_buffer("input_scale", input_scale)
        self.register_buffer("outliers", outliers)
        self.register_buffer("kept_index", None if kept is None else kept.index.long())
        self.register_buffer("kept_weight", None if kept is None else kept.weight.to(weight.dtype))

    @classmethod
    def of(cls, quantized: QuantizedWeight, bias: Tensor | None = None) -> FakeQuantLinear:
        """What the runtime computes with ``quantized`` in a model whose dtype is that of its scales, in float32.

        A weight-only layer rounds its weight to that dtype; one with 8-bit activations multiplies codes, and rounds no weight.
        """
        scheme, columns = quantized.scheme, quantized.outliers
        if scheme.activations is None:
            return cls(quantized.dequantize().float(), bias)
        scale = None if quantized.input_scale is None else quantized.input_scale.float()
        if scheme.outliers is None or scheme.outliers.dynamic:
            threshold = None if scheme.outliers is None else scheme.outliers.threshold
            weight = replace(quantized, outliers=None).dequantize(torch.float32)
            return cls(weight, bias, activations=scheme.activations, input_scale=scale, threshold=threshold, kept=columns)
        weight, outliers = quantized.dequantize(torch.float32), None
        if columns is not None:
            outliers = torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device)
            outliers[columns.index.long()] = True
        return cls(weight, bias, activations=scheme.activations, input_scale=scale, outliers=outliers)

    def matrix(self) -> Tensor:
        """What multiplies inputs that are not rounded: ``W' / divisor``, [out, in]."""
        return self.weight if self.divisor is None else self.weight / self.divisor

    def forward(self, inputs: Tensor) -> Tensor:
        """``inputs`` [..., in] to [..., out] in the dtype of the inputs."""
        x, weight = inputs.to(self.weight.dtype), self.weight
        if self.divisor is not None:
            x = x / self.divisor
        if self.activations is not None:
            above = self._outlier_columns(x)
            x, weight = self._rounded(x, self.activations, above), self._weight(above)
        return functional.linear(x, weight, self.bias).to(inputs.dtype)

    def _outlier_columns(self, x: Tensor) -> Tensor | None:
        """Bool [in], the columns of ``x`` that are not rounded."""
        if self.threshold is None:
            return self.outliers
        above = (x.detach().abs() > self.threshold).reshape(-1, x.shape[-1]).any(dim=0)
        return above if self.outliers is None else above | self.outliers

    def _rounded(self, x: Tensor, activations: ActivationScheme, above: Tensor | None) -> Tensor:
        even = x.detach() if above is None else x.detach().masked_fill(above, 0)
        rounded = round_activations(even, activations, self.input_scale)
        if x.requires_grad:
            passed = x - x.detach()  # 0, with the gradient of x
            if self.input_scale is not None:
                passed = passed * (even.abs() <= self.input_scale * 2 ** (activations.bits - 1))
            rounded = rounded + passed
        return rounded if above is None else torch.where(above, x, rounded)

    def _weight(self, above: Tensor | None) -> Tensor:
        """The weight that inputs with outliers in the columns ``above`` meet."""
        if above is None or self.kept_index is None or self.kept_weight is None:
            return self.weight
        met = above[self.kept_index]
        return self.weight.index_copy(1, self.kept_index[met], self.kept_weight[:, met])
