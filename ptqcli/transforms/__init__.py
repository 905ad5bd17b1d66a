"""Transforms: each rewrites a block, or the whole model, without changing what it computes, so that it quantizes better. One file a method.

A transform is a frozen dataclass of its options. One that derives from ``BlockTransform`` has at least ``apply``; it sees a block as
``FoldedBlock`` (``folded.py``): its folds, the statistics of the inputs, the weights, and how far the block's output moves when some
linears are quantized. ``folds.py`` finds the folds. One that derives from ``ModelTransform`` has at least ``prepare``, and works below
all that: on the tensors of the model while they are read.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Protocol

from ptqcli.calibration.statistics import StatisticsRequest
from ptqcli.model.rewritten import Rewrite
from ptqcli.model.skeleton import Skeleton
from ptqcli.numerics.scheme import Scheme
from ptqcli.transforms.folded import FoldedBlock, FoldNote


class UnsuitedError(Exception):
    """Why a transform of the whole model does not suit a model, in a clause."""


class BlockTransform(Protocol):
    """Rewrites one block."""

    name: ClassVar[str]
    summary: ClassVar[str]
    needs: ClassVar[StatisticsRequest] = StatisticsRequest()

    @abstractmethod
    def apply(self, block: FoldedBlock) -> list[FoldNote]:
        """Choose scales for the block's folds and apply them; say what was chosen for each."""

    def refusal(self, scheme: Scheme) -> str | None:
        """Why it does not suit linears in this scheme, None if it does; as it stands, it does."""
        return None

    def finish(self, block: FoldedBlock) -> None:
        """Choose what depends on the weights as all transforms have left them; as it stands, nothing."""
        return

    @property
    def tries(self) -> bool:
        """Whether it tries choices out on the excerpt, for which it keeps what each module returned; as it stands, it does."""
        return True

    def learning_bytes(self, weights: int, largest: int, features: int, tokens: int) -> int:
        """Memory to learn from a block, beside the block in float32 and what its modules return; as it stands, none.

        weights: of the block's linears. largest: of its largest matrix. features: of the inputs and outputs of all its modules, for each
        of the excerpt's ``tokens``.
        """
        return 0


class ModelTransform(Protocol):
    """Rewrites the whole model before anything else looks at it.

    optional: whether the run goes on without it where it does not suit the model.
    """

    name: ClassVar[str]
    summary: ClassVar[str]

    @property
    def optional(self) -> bool:
        """As it stands, no."""
        return False

    @property
    def advice(self) -> str:
        """What to do where it does not suit; as it stands, to leave it out."""
        return f"leave {self.name} out"

    @abstractmethod
    def prepare(self, skeleton: Skeleton) -> Rewrite:
        """Which tensors change and how; none is read before it is needed. Raises UnsuitedError."""

    def notes(self, solver: str) -> list[str]:
        """What to know when the solver of this name comes behind it; as it stands, nothing."""
        return []
