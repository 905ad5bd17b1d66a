"""Linears of one input as one layer: its product is one, and its input is read and rounded once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ptqcli.errors import PTQError
from ptqcli.model.discovery import find_blocks, probe_model
from ptqcli.model.kinds import ModelKind
from ptqcli.numerics.scheme import WHOLE_MATRIX, WHOLE_ROW, Scheme
from ptqcli.numerics.weight import OutlierColumns, QuantizedWeight


def same_input(model: nn.Module, kind: ModelKind, schemes: Mapping[str, Scheme]) -> list[list[str]]:
    """The quantized linears, those of a block that read the same tensor together, in the order of ``schemes``."""
    try:
        probe = probe_model(model, kind)
        blocks = find_blocks(model, ran=probe.order)
    except PTQError:  # nothing is known of this model's inputs: its layers run one by one
        return [[name] for name in schemes]
    prefixes = [f"{blocks}.{index}" for index, _ in enumerate(model.get_submodule(blocks).children())]
    stages = [[f"{prefix}.{local}" for local in stage] for prefix in prefixes for stage in probe.shape(prefix).stages]
    stage_of = {name: place for place, stage in enumerate(stages) for name in stage}
    found: dict[int | str, list[str]] = {}
    for name in schemes:
        found.setdefault(stage_of.get(name, name), []).append(name)
    return list(found.values())


def alike(weights: Mapping[str, tuple[QuantizedWeight, Tensor | None]]) -> Iterator[list[str]]:
    """Names of weights that can be joined along their rows: of one scheme, with the same numbers for their inputs."""
    found: dict[object, list[str]] = {}
    for name, (weight, _) in weights.items():
        inputs = [weight.g_idx, weight.input_scale, None if weight.outliers is None else weight.outliers.index]
        key = (
            weight.scheme,
            weight.codes.shape[1],
            weight.scale.dtype,
            *(None if part is None else tuple(part.tolist()) for part in inputs),
        )
        found.setdefault(key, []).append(name)
    yield from found.values()


def joined_weight(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Weights that are ``alike``, one below the other."""
    first = weights[0]
    if len(weights) == 1:
        return first
    outliers = None
    if first.outliers is not None:
        outliers = OutlierColumns(first.outliers.index, torch.cat([weight.outliers.weight for weight in weights if weight.outliers]))
    scheme = first.scheme
    if scheme.group_size == WHOLE_MATRIX:  # a scale for each of several matrices, so it must be one a row
        scheme = replace(scheme, group_size=WHOLE_ROW)
    codes, scale, zero = (torch.cat([getattr(weight, part) for weight in weights]) for part in ("codes", "scale", "zero"))
    return QuantizedWeight(
        codes=codes, scale=scale, zero=zero, scheme=scheme, g_idx=first.g_idx, input_scale=first.input_scale, outliers=outliers
    )


def joined_bias(weights: Sequence[QuantizedWeight], biases: Sequence[Tensor | None]) -> Tensor | None:
    """Their biases, zero where one has none, or None if none has any."""
    given = next((bias for bias in biases if bias is not None), None)
    if given is None:
        return None
    return torch.cat([given.new_zeros(len(weight.codes)) if bias is None else bias for weight, bias in zip(weights, biases, strict=True)])
