"""Who runs in a kernel benchmark: random inputs and weights, and every contender with its copies of the weight.

Weights are drawn as codes, since rounding real ones would take longer than timing them. Nothing is zero on purpose, inputs have both signs,
and in a scheme that splits off outliers some columns of the input hold outliers. All contenders have the same numbers; each has as many
copies of them as it takes to leave the cache, and memory to hold them all is asked for before the first is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ptqcli.bench.peers import Multiply, Peer, first_line, kernel_errors
from ptqcli.bench.shapes import Shape
from ptqcli.bench.timing import copies
from ptqcli.errors import UsageError
from ptqcli.formats import DEFAULT_FORMAT, LinearSpec, find_format
from ptqcli.numerics.grids import Grid
from ptqcli.numerics.scheme import WHOLE_MATRIX, Scheme
from ptqcli.numerics.weight import OutlierColumns, QuantizedWeight
from ptqcli.resources import free_bytes
from ptqcli.runtime import quantized_linear

BASELINES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}

OUTLIER_COLUMNS = 8  # models of some billion parameters have about as many in a layer's input
OUTLIER_SIZE = 20.0
# Around each weight's code while contenders pack it: the code, its copy, and words or floats of four bytes.
WORKING_BYTES_PER_WEIGHT = 12
# Around each number of the inputs and outputs: in 16 bit and in float32, as sums of integers, and scaled.
WORKING_BYTES_PER_VALUE = 16
ROWS_AT_ONCE = 1024
FEW_ROWS = 64  # that show whether a kernel can do it


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to multiply. kind: ``ours``, ``baseline`` or ``peer``. dtype: of its input.

    weight_bytes: one copy of the weight as stored. arithmetic: the dtype whose limit counts. copies: functions of x [M, K] that return
    [M, N], one for each copy of the weight. same_numbers: it computes with the codes that all have. graphs: a CUDA graph can hold it.
    """

    name: str
    kind: str
    dtype: torch.dtype
    weight_bytes: int
    arithmetic: str
    copies: Sequence[Multiply]
    same_numbers: bool = True
    graphs: bool = True


@dataclass(frozen=True, kw_only=True)
class Lineup:
    """All contenders on one matrix. x: [M, K] for the largest M. failures: a line for each peer that could not be built."""

    x: Tensor
    weight: QuantizedWeight
    contenders: list[Contender]
    failures: list[str]


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def prepare(
    shape: Shape, scheme: Scheme, tokens: int, device: torch.device, dtype: torch.dtype, kernel: str, peers: Sequence[Peer]
) -> Lineup:
    """The contenders on one matrix, for up to ``tokens`` rows of input; baselines first, ours, then the peers that do the scheme.

    Raises what ``check`` raises.
    """
    size = _size_text(shape)
    dense = BASELINES[device.type]
    spare = check(shape, scheme, tokens, device, dtype, kernel, len(peers))
    x = random_inputs(tokens, shape.in_features, dtype, device, scheme)
    weight = random_weight(shape, scheme, x)
    contenders = [_baseline(weight, each, device, spare) for each in dense]
    contenders.append(_ours(weight, dtype, device, kernel, spare))
    failures = []
    for peer in peers:
        try:
            built = _peer(peer, weight, dtype, device, spare)
        except kernel_errors() as error:
            failures.append(f"{peer.name}: {scheme}, {size}: {first_line(error)}")
        else:
            contenders += [] if built is None else [built]
    return Lineup(x=x, weight=weight, contenders=contenders, failures=failures)


def check(shape: Shape, scheme: Scheme, tokens: int, device: torch.device, dtype: torch.dtype, kernel: str, peers: int) -> int:
    """Whether the matrix can be timed, before anything large is made: bytes that each contender may take for copies beside its first.

    Raises UsageError, naming the matrix, if there is no kernel to time, if a group does not divide it, if ``kernel`` cannot do the scheme,
    or if it does not fit into memory.
    """
    size = _size_text(shape)
    if scheme.codebook is not None or scheme.blocks is not None:
        raise UsageError(f"{size}: {scheme} has no kernel of its own to time; choose a --scheme of integers such as w4a16-g64")
    if shape.in_features % scheme.columns_per_group(shape.in_features):
        raise UsageError(f"{size}: group size {scheme.group_size} does not divide its input features; choose another --scheme or --shapes")
    inputs = random_inputs(1, shape.in_features, dtype, device, scheme)
    few_rows = random_weight(replace(shape, out_features=min(shape.out_features, FEW_ROWS)), scheme, inputs)
    try:
        quantized_linear(few_rows, None, dtype, device, kernel)
    except UsageError as error:
        raise UsageError(f"{size}: {error}") from error
    return _spare_memory(size, shape, scheme, tokens, device, dtype, peers)


