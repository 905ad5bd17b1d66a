"""Linear layers on the kernels that torch itself has for weights in integers on a CPU.

At a few tokens they read the packed weight where ``reference`` first expands it, and take a twentieth to a hundredth of the time. That
grows with the tokens, though, while expanding costs the same for any number, so that above MOST_TOKENS the weight is expanded here, too.
The kernels for bfloat16 use vector instructions; those for the other dtypes do not, and win at one token only.

The two do not give the same numbers: expanding rounds a weight to the dtype of its scale, as transformers does, and the kernels do not. So
a measurement expands always (``always_expand``), or it would depend on how many tokens run at once.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ptq_kernels.autocast import is_autocast, without_autocast
from ptq_kernels.reference import expanding_linear

GROUP_SIZES = (256, 128, 64, 32)  # those of torch's kernel
_ROW_MULTIPLE = 16
INT8_COLUMN_MULTIPLE = 32  # torch's 8-bit kernel reads beyond the end of rows of any other length (seen in torch 2.13)
# By bits: up to so many tokens the kernel is faster than expanding first (4096 x 4096, 2 cores with AVX-512, torch 2.13).
MOST_TOKENS = {
    4: {torch.bfloat16: 112, torch.float32: 1, torch.float16: 1},
    8: {torch.bfloat16: 24, torch.float32: 1, torch.float16: 1},
}
DTYPES = (torch.bfloat16, torch.float32, torch.float16)


def int4_group_size(in_features: int, group_size: int) -> int | None:
    """The group size with which torch's 4-bit kernel can run groups of ``group_size`` (-1: whole rows), or None if with none."""
    per_group = in_features if group_size == -1 else group_size
    return next((size for size in GROUP_SIZES if per_group > 0 and per_group % size == 0), None)


