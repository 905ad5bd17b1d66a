"""How far a linear's output moves when it is quantized, on the inputs that calibration saw."""

from __future__ import annotations

import torch
from torch import Tensor

from ptqcli.calibration.statistics import InputStatistics
from ptqcli.numerics.fake_quant import FakeQuantLinear
from ptqcli.numerics.scheme import Scheme
from ptqcli.solvers import LinearTask, Stage, ignore_progress
from ptqcli.solvers.per_matrix import StageWork
from ptqcli.solvers.rtn import RTN


def relative_error(weight: Tensor, layer: FakeQuantLinear, statistics: InputStatistics | None, shift: Tensor | None = None) -> float:
    """``|W x - layer(x)|_F / |W x|_F`` over the tokens of ``statistics``, the bias left out on both sides; 0 if ``W x`` is 0.

    weight: W, float32 [out, in]. shift: what has been added to the bias, [out]. A layer that rounds its inputs runs on the sampled tokens,
    in one call. One that does not is measured on all tokens through their Hessian, or on the samples where there is none. Without
    statistics: ``|W - W'|_F / |W|_F``.
    """
    difference = weight - layer.matrix()
    if statistics is None:
        error, whole = difference.square().sum(), weight.square().sum()
    elif layer.activations is not None:
        inputs = statistics.sampled()
        expected, found = inputs @ weight.t(), layer(inputs)
        found = found if layer.bias is None else found - layer.bias
        found = found if shift is None else found + shift
        error, whole = (expected - found).square().sum(), expected.square().sum()
    elif statistics.hessian is not None:
        hessian = statistics.hessian.matrix
        error, whole = ((difference @ hessian) * difference).sum(), ((weight @ hessian) * weight).sum()
        if shift is not None and statistics.sums is not None:
            error = error - 2 * (shift * (difference @ statistics.sums)).sum() + statistics.hessian.tokens * shift.square().sum()
    else:
        inputs = statistics.sampled()
        error, whole = (inputs @ difference.t()).square().sum(), (inputs @ weight.t()).square().sum()
    return float((error.clamp(min=0) / whole).sqrt()) if whole > 0 else 0.0


def error_in_scheme(
    weight: Tensor,
    scheme: Scheme,
    statistics: InputStatistics | None,
    scale_dtype: torch.dtype,
    scale_search: str = "mse",
) -> float:
    """``relative_error`` of ``weight``, float32 [out, in], rounded to nearest in ``scheme``.

    statistics: with magnitudes where the scheme has static input scales or an outlier split, which then come from them, and with samples
    where it has 8-bit activations. Raises UsageError if the group size does not divide ``in``.
    """
    task = LinearTask(name="weight", weight=weight, scheme=scheme, scale_dtype=scale_dtype)
    solution = StageWork(RTN(scale_search), Stage((task,), statistics)).solve(task, ignore_progress)
    return relative_error(weight, FakeQuantLinear.of(solution.weight), statistics)
