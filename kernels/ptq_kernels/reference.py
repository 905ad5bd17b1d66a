"""Plain torch versions of the kernels: the oracle that every kernel is tested against, and the path on a machine without a GPU.

Weight-only linear, ``y = x W'^T + b`` with ``W'[n, k] = (code[n, k] - zero[n, g]) * scale[n, g]``, ``g`` the group of column ``k``. The
weight is computed in float32, rounded once to the dtype of ``x``, and multiplied as any other. That is what transformers does with
compressed-tensors, so the same codes give the same numbers here and there. The whole weight is expanded on every call; a fused
kernel exists so that this need not be.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ptq_kernels.layout import packed_width, unpack_codes


def weight_only_linear(
    x: Tensor,  # [..., K]
    packed: Tensor,  # uint8 [N, packed_width(K, bits)]
    scale: Tensor,  # [N, G]
    zero: Tensor | None,  # uint8 [N, G], None: 2^(bits-1) everywhere
    bits: int,
    group_size: int,
    bias: Tensor | None = None,  # [N]
    g_idx: Tensor | None = None,  # int32 [K]
) -> Tensor:
    """``x`` times the packed weight, [..., N] in ``x.dtype``.

    group_size: neighbouring columns per scale, -1 for whole rows; with ``g_idx``, the group of each column, it only counts groups.
    Raises TypeError or ValueError, naming the argument, when a dtype or shape does not fit.
    """
    check_arguments(x, packed, scale, zero, bits, group_size, bias, g_idx)
    weight = dequantize(packed, scale, zero, bits, x.shape[-1], x.dtype, g_idx)
    return functional.linear(x, weight, bias)


def dequantize(
    packed: Tensor,  # uint8 [N, packed_width(K, bits)]
    scale: Tensor,  # [N, G]
    zero: Tensor | None,  # uint8 [N, G]
    bits: int,
    columns: int,
    dtype: torch.dtype,
    g_idx: Tensor | None = None,  # int32 [K]
) -> Tensor:
    """The weight [N, K = columns] in ``dtype``, computed in float32 and rounded once. Checks nothing."""
    codes = unpack_codes(packed, bits, columns).float()
    rows, groups = scale.shape
    scale = scale.float()
    zero = torch.full_like(scale, 1 << (bits - 1)) if zero is None else zero.float()
    if g_idx is not None:
        index = g_idx.long()
        return codes.sub_(zero[:, index]).mul_(scale[:, index]).to(dtype)
    grouped = codes.view(rows, groups, -1).sub_(zero.unsqueeze(-1)).mul_(scale.unsqueeze(-1))
    return grouped.view(rows, columns).to(dtype)


def check_arguments(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    bias: Tensor | None,
    g_idx: Tensor | None,
) -> None:
    """The contract of ``weight_only_linear``, for every kernel with its signature."""
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, not {x.dtype}")
    columns, rows = x.shape[-1], packed.shape[0]
    per_group = columns if group_size == -1 else group_size
    if per_group < 1 or columns % per_group:
        raise ValueError(f"group_size {group_size} does not divide the {columns} columns of x")
    groups = columns // per_group
    _expect("packed", packed, torch.uint8, (rows, packed_width(columns, bits)))
    if not scale.is_floating_point():
        raise TypeError(f"scale must be floating point, not {scale.dtype}")
    _expect("scale", scale, scale.dtype, (rows, groups))
    if zero is not None:
        _expect("zero", zero, torch.uint8, (rows, groups))
    if bias is not None:
        _expect("bias", bias, x.dtype, (rows,))
    if g_idx is not None:
        _expect("g_idx", g_idx, torch.int32, (columns,))


def _expect(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, not {tensor.dtype}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, not {list(tensor.shape)}")
