"""Linear layers whose weight stays in integers."""

from __future__ import annotations

from torch import Tensor, nn

from ptq_kernels.layout import pack_codes
from ptq_kernels.reference import (
    check_arguments,
    check_int8_arguments,
    check_llm_int8_arguments,
    int8_linear,
    llm_int8_linear,
    weight_only_linear,
)


class WeightOnlyLinear(nn.Module):
    """``nn.Linear`` for inference with packed integer weights; computes in the dtype of its input.

    codes: uint8 [N, K] below 2^bits. scale: floating [N, G]. zero: uint8 [N, G], or None for 2^(bits-1) everywhere. group_size:
    neighbouring columns per scale, -1 for whole rows. bias: [N]. g_idx: int32 [K], the group of each column.
    Raises TypeError or ValueError, naming the argument, when a dtype or shape does not fit.
    """

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
        self.out_features, self.in_features = codes.shape
        self.bits = bits
        self.group_size = group_size
        self.register_buffer("packed", pack_codes(codes, bits))
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        self.register_buffer("bias", bias)
        self.register_buffer("g_idx", g_idx)
        probe = scale.new_empty((1, self.in_features), device="meta")
        check_arguments(probe, self.packed, scale, zero, bits, group_size, bias, g_idx)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., K] to [..., N]."""
        return weight_only_linear(x, self.packed, self.scale, self.zero, self.bits, self.group_size, self.bias, self.g_idx)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        size = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{size}, bits={self.bits}, group_size={self.group_size}, bias={self.bias is not None}"


class W8A8Linear(nn.Module):
    """``nn.Linear`` for inference in 8-bit integers, weights and inputs (SmoothQuant, section 2); returns the dtype of its input.

    codes: int8 [N, K]. scale: floating [N], or [1] for the whole matrix. input_scale: floating [1], or None to take it from each input,
    per_token or for all tokens at once. bias: [N].
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
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = _matrix_shape(codes)
        self.per_token = per_token
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("input_scale", input_scale)
        self.register_buffer("bias", bias)
        check_int8_arguments(_probe(codes, scale, bias), codes, scale, input_scale, per_token, bias)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., K] to [..., N]."""
        return int8_linear(x, self.codes, self.scale, self.input_scale, self.per_token, self.bias)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        inputs = "static" if self.input_scale is not None else "token" if self.per_token else "tensor"
        return f"in_features={self.in_features}, out_features={self.out_features}, inputs={inputs}, bias={self.bias is not None}"


class LLMInt8Linear(nn.Module):
    """``nn.Linear`` for inference in 8-bit integers with outlier columns in 16 bit (Dettmers et al. 2022, section 3).

    codes: int8 [N, K]. scale: floating [N], or [1] for the whole matrix. outlier_index: int32 [k], rising, below K. outlier_weight:
    floating [N, k]. threshold: columns with a larger input are split off; None: those in ``outlier_index``. per_token: as in
    ``W8A8Linear``. bias: [N]. Raises TypeError or ValueError, naming the argument, when a dtype, shape or index does not fit.
    """

    codes: Tensor
    scale: Tensor
    outlier_index: Tensor
    outlier_weight: Tensor
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
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = _matrix_shape(codes)
        self.threshold = threshold
        self.per_token = per_token
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

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., K] to [..., N]."""
        return llm_int8_linear(
            x, self.codes, self.scale, self.outlier_index, self.outlier_weight, self.threshold, self.per_token, self.bias
        )

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        size = f"in_features={self.in_features}, out_features={self.out_features}"
        outliers = f"threshold={self.threshold}, outliers={len(self.outlier_index)}"
        return f"{size}, inputs={'token' if self.per_token else 'tensor'}, {outliers}, bias={self.bias is not None}"


def _matrix_shape(codes: Tensor) -> tuple[int, int]:
    if codes.dim() != 2:
        raise ValueError(f"codes must be [N, K], not {list(codes.shape)}")
    return codes.shape[0], codes.shape[1]


def _probe(codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """An input without values, in the dtype that the layer will be given."""
    like = scale if bias is None else bias
    return like.new_empty((1, codes.shape[1]), device="meta")
