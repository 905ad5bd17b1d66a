"""GPTQ as its paper writes it, one column at a time in float64: the independent truth for the solver's tests.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
Algorithm 1 with block size 1. With the damped Hessian ``H`` of the layer's inputs and ``U`` the upper
Cholesky factor of its inverse, ``H^-1 = U^T U``, for each column ``j`` in turn

    q_j = nearest grid point of w_j        e_j = (w_j - q_j) / U_jj        w_k -= e_j * U_jk  for all k > j

Nothing is blocked, cached or shared with the package: the grids are written here a second time, in float64,
from the definition in ``ptqcli.numerics.scheme``. A solver in float32 may send a value that lies within its rounding
of the middle between two codes the other way, and the columns after it then follow another path:
``excess_rounding`` tells such a tie from a mistake.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ptqcli.numerics.ranges import SHRINK_FACTORS, SIGNED_FACTORS
from ptqcli.numerics.scheme import Scheme
from ptqcli.numerics.weight import QuantizedWeight


def textbook_gptq(
    weight: Tensor,
    hessian: Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    damp: float = 0.0,
    act_order: bool = False,
    static_groups: bool = True,
    search: str = "mse",
    levels: Sequence[float] | None = None,
) -> QuantizedWeight:
    """Codes of ``weight``, [out, in], for the layer's Hessian, [in, in], any positive multiple of X^T X.

    ``damp`` times the mean of the diagonal is added to the diagonal (0 for a Hessian that is damped already).
    Without ``act_order`` a group's grid is fitted when its first column is reached, on the weights as the
    error feedback has left them. ``act_order`` takes the columns by falling diagonal (stable): with
    ``static_groups`` on grids fitted beforehand to the original weights of neighbouring columns; without,
    groups are neighbours in the new order, fitted when reached, and ``g_idx`` names the group of each
    original column (one group for the whole row needs none). ``levels``: codes count these values instead of
    integers, see ``textbook_codes``.
    Raises torch.linalg.LinAlgError if the damped Hessian is not positive definite.
    """
    weight = weight.double().clone()  # [out, in]
    out, columns = weight.shape
    width = scheme.columns_per_group(columns)
    groups = scheme.group_count(columns)
    order = importance_order(hessian) if act_order else torch.arange(columns)
    group_of = (order if static_groups else torch.arange(columns)) // width  # of each step

    scale = torch.zeros(out, groups, dtype=torch.float64)
    zero = torch.zeros(out, groups, dtype=torch.float64)
    fitted_beforehand = act_order and static_groups
    if fitted_beforehand:
        for group in range(groups):
            neighbours = weight[:, group * width : (group + 1) * width]
            scale[:, group], zero[:, group] = textbook_grid(neighbours, scheme, scale_dtype, search, levels)

    weight = weight[:, order]
    inverse = torch.linalg.inv(damped(hessian, damp)[order][:, order])
    factor = torch.linalg.cholesky(inverse, upper=True)  # U, [in, in]
    codes = torch.zeros(out, columns, dtype=torch.float64)
    for j in range(columns):
        group = int(group_of[j])
        if not fitted_beforehand and j % width == 0:
            scale[:, group], zero[:, group] = textbook_grid(weight[:, j : j + width], scheme, scale_dtype, search, levels)
        codes[:, j] = textbook_codes(weight[:, j], scale[:, group], zero[:, group], scheme, levels)
        quantized = textbook_values(codes[:, j], scale[:, group], zero[:, group], levels)
        error = (weight[:, j] - quantized) / factor[j, j]
        weight[:, j + 1 :] -= torch.outer(error, factor[j, j + 1 :])

    place = torch.argsort(order)  # of each original column in the order
    return QuantizedWeight(
        codes=codes[:, place].to(torch.uint8),
        scale=scale.to(scale_dtype),
        zero=zero.to(torch.uint8),
        scheme=scheme,
        g_idx=group_of[place].to(torch.int32) if act_order and not static_groups and groups > 1 else None,
    )


def excess_rounding(weight: Tensor, hessian: Tensor, quantized: QuantizedWeight, damp: float = 0.0, act_order: bool = False) -> float:
    """Code steps by which the worst code lies farther from its value than the nearest; 0 for exact GPTQ.

    Replays the error feedback in float64 for the codes as they are, so that one tie that went the other way
    does not count against the columns after it. Float32 work stays below about 1e-3; a wrong code shows as up
    to 1 or more.
    """
    columns = weight.shape[1]
    order = importance_order(hessian) if act_order else torch.arange(columns)
    inverse = torch.linalg.inv(damped(hessian, damp)[order][:, order])
    factor = torch.linalg.cholesky(inverse, upper=True)
    group_of = torch.arange(columns) // (columns // quantized.scale.shape[1])
    if quantized.g_idx is not None:
        group_of = quantized.g_idx.long()
    codes = quantized.codes.double()
    scale, zero = quantized.scale.double()[:, group_of], quantized.zero.double()[:, group_of]
    weight = weight.double()[:, order]
    worst = 0.0
    for j, column in enumerate(order.tolist()):
        value = weight[:, j] / scale[:, column] + zero[:, column]
        nearest = value.round().clamp(0, quantized.scheme.levels - 1)
        excess = (codes[:, column] - value).abs() - (nearest - value).abs()
        worst = max(worst, float(excess.max()))
        error = (weight[:, j] - (codes[:, column] - zero[:, column]) * scale[:, column]) / factor[j, j]
        weight[:, j + 1 :] -= torch.outer(error, factor[j, j + 1 :])
    return worst


def damped(hessian: Tensor, damp: float) -> Tensor:
    """``hessian`` in float64 with ``damp`` times its mean diagonal added.

    An entry that stays 0 (a column never activated, no damping) becomes 1: its column is only rounded.
    """
    hessian = hessian.double().clone()
    diagonal = hessian.diagonal()
    diagonal += damp * diagonal.mean()
    diagonal[diagonal == 0] = 1.0
    return hessian


def importance_order(hessian: Tensor) -> Tensor:
    """Columns by falling diagonal of the undamped ``hessian``; equal ones keep their order."""
    return torch.argsort(hessian.diagonal(), descending=True, stable=True)


def textbook_grid(
    weights: Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    search: str = "mse",
    levels: Sequence[float] | None = None,
    signed: bool = True,
) -> tuple[Tensor, Tensor]:
    """Scale, rounded to ``scale_dtype``, and zero point of one group [rows, columns]; float64 [rows] each.

    Every candidate of the search is tried. signed: of a symmetric scheme without ``levels``, scales have a sign.
    """
    scales, zeros, errors = [], [], []
    for scale, zero in _candidates(weights, scheme, scale_dtype, search, levels, signed):
        codes = textbook_codes(weights, scale[:, None], zero[:, None], scheme, levels)
        scales.append(scale)
        zeros.append(zero)
        errors.append((textbook_values(codes, scale[:, None], zero[:, None], levels) - weights).square().sum(dim=1))
    best = torch.stack(errors).argmin(dim=0, keepdim=True)
    return torch.stack(scales).gather(0, best)[0], torch.stack(zeros).gather(0, best)[0]


def _candidates(
    weights: Tensor, scheme: Scheme, scale_dtype: torch.dtype, search: str, levels: Sequence[float] | None, signed: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    if scheme.symmetric and signed and levels is None:
        largest = torch.stack([row[row.abs().argmax()] for row in weights])
        for factor in SIGNED_FACTORS if search == "mse" else (1.0,):
            scale = _stored(-factor * largest / 2 ** (scheme.bits - 1), scale_dtype)
            yield scale, torch.full_like(scale, 2 ** (scheme.bits - 1))
        return
    low = weights.min(dim=1).values.clamp(max=0.0)
    high = weights.max(dim=1).values.clamp(min=0.0)
    if scheme.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    for factor in SHRINK_FACTORS if search == "mse" else (1.0,):
        steps = 2**scheme.bits - 1 if levels is None else max(levels) - min(levels)
        yield _grid_of_range(low * factor, high * factor, scheme, scale_dtype, steps)


def _stored(scale: Tensor, scale_dtype: torch.dtype) -> Tensor:
    limits = torch.finfo(scale_dtype)
    smallest = 1 / 1048576 if scale_dtype == torch.float16 else limits.tiny
    held = torch.sign(scale) * scale.abs().clamp(smallest, limits.max)
    return torch.where(scale == 0, 1.0, held).to(scale_dtype).double()


def _grid_of_range(low: Tensor, high: Tensor, scheme: Scheme, scale_dtype: torch.dtype, steps: float) -> tuple[Tensor, Tensor]:
    scale = _stored((high - low) / steps, scale_dtype)
    if scheme.symmetric:
        return scale, torch.full_like(scale, 2 ** (scheme.bits - 1))
    return scale, (-low / scale).round().clamp(0, 2**scheme.bits - 1)


def textbook_codes(weights: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme, levels: Sequence[float] | None = None) -> Tensor:
    """Nearest codes as float64 integers, ties to even; ``scale`` and ``zero`` broadcast to ``weights``.

    With ``levels`` every one of them is tried.
    """
    if levels is not None:
        values = torch.tensor(levels, dtype=torch.float64) * scale.unsqueeze(-1)
        return (values - weights.unsqueeze(-1)).abs().argmin(dim=-1).double()
    return (weights / scale + zero).round().clamp(0, 2**scheme.bits - 1)


def textbook_values(codes: Tensor, scale: Tensor, zero: Tensor, levels: Sequence[float] | None = None) -> Tensor:
    """What codes stand for, float64."""
    if levels is not None:
        return torch.tensor(levels, dtype=torch.float64)[codes.long()] * scale
    return (codes - zero) * scale
