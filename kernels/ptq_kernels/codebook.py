"""Linear layer whose codes count the levels of a codebook, such as NF4: ``y = x W'^T + b`` with ``W'[n, k] = levels[code[n, k]] s[n, g]``.

Plain torch on any device. The product of level and scale is float32, rounded once to the dtype of ``x``, as the library of QLoRA does it.
The weight is expanded on every call, some rows at a time on a CPU, and a token's output does not depend on how many there are beyond what
the matrix product itself makes of that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ptq_kernels.autocast import is_autocast, without_autocast
from ptq_kernels.layout import pack_codes, unpack_codes
from ptq_kernels.reference import expanding_linear

BITS = 4


class CodebookLinear(nn.Module):
    """``nn.Linear`` for inference with 4-bit codes of a codebook; computes in the dtype of its input.

    codes: uint8 [N, K] below the number of ``levels``. scale: float32 [N, G], each for K / G neighbouring columns. levels: 16 at most.
    name: of the codebook. bias: [N]. Raises TypeError or ValueError, naming the argument, when a dtype, a shape or a range does not fit.
    """

    kernel = "reference"
    bits = BITS

    packed: Tensor
    scale: Tensor
    levels: Tensor
    bias: Tensor | None

    def __init__(self, codes: Tensor, scale: Tensor, levels: Sequence[float], name: str, bias: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("packed", pack_codes(codes, BITS))
        self.out_features, self.in_features = codes.shape
        if scale.dtype != torch.float32:
            raise TypeError(f"scale must be float32, not {scale.dtype}")
        if scale.dim() != 2 or len(scale) != self.out_features or not scale.shape[1] or self.in_features % scale.shape[1]:
            raise ValueError(f"scale must be [{self.out_features}, G] with G that divides {self.in_features}, not {list(scale.shape)}")
        if not 2 <= len(levels) <= 1 << BITS or (codes.numel() and int(codes.max()) >= len(levels)):
            raise ValueError(f"levels must be 2 to {1 << BITS}, more than the largest code, not {len(levels)}")
        self.name = name
        self.register_buffer("scale", scale)
        self.register_buffer("levels", torch.tensor(levels, dtype=torch.float32, device=codes.device), persistent=False)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., K] to [..., N]."""
        if is_autocast(x):
            return without_autocast(self, x)
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x must have {self.in_features} columns, not {x.shape[-1]}")
        return expanding_linear(x, self.out_features, lambda rows: self.expand(rows, x.dtype), self.bias)

    def expand(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Those rows of the weight, in ``dtype``."""
        codes = unpack_codes(self.packed[rows], BITS, self.in_features)
        values = self.levels.float()[codes.int()].view(len(codes), self.scale.shape[1], -1)
        return values.mul_(self.scale[rows].float().unsqueeze(-1)).view(codes.shape).to(dtype)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.name}, bias={self.bias is not None}"
