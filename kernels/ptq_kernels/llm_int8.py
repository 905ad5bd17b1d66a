"""LLM.int8: ``reference.llm_int8_linear`` as a torch operator, ``ptq_kernels::llm_int8``: Triton on CUDA, the reference elsewhere.

Columns with outliers leave the int8 part, whose row scales they would coarsen, and are multiplied in 16 bit:

    y = s_x s_w (q_x q_w^T)  +  x[:, outliers] w[:, outliers]^T  +  b          (q_x is zero in the columns of outliers)

Two launches and no host synchronisation:

1. ``split_rows``: scales and int8 codes of what stays, and the values split off side by side in a buffer [M, k] of 16 bit.
2. the int8 product, which then goes on over that buffer, in the same float32 registers. Its weight columns are those stored in 16 bit,
   where ``outlier_index`` lists them, or int8 codes dequantized on the way.

With a threshold the columns depend on all tokens at once, which no program of the first launch knows. Up to 8 tokens, each program
looks through all of them itself; above that a launch before, ``column_flags``, leaves one bit for each column and 128 tokens (or an eighth
of them, if that is more: each program joins those bits, so there must be few): three launches, where a launch is small beside the work. A
grid-wide barrier would save it, but needs a counter that is set to zero by a launch of its own, or one that outlives the call and breaks
when two streams share it. One scale for all tokens needs one launch more: it, too, depends on them all.

How many columns there are is known to the GPU alone. The list of them and the buffer have room for all K columns, only as many as
there are get written and read, and the loop over them ends by a number that the first launch wrote. Not done: a 16-bit product
inside the loop over K, which has the codes at hand. Seven outlier columns among 4096 touch up to seven of 32 tiles there, each for
the price of a whole 16-bit tile, and a second set of sums in registers, which large tiles do not have.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ptq_kernels.reference import check_llm_int8_arguments, llm_int8_linear
from ptq_kernels.w8a8 import check_layout, matrix

if TYPE_CHECKING:
    from ptq_kernels.tile_config import TileConfig


def outlier_slots(outlier_index: Tensor, K: int) -> Tensor:
    """For each of ``K`` columns its position in ``outlier_index``, else -1: int32 [K]. What the kernels read; made once, at load."""
    slots = outlier_index.new_full((K,), -1)
    slots[outlier_index.long()] = torch.arange(len(outlier_index), dtype=slots.dtype, device=slots.device)
    return slots


@torch.library.custom_op("ptq_kernels::llm_int8", mutates_args=())
def llm_int8(
    x: Tensor,  # [..., K]
    codes: Tensor,  # int8 [N, K]
    scale: Tensor,  # [N], or [1] for the whole matrix
    outlier_index: Tensor,  # int32 [k], rising
    outlier_weight: Tensor,  # [N, k]
    threshold: float | None = None,
    per_token: bool = True,
    bias: Tensor | None = None,  # [N]
    slots: Tensor | None = None,  # int32 [K], outlier_slots(outlier_index, K)
) -> Tensor:
    """``reference.llm_int8_linear``, [..., N] in ``x.dtype``; without ``slots`` they are made on every call.

    On CUDA ``x`` is float16, bfloat16 or float32 and the others are contiguous. Raises TypeError or ValueError, naming the argument.
    """
    if x.is_cuda:
        with torch.cuda.device(x.device):
            return launch(x, codes, scale, outlier_index, outlier_weight, threshold, per_token, bias, slots)
    return llm_int8_linear(x, codes, scale, outlier_index, outlier_weight, threshold, per_token, bias)


@llm_int8.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    outlier_index: Tensor,
    outlier_weight: Tensor,
    threshold: float | None = None,
    per_token: bool = True,
    bias: Tensor | None = None,
    slots: Tensor | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def launch(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    outlier_index: Tensor,
    outlier_weight: Tensor,
    threshold: float | None = None,
    per_token: bool = True,
    bias: Tensor | None = None,
    slots: Tensor | None = None,
    config: TileConfig | None = None,
) -> Tensor:
    """The Triton path of ``llm_int8``. config: how to cut the product, instead of what the table says."""
    from ptq_kernels import int8_product, quantize_rows

    check_llm_int8_arguments(x, codes, scale, outlier_index, outlier_weight, threshold, per_token, bias)
    check_layout(x, codes=codes, scale=scale, outlier_index=outlier_index, outlier_weight=outlier_weight, bias=bias, slots=slots)
    if slots is None:
        slots = outlier_slots(outlier_index, x.shape[-1])
    elif slots.dtype != torch.int32 or slots.shape != x.shape[-1:]:
        raise ValueError(f"slots must be int32 of shape {[x.shape[-1]]}, not {slots.dtype} of shape {list(slots.shape)}")
    tokens, N = matrix(x), len(codes)
    out = tokens.new_empty((len(tokens), N))
    if out.numel():
        plan = int8_product.plan("llm_int8", tokens, codes, config)
        # Compared in the dtype of x, as torch compares a tensor with a number.
        limit = None if threshold is None else float(torch.tensor(threshold, dtype=x.dtype))
        quantized = quantize_rows.split(tokens, outlier_index, slots, limit, per_token, plan.counters, plan.config.pdl)
        int8_product.product(quantized, codes, scale, bias, out, plan, slots, outlier_weight)
    return out.view(*x.shape[:-1], N)
