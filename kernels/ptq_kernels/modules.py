"""Linear layers whose weight stays in integers. ``kernel`` says what a layer runs on: "triton", "torch" or "reference"."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptq_kernels.autocast import is_autocast, without_autocast
from ptq_kernels.layout import pack_codes
from ptq_kernels.llm_int8 import llm_int8, outlier_slots
from ptq_kernels.packing import pack_groups, pack_tiles
from ptq_kernels.reference import (
    check_arguments,
    check_int8_arguments,
    check_llm_int8_arguments,
    int8_linear,
    int_mm_is_fast_and_exact,
    llm_int8_linear,
    weight_only_linear,
)
from ptq_kernels.w4a16 import check_w4a16, w4a16
from ptq_kernels.w8a8 import w8a8


class ReferenceWeightOnly(nn.Module):
    """``nn.Linear`` for inference with packed integer weights, on the reference; computes in the dtype of its input, on any device.

    codes: uint8 [N, K] below 2^bits. scale: floating [N, G]. zero: uint8 [N, G], or None for 2^(bits-1) everywhere. group_size:
    neighbouring columns per scale, -1 for whole rows. bias: [N]. g_idx: int32 [K], the group of each column.
    Raises TypeError or ValueError, naming the argument, when a dtype, a shape or a range does not fit.
    """

    kernel = "reference"

    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    bias: Tensor | None
    g_idx: Tensor | None

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        bits: int,
        group_size: int,
        bias: Tensor | None = None,
        g_idx: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = _matrix_shape(codes)
        self.bits = bits
        self.group_size = group_size
        self.register_buffer("packed", pack_codes(codes, bits))
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        self.register_buffer("bias", bias)
        self.register_buffer("g_idx", g_idx)
        probe = scale.new_empty((1, self.in_features), device="meta")
        check_arguments(probe, self.packed, scale, zero, bits, group_size, bias, g_idx)
        _check_zero(zero, bits)
        if g_idx is not None and not 0 <= int(g_idx.min()) <= int(g_idx.max()) < scale.shape[1]:
            raise ValueError(f"g_idx must be below {scale.shape[1]}, the number of groups, found {int(g_idx.min())} to {int(g_idx.max())}")

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., K] to [..., N]."""
        if is_autocast(x):
            return without_autocast(self, x)
        return weight_only_linear(x, self.packed, self.scale, self.zero, self.bits, self.group_size, self.bias, self.g_idx)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        size = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{size}, bits={self.bits}, group_size={self.group_size}, bias={self.bias is not None}"


class TritonWeightOnly(nn.Module):
    """``nn.Linear`` for inference with 4-bit or 8-bit weights on the Triton kernel (``w4a16``); on a CPU the operator runs the reference.

    codes: uint8 [N, K] below 2^bits. scale: float16 or bfloat16 [N, G], the dtype of the layer's inputs. zero: uint8 [N, G], or None for
    2^(bits-1) everywhere. bits: 4 or 8. group_size: columns per scale, 32, 64, 128, or -1 for whole rows. bias: [N]. g_idx: int32 [K], the
    group of each column, equally many to each, where groups are not neighbours; the columns are sorted by it once, here.
    Raises TypeError or ValueError, naming the argument, when a dtype or shape does not fit.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    bias: Tensor | None
    perm: Tensor | None

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        bits: int,
        group_size: int,
        bias: Tensor | None = None,
        g_idx: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = _matrix_shape(codes)
        if group_size == self.in_features:
            group_size = -1
        self.bits = bits
        self.group_size = group_size
        _check_zero(zero, bits)
        perm = None if g_idx is None else _column_order(g_idx, codes, scale)
        self.register_buffer("packed", pack_tiles(codes if perm is None else codes[:, perm.long()], bits))
        self.register_buffer("scale", pack_groups(scale, scale.dtype))
        self.register_buffer("zero", None if zero is None else pack_groups(zero, torch.int16))
        self.register_buffer("bias", bias)
        self.register_buffer("perm", perm)
        probe = scale.new_empty((1, self.in_features))
        check_w4a16(probe, self.packed, self.scale, self.zero, bits, group_size, self.out_features, bias, perm)

    @property
    def kernel(self) -> str:
        """What the layer runs on where its weight lies now."""
        return "triton" if self.packed.is_cuda else "reference"

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., K] to [..., N]."""
        if is_autocast(x):
            return without_autocast(self, x)
        return w4a16(x, self.packed, self.scale, self.zero, self.bits, self.group_size, self.out_features, self.bias, self.perm)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        size = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{size}, bits={self.bits}, group_size={self.group_size}, bias={self.bias is not None}, kernel={self.kernel}"


