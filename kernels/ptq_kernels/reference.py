"""Plain torch versions of the kernels: the oracle that every kernel is tested against, and the path on a machine without a GPU.

Weight-only linear, ``y = x W'^T + b`` with ``W'[n, k] = (code[n, k] - zero[n, g]) * scale[n, g]``, ``g`` the group of column ``k``. The
weight is rounded once to the dtype of ``x`` and multiplied as any other. That is what transformers does with compressed-tensors, so the
same codes give the same numbers here and there. The weight is expanded on every call; a fused kernel exists so that this need not be.

Int8 linear (Xiao et al. 2022, SmoothQuant, section 2; with one scale a token and a row, the vector-wise product of Dettmers et al.
2022, LLM.int8, section 3.1):

    s_x = max|x| / 127.5        q_x = clamp(round(x / s_x), -128, 127)        y = s_x s_w (q_x q_w^T) + b

A token that holds NaN or infinity, which have no code, has NaN for its scale and so for all its outputs; where all tokens share a scale
that is taken from them, they all have. The product is one of integers, with sums that are exact; scaling and bias are float32, rounded
once to the dtype of ``x``. (transformers multiplies the rounded values ``s_x q_x`` and ``s_w q_w`` as floats instead, and in a 16-bit
model rounds both to 16 bits before.)

LLM.int8 linear (Dettmers et al. 2022, section 3.2): the columns of ``x`` with outliers are set to zero before that, and multiplied with
16-bit columns of the weight; both products are added in float32. Outliers are the columns in which any input of the call exceeds a
threshold, so that the tokens of a call influence each other, or fixed ones. A 16-bit product here has operands in the dtype of ``x`` and
sums in float32, as the hardware's has.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from ptq_kernels.layout import packed_width, unpack_codes

# Products of int8 numbers reach 2^14: so many can be summed exactly in float32, which holds all integers up to 2^24, ...
COLUMNS_EXACT_IN_FLOAT32 = 1 << 10
# ... and fewer than so many in 32 bits.
TOO_MANY_COLUMNS = 1 << 17
# Weights that are expanded at a time, in rows by the multiple.
EXPANDED_AT_ONCE = 1 << 21
ROW_MULTIPLE = 64
# Up to so many tokens torch._int_mm is up to twice as fast with the weight as its left operand.
WEIGHT_LEFT_TOKENS = 128


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

    def expand(rows: slice) -> Tensor:
        return dequantize(packed[rows], scale[rows], None if zero is None else zero[rows], bits, x.shape[-1], x.dtype, g_idx)

    return expanding_linear(x, len(packed), expand, bias)


def expanding_linear(x: Tensor, N: int, expand: Callable[[slice], Tensor], bias: Tensor | None) -> Tensor:
    """``x`` [..., K] times a weight of ``N`` rows that ``expand`` makes for a slice of them, [..., N] in ``x.dtype``.

    On a CPU some rows at a time: a large matrix would be new memory on every call, whose pages cost more than its arithmetic.
    """
    at_once = max(EXPANDED_AT_ONCE // x.shape[-1] // ROW_MULTIPLE, 1) * ROW_MULTIPLE
    if x.device.type != "cpu" or torch.compiler.is_compiling() or at_once >= N:
        return functional.linear(x, expand(slice(0, N)), bias)
    out = x.new_empty((*x.shape[:-1], N))
    for start in range(0, N, at_once):
        block = slice(start, min(start + at_once, N))
        out[..., block] = functional.linear(x, expand(block), None if bias is None else bias[block])
    return out


def dequantize(
    packed: Tensor,  # uint8 [N, packed_width(K, bits)]
    scale: Tensor,  # [N, G]
    zero: Tensor | None,  # uint8 [N, G]
    bits: int,
    K: int,
    dtype: torch.dtype,
    g_idx: Tensor | None = None,  # int32 [K]
) -> Tensor:
    """The weight [N, K] in ``dtype``, rounded once. Checks nothing."""
    # A code less a zero point is within 255 of zero, exact in any dtype, so that its product with a scale of this dtype is rounded once.
    work = dtype if scale.dtype == dtype else torch.float32
    codes = unpack_codes(packed, bits, K).to(work)
    scale = scale.to(work)
    zero = torch.full_like(scale, 1 << (bits - 1)) if zero is None else zero.to(work)
    if g_idx is not None:
        index = g_idx.long()
        return codes.sub_(zero[:, index]).mul_(scale[:, index]).to(dtype)
    grouped = codes.view(*scale.shape, -1).sub_(zero.unsqueeze(-1)).mul_(scale.unsqueeze(-1))
    return grouped.view(len(packed), K).to(dtype)


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
    K, N = _columns(x), packed.shape[0]
    per_group = K if group_size == -1 else group_size
    if per_group < 1 or K % per_group:
        raise ValueError(f"group_size {group_size} does not divide the {K} columns of x")
    groups = K // per_group
    _expect("packed", packed, torch.uint8, (N, packed_width(K, bits)))
    _expect_floats("scale", scale, (N, groups))
    if zero is not None:
        _expect("zero", zero, torch.uint8, (N, groups))
    if bias is not None:
        _expect("bias", bias, x.dtype, (N,))
    if g_idx is not None:
        _expect("g_idx", g_idx, torch.int32, (K,))


def int8_linear(
    x: Tensor,  # [..., K]
    codes: Tensor,  # int8 [N, K]
    scale: Tensor,  # [N], or [1] for the whole matrix
    input_scale: Tensor | None = None,  # [1], None: from x
    per_token: bool = True,
    bias: Tensor | None = None,  # [N]
) -> Tensor:
    """``x`` in 8 bits times the int8 weight, [..., N] in ``x.dtype``.

    per_token: each token of ``x`` has its own scale, otherwise they share one, which ``input_scale`` can fix beforehand.
    Raises TypeError or ValueError, naming the argument, when a dtype or shape does not fit.
    """
    check_int8_arguments(x, codes, scale, input_scale, per_token, bias)
    return _rounded(_int8_product(x.float(), codes, scale, input_scale, per_token), bias, x.dtype)


def llm_int8_linear(
    x: Tensor,  # [..., K]
    codes: Tensor,  # int8 [N, K]
    scale: Tensor,  # [N], or [1] for the whole matrix
    outlier_index: Tensor,  # int32 [k], rising
    outlier_weight: Tensor,  # [N, k]
    threshold: float | None = None,
    per_token: bool = True,
    bias: Tensor | None = None,  # [N]
) -> Tensor:
    """``int8_linear`` with outlier columns split off and multiplied in ``x.dtype``, [..., N].

    threshold: columns of ``x`` that hold a larger magnitude are split off, with the weights in ``outlier_weight`` where ``outlier_index``
    lists them and with the dequantized codes elsewhere. None: the columns that ``outlier_index`` lists are, whatever ``x`` holds.
    With every column split off this is ``functional.linear``, with none it is ``int8_linear``, bit for bit. Raises TypeError or
    ValueError, naming the argument, when a dtype or shape does not fit.
    """
    check_llm_int8_arguments(x, codes, scale, outlier_index, outlier_weight, threshold, per_token, bias)
    columns = outlier_index.long() if threshold is None else _columns_above(x, threshold)
    if not len(columns):
        return int8_linear(x, codes, scale, None, per_token, bias)
    weight = _outlier_columns(columns, codes, scale, outlier_index, outlier_weight, x.dtype)
    if len(columns) == x.shape[-1]:
        return functional.linear(x, weight, bias)
    below = _int8_product(x.float().index_fill(-1, columns, 0), codes, scale, None, per_token)
    above = functional.linear(x[..., columns].float(), weight.float())
    return _rounded(below + above, bias, x.dtype)


def integer_product(left: Tensor, right: Tensor) -> Tensor:
    """int8 [M, K] times int8 [N, K] transposed: the exact sums, int32 [M, N], for K below TOO_MANY_COLUMNS."""
    K = left.shape[1]
    # With one column torch._int_mm returns memory that it never wrote (seen in torch 2.13).
    if left.device.type == "cpu" and K > 1 and int_mm_is_fast_and_exact():
        if len(left) <= WEIGHT_LEFT_TOKENS:
            return torch._int_mm(right, left.t()).t().contiguous()
        return torch._int_mm(left, right.t())
    sums = torch.zeros(left.shape[0], right.shape[0], dtype=torch.int32, device=left.device)
    for start in range(0, K, COLUMNS_EXACT_IN_FLOAT32):
        part = slice(start, start + COLUMNS_EXACT_IN_FLOAT32)
        sums += functional.linear(left[:, part].float(), right[:, part].float()).int()
    return sums


@cache
def int_mm_is_fast_and_exact() -> bool:
    """Whether this CPU's ``torch._int_mm`` is fit for use.

    With oneDNN and VNNI instructions it is exact and four to ten times as fast as float32. Without VNNI, oneDNN adds pairs of products
    with 16-bit saturation; without oneDNN, torch runs a plain loop, twenty times slower than float32.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    extremes = torch.tensor([[-128], [127]], dtype=torch.int8).repeat(1, 64)
    return torch.equal(torch._int_mm(extremes, extremes.t()).long(), extremes.long() @ extremes.long().t())


