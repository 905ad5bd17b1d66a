"""A linear layer whose weight stays packed."""

from __future__ import annotations

from torch import Tensor, nn

from ptq_kernels.layout import pack_codes
from ptq_kernels.reference import check_arguments, weight_only_linear


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
