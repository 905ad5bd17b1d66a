"""Weights that are stored as 8- or 4-bit floats with scales, as the numbers that they stand for.

FP8. ``N`` is float8 [..., out, in] beside a scale, ``N_scale_inv`` (DeepSeek-V3, arXiv:2412.19437, section 3.3.2) or ``N_scale`` (of
libraries that quantize), for the whole matrix, for each row, or for each block of 128 x 128 of it, those at the end being what is left:

    W[o, i] = fp8[o, i] * scale[o // 128, i // 128]

The product is taken in float32 and rounded once to the dtype of the model, as in the code that came with the first such model.

MXFP4 (OCP Microscaling Formats 1.0, section 5.2). ``X_blocks`` is uint8 [E, out, in / 32, 16], two 4-bit floats (1 sign, 2 exponent,
1 mantissa bit) a byte with the earlier column in the low half, ``X_scales`` uint8 [E, out, in / 32], a power of two each:

    W[e, o, 32 g + j] = fp4[e, o, g, j] * 2^(scale[e, o, g] - 127)

Such are stacks of experts, which transformers keeps as [E, in, out]; every value is exact in bfloat16 but beside the ends of its range.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ptqcli.checkpoint.tensors import FLOATING, SafetensorsFolder, TensorSource, refuse_not_finite
from ptqcli.errors import PTQError

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
FP8_SCALES = ("_scale_inv", "_scale")  # behind the name of the weight
INPUT_SCALES = ("input_scale", "activation_scale")  # of the inputs of a linear whose weight is FP8
BLOCK = (128, 128)

MXFP4_BLOCKS, MXFP4_SCALES = "_blocks", "_scales"
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by the low three bits
BYTES, COLUMNS = 16, 32  # of a group


class _Scaled(Protocol):
    """A weight that is stored as several tensors. parts: their names."""

    @property
    def parts(self) -> tuple[str, ...]: ...

    def shape(self, stored: SafetensorsFolder) -> tuple[int, ...]: ...

    def read(self, stored: SafetensorsFolder, dtype: torch.dtype) -> Tensor: ...

    def read_entry(self, stored: SafetensorsFolder, dtype: torch.dtype, index: int) -> Tensor: ...


@dataclass(frozen=True)
class FP8:
    """One FP8 weight. block: rows and columns that share a scale, where there are blocks."""

    name: str
    scale: str
    block: tuple[int, int]

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of its tensors."""
        return self.name, self.scale

    def shape(self, stored: SafetensorsFolder) -> tuple[int, ...]:
        """Its shape."""
        return stored.shape(self.name)

    def read(self, stored: SafetensorsFolder, dtype: torch.dtype) -> Tensor:
        """Its values. Raises PTQError, naming tensor and file, for scales of another shape, and for values that ``dtype`` does not hold."""
        return self._scaled(stored.read(self.name).float(), _scale(stored, self.scale), stored, dtype)

    def read_entry(self, stored: SafetensorsFolder, dtype: torch.dtype, index: int) -> Tensor:
        """One matrix of a stack."""
        values, scale = stored.read_entry(self.name, index).float(), _scale(stored, self.scale)
        stacked = scale.dim() > 1 and len(scale) == stored.shape(self.name)[0]
        return self._scaled(values, scale[index] if stacked else scale, stored, dtype)

    def _scaled(self, values: Tensor, scale: Tensor, stored: SafetensorsFolder, dtype: torch.dtype) -> Tensor:
        if scale.numel() == 1:
            return values.mul_(scale.flatten()).to(dtype)
        if scale.shape == values.shape[:-1]:
            return values.mul_(scale[..., None]).to(dtype)
        if scale.shape == (*values.shape[:-1], 1):
            return values.mul_(scale).to(dtype)
        return values.mul_(self._spread(scale, values.shape, stored)).to(dtype)

    def _spread(self, scale: Tensor, shape: Sequence[int], stored: SafetensorsFolder) -> Tensor:
        """The scale of each weight."""
        *stack, out_features, in_features = shape
        rows, columns = self.block
        wanted = (*stack, -(-out_features // rows), -(-in_features // columns))
        if scale.shape != wanted:
            raise PTQError(
                f"{stored.path(self.scale)}: tensor {self.scale} has shape {list(scale.shape)}; {self.name} {list(shape)} takes "
                f"{list(wanted)} for blocks of {rows} x {columns}, one a row, or one in all"
            )
        return scale.repeat_interleave(rows, -2)[..., :out_features, :].repeat_interleave(columns, -1)[..., :in_features]


@dataclass(frozen=True)
class MXFP4:
    """One stack of matrices in MXFP4."""

    name: str

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of its tensors."""
        return self.name + MXFP4_BLOCKS, self.name + MXFP4_SCALES

    def shape(self, stored: SafetensorsFolder) -> tuple[int, ...]:
        """[E, in, out]. Raises PTQError, naming tensor and file, if the parts do not fit each other."""
        blocks, scales = self.parts
        found, beside = stored.shape(blocks), stored.shape(scales)
        if len(found) != 4 or found[-1] != BYTES or found[:-1] != beside:
            raise PTQError(
                f"{stored.path(blocks)}: tensor {blocks} has shape {list(found)}, and {scales} {list(beside)}; MXFP4 takes "
                f"[E, out, in / {COLUMNS}, {BYTES}] and [E, out, in / {COLUMNS}]"
            )
        experts, out_features, groups, _ = found
        return experts, groups * COLUMNS, out_features

    def read(self, stored: SafetensorsFolder, dtype: torch.dtype) -> Tensor:
        """Its values. Raises PTQError for parts of other shapes or dtypes."""
        self._check(stored)
        made = torch.empty(self.shape(stored), dtype=dtype)
        for expert in range(len(made)):  # in float32 a stack would take many times what it takes on disk
            made[expert] = self._matrix(stored, expert)
        return made

    def read_entry(self, stored: SafetensorsFolder, dtype: torch.dtype, index: int) -> Tensor:
        """One matrix of it, [in, out]."""
        self._check(stored)
        return self._matrix(stored, index).to(dtype).contiguous()

    def _matrix(self, stored: SafetensorsFolder, expert: int) -> Tensor:
        return _fp4(*(stored.read_entry(part, expert) for part in self.parts)).t()

    def _check(self, stored: SafetensorsFolder) -> None:
        self.shape(stored)
        for part in self.parts:
            if stored.dtype(part) != torch.uint8:
                raise PTQError(f"{stored.path(part)}: tensor {part} is {stored.dtype(part)}; MXFP4 is stored as uint8")


def _fp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """float32 [out, in] of uint8 [out, G, 16] and [out, G]."""
    codes = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2)
    magnitudes = torch.tensor(FP4_VALUES)[(codes & 7).int()]
    return torch.ldexp(torch.where(codes > 7, -magnitudes, magnitudes), scales[..., None].int() - 127).flatten(-2)


def _scale(stored: SafetensorsFolder, name: str) -> Tensor:
    """Scales as float32. Raises PTQError for what is none."""
    if stored.dtype(name) not in FLOATING:
        raise PTQError(f"{stored.path(name)}: tensor {name} is {stored.dtype(name)}; scales of FP8 weights are read as floating numbers")
    scale = stored.read(name).float()
    if not scale.numel() or bool((scale < 0).any()):
        raise PTQError(f"{stored.path(name)}: tensor {name} holds no scale, or a negative one; download it again")
    return scale


class ScaledFloats(TensorSource):
    """The tensors of a folder with numbers of ``dtype`` in the place of 8- and 4-bit floats, made when they are read.

    block: rows and columns that share a scale, where FP8 weights have blocks. kinds: which such weights there are, by what they are called.
    """

    def __init__(self, stored: SafetensorsFolder, dtype: torch.dtype, block: tuple[int, int] = BLOCK) -> None:
        self.stored, self._dtype, self.block = stored, dtype, block
        self._scaled: dict[str, _Scaled] = {}
        names = set(stored.names)
        for name in stored.names:
            weight = name.removesuffix(MXFP4_BLOCKS)
            if weight != name and weight + MXFP4_SCALES in names:
                self._scaled[weight] = MXFP4(weight)
            scale = next((name + end for end in FP8_SCALES if name + end in names), None)
            if scale is not None and stored.dtype(name) in FP8_DTYPES:
                self._scaled[name] = FP8(name, scale, block)
        parts = {part for weight in self._scaled.values() for part in weight.parts}
        inputs = {f"{weight.rpartition('.')[0]}.{part}" for weight in self._scaled for part in INPUT_SCALES}
        self._names = tuple(sorted((names - parts - inputs) | self._scaled.keys()))
        self.kinds = tuple(sorted({type(weight).__name__ for weight in self._scaled.values()}))

    @property
    def names(self) -> tuple[str, ...]:
        """All tensor names, sorted."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of ``name``. Raises PTQError, here and below, if there is no such tensor, or its parts do not fit each other."""
        return self._scaled[name].shape(self.stored) if name in self._scaled else self.stored.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of ``name``."""
        return self._dtype if name in self._scaled else self.stored.dtype(name)

    def read(self, name: str) -> Tensor:
        """The tensor ``name``. Raises PTQError if it holds NaN or infinity, or values beyond its dtype."""
        if name not in self._scaled:
            return self.stored.read(name)
        return self._finite(name, self._scaled[name].read(self.stored, self._dtype))

    def read_entry(self, name: str, index: int) -> Tensor:
        """Entry ``index`` of the first dimension of ``name``, read by itself."""
        if name not in self._scaled:
            return self.stored.read_entry(name, index)
        return self._finite(name, self._scaled[name].read_entry(self.stored, self._dtype, index))

    def _finite(self, name: str, values: Tensor) -> Tensor:
        refuse_not_finite(values, f"{self.stored.path(self._scaled[name].parts[0])}: tensor {name}, in {self._dtype},")
        return values
