"""Transforms: each rewrites a block without changing what it computes, so that it quantizes better. One file a method.

A transform is a frozen dataclass of its options that derives from ``BlockTransform`` and has at least ``apply``. It sees a block as
``FoldedBlock`` (``folded.py``): its folds, the statistics of the inputs, the weights, and how far the block's output moves when some
linears are quantized. ``folds.py`` finds the folds.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Protocol

from ptqcli.calibration.statistics import StatisticsRequest
from ptqcli.transforms.folded import FoldedBlock, FoldNote


class BlockTransform(Protocol):
    """Rewrites one block."""

    name: ClassVar[str]
    summary: ClassVar[str]
    needs: ClassVar[StatisticsRequest] = StatisticsRequest()

    @abstractmethod
    def apply(self, block: FoldedBlock) -> list[FoldNote]:
        """Choose scales for the block's folds and apply them; say what was chosen for each."""

    def finish(self, block: FoldedBlock) -> None:
        """Choose what depends on the weights as all transforms have left them; as it stands, nothing."""
        return
