"""What the cases of ``gpu_check.py`` run on: random layers, signed inputs, and float64 of the same codes and scales. No program of its own.

A case is a name and a function that returns what it found, as plain numbers and texts, or raises AssertionError with one line.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
for package, home in (("ptq_kernels", ROOT / "kernels"), ("ptqcli", ROOT)):
    if find_spec(package) is None:
        sys.path.append(str(home))

from ptqcli.bench.peers import kernel_errors  # noqa: E402
from ptqcli.numerics.scheme import WHOLE_MATRIX, ActivationScheme, OutlierSplit, Scheme  # noqa: E402
from ptqcli.numerics.weight import OutlierColumns, QuantizedWeight  # noqa: E402

Values = dict[str, Any]
Case = Callable[[], Values]

TOLERANCE = 4e-3  # relative Frobenius error of a 16-bit output
PEER_TOLERANCE = 1e-2  # some round their zero points to 16 bits ...
PEER_INT8_TOLERANCE = 3e-2  # ... and inputs in 8 bits are rounded to steps of max / 127, where ours are max / 127.5
WHAT_CASES_RAISE = kernel_errors()

TOKENS = (1, 2, 3, 16, 17, 64, 300)
DTYPES = (torch.bfloat16, torch.float16)
# out and in features by group size; a flipped code is looked for in the first of each, where it is a large part of a row
ODD_SHAPES = {
    32: ((101, 96), (1000, 2112)),
    64: ((67, 704), (515, 2112)),
    128: ((131, 384), (515, 2176)),
    -1: ((70, 99), (33, 704), (257, 2112)),
}
INT8_SHAPES = ((70, 99), (33, 704), (515, 2112), (1000, 2048))

TIMED_TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
# As a runtime multiplies them: q, k and v in one, gate and up in one. The last is one of those two by itself.
SHAPES = {
    "qkv": (4096, 6144),
    "o": (4096, 4096),
    "gate_up": (4096, 28672),
    "down": (14336, 4096),
    "up": (4096, 14336),
}  # in_features, out_features
OURS, BASELINE = "ours", "bfloat16"
SCHEMES = {
    "W4A16": Scheme(4, 128),
    "W8A8": Scheme(8, -1, activations=ActivationScheme()),
    "LLM.int8": Scheme(8, -1, activations=ActivationScheme(), outliers=OutlierSplit()),
}
OUTLIERS = 7  # columns, as in the paper for a model of 4096


@dataclass(frozen=True)
class GpuRun:
    """Where the cases run. rehearse: on the CPU, at sizes that take no time, by the operators' own way for machines without a GPU.

    ready: names of the preparations that succeeded. eager: peers that turned out to fit into no CUDA graph.
    """

    rehearse: bool = False
    ready: frozenset[str] = frozenset()
    eager: frozenset[str] = frozenset()

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.rehearse else "cuda")

    @property
    def tokens(self) -> tuple[int, ...]:
        return (1, 17) if self.rehearse else TOKENS

    @property
    def timed_tokens(self) -> tuple[int, ...]:
        return (1, 4) if self.rehearse else TIMED_TOKENS

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        return {"up": (256, 384)} if self.rehearse else SHAPES

    @property
    def seconds(self) -> float:
        """For each contender of a timing."""
        return 0.002 if self.rehearse else 0.1


@dataclass(frozen=True)
class Layer:
    """A random layer. perm: int32 [K], its columns belong to those of the input in this order. bias: [N] in the dtype of the input."""

    weight: QuantizedWeight
    bias: Tensor | None = None
    perm: Tensor | None = None


def make_layer(scheme: Scheme, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device, order: bool = False) -> Layer:
    """Random codes, scales in ``dtype``, zero points and a bias; in an outlier split, two columns of which are stored in 16 bit."""
    generator = torch.Generator(device).manual_seed(out_features * in_features + scheme.bits)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    groups = scheme.group_count(in_features)
    codes = torch.randint(0, scheme.levels, (out_features, in_features), generator=generator, device=device, dtype=torch.uint8)
    zero = torch.full((out_features, groups), scheme.middle, dtype=torch.uint8, device=device)
    if not scheme.symmetric:
        zero = torch.randint(0, scheme.levels, (out_features, groups), generator=generator, device=device, dtype=torch.uint8)
    signs = torch.where(uniform(out_features, groups) < 0.5, -1, 1)
    scale = ((uniform(out_features, groups) + 0.5) * signs * 0.32 / scheme.levels).to(dtype)
    if scheme.group_size == WHOLE_MATRIX:
        scale[:] = scale[0].clone()
    given = torch.tensor([0.03], device=device) if scheme.activations and not scheme.activations.dynamic else None
    outliers = None
    if scheme.outliers:
        index = torch.tensor([1, in_features - 1], dtype=torch.int32, device=device)
        outliers = OutlierColumns(index, (uniform(out_features, 2) - 0.5).to(dtype))
    perm = torch.randperm(in_features, generator=generator, device=device).to(torch.int32) if order else None
    return Layer(
        QuantizedWeight(codes=codes, scale=scale, zero=zero, scheme=scheme, input_scale=given, outliers=outliers),
        (uniform(out_features) - 0.5).to(dtype),
        perm,
    )


def make_input(tokens: int, in_features: int, dtype: torch.dtype, device: torch.device, outliers: int = 0) -> Tensor:
    """Signed normal numbers, [tokens, in_features], none above the threshold of an outlier split but in so many columns."""
    generator = torch.Generator(device).manual_seed(tokens * in_features)
    x = torch.randn(tokens, in_features, generator=generator, device=device).clamp_(-4, 4)
    for place in range(outliers):
        x[place % tokens, (place * in_features) // outliers + place % 2] = -40.0
    return x.to(dtype)


def signed(weight: QuantizedWeight) -> Tensor:
    """Symmetric codes as int8, zero in the middle."""
    return (weight.codes - weight.scheme.middle).view(torch.int8)


def ours(layer: Layer, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Our operator for the layer."""
    weight, scheme, bias = layer.weight, layer.weight.scheme, layer.bias
    if scheme.activations is None:
        w4a16 = import_module("ptq_kernels.w4a16")
        packed, scale, zero = tiles(weight, dtype)
        out_features = len(weight.codes)
        return lambda x: w4a16.w4a16(x, packed, scale, zero, scheme.bits, scheme.group_size, out_features, bias, layer.perm)
    codes, scale, per_token = signed(weight), int8_scale(weight), scheme.activations.per_token
    if weight.outliers is None or scheme.outliers is None:
        w8a8 = import_module("ptq_kernels.w8a8")
        return lambda x: w8a8.w8a8(x, codes, scale, weight.input_scale, per_token, bias)
    llm_int8 = import_module("ptq_kernels.llm_int8")
    slots = llm_int8.outlier_slots(weight.outliers.index, codes.shape[1])
    threshold = scheme.outliers.threshold if scheme.outliers.dynamic else None
    split = (weight.outliers.index, weight.outliers.weight, threshold, per_token)
    return lambda x: llm_int8.llm_int8(x, codes, scale, *split, bias, slots)