class TorchInt4WeightOnly(nn.Module):
    """``nn.Linear`` for inference with 4-bit weights, on ``torch.ops.aten._weight_int4pack_mm_for_cpu``.

    codes: uint8 [N, K] below 16. scale: bfloat16, float16 or float32 [N, G], the dtype of the layer's inputs. zero: uint8 [N, G], or None
    for 8 everywhere. group_size: neighbouring columns per scale, -1 for whole rows; ``int4_group_size`` must not be None. bias: [N].
    The kernel takes ``(code - 8) s + t``; the shift ``t = (8 - zero) s`` is rounded to the dtype of ``s``.
    Raises TypeError or ValueError, naming the argument, when a dtype or shape does not fit.
    """

    kernel = "torch"
    bits = 4
    always_expand = False  # for any number of tokens, so that one window gives what many give

    packed: Tensor
    scale_and_shift: Tensor
    bias: Tensor | None

    def __init__(self, codes: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, bias: Tensor | None = None) -> None:
        super().__init__()
        if codes.dtype != torch.uint8:
            raise TypeError(f"codes must be uint8, not {codes.dtype}")
        _check(codes, scale, bias)
        if zero is not None and (zero.dtype != torch.uint8 or zero.shape != scale.shape):
            raise ValueError(f"zero must be uint8 of shape {list(scale.shape)}, not {zero.dtype} of shape {list(zero.shape)}")
        self.out_features, self.in_features = codes.shape
        per_group = self.in_features if group_size == -1 else group_size
        size = int4_group_size(self.in_features, group_size)
        if size is None or scale.shape != (self.out_features, self.in_features // per_group):
            raise ValueError(f"group_size {group_size} does not go with {self.in_features} columns and scales {list(scale.shape)}")
        for name, values in (("codes", codes), ("zero", zero)):
            if values is not None and values.numel() and int(values.max()) >= 16:
                raise ValueError(f"{name} must be below 16, found {int(values.max())}")
        self.group_size = size
        self.shifted = zero is not None
        shift = torch.zeros_like(scale) if zero is None else ((8 - zero.float()) * scale.float()).to(scale.dtype)
        beyond = -self.out_features % _ROW_MULTIPLE
        padded = functional.pad(codes, (0, 0, 0, beyond))
        parts = functional.pad(torch.stack((scale, shift), dim=-1), (0, 0, 0, 0, 0, beyond))  # [N, G, 2]
        parts = parts.repeat_interleave(per_group // size, dim=1)
        self.register_buffer("packed", torch._convert_weight_to_int4pack_for_cpu(padded.int(), 1))
        self.register_buffer("scale_and_shift", parts.transpose(0, 1).contiguous())
        self.register_buffer("bias", bias)
        # The layout follows the processor's instructions. Where it is none that is known here, many tokens take the kernel, too.
        self.block = next((block for block in (64, 32) if torch.equal(_unpack(self.packed, block), padded)), None)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., K] to [..., N]. Raises TypeError or ValueError for another dtype or number of columns."""
        if is_autocast(x):
            return without_autocast(self, x)
        tokens = _tokens(x, self.in_features, self.scale_and_shift.dtype)
        if self.block is not None and (self.always_expand or len(tokens) > MOST_TOKENS[self.bits][x.dtype]):
            return expanding_linear(x, self.out_features, self.expanded, self.bias)
        product = torch.ops.aten._weight_int4pack_mm_for_cpu(tokens, self.packed, self.group_size, self.scale_and_shift)
        if product.shape[1] > self.out_features:
            product = product[:, : self.out_features]
        if self.bias is not None:
            product = product + self.bias
        return product.reshape(*x.shape[:-1], self.out_features)

    @property
    def scale(self) -> Tensor:
        """[G, N], as the kernel takes them."""
        return self.scale_and_shift[:, : self.out_features, 0]

    def expanded(self, rows: slice) -> Tensor:
        """``rows`` of the weight, from a multiple of 64 on, in the dtype of the scales, rounded once: [rows, K]."""
        assert self.block is not None
        stop = rows.stop + -rows.stop % _ROW_MULTIPLE  # the padding is packed, too
        codes = _unpack(self.packed[rows.start : stop], self.block)
        parts = self.scale_and_shift[:, rows.start : stop]
        if self.shifted:  # otherwise it is one product of two numbers that this dtype holds, which is rounded once by itself
            parts = parts.float()
        scale, shift = parts.transpose(0, 1).unsqueeze(-1).unbind(dim=2)  # [N, G, 1]
        weight = codes.to(parts.dtype).view(len(codes), -1, self.group_size).sub_(8).mul_(scale)
        if self.shifted:
            weight.add_(shift)
        return weight.view(len(codes), -1)[: rows.stop - rows.start].to(self.scale_and_shift.dtype)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        size = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{size}, bits=4, group_size={self.group_size}, bias={self.bias is not None}, kernel={self.kernel}"


def _unpack(packed: Tensor, block: int) -> Tensor:
    """Codes, uint8 [N, K], of what torch packs where its kernel takes ``block`` rows at a time.

    A block lies column by column. Of 64 rows, byte ``d`` holds rows ``d`` and ``32 + d`` in its low and high half, of 32 rows ``d`` and
    ``16 + d``; of fewer, byte ``j`` holds ``2 j`` and ``2 j + 1``.
    """
    N, K = packed.shape[0], 2 * packed.shape[1]
    whole = N - N % block
    data = packed.reshape(-1)
    full = data[: whole * K // 2].view(-1, K, block // 2)
    halves = torch.cat((full & 15, full >> 4), dim=-1)  # [blocks, K, rows of a block]
    codes = halves.transpose(1, 2).reshape(whole, K)
    if whole == N:
        return codes
    rest = data[whole * K // 2 :].view(K, -1)
    return torch.cat((codes, torch.stack((rest & 15, rest >> 4), dim=-1).view(K, -1).t()))


class TorchInt8WeightOnly(nn.Module):
    """``nn.Linear`` for inference with 8-bit weights, a scale a row and no zero points, on ``torch.ops.aten._weight_int8pack_mm``.

    codes: int8 [N, K], K a multiple of INT8_COLUMN_MULTIPLE. scale: bfloat16, float16 or float32 [N], the dtype of the layer's inputs.
    bias: [N].
    Raises TypeError or ValueError, naming the argument, when a dtype or shape does not fit.
    """

    kernel = "torch"
    bits = 8
    always_expand = False  # as above

    codes: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        if codes.dtype != torch.int8:
            raise TypeError(f"codes must be int8, not {codes.dtype}")
        _check(codes, scale, bias)
        self.out_features, self.in_features = codes.shape
        if self.in_features % INT8_COLUMN_MULTIPLE:
            raise ValueError(f"codes must have a multiple of {INT8_COLUMN_MULTIPLE} columns, not {self.in_features}")
        if scale.shape != (self.out_features,):
            raise ValueError(f"scale must have shape {[self.out_features]}, not {list(scale.shape)}")
        self.register_buffer("codes", codes.contiguous())
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., K] to [..., N]. Raises TypeError or ValueError for another dtype or number of columns."""
        if is_autocast(x):
            return without_autocast(self, x)
        tokens = _tokens(x, self.in_features, self.scale.dtype)
        if self.always_expand or len(tokens) > MOST_TOKENS[self.bits][x.dtype]:
            return expanding_linear(x, self.out_features, self.expanded, self.bias)
        product = torch.ops.aten._weight_int8pack_mm(tokens, self.codes, self.scale)
        if self.bias is not None:
            product = product + self.bias
        return product.view(*x.shape[:-1], self.out_features)

    def expanded(self, rows: slice) -> Tensor:
        """``rows`` of the weight in the dtype of the scales, which holds both factors exactly, rounded once: [rows, K]."""
        return self.codes[rows].to(self.scale.dtype).mul_(self.scale[rows].unsqueeze(-1))

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        size = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{size}, bits=8, group_size=-1, bias={self.bias is not None}, kernel={self.kernel}"


def _tokens(x: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
    """``x`` as [M, K], without gaps: torch's kernels take nothing else."""
    if x.dtype != dtype or dtype not in DTYPES:
        raise TypeError(f"x must be {dtype}, as the scales are, and one of {DTYPES}, not {x.dtype}")
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x must have {in_features} columns, not the shape {list(x.shape)}")
    return x.reshape(-1, in_features).contiguous()


def _check(codes: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    if codes.dim() != 2:
        raise ValueError(f"codes must be [N, K], not {list(codes.shape)}")
    if scale.dtype not in DTYPES:
        raise TypeError(f"scale must be one of {DTYPES}, not {scale.dtype}")
    if bias is not None and (bias.dtype != scale.dtype or bias.shape != codes.shape[:1]):
        raise ValueError(f"bias must be {scale.dtype} of shape {[len(codes)]}, not {bias.dtype} of shape {list(bias.shape)}")
