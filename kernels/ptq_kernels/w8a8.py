"""W8A8: ``reference.int8_linear`` as a torch operator, ``ptq_kernels::w8a8``, with Triton kernels on CUDA and the reference elsewhere.

Two launches (three with one scale taken from all tokens): activations to int8 (``quantize_rows``), then the int8 product with scales and
bias at its end (``int8_product``). Nothing waits for the GPU in between, so that a CUDA graph can hold it. The result is that of the
reference on the CPU to the last bit: scales, codes, sums, and the order in which all is rounded. The reference on CUDA is no
yardstick: torch divides by a number there by way of its reciprocal, so that a scale, and with it a code, can be off by its last place.

Triton is imported at the first call on CUDA: a machine without a GPU need not have it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ptq_kernels.reference import check_int8_arguments, int8_linear

if TYPE_CHECKING:
    from ptq_kernels.tile_config import TileConfig

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@torch.library.custom_op("ptq_kernels::w8a8", mutates_args=())
def w8a8(
    x: Tensor,  # [..., K]
    codes: Tensor,  # int8 [N, K]
    scale: Tensor,  # [N], or [1] for the whole matrix
    input_scale: Tensor | None = None,  # [1], None: from x
    per_token: bool = True,
    bias: Tensor | None = None,  # [N]
) -> Tensor:
    """``reference.int8_linear``, [..., N] in ``x.dtype``.

    On CUDA ``x`` is float16, bfloat16 or float32 and ``codes`` is contiguous. Raises TypeError or ValueError, naming the argument.
    """
    if x.is_cuda:
        with torch.cuda.device(x.device):
            return launch(x, codes, scale, input_scale, per_token, bias)
    return int8_linear(x, codes, scale, input_scale, per_token, bias)


@w8a8.register_fake
def _(
    x: Tensor, codes: Tensor, scale: Tensor, input_scale: Tensor | None = None, per_token: bool = True, bias: Tensor | None = None
) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def launch(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    input_scale: Tensor | None = None,
    per_token: bool = True,
    bias: Tensor | None = None,
    config: TileConfig | None = None,
) -> Tensor:
    """The Triton path of ``w8a8``. config: how to cut the product, instead of what the table says."""
    from ptq_kernels import int8_product, quantize_rows

    check_int8_arguments(x, codes, scale, input_scale, per_token, bias)
    check_layout(x, codes=codes, scale=scale, input_scale=input_scale, bias=bias)
    tokens, N = matrix(x), len(codes)
    out = tokens.new_empty((len(tokens), N))
    if out.numel():
        plan = int8_product.plan("w8a8", tokens, codes, config)
        quantized = quantize_rows.quantize(tokens, per_token, input_scale, plan.counters, plan.config.pdl)
        int8_product.product(quantized, codes, scale, bias, out, plan)
    return out.view(*x.shape[:-1], N)


def check_layout(x: Tensor, **others: Tensor | None) -> None:
    """What the kernels ask beyond the reference's contract. Raises TypeError or ValueError, naming the argument."""
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be float16, bfloat16 or float32, not {x.dtype}")
    for name, tensor in others.items():
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, not on {tensor.device}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, not with strides {list(tensor.stride())}")


def matrix(x: Tensor) -> Tensor:
    """``x`` [..., K] as [M, K] with unit stride along K; copied only if it has none."""
    tokens = x.reshape(-1, x.shape[-1])
    return tokens if tokens.stride(1) == 1 else tokens.contiguous()
