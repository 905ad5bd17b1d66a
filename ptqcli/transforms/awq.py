"""AWQ (Lin et al. 2023, "AWQ: Activation-aware Weight Quantization", sections 3.2 and 3.3).

A weight matters as much as the inputs that it meets. Scaling input channel ``c`` up by ``s_c`` before rounding, and its input down,
divides the rounding error of that channel's weights by ``s_c``, at the cost of a coarser grid for the rest of the group. For every fold
the scales are searched on one line (equation 5): with ``x_c`` the mean magnitude of channel ``c`` over the calibration tokens and ``w_c``
the mean magnitude of its weights, each relative to the largest of its group,

    s_c = x_c^alpha                          or, with duo scaling,      s_c = x_c^alpha / w_c^(1 - alpha)

for alpha = 0, 0.1 ... 0.9, normalised so that ``max(s) min(s) = 1``. The s with the least squared error of the block's output wins, when
the fold's readers are rounded with the scale search of the run; no scaling at all takes part. The paper measures the error behind the
attention or the MLP; here it is the whole block's.

Clipping: when all transforms are done, the range of every group of every row is shrunk by each of SHRINK_FACTORS, and the one with the
least squared error of that group's share of the output, ``d G d^T`` with ``d`` the group's rounding errors and ``G`` the Gram matrix of
its sampled inputs, bounds that group's grid (``numerics.ranges.Clipped``), whichever solver then chooses the codes.

A channel that calibration never reached, or whose weights are all zero, keeps the scale 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ptqcli.calibration.statistics import StatisticsRequest
from ptqcli.numerics.ranges import SHRINK_FACTORS, Clipped
from ptqcli.numerics.scheme import WHOLE_MATRIX, Scheme
from ptqcli.options import option
from ptqcli.transforms import BlockTransform
from ptqcli.transforms.folded import FoldedBlock, FoldNote, WeightSpec
from ptqcli.transforms.folds import Fold

ALPHAS = tuple(step / 10 for step in range(10))
SMALLEST_SCALE = 1e-4


@dataclass(frozen=True)
class AWQ(BlockTransform):
    """AWQ with its one option. clip: search the ranges of the groups after the scales."""

    name: ClassVar[str] = "awq"
    summary: ClassVar[str] = "AWQ: channels scaled by what the inputs weigh, then ranges clipped"
    needs: ClassVar[StatisticsRequest] = StatisticsRequest(magnitudes=True, samples=True)
    clip: bool = option(True, "search the range of every group, too", flag="awq-clip")

    def apply(self, block: FoldedBlock) -> list[FoldNote]:
        """Scale every fold that has a linear to quantize."""
        return [_scale(block, fold) for fold in block.folds if block.readers(fold)]

    def finish(self, block: FoldedBlock) -> None:
        """Clip every linear to quantize; columns that a static split takes out are not part of its groups. Blocks are left to the search of
        their own, which fits the grids of a row at once."""
        for local, spec in block.specs.items():
            if not self.clip:
                return
            if spec.scheme.blocks is not None:
                continue
            block.tell(f"awq searches ranges for {local}")
            weight, samples, split = block.weight(local), block.inputs(local).sampled(), spec.scheme.outliers
            outliers = block.outliers(local)
            if split is not None and outliers is not None and not split.dynamic:
                weight, samples = weight[:, ~outliers], samples[:, ~outliers]
            if samples.any():  # otherwise there is no error to search by, and the solver's own search is used
                block.ranges[local] = Clipped(clip_limits(weight, samples, spec, block.search.signed), block.search.signed)


def _scale(block: FoldedBlock, fold: Fold) -> FoldNote:
    block.tell(f"awq searches scales for {fold.producer}")
    return block.best_of(fold, "no scaling", _candidates(block, fold))


def _candidates(block: FoldedBlock, fold: Fold) -> Iterator[tuple[str, Tensor]]:
    readers = block.readers(fold)
    inputs = fold.largest(block.inputs(readers[0]).mean_magnitude())
    summed = torch.stack([_relative_to_group(block.weight(local), block.specs[local].scheme).sum(dim=0) for local in readers])
    weights = fold.largest(summed.sum(dim=0) / sum(len(block.weight(local)) for local in readers))
    usable = (inputs > 0) & (weights > 0)
    for alpha in ALPHAS:
        if alpha > 0:  # alpha 0 without the weights is no scaling
            yield f"alpha {alpha:g}", _normalised(inputs**alpha, usable)
        yield f"alpha {alpha:g} duo", _normalised(inputs**alpha / (weights ** (1 - alpha) + SMALLEST_SCALE), usable)


def _normalised(scales: Tensor, usable: Tensor) -> Tensor:
    """Scales whose largest and smallest multiply to 1; 1 where a channel is not usable."""
    scales = scales.clamp(min=SMALLEST_SCALE)
    among = scales[usable]
    if among.numel() == 0:
        return torch.ones_like(scales)
    return torch.where(usable, scales / (among.max() * among.min()).sqrt(), torch.ones_like(scales))


def _relative_to_group(weight: Tensor, scheme: Scheme) -> Tensor:
    """Magnitudes relative to the largest of each group, [out, in]; 0 in a group of zeros."""
    groups = weight.abs().reshape(len(weight), scheme.group_count(weight.shape[1]), -1)
    largest = groups.amax(dim=2, keepdim=True)
    return (groups / torch.where(largest > 0, largest, torch.ones_like(largest))).reshape(weight.shape)


def clip_limits(weight: Tensor, samples: Tensor, spec: WeightSpec, signed: bool) -> Tensor:
    """The limit [out, groups] of each group's grid that gives the least squared output error.

    weight: float32 [out, in]. samples: inputs of the linear, float32 [tokens, in]. signed: as in ``RangeSearch``.
    """
    scheme = spec.scheme
    columns = scheme.columns_per_group(weight.shape[1])
    limits = [
        _group_limit(group, inputs.t() @ inputs, spec, signed)
        for group, inputs in zip(weight.split(columns, dim=1), samples.split(columns, dim=1), strict=True)
    ]
    return torch.cat(limits, dim=1)


def _group_limit(weight: Tensor, gram: Tensor, spec: WeightSpec, signed: bool) -> Tensor:
    scheme = spec.scheme
    largest = weight.abs().amax(dim=1, keepdim=True)  # [out, 1]
    if scheme.group_size == WHOLE_MATRIX:
        largest = largest.amax().expand_as(largest)
    best, limit = torch.full_like(largest, torch.inf), largest
    for factor in SHRINK_FACTORS:
        difference = Clipped(largest * factor, signed).fit(weight, scheme, spec.scale_dtype).round(weight) - weight
        error = ((difference @ gram) * difference).sum(dim=1, keepdim=True)
        if scheme.group_size == WHOLE_MATRIX:
            error = error.sum().expand_as(error)
        limit = torch.where(error < best, largest * factor, limit)
        best = torch.minimum(best, error)
    return limit