def _size_text(shape: Shape) -> str:
    return f"{shape.name} ({shape.in_features} x {shape.out_features})"


def _spare_memory(size: str, shape: Shape, scheme: Scheme, tokens: int, device: torch.device, dtype: torch.dtype, peers: int) -> int:
    """Bytes that each contender may take for copies beside its first. Raises UsageError if one copy for each is too much already."""
    weights = shape.in_features * shape.out_features
    dense = [weights * each.itemsize for each in BASELINES[device.type]]
    packed = _planned_bytes(scheme, shape.out_features, shape.in_features, dtype)
    working = WORKING_BYTES_PER_WEIGHT * weights + WORKING_BYTES_PER_VALUE * tokens * (shape.in_features + shape.out_features)
    needed = sum(dense) + packed * (1 + peers) + working
    free = free_bytes(device)
    if needed > free:
        raise UsageError(
            f"{size}: takes {_gib(needed)} of memory with {tokens} tokens, but {_gib(free)} are free; leave it out of --shapes"
        )
    return (free - needed) // 2 // (len(dense) + 1 + peers)  # the other half stays free


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def random_inputs(tokens: int, in_features: int, dtype: torch.dtype, device: torch.device, scheme: Scheme) -> Tensor:
    """Standard normal [tokens, in_features]; where the scheme splits off outliers, some columns are OUTLIER_SIZE times as large."""
    x = torch.randn(tokens, in_features, device=device, generator=torch.Generator(device).manual_seed(1))
    if scheme.outliers is not None:
        x[:, _outlier_columns(in_features, device)] *= OUTLIER_SIZE
    return x.to(dtype)