def _int8_product(x: Tensor, codes: Tensor, scale: Tensor, input_scale: Tensor | None, per_token: bool) -> Tensor:
    """The product without bias, float32 [..., N], of ``x`` float32 [..., K]."""
    tokens = x.reshape(-1, x.shape[-1])  # [M, K]
    if input_scale is None:
        token_scale = activation_scale(tokens, per_token)  # [M, 1] or [1], not finite where a token is not
    else:
        token_scale = input_scale.float() + (tokens * 0).sum(dim=-1, keepdim=True)  # [M, 1], NaN where a token is not finite
    quantized = torch.round(tokens / token_scale).clamp_(-128, 127).to(torch.int8)
    product = integer_product(quantized, codes).float() * token_scale * scale.float()
    return product.view(*x.shape[:-1], codes.shape[0])


def activation_scale(tokens: Tensor, per_token: bool) -> Tensor:
    """``max|x| / 127.5`` of float32 [M, K], as [M, 1] per token, [1] for all. What is zero throughout gets scale 1."""
    scale = tokens.abs().amax(dim=-1, keepdim=True) / 127.5
    if not per_token and len(tokens):
        scale = scale.amax(dim=0)
    return scale.masked_fill(scale == 0, 1.0)


def _columns_above(x: Tensor, threshold: float) -> Tensor:
    """The columns of ``x`` [..., K] with a magnitude above ``threshold``, int64, rising."""
    return (x.abs() > threshold).reshape(-1, x.shape[-1]).any(dim=0).nonzero().flatten()