def _column_order(g_idx: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """The columns sorted by group, int32 [K]."""
    in_features, groups = codes.shape[1], scale.shape[-1]
    if g_idx.dtype != torch.int32 or g_idx.shape != (in_features,):
        raise ValueError(f"g_idx must be int32 of shape {[in_features]}, not {g_idx.dtype} of shape {list(g_idx.shape)}")
    if int(g_idx.min()) < 0 or g_idx.bincount(minlength=groups).tolist() != [in_features // groups] * groups:
        raise ValueError(f"g_idx must give each of {groups} groups {in_features // groups} columns")
    return g_idx.argsort(stable=True).to(torch.int32)


def _check_zero(zero: Tensor | None, bits: int) -> None:
    if zero is not None and zero.numel() and int(zero.max()) >= 1 << bits:
        raise ValueError(f"zero must be below {1 << bits}, found {int(zero.max())}")


class W8A8Linear(nn.Module):
    """``nn.Linear`` for inference in 8-bit integers, weights and inputs (SmoothQuant, section 2); returns the dtype of its input.

    codes: int8 [N, K]. scale: floating [N], or [1] for the whole matrix. input_scale: floating [1], or None to take it from each input,
    per_token or for all tokens at once. bias: [N]. reference: never run on Triton.
    Raises TypeError or ValueError, naming the argument, when a dtype or shape does not fit.
    """

    codes: Tensor
    scale: Tensor
    input_scale: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        input_scale: Tensor | None = None,
        per_token: bool = True,
        bias: Tensor | None = None,
        reference: bool = False,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = _matrix_shape(codes)
        self.per_token = per_token
        self.reference = reference
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("input_scale", input_scale)
        self.register_buffer("bias", bias)
        check_int8_arguments(_probe(codes, scale, bias), codes, scale, input_scale, per_token, bias)

    @property
    def kernel(self) -> str:
        """What the layer runs on where its weight lies now."""
        return _integer_kernel(self.codes, self.reference)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., K] to [..., N]."""
        if is_autocast(x):
            return without_autocast(self, x)
        linear = int8_linear if self.reference else w8a8
        return linear(x, self.codes, self.scale, self.input_scale, self.per_token, self.bias)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        inputs = "static" if self.input_scale is not None else "token" if self.per_token else "tensor"
        size = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{size}, inputs={inputs}, bias={self.bias is not None}, kernel={self.kernel}"


class LLMInt8Linear(nn.Module):
    """``nn.Linear`` for inference in 8-bit integers with outlier columns in 16 bit (Dettmers et al. 2022, section 3).

    codes: int8 [N, K]. scale: floating [N], or [1] for the whole matrix. outlier_index: int32 [k], rising, below K. outlier_weight:
    floating [N, k]. threshold: columns with a larger input are split off; None: those in ``outlier_index``. per_token: as in
    ``W8A8Linear``. bias: [N]. reference: never run on Triton.
    Raises TypeError or ValueError, naming the argument, when a dtype, shape or index does not fit.
    """

    codes: Tensor
    scale: Tensor
    outlier_index: Tensor
    outlier_weight: Tensor
    slots: Tensor
    bias: Tensor | None

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        outlier_index: Tensor,
        outlier_weight: Tensor,
        threshold: float | None = None,
        per_token: bool = True,
        bias: Tensor | None = None,
        reference: bool = False,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = _matrix_shape(codes)
        self.threshold = threshold
        self.per_token = per_token
        self.reference = reference
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("outlier_index", outlier_index)
        self.register_buffer("outlier_weight", outlier_weight)
        self.register_buffer("bias", bias)
        probe = _probe(codes, scale, bias)
        check_llm_int8_arguments(probe, codes, scale, outlier_index, outlier_weight, threshold, per_token, bias)
        columns = outlier_index.tolist()
        if columns != sorted(set(columns)) or not all(0 <= column < self.in_features for column in columns):
            raise ValueError(f"outlier_index must hold rising columns below {self.in_features}")
        self.register_buffer("slots", outlier_slots(outlier_index, self.in_features), persistent=False)

    @property
    def kernel(self) -> str:
        """What the layer runs on where its weight lies now."""
        return _integer_kernel(self.codes, self.reference)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., K] to [..., N]."""
        if is_autocast(x):
            return without_autocast(self, x)
        arguments = (self.codes, self.scale, self.outlier_index, self.outlier_weight, self.threshold, self.per_token, self.bias)
        return llm_int8_linear(x, *arguments) if self.reference else llm_int8(x, *arguments, self.slots)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        size = f"in_features={self.in_features}, out_features={self.out_features}"
        outliers = f"threshold={self.threshold}, outliers={len(self.outlier_index)}"
        inputs = "token" if self.per_token else "tensor"
        return f"{size}, inputs={inputs}, {outliers}, bias={self.bias is not None}, kernel={self.kernel}"


def _integer_kernel(codes: Tensor, reference: bool) -> str:
    if reference:
        return "reference"
    if codes.is_cuda:
        return "triton"
    return "torch" if int_mm_is_fast_and_exact() else "reference"


def _matrix_shape(codes: Tensor) -> tuple[int, int]:
    if codes.dim() != 2 or not codes.numel():
        raise ValueError(f"codes must be [N, K], not {list(codes.shape)}")
    return codes.shape[0], codes.shape[1]


def _probe(codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """An input without values, in the dtype that the layer will be given."""
    like = scale if bias is None else bias
    return like.new_empty((1, codes.shape[1]), device="meta")