def _outlier_columns(in_features: int, device: torch.device) -> Tensor:
    """OUTLIER_COLUMNS of them, or all if there are fewer, evenly spread."""
    return torch.arange(0, in_features, max(1, in_features // OUTLIER_COLUMNS), device=device)[:OUTLIER_COLUMNS]


def random_weight(shape: Shape, scheme: Scheme, x: Tensor) -> QuantizedWeight:
    """Random codes, scales and zero points, on the device and with scales in the dtype of ``x`` [M, in_features], the inputs to come.

    Outputs are of the order of 1. A static input scale is the one that fits ``x``.
    """
    out_features, in_features = shape.out_features, shape.in_features
    device, source = x.device, torch.Generator(x.device).manual_seed(0)
    spread = 8 / in_features**0.5  # of a row: levels times scale
    groups = (1, 1) if scheme.group_size == WHOLE_MATRIX else (out_features, scheme.group_count(in_features))
    scale = (torch.rand(groups, device=device, generator=source) + 0.5) * (spread / scheme.levels)
    zero = torch.full(groups, scheme.middle, dtype=torch.uint8, device=device)
    if not scheme.symmetric:
        zero.random_(scheme.levels // 4, 3 * scheme.levels // 4, generator=source)
    codes = torch.randint(0, scheme.levels, (out_features, in_features), dtype=torch.uint8, device=device, generator=source)
    outliers = input_scale = None
    if scheme.outliers is not None:
        index = _outlier_columns(in_features, device)
        values = Grid(scheme.element, scale, zero.float()).decode(codes[:, index].float())  # a column counts the same in 8 bits and in 16
        outliers = OutlierColumns(index.int(), values.to(x.dtype))
        if not scheme.outliers.dynamic:
            codes[:, index] = scheme.middle
    if scheme.activations is not None and not scheme.activations.dynamic:
        input_scale = (x.abs().amax() / 127.5).reshape(1).to(x.dtype)
    everywhere = (out_features, groups[1])
    return QuantizedWeight(
        codes=codes,
        scale=scale.to(x.dtype).expand(everywhere).clone(),
        zero=zero.expand(everywhere).clone(),
        scheme=scheme,
        input_scale=input_scale,
        outliers=outliers,
    )


def rows_of(weight: QuantizedWeight, index: Any) -> QuantizedWeight:
    """Those rows of ``weight`` that ``index`` names: a slice, or int64 [n]."""
    outliers = weight.outliers and OutlierColumns(weight.outliers.index, weight.outliers.weight[index])
    return replace(weight, codes=weight.codes[index], scale=weight.scale[index], zero=weight.zero[index], outliers=outliers)


def dense_weight(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """``weight.dequantize(dtype)`` some rows at a time: it takes many times the memory of what it returns."""
    dense = torch.empty(weight.codes.shape, dtype=dtype, device=weight.codes.device)
    for start in range(0, len(dense), ROWS_AT_ONCE):
        block = slice(start, start + ROWS_AT_ONCE)
        dense[block] = rows_of(weight, block).dequantize(dtype)
    return dense


def stored_bytes(weight: QuantizedWeight) -> int:
    """What ``weight`` takes in a checkpoint of the default format, 16-bit columns included."""
    outliers = 0 if weight.outliers is None else weight.outliers.index.nbytes + weight.outliers.weight.nbytes
    out_features, in_features = weight.codes.shape
    return _planned_bytes(weight.scheme, out_features, in_features, weight.scale.dtype) + outliers


def _planned_bytes(scheme: Scheme, out_features: int, in_features: int, dtype: torch.dtype) -> int:
    spec = LinearSpec(name="", scheme=scheme, out_features=out_features, in_features=in_features, scale_dtype=dtype)
    return find_format(DEFAULT_FORMAT).stored_bytes(spec)


def _copied(weight: QuantizedWeight) -> QuantizedWeight:
    """The same numbers elsewhere in memory, so that no two copies share the tensors that a layer keeps as they are."""
    outliers = weight.outliers and OutlierColumns(weight.outliers.index.clone(), weight.outliers.weight.clone())
    return replace(weight, codes=weight.codes.clone(), scale=weight.scale.clone(), zero=weight.zero.clone(), outliers=outliers)


def _arithmetic(scheme: Scheme, dtype: torch.dtype) -> str:
    return dtype_name(dtype) if scheme.activations is None else "int8"


def _baseline(weight: QuantizedWeight, dtype: torch.dtype, device: torch.device, spare: int) -> Contender:
    first = dense_weight(weight, dtype)
    others = [first.clone() for _ in range(copies(first.nbytes, device, first.nbytes + spare) - 1)]
    name = dtype_name(dtype)
    return Contender(
        name=name,
        kind="baseline",
        dtype=dtype,
        weight_bytes=first.nbytes,
        arithmetic=name,
        copies=[partial(functional.linear, weight=each) for each in [first, *others]],
    )


def _ours(weight: QuantizedWeight, dtype: torch.dtype, device: torch.device, kernel: str, spare: int) -> Contender:
    size, scheme = stored_bytes(weight), weight.scheme
    layers: list[Any] = [
        quantized_linear(_copied(weight), None, dtype, device, kernel).eval() for _ in range(copies(size, device, size + spare))
    ]
    inputs = 16 if scheme.activations is None else scheme.activations.bits
    method = f"W{scheme.bits}A{inputs}" if scheme.outliers is None else "LLM.int8"
    return Contender(
        name=f"{method} {layers[0].kernel}",
        kind="ours",
        dtype=dtype,
        weight_bytes=size,
        arithmetic=_arithmetic(scheme, dtype),
        copies=layers,
    )


def _peer(peer: Peer, weight: QuantizedWeight, dtype: torch.dtype, device: torch.device, spare: int) -> Contender | None:
    size = stored_bytes(weight)
    built: list[Multiply] = []
    for _ in range(copies(size, device, size + spare)):
        multiply = peer.build(_copied(weight), dtype, device)
        if multiply is None:
            return None
        built.append(multiply)
    return Contender(
        name=peer.name,
        kind="peer",
        dtype=dtype,
        weight_bytes=size,
        arithmetic=_arithmetic(weight.scheme, dtype),
        copies=built,
        same_numbers=peer.same_numbers,
        graphs=peer.graphs,
    )
