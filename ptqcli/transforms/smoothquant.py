"""SmoothQuant (Xiao et al. 2022, section 4).

A few channels of the inputs are a hundred times as large as the others, so that 8 bits for a token leave next to nothing to the rest, while
weights are even and easy to quantize. Dividing channel ``c`` of the inputs by ``s_c`` and multiplying the weights' column by it shares the
difficulty between the two (equation 4):

    s_c = max|X_c|^alpha / max|W_c|^(1 - alpha)

with the largest magnitudes over the calibration tokens and over all linears that read the channel. ``alpha`` is given, 0.5 in the paper for
most models, or searched for every fold ("auto") as the one of ALPHAS with the least squared error of the block's output when the fold's
readers compute in their scheme, activations included.

A channel that calibration never reached, or whose weights are all zero, keeps the scale 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ptqcli.calibration.statistics import StatisticsRequest
from ptqcli.errors import UsageError
from ptqcli.numerics.scheme import WHOLE_MATRIX
from ptqcli.options import SchemeDefaults, check_choices, option
from ptqcli.transforms import BlockTransform
from ptqcli.transforms.folded import FoldedBlock, FoldNote
from ptqcli.transforms.folds import Fold

AUTO = "auto"
ALPHAS = tuple(step / 20 for step in range(21))
SMALLEST_SCALE = 1e-5

# Settings of the paper (table 2): weights have one scale in all, activations these.
LEVELS = {"O1": "token", "O2": "tensor", "O3": "static"}


@dataclass(frozen=True)
class SmoothQuant(BlockTransform):
    """SmoothQuant with its options.

    alpha: from 0 (all difficulty stays in the activations) to 1 (all in the weights), or "auto". level: O1, O2 or O3 of the paper.
    """

    name: ClassVar[str] = "smoothquant"
    summary: ClassVar[str] = "SmoothQuant: outliers moved from the activations into the weights"
    needs: ClassVar[StatisticsRequest] = StatisticsRequest(magnitudes=True)
    alpha: float | str = option(0.5, "share moved to the weights", flag="smooth-alpha", metavar=f"X|{AUTO}")
    level: str | None = option(
        None,
        "settings of the paper: one scale for a weight matrix, and --act-scales token, tensor or static",
        flag="smooth-level",
        choices=tuple(LEVELS),
    )

    def __post_init__(self) -> None:
        check_choices(self)
        number = isinstance(self.alpha, (int, float)) and not isinstance(self.alpha, bool)
        if self.alpha != AUTO and not (number and 0 <= float(self.alpha) <= 1):
            raise UsageError(f"smooth alpha {self.alpha!r} is not valid; give a number from 0 to 1, or {AUTO}")

    @property
    def scheme_defaults(self) -> SchemeDefaults:
        """8 bits for both sides, and what the level says."""
        plain = SchemeDefaults(bits=8, abits=8)
        if self.level is None:
            return plain
        return replace(plain, group_size=WHOLE_MATRIX, act_scales=LEVELS[self.level], fixed_by=f"smooth level {self.level}")

    @property
    def tries(self) -> bool:
        """Where alpha is searched for."""
        return self.alpha == AUTO

    def apply(self, block: FoldedBlock) -> list[FoldNote]:
        """Smooth every fold that has a linear to quantize."""
        return [self._smooth(block, fold) for fold in block.folds if block.readers(fold)]

    def _smooth(self, block: FoldedBlock, fold: Fold) -> FoldNote:
        if isinstance(self.alpha, str):
            block.tell(f"smoothquant searches alpha for {fold.producer}")
            return block.best_of(fold, "no smoothing", ((f"alpha {alpha:g}", smoothing_scales(block, fold, alpha)) for alpha in ALPHAS))
        block.scale(fold, smoothing_scales(block, fold, self.alpha))
        return FoldNote(producer=fold.producer, readers=fold.readers, choice=f"alpha {self.alpha:g}")


def smoothing_scales(block: FoldedBlock, fold: Fold, alpha: float) -> Tensor:
    """Equation 4 for the channels of the fold's producer, [fold.width]."""
    readers = block.readers(fold)
    largest = block.inputs(readers[0]).largest
    assert largest is not None
    inputs = fold.largest(largest)
    weights = fold.largest(torch.stack([block.weight(local).abs().amax(dim=0) for local in readers]).amax(dim=0))
    usable = (inputs > 0) & (weights > 0)
    scales = inputs.clamp(min=SMALLEST_SCALE) ** alpha / weights.clamp(min=SMALLEST_SCALE) ** (1 - alpha)
    return torch.where(usable, scales.clamp(min=SMALLEST_SCALE), torch.ones_like(scales))
