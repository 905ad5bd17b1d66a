"""Random layers and inputs, each from a seed, and what a layer computes, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from ptqcli.calibration.statistics import Hessian
from ptqcli.errors import PTQError
from ptqcli.formats import Format
from ptqcli.numerics.scheme import Scheme
from ptqcli.numerics.weight import OutlierColumns, QuantizedWeight


class Layer(NamedTuple):
    codes: Tensor  # uint8 [rows, columns]
    scale: Tensor  # [rows, groups]
    zero: Tensor | None  # uint8 [rows, groups]; None stands for the middle of the codes
    bias: Tensor  # [rows], dtype of the scales


def random_codes(rows: int, columns: int, bits: int, seed: int = 0) -> Tensor:
    """uint8 [rows, columns]; ``view(torch.int8)`` makes those of 8 bits signed integers."""
    return torch.randint(0, 1 << bits, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def random_inputs(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    """Of normal distribution, both signs."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def signs(rows: int, columns: int, seed: int = 0) -> Tensor:
    """1 and -1, as often as not."""
    return torch.randint(0, 2, (rows, columns), generator=torch.Generator().manual_seed(seed + 1)) * 2 - 1


def random_layer(
    rows: int, columns: int, bits: int, group_size: int, dtype: torch.dtype = torch.float32, symmetric: bool = True, seed: int = 0
) -> Layer:
    """Groups of ``group_size`` columns, or whole rows for -1; scales have both signs and differ by a factor of up to eleven."""
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if group_size == -1 else columns // group_size
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(rows, groups, generator=generator) * 0.1 + 0.01).to(dtype) * signs(rows, groups, seed).to(dtype)
    zero = None if symmetric else torch.randint(0, 1 << bits, (rows, groups), generator=generator, dtype=torch.uint8)
    return Layer(codes, scale, zero, torch.randn(rows, generator=generator).to(dtype))


def exact_weight(codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, index: Tensor | None = None) -> Tensor:
    """float64 [rows, columns]. index: the group of each column; without it groups are neighbours."""
    columns, groups = codes.shape[1], scale.shape[1]
    if index is None:
        index = torch.arange(columns) // (columns // groups)
    centre = torch.full(scale.shape, 2.0 ** (bits - 1), dtype=torch.float64) if zero is None else zero.double()
    return (codes.double() - centre[:, index]) * scale.double()[:, index]


def exact_output(x: Tensor, layer: Layer, bits: int, index: Tensor | None = None) -> Tensor:
    return x.double() @ exact_weight(layer.codes, layer.scale, layer.zero, bits, index).T + layer.bias.double()


def random_weight(
    scheme: Scheme, out_features: int, in_features: int, seed: int = 0, dtype: torch.dtype = torch.float32, outliers: int = 3
) -> QuantizedWeight:
    """All that a weight of ``scheme`` can hold. outliers: the number of its columns in 16 bit, if it has such."""
    generator = torch.Generator().manual_seed(seed)
    groups = scheme.group_count(in_features)

    def integers(*shape: int) -> Tensor:
        return torch.randint(0, scheme.levels, shape, generator=generator, dtype=torch.uint8)

    scale = (torch.rand(out_features, groups, generator=generator) + 0.01).to(dtype) * signs(out_features, groups, seed).to(dtype)
    if scheme.group_size == 0:
        scale = scale[:1].expand(out_features, 1).clone()
    zero = torch.full((out_features, groups), scheme.middle, dtype=torch.uint8)
    if not scheme.symmetric:
        zero = integers(out_features, groups)
    static = scheme.activations is not None and not scheme.activations.dynamic
    input_scale = torch.rand(1, generator=generator).to(dtype) if static else None
    columns = None
    if scheme.outliers is not None:
        index = torch.randperm(in_features, generator=generator)[:outliers].sort().values.int()
        columns = OutlierColumns(index, torch.randn(out_features, len(index), generator=generator).to(dtype))
    return QuantizedWeight(
        codes=integers(out_features, in_features),
        scale=scale,
        zero=zero,
        scheme=scheme,
        input_scale=input_scale,
        outliers=columns,
    )


def correlated_layer(out: int, columns: int, tokens: int, dtype: torch.dtype, seed: int, spread: float) -> tuple[Tensor, Hessian]:
    """A matrix [out, columns] and the Hessian of correlated inputs whose columns differ in size by factors of 10^-spread to 10^spread."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, columns, generator=generator, dtype=torch.float64)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
    inputs = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ (mix + torch.eye(columns, dtype=torch.float64))
    inputs *= torch.logspace(-spread, spread, columns, dtype=torch.float64)[torch.randperm(columns, generator=generator)]
    hessian = Hessian.zeros(columns, torch.device("cpu"), torch.float64)
    hessian.add(inputs)
    hessian.sums = hessian.sums.to(dtype)
    return weight.to(dtype), hessian


Change = Callable[[dict[str, Tensor]], Any]


def refused_when_damaged(stored_as: Format, scheme: Scheme, tensors: dict[str, Tensor], change: Change, message: str) -> None:
    """The linear ``m`` is read from ``tensors``; after ``change`` it is refused, in one line that ``message`` is found in."""
    stored_as.unpack("m", tensors.__getitem__, scheme)
    change(tensors)
    with pytest.raises(PTQError, match=message) as caught:
        stored_as.unpack("m", tensors.__getitem__, scheme)
    assert "\n" not in str(caught.value)