def _outlier_columns(
    columns: Tensor, codes: Tensor, scale: Tensor, outlier_index: Tensor, outlier_weight: Tensor, dtype: torch.dtype
) -> Tensor:
    """``columns`` of the weight in ``dtype``: the stored 16-bit ones where there are, else dequantized codes."""
    weight = (codes[:, columns].float() * scale.float().unsqueeze(-1)).to(dtype)
    # Both lists rise, so those that they share come in the same order.
    weight[:, torch.isin(columns, outlier_index)] = outlier_weight[:, torch.isin(outlier_index, columns)].to(dtype)
    return weight


def _rounded(product: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (product if bias is None else product + bias.float()).to(dtype)


def check_int8_arguments(x: Tensor, codes: Tensor, scale: Tensor, input_scale: Tensor | None, per_token: bool, bias: Tensor | None) -> None:
    """The contract of ``int8_linear``, for every kernel with its signature."""
    K, N = _columns(x), codes.shape[0]
    if K >= TOO_MANY_COLUMNS:
        raise ValueError(f"x must have fewer than {TOO_MANY_COLUMNS} columns, not {K}, for sums of 32 bits")
    _expect("codes", codes, torch.int8, (N, K))
    _expect_floats("scale", scale, (1,) if scale.shape == (1,) else (N,))
    if input_scale is not None:
        if per_token:
            raise ValueError("per_token must be False with an input_scale, which is one for all tokens")
        _expect_floats("input_scale", input_scale, (1,))
    if bias is not None:
        _expect("bias", bias, x.dtype, (N,))


def check_llm_int8_arguments(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    outlier_index: Tensor,
    outlier_weight: Tensor,
    threshold: float | None,
    per_token: bool,
    bias: Tensor | None,
) -> None:
    """The contract of ``llm_int8_linear``, for every kernel with its signature, but for what ``outlier_index`` holds."""
    check_int8_arguments(x, codes, scale, None, per_token, bias)
    if threshold is not None and not threshold > 0:
        raise ValueError(f"threshold must be positive, not {threshold}")
    _expect("outlier_index", outlier_index, torch.int32, (outlier_index.numel(),))
    _expect_floats("outlier_weight", outlier_weight, (codes.shape[0], len(outlier_index)))


def _columns(x: Tensor) -> int:
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, not {x.dtype}")
    if x.dim() == 0:
        raise ValueError("x must have one dimension at least, the columns")
    return x.shape[-1]


def _expect_floats(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, not {tensor.dtype}")
    _expect(name, tensor, tensor.dtype, shape)


def _expect(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, not {tensor.dtype}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, not {list(tensor.shape)}")