def int8_scale(weight: QuantizedWeight) -> Tensor:
    """[N], or [1] for the whole matrix."""
    scale = weight.scale.flatten()
    return scale[:1].clone() if weight.scheme.group_size == WHOLE_MATRIX else scale


def tiles(weight: QuantizedWeight, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and zero points as the W4A16 kernels read them."""
    packing = import_module("ptq_kernels.packing")
    zero = None if weight.scheme.symmetric else packing.pack_groups(weight.zero, torch.int16)
    return packing.pack_tiles(weight.codes, weight.scheme.bits), packing.pack_groups(weight.scale, dtype), zero


def truth(layer: Layer, x: Tensor) -> Tensor:
    """What the layer's output is in float64: inputs in 8 bits are rounded as the reference rounds them, everything else is exact."""
    weight, activations = layer.weight, layer.weight.scheme.activations
    x = x if layer.perm is None else x[:, layer.perm.long()]
    group = torch.arange(x.shape[1], device=x.device) // (x.shape[1] // weight.scale.shape[1])
    values = (weight.codes.double() - weight.zero.double()[:, group]) * weight.scale.double()[:, group]
    bias = 0.0 if layer.bias is None else layer.bias.double()
    if activations is None:
        return x.double() @ values.T + bias
    apart = outlier_columns(layer, x)
    below = x.float().index_fill(1, apart, 0)
    scale = weight.input_scale
    if scale is None:
        scale = below.abs().amax(dim=1, keepdim=True) if activations.per_token else below.abs().amax().reshape(1)
        # By a tensor: a Python number torch on CUDA divides by through its reciprocal, which rounds otherwise.
        scale = torch.where(scale > 0, scale / scale.new_full((), 127.5), 1.0)
    rounded = torch.round(below / scale).clamp(-128, 127).double() * scale.double()
    if weight.outliers is not None:
        values = values.index_fill(1, apart, 0) + columns_apart(weight, values, apart, x.dtype)
        rounded[:, apart] = x.double()[:, apart]
    return rounded @ values.T + bias


def outlier_columns(layer: Layer, x: Tensor) -> Tensor:
    """The columns that the split takes out of the int8 product."""
    split, stored = layer.weight.scheme.outliers, layer.weight.outliers
    if split is None or stored is None:
        return torch.empty(0, dtype=torch.int64, device=x.device)
    return (x.abs() > split.threshold).any(dim=0).nonzero().flatten() if split.dynamic else stored.index.long()


def columns_apart(weight: QuantizedWeight, values: Tensor, apart: Tensor, dtype: torch.dtype) -> Tensor:
    """The 16-bit columns that the split multiplies, zero elsewhere: stored ones, else dequantized and rounded."""
    assert weight.outliers is not None
    whole = values.to(dtype).double()
    whole[:, weight.outliers.index.long()] = weight.outliers.weight.double()
    return torch.zeros_like(values).index_copy_(1, apart, whole[:, apart])


def error(found: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error; NaN where anything was left unwritten."""
    return float((found.double() - expected).norm() / expected.norm())


def in_poisoned_memory(call: Callable[[], Tensor]) -> Tensor:
    """``call()``, with NaN, or the largest integer, in all memory that torch hands out meanwhile: outputs, workspaces, counters."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        return call()
    finally:
        torch.use_deterministic_algorithms(False)


def flipped(layer: Layer, x: Tensor) -> Layer:
    """The layer with the highest bit of one code flipped: in the middle row, where the first token's input is largest."""
    column = int(x[0].abs().argmax())
    if layer.perm is not None:
        column = int((layer.perm == column).nonzero())
    codes = layer.weight.codes.clone()
    codes[len(codes) // 2, column] ^= layer.weight.scheme.middle
    return replace(layer, weight=replace(layer.weight, codes=codes))


def first_rows(layer: Layer, rows: int) -> Layer:
    """Float64 of a few outputs is enough to see a wrong layout, and costs little."""
    weight = layer.weight
    outliers = weight.outliers and OutlierColumns(weight.outliers.index, weight.outliers.weight[:rows])
    return Layer(replace(weight, codes=weight.codes[:rows], scale=weight.scale[:rows], zero=weight.zero[:rows], outliers=outliers))


def timed_outliers(scheme: str) -> int:
    return OUTLIERS if SCHEMES[scheme].outliers else 0


def copied(layer: Layer) -> Layer:
    weight = layer.weight
    return replace(layer, weight=replace(weight, codes=weight.codes.clone(), scale=weight.scale.clone()))
